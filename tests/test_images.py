"""Hostile and unusual pictures: a clean RGB picture or one sentence, never another exception."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from fastsiu import images
from fastsiu.images import commitment, list_images, load_image, variants
from fastsiu.request import BadInput


def photo(size=(64, 48), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(path):
    with pytest.raises(BadInput) as caught:
        load_image(path)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and ": " in sentence, sentence  # the fact, then the remedy
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
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]), st.floats(0, 1), st.binary(min_size=1, max_size=12))
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


def png_header_only(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


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
    exif[0x0112] = 6  # the camera was turned: the top row of the stored pixels is the right column of the picture
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
    assert len({commitment(b"picture", b"k" * 32), commitment(b"picture", b"l" * 32), commitment(b"other", b"k" * 32)}) == 3
    with pytest.raises(ValueError):
        commitment(b"picture", b"")


def test_the_verdicts_transforms_are_none_of_the_trainings():
    image = Image.merge("RGB", [Image.effect_noise((60, 48), sigma) for sigma in (40, 60, 80)])
    seen, kept = dict(variants(image, 1)), dict(variants(image, 1, held_out=True))
    assert set(seen) & set(kept) == {"original"} and len(kept) >= 12
    pixels = [made.tobytes() for made in seen.values()]
    assert sum(made.tobytes() in pixels for made in kept.values()) == 1
    assert kept["original"].tobytes() == image.tobytes()
