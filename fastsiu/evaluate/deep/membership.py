"""Membership inference: does a comparison of the two models tell which concept was unlearned, and
on which picture?

Rank 1 means that whoever has both models can tell the concept: its answers changed most. The
training picture can be told where its answers changed more, or are surer, than answers about other
pictures of the same concept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from ...model import adapter, ask, prefix
from ...model.turns import Encoded, Picture
from ...model.vlm import VLM
from ...text.answers import is_degenerate
from ...text.rate import wilson
from .target import LONGEST, NO_OTHER, Row, Shown, Target, adapted, complete, namings, see

ROWS = 256  # positions whose logits exist at a time
FEW = 2  # other pictures of each name, and of strangers, at most
ONE_PICTURE = (
    "There is only one picture of the concept, so there is none to tell the training picture from."
)
TWO_PICTURES = (
    "There are only two pictures of the concept, so none can stand in for the training picture."
)
NO_NAMES = "No name of anyone else is known, so there is nothing to rank among."

Asked = Sequence[tuple[str, Shown | None]]


def run(loaded: VLM, target: Target) -> list[dict[str, Any]]:
    """Rows of the concept's rank among all known names, and of the AUC of the training picture.

    rank: by the mean KL(untouched || unlearned) over the tokens of the untouched model's answers,
          in words about each name and about pictures (or dreams) of each; 1 changed most. Control:
          the rank of somebody whom no model knows
    AUC:  the training picture is paired with each other picture, question by question. The AUC is
          the share of these pairs in which the training picture has the higher score. There are two
          scores: that KL, and the unlearned model's log-probability of its own answer. Control: the
          second picture in place of the training picture. The interval is Wilson's with one trial
          for each other picture, since the pairs of one picture are not independent

    Null with the reason where no other name or only one picture is known. Raises BadInput without
    an adapter, and where the untouched model does not name the concept.
    """
    adapted(loaded)
    target = complete(loaded, target)
    asked = [naming.question for naming in namings(loaded, target)]
    return [
        row.as_dict()
        for row in (*_concept(loaded, target, asked), *_picture(loaded, target, asked))
    ]


# Which concept ------------------------------------------------------------------------------------


def _concept(loaded: VLM, target: Target, asked: Sequence[str]) -> list[Row]:
    words, concept = target.kind.words, target.concept.name
    setting = "which concept: rank by KL of {}"
    kinds = {
        "facts in words": words["facts"]["held_out"],
        "looks in words": words["appearance"]["held_out"],
    }
    if not target.others:
        return [
            Row.null("mia", setting.format(kind), NO_NAMES)
            for kind in (*kinds, "names in pictures")
        ]
    nobody = next(n for n in words["invented"]["names"] if n not in (concept, *target.others))
    rows = []
    for kind, questions in kinds.items():
        about: dict[str, Asked] = {
            name: [(target.kind.fill(q, name=name), None) for q in questions]
            for name in (concept, nobody, *target.others)
        }
        rows += _ranks(setting.format(kind), _mean_change(loaded, about), concept, nobody)
    pictures: dict[str, list[Shown]] = {
        concept: list(target.tests[:FEW]),
        nobody: list(target.strangers[:FEW]),
    }
    for name, shown in target.other_pictures:
        if len(pictures.setdefault(name, [])) < FEW:
            pictures[name].append(shown)
    if len(pictures) == 2:
        return [*rows, Row.null("mia", setting.format("names in pictures"), NO_OTHER)]
    about = {name: [(q, p) for p in shown for q in asked] for name, shown in pictures.items()}
    return rows + _ranks(
        setting.format("names in pictures"), _mean_change(loaded, about), concept, nobody
    )


def _mean_change(loaded: VLM, about: Mapping[str, Asked]) -> dict[str, float]:
    """By name, the mean KL of its answers, nats per token; names without a usable answer are left
    out."""
    every = [one for asked in about.values() for one in asked]
    found = iter(changes(loaded, every))
    by_name = {
        name: [x for _ in asked if (x := next(found)) is not None] for name, asked in about.items()
    }
    return {name: fmean(values) for name, values in by_name.items() if values}


def _ranks(setting: str, change: Mapping[str, float], concept: str, nobody: str) -> list[Row]:
    others = [x for name, x in change.items() if name not in (concept, nobody)]
    rows = []
    for side, name in (("unlearned", concept), ("control", nobody)):
        if name in change and others:
            rows.append(
                Row(
                    "mia", setting, side, 1 + sum(x > change[name] for x in others), 1 + len(others)
                )
            )
        else:
            rows.append(
                Row.null(
                    "mia",
                    setting,
                    "The untouched model gave no usable answer to these questions.",
                    side,
                )
            )
    return rows


# Which picture ------------------------------------------------------------------------------------


def _picture(loaded: VLM, target: Target, asked: Sequence[str]) -> list[Row]:
    setting = "which picture: AUC by {}"
    kinds = ("KL to the untouched model", "log p of its own answers")
    if len(target.pictures) < 2:
        return [Row.null("mia", setting.format(kind), ONE_PICTURE) for kind in kinds]
    questions = [*asked, *target.kind.words["describe"]["held_out"]]
    pairs: Asked = [(q, p) for p in target.pictures for q in questions]
    rows = []
    for kind, scores in zip(kinds, (changes(loaded, pairs), sureness(loaded, pairs)), strict=True):
        table = [scores[at : at + len(questions)] for at in range(0, len(scores), len(questions))]
        rows.append(_auc(setting.format(kind), "unlearned", table[0], table[1:]))
        if len(table) > 2:
            rows.append(_auc(setting.format(kind), "control", table[1], table[2:]))
        else:
            rows.append(Row.null("mia", setting.format(kind), TWO_PICTURES, "control"))
    return rows


def _auc(
    setting: str, side: str, own: Sequence[float | None], others: Sequence[Sequence[float | None]]
) -> Row:
    """The area under the ROC curve; ties count half.

    own:    a picture's score for each question
    others: the same for each other picture
    """
    wins = [
        (a > b) + 0.5 * (a == b)
        for other in others
        for a, b in zip(own, other, strict=True)
        if a is not None and b is not None
    ]
    if not wins:
        return Row.null("mia", setting, "No answer about these pictures could be scored.", side)
    share = fmean(wins)
    low, high = wilson(share * len(others), len(others))
    return Row("mia", setting, side, share, len(others), low, high)


# Scores -------------------------------------------------------------------------------------------


@torch.no_grad()
def changes(loaded: VLM, asked: Asked) -> list[float | None]:
    """For each question, the mean KL(untouched || unlearned) over the tokens of the untouched
    model's own answer, nats; None where that answer is empty or degenerate."""
    with adapter.teacher(loaded):
        pictures = _seen(loaded, asked)
        said = ask.replies(
            loaded,
            [(q, p) for (q, _), p in zip(asked, pictures, strict=True)],
            max_new_tokens=LONGEST,
        )
        kept = [i for i, reply in enumerate(said) if is_degenerate(reply.text) is None]
        turns = [
            loaded.encode(asked[i][0], said[i].text, pictures[i], said[i].closed) for i in kept
        ]
        before = _states(loaded, turns, [pictures[i] for i in kept])
    after = _states(
        loaded,
        turns,
        [(_seen(loaded, asked) if adapter.sees_anew(loaded) else pictures)[i] for i in kept],
    )
    parts = []
    for at in range(0, len(before), ROWS):
        p, q = (loaded.logits(x[at : at + ROWS]).log_softmax(-1) for x in (before, after))
        parts.append((p.exp() * (p - q)).sum(-1))
    out: list[float | None] = [None] * len(asked)
    if kept:
        for i, kl in zip(
            kept, torch.cat(parts).split([len(turn.labels) for turn in turns]), strict=True
        ):
            out[i] = float(kl.mean())
    return out


@torch.no_grad()
def sureness(loaded: VLM, asked: Asked) -> list[float | None]:
    """For each question, the mean log-probability per token of the model's own answer, nats; None
    where that is degenerate."""
    pictures = _seen(loaded, asked)
    said = ask.replies(
        loaded, [(q, p) for (q, _), p in zip(asked, pictures, strict=True)], max_new_tokens=LONGEST
    )
    kept = [i for i, reply in enumerate(said) if is_degenerate(reply.text) is None]
    turns = [loaded.encode(asked[i][0], said[i].text, pictures[i], said[i].closed) for i in kept]
    out: list[float | None] = [None] * len(asked)
    for i, score in zip(
        kept, ask.label_scores(loaded, turns, [pictures[i] for i in kept]), strict=True
    ):
        out[i] = float(score.log_p.mean())
    return out


def _seen(loaded: VLM, asked: Asked) -> list[Picture | None]:
    """The pictures as the model sees them now, each seen once."""
    each = {id(shown): shown for _, shown in asked if shown is not None}
    found = dict(zip(each, see(loaded, list(each.values())), strict=True))
    return [None if shown is None else found[id(shown)] for _, shown in asked]


def _states(
    loaded: VLM, turns: Sequence[Encoded], pictures: Sequence[Picture | None]
) -> torch.Tensor:
    """[N, D] at all supervised positions."""
    features = [None if p is None else p.features for p in pictures]
    if not turns:
        return loaded.head_weight.new_zeros(0, loaded.head_weight.shape[1])
    run = lambda size: prefix.supervised_states(loaded, turns, features, micro_batch=size)
    return ask.fitting(loaded, run, min(32, len(turns)))
