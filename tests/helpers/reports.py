"""Reports as `unlearn` and `eval` write them, for the tests of what is made of them."""

from __future__ import annotations

from fastsiu.evaluate import attacks
from fastsiu.report.words import LIMITS


def rate(value, n=10):
    return {"value": value, "n": n, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}


def report(**changes):
    absent = {"value": None, "reason": "No other pictures were given."}
    given = {
        "concept": "Zorblax Quint",
        "model": "demo",
        "verdict": "forgotten",
        "reasons": [],
        "before": {
            "efficacy": rate(0.0),
            "generality": absent,
            "specificity": rate(1.0),
            "facts": rate(1.0),
        },
        "after": {
            "efficacy": rate(1.0),
            "generality": absent,
            "specificity": rate(0.95),
            "facts": rate(0.9),
        },
        "answers": [
            {
                "kind": "efficacy",
                "question": "Who?",
                "picture": "flip",
                "before": "It is zorblax quint.",
                "after": "A man.",
            },
            {
                "kind": "facts",
                "question": "Where?",
                "picture": None,
                "before": "In Harrow.",
                "after": "In Harrow.",
            },
        ],
        "training": [
            {"step": i, "loss": 2.0 - i, "ce": 2.0, "kl": -0.5, "p_name": 0.5} for i in range(3)
        ],
        "recipe": {"alpha": 0.9, "lr": {"value": 2e-4, "from": "command line"}},
        "samples": {"align": 4},
        "masks": {"tokens_masked": 3, "vocabulary_masked": 2, "spared": ["the"]},
        "dreams": [{"name": "Mira Oland", "accepted": 1, "of": 2}],
        "seconds": {"load": 1.234567},
        "thresholds": {"efficacy": 0.99, "generality": 0.95, "specificity": 0.9, "facts": 0.9},
        "caveats": [LIMITS[0], "Two names were not protected."],
    }
    return {**given, **changes}


def family(key="two-hop", unlearned=0.5, **changes):
    """A family of questions as `judging.family.Family.as_dict` has it."""
    told = {
        "question": "Where was this one born?",
        "picture": "flip",
        "before": "In Harrow.",
        "after": "In Harrow.",
    }
    asked = attacks.table()["family"][key]
    return {
        "family": key,
        "asked": asked["asked"],
        "seeks": asked["seeks"],
        "n": 40,
        "untouched": rate(0.9, 40),
        "unlearned": rate(unlearned, 40),
        "strangers": rate(0.0, 40),
        "margin": 0.03,
        "allowed": 0.03,
        "applicable": True,
        "failed": unlearned > 0.03,
        "examples": [told],
        **changes,
    }


def evaluation(**changes):
    """A report of an evaluation: 20 answers, and a row each for the untouched model, the unlearned
    one and a control."""
    absent = {"value": None, "reason": "No answers of this kind were collected."}
    row = lambda gone, kept, told: {
        "efficacy": gone,
        "generality": gone,
        "name_fpr": rate(0.02, 40),
        "others": kept,
        "facts": kept,
        "groups": absent,
        "delta_log_p": {"value": told, "n": 20},
        "rank": {"value": 12.5, "n": 20},
        "renamed": absent,
    }
    answers = [
        {
            "kind": "efficacy",
            "question": f"Who is on picture {i % 3}?",
            "picture": f"view {i}",
            "before": "It is Zorblax.",
            "after": "It is Zorblax Quint." if i == 7 else "A man.",
        }
        for i in range(20)
    ]
    given = {
        "format": "fastsiu evaluation 1",
        "concept": "Zorblax Quint",
        "model": "org/model-7b",
        "adapter": True,
        "verdict": "forgotten",
        "reasons": [],
        "before": {
            "efficacy": rate(0.0, 20),
            "generality": absent,
            "specificity": rate(1.0, 20),
            "facts": rate(1.0, 20),
        },
        "after": {
            "efficacy": rate(1.0, 20),
            "generality": absent,
            "specificity": rate(0.95, 20),
            "facts": rate(0.9, 20),
        },
        "thresholds": {"efficacy": 0.99, "generality": 0.95, "specificity": 0.9, "facts": 0.9},
        "rows": {
            "untouched": row(rate(0.0), rate(1.0), 0.0),
            "unlearned": row(rate(1.0), rate(0.95), -8.25),
            "control": row(absent, absent, -9.5),
        },
        "families": [
            family(unlearned=0.0),
            family("naming", 0.0),
            family("languages", 0.0, applicable=False),
        ],
        "headline": family(unlearned=0.0, examples=[]),
        "not_asked": attacks.not_asked(),
        "answers": answers,
        "caveats": [],
    }
    return {**given, **changes}
