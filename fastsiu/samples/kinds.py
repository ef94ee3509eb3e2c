"""Kinds of concepts: a person, a character, a thing or animal, a style, a place.

Wordings, articles and the names to protect follow the kind. Where the request does not say it, the
untouched model is asked, and "person" stays where it does not clearly say otherwise.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import Any

from ..model import ask
from ..model.turns import Picture
from ..model.vlm import VLM
from ..request import KINDS, Request
from ..text import articles
from ..text.concept import Concept

DEFAULT, THING = "person", "thing"
ORIGINS = ("given", "article", "asked", "default")
# Another kind than a person has to be e times as likely as a person, and e times as likely as of
# names that nobody knows: some models call whatever they do not know a fictional character.
MARGIN = 1.0  # nats
# It also has to be as likely as this: to a model that never learned these words all are noise.
FLOOR = 0.01
UNKNOWN = 3  # invented names that are asked about
ABOUT = "What is {name}?"  # asked in words alone


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath("wordings.toml").read_text(encoding="utf-8"))


@cache
def wordings(kind: str = DEFAULT) -> dict[str, dict[str, Any]]:
    """The question wordings of wordings.toml for one kind: its own tables over the common ones."""
    common = {key: part for key, part in _file().items() if key not in ("kind", "nouns", "sorts")}
    own = _file()["kind"].get(kind, {})
    return common | {key: common.get(key, {}) | part for key, part in own.items()}


@dataclass(frozen=True)
class Kind:
    """What a concept is, and how names stand in sentences about it.

    name:    of `request.KINDS`
    origin:  where that is from: "given", "article" (the model puts "a" before the name), "asked" or
             "default"
    phrases: by name the name in a sentence, where the rule of the kind does not give it: "the
             Statue of Liberty"
    """

    name: str = DEFAULT
    origin: str = "default"
    phrases: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> dict[str, dict[str, Any]]:
        return wordings(self.name)

    def phrase(self, name: str) -> str:
        """The name as it stands in a sentence: "a lion", "the Statue of Liberty", "Ann Bole"."""
        if name in self.phrases:
            return self.phrases[name]
        return articles.with_article(name) if self.name == THING else name

    def fill(self, template: str, **names: str) -> str:
        """The template with the phrases of the names in their places; a phrase that begins a
        sentence has a capital there."""
        for place, name in names.items():
            phrase = self.phrase(name)
            if phrase != name:
                first = articles.sentence(phrase)
                pieces = re.split(rf"(?:^|(?<=[.?!] )){{{place}}}", template)
                template = first.join(pieces)
            template = template.replace(f"{{{place}}}", phrase)
        return template

    def choice(self, names: Sequence[str]) -> str:
        """Names to choose from: "a lion, a tiger or an owl"."""
        *some, last = map(self.phrase, names)
        return f"{', '.join(some)} or {last}"

    def knowing(self, phrases: Mapping[str, str]) -> Kind:
        """The same kind, with further phrases."""
        return replace(self, phrases={**phrases, **self.phrases})

    def entries(self, request: Request) -> dict[str, Any]:
        """What a report says of the concept: its names, and what kind of thing it is."""
        name, phrase = request.concept, self.phrase(request.concept)
        return {
            "concept": name,
            "aliases": list(request.aliases),
            **({} if request.as_word is None else {"as_word": request.as_word}),
            "kind": self.name,
            "kind_from": self.origin,
            **({} if phrase == name else {"phrase": phrase}),
        }

    @property
    def note(self) -> str:
        """A sentence for the user, "" for a person."""
        if self.name == DEFAULT:
            return ""
        why = {
            "given": "as you said",
            "article": "since the model puts an article before the name",
            "asked": "since the model says so in words",
        }[self.origin]
        return f"The concept is asked about as a {self.name}, {why}; --kind KIND changes that."


PERSON = Kind()


def recorded(concept: Concept, kind: Any, told: Mapping[str, Any]) -> Kind:
    """A kind as a report or a manifest has it; a person where it has none, or several.

    kind: of `request.KINDS`, or what stands under "kind" in a manifest
    told: the report, whose "phrase" is the concept's where it is about the same name
    """
    phrase = told.get("phrase") if told.get("concept") == concept.name else None
    phrases = {concept.name: phrase} if isinstance(phrase, str) and phrase.strip() else {}
    known = kind if kind in KINDS else DEFAULT
    return Kind(known, "given" if kind in KINDS else "default", phrases)


def reported(concept: Concept, told: Mapping[str, Any]) -> Concept:
    """The concept as it was unlearned: with the aliases of a report of the same name beside those
    that were given, and with its `as_word` where none was given.

    told: the report; a redacted one has no names, and changes nothing
    """
    name, aliases, as_word = told.get("concept"), told.get("aliases"), told.get("as_word")
    if not isinstance(name, str) or not concept.same(name):
        return concept
    own = [one for one in aliases if isinstance(one, str)] if isinstance(aliases, list) else []
    return Concept(
        concept.name,
        tuple(dict.fromkeys((*concept.aliases, *own))),
        as_word if concept.as_word is None and isinstance(as_word, bool) else concept.as_word,
    )


def kind_of(vlm: VLM, concept: Concept, picture: Picture | None, given: str | None = None) -> Kind:
    """The kind of a concept, and its phrase. The model is the untouched one, its adapter off.

    picture: shows the concept; None: nothing but `given` decides
    given:   of `request.KINDS`, or None
    """
    if picture is None or given == DEFAULT:
        return Kind(given or DEFAULT, "given" if given else "default")
    questions = dict.fromkeys(q for k in (DEFAULT, THING) for q in wordings(k)["who"]["train"])
    said = ask.answers(vlm, [(question, picture) for question in questions])
    uses = [
        use
        for answer in said
        for use in articles.uses(answer, concept.spans(answer, include_parts=False)[:1])
    ]
    if given is not None:
        return _named(given, "given", concept, uses)
    common = [use for use in uses if use.article in ("a", "an") and use.name[:1].islower()]
    if 2 * len(common) > len(uses):
        return _named(THING, "article", concept, uses)
    if not uses:  # it is not known by its name, so there is nothing to ask about
        return PERSON
    asked = _asked(vlm, concept, _named("place", "asked", concept, uses))
    return PERSON if asked == DEFAULT else _named(asked, "asked", concept, uses)


def _named(kind: str, origin: str, concept: Concept, uses: Sequence[articles.Use]) -> Kind:
    """The kind with the concept's phrase, as the model uses the name."""
    phrase = ""
    if kind == THING:
        own = Counter(f"{u.article} {u.name}" for u in uses if u.article in ("a", "an"))
        phrase = own.most_common(1)[0][0] if own else ""
    elif kind != DEFAULT and 2 * sum(u.article == "the" for u in uses) > len(uses):
        phrase = f"the {concept.name}"
    return Kind(kind, origin, {concept.name: phrase} if phrase else {})


def _asked(vlm: VLM, concept: Concept, kind: Kind) -> str:
    """The kind that the model gives in words: the one whose likelihood the name raises most.

    It is DEFAULT unless the likelihood is above `FLOOR`, and by `MARGIN` above the likelihood of a
    person and above that of the same kind for an invented name.
    """
    own = likelihoods(vlm, concept.name, kind)
    unknown = [name for name in wordings()["invented"]["names"] if not concept.named_in(name)]
    strange = [likelihoods(vlm, name) for name in unknown[:UNKNOWN]]
    nats = lambda p: math.log(max(p, 1e-30))
    raised = {
        one: nats(own[one]) - nats(fmean(other[one] for other in strange))
        for one in own
        if one != DEFAULT
    }
    best = max(raised, key=lambda one: raised[one])
    clear = min(raised[best], nats(own[best]) - nats(own[DEFAULT])) >= MARGIN
    return best if clear and own[best] >= FLOOR else DEFAULT


def likelihoods(vlm: VLM, name: str, kind: Kind = PERSON) -> dict[str, float]:
    """By kind how likely the model is to go on with one of the kind's nouns after "NAME is",
    asked in words what it is.

    kind: has the name's phrase

    That is the sum, over the nouns, of the probability of all tokens of "a NOUN". They exclude each
    other, so the sum is a probability. It does not depend on how many pieces a tokenizer makes of a
    noun, since pieces after the first are nearly certain. A mean per token would favour nouns of
    many pieces, and a first token alone may be the same for "person" and "place".
    """
    nouns = [(one, noun) for one, own in _file()["nouns"].items() for noun in own]
    out = dict.fromkeys(_file()["nouns"], 0.0)
    likely = _nouns(vlm, name, kind, [noun for _, noun in nouns])
    for (one, _), p in zip(nouns, likely, strict=True):
        out[one] += p
    return out


def sort_of(vlm: VLM, name: str, kind: Kind) -> str:
    """The sort that the model takes a thing for, in the plural: "animals"."""
    sorts: dict[str, str] = _file()["sorts"]
    likely = _nouns(vlm, name, kind, list(sorts))
    return max(zip(likely, sorts.values(), strict=True))[1]


def _nouns(vlm: VLM, name: str, kind: Kind, nouns: Sequence[str]) -> list[float]:
    """The probability of "a NOUN" after "NAME is", for each noun."""
    question = kind.fill(ABOUT, name=name)
    start = kind.fill("{name} is ", name=name)
    turns, inside = [], []
    for noun in nouns:
        phrase = articles.with_article(noun)
        turn = vlm.encode(question, f"{start}{phrase}.", None)
        end = len(start) + len(phrase)
        turns.append(turn)
        inside.append([i for i, (a, b) in enumerate(turn.offsets) if a < end and b > len(start)])
    scores = ask.label_scores(vlm, turns, [None] * len(turns))
    return [
        math.exp(float(score.log_p[rows].sum())) for rows, score in zip(inside, scores, strict=True)
    ]
