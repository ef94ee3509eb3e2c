"""benches/clock.py without a GPU: the order in which it asks one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def asked(monkeypatch):
    """A GPU that only writes down what it is asked for; a fill takes 1 ms, and the GPU begins with
    a piece of work when `busy` is over."""
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    import clock

    seen = SimpleNamespace(log=[], busy=True, clock=clock, host=0.0)

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            seen.log.append("event")

        def query(self):
            seen.log.append("asked")
            return not seen.busy

        def elapsed_time(self, other):
            return 8.0

    buffer = SimpleNamespace(zero_=lambda: seen.log.append("fill"))
    monkeypatch.setattr(clock.torch, "empty", lambda *size, **given: buffer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.log.append("wait"))
    monkeypatch.setattr(clock.Clock, "launching", lambda self, work: seen.host)
    return seen


def test_the_work_lies_behind_fills_that_outlast_its_launch(asked):
    clock = asked.clock.Clock()
    assert clock.fill_seconds == pytest.approx(1e-3)
    asked.log.clear()
    asked.host = 2.5e-3
    found = clock.queued(lambda: asked.log.append("work"))
    assert asked.log == ["fill"] * 6 + ["event", "work", "event", "asked", "wait"]
    assert found == (8e-3, 2.5e-3, True)
    asked.log.clear()
    clock.queued(lambda: asked.log.append("work"), hot=True)
    assert asked.log == ["fill"] * 11 + ["work", "event", "work", "event", "asked", "wait"]


def test_a_queue_that_ran_empty_is_told(asked):
    clock = asked.clock.Clock()
    asked.busy = False
    assert not clock.queued(lambda: None).full
    asked.log.clear()
    asked.host = 60.0
    clock.queued(lambda: None)
    assert asked.log.count("fill") == asked.clock.MOST


def test_a_table_of_a_gpu_has_replayed_graphs_beside_the_calls(asked):
    import loss

    row = dict(
        missing=None, package="torch", version="2", skips_dw=True, ours=False, how="one call"
    )
    row |= dict(terms="CE+KL", keeps="-", teacher_mib=0.0, mib=1.0, x_floor=2.0, accuracy=[])
    plain = row | dict(contender="a rival", ms=dict(median=4.0))
    graph = plain | dict(contender="ours", ms_graph=dict(median=3.0), x_floor_graph=1.5)
    head, _, *lines = loss.table([plain, graph]).splitlines()
    assert "| time | to floor | graph | to floor | memory |" in head
    assert "| 4.00 ms | 2.00 | 3.00 ms | 1.50 | 1 MiB |" in lines[1]
    assert "| 4.00 ms | 2.00 | - | - | 1 MiB |" in lines[0]
    assert "graph" not in loss.table([plain])
