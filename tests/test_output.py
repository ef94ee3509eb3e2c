"""The output is complete or absent: refusals, the no-op, failures, and a real kill -9 at many moments."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastsiu import output
from fastsiu.output import (
    Transaction,
    check_destination,
    digest_file,
    digest_model,
    manifest,
    random_directory,
    request_digest,
    write_reports,
)
from fastsiu.request import BadInput, NumericFailure, Recipe, Request

ROOT = Path(__file__).resolve().parents[1]
DIGEST = "d" * 64


def described(key, **changes):
    given = {
        "recipe": Recipe(), "origins": {"lr": "command line"}, "model_id": "demo", "revision": None, "weights": {},
        "digest": DIGEST, "key": key, "pictures": {"concept": b"secret picture"}, "masks": {"tokens_masked": 3},
    }  # fmt: skip
    return manifest(**{**given, **changes})


def written(path, digest=DIGEST):
    transaction = Transaction(path)
    with transaction as staging:
        (staging / "adapter_model.safetensors").write_bytes(b"weights" * 100)
        (staging / "deep").mkdir()
        (staging / "deep" / "file").write_text("x")
        transaction.commit(described(transaction.key, digest=digest))
    return path


def partials(directory):
    return sorted(p.name for p in directory.iterdir() if ".partial-" in p.name)


def test_a_complete_output_and_the_no_op(tmp_path):
    out = tmp_path / "out"
    assert check_destination(out, DIGEST) == "free" and not out.exists()
    written(out)
    assert sorted(p.name for p in out.iterdir()) == ["adapter_model.safetensors", "deep", "manifest.json", "private.key"]
    assert partials(tmp_path) == []
    assert check_destination(out, DIGEST) == "same" and check_destination(str(out) + "/", DIGEST) == "same"
    stored = json.loads((out / "manifest.json").read_text())
    weights = out / "adapter_model.safetensors"
    assert stored["files"][weights.name] == {"bytes": 700, "sha256": digest_file(weights)}
    assert set(stored["files"]) == {"adapter_model.safetensors", "deep/file"}
    if os.name != "nt":
        assert (out / "private.key").stat().st_mode & 0o077 == 0


def test_everything_else_that_exists_is_refused(tmp_path):
    def refused(path, words, digest=DIGEST):
        with pytest.raises(BadInput, match=words) as caught:
            check_destination(path, digest)
        assert str(caught.value).endswith("choose another --output.") or "create it" in str(caught.value)

    out = written(tmp_path / "out")
    refused(out, "another request", "e" * 64)
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not a directory")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    refused(tmp_path / "full", "not a result of FastSIU")
    (tmp_path / "full" / "manifest.json").write_text("[1]")
    refused(tmp_path / "full", "not a result of FastSIU")
    refused(tmp_path / "absent" / "out", "does not exist")
    refused(tmp_path / "file" / "out", "does not exist|cannot be used")
    refused(tmp_path / "nul\0", "NUL")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "dangling", "not a directory")
    (out / "adapter_model.safetensors").write_bytes(b"short")
    refused(out, "was changed")
    (out / "private.key").unlink()
    refused(out, "private.key is gone")


def test_an_empty_directory_is_free_and_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert check_destination(tmp_path / "out", DIGEST) == "free"
    assert check_destination(written(tmp_path / "out"), DIGEST) == "same"


def test_a_parent_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(BadInput, match="cannot be written"):
        check_destination(tmp_path / "out", DIGEST)
    with pytest.raises(BadInput, match="cannot be written"), Transaction(tmp_path / "absent" / "out"):
        pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), Transaction(tmp_path / "out") as staging:
        (staging / "f").write_text("x")
        assert partials(tmp_path) and not (tmp_path / "out").exists()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_a_commit_creates_nothing(tmp_path):
    with Transaction(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_never_reaches_a_file(tmp_path, number):
    transaction = Transaction(tmp_path / "out")
    with pytest.raises(NumericFailure), transaction:
        transaction.commit(described(transaction.key, masks={"x": number}))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NumericFailure):
        write_reports(tmp_path, {"concept": "c", "verdict": "forgotten", "seconds": {"load": number}})


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    transaction = Transaction(out)
    with pytest.raises(BadInput, match="appeared"), transaction:
        out.mkdir()
        (out / "precious").write_text("x")
        transaction.commit(described(transaction.key))
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "precious").read_text() == "x"


def test_commit_is_refused_twice_and_outside_the_block(tmp_path):
    transaction = Transaction(tmp_path / "out")
    with pytest.raises(RuntimeError):
        transaction.commit({})
    with transaction:
        transaction.commit(described(transaction.key))
        with pytest.raises(RuntimeError):
            transaction.commit({})
    assert check_destination(tmp_path / "out", DIGEST) == "same"


def test_the_manifest_is_the_last_file_and_the_rename_the_last_step(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(output, "_sync", lambda path: steps.append(("sync", path.name)))
    plain_write, plain_rename = output._write, os.rename
    monkeypatch.setattr(output, "_write", lambda p, *a, **k: (steps.append(("write", p.name)), plain_write(p, *a, **k)))
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append(("rename", Path(b).name)), plain_rename(a, b)))
    written(tmp_path / "out")
    at = steps.index(("write", "manifest.json"))
    assert {("sync", "adapter_model.safetensors"), ("sync", "file"), ("sync", "private.key"), ("sync", "deep")} <= set(steps[:at])
    assert [kind for kind, _ in steps[at:]] == ["write", "sync", "rename", "sync"]
    assert steps[-1] == ("sync", tmp_path.name)


CHILD = """
import sys, time
from pathlib import Path
from fastsiu import output
transaction = output.Transaction(Path(sys.argv[1]))
with transaction as staging:
    for i in range(40):
        (staging / f"shard-{i}").write_bytes(bytes(100_000))
    print("staged", flush=True)
    if sys.argv[2] == "staged":
        time.sleep(60)
    transaction.commit({"request": output._keyed("d" * 64, transaction.key)})
    print("done", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["staged", "commit", "done"])
def test_kill_9_from_outside_leaves_the_output_absent_or_complete(tmp_path, moment):
    out = tmp_path / "out"
    for delay in (0.0,) if moment != "commit" else (0.0, 0.003, 0.01, 0.03):
        child = subprocess.Popen([sys.executable, "-c", CHILD, out, moment], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert any(line.strip() == ("done" if moment == "done" else "staged") for line in child.stdout)
            time.sleep(delay)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
        assert out.exists() if moment == "done" else moment == "commit" or not out.exists()
        assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] in ([], ["out"])
        if out.exists():
            assert check_destination(out, DIGEST) == "same"
            assert len(list(out.glob("shard-*"))) == 40 and partials(tmp_path) == []
            shutil.rmtree(out)
        else:
            assert len(partials(tmp_path)) == 1  # the next run cleans up, so they never add up
    written(out)
    assert partials(tmp_path) == []


# Dies by SIGKILL just before its k-th system call that opens, syncs or renames, for every k there is.
SWEEP = """
import os, signal, sys
from pathlib import Path
from fastsiu import output
for k in range(1000):
    out = Path(sys.argv[1]) / str(k) / "out"
    out.parent.mkdir()
    child = os.fork()
    if not child:
        left = k
        def deadly(call):
            def wrapped(*args, **options):
                global left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)
            return wrapped
        for name in ("open", "fsync", "rename", "mkdir"):
            setattr(os, name, deadly(getattr(os, name)))
        transaction = output.Transaction(out)
        with transaction as staging:
            (staging / "a").write_bytes(b"abc")
            (staging / "deep").mkdir()
            (staging / "deep" / "b").write_bytes(b"abc")
            transaction.commit({"request": output._keyed("d" * 64, transaction.key)})
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_before_every_system_call_leaves_the_output_absent_or_complete(tmp_path):
    subprocess.run([sys.executable, "-c", SWEEP, tmp_path], cwd=ROOT, check=True, timeout=60)
    runs = sorted(tmp_path.iterdir(), key=lambda p: int(p.name))
    assert len(runs) > 15
    complete = []
    for run in runs:
        out = run / "out"
        complete.append(out.exists())
        if out.exists():
            assert check_destination(out, DIGEST) == "same" and (out / "deep" / "b").read_bytes() == b"abc"
        assert len(list(run.iterdir())) <= 1
    assert complete == sorted(complete) and not complete[0] and complete[-1]


@pytest.mark.skipif(output.fcntl is None, reason="needs file locks")
def test_only_dead_leftovers_of_the_same_output_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone, alive_id = dead.pid, os.getppid()
    for name in (f".out.partial-{gone}-ab", f".other.partial-{gone}-ab", f".out.partial-{alive_id}-ab", ".out.partial-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text("x")
    recycled = tmp_path / f".out.partial-{os.getpid()}-ab"  # in containers a dead run often had this run's process id
    recycled.mkdir()
    with Transaction(tmp_path / "out") as alive:
        assert not recycled.exists()
        assert not (tmp_path / f".out.partial-{gone}-ab").exists()
        assert len(partials(tmp_path)) == 4
        with Transaction(tmp_path / "out") as second:  # the same process id, yet alive
            assert alive.exists() and second.exists()
    assert len(partials(tmp_path)) == 3


def test_the_manifest_says_where_values_came_from_and_hides_the_picture():
    stored = described(b"k" * 32)
    assert stored["recipe"]["lr"] == {"value": 2e-4, "from": "command line"}
    assert stored["recipe"]["beta"] == {"value": 0.75, "from": "default"}
    assert {"python", "torch", "transformers", "peft", "fastsiu"} <= set(stored["versions"]) and stored["versions"]["fastsiu"]
    text = json.dumps(stored)
    for secret in (DIGEST, output._sha256(b"secret picture"), str(ROOT)):
        assert secret not in text
    assert described(b"l" * 32)["pictures"] != stored["pictures"] and described(b"l" * 32)["request"] != stored["request"]
    for bad in ({"lr": "somewhere"}, {"learning_rate": "default"}):
        with pytest.raises(ValueError):
            described(b"k" * 32, origins=bad)


def test_the_digest_depends_on_content_and_not_on_paths(tmp_path):
    for name, data in (("a.jpg", b"one"), ("copy.jpg", b"one"), ("b.jpg", b"two")):
        (tmp_path / name).write_bytes(data)
    request = Request("Zorblax", tmp_path / "a.jpg", aliases=("Z", "Quint"))
    base = request_digest(request, Recipe(), "m", "r")
    assert base == request_digest(replace(request, image=tmp_path / "copy.jpg", aliases=("Quint", "Z")), Recipe(), "m", "r")
    others = [
        request_digest(replace(request, image=tmp_path / "b.jpg"), Recipe(), "m", "r"),
        request_digest(replace(request, concept="Other"), Recipe(), "m", "r"),
        request_digest(replace(request, images=tmp_path), Recipe(), "m", "r"),
        request_digest(replace(request, data=tmp_path / "b.jpg"), Recipe(), "m", "r"),
        request_digest(request, Recipe(steps=61), "m", "r"),
        request_digest(request, Recipe(), "m2", "r"),
        request_digest(request, Recipe(), "m", None),
        request_digest(request, Recipe(), "m", "r", quantize="nf4"),
        request_digest(request, Recipe(), "m", "r", weights={"model.safetensors": "a"}),
        request_digest(request, Recipe(), "m", "r", weights={"model.safetensors": "b"}),
    ]
    assert len({base, *others}) == 11
    with pytest.raises(BadInput):
        request_digest(replace(request, image=tmp_path / "absent.jpg"), Recipe(), "m", "r")


def test_random_directory_is_free_and_creates_nothing(tmp_path):
    names = {random_directory(tmp_path).name for _ in range(50)}
    assert len(names) == 50 and all(n.startswith("fastsiu-") for n in names) and list(tmp_path.iterdir()) == []


def test_digest_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "README.md").write_text("x")
    assert digest_model(tmp_path) == {"model.safetensors": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}


def test_a_model_file_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="nowhere' cannot be read"):
        digest_model(tmp_path / "nowhere")


def test_reports_are_written_even_with_broken_characters(tmp_path):
    write_reports(tmp_path, {"concept": "Zoë \ud83d", "verdict": "forgotten", "model": "m"})
    assert json.loads((tmp_path / "report.json").read_bytes())["concept"] == "Zoë \ud83d"
    for name in ("report.md", "report.html"):
        assert "Zoë" in (tmp_path / name).read_text(encoding="utf-8")
