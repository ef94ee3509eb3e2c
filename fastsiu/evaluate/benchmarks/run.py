"""`fastsiu benchmark`: asks a model a benchmark's items and computes the benchmark's metrics.

The table has them under the benchmark's own names: for the untouched model, and with an adapter for
the unlearned one as well.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

from ...disk.staging import check_new, new_file
from ...guards.strict_json import read_json
from ...model import adapter, adapter_files, ask, vlm
from ...model.turns import Encoded, Picture
from ...request import BadInput, Recipe
from ...session import Listener
from ...settings import ModelRef, Settings, choose_layout
from ..eval_files import Loadable
from ..exam import evenly
from ..grading import Grader
from . import clear, fiubench, judged, mllmu, mlubench, mmubench, ppubench, scores
from .form import Answer, Answered, Benchmark, Item, Row

FORMAT = "fastsiu benchmark 1"
READERS: dict[str, ModuleType] = {
    "mmubench": mmubench,
    "mlubench": mlubench,
    "fiubench": fiubench,
    "clear": clear,
    "mllmu": mllmu,
    "ppubench": ppubench,
}
# The percentages to forget that a set is split by, the authors' first choice first. The other sets
# are not split by percentages.
RATIOS: dict[str, tuple[int, ...]] = {
    "fiubench": (5, 1, 10),
    "clear": (10, 5, 1),
    "mllmu": (5, 10, 15),
    "ppubench": (5, 10, 15, 30),
}
LIKELY = ("fiubench", "clear")  # The metrics of these need the probability of given answers.
AT_ONCE = 16  # pictures on the device


@dataclass(frozen=True)
class Choice:
    """What of a benchmark is asked.

    sets:  only these, by the benchmark's own names; all where it is empty
    limit: at most so many items of each set, at even distances
    """

    sets: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class Scoring:
    """What the metrics need besides the answers.

    stem:      ROUGE compares the stems of words, with nltk, as the authors do; else whole words
    retrained: an output of `measure` for a model that never learned what is to be forgotten; some
               metrics compare with that model's answers
    judge:     who grades the answers, for metrics that a language model grades; what leaves the
               machine is told first
    """

    stem: bool = False
    retrained: Path | None = None
    judge: Grader | None = None


@dataclass(frozen=True)
class Measured:
    """What `measure` returns; report: the file's content."""

    report: dict[str, Any]
    output: Path | None


def read(name: str, directory: Path, ratio: int | None = None) -> Benchmark:
    """Reads a benchmark and checks all of it except the pixels of its pictures.

    Raises BadInput for an unknown name, for a percentage that it is not split by, and for a damaged
    set.
    """
    if name not in READERS:
        raise BadInput(f"{name!r} is no benchmark that can be read: give {', '.join(READERS)}.")
    if not directory.is_dir():
        raise BadInput(f"There is no directory {directory}: give the one that holds the set.")
    known = RATIOS.get(name, ())
    if ratio is None:
        return _read(name, directory, *known[:1])
    if ratio not in known:
        said = ", ".join(map(str, sorted(known))) or "none; leave --ratio out"
        raise BadInput(f"{READERS[name].NAME} has no split of {ratio} %: it has {said}.")
    return _read(name, directory, ratio)


def _read(name: str, *arguments: Any) -> Benchmark:
    found: Benchmark = READERS[name].read(*arguments)
    return found


def told(benchmark: Benchmark) -> str:
    """Decodes every picture. Returns a sentence with the counts. Raises BadInput for a picture that
    cannot be read."""
    photos = {p.label: p for e in benchmark.entities for p in e.photos}
    photos |= {i.photo.label: i.photo for i in benchmark.items if i.photo is not None}
    for photo in photos.values():
        photo.load()
    counts = ", ".join(f"{number} {what}" for what, number in benchmark.counts().items())
    return f"{benchmark.name}: {counts}, and no defect."


def chosen(benchmark: Benchmark, choice: Choice) -> tuple[Item, ...]:
    """The items to ask, in the benchmark's order. Raises BadInput for an unknown set."""
    known = dict.fromkeys(name for item in benchmark.items for name in sorted(item.sets))
    for name in choice.sets:
        if name not in known:
            raise BadInput(f"{benchmark.name} has no set {name!r}: choose from {', '.join(known)}.")
    picked: set[str] = set()
    for name in choice.sets or known:
        picked |= {item.id for item in evenly(benchmark.of(name), choice.limit)}
    return tuple(item for item in benchmark.items if item.id in picked)


def measure(
    name: str,
    directory: Path,
    choice: Choice,
    *,
    ratio: int | None = None,
    model: ModelRef = ModelRef(),
    adapter_dir: Path | None = None,
    settings: Settings = Settings(),
    max_new_tokens: int = 64,
    scoring: Scoring = Scoring(),
    output: Path | None = None,
    listener: Listener | None = None,
) -> Measured:
    """Asks the untouched model and, with `adapter_dir`, the unlearned one.

    output: a JSON file for the table and the answers; None writes nothing

    Raises BadInput and OutOfMemory.
    """
    listener, grader = listener or Listener(), scoring.judge
    stem, retrained = scoring.stem, scoring.retrained
    if output is not None:
        check_new(output, "give another file")
    if retrained is not None and name in READERS and name not in LIKELY:
        raise BadInput(
            f"{READERS[name].NAME} has no metric that compares with another model: leave "
            "--retrained out."
        )
    if grader is not None and name in READERS and not hasattr(READERS[name], "judged"):
        raise BadInput(
            f"{READERS[name].NAME} has no metric that a judge grades: leave --judge out."
        )
    split = functools.partial(scores.tokens, stem=scores.porter() if stem else None)
    benchmark = read(name, directory, ratio)
    items = chosen(benchmark, choice)
    if not items:
        raise BadInput(f"{benchmark.name} has no item to ask: choose other sets.")
    wanted = [] if grader is None else READERS[name].judged(items)
    if grader is not None:  # what may not be sent is told now, not after hours of asking
        judged.check(grader, benchmark.name, wanted, 1 if adapter_dir is None else 2)
    theirs = None if retrained is None else _answers(retrained, name)
    which = Loadable(model, choose_layout(model, settings, Recipe(), None, listener), listener)
    notes = list(_notes(stem))
    with which.loaded() as loaded:
        if adapter_dir is not None:
            adapter_files.check_directory(adapter_dir)
            notes += adapter_files.check_belongs(
                adapter_dir, model.name, loaded.revision, which.weights
            )
        put = functools.partial(ask_items, loaded, name, items, max_new_tokens=max_new_tokens)
        listener.stage(f"Asking the untouched model {len(items)} items")
        said = {"untouched": put()}
        if adapter_dir is not None:
            adapter.load(loaded, adapter_dir)
            listener.stage(f"Asking the unlearned model {len(items)} items")
            said["unlearned"] = put()
            adapter.detach(loaded)
    grades = judged.Grades()
    if grader is not None:
        listener.stage(f"Asking the judge {grader.model}")
        grades = judged.grade(grader, benchmark, wanted, said, listener.note)
    tables = {
        who: READERS[name].table(
            Answered(items, answers, split, theirs, grades.values.get(who, {}))
        )
        for who, answers in said.items()
    }
    report = {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "reader": name,
        "source": READERS[name].SOURCE,
        "model": model.name,
        "counts": benchmark.counts(),
        "published": READERS[name].PUBLISHED,
        "asked": len(items),
        "notes": [*notes, *grades.notes],
        "judge": None if grader is None else {"model": grader.model, "host": grader.host},
        "table": _merged(tables),
        "answers": {
            who: {key: answer.as_dict() for key, answer in answers.items()}
            for who, answers in said.items()
        },
        "grades": grades.each,
    }
    if output is not None:
        data = json.dumps(report, ensure_ascii=False, allow_nan=False, indent=1)
        new_file(output, data.encode() + b"\n")
    return Measured(report, output)


def repeating(output: Path) -> Path:
    """The file beside an output that repeats the run: table.json has table.json.toml."""
    return output.with_name(f"{output.name}.toml")


def _notes(stem: bool) -> list[str]:
    if stem:
        return []
    return ["ROUGE compares words as they stand; the authors compare stems (--stem)."]


def _merged(tables: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """One table with a column for each of the `tables`, which all have the same rows."""
    return [
        {
            "set": rows[0].part,
            "metric": rows[0].metric,
            **{who: row.value for who, row in zip(tables, rows, strict=True)},
        }
        for rows in zip(*tables.values(), strict=True)
    ]


def _answers(file: Path, name: str) -> dict[str, Answer]:
    remedy = "give the --output of `fastsiu benchmark` for the other model"
    answer = {
        "text": str,
        "rephrased": [str],
        "nats": [float],
        "same": float,
        "wrong": [float],
    }
    record = read_json(file, what=str(file), remedy=remedy, shape={"answers": {"*": {"*": answer}}})
    if record.get("format") != FORMAT or record.get("reader") != name:
        raise BadInput(f"{file} holds no answers to this benchmark: {remedy}.")
    try:
        return {k: Answer.from_dict(v) for k, v in record["answers"]["untouched"].items()}
    except KeyError as error:
        raise BadInput(f"{file} lacks {error}: {remedy}.") from error


# Asking -------------------------------------------------------------------------------------------


def ask_items(
    loaded: vlm.VLM, name: str, items: Sequence[Item], *, max_new_tokens: int = 64
) -> dict[str, Answer]:
    """The answer to each item by its id, of the model as it is now. Raises BadInput for a picture
    that cannot be read and for words that the chat template does not take."""
    prompt = READERS[name].prompt
    found: dict[str, Answer] = {}
    label = lambda item: item.photo.label if item.photo is not None else ""
    groups = [list(group) for _, group in groupby(sorted(items, key=label), key=label)]
    for at in range(0, len(groups), AT_ONCE):
        asked: list[tuple[Item, Picture | None]] = []
        for group in groups[at : at + AT_ONCE]:
            shown = group[0].photo
            picture = None if shown is None else loaded.picture(shown.load())
            asked += [(item, picture) for item in group]
        put = [
            (words, picture)
            for item, picture in asked
            for words in (prompt(item), *(_other(prompt, item, w) for w in item.rephrased))
        ]
        said = iter(ask.answers(loaded, put, max_new_tokens=max_new_tokens))
        texts = [[next(said) for _ in range(1 + len(i.rephrased))] for i, _ in asked]
        costs = _costs(loaded, prompt, asked) if name in LIKELY else [((), 0.0, ())] * len(asked)
        for (item, _), (first, *rest), (nats, same, wrong) in zip(asked, texts, costs, strict=True):
            found[item.id] = Answer(first, tuple(rest), nats, same, wrong)
    return {item.id: found[item.id] for item in items}


def _other(prompt: Any, item: Item, words: str) -> str:
    asked: str = prompt(replace(item, question=words))
    return asked


def _costs(
    loaded: vlm.VLM, prompt: Any, asked: Sequence[tuple[Item, Picture | None]]
) -> list[tuple[tuple[float, ...], float, tuple[float, ...]]]:
    """For each item what each token of the right answer costs, the mean of its other wording, and
    that of each wrong answer, in nats. The end of the turn is no part of an answer."""
    encode = vlm.encoder(loaded)
    turns: list[Encoded] = []
    pictures: list[Picture | None] = []
    for item, picture in asked:
        for answer in (item.answer, item.same or item.answer, *item.wrong):
            turns.append(encode(prompt(item), answer, picture, False))
            pictures.append(picture)
    given = iter(ask.label_scores(loaded, turns, pictures))
    mean = lambda score: float(-score.log_p.mean())
    out = []
    for item, _ in asked:
        right, same = next(given), next(given)
        wrong = tuple(mean(next(given)) for _ in item.wrong)
        out.append((tuple((-right.log_p).tolist()), mean(same), wrong))
    return out
