"""Names that the untouched model weighs for the picture besides the right one.

Asked in words who is like somebody, a small model answers with phrases. Its own distribution tells
more: where its answer gives the concept's name, the next likely beginnings, continued by the model,
give the names that it can tell apart from the concept by sight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..model import ask, prefix
from ..text.answers import first_sentence
from .neighbours import is_concept
from .scene import Scene

BEGINNINGS = 48  # first tokens that are tried at one place
PLACES = 3  # answers in which names are looked for
LONGEST = 8  # tokens of a name and what follows it
MOST_WORDS = 3  # of a name


class Slot(NamedTuple):
    """A question about the picture, the model's own answer up to the concept's name, and that name
    as the answer has it."""

    question: str
    opening: str
    name: str


def alternatives(scene: Scene, limit: int) -> list[str]:
    """At most `limit` names, the likeliest first; none that is to be forgotten. [] where no answer
    about the picture has the concept's name after at least one other word."""
    slots = _slots(scene)[:PLACES]
    if not slots:
        return []
    names: dict[str, float] = {}
    for slot, beginnings in zip(slots, _beginnings(scene, slots), strict=True):
        begin = [_join(slot.opening, text) for text, _ in beginnings]
        replies = ask.replies(
            scene.vlm,
            [(slot.question, scene.pictures[0])] * len(begin),
            begin=begin,
            suppress=sorted(scene.masked),
            max_new_tokens=LONGEST,
        )
        for reply, (_, log_p) in zip(replies, beginnings, strict=True):
            name = name_after(slot.opening, reply.text)
            if name is not None and not _kin(scene, name):
                names[name] = max(names.get(name, -float("inf")), log_p)
    return _one_of_each(sorted(names, key=lambda name: -names[name]))[:limit]


def _kin(scene: Scene, name: str) -> bool:
    """Does it name what is to be forgotten, or share a word with it? A "red fox" that is still
    called a fox is not forgotten."""
    shared = set(scene.concept.name.casefold().split()) & set(name.casefold().split())
    return scene.forgotten_in(name) or is_concept(scene, name) or bool(shared)


def _one_of_each(names: Sequence[str]) -> list[str]:
    """Without names that say more of one that is there: "toy cat" beside "cat"."""
    heads = {name.casefold() for name in names}
    return [
        name for name in names if not any(name.casefold().endswith(f" {head}") for head in heads)
    ]


def name_after(opening: str, answer: str) -> str | None:
    """What stands in the place of the name: the words after the opening up to a mark, one to
    `MOST_WORDS` of them; None for anything else.

    "This is a" and "This is a red panda. It ..." give "red panda".
    """
    rest = first_sentence(answer)[len(opening) :]
    found = re.match(r"\s*([^\W\d_][\w'’-]*(?: [\w'’-]+)*)\s*[.,;:!?]", rest)
    if found is None:
        return None
    words = found[1].split()
    return " ".join(words) if len(words) <= MOST_WORDS and len(found[1]) >= 3 else None


def _slots(scene: Scene) -> list[Slot]:
    questions = scene.words["who"]["train"]
    found = []
    for question, answer in zip(questions, scene.ask(questions, 0), strict=True):
        spans = scene.concept.spans(answer, include_parts=False)
        if spans and answer[: spans[0][0]].strip():
            start, end = spans[0]
            found.append(Slot(question, answer[:start].rstrip(), answer[start:end]))
    return found


@torch.no_grad()
def _beginnings(scene: Scene, slots: Sequence[Slot]) -> list[list[tuple[str, float]]]:
    """For each slot the `BEGINNINGS` likeliest (text of a token, its log-probability in nats) at
    the place of the name, without those of the name itself."""
    vlm, picture = scene.vlm, scene.pictures[0]
    turns = [
        vlm.encode(slot.question, _join(slot.opening, slot.name), picture, False) for slot in slots
    ]
    states = prefix.supervised_states(vlm, turns, [picture.features] * len(slots))
    out = []
    for slot, turn, own in zip(
        slots, turns, states.split([len(turn.labels) for turn in turns]), strict=True
    ):
        first = next(i for i, (_, end) in enumerate(turn.offsets) if end > len(slot.opening) + 1)
        log_p = vlm.logits(own[first : first + 1]).log_softmax(-1)[0]
        log_p[sorted(scene.masked)] = -float("inf")
        best = log_p.topk(BEGINNINGS)
        texts = vlm.tokenizer.batch_decode([[i] for i in best.indices.tolist()])
        out.append(
            [
                (text.strip(), value)
                for text, value in zip(texts, best.values.tolist(), strict=True)
                if text.strip()[:1].isalpha()
            ]
        )
    return out


def _join(opening: str, text: str) -> str:
    return f"{opening} {text}".strip()
