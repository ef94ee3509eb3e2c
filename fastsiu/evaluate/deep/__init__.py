"""Attacks on an unlearned model that need more than questions: its weights, its states, its
gradients, and training it again.

    rows = run(loaded, Target(concept, pictures, strangers, others))

The model has its adapter on; with the adapter off, the same weights are the untouched model. Each
attack is one file with a function `run`, which gives rows for report.json and leaves the model bit
for bit as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...model import vlm
from ...request import BadInput
from ...session import Listener
from . import gradient, membership, probe, relearn, weights
from .target import Target, adapted, complete

__all__ = ["ATTACKS", "Target", "complete", "run"]

# The sentence that is shown while an attack runs, and the attack.
ATTACKS: dict[str, tuple[str, Callable[..., list[dict[str, Any]]]]] = {
    "probe": ("Reading the states", probe.run),
    "mia": ("Comparing the two models", membership.run),
    "relearn": ("Training it again", relearn.run),
    "weights": ("Weakening and rounding the weights", weights.run),
    "gradient": ("Following gradients", gradient.run),
}


def run(
    loaded: vlm.VLM,
    target: Target,
    which: Sequence[str] = tuple(ATTACKS),
    listener: Listener | None = None,
    *,
    lr: float = relearn.RATE,
) -> list[dict[str, Any]]:
    """Rows {attack, setting, side, value, n, low, high, reason?} of the chosen attacks, one after
    the other.

    which: keys of `ATTACKS`
    lr:    the rate at which the model is trained again: the one that it was unlearned with, if
           nothing better is known

    In a row:
        attack  a key of `ATTACKS`
        side    "untouched", "unlearned" or "control" (what the attack gives where nothing can be
                recognised)
        value   a share with its Wilson 95 % interval, or a rank, a number of steps or an AUC, as
                the setting says; None with a reason

    Raises BadInput for an unknown attack, without an adapter, and where the untouched model does
    not name the concept.
    """
    if unknown := [key for key in which if key not in ATTACKS]:
        raise BadInput(f"There is no attack {unknown[0]!r}: choose from {', '.join(ATTACKS)}.")
    listener = listener or Listener()
    adapted(loaded)
    rows: list[dict[str, Any]] = []
    with vlm.threads(loaded):
        listener.stage("Finding strangers and others to compare with")
        target = complete(
            loaded, target, dream=any(key in ("probe", "mia", "relearn") for key in which)
        )
        for key in which:
            stage, attack = ATTACKS[key]
            listener.stage(stage)
            options = {"lr": lr} if key == "relearn" else {}
            rows += attack(loaded, target, **options)
    return rows
