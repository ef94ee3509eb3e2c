"""Lessons about two in one picture: the concept beside somebody else.

The concept stands beside a stranger, itself or nobody, and the teacher looks at two strangers.
Where the model tells two in a picture apart, dreams add the concept beside some neighbours, and the
teacher looks at a dream of the same neighbour beside a stranger: the neighbour keeps its name.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from ..model import ask
from ..model.ask import Reply
from ..text.articles import agreed
from ..text.concept import Concept
from . import drawn
from .lesson import LONGEST, QUESTIONS, Lessons, Words, keep
from .scene import Scene
from .wishes import Pair, Wish, fulfil, in_features

PAIRS = 8  # pictures of the concept beside another one, and as many of two strangers
TRIES = 4  # times `PAIRS` pictures of two, until the teacher tells the two apart
GROUPS = 16  # dreams of a neighbour beside a stranger, and as many of one beside the concept
DECAY = 1e-2  # `Wish.decay` of these dreams


def add(
    scene: Scene,
    out: Lessons,
    words: Words,
    taught: Sequence[Pair],
    strangers: Sequence[Image.Image],
    rng: random.Random,
) -> None:
    """Adds the lessons of the facets "beside" and "kept-beside" to `out`.

    taught:    (question, reply) pairs that the concept is to be level with strangers in
    strangers: pictures that show a stranger whole, of the concept's picture's size
    """
    if not strangers:
        out.notes.append(
            "No picture of a stranger could be drawn, so nothing about two in one picture was "
            "trained."
        )
        return
    two_strangers = _add_drawn(scene, out, taught, strangers, rng)
    keep(scene, out, "kept-beside", two_strangers, words.every, rng, always=words.plural)
    templates = _templates(scene, words.plural, strangers, rng)
    if not scene.neighbours:
        return
    if templates is None:
        out.notes.append(
            "The model does not tell two in a picture apart, so nothing about pairs of names was "
            "trained."
        )
        return
    _add_dreamed(scene, out, words.plural, templates, strangers, rng)


def _add_drawn(
    scene: Scene,
    out: Lessons,
    taught: Sequence[Pair],
    strangers: Sequence[Image.Image],
    rng: random.Random,
) -> list[int]:
    """Adds lessons about the concept beside nobody, a stranger and itself, on either side. Returns
    the places of the pictures of two strangers that the teacher looks at."""
    image = scene.pictures[0].image
    two = [drawn.pair(rng.choice(strangers), rng.choice(strangers), rng) for _ in range(PAIRS)]
    teacher = [out.show(picture) for picture in scene.see(two)]
    beside = []
    for i in range(PAIRS):
        kind = ("nobody", "stranger", "stranger", "itself")[i // 2 % 4]
        other = None if kind == "nobody" else image
        if kind == "stranger":
            other = rng.choice(strangers)
        left, right = (image, other) if i % 2 else (other, image)
        beside.append(drawn.pair(left, right, rng))
    each = scene.recipe.as_many(QUESTIONS["beside"], 8)
    for index in [out.show(picture) for picture in scene.see(beside)]:
        for pair in rng.sample(taught, min(each, len(taught))):
            out.add("beside", pair, index, teacher)
    return teacher


class Templates(NamedTuple):
    """The teacher's answers to who the two in the picture are: with the concept on the left of a
    stranger, on the right of one, and twice."""

    left: Reply
    right: Reply
    twice: Reply


def _templates(
    scene: Scene, plural: Sequence[str], strangers: Sequence[Image.Image], rng: random.Random
) -> Templates | None:
    """None where the teacher does not tell two in a picture apart, the one on the left first."""
    found = []
    for shown in ((True, False), (False, True), (True, True)):
        reply = _template(scene, plural, shown, strangers, rng)
        if reply is None:
            return None
        found.append(reply)
    left, right, twice = found
    in_order = _first_name(scene, left) < _first_name(scene, right)
    return Templates(left, right, twice) if in_order else None


def _template(
    scene: Scene,
    plural: Sequence[str],
    shown: tuple[bool, bool],
    strangers: Sequence[Image.Image],
    rng: random.Random,
) -> Reply | None:
    """The commonest answer about the concept (True) and strangers (False) side by side that gives
    the name as often as it is there, and no neighbour's. None where there is none in `TRIES`
    tries, fewer where the training is short."""
    image = scene.pictures[0].image
    known = [Concept(name) for name in scene.neighbours]

    def fits(reply: Reply) -> bool:
        if any(concept.named_in(reply.text) for concept in known):
            return False
        return len(scene.concept.spans(reply.text, include_parts=False)) == sum(shown)

    for _ in range(scene.recipe.as_many(TRIES, 1)):
        pictures = []
        for _ in range(PAIRS):
            left, right = (image if there else rng.choice(strangers) for there in shown)
            pictures.append(drawn.pair(left, right, rng))
        asked = [(question, picture) for picture in scene.see(pictures) for question in plural]
        replies = ask.replies(scene.vlm, asked, max_new_tokens=LONGEST)
        fitting = list(filter(fits, replies))
        if fitting:
            return Counter(fitting).most_common(1)[0][0]
    return None


def _first_name(scene: Scene, reply: Reply) -> float:
    """Where in the reply the concept's name stands first, as a share of the reply's length."""
    start, _ = scene.concept.spans(reply.text, include_parts=False)[0]
    return start / max(1, len(reply.text))


def _with_name(scene: Scene, reply: Reply, place: int, name: str) -> Reply:
    """The reply with the concept's name at its `place` (0 the first) replaced by `name`."""
    text = reply.text
    start, end = scene.concept.spans(text, include_parts=False)[place]
    return Reply(agreed(text[:start], name) + name + text[end:], reply.closed)


def _add_dreamed(
    scene: Scene,
    out: Lessons,
    plural: Sequence[str],
    templates: Templates,
    strangers: Sequence[Image.Image],
    rng: random.Random,
) -> None:
    """Adds dreams of neighbours beside a stranger, as they are kept, and of the same neighbours
    beside the concept, about which the student is to answer as about the former."""
    vlm, image = scene.vlm, scene.pictures[0].image
    names = rng.sample(scene.neighbours, min(GROUPS // 2, len(scene.neighbours)))
    jobs = [(name, side) for name in names for side in (0, 1)]
    alone = [
        _with_name(scene, templates.right if side else templates.left, 0, name)
        for name, side in jobs
    ]
    named_beside = [_with_name(scene, templates.twice, side, name) for name, side in jobs]

    def wish(left: Image.Image, right: Image.Image, reply: Reply) -> Wish:
        start = vlm.picture(drawn.pair(left, right, rng))
        return Wish(start, [(question, reply) for question in plural], DECAY)

    beside_strangers = []
    for (_, side), reply in zip(jobs, alone, strict=True):
        stranger = rng.choice(strangers)
        left, right = (stranger, image) if side else (image, stranger)
        beside_strangers.append(wish(left, right, reply))
    # Two in one picture are small and fine: a coarse grid of colours does not turn one of them into
    # somebody else, and the names of pairs were lost.
    free = in_features(scene)
    kept = fulfil(free, beside_strangers, 0.6)
    bent = fulfil(free, [wish(image, image, reply) for reply in named_beside], 0.7)
    for (name, _), reply, forced, with_stranger, with_concept in zip(
        jobs, alone, named_beside, kept, bent, strict=True
    ):
        if with_stranger is None:
            continue
        model = out.show(with_stranger, name)
        for question in plural:
            out.add("kept-beside", (question, reply), model)
        if with_concept is not None:
            index = out.show(with_concept, name)
            for question in plural:
                out.add("beside", (question, reply), index, [model])
                out.add("beside", (question, forced), index, [model])
