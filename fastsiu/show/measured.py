"""What the terminal shows of what was measured: of one concept, of a suite, of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..evaluate.run import Evaluation
from ..evaluate.suites.run import Evaluated
from ..output import KEY
from ..report.summary import inside, standing
from .results import before_publishing, cell, families_table


def inside_table(console: Console, report: Mapping[str, Any]) -> None:
    """What attacks on weights, states and gradients brought out; nothing where none was tried."""
    lines = inside(report, brief=True)
    if not lines:
        return
    title = "Attacked from inside: given away, or as the line says"
    table = Table("", title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for side in ("untouched", "unlearned", "control"):
        table.add_column(side, justify="right")
    for one in lines:
        table.add_row(f"{one.attack}: {one.setting}", *one.cells.values())
    console.print(table)


METRICS = {
    "efficacy": "name gone, training picture",
    "generality": "name gone, other pictures",
    "name_tpr": "named, its pictures",
    "name_fpr": "named, others' pictures",
    "yes_tpr": "yes to its name, its pictures",
    "yes_fpr": "yes to its name, others'",
    "yes_stranger": "yes to an invented name",
    "c_dis": "C-Dis, nats",
    "delta_log_p": "change of log P(name), nats",
    "log_p": "log P(name), nats",
    "rank": "rank of the name, median",
    "extraction_strength": "extraction strength",
    "others": "same, others' pictures",
    "lookalikes": "same, look-alikes",
    "groups": "same, beside others",
    "groups_named": "still named beside others",
    "facts": "same, facts in words",
    "general": "same, general knowledge",
    "renamed": "given another's name",
    "fluency": "perplexity, untouched model",
    "fluency_paper": "perplexity, the paper's",
    "diversity": "unique words / words",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "refusals": "refusals",
    "empty": "empty",
    "gibberish": "gibberish",
    "repetition": "repetition",
    "g_eval": "G-Eval, 1 to 5",
}


def evaluation_table(console: Console, evaluation: Evaluation) -> None:
    """A line for each metric and a column for each row of the report, then the verdict and what was
    not checked."""
    report = evaluation.report
    rows = {
        name: report["rows"][name]
        for name in ("untouched", "unlearned", "control")
        if name in report["rows"]
    }
    table = Table("", title=f"{report['concept']}: {report['model']}", title_justify="left")
    for name in rows:
        table.add_column(name, justify="right")
    for key, label in METRICS.items():
        share = key != "g_eval"
        table.add_row(label, *(_metric(row[key], share) for row in rows.values()))
    console.print(table)
    families_table(console, report)
    inside_table(console, report)
    asked: dict[str, list[str]] = {}
    for key, label in METRICS.items():
        if (one := list(rows.values())[-2][key])[
            "value"
        ] is None:  # the control's own are of no interest
            asked.setdefault(one["reason"], []).append(label)
    for note in (
        *(f"Not measured ({'; '.join(labels)}): {reason}" for reason, labels in asked.items()),
        *report["caveats"],
    ):
        console.print(note, soft_wrap=True)
    if evaluation.forgotten is not None:
        console.print(standing(report), soft_wrap=True)
    for reason in report["reasons"]:
        console.print(f"  {reason}", soft_wrap=True)
    for note in (
        *evaluation.notes,
        *(
            [f"Written to {evaluation.output}"]
            if evaluation.output and not evaluation.notes
            else []
        ),
    ):
        console.print(note, soft_wrap=True)


def suite_table(console: Console, evaluated: Evaluated) -> None:
    """The pooled rows, then what became of each concept."""
    report = evaluated.report
    table = Table("", title=f"{report['suite']}: {report['model']}", title_justify="left")
    for name in report["pooled"]:
        table.add_column(name, justify="right")
    for key, label in METRICS.items():
        table.add_row(
            label,
            *(
                _metric(row.get(key, {"value": None}), key != "g_eval")
                for row in report["pooled"].values()
            ),
        )
    if report["pooled"]:
        console.print(table)
    for outcome in evaluated.outcomes:
        console.print(f"{outcome.concept}: {outcome.status}", soft_wrap=True)
        for reason in outcome.reasons:
            console.print(f"  {reason}", soft_wrap=True)
    if evaluated.resumed:
        console.print(f"{evaluated.resumed} of {len(evaluated.outcomes)} were done already.")
    console.print(
        f"Written to {evaluated.output}. {before_publishing(f'each {KEY}')}", soft_wrap=True
    )


def benchmark_table(console: Console, report: dict[str, Any]) -> None:
    """A benchmark's own metrics, then why some have no value."""
    who = [name for name in ("untouched", "unlearned") if name in report["answers"]]
    table = Table("set", "metric", title=f"{report['benchmark']}: {report['model']}")
    for name in who:
        table.add_column(name, justify="right")
    missing: dict[str, list[str]] = {}
    for row in report["table"]:
        table.add_row(cell(row["set"]), cell(row["metric"]), *(_graded(row[n]) for n in who))
        if row[who[-1]]["value"] is None:
            missing.setdefault(row[who[-1]]["reason"], []).append(row["metric"])
    console.print(table)
    for reason, names in missing.items():
        console.print(f"Not measured ({', '.join(dict.fromkeys(names))}): {reason}", soft_wrap=True)
    for note in report["notes"]:
        console.print(note, soft_wrap=True)


def _graded(one: dict[str, Any]) -> str:
    """A value that may be a judge's, with the number of answers that it did not grade."""
    missing = one.get("not_graded")
    more = f", {missing} not graded" if missing and one["value"] is not None else ""
    return f"{_metric(one, 'scale' not in one)}{more}"


def _metric(one: dict[str, Any], share: bool = True) -> str:
    """share: an interval is one of a share; else of a mean grade"""
    if one["value"] is None:
        return "-"
    if "low" in one and not share:
        return f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}] n={one['n']}"
    if "low" not in one:
        return f"{one['value']:.4g}  n={one['n']}"
    return f"{one['value']:.1%} [{one['low']:.0%}, {one['high']:.0%}] n={one['n']}"
