"""The paper's eight public benchmarks (section 5.1, its Specificity) through lmms-eval: the script
that runs them, and the results that it left.

FastSIU itself runs nothing here: the data sets are downloads of gigabytes, and a run takes hours of
a GPU. Names of models, tasks and metrics, flags and the shape of the results were read from
EvolvingLMMs-Lab/lmms-eval at commit 75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 (version 0.7.2,
2026-08-06).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..guards.small_file import read_bytes
from ..model import source
from ..request import BadInput

FOLDER = "lmms-eval"
SIDES = ("untouched", "merged")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. task: lmms-eval's name; metric: the one that counts, higher is better; full:
    the score of a perfect model."""

    name: str
    task: str
    metric: str
    full: float = 1.0


# In the paper's order. Each is the split that lmms-eval scores itself: the test answers of VQAv2,
# VizWiz and MMBench are secret. MMBench without its judge: the letter is read out of the answer.
# POPE by accuracy, at which answering always yes scores a half.
BENCHMARKS = (
    Benchmark("GQA", "gqa", "exact_match"),
    Benchmark("VQAv2", "vqav2_val", "exact_match"),
    Benchmark("VizWiz", "vizwiz_vqa_val", "exact_match"),
    Benchmark("SQA-I", "scienceqa_img", "exact_match"),
    Benchmark("TextVQA", "textvqa_val", "exact_match"),
    Benchmark("POPE", "pope", "pope_accuracy"),
    Benchmark("MMBench", "mmbench_en_dev_static", "gpt_eval_score", 100.0),
    Benchmark("MM-Vet", "mmvet", "gpt_eval_score", 100.0),
)

# `model_type` of a configuration -> lmms-eval's name of what loads such a model with transformers'
# own classes. Left out: those that choose the class by the directory's name, and the general
# "huggingface", whose check of the type never finds one.
MODELS = {
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_5": "qwen3_5",
    "internvl": "internvl_hf",
    "gemma3": "gemma3",
    "idefics2": "idefics2",
    "mllama": "llama_vision",
    "llama4": "llama4_scout",
    "instructblip": "instructblip",
}

_SCRIPT = """#!/usr/bin/env bash
# The same benchmarks on the untouched and on the merged model. Arguments go on to lmms-eval, such as --limit 100.
# What has finished with these arguments is not run again.
# shellcheck disable=SC2016 # a dollar in a path stands for itself
set -euo pipefail
cd "$(dirname "$0")"
untouched={untouched}
merged={merged}
failed=0

evaluate() {{ # side, model, further arguments
  local side=$1 model=$2 task
  shift 2
  while read -r task; do
    if [ -e "$side/$task/finished" ] && [ "$(cat "$side/$task/finished")" = "with: $*" ]; then
      continue
    fi
    if [ "$task" = mmvet ] && [ -z "${{OPENAI_API_KEY:-}}" ]; then
      echo "mmvet is left out: its judge needs OPENAI_API_KEY, and without one every answer would score 0." >&2
      continue
    fi
    mkdir -p "$side/$task"
    if python3 -m lmms_eval --model {adapter} --model_args "pretrained=$model" --tasks "$task" --batch_size 1 \\
      --output_path "$side/$task" "$@" </dev/null; then
      echo "with: $*" >"$side/$task/finished"
    else
      echo "$task failed on the $side model." >&2
      failed=1
    fi
  done <tasks.txt
}}

evaluate untouched "$untouched" "$@"
evaluate merged "$merged" "$@"
exit "$failed"
"""  # noqa: E501

_README = """# Public benchmarks of the untouched and the merged model

`run.sh` puts the paper's eight benchmarks, listed in `tasks.txt`, to both models with the same command. First install lmms-eval \
(`pip install lmms-eval`; 0.7.2 was read for this) into the environment that `python3` is. The data sets come from the Hugging \
Face hub, tens of gigabytes in all; those of GQA, VQAv2, SQA-I, POPE, MMBench and MM-Vet need a login (`hf auth login`, any \
account). A full run is hours of a GPU for each model: `./run.sh --limit 100` looks at the first hundred of each. What is done \
is skipped when it is run again.

MM-Vet is graded by a judge behind an API, to which lmms-eval sends its questions, its reference answers and the model's \
answers: set `OPENAI_API_KEY` (and `MODEL_VERSION` for the judge's name), or it is left out. MMBench is scored on its \
development set without one, by reading the letter out of the answer; its test set needs the benchmark's own submission \
server, as do the test sets of VQAv2 and VizWiz, whose validation sets are used here. Nothing of this asks about the \
forgotten concept: it is what else the model can still do.
"""  # noqa: E501


def write(directory: str | Path, model: str | Path, merged: str | Path) -> Path:
    """Writes DIRECTORY/lmms-eval/ with run.sh, tasks.txt and README.md for both models, and returns
    that path. Nothing is run.

    model:  the untouched model, a hub id or a directory
    merged: a directory that `fastsiu merge` wrote

    Raises BadInput for a model without a loader in lmms-eval, for two models of different types,
    for a path that lmms-eval cannot take, and where DIRECTORY/lmms-eval exists.
    """
    kinds = [source.read_config(str(m)).model_type for m in (model, merged)]
    if kinds[0] != kinds[1]:
        raise BadInput(
            f"{model} is a {kinds[0]} and {merged} a {kinds[1]}: give the model that the merged "
            "one was made from."
        )
    if kinds[0] not in MODELS:
        raise BadInput(
            f"lmms-eval has no loader for models of type {kinds[0]} (it has for "
            f"{', '.join(MODELS)}): leave --lmms-eval out."
        )
    places = [str(Path(m).resolve()) if Path(m).is_dir() else str(m) for m in (model, merged)]
    if bad := [place for place in places if "," in place or "\n" in place]:
        raise BadInput(
            f"lmms-eval splits its arguments at commas, and {bad[0]!r} has one: rename the "
            "directory."
        )
    folder = Path(directory) / FOLDER
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise BadInput(f"{folder} exists: remove it, or give another directory.") from None
    except OSError as error:
        raise BadInput(
            f"{folder} cannot be written ({error.strerror}): give another directory."
        ) from error
    untouched, after = map(shlex.quote, places)
    script = folder / "run.sh"
    script.write_text(
        _SCRIPT.format(untouched=untouched, merged=after, adapter=MODELS[kinds[0]]),
        encoding="utf-8",
    )
    script.chmod(script.stat().st_mode | 0o111)
    (folder / "tasks.txt").write_text("".join(f"{b.task}\n" for b in BENCHMARKS), encoding="utf-8")
    (folder / "README.md").write_text(_README, encoding="utf-8")
    return folder


def read_results(directory: str | Path) -> dict[str, Any]:
    """The results that lmms-eval wrote below DIRECTORY/lmms-eval/, the newest where a benchmark was
    run twice.

    Returns a dict:
        benchmarks  [{name, task, metric, untouched, merged}], each side {value, n, low, high} or
                    {value: None, reason}
        mean        {untouched, merged}, each {value, n: number of benchmarks} over the benchmarks
                    that both have, or {value: None, reason}
        missing     a sentence for each benchmark that does not count
        limited     tasks that were not run in full
    Values are shares of a perfect score. low and high are the 95 % interval, from lmms-eval's
    standard error where it gives one.

    Raises BadInput where there is no such directory or a file is not lmms-eval's.
    """
    folder = Path(directory) / FOLDER
    if not folder.is_dir():
        raise BadInput(f"There is no {folder}: write it with --lmms-eval, and run its run.sh.")
    sides = {side: _runs(folder / side) for side in SIDES}
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    limited: set[str] = set()
    for bench in BENCHMARKS:
        found = {side: _score(sides[side].get(bench.task), bench, side) for side in SIDES}
        rows.append({"name": bench.name, "task": bench.task, "metric": bench.metric, **found})
        reasons = [one["reason"] for one in found.values() if one["value"] is None]
        missing += [f"{bench.name}: {' '.join(reasons)}"] if reasons else []
        limited |= {
            bench.task for side in SIDES if _is_limited(sides[side].get(bench.task), bench.task)
        }
    both = [row for row in rows if all(row[side]["value"] is not None for side in SIDES)]
    why = {"value": None, "reason": "No benchmark has been run on both models."}
    mean = {
        side: {"value": sum(r[side]["value"] for r in both) / len(both), "n": len(both)}
        if both
        else why
        for side in SIDES
    }
    return {"benchmarks": rows, "mean": mean, "missing": missing, "limited": sorted(limited)}


def _runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Task -> the newest results file that has it; their names begin with the date."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*_results.json"), key=lambda path: path.name):
        try:
            run = json.loads(read_bytes(path).decode("utf-8-sig"))
            tasks = list(run["results"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{path} is not a results file of lmms-eval: remove it and run run.sh again."
            ) from error
        found |= {task: run for task in tasks}
    return found


def _score(run: Mapping[str, Any] | None, bench: Benchmark, side: str) -> dict[str, Any]:
    """{value, n, low, high}, or {value: None, reason}."""
    if run is None:
        return {"value": None, "reason": f"It was not run on the {side} model."}
    given = run["results"][bench.task]
    value, error = given.get(f"{bench.metric},none"), given.get(f"{bench.metric}_stderr,none")
    if not _number(value):
        return {"value": None, "reason": f"Its results on the {side} model hold no {bench.metric}."}
    if bench.task == "mmvet" and value == 0:  # what lmms-eval gives an answer that no judge graded
        return {
            "value": None,
            "reason": f"On the {side} model every answer scored 0, as where the judge does not "
            "reply.",
        }
    value = value / bench.full
    found: dict[str, Any] = {
        "value": value,
        "n": given.get("samples", _counted(run, bench.task).get("effective")),
    }
    if _number(error):
        half = 1.96 * error / bench.full
        found |= {"low": max(0.0, value - half), "high": min(1.0, value + half)}
    return found


def _is_limited(run: Mapping[str, Any] | None, task: str) -> bool:
    counted = _counted(run, task) if run else {}
    return bool(counted) and counted["effective"] < counted["original"]


def _counted(run: Mapping[str, Any], task: str) -> dict[str, int]:
    return run.get("n-samples", {}).get(task, {})


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
