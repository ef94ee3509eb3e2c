"""Rows of many concepts as one: shares pooled over all answers with their Wilson interval, everything else as the mean.

Pure functions over the rows of report.json, whose metrics are {"value", "n", ...} or {"value": None, "reason"}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..verdict import Rate

Row = dict[str, dict[str, Any]]

# What the table shows, in this order; suite.json has every metric.
SHOWN = ("efficacy", "generality", "name_tpr", "name_fpr", "yes_tpr", "yes_fpr", "others", "lookalikes", "groups", "facts",
         "fluency", "renamed")  # fmt: skip
HEADINGS = {
    "untouched": "the untouched model", "unlearned": "the unlearned model", "control": "pictures of what no model has seen",
}  # fmt: skip


def pooled(concepts: Sequence[dict[str, Row]]) -> dict[str, Row]:
    """One row of each sort ("untouched", "unlearned", ...) over all concepts that have it.

    A metric with an interval is a share of n answers: successes and answers are added up, and the interval is Wilson's over all.
    Any other is the mean over the concepts that have a value, and its n is their number.
    """
    sorts = dict.fromkeys((*HEADINGS, *(sort for rows in concepts for sort in rows)))
    return {sort: _row([rows[sort] for rows in concepts if sort in rows]) for sort in sorts if any(sort in r for r in concepts)}


def _row(rows: Sequence[Row]) -> Row:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return {key: _metric([row[key] for row in rows if key in row]) for key in keys}


def _metric(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    known = [v for v in values if v.get("value") is not None]
    if not known:
        return {"value": None, "reason": values[0].get("reason")}
    if all("low" in v and v["low"] is not None for v in known):
        return Rate.of(sum(round(v["value"] * v["n"]) for v in known), sum(v["n"] for v in known)).as_dict()
    return {"value": sum(v["value"] for v in known) / len(known), "n": len(known)}


def markdown(content: dict[str, Any]) -> str:
    """report.md: the pooled rows, then each concept's verdict, of suite.json's content."""
    count, of = len(content["concepts"]), content["of"]
    lines = [f"# {_cell(content['suite'])}: {count} of {of} concepts", "", f"Model: {_cell(content['model'])}", ""]
    for sort, row in content["pooled"].items():
        shown = [key for key in SHOWN if key in row]
        lines += [f"## All concepts, {HEADINGS.get(sort, sort)}", "", *_head("metric", "value", "95 % interval", "n")]
        lines += [_line(key, row[key]) for key in shown] + [""]
    lines += ["## Each concept", "", *_head("concept", "verdict", "efficacy", "generality", "others", "why not")]
    for one in content["concepts"]:
        row = one["rows"].get("unlearned") or one["rows"].get("untouched") or {}
        values = [_number(row.get(key, {})) for key in ("efficacy", "generality", "others")]
        lines.append("| " + " | ".join([_cell(one["concept"]), one["status"], *values, _cell(" ".join(one["reasons"]))]) + " |")
    return "\n".join([*lines, ""])


def _head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def _line(key: str, metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return f"| {key} | - | {_cell(metric['reason'] or '')} | 0 |"
    interval = f"{metric['low']:.3f} to {metric['high']:.3f}" if metric.get("low") is not None else ""
    return f"| {key} | {_number(metric)} | {interval} | {metric.get('n', '')} |"


def _number(metric: dict[str, Any]) -> str:
    return "-" if metric.get("value") is None else f"{metric['value']:.3f}"


def _cell(text: str) -> str:
    """Text from outside, in a table of Markdown: no column, link, tag or line of its own."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\|[]*_`#" else c for c in plain)
