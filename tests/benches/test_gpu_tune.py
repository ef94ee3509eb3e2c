"""benches/gpu_tune.py without a GPU: which candidates there are, which wins, and what is written
down before the end."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from gpu_rows import STEP, WIDE

from fastsiu.kernels.triton_launch import SHARED_LIMIT, TARGETS, rows

ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16


@pytest.fixture
def tuner(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    import gpu_tune

    return gpu_tune


@pytest.mark.parametrize("target", TARGETS)
def test_candidates_fit_the_target_and_the_kernels(tuner, target):
    for sums, product in zip(*rows(target, BF16), strict=True):
        base = tuner.Candidate(sums, product, 2, 2**26)
        made = [c for stage in (tuner.sums_like, tuner.product_like) for c in stage(base, target)]
        assert len(made) > 5 and len(set(made)) >= len(made) - 1
        for c in made:
            assert (
                c.sums.BLOCK_N == c.product.BLOCK_N == sums.BLOCK_N
                and c.sums.BLOCK_V % c.product.BLOCK_V == 0
            )
        assert base in made
        for c in tuner.sums_like(base, target):
            assert (
                2 * c.sums.num_stages * (c.sums.BLOCK_N + c.sums.BLOCK_V) * c.sums.BLOCK_D
                <= SHARED_LIMIT[target]
            )
    assert tuner.launch_like(base, target)[0].waves == 1


def trial(tuner, monkeypatch, ms, error=None, scale=1.0):
    """A Trial at two D of which nothing runs: `ms` by candidate, `error` or results times `scale`
    for the second one. (trial, candidates, rows written down)"""
    first = tuner.Candidate(WIDE, STEP, 2, 2**26)
    some = [first, first._replace(waves=3), first._replace(waves=4)]
    written = []

    def results(p, c):
        if c == some[1] and error:
            raise error
        one = torch.ones(3, 4, dtype=torch.float64)
        return one[:, 0], one * (scale if c == some[1] else 1)

    monkeypatch.setattr(tuner, "problem", lambda *given: None)
    monkeypatch.setattr(tuner, "results", results)
    monkeypatch.setattr(tuner, "milliseconds", lambda p, c, clock: ms[some.index(c)])
    made = tuner.Trial(64, 1000, (32, 64), BF16, object(), written.append)
    made.start(first, [])
    return made, some, written


def test_the_fastest_candidate_wins(tuner, monkeypatch):
    pytest.importorskip("triton")
    made, some, _ = trial(tuner, monkeypatch, [2.0, 1.0, 3.0])
    made.measure(some[1:], {}, math.inf)
    assert made.best == some[1] and made.ms[some[1]] == [1.0, 1.0]
    made, some, written = trial(tuner, monkeypatch, [2.0, 1.0, 1.5])
    made.measure(some[1:], {some[1]: "not compiled in time"}, math.inf)
    assert made.best == some[2]
    assert [r.get("error") for r in written if r["kind"] == "candidate"] == [
        None,
        "not compiled in time",
        None,
    ]
    made, some, written = trial(tuner, monkeypatch, [2.0, 1.0, 3.0])
    made.measure(some[1:], {}, 0.0)
    assert made.best == some[0] and written[-1]["error"] == "no time left"


def test_what_was_timed_is_written_down_at_once(tuner, monkeypatch):
    """A kill after any candidate leaves the fastest so far: apply.py takes the last row."""
    pytest.importorskip("triton")
    made, some, written = trial(tuner, monkeypatch, [2.0, 1.0, 3.0])
    assert [r["kind"] for r in written] == ["candidate", "tune"]
    made.measure(some[1:2], {}, math.inf)
    made.measure(some[2:], {}, math.inf)
    assert [r["kind"] for r in written] == ["candidate", "tune", "candidate", "tune", "candidate"]
    stamp = dict(target="sm_90", dtype="bfloat16", V=1000, D=[32, 64], device="A GPU")
    stamp |= dict(date="2026-01-02T03:04:05+00:00", commit="0123abc")
    import rows as results

    for end, waves in ((2, 2), (4, 3), (5, 3)):
        kept = [json.loads(json.dumps(stamp | r)) for r in written[:end]]
        ((_, _, found, chunk, why),) = results.plans_of(kept).values()
        assert (found, chunk) == (waves, 2**26) and "the predicted row 2.000 / 2.000" in why


def test_a_wrong_candidate_is_out_however_fast(tuner, monkeypatch):
    pytest.importorskip("triton")
    made, some, written = trial(tuner, monkeypatch, [2.0, 1.0, 3.0], scale=1.01)
    made.measure(some[1:], {}, math.inf)
    assert made.best == some[0] and "differs" in written[2]["error"]


def test_a_candidate_that_triton_refuses_is_recorded_and_other_errors_are_raised(
    tuner, monkeypatch
):
    errors = pytest.importorskip("triton.runtime.errors")
    refused = errors.OutOfResources(2**20, 2**17, "shared memory")
    made, some, written = trial(tuner, monkeypatch, [2.0, 1.0, 3.0], refused)
    made.measure(some[1:], {}, math.inf)
    assert made.best == some[0] and "shared memory" in written[2]["error"]
    fault = RuntimeError("an illegal memory access was encountered")
    made, some, _ = trial(tuner, monkeypatch, [2.0, 1.0, 3.0], fault)
    with pytest.raises(RuntimeError, match="illegal"):
        made.measure(some[1:], {}, math.inf)


def test_a_compilation_without_time_is_ended(tuner, monkeypatch):
    """A stage does not wait for compilers that are still at work."""
    monkeypatch.setattr(tuner, "processes", lambda jobs: 1)
    monkeypatch.setattr(tuner, "compiles", time.sleep)
    began = time.monotonic()
    found = tuner.compiled([0.0, 500.0], time.monotonic() + 60)
    assert list(found) == [500.0] and "not compiled in time" in found[500.0]
    assert time.monotonic() - began < 120 and tuner.compiled([], 1.0) == {}
