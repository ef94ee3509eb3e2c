"""The sculpted adapter of SMFA (arXiv 2511.20196), a method that SIU is compared with.

Two trainings with the cross-entropy alone: one on refusals and retained answers, whose change of a
weight matrix is dW_f, and one on retained answers, whose change is the anchor dW_a. The model has

    W + dW_f * (1 - C * R)        C = 1 where dW_a * dW_f < 0
                                  R = 1 where k * rho * |dW_a| < |dW_f|,  rho = |dW_f|_F / |dW_a|_F

so that what conflicts with the anchor and outweighs it is left out. The equations are those of a
published summary of the paper, whose own text could not be read; nor could its k. So the search of
`compare` tries `KS`. At 1 the two changes are compared at equal norms; a larger k leaves out less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from .. import objectives, train
from ..model import adapter
from ..model.vlm import VLM
from ..request import Recipe
from ..samples.corpus import FORGET, Corpus
from ..step.look import Look

K = 1.0
KS = (0.5, 1.0, 2.0, 4.0)
_TINY = 1e-12  # of a norm


def sculpted(forget: Tensor, anchor: Tensor, k: float = K) -> Tensor:
    """dW_f without what conflicts with dW_a and outweighs it; both of one shape."""
    rho = forget.norm() / anchor.norm().clamp_min(_TINY)
    conflict = anchor * forget < 0
    outweighs = k * rho * anchor.abs() < forget.abs()
    return forget.masked_fill(conflict & outweighs, 0)


def anchor_of(vlm: VLM, corpus: Corpus, recipe: Recipe) -> dict[str, Tensor]:
    """dW_a of each adapted matrix by its module's name, on the CPU: a fresh adapter, trained on the
    retained samples for as many steps as the recipe has. No adapter is on before or afterwards.

    Raises NumericFailure for NaN and infinity.
    """
    kept = [i for i, sample in enumerate(corpus.samples) if sample.facet not in FORGET]
    adapter.attach(vlm, recipe)
    try:
        train.fit(vlm, corpus.pick(kept), objectives.descent, recipe, lambda: Look(1.0, 0.0, 0.0))
        return {name: _change(layer).cpu() for name, layer in _layers(vlm)}
    finally:
        adapter.detach(vlm)


@contextmanager
def put_on(vlm: VLM, anchor: dict[str, Tensor], k: float = K) -> Iterator[None]:
    """In the block the model with its adapter has the sculpted change; afterwards every weight is
    as it was, to the bit. Takes a copy of the adapted matrices."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, layer in _layers(vlm):
                weight = layer.get_base_layer().get_parameter("weight")
                change = _change(layer)
                before.append((weight, weight.detach().clone()))
                less = sculpted(change, anchor[name].to(change), k) - change
                weight.add_(less.to(weight.dtype))
        yield
    finally:
        with torch.no_grad():
            for matrix, kept in before:
                matrix.copy_(kept)


def _layers(vlm: VLM) -> list[tuple[str, LoraLayer]]:
    return [(n, m) for n, m in vlm.model.named_modules() if isinstance(m, LoraLayer)]


def _change(layer: LoraLayer) -> Tensor:
    """The scaled product of an adapter's factors, [outputs, inputs] fp32."""
    # PEFT declares it on each kind of layer, and not on their common class.
    change: Tensor = layer.get_delta_weight("default")  # type: ignore[attr-defined]
    return change.detach().float()
