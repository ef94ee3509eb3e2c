"""The arithmetic of docs/at-scale.md."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from fastsiu.request import Recipe

sys.path.append(str(Path(__file__).resolve().parents[2] / "benches"))
at_scale = importlib.import_module("at_scale")


def test_whole_requests_go_to_whole_copies():
    assert at_scale.wall(10.0, 1000, 8, 1) == 1250.0
    assert at_scale.wall(10.0, 9, 8, 1) == 20.0  # the ninth waits
    assert at_scale.wall(10.0, 1, 512, 1) == 10.0  # one request is not shared out
    assert at_scale.wall(10.0, 8, 8, 3) == 40.0  # two copies on eight cards
    assert at_scale.wall(10.0, 1, 2, 3) is None


def test_a_request_costs_more_on_a_larger_model_and_with_more_steps():
    few, many = (at_scale.counted(Recipe(), steps) for steps in (10, 20))
    assert many["training"] == 2 * few["training"] and many["read"] == few["read"]
    small, large = at_scale.MODELS[0], at_scale.MODELS[1]
    assert at_scale.flops(large, few) / at_scale.flops(small, few) == pytest.approx(
        large.active / small.active
    )


def test_a_mixture_reads_all_weights_and_multiplies_few():
    parts = at_scale.seconds(at_scale.MODELS[4], at_scale.counted(Recipe()))
    assert max(parts, key=parts.__getitem__) == "answers (memory)"


def test_the_assumptions_are_those_of_the_plan():
    from fastsiu.model.memory import Layout
    from fastsiu.model.plan import TEMPLATE
    from fastsiu.model.workload import Workload

    work = Workload(1, 1)
    assert (work.suffix, work.text, work.answer, work.pictures, work.samples) == (
        at_scale.SUFFIX,
        at_scale.TEXT,
        at_scale.ANSWER,
        at_scale.PICTURES,
        at_scale.SAMPLES,
    )
    assert (Layout().ask_batch, TEMPLATE) == (at_scale.ASK_BATCH, at_scale.TEMPLATE)
