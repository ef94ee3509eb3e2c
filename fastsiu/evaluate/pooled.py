"""The rows of many concepts as one row: shares pooled over all answers, every other metric as a
mean.

Pure functions over the rows of report.json, whose metrics are {"value", "n", ...} or {"value":
None, "reason"}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..text.rate import Rate

Row = dict[str, dict[str, Any]]

# The metrics of the table, in this order; suite.json has every metric.
SHOWN = (
    "efficacy",
    "generality",
    "name_tpr",
    "name_fpr",
    "yes_tpr",
    "yes_fpr",
    "others",
    "lookalikes",
    "groups",
    "facts",
    "fluency",
    "renamed",
)
HEADINGS = {"untouched": "untouched", "unlearned": "unlearned", "control": "never seen"}
# The metrics of the table of concepts.
OF_ONE = ("efficacy", "generality", "name_fpr", "others", "facts")
STATUSES = ("forgotten", "not forgotten", "untouched", "failed")
NOTE = (
    "In brackets: Wilson's 95 % interval over all answers, as if each were independent; answers "
    "about one concept are not quite. Never seen: the same questions about pictures of what no "
    "model has seen, put to the untouched model. Other values are means over the concepts."
)


def pooled(concepts: Sequence[dict[str, Row]]) -> dict[str, Row]:
    """One row of each sort ("untouched", "unlearned", ...) over all concepts that have it.

    A metric with an interval is a share of n answers: its successes and answers are added up, and
    its interval is Wilson's over all. Any other metric becomes the mean over the concepts that have
    a value, and its n is their number.
    """
    sorts = dict.fromkeys((*HEADINGS, *(sort for rows in concepts for sort in rows)))
    return {
        sort: _row([rows[sort] for rows in concepts if sort in rows])
        for sort in sorts
        if any(sort in r for r in concepts)
    }


def _row(rows: Sequence[Row]) -> Row:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return {key: _metric([row[key] for row in rows if key in row]) for key in keys}


def _metric(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    known = [v for v in values if v.get("value") is not None]
    if not known:
        return {"value": None, "reason": values[0].get("reason")}
    if all("low" in v and v["low"] is not None for v in known):
        return Rate.of(
            sum(round(v["value"] * v["n"]) for v in known), sum(v["n"] for v in known)
        ).as_dict()
    return {"value": sum(v["value"] for v in known) / len(known), "n": len(known)}


def markdown(content: dict[str, Any]) -> str:
    """report.md from suite.json's content: how many concepts were forgotten, the pooled rows side
    by side, each concept's verdict."""
    concepts, rows = content["concepts"], content["pooled"]
    counts = {status: sum(one["status"] == status for one in concepts) for status in STATUSES}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    lines = [
        f"# {_cell(content['suite'])}",
        "",
        f"Model: {_cell(content['model'])}. {len(concepts)} of {content['of']} concepts",
    ]
    lines[-1] += f": {told}." if told else "."
    if rows:
        lines += [
            "",
            "## All concepts",
            "",
            *_head("metric", *(HEADINGS.get(sort, sort) for sort in rows)),
        ]
        known = [
            key
            for key in SHOWN
            if any(row.get(key, {}).get("value") is not None for row in rows.values())
        ]
        lines += [
            "| "
            + " | ".join([key, *(_pooled_cell(row.get(key, {})) for row in rows.values())])
            + " |"
            for key in known
        ]
        lines += ["", NOTE]
    lines += ["", "## Each concept", "", *_head("concept", "verdict", *OF_ONE)]
    for one in concepts:
        row = one["rows"].get("unlearned") or one["rows"].get("untouched") or {}
        cells = [
            _cell(one["concept"]),
            one["status"],
            *(_number(row.get(key, {})) for key in OF_ONE),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    reasons = [
        f"- {_cell(one['concept'])}: {_cell(reason)}"
        for one in concepts
        for reason in one["reasons"]
    ]
    return "\n".join([*lines, "", *(["## Why not", "", *reasons, ""] if reasons else [])])


def _head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def _pooled_cell(metric: dict[str, Any]) -> str:
    if metric.get("value") is None or metric.get("low") is None:
        return _number(metric)
    return f"{_number(metric)} ({metric['low']:.3f} to {metric['high']:.3f}, n {metric['n']})"


def _number(metric: dict[str, Any]) -> str:
    return "-" if metric.get("value") is None else f"{metric['value']:.3f}"


def _cell(text: str) -> str:
    """Text from outside for a cell of a Markdown table, where it makes no column, link, tag or
    line."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\|[]*_`#" else c for c in plain)
