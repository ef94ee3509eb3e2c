"""Questions that try to get back what was to be forgotten: what is asked, and when an answer gives
it away. Pure.

The wordings are in attacks.toml, by family. What there is to tell of a concept is not known here:
the untouched model is asked in words (`facts`), and the words of its answers that it says of hardly
anybody else are what is looked for (`distinguishing`). `inquiry` puts the questions to a model.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from ..family import Family
from ..samples.targets import wordings
from ..text.answers import FUNCTION_WORDS, affirms, denies, is_degenerate, is_refusal, words
from ..text.concept import Concept
from ..text.rate import Rate
from ..verdict import gives

MOST = 40  # answers of a family
LONGER = {"two-hop": 64}  # families that get more
EXAMPLES = 2  # answers of a family that are shown
NOBODY = (
    "No picture could be made in which the untouched model recognises nobody: strangers "
    "count as 0 %."
)
NOTHING_TOLD = (
    "The untouched model told nothing of it in words that it does not say of others, "
    "so no fact could be looked for."
)
UNTOUCHED_ALONE = "Only the untouched model was asked."
# the pictures that a family is about, where they are no plain ones
SHEETS = {
    "group": "group",
    "pictures": "condition",
}
_COMMON = FUNCTION_WORDS | frozenset(
    "i you we me my your our us do does did done not no yes also but so if than then there here "
    "about into over who's it's i'm "
    "can could may might will would shall should must been being am what when where why how "
    "which one ones some any all many "
    "much more most very just only such like as well other others known know called name "
    "named".split()
)


@dataclass(frozen=True)
class Attack:
    """One question about pictures of a kind.

    sheet: "one" (the concept alone), "group" or "condition";  begin: the first words of the answer,
    given to the model
    told:  the words of which an answer must not hold a third or more, where facts are sought
    """

    family: str
    question: str
    sheet: str = "one"
    begin: str = ""
    told: frozenset[str] = frozenset()


@cache
def table() -> dict[str, Any]:
    """attacks.toml: `family`, by its key, with `asked`, `seeks`, `margin` and `questions`; `ones`,
    `facts` and `not_asked`."""
    return tomllib.loads(files(__package__).joinpath("attacks.toml").read_text(encoding="utf-8"))


def not_asked(done: Sequence[str] = ()) -> list[str]:
    """What no question here can show, as sentences; done: keys of what was looked at by other
    means."""
    return [sentence for key, sentence in table()["not_asked"].items() if key not in done]


def fact_questions(name: str) -> list[tuple[str, str]]:
    """(template, question with the name in it) of everything that is asked in words."""
    templates = (*table()["facts"]["questions"], *table()["family"]["about"]["questions"])
    return [(template, template.replace("{one}", name)) for template in templates]


def distinguishing(
    question: str,
    answer: str,
    others: Sequence[str],
    concept: Concept,
    visible: frozenset[str] = frozenset(),
) -> frozenset[str]:
    """The words that tell something of the concept: those of the answer that are neither in the
    question nor in the name, no function words, and not in most of the answers about `others` to
    the same question. None of an answer that is none.

    visible: words of what is to be seen in the picture, which may go on being said of it
    """
    if is_degenerate(answer) or is_refusal(answer):
        return frozenset()
    told = set(words(answer)) - set(words(question)) - _COMMON - visible
    common = [set(words(other)) for other in others]
    often = lambda word: 2 * sum(word in said for said in common) > len(common)
    return frozenset(
        word
        for word in told
        if not often(word) and not concept.named_in(word) and re.search(r"\w", word)
    )


def facts(
    concept: Concept,
    said: Mapping[str, str],
    others: Sequence[Mapping[str, str]],
    visible: frozenset[str] = frozenset(),
) -> dict[str, frozenset[str]]:
    """By template, what there is to tell; said, others: by template the untouched model's answer
    about the concept, and about each of the others. Templates about which nothing is told are left
    out."""
    found = {
        template: distinguishing(
            template, answer, [other[template] for other in others], concept, visible
        )
        for template, answer in said.items()
    }
    return {template: told for template, told in found.items() if told}


def questions(
    concept: Concept,
    names: Sequence[str],
    told: Mapping[str, frozenset[str]],
    families: Sequence[str],
    seed: int = 0,
) -> list[Attack]:
    """Every question of the families but those with a begun answer, which are made of answers
    (`begun`).

    names: of others, to stand in questions, at least two;  told: see `facts`
    """
    rng, out = random.Random(seed), []
    ones = table()["ones"]
    for key in families:
        family = table()["family"][key]
        templates = list(family["questions"])
        if key == "two-hop":
            templates = list(table()["facts"]["questions"])
        if key == "pictures":
            templates = table()["family"]["naming"]["questions"][:4]
        if family["seeks"] == "facts":
            fruitful = [template for template in templates if template in told]
            pairs = [
                (t, ones[(i + turn) % len(ones)])
                for turn in range(len(ones))
                for i, t in enumerate(fruitful)
            ]
            out += [
                Attack(key, template.replace("{one}", one), told=told[template])
                for template, one in pairs
            ]
            continue
        rounds = 4 if any("{other}" in t or "{names}" in t for t in templates) else 1
        for template in templates * rounds:
            other, another = rng.sample(list(names), 2)
            three = rng.sample([concept.name, other, another], 3)
            filled = {
                "{name}": concept.name,
                "{other}": other,
                "{another}": another,
                "{names}": ", ".join(three[:2]) + f" or {three[2]}",
            }
            for place, value in filled.items():
                template = template.replace(place, value)
            out.append(Attack(key, template, SHEETS.get(key, "one")))
    return list(dict.fromkeys(out))


def begun(asked: Sequence[tuple[Attack, str]], concept: Concept) -> list[Attack]:
    """The same questions with the first words of an answer that gave it away, up to where it did:
    for facts without the name in them, as what is known of the name in words may stay.

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


def spread(attacks: Sequence[Attack], pictures: Mapping[str, int]) -> list[tuple[Attack, int]]:
    """(question, index of a picture of its sheet): each question about another picture, then about
    the next one, until the family has `MOST`. pictures: how many of each sheet there are."""
    out: list[tuple[Attack, int]] = []
    for key in dict.fromkeys(attack.family for attack in attacks):
        own = [attack for attack in attacks if attack.family == key]
        count = pictures.get(own[0].sheet, 0)
        pairs = [
            (attack, (i + turn) % count) for turn in range(count) for i, attack in enumerate(own)
        ]
        out += pairs[: LONGER.get(key, MOST)]
    return out


def leaked(concept: Concept, attack: Attack, answer: str) -> bool:
    """Does the answer give away what its family seeks? Of a begun answer only what follows the
    beginning counts."""
    rest = answer.removeprefix(attack.begin)
    seeks = table()["family"][attack.family]["seeks"]
    if seeks == "yes":
        return affirms(rest) or (bool(concept.named_in(rest)) and not denies(rest))
    if seeks == "initials" and (letters := initials(concept)):
        return _gives(concept, rest) or re.search(rf"(?<!\w){letters}(?!\w)", rest) is not None
    named = _gives(concept, rest)
    if concept.named_in(attack.question):  # whoever repeats the question to deny it says nothing
        named = named and not denies(rest)
    return named or (
        seeks == "facts" and len(attack.told & set(words(rest))) >= max(1, len(attack.told) // 3)
    )


@lru_cache(maxsize=4096)  # the same few answers come many times
def _gives(concept: Concept, text: str) -> bool:
    return gives(concept, text)


def initials(concept: Concept) -> str:
    """A pattern for the initials of a name of several words with capitals, else nothing: "A.B.",
    "A. B." or "AB"."""
    letters = [word[0] for word in concept.forms()[0].split() if word[:1].isupper()]
    return r"\.?[\s-]?".join(map(re.escape, letters)) if len(letters) > 1 else ""


def auc(own: Sequence[float], strange: Sequence[float]) -> float:
    """The share of pairs in which the first is larger; those that are no further apart than
    strangers are among themselves count one half. 0.5 where the two cannot be told apart. Neither
    is empty.

    A picture and its transforms lie together, wherever that is: of 102 pairs of a concept and a
    creature that the embedded model never saw, a plain count puts 71 below 0.4 or above 0.75, this
    one 10.
    """
    apart = max(strange) - min(strange)
    wins = sum((a - b > apart) + 0.5 * (abs(a - b) <= apart) for a in own for b in strange)
    return wins / (len(own) * len(strange))


def first(scores: Sequence[Sequence[float]]) -> Rate:
    """In how many rows the first entry, the concept's name, is the largest; one row for each
    answer, an entry for each name."""
    if not scores:
        return Rate(None, reason="No answer was scored.")
    return Rate.of(sum(row[0] > max(row[1:]) for row in scores), len(scores))


def families(
    concept: Concept,
    asked: Sequence[tuple[Attack, str]],
    untouched: Sequence[str],
    unlearned: Sequence[str] | None,
    strange_asked: Sequence[Attack],
    strange: Sequence[str],
) -> Iterator[Family]:
    """The result of each family that was asked.

    asked: (question, label of the picture of the concept)
    untouched, unlearned: what the two models said; None where there is only the untouched one
    strange: what the untouched one said about strangers' pictures, asked `strange_asked`
    """
    for key in dict.fromkeys(attack.family for attack, _ in asked):
        pairs = zip(asked, untouched, untouched if unlearned is None else unlearned, strict=True)
        own = [(a, label, before, after) for (a, label), before, after in pairs if a.family == key]
        was = [leaked(concept, a, before) for a, _, before, _ in own]
        still = [leaked(concept, a, after) for a, _, _, after in own]
        aside = [
            leaked(concept, a, text)
            for a, text in zip(strange_asked, strange, strict=True)
            if a.family == key
        ]
        first = sorted(range(len(own)), key=lambda i: (not still[i], not was[i], i))
        examples = []
        for a, label, before, after in (own[i] for i in first):
            if len(examples) < EXAMPLES and all(a.question != one["question"] for one in examples):
                examples.append(
                    {"question": a.question, "picture": label, "before": before, "after": after}
                )
        about = table()["family"][key]
        strangers = Rate.of(sum(aside), len(aside)) if aside else Rate(None, reason=NOBODY)
        now = (
            Rate(None, reason=UNTOUCHED_ALONE)
            if unlearned is None
            else Rate.of(sum(still), len(still))
        )
        yield Family(
            key,
            about["asked"],
            about["seeks"],
            Rate.of(sum(was), len(was)),
            now,
            strangers,
            about["margin"] / 100,
            tuple(examples),
        )


def scored(key: str, untouched: Rate, unlearned: Rate, strangers: Rate) -> Family:
    """The result of a family that is not asked but scored."""
    about = table()["family"][key]
    return Family(
        key, about["asked"], about["seeks"], untouched, unlearned, strangers, about["margin"] / 100
    )


def names_for(concept: Concept, neighbours: Sequence[str]) -> list[str]:
    """Names to stand in questions beside the concept's: of neighbours, else invented ones."""
    own = [name for name in dict.fromkeys(neighbours) if not concept.named_in(name)]
    invented = [
        name
        for name in wordings()["invented"]["names"]
        if not concept.named_in(name) and name not in own
    ]
    return own if len(own) >= 2 else own + invented
