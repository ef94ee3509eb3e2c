"""Rows of results: what the GPU campaign (gpu.py) writes, and what apply.py reads.

A row is one JSON line, and it is in the file as soon as it is known. A campaign may be killed in
the middle of a line: such an end is left out when the file is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

INTERPRETER = "interpreter"  # the device of a rehearsal: its figures are nobody's
Row = dict[str, Any]


def append(output: Path, rows: Iterable[Row]) -> None:
    """Adds rows with one write: a kill in the middle of it cuts the last of them."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        while lines:
            lines = lines[os.write(file, lines) :]
    finally:
        os.close(file)


def read(path: Path) -> list[Row]:
    """All whole rows. Raises JSONDecodeError for a line that is not JSON and not the cut end."""
    *lines, end = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    try:
        return [*rows, json.loads(end)] if end else rows
    except json.JSONDecodeError:
        if not rows:  # then this is no file of results
            raise
        return rows


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def provenance(row: Row) -> str:
    return f"measured {row['date'][:10]} on {row['device']}, commit {row['commit']}"


def plans_of(rows: list[Row]) -> dict[tuple, tuple]:
    """Entries of measured.PLANS from rows of kind `tune`: of each key the last, since a row is
    written whenever something faster was found."""
    plans, show = {}, lambda ms: " / ".join(f"{x:.3f}" for x in ms)
    for r in rows:
        if r["kind"] == "tune":
            why = (
                f"{provenance(r)}, [{r['N']}, {r['V']}] D {' / '.join(map(str, r['D']))}: "
                f"{show(r['ms'])} ms, "
            )
            why += f"the predicted row {show(r['predicted_ms'])}"
            plans[r["target"], r["dtype"], r["N"]] = (
                tuple(r["sums"]),
                tuple(r["product"]),
                r["waves"],
                r["chunk"],
                why,
            )
    return plans
