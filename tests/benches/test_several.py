"""benches/several.py: what a row of switched adapters says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastsiu.compare import switched
from fastsiu.text.concept import Concept

sys.path.append(str(Path(__file__).resolve().parents[2] / "benches"))
several = importlib.import_module("several")


@pytest.fixture
def experts():
    return [switched.Expert(Concept(name), Path("nowhere")) for name in ("Ann Lee", "Bea Lo")]


def record(**more):
    cell = {"n": 4, "before": 4, "after": 3, "named": 1}
    return {
        "mode": "switched",
        "requests": 2,
        "outcomes": [{"status": "forgotten"}, {"status": "not forgotten"}],
        "counts": {"Ann Lee": {"own": cell}, "rest": {"naming others": cell}},
        "seconds": 1.4,
        **more,
    }


def test_a_row_says_what_the_router_did_and_where_there_is_no_verdict():
    found = record(routed={"own": [3, 4], "others": [9, 9]})
    assert several.label(found) == ("switched, own adapter for 75.0 %, none for 100.0 % of others")
    assert several.label(record(mode="combine", weight=0.5)) == "combine, 0.5 times each"
    assert several.label(record(routed={"own": [1, 4], "others": [0, 0]})).endswith(
        "none for - of others"
    )
    assert several.verdicts(found) == "1"
    assert several.verdicts(record(outcomes=[{"status": "no verdict"}])) == "-"
    line = several.table([found]).splitlines()[2]
    assert line.startswith(f"| {several.label(found)} | 2 | 1 | 25.0 % (n 4) | 25 % | 25.0 (n 4) |")


def test_pictures_are_counted_by_the_adapter_that_they_reach(experts, monkeypatch):
    monkeypatch.setattr("fastsiu.demo.world.draw", lambda scene: scene)
    monkeypatch.setattr(switched, "route", lambda loaded, concepts, shown: [0, 0, None, None, 1])
    of = lambda concept, scene: (concept, "kind", scene, "Who?", "It.")
    asked = [of("Ann Lee", 1), of("Bea Lo", 2), of("Bea Lo", 3), of(None, 4), of(None, 5)]
    asked.insert(2, of(None, None))  # a fact: no picture, no router
    loaded = SimpleNamespace(picture=lambda scene: scene)
    assert several.routed(loaded, experts, asked) == {"own": [1, 3], "others": [1, 2]}


def test_the_matrix_grows_with_what_the_router_knows(experts, monkeypatch):
    """Ann's name comes back with the second adapter, Bea's is never given."""
    lines = [(4, "Ann Lee"), (7, "Bea Lo")]
    requests = [(line, SimpleNamespace(concept=c, image=c)) for line, c in lines]
    monkeypatch.setattr("fastsiu.disk.request_file.read_requests", lambda file: requests)
    monkeypatch.setattr("fastsiu.several.held_out", lambda loaded, image, *rest: [image, image])

    def answers(loaded, questions, *, experts):
        return [f"{questions[0]}." if len(experts) == 2 and "Ann" in questions[0] else "", ""]

    monkeypatch.setattr(switched, "answers", answers)
    assert several.matrix(None, Path("file"), experts, 0) == [
        {"after": [4], "named": {"4": 0.0}},
        {"after": [4, 7], "named": {"4": 0.5, "7": 0.0}},
    ]
