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
