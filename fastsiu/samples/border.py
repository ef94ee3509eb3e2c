"""The border of a concept: changed copies of the one picture, sorted by whom the untouched model
takes them for.

The model is to forget a copy that it takes for the concept. It is to keep a copy that it takes for
somebody else, however much that looks like the concept: no picture of a neighbour is nearer to the
concept than a copy that the model takes for the neighbour.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from ..model import ask
from ..model.turns import Picture
from ..text.concept import Concept
from . import drawn
from .scene import Border, Scene

# Copies with something changed; copies that are turned, moved or lit anew. A short training gets
# fewer.
CHANGED, MOVED = 90, 30
FEW = 8  # most copies that are kept of each neighbour, and of nobody
AT_ONCE = 16  # copies in memory at a time
NAMING = 24  # tokens of an answer that gives a name or none
ASKED = 4  # wordings of the question who a copy shows


def border(scene: Scene) -> Border:
    """Copies of the scene's picture that its model takes for one of `scene.neighbours`, or for
    nobody; at most `FEW` of each."""
    image, seed, out = scene.pictures[0].image, scene.recipe.seed, Border()
    changed, moved = scene.recipe.as_many(CHANGED, 24), scene.recipe.as_many(MOVED, 8)
    copies = itertools.chain(
        drawn.changes(image, seed, changed), drawn.moved(image, seed + 1, moved)
    )
    while some := list(itertools.islice(copies, AT_ONCE)):
        pictures = scene.see(some)
        for picture, name in zip(pictures, taken_for(scene, pictures), strict=True):
            if name is None:
                same = out.nobody
            elif name in scene.neighbours:
                out.times[name] += 1
                same = out.others.setdefault(name, [])
            else:
                continue
            if len(same) < FEW:
                same.append(picture)
    return out


def taken_for(scene: Scene, pictures: Sequence[Picture]) -> list[str | None]:
    """Whom the model takes each picture for: the concept, where any answer names the concept or
    another one to forget; else the neighbour that most answers name; None where none is named."""
    who = scene.words["who"]["train"][:ASKED]
    said = ask.answers(
        scene.vlm,
        [(question, picture) for picture in pictures for question in who],
        max_new_tokens=NAMING,
    )
    known = {name: Concept(name) for name in scene.neighbours}
    out: list[str | None] = []
    for i in range(len(pictures)):
        answers = said[i * len(who) : (i + 1) * len(who)]
        if any(scene.forgotten_in(answer) for answer in answers):
            out.append(scene.concept.name)
            continue
        named = Counter(
            name
            for answer in answers
            for name, concept in known.items()
            if concept.named_in(answer)
        )
        out.append(named.most_common(1)[0][0] if named else None)
    return out
