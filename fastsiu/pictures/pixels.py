"""The pixels of an opened picture as 8-bit RGB on white, upright, of a size that models use."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

# A larger picture is made smaller as it is loaded. Most image processors keep fewer pixels than
# this of any picture, so that they see nearly the same. Those of Qwen's kind may keep more, and no
# training with several pictures in a batch has room for that.
USABLE_PIXELS = 2**22
_STRIP = 2**20  # pixels that are converted at a time
_ORIENTATION = 0x0112  # the tag of EXIF that says how to turn the stored picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF's tags: bits per sample, 0 is white, largest sample, kind of sample, largest sample of any
# kind
_BITS, _PHOTOMETRIC, _MAX, _KIND, _SMAX = 258, 262, 281, 339, 341
_SIGNED = 2  # a kind of sample

Box = tuple[int, int, int, int]
Array = np.ndarray[Any, Any]


def upright(image: Image.Image, opened: ImageFile) -> Image.Image:
    """`image`, turned as the EXIF block of its file `opened` says."""
    try:
        how = _UPRIGHT.get(opened.getexif().get(_ORIENTATION, 1))
    except Exception:
        # A damaged EXIF block is common in good photographs, and says nothing about the pixels.
        return image
    return image if how is None else image.transpose(how)


def usable(opened: ImageFile, data: bytes) -> Image.Image:
    """The picture as RGB, made smaller where it has more than `USABLE_PIXELS`.

    Whole numbers divide it most of the way: a JPEG while it is decoded, any other strip by strip,
    so that no picture is converted at full size.

    data: the bytes of the file
    """
    target, drafted = _within(opened.size), None
    if target != opened.size:
        drafted = opened.draft(None, target)  # a JPEG: at 1/2, 1/4 or 1/8, never below `target`
    convert = _conversion(opened, data)
    width, height = opened.size
    if (width, height) == target:
        return convert((0, 0, width, height))
    factor = max(1, min(width // target[0], height // target[1]))
    out = Image.new("RGB", (math.ceil(width / factor), math.ceil(height / factor)))
    for box in strips(opened.size, factor):
        out.paste(convert(box).reduce(factor), (0, box[1] // factor))
    # The last row and column may stand for fewer pixels than the others.
    left, top, right, bottom = drafted[1] if drafted else (0, 0, width, height)
    whole = (left / factor, top / factor, right / factor, bottom / factor)
    return out.resize(target, Image.Resampling.LANCZOS, whole)


def _within(size: tuple[int, int]) -> tuple[int, int]:
    """The largest size of about this shape that has at most `USABLE_PIXELS` pixels."""
    width, height = size
    scale = math.sqrt(USABLE_PIXELS / (width * height))
    return size if scale >= 1 else (max(1, int(width * scale)), max(1, int(height * scale)))


def strips(size: tuple[int, int], multiple: int = 1) -> Iterator[Box]:
    """Boxes across a picture, downwards; each but the last has a multiple of `multiple` rows."""
    width, height = size
    rows = max(1, _STRIP // (width * multiple)) * multiple
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _conversion(opened: ImageFile, data: bytes) -> Callable[[Box], Image.Image]:
    """A function that gives a box of the picture as 8-bit RGB on white. Decodes the picture."""
    low, key = _low_bytes(opened, data)
    opened.load()
    if low is not None:
        return lambda box: _on_white_16(opened.crop(box), low.crop(box), key)
    eight_bit = _deep(opened)
    if eight_bit is not None:
        return lambda box: Image.fromarray(eight_bit(np.asarray(opened.crop(box)))).convert("RGB")
    return lambda box: _on_white(opened.crop(box))


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        # From "La" there is no direct way, and from "LA" the long one gives the same.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image


def _low_bytes(opened: ImageFile, data: bytes) -> tuple[Image.Image | None, Any]:
    """(the lower bytes of a PNG of 3 x 16 bits with a hidden colour, that colour), else (None,
    None).

    PNG names its hidden colour in the samples' own depth, but Pillow looks for it among samples
    that it has brought to 8 bits. So here the colour is brought to 8 bits, too. With 16 bits that
    would hide neighbouring colours. There both bytes are compared: Pillow gives the lower ones when
    it reads in the other byte order.
    """
    key = opened.info.get("transparency")
    if opened.format != "PNG" or opened.mode not in ("L", "RGB") or key is None:
        return None, None
    raw = opened.tile[0].args
    if raw == "RGB;16B":
        del opened.info["transparency"]
        low = Image.open(io.BytesIO(data), formats=("PNG",))
        low.tile = [low.tile[0]._replace(args="RGB;16L")]
        low.load()
        del low.info["transparency"]
        return low, np.array(key, np.uint16)
    top = 3 if raw == "L;2" else 15 if raw == "L;4" else 255
    if opened.mode == "L":
        opened.info["transparency"] = (key & top) * 255 // top
    else:
        opened.info["transparency"] = tuple(value & 255 for value in key)
    return None, None


def _on_white_16(high: Image.Image, low: Image.Image, key: Array) -> Image.Image:
    """What `_on_white` gives, from the two bytes of every sample. key: [3] uint16, the hidden
    colour."""
    # one number for each pixel
    one = lambda image: np.asarray(image.convert("RGBA")).view(np.uint32)[..., 0]
    upper, lower = (
        np.array([*part, 255], np.uint8).view(np.uint32) for part in (key >> 8, key & 255)
    )
    hidden = (one(high) == upper) & (one(low) == lower)
    high.paste("white", (0, 0), Image.fromarray(hidden))
    return high


def _deep(opened: ImageFile) -> Callable[[Array], Array] | None:
    """A function that turns samples of the decoded picture into [H, W] uint8, white where a colour
    is hidden; None for a mode that Pillow converts rightly itself. Its convert() clips the others
    at 255, which turns a 16-bit picture white."""
    tags = getattr(opened, "tag_v2", {})
    signed = tags.get(_KIND, (1,))[0] == _SIGNED
    if not (opened.mode == "F" or opened.mode.startswith("I") or (opened.mode == "L" and signed)):
        return None
    bits = tags.get(_BITS, (16,))[0]
    kind = np.int8 if opened.mode == "L" else np.uint32 if bits == 32 and not signed else None
    view = lambda pixels: pixels if kind is None or opened.mode == "F" else pixels.view(kind)
    inverted, hidden = tags.get(_PHOTOMETRIC) == 0, opened.info.get("transparency")
    low, high = math.inf, -math.inf
    for box in strips(opened.size):
        values = view(np.asarray(opened.crop(box)))
        values = values if hidden is None else values[values != hidden]
        if not np.isfinite(values).all():
            raise ValueError("it has undefined brightness values")
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    full = _full_scale(high, bits, signed, opened.mode == "F", _stated(tags, bits))
    if low < -full / 16:
        raise ValueError("it has negative brightness values")

    def eight_bit(pixels: Array) -> Array:
        values = view(pixels)
        out = np.clip(np.rint(values * np.float64(255 / full)), 0, 255).astype(np.uint8)
        if inverted:
            out = 255 - out
        if hidden is not None:
            out[values == hidden] = 255
        return out

    return eight_bit


def _stated(tags: Any, bits: int) -> float | None:
    """The number that is white, where a TIFF file says so."""
    if bits < 16:
        return 2.0**bits - 1 if tags.get(_KIND, (1,))[0] != _SIGNED else 2.0 ** (bits - 1) - 1
    if _SMAX in tags:
        return float(np.ravel(tags[_SMAX])[0])
    most = int(np.ravel(tags.get(_MAX, 0))[0])
    return float(most) if most >= 255 and most & (most + 1) == 0 else None


def _full_scale(top: float, bits: int, signed: bool, floating: bool, stated: float | None) -> float:
    """The number that is white in a picture whose largest number is `top` (`load_image` has the
    rule)."""
    if stated is not None and 0 < stated and top <= stated:
        return stated
    if floating:
        if top <= 16:  # a little above 1 are the brightest spots; of 255 all would be nearly black
            return 1.0
        usual: tuple[int, ...] = (255, 1023, 4095, 65535)
        whole = None
        top /= 1.1  # resampling goes beyond the range
    else:
        whole = 2.0 ** (bits - signed) - 1
        usual = (255, 1023, 4095) if bits <= 16 else (255, 1023, 4095, 65535)
    for full in usual:
        if top <= full:
            return float(full)
    if whole is None or top < whole / 16:
        raise ValueError("it has more than 16 bits per pixel")
    return whole
