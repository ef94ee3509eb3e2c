"""Positions of points and lines for the report's inline drawings; no markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .words import GONE, KEPT

WIDTH, HEIGHT = 320.0, 240.0  # of the forget/retain plot, in SVG units
# shares at its edges: room around 0 and 100 %, so that what lies there can be seen
LOW, HIGH = (
    -0.05,
    1.07,
)
ROW_OF = {
    "efficacy": "efficacy",
    "generality": "generality",
    "specificity": "others",
    "facts": "facts",
}
# where a row has nothing nearer
NOT_NAMED = {
    "efficacy": "name_fpr",
    "generality": "name_fpr",
    "recognition": "yes_fpr",
}


def untouched_alone(report: Mapping[str, Any]) -> bool:
    """Whether nothing was unlearned: an evaluation of one model, which is the untouched one."""
    return not report.get("verdict") or ("rows" in report and "unlearned" not in report["rows"])


def sides(report: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """{"untouched" | "unlearned" | "control": {measure: rate}} from what the verdict saw, else from
    an evaluation's rows."""
    rows = report.get("rows") or {}
    found = {}
    for who, side in (("untouched", "before"), ("unlearned", "after"), ("control", None)):
        row = rows.get(who) or {}
        of = {kind: row[key] for kind, key in ROW_OF.items() if row.get(key)}
        if who == "control":
            of |= {
                kind: _less(row[key])
                for kind, key in NOT_NAMED.items()
                if _value(of.get(kind)) is None and row.get(key)
            }
        found[who] = of | dict((report.get(side) or {}) if side else {})
    return found


def trade_off(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The forget/retain plot: x is what is kept, y how far the name is gone, each at the
    requirement that is met with the least margin, so that a point is inside the box where all of
    them are met. None where nothing was unlearned or asked.

    {"gone", "kept": the two measures, "box": (x, y, width, height) or None, "points": [{who, x, y,
    at, bars}]}, x None where only y is known, bars the 95 % intervals as lines (x1, y1, x2, y2);
    all in units of `WIDTH` x `HEIGHT`
    """
    if untouched_alone(report):
        return None
    of, limits = sides(report), report.get("thresholds") or {}
    margin = lambda kind: _value(of["unlearned"][kind]) - limits.get(kind, 1.0)
    gone, kept = (
        min(
            (k for k in kinds if _value(of["unlearned"].get(k)) is not None),
            key=margin,
            default=None,
        )
        for kinds in (GONE, KEPT)
    )
    if gone is None or kept is None:
        return None
    points = []
    for who, rates in of.items():
        y, x = rates.get(gone), rates.get(kept)
        if _value(y) is not None and (_value(x) is not None or who == "control"):
            points.append(
                {
                    "who": who,
                    "kept": _value(x),
                    "gone": _value(y),
                    "x": _value(x) is not None and _x(_value(x)),
                    "y": _y(_value(y)),
                    "bars": _bars(x, y) if who == "unlearned" else [],
                }
            )
    box = None
    if gone in limits and kept in limits:
        box = (_x(limits[kept]), 0.0, WIDTH - _x(limits[kept]), _y(limits[gone]))
    ticks = [
        (f"{100 * share:.0f} %", _x(share), _y(share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return {
        "gone": gone,
        "kept": kept,
        "points": points,
        "box": box,
        "ticks": ticks,
        "width": WIDTH,
        "height": HEIGHT,
        "least": (limits.get(kept), limits.get(gone)),
    }


def chart(
    training: Sequence[Mapping[str, Any]], names: Sequence[str], top: float | None = None
) -> dict[str, Any] | None:
    """Polylines in a box of 300 x 120 units; points that are missing or not finite are left out."""
    series = {}
    for name in names:
        points = [
            (i if row.get("step") is None else row["step"], row.get(name))
            for i, row in enumerate(training)
        ]
        series[name] = [
            (float(x), float(y))
            for x, y in points
            if isinstance(y, (int, float)) and math.isfinite(y)
        ]
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    left, right = min(xs), max(xs)
    low, high = min(0.0, *ys), max(ys) if top is None else max(top, *ys)
    high = high if high > low else low + 1.0

    def place(x: float, y: float) -> str:
        across = 0.5 if right == left else (x - left) / (right - left)
        return f"{300 * across:.1f},{120 * (high - y) / (high - low):.1f}"

    lines = [
        {
            "name": name,
            "points": " ".join(place(x, y) for x, y in points),
            "last": place(*points[-1]).split(","),
            "first_value": points[0][1],
            "last_value": points[-1][1],
        }
        for name, points in series.items()
    ]
    return {
        "lines": lines,
        "low": low,
        "high": high,
        "zero": 120 * high / (high - low),
        "left": left,
        "right": right,
    }


def _value(rate: Mapping[str, Any] | None) -> float | None:
    return (rate or {}).get("value")


def _less(rate: Mapping[str, Any]) -> dict[str, Any]:
    """The share of the others: of answers without where `rate` is of those with."""
    return dict(rate) if _value(rate) is None else {"value": 1 - rate["value"], "n": rate.get("n")}


def _x(share: float) -> float:
    return WIDTH * (share - LOW) / (HIGH - LOW)


def _y(share: float) -> float:
    return HEIGHT * (HIGH - share) / (HIGH - LOW)


def _bars(
    x: Mapping[str, Any] | None, y: Mapping[str, Any] | None
) -> list[tuple[float, float, float, float]]:
    lines = []
    if x and x.get("low") is not None:
        lines.append((_x(x["low"]), _y(_value(y)), _x(x["high"]), _y(_value(y))))
    if y and y.get("low") is not None:
        lines.append((_x(_value(x)), _y(y["low"]), _x(_value(x)), _y(y["high"])))
    return lines
