"""Rows that are measured anew beside an earlier report's: when they may stand in one table, and
what the table then says."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import calls
import pytest

from fastsiu.compare import front, renewed, trials
from fastsiu.compare import run as compare
from fastsiu.compare.trials import Point
from fastsiu.evaluate.suites.suite import Subject, Suite
from fastsiu.request import BadInput, Recipe
from fastsiu.text.rate import Rate


def row(method, named, kept, n=200):
    rates = {key: Rate.of(kept, n).as_dict() for key in ("kept", "others", "lookalikes", "facts")}
    return {
        "method": method,
        "named": Rate.of(named, n).as_dict(),
        "broken": Rate.of(0, n).as_dict(),
        **rates,
        "floor_met": True,
        "front": False,
        "clearly_beaten_by": ["whoever was there"],
    }


def record(rows, **more):
    return {
        "date": "2026-11-30T00:37:35+00:00",
        "commit": "aaaaaaa",
        "device": "x86_64",
        "torch": "2",
        "transformers": "5",
        "format": compare.FORMAT,
        "suite": "made up",
        "concepts": ["Ann Lee", "Bea Lo"],
        "model": "embedded",
        "floor": 0.95,
        "recipe": Recipe().as_dict(),
        "search": {"lr": [1e-3], "steps": [1, 2], "seed": 0},
        "test": {"seeds": [1, 2, 3], "asked": {"own": 10}},
        "untouched": row("", 200, 200),
        "rows": rows,
        **more,
    }


@pytest.fixture
def earlier():
    return record([row("siu", 0, 196), row("ga", 80, 120), row("npo", 60, 150)])


@pytest.fixture
def new():
    return record([row("ga", 20, 199)], date="2026-12-02T10:00:00+00:00", commit="bbbbbbb")


def test_the_new_rows_replace_the_old_and_each_says_what_measured_it(earlier, new):
    before = copy.deepcopy(earlier)
    both = renewed.renewed(new, earlier)
    assert [r["method"] for r in both["rows"]] == ["siu", "ga", "npo"]
    assert {r["method"]: r["measured"]["commit"] for r in both["rows"]} == {
        "siu": "aaaaaaa",
        "ga": "bbbbbbb",
        "npo": "aaaaaaa",
    }
    assert both["rows"][1]["named"]["value"] == 0.1 and both["commit"] == "bbbbbbb"
    assert earlier == before and json.loads(json.dumps(both)) == both
    assert set(both["rows"][0]["measured"]) == {*renewed.PROVENANCE}


def test_the_front_is_that_of_all_rows(earlier, new):
    siu, ga, npo = renewed.renewed(new, earlier)["rows"]
    assert (siu["front"], ga["front"], npo["front"]) == (True, True, False)
    assert siu["clearly_beaten_by"] == [] and npo["clearly_beaten_by"] == ["siu", "ga"]


def test_a_row_keeps_what_measured_it_over_several_results(earlier, new):
    once = renewed.renewed(new, earlier)
    later = record([row("po", 5, 190)], date="2026-12-05T00:00:00+00:00", commit="ccccccc")
    twice = renewed.renewed(later, once)
    assert [(r["method"], r["measured"]["commit"]) for r in twice["rows"]] == [
        ("siu", "aaaaaaa"),
        ("po", "ccccccc"),
        ("ga", "bbbbbbb"),
        ("npo", "aaaaaaa"),
    ]
    assert renewed.note(twice) == (
        "Measured: ga on 2026-12-02 at commit bbbbbbb; po on 2026-12-05 at commit ccccccc; all "
        "others on 2026-11-30 at commit aaaaaaa."
    )
    assert renewed.note(earlier) == ""


def test_a_method_that_is_no_more_keeps_its_row(earlier, new):
    earlier["rows"].insert(0, row("forgotten-method", 90, 100))
    assert renewed.renewed(new, earlier)["rows"][-1]["method"] == "forgotten-method"


def test_a_row_without_a_value_is_on_no_front(earlier, new):
    none = {"value": None, "reason": "It diverged in every run."}
    new["rows"] = [{"method": "ga", "named": none, "kept": none, "front": False}]
    both = renewed.renewed(new, earlier)
    assert [r["front"] for r in both["rows"]] == [True, False, False]
    assert "It diverged in every run." in front.table(both)[2]


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("suite", "another", "the suite"),
        ("concepts", ["Ann Lee"], "the concepts"),
        ("model", "owner/name", "the model"),
        ("floor", 0.9, "the floor"),
        ("search", {"lr": [1e-3], "steps": [1, 2], "seed": 5}, "the search"),
        ("test", {"seeds": [1], "asked": {"own": 10}}, "the seeds"),
        ("untouched", row("", 199, 200), "so the world is another"),
        ("recipe", Recipe(rank=2).as_dict(), "the recipe"),
    ],
)
def test_what_cannot_stand_in_one_table_is_refused(key, value, what, earlier, new):
    new[key] = value
    with pytest.raises(BadInput, match=f"differ in .*{what}.*: measure all methods anew"):
        renewed.renewed(new, earlier)


def test_what_a_recipe_did_not_have_yet_is_off():
    now = Recipe(steps=9).as_dict()
    then = {key: value for key, value in now.items() if key not in ("directions", "relearn")}
    assert renewed.same_recipe(now, then)
    assert not renewed.same_recipe({**now, "relearn": 6}, then)
    assert not renewed.same_recipe(then, now)


class Made:
    """A made-up pool: `untouched` gives what `answers` says."""

    answers, jobs = 100, []

    def __init__(self, settings, processes):
        pass

    def map(self, verb, some):
        Made.jobs += [(verb, *job) for job in some]
        return [getattr(self, verb)(*job) for job in some]

    def prepare(self, slug, seed):
        return 1.0

    def run(self, slug, seed, name, lr, looks, part, k):
        return [Point(lr, s, self.counts(30), k) for s in looks], 2.0

    def untouched(self, slug):
        return self.counts(self.answers)

    def counts(self, named):
        return {key: (named if key == "named" else 100, 100) for key in trials.COUNTS}

    def close(self):
        pass


@pytest.fixture
def suite(tmp_path, monkeypatch):
    images = tuple(Path(f"/s/{i}.png") for i in range(5))
    subjects = [Subject(slug, slug.title(), (), (), images[0], images) for slug in ("ann", "bea")]
    made = Suite(Path("/s"), "made up", tuple(subjects), ())
    monkeypatch.setattr(compare, "Pool", Made)
    monkeypatch.setattr(compare, "read", lambda directory: made)
    monkeypatch.setattr(Made, "jobs", [])
    return made


def test_only_the_named_methods_are_measured(suite, tmp_path):
    first = calls.compare(tmp_path, None, names=["siu", "ga"], concepts=["ann"], seeds=2, steps=3)
    Made.jobs.clear()
    again = calls.compare(
        tmp_path, None, names=["ga"], concepts=["ann"], seeds=2, steps=3, beside=first
    )
    assert {j[3] for j in Made.jobs if j[0] == "run"} == {"ga"}
    both = renewed.renewed({"date": "d", "commit": "c", **again}, {"date": "d", **first})
    assert [r["method"] for r in both["rows"]] == ["siu", "ga"]


def test_another_plan_is_refused_before_anything_is_measured(suite, tmp_path):
    first = calls.compare(tmp_path, None, names=["siu"], concepts=["ann"], seeds=2, steps=3)
    Made.jobs.clear()
    for more in ({"seeds": 3}, {"concepts": ["bea"]}, {"steps": 4}, {"floor": 0.9}):
        options = {"names": ["ga"], "concepts": ["ann"], "seeds": 2, "steps": 3, **more}
        with pytest.raises(BadInput, match="measure all methods anew"):
            calls.compare(tmp_path, None, **options, beside=first)
    assert Made.jobs == []


def test_another_world_is_refused_before_the_search(suite, tmp_path, monkeypatch):
    options = {"names": ["siu"], "concepts": ["ann"], "seeds": 2, "steps": 3}
    first = calls.compare(tmp_path, None, **options)
    Made.jobs.clear()
    monkeypatch.setattr(Made, "answers", 99)
    with pytest.raises(BadInput, match="the world is another"):
        calls.compare(tmp_path, None, **options, beside=first)
    assert {j[0] for j in Made.jobs} == {"prepare", "untouched"}
