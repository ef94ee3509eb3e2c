"""The output is complete or absent: refusals, the no-op, failures, and a real kill -9 at many
moments."""

import errno
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

from fastsiu import cli
from fastsiu import manifest as manifests
from fastsiu.disk import staging
from fastsiu.manifest import sha256
from fastsiu.model import vlm
from fastsiu.output import (
    Transaction,
    check_destination,
    digest_file,
    digest_model,
    manifest,
    random_directory,
    request_digest,
    reserved,
    write_reports,
)
from fastsiu.request import BadInput, NumericFailure, Recipe, Request

ROOT = Path(__file__).resolve().parents[1]
DIGEST = "d" * 64


def described(key, **changes):
    given = {
        "recipe": Recipe(),
        "origins": {"lr": "command line"},
        "model_id": "demo",
        "revision": None,
        "weights": {},
        "digest": DIGEST,
        "key": key,
        "pictures": {"concept": b"secret picture"},
        "masks": {"tokens_masked": 3},
    }
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
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_model.safetensors",
        "deep",
        "manifest.json",
        "private.key",
    ]
    assert partials(tmp_path) == []
    assert (
        check_destination(out, DIGEST) == "same"
        and check_destination(str(out) + "/", DIGEST) == "same"
    )
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
        assert str(caught.value).endswith("choose another --output.") or "create it" in str(
            caught.value
        )

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
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(BadInput, match="cannot be written"):
        check_destination(tmp_path / "out", DIGEST)
    with (
        pytest.raises(BadInput, match="cannot be written"),
        Transaction(tmp_path / "absent" / "out"),
    ):
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
        write_reports(
            tmp_path, {"concept": "c", "verdict": "forgotten", "seconds": {"load": number}}
        )


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
    monkeypatch.setattr(staging, "sync", lambda path: steps.append(("sync", path.name)))
    plain_write, plain_rename = staging.write, os.rename
    monkeypatch.setattr(
        staging,
        "write",
        lambda p, *a, **k: (steps.append(("write", p.name)), plain_write(p, *a, **k)),
    )
    monkeypatch.setattr(
        os, "rename", lambda a, b: (steps.append(("rename", Path(b).name)), plain_rename(a, b))
    )
    written(tmp_path / "out")
    at = steps.index(("write", "manifest.json"))
    assert {
        ("sync", "adapter_model.safetensors"),
        ("sync", "file"),
        ("sync", "private.key"),
        ("sync", "deep"),
    } <= set(steps[:at])
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
    transaction.commit({"request": output.keyed("d" * 64, transaction.key)})
    print("done", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["staged", "commit", "done"])
@pytest.mark.slow
def test_kill_9_from_outside_leaves_the_output_absent_or_complete(tmp_path, moment):
    out = tmp_path / "out"
    for delay in (0.0,) if moment != "commit" else (0.0, 0.003, 0.01, 0.03):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, out, moment], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert any(
                line.strip() == ("done" if moment == "done" else "staged") for line in child.stdout
            )
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


# Dies by SIGKILL just before its k-th system call that opens, syncs or renames, for every k there
# is.
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
            transaction.commit({"request": output.keyed("d" * 64, transaction.key)})
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
            assert (
                check_destination(out, DIGEST) == "same"
                and (out / "deep" / "b").read_bytes() == b"abc"
            )
        assert len(list(run.iterdir())) <= 1
    assert complete == sorted(complete) and not complete[0] and complete[-1]


HOLD = """
import sys, time
from pathlib import Path
from fastsiu.disk.staging import Staging, claim
with Staging(Path(sys.argv[1])) as path, claim(Path(sys.argv[1]), "key") as mine:
    (path / "f").write_text("x")
    print(mine, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process with a staging directory and a claim in `tmp_path`."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline().strip() == "True"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


@pytest.mark.skipif(staging.fcntl is None, reason="needs file locks")
def test_the_next_run_removes_what_killed_runs_left_whatever_they_wrote(tmp_path, holder):
    """Of any output, with any process id: what is dead has no lock."""
    dead = f"{staging.PREFIX}{staging.here()}-"
    (tmp_path / f"{dead}{os.getppid()}-00000000").mkdir()
    (tmp_path / f"{dead}{os.getppid()}-00000000" / "f").write_text("x")
    (tmp_path / f"{dead}1-11111111").write_text("a file")
    kept = [
        ".fastsiu.partial-x",
        ".other.partial-1-00000000",
        f"{dead}1-00000000.txt",
        ".fastsiu.claim-notes",
    ]
    for name in kept:  # not ours
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    (tmp_path / f"{dead}1-22222222").symlink_to(tmp_path / "elsewhere")
    kept += ["elsewhere", f"{dead}1-22222222"]
    with Transaction(tmp_path / "out") as own:
        alive = {p.name for p in tmp_path.iterdir()} - set(kept) - {own.name}
        assert len(alive) == 2  # the other process's staging directory and claim
        with Transaction(tmp_path / "out") as second:  # the same process, yet alive
            assert own.exists() and second.exists()
    holder.kill()
    holder.wait()
    assert len(staging.sweep(tmp_path)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    assert (tmp_path / "elsewhere" / "precious").read_text() == "x"


OTHERS = (f"{staging.PREFIX}00000000-1-00000000", f"{staging.PREFIX}1-00000000")
OF_EARLIER_VERSIONS = ".fastsiu-0123456789ab.partial-1-00000000"


@pytest.mark.skipif(staging.fcntl is None, reason="needs file locks")
@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("name", [*OTHERS, OF_EARLIER_VERSIONS])
def test_what_another_machine_is_at_stays_for_a_day(tmp_path, monkeypatch, name, locks):
    """Its lock looks free from here, and its process id is none of ours."""
    if not locks:
        monkeypatch.setattr(
            staging.fcntl, "flock", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "no"))
        )
    old, young = tmp_path / name, tmp_path / "young"
    (old / "deep").mkdir(parents=True)
    (old / "deep" / "f").write_text("x")
    past = time.time() - staging.LONG_AGO - 60
    os.utime(old, (past, past))
    assert staging.sweep(tmp_path) == [] and not staging.is_dead(old)  # a file in it is young
    for path in (old / "deep" / "f", old / "deep"):
        os.utime(path, (past, past))
    assert staging.sweep(tmp_path) == [old] and not young.exists()


@pytest.mark.skipif(staging.fcntl is None, reason="needs file locks")
def test_a_claim_of_another_machine_stays_for_a_day(tmp_path):
    path = tmp_path / f"{staging.CLAIM}0123456789abcdef"
    path.write_bytes(b"00000000")
    assert staging.sweep(tmp_path) == [] and not staging.is_from_here(path)
    past = time.time() - staging.LONG_AGO - 60
    os.utime(path, (past, past))
    assert staging.sweep(tmp_path) == [path]


@pytest.mark.skipif(staging.fcntl is None, reason="needs file locks")
def test_on_a_file_system_without_locks_nothing_young_is_removed(tmp_path, monkeypatch):
    path = tmp_path / f"{staging.PREFIX}{staging.here()}-999999999-00000000"
    path.mkdir()
    refuse = lambda *a: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "no"))
    monkeypatch.setattr(staging.fcntl, "flock", refuse)
    assert staging.sweep(tmp_path) == []


@pytest.mark.skipif(staging.fcntl is None, reason="needs file locks")
def test_what_is_left_in_a_directory_of_several_results_is_found_from_beside_it(tmp_path):
    name = f"{staging.PREFIX}{staging.here()}-1-00000000"
    for folder in ("suite", "other"):
        (tmp_path / folder / name).mkdir(parents=True)
    (tmp_path / "suite" / "suite.json").write_text("{}")
    (tmp_path / "other" / "mine").write_text("x")
    (tmp_path / "begun" / name).mkdir(parents=True)  # killed before it wrote anything else
    assert check_destination(tmp_path / "out", DIGEST) == "free"
    assert not (tmp_path / "suite" / name).exists() and (tmp_path / "other" / name).exists()
    assert list((tmp_path / "begun").iterdir()) == []


@pytest.mark.skipif(staging.fcntl is None, reason="needs file locks")
def test_a_claim_is_one_process_s_and_a_dead_one_s_is_free(tmp_path, holder):
    with staging.claim(tmp_path, "key") as mine, staging.claim(tmp_path, "another") as other:
        assert not mine and other
    holder.kill()
    holder.wait()
    with staging.claim(tmp_path, "key") as mine, staging.claim(tmp_path, "key") as again:
        assert mine and not again
    with staging.claim(tmp_path, "key", wait=True) as mine:
        assert mine
    staging.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


RESERVE = """
import sys, time
from fastsiu.output import reserved
with reserved(sys.argv[1], "d" * 64) as found:
    print(found, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(staging.fcntl is None, reason="needs file locks")
def test_of_two_runs_on_one_output_the_second_is_told_before_its_work(tmp_path):
    out = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", RESERVE, out], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline().strip() == "free"
        with pytest.raises(BadInput, match="Another run is writing to") as error:
            with reserved(out, DIGEST):
                pytest.fail("the second run began its work")
        assert "choose another --output" in str(error.value)
        with pytest.raises(BadInput, match="Another run"), reserved(out, "e" * 64):
            pytest.fail("a run of another request began its work")
        with reserved(tmp_path / "another", DIGEST) as found:
            assert found == "free"
        assert not out.exists()
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    assert len(list(tmp_path.iterdir())) == 1  # what the killed run leaves
    with reserved(out, DIGEST) as found:  # whose lock is free, and whose file is gone afterwards
        assert found == "free"
        written(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with reserved(out, DIGEST) as found, reserved(out, DIGEST) as again:
        assert found == again == "same"  # nothing is written, so nobody waits


def test_a_run_that_ended_between_two_looks_is_not_repeated(tmp_path, monkeypatch):
    claim, out = staging.claim, tmp_path / "out"

    def late(place, key):
        written(out)
        return claim(place, key)

    monkeypatch.setattr(staging, "claim", late)
    with reserved(out, DIGEST) as found:
        assert found == "same"


def test_one_changed_byte_of_any_file_is_no_longer_the_same_result(tmp_path):
    out = written(tmp_path / "out")
    files = [p for p in out.rglob("*") if p.is_file() and p.name != "private.key"]
    assert len(files) == 3
    for path in files:
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(BadInput, match="was changed|not a result|another request"):
                check_destination(out, DIGEST)
        path.write_bytes(whole)
        assert check_destination(out, DIGEST) == "same"


def test_a_missing_and_an_added_file_are_no_longer_the_same_result(tmp_path):
    out = written(tmp_path / "out")
    for name in ("adapter_model.bin", "adapter.SAFETENSORS", "deep/tokenizer.json", "modeling.py"):
        (out / name).write_bytes(b"x")
        with pytest.raises(BadInput, match=f"'{name}' was added"):
            check_destination(out, DIGEST)
        (out / name).unlink()
    (out / "notes.txt").write_text("no loader reads this")
    assert check_destination(out, DIGEST) == "same"
    (out / "deep" / "file").unlink()
    with pytest.raises(BadInput, match="'deep/file' is missing"):
        check_destination(out, DIGEST)


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {"a": [1]}},
        {"files": {"a": {"bytes": "1", "sha256": 1}}},
        {"request": 5},
        {"request": None},
        {"model": 3},
        {"files": {"../../precious": {"bytes": 1, "sha256": "0"}}},
        {"files": {"/etc/passwd": {"bytes": 1}}},
        {"sha256": 1},
        {"settings": [1]},
    ],
)
def test_a_manifest_of_other_types_is_no_result(tmp_path, change):
    out = written(tmp_path / "out")
    stored = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**stored, **change}))
    with pytest.raises(BadInput, match="not a result of FastSIU"):
        check_destination(out, DIGEST)
    with pytest.raises(BadInput):
        manifests.read(out)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"request": NaN}', '{"request": 1e999}', "null", "", "\0", '"x"', "{"]
)
def test_a_manifest_that_is_no_json_object_is_no_result(tmp_path, text):
    out = written(tmp_path / "out")
    (out / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match="not a result of FastSIU"):
        check_destination(out, DIGEST)
    with pytest.raises(BadInput):
        manifests.read(out)
    (out / "report.json").write_text(text)
    with pytest.raises(BadInput, match="report.json"):
        manifests.read_report(out)


def test_the_manifest_spells_no_name(tmp_path):
    pictures = {
        "image": b"1",
        "images/Zorblax.png": b"2",
        "images/a/b.png": b"3",
        "retain/Quint.png": b"4",
        "001/images/Z.png": b"5",
    }
    stored = described(
        b"k" * 32, pictures=pictures, masks={"tokens_masked": 3, "spared": ["Z", "or", "bl"]}
    )
    labels = [one["label"] for one in stored["pictures"]]
    assert labels == ["image", "images/001", "images/002", "retain/001", "001/images/001"]
    assert stored["masks"] == {"tokens_masked": 3, "spared": 3}


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
def test_names_and_answers_are_for_their_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        transaction = Transaction(tmp_path / "out")
        with transaction as folder:
            write_reports(folder, {"concept": "c", "verdict": "forgotten"})
            (folder / "untouched.json").write_text("{}")
            transaction.commit(described(transaction.key))
        staging.replace_file(tmp_path / "suite.json", b"{}")
        staging.new_file(tmp_path / "samples.jsonl", b"{}")
    finally:
        os.umask(before)
    out = tmp_path / "out"
    assert out.stat().st_mode & 0o777 == 0o700
    private = (
        "report.json",
        "report.md",
        "report.html",
        "untouched.json",
        "private.key",
        "../suite.json",
        "../samples.jsonl",
    )
    assert {(out / name).stat().st_mode & 0o777 for name in private} == {0o600}


def test_no_file_is_half_written_and_none_is_replaced_by_a_new_one(tmp_path):
    path = tmp_path / "f"
    staging.new_file(path, b"one")
    with pytest.raises(FileExistsError):
        staging.new_file(path, b"two")
    assert path.read_bytes() == b"one"
    staging.replace_file(path, b"two")
    assert path.read_bytes() == b"two" and [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("name", ["x" * 256, "\u00e9" * 128, "a/" + "x" * 256])
def test_a_name_that_is_too_long_is_told_at_once(tmp_path, name):
    (tmp_path / "a").mkdir()
    with pytest.raises(BadInput, match="cannot be used"):
        check_destination(tmp_path / name, DIGEST)
    with pytest.raises(BadInput, match="cannot be used"):
        staging.check_new(tmp_path / name, "choose another")


@pytest.mark.skipif(os.name == "nt", reason="Windows has shorter paths")
def test_the_longest_name_can_be_written(tmp_path):
    assert check_destination(tmp_path / ("x" * 255), DIGEST) == "free"
    written(tmp_path / ("x" * 255))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("path", ["/proc/x", "/proc/self/x", "/sys/x", "/dev/null/x"])
def test_a_place_where_nothing_can_be_made_is_told_at_once(path):
    for check in (
        lambda p: check_destination(p, DIGEST),
        lambda p: staging.check_new(Path(p), "choose another"),
    ):
        with pytest.raises(BadInput, match="cannot be|does not exist"):
            check(path)


def test_a_full_disk_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20)
    )
    with pytest.raises(BadInput, match="1 MiB left, and the result takes about 32 MiB"):
        check_destination(tmp_path / "out", DIGEST)
    assert (
        check_destination(tmp_path / "out", DIGEST, size=2**20) == "free"
        and list(tmp_path.iterdir()) == []
    )


def test_the_manifest_says_where_values_came_from_and_hides_the_picture():
    stored = described(b"k" * 32)
    assert stored["recipe"]["lr"] == {"value": 2e-4, "from": "command line"}
    assert stored["recipe"]["beta"] == {"value": 0.75, "from": "default"}
    assert {"python", "torch", "transformers", "peft", "fastsiu"} <= set(
        stored["versions"]
    ) and stored["versions"]["fastsiu"]
    text = json.dumps(stored)
    for secret in (DIGEST, sha256(b"secret picture"), str(ROOT)):
        assert secret not in text
    assert (
        described(b"l" * 32)["pictures"] != stored["pictures"]
        and described(b"l" * 32)["request"] != stored["request"]
    )
    for bad in ({"lr": "somewhere"}, {"learning_rate": "default"}):
        with pytest.raises(ValueError):
            described(b"k" * 32, origins=bad)


def test_the_digest_depends_on_content_and_not_on_paths(tmp_path):
    for name, data in (("a.jpg", b"one"), ("copy.jpg", b"one"), ("b.jpg", b"two")):
        (tmp_path / name).write_bytes(data)
    request = Request("Zorblax", tmp_path / "a.jpg", aliases=("Z", "Quint"))
    base = request_digest(request, Recipe(), "m", "r")
    assert base == request_digest(
        replace(request, image=tmp_path / "copy.jpg", aliases=("Quint", "Z")), Recipe(), "m", "r"
    )
    others = [
        request_digest(replace(request, image=tmp_path / "b.jpg"), Recipe(), "m", "r"),
        request_digest(replace(request, concept="Other"), Recipe(), "m", "r"),
        request_digest(replace(request, images=tmp_path), Recipe(), "m", "r"),
        request_digest(replace(request, data=tmp_path / "b.jpg"), Recipe(), "m", "r"),
        request_digest(replace(request, as_word=True), Recipe(), "m", "r"),
        request_digest(replace(request, as_word=False), Recipe(), "m", "r"),
        request_digest(request, Recipe(steps=61), "m", "r"),
        request_digest(request, Recipe(), "m2", "r"),
        request_digest(request, Recipe(), "m", None),
        request_digest(request, Recipe(), "m", "r", quantize="nf4"),
        request_digest(request, Recipe(), "m", "r", weights={"model.safetensors": "a"}),
        request_digest(request, Recipe(), "m", "r", weights={"model.safetensors": "b"}),
    ]
    assert len({base, *others}) == 13
    with pytest.raises(BadInput):
        request_digest(replace(request, image=tmp_path / "absent.jpg"), Recipe(), "m", "r")


def test_random_directory_is_free_and_creates_nothing(tmp_path):
    names = {random_directory(tmp_path).name for _ in range(50)}
    assert (
        len(names) == 50
        and all(n.startswith("fastsiu-") for n in names)
        and list(tmp_path.iterdir()) == []
    )


def test_digest_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "README.md").write_text("x")
    assert digest_model(tmp_path) == {
        "model.safetensors": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }


def test_a_model_file_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="nowhere' cannot be read"):
        digest_model(tmp_path / "nowhere")


def test_reports_are_written_even_with_broken_characters(tmp_path):
    write_reports(tmp_path, {"concept": "Zoë \ud83d", "verdict": "forgotten", "model": "m"})
    assert json.loads((tmp_path / "report.json").read_bytes())["concept"] == "Zoë \ud83d"
    for name in ("report.md", "report.html"):
        assert "Zoë" in (tmp_path / name).read_text(encoding="utf-8")


def test_a_report_in_a_terminal_obeys_nothing_that_it_holds(tmp_path):
    name = "Zo\u00eb \x1b[2J\x9b31m \u202eeno"
    write_reports(
        tmp_path,
        {"concept": name, "verdict": "forgotten", "model": "m", "caveats": [name], "reasons": []},
    )
    for file in tmp_path.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "Zo\u00eb" in text and not {"\x1b", "\x9b", "\u202e"} & set(text), file.name
    assert json.loads((tmp_path / "report.json").read_text())["concept"] == name


def test_no_file_is_written_through_a_link_that_somebody_put_there(tmp_path):
    (tmp_path / "theirs").write_text("theirs alone")
    with staging.claim(tmp_path, "a run"):
        (held,) = (p for p in tmp_path.iterdir() if p.name.startswith(staging.CLAIM))
    held.symlink_to("theirs")
    with pytest.raises(BadInput, match="cannot be used"), staging.claim(tmp_path, "a run"):
        pass
    (tmp_path / "note").symlink_to("theirs")
    with pytest.raises(OSError):
        staging.write(tmp_path / "note", b"ours")
    assert (tmp_path / "theirs").read_text() == "theirs alone"


@pytest.mark.parametrize("there", ["directory", "dangling"])
def test_a_claim_that_cannot_be_used_is_a_sentence(tmp_path, there):
    with staging.claim(tmp_path, "out"):
        (held,) = tmp_path.iterdir()
    held.mkdir() if there == "directory" else held.symlink_to(tmp_path / "no" / "where")
    with pytest.raises(BadInput, match="another --output"), reserved(tmp_path / "out", ""):
        pass


@pytest.mark.skipif(staging.fcntl is None, reason="needs file locks")
@pytest.mark.parametrize(
    "verb",
    [
        "eval --concept A --image who.png --output out",
        "audit --concept A --image who.png --adapter adapter --output out",
        "merge --adapter adapter --no-verify --output out",
        "compare --quick --output out",
    ],
)
def test_every_verb_that_takes_long_learns_first_that_another_run_has_its_output(
    tmp_path, monkeypatch, capfd, trained, cast, verb
):
    shutil.copytree(trained.output, tmp_path / "adapter")
    shutil.copy(cast.image, tmp_path / "who.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vlm, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    key = str(tmp_path / "out") if verb.startswith("compare") else "out"
    with staging.claim(tmp_path, key) as mine:
        assert mine and cli.run(verb.split()) == 2
    assert "Another run is writing to" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()
