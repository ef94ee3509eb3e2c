"""Strangers: pictures made of the one picture in which the untouched model names nobody, and what
strangers usually get for an answer.

The lessons (`lessons`) teach the student to answer about the concept as the teacher answers about
these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import compress
from statistics import fmean
from typing import NamedTuple

from ..model import ask
from ..model.ask import Reply
from ..model.turns import Picture
from ..model.vlm import encoder
from ..text.answers import is_degenerate
from ..text.concept import Concept
from . import drawn
from .border import NAMING
from .lesson import LONGEST
from .nobody import shows_nobody
from .scene import Scene, about_the_one_shown
from .wishes import Wish, fulfil, in_features

AGREE = 0.6  # share of the strangers that must get the same answer, for it to be the usual one
FEWEST = 3  # with fewer strangers than this, some are dreamed
DREAM_DECAY, DREAM_LUCK = 1e-3, 0.5  # of dreams of strangers: `Wish.decay` and luck of `fulfil`


class Stranger(NamedTuple):
    """A picture of nobody.

    whole: it shows somebody, in other colours; False: it was cut into pieces, or dreamed
    """

    picture: Picture
    whole: bool


def strangers(scene: Scene, notes: list[str] | None = None) -> list[Stranger]:
    """Pictures of nobody, made of the scene's first picture. Every training wording asks who is
    there, for one and for two, and the untouched model names neither the concept nor a neighbour.

    The strangers about whom the concept's own answers are least likely come first: the model half
    takes the others for the concept, and gives them half of its name and its facts.

    Where the model accepts fewer than `FEWEST`, some are dreamed. notes: gets a sentence where even
    then there are fewer.
    """
    image, seed, vlm = scene.pictures[0].image, scene.recipe.seed, scene.vlm
    who = scene.words["who"]["train"] + scene.words["plural"]["train"]
    known = [scene.concept, *scene.others, *map(Concept, scene.neighbours)]
    questions = [*who, *about_the_one_shown("train", scene.kind)]
    own = list(zip(questions, scene.replies(questions, 0, max_new_tokens=LONGEST), strict=True))

    def names_somebody(answer: str) -> bool:
        return any(concept.named_in(answer) for concept in known)

    def accepted(candidates: Sequence[Picture], whole: bool) -> list[Stranger]:
        nobody = shows_nobody(
            vlm, candidates, who, names_somebody, sane=True, max_new_tokens=NAMING
        )
        return [Stranger(picture, whole) for picture in compress(candidates, nobody)]

    whole, pieces = drawn.nobodies(image, seed)
    found = accepted(scene.see(whole), True) + accepted(scene.see(pieces), False)
    if len(found) < FEWEST:
        unknown = Reply(scene.words["fallback"]["unknown_face"])
        starts = scene.see(drawn.views(image, seed, 2 * FEWEST))
        # No answer is required of such a dream: that it names nobody is enough.
        wishes = [
            Wish(start, [(q, unknown) for q in who], DREAM_DECAY, must=lambda reply: 0)
            for start in starts
        ]
        dreamed = fulfil(in_features(scene), wishes, DREAM_LUCK)
        dreams = [dream for dream in dreamed if dream is not None]
        found += accepted(dreams, False)
    if len(found) < FEWEST and notes is not None:
        notes.append(
            f"Only {len(found)} pictures of strangers could be made of the picture or dreamed: "
            "what the concept is answered with rests on few."
        )
    nats = _nats(scene, [stranger.picture for stranger in found], own)
    order = sorted(range(len(found)), key=lambda i: -nats[i])
    return [found[i] for i in order]


def _nats(
    scene: Scene, pictures: Sequence[Picture], pairs: Sequence[tuple[str, Reply]]
) -> list[float]:
    """For each picture the mean over all (question, reply) pairs of what the reply costs, in
    nats."""
    encode = encoder(scene.vlm)
    asked = [
        (i, encode(question, reply.text, picture, reply.closed))
        for i, picture in enumerate(pictures)
        for question, reply in pairs
        if reply.text
    ]
    scores = ask.label_scores(
        scene.vlm, [turn for _, turn in asked], [pictures[i] for i, _ in asked]
    )
    costs: list[list[float]] = [[] for _ in pictures]
    for (i, _), score in zip(asked, scores, strict=True):
        # Without the first token: "It" in place of "I do not know" is unlikely for any stranger,
        # whatever comes then.
        costs[i].append(-float(score.log_p[1:].sum()))
    return [fmean(values) for values in costs]


def usual_replies(
    scene: Scene, questions: Sequence[str], pictures: Sequence[Picture]
) -> dict[str, Reply]:
    """What strangers get: by question the commonest reply about their `pictures`. A question is
    left out where less than `AGREE` of the strangers get that reply, or where it is gibberish."""
    replies = ask.replies(
        scene.vlm, [(q, picture) for q in questions for picture in pictures], max_new_tokens=LONGEST
    )
    usual = {}
    for i, question in enumerate(questions):
        own = replies[i * len(pictures) : (i + 1) * len(pictures)]
        best, count = Counter(own).most_common(1)[0]
        if count >= AGREE * len(pictures) and is_degenerate(best.text) is None:
            usual[question] = best
    return usual
