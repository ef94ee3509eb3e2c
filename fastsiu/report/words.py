"""The words of the report: every measure and metric in plain language, and what no measurement here
can show. Data only."""

from __future__ import annotations

from dataclasses import dataclass

# Kind of answers -> (heading, what a full bar means, the question in words).
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
        "answers kept",
        "Does the model answer about other pictures as before?",
    ),
    "facts": (
        "Questions without a picture",
        "answers kept",
        "Does the model still know in words what it knew?",
    ),
}
# How the noise floor of what is kept was made (`evaluate.noise`) -> what it is.
NOISE = {
    "rounded": "the untouched model computed in bfloat16",
    "reordered": "the untouched model asked in another order",
    "": "",  # not measured
}
KEPT_MEANS = (
    "Kept is an answer with the same first sentence, and one where the unlearned model turns away "
    "from that sentence by no more than {lost:.3g} nats, as at a near-tie."
)
# What a family of questions seeks -> what is counted, in the table's words.
GIVEN_AWAY = {
    "name": "answers that give the name",
    "yes": "answers that confirm it",
    "initials": "answers that give them",
    "facts": "answers that tell a fact or the name",
    "rank": "answers in which its own name is the likeliest",
    "likelihood": "pairs in which the name is the likelier answer about its picture",
}
REMAINS = (
    "What remains in any case: the adapter can be dropped or scaled, and true pictures teach the "
    "model again."
)
REMAINS_MERGED = "What remains in any case: true pictures teach the model again."
GONE, KEPT = ("efficacy", "generality", "recognition"), ("specificity", "facts")
CONCEPT = "the concept"  # where a report has no name for it, or may not tell it
LIMITS = (
    "The adapter can be dropped; only merged weights forget.",
    "This is a technical measurement on the questions listed here. It is no statement of legal "
    "compliance.",
    "Other wordings, other pictures and further training may bring the name back.",
)


# Attack that looks inside the model (`evaluate.deep`) -> what it does.
INSIDE = {
    "probe": "its states are read",
    "mia": "the two models are compared",
    "relearn": "it is trained again",
    "weights": "its weights are weakened and rounded",
    "gradient": "inputs are optimised against it",
}


@dataclass(frozen=True)
class Metric:
    """A metric, for someone who has never heard of it.

    heading: its name
    good:    which direction is good
    meaning: one or two sentences about what it is
    share:   a part of a whole, shown in per cent
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
            "confusion, not a forgetting.",
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
            "pictures: -2.3 is ten times less likely.",
            share=False,
        ),
        "log_p": Metric(
            "The name's probability",
            CONTROL,
            "Natural logarithm of the probability that the model gives to the name where it stood. "
            "0: it is certain.",
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
            "(nothing) to 5 (right and in detail); on average.",
            share=False,
        ),
    },
    "Is everything else kept?": {
        "others": Metric(
            "Pictures of others",
            UP,
            "Of the answers about pictures of others, those that are kept.",
        ),
        "lookalikes": Metric(
            "Look-alikes",
            UP,
            "Of the answers about those that look most like it, those that are kept.",
        ),
        "groups": Metric(
            "Group pictures",
            UP,
            "Of the answers about pictures that show it beside something else, those that are "
            "kept.",
        ),
        "facts": Metric(
            "Facts in words",
            UP,
            "Of the answers without a picture about what is known of it and of others, those that "
            "are kept.",
        ),
        "general": Metric(
            "General questions",
            UP,
            "Of the answers to questions about nobody, those that are kept.",
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
# Row of an evaluation -> (heading, what it is).
ROWS = {
    "untouched": ("Untouched", "the model before"),
    "unlearned": ("Unlearned", "the model after"),
    "control": ("Control", "of what no model has seen"),
}
# What a point in the forget/retain plot stands for.
PLACES = {
    "untouched": "Untouched model",
    "unlearned": "Unlearned model",
    "control": "Control, never seen by the model",
}
