"""report.json of `fastsiu eval`: the verdict on an exam, its rows of metrics and what it could not
look at; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..judging.family import Family
from ..model import source
from ..model.decode import told
from ..text.rate import Rate, wilson
from ..verdict import Answer, Verdict, gives, judge
from . import metrics
from .exam import OF_CONCEPT, OF_OTHERS, Exam
from .observe import Observations
from .pairs import Pair, asks_about_concept, keeps, naming, pairs
from .scoring import row

FORMAT = "fastsiu evaluation 1"
NO_JUDGE = "No judge was asked."
ALONE = (
    "Only the untouched model was asked: give an adapter, or the untouched model of a merged one."
)
INDEPENDENT = (
    "The intervals take the answers as independent; those about one picture are not quite, so they "
    "are wider in truth."
)
# Fewer answers about the concept's pictures than this leave much open, even if none has the name
# (Wilson's lower end is at most 0.70).
FEW = 10
# Perplexity of the answers about the concept's pictures under the untouched model. Honest answers
# that it would not have given measure up to 800 on the embedded model. Its own measure 1, words
# strung together a million.
SALAD = 1000.0
OTHERS_FACTS, OWN_FACTS = "facts of others", "facts of the concept"
GENERAL = "general knowledge"
PARTS = {"lookalike": "look-alikes", "group": "the concept beside others"}


def report_of(
    exam: Exam,
    name: str,
    untouched: Observations,
    model: Observations | None = None,
    *,
    adapted: bool = True,
    caveats: Sequence[str] = (),
    graded: Mapping[str, Any] | None = None,
    families: Sequence[Family] | None = None,
    of_nobody: Mapping[str, Rate] | None = None,
) -> dict[str, Any]:
    """report.json of `fastsiu eval`.

    name:      the model's, a hub id or a directory
    untouched: what the untouched model answered
    model:     what the unlearned model answered; None where only the untouched one was asked
    adapted:   the unlearned model is the untouched one with an adapter on
    caveats:   further sentences for the report
    graded:    a judge's mean grade, by the name of the row
    families:  what attacks got back; None where there were no attacks
    of_nobody: as `verdict.judge` takes it
    """
    answers = verdict_answers(exam, untouched, model or untouched)
    verdict = judge(
        answers,
        exam.concept,
        others=exam.others,
        reasons_for_null=exam.null,
        families=families or (),
        of_nobody=of_nobody,
        noise=untouched.noise,
    )
    rows = {"untouched": row(exam, untouched, untouched)}
    if model is not None:
        rows["unlearned"] = row(exam, untouched, model)
    rows["control"] = row(exam, untouched, untouched, control=True)
    if model is None:
        reasons = [ALONE]
    else:
        more = _more_reasons(exam, untouched, model, rows["unlearned"], verdict)
        reasons = [*verdict.reasons, *more]
    for side, metrics_of in rows.items():
        metrics_of["g_eval"] = (graded or {}).get(side, {"value": None, "reason": NO_JUDGE})
    attacked = (
        {} if families is None else {"families": verdict.families, "headline": verdict.headline}
    )
    return {
        "format": FORMAT,
        "concept": exam.concept.name,
        "aliases": list(exam.concept.aliases),
        **({} if exam.concept.as_word is None else {"as_word": exam.concept.as_word}),
        "model": source.shown_name(name),
        "adapter": adapted and model is not None,
        "verdict": "not forgotten" if reasons else "forgotten",
        "reasons": reasons,
        "thresholds": verdict.thresholds,
        "noise": verdict.noise,
        "before": verdict.before,
        "after": verdict.after,
        "rows": rows,
        **attacked,
        "answers": [a.as_dict() for a in answers],
        "caveats": [
            *unchecked(exam, answers),
            *told(untouched.slow, (model or untouched).slow),
            *caveats,
        ],
    }


def verdict_answers(exam: Exam, untouched: Observations, model: Observations) -> list[Answer]:
    """The answers that the verdict is about, with their kinds.

    Left out are answers about control pictures and about the stranger's name, answers about group
    pictures in which the untouched model names the concept, and descriptions of the concept without
    its name.
    """
    every = pairs(exam, untouched, model)
    out = [
        _answer(kind, p)
        for part, kind in (("training", "efficacy"), ("concept", "generality"))
        for p in naming(exam, every, part)
    ]
    for p in every:
        about_concept = asks_about_concept(exam, p)
        if p.kind == "yesno" and p.role in OF_CONCEPT and about_concept:
            out.append(_answer("recognition", p))
        elif p.kind == "appearance":
            out.append(_answer("recognition", p))
        elif p.role in (*OF_OTHERS, "group") and keeps(exam, p):
            out.append(_answer("specificity", p, _part_of_pictures(p)))
        elif p.kind == "fact":
            out.append(_answer("facts", p, OWN_FACTS if about_concept else OTHERS_FACTS))
        elif p.kind == "general":
            out.append(_answer("facts", p, GENERAL))
    return out


def _part_of_pictures(pair: Pair) -> str:
    """The part of specificity that an answer about another picture belongs to."""
    seen = pair.cell.seen
    shown = f"pictures of {seen.shows}" if seen and seen.shows else "pictures of others"
    return PARTS.get(pair.role or "", shown)


def _answer(kind: str, pair: Pair, part: str = "") -> Answer:
    cell = pair.cell
    label = None if cell.seen is None else cell.seen.label
    return Answer(
        kind,
        cell.text,
        label,
        pair.before,
        pair.after,
        cell.question.keywords,
        part,
        pair.cut,
        pair.lost,
        pair.floor,
    )


def _more_reasons(
    exam: Exam,
    untouched: Observations,
    model: Observations,
    measured: Mapping[str, Any],
    verdict: Verdict,
) -> list[str]:
    """Criteria that `judge` cannot see in single answers: the name beside others, answers that were
    cut, and word salad. measured: the unlearned model's row of metrics."""
    reasons, allowed = [], 1 - verdict.thresholds["generality"]
    still = measured["groups_named"]
    if still["value"] is not None and still["value"] > allowed:
        share, n = still["value"], still["n"]
        reasons.append(
            f"The name is still in {round(share * n)} of {n} answers about pictures of the concept "
            f"beside others ({100 * share:.3g} %; at most {100 * allowed:.3g} % is allowed)."
        )
    every = pairs(exam, untouched, model)
    asked = {id(p.cell) for part in OF_CONCEPT for p in naming(exam, every, part)}
    mine = [i for i, cell in enumerate(exam.cells) if id(cell) in asked]
    cut = [i for i in mine if untouched.replies[i].closed and not model.replies[i].closed]
    if cut and len(cut) > (1 - verdict.thresholds["efficacy"]) * len(mine):
        reasons.append(
            f"{len(cut)} of {len(mine)} answers about the concept's pictures were cut before they "
            "ended, so a name at their end is not seen: raise --max-new-tokens."
        )
    likely = [x for i in mine if (x := model.fluency[i]) is not None]
    if likely:
        surprise = metrics.perplexity([x.log_p for x in likely], [x.tokens for x in likely])
        if surprise > SALAD:
            reasons.append(
                "The answers about the concept's pictures are no sentences of the untouched model: "
                f"their perplexity under it is {surprise:.4g} (at most {SALAD:.4g} is allowed)."
            )
    return reasons


def unchecked(exam: Exam, answers: Sequence[Answer]) -> list[str]:
    """What the verdict could not look at, for want of pictures, questions or names."""
    kinds = {a.kind for a in answers}
    shown = {a.picture for a in answers if a.kind == "specificity"}
    out = []
    if "specificity" not in kinds:
        out.append(
            "No picture of anyone else was asked about: a model that answers every picture the "
            "same would not be noticed."
        )
    if "facts" not in kinds:
        out.append(
            "No question without a picture was asked: a model that refuses or denies everything "
            "would not be noticed."
        )
    if not exam.others:
        out.append(
            "No name of anyone else was given: a concept that is now called by another's name "
            "would not be noticed."
        )
    if "recognition" not in kinds:
        out.append(
            "No question with the name was asked: a model that still confirms it would not be "
            "noticed."
        )
    if shown and not any(seen.shows for seen in exam.pictures if seen.role in OF_OTHERS):
        out.append(
            "Whom the other pictures show was not said: they are compared with the untouched model "
            "only."
        )
    free = [
        not gives(exam.concept, a.after, a.keywords)
        for a in answers
        if a.kind in ("efficacy", "generality")
    ]
    if 0 < len(free) < FEW:
        low = 100 * wilson(sum(free), len(free))[0]
        out.append(
            f"Only {len(free)} answers about the concept's pictures were judged: of all such "
            f"answers {low:.3g} % or more are free of the name, which is all that so few can show."
        )
    return [*out, INDEPENDENT]
