"""What lmms-eval is given, down to the words that reach it, and what is read of its results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastsiu.evaluate import lmms
from fastsiu.request import BadInput


@pytest.fixture
def models(tmp_path):
    """Directories with nothing but a configuration, in a path that a shell would take apart."""
    made = []
    for name in ("the base", "it's $HOME merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llava"}))
        made.append(tmp_path / name)
    return made


def result(task: str, metrics: dict, n: int = 100, original: int = 100) -> dict:
    """The shape of <date>_results.json at the commit that lmms.py names."""
    return {
        "results": {task: {"alias": task, "samples": n, " ": " ", **metrics}},
        "group_subtasks": {task: []},
        "configs": {task: {"task": task}},
        "versions": {task: 0.0},
        "n-shot": {task: 0},
        "higher_is_better": {task: {}},
        "n-samples": {task: {"original": original, "effective": n}},
        "config": {"model": "llava_hf"},
        "git_hash": "75571cf",
        "lmms_eval_version": "0.7.2",
        "date": "20260806_102223",
        "task_hashes": {},
        "model_source": "llava_hf",
    }


def put(
    folder: Path, side: str, task: str, metrics: dict, date: str = "20260806_102223", **more
) -> None:
    place = folder / "lmms-eval" / side / task / "x__merged"
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{date}_results.json").write_text(json.dumps(result(task, metrics, **more)))


def test_both_models_get_the_same_command(models, tmp_path):
    """run.sh with a stub in place of Python: the words arrive whole, what is done is not done
    again, a failure is told."""
    folder = lmms.write(tmp_path / "evaluation here", *models)
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python3"
    stub.write_text(
        f'#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done >>"{tmp_path}/said"\necho '
        f'>>"{tmp_path}/said"\n'
        'case "$*" in *merged*pope*) exit 3;; esac\n'
    )
    stub.chmod(0o755)
    bare = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"}
    env = {**bare, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    run = lambda **more: subprocess.run(
        [folder / "run.sh", "--limit", "5"], env={**env, **more}, capture_output=True, text=True
    )
    first = run()
    assert (
        first.returncode == 1
        and "pope failed on the merged model" in first.stderr
        and "mmvet is left out" in first.stderr
    )
    calls = [call.splitlines() for call in (tmp_path / "said").read_text().strip().split("\n\n")]
    assert (
        len(calls) == 14
        and [c[:4] for c in calls] == [["-m", "lmms_eval", "--model", "llava_hf"]] * 14
    )
    assert [c[5] for c in calls[::7]] == [f"pretrained={m}" for m in models]
    strip = lambda c: [w for w in c if not w.startswith(("pretrained=", "untouched/", "merged/"))]
    assert list(map(strip, calls[:7])) == list(map(strip, calls[7:])) and calls[0][-2:] == [
        "--limit",
        "5",
    ]
    assert [c[c.index("--tasks") + 1] for c in calls[:7]] == [
        b.task for b in lmms.BENCHMARKS if b.task != "mmvet"
    ]
    (tmp_path / "said").unlink()
    # all of it is another run
    other = subprocess.run([folder / "run.sh"], env=env, capture_output=True, text=True)
    assert (
        other.returncode == 1 and len((tmp_path / "said").read_text().strip().split("\n\n")) == 14
    )
    run()
    (tmp_path / "said").unlink()
    run(OPENAI_API_KEY="x")
    calls = [call.splitlines() for call in (tmp_path / "said").read_text().strip().split("\n\n")]
    assert [c[c.index("--tasks") + 1] for c in calls] == ["mmvet", "pope", "mmvet"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(models, tmp_path):
    folder = lmms.write(tmp_path, *models)
    done = subprocess.run(["shellcheck", folder / "run.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_needs_a_key_or_a_login_is_said(models, tmp_path):
    text = (lmms.write(tmp_path, *models) / "README.md").read_text()
    assert len([p for p in text.split("\n\n") if not p.startswith("#")]) == 2
    assert all(
        word in text
        for word in ("OPENAI_API_KEY", "MM-Vet", "hf auth login", "MMBench", "submission server")
    )


def test_what_cannot_be_evaluated_is_refused(models, tmp_path):
    base, merged = models
    (merged / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(BadInput, match="made from"):
        lmms.write(tmp_path / "out", base, merged)
    for place in models:
        (place / "config.json").write_text(json.dumps({"model_type": "paligemma"}))
    with pytest.raises(BadInput, match=r"no loader for models of type paligemma"):
        lmms.write(tmp_path / "out", base, merged)
    (base / "config.json").write_text(json.dumps({"model_type": "llava"}))
    comma = base.rename(tmp_path / "a,b")
    with pytest.raises(BadInput, match="commas"):
        lmms.write(tmp_path / "out", comma, comma)
    assert not (tmp_path / "out").exists()
    base = comma.rename(tmp_path / "base")
    lmms.write(tmp_path / "out", base, base)
    with pytest.raises(BadInput, match="exists"):
        lmms.write(tmp_path / "out", base, base)


def test_results_are_read(tmp_path):
    put(tmp_path, "untouched", "gqa", {"exact_match,none": 0.62, "exact_match_stderr,none": 0.01})
    put(
        tmp_path,
        "merged",
        "gqa",
        {"exact_match,none": 0.30, "exact_match_stderr,none": 0.01},
        date="20260805_102223",
    )
    put(
        tmp_path,
        "merged",
        "gqa",
        {"exact_match,none": 0.60, "exact_match_stderr,none": "N/A"},
        n=50,
    )
    put(
        tmp_path,
        "untouched",
        "mmbench_en_dev_static",
        {"gpt_eval_score,none": 64.0, "gpt_eval_score_stderr,none": "N/A", "submission,none": None},
    )
    put(
        tmp_path,
        "merged",
        "mmbench_en_dev_static",
        {"gpt_eval_score,none": 58.0, "gpt_eval_score_stderr,none": "N/A"},
    )
    put(tmp_path, "untouched", "pope", {"pope_accuracy,none": 0.9, "pope_f1_score,none": 0.2})
    put(tmp_path, "untouched", "mmvet", {"gpt_eval_score,none": 31.0})
    put(tmp_path, "merged", "mmvet", {"gpt_eval_score,none": 0.0})
    put(tmp_path, "merged", "vqav2_val", {"submission,none": None})
    found = lmms.read_results(tmp_path)
    rows = {row["name"]: row for row in found["benchmarks"]}
    assert list(rows) == ["GQA", "VQAv2", "VizWiz", "SQA-I", "TextVQA", "POPE", "MMBench", "MM-Vet"]
    assert rows["GQA"]["untouched"] == {
        "value": 0.62,
        "n": 100,
        "low": pytest.approx(0.6004),
        "high": pytest.approx(0.6396),
    }
    assert rows["GQA"]["merged"] == {"value": 0.60, "n": 50}  # the newest
    assert (
        rows["MMBench"]["merged"]["value"] == pytest.approx(0.58)
        and rows["POPE"]["untouched"]["value"] == 0.9
    )
    # The mean is over the two that both have: POPE was run on one, MM-Vet had no judge.
    assert found["mean"]["untouched"] == {"value": pytest.approx(0.63), "n": 2}
    assert found["mean"]["merged"] == {"value": pytest.approx(0.59), "n": 2}
    told = {text.split(":")[0]: text for text in found["missing"]}
    assert list(told) == ["VQAv2", "VizWiz", "SQA-I", "TextVQA", "POPE", "MM-Vet"]
    assert (
        "merged" in told["POPE"] and "judge" in told["MM-Vet"] and "no exact_match" in told["VQAv2"]
    )
    assert found["limited"] == ["gqa"]


def test_what_is_no_result_is_told(tmp_path):
    with pytest.raises(BadInput, match=r"run\.sh"):
        lmms.read_results(tmp_path)
    (tmp_path / "lmms-eval" / "merged").mkdir(parents=True)
    empty = lmms.read_results(tmp_path)
    assert empty["mean"]["merged"]["value"] is None and len(empty["missing"]) == 8
    (tmp_path / "lmms-eval" / "merged" / "1_results.json").write_text("[]")
    with pytest.raises(BadInput, match="not a results file"):
        lmms.read_results(tmp_path)
