"""benches/compare.py: some methods measured anew, beside the newest result's rows of the others."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastsiu.compare import front, renewed
from fastsiu.compare import run as compare
from fastsiu.demo import export
from fastsiu.request import BadInput

BENCHES = Path(__file__).resolve().parents[2] / "benches"
sys.path.append(str(BENCHES))
bench = importlib.import_module("compare")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the bench on a result of one run with a made-up measurement: `run.asked` holds what was
    measured, `run.lines()` the results."""
    results = tmp_path / "compare.jsonl"
    newest = json.loads((BENCHES / "results" / "compare.jsonl").read_text().splitlines()[-1])
    rows = {
        row["method"]: {key: value for key, value in row.items() if key != "measured"}
        for row in newest["rows"]
        if row["method"] != "vgid-context"
    }
    newest |= {"commit": "eeeeeee", "rows": [*rows.values()]}
    results.write_text(json.dumps(newest) + "\n")
    asked, drawn = [], []

    def measured(suite, search, *, beside=None, **_):
        asked.append((search, beside))
        found = [{**rows.get(name, rows["siu"]), "method": name} for name in search.names]
        plan = {k: v for k, v in newest.items() if k not in renewed.PROVENANCE}
        return {**plan, "rows": found}

    monkeypatch.setattr(compare, "compare", measured)
    monkeypatch.setattr(export, "export", lambda folder: None)
    monkeypatch.setattr(front, "plot", lambda record, folder: drawn.append(record) or [])
    monkeypatch.setattr(bench, "RESULTS", results)
    monkeypatch.setattr(bench, "commit", lambda: "fffffff")
    monkeypatch.setattr(bench, "other_world", lambda record: "")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
        bench.main()

    run.asked, run.drawn, run.newest = asked, drawn, newest
    run.lines = lambda: [json.loads(line) for line in results.read_text().splitlines()]
    return run


def test_the_newest_results_other_rows_stand_beside_the_new_ones(run, capsys):
    run("--renew", "smfa", "vgid-context")
    (search, beside) = run.asked[0]
    assert search.names == ("smfa", "vgid-context") and beside == run.newest and search.seeds == 3
    first, last = run.lines()
    assert first == run.newest and last["commit"] == "fffffff" and run.drawn == [last]
    measured = {r["method"]: r["measured"]["commit"] for r in last["rows"]}
    assert {name for name, at in measured.items() if at == "fffffff"} == {"smfa", "vgid-context"}
    assert {at for at in measured.values()} == {"fffffff", run.newest["commit"]}
    assert len(last["rows"]) == len(run.newest["rows"]) + 1
    told = capsys.readouterr().out
    assert f"all others on {run.newest['date'][:10]} at commit {run.newest['commit']}." in told
    run("--table")
    assert capsys.readouterr().out.splitlines()[-1].startswith("Measured: smfa, vgid-context on ")


def test_a_table_of_one_run_is_the_table_alone(run, capsys):
    run("--table")
    assert all(line.startswith("|") for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    "more", [["--methods", "siu"], ["--retest"], ["--quick"], ["--renew"]], ids=" ".join
)
def test_what_does_not_go_with_it_is_refused(run, more):
    with pytest.raises(SystemExit):
        run("--renew", "smfa", *more)
    assert run.asked == []


def test_another_world_is_refused_and_nothing_appended(run, monkeypatch, capsys):
    before = run.lines()
    monkeypatch.setattr(bench, "other_world", lambda record: "the embedded world is another one")
    with pytest.raises(SystemExit):
        run("--renew", "smfa")
    assert "measure all methods anew" in capsys.readouterr().err
    assert run.asked == [] and run.lines() == before


def test_rows_of_other_seeds_are_refused_and_nothing_appended(run, monkeypatch):
    before, real = run.lines(), compare.compare

    def other(*given, **more):
        return real(*given, **more) | {"test": {"seeds": [1], "asked": {}}}

    monkeypatch.setattr(compare, "compare", other)
    with pytest.raises(BadInput, match="the seeds"):
        run("--renew", "smfa")
    assert run.lines() == before and run.drawn == []


def test_the_world_is_that_of_every_rows_commit(monkeypatch):
    codes = {"aaa": 0, "bbb": 1, "ccc": 128}
    asked = []

    def git(*arguments):
        asked.append(arguments)
        return SimpleNamespace(returncode=codes[arguments[2]])

    monkeypatch.setattr(bench, "git", git)
    one = {"commit": "aaa-dirty", "rows": [{"measured": {"commit": "aaa"}}, {}]}
    assert bench.other_world(one) == "" and asked == [("diff", "--quiet", "aaa", "--", bench.WORLD)]
    for at, said in (("bbb", "another one than at commit bbb"), ("ccc", "git knows no commit ccc")):
        one["rows"][0]["measured"]["commit"] = at
        assert said in bench.other_world(one)
