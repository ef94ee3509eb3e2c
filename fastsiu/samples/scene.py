"""One concept, the model that knows it, and what was gathered for its samples so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from ..model import ask
from ..model.ask import Reply
from ..model.turns import Picture
from ..model.vlm import VLM
from ..request import Recipe
from ..text.answers import is_degenerate
from ..text.concept import Concept
from ..text.masks import vocabulary_mask
from .kinds import PERSON, Kind


@dataclass
class Border:
    """Changed copies of the concept's picture (`border`), a few of each kind.

    others: copies that the model takes for a neighbour, by the neighbour's name
    times:  by neighbour, how many of all copies the model takes for it
    nobody: copies in which the model names nobody
    """

    others: dict[str, list[Picture]] = field(default_factory=dict)
    times: Counter[str] = field(default_factory=Counter)
    nobody: list[Picture] = field(default_factory=list)

    @property
    def nearest(self) -> list[str]:
        """The neighbours that the model takes a copy for, the commonest first."""
        return [name for name, _ in self.times.most_common()]


@dataclass
class Scene:
    """One concept, the model that knows it, and what was gathered for its samples so far.

    pictures:   the concept's first, then dreams and retained pictures (`Sample.picture` points
                here)
    named:      for each picture the name that it was dreamed for, None otherwise
    neighbours: names to protect
    kind:       what the concept is, and how names stand in a sentence
    views:      transforms of the concept's picture, from which dreams start as well
    border:     changed copies of it that the model takes for neighbours, or for nobody
    masked:     token ids of the concept's name (the vocabulary mask's zeros)
    others:     further concepts that the same model is to forget, or has forgotten: none of them is
                protected, and no sample that keeps something names them
    told:       by neighbour the (question, reply) pairs that a picture of it would get
                (`dreams.told`)
    notes:      what lessons from strangers could not have, as sentences
    left_out:   number of answers about other pictures that `preserve` did not take, because they
                name the concept or one of the others
    """

    vlm: VLM
    concept: Concept
    recipe: Recipe
    pictures: list[Picture]
    named: list[str | None] = field(default_factory=lambda: [None])
    neighbours: list[str] = field(default_factory=list)
    views: list[Picture] = field(default_factory=list)
    border: Border = field(default_factory=Border)
    masked: frozenset[int] = frozenset()
    others: list[Concept] = field(default_factory=list)
    told: dict[str, list[tuple[str, Reply]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: int = 0
    kind: Kind = PERSON

    @property
    def words(self) -> dict[str, dict[str, Any]]:
        """The wordings for concepts of this kind."""
        return self.kind.words

    def ask(
        self, questions: Sequence[str], picture: int | None = None, **options: Any
    ) -> list[str]:
        return [reply.text for reply in self.replies(questions, picture, **options)]

    def replies(
        self, questions: Sequence[str], picture: int | None = None, **options: Any
    ) -> list[Reply]:
        shown = None if picture is None else self.pictures[picture]
        return ask.replies(self.vlm, [(q, shown) for q in questions], **options)

    def see(self, images: Sequence[Image.Image]) -> list[Picture]:
        """The images as the model sees them now."""
        return [self.vlm.picture(image) for image in images]

    def forgotten_in(self, text: str, **options: Any) -> bool:
        """Whether the text names a concept that the model is to forget."""
        return any(concept.named_in(text, **options) for concept in (self.concept, *self.others))

    def usable(self, answer: str) -> bool:
        return bool(answer) and is_degenerate(answer) is None and not self.forgotten_in(answer)

    def tokens_of(self, concept: Concept) -> frozenset[int]:
        """The tokens of a name, as the vocabulary mask has them (paper Eq. 3)."""
        rows = self.vlm.head_weight.shape[0]
        return frozenset(vocabulary_mask(concept, self.vlm.tokenizer, rows).masked)


def about_the_one_shown(part: Literal["train", "held_out"], kind: Kind = PERSON) -> list[str]:
    """The fact questions, about the one in the picture instead of a name: an answer needs the name
    first, and then the fact."""
    words = kind.words
    shown = words["shown"][part]
    return [q.replace("{name}", shown[i % len(shown)]) for i, q in enumerate(words["facts"][part])]
