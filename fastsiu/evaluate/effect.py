"""From a deployed model's answers: is the unlearning in effect, and is it the promised model? Pure.

Some servers ignore an adapter without a word (vLLM issue 55193): then every answer is the untouched
model's. Another base, or another revision of it, gives other answers even to questions that
unlearning does not change. So an audit asks both models the same questions. Answers with the name
show whether the adapter is in effect. Answers about anything else show whether the base is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..judging.kept import LOST, is_kept
from ..text.answers import same_beginning
from ..text.rate import Rate
from ..verdict import Answer, Named, gives

# An adapter that is not in effect leaves at least this share of the untouched model's answers with
# the name as they are. With equal rounding it is all of them; other rounding changes a few.
UNCHANGED = 0.90
# If fewer answers about anything else than this share are the untouched model's, another model is
# deployed. The verdict demands more (`verdict.FACTS`): in between, unlearning has cost something.
SAME_MODEL = 0.50
# Of the report's answers by the untouched model, the one that is served has to give at least this
# share. A right server that computes as the report's machine did gives them all: so does
# `transformers serve`. Other rounding turns near-ties alone: of the embedded model's 127 answers
# bf16 turns none; of a larger model's, bf16 and other attention kernels may turn a few.
# Quantised to 4 bits a model may lose more. Then it is not what was measured, and it is right to
# say so. Another revision may lose fewer, which a caveat tells: anything short of all has one.
REPEATED = 0.90
# The same for the unlearned model's answers about anything else. They may be 16, of which rounding
# turns two by chance in one audit of five where it turns one in twenty; four in one of a hundred.
REPEATED_ELSEWHERE = 0.80
# Of the answers that unlearning changed, this share must be the same as in the report.
AS_PROMISED = 0.50

FORGOTTEN, REMAINS = "forgotten", "not forgotten"
IGNORED, OTHER_MODEL, OTHER_RESULT = "not in effect", "wrong revision", "not as promised"
STATUSES = (FORGOTTEN, REMAINS, IGNORED, OTHER_MODEL, OTHER_RESULT)

NO_NAMING = "The untouched model gives the name in no answer."
NOTHING_ELSE = "No question was asked that has nothing to do with the look."
NO_PROMISE = "No report says what the model was to answer."
NOT_TOLD = "The report holds no answer to compare with."

# (question, label of the picture) -> answers of the untouched and of the unlearned model
Promised = Mapping[tuple[str, str | None], tuple[str, str]]


@dataclass(frozen=True)
class Effect:
    """What is deployed.

    status:    of `STATUSES`
    reasons:   sentences; none for the first two statuses, which the verdict explains
    unchanged: share of the untouched model's answers with the name that the deployed one gives, too
    elsewhere: the same share of answers that have nothing to do with the look
    base:      share of the report's answers that the untouched model still gives
    promised:  share of the answers changed by unlearning that are the same as in the report
    rest:      share of the report's answers about anything else that the deployed model gives
    caveats:   sentences about answers that are not the report's, though enough of them are
    """

    status: str
    reasons: list[str] = field(default_factory=list)
    unchanged: Rate = field(default_factory=lambda: Rate(None, reason=NO_NAMING))
    elsewhere: Rate = field(default_factory=lambda: Rate(None, reason=NOTHING_ELSE))
    base: Rate = field(default_factory=lambda: Rate(None, reason=NO_PROMISE))
    promised: Rate = field(default_factory=lambda: Rate(None, reason=NO_PROMISE))
    rest: Rate = field(default_factory=lambda: Rate(None, reason=NO_PROMISE))
    caveats: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The entry `deployed` of report.json."""
        names = ("unchanged", "elsewhere", "base", "promised", "rest")
        return {"status": self.status} | {name: getattr(self, name).as_dict() for name in names}


def effect(
    answers: Sequence[Answer],
    concept: Named,
    forgotten: bool,
    promised: Promised | None = None,
    said_forgotten: bool | None = None,
    revision: str = "",
    here: bool = False,
) -> Effect:
    """What is deployed: compares the untouched model's answers (`before`) with the deployed model's
    (`after`).

    forgotten:      the verdict on these answers
    promised:       the answers of the unlearning's report; None without a report
    said_forgotten: that report's verdict; None without a report
    revision:       a sentence where the server names another revision, else ""
    here:           `promised` was asked on this machine, which may round otherwise than the
                    server: only fewer than `REPEATED` of the answers are a caveat then
    """
    naming = [
        a
        for a in answers
        if a.kind in ("efficacy", "generality") and gives(concept, a.before, a.keywords)
    ]
    aside = [a for a in answers if a.kind in ("specificity", "facts")]
    told = [(a, promised[place]) for a in answers if promised and (place := _place(a)) in promised]
    changed = [(a, said) for a, said in told if a in naming and not same_beginning(*said)]

    unchanged = _rate([same_beginning(a.before, a.after, a.cut) for a in naming], NO_NAMING)
    elsewhere = _rate([is_kept(a, LOST) for a in aside], NOTHING_ELSE)
    nothing = NO_PROMISE if promised is None else NOT_TOLD
    base = _rate([same_beginning(was, a.before) for a, (was, _) in told], nothing)
    # How many answers elsewhere unlearning has kept by its own report. Where that is as few as are
    # kept now, another base is no explanation.
    cost = _rate([same_beginning(*said) for a, said in told if a in aside], nothing)
    kept = _rate([same_beginning(now, a.after) for a, (_, now) in changed], nothing)
    rest = _rate([same_beginning(now, a.after) for a, (_, now) in told if a in aside], nothing)
    caveats = {
        "base": f"{_same(base)} of {base.n} answers of the untouched model are those in the "
        "report: the others were turned by rounding, or by another revision.",
        "rest": f"{_same(rest)} of {rest.n} answers that have nothing to do with the look are "
        "those in the report: the others were turned by rounding, or by another revision.",
        "promised": f"{_same(kept)} of {kept.n} answers that unlearning changed are those in the "
        "report: the others were turned by rounding, or by another revision.",
    }

    def found(status: str, reason: str = "", about: str = "") -> Effect:
        """about: the share that `reason` gives, which needs no caveat"""
        made = Effect(status, [reason] if reason else [], unchanged, elsewhere, base, kept, rest)
        least = REPEATED if here else 1.0
        told = [key for key in caveats if key != about and _below(getattr(made, key), least)]
        return replace(made, caveats=[caveats[key] for key in told])

    if revision:
        return found(OTHER_MODEL, revision)
    if _below(base, SAME_MODEL):
        return found(
            OTHER_MODEL,
            "The untouched model is not the one that was unlearned: only "
            f"{_same(base)} of {base.n} of its answers are those in the report "
            f"(at least {100 * SAME_MODEL:.0f} % is required).",
            "base",
        )
    if _below(elsewhere, SAME_MODEL) and not _below(cost, SAME_MODEL):
        return found(
            OTHER_MODEL,
            "Another model or another revision answers, or unlearning has damaged all else: only "
            f"{_same(elsewhere)} of {elsewhere.n} answers that have nothing to do with the look "
            f"are the untouched model's (at least {100 * SAME_MODEL:.0f} % is required).",
        )
    if unchanged.value is not None and unchanged.value >= UNCHANGED:
        return found(
            IGNORED,
            f"The adapter is not in effect: {_same(unchanged)} of {unchanged.n} answers in which "
            "the untouched model gives the name are still its own, word for word.",
        )
    if _below(base, REPEATED):
        return found(
            OTHER_RESULT,
            "Another revision or another model is served, or the same one quantised: only "
            f"{_same(base)} of {base.n} answers of the untouched model are those in the report "
            f"(at least {100 * REPEATED:.0f} % is required).",
            "base",
        )
    if _below(rest, REPEATED_ELSEWHERE):
        return found(
            OTHER_RESULT,
            "Another revision or another model is served, or the same one quantised: only "
            f"{_same(rest)} of {rest.n} answers that have nothing to do with the look are those in "
            f"the report (at least {100 * REPEATED_ELSEWHERE:.0f} % is required).",
            "rest",
        )
    if _below(kept, AS_PROMISED):
        return found(
            OTHER_RESULT,
            f"Another result of unlearning answers: only {_same(kept)} of {kept.n} answers that "
            "unlearning changed are those in the report "
            f"(at least {100 * AS_PROMISED:.0f} % is required).",
            "promised",
        )
    if said_forgotten and not forgotten:
        return found(
            OTHER_RESULT, "The report says forgotten, and what is deployed has not forgotten."
        )
    return found(FORGOTTEN if forgotten else REMAINS)


def _place(answer: Answer) -> tuple[str, str | None]:
    return answer.question, answer.picture


def _rate(kept: Sequence[bool], reason: str) -> Rate:
    return Rate.of(sum(kept), len(kept)) if kept else Rate(None, reason=reason)


def _below(rate: Rate, least: float) -> bool:
    return rate.value is not None and rate.value < least


def _same(rate: Rate) -> int:
    return round((rate.value or 0.0) * rate.n)
