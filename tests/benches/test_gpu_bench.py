"""benches/gpu.py without a GPU: what is looked at first, a step that fails is recorded and the next
one runs, and a kill keeps what is there."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_rows import synthetic

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(monkeypatch):
    """benches/gpu.py, with all packages there; what it changes in benches/loss.py is put back."""
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    import gpu
    import loss

    for name in ("RESULTS", "PLOTS"):
        monkeypatch.setattr(loss, name, getattr(loss, name))
    monkeypatch.setattr(gpu.packages, "lacking", lambda step: None)
    monkeypatch.setattr(gpu.packages, "no_interpreter", lambda: None)
    return gpu


def test_bad_input_is_one_sentence(gpu, tmp_path, capsys, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "gpu.jsonl").write_text("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, said in (
        (["--quick", "--output", taken], "has results"),
        ([], "--quick"),
        (["--quick", "--seconds", 3], "out of range"),
        (["--quick", "--only", "reel"], "no step 'reel'"),
        (["--quick", "--wheels", tmp_path / "none"], "not a folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
        assert gpu.main() == 2, arguments
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("gpu.py: ") and said in error, error


def test_nothing_is_made_where_something_needed_is_missing(gpu, tmp_path, monkeypatch):
    """The step that was asked for, or one of the first command; else it is named and left out."""
    lacking = lambda step: "The step real needs a wheel: give it." if step == "real" else None
    monkeypatch.setattr(gpu.packages, "lacking", lacking)
    given = gpu.Options(tmp_path / "out", True, ("real",))
    with pytest.raises(gpu.BadInput, match="needs a wheel"):
        gpu.measure(given, tmp_path / "work")
    assert not (tmp_path / "out").exists()
    (step,) = (s for s in gpu.steps(tmp_path / "r", tmp_path, given) if s.name == "real")
    row = gpu.run(step, 60, tmp_path / "log")
    assert (row["rc"], row["failed"]) == (None, False) and "wheel" in row["tail"]
    monkeypatch.setattr(gpu.packages, "lacking", lambda step: f"{step} needs triton: give it.")
    with pytest.raises(gpu.BadInput, match="tests needs triton"):
        gpu.measure(gpu.Options(tmp_path / "out", True), tmp_path / "work")


# --------------------------------------------------------------------------------------------------
# steps


def python(gpu, code, **more):
    return gpu.Step("step", [sys.executable, "-c", code], 20, **more)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "gpu.log"


def test_a_step_leaves_its_exit_code_and_what_it_said(gpu, log):
    row = gpu.run(python(gpu, "print('some'); raise SystemExit(3)"), 20, log)
    assert (row["rc"], row["failed"]) == (3, True) and "some" in row["tail"]
    code = "import os; print(os.environ['A'], 'TRITON_INTERPRET' in os.environ)"
    row = gpu.run(python(gpu, code, env={"A": "b"}), 20, log)
    assert (row["rc"], row["failed"]) == (0, False) and "b False" in row["tail"]
    assert "some" not in row["tail"] and "some" in log.read_text()


def test_a_step_out_of_time_dies_with_its_children(gpu, tmp_path, log):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); "
    )
    began = time.monotonic()
    row = gpu.run(
        python(gpu, code + "print('begun', flush=True); time.sleep(60)")._replace(seconds=3), 3, log
    )
    assert (
        (row["rc"], row["failed"]) == (124, True)
        and "begun" in row["tail"]
        and time.monotonic() - began < 15
    )
    stat = Path(f"/proc/{child.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_what_is_absent_has_not_failed_and_what_has_no_time_has(gpu, log):
    absent = gpu.run(python(gpu, "", absent="It is not here."), 20, log)
    assert (absent["rc"], absent["failed"], absent["tail"]) == (None, False, "It is not here.")
    late = gpu.run(python(gpu, ""), 1, log)
    assert (late["rc"], late["failed"]) == (None, True) and "No time" in late["tail"]


def test_the_steps_after_a_failed_one_run_and_get_what_time_it_left(
    gpu, tmp_path, monkeypatch, capsys
):
    begun = []
    real = gpu.run
    monkeypatch.setattr(
        gpu, "run", lambda step, seconds, log: begun.append(seconds) or real(step, seconds, log)
    )
    some = [
        python(gpu, "raise SystemExit(1)")._replace(name=n, seconds=s)
        for n, s in (("a", 200), ("b", 100))
    ]
    monkeypatch.setattr(gpu, "steps", lambda *_: [*some, python(gpu, "")._replace(name="c")])
    assert gpu.measure(gpu.Options(tmp_path / "out", True), tmp_path / "work") == 1
    made = rows(tmp_path / "out")
    assert [r["kind"] for r in made] == ["run", "step", "step", "step"] and [
        r.get("rc") for r in made[1:]
    ] == [1, 1, 0]
    assert 100 < begun[0] <= 200 < begun[1] <= 300 < begun[2] <= 320
    assert "failed: a, b" in capsys.readouterr().out and made[0]["device"] == "interpreter"


def rows(folder):
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


def test_two_commands_fit_the_time_of_a_machine(gpu, tmp_path):
    """The limits of the steps, the starts included; the order is that of their worth."""
    outer = int(re.search(r"--kill-after=5 (\d+)", (ROOT / "benches/gpu.sh").read_text())[1])
    assert gpu.COMMAND - 10 < outer <= gpu.COMMAND - 5 and gpu.COMMAND == 9 * 60
    known = gpu.steps(tmp_path / "out", tmp_path, gpu.Options())
    first = gpu.chosen(gpu.Options(), known)
    second = gpu.chosen(gpu.Options(only=("real",)), known)
    assert [s.name for s in first] == ["tests", "ours", "rivals", "tune", "tuned"]
    assert [s.name for s in second] == ["real"] and known.index(second[0]) == len(first)
    one, two = (sum(s.seconds for s in some) for some in (first, second))
    assert max(one, two) <= gpu.COMMAND - 10
    assert one + two + gpu.START <= gpu.ALL == 15 * 60
    for seconds in (100.0, 520.0):
        given = gpu.Options(seconds=seconds)
        assert sum(s.seconds for s in gpu.chosen(given, known)) == pytest.approx(seconds)
    quick = gpu.steps(tmp_path / "out", tmp_path, gpu.Options(quick=True))
    assert [s.name for s in quick] == [s.name for s in (*first, *second)] + ["apply"]


def test_some_of_the_steps_can_be_asked_for(gpu, tmp_path, monkeypatch):
    some = [python(gpu, "")._replace(name=name) for name in ("tests", "ours", "real")]
    monkeypatch.setattr(gpu, "steps", lambda *_: some)
    work = tmp_path / "work"
    assert gpu.measure(gpu.Options(tmp_path / "one", True, ("real",)), work) == 0
    assert gpu.measure(gpu.Options(tmp_path / "two", True, ("ours",)), work) == 0
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [r["name"] for r in one[1:]] == ["real"] and one[0]["shapes"] == [] and two[0]["shapes"]
    with pytest.raises(gpu.BadInput, match="'reel'"):
        gpu.measure(gpu.Options(tmp_path / "three", True, ("reel",)), work)
    assert not (tmp_path / "three").exists()


def test_the_machine_is_looked_at_in_another_process(gpu):
    assert gpu.apart(os.getpid) != os.getpid()


def test_a_sanitizer_that_is_there_is_used(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if not any(
        map(
            os.path.exists,
            ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer"),
        )
    ):
        step = gpu.sanitizer("memcheck", {})
        assert "neither" in step.absent
    shutil.copy(
        "/bin/true" if os.path.exists("/bin/true") else "/usr/bin/true",
        tmp_path / "compute-sanitizer",
    )
    step = gpu.sanitizer("memcheck", {})
    assert step.absent is None and step.command[:3] == [
        str(tmp_path / "compute-sanitizer"),
        "--tool",
        "memcheck",
    ]


# --------------------------------------------------------------------------------------------------
# rows


def test_a_kill_at_any_moment_leaves_whole_rows(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    import rows as results

    out = tmp_path / "gpu.jsonl"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benches')!r}); import rows, pathlib\n"
        f"for i in range(10**9): rows.append(pathlib.Path({str(out)!r}), "
        "[dict(kind='a', i=i, tail='x' * 20000)])"
    )
    writer = subprocess.Popen([sys.executable, "-c", code])
    while not (out.exists() and out.stat().st_size > 1e6):
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    made = results.read(out)
    assert [r["i"] for r in made] == list(range(len(made))) and len(made) > 40
    text = out.read_text()
    text = text[: text.rindex("\n") + 1]  # the kill itself can have cut a row
    for cut in (2, 10_000, 20_030):  # as if the copy of the file had broken off
        out.write_text(text[:-cut])
        assert results.read(out) == made[:-1]
    out.write_text("{}\nno JSON\n{}\n")
    with pytest.raises(json.JSONDecodeError):
        results.read(out)


# --------------------------------------------------------------------------------------------------
# measuring


@pytest.fixture
def visited(gpu, monkeypatch):
    """Calls of loss.bench, none of which runs: [(shape, names, with accuracy)]; `seconds` each, and
    what it raises."""
    import gpu_measure
    import loss

    calls = SimpleNamespace(made=[], clock=0.0, seconds=10.0, error={}, measure=gpu_measure)

    def bench(shape, found, levels, **options):
        calls.made.append((shape, [c.name for c in found], bool(levels)))
        calls.clock += calls.seconds
        if shape in calls.error:
            raise calls.error[shape]
        return [dict(kind="shape", N=shape[0], V=shape[1], D=shape[2])]

    monkeypatch.setattr(loss, "bench", bench)
    monkeypatch.setattr(loss, "table", lambda rows: "")
    monkeypatch.setattr(gpu_measure.time, "monotonic", lambda: calls.clock)
    return calls


def test_a_shape_without_time_or_memory_is_named_and_the_rest_is_measured(
    visited, tmp_path, capsys
):
    import loss
    from rows import append, read

    append(tmp_path / "out", [dict(kind="run")])
    visited.error[loss.PEERS[0]] = torch.OutOfMemoryError("too much")
    jobs = [(shape, [], ()) for shape in loss.PEERS[:4]]
    assert visited.measure.visit(jobs, tmp_path / "out", 35.0, device="cpu") == 0
    said = capsys.readouterr().out
    assert [shape for shape, *_ in visited.made] == loss.PEERS[:3] and len(
        read(tmp_path / "out")
    ) == 3
    assert (
        "left out, OutOfMemoryError: too much" in said
        and said.count("left out for lack of time") == 1
    )


def test_the_goal_comes_first(visited, tmp_path):
    import loss
    from rivals import FLOOR
    from rows import append

    append(tmp_path / "out", [dict(kind="run")])
    visited.seconds = 0.0
    assert loss.GOAL == [(N, 151936, 2048, "bfloat16") for N in (64, 256, 1024)]
    assert visited.measure.ours(tmp_path / "out", 1e6, False) == 0
    mine = list(visited.made)
    assert [(shape, accuracy) for shape, _, accuracy in mine[:3]] == [(s, True) for s in loss.GOAL]
    assert sorted(made[0] for made in mine) == sorted(loss.PEERS)
    assert all(
        {FLOOR, "fastsiu triton", "fastsiu tiled"} <= set(names) and len(names) == 4
        for _, names, _ in mine
    )
    visited.made.clear()
    assert visited.measure.tuned(tmp_path / "out", 1e6, False) == 0
    assert [shape for shape, *_ in visited.made] == loss.GOAL
    visited.made.clear()
    assert visited.measure.rivals(tmp_path / "out", 1e6, False) == 0
    assert [made[0] for made in visited.made[:3]] == loss.GOAL
    names = {name for _, some, _ in visited.made for name in some}
    assert {"Liger KLDiv + FLCE", "orda", "torch.compile", FLOOR} <= names
    assert not any(name.startswith("fastsiu") for name in names)


def test_benches_run_with_the_rows_just_tuned(visited, tmp_path, monkeypatch):
    measured = SimpleNamespace(PLANS={})
    monkeypatch.setattr("fastsiu.kernels.measured.PLANS", measured.PLANS)
    assert visited.measure.visit([], synthetic(tmp_path / "results"), 1.0) == 0
    assert set(measured.PLANS) == {("sm_90", "bfloat16", 64), ("sm_90", "bfloat16", 256)}


def test_processes_side_by_side_are_told_as_they_end(gpu, tmp_path, capsys):
    import gpu_measure

    jobs = [[sys.executable, "-c", f"print({i}); raise SystemExit({i})"] for i in (0, 3)]
    assert gpu_measure.together(jobs, time.monotonic() + 60) == 3
    said = capsys.readouterr().out
    assert "0\n" in said and "exit code 3: 3" in said
    jobs = [[sys.executable, "-c", "import time; time.sleep(100)"]]
    assert gpu_measure.together(jobs, time.monotonic() + 1) == 124
