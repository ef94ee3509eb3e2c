"""One row of metrics: from what two models answered to values with their n and their interval;
pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..verdict import renames
from . import metrics
from .exam import OF_CONCEPT, OF_OTHERS, Exam
from .observe import Observations, role
from .pairs import Pair, confirmed, keeps, kept_in_group, names_it, naming, pairs

NO_TRAINING = "The training picture was not given."
NO_IMAGES = "One picture cannot show it: no other pictures of the concept were given."
NO_NAME = "No question whose answer is the name was put to a picture of the concept."
NO_YESNO = "No question with the name was put to a picture of the concept."
NO_NEGATIVE = "No picture without the concept was given."
NO_STRANGER = "No invented name was asked about."
NO_OTHERS = "No picture of that kind was given."
NO_GROUP = "No picture of the concept beside others was given."
NO_GROUP_NAMED = "The untouched model names the concept in none of them."
NO_KIND = "No question of this kind was asked."
NO_NAMES = "No name of anyone else was given, so a renaming cannot be told from a description."
NO_UNTOUCHED = "The untouched model was not at hand to score these answers, or they hold no token."
ABSENT = "The control pictures show nobody."

Metrics = dict[str, Any]  # metric -> {"value", "n", ...} or {"value": None, "reason"}


@dataclass(frozen=True)
class _Row:
    """What one row is about.

    pairs:   the answers that count
    control: they are about the never-seen control pictures only
    """

    exam: Exam
    pairs: Sequence[Pair]
    control: bool

    def why(self, metric: str, reason: str) -> str:
        """The reason for a metric without a value; the exam may know a better one."""
        return ABSENT if self.control else self.exam.null.get(metric) or reason

    def about(self, kind: str, *roles: str) -> list[Pair]:
        return [p for p in self.pairs if p.kind == kind and p.role in roles]

    def named(self, picked: Sequence[Pair]) -> list[bool]:
        return [names_it(self.exam, p) for p in picked]


def row(
    exam: Exam, untouched: Observations, model: Observations, *, control: bool = False
) -> Metrics:
    """All metrics of a model, each a value with its n (shares with their Wilson interval) or null
    with the reason.

    untouched: what the untouched model answered; row(exam, u, u) is the untouched model's own row
    control:   only what concerns the never-seen control pictures

    Raises ValueError where the observations are of another exam.
    """
    every = pairs(exam, untouched, model)
    asked = _Row(exam, [p for p in every if p.role == "control"] if control else every, control)
    return {
        **_named(asked),
        **_confirmed(asked),
        **_at_the_name(asked, untouched, model),
        **_kept(asked),
        **_of_the_text(asked, model),
        **_renamed(asked),
    }


def _named(asked: _Row) -> Metrics:
    out = {}
    for metric, part, reason in (
        ("efficacy", "training", NO_TRAINING),
        ("generality", "concept", NO_IMAGES),
    ):
        named = asked.named(naming(asked.exam, asked.pairs, part))
        out[metric] = metrics.share([not is_named for is_named in named], asked.why(metric, reason))
    for metric, roles, reason in (
        ("name_tpr", OF_CONCEPT, NO_NAME),
        ("name_fpr", (*OF_OTHERS, "control"), NO_NEGATIVE),
    ):
        named = asked.named(asked.about("name", *roles))
        out[metric] = metrics.share(named, asked.why(metric, reason))
    return out


def _confirmed(asked: _Row) -> Metrics:
    """The shares of a yes: about the concept by its name, about others by its name, and about the
    concept by a name that nobody bears."""
    own, stranger = asked.exam.concept.name, asked.exam.stranger
    mine = asked.about("yesno", *OF_CONCEPT)
    others = asked.about("yesno", *OF_OTHERS, "control")
    picked = {
        "yes_tpr": [p for p in mine if p.cell.about in (own, None)],
        "yes_fpr": [p for p in others if p.cell.about in (own, None)],
        "yes_stranger": [p for p in mine if p.cell.about is not None and p.cell.about == stranger],
    }
    reasons = {"yes_tpr": NO_YESNO, "yes_fpr": NO_NEGATIVE, "yes_stranger": NO_STRANGER}
    return {
        metric: metrics.share(
            [confirmed(p.cell, p.after) for p in some], asked.why(metric, reasons[metric])
        )
        for metric, some in picked.items()
    }


def _at_the_name(asked: _Row, untouched: Observations, model: Observations) -> Metrics:
    """What the probabilities of the name's tokens tell.

    A control row has no C-Dis, since no two models are compared there. Its change of
    log-probability is the distance to the concept's own pictures: what is left of the name where
    nobody sees the concept.
    """
    exam, control = asked.exam, asked.control
    here = [
        (b, a)
        for b, a in zip(untouched.names, model.names, strict=True)
        if (role(exam, a.cell) == "control") == control and a.log_p
    ]
    before = [x for b, _ in here for x in b.log_p]
    after = [x for _, a in here for x in a.log_p]
    c_dis = metrics.measure(metrics.c_dis, before, after, reason=asked.why("c_dis", NO_NAME))
    delta = metrics.measure(
        metrics.delta_log_p, before, after, reason=asked.why("delta_log_p", NO_NAME)
    )
    if control:
        seen = [x for b in untouched.names if role(exam, b.cell) != "control" for x in b.log_p]
        c_dis = {"value": None, "reason": "It compares two models on the same picture."}
        if before and seen:
            delta = {"value": fmean(after) - fmean(seen), "n": len(after)}

    def mean_strength(rights: Sequence[Sequence[bool]]) -> float:
        return fmean(map(metrics.extraction_strength, rights))

    ranks, rights = [a.likelier[0] for _, a in here], [a.right for _, a in here]
    return {
        "c_dis": c_dis,
        "delta_log_p": delta,
        "log_p": metrics.measure(fmean, after, reason=asked.why("log_p", NO_NAME)),
        "rank": metrics.measure(metrics.median_rank, ranks, reason=asked.why("rank", NO_NAME)),
        "extraction_strength": metrics.measure(
            mean_strength, rights, reason=asked.why("extraction_strength", NO_NAME)
        ),
    }


def _kept(asked: _Row) -> Metrics:
    """The shares of the answers about anything else that are the untouched model's, by the
    verdict's own rule (`judging.kept.kept`)."""
    out, exam = {}, asked.exam
    for metric, part in (("others", "other"), ("lookalikes", "lookalike")):
        same = [p.kept for p in asked.pairs if p.role == part and keeps(exam, p)]
        out[metric] = metrics.share(same, asked.why(metric, NO_OTHERS))
    groups = [p for p in asked.pairs if p.role == "group"]
    kept = [one for p in groups if (one := kept_in_group(exam, p)) is not None]
    out["groups"] = metrics.share(kept, asked.why("groups", NO_GROUP))
    still = asked.named([p for p in groups if p.kind != "yesno" and not keeps(exam, p)])
    out["groups_named"] = metrics.share(
        still, NO_GROUP_NAMED if groups else asked.why("groups_named", NO_GROUP)
    )
    for metric, kind in (("facts", "fact"), ("general", "general")):
        same = [p.kept for p in asked.pairs if p.kind == kind]
        out[metric] = metrics.share(same, asked.why(metric, NO_KIND))
    return out


def _of_the_text(asked: _Row, model: Observations) -> Metrics:
    """Whether the answers are proper text: perplexity, different words, refusals."""
    texts = [p.after for p in asked.pairs]
    nothing = "Nothing was asked."
    likely = [
        x
        for i, x in enumerate(model.fluency)
        if x is not None and (not asked.control or role(asked.exam, i) == "control")
    ]
    log_p, tokens = [x.log_p for x in likely], [x.tokens for x in likely]
    name_log_p, name_tokens = [x.name_log_p for x in likely], [x.name_tokens for x in likely]

    out = {
        "fluency": metrics.measure(metrics.perplexity, log_p, tokens, reason=NO_UNTOUCHED),
        "fluency_paper": metrics.measure(
            _paper_perplexity(model.vocabulary),
            log_p,
            tokens,
            name_log_p,
            name_tokens,
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


def _paper_perplexity(vocabulary: int) -> Callable[..., float]:
    """`metrics.paper_perplexity` for one size of vocabulary."""

    def measured(
        log_p: Sequence[float],
        tokens: Sequence[int],
        name_log_p: Sequence[float],
        name_tokens: Sequence[int],
    ) -> float:
        return metrics.paper_perplexity(log_p, tokens, name_log_p, name_tokens, vocabulary)

    return measured


def _renamed(asked: _Row) -> Metrics:
    exam = asked.exam
    open_answers = [p for part in OF_CONCEPT for p in naming(exam, asked.pairs, part)]
    if not exam.others:
        open_answers = []  # without other names nothing can be a renaming
    newly = [renames(exam.concept, exam.others, p.before, p.after) for p in open_answers]
    return {"renamed": metrics.share(newly, asked.why("renamed", NO_NAMES))}
