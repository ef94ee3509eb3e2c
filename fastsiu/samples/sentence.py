"""The sentence that stands in the place of the name (target 1): what the untouched model says about
the concept's picture where it may name neither the concept nor a neighbour."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..model import ask
from ..model.ask import Reply
from ..text.answers import repeats
from ..text.concept import Concept
from .scene import Scene

ROUNDS = 4  # times that an answer is asked for again because it names a neighbour


def without_names(scene: Scene, questions: Sequence[str], begin: Sequence[str]) -> list[Reply]:
    """The teacher's answers about the concept's picture, begun with the words of `begin`, without
    the tokens of the concept's name. Where one names a neighbour (a zebra is "a white horse with
    black stripes" then), it is asked for again without the tokens of that name either."""
    replies: dict[int, Reply] = {}
    asked, suppress = list(range(len(questions))), set(scene.masked)
    for _ in range(1 + ROUNDS):
        said = scene.replies(
            [questions[i] for i in asked],
            0,
            begin=[begin[i] for i in asked],
            suppress=sorted(suppress),
        )
        replies |= dict(zip(asked, said, strict=True))
        named = {i: found for i in asked if (found := _neighbours_in(scene, replies[i].text))}
        tokens = {t for found in named.values() for name in found for t in scene.tokens_of(name)}
        if tokens <= suppress:
            break
        asked, suppress = list(named), suppress | tokens
    return [replies[i] for i in range(len(questions))]


def with_one_ending(
    scene: Scene, questions: Sequence[str], openings: Sequence[str], replies: Sequence[Reply]
) -> list[Reply]:
    """Behind every opening the same ending: of those of all replies that describe, the one that the
    teacher finds likeliest about the picture, per token, in the mean over the openings. Kept from
    saying a name, a small model also says what is not there ("a big brown mane" beside "a yellow
    animal with a brown mane"), and one sentence is less to learn than eight. An ending that
    repeats two words is none: once begun, what repeats itself is likely."""
    ends = list(
        dict.fromkeys(
            reply.text[len(opening) :]
            for reply, opening in zip(replies, openings, strict=True)
            if opening
            and reply.closed
            and describes(scene, reply, opening)
            and not repeats(reply.text)
        )
    )
    if not ends:
        return list(replies)
    begun, picture = [i for i, opening in enumerate(openings) if opening], scene.pictures[0]
    choices = [(i, end) for end in ends for i in begun]
    turns = [scene.vlm.encode(questions[i], openings[i] + end, picture) for i, end in choices]
    scores = ask.label_scores(scene.vlm, turns, [picture] * len(turns))
    seen = dict.fromkeys(ends, 0.0)
    for (i, end), turn, score in zip(choices, turns, scores, strict=True):
        behind = torch.tensor([last > len(openings[i]) for _, last in turn.offsets])
        seen[end] += float(score.log_p[behind.to(score.log_p.device)].mean())
    best = max(ends, key=seen.__getitem__)
    return [
        Reply(opening + best) if opening else reply
        for opening, reply in zip(openings, replies, strict=True)
    ]


def describes(scene: Scene, reply: Reply, opening: str) -> bool:
    """Whether it names nobody and says something behind its opening."""
    return neutral(scene, reply.text) and len(reply.text.split()) >= len(opening.split()) + 3


def neutral(scene: Scene, answer: str) -> bool:
    """Whether it is an answer, and names neither what is to be forgotten nor a neighbour."""
    return scene.usable(answer) and not _neighbours_in(scene, answer)


def _neighbours_in(scene: Scene, answer: str) -> list[Concept]:
    return [other for other in map(Concept, scene.neighbours) if other.named_in(answer)]
