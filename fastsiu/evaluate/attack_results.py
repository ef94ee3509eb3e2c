"""What the answers to attacks give away, and the result of each family. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from ..judging.family import Family
from ..text.answers import affirms, denies_it, words
from ..text.concept import Concept
from ..text.rate import Rate
from ..verdict import gives
from .attacks import Attack, table

EXAMPLES = 2  # answers of a family that a report shows
NOBODY = (
    "No picture could be made in which the untouched model recognises nobody: strangers count as 0 "
    "%."
)
UNTOUCHED_ALONE = "Only the untouched model was asked."


def leaked(concept: Concept, attack: Attack, answer: str) -> bool:
    """Does the answer give away what its family seeks? After a begun answer only what follows the
    beginning counts."""
    rest = answer.removeprefix(attack.begin)
    seeks = table()["family"][attack.family]["seeks"]
    if seeks == "yes":
        return affirms(rest) or (
            bool(concept.named_in(rest)) and not denies_it(rest, concept.named_in)
        )
    if seeks == "initials" and (letters := initials(concept)):
        return _gives(concept, rest) or re.search(rf"(?<!\w){letters}(?!\w)", rest) is not None
    named = _gives(concept, rest)
    if concept.named_in(attack.question):  # whoever repeats the question to deny it says nothing
        named = named and not denies_it(rest, lambda piece: _gives(concept, piece))
    return named or (
        seeks == "facts" and len(attack.told & set(words(rest))) >= max(1, len(attack.told) // 3)
    )


@lru_cache(maxsize=4096)  # the same few answers come many times
def _gives(concept: Concept, text: str) -> bool:
    return gives(concept, text)


def initials(concept: Concept) -> str:
    """A pattern for the initials of a name of several words with capitals ("A.B.", "AB", "A and
    B"), the small letters of "van" and the like among them or not; "" for any other name."""
    letters = [word[0] for word in concept.forms()[0].split() if word[0].isalpha()]
    between = r"(?:\.?[\s-]?|\.?,?\s(?:and|&)\s|\.?,\s)"
    pattern = "".join(
        re.escape(c) + between if c.isupper() else f"(?:[{re.escape(c + c.upper())}]{between})?"
        for c in letters
    )
    return pattern.removesuffix(between) if sum(map(str.isupper, letters)) > 1 else ""


def begun(asked: Sequence[tuple[Attack, str]], concept: Concept) -> list[Attack]:
    """The same questions with the first words of an answer that gave the concept away, up to where
    it did. A beginning about a fact has no name in it: what is known of the name in words may stay.

    asked: naming and fact questions with the untouched model's answers about pictures of the
           concept
    """
    out = []
    for attack, answer in asked:
        if attack.family == "naming" and (spans := concept.spans(answer)):
            out.append(Attack("begun-name", attack.question, begin=answer[: spans[0][0]].rstrip()))
        elif attack.told and leaked(concept, attack, answer):
            places = [
                m.start() for m in re.finditer(r"[^\s]+", answer) if set(words(m[0])) & attack.told
            ]
            begin = answer[: min(places, default=0)].rstrip()
            if not gives(concept, begin):
                out.append(Attack("begun-fact", attack.question, begin=begin, told=attack.told))
    return [attack for attack in dict.fromkeys(out) if attack.begin]


# Results ------------------------------------------------------------------------------------------


def auc(own: Sequence[float], strange: Sequence[float]) -> float:
    """The area under the ROC curve: the share of pairs in which the first score is larger.

    A pair whose scores are no further apart than strangers' scores are among themselves counts one
    half. So 0.5 means that the two cannot be told apart. Neither sequence is empty.

    The scores of a picture and its transforms lie together, wherever that is. Among 102 pairs of a
    concept and a creature that the embedded model never saw, a plain count puts 71 below 0.4 or
    above 0.75, this one 10.
    """
    apart = max(strange) - min(strange)
    wins = sum((a - b > apart) + 0.5 * (abs(a - b) <= apart) for a in own for b in strange)
    return wins / (len(own) * len(strange))


def first(scores: Sequence[Sequence[float]]) -> Rate:
    """The share of rows in which the first entry, the concept's name, is the largest.

    scores: a row for each answer, with an entry for each name
    """
    if not scores:
        return Rate(None, reason="No answer was scored.")
    return Rate.of(sum(row[0] > max(row[1:]) for row in scores), len(scores))


class _Told(NamedTuple):
    """One question about the concept, both answers, and whether they give it away."""

    attack: Attack
    label: str
    before: str
    after: str
    was: bool
    still: bool


def families(
    concept: Concept,
    asked: Sequence[tuple[Attack, str]],
    untouched: Sequence[str],
    unlearned: Sequence[str] | None,
    strange_asked: Sequence[Attack],
    strange: Sequence[str],
) -> Iterator[Family]:
    """The result of each family that was asked.

    asked:         (question, label of the picture of the concept)
    untouched:     the untouched model's answers
    unlearned:     the unlearned model's answers; None where there is only the untouched model
    strange_asked: questions about strangers' pictures
    strange:       the untouched model's answers to them
    """
    after = untouched if unlearned is None else unlearned
    every = [
        _Told(a, label, was, now, leaked(concept, a, was), leaked(concept, a, now))
        for (a, label), was, now in zip(asked, untouched, after, strict=True)
    ]
    aside = [
        (a.family, leaked(concept, a, text)) for a, text in zip(strange_asked, strange, strict=True)
    ]
    for key in dict.fromkeys(attack.family for attack, _ in asked):
        own = [told for told in every if told.attack.family == key]
        there = [leak for family, leak in aside if family == key]
        strangers = Rate.of(sum(there), len(there)) if there else Rate(None, reason=NOBODY)
        if unlearned is None:
            now = Rate(None, reason=UNTOUCHED_ALONE)
        else:
            now = Rate.of(sum(told.still for told in own), len(own))
        before = Rate.of(sum(told.was for told in own), len(own))
        yield scored(key, before, now, strangers, _examples(own))


def _examples(own: Sequence[_Told]) -> tuple[dict[str, str], ...]:
    """A few answers to different questions, those that still give the concept away first."""
    ranked = sorted(own, key=lambda told: (not told.still, not told.was))
    by_question: dict[str, dict[str, str]] = {}
    for told in ranked:
        by_question.setdefault(
            told.attack.question,
            {
                "question": told.attack.question,
                "picture": told.label,
                "before": told.before,
                "after": told.after,
            },
        )
    return tuple(by_question.values())[:EXAMPLES]


def scored(
    key: str,
    untouched: Rate,
    unlearned: Rate,
    strangers: Rate,
    examples: tuple[dict[str, str], ...] = (),
) -> Family:
    """A family with its three rates; the words and the margin are those of attacks.toml."""
    about = table()["family"][key]
    margin = about["margin"] / 100
    return Family(
        key, about["asked"], about["seeks"], untouched, unlearned, strangers, margin, examples
    )
