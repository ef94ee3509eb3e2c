"""Positions of points and lines for the report's inline drawings; no markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..judging.kept import demanded
from .words import GONE, KEPT

WIDTH, HEIGHT = 320.0, 240.0  # of the forget/retain plot, in SVG units
# Shares at the edges of the plot: room around 0 and 100 %, so that points there can be seen.
LOW, HIGH = -0.05, 1.07
# Measure -> the metric of an evaluation that stands for it.
ROW_OF = {
    "efficacy": "efficacy",
    "generality": "generality",
    "specificity": "others",
    "facts": "facts",
}
# Measure -> the metric whose remainder (1 - share) stands for it where the row has no better one.
NOT_NAMED = {
    "efficacy": "name_fpr",
    "generality": "name_fpr",
    "recognition": "yes_fpr",
}


def untouched_alone(report: Mapping[str, Any]) -> bool:
    """Is it an evaluation of the untouched model alone, so that nothing was unlearned?"""
    return not report.get("verdict") or ("rows" in report and "unlearned" not in report["rows"])


def sides(report: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """{"untouched" | "unlearned" | "control": {measure: rate}}, from the verdict's rates where it
    has them, else from the rows of an evaluation."""
    rows = report.get("rows") or {}
    out = {}
    for who, side in (("untouched", "before"), ("unlearned", "after"), ("control", None)):
        row = rows.get(who) or {}
        of = {kind: row[key] for kind, key in ROW_OF.items() if row.get(key)}
        if who == "control":
            of |= {
                kind: _less(row[key])
                for kind, key in NOT_NAMED.items()
                if _value(of.get(kind)) is None and row.get(key)
            }
        out[who] = of | dict((report.get(side) or {}) if side else {})
    return out


def trade_off(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The forget/retain plot; None where nothing was unlearned or asked.

    x is the share that is kept, y the share for which the name is gone. Each axis shows the measure
    that meets its requirement with the least margin, so a point is inside the box where every
    requirement is met.

    Returns a dict, with lengths in units of `WIDTH` x `HEIGHT`:
        gone, kept     the two measures
        box            (x, y, width, height) or None
        points         [{who, kept, gone, x, y, bars}]; x is False where only y is known; bars are
                       the 95 % intervals as lines (x1, y1, x2, y2)
        ticks          [(text, x, y)]
        width, height  of the plot
        least          (requirement for kept, requirement for gone)
    """
    if untouched_alone(report):
        return None
    of, limits = sides(report), dict(report.get("thresholds") or {})
    for kind in KEPT:
        if kind in limits:  # of what noise alone keeps
            limits[kind] = demanded(limits[kind], _value(of["untouched"].get(kind)))
    gone = _nearest(of["unlearned"], limits, GONE)
    kept = _nearest(of["unlearned"], limits, KEPT)
    if gone is None or kept is None:
        return None
    points = []
    for who, rates in of.items():
        x, y = _value(rates.get(kept)), _value(rates.get(gone))
        if y is None or (x is None and who != "control"):
            continue
        bars = _bars(rates[kept], rates[gone]) if who == "unlearned" else []
        points.append(
            {
                "who": who,
                "kept": x,
                "gone": y,
                "x": x is not None and _x(x),
                "y": _y(y),
                "bars": bars,
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


def _nearest(
    rates: Mapping[str, Mapping[str, Any]], limits: Mapping[str, float], kinds: Sequence[str]
) -> str | None:
    """The measure that meets its requirement with the least margin; None where none has a value."""
    margins = {
        kind: value - limits.get(kind, 1.0)
        for kind in kinds
        if (value := _value(rates.get(kind))) is not None
    }
    return min(margins, key=lambda kind: margins[kind], default=None)


def chart(
    training: Sequence[Mapping[str, Any]], names: Sequence[str], top: float | None = None
) -> dict[str, Any] | None:
    """Polylines in a box of 300 x 120 units, or None without any; points that are missing or not
    finite are left out.

    training: a dict for each step
    names:    keys of those dicts, a line for each
    top:      the least upper end of the vertical axis; None is the largest value
    """
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
    high = max(ys) if top is None else max(top, *ys)
    # what rounding leaves below zero, of a divergence for instance, is no end of an axis
    low = min(ys) if min(ys) < -1e-3 * high else 0.0
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
    """The remaining share: of answers without, where `rate` is of answers with."""
    return dict(rate) if _value(rate) is None else {"value": 1 - rate["value"], "n": rate.get("n")}


def _x(share: float) -> float:
    return WIDTH * (share - LOW) / (HIGH - LOW)


def _y(share: float) -> float:
    return HEIGHT * (HIGH - share) / (HIGH - LOW)


def _bars(x: Mapping[str, Any], y: Mapping[str, Any]) -> list[tuple[float, float, float, float]]:
    """The 95 % intervals of a point as lines (x1, y1, x2, y2); both rates have a value."""
    across, up = _x(x["value"]), _y(y["value"])
    lines = []
    if x.get("low") is not None:
        lines.append((_x(x["low"]), up, _x(x["high"]), up))
    if y.get("low") is not None:
        lines.append((across, _y(y["low"]), across, _y(y["high"])))
    return lines
