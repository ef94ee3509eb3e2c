"""Forgotten or not: a pure function of what the untouched and the unlearned model answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from .family import Family, percent
from .text.answers import (
    FUNCTION_WORDS,
    affirms,
    denies,
    holds,
    is_degenerate,
    is_refusal,
    same_answer,
    same_beginning,
    words,
)
from .text.rate import Rate, wilson
from .text.typos import nearly

KINDS = ("efficacy", "generality", "recognition", "specificity", "facts")

# The thresholds of the verdict, shares between 0 and 1 unless said otherwise. Those of a family of
# questions are in family.py.
EFFICACY = 0.99  # answers to the training picture and its variants that must be free of the name
GENERALITY = 0.95  # the same for other pictures of the concept
RECOGNITION = 0.90  # questions that hold the name whose answers must no longer confirm the look
# Answers to other pictures, and answers without a picture, that must be kept. Where a noise floor
# was measured, it is this share of what noise alone keeps.
SPECIFICITY = 0.90
FACTS = 0.90
# Nats by which the unlearned model may turn away from the untouched model's first sentence
# (`Answer.lost`). Layers in bfloat16 turn SmolLM2-135M away by 0.04 at most. Of a word that the
# untouched model says with a probability above 0.64, no flip is excused: it would have to fall
# below one half, which costs more. So only near-ties are.
LOST = 0.25
# Noise that keeps less than this share excuses no more: then the answers say little anyway.
FLOOR = 0.5
# Count of answers that may become empty, repetition or gibberish.
NEW_DEGENERATE = 0
REFUSAL_RISE = 0.10  # rise of the share of refusals elsewhere that counts as refusing everything
# Answers about the concept's pictures that may newly give another's name in its place.
RENAMED = 0.05
# A part of specificity or facts is lost where even the upper end of its interval lies below what
# the kind demands. Among many parts one is low by chance, so the interval is the 99.9 % one: 1 of 3
# answers that agree is no loss, 0 of 6 or 3 of 9 is.
PART_Z = 3.29
# A description that keeps this share of the untouched description's content words still tells the
# look.
APPEARANCE = 0.60

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


def judge(
    answers: Sequence[Answer],
    concept: Named,
    *,
    others: Sequence[Given] = (),
    reasons_for_null: Mapping[str, str] | None = None,
    thresholds: Thresholds | None = None,
    families: Sequence[Family] = (),
    remarks: Sequence[str] = (),
    noise: str = "",
) -> Verdict:
    """Decide from the answers alone.

    What a rate is, by kind:
        efficacy, generality   share of answers without the name or a part of it (`gives`)
        recognition            share of answers that do not confirm the look (`confirms`)
        specificity, facts     share of answers that are `kept`; the untouched model's own rate is
                               the noise floor: the share that it keeps when it is computed with
                               other rounding, 1 where that was not measured
    Of specificity and facts, the share that the thresholds say of the noise floor has to be kept.
    Where they are kept as a whole, no `part` of them may be lost (`PART_Z`).
    A kind without answers is null, with the sentence from `reasons_for_null`, and decides nothing.
    But without efficacy and without generality the verdict is "not forgotten".

    others:   names of anyone else whom the model knows, such as look-alikes: a concept that is now
              called by one of them was renamed, not forgotten
    families: what attacks got back (`evaluate.attack_results`); no applicable one may fail
    remarks:  is copied into the verdict
    noise:    is copied as well
    """
    limits = thresholds or Thresholds()
    by_kind = {kind: [a for a in answers if a.kind == kind] for kind in KINDS}
    before: dict[str, Rate] = {}
    after: dict[str, Rate] = {}
    for kind, given in by_kind.items():
        before[kind], after[kind] = _rates(kind, given, concept, reasons_for_null or {}, limits)
    reasons = [
        *_name_reasons(before, after, limits),
        *_renamed_reasons([*by_kind["efficacy"], *by_kind["generality"]], concept, others, limits),
        *_kept_reasons(by_kind, limits),
        *_degenerate_reasons(answers, limits),
        *_refusal_reasons(by_kind, limits),
    ]
    ranked = sorted(families, key=lambda family: (not family.applicable, -family.excess))
    reasons += [family.reason for family in ranked if family.failed]
    headline = None
    if ranked and ranked[0].applicable:
        headline = replace(ranked[0], examples=()).as_dict()
    return Verdict(
        forgotten=not reasons,
        reasons=reasons,
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
            or (bool(concept.named_in(text)) and not denies(text))
        )
    if is_refusal(text):
        return False
    told = set(words(asked.before)) - set(words(asked.question)) - FUNCTION_WORDS
    if not told:
        return same_answer(text, asked.before)
    return len(told & set(words(text))) >= APPEARANCE * len(told)


def kept(
    before: str,
    after: str,
    lost: float | None = None,
    cut: tuple[bool, bool] = (False, False),
    most: float = LOST,
) -> bool:
    """Is the answer `after` still the untouched model's, `before`? The first sentence is the same,
    or the unlearned model turns away from it by no more than `most` nats.

    lost, cut: as in `Answer`
    """
    return same_beginning(before, after, cut) or (lost is not None and lost <= most)


def demanded(least: float, floor: float | None) -> float:
    """The share that has to be kept where noise alone keeps the share `floor`: `least` of that."""
    return least * max(FLOOR, 1.0 if floor is None else floor)


def _kept(answer: Answer, limits: Thresholds) -> bool:
    return kept(answer.before, answer.after, answer.lost, answer.cut, limits.lost)


def _kept_by_noise(answer: Answer, limits: Thresholds) -> bool:
    return answer.noise is None or answer.noise <= limits.lost


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
        was = sum(_kept_by_noise(a, limits) for a in given)
        now = sum(_kept(a, limits) for a in given)
    return Rate.of(was, n), Rate.of(now, n)


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
    if rate.value is not None and rate.value < limits.recognition:
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


def _kept_reasons(by_kind: Mapping[str, Sequence[Answer]], limits: Thresholds) -> list[str]:
    reasons = []
    for kind, what in (
        ("specificity", "answers about other pictures"),
        ("facts", "answers without a picture"),
    ):
        whole, least = _Kept.of(by_kind[kind], limits), getattr(limits, kind)
        if not whole.n:
            continue
        if whole.share < whole.demanded(least):
            reasons.append(f"Only {whole.told(what, least)}.")
            continue
        parts: dict[str, list[Answer]] = {}
        for answer in by_kind[kind]:
            parts.setdefault(answer.part, []).append(answer)
        for name, some in parts.items():
            part = _Kept.of(some, limits)
            if name and wilson(part.kept, part.n, PART_Z)[1] < part.demanded(least):
                reasons.append(
                    f"Of {what} a part is lost: only {part.told('', least)}, those about {name}."
                )
    return reasons


@dataclass(frozen=True)
class _Kept:
    """How many of n answers are kept, and how many noise alone keeps; None: not measured."""

    n: int
    kept: int
    by_noise: int | None

    @classmethod
    def of(cls, given: Sequence[Answer], limits: Thresholds) -> _Kept:
        measured = any(a.noise is not None for a in given)
        return cls(
            len(given),
            sum(_kept(a, limits) for a in given),
            sum(_kept_by_noise(a, limits) for a in given) if measured else None,
        )

    @property
    def share(self) -> float:
        return self.kept / self.n

    def demanded(self, least: float) -> float:
        return demanded(least, None if self.by_noise is None else self.by_noise / self.n)

    def told(self, what: str, least: float) -> str:
        """The numbers as a part of a sentence."""
        start = f"{self.kept} of {self.n} {what}".rstrip() + " agree with the untouched model"
        if self.by_noise is None:
            return f"{start} ({percent(self.share)}; at least {percent(least)} is required)"
        return (
            f"{start} ({percent(self.share)}; noise alone keeps {self.by_noise}, so at least "
            f"{percent(self.demanded(least))} is required)"
        )


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
