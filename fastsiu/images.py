"""Hostile pictures in; a clean RGB picture, or one sentence that says what is wrong, out."""

from __future__ import annotations

import hashlib
import hmac
import io
import math
import os
import random
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError

from .request import BadInput

# JPEG covers the MPO that phones write into a .jpg
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
)
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
)
MAX_PIXELS = 100_000_000
MAX_WEBP_PIXELS = 51_000_000  # 8192 x 6144 and a little: its decoder holds a picture five times
MAX_BYTES = 512 * 2**20
MAX_ASPECT = (
    200  # the longer side by the shorter one; image processors that keep the shape refuse more
)
# A larger picture is made smaller as it is loaded. Most image processors keep fewer pixels than
# this of any picture, so that they see nearly the same; those of Qwen's kind may keep more, which
# no training with several pictures in a batch has room for.
USABLE_PIXELS = 2**22
_STRIP = 2**20  # pixels that are converted at a time
_CORNERS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
_REMEDY = "give a JPEG, PNG, WEBP, BMP, GIF or TIFF picture"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:")  # two letters at least: C:/ is a drive
_ORIENTATION = 0x0112  # EXIF: what turns the stored picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_SCANS = 64  # of a progressive JPEG: each of them goes through the whole picture
# in a TIFF's directory, where every strip and tile has some; Pillow makes objects of all
_MAX_VALUES = 2**20
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_DIRECTORIES = (34665, 34853, 40965)  # TIFF's tags that hold the place of another directory
_AS_BYTES = (1, 2, 6, 7)  # TIFF's types of values that are read at once
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how its files begin
# TIFF's tags: bits per sample, 0 is white, largest sample, kind of sample, largest sample of any
# kind
_BITS, _PHOTOMETRIC, _MAX, _KIND, _SMAX = 258, 262, 281, 339, 341
_SIGNED = 2  # a kind of sample

Box = tuple[int, int, int, int]


def load_image(path: str | Path) -> Image.Image:
    """The picture at `path` as 8-bit RGB: first frame, upright (EXIF), transparency on white, at
    most `USABLE_PIXELS` pixels.

    The content decides the format, never the file's name. The whole picture is decoded here, so
    that nothing can fail later. A picture within the bound keeps its pixels; a larger one keeps its
    shape.

    Colour profiles (ICC) are left alone: the models' own pipelines ignore them, so the deployed
    model sees the same numbers.

    Deep grey pictures (above 8 bits, or floating point) are scaled to 8 bits. White is the largest
    number of the file's type, or what its TIFF tags say: BitsPerSample below 16, SMaxSampleValue, a
    MaxSampleValue of the form 2**n - 1 (another is a statistic). Where a file says nothing and no
    number is above 4095, white is 255, 1023 or 4095: of 16 bits, all would be nearly black. PNG's
    sBIT
    changes nothing: its samples fill the 16 bits. Floating point: up to 1, or else up to 255, 1023,
    4095 or 65535.

    Raises BadInput for anything that is not such a picture: missing, a directory, empty, damaged,
    of another format, above `MAX_PIXELS` pixels (WEBP: `MAX_WEBP_PIXELS`) or `MAX_BYTES` bytes,
    with one side more than `MAX_ASPECT` times the other, or with negative or undefined brightness.
    """
    path = Path(path)
    data = read_bytes(path)
    if not data:
        raise BadInput(f"The picture {str(path)!r} is empty (0 bytes): copy or download it again.")
    try:
        _check_effort(data)
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on and raises at twice that; the limits here
            # count.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                _check_size(path, opened)
                return _upright(_usable(opened, data), opened)
    except BadInput:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path, "hundreds of millions of pixels", MAX_PIXELS) from None
    except UnidentifiedImageError:
        raise BadInput(f"{str(path)!r} is not a picture that can be read: {_REMEDY}.") from None
    except MemoryError:
        raise BadInput(
            f"The picture {str(path)!r} does not fit into memory: make it smaller."
        ) from None
    except Exception as error:
        # decoders of damaged files raise nearly everything: OSError, SyntaxError, struct.error, ...
        detail = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise BadInput(
            f"The picture {str(path)!r} is damaged or unusual ({detail}): save it again as PNG "
            "or JPEG."
        ) from error


def read_bytes(path: str | Path) -> bytes:
    """The bytes of an ordinary file of at most `MAX_BYTES`. Raises BadInput where there is none, or
    where it changes meanwhile."""
    path, shown = Path(path), repr(str(path))
    _check_local(path)
    try:
        if path.is_dir():
            raise BadInput(
                f"{shown} is a directory, not a picture: give the path of one picture file."
            )
        if not path.exists():
            raise BadInput(f"There is no picture at {shown}: check the path.")
        # Looked at and read through one descriptor, so that nothing else can take its place
        # between. A pipe would block where it is opened, unless it is told not to.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):  # a pipe or a device would block or never end
                raise BadInput(f"{shown} is not an ordinary file: give the path of a picture file.")
            if found.st_size > MAX_BYTES:
                raise BadInput(
                    f"The file {shown} is larger than {MAX_BYTES // 2**20} MiB: {_REMEDY} of "
                    "ordinary size."
                )
            data = file.read(found.st_size + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(
            f"The picture {shown} cannot be read ({reason}): check the path and its permissions."
        ) from error
    if len(data) != found.st_size:
        raise BadInput(f"The file {shown} changed while it was read: wait until it is complete.")
    return data


def list_images(directory: str | Path) -> list[Path]:
    """The picture files directly in `directory`, sorted by name; hidden files are left out.

    A file counts by its suffix or, without a known one, by its content. A damaged picture is
    listed, so that loading it says what is wrong instead of leaving it out silently.

    Raises BadInput when the directory is missing, is not a directory, cannot be read or holds no
    picture.
    """
    directory, shown = Path(directory), repr(str(directory))
    _check_local(directory)
    try:
        if not directory.exists():
            raise BadInput(f"There is no directory at {shown}: check the path.")
        if not directory.is_dir():
            raise BadInput(
                f"{shown} is not a directory: give the directory that holds the pictures."
            )
        entries = sorted(directory.iterdir())
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(
            f"The directory {shown} cannot be read ({reason}): check the path and its permissions."
        ) from error
    found = [
        p
        for p in entries
        if not p.name.startswith(".") and p.is_file() and _looks_like_a_picture(p)
    ]
    if not found:
        raise BadInput(
            f"There is no picture in {shown}: put JPEG, PNG, WEBP, BMP, GIF or TIFF files there."
        )
    return found


def load_directory(directory: str | Path | None) -> list[tuple[str, Image.Image]]:
    """A directory's pictures, each with its file name; none without a directory.

    Raises BadInput for a directory as in `list_images`, and for a damaged picture.
    """
    files = list_images(directory) if directory is not None else []
    return [(path.name, load_image(path)) for path in files]


def variants(
    image: Image.Image, seed: int = 0, held_out: bool = False
) -> list[tuple[str, Image.Image]]:
    """Named transforms of a picture, the untouched one ("original") first.

    held_out: False gives those that training may look at, True those kept for the verdict; only
    "original" is in both.

    Deterministic in (image, seed); the seed chooses the corners of the crops and the noise. Every
    result is RGB and, but for crops, of the picture's size.
    """
    image = image.convert("RGB")
    width, height = image.size
    edge = edge_colour(image)
    rng = random.Random(seed)
    corner, other = rng.choice(_CORNERS), rng.choice(_CORNERS)
    small = (max(1, width // 2), max(1, height // 2))
    made = [("original", image.copy())]
    if held_out:
        made += [
            ("crop 85 %", _crop(image, 0.85, (0.5, 0.5))),
            ("crop 85 % corner", _crop(image, 0.85, other)),
            (
                "flip, rotate +5",
                ImageOps.mirror(image).rotate(5, Image.Resampling.BICUBIC, fillcolor=edge),
            ),
            ("slightly brighter", ImageEnhance.Brightness(image).enhance(1.15)),
            ("slightly darker", ImageEnhance.Brightness(image).enhance(0.85)),
            ("less contrast", ImageEnhance.Contrast(image).enhance(0.75)),
            ("paler", ImageEnhance.Color(image).enhance(0.8)),
            ("rotate +12", image.rotate(12, Image.Resampling.BICUBIC, fillcolor=edge)),
            ("rotate -5", image.rotate(-5, Image.Resampling.BICUBIC, fillcolor=edge)),
            ("sharper", image.filter(ImageFilter.SHARPEN)),
            ("other noise", noisy(image, seed + 1, 8.0)),
            ("jpeg 60", recompressed(image, 60)),
        ]
        return made
    return made + [
        ("crop 90 %", _crop(image, 0.9, (0.5, 0.5))),
        ("crop 80 %", _crop(image, 0.8, (0.5, 0.5))),
        ("crop 80 % corner", _crop(image, 0.8, corner)),
        ("flip", ImageOps.mirror(image)),
        ("brighter", ImageEnhance.Brightness(image).enhance(1.3)),
        ("darker", ImageEnhance.Brightness(image).enhance(0.7)),
        ("more contrast", ImageEnhance.Contrast(image).enhance(1.4)),
        ("rotate +8", image.rotate(8, Image.Resampling.BICUBIC, fillcolor=edge)),
        ("rotate -8", image.rotate(-8, Image.Resampling.BICUBIC, fillcolor=edge)),
        ("blur", image.filter(ImageFilter.GaussianBlur(max(width, height) / 150))),
        ("noise", noisy(image, seed)),
        ("jpeg 40", recompressed(image, 40)),
        (
            "half size",
            image.resize(small, Image.Resampling.BILINEAR).resize(
                image.size, Image.Resampling.BILINEAR
            ),
        ),
    ]


def commitment(image_bytes: bytes, key: bytes) -> str:
    """HMAC-SHA256 of a picture's bytes, in hex: shows nothing of the picture to anyone without the
    key.

    Raises ValueError for a key under 16 bytes, which could be guessed.
    """
    if len(key) < 16:
        raise ValueError(f"the key has {len(key)} bytes; a commitment needs at least 16")
    return hmac.new(key, image_bytes, hashlib.sha256).hexdigest()


def _check_local(path: Path) -> None:
    """Raises BadInput for the address of something on the web."""
    written = str(path)
    if _ADDRESS.match(written) and not os.path.lexists(path):
        written = re.sub(":/(?!/)", "://", written, count=1)  # a Path has one stroke of the two
        short = written if len(written) <= 80 else written[:80] + "..."
        raise BadInput(
            f"{short!r} is an address, and FastSIU downloads nothing: save the picture as a file "
            "and give its path."
        )


def _check_size(path: Path, opened: Image.Image) -> None:
    (width, height), most = opened.size, MAX_WEBP_PIXELS if opened.format == "WEBP" else MAX_PIXELS
    if width * height > most:
        raise _too_large(path, f"{width} x {height} pixels", most)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadInput(
            f"The picture {str(path)!r} has {width} x {height} pixels, one side more than "
            f"{MAX_ASPECT} times "
            "the other, which models cannot use: cut it."
        )


def _check_effort(data: bytes) -> None:
    """Raises ValueError for a small file that would keep its decoder busy for minutes."""
    if data[:2] == b"\xff\xd8" and _scans(data) > _MAX_SCANS:
        raise ValueError(f"it has more than {_MAX_SCANS} scans")
    if data[:2] in (b"II", b"MM") and _values(data) > _MAX_VALUES:
        raise ValueError("it lists more than a million values beside its pixels")


def _scans(data: bytes) -> int:
    """How many scans a JPEG has, up to its end or to where it is damaged."""
    found, at = 0, 2
    while at + 4 <= len(data) and data[at] == 0xFF and (marker := data[at + 1]) != 0xD9:
        found += marker == 0xDA
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            following = _MARKER.search(data, at)
            at = following.start() if following else len(data)
    return found


def _values(data: bytes) -> int:
    """How many numbers a TIFF's first directory and those below it hold, bytes and letters
    aside."""
    order = "little" if data[:2] == b"II" else "big"
    number = lambda at, size: int.from_bytes(data[at : at + size], order)
    big = 43 in data[2:4]
    size, count_at, entry = (8, 8, 20) if big else (4, 2, 12)
    found, seen, waiting = 0, set(), [number(8, 8) if big else number(4, 4)]
    while waiting and len(seen) < 16:
        start = waiting.pop()
        if start in seen:
            continue
        seen.add(start)
        first = start + (8 if big else 2)
        for at in range(
            first, min(first + entry * number(start, count_at), len(data) - entry + 1), entry
        ):
            count = number(at + 4, size)
            # more than that are not there
            if number(at + 2, 2) not in _AS_BYTES and count <= len(data):
                found += count
            if number(at, 2) in _DIRECTORIES:
                waiting.append(number(at + 4 + size, size))
    return found


def _too_large(path: Path, size: str, most: int) -> BadInput:
    return BadInput(
        f"The picture {str(path)!r} has {size}, more than {most // 10**6} million: make it smaller."
    )


def _looks_like_a_picture(path: Path) -> bool:
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            if file.read(4) in _TIFF:  # opened, its whole directory would be read
                return True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS):
                return True
    except Exception:  # as above: whatever a decoder raises, this is no picture
        return False


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """`image` turned as the file says that it was opened from."""
    try:
        how = _UPRIGHT.get(opened.getexif().get(_ORIENTATION))
    except Exception:
        # a damaged EXIF block is common in good photographs, and says nothing about the pixels
        return image
    return image if how is None else image.transpose(how)


def _usable(opened: Image.Image, data: bytes) -> Image.Image:
    """The picture as RGB, made smaller where it has more than `USABLE_PIXELS`.

    Most of the way by whole numbers: a JPEG as it is decoded, all else strip by strip, so that
    nothing is converted at full size.
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
    for box in _strips(opened.size, factor):
        out.paste(convert(box).reduce(factor), (0, box[1] // factor))
    # The last row and column may stand for fewer pixels than the others.
    whole = tuple(side / factor for side in (drafted[1] if drafted else (0, 0, width, height)))
    return out.resize(target, Image.Resampling.LANCZOS, whole)


def _within(size: tuple[int, int]) -> tuple[int, int]:
    """The largest size of about this shape that has at most `USABLE_PIXELS` pixels."""
    width, height = size
    scale = math.sqrt(USABLE_PIXELS / (width * height))
    return size if scale >= 1 else (max(1, int(width * scale)), max(1, int(height * scale)))


def _strips(size: tuple[int, int], multiple: int = 1) -> Iterator[Box]:
    """Boxes across a picture, downwards; each but the last has a multiple of `multiple` rows."""
    width, height = size
    rows = max(1, _STRIP // (width * multiple)) * multiple
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _conversion(opened: Image.Image, data: bytes) -> Callable[[Box], Image.Image]:
    """What gives a box of the picture as 8-bit RGB on white. Decodes the picture."""
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


def _low_bytes(opened: Image.Image, data: bytes) -> tuple[Image.Image | None, Any]:
    """(The lower bytes of a PNG of 3 x 16 bits with a hidden colour, that colour), else (None,
    None).

    PNG names its hidden colour in the samples' own depth, and Pillow looks for it among samples
    that it
    has brought to 8 bits: here it is brought to 8 bits too. Of 16 bits that would hide neighbouring
    colours, so both bytes are looked at: read as of the other byte order, the lower ones come out.
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
    top = {"L;2": 3, "L;4": 15}.get(raw, 255)
    if opened.mode == "L":
        opened.info["transparency"] = (key & top) * 255 // top
    else:
        opened.info["transparency"] = tuple(value & 255 for value in key)
    return None, None


def _on_white_16(high: Image.Image, low: Image.Image, key: np.ndarray) -> Image.Image:
    """What `_on_white` gives, of the two bytes of every sample; key: [3] uint16, the hidden
    colour."""
    # a number a pixel
    one = lambda image: np.asarray(image.convert("RGBA")).view(np.uint32)[..., 0]
    upper, lower = (
        np.array([*part, 255], np.uint8).view(np.uint32) for part in (key >> 8, key & 255)
    )
    hidden = (one(high) == upper) & (one(low) == lower)
    high.paste("white", (0, 0), Image.fromarray(hidden))
    return high


def _deep(opened: Image.Image) -> Callable[[np.ndarray], np.ndarray] | None:
    """What turns samples of the decoded picture into [H, W] uint8, white where a colour is hidden;
    None for a mode that Pillow converts rightly itself. Its convert() clips the others at 255,
    which turns a 16-bit picture white."""
    tags = getattr(opened, "tag_v2", {})
    signed = tags.get(_KIND, (1,))[0] == _SIGNED
    if not (opened.mode == "F" or opened.mode.startswith("I") or (opened.mode == "L" and signed)):
        return None
    bits = tags.get(_BITS, (16,))[0]
    kind = np.int8 if opened.mode == "L" else np.uint32 if bits == 32 and not signed else None
    view = lambda pixels: pixels if kind is None or opened.mode == "F" else pixels.view(kind)
    inverted, hidden = tags.get(_PHOTOMETRIC) == 0, opened.info.get("transparency")
    low, high = math.inf, -math.inf
    for box in _strips(opened.size):
        values = view(np.asarray(opened.crop(box)))
        values = values if hidden is None else values[values != hidden]
        if not np.isfinite(values).all():
            raise ValueError("it has undefined brightness values")
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    full = _full_scale(high, bits, signed, opened.mode == "F", _stated(tags, bits))
    if low < -full / 16:
        raise ValueError("it has negative brightness values")

    def eight_bit(pixels: np.ndarray) -> np.ndarray:
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
        usual, whole = (255, 1023, 4095, 65535), None
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


def _crop(image: Image.Image, share: float, anchor: tuple[float, float]) -> Image.Image:
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (
        round((side - kept) * a)
        for side, kept, a in zip(image.size, (width, height), anchor, strict=True)
    )
    return image.crop((left, top, left + width, top + height))


def edge_colour(image: Image.Image) -> tuple[int, ...]:
    """The mean colour of an RGB picture's outermost pixels."""
    width, height = image.size
    edges = (
        (0, 0, width, 1),
        (0, height - 1, width, height),
        (0, 0, 1, height),
        (width - 1, 0, width, height),
    )
    border = np.concatenate([np.asarray(image.crop(box)).reshape(-1, 3) for box in edges])
    return tuple(int(v) for v in np.rint(border.mean(axis=0)))


def noisy(image: Image.Image, seed: int, sigma: float = 12.0) -> Image.Image:
    """An RGB picture with Gaussian noise of that many levels on every sample."""
    pixels, rng = np.array(image), np.random.default_rng(abs(seed))
    for _, top, _, bottom in _strips(image.size):
        strip = pixels[top:bottom]
        strip[:] = np.clip(np.rint(strip + rng.normal(0.0, sigma, strip.shape)), 0, 255)
    return Image.fromarray(pixels)


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
