"""Attacks on an unlearned model that need more than questions: its weights, its states, its
gradients, and training it again.

    rows = run(loaded, Target(concept, pictures, strangers, others))

The model is one with its adapter on; the same weights with the adapter off are the untouched model.
Each attack is one file with one function `run`, gives rows for report.json, and leaves the model
bit for bit as it was.
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

# What is said while an attack runs, and the attack.
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

    attack: as in `which`;  side: "untouched", "unlearned" or "control" (what the attack gives where
    nothing can be recognised)
    value:  a share with its Wilson 95 % interval, or a rank, a number of steps or an AUC as the
    setting says; None with a reason
    lr:     the rate at which the model is trained again: the one it was unlearned with, if nothing
    better is known

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
            rows += attack(loaded, target, **({"lr": lr} if key == "relearn" else {}))
    return rows
