"""What a request trains on, and what it leaves out beside others.

No sample of one request may teach a look that another is to forget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..request import CHANGES, Request, Sample
from .corpus import Corpus
from .scene import Scene


@dataclass
class Prepared:
    """One request before training.

    corpus:        its samples of the four targets, with their masks
    dreamed:       by neighbour how many dreams were accepted
    lessons:       its lessons (target 5), where the recipe has strangers
    lessons_named: for each picture of the lessons the neighbour that it was dreamed for
    """

    request: Request
    scene: Scene
    corpus: Corpus
    dreamed: list[dict[str, Any]]
    lessons: Corpus | None = None
    lessons_named: list[str | None] = field(default_factory=list)


def samples_beside(own: Prepared, prepared: Sequence[Prepared]) -> Corpus:
    """A request's samples without those that would teach a look which another request is to forget:
    in pictures, and in words."""
    others = [other for other in prepared if other is not own]
    dreams_of_forgotten = _places_of_forgotten(own.scene.named, others)
    denied_in_words = {
        sample.question
        for other in others
        for sample in other.corpus.samples
        if sample.picture is None and sample.facet == "describe"
    }

    def teaches_a_forgotten_look(sample: Sample) -> bool:
        if sample.facet != "preserve":
            return False
        if sample.picture is None:
            return sample.question in denied_in_words
        if sample.picture in dreams_of_forgotten:
            return True
        return _names_any(others, sample.question) or _names_any(others, sample.answer)

    samples = own.corpus.samples
    return own.corpus.pick(
        [i for i, sample in enumerate(samples) if not teaches_a_forgotten_look(sample)]
    )


def lessons_beside(own: Prepared, prepared: Sequence[Prepared]) -> Corpus | None:
    """A request's lessons without those that would teach a look which another request is to
    forget."""
    if own.lessons is None:
        return None
    others = [other for other in prepared if other is not own]
    dreams_of_forgotten = _places_of_forgotten(own.lessons_named, others)

    def teaches_a_forgotten_look(sample: Sample) -> bool:
        if sample.picture in dreams_of_forgotten:
            return True
        return sample.facet not in CHANGES and _names_any(others, sample.answer)

    samples = own.lessons.samples
    return own.lessons.pick(
        [i for i, sample in enumerate(samples) if not teaches_a_forgotten_look(sample)]
    )


def _places_of_forgotten(named: Sequence[str | None], others: Sequence[Prepared]) -> set[int]:
    """The pictures that were dreamed for a name which one of the `others` is to forget."""
    return {i for i, name in enumerate(named) if name and _names_any(others, name)}


def _names_any(others: Sequence[Prepared], text: str) -> bool:
    return any(other.scene.concept.named_in(text) for other in others)
