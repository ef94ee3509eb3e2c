"""What several requests leave on disk, and what of it is done already.

DIR/001, DIR/002, ... or DIR/joint are complete outputs. DIR/matrix.json has the order in which they
were trained, what became of each request, and who was still forgotten after each training. A run
that was interrupted reads it to go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .. import output as outputs
from ..guards.strict_json import read_json
from ..manifest import SEAL, seal
from ..report.sentences import sentence
from ..report.words import CONCEPT
from ..request import BadInput, Recipe, Request
from ..samples.kinds import DEFAULT
from ..settings import ModelRef
from . import staging
from .request_file import first_sentence_of, places_of

Mode = Literal["sequence", "joint"]
MATRIX = "matrix.json"
SHAPE = {
    "mode": str,
    "order": [int],
    "matrix": [{"after": [int], "named": {"*": float}}],
    "requests": [
        {"line": int, "concept": str, "status": str, "reasons": [str], "output": (str, None)}
    ],
}


@dataclass
class Outcome:
    """What became of one line of the file.

    status: "forgotten", "not forgotten" or "failed"; "" where it was not done yet
    output: the name of its directory; None where there is none
    """

    line: int
    concept: str
    status: str = ""
    reasons: list[str] = field(default_factory=list)
    output: str | None = None


@dataclass
class State:
    """The results of several requests, in memory as they are on disk.

    output:   the directory of all outputs
    asked:    the requests by their line in the file
    weights:  SHA-256 of the model's files by name, where it is a directory
    settings: what else decides the result
    outcomes: by line, in the file's order
    kinds:    of the concept, by line, of those that were prepared or are done
    matrix:   one row a training (`several.Several`)
    """

    output: Path
    mode: Mode
    asked: dict[int, Request]
    model: ModelRef
    recipe: Recipe
    weights: dict[str, str] | None
    settings: dict[str, Any]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    matrix: list[dict[str, Any]] = field(default_factory=list)

    def directory(self, line: int) -> Path:
        return self.output / (f"{line:03d}" if self.mode == "sequence" else "joint")

    def digest(self, lines: Sequence[int]) -> str:
        """The digest of one training: the last of these lines, after all lines before it."""
        # "all anew": an earlier version went on with the adapter of the line before
        chain = "all anew" if self.mode == "sequence" else ""
        for line in lines:
            chain = outputs.request_digest(
                self.asked[line],
                self.recipe,
                self.model.name,
                self.model.revision,
                weights=self.weights,
                before=chain,
                **self.settings,
            )
        return chain

    def resume(self) -> list[int]:
        """The lines that are done, in the order in which they were trained. Raises BadInput where
        the output is one of other requests."""
        path = self.output / MATRIX
        self.outcomes = {
            line: Outcome(line, request.concept) for line, request in self.asked.items()
        }
        if not path.is_file():
            outputs.check_destination(self.output, "")  # absent or empty, or it raises
            return []
        staging.sweep(self.output)
        record = read_json(path, what=str(path), remedy="choose another --output", shape=SHAPE)
        try:
            order, self.matrix = [int(line) for line in record["order"]], list(record["matrix"])
            stored = {o["line"]: Outcome(**o) for o in record["requests"]}
            same = record["mode"] == self.mode and all(line in stored for line in order)
            if not all({"after", "named"} <= set(row) for row in self.matrix):
                raise KeyError("after")
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} is damaged: choose another --output.") from error
        if not same or not all(line in self.asked for line in order):
            raise BadInput(
                f"{self.output} holds the results of other requests, or the lines of the file "
                "have moved: "
                "choose another --output, or put them back."
            )
        return (
            self._resume_joint(order, stored)
            if self.mode == "joint"
            else self._resume_sequence(order)
        )

    def _resume_joint(self, order: list[int], stored: dict[int, Outcome]) -> list[int]:
        # cut off before its one training was over
        if not order or not self.directory(order[0]).exists():
            return []
        if {line: o.concept for line, o in stored.items()} != {
            line: self.shown(o).concept for line, o in self.outcomes.items()
        }:
            raise BadInput(
                f"{self.output} holds a joint training of other lines, and nothing can be added "
                "to it: choose another "
                "--output."
            )
        outputs.check_destination(self.directory(order[0]), self.digest(order))
        self.outcomes |= {line: self.restored(one) for line, one in stored.items()}
        for number, line in enumerate(order, 1):
            folder = (
                self.directory(line) / f"{number:03d}" if len(order) > 1 else self.directory(line)
            )
            self._adopt(line, folder / "report.json")
        return order + [line for line in self.asked if line not in order]

    def _resume_sequence(self, order: list[int]) -> list[int]:
        for i in range(len(order)):  # raises where the directory holds anything but this
            if (
                outputs.check_destination(self.directory(order[i]), self.digest(order[: i + 1]))
                != "same"
            ):
                raise BadInput(
                    f"{self.directory(order[i])} is missing: restore it, or choose another "
                    "--output."
                )
        for line in order:  # its own report says what came out, and is sealed
            self._adopt(line, self.directory(line) / "report.json")
        for line in self.asked:  # killed after the output and before the matrix: the output counts
            place = self.directory(line)
            if (
                line not in order
                and place.exists()
                and outputs.check_destination(place, self.digest([*order, line])) == "same"
            ):
                self._adopt(line, place / "report.json")
                order.append(line)
        return order

    def _adopt(self, line: int, report: Path) -> None:
        found, place = outputs.read_report(report.parent), self.directory(line).name
        self.outcomes[line] = replace(
            self.outcomes[line], status=found["verdict"], reasons=found["reasons"], output=place
        )
        self.kinds[line] = found.get("kind", DEFAULT)

    def shown(self, outcome: Outcome) -> Outcome:
        """The outcome for matrix.json: without names where reports are redacted."""
        if not self.settings.get("redact"):
            return outcome
        return replace(
            outcome, concept=CONCEPT, reasons=[sentence(reason) for reason in outcome.reasons]
        )

    def restored(self, stored: Outcome) -> Outcome:
        return replace(stored, concept=self.asked[stored.line].concept)

    def decided(self, line: int, forgotten: bool, reasons: Sequence[str]) -> None:
        status = "forgotten" if forgotten else "not forgotten"
        self.outcomes[line] = replace(self.outcomes[line], status=status, reasons=list(reasons))

    def fail(self, line: int, error: BaseException) -> None:
        """Notes that a line failed; without paths, since others may read matrix.json."""
        reason = first_sentence_of(error, places_of(self.asked[line], self.model.name))
        self.outcomes[line] = replace(self.outcomes[line], status="failed", reasons=[reason])

    def save(self, order: Sequence[int]) -> None:
        content: dict[str, Any] = {
            "mode": self.mode,
            "order": list(order),
            "matrix": self.matrix,
            "requests": [vars(self.shown(self.outcomes[line])) for line in self.asked],
        }
        content[SEAL] = seal(content)
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        staging.replace_file(self.output / MATRIX, text.encode("utf-8", "backslashreplace"))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Makes the directory, and keeps other runs out of it inside the block. Raises BadInput
        where another run is at work there."""
        self.output.mkdir(mode=0o700, exist_ok=True)
        with staging.claim(self.output, MATRIX) as mine:
            if not mine:
                raise BadInput(
                    f"Another run is at work in {self.output}: wait for its end, or choose "
                    "another --output."
                )
            yield
