"""The border of a concept: changed copies of the one picture, by whom the untouched model takes
them for.

What the model takes for the concept it is to forget; what it takes for somebody else it is to keep,
however much it looks like the concept. A copy that it takes for a neighbour is a picture of that
neighbour as near to the concept as can be had.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from ..model import ask
from ..model.vlm import Picture
from ..text.concept import Concept
from . import drawn
from .targets import Border, Scene, wordings

CHANGED, MOVED = 90, 30  # copies that are made: with something changed, and seen otherwise
FEW = 8  # copies that are kept of each neighbour, and of nobody
AT_ONCE = 16
ASKED = 4  # wordings in which each is asked who it shows


def border(scene: Scene) -> Border:
    """Copies of the scene's picture that its model takes for one of `scene.neighbours`, or for
    nobody; at most `FEW` of each are kept, and `AT_ONCE` are there at a time."""
    image, seed, out = scene.pictures[0].image, scene.recipe.seed, Border()
    made = itertools.chain(drawn.changes(image, seed, CHANGED), drawn.moved(image, seed + 1, MOVED))
    while some := list(itertools.islice(made, AT_ONCE)):
        pictures = [scene.vlm.picture(one) for one in some]
        for picture, name in zip(pictures, taken_for(scene, pictures), strict=True):
            if name is None:
                out.nobody += [picture] if len(out.nobody) < FEW else []
            elif name in scene.neighbours:
                out.times[name] += 1
                of_one = out.others.setdefault(name, [])
                of_one += [picture] if len(of_one) < FEW else []
    return out


def taken_for(scene: Scene, pictures: Sequence[Picture]) -> list[str | None]:
    """Whom the model names in each picture: the concept or one of the others to forget where it
    does so in any wording, else the neighbour that it names most often; None: nobody."""
    who = wordings()["who"]["train"][:ASKED]
    said = ask.answers(scene.vlm, [(question, picture) for picture in pictures for question in who])
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
