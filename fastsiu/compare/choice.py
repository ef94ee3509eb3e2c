"""Which setting of a method is its best, and which method beats which: from counts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .trials import Point, total


def choose(points: Sequence[Point], floor: float) -> tuple[Point, bool]:
    """The point with the lowest share of the name still given among those that keep the floor, and
    True; where none does, the one that keeps most, and False. Among equals the one that keeps more,
    then the middle one by steps: where many settings are as good as can be told, those at the ends
    only just are."""
    good = [p for p in points if p.kept >= floor]
    order = (lambda p: (p.named, -p.kept)) if good else (lambda p: (-p.kept, p.named))
    best = min(map(order, good or points))
    equal = sorted(
        (p for p in good or points if order(p) == best), key=lambda p: (p.step, p.lr, p.k)
    )
    return equal[(len(equal) - 1) // 2], bool(good)


def over_concepts(runs: Sequence[Sequence[Point]]) -> list[Point]:
    """The looks that all concepts' runs have, which may end early, with the counts of all."""
    here = [{(p.lr, p.step, p.k): p for p in run} for run in runs]
    shared = [key for key in here[0] if all(key in run for run in here)]
    return [
        Point(lr, step, total(run[lr, step, k].counts for run in here), k) for lr, step, k in shared
    ]


def unbeaten(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which rows no other beats: none keeps at least as much and gives the name at most as often,
    one of the two strictly."""
    place = [(row["kept"]["value"], -row["named"]["value"]) for row in rows]
    beats = lambda a, b: a != b and a[0] >= b[0] and a[1] >= b[1]
    return [not any(beats(other, own) for other in place) for own in place]


def marked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with whether it is on the front and by whom it is beaten clearly; one without
    a value stays as it is."""
    ran = [row for row in rows if row["named"]["value"] is not None]
    for row, on_front in zip(ran, unbeaten(ran), strict=True):
        row |= {"front": on_front, "clearly_beaten_by": beaten_clearly(row, ran)}
    return [*rows]


def beaten_clearly(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The methods that beat a row by more than its and their 95 % intervals on one axis, and are
    not behind on the other."""
    found = []
    for other in rows:
        less, more = (
            other["named"]["value"] <= row["named"]["value"],
            other["kept"]["value"] >= row["kept"]["value"],
        )
        clear = (
            other["named"]["high"] < row["named"]["low"]
            or other["kept"]["low"] > row["kept"]["high"]
        )
        if less and more and clear:
            found.append(other["method"])
    return found
