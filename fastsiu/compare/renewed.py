"""Some methods measured anew, beside an earlier report's rows of the others: what must be the same,
and the report of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..request import BadInput
from . import methods
from .choice import marked

# By key of a report, what differs where the key does.
SAME = {
    "format": "their form",
    "suite": "the suite",
    "concepts": "the concepts",
    "model": "the model",
    "floor": "the floor",
    "search": "the search",
    "test": "the seeds or the questions of the test",
    "untouched": "what the untouched model answers, so the world is another",
}
# Of a record, what a row keeps of the run that measured it.
PROVENANCE = ("date", "commit", "device", "torch", "transformers")


def check(new: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """Raises BadInput where a report, or what is known of it yet, and an earlier one differ in what
    makes their rows comparable. The untouched model's answers are not known before it is asked."""
    for key, what in SAME.items():
        if key in new and new[key] != earlier.get(key):
            raise _differs(what)
    if "recipe" in new and not same_recipe(new["recipe"], earlier["recipe"]):
        raise _differs("the recipe")


def same_recipe(new: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    """Whether two recipes are the same; what the earlier one does not have, since there was none of
    it yet, must be off in the other."""
    return earlier.items() <= new.items() and not any(
        value for key, value in new.items() if key not in earlier
    )


def renewed(new: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The new record with its own rows and the earlier one's others, in the order of
    `methods.METHODS`, each with what measured it in "measured". The front, and who beats whom, is
    told of all of them.

    new, earlier: records with `PROVENANCE`

    Raises BadInput as `check`.
    """
    check(new, earlier)
    rows = {row["method"]: _told(row, earlier) for row in earlier["rows"]}
    rows |= {row["method"]: _told(row, new) for row in new["rows"]}
    order = {name: number for number, name in enumerate(methods.METHODS)}
    listed = sorted(rows.values(), key=lambda row: order.get(row["method"], len(order)))
    return {**new, "rows": marked(listed)}


def note(report: Mapping[str, Any]) -> str:
    """Which rows were measured when, and at which commit; "" where one run measured all."""
    runs: dict[tuple[str, str], list[str]] = {}
    for row in report["rows"]:
        if found := row.get("measured"):
            runs.setdefault((found["date"][:10], found["commit"]), []).append(row["method"])
    if len(runs) < 2:
        return ""
    most = max(runs, key=lambda run: len(runs[run]))
    others = [(run, names) for run, names in sorted(runs.items()) if run != most]
    said = [f"{', '.join(names)} on {day} at commit {at}" for (day, at), names in others]
    said.append(f"all others on {most[0]} at commit {most[1]}")
    return f"Measured: {'; '.join(said)}."


def _told(row: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a row that says what measured it; a row that says so already keeps that."""
    measured = {key: record[key] for key in PROVENANCE if key in record}
    return {"measured": measured, **row}


def _differs(what: str) -> BadInput:
    return BadInput(f"The earlier rows differ in {what}: measure all methods anew.")
