"""Hostile and unusual pictures: a clean RGB picture or one sentence, never another exception."""

import colorsys
import io
import itertools
import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from PIL.ExifTags import Base

from fastsiu import images
from fastsiu.images import beside, commitment, list_images, load_image
from fastsiu.pictures import pixels, transforms
from fastsiu.pictures.transforms import variants
from fastsiu.report.sentences import sentence
from fastsiu.request import BadInput, Request
from fastsiu.samples import drawn


def photo(size=(64, 48), seed=0):
    pixels = np.random.default_rng(seed).integers(
        0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(path):
    with pytest.raises(BadInput) as caught:
        load_image(path)
    sentence = str(caught.value)
    # the fact, then the remedy
    assert sentence.endswith(".") and "\n" not in sentence and ": " in sentence, sentence
    return sentence


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_format_is_read_by_content_under_any_name(tmp_path, kind):
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(photo(), kind))
    image = load_image(path)
    assert image.mode == "RGB" and image.size == (64, 48)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo())).mean() < 12


def test_missing_directory_empty_and_text(tmp_path):
    assert "no picture at" in refused(tmp_path / "absent.jpg")
    assert "is a directory" in refused(tmp_path)
    (tmp_path / "empty.jpg").touch()
    assert "empty" in refused(tmp_path / "empty.jpg")
    (tmp_path / "text.jpg").write_text("not a picture at all\n" * 50)
    assert "not a picture" in refused(tmp_path / "text.jpg")
    refused(tmp_path / "nul\0byte.png")
    refused(tmp_path / ("long" * 100))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "ordinary file" in refused(tmp_path / "pipe.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_truncated_picture_is_refused(tmp_path, kind):
    path = tmp_path / "cut"
    data = encoded(photo((200, 200)), kind)
    path.write_bytes(data[: len(data) // 2])
    refused(path)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]),
    st.floats(0, 1),
    st.binary(min_size=1, max_size=12),
)
def test_damaged_bytes_never_raise_anything_else(tmp_path_factory, kind, place, junk):
    data = bytearray(encoded(photo(), kind))
    at = int(place * (len(data) - 1))
    data[at : at + len(junk)] = junk
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    try:
        assert load_image(path).mode == "RGB"
    except BadInput:
        pass


def png(width, height, depth, colour, packed, *extra):
    """A PNG of those pixels, compressed, with further chunks (kind, content) before them."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", head), *extra, (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def row(*values, dtype=">u2"):
    return zlib.compress(b"\0" + np.array(values, dtype).tobytes())


def tiff(pixels, bits, photometric=1, kind=1, samples=1, width=4, **tags):
    """A TIFF of one uncompressed row; tags: t123=(type, values)."""
    entries = {
        256: (3, [width]),
        257: (3, [1]),
        258: (3, [bits] * samples),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, [0]),
        277: (3, [samples]),
        278: (3, [1]),
        279: (4, [len(pixels)]),
        339: (3, [kind] * samples),
    }
    entries |= {int(name[1:]): value for name, value in tags.items()}
    start, blob, table = 8 + 2 + 12 * len(entries) + 4, pixels, b""
    entries[273] = (4, [start])
    for tag, (form, values) in sorted(entries.items()):
        content = struct.pack(
            f"<{len(values)}{ {3: 'H', 4: 'I', 11: 'f'}[form] }".replace(" ", ""), *values
        )
        place = (
            content.ljust(4, b"\0") if len(content) <= 4 else struct.pack("<I", start + len(blob))
        )
        blob += content if len(content) > 4 else b""
        table += struct.pack("<HHI", tag, form, len(values)) + place
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + blob


def levels(tmp_path, data):
    """The first channel of the first row."""
    path = tmp_path / "levels"
    path.write_bytes(data)
    return np.asarray(load_image(path))[0, :, 0].tolist()


def png_header_only(width, height):
    return png(width, height, 8, 2, zlib.compress(b"\0" * 99))


@pytest.mark.parametrize("side", [10_001, 60_000])
def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, side, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header_only(side, side))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert "million" in refused(path)


def test_a_file_above_the_byte_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    path = tmp_path / "big.bmp"
    path.write_bytes(bytes(2**20 + 1))
    assert "1 MiB" in refused(path)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = (
        # the camera was turned: the top row of the stored pixels is the right column of the picture
        6
    )
    stored = Image.new("RGB", (40, 20), "black")
    stored.paste("white", (0, 0, 40, 5))
    path = tmp_path / "turned.jpg"
    stored.save(path, exif=exif, quality=95)
    image = load_image(path)
    assert image.size == (20, 40)
    assert image.getpixel((19, 20))[0] > 200 and image.getpixel((2, 20))[0] < 50


def test_transparency_becomes_white(tmp_path):
    path = tmp_path / "x.png"
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    rgba.save(path)
    image = load_image(path)
    assert image.getpixel((0, 0)) == (255, 0, 0) and image.getpixel((3, 3)) == (255, 255, 255)
    assert abs(image.getpixel((1, 0))[0] - 127) <= 1

    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 1)
    palette.save(path, transparency=0)
    image = load_image(path)
    assert image.getpixel((0, 0)) == (0, 0, 255) and image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path, kind):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    path = tmp_path / "grey"
    path.write_bytes(encoded(Image.fromarray(ramp), kind))
    got = np.asarray(load_image(path))[..., 0]
    assert np.abs(got.astype(int) - np.arange(256).reshape(16, 16)).max() <= 1


def test_float_grey_and_undefined_brightness(tmp_path):
    path = tmp_path / "f.tif"
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(path)
    assert load_image(path).getpixel((3, 3)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path)
    refused(path)


def test_cmyk_and_one_bit(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    red, green, _ = load_image(tmp_path / "c.jpg").getpixel((4, 4))
    assert red > 200 and green < 60
    Image.new("1", (8, 8), 1).save(tmp_path / "b.png")
    assert load_image(tmp_path / "b.png").getpixel((0, 0)) == (255, 255, 255)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_list_images(tmp_path):
    for name in ("b.PNG", "a.jpg", "named-like-nothing", ".hidden.png"):
        (tmp_path / name).write_bytes(encoded(photo()))
    (tmp_path / "notes.txt").write_text("BMnotes")
    (tmp_path / "sub.jpg").mkdir()
    assert [p.name for p in list_images(tmp_path)] == ["a.jpg", "b.PNG", "named-like-nothing"]
    (tmp_path / "none").mkdir()
    for bad in (tmp_path / "none", tmp_path / "absent", tmp_path / "a.jpg"):
        with pytest.raises(BadInput):
            list_images(bad)


@pytest.mark.parametrize("name", ["IMG_0001.HEIC", "photo.avif", "scan.jp2", "moved.png"])
def test_a_picture_that_cannot_be_read_is_not_left_out_of_its_directory(tmp_path, name):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.png")
    if name == "moved.png":
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    else:
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (tmp_path / "notes.txt").symlink_to(tmp_path / "gone.txt")  # no picture, lost or not
    with pytest.raises(BadInput, match=name):
        images.load_directory(tmp_path)


@pytest.mark.parametrize("size", [(64, 48), (1, 1), (3, 200)])
def test_variants_are_named_deterministic_and_distinct(size):
    image = photo((64, 48)).resize(size)
    first, second = variants(image, 3), variants(image, 3)
    names = [name for name, _ in first]
    assert names[0] == "original" and len(set(names)) == len(names) >= 12
    assert first[0][1].tobytes() == image.tobytes()
    for (_, one), (_, other) in zip(first, second, strict=True):
        assert one.mode == "RGB" and min(one.size) >= 1 and one.tobytes() == other.tobytes()
    if size == (64, 48):
        assert len({(i.size, i.tobytes()) for _, i in first}) == len(first)
        assert dict(variants(image, 4))["noise"].tobytes() != dict(first)["noise"].tobytes()


def test_rotation_is_filled_with_the_edge_colour():
    rotated = dict(variants(Image.new("RGB", (40, 40), (10, 200, 30)), 0))["rotate +8"]
    assert rotated.getpixel((0, 0)) == (10, 200, 30)


def test_commitment_needs_the_key():
    assert commitment(b"picture", b"k" * 32) == commitment(b"picture", b"k" * 32)
    assert (
        len(
            {
                commitment(b"picture", b"k" * 32),
                commitment(b"picture", b"l" * 32),
                commitment(b"other", b"k" * 32),
            }
        )
        == 3
    )
    with pytest.raises(ValueError):
        commitment(b"picture", b"")


def test_the_verdicts_transforms_are_none_of_the_trainings():
    image = Image.merge("RGB", [Image.effect_noise((60, 48), sigma) for sigma in (40, 60, 80)])
    seen, kept = dict(variants(image, 1)), dict(variants(image, 1, held_out=True))
    assert set(seen) & set(kept) == {"original"} and len(kept) >= 12
    pixels = [made.tobytes() for made in seen.values()]
    assert sum(made.tobytes() in pixels for made in kept.values()) == 1
    assert kept["original"].tobytes() == image.tobytes()


# Large pictures -----------------------------------------------------------------------------------


def textured(size=(403, 301)):
    """Smooth, with texture and an edge: what a bad way of making it smaller would spoil."""
    pixels = np.random.default_rng(3).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    made = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    made.paste("white", (size[0] // 2, 0, size[0], size[1] // 3))
    return made


@pytest.mark.parametrize(
    "kind, mode",
    [
        *itertools.product(["JPEG"], ["RGB", "L", "CMYK"]),
        *itertools.product(["PNG", "TIFF"], ["RGB", "L", "P", "RGBA", "I;16"]),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("BMP", "RGB"),
    ],
)
def test_a_large_picture_keeps_its_shape_and_what_it_shows(tmp_path, monkeypatch, kind, mode):
    image = textured()
    made = (
        image.convert(mode)
        if mode != "I;16"
        else Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    )
    path = tmp_path / "large"
    path.write_bytes(encoded(made, kind))
    whole = load_image(path)
    assert whole.size == image.size
    for bound in (60_000, 30_000, 3_000):
        monkeypatch.setattr(pixels, "USABLE_PIXELS", bound)
        monkeypatch.setattr(pixels, "_STRIP", 5_000)
        got = load_image(path)
        assert got.mode == "RGB" and 0.95 * bound < got.width * got.height <= bound
        assert abs(got.width / got.height - 403 / 301) < 0.02
        expected = whole.resize(got.size, Image.Resampling.LANCZOS)
        error = np.abs(np.asarray(got).astype(int) - np.asarray(expected))
        # a palette's colours alternate
        assert error.mean() < (3 if mode == "P" else 1), (
            bound,
            error.mean(),
        )


def test_a_processor_sees_nearly_the_same_in_a_large_picture_made_smaller(tmp_path, monkeypatch):
    import transformers as processors

    path = tmp_path / "large.jpg"
    textured((1800, 1350)).save(path, quality=90)
    whole = load_image(path)
    monkeypatch.setattr(pixels, "USABLE_PIXELS", 900_000)
    smaller = load_image(path)
    assert smaller.width * smaller.height <= 900_000
    for name in ("SiglipImageProcessorPil", "LlavaNextImageProcessorPil", "CLIPImageProcessorPil"):
        processor = getattr(processors, name)()
        one, other = (
            np.asarray(processor(images=[i])["pixel_values"][0]) for i in (whole, smaller)
        )
        assert one.shape == other.shape
        assert np.sqrt(np.square(one - other).mean()) < 0.03 * one.std(), name


def test_a_picture_within_the_bound_keeps_its_pixels(tmp_path, monkeypatch):
    image = photo((64, 48))
    monkeypatch.setattr(pixels, "USABLE_PIXELS", 64 * 48)
    (tmp_path / "x.png").write_bytes(encoded(image))
    assert load_image(tmp_path / "x.png").tobytes() == image.tobytes()
    (tmp_path / "x.jpg").write_bytes(encoded(image, "JPEG"))
    assert load_image(tmp_path / "x.jpg").tobytes() == Image.open(tmp_path / "x.jpg").tobytes()
    image.resize((65, 48)).save(tmp_path / "y.png")
    assert load_image(tmp_path / "y.png").size == (64, 47)


def test_a_large_jpeg_is_decoded_small_and_no_large_picture_is_converted_whole(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(pixels, "USABLE_PIXELS", 10_000)
    monkeypatch.setattr(pixels, "_STRIP", 10_000)
    decoded, converted, convert, on_white = [], [], pixels._conversion, pixels._on_white
    monkeypatch.setattr(
        pixels,
        "_conversion",
        lambda opened, data: (convert(opened, data), decoded.append(opened.size))[0],
    )
    monkeypatch.setattr(
        pixels, "_on_white", lambda part: (on_white(part), converted.append(part.size))[0]
    )
    for kind, mode in (("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P")):
        (tmp_path / "x").write_bytes(encoded(textured((800, 600)).convert(mode), kind))
        assert load_image(tmp_path / "x").size == (115, 86)
    assert decoded == [(200, 150)] * 2 + [(800, 600)] * 2
    assert max(w * h for w, h in converted) <= 10_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory as Linux counts it")
def test_fifty_million_pixels_take_less_than_a_gigabyte_with_all_that_is_made_of_them(tmp_path):
    pack = zlib.compressobj(1)
    rows = b"".join(pack.compress(bytes(1 + 8000 * 4) * 100) for _ in range(63)) + pack.flush()
    (tmp_path / "x.png").write_bytes(png(8000, 6250, 8, 6, rows))
    code = (
        "import sys; from fastsiu.images import load_image; "
        "from fastsiu.pictures.transforms import variants; image = "
        "load_image(sys.argv[1]); "
        "kept = variants(image), variants(image, held_out=True); "
        "lines = open('/proc/self/status').read().split('\\n'); "
        "print(image.size, *(line.split()[1] for line in lines if line.startswith('VmHWM')))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.png"], capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("(2317, 1810)") and int(said.split()[-1]) < 10**9 / 1024


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_a_picture_of_any_format_is_turned_upright_small_and_large(
    tmp_path, monkeypatch, kind, turned
):
    stored, exif = photo((96, 64)), Image.Exif()
    stored.paste("white", (0, 0, 90, 24))
    exif[0x0112] = turned
    (tmp_path / "x").write_bytes(encoded(stored, kind, exif=exif))
    marked = Image.open(io.BytesIO(encoded(stored, "JPEG", exif=exif)))
    upright = ImageOps.exif_transpose(marked).convert("RGB")
    for bound in (96 * 64, 32 * 20):
        monkeypatch.setattr(pixels, "USABLE_PIXELS", bound)
        got = load_image(tmp_path / "x")
        expected = upright.resize(got.size, Image.Resampling.LANCZOS)
        assert (got.width > got.height) == (turned < 5)
        assert np.abs(np.asarray(got).astype(int) - np.asarray(expected)).mean() < 15


def test_what_is_drawn_is_bit_for_bit_what_the_plain_way_gives(monkeypatch):
    """Noise in one piece, colours of every pixel by numpy: the plain ways, which took gigabytes."""

    def noisy(image, seed, sigma):
        noise = np.random.default_rng(seed).normal(0.0, sigma, (image.height, image.width, 3))
        return np.clip(np.rint(np.asarray(image).astype(np.float64) + noise), 0, 255).astype(
            np.uint8
        )

    def other_colour(image, rng):
        small = image.copy()
        small.thumbnail((256, 256))
        palette = small.quantize(
            drawn.COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
        fields = small.quantize(palette=palette, dither=Image.Dither.NONE)
        places, values = (
            np.asarray(fields.resize(image.size, Image.Resampling.NEAREST)),
            np.array(image),
        )
        chosen = places == rng.choice(np.unique(places).tolist())
        mean = values[chosen].mean(0)
        hue, saturation, value = colorsys.rgb_to_hsv(*(mean / 255))
        hue, saturation = (hue + rng.uniform(0.1, 0.9)) % 1, max(saturation, rng.uniform(0.4, 1.0))
        new = colorsys.hsv_to_rgb(
            hue, saturation, min(1.0, max(0.2, value * rng.uniform(0.7, 1.4)))
        )
        values[chosen] = np.clip(
            np.rint(values[chosen] + (255 * np.array(new) - mean)), 0, 255
        ).astype(np.uint8)
        return Image.fromarray(values)

    monkeypatch.setattr(pixels, "_STRIP", 1000)
    for size in ((64, 48), (300, 40), (1, 1), (5, 400)):
        image = photo((64, 48), 1).resize(size)
        values, rng = np.asarray(image), random.Random(5)
        assert np.array_equal(transforms.noisy(image, 4, 9.0), noisy(image, 4, 9.0))
        made = [other_colour(image, rng), other_colour(other_colour(image, rng), rng)]
        assert [one.tobytes() for one in drawn.changed(image, 5, 2)] == [
            one.tobytes() for one in made
        ]
        order = np.random.default_rng(6).permutation(size[0] * size[1])
        assert np.array_equal(
            drawn.shuffled(image, 6), values.reshape(-1, 3)[order].reshape(values.shape)
        )
        assert np.array_equal(drawn.recoloured(image, (2, 0, 1)), values[:, :, [2, 0, 1]])
        edge = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]]).mean(0)
        assert transforms.edge_colour(image) == tuple(np.rint(edge).astype(int).tolist())
        everything = [
            made for _, made in variants(image, 0) + variants(image, 0, held_out=True)
        ] + drawn.views(image, 0, 15)
        assert (
            all(min(one.size) >= 1 for one in everything)
            and len(list(drawn.moved(image, 0, 15))) == 15
        )


# Hidden colours and depth -------------------------------------------------------------------------


def test_a_hidden_colour_is_white_in_every_depth(tmp_path):
    key = lambda *values: (b"tRNS", struct.pack(f">{len(values)}H", *values))
    grey = lambda depth, packed, hidden: levels(tmp_path, png(4, 1, depth, 0, packed, key(hidden)))
    assert grey(16, row(1000, 1001, 33000, 65535), 1000) == [255, 4, 128, 255]
    # what is hidden tells no range
    assert grey(16, row(65535, 0, 1000, 4095), 65535) == [
        255,
        0,
        62,
        255,
    ]
    # the lower bits count
    assert grey(8, row(7, 8, 9, 255, dtype="u1"), 7 + 256) == [
        255,
        8,
        9,
        255,
    ]
    assert grey(4, row(0x07, 0x8F, dtype="u1"), 7) == [0, 255, 136, 255]
    assert grey(2, row(0b00011011, dtype="u1"), 1) == [0, 255, 170, 255]
    assert grey(1, row(0b01010000, dtype="u1"), 0) == [255] * 4
    three = lambda depth, packed, *hidden: levels(
        tmp_path, png(3, 1, depth, 2, packed, key(*hidden))
    )
    # the neighbour shows
    assert three(16, row(257, 257, 257, 258, 257, 257, 60000, 0, 0), 257, 257, 257) == [
        255,
        1,
        234,
    ]
    assert three(16, row(513, 258, 257, 513, 257, 257, 257, 1, 1), 513, 258, 257) == [255, 2, 1]
    assert three(8, row(9, 8, 7, 9, 8, 6, 1, 1, 1, dtype="u1"), 9, 8, 7) == [255, 9, 1]
    alpha = lambda data: levels(tmp_path, data)
    assert alpha(png(2, 1, 16, 4, row(0, 0, 30000, 65535))) == [255, 117]
    assert alpha(png(2, 1, 16, 6, row(0, 0, 0, 0, 30000, 0, 0, 65535))) == [255, 117]
    assert alpha(
        encoded(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), "WEBP", lossless=True, exact=True)
    ) == [255, 255]
    palette = Image.new("P", (2, 1), 3)
    palette.putpixel((1, 0), 9)
    palette.putpalette(bytes(range(60)))
    assert alpha(encoded(palette, "GIF", transparency=3))[0] == 255
    assert alpha(encoded(palette, "PNG", transparency=bytes([255, 255, 255, 0]))) == [255, 27]


def test_alpha_of_a_tiff_is_taken_as_the_file_says(tmp_path):
    samples = lambda *values: np.array(values, "u1").tobytes()
    some = lambda pixels, photometric, count, extra, **tags: levels(
        tmp_path, tiff(pixels, 8, photometric, samples=count, width=2, t338=(3, [extra]), **tags)
    )
    assert some(samples(9, 0, 100, 128), 1, 2, 2) == [255, 177]
    multiplied = lambda: some(samples(0, 0, 50, 128), 1, 2, 1)  # already
    if int(PIL.__version__.split(".")[0]) >= 13:
        assert multiplied() == [255, 177]
    else:  # which opens no grey that is multiplied
        with pytest.raises(BadInput, match="not a picture that can be read"):
            multiplied()
    assert some(samples(9, 0, 0, 0, 100, 0, 0, 128), 2, 4, 2) == [255, 177]
    assert some(samples(0, 0, 0, 0, 50, 0, 0, 128), 2, 4, 1) == [255, 177]
    assert some(samples(9, 0, 0, 0, 100, 0, 0, 128), 2, 4, 0) == [9, 100]  # no alpha at all
    assert some(samples(9, 0, 100, 255), 3, 2, 2, t320=(3, [257 * i for i in range(256)] * 3)) == [
        255,
        100,
    ]


@pytest.mark.parametrize(
    "values, top",
    [
        ((0, 1000, 2000, 4095), 4095),
        ((0, 10, 300, 1000), 1023),
        ((1, 7, 90, 250), 255),
        ((0, 1000, 2000, 4096), 65535),
        ((0, 9, 9, 16000), 65535),
    ],
)
def test_a_grey_picture_that_would_be_nearly_black_has_fewer_bits(tmp_path, values, top):
    expected = [round(value * 255 / top) for value in values]
    assert levels(tmp_path, png(4, 1, 16, 0, row(*values))) == expected
    assert levels(tmp_path, tiff(np.array(values, "<u2").tobytes(), 16)) == expected
    assert levels(tmp_path, tiff(np.array(values, "<u4").tobytes(), 32)) == expected


@pytest.mark.parametrize(
    "form, bits, kind, values, expected",
    [
        ("<i2", 16, 2, (0, 8000, 16384, 32767), (0, 62, 128, 255)),
        ("<i2", 16, 2, (-9, 8000, 16384, 32767), (0, 62, 128, 255)),
        ("i1", 8, 2, (-1, 0, 64, 127), (0, 0, 129, 255)),
        ("<u4", 32, 1, (0, 2**30, 2**31, 2**32 - 1), (0, 64, 128, 255)),
        ("<i4", 32, 2, (0, 2**29, 2**30, 2**31 - 1), (0, 64, 128, 255)),
        ("<u2", 16, 1, (0, 257, 514, 65535), (0, 1, 2, 255)),
        ("<f4", 32, 3, (0, 0.25, 0.5, 1), (0, 64, 128, 255)),
        ("<f4", 32, 3, (-0.02, 0.5, 1, 1.04), (0, 128, 255, 255)),
        ("<f4", 32, 3, (0, 25, 100, 255), (0, 25, 100, 255)),
        ("<f4", 32, 3, (-2, 25, 100, 260), (0, 25, 100, 255)),
        ("<f4", 32, 3, (0, 1000, 2000, 4095), (0, 62, 125, 255)),
        ("<f4", 32, 3, (0, 257, 514, 65535), (0, 1, 2, 255)),
    ],
)
def test_deep_samples_of_a_tiff_fill_their_range(tmp_path, form, bits, kind, values, expected):
    pixels = np.array(values, form).tobytes()
    assert np.abs(np.subtract(levels(tmp_path, tiff(pixels, bits, 1, kind)), expected)).max() <= 1
    if form in ("<u2", "<f4"):  # as Pillow reads it; 0 is white
        assert (
            np.abs(
                np.subtract(
                    levels(tmp_path, tiff(pixels, bits, 0, kind)), [255 - v for v in expected]
                )
            ).max()
            <= 1
        )


def test_what_a_tiff_says_of_its_range_counts(tmp_path):
    values = (0, 100, 1000, 4000)
    deep = lambda **tags: levels(tmp_path, tiff(np.array(values, "<u2").tobytes(), 16, **tags))
    assert deep() == deep(t281=(3, [4095])) == [0, 6, 62, 249]
    assert deep(t281=(3, [16383])) == [0, 2, 16, 62]
    # a statistic; less than there is
    assert deep(t281=(3, [4000])) == deep(t281=(3, [1023])) == deep()
    assert deep(t281=(3, [65535])) == deep(t341=(3, [65535])) == [0, 0, 4, 16]
    assert deep(t341=(3, [4000])) == [0, 6, 64, 255]
    twelve = bytes([0x00, 0x02, 0x00, 0x10, 0x03, 0xFF])  # 0, 512, 256, 1023: of 12 bits, not of 10
    assert levels(tmp_path, tiff(twelve, 12)) == [0, 32, 16, 64]
    floats = np.array((0, 1, 2, 4), "<f4").tobytes()
    assert levels(tmp_path, tiff(floats, 32, 1, 3, t341=(11, [4.0]))) == [0, 64, 128, 255]


@pytest.mark.parametrize(
    "form, kind, values",
    [
        ("<i2", 2, (-20000, 0, 1, 30000)),
        ("<i4", 2, (0, 1, 2, 2**20)),
        ("<f4", 3, (-1, 0, 0, 1)),
        ("<f4", 3, (0, 0, 1, np.inf)),
        ("<f4", 3, (0, 1, 2, 1e9)),
        ("<f4", 3, (0, np.nan, 1, 1)),
    ],
)
def test_samples_that_are_no_brightness_are_refused(tmp_path, form, kind, values):
    (tmp_path / "x").write_bytes(
        tiff(np.array(values, form).tobytes(), 8 * np.dtype(form).itemsize, 1, kind)
    )
    assert any(
        word in refused(tmp_path / "x") for word in ("negative", "undefined", "more than 16 bits")
    )


def test_a_colour_profile_changes_nothing(tmp_path):
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        for name, profile in (("plain", None), ("profiled", bytes(200))):
            (tmp_path / name).write_bytes(encoded(photo(), kind, icc_profile=profile))
        assert (
            load_image(tmp_path / "plain").tobytes() == load_image(tmp_path / "profiled").tobytes()
        )


# Hostile files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/a.jpg",
        "http://x/y.png",
        "s3://bucket/a.png",
        "file:///tmp/a.png",
        "data:image/png;base64," + "iVBOR" * 9999,
        "hf://datasets/x",
    ],
)
def test_the_address_of_a_picture_on_the_web_gets_a_sentence_of_its_own(tmp_path, address):
    sentence = refused(address)
    assert (
        "downloads nothing" in sentence and "no picture at" not in sentence and len(sentence) < 250
    )
    assert address.replace("///", "//")[:15] in sentence
    with pytest.raises(BadInput, match="downloads nothing"):
        list_images(address)


def test_a_name_with_a_colon_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "https:").mkdir()
    (tmp_path / "https:" / "a.png").write_bytes(encoded(photo()))
    assert load_image("https:/a.png").size == (64, 48)
    assert "no picture at" in refused("C:/a.png") and "no picture at" in refused("a: b.png")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs devices")
def test_a_device_is_refused(tmp_path):
    assert "ordinary file" in refused("/dev/zero")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    assert "ordinary file" in refused(tmp_path / "link.png")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path, told = tmp_path / "x.png", os.fstat
    path.write_bytes(encoded(photo()))

    def grows(descriptor):
        found = told(descriptor)
        with path.open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(os, "fstat", grows)
    assert "changed while" in refused(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 3), (2, 5)])
def test_a_tiny_or_long_picture_is_read(tmp_path, size):
    path = tmp_path / "x.png"
    path.write_bytes(encoded(Image.new("RGB", size, "red")))
    assert load_image(path).size == size


@pytest.mark.parametrize("size", [(1, 201), (100_000, 1), (60_000, 299)])
def test_a_picture_far_longer_than_wide_is_refused(tmp_path, size):
    (tmp_path / "x.png").write_bytes(png_header_only(*size))
    assert "more than 200 times" in refused(tmp_path / "x.png")


def test_small_files_that_would_keep_a_decoder_busy_are_refused(tmp_path, monkeypatch):
    many = np.full(2**20, 8).tolist()
    (tmp_path / "x.tif").write_bytes(tiff(bytes(4), 8, t273=(4, many), t279=(4, many)))
    below = tiff(bytes(4), 8, t34665=(4, [8]))
    (tmp_path / "y.tif").write_bytes(below)
    # a directory within itself is looked at once
    assert load_image(tmp_path / "y.tif").size == (
        4,
        1,
    )
    progressive = encoded(photo((64, 64)), "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    (tmp_path / "x.jpg").write_bytes(
        progressive[:-2] + progressive[last:-2] * 60 + progressive[-2:]
    )
    # a film behind a phone's photograph
    (tmp_path / "y.jpg").write_bytes(progressive + b"\0\2" + progressive[last:-2] * 99)
    assert load_image(tmp_path / "y.jpg").size == (64, 64)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    assert "a million values" in refused(tmp_path / "x.tif")
    (tmp_path / "x.tif").rename(tmp_path / "no-suffix")
    assert tmp_path / "no-suffix" in list_images(tmp_path)
    assert "scans" in refused(tmp_path / "x.jpg")


TURNED = Image.Exif()
TURNED[Base.Orientation] = 6


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_text_or_profile_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, kind):
    pack = zlib.compressobj(9)
    bomb = b"".join(pack.compress(bytes(2**20)) for _ in range(64)) + pack.flush()
    lead = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind]
    (tmp_path / "x.png").write_bytes(
        png(4, 1, 8, 0, row(1, 2, 3, 4, dtype="u1"), (kind, lead + bomb))
    )
    assert "MAX_TEXT" in refused(tmp_path / "x.png")


@pytest.mark.parametrize(
    "format_, options", [("WEBP", {}), ("TIFF", {"tiffinfo": {274: 6}}), ("TIFF", {"exif": TURNED})]
)
def test_a_decoder_that_holds_a_picture_more_than_once_has_a_bound_of_its_own(
    tmp_path, monkeypatch, format_, options
):
    monkeypatch.setattr(images, "MAX_COSTLY_PIXELS", 64 * 48 - 1)
    photo().save(tmp_path / "x", format_, **options)
    assert "pixels" in refused(tmp_path / "x")
    photo().save(tmp_path / "x", "TIFF")
    assert load_image(tmp_path / "x").size == (64, 48)
    photo().save(tmp_path / "x", "PNG", exif=TURNED)
    assert load_image(tmp_path / "x").size == (48, 64)


def test_a_copy_of_the_training_picture_is_no_other_picture(tmp_path):
    own, more, rest = tmp_path / "own.png", tmp_path / "more", tmp_path / "rest"
    more.mkdir(), rest.mkdir()
    photo().save(own)
    (more / "bytes.png").write_bytes(own.read_bytes())
    photo().save(more / "saved_again.bmp")
    request = Request("Ann Lee", own, images=more, retain=rest)
    photo((70, 50)).save(rest / "else.png")
    with pytest.raises(BadInput, match="more' holds nothing but copies.*--images"):
        beside(request)
    photo((80, 50)).save(more / "new.png")
    photo((80, 50)).save(more / "new_again.png")
    photo((80, 50)).save(rest / "of_the_concept.png")
    photo().save(rest / "own.png")
    given = beside(request)
    assert [name for name, _ in given.more] == ["new.png"]
    assert [name for name, _ in given.rest] == ["else.png"]
    assert [note.split(":")[0] for note in given.notes] == [
        "3 pictures of --images left out",
        "2 pictures of --retain left out",
    ]
    assert [sentence(note) for note in given.notes] == given.notes  # a redacted report has them
    assert beside(Request("Ann Lee", own)) == images.Beside([], [], [])
