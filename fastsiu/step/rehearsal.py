"""Rehearsing what somebody does who teaches the name again.

A name that is gone may lie close below: a few steps of training on one true picture bring it back
sooner than they teach it to a face that the model has never seen. So in every second step of the
training somebody is played who does that: the trained parameters go a few steps down the
cross-entropy of the untouched model's own answers that give the name. There the gradient of the
step is taken; it is applied where the parameters were before. What is learned then is what still
forgets after so many steps of relearning.

No part of the paper. It is the first-order form of training against tampering (Tamirisa et al.,
"Tamper-Resistant Safeguards for Open-Weight LLMs", arXiv 2408.00761), where the gradient does not
go through the steps that are rehearsed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..loss.fused import fused_dmk_ce
from ..model import prefix
from ..model.vlm import VLM
from ..request import Recipe
from .look import Naming

# Every second step rehearses, once the first ones have taught what to say instead: as long as the
# name is there, nobody needs to bring it back.
FIRST, EVERY = 10, 2
TAUGHT = 2  # answers that give the name, in all steps of one rehearsal: fewer than a step trains on


@dataclass(frozen=True)
class Rehearsal:
    """naming: the untouched model's answers that give the name; none: nothing is rehearsed"""

    vlm: VLM
    recipe: Recipe
    naming: Sequence[Naming]

    @contextmanager
    def before(self, step: int, rates: Sequence[tuple[Tensor, float]]) -> Iterator[None]:
        """Inside, the parameters are where relearning would have taken them, in a step that
        rehearses; afterwards they are where they were.

        rates: each trained parameter with its learning rate
        """
        most = self.recipe.relearn
        if not most or not self.naming or step < FIRST or step % EVERY:
            yield
            return
        rng = random.Random(f"{self.recipe.seed} {step}")
        taught = rng.sample(list(self.naming), min(TAUGHT, len(self.naming)))
        before = [parameter.detach().clone() for parameter, _ in rates]
        try:
            for _ in range(rng.randint(1, most)):
                self._teach(taught, rates)
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), value in zip(rates, before, strict=True):
                    parameter.copy_(value)

    def _teach(self, taught: Sequence[Naming], rates: Sequence[tuple[Tensor, float]]) -> None:
        """One step of relearning. Each number moves by its rate, as in the first steps of AdamW."""
        vlm = self.vlm
        states = prefix.supervised_states(
            vlm,
            [turn for turn, _, _ in taught],
            [
                vlm.image_features(shown.image) if self.recipe.sees_anew else shown.features
                for _, _, shown in taught
            ],
            micro_batch=vlm.budget.micro_batch,
        )
        labels = torch.cat([turn.labels for turn, _, _ in taught])
        loss = fused_dmk_ce(
            states, vlm.head_weight, labels, alpha=1.0, return_parts=False, **vlm.head_options
        )
        moved = [parameter for parameter, _ in rates]
        gradients = torch.autograd.grad(loss, moved, allow_unused=True)
        with torch.no_grad():
            for (parameter, rate), gradient in zip(rates, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(rate * gradient.sign())
