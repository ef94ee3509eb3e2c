"""`fastsiu benchmark` on small sets and the embedded model: whom it asks, what it writes, what it
refuses."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("pyarrow", reason="the extra [benchmarks] is not installed")

import benchmark_sets as made

from fastsiu.cli import run as command
from fastsiu.evaluate.benchmarks import run
from fastsiu.request import BadInput


@pytest.mark.parametrize("name", ["mllmu", "fiubench"])
def test_a_model_is_asked_and_its_probabilities_are_the_formula(loaded, tmp_path, name):
    found = run.read(name, made.SETS[name](tmp_path))
    items = run.chosen(found, run.Choice(limit=2))
    answers = run.ask_items(loaded, name, items, max_new_tokens=4)
    assert [*answers] == [item.id for item in items] and len({i.id for i in items}) < len(
        found.items
    )
    for item in items:
        answer = answers[item.id]
        assert len(answer.rephrased) == len(item.rephrased)
        assert len(answer.wrong) == (len(item.wrong) if name in run.LIKELY else 0)
    if name not in run.LIKELY:
        return
    # One item on full logits: the tokens of the answer and nothing of the turn's end.
    item = next(i for i in items if i.photo is not None)
    picture = loaded.picture(item.photo.load())
    ids = loaded.tokenizer(item.answer, add_special_tokens=False).input_ids
    assert len(answers[item.id].nats) == len(ids)
    from fastsiu.model import ask, vlm

    turn = vlm.encoder(loaded)(item.question, item.wrong[0], picture, False)
    score = ask.label_scores(loaded, [turn], [picture], ways=())[0]
    assert answers[item.id].wrong[0] == pytest.approx(-float(score.log_p.mean()), rel=1e-4)


def test_the_verb_writes_a_table_that_another_run_compares_with(tmp_path, capsys):
    root, first = str(made.fiubench(tmp_path / "set")), tmp_path / "first.json"
    common = ["benchmark", "fiubench", root, "--limit", "2", "--max-new-tokens", "2"]
    assert command([*common, "--set", "forget5", "--output", str(first)]) == 0
    report = json.loads(first.read_text())
    assert report["counts"]["forget5"] == 4 and report["asked"] == 2
    shown = capsys.readouterr().out
    assert "Truth Ratio" in shown and "never learned the set" in shown
    both = [*common, "--set", "forget5", "--retrained", str(first), "--json"]
    assert command(both) == 0
    table = json.loads(capsys.readouterr().out)["table"]
    ks = next(row for row in table if row["metric"] == "KS-Test")
    assert ks["untouched"]["value"] == 1.0  # the same model
    assert command([*common, "--output", str(first)]) == 2
    assert "exists" in capsys.readouterr().err and json.loads(first.read_text()) == report


def test_the_file_beside_a_table_repeats_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made.mllmu(tmp_path / "set")
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    asked = ["benchmark", "mllmu", "set", "--limit", "1", "--max-new-tokens", "2"]
    assert command([*asked, "--set", "Forget", "--output", str(first)]) == 0
    beside = run.repeating(first)
    assert beside.stat().st_mode & 0o777 == 0o600
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command(["--config", str(beside), "--output", str(again)]) == 0
    assert first.read_bytes() == again.read_bytes()
    first.unlink()
    assert command(["--config", str(beside), "--output", str(first)]) == 2
    assert "first.json.toml exists" in " ".join(capsys.readouterr().err.split())
    assert not first.exists()


def test_the_verb_checks_and_makes_suites(tmp_path, capsys):
    root = str(made.mmubench(tmp_path / "set"))
    assert command(["benchmark", "mmubench", root, "--check"]) == 0
    assert "2 entities, 6 pictures, 16 items" in " ".join(capsys.readouterr().err.split())
    assert command(["benchmark", "mmubench", root, "--suite", str(tmp_path / "suite")]) == 0
    assert command(["suite", str(tmp_path / "suite"), "--check"]) == 0
    assert "2 concepts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nobench", "."], "is no benchmark that can be read"),
        (["clear", "nowhere"], "There is no directory nowhere"),
        (["mmubench", ".", "--ratio", "5"], "has no split of 5 %"),
        (["clear", ".", "--ratio", "7"], "it has 1, 5, 10"),
        (["clear", ".", "--names", "x.json"], "add --suite"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(["benchmark", *arguments]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_an_unknown_set_is_refused_with_those_there_are(tmp_path):
    found = run.read("mmubench", made.mmubench(tmp_path))
    with pytest.raises(BadInput, match="choose from Efficacy, Generality"):
        run.chosen(found, run.Choice(("forget",)))


def test_another_model_is_no_use_where_nothing_compares_with_it(tmp_path):
    file = made.put(tmp_path / "a.json", {})
    with pytest.raises(BadInput, match="MMUBench has no metric that compares"):
        run.measure(
            "mmubench",
            made.mmubench(tmp_path),
            run.Choice(),
            scoring=run.Scoring(retrained=file),
        )


def test_answers_of_another_benchmark_are_refused(tmp_path):
    file = made.put(tmp_path / "a.json", {"format": run.FORMAT, "reader": "clear", "answers": {}})
    with pytest.raises(BadInput, match="no answers to this benchmark"):
        run._answers(file, "fiubench")
