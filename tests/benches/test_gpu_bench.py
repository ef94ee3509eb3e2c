"""benches/gpu.py without a GPU: what fails is recorded and no more, and only what a GPU has
measured becomes a launch row."""

import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastsiu.kernels import triton_launch
from fastsiu.kernels.triton_launch import SHARED_LIMIT, TARGETS, Blocks, measured_backend, rows

ROOT = Path(__file__).resolve().parents[2]
BF16, SHAPES = torch.bfloat16, [[256, 151936, 1024, "bfloat16"], [64, 151936, 1024, "bfloat16"]]
WIDE, STEP = Blocks(64, 256, 32, 8, 2), Blocks(64, 128, 64, 8, 2)  # rows that nobody predicts


@pytest.fixture
def gpu(monkeypatch):
    """benches/gpu.py; what it changes in benches/loss.py is put back."""
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    import gpu
    import loss

    for name in ("RESULTS", "PLOTS"):
        monkeypatch.setattr(loss, name, getattr(loss, name))
    return gpu


@pytest.fixture
def tree(gpu, tmp_path):
    """What --apply changes, without the rows of any GPU."""
    made = gpu.copy(tmp_path / "tree")
    path = made / "kernels/measured.py"
    path.write_text(re.sub(r" = \{.*?\}(?=\n\n|\n*\Z)", " = {}", path.read_text(), flags=re.S))
    return made


def synthetic(path, *, device="Synthetic GPU", quick=False, shapes=SHAPES, tuned=None):
    """A results file of a GPU that does not exist: triton wins at N = 64 and loses at 256."""
    stamp = dict(date="2026-01-02T03:04:05+00:00", commit="0123abc")
    made = [
        dict(
            kind="run",
            quick=quick,
            device=device,
            target="sm_90",
            units=132,
            shapes=SHAPES,
            **stamp,
        )
    ]
    made.append(dict(kind="step", name="tests", rc=0, failed=False, seconds=1.0, tail=""))
    for N in (64, 256):
        blocks = dict(
            sums=WIDE._replace(BLOCK_N=N), product=STEP._replace(BLOCK_N=N), waves=1, chunk=2**23
        )
        ms = dict(ms=[1.0, 2.0], predicted_ms=[1.5, 2.5], candidates=[])
        made.append(
            dict(
                kind="tune",
                device=tuned or device,
                target="sm_90",
                dtype="bfloat16",
                N=N,
                V=1000,
                D=[32, 64],
                **stamp,
            )
            | blocks
            | ms
        )
    for N, V, D, dtype in shapes:
        for name, median in (
            ("two GEMMs (the floor)", 1.0),
            ("fastsiu tiled", 2.0),
            ("fastsiu triton", N / 64),
            ("eager", 9.0),
        ):
            ours, ms = (
                name.startswith("fastsiu"),
                dict(median=median, min=median, max=median, rounds=3),
            )
            error = dict(
                term="KL",
                teacher="peaked",
                mask=False,
                level=1e-3,
                truth=1e-3,
                grad_error=1e-3,
                cosine=1.0,
            )
            made.append(
                dict(
                    kind="shape",
                    device=device,
                    gpu=True,
                    threads=1,
                    torch="2",
                    triton="3",
                    contender=name,
                    package="torch",
                    version="2",
                    terms="GEMM" if "GEMM" in name else "CE+KL",
                    how="one call",
                    keeps="-",
                    skips_dw=True,
                    fp32_logits=True,
                    ours=ours,
                    N=N,
                    V=V,
                    D=D,
                    dtype=dtype,
                    missing=None,
                    ms=ms,
                    x_floor=median,
                    teacher_mib=0.0,
                    mib=1.0,
                    accuracy=[] if "GEMM" in name else [error],
                    **stamp,
                )
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def applied(tree, monkeypatch):
    """triton_launch with the tree's measured.py"""
    found = runpy.run_path(str(tree / "kernels" / "measured.py"))
    monkeypatch.setattr(
        triton_launch, "measured", SimpleNamespace(PLANS=found["PLANS"], BACKENDS=found["BACKENDS"])
    )
    return lambda N, target="sm_90", dtype=BF16, **more: triton_launch.triton_launch(
        N, 151_936, 2048, dtype, target, **more
    )


def test_measured_rows_reach_the_launch_with_their_provenance(gpu, tree, tmp_path, monkeypatch):
    before = applied(tree, monkeypatch)(64)
    assert gpu.apply(synthetic(tmp_path / "results"), tree, False) == 0
    launch = applied(tree, monkeypatch)
    plan = launch(64)
    assert (
        plan.sums == WIDE
        and plan.product == STEP
        and before.sums != WIDE
        and isinstance(plan.sums, Blocks)
    )
    assert plan == triton_launch.plan_of(
        WIDE, STEP, 1, 2**23, 64, 151_936, 2048, BF16, 132, plan.why
    )
    assert plan.chunk == 2**23 // (2 * 64) != before.chunk
    assert plan.why == (
        "measured 2026-01-02 on Synthetic GPU, commit 0123abc, [64, 1000] D 32 / 64: "
        "1.000 / 2.000 ms, the predicted row 1.500 / 2.500"
    )
    assert [launch(N).sums.BLOCK_N for N in (1, 63, 65, 256, 10_000)] == [64, 64, 256, 256, 256]
    assert launch(64) == plan
    for other in (
        launch(64, "sm_80"),
        launch(64, dtype=torch.float16),
        launch(64, dtype=torch.float32),
        launch(64, heavy=True),
    ):
        assert other.why.startswith("predicted for ")
    backend, why = measured_backend("sm_90", BF16, 50)
    assert (
        backend == "triton"
        and "0.50 of tiled's time" in why
        and why.startswith("measured 2026-01-02 on Synthetic GPU")
    )
    assert measured_backend("sm_90", BF16, 4096)[0] == "tiled"
    assert (
        measured_backend("sm_90", torch.float32, 64) is None
        and measured_backend("sm_89", BF16, 64) is None
    )


def test_it_is_applied_once_and_beside_what_was_there(gpu, tree, tmp_path, capsys):
    original = (ROOT / "README.md").read_text()
    for _ in range(2):
        assert gpu.apply(synthetic(tmp_path / "results"), tree, False) == 0
    readme, end = (tree / "README.md").read_text(), "<!-- end of table -->"
    begin = "<!-- table: python benches/loss.py --table -->"
    cpu = lambda text: text.split(begin)[1].split(end)[0]
    assert cpu(readme) == cpu(original)
    assert (
        readme.count("--of 'Synthetic GPU' -->") == 1 and readme.count("### On Synthetic GPU") == 1
    )
    assert "fastsiu triton" in readme.split("--of 'Synthetic GPU' -->")[1].split(end)[0]
    start = readme.index("\n### On Synthetic GPU")
    assert readme[:start] + readme[readme.index(end, start) + len(end) + 1 :] == original
    assert len((tree / "benches/results/loss.jsonl").read_text().splitlines()) == 8 + len(
        (ROOT / "benches/results/loss.jsonl").read_text().splitlines()
    )
    other = synthetic(tmp_path / "other", device="Another One")
    other.write_text(other.read_text().replace("sm_90", "sm_89"))
    assert gpu.apply(other, tree, False) == 0
    found = runpy.run_path(str(tree / "kernels/measured.py"))
    assert (
        {target for target, *_ in found["PLANS"]}
        == {target for target, *_ in found["BACKENDS"]}
        == {"sm_89", "sm_90"}
    )
    source = (tree / "kernels/measured.py").read_text()
    assert max(map(len, source.splitlines())) <= 130 and source.startswith(
        (ROOT / "kernels/measured.py").read_text()[:200]
    )


@pytest.mark.parametrize(
    "options", [dict(device="interpreter", quick=True), dict(tuned="interpreter")]
)
def test_figures_of_the_interpreter_are_refused(gpu, tree, tmp_path, capsys, options):
    before = (tree / "kernels/measured.py").read_bytes()
    assert gpu.apply(synthetic(tmp_path / "results", **options), tree, False) == 0
    assert (tree / "kernels/measured.py").read_bytes() == before
    assert "refused" in capsys.readouterr().out


def test_plots_of_a_gpu_stand_beside_the_others(gpu, tree, tmp_path):
    pytest.importorskip("matplotlib")
    assert gpu.apply(synthetic(tmp_path / "results"), tree, True) == 0
    drawn = sorted(p.name for p in (tree / "benches/plots").iterdir())
    assert drawn == ["loss_scaling-synthetic-gpu.png", "loss_tradeoff-synthetic-gpu.png"]
    readme = (tree / "README.md").read_text()
    assert all(f"(benches/plots/{name})" in readme for name in drawn)


def test_an_incomplete_device_gets_no_table(gpu, tree, tmp_path, capsys):
    assert gpu.apply(synthetic(tmp_path / "results", shapes=SHAPES[:1]), tree, False) == 1
    assert (tree / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    assert "N=64, V=151936, D=1024, bfloat16" in capsys.readouterr().err


def test_bad_input_is_one_sentence(gpu, tmp_path, capsys, monkeypatch):
    text, empty = tmp_path / "text", tmp_path / "empty"
    text.write_text("not JSON\n")
    empty.write_text("")
    rehearsal = synthetic(tmp_path / "rehearsal", quick=True)
    given = [["--apply", p] for p in (tmp_path / "none", text, empty, rehearsal)] + [
        ["--quick", "--output", text],
        [],
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in given:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
        assert gpu.main() == 2, arguments
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("gpu.py: "), said
    assert ("--quick" if importlib.util.find_spec("triton") else "fastsiu[triton]") in said


def test_the_launch_file_in_the_tree_holds_only_what_a_gpu_measured():
    found = runpy.run_path(str(ROOT / "kernels/measured.py"))
    for key, entry in [*found["PLANS"].items(), *found["BACKENDS"].items()]:
        assert (
            key[0] in TARGETS
            and entry[-1].startswith("measured 20")
            and "interpreter" not in entry[-1]
        )


# --------------------------------------------------------------------------------------------------
# steps


def python(gpu, code, **more):
    return gpu.Step("step", [sys.executable, "-c", code], 20, **more)


def test_a_step_leaves_its_exit_code_and_what_it_said(gpu):
    row = gpu.run(python(gpu, "print('some'); raise SystemExit(3)"), 20)
    assert (row["rc"], row["failed"]) == (3, True) and "some" in row["tail"]
    row = gpu.run(
        python(
            gpu,
            "import os; print(os.environ['A'], 'TRITON_INTERPRET' in os.environ)",
            env={"A": "b"},
        ),
        20,
    )
    assert (row["rc"], row["failed"]) == (0, False) and "b False" in row["tail"]


def test_a_step_out_of_time_dies_with_its_children(gpu, tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); "
    )
    began = time.monotonic()
    row = gpu.run(
        python(gpu, code + "print('begun', flush=True); time.sleep(60)")._replace(seconds=3), 3
    )
    assert (
        (row["rc"], row["failed"]) == (124, True)
        and "begun" in row["tail"]
        and time.monotonic() - began < 15
    )
    stat = Path(f"/proc/{child.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_what_is_absent_has_not_failed_and_what_has_no_time_has(gpu):
    absent = gpu.run(python(gpu, "", absent="It is not here."), 20)
    assert (absent["rc"], absent["failed"], absent["tail"]) == (None, False, "It is not here.")
    late = gpu.run(python(gpu, ""), 1)
    assert (late["rc"], late["failed"]) == (None, True) and "No time" in late["tail"]
    assert not gpu.run(python(gpu, "", optional=True), 1)["failed"]


def test_the_steps_after_a_failed_one_run_in_the_time_that_is_left(
    gpu, tmp_path, monkeypatch, capsys
):
    begun = []
    real = gpu.run
    monkeypatch.setattr(
        gpu, "run", lambda step, seconds: begun.append(seconds) or real(step, seconds)
    )
    some = [
        python(gpu, "raise SystemExit(1)")._replace(name=n, seconds=s)
        for n, s in (("a", 20), ("b", 1e6))
    ]
    monkeypatch.setattr(gpu, "steps", lambda *_: [*some, python(gpu, "")._replace(name="c")])
    assert gpu.measure(tmp_path / "out", True) == 1
    made = gpu.read(tmp_path / "out")
    assert [r["kind"] for r in made] == ["run", "step", "step", "step"] and [
        r.get("rc") for r in made[1:]
    ] == [1, 1, 0]
    assert begun[0] == begun[2] == 20 and begun[1] < gpu.BUDGET
    assert "failed: a, b" in capsys.readouterr().out and made[0]["device"] == "interpreter"


def test_all_steps_together_are_bounded(gpu, tmp_path):
    outer = int((ROOT / "benches/gpu.sh").read_text().split("--kill-after=5 ")[1].split()[0])
    assert gpu.BUDGET + 5 < outer + 5 <= 540
    names = [step.name for step in gpu.steps(tmp_path / "out", tmp_path, False)]
    assert names[-1] == "real" and all(
        step.optional for step in gpu.steps(tmp_path / "out", tmp_path, False)[-2:]
    )
    assert names.index("tests") < names.index("tune") < names.index("bench") < names.index("peers")
    assert {step.name for step in gpu.steps(tmp_path / "out", tmp_path, True)} >= {
        "tests",
        "tune",
        "bench",
        "real",
        "apply",
    }


def test_some_of_the_steps_can_be_asked_for(gpu, tmp_path, monkeypatch, capsys):
    some = [python(gpu, "")._replace(name=name) for name in ("tests", "bench", "real")]
    monkeypatch.setattr(gpu, "steps", lambda *_: some)
    assert (
        gpu.measure(tmp_path / "one", True, ["real"]) == 0
        and gpu.measure(tmp_path / "two", True, ["bench"]) == 0
    )
    one, two = gpu.read(tmp_path / "one"), gpu.read(tmp_path / "two")
    assert [r["name"] for r in one[1:]] == ["real"] and one[0]["shapes"] == [] and two[0]["shapes"]
    assert (
        gpu.measure(tmp_path / "three", True, ["reel"]) == 2 and "'reel'" in capsys.readouterr().err
    )
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
        step = gpu.sanitizer("memcheck", 60, False)
        assert "neither" in step.absent
    shutil.copy(
        "/bin/true" if os.path.exists("/bin/true") else "/usr/bin/true",
        tmp_path / "compute-sanitizer",
    )
    step = gpu.sanitizer("memcheck", 60, False)
    assert step.absent is None and step.command[:3] == [
        str(tmp_path / "compute-sanitizer"),
        "--tool",
        "memcheck",
    ]


# --------------------------------------------------------------------------------------------------
# benches


@pytest.fixture
def visited(gpu, monkeypatch):
    """Calls of loss.bench, none of which runs: [(shape, names, with accuracy)]; `seconds` each, and
    what it raises."""
    import loss

    calls = SimpleNamespace(made=[], clock=0.0, seconds=10.0, error={})

    def bench(shape, found, levels, **options):
        calls.made.append((shape, [c.name for c in found], bool(levels)))
        calls.clock += calls.seconds
        if shape in calls.error:
            raise calls.error[shape]
        return [dict(kind="shape", N=shape[0], V=shape[1], D=shape[2])]

    monkeypatch.setattr(loss, "bench", bench)
    monkeypatch.setattr(loss, "table", lambda rows: "")
    monkeypatch.setattr(gpu.time, "monotonic", lambda: calls.clock)
    return calls


def test_a_shape_without_time_or_memory_is_named_and_the_rest_is_measured(
    gpu, visited, tmp_path, capsys
):
    import loss

    gpu.append(tmp_path / "out", [dict(kind="run")])
    visited.error[loss.PEERS[0]] = torch.OutOfMemoryError("too much")
    assert (
        gpu.visit(
            [(shape, [], ()) for shape in loss.PEERS[:4]], tmp_path / "out", 35.0, device="cpu"
        )
        == 0
    )
    said = capsys.readouterr().out
    assert [shape for shape, *_ in visited.made] == loss.PEERS[:3] and len(
        gpu.read(tmp_path / "out")
    ) == 3
    assert (
        "left out, OutOfMemoryError: too much" in said
        and said.count("left out for lack of time") == 1
    )


def test_contenders_that_compile_go_along_where_they_are_fast(gpu, visited, tmp_path):
    import loss

    ms = {"eager": 5.0, "torch.compile": 3.0, "orda": 7.0, "fastsiu tiled": 1.0}
    row = lambda name: dict(kind="shape", contender=name, missing=None, ms=dict(median=ms[name]))
    gpu.append(tmp_path / "out", map(row, ms))
    visited.seconds = 0.0
    assert gpu.peers(tmp_path / "out", 1e6, False) == 0
    n = len(loss.PEERS) - 1 + len(loss.FULL)
    assert [shape for shape, *_ in visited.made[:n]] == loss.PEERS[1:] + loss.FULL
    assert all(accuracy and "torch.compile" not in names for _, names, accuracy in visited.made[:n])
    assert [made[0] for made in visited.made[n:]] == loss.PEERS[1:]
    assert all(
        made[1:] == (["two GEMMs (the floor)", "torch.compile"], False) for made in visited.made[n:]
    )


def test_benches_run_with_the_rows_just_tuned(gpu, visited, tmp_path, monkeypatch):
    measured = SimpleNamespace(PLANS={})
    monkeypatch.setattr("fastsiu.kernels.measured.PLANS", measured.PLANS)
    assert gpu.visit([], synthetic(tmp_path / "results"), 1.0) == 0
    assert set(measured.PLANS) == {("sm_90", "bfloat16", 64), ("sm_90", "bfloat16", 256)}


# --------------------------------------------------------------------------------------------------
# real size


def real_row(variant, device="Synthetic GPU", **changes):
    """A row of benches/real.py that no run has made: all of it in 50 s and 10.5 GB, where 10.25
    were planned."""
    seconds = dict(
        plan=8.0,
        load=5.0,
        samples=10.0,
        dreams=10.0,
        teacher=1.0,
        train=20.0,
        verdict=3.0,
        save=1.0,
    )
    recipe = dict(steps=60, batch_size=32, dreams=2, dream_steps=60)
    made = dict(
        kind="real",
        variant=variant,
        device=device,
        missing=None,
        quick=False,
        settings="nf4",
        steps=60,
        recipe=recipe,
        seconds=seconds,
        total=50.0,
        target_seconds=60,
        target_gb=11,
        peak=dict(used=10.5),
        budget=dict(micro_batch=None),
        planned=dict(peak=10.25 * 2**30, settings=dict(micro_batch=None)),
    )
    return made | dict(met_seconds=True, met_gb=True) | changes


MADE = dict(
    kind="made",
    variant=None,
    device="Synthetic GPU",
    missing=None,
    model="A Model",
    parameters=7e9,
    gb=13.2,
    seconds=dict(build=10.0, write=30.0, digests=13.0),
)


def with_real(gpu, path, *rows):
    gpu.append(
        path, [dict(kind="run", quick=False, device="Synthetic GPU", shapes=[]), MADE, *rows]
    )
    return path


def test_runs_at_the_real_size_get_their_table_once(gpu, tree, tmp_path):
    slow = real_row(
        "bf16", total=75.25, met_seconds=False, target_gb=None, budget=dict(micro_batch=4)
    )
    absent = dict(
        kind="real",
        variant="flash",
        device="Synthetic GPU",
        missing="It is not installed.",
        seconds={},
    )
    path = with_real(gpu, tmp_path / "results", real_row("nf4"), slow, absent)
    for _ in range(2):
        assert gpu.apply(path, tree, False) == 0
    readme, original = (tree / "README.md").read_text(), (ROOT / "README.md").read_text()
    begin = "<!-- table: python benches/real.py --table --of 'Synthetic GPU' -->"
    table = readme.split(begin)[1].split("<!-- end of table -->")[0]
    assert readme.count(begin) == 1 and readme.count("### On Synthetic GPU") == 1
    assert (
        readme.index("## On the card you have")
        < readme.index(begin)
        < readme.index("## The loss beside its rivals")
    )
    one, two = (line for line in table.splitlines() if line.startswith(("| nf4", "| bf16")))
    assert (
        "| 8.0 | 50.0 s | 5.0 | 10.0 | 10.0 | 1.0 | 20.0 | 3.0 | 1.0 | 60 s: met | 10.50 | 10.25 "
        "| 11 GB: met |" in one
    )
    assert (
        "| 75.2 s |" in two
        and "| 60 s: not met |" in two
        and two.endswith("| - |")
        and "at last micro-batch 4" in two
    )
    assert "flash (It is not installed)" in table and "13.2 GB written in 30 s" in table
    assert len((tree / "benches/results/real.jsonl").read_text().splitlines()) == 4
    start, end = (
        readme.index("\n### On Synthetic GPU"),
        readme.index("<!-- end of table -->", readme.index(begin)),
    )
    assert readme[:start] + readme[end + len("<!-- end of table -->\n") :] == original
    assert (tree / "benches/results/loss.jsonl").read_bytes() == (
        ROOT / "benches/results/loss.jsonl"
    ).read_bytes()


def test_a_newer_run_takes_the_place_of_the_older_one_of_its_variant(gpu, tree, tmp_path):
    assert (
        gpu.apply(with_real(gpu, tmp_path / "one", real_row("nf4"), real_row("bf16")), tree, False)
        == 0
    )
    assert (
        gpu.apply(with_real(gpu, tmp_path / "two", real_row("nf4", total=40.5)), tree, False) == 0
    )
    readme = (tree / "README.md").read_text()
    assert readme.count("| nf4 | nf4 |") == 1 and "| 40.5 s |" in readme and "| bf16 |" in readme


def test_nothing_that_ran_makes_no_table(gpu, tree, tmp_path):
    failed = dict(
        kind="real",
        variant="bf16",
        device="Synthetic GPU",
        missing="It failed.",
        seconds={},
        failed=True,
    )
    assert gpu.apply(with_real(gpu, tmp_path / "results", failed), tree, False) == 0
    assert (tree / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()


def test_a_variant_that_fails_loses_no_other(gpu, tmp_path, monkeypatch):
    """Each job in a process that does what a GPU's would, down to its end."""
    import real

    script = tmp_path / "jobs.py"
    script.write_text(
        "import json, sys, time\n"
        "job = json.loads(sys.argv[2])\n"
        "if job['variant'] == 'nf4 in 12 GB': raise RuntimeError('an illegal address')\n"
        "if job['variant'] == 'nf4 in 8 GB': time.sleep(60)\n"
        "made = dict.fromkeys(('date', 'commit', 'device', 'gpu', 'torch', 'transformers', "
        "'model'), 'known')\n"
        "print('said by a library')\n"
        "print(json.dumps(dict(kind='real', variant=job['variant'], missing=None, **made)))\n"
    )
    monkeypatch.setattr(real, "__file__", str(script))
    monkeypatch.setattr(real, "LEAST", 0.5)
    monkeypatch.setattr(real.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    rows, chosen = [], real.chosen(False, ["nf4 in 12 GB", "bf16, sdpa", "nf4 in 8 GB", real.STEP])
    assert real.every(chosen, False, False, time.monotonic() + 8, rows.extend) == 1
    assert [r["variant"] for r in rows] == [None, *(v.name for v in chosen)] and {
        r["device"] for r in rows
    } == {"known"}
    made, crashed, fine, slow, late = (r["missing"] for r in rows)
    assert made is fine is None and crashed == "RuntimeError: an illegal address"
    assert slow.startswith("Not done after") and late == "No time was left for it."


def test_targets_are_judged_where_they_were_put_to_the_test(gpu):
    import real

    row = real_row("a", peak=dict(used=11.5), total=60.0)
    assert real.met(row) == dict(met_gb=False, met_seconds=True)
    with pytest.raises(real.BadInput, match="choose from bf16, sdpa, nf4"):
        real.chosen(False, ["nf4"])
    for other in (
        row | dict(missing="It failed."),
        row | dict(quick=True),
        row | dict(target_gb=None, target_seconds=None),
    ):
        assert real.met(other) == dict(met_gb=None, met_seconds=None)


def test_the_real_size_is_llava_s(gpu):
    import real
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    config, processor = real.described(real.REAL)
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for p in base.parameters()) == 7_063_427_072  # as published
    seen = processor(text=["<image> a"], images=[Image.new("RGB", (640, 480))], return_tensors="pt")
    assert int((seen["input_ids"] == config.image_token_index).sum()) == 576 and seen[
        "pixel_values"
    ].shape[-2:] == (336, 336)
    text = real.answer(processor.tokenizer, 40, real.CONCEPT)
    assert len(processor.tokenizer(text, add_special_tokens=False).input_ids) == 39


def test_the_limit_is_for_the_whole_process(gpu, monkeypatch):
    """Of 80 GB, 0.5 are gone before anything is allocated, and 0.75 in the end; torch holds 7 of
    which 6.5 were in use."""
    import real

    GB, shares = 2**30, []
    now = SimpleNamespace(free=79.5, reserved=0.0)
    fake = dict(
        mem_get_info=lambda: (now.free * GB, 80 * GB),
        memory_reserved=lambda: now.reserved * GB,
        max_memory_reserved=lambda: 7 * GB,
        max_memory_allocated=lambda: 6.5 * GB,
        reset_peak_memory_stats=lambda: None,
        set_per_process_memory_fraction=shares.append,
    )
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(real, "place", lambda: "cuda")
    gauge = real.Gauge(7.5)
    real.Gauge(None)
    real.Gauge(100)
    assert shares == [7 / 80, 1.0] and real.room(real.CARD) == 79 and real.room(8) == 8
    now.free, now.reserved = 72.25, 7.0
    assert gauge.read() == dict(
        allocated=6.5, reserved=7.0, outside_at_start=0.5, outside=0.75, used=7.75
    )
    now.reserved = 0.0
    with pytest.raises(real.BadInput, match="7.8 GB of this GPU are in use by others"):
        real.Gauge(7.5)


@pytest.mark.slow
def test_the_real_size_is_rehearsed_on_a_tiny_model(gpu, tmp_path, capsys):
    """The driver's path from load to saved adapter, with an adapter that transformers and peft can
    read, and its estimate."""
    import real

    rows = []
    assert (
        real.every(
            real.chosen(True, ["bf16, sdpa", "bf16, flash-attn"]),
            True,
            False,
            math.inf,
            rows.extend,
        )
        == 0
    )
    made, ran, absent = rows
    assert made["parameters"] > 1e5 and made["shards"] == 1
    assert {*real.STAGES, "plan"} == set(ran["seconds"]) and ran["total"] >= 0.99 * sum(
        ran["seconds"][s] for s in real.STAGES
    )
    assert (
        ran["steps"] == len(ran["losses"]) == 2
        and ran["pictures"] == 2
        and ran["missing"] is None
        and ran["met_gb"] is None
    )
    assert (
        ran["planned"]["settings"]["checkpointing"]
        and ran["shares"]
        and ran["samples"] == 8 + 6 + 20 + 10 + 2 * 6 + 2 + 11
    )
    assert "CUDA GPU" in absent["missing"] or "flash-attn" in absent["missing"]
    assert "| bf16, sdpa | float32, activation checkpointing | 2 of 8" in real.tables(rows)


# --------------------------------------------------------------------------------------------------
# tuning


@pytest.mark.parametrize("target", TARGETS)
def test_candidates_fit_the_target_and_the_kernels(gpu, target):
    for sums, product in zip(*rows(target, BF16), strict=True):
        base = gpu.Candidate(sums, product, 2, 2**26)
        made = [c for stage in (gpu.sums_like, gpu.product_like) for c in stage(base, target)]
        assert len(made) > 5 and len(set(made)) >= len(made) - 1
        for c in made:
            assert (
                c.sums.BLOCK_N == c.product.BLOCK_N == sums.BLOCK_N
                and c.sums.BLOCK_V % c.product.BLOCK_V == 0
            )
        assert base in made
        for c in gpu.sums_like(base, target):
            assert (
                2 * c.sums.num_stages * (c.sums.BLOCK_N + c.sums.BLOCK_V) * c.sums.BLOCK_D
                <= SHARED_LIMIT[target]
            )
    assert gpu.launch_like(base, target)[0].waves == 1


def trial(gpu, monkeypatch, ms, error=None, scale=1.0):
    """A Trial at two D of which nothing runs: `ms` by candidate, `error` or results times `scale`
    for the second one."""
    first = gpu.Candidate(WIDE, STEP, 2, 2**26)
    some = [first, first._replace(waves=3), first._replace(waves=4)]

    def results(p, c):
        if c == some[1] and error:
            raise error
        one = torch.ones(3, 4, dtype=torch.float64)
        return one[:, 0], one * (scale if c == some[1] else 1)

    monkeypatch.setattr(gpu, "problem", lambda *given: None)
    monkeypatch.setattr(gpu, "results", results)
    monkeypatch.setattr(gpu, "milliseconds", lambda p, c: ms[some.index(c)])
    made = gpu.Trial(64, 1000, (32, 64), BF16, False)
    made.start(first, [])
    return made, some


def test_the_fastest_candidate_wins(gpu, monkeypatch):
    pytest.importorskip("triton")
    made, some = trial(gpu, monkeypatch, [2.0, 1.0, 3.0])
    assert made.fastest(some[1:], {}, math.inf) == some[1] and made.ms[some[1]] == [1.0, 1.0]
    made, some = trial(gpu, monkeypatch, [2.0, 1.0, 1.5])
    assert made.fastest(some[1:], {some[1]: "not compiled in time"}, math.inf) == some[2]
    assert [row.get("error") for row in made.tried] == [None, "not compiled in time", None]
    made, some = trial(gpu, monkeypatch, [2.0, 1.0, 3.0])
    assert made.fastest(some[1:], {}, 0.0) == some[0] and made.tried[1]["error"] == "no time left"


def test_a_wrong_candidate_is_out_however_fast(gpu, monkeypatch):
    pytest.importorskip("triton")
    made, some = trial(gpu, monkeypatch, [2.0, 1.0, 3.0], scale=1.01)
    assert made.fastest(some[1:], {}, math.inf) == some[0] and "differs" in made.tried[1]["error"]


def test_a_candidate_that_triton_refuses_is_recorded_and_other_errors_are_raised(gpu, monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors")
    made, some = trial(
        gpu, monkeypatch, [2.0, 1.0, 3.0], errors.OutOfResources(2**20, 2**17, "shared memory")
    )
    assert (
        made.fastest(some[1:], {}, math.inf) == some[0]
        and "shared memory" in made.tried[1]["error"]
    )
    made, some = trial(
        gpu, monkeypatch, [2.0, 1.0, 3.0], RuntimeError("an illegal memory access was encountered")
    )
    with pytest.raises(RuntimeError, match="illegal"):
        made.fastest(some[1:], {}, math.inf)
