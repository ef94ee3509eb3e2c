"""What a model is asked about one concept: pictures by the part they play, questions by kind, and
every pair of them. Pure data.

Questions are templates. {name} becomes the concept's name and, about a picture of someone else,
also that person's name: a model that says no to everything gives itself away there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL import Image

from ..images import load_image
from ..samples.kinds import PERSON, Kind
from ..text.concept import Concept

# The part that a picture plays.
ROLES = (
    "training",  # the picture that was trained on, and its transforms
    "concept",  # other pictures of the concept
    "other",  # anything else
    "lookalike",  # what looks like the concept
    "group",  # the concept beside something else
    "control",  # what no model has seen
)
# Kinds of questions about a picture: the answer would be the name; "is this NAME?"; the answer
# needs no name.
WITH_PICTURE = ("name", "yesno", "describe")
# Kinds of questions in words alone: what the concept looks like; a fact about it; about nobody.
TEXT = ("appearance", "fact", "general")
OF_CONCEPT = ("training", "concept")
OF_OTHERS = ("other", "lookalike")

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A wording and its kind.

    keywords: further words (word boundaries, any case) that count as the concept's name in an
              answer to it

    Raises ValueError for an unknown kind.
    """

    text: str
    kind: str
    keywords: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in (*WITH_PICTURE, *TEXT):
            raise ValueError(f"kind {self.kind!r} is none of {', '.join((*WITH_PICTURE, *TEXT))}")


@dataclass(frozen=True)
class Seen:
    """A picture, read from its file when it is needed.

    role:  the part it plays, of `ROLES`
    shows: the name of whom it shows, where that is known

    Raises ValueError for an unknown role.
    """

    label: str
    source: Path | Image.Image
    role: str
    shows: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is none of {', '.join(ROLES)}")

    def load(self) -> Image.Image:
        """Raises BadInput for a file that is no picture."""
        return self.source if isinstance(self.source, Image.Image) else load_image(self.source)


@dataclass(frozen=True)
class Cell:
    """One question about one picture or about none.

    text:  the question, filled in
    about: the name in the question; None where it holds none
    """

    question: Question
    text: str
    seen: Seen | None
    about: str | None


@dataclass(frozen=True)
class Exam:
    """Everything that is asked about one concept.

    others:   names of others whom the model knows: an answer about the concept that newly gives one
              of them has renamed it; facts are asked about them, too
    stranger: a name that no model knows: "Is this STRANGER?" about the concept's pictures shows
              how often any name gets a yes
    kind:     what the concept is: names stand in questions as its kind has them
    null:     by metric, the reason for one that cannot be measured
    """

    concept: Concept
    pictures: tuple[Seen, ...]
    questions: tuple[Question, ...]
    others: tuple[Concept, ...] = ()
    stranger: str | None = None
    null: Mapping[str, str] = field(default_factory=dict)
    kind: Kind = PERSON

    @functools.cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every question of `WITH_PICTURE` about every picture, then those in words alone."""
        return (*self._about_pictures(), *self._text())

    def _about_pictures(self) -> Iterator[Cell]:
        for seen in self.pictures:
            for question in self.questions:
                if question.kind in WITH_PICTURE:
                    floor = (
                        self.stranger
                        if question.kind == "yesno" and seen.role in OF_CONCEPT
                        else None
                    )
                    for name in self._names(question, [seen.shows, floor]):
                        yield Cell(question, self._filled(question.text, name), seen, name)

    def _text(self) -> Iterator[Cell]:
        for question in self.questions:
            if question.kind in TEXT:
                others = [other.name for other in self.others] if question.kind == "fact" else []
                for name in self._names(question, others):
                    yield Cell(question, self._filled(question.text, name), None, name)

    def _filled(self, text: str, name: str | None) -> str:
        return text if name is None else self.kind.fill(text, name=name)

    def _names(self, question: Question, more: Sequence[str | None]) -> list[str | None]:
        if "{name}" not in question.text:
            return [None]
        return list(
            dict.fromkeys([self.concept.name, *(name for name in more if name is not None)])
        )


def evenly(items: Sequence[T], most: int | None) -> list[T]:
    """`most` of the items (all for None) at even distances, the first among them."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]
