"""Hostile pictures in; a clean RGB picture, or one sentence that says what is wrong, out."""

from __future__ import annotations

import hashlib
import hmac
import io
import random
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError

from .request import BadInput

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # JPEG covers the MPO that phones write into a .jpg
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 100_000_000
MAX_BYTES = 512 * 2**20
_CORNERS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
_REMEDY = "give a JPEG, PNG, WEBP, BMP, GIF or TIFF picture"


def load_image(path: str | Path) -> Image.Image:
    """The picture at `path` as 8-bit RGB: first frame, upright (EXIF), transparency on white.

    The content decides the format, never the file's name. The whole picture is decoded here, so that nothing can fail
    later. 16-bit grey is scaled to 8 bit.

    Raises BadInput for anything that is not such a picture: missing, a directory, empty, damaged, of another format, or
    above `MAX_PIXELS` pixels or `MAX_BYTES` bytes.
    """
    path = Path(path)
    data = read_bytes(path)
    if not data:
        raise BadInput(f"The picture {str(path)!r} is empty (0 bytes): copy or download it again.")
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on and raises at twice that; the limit below is the one that counts.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    raise _too_large(path, f"{width} x {height} pixels")
                opened.load()
                return _rgb(_upright(opened))
    except BadInput:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path, "hundreds of millions of pixels") from None
    except UnidentifiedImageError:
        raise BadInput(f"{str(path)!r} is not a picture that can be read: {_REMEDY}.") from None
    except MemoryError:
        raise BadInput(f"The picture {str(path)!r} does not fit into memory: make it smaller.") from None
    except Exception as error:  # decoders of damaged files raise nearly everything: OSError, SyntaxError, struct.error, ...
        detail = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise BadInput(f"The picture {str(path)!r} is damaged or unusual ({detail}): save it again as PNG or JPEG.") from error


def read_bytes(path: str | Path) -> bytes:
    """The bytes of an ordinary file of at most `MAX_BYTES`. Raises BadInput where there is none."""
    path, shown = Path(path), repr(str(path))
    try:
        if path.is_dir():
            raise BadInput(f"{shown} is a directory, not a picture: give the path of one picture file.")
        if not path.exists():
            raise BadInput(f"There is no picture at {shown}: check the path.")
        if not path.is_file():  # a pipe or a device would block or never end
            raise BadInput(f"{shown} is not an ordinary file: give the path of a picture file.")
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"The file {shown} is larger than {MAX_BYTES // 2**20} MiB: {_REMEDY} of ordinary size.")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"The picture {shown} cannot be read ({reason}): check the path and its permissions.") from error


def list_images(directory: str | Path) -> list[Path]:
    """The picture files directly in `directory`, sorted by name; hidden files are left out.

    A file counts by its suffix or, without a known one, by its content. A damaged picture is listed, so that loading it
    says what is wrong instead of leaving it out silently.

    Raises BadInput when the directory is missing, is not a directory, cannot be read or holds no picture.
    """
    directory, shown = Path(directory), repr(str(directory))
    try:
        if not directory.exists():
            raise BadInput(f"There is no directory at {shown}: check the path.")
        if not directory.is_dir():
            raise BadInput(f"{shown} is not a directory: give the directory that holds the pictures.")
        entries = sorted(directory.iterdir())
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"The directory {shown} cannot be read ({reason}): check the path and its permissions.") from error
    found = [p for p in entries if not p.name.startswith(".") and p.is_file() and _looks_like_a_picture(p)]
    if not found:
        raise BadInput(f"There is no picture in {shown}: put JPEG, PNG, WEBP, BMP, GIF or TIFF files there.")
    return found


def variants(image: Image.Image, seed: int = 0, held_out: bool = False) -> list[tuple[str, Image.Image]]:
    """Named transforms of a picture, the untouched one ("original") first.

    held_out: False gives those that training may look at, True those kept for the verdict; only "original" is in both.

    Deterministic in (image, seed); the seed chooses the corners of the crops and the noise. Every result is RGB and, but
    for crops, of the picture's size.
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
            ("flip, rotate +5", ImageOps.mirror(image).rotate(5, Image.Resampling.BICUBIC, fillcolor=edge)),
            ("slightly brighter", ImageEnhance.Brightness(image).enhance(1.15)),
            ("slightly darker", ImageEnhance.Brightness(image).enhance(0.85)),
            ("less contrast", ImageEnhance.Contrast(image).enhance(0.75)),
            ("paler", ImageEnhance.Color(image).enhance(0.8)),
            ("rotate +12", image.rotate(12, Image.Resampling.BICUBIC, fillcolor=edge)),
            ("rotate -5", image.rotate(-5, Image.Resampling.BICUBIC, fillcolor=edge)),
            ("sharper", image.filter(ImageFilter.SHARPEN)),
            ("other noise", _noisy(image, seed + 1, 8.0)),
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
        ("noise", _noisy(image, seed)),
        ("jpeg 40", recompressed(image, 40)),
        ("half size", image.resize(small, Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BILINEAR)),
    ]


def commitment(image_bytes: bytes, key: bytes) -> str:
    """HMAC-SHA256 of a picture's bytes, in hex: shows nothing of the picture to anyone without the key.

    Raises ValueError for a key under 16 bytes, which could be guessed.
    """
    if len(key) < 16:
        raise ValueError(f"the key has {len(key)} bytes; a commitment needs at least 16")
    return hmac.new(key, image_bytes, hashlib.sha256).hexdigest()


def _too_large(path: Path, size: str) -> BadInput:
    return BadInput(f"The picture {str(path)!r} has {size}, more than {MAX_PIXELS // 10**6} million: make it smaller.")


def _looks_like_a_picture(path: Path) -> bool:
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS):
                return True
    except Exception:  # as above: whatever a decoder raises, this is no picture
        return False


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block is common in good photographs, and says nothing about the pixels
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own convert() clips these at 255, which turns a 16-bit picture white.
        return Image.fromarray(_eight_bit(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _eight_bit(pixels: np.ndarray, mode: str) -> np.ndarray:
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("it has negative or undefined brightness values")
    top = values.max()
    if mode == "F" and top <= 1:
        scale = 255.0
    elif mode == "F" and top <= 255:
        scale = 1.0
    elif top <= 65535:
        scale = 1 / 257
    else:
        raise ValueError("it has more than 16 bits per pixel")
    return np.rint(values * scale).astype(np.uint8)


def _crop(image: Image.Image, share: float, anchor: tuple[float, float]) -> Image.Image:
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (round((side - kept) * a) for side, kept, a in zip(image.size, (width, height), anchor, strict=True))
    return image.crop((left, top, left + width, top + height))


def edge_colour(image: Image.Image) -> tuple[int, ...]:
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return tuple(int(v) for v in np.rint(border.mean(axis=0)))


def _noisy(image: Image.Image, seed: int, sigma: float = 12.0) -> Image.Image:
    pixels = np.asarray(image).astype(np.float64)
    noise = np.random.default_rng(abs(seed)).normal(0.0, sigma, pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8))


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")

