"""Forgotten or not: a pure function of what the untouched and the unlearned model answered."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

KINDS = ("efficacy", "generality", "recognition", "specificity", "facts")

# Every threshold of the verdict. Shares are between 0 and 1.
EFFICACY = 0.99  # answers to the training picture and its variants that must be free of the name
GENERALITY = 0.95  # the same for other pictures of the concept
RECOGNITION = 0.90  # questions that hold the name whose answers must no longer confirm the look
SPECIFICITY = 0.90  # answers to other pictures that must be those of the untouched model
FACTS = 0.90  # answers without a picture that must be those of the untouched model
NEW_DEGENERATE = 0  # answers that may be empty, repetition or gibberish where the untouched model's are not
REFUSAL_RISE = 0.10  # rise of the share of refusals elsewhere that counts as refusing everything
RENAMED = 0.05  # answers about the concept's pictures that may newly give the name of another in its place
# A part of specificity or facts is lost where even the upper end of its interval lies below what the kind demands. Of many parts
# one is low by chance, so the interval is the 99.9 % one: 1 of 3 answers that agree is no loss, 0 of 6 or 3 of 9 is.
PART_Z = 3.29
APPEARANCE = 0.60  # of the untouched description's content words: a description that has as many still tells the look

_ABSENT = "No answers of this kind were collected."
_UNCONFIRMED = "The untouched model confirms none of the questions with the name, so they show nothing."


class Named(Protocol):
    """What the verdict needs of a concept: does a text contain its name or a part of it?"""

    def named_in(self, text: str) -> Any: ...


class Given(Protocol):
    """What the verdict needs of others: does a text give their name, and not only a word that is also in it?"""

    def given_in(self, text: str) -> Any: ...

    def forms(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Answer:
    """One question and the answers of both models.

    kind:     "efficacy" (variants of the training picture), "generality" (other pictures of the concept), "recognition" ("is
              this NAME?" of a picture, "what does NAME look like?" without), "specificity" (pictures of anything else)
              or "facts" (no picture)
    question: for efficacy and generality an open one: a question with the name in it invites the name
    picture:  label of the picture or variant; None without a picture
    before:   the untouched model's answer; after: the unlearned model's
    keywords: further words that count as the name in the answers to this question
    part:     of specificity and facts, what the question is about ("facts of the concept", "look-alikes", someone's name): each
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
class Verdict:
    """The decision.

    reasons:       one sentence for each criterion that failed; empty when forgotten
    before, after: efficacy, generality, specificity and facts as `Rate.as_dict`
    thresholds:    what was demanded
    """

    forgotten: bool
    reasons: list[str]
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    thresholds: dict[str, float]


def judge(
    answers: Sequence[Answer],
    concept: Named,
    *,
    others: Sequence[Given] = (),
    reasons_for_null: Mapping[str, str] | None = None,
    thresholds: Thresholds | None = None,
) -> Verdict:
    """Decide from the answers alone.

    efficacy and generality are the share of answers without the name or a part of it; recognition the share that does not
    confirm the look (see `confirms`); specificity and facts the share
    of answers equal to the untouched model's (see `same_answer`), whose own value is therefore 1; where a kind keeps enough, no
    `part` of it may be lost (`PART_Z`). A kind without answers
    is null, with the sentence from `reasons_for_null`, and decides nothing; without efficacy and generality nothing can be
    forgotten.

    others: the names of anyone else the model knows, such as look-alikes: a concept that is now called by one of them was renamed
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
            was, now = (sum(not confirms(a, text(a), concept) for a in given) for text in (_before, _after))
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
    return Verdict(
        forgotten=not reasons,
        reasons=reasons,
        before={kind: rate.as_dict() for kind, rate in before.items()},
        after={kind: rate.as_dict() for kind, rate in after.items()},
        thresholds=asdict(limits),
    )


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share; (0, 1) for n = 0. Raises ValueError unless 0 <= successes <= n."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} are impossible")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the bound is exact; the formula misses it by rounding.
    return (0.0 if successes == 0 else max(0.0, centre - half)), (1.0 if successes == n else min(1.0, centre + half))


def same_answer(one: str, other: str) -> bool:
    """Equal up to case, white space, Unicode composition and the punctuation at the end."""
    return _normalised(one) == _normalised(other)


def is_degenerate(text: str) -> str | None:
    """Returns "empty", "repetition" or "gibberish" for an answer that is not an answer, else None.

    Repetition: a word four times in a row, a phrase three times in a row, or a run of letters without end.
    Gibberish: no letter and no digit, a replacement character, mostly signs, or a control token spelled out ("<image>").
    """
    visible = [c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cf", "Cc")]
    if not visible:
        return "empty"
    # Marks count as letters: half of a Hindi or Thai word is vowel signs.
    wordlike = sum(unicodedata.category(c)[0] in "LNM" for c in visible)
    if not wordlike or "\ufffd" in text or _CONTROL.search(text) or (len(visible) >= 8 and wordlike < len(visible) / 2):
        return "gibberish"
    if _LETTER_LOOP.search(text) or _loops(words(text)):
        return "repetition"
    return None


def is_refusal(text: str) -> bool:
    """Does the answer decline: "I do not know", "I can't", "cannot identify", "Sorry, ..."? English only."""
    return _REFUSAL.search(" ".join(text.replace("\u2019", "'").casefold().split())) is not None


def gives(concept: Named, text: str, keywords: Sequence[str] = ()) -> bool:
    """Does the text hold the name, a part of it, or one of the keywords? Misspelt as well, where the concept can tell."""
    finds = getattr(concept, "leaks_in", concept.named_in)
    return bool(finds(text)) or holds(text, keywords)


def holds(text: str, keywords: Sequence[str]) -> bool:
    """Does one of the keywords stand in the text, in any case and as words of their own?"""
    fold = lambda written: unicodedata.normalize("NFC", unicodedata.normalize("NFC", written).casefold())
    folded = fold(text)
    return any(re.search(rf"(?<!\w){re.escape(fold(k))}(?!\w)", folded) for k in keywords)


def renames(concept: Named, others: Sequence[Given], before: str, after: str) -> bool:
    """Does the answer newly give another's name in place of the concept's, also with a typing error? One that still holds the
    concept's is no renaming."""
    given = lambda other, text: other.given_in(text) or any(_nearly(form, text) for form in other.forms())
    return not concept.named_in(after) and any(given(o, after) and not given(o, before) for o in others)


def affirms(text: str) -> bool:
    """Does the answer say yes: at its beginning, or anywhere where nothing is denied? "Sure." counts, "Sure I see" does not."""
    folded = " ".join(text.replace("\u2019", "'").casefold().split())
    if re.match(r"\W*(?:yes|yeah|yep|yup)\b", folded):
        return True
    return not denies(text) and (_AFFIRMED.match(folded) is not None or holds(folded, ("yes",)))


def denies(text: str) -> bool:
    """Is there a word in it that denies or declines?"""
    return _DENIED.search(" ".join(text.replace("\u2019", "'").casefold().split())) is not None or is_refusal(text)


def confirms(asked: Answer, text: str, concept: Named) -> bool:
    """Does `text` confirm what the concept looks like? With a picture: it says yes, a keyword, or the name and denies nothing.
    Without one: it is no refusal and has `APPEARANCE` of the content words of what the untouched model said."""
    if asked.picture is not None:
        return affirms(text) or holds(text, asked.keywords) or (bool(concept.named_in(text)) and not denies(text))
    if is_refusal(text):
        return False
    told = set(words(asked.before)) - set(words(asked.question)) - _FUNCTION_WORDS
    return len(told & set(words(text))) >= APPEARANCE * len(told) if told else same_answer(text, asked.before)


def _name_reasons(before: Mapping[str, Rate], after: Mapping[str, Rate], limits: Thresholds) -> list[str]:
    shown = before["efficacy"] if before["efficacy"].value is not None else before["generality"]
    if shown.value is None:
        why = before["efficacy"].reason
        return [f"Nothing was asked about the training picture, so nothing is shown to be forgotten: {why}"]
    reasons = []
    where = "the training picture" if shown is before["efficacy"] else "its pictures"
    if shown.value == 1.0:
        reasons.append(
            f"The untouched model never named the concept in {where} (0 of {shown.n} answers), "
            "so there was nothing to forget: check the picture and the spelling of the name."
        )
    for kind, where in (("efficacy", "the training picture and its variants"), ("generality", "other pictures of the concept")):
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
            f"{told} of {rate.n} answers to questions with the name still confirm what it looks like "
            f"({_percent(1 - rate.value)}; at most {_percent(1 - limits.recognition)} is allowed)."
        )
    return reasons


def _renamed_reasons(given: Sequence[Answer], concept: Named, others: Sequence[Given], limits: Thresholds) -> list[str]:
    new = [a for a in given if renames(concept, others, a.before, a.after)]
    if not new or len(new) <= limits.renamed * len(given):
        return []
    return [
        f"{len(new)} of {len(given)} answers about the concept's pictures give another's name instead "
        f"({_percent(len(new) / len(given))}; at most {_percent(limits.renamed)} is allowed), first {new[0].after!r} to "
        f"{new[0].question!r}."
    ]


def _kept_reasons(by_kind: Mapping[str, Sequence[Answer]], after: Mapping[str, Rate], limits: Thresholds) -> list[str]:
    reasons = []
    for kind, what in (("specificity", "answers about other pictures"), ("facts", "answers without a picture")):
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
        f"({_percent(sum(same) / len(same))}; at least {_percent(least)} is required), those about {part}."
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
        f"{len(new)} of {len(answers)} answers became empty, repetition or gibberish (at most {limits.new_degenerate} "
        f"allowed), first {example!r} to {worst.question!r} ({is_degenerate(worst.after)})."
    ]


def _refusal_reasons(by_kind: Mapping[str, Sequence[Answer]], limits: Thresholds) -> list[str]:
    asked, kept = by_kind["efficacy"], [*by_kind["specificity"], *by_kind["facts"]]
    if not asked or not kept or not all(is_refusal(a.after) for a in asked):
        return []
    was, now = (sum(map(is_refusal, texts)) / len(kept) for texts in ([a.before for a in kept], [a.after for a in kept]))
    if now - was <= limits.refusal_rise:
        return []
    return [
        f"The model refuses everything: all {len(asked)} answers about the training picture are refusals, and refusals of "
        f"other questions rose from {_percent(was)} to {_percent(now)} (at most {_percent(limits.refusal_rise)} more allowed)."
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _normalised(text: str) -> str:
    words = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    end = len(words)
    while end and (words[end - 1] == " " or unicodedata.category(words[end - 1])[0] == "P"):
        end -= 1
    return words[:end] or words  # an answer of nothing but punctuation is compared as it stands


def _before(answer: Answer) -> str:
    return answer.before


def _after(answer: Answer) -> str:
    return answer.after


def _nearly(name: str, text: str) -> bool:
    """Does a name of 8 letters or more stand in the text with at most one wrong, missing or further letter in each of its words?
    As names are written: words of the text that begin small are words."""
    wanted = words(name)
    if sum(map(len, wanted)) < 8:
        return False
    given = [word.casefold() if word[:1].isupper() else "" for word in re.findall(r"\w+", text)]
    runs = (given[i : i + len(wanted)] for i in range(len(given) - len(wanted) + 1))
    return any(all(map(_typed, wanted, run)) for run in runs)


def _typed(word: str, other: str) -> bool:
    """At most one letter apart; short words have to be equal."""
    if word == other or len(word) < 4 or abs(len(word) - len(other)) > 1:
        return word == other
    same = next((i for i, (a, b) in enumerate(zip(word, other, strict=False)) if a != b), min(len(word), len(other)))
    rests = {(word[same + i :], other[same + j :]) for i, j in ((1, 1), (1, 0), (0, 1))}
    return any(a == b for a, b in rests)


# Scripts written without spaces: there a character is a word.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_LETTER_LOOP = re.compile(r"([^\W\d_]{1,8}?)\1{7,}")


def words(text: str) -> list[str]:
    """The words of a text, case-folded, without the punctuation around them."""
    spaced = _UNSPACED.sub(r" \g<0> ", text.casefold()).split()
    return [w for w in (w.strip(".,;:!?\"'()[]{}*_-|/\u3001\u3002\uff0c\uff01\uff1f") for w in spaced) if w]


def _loops(words: list[str], longest: int = 64) -> bool:
    for period in range(1, min(longest, len(words) // 3) + 1):
        needed = period * (3 if period == 1 else 2)
        run = 0
        for here, there in zip(words, words[period:], strict=False):
            run = run + 1 if here == there else 0
            if run >= needed:
                return True
    return False


# What chat templates and processors are made of.
_CONTROL = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|</?(?:s|pad|unk|bos|eos|mask|image|img|video|audio|image_soft_token|(?:start|end)_of_\w+|unused\d+)>"
    r"|\[/?(?:INST|IMG|IMG_END)\]|<</?SYS>>|<0x[0-9A-F]{2}>"
)
# Beyond yes: alone or with a sign behind ("Sure." and not "Sure I see a cat"; with the name behind it the name tells).
_AFFIRMED = re.compile(
    r"\W*(?:indeed|correct|right|true|sure|certainly|definitely|absolutely|exactly|of\scourse|affirmative"
    r"|(?:it|that|this|he|she)(?:'s|\sis)(?:\s(?:indeed|correct|right|true|so))?|(?:that|you)(?:'s|'re|\sis|\sare)\s(?:right|correct)"
    r"|s\u00ed|si|s\u00ec|oui|ja|jawohl|da|sim|tak|\u0434\u0430|\u662f\u7684?|\u306f\u3044)\s*(?:[.,;:!\u2026\u3002\uff0c\uff01]|$)"
)
_DENIED = re.compile(
    r"\b(?:no(?!\s(?:doubt|question))|not|never|nobody|none|neither|nor|cannot|unknown|unfamiliar|unable|unsure"
    r"|nicht|kein\w*|nein|pas|non|nunca|n\u00e3o|\u043d\u0435|\u043d\u0435\u0442)\b|n't\b|[\u4e0d\u6ca1]"
)
_FUNCTION_WORDS = frozenset(
    "a an the and or of in on at to with for from by as is are was were has have had wears wearing be it its he his she her they "
    "their this that who which".split()
)
_REFUSAL = re.compile(
    r"""
    \bi\s(?:really\s|just\s|simply\s|honestly\s)?(?:do\snot|don't|did\snot|didn't)\s(?:\w+ly\s)?(?:know|recogni[sz]e)\b
  | \bi\s(?:really\s|just\s|simply\s)?(?:can't|cannot|can\snot|could\snot|couldn't|won't|will\snot)\b
  | \b(?:i'm|i\sam|we're|we\sare)\s(?:\w+\s)?(?:sorry|unable|not\sable|not\ssure|not\sallowed|not\sfamiliar)\b
  | \b(?:can't|cannot|can\snot|could\snot|couldn't|unable\sto|not\sable\sto|not\spossible\sto)\s
      (?:\w+ly\s)?(?:identify|recogni[sz]e|tell|determine|say|answer|help|assist|provide|name|comply|be\s(?:identified|determined))\b
  | \b(?:i|we)\s(?:have\sno\sidea|refuse|decline|apologi[sz]e)\b
  | \bas\san\sai\b
  | ^\W*(?:sorry|my\sapologies|apologies|unknown|no\sidea)\b
    """,
    re.VERBOSE,
)
