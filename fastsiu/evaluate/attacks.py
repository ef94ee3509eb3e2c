"""Questions that try to get back what was to be forgotten. Pure.

The wordings are in attacks.toml, by family. The program does not know what can be told of a
concept: the untouched model is asked in words, and those words of its answers that it says of
hardly anybody else are the facts that an attack looks for (`distinguishing`). `inquiry` puts the
questions to a model, `attack_results` judges the answers.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ..samples.kinds import DEFAULT, PERSON, Kind
from ..text.answers import FUNCTION_WORDS, is_degenerate, is_refusal, words
from ..text.concept import Concept

MOST, LEAST = 40, 20  # answers of a family; and where the training was short
LONGER = {"two-hop": 64}  # families that get more answers
ROUNDS = 4  # times that a wording with other names in it is filled in
# The pictures that a family asks about, where they do not show the concept alone.
SHEETS = {"group": "group", "pictures": "condition"}
_COMMON = FUNCTION_WORDS | frozenset(
    "i you we me my your our us do does did done not no yes also but so if than then there here "
    "about into over who's it's i'm can could may might will would shall should must been being am "
    "what when where why how which one ones some any all many much more most very just only such "
    "like as well other others known know called name "
    "named".split()
)


@dataclass(frozen=True)
class Attack:
    """One question about pictures of a kind.

    family: key of attacks.toml
    sheet:  the pictures that it asks about: "one" (the concept alone), "group" or "condition"
    begin:  the first words of the answer, which the model is given
    told:   where facts are sought, the words that tell one; an answer that holds a third of them
            gives the fact away
    """

    family: str
    question: str
    sheet: str = "one"
    begin: str = ""
    told: frozenset[str] = frozenset()


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath("attacks.toml").read_text(encoding="utf-8"))


@cache
def table(kind: str = DEFAULT) -> dict[str, Any]:
    """attacks.toml for one kind of concept: `family`, by its key, with `asked`, `seeks`, `margin`
    and `questions`; `ones`, `facts` and `not_asked`. Only wordings differ between kinds."""
    common = {key: part for key, part in _file().items() if key != "kind"}
    own = _file()["kind"].get(kind, {})
    families = {
        key: about | own.get("family", {}).get(key, {}) for key, about in common["family"].items()
    }
    return common | own | {"family": families}


def not_asked(done: Sequence[str] = ()) -> list[str]:
    """Sentences about what no question here can show. done: keys of what was tried by other means,
    which are left out."""
    return [sentence for key, sentence in table()["not_asked"].items() if key not in done]


# Facts --------------------------------------------------------------------------------------------


def fact_questions(name: str, kind: Kind = PERSON) -> list[tuple[str, str]]:
    """(template, question with the name in it) of everything that is asked in words."""
    words = table(kind.name)
    templates = (*words["facts"]["questions"], *words["family"]["about"]["questions"])
    return [(template, kind.fill(template, one=name)) for template in templates]


def distinguishing(
    question: str,
    answer: str,
    others: Sequence[str],
    concept: Concept,
    visible: frozenset[str] = frozenset(),
) -> frozenset[str]:
    """The words of an answer that tell something of the concept.

    Left out are words of the question and of the name, function words, and words that are in more
    than half of the answers about `others` to the same question. A refusal and a degenerate answer
    tell nothing.

    visible: words for what the picture shows, which the model may go on saying
    """
    if is_degenerate(answer) or is_refusal(answer):
        return frozenset()
    told = set(words(answer)) - set(words(question)) - _COMMON - visible
    common = [set(words(other)) for other in others]
    often = {word for word in told if 2 * sum(word in said for said in common) > len(common)}
    return frozenset(
        word for word in told - often if not concept.named_in(word) and re.search(r"\w", word)
    )


def facts(
    concept: Concept,
    said: Mapping[str, str],
    others: Sequence[Mapping[str, str]],
    visible: frozenset[str] = frozenset(),
) -> dict[str, frozenset[str]]:
    """By template, the words that tell a fact of the concept (`distinguishing`); templates without
    any are left out.

    said:   by template, the untouched model's answer about the concept
    others: the same about each of the others
    """
    told = {
        template: distinguishing(
            template, answer, [other[template] for other in others], concept, visible
        )
        for template, answer in said.items()
    }
    return {template: facts_of for template, facts_of in told.items() if facts_of}


# Questions ----------------------------------------------------------------------------------------


def questions(
    concept: Concept,
    names: Sequence[str],
    told: Mapping[str, frozenset[str]],
    families: Sequence[str],
    seed: int = 0,
    kind: Kind = PERSON,
) -> list[Attack]:
    """Every question of the families, each once. Questions with a begun answer are not among them:
    they are made of answers (`attack_results.begun`).

    names: of others, to stand in questions, at least two
    told:  what `facts` gives
    """
    rng, out = random.Random(seed), []
    for key in families:
        if table()["family"][key]["seeks"] == "facts":
            out += _about_facts(key, told, kind)
        else:
            out += _with_names(key, concept, names, rng, kind)
    return list(dict.fromkeys(out))


def _templates(key: str, kind: Kind) -> list[str]:
    words = table(kind.name)
    if key == "two-hop":
        return list(words["facts"]["questions"])
    if key == "pictures":
        return list(words["family"]["naming"]["questions"][:4])
    return list(words["family"][key]["questions"])


def _about_facts(key: str, told: Mapping[str, frozenset[str]], kind: Kind) -> list[Attack]:
    """Each question to which there is a fact, with each wording for the one in the picture."""
    ones = table(kind.name)["ones"]
    fruitful = [template for template in _templates(key, kind) if template in told]
    return [
        Attack(key, template.replace("{one}", ones[(i + turn) % len(ones)]), told=told[template])
        for turn in range(len(ones))
        for i, template in enumerate(fruitful)
    ]


def _with_names(
    key: str, concept: Concept, names: Sequence[str], rng: random.Random, kind: Kind
) -> list[Attack]:
    """Each wording with the concept's name and drawn names of others in their places."""
    templates = _templates(key, kind)
    rounds = ROUNDS if any("{other}" in t or "{names}" in t for t in templates) else 1
    out = []
    for template in templates * rounds:
        other, another = rng.sample(list(names), 2)
        three = rng.sample([concept.name, other, another], 3)
        filled = kind.fill(template, name=concept.name, other=other, another=another)
        filled = filled.replace("{names}", kind.choice(three))
        out.append(Attack(key, filled, SHEETS.get(key, "one")))
    return out


def spread(
    attacks: Sequence[Attack], pictures: Mapping[str, int], share: float = 1.0
) -> list[tuple[Attack, int]]:
    """(question, index of a picture of its sheet): the questions of a family go over the pictures
    in turn, then over the next ones, until the family has the share of `MOST`.

    pictures: how many pictures each sheet has
    """
    out: list[tuple[Attack, int]] = []
    for key in dict.fromkeys(attack.family for attack in attacks):
        own = [attack for attack in attacks if attack.family == key]
        count = pictures.get(own[0].sheet, 0)
        pairs = [
            (attack, (i + turn) % count) for turn in range(count) for i, attack in enumerate(own)
        ]
        out += pairs[: round(share * LONGER.get(key, MOST))]
    return out


def names_for(concept: Concept, neighbours: Sequence[str], kind: Kind = PERSON) -> list[str]:
    """Names to stand in questions beside the concept's: those of neighbours and, where these are
    fewer than two, invented ones as well."""
    own = [name for name in dict.fromkeys(neighbours) if not concept.named_in(name)]
    invented = [
        name
        for name in kind.words["invented"]["names"]
        if not concept.named_in(name) and name not in own
    ]
    return own if len(own) >= 2 else own + invented
