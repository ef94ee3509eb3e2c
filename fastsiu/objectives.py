"""What is minimised: each objective its formula and little more. An objective is a plain function of one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .loss import fused_dmk_ce
from .request import Recipe
from .teacher import TeacherCache


@dataclass
class Batch:
    """The supervised rows of one optimisation step.

    hidden [N, D] with graph; labels [N] int64; teacher: the N matching rows of the cache; kl_weight [N] bool, the paper's
    K_S (False = the KL skips the row); head_options: keywords that describe the head.
    """

    hidden: Tensor
    labels: Tensor
    teacher: TeacherCache | None
    kl_weight: Tensor
    head_weight: Tensor
    head_options: dict[str, Any]


Objective = Callable[[Batch, Recipe], tuple[Tensor, dict[str, float]]]


def siu(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """alpha * mean CE + beta * mean DMK over the tokens with K_S = 1 (paper Eq. 2-5)."""
    teacher = batch.teacher if recipe.beta else None
    loss, parts = fused_dmk_ce(
        batch.hidden, batch.head_weight, batch.labels, teacher, alpha=recipe.alpha, beta=recipe.beta,
        kl_weight=batch.kl_weight if teacher is not None else None, return_parts=True, **batch.head_options,
    )  # fmt: skip
    kept = batch.kl_weight.float()
    kl = float((parts.kl * kept).sum() / kept.sum().clamp_min(1)) if teacher is not None else 0.0
    return loss, {"ce": float(parts.ce.mean()), "kl": kl}
