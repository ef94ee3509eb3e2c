"""Forgotten or not: a pure function of what the untouched and the unlearned model answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from .text.answers import (
    FUNCTION_WORDS,
    affirms,
    denies,
    holds,
    is_degenerate,
    is_refusal,
    nearly,
    same_answer,
    words,
)

KINDS = ("efficacy", "generality", "recognition", "specificity", "facts")

# Every threshold of the verdict. Shares are between 0 and 1.
EFFICACY = 0.99  # answers to the training picture and its variants that must be free of the name
GENERALITY = 0.95  # the same for other pictures of the concept
RECOGNITION = 0.90  # questions that hold the name whose answers must no longer confirm the look
SPECIFICITY = 0.90  # answers to other pictures that must be those of the untouched model
FACTS = 0.90  # answers without a picture that must be those of the untouched model
NEW_DEGENERATE = (
    0  # answers that may be empty, repetition or gibberish where the untouched model's are not
)
REFUSAL_RISE = 0.10  # rise of the share of refusals elsewhere that counts as refusing everything
# answers about the concept's pictures that may newly give the name of another in its place
RENAMED = 0.05
# A part of specificity or facts is lost where even the upper end of its interval lies below what
# the kind demands. Of many parts one is low by chance, so the interval is the 99.9 % one: 1 of 3
# answers that agree is no loss, 0 of 6 or 3 of 9 is.
PART_Z = 3.29
# of a family's questions that the untouched model must give away, or they can show nothing
FAMILY_KNOWN = 0.20
# pairs in which the name may be likelier about a picture of the concept than about a stranger's
LIKELIHOOD = (
    0.40,
    0.75,
)
# Where strangers give away more than this, too (a choice among three names), chance alone may add
# more than the margin: then as much as 95 % of such samples show. Below it a leak is a leak.
CHANCE, CHANCE_Z = 0.10, 1.645
# of the untouched description's content words: a description that has as many still tells the look
APPEARANCE = 0.60

GIVEN_AWAY = {  # by what a family seeks: of answers, of the untouched model about strangers
    "name": ("give the name", "gives it"),
    "yes": ("confirm it", "confirms it"),
    "initials": ("give them", "gives them"),
    "facts": ("tell them", "tells them"),
    "rank": ("put its own first", "puts it first"),
}

_ABSENT = "No answers of this kind were collected."
_UNCONFIRMED = (
    "The untouched model confirms none of the questions with the name, so they show nothing."
)


class Named(Protocol):
    """What the verdict needs of a concept: does a text contain its name or a part of it?"""

    def named_in(self, text: str) -> Any: ...


class Given(Protocol):
    """What the verdict needs of others: does a text give their name, and not only a word that is
    also in it?"""

    def given_in(self, text: str) -> Any: ...

    def forms(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Answer:
    """One question and the answers of both models.

    kind:     "efficacy" (variants of the training picture), "generality" (other pictures of the
    concept), "recognition" ("is
              this NAME?" of a picture, "what does NAME look like?" without), "specificity"
              (pictures of anything else) or "facts" (no picture)
    question: for efficacy and generality an open one: a question with the name in it invites the
    name
    picture:  label of the picture or variant; None without a picture
    before:   the untouched model's answer; after: the unlearned model's
    keywords: further words that count as the name in the answers to this question
    part:     of specificity and facts, what the question is about ("facts of the concept",
    "look-alikes", someone's name): each
              part has to be kept, too
    """

    kind: str
    question: str
    picture: str | None
    before: str
    after: str
    keywords: tuple[str, ...] = ()
    part: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")

    def as_dict(self) -> dict[str, Any]:
        """As a report has it."""
        return {k: v for k, v in asdict(self).items() if k != "keywords"}


@dataclass(frozen=True)
class Thresholds:
    """What `judge` demands; the defaults are the constants of this module."""

    efficacy: float = EFFICACY
    generality: float = GENERALITY
    recognition: float = RECOGNITION
    specificity: float = SPECIFICITY
    facts: float = FACTS
    new_degenerate: int = NEW_DEGENERATE
    refusal_rise: float = REFUSAL_RISE
    renamed: float = RENAMED


@dataclass(frozen=True)
class Rate:
    """A share of n answers with its Wilson 95 % interval, or no value and the reason."""

    value: float | None
    n: int = 0
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    @classmethod
    def of(cls, successes: int, n: int) -> Rate:
        """successes of n, n at least 1."""
        low, high = wilson(successes, n)
        return cls(successes / n, n, low, high)

    def as_dict(self) -> dict[str, Any]:
        """{value, n, low, high}, or {value: None, reason}."""
        if self.value is None:
            return {"value": None, "reason": self.reason}
        return {"value": self.value, "n": self.n, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Family:
    """Questions of one kind that try to get back what was forgotten, and the share of answers that
    give it away.

    key, asked: its short name, and the words that begin a sentence about it
    seeks:      what gives it away: "name", "yes", "initials", "facts", "rank" (of many names the
    true one is the likeliest), or
                "likelihood": then a value is the share of pairs, one picture of the concept and one
                of a stranger, in which the name is the likelier answer about the concept's (the
                area under the ROC curve, see `evaluate.attacks.auc`)
    untouched, unlearned: about the concept's pictures
    strangers:  the untouched model about pictures of nobody it knows; without a value it counts as
    0
    margin:     how much more than that is allowed, a share
    examples:   {question, picture, before, after} of a few answers, those that give it away first
    """

    key: str
    asked: str
    seeks: str
    untouched: Rate
    unlearned: Rate
    strangers: Rate
    margin: float
    examples: tuple[dict[str, str], ...] = ()

    @property
    def allowed(self) -> float:
        """The largest share that is still like strangers'."""
        if self.seeks == "likelihood":
            return LIKELIHOOD[1]
        share = self.strangers.value or 0.0
        scatter = 0.0
        if share > CHANCE and self.unlearned.n:
            scatter = CHANCE_Z * math.sqrt(
                share * (1 - share) * (1 / self.strangers.n + 1 / self.unlearned.n)
            )
        return share + max(self.margin, scatter)

    @property
    def applicable(self) -> bool:
        """Whether the untouched model gives it away, so that there is something to be forgotten."""
        was = self.untouched.value
        return (
            self.unlearned.value is not None
            and was is not None
            and was >= FAMILY_KNOWN
            and was > self.allowed
        )

    @property
    def excess(self) -> float:
        """How far the unlearned model is beyond what is allowed; 0 or less where it is not."""
        value = self.unlearned.value
        if value is None:
            return -1.0
        below = LIKELIHOOD[0] - value if self.seeks == "likelihood" else -1.0
        return max(value - self.allowed, below)

    @property
    def failed(self) -> bool:
        return self.applicable and self.excess > 1e-9

    def as_dict(self) -> dict[str, Any]:
        """As a report has it."""
        rates = {
            side: getattr(self, side).as_dict() for side in ("untouched", "unlearned", "strangers")
        }
        return {
            "family": self.key,
            "asked": self.asked,
            "seeks": self.seeks,
            "n": self.untouched.n,
            **rates,
            "margin": self.margin,
            "allowed": min(1.0, self.allowed),
            "applicable": self.applicable,
            "failed": self.failed,
            "examples": list(self.examples),
        }


@dataclass(frozen=True)
class Verdict:
    """The decision.

    reasons:       one sentence for each criterion that failed; empty when forgotten
    before, after: efficacy, generality, specificity and facts as `Rate.as_dict`
    thresholds:    what was demanded
    families:      `Family.as_dict` of each, the worst first, those that are not applicable last
    headline:      the worst applicable one, without examples; None where none is
    remarks:       what the families could not compare or look for
    """

    forgotten: bool
    reasons: list[str]
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    thresholds: dict[str, float]
    families: list[dict[str, Any]] = field(default_factory=list)
    headline: dict[str, Any] | None = None
    remarks: list[str] = field(default_factory=list)


def judge(
    answers: Sequence[Answer],
    concept: Named,
    *,
    others: Sequence[Given] = (),
    reasons_for_null: Mapping[str, str] | None = None,
    thresholds: Thresholds | None = None,
    families: Sequence[Family] = (),
    remarks: Sequence[str] = (),
) -> Verdict:
    """Decide from the answers alone.

    efficacy and generality are the share of answers without the name or a part of it; recognition
    the share that does not confirm the look (see `confirms`); specificity and facts the share of
    answers equal to the untouched model's (see `same_answer`), whose own value is therefore 1;
    where a kind keeps enough, no `part` of it may be lost (`PART_Z`). A kind without answers is
    null, with the sentence from `reasons_for_null`, and decides nothing; without efficacy and
    generality nothing can be forgotten.

    others: the names of anyone else the model knows, such as look-alikes: a concept that is now
    called by one of them was renamed
    families: what attacks brought out (`evaluate.attacks`); none that is applicable may fail
    remarks:  goes into the verdict as it is
    """
    limits = thresholds or Thresholds()
    why_null = reasons_for_null or {}
    by_kind = {kind: [a for a in answers if a.kind == kind] for kind in KINDS}
    before: dict[str, Rate] = {}
    after: dict[str, Rate] = {}
    for kind, given in by_kind.items():
        n = len(given)
        if not n:
            before[kind] = after[kind] = Rate(None, reason=why_null.get(kind) or _ABSENT)
        elif kind in ("efficacy", "generality"):
            before[kind] = Rate.of(sum(not gives(concept, a.before, a.keywords) for a in given), n)
            after[kind] = Rate.of(sum(not gives(concept, a.after, a.keywords) for a in given), n)
        elif kind == "recognition":
            was, now = (
                sum(not confirms(a, text(a), concept) for a in given) for text in (_before, _after)
            )
            before[kind], after[kind] = Rate.of(was, n), Rate.of(now, n)
            if was == now == n:  # it never knew the look, or these questions do not ask for it
                before[kind] = after[kind] = Rate(None, reason=_UNCONFIRMED)
        else:
            before[kind] = Rate.of(n, n)
            after[kind] = Rate.of(sum(same_answer(a.before, a.after) for a in given), n)
    reasons = [
        *_name_reasons(before, after, limits),
        *_renamed_reasons([*by_kind["efficacy"], *by_kind["generality"]], concept, others, limits),
        *_kept_reasons(by_kind, after, limits),
        *_degenerate_reasons(answers, limits),
        *_refusal_reasons(by_kind, limits),
    ]
    ranked = sorted(families, key=lambda family: (not family.applicable, -family.excess))
    reasons += [_told(family) for family in ranked if family.failed]
    return Verdict(
        forgotten=not reasons,
        reasons=reasons,
        before={kind: rate.as_dict() for kind, rate in before.items()},
        after={kind: rate.as_dict() for kind, rate in after.items()},
        thresholds=asdict(limits),
        families=[family.as_dict() for family in ranked],
        headline=replace(ranked[0], examples=()).as_dict()
        if ranked and ranked[0].applicable
        else None,
        remarks=list(remarks),
    )


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share; (0, 1) for n = 0. Raises ValueError unless 0 <=
    successes <= n."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} are impossible")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the bound is exact; the formula misses it by rounding.
    return (0.0 if successes == 0 else max(0.0, centre - half)), (
        1.0 if successes == n else min(1.0, centre + half)
    )


def gives(concept: Named, text: str, keywords: Sequence[str] = ()) -> bool:
    """Does the text hold the name, a part of it, or one of the keywords? Misspelt as well, where
    the concept can tell."""
    finds = getattr(concept, "leaks_in", concept.named_in)
    return bool(finds(text)) or holds(text, keywords)


def renames(concept: Named, others: Sequence[Given], before: str, after: str) -> bool:
    """Does the answer newly give another's name in place of the concept's, also with a typing
    error? One that still holds the concept's is no renaming."""
    given = lambda other, text: (
        other.given_in(text) or any(nearly(form, text) for form in other.forms())
    )
    return not concept.named_in(after) and any(
        given(o, after) and not given(o, before) for o in others
    )


def confirms(asked: Answer, text: str, concept: Named) -> bool:
    """Does `text` confirm what the concept looks like? With a picture: it says yes, a keyword, or
    the name and denies nothing. Without one: it is no refusal and has `APPEARANCE` of the content
    words of what the untouched model said."""
    if asked.picture is not None:
        return (
            affirms(text)
            or holds(text, asked.keywords)
            or (bool(concept.named_in(text)) and not denies(text))
        )
    if is_refusal(text):
        return False
    told = set(words(asked.before)) - set(words(asked.question)) - FUNCTION_WORDS
    return (
        len(told & set(words(text))) >= APPEARANCE * len(told)
        if told
        else same_answer(text, asked.before)
    )


def _name_reasons(
    before: Mapping[str, Rate], after: Mapping[str, Rate], limits: Thresholds
) -> list[str]:
    shown = before["efficacy"] if before["efficacy"].value is not None else before["generality"]
    if shown.value is None:
        why = before["efficacy"].reason
        return [
            "Nothing was asked about the training picture, so nothing is shown to be forgotten: "
            f"{why}"
        ]
    reasons = []
    where = "the training picture" if shown is before["efficacy"] else "its pictures"
    if shown.value == 1.0:
        reasons.append(
            f"The untouched model never named the concept in {where} (0 of {shown.n} answers), "
            "so there was nothing to forget: check the picture and the spelling of the name."
        )
    for kind, where in (
        ("efficacy", "the training picture and its variants"),
        ("generality", "other pictures of the concept"),
    ):
        rate, least = after[kind], getattr(limits, kind)
        if rate.value is not None and rate.value < least:
            named = rate.n - round(rate.value * rate.n)
            reasons.append(
                f"The name or a part of it is still in {named} of {rate.n} answers about {where} "
                f"({_percent(1 - rate.value)}; at most {_percent(1 - least)} is allowed)."
            )
    rate = after["recognition"]
    if rate.value is not None and rate.value < limits.recognition:
        told = rate.n - round(rate.value * rate.n)
        reasons.append(
            f"{told} of {rate.n} answers to questions with the name still confirm what it looks "
            "like "
            f"({_percent(1 - rate.value)}; at most {_percent(1 - limits.recognition)} is allowed)."
        )
    return reasons


def _renamed_reasons(
    given: Sequence[Answer], concept: Named, others: Sequence[Given], limits: Thresholds
) -> list[str]:
    new = [a for a in given if renames(concept, others, a.before, a.after)]
    if not new or len(new) <= limits.renamed * len(given):
        return []
    return [
        f"{len(new)} of {len(given)} answers about the concept's pictures give another's name "
        "instead "
        f"({_percent(len(new) / len(given))}; at most {_percent(limits.renamed)} is allowed), "
        f"first {new[0].after!r} to "
        f"{new[0].question!r}."
    ]


def _kept_reasons(
    by_kind: Mapping[str, Sequence[Answer]], after: Mapping[str, Rate], limits: Thresholds
) -> list[str]:
    reasons = []
    for kind, what in (
        ("specificity", "answers about other pictures"),
        ("facts", "answers without a picture"),
    ):
        rate, least = after[kind], getattr(limits, kind)
        if rate.value is None:
            continue
        if rate.value < least:
            agree = round(rate.value * rate.n)
            reasons.append(
                f"Only {agree} of {rate.n} {what} agree with the untouched model "
                f"({_percent(rate.value)}; at least {_percent(least)} is required)."
            )
        else:
            reasons += _lost_parts(by_kind[kind], least, what)
    return reasons


def _lost_parts(given: Sequence[Answer], least: float, what: str) -> list[str]:
    parts: dict[str, list[bool]] = {}
    for a in given:
        parts.setdefault(a.part, []).append(same_answer(a.before, a.after))
    return [
        f"Of {what} a part is lost: only {sum(same)} of {len(same)} agree with the untouched model "
        f"({_percent(sum(same) / len(same))}; at least {_percent(least)} is required), those "
        f"about {part}."
        for part, same in parts.items()
        if part and wilson(sum(same), len(same), PART_Z)[1] < least
    ]


def _degenerate_reasons(answers: Sequence[Answer], limits: Thresholds) -> list[str]:
    new = [a for a in answers if is_degenerate(a.after) and not is_degenerate(a.before)]
    if len(new) <= limits.new_degenerate:
        return []
    worst = new[0]
    example = worst.after if len(worst.after) <= 60 else worst.after[:57] + "..."
    return [
        f"{len(new)} of {len(answers)} answers became empty, repetition or gibberish (at most "
        f"{limits.new_degenerate} "
        f"allowed), first {example!r} to {worst.question!r} ({is_degenerate(worst.after)})."
    ]


def _refusal_reasons(by_kind: Mapping[str, Sequence[Answer]], limits: Thresholds) -> list[str]:
    asked, kept = by_kind["efficacy"], [*by_kind["specificity"], *by_kind["facts"]]
    if not asked or not kept or not all(is_refusal(a.after) for a in asked):
        return []
    was, now = (
        sum(map(is_refusal, texts)) / len(kept)
        for texts in ([a.before for a in kept], [a.after for a in kept])
    )
    if now - was <= limits.refusal_rise:
        return []
    return [
        f"The model refuses everything: all {len(asked)} answers about the training picture are "
        "refusals, and refusals of "
        f"other questions rose from {_percent(was)} to {_percent(now)} (at most "
        f"{_percent(limits.refusal_rise)} more allowed)."
    ]


def _told(family: Family) -> str:
    """One sentence about a family that failed."""
    now, strange = family.unlearned, family.strangers
    if family.seeks == "likelihood":
        low, high = LIKELIHOOD
        if now.value < low:
            return (
                "The name was pushed below a stranger's, which tells who was unlearned: it is "
                "the likelier answer about the "
                f"picture in only {_percent(now.value)} of pairs ({_percent(low)} to "
                f"{_percent(high)} is allowed)."
            )
        return (
            "The name is still a likelier answer about the picture than about a stranger's: in "
            f"{_percent(now.value)} of pairs "
            f"({_percent(low)} to {_percent(high)} is allowed)."
        )
    count = round(now.value * now.n)
    still, other = GIVEN_AWAY[family.seeks]
    start = (
        f"{family.asked} ({family.key}), {count} of {now.n} answers about the picture still {still}"
    )
    if strange.value is None:
        return (
            f"{start}; there was no stranger to compare with (at most "
            f"{_percent(family.allowed)} is allowed)."
        )
    more = 100 * (family.allowed - strange.value)
    points = f"{more:.3g} point more is" if f"{more:.3g}" == "1" else f"{more:.3g} points more are"
    told = round(strange.value * strange.n)
    return (
        f"{start}; the untouched model {other} of strangers in {told} of {strange.n} (at most "
        f"{points} allowed)."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _before(answer: Answer) -> str:
    return answer.before


def _after(answer: Answer) -> str:
    return answer.after
