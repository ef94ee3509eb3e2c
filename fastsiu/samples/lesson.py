"""What a lesson is made of: the questions, the pictures that are shown, and the samples that keep
what the teacher says of a picture. The story is in `lessons`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..model import ask
from ..model.turns import Picture
from ..request import Sample
from ..text.answers import is_degenerate
from .scene import Scene, about_the_one_shown
from .wishes import Pair

LONGEST = 40  # tokens of an answer: a lesson is about its beginning
# Lessons about each picture, by facet.
QUESTIONS = {"stranger": 40, "beside": 24, "kept": 14, "kept-beside": 8}


@dataclass
class Lessons:
    """Samples of the facets `request.CHANGES` and `request.KEEPS`, with pictures of their own.

    pictures:  what `Sample.picture` and `Sample.teacher_pictures` count
    named:     for each picture the neighbour that it was dreamed for, None otherwise
    strangers: number of strangers; theirs are the first pictures
    notes:     what could not be had, in sentences
    """

    pictures: list[Picture] = field(default_factory=list)
    named: list[str | None] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    strangers: int = 0
    notes: list[str] = field(default_factory=list)

    def show(self, picture: Picture, name: str | None = None) -> int:
        """Adds a picture and returns its place."""
        self.pictures.append(picture)
        self.named.append(name)
        return len(self.pictures) - 1

    def add(self, facet: str, pair: Pair, picture: int, teacher: Sequence[int] = ()) -> None:
        """Adds a sample, unless its answer is gibberish. teacher: what the teacher looks at instead
        of `picture`."""
        question, reply = pair
        answer, closed = reply.opening
        if is_degenerate(answer) is None:
            self.samples.append(
                Sample(facet, question, answer, picture, (), "lesson", closed, tuple(teacher))
            )


@dataclass(frozen=True)
class Words:
    """The questions of lessons.

    naming: about who it is, to which strangers get another answer; `plural` is part of it
    plural: who the two in the picture are
    look:   about what is visible
    """

    naming: list[str]
    plural: list[str]
    look: list[str]

    @property
    def every(self) -> list[str]:
        return [*self.naming, *self.look]


def words_of(scene: Scene, rng: random.Random) -> Words:
    """The training wordings, filled in with the concept's name and with some neighbours'."""
    words, name, near = scene.words, scene.concept.name, scene.neighbours
    fill = scene.kind.fill
    yes, plural = words["yesno"]["train"], list(words["plural"]["train"])
    naming = [*words["who"]["train"], *(fill(q, name=name) for q in yes)]
    some = rng.sample(near, min(6, len(near)))
    naming += [fill(yes[i % len(yes)], name=other) for i, other in enumerate(some)]
    naming += [*about_the_one_shown("train", scene.kind), *plural]
    for i in range(6 if len(near) > 1 else 0):
        three = [name, *rng.sample(near, 2)]
        rng.shuffle(three)
        choice = words["choice"]["train"]
        naming.append(choice[i % len(choice)].replace("{names}", scene.kind.choice(three)))
    return Words(naming, plural, [*words["describe"]["train"], *words["look"]["train"]])


def keep(
    scene: Scene,
    out: Lessons,
    facet: str,
    pictures: Sequence[int],
    questions: Sequence[str],
    rng: random.Random,
    always: Sequence[str] = (),
) -> None:
    """Adds `QUESTIONS[facet]` questions about each picture with the teacher's own answers, without
    those that name what is to be forgotten.

    always: asked of every picture, besides some of `questions`. Without them half of the questions
            about a neighbour's dream are about its facts: they are lost before its name is
    """
    asked, facts = [], about_the_one_shown("train", scene.kind)
    count = scene.recipe.as_many(QUESTIONS[facet], 3)
    for index in pictures:
        first = list(always)
        if out.named[index] and not always:
            first = rng.sample(facts, min(count // 2, len(facts)))
        rest = [question for question in questions if question not in first]
        first += rng.sample(rest, min(max(2, count - len(first)), len(rest)))
        asked += [(question, index) for question in first]
    replies = ask.replies(
        scene.vlm,
        [(question, out.pictures[index]) for question, index in asked],
        max_new_tokens=LONGEST,
    )
    for (question, index), reply in zip(asked, replies, strict=True):
        denied = scene.forgotten_in(question)
        if denied or not scene.forgotten_in(reply.text):
            out.add(facet, (question, reply), index)
