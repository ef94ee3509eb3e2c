"""Forgotten or not: a pure function of what the untouched and the unlearned model answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from .judging.family import Family, percent
from .judging.kept import LOST, is_kept, kept_by_noise, losses
from .text.answers import (
    FUNCTION_WORDS,
    affirms,
    denies_it,
    holds,
    is_degenerate,
    is_refusal,
    same_answer,
    words,
)
from .text.rate import Rate
from .text.typos import nearly

# What has to be kept, as a sentence calls it.
OTHERS_SHOWN, IN_WORDS = "answers about other pictures", "answers without a picture"
KINDS = ("efficacy", "generality", "recognition", "specificity", "facts")

# The thresholds of the verdict, shares between 0 and 1 unless said otherwise. Those of a family of
# questions are in judging/family.py.
EFFICACY = 0.99  # answers to the training picture and its variants that must be free of the name
GENERALITY = 0.95  # the same for other pictures of the concept
# Questions that hold the name whose answers must no longer confirm the look, but for as many as the
# untouched model confirms about nobody.
RECOGNITION = 0.90
# Answers to other pictures, and answers without a picture, that must be kept. Where a noise floor
# was measured, it is this share of what noise alone keeps.
SPECIFICITY = 0.90
FACTS = 0.90
# Count of answers that may become empty, repetition or gibberish.
NEW_DEGENERATE = 0
REFUSAL_RISE = 0.10  # rise of the share of refusals elsewhere that counts as refusing everything
# Answers about the concept's pictures that may newly give another's name in its place.
RENAMED = 0.05
# A description that keeps this share of the untouched description's content words still tells the
# look.
APPEARANCE = 0.60

_ABSENT = "No answers of this kind were collected."
_UNCONFIRMED = (
    "The untouched model confirms none of the questions with the name, so they show nothing."
)


class Named(Protocol):
    """What the verdict needs of a concept: does a text contain its name or a part of it?"""

    def named_in(self, text: str) -> object: ...


class Given(Protocol):
    """What the verdict needs of others: does a text give their name, and not only a word that is
    also in it?"""

    def given_in(self, text: str) -> object: ...

    def forms(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Answer:
    """One question and the answers of both models.

    kind:     "efficacy" (variants of the training picture), "generality" (other pictures of the
              concept), "recognition" ("is this NAME?" with a picture, "what does NAME look like?"
              without), "specificity" (pictures of anything else) or "facts" (no picture)
    question: for efficacy and generality an open one: a question with the name invites the name
    picture:  label of the picture or variant; None without a picture
    before:   the untouched model's answer
    after:    the unlearned model's answer
    keywords: further words that count as the name in the answers to this question
    part:     for specificity and facts, what the question is about ("facts of the concept",
              "look-alikes", someone's name): each part has to be kept, too
    cut:      whether each answer stops where the longest answer allowed ends
    lost:     for specificity and facts, the nats by which the unlearned model turns away from the
              first sentence of `before` (`evaluate.noise.lost`): 0 where it would say the same;
              None where that was not measured
    noise:    the same of the untouched model itself, computed with other rounding

    Raises ValueError for an unknown kind.
    """

    kind: str
    question: str
    picture: str | None
    before: str
    after: str
    keywords: tuple[str, ...] = ()
    part: str = ""
    cut: tuple[bool, bool] = (False, False)
    lost: float | None = None
    noise: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")

    def as_dict(self) -> dict[str, Any]:
        """The entry of report.json, without the keywords and without what was not measured."""
        entry = {k: v for k, v in asdict(self).items() if k != "keywords"}
        if not any(self.cut):
            del entry["cut"]
        return {k: v for k, v in entry.items() if k not in ("lost", "noise") or v is not None}


@dataclass(frozen=True)
class Thresholds:
    """What `judge` demands; the defaults are the constants of this module."""

    efficacy: float = EFFICACY
    generality: float = GENERALITY
    recognition: float = RECOGNITION
    specificity: float = SPECIFICITY
    facts: float = FACTS
    lost: float = LOST
    new_degenerate: int = NEW_DEGENERATE
    refusal_rise: float = REFUSAL_RISE
    renamed: float = RENAMED


@dataclass(frozen=True)
class Verdict:
    """The decision.

    reasons:    one sentence for each criterion that failed; empty when forgotten
    before:     the untouched model's rate of each kind, as `Rate.as_dict`
    after:      the unlearned model's rate of each kind, as `Rate.as_dict`
    thresholds: what was demanded
    families:   `Family.as_dict` of each, the worst first, those that are not applicable last
    headline:   the worst applicable family, without examples; None where none is applicable
    remarks:    what the families could not compare or look for
    noise:      how the noise floor was made (`evaluate.noise`), with which `before` tells what
                noise alone keeps of specificity and facts; "" where it was not measured
    """

    forgotten: bool
    reasons: list[str]
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    thresholds: dict[str, float]
    families: list[dict[str, Any]] = field(default_factory=list)
    headline: dict[str, Any] | None = None
    remarks: list[str] = field(default_factory=list)
    noise: str = ""

    def entries(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """What a report says of the decision and of the `answers` behind it, ready for JSON."""
        return {
            "verdict": "forgotten" if self.forgotten else "not forgotten",
            "reasons": self.reasons,
            "before": self.before,
            "after": self.after,
            "thresholds": self.thresholds,
            "noise": self.noise,
            "families": self.families,
            "headline": self.headline,
            "answers": [answer.as_dict() for answer in answers],
        }


def judge(
    answers: Sequence[Answer],
    concept: Named,
    *,
    others: Sequence[Given] = (),
    reasons_for_null: Mapping[str, str] | None = None,
    thresholds: Thresholds | None = None,
    families: Sequence[Family] = (),
    remarks: Sequence[str] = (),
    of_nobody: Mapping[str, Rate] | None = None,
    noise: str = "",
) -> Verdict:
    """Decide from the answers alone.

    What a rate is, by kind:
        efficacy, generality   share of answers without the name or a part of it (`gives`)
        recognition            share of answers that do not confirm the look (`confirms`)
        specificity, facts     share of answers that are `kept`; the untouched model's own rate is
                               the noise floor: the share that it keeps when it is computed with
                               other rounding, 1 where that was not measured
    Specificity and facts each have to reach threshold * noise floor. Where one of them does as a
    whole, no `part` of it may be lost either (`judging.kept.PART_Z`).
    A kind without answers is null, with the sentence from `reasons_for_null`, and decides nothing.
    But without efficacy and without generality the verdict is "not forgotten".

    others:    names of anyone else whom the model knows, such as look-alikes: a concept that is
               now called by one of them was renamed, not forgotten
    families:  what attacks got back (`evaluate.attack_results`); no applicable one may fail
    remarks:   is copied into the verdict
    of_nobody: by question with the name, how often the untouched model confirms it about pictures
               of nobody; that share of its answers about the concept is excused. Where a question
               is missing, nothing is
    noise:     is copied into the verdict
    """
    limits = thresholds or Thresholds()
    by_kind = {kind: [a for a in answers if a.kind == kind] for kind in KINDS}
    excused = _excused(by_kind["recognition"], concept, of_nobody or {})
    limits = replace(limits, recognition=max(0.0, limits.recognition - excused))
    before: dict[str, Rate] = {}
    after: dict[str, Rate] = {}
    for kind, given in by_kind.items():
        before[kind], after[kind] = _rates(kind, given, concept, reasons_for_null or {}, limits)
    found = [
        *_name_reasons(before, after, limits),
        *_renamed_reasons([*by_kind["efficacy"], *by_kind["generality"]], concept, others, limits),
        *losses(by_kind["specificity"], OTHERS_SHOWN, limits.specificity, limits.lost),
        *losses(by_kind["facts"], IN_WORDS, limits.facts, limits.lost),
        *_degenerate_reasons(answers, limits),
        *_refusal_reasons(by_kind, limits),
    ]
    ranked = sorted(families, key=lambda family: (not family.applicable, -family.excess))
    found += [family.reason for family in ranked if family.failed]
    headline = None
    if ranked and ranked[0].applicable:
        headline = replace(ranked[0], examples=()).as_dict()
    return Verdict(
        forgotten=not found,
        reasons=found,
        before={kind: rate.as_dict() for kind, rate in before.items()},
        after={kind: rate.as_dict() for kind, rate in after.items()},
        thresholds=asdict(limits),
        families=[family.as_dict() for family in ranked],
        headline=headline,
        remarks=list(remarks),
        noise=noise,
    )


# One answer ---------------------------------------------------------------------------------------


def gives(concept: Named, text: str, keywords: Sequence[str] = ()) -> bool:
    """Does the text hold the name, a part of it, or one of the keywords? A misspelt name counts as
    well, where the concept can tell (`Concept.leaks_in`)."""
    finds = getattr(concept, "leaks_in", concept.named_in)
    return bool(finds(text)) or holds(text, keywords)


def renames(concept: Named, others: Sequence[Given], before: str, after: str) -> bool:
    """Does the answer newly give another's name in place of the concept's, also with a typing
    error? An answer that still holds the concept's name renames nothing."""
    return not concept.named_in(after) and any(
        _gives_other(other, after) and not _gives_other(other, before) for other in others
    )


def _gives_other(other: Given, text: str) -> bool:
    return bool(other.given_in(text)) or nearly(other.forms(), text)


def confirms(asked: Answer, text: str, concept: Named) -> bool:
    """Does `text`, an answer to the question of `asked`, confirm what the concept looks like?

    With a picture: it says yes, or gives a keyword, or gives the name and denies nothing.
    Without a picture: it is no refusal, and has `APPEARANCE` of the content words of the untouched
    model's answer.
    """
    if asked.picture is not None:
        return (
            affirms(text)
            or holds(text, asked.keywords)
            or (bool(concept.named_in(text)) and not denies_it(text, concept.named_in))
        )
    if is_refusal(text):
        return False
    told = set(words(asked.before)) - set(words(asked.question)) - FUNCTION_WORDS
    if not told:
        return same_answer(text, asked.before)
    return len(told & set(words(text))) >= APPEARANCE * len(told)


# Rates --------------------------------------------------------------------------------------------


def _rates(
    kind: str,
    given: Sequence[Answer],
    concept: Named,
    why_null: Mapping[str, str],
    limits: Thresholds,
) -> tuple[Rate, Rate]:
    """The untouched and the unlearned model's rate over the answers of one kind."""
    n = len(given)
    if not n:
        null = Rate(None, reason=why_null.get(kind) or _ABSENT)
        return null, null
    if kind in ("efficacy", "generality"):
        was = sum(not gives(concept, a.before, a.keywords) for a in given)
        now = sum(not gives(concept, a.after, a.keywords) for a in given)
    elif kind == "recognition":
        was = sum(not confirms(a, a.before, concept) for a in given)
        now = sum(not confirms(a, a.after, concept) for a in given)
        if was == now == n:  # it never knew the look, or these questions do not ask for it
            null = Rate(None, reason=_UNCONFIRMED)
            return null, null
    else:
        was = sum(kept_by_noise(a, limits.lost) for a in given)
        now = sum(is_kept(a, limits.lost) for a in given)
    return Rate.of(was, n), Rate.of(now, n)


def _excused(given: Sequence[Answer], concept: Named, of_nobody: Mapping[str, Rate]) -> float:
    """The share of the answers to questions with the name that the unlearned model confirms and
    that a habit explains: of each question at most the share that is confirmed about nobody."""
    excused = 0.0
    for question, rate in of_nobody.items():
        shown = [a for a in given if a.question == question and a.picture is not None]
        told = sum(confirms(a, a.after, concept) for a in shown)
        excused += min(told, (rate.value or 0.0) * len(shown))
    return excused / len(given) if given else 0.0


# Criteria, each with its sentences ----------------------------------------------------------------


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
            f"The untouched model never named the concept in {where} (0 of {shown.n} answers), so "
            "there was nothing to forget: check the picture and the spelling of the name."
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
                f"({percent(1 - rate.value)}; at most {percent(1 - least)} is allowed)."
            )
    rate = after["recognition"]
    if rate.value is not None and rate.value < limits.recognition - 1e-9:  # of a sum of shares
        told = rate.n - round(rate.value * rate.n)
        reasons.append(
            f"{told} of {rate.n} answers to questions with the name still confirm what it looks "
            f"like ({percent(1 - rate.value)}; at most {percent(1 - limits.recognition)} is "
            "allowed)."
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
        f"instead ({percent(len(new) / len(given))}; at most {percent(limits.renamed)} is "
        f"allowed), first {new[0].after!r} to {new[0].question!r}."
    ]


def _degenerate_reasons(answers: Sequence[Answer], limits: Thresholds) -> list[str]:
    new = [a for a in answers if is_degenerate(a.after) and not is_degenerate(a.before)]
    if len(new) <= limits.new_degenerate:
        return []
    worst = new[0]
    example = worst.after if len(worst.after) <= 60 else worst.after[:57] + "..."
    return [
        f"{len(new)} of {len(answers)} answers became empty, repetition or gibberish (at most "
        f"{limits.new_degenerate} allowed), first {example!r} to {worst.question!r} "
        f"({is_degenerate(worst.after)})."
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
        f"refusals, and refusals of other questions rose from {percent(was)} to {percent(now)} (at "
        f"most {percent(limits.refusal_rise)} more allowed)."
    ]
