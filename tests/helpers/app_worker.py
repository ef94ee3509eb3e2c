"""A worker process for the app that computes nothing: `Job(place, app_worker.serve)`.

The concept's name says how it behaves: "unknown" is not named, "refused" cannot be used, "dies"
ends the process, "slow" never ends its training, "endless" not even its first question, and "full"
cannot pack its first result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STEPS = 4


def serve(connection: Connection, settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        asked = arguments[0]
        if asked.concept == "dies":
            os._exit(9)
        if asked.concept == "refused":
            connection.send(("refused", "It cannot be used: give another."))
            continue
        try:
            connection.send(("result", globals()[command](connection, *arguments)))
        except OSError as error:
            connection.send(("refused", str(error)))


def look(connection: Connection, asked: Any) -> list[tuple[str, str, bool]]:
    connection.send(("stage", "Asking"))
    while asked.concept == "endless":
        time.sleep(1)
    name = "a stranger" if asked.concept == "unknown" else asked.concept
    return [("Who is this?", f"This is {name}.", name == asked.concept)]


def gather(connection: Connection, asked: Any) -> dict[str, Any]:
    connection.send(("note", "A <b>note</b>."))
    answer = [("This is ", True, False), ("a hat", False, False), (asked.concept, True, True)]
    return {
        "rows": [("align, teacher, picture 0", "Who is <i>this</i>?", answer)],
        "count": 1,
        "tokens": [asked.concept],
        "warning": None,
        "protected": ["Ann & Bo"],
        "lessons": [("about a view of it", 7, [("Who?", "Nobody.")])],
    }


def train(connection: Connection, asked: Any, destination: Path, archive: Path) -> dict[str, Any]:
    connection.send(("stage", "Training"))
    for number in range(1, STEPS + 1):
        p_name = 0.9 if number < STEPS else 0.01
        step = {"step": number, "loss": 1.0, "ce": 0.5, "kl": 0.1, "strange": 0.4}
        connection.send(("step", ({**step, "p_name": p_name, "retained": 0.97}, STEPS)))
        connection.send(("look", (number, 0.9 - number / 10, 0.98)))
        (destination.parent / "unfinished").write_text("half")
        while asked.concept == "slow":
            time.sleep(1)
    (destination.parent / "unfinished").unlink()
    destination.mkdir()
    (destination / "report.html").write_text("the report")
    archive.write_bytes(b"the archive")
    if asked.concept == "full" and not (marker := destination.parent.parent / "was full").exists():
        marker.touch()
        raise OSError("No space left on device.")
    rate = {"value": 1.0, "low": 0.9, "high": 1.0, "n": 30}
    return {
        "forgotten": True,
        "standing": "Forgotten: as far as it was asked.",
        "reasons": [],
        "measures": [("The picture", "Is it gone?", {**rate, "value": 0.0, "low": 0.0}, rate)],
        "remains": "What remains.",
        "caveats": ["A caveat."],
        "seconds": 1.0,
    }


def ask(
    connection: Connection, asked: Any, destination: Path, question: str, picture: Path | None
) -> tuple[str, str]:
    where = "in words" if picture is None else "with a picture"
    return f"{asked.concept}, {where}.", f"Nobody, {where}."
