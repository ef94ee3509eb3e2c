"""The verdict of an unlearning: both models are asked held-out questions about held-out transforms
of the picture, which no sample, no dream and no early stop has seen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import compress

from ..judging.kept import DRAWN
from ..model import adapter, ask
from ..model.turns import Picture
from ..pictures.transforms import variants
from ..samples import generic
from ..samples.kinds import THING, wordings
from ..samples.scene import Scene
from ..text.concept import Concept
from ..verdict import Answer, Verdict, judge
from . import noise
from .asked_pictures import Shown
from .attacks import LEAST, MOST
from .inquiry import VERDICT, inquire

KEPT = ("specificity", "facts")  # kinds of the verdict that are compared against a noise floor
# Pictures that are drawn where nobody gave one of anything else, and the questions to each.
DRAWN_PICTURES, DRAWN_QUESTIONS = 20, 3
DRAWN_ALONE = (
    "No picture of anything else was given (--retain DIR), so what is kept in pictures was "
    "measured on drawn shapes."
)
NULL = {
    "generality": "One picture cannot show it: give more pictures of the concept with --images "
    "DIR.",
    "specificity": "No picture of anything else was given: give some with --retain DIR.",
}


def questions(
    scene: Scene, more: Sequence[Shown] = (), rest: Sequence[Shown] = ()
) -> list[tuple[str, str, Shown | None]]:
    """(kind of the verdict, question, picture or None) of everything that both models are asked.

    more: further pictures of the concept
    rest: pictures of anything else
    """
    words, name, fill = scene.words, scene.concept.name, scene.kind.fill
    who = words["who"]["held_out"]
    asked: list[tuple[str, str, Shown | None]] = []
    for shown in variants(scene.pictures[0].image, scene.recipe.seed, held_out=True):
        asked += [("efficacy", q, shown) for q in who]
        asked += [("recognition", fill(q, name=name), shown) for q in words["yesno"]["held_out"]]
    asked += [("recognition", fill(q, name=name), None) for q in words["appearance"]["held_out"]]
    asked += [("generality", q, shown) for shown in more for q in who]
    asked += [("specificity", q, shown) for shown in rest for q in who]
    asked += [
        ("facts", fill(q, name=n), None)
        for n in (name, *scene.neighbours)
        for q in words["facts"]["held_out"]
    ]
    return asked + [("facts", q, None) for q in words["general"]["held_out"]]


def drawn(scene: Scene) -> list[tuple[str, str, Shown | None]]:
    """The same, about drawn pictures that no lesson has. A model that gives one new answer about
    everything gives it about these as well. Nothing where the recipe draws none either."""
    if not scene.recipe.generic:
        return []
    rng = random.Random(f"held out {scene.recipe.seed}")
    size, who = scene.pictures[0].image.size, scene.words["who"]["held_out"]
    asked: list[tuple[str, str, Shown | None]] = []
    for number in range(1, DRAWN_PICTURES + 1):
        shown = (f"drawing {number}", generic.shapes(size, rng))
        asked += [("specificity", q, shown) for q in rng.sample(who, DRAWN_QUESTIONS)]
    return asked


def part(kind: str, question: str, concept: Concept) -> str:
    """The part of what is kept that a question is about, "" where there is one only; the verdict
    looks at each part."""
    if kind != "facts":
        return ""
    if question in wordings()["general"]["held_out"]:
        return "general knowledge"
    return (
        "facts of the concept"
        if concept.named_in(question, include_parts=False)
        else "facts of others"
    )


def decide(
    scene: Scene,
    more: Sequence[Shown] = (),
    rest: Sequence[Shown] = (),
    *,
    families: Sequence[str] = VERDICT,
) -> tuple[Verdict, list[Answer]]:
    """Asks the untouched and the unlearned model the same questions, tries to get the name or the
    facts back, and judges the answers. The adapter is on.

    more:     further pictures of the concept
    rest:     pictures of anything else
    families: keys from `inquiry.VERDICT`, the attacks that are tried
    """
    drawings = [] if rest else drawn(scene)
    asked = questions(scene, more, rest) + drawings
    of_drawings = {id(shown) for _, _, shown in drawings}
    vlm, images = scene.vlm, {id(shown[1]): shown[1] for _, _, shown in asked if shown}

    def see() -> dict[int, Picture]:
        return {key: vlm.picture(image) for key, image in images.items()}

    def put(pictures: dict[int, Picture]) -> list[tuple[str, Picture | None]]:
        return [(q, pictures[id(shown[1])] if shown else None) for _, q, shown in asked]

    with adapter.teacher(vlm):
        pictures = see()
        before = ask.replies(vlm, put(pictures))
        # A drawing in which the untouched model sees what is to be forgotten shows nothing.
        sound = [
            not (id(shown) in of_drawings and scene.forgotten_in(reply.text))
            for (_, _, shown), reply in zip(asked, before, strict=True)
        ]
        asked, before = list(compress(asked, sound)), list(compress(before, sound))
        kept = noise.Kept(vlm, [kind in KEPT for kind, _, _ in asked], put(pictures), before)
        inquiry = (
            inquire(
                vlm,
                scene.concept,
                scene.pictures[0].image,
                neighbours=scene.neighbours,
                more=more,
                families=families,
                seed=scene.recipe.seed,
                kind=scene.kind,
                # as long as the training, not longer
                share=scene.recipe.as_many(MOST, LEAST) / MOST,
            )
            if families
            else None
        )
    # a trained projector sees differently
    pictures = see() if scene.recipe.sees_anew else pictures
    after = ask.replies(vlm, put(pictures))
    answers = [
        Answer(
            kind,
            q,
            shown[0] if shown else None,
            b.text,
            a.text,
            part=DRAWN if id(shown) in of_drawings else part(kind, q, scene.concept),
            cut=(not b.closed, not a.closed),
            lost=lost,
            noise=floor,
        )
        for (kind, q, shown), b, a, lost, floor in zip(
            asked, before, after, kept.again(vlm, put(pictures)), kept.floor, strict=True
        )
    ]
    # The recipe may put an invented name in the concept's place: that is nobody's, so it is not
    # among the others.
    # A thing that is not recognised is still called something, as a stranger's picture is.
    known = [] if scene.kind.name == THING else scene.neighbours
    others = [*map(Concept, known), *scene.others]
    found = inquiry.families(inquiry.again(vlm)) if inquiry else []
    remarks = [*(inquiry.remarks if inquiry else []), *([DRAWN_ALONE] if drawings else [])]
    return judge(
        answers,
        scene.concept,
        others=others,
        reasons_for_null=NULL,
        families=found,
        remarks=remarks,
        of_nobody=inquiry.confirmed if inquiry else None,
        noise=kept.way,
    ), answers
