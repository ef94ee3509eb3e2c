"""Hostile pictures in; a clean RGB picture, or one sentence that says what is wrong, out."""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from .guards.first_read import bytes_once, once
from .guards.small_file import NotOrdinary, open_ordinary
from .pictures.pixels import upright, usable
from .request import BadInput, Request

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # JPEG covers the MPO of phones
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
)
# of pictures that nothing here decodes: left out of a directory, they would be missed by nobody
UNREAD = frozenset({".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2"})
MAX_PIXELS = 100_000_000
# 8192 x 6144 and a little, where a decoder holds a picture more than once: WEBP five times, and a
# TIFF that is to be turned twice.
MAX_COSTLY_PIXELS = 51_000_000
MAX_BYTES = 512 * 2**20
# The longer side by the shorter one. Image processors that keep the shape refuse more.
MAX_ASPECT = 200
_REMEDY = "give a JPEG, PNG, WEBP, BMP, GIF or TIFF picture"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:")  # two letters at least: C:/ is a drive
_MAX_SCANS = 64  # of a progressive JPEG: each of them goes through the whole picture
# In a TIFF's directory, where every strip and tile has some: Pillow makes an object of each.
_MAX_VALUES = 2**20
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_DIRECTORIES = (34665, 34853, 40965)  # TIFF's tags that hold the place of another directory
_AS_BYTES = (1, 2, 6, 7)  # TIFF's types of values that are read at once
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how its files begin


def load_image(path: str | Path) -> Image.Image:
    """The picture at `path` as 8-bit RGB: first frame, upright (EXIF), transparency on white, at
    most `pictures.pixels.USABLE_PIXELS` pixels.

    The content decides the format, never the file's name. The whole picture is decoded here, so
    that nothing can fail later. A picture within the bound keeps its pixels; a larger one keeps its
    shape.

    Colour profiles (ICC) are left alone: the models' own pipelines ignore them, so the deployed
    model sees the same numbers.

    Deep grey pictures (above 8 bits, or floating point) are scaled to 8 bits. White is the largest
    number of the file's type, or what its TIFF tags say: BitsPerSample below 16, SMaxSampleValue, a
    MaxSampleValue of the form 2**n - 1 (another is a statistic). Where a file says nothing and no
    number is above 4095, white is 255, 1023 or 4095: in 16 bits, all would be nearly black. PNG's
    sBIT changes nothing: its samples fill the 16 bits. Floating point: up to 1, or else up to 255,
    1023, 4095 or 65535.

    Raises BadInput for anything that is not such a picture: missing, a directory, empty, damaged,
    of another format, or with negative or undefined brightness. Also above `MAX_PIXELS` pixels
    (WEBP, and a TIFF that is to be turned: `MAX_COSTLY_PIXELS`) or `MAX_BYTES` bytes, and where one
    side is more than `MAX_ASPECT` times the other.
    """
    return picture_of(read_bytes(path), Path(path))


def picture_of(data: bytes, path: Path) -> Image.Image:
    """The picture that a file holds, as `load_image`. path: what a sentence calls it."""
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
                return upright(usable(opened, data), opened)
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
    return bytes_once(Path(path), lambda: _read(Path(path)))


def _read(path: Path) -> bytes:
    shown = repr(str(path))
    _check_local(path)
    try:
        if path.is_dir():
            raise BadInput(
                f"{shown} is a directory, not a picture: give the path of one picture file."
            )
        if not path.exists():
            raise BadInput(f"There is no picture at {shown}: check the path.")
        with open_ordinary(path) as file:
            status = os.fstat(file.fileno())
            if status.st_size > MAX_BYTES:
                raise BadInput(
                    f"The file {shown} is larger than {MAX_BYTES // 2**20} MiB: {_REMEDY} of "
                    "ordinary size."
                )
            data = file.read(status.st_size + 1)
    except NotOrdinary:
        raise BadInput(
            f"{shown} is not an ordinary file: give the path of a picture file."
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(
            f"The picture {shown} cannot be read ({reason}): check the path and its permissions."
        ) from error
    if len(data) != status.st_size:
        raise BadInput(f"The file {shown} changed while it was read: wait until it is complete.")
    return data


def list_images(directory: str | Path) -> list[Path]:
    """The picture files directly in `directory`, sorted by name; hidden files are left out.

    A file counts by its suffix or, without a known one, by its content. A picture that is damaged,
    of a format that is not read (`UNREAD`), or a link to nothing is listed, so that loading it says
    what is wrong instead of leaving it out silently.

    Raises BadInput when the directory is missing, is not a directory, cannot be read or holds no
    picture.
    """
    return list(once("pictures", Path(directory), lambda: _listed(Path(directory))))


def _listed(directory: Path) -> list[Path]:
    shown = repr(str(directory))
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
    pictures = [
        p
        for p in entries
        if not p.name.startswith(".") and (p.is_file() or _is_lost(p)) and _looks_like_a_picture(p)
    ]
    if not pictures:
        raise BadInput(
            f"There is no picture in {shown}: put JPEG, PNG, WEBP, BMP, GIF or TIFF files there."
        )
    return pictures


def load_directory(directory: str | Path | None) -> list[tuple[str, Image.Image]]:
    """A directory's pictures, each with its file name; none without a directory.

    Raises BadInput for a directory as in `list_images`, and for a damaged picture.
    """
    files = list_images(directory) if directory is not None else []
    return [(path.name, load_image(path)) for path in files]


@dataclass(frozen=True)
class Beside:
    """The pictures of a request beside its training picture, each with its file's name.

    more:  other pictures of the concept
    rest:  pictures of anything else
    notes: a sentence for each directory of which pictures were left out
    """

    more: list[tuple[str, Image.Image]]
    rest: list[tuple[str, Image.Image]]
    notes: list[str]


def beside(request: Request) -> Beside:
    """The pictures in the two directories of a request. A copy of the training picture is no other
    picture of the concept, and nothing else either: copies are left out, by their pixels. So are
    pictures that a directory holds twice, and those of `images` from `retain`.

    Raises BadInput as `load_directory`, and where a directory holds nothing but copies.
    """
    seen, notes = {content(load_image(request.image))}, []

    def others(option: str, directory: Path | None) -> list[tuple[str, Image.Image]]:
        given = load_directory(directory)
        kept = []
        for name, image in given:
            if (pixels := content(image)) not in seen:
                seen.add(pixels)
                kept.append((name, image))
        if given and not kept:
            raise BadInput(
                f"{str(directory)!r} holds nothing but copies of pictures that are given already, "
                f"of the training picture for instance: give {option} other pictures, or leave it "
                "out."
            )
        if left_out := len(given) - len(kept):
            pictures = "1 picture" if left_out == 1 else f"{left_out} pictures"
            notes.append(
                f"{pictures} of {option} left out: copies of the training picture or of others "
                "that are given."
            )
        return kept

    more = others("--images", request.images)
    return Beside(more, others("--retain", request.retain), notes)


def content(image: Image.Image) -> str:
    """SHA-256 of a picture's mode, size and pixels."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def commitment(image_bytes: bytes, key: bytes) -> str:
    """HMAC-SHA256 of a picture's bytes, in hex. It shows nothing of the picture to anyone without
    the key.

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
    turned = opened.format == "TIFF" and opened.getexif().get(Base.Orientation, 1) != 1
    (width, height), costly = opened.size, opened.format == "WEBP" or turned
    most = MAX_COSTLY_PIXELS if costly else MAX_PIXELS
    if width * height > most:
        raise _too_large(path, f"{width} x {height} pixels", most)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadInput(
            f"The picture {str(path)!r} has {width} x {height} pixels, one side more than "
            f"{MAX_ASPECT} times the other, which models cannot use: cut it."
        )


def _check_effort(data: bytes) -> None:
    """Raises ValueError for a small file that would keep its decoder busy for minutes."""
    if data[:2] == b"\xff\xd8" and _scans(data) > _MAX_SCANS:
        raise ValueError(f"it has more than {_MAX_SCANS} scans")
    if data[:2] in (b"II", b"MM") and _values(data) > _MAX_VALUES:
        raise ValueError("it lists more than a million values beside its pixels")


def _scans(data: bytes) -> int:
    """How many scans a JPEG has, up to its end or to where it is damaged."""
    scans, at = 0, 2
    while at + 4 <= len(data) and data[at] == 0xFF and (marker := data[at + 1]) != 0xD9:
        scans += marker == 0xDA
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            following = _MARKER.search(data, at)
            at = following.start() if following else len(data)
    return scans


def _values(data: bytes) -> int:
    """How many numbers a TIFF's first directory and those below it hold, bytes and letters
    aside."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    number = lambda at, size: int.from_bytes(data[at : at + size], order)
    big = 43 in data[2:4]
    size, count_at, entry = (8, 8, 20) if big else (4, 2, 12)
    values, waiting = 0, [number(8, 8) if big else number(4, 4)]
    seen: set[int] = set()
    while waiting and len(seen) < 16:
        start = waiting.pop()
        if start in seen:
            continue
        seen.add(start)
        first = start + (8 if big else 2)
        end = min(first + entry * number(start, count_at), len(data) - entry + 1)
        for at in range(first, end, entry):
            count = number(at + 4, size)
            # A file cannot hold more numbers than bytes.
            if number(at + 2, 2) not in _AS_BYTES and count <= len(data):
                values += count
            if number(at, 2) in _DIRECTORIES:
                waiting.append(number(at + 4 + size, size))
    return values


def _too_large(path: Path, size: str, most: int) -> BadInput:
    return BadInput(
        f"The picture {str(path)!r} has {size}, more than {most // 10**6} million: make it smaller."
    )


def _is_lost(path: Path) -> bool:
    """A link whose file was moved away."""
    return path.is_symlink() and not path.exists()


def _looks_like_a_picture(path: Path) -> bool:
    if path.suffix.lower() in SUFFIXES | UNREAD:
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
