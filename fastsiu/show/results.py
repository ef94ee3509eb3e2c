"""What the terminal shows of results: tables before and after, and plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..driver import Result
from ..guards.terminal import visible
from ..merge import Merged
from ..model.plan import Plan
from ..output import KEY
from ..report.summary import attacked, standing
from ..report.words import NOISE, REMAINS, REMAINS_MERGED
from ..several import Several
from ..verdict import KINDS


def cell(value: Any) -> Text:
    """A cell of a table, with control characters as their escapes."""
    return Text(visible(str(value)))


def before_publishing(keys: object, more: str = "") -> str:
    """What to remove from an output before it is published, and why.

    keys: the file, or which files
    more: what else the output gives away
    """
    return (
        f"Before you publish it, remove {keys}: whoever holds it and one of the pictures can tell "
        f"that the picture was used{more}."
    )


def summary(console: Console, result: Result) -> None:
    """Before and after side by side, the rates, the verdict with its reasons."""
    report = result.report
    table = Table(title=f"{report['concept']}: before and after", title_justify="left")
    for heading in ("picture", "question", "before", "after"):
        table.add_column(heading, overflow="fold")
    for row in _examples(report["answers"]):
        table.add_row(*(cell(row[k] or "-") for k in ("picture", "question", "before", "after")))
    if report["answers"]:  # none where they were left out
        console.print(table)
    for key, label in (
        ("efficacy", "name gone on the picture's transforms"),
        ("generality", "name gone on other pictures"),
        ("recognition", "look no longer confirmed by name"),
        ("specificity", "other pictures answered as before"),
        ("facts", "text answered as before"),
    ):
        console.print(
            f"  {label:40s} {_rate(report['before'][key])} -> {_rate(report['after'][key])}",
            soft_wrap=True,
        )
    if noise := NOISE.get(report.get("noise") or ""):
        console.print(f"  (answered as before, on the left: by {noise})", soft_wrap=True)
    steps = report["training"]
    if steps:
        spent = sum(report["seconds"].values())
        console.print(
            f"  {steps[-1]['step']} steps, P(name) {steps[-1]['p_name']:.4f} at most, "
            f"{spent:.0f} s in all"
        )
    families_table(console, report)
    console.print(
        standing({**report, "verdict": "forgotten" if result.forgotten else "not forgotten"}),
        soft_wrap=True,
    )
    for reason in result.reasons:
        console.print(f"  {reason}", soft_wrap=True)
    if report.get("families"):
        console.print(REMAINS, soft_wrap=True)
    for note in (*result.notes, *([] if result.repeated else [f"Written to {result.output}"])):
        console.print(note, soft_wrap=True)
    if result.output is not None and (result.output / KEY).is_file():
        console.print(before_publishing(result.output / KEY), soft_wrap=True)


def families_table(console: Console, report: Mapping[str, Any]) -> None:
    """What gave it away, in %, a line for each family, the worst first; nothing where none was
    asked."""
    families = report.get("families") or []
    if not families:
        return
    table = Table(
        "",
        title="Asked in other ways: given away, %",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for side in ("untouched", "unlearned", "strangers", "allowed", "n"):
        table.add_column(side, justify="right")
    # only the untouched model was asked
    alone = all(one["unlearned"].get("value") is None for one in families)
    share = lambda rate: "-" if (rate or {}).get("value") is None else f"{100 * rate['value']:.0f}"
    for one in families:
        if one["applicable"] or alone:
            sign = "! " if one["failed"] else "  "
            table.add_row(
                sign + one["family"],
                *(share(one[side]) for side in ("untouched", "unlearned", "strangers")),
                f"{100 * one['allowed']:.0f}",
                str(one["n"]),
            )
    console.print(table)
    if absent := [one["family"] for one in families if not one["applicable"] and not alone]:
        console.print(
            "  Not applicable, as the untouched model does not tell it either: "
            f"{', '.join(absent)}.",
            soft_wrap=True,
        )


def several_table(console: Console, several: Several) -> None:
    """What became of each request, and who is still named after each training."""
    lines = [str(o.line) for o in several.printed]
    table = Table(
        title="Share of answers that still give the name, after each training", title_justify="left"
    )
    for heading in (
        "line",
        "concept",
        "verdict",
        *(f"after {row['after'][-1]}" for row in several.matrix),
    ):
        table.add_column(heading, overflow="fold")
    for line, outcome in zip(lines, several.printed, strict=True):
        shares = [row["named"].get(line) for row in several.matrix]
        shown = ["-" if share is None else f"{share:.0%}" for share in shares]
        table.add_row(line, cell(outcome.concept), outcome.status or "-", *shown)
    console.print(table)
    for outcome in several.printed:
        for reason in outcome.reasons:
            console.print(f"  line {outcome.line}: {reason}", soft_wrap=True)
    if several.resumed:
        console.print(f"{several.resumed} of {len(lines)} were done already.")
    console.print("All forgotten." if several.forgotten else "Not all forgotten.")
    console.print(
        f"Written to {several.output}. {before_publishing(f'each {KEY}')}", soft_wrap=True
    )


def merged_summary(console: Console, result: Merged) -> None:
    """What became of the weights, and the verdict in every form it was repeated in."""
    weights = result.report["weights"]
    console.print(
        f"Largest change of a weight: {weights['largest']:.3g} in {weights['matrix']}, "
        f"{weights['relative']:.1%} of "
        f"its largest weight; {weights['matrices']} of {weights['of']} tensors changed; rounding "
        "undid "
        f"{weights['unchanged']:.1%} of the changes.",
        soft_wrap=True,
    )
    for row in result.report.get("merged", []):
        if row["verdict"] is None:
            console.print(f"  {row['dtype']:9s} not verified: {row['reason']}", soft_wrap=True)
            continue
        console.print(f"  {row['dtype']:9s} {row['verdict']}")
        for key, label in (
            ("efficacy", "name gone on the picture's transforms"),
            ("generality", "name gone on other pictures"),
            ("recognition", "look no longer confirmed by name"),
        ):
            console.print(
                f"    {label:40s} {_rate(row['before'][key])} -> {_rate(row['after'][key])}",
                soft_wrap=True,
            )
        console.print(f"    {attacked(row)}", soft_wrap=True)
        for key, label in (("specificity", "other pictures"), ("facts", "text")):
            console.print(
                f"    {label} as the untouched model in {row['dtype']}: {_rate(row['after'][key])}",
                soft_wrap=True,
            )
            console.print(
                f"    {label} as the untouched model as stored: {_rate(row['agreement'][key])}, "
                "without unlearning "
                f"{_rate(row['control'][key])}",
                soft_wrap=True,
            )
    if result.forgotten is not None:
        console.print(
            "Forgotten in every form that was asked." if result.forgotten else "Not forgotten:"
        )
    for reason in result.reasons:
        console.print(f"  {reason}", soft_wrap=True)
    if result.forgotten is not None:
        console.print(REMAINS_MERGED, soft_wrap=True)
    for note in (*result.notes, *([] if result.repeated else [f"Written to {result.output}"])):
        console.print(note, soft_wrap=True)
    named = "" if result.report.get("redacted") else "; README.md and report.* hold the name"
    console.print(before_publishing(result.output / KEY, named), soft_wrap=True)


def answers_table(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Questions and answers; two answer columns where base and adapter are compared."""
    columns = [k for k in ("question", "before", "after", "answer") if k in rows[0]]
    table = Table(
        *(
            c
            if c not in ("before", "after")
            else {"before": "untouched", "after": "with adapter"}[c]
            for c in columns
        )
    )
    for row in rows:
        table.add_row(*(cell(row[c]) for c in columns))
    console.print(table)


def plan_table(console: Console, plan: Plan) -> None:
    """A column for each of the settings that were estimated, in GB of 2**30 bytes, and the
    verdict."""
    table = Table("", title=f"{plan.model}: GB of memory, estimated", title_justify="left")
    for e in plan.estimates:
        table.add_column(str(e.settings), justify="right", overflow="fold")
    parts = {
        "weights": "weights",
        "adapter": "trained",
        "gradient": "gradient",
        "optimiser": "optimizer",
        "activations": "activations",
        "features, teacher": "kept",
        "driver, allocator": "overhead",
        "(while asking)": "asking",
    }
    for label, name in parts.items():
        table.add_row(label, *(f"{getattr(e, name) / 2**30:.2f}" for e in plan.estimates))
    table.add_row("peak", *(f"{e.peak / 2**30:.2f}" for e in plan.estimates))
    if plan.memory is not None:
        table.add_row(
            "", *("fits" if e.peak <= plan.memory else "does not fit" for e in plan.estimates)
        )
    console.print(table)
    work = plan.work
    console.print(
        f"A picture is {work.prefix} tokens with what stands before its question, a question and "
        "its answer "
        f"{work.suffix}. {' '.join(plan.assumed)}",
        soft_wrap=True,
    )
    if plan.placed is not None:
        console.print(plan.placed.sentence, soft_wrap=True)
    console.print(plan.sentence, soft_wrap=True)


def _examples(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of each question, two a kind: enough to see what happened."""
    shown: list[dict[str, Any]] = []
    for kind in KINDS:
        seen: set[str] = set()
        for row in answers:
            if row["kind"] == kind and row["question"] not in seen and len(seen) < 3:
                seen.add(row["question"])
                shown.append(row)
    return shown


def _rate(rate: dict[str, Any]) -> str:
    if rate["value"] is None:
        return "not measured"
    return f"{rate['value']:6.1%} [{rate['low']:.1%}, {rate['high']:.1%}] n={rate['n']}"
