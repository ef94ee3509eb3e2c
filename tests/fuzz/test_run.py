"""The driver finds what it is for, and a bounded run of every target finds nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent

PLANTED = """
import ctypes, os, time

ALLOWED = (ValueError,)

def seeds(name):
    return [b"whole 12345", b"another"]

def traceback(data):
    if b"whole" not in data:
        raise KeyError(len(data))
    raise ValueError("as promised")

def memory(data):
    if data[:1] != b"w":
        bytearray(2**29)

def recursion(data):
    recursion(data)

def wrong(data):
    assert data.startswith((b"w", b"a")), "a wrong number"

def forever(data):
    while len(data) < 7:
        try:
            time.sleep(0.01)
        except Exception:
            pass

def killed(data):
    if data[:1] != b"w":
        os._exit(3)

def fine(data):
    raise ValueError("as promised")

TARGETS = {f.__name__: f for f in (traceback, memory, recursion, wrong, forever, killed, fine)}
"""


def fuzz(script, corpus, *options):
    command = [sys.executable, str(script), "--corpus", str(corpus), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def planted(tmp_path):
    """A copy of the driver beside targets that fail."""
    script = tmp_path / "fuzz" / "run.py"
    script.parent.mkdir()
    script.write_text((FUZZ / "run.py").read_text())
    (script.parent / "fuzz_planted.py").write_text(PLANTED)
    return script


@pytest.mark.parametrize(
    "name, found",
    [
        ("traceback", "KeyError"),
        ("memory", "MemoryError"),
        ("recursion", "RecursionError"),
        ("wrong", "AssertionError"),
        ("forever", "TooLong"),
    ],
)
def test_what_a_target_may_not_do_is_found_and_kept(name, found, planted, tmp_path):
    limits = ["--runs", "60", "--input-seconds", "0.2", "--input-mib", "256"]
    done = fuzz(planted, tmp_path / "corpus", name, *limits)
    assert done.returncode == 1 and found in done.stdout, done.stdout + done.stderr
    kept = [p for p in (tmp_path / "corpus" / name).iterdir() if p.name.startswith("failed-")]
    assert kept and not (tmp_path / "corpus" / name / "running").exists()
    if name in ("traceback", "wrong"):
        again = fuzz(planted, tmp_path, name, "--input", str(kept[0]))
        assert again.returncode == 1 and found in again.stderr
    same = fuzz(planted, tmp_path / "again", name, *limits)  # the same seed, the same inputs
    assert same.stdout.replace("again", "corpus") == done.stdout or name == "forever"


def test_an_input_that_ends_the_process_is_not_lost(planted, tmp_path):
    assert fuzz(planted, tmp_path, "killed", "--runs", "60").returncode == 3
    done = fuzz(planted, tmp_path, "killed", "--runs", "1")
    assert done.returncode == 1 and "ended the process of an earlier run" in done.stdout
    (kept,) = (tmp_path / "killed").glob("failed-*")
    assert not kept.read_bytes().startswith(b"w")


def test_what_is_allowed_is_no_failure(planted, tmp_path):
    rows = tmp_path / "rows.jsonl"
    done = fuzz(planted, tmp_path, "fine", "--runs", "200", "--results", str(rows))
    assert done.returncode == 0 and done.stdout == "fine: 200 inputs, 0 kinds of failures.\n", (
        done.stdout + done.stderr
    )
    row = json.loads(rows.read_text())
    told = {key: row[key] for key in ("target", "seed", "inputs", "kinds_of_failures")}
    assert told == {"target": "fine", "seed": 0, "inputs": 200, "kinds_of_failures": 0}
    assert fuzz(planted, tmp_path, "unknown").returncode == 2


def test_a_bounded_run_of_every_target_finds_nothing(tmp_path):
    done = fuzz(FUZZ / "run.py", tmp_path, "--runs", "800")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "teacher: 800 inputs" in done.stdout and "index: 800 inputs" in done.stdout


def test_the_seeds_are_read():
    """Else nothing but the first check is ever reached."""
    spec = importlib.util.spec_from_file_location("fuzz_files", FUZZ / "fuzz_files.py")
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    for name, target in files.TARGETS.items():
        for data in files.seeds(name):
            target(data)


def test_the_table_adds_up_what_ran_and_forgets_what_was_mended():
    spec = importlib.util.spec_from_file_location("fuzz_run", FUZZ / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    row = lambda **values: json.dumps(
        dict(target="names", commit="b", cpu_seconds=90, inputs=500, kinds_of_failures=0) | values
    )
    lines = [row(commit="a", kinds_of_failures=2), row(inputs=700), row(target="index"), row()]
    said = run.table(lines).splitlines()[2:]
    assert said == ["| names | 4 | 1,700 | 0 |", "| index | 2 | 500 | 0 |"]
    assert "| 3 |" in run.table([*lines, row(kinds_of_failures=3)]).splitlines()[2]
