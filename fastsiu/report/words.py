"""What the report calls things: every measure and metric in plain language, and what no measurement
here can show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# kind -> (heading, what a full bar means, the question in words)
MEASURES = {
    "efficacy": (
        "The training picture",
        "answers without the name",
        "Is the name gone for it, cropped, turned or blurred?",
    ),
    "generality": (
        "Other pictures of it",
        "answers without the name",
        "Is the name gone for pictures not used in training?",
    ),
    "recognition": (
        "Questions that hold the name",
        "answers that confirm nothing",
        "Is its look denied when asked by name?",
    ),
    "specificity": (
        "Pictures of anything else",
        "answers unchanged",
        "Does the model answer about other pictures as before?",
    ),
    "facts": (
        "Questions without a picture",
        "answers unchanged",
        "Does the model still know in words what it knew?",
    ),
}
# What gives a family of questions away -> what is counted, in the table's words.
GIVEN_AWAY = {
    "name": "answers that give the name",
    "yes": "answers that confirm it",
    "initials": "answers that give them",
    "facts": "answers that tell a fact or the name",
    "rank": "answers in which its own name is the likeliest",
    "likelihood": "pairs in which the name is the likelier answer about its picture",
}
REMAINS = (
    "What remains in any case: the adapter can be dropped or scaled, and true pictures "
    "teach the model again."
)
REMAINS_MERGED = "What remains in any case: true pictures teach the model again."
GONE, KEPT = ("efficacy", "generality", "recognition"), ("specificity", "facts")
CONCEPT = "the concept"  # where it has no name, or none that may be told
LIMITS = (
    "The adapter can be dropped; only merged weights forget.",
    "This is a technical measurement on the questions listed here. It is no statement of legal "
    "compliance.",
    "Other wordings, other pictures and further training may bring the name back.",
)


def standing(report: Mapping[str, Any]) -> str:
    """The verdict in one sentence that says no more than was asked; "" where nothing was
    unlearned."""
    verdict = report.get("verdict")
    if verdict not in ("forgotten", "not forgotten"):
        return ""
    asked = [one for one in report.get("families") or [] if one.get("applicable")]
    failed = sum(bool(one.get("failed")) for one in asked)
    more = ((report.get("after") or {}).get("generality") or {}).get("value") is not None
    where = (
        "this picture, its transforms and other pictures of it"
        if more
        else "this picture and its transforms"
    )
    families = "1 family of questions" if len(asked) == 1 else f"{len(asked)} families of questions"
    if verdict == "forgotten" and asked:
        return f"Forgotten: in {families} on {where} the model answers as it does about strangers."
    if verdict == "forgotten":
        return (
            "Forgotten as far as it was asked, in the questions below; nothing tried to get "
            "it back in other ways."
        )
    if failed:
        return (
            f"Not forgotten: in {failed} of {families} on {where} the model tells more than "
            "it does about strangers."
        )
    return "Not forgotten: see the reasons."


def attacked(report: Mapping[str, Any]) -> str:
    """What the families of questions came to, in a few words; of a report or of a merged model's
    form."""
    asked = [one for one in report.get("families") or [] if one.get("applicable")]
    if not asked:
        return "asked in other ways: nothing"
    failed = [str(one.get("family")) for one in asked if one.get("failed")]
    told = f"{len(failed)} of {len(asked)} families tell more than of strangers"
    return f"asked in other ways: {told}{': ' if failed else ''}{', '.join(failed)}"


# What looks inside the model (`evaluate.deep`) -> what it does.
INSIDE = {
    "probe": "its states are read",
    "mia": "the two models are compared",
    "relearn": "it is trained again",
    "weights": "its weights are weakened and rounded",
    "gradient": "inputs are optimised against it",
}


@dataclass(frozen=True)
class Inside:
    """One attack in one setting. cells: for each side ("untouched", "unlearned", "control") its
    value in words, "" where there is none; reason: why the unlearned model has none"""

    attack: str
    setting: str
    cells: dict[str, str]
    reason: str = ""


def inside(report: Mapping[str, Any], brief: bool = False) -> list[Inside]:
    """The rows of report.json's `inside`, the sides of one setting together. A control's suffix
    ("...: unseen face, same name") is a setting of its own. brief: of a series of steps of training
    only how many it takes"""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for one in report.get("inside") or []:
        found.setdefault((str(one["attack"]), str(one["setting"])), {})[str(one["side"])] = one
    out = []
    for (attack, setting), sides_of in found.items():
        if brief and attack == "relearn" and re.match(r"\d+ pictures?, .*\d steps?(:|$)", setting):
            continue
        cells = {
            side: _inside_value(sides_of.get(side), setting)
            for side in ("untouched", "unlearned", "control")
        }
        out.append(
            Inside(
                attack, setting, cells, str((sides_of.get("unlearned") or {}).get("reason") or "")
            )
        )
    return out


def _inside_value(one: Mapping[str, Any] | None, setting: str) -> str:
    """A share in per cent; a rank, a number of steps and an AUC as they are."""
    if one is None or one.get("value") is None:
        return "" if one is None else "none"
    share = one.get("low") is not None and "AUC" not in setting
    return f"{100 * one['value']:.0f} %" if share else f"{one['value']:.3g}"


@dataclass(frozen=True)
class Metric:
    """For someone who has never heard of it: what it is called, which direction is good, what it
    is.

    share: a part of a whole, shown in per cent
    """

    heading: str
    good: str
    meaning: str
    share: bool = True


UP, DOWN, SAME = "Higher is better.", "Lower is better.", "Good: close to the untouched model."
CONTROL = "Good: as low as the control."
METRICS = {
    "Is the name gone?": {
        "efficacy": Metric(
            "Name gone: training picture",
            UP,
            "Of the answers about the picture that was trained on, those without the name.",
        ),
        "generality": Metric(
            "Name gone: other pictures",
            UP,
            "Of the answers about pictures of it that were not trained on, those without the name.",
        ),
        "name_tpr": Metric(
            "Names it where it is shown",
            DOWN,
            "Asked who this is: of the answers about its own pictures, those that give the name.",
        ),
        "name_fpr": Metric(
            "Names it where it is not",
            DOWN,
            "Asked who this is: of the answers about pictures of others, those that give its name.",
        ),
        "yes_tpr": Metric(
            "Says yes where it is shown",
            DOWN,
            "Asked whether this is the one named: of the answers about its own pictures, those "
            "that say yes.",
        ),
        "yes_fpr": Metric(
            "Says yes where it is not",
            DOWN,
            "Asked whether this is the one named: of the answers about pictures of others, those "
            "that say yes.",
        ),
        "yes_stranger": Metric(
            "Says yes to an invented name",
            DOWN,
            "Asked whether this is someone who does not exist: of the answers about its own "
            "pictures, those that say yes.",
        ),
        "groups_named": Metric(
            "Names it in group pictures",
            DOWN,
            "Of the answers about pictures that show it beside others, those that still give the "
            "name.",
        ),
        "renamed": Metric(
            "Given another's name",
            DOWN,
            "Of the answers about its pictures, those that now give the name of someone else: a "
            "confusion, not a "
            "forgetting.",
        ),
    },
    "Is it gone below the surface, too?": {
        "c_dis": Metric(
            "Distance at the name (C-Dis)",
            UP,
            "How far the model's expectation of the name has moved away from the untouched "
            "model's. 0: not at all.",
            share=False,
        ),
        "delta_log_p": Metric(
            "Change of the name's probability",
            "Good: as far below 0 as the control.",
            "Natural logarithm of the name's probability, less the untouched model's for its own "
            "pictures: -2.3 is ten times "
            "less likely.",
            share=False,
        ),
        "log_p": Metric(
            "The name's probability",
            CONTROL,
            "Natural logarithm of the probability that the model gives to the name where it "
            "stood. 0: it is certain.",
            share=False,
        ),
        "rank": Metric(
            "Rank of the name",
            "Good: as far back as the control.",
            "Place of the name among all that the model might say where it stood, in the middle "
            "case. 1: its first choice.",
            share=False,
        ),
        "extraction_strength": Metric(
            "Extraction strength",
            DOWN,
            "How much of the name the model completes by itself when given its beginning. 0: "
            "nothing.",
        ),
    },
    "What does a judge say?": {
        "g_eval": Metric(
            "Grade by a judge (G-Eval)",
            DOWN,
            "A language model grades how much each answer about its pictures gives away, from 1 "
            "(nothing) to 5 (right and in "
            "detail); on average.",
            share=False,
        ),
    },
    "Is everything else kept?": {
        "others": Metric(
            "Pictures of others",
            UP,
            "Of the answers about pictures of others, those that are the untouched model's.",
        ),
        "lookalikes": Metric(
            "Look-alikes",
            UP,
            "Of the answers about those that look most like it, those that are the untouched "
            "model's.",
        ),
        "groups": Metric(
            "Group pictures",
            UP,
            "Of the answers about pictures that show it beside something else, those that are "
            "the untouched model's.",
        ),
        "facts": Metric(
            "Facts in words",
            UP,
            "Of the answers without a picture about what is known of it and of others, those "
            "that are the untouched "
            "model's.",
        ),
        "general": Metric(
            "General questions",
            UP,
            "Of the answers to questions about nobody, those that are the untouched model's.",
        ),
    },
    "Does it still answer properly?": {
        "fluency": Metric(
            "Fluency (perplexity)",
            SAME,
            "How surprised the untouched model is by the answers. 1: not at all.",
            share=False,
        ),
        "fluency_paper": Metric(
            "Fluency, as published",
            SAME,
            "Perplexity of the answers, with the name's own words counted as pure chance.",
            share=False,
        ),
        "diversity": Metric(
            "Different words",
            SAME,
            "Of the words of an answer, those that are different ones; on average.",
        ),
        "distinct_1": Metric(
            "Different words overall",
            SAME,
            "Of the words of all answers, those that are different ones.",
        ),
        "distinct_2": Metric(
            "Different pairs overall",
            SAME,
            "Of the pairs of neighbouring words, those that are different ones.",
        ),
        "refusals": Metric(
            "Refusals",
            SAME,
            "Of all answers, those that decline to answer.",
        ),
        "empty": Metric(
            "Empty answers",
            DOWN,
            "Of all answers, those with nothing in them.",
        ),
        "gibberish": Metric(
            "Gibberish",
            DOWN,
            "Of all answers, those that are no language.",
        ),
        "repetition": Metric(
            "Repetition",
            DOWN,
            "Of all answers, those that repeat themselves without end.",
        ),
    },
}
ROWS = {  # of an evaluation: heading, what it is
    "untouched": ("Untouched", "the model before"),
    "unlearned": ("Unlearned", "the model after"),
    "control": ("Control", "of what no model has seen"),
}
PLACES = {  # in the forget/retain plot: what a point stands for
    "untouched": "Untouched model",
    "unlearned": "Unlearned model",
    "control": "Control, never seen by the model",
}
