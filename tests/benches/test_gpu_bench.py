"""benches/gpu.py without a GPU: a step that fails is recorded, and the next one runs."""

import importlib.util
import math
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_rows import STEP, WIDE, real_row, synthetic

from fastsiu.kernels.triton_launch import SHARED_LIMIT, TARGETS, rows

ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch):
    """benches/gpu.py; what it changes in benches/loss.py is put back."""
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    import gpu
    import loss

    for name in ("RESULTS", "PLOTS"):
        monkeypatch.setattr(loss, name, getattr(loss, name))
    return gpu


def test_bad_input_is_one_sentence(gpu, tmp_path, capsys, monkeypatch):
    taken = tmp_path / "taken"
    taken.write_text("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["--quick", "--output", taken], []):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
        assert gpu.main() == 2, arguments
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("gpu.py: "), said
    assert ("--quick" if importlib.util.find_spec("triton") else "fastsiu[triton]") in said


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
        and ran["pictures"] == 2 + 4
        and ran["missing"] is None
        and ran["met_gb"] is None
    )
    assert (
        ran["planned"]["settings"]["checkpointing"]
        and ran["shares"]
        # the generic pictures' answers are a random model's: gibberish gives no sample
        and 0 <= ran["samples"] - (8 + 6 + 20 + 10 + 2 * 6 + 2 + 11) <= 4 * 12
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
