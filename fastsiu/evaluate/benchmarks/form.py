"""The form that every benchmark is read into: entities with pictures, items, answers, rows of a
table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...images import picture_of
from ...request import BadInput

# A value {value, n, ...}, or {value: None, reason}.
Value = dict[str, Any]


@dataclass(frozen=True)
class Photo:
    """A picture of a benchmark; its file is read when it is needed.

    label: how sentences name it: by a path, and by its row where it lies in a table
    read:  returns the bytes of the picture's file; raises BadInput
    """

    label: str
    read: Callable[[], bytes] = field(compare=False)

    def load(self) -> Image.Image:
        """Raises BadInput for bytes that are no picture."""
        return picture_of(self.read(), Path(self.label))


@dataclass(frozen=True)
class Entity:
    """Whom or what the items are about.

    name: None where the benchmark has no field for it
    """

    id: str
    name: str | None
    photos: tuple[Photo, ...]


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    id:          unique in the benchmark
    entity:      an `Entity.id`; "" for a question about none of them
    sets:        the parts of the benchmark that it belongs to, by the benchmark's own names
    task:        by the benchmark's own name
    photo:       None: it is asked in words alone
    options:     (letter, text) of a choice
    keywords:    words of a right answer
    rephrased:   other wordings of the question
    same:        another wording of the answer
    wrong:       wrong answers of the same form
    """

    id: str
    entity: str
    sets: frozenset[str]
    task: str
    question: str
    answer: str
    photo: Photo | None = None
    options: tuple[tuple[str, str], ...] = ()
    keywords: tuple[str, ...] = ()
    rephrased: tuple[str, ...] = ()
    same: str | None = None
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that was read and checked.

    forget: the name of the set to forget, as `Item.sets` has it; "" where there are several
    """

    name: str
    entities: tuple[Entity, ...]
    items: tuple[Item, ...]
    forget: str = ""

    def counts(self) -> dict[str, int]:
        """Numbers of entities, different pictures and items, and of the items of each set."""
        photos = {p.label for e in self.entities for p in e.photos}
        photos |= {i.photo.label for i in self.items if i.photo is not None}
        sets = Counter(name for item in self.items for name in item.sets)
        return {
            "entities": len(self.entities),
            "pictures": len(photos),
            "items": len(self.items),
            **dict(sorted(sets.items())),
        }

    def of(self, part: str) -> list[Item]:
        return [item for item in self.items if part in item.sets]


@dataclass(frozen=True)
class Answer:
    """What a model answered to an item.

    text:      the greedy answer
    rephrased: the answers to the other wordings of the question
    nats:      what each token of the right answer costs, -log p, teacher-forced
    same:      the mean over the tokens of the right answer's other wording; of the answer itself
               where there is none
    wrong:     the mean over the tokens of each wrong answer
    """

    text: str
    rephrased: tuple[str, ...] = ()
    nats: tuple[float, ...] = ()
    same: float = 0.0
    wrong: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """The mean over the tokens of the right answer."""
        return sum(self.nats) / len(self.nats)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Answer:
        """The inverse of `as_dict`, also after JSON."""
        return cls(
            values["text"],
            tuple(values["rephrased"]),
            tuple(values["nats"]),
            values["same"],
            tuple(values["wrong"]),
        )


@dataclass(frozen=True)
class Row:
    """One line of the benchmark's table: a metric on a set, both by the benchmark's own names."""

    part: str
    metric: str
    value: Value


@dataclass(frozen=True)
class Answered:
    """Items with their answers.

    retrained: the answers of a model that never learned what is to be forgotten, by `Item.id`, for
               metrics that compare with one; None where there is no such model
    split:     the words of a text, as ROUGE compares them
    graded:    what a judge's grades come to, by part and metric; empty where none was asked
    """

    items: tuple[Item, ...]
    answers: Mapping[str, Answer]
    split: Callable[[str], list[str]]
    retrained: Mapping[str, Answer] | None = None
    graded: Mapping[tuple[str, str], Value] = field(default_factory=dict)

    def of(self, part: str, task: str | None = None) -> list[tuple[Item, Answer]]:
        return [
            (item, self.answers[item.id])
            for item in self.items
            if part in item.sets and item.id in self.answers and task in (None, item.task)
        ]


def check_ids(what: str, ids: Iterable[str]) -> None:
    """Raises BadInput for the first id that comes twice."""
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise BadInput(f"{what} has the id {one!r} twice: download it again.")
        seen.add(one)


def mean(values: Sequence[float], reason: str) -> Value:
    """{value, n} of the mean; null with the reason where there are no values."""
    if not values:
        return {"value": None, "reason": reason}
    return {"value": sum(values) / len(values), "n": len(values)}
