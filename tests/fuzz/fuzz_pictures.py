"""Pictures of all formats: what is loaded is 8-bit RGB within the bound, or BadInput of one
sentence is raised."""

from __future__ import annotations

import io
import random
import struct
import tempfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastsiu import images
from fastsiu.pictures import pixels
from fastsiu.request import BadInput

ALLOWED = (BadInput,)
FOLDER = tempfile.TemporaryDirectory(prefix="fastsiu-fuzz-")
PATH = Path(FOLDER.name) / "picture"
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F")
OPTIONS = {
    "JPEG": ({}, {"progressive": True}),
    "PNG": ({}, {"transparency": 0}),
    "WEBP": ({}, {"lossless": True}),
    "BMP": ({},),
    "GIF": ({}, {"interlace": False, "transparency": 0}),
    "TIFF": (
        {},
        {"compression": "tiff_lzw"},
        {"compression": "tiff_deflate"},
        {"compression": "jpeg"},
    ),
}
# libtiff writes past its memory where JPEG is asked for in another mode.
JPEG_IN_TIFF = ("L", "RGB", "CMYK", "YCbCr")


@cache
def seeds(name: str) -> list[bytes]:
    """Every format in every mode that it has, small and turned, and some with several frames."""
    exif = Image.Exif()
    exif[0x0112] = 6
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture, found = Image.fromarray(colours).resize((28, 20), Image.Resampling.BILINEAR), []
    for kind, several in OPTIONS.items():
        for mode in MODES:
            for options in several:
                made = (
                    picture.convert("L").convert("I").convert(mode)
                    if mode[0] == "I"
                    else picture.convert(mode)
                )
                if options.get("compression") == "jpeg" and mode not in JPEG_IN_TIFF:
                    continue
                try:
                    buffer = io.BytesIO()
                    made.save(buffer, kind, exif=exif, **options)
                    Image.open(io.BytesIO(buffer.getvalue())).load()
                except (
                    OSError,
                    ValueError,
                    TypeError,
                    KeyError,
                    RuntimeError,
                    UnidentifiedImageError,
                ):
                    continue  # Pillow does not write this mode in this format
                found.append(buffer.getvalue())
        if kind in ("PNG", "WEBP", "GIF", "TIFF"):
            buffer = io.BytesIO()
            picture.save(buffer, kind, save_all=True, append_images=[picture.rotate(180)])
            found.append(buffer.getvalue())
    raw = zlib.compress((b"\0" + colours.astype(">u2").tobytes()[:42]) * 5)
    for colour, hidden in ((0, 2), (2, 6)):
        head = struct.pack(">IIBBBBB", 7 if colour else 21, 5, 16, colour, 0, 0, 0)
        found.append(
            png([(b"IHDR", head), (b"tRNS", bytes(hidden)), (b"IDAT", raw), (b"IEND", b"")])
        )
    return found


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    body = (
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c))
        for kind, c in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def mutate(name: str, data: bytes, rng: random.Random) -> bytes:
    """A PNG with right checksums after the damage; of all others the sizes and lists near the
    beginning are damaged."""
    if data[:4] == b"\x89PNG":
        chunks = []
        at = 8
        while at + 12 <= len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
            at += 12 + size
        if not chunks:
            return data
        for _ in range(rng.choice((1, 1, 2))):
            i = rng.randrange(len(chunks))
            kind, content = chunks[i]
            what = rng.choice(("byte", "byte", "pixels", "kind", "repeat", "drop"))
            if what == "byte" and content:
                where = rng.randrange(len(content))
                content = (
                    content[:where]
                    + rng.choice((b"\0", b"\xff", b"\x10", rng.randbytes(1)))
                    + content[where + 1 :]
                )
            elif what == "pixels":
                kind, content = b"IDAT", zlib.compress(rng.randbytes(2) * rng.randrange(1, 5000))
            elif what == "kind":
                kind = rng.choice(
                    (
                        b"tRNS",
                        b"PLTE",
                        b"iCCP",
                        b"eXIf",
                        b"zTXt",
                        b"acTL",
                        b"fcTL",
                        b"fdAT",
                        b"IDAT",
                        b"sBIT",
                    )
                )
            elif what == "repeat":
                chunks[i:i] = [chunks[i]] * rng.choice((1, 2, 2000))
            else:
                content = b""
            chunks[i] = kind, content
        return png(chunks)
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 3))):
        size, at = rng.choice((1, 2, 4)), rng.randrange(max(1, min(len(out), 256)))
        number = rng.choice(
            (
                0,
                1,
                2,
                3,
                5,
                8,
                16,
                32,
                255,
                256,
                4000,
                9999,
                16383,
                65535,
                2**24,
                2**31 - 1,
                2**32 - 1,
            )
        )
        out[at : at + size] = (number % 256**size).to_bytes(size, rng.choice(("little", "big")))
    return bytes(out)


def read_picture(data: bytes) -> None:
    PATH.write_bytes(data)
    try:
        made = images.load_image(PATH)
    except BadInput as error:
        text = str(error)
        assert (
            text.endswith(".")
            and ": " in text
            and text.isprintable()
            and len(text) < len(str(PATH)) + 300
        ), text
        assert "does not fit into memory" not in text, (
            "more memory than a picture within the limits may take"
        )
        raise
    assert made.mode == "RGB" and 1 <= made.width * made.height <= pixels.USABLE_PIXELS, (
        made.mode,
        made.size,
    )


TARGETS = {"pictures": read_picture}
