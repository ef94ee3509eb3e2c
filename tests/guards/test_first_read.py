"""What a run reads more than once is what it was at first; outside of a run every read is new."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from fastsiu.guards import first_read
from fastsiu.guards.first_read import first_reads_count, once
from fastsiu.images import list_images, load_image, read_bytes
from fastsiu.request import BadInput


def test_a_picture_and_a_directory_stay_as_they_were_read(tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    file = place / "one.png"
    Image.new("RGB", (6, 4), "red").save(file)
    with first_reads_count():
        data, names = read_bytes(str(file)), list_images(place)
        list_images(place).clear()  # whoever has the list may change it
        Image.new("RGB", (5, 5), "blue").save(file)
        assert load_image(file).size == (6, 4)
        shutil.rmtree(place)
        with first_reads_count():
            assert read_bytes(file) == data
        assert list_images(str(place)) == names == [file]
    with pytest.raises(BadInput, match="There is no picture"):
        read_bytes(file)


def test_what_could_not_be_read_is_read_again(tmp_path):
    with first_reads_count():
        with pytest.raises(BadInput):
            read_bytes(tmp_path / "late.png")
        (tmp_path / "late.png").write_bytes(b"here")
        assert read_bytes(tmp_path / "late.png") == b"here"


def test_what_is_read_from_one_path_in_two_ways_is_kept_apart(tmp_path):
    with first_reads_count():
        assert once("a", tmp_path, lambda: 1) == 1 and once("b", tmp_path, lambda: 2) == 2
        assert once("a", tmp_path, lambda: 3) == 1
    assert once("a", tmp_path, lambda: 3) == 3


def test_no_more_than_so_much_is_held_and_what_is_not_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(first_read, "HELD", 10)
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, size in zip(files, (6, 7, 4), strict=True):
        file.write_bytes(bytes([size]) * size)
    with first_reads_count():
        first = [read_bytes(file) for file in files]
        files[0].unlink()
        assert [read_bytes(file) for file in files] == first
        files[2].write_bytes(b"other")
        assert read_bytes(files[2]) == first[2]  # held: 6 and 4 bytes
        files[1].write_bytes(b"changed")
        with pytest.raises(BadInput, match="has changed since this run read it first"):
            read_bytes(files[1])
    assert read_bytes(files[1]) == b"changed"
