"""The metrics that a language model grades: what of a set is sent to the judge, and what its grades
come to.

The scales are the sets' own, the wording of the questions is ours. An answer that the judge does
not grade is counted and is in no mean.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...request import BadInput
from .. import grading
from ..grading import Graded, Grader, Scale
from .form import Answer, Benchmark, Item, Value

Answers = Mapping[str, Mapping[str, Answer]]  # by model, then by `Item.id`


@dataclass(frozen=True)
class Judged:
    """A metric of one part that a judge grades, both by the set's own names.

    named:        the entity's name is sent, too
    by_untouched: the reference text is what the untouched model answered; else it is the set's
                  right answer
    """

    part: str
    metric: str
    scale: Scale
    items: tuple[Item, ...]
    named: bool = False
    by_untouched: bool = False


@dataclass(frozen=True)
class Grades:
    """values: by model, the metrics by (part, metric). each: by model and metric, the grades by
    `Item.id`. notes: for the reader of the table."""

    values: dict[str, dict[tuple[str, str], Value]] = field(default_factory=dict)
    each: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def check(grader: Grader, name: str, wanted: Sequence[Judged], models: int) -> None:
    """Raises BadInput, before a model is loaded, where nothing may or can be sent.

    name:   the set's
    models: number of those that will be asked
    """
    items = len({(one.scale, item.id) for one in wanted for item in one.items})
    if not items:
        raise BadInput(
            f"No judge grades any of these items of {name}: leave --judge out, or choose other "
            "sets."
        )
    grading.announcement(grader, f"at most {_told(items * models, wanted)}")
    _ = grader.caller


def grade(
    grader: Grader,
    benchmark: Benchmark,
    wanted: Sequence[Judged],
    said: Answers,
    say: Callable[[str], None],
) -> Grades:
    """The grades of all models' answers. What would be the same request is sent once: an item of
    several parts, and an answer that both models gave.

    said: the untouched model is "untouched"
    say:  takes the announcement, before anything is sent

    Where the server refuses altogether, all values are null, with its reason. Raises BadInput
    without permission to send.
    """
    names = {entity.id: entity.name or "" for entity in benchmark.entities}
    keys: dict[tuple[str, str, str], str] = {}
    texts: dict[str, grading.Text] = {}
    for who, answers in said.items():
        for one in wanted:
            for item in one.items:
                reference = said["untouched"][item.id].text if one.by_untouched else item.answer
                asked = {"subject": names.get(item.entity, "")} if one.named else {}
                asked |= {"question": item.question, "reference": reference}
                asked |= {"answer": answers[item.id].text}
                body = grading.body(grader, one.scale.system, asked)
                key = keys[who, one.metric, item.id] = json.dumps(body)
                texts.setdefault(key, grading.Text(body, one.scale.read))
    sent = [*texts.values()]
    say(grading.announcement(grader, _told(len(sent), wanted), grading.size_of(sent)))
    try:
        found = dict(zip(texts, grading.grade(grader, sent), strict=True))
    except grading.Refused as error:
        null = {(one.part, one.metric): {"value": None, "reason": str(error)} for one in wanted}
        return Grades({who: dict(null) for who in said})
    grades = Grades(notes=(_note(grader, wanted),))
    for who in said:
        values, each = grades.values.setdefault(who, {}), grades.each.setdefault(who, {})
        for one in wanted:
            got = {item.id: found[keys[who, one.metric, item.id]] for item in one.items}
            values[one.part, one.metric] = _value([*got.values()], one.scale)
            each.setdefault(one.metric, {}).update({key: g.score for key, g in got.items()})
    return grades


def _value(graded: Sequence[Graded], scale: Scale) -> Value:
    """{value, n, low, high, scale, not_graded, problems}, or {value: None, reason, not_graded,
    problems}. not_graded: number of answers; problems: how many of them have which."""
    problems = Counter(g.problem for g in graded if g.problem)
    value: dict[str, Any] = grading.summary([g.score for g in graded], scale.least, scale.most)
    if value["value"] is not None:
        value["scale"] = [scale.least, scale.most]
    elif problems:
        told = ", ".join(f"{problem}: {n}" for problem, n in problems.most_common())
        value["reason"] = f"{value['reason'].removesuffix('.')} ({told})."
    return value | {"not_graded": problems.total(), "problems": dict(problems)}


def _told(answers: int, wanted: Sequence[Judged]) -> str:
    """What is sent, in words."""
    names = len({item.entity for one in wanted if one.named for item in one.items})
    told = f"{answers} answers with their questions, as many reference texts"
    return f"{told} and {names} names" if names else told


def _note(grader: Grader, wanted: Sequence[Judged]) -> str:
    metrics = ", ".join(dict.fromkeys(one.metric for one in wanted))
    return (
        f"Graded by {grader.model} at {grader.host}: {metrics}. The question to the judge has our "
        "wording: such figures compare within a table, not with the paper's."
    )
