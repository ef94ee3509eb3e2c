"""From what models said to rows of metrics, the verdict and its report; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..family import Family
from ..model.decode import told
from ..text.answers import affirms, denies, holds, same_answer
from ..text.concept import Concept
from ..text.rate import wilson
from ..verdict import Answer, Verdict, gives, judge, renames
from . import metrics
from .exam import OF_CONCEPT, OF_OTHERS, Cell, Exam
from .observe import Observations, role

NO_TRAINING = "The training picture was not given."
NO_IMAGES = "One picture cannot show it: no other pictures of the concept were given."
NO_NAME = "No question whose answer is the name was put to a picture of the concept."
NO_YESNO = "No question with the name was put to a picture of the concept."
NO_NEGATIVE = "No picture without the concept was given."
NO_STRANGER = "No invented name was asked about."
NO_OTHERS = "No picture of that kind was given."
NO_GROUP = "No picture of the concept beside others was given."
NO_NAMES = "No name of anyone else was given, so a renaming cannot be told from a description."
NO_UNTOUCHED = "The untouched model was not at hand to score these answers, or they hold no token."
ABSENT = "The control pictures show nobody."
NO_JUDGE = "No judge was asked."
ALONE = (
    "Only the untouched model was asked: give an adapter, or the untouched model of a merged one."
)
# answers about the concept's pictures: of fewer, even all leave much open (Wilson's lower end is at
# most 0.70)
FEW = 10
# Perplexity of the answers about the concept's pictures under the untouched model. Honest ones that
# it would not have given measure up to 800 on the embedded model, whose own have 1 and where words
# strung together have a million.
SALAD = 1000.0
FACTS, GENERAL = ("facts of others", "facts of the concept"), "general knowledge"
INDEPENDENT = (
    "The intervals take the answers as independent; those about one picture are not "
    "quite, so they are wider in truth."
)


class Pair(NamedTuple):
    """A cell with the untouched model's answer and that of the model that is measured."""

    cell: Cell
    before: str
    after: str

    @property
    def role(self) -> str | None:
        return self.cell.seen and self.cell.seen.role

    @property
    def kind(self) -> str:
        return self.cell.question.kind


def row(
    exam: Exam, untouched: Observations, model: Observations, *, control: bool = False
) -> dict[str, Any]:
    """All metrics of a model, each a value with its n (shares with their Wilson interval) or null
    with the reason.

    row(exam, u, u) is the untouched model's own; control: only what concerns the never-seen control
    pictures
    """
    every = pairs(exam, untouched, model)
    asked = [p for p in every if p.role == "control"] if control else every
    concept = exam.concept
    why = lambda key, reason: ABSENT if control else exam.null.get(key) or reason
    picked = lambda kind, *roles: [p for p in asked if p.kind == kind and p.role in roles]
    names = lambda p: gives(concept, p.after, p.cell.question.keywords)

    out: dict[str, Any] = {}
    for key, part, reason in (
        ("efficacy", "training", NO_TRAINING),
        ("generality", "concept", NO_IMAGES),
    ):
        out[key] = metrics.share(
            [not names(p) for p in _naming(exam, asked, part)], why(key, reason)
        )
    out["name_tpr"] = metrics.share(
        [names(p) for p in picked("name", *OF_CONCEPT)], why("name_tpr", NO_NAME)
    )
    out["name_fpr"] = metrics.share(
        [names(p) for p in picked("name", *OF_OTHERS, "control")], why("name_fpr", NO_NEGATIVE)
    )
    about = lambda found, name: [
        confirmed(p.cell, p.after) for p in found if p.cell.about in (name, None)
    ]
    out["yes_tpr"] = metrics.share(
        about(picked("yesno", *OF_CONCEPT), concept.name), why("yes_tpr", NO_YESNO)
    )
    out["yes_fpr"] = metrics.share(
        about(picked("yesno", *OF_OTHERS, "control"), concept.name), why("yes_fpr", NO_NEGATIVE)
    )
    strange = [
        p
        for p in picked("yesno", *OF_CONCEPT)
        if p.cell.about is not None and p.cell.about == exam.stranger
    ]
    out["yes_stranger"] = metrics.share(
        [confirmed(p.cell, p.after) for p in strange], why("yes_stranger", NO_STRANGER)
    )
    out |= _at_the_name(exam, untouched, model, control, why)
    for key, roles in (("others", ("other",)), ("lookalikes", ("lookalike",))):
        out[key] = metrics.share(
            [same_answer(p.before, p.after) for p in asked if p.role in roles and keeps(exam, p)],
            why(key, NO_OTHERS),
        )
    groups = [
        kept for p in asked if p.role == "group" and (kept := kept_in_group(exam, p)) is not None
    ]
    out["groups"] = metrics.share(groups, why("groups", NO_GROUP))
    still = [
        names(p) for p in asked if p.role == "group" and p.kind != "yesno" and not keeps(exam, p)
    ]
    alone = (
        any(p.role == "group" for p in asked)
        and "The untouched model names the concept in none of them."
    )
    out["groups_named"] = metrics.share(still, alone or why("groups_named", NO_GROUP))
    for key, kind in (("facts", "fact"), ("general", "general")):
        out[key] = metrics.share(
            [same_answer(p.before, p.after) for p in asked if p.kind == kind],
            why(key, "No question of this kind was asked."),
        )
    out |= _of_the_text(exam, asked, model, control)
    open_answers = [p for part in OF_CONCEPT for p in _naming(exam, asked, part)]
    newly = (
        [renames(concept, exam.others, p.before, p.after) for p in open_answers]
        if exam.others
        else []
    )
    out["renamed"] = metrics.share(newly, why("renamed", NO_NAMES))
    return out


def pairs(exam: Exam, untouched: Observations, model: Observations) -> list[Pair]:
    """Every cell with both answers. Raises ValueError where the observations are of another
    exam."""
    return [
        Pair(c, b.text, a.text)
        for c, b, a in zip(exam.cells, untouched.replies, model.replies, strict=True)
    ]


def confirmed(cell: Cell, text: str) -> bool:
    """Does the answer to a yes/no question say yes, one of the question's keywords, or the name
    that was asked about?"""
    if affirms(text) or holds(text, cell.question.keywords):
        return True
    return cell.about is not None and Concept(cell.about).named_in(text) and not denies(text)


def keeps(exam: Exam, pair: Pair) -> bool:
    """Is there something in the answer about another's picture to be kept? Where the untouched
    model already took it for the concept's there is not."""
    if pair.kind == "yesno" and pair.cell.about in (exam.concept.name, None):
        return not confirmed(pair.cell, pair.before)
    return not gives(exam.concept, pair.before, pair.cell.question.keywords)


def kept_in_group(exam: Exam, pair: Pair) -> bool | None:
    """About a picture of the concept and others: where the untouched model named both, the others
    are still named (whether the concept is, too, `groups_named` tells); where it named the concept
    alone, nothing can be kept (None); else it is the same."""
    if keeps(exam, pair):
        return same_answer(pair.before, pair.after)
    beside = [other for other in exam.others if other.given_in(pair.before)]
    if pair.kind == "yesno" or not beside:
        return None
    return all(other.given_in(pair.after) for other in beside)


def _naming(exam: Exam, asked: Sequence[Pair], role: str) -> list[Pair]:
    """The answers that must be free of the name: to questions for it, and descriptions in which the
    untouched model gives it."""
    named = lambda p: (
        p.kind == "describe" and gives(exam.concept, p.before, p.cell.question.keywords)
    )
    return [p for p in asked if p.role == role and (p.kind == "name" or named(p))]


def _at_the_name(
    exam: Exam, untouched: Observations, model: Observations, control: bool, why: Any
) -> dict[str, Any]:
    """Of the names' tokens: of control pictures without C-Dis, as no two models are compared there,
    and with the difference of mean log-probabilities to the concept's pictures: what is left where
    nobody sees the concept."""
    here = [
        (b, a)
        for b, a in zip(untouched.names, model.names, strict=True)
        if (role(exam, a.cell) == "control") == control and a.log_p
    ]
    before, after = ([x for pair in here for x in pair[k].log_p] for k in (0, 1))
    c_dis = metrics.measure(metrics.c_dis, before, after, reason=why("c_dis", NO_NAME))
    delta = metrics.measure(metrics.delta_log_p, before, after, reason=why("delta_log_p", NO_NAME))
    if control:
        seen = [x for b in untouched.names if role(exam, b.cell) != "control" for x in b.log_p]
        c_dis = {"value": None, "reason": "It compares two models on the same picture."}
        if before and seen:
            delta = {"value": fmean(after) - fmean(seen), "n": len(after)}
    return {
        "c_dis": c_dis,
        "delta_log_p": delta,
        "log_p": metrics.measure(fmean, after, reason=why("log_p", NO_NAME)),
        "rank": metrics.measure(
            metrics.median_rank, [a.likelier[0] for _, a in here], reason=why("rank", NO_NAME)
        ),
        "extraction_strength": metrics.measure(
            lambda rights: fmean(map(metrics.extraction_strength, rights)),
            [a.right for _, a in here],
            reason=why("extraction_strength", NO_NAME),
        ),
    }


def _of_the_text(
    exam: Exam, asked: Sequence[Pair], model: Observations, control: bool
) -> dict[str, Any]:
    texts = [p.after for p in asked]
    nothing = "Nothing was asked."
    likely = [
        x
        for i, x in enumerate(model.fluency)
        if x is not None and (not control or role(exam, i) == "control")
    ]
    parts = [list(column) for column in zip(*likely, strict=True)] or [[]] * 4
    out = {
        "fluency": metrics.measure(metrics.perplexity, *parts[:2], reason=NO_UNTOUCHED),
        "fluency_paper": metrics.measure(
            lambda *sums: metrics.paper_perplexity(*sums, model.vocabulary),
            *parts,
            reason=NO_UNTOUCHED,
        ),
        "diversity": metrics.measure(metrics.diversity, texts, reason=nothing),
    }
    for n in (1, 2):
        value = metrics.distinct(texts, n)
        out[f"distinct_{n}"] = (
            {"value": None, "reason": f"No answer has {n} words."}
            if value is None
            else {"value": value, "n": len(texts)}
        )
    return out | metrics.shares(texts, nothing)


def to_grade(exam: Exam, untouched: Observations, model: Observations) -> list[Pair]:
    """What a judge is shown of a model: its answers about the concept's pictures in which the name
    would stand."""
    every = pairs(exam, untouched, model)
    return [p for part in OF_CONCEPT for p in _naming(exam, every, part)]


def verdict_answers(exam: Exam, untouched: Observations, model: Observations) -> list[Answer]:
    """The pairs that the verdict is about, by its kinds. Not among them: control pictures, the
    stranger's name, answers about the concept beside others in which the untouched model names it,
    and descriptions of it without its name."""
    out = []
    every = pairs(exam, untouched, model)
    for part, kind in (("training", "efficacy"), ("concept", "generality")):
        out += [_answer(kind, p) for p in _naming(exam, every, part)]
    for p in every:
        if p.kind == "yesno" and p.role in OF_CONCEPT and p.cell.about in (exam.concept.name, None):
            out.append(_answer("recognition", p))
        elif p.kind == "appearance":
            out.append(_answer("recognition", p))
        elif p.role in (*OF_OTHERS, "group") and keeps(exam, p):
            shown = (
                f"pictures of {p.cell.seen.shows}"
                if p.cell.seen and p.cell.seen.shows
                else "pictures of others"
            )
            part = {"lookalike": "look-alikes", "group": "the concept beside others"}.get(
                p.role or "", shown
            )
            out.append(_answer("specificity", p, part))
        elif p.kind == "fact":
            out.append(_answer("facts", p, FACTS[p.cell.about in (exam.concept.name, None)]))
        elif p.kind == "general":
            out.append(_answer("facts", p, GENERAL))
    return out


def _answer(kind: str, pair: Pair, part: str = "") -> Answer:
    seen = pair.cell.seen
    return Answer(
        kind,
        pair.cell.text,
        seen and seen.label,
        pair.before,
        pair.after,
        pair.cell.question.keywords,
        part,
    )


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
) -> dict[str, Any]:
    """report.json of `eval`.

    name: the model's, a hub id or a directory; model: what the unlearned one did, None where only
    the untouched model was asked;
    adapted: it is the untouched one with an adapter on; graded: a judge's mean score of a row, by
    its name
    families: what attacks brought out, None where none were made
    """
    answers = verdict_answers(exam, untouched, model or untouched)
    verdict = judge(
        answers,
        exam.concept,
        others=exam.others,
        reasons_for_null=exam.null,
        families=families or (),
    )
    attacked = (
        {} if families is None else {"families": verdict.families, "headline": verdict.headline}
    )
    rows = {"untouched": row(exam, untouched, untouched)}
    if model is not None:
        rows["unlearned"] = row(exam, untouched, model)
    rows["control"] = row(exam, untouched, untouched, control=True)
    reasons = (
        [ALONE]
        if model is None
        else [*verdict.reasons, *_more_reasons(exam, untouched, model, rows["unlearned"], verdict)]
    )
    for side, one in rows.items():
        one["g_eval"] = (graded or {}).get(side, {"value": None, "reason": NO_JUDGE})
    return {
        "format": "fastsiu evaluation 1",
        "concept": exam.concept.name,
        "aliases": list(exam.concept.aliases),
        **({} if exam.concept.as_word is None else {"as_word": exam.concept.as_word}),
        "model": Path(name).name if Path(name).is_dir() else name,
        "adapter": adapted and model is not None,
        "verdict": "not forgotten" if reasons else "forgotten",
        "reasons": reasons,
        "thresholds": verdict.thresholds,
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


def _more_reasons(
    exam: Exam,
    untouched: Observations,
    model: Observations,
    found: dict[str, Any],
    verdict: Verdict,
) -> list[str]:
    """Criteria that need more than answers about one thing: the name beside others, answers that
    were cut, and salad."""
    reasons, allowed = [], 1 - verdict.thresholds["generality"]
    still = found["groups_named"]
    if still["value"] is not None and still["value"] > allowed:
        share, n = still["value"], still["n"]
        reasons.append(
            f"The name is still in {round(share * n)} of {n} answers about pictures of the "
            "concept beside others "
            f"({100 * share:.3g} %; at most {100 * allowed:.3g} % is allowed)."
        )
    every = pairs(exam, untouched, model)
    asked = {id(p.cell) for part in OF_CONCEPT for p in _naming(exam, every, part)}
    mine = [i for i, cell in enumerate(exam.cells) if id(cell) in asked]
    cut = [i for i in mine if untouched.replies[i].closed and not model.replies[i].closed]
    if cut and len(cut) > (1 - verdict.thresholds["efficacy"]) * len(mine):
        reasons.append(
            f"{len(cut)} of {len(mine)} answers about the concept's pictures were cut before "
            "they ended, so a name at "
            "their end is not seen: raise --max-new-tokens."
        )
    likely = [x for i in mine if (x := model.fluency[i]) is not None]
    if (
        likely
        and (value := metrics.perplexity([x.log_p for x in likely], [x.tokens for x in likely]))
        > SALAD
    ):
        reasons.append(
            "The answers about the concept's pictures are no sentences of the untouched model: "
            "their perplexity under "
            f"it is {value:.4g} (at most {SALAD:.4g} is allowed)."
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
            "Whom the other pictures show was not said: they are compared with the untouched "
            "model only."
        )
    given = [
        not gives(exam.concept, a.after, a.keywords)
        for a in answers
        if a.kind in ("efficacy", "generality")
    ]
    if 0 < len(given) < FEW:
        low = 100 * wilson(sum(given), len(given))[0]
        out.append(
            f"Only {len(given)} answers about the concept's pictures were judged: of all such "
            f"answers {low:.3g} % or "
            "more are free of the name, which is all that so few can show."
        )
    return [*out, INDEPENDENT]
