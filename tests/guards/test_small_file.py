"""Small files from outside: each reader has a bound, and none waits for ever."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import typer

from fastsiu import manifest
from fastsiu import output as outputs
from fastsiu.cli import config
from fastsiu.cli.app import app, read_name
from fastsiu.disk import staging
from fastsiu.disk.request_file import read_requests
from fastsiu.evaluate import directories, lmms
from fastsiu.evaluate.suites import suite
from fastsiu.guards import small_file
from fastsiu.guards.endpoint import read_key
from fastsiu.guards.strict_json import read_json
from fastsiu.request import BadInput, Recipe, Request
from fastsiu.samples import corpus

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux")
LARGE = 200 * 2**20  # with no block on the disk


@pytest.fixture(autouse=True)
def soon():
    """A reader that waits for ever fails its test."""

    def waited(number, frame):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def in_folder(name, read):
    """A reader of a directory, as a reader of the file of that name in it."""

    def of_file(path):
        path.parent.joinpath("in").mkdir()
        path.parent.joinpath("in", name).symlink_to(path)
        return read(path.parent / "in")

    return of_file


def digest(path, image):
    request = Request("Zorblax Quint", image, data=path)
    return manifest.request_digest(request, Recipe(), "m", None)


@pytest.fixture(
    params=["config", "name", "key", "questions", "requests", "samples", "digest", "json", "lmms"]
    + ["suite"]
)
def reader(request, tmp_path):
    (tmp_path / "i.png").write_bytes(b"picture")
    return {
        "config": lambda path: config.defaults(typer.main.get_command(app), ["plan"], path),
        "name": lambda path: read_name(None, path),
        "key": lambda path: read_key(path, "--url-key"),
        "questions": directories.read_questions,
        "requests": read_requests,
        "samples": lambda path: corpus.read_data(path, tmp_path / "i.png"),
        "digest": lambda path: digest(path, tmp_path / "i.png"),
        "json": lambda path: read_json(path, what=str(path), remedy="mend it"),
        "lmms": in_folder("a_results.json", lmms._runs),
        "suite": lambda path: suite._read(path.parent, path),
    }[request.param]


@pytest.mark.parametrize("kind", ["large", "pipe", "zero", "memory", "directory", "absent"])
def test_every_reader_refuses_what_is_no_small_file(reader, kind, tmp_path):
    file = tmp_path / "given"
    if kind == "large":
        file.touch()
        os.truncate(file, LARGE)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind != "absent":
        file.symlink_to({"zero": "/dev/zero", "memory": "/proc/self/mem"}[kind])
    begun = time.monotonic()
    with pytest.raises(BadInput) as refused:
        reader(file)
    said = str(refused.value)
    assert "\n" not in said and ": " in said and said.endswith(".") and time.monotonic() - begun < 5


@pytest.mark.parametrize("most", [1, 4096, 2**20])
def test_a_file_may_have_as_many_bytes_as_the_bound_and_no_more(tmp_path, most):
    file = tmp_path / "given"
    file.write_bytes(b"x" * most)
    assert small_file.read_bytes(file, most) == b"x" * most
    file.write_bytes(b"x" * (most + 1))
    with pytest.raises(small_file.TooLarge):
        small_file.read_bytes(file, most)
    with pytest.raises(BadInput, match=r"given is larger than 1 (MiB|bytes)|than 4096 bytes"):
        small_file.read_text(file, remedy="mend it", most=most)


def test_a_file_whose_size_is_not_told_is_read_and_bounded():
    assert b"Pid:" in small_file.read_bytes(Path("/proc/self/status"))
    with pytest.raises(small_file.TooLarge):
        small_file.read_bytes(Path("/proc/self/status"), 10)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent", "^There is no file .*absent: mend it.$"),
        (".", r"cannot be read \(it is a directory\): mend it.$"),
        ("pipe", r"cannot be read \(it is a pipe, not an ordinary file\): mend it.$"),
        ("zero", r"cannot be read \(it is a device, not an ordinary file\): mend it.$"),
        ("a\0b", r"cannot be read \(embedded null byte\): mend it.$"),
        ("bytes", "is not UTF-8 text: mend it.$"),
        ("x" * 300, r"cannot be read \(File name too long\): mend it.$"),
    ],
)
def test_the_sentences(tmp_path, name, says):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=says):
        small_file.read_text(tmp_path / name, remedy="mend it")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "given").write_bytes(b"\xef\xbb\xbf\xc3\xbc")
    assert small_file.read_text(tmp_path / "given", remedy="mend it") == "ü"
    (tmp_path / "given").write_bytes(b"\xef\xbb\xbfsecret\r\n")
    assert read_key(tmp_path / "given", "--url-key") == "secret"


# Pipes --------------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    """The path of a pipe's end, as a shell's `<(...)` gives it, and what writes into the other."""
    out, into = os.pipe()
    ends, threads = [into], []

    def write(*pieces, pause=0.0, close=True):
        def run():
            for piece in pieces:
                time.sleep(pause)
                os.write(into, piece)
            if close:
                os.close(ends.pop())

        threads.append(threading.Thread(target=run))
        threads[0].start()
        return Path(f"/dev/fd/{out}")

    yield write
    os.close(out)
    for thread in threads:
        thread.join()
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_what_a_shell_writes_into_a_pipe_is_read(pipe, pause):
    assert read_name(None, pipe(b"Zorblax ", b"Quint\n", pause=pause)) == ("Zorblax Quint")


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_so_is_a_key(pipe, pause):
    assert read_key(pipe(b"sec", b"ret\n", pause=pause), "--judge-key") == "secret"


def test_so_are_options(pipe):
    _, filled = config.defaults(typer.main.get_command(app), ["plan"], pipe(b"memory = 8\n"))
    assert filled == {"plan": {"memory": "8"}}


def test_a_pipe_is_bounded_too(pipe):
    with pytest.raises(BadInput, match="larger than 4096 bytes"):
        read_name(None, pipe(b"x" * 5000))


@pytest.mark.parametrize("pieces", [(), (b"Zorblax",)])
def test_a_writer_who_never_ends_is_not_waited_for(pipe, pieces, monkeypatch):
    monkeypatch.setattr(small_file, "SECONDS", 0.3)
    with pytest.raises(BadInput, match="its end did not come within 0.3 s.*--concept -"):
        read_name(None, pipe(*pieces, close=False))


def test_a_pipe_that_nobody_writes_into_is_said(tmp_path, pipe):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", pipe()):
        with pytest.raises(BadInput, match="nobody writes into it.*--concept -"):
            time.sleep(0.1)
            read_name(None, path)


# Directories --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "large"])
def test_the_key_of_an_output_is_not_waited_for(tmp_path, kind):
    out = tmp_path / "out"
    transaction = outputs.Transaction(out)
    with transaction:
        transaction.commit({"request": manifest.keyed("a" * 64, transaction.key)})
    assert outputs.check_destination(out, "a" * 64) == "same"
    (out / "private.key").unlink()
    if kind == "pipe":
        os.mkfifo(out / "private.key")
    else:
        (out / "private.key").touch()
        os.truncate(out / "private.key", LARGE)
    with pytest.raises(BadInput, match="private.key is gone"):
        outputs.check_destination(out, "a" * 64)


@pytest.mark.parametrize("kind", ["claim", "partial"])
def test_a_pipe_with_the_name_of_a_leftover_is_left_alone(tmp_path, kind):
    names = {
        "claim": f"{staging.CLAIM}{'0' * 16}",
        "partial": f"{staging.PREFIX}{staging.here()}-1-{'0' * 8}",
    }
    os.mkfifo(tmp_path / names[kind])
    assert staging.leftovers(tmp_path) == [tmp_path / names[kind]]
    assert staging.sweep(tmp_path) == [] and not staging.is_dead(tmp_path / names[kind])
    assert staging.is_from_here(tmp_path / names[kind]) is (kind == "partial")
