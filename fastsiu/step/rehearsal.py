"""Rehearsing what somebody does who teaches the name again.

A name that is gone may lie close below: a few steps of training on one true picture bring it back
sooner than they teach it to a face that the model has never seen. So in every second step of the
training somebody is played who does that: the trained parameters go a few steps down the
cross-entropy of the untouched model's own answers that give the name. There the gradient of the
step is taken; it is applied where the parameters were before. What is learned then is what still
forgets after so many steps of relearning.

No part of the paper. The idea is that of training against tampering (Tamirisa et al.,
"Tamper-Resistant Safeguards for Open-Weight LLMs", arXiv 2408.00761). Here the gradient does not go
through the steps that are rehearsed, and the whole loss of the step is taken there, also of what is
to stay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import prefix
from ..model.vlm import VLM
from ..objectives import answer_loss
from ..request import Recipe
from .look import Naming

# Every second step rehearses, after the first eighth has taught what to say instead: as long as the
# name is there, nobody needs to bring it back.
FROM, EVERY = 1 / 8, 2
TAUGHT = 2  # answers that give the name, in all steps of one rehearsal
NOTHING_TO_TEACH = (
    "The untouched model gives the name in none of the wordings that are trained, so no relearning "
    "was rehearsed."
)


@dataclass(frozen=True)
class Rehearsal:
    """naming: the untouched model's answers that give the name, in trained wordings; none: nothing
    is rehearsed"""

    vlm: VLM
    recipe: Recipe
    naming: Sequence[Naming]

    @classmethod
    def of(cls, vlm: VLM, recipe: Recipe, asked: Sequence[Naming]) -> Rehearsal:
        """Held-out wordings are what the verdict asks: they are not rehearsed."""
        return cls(vlm, recipe, [one for one in asked if not one.held_out])

    @property
    def note(self) -> str:
        """Why nothing is rehearsed although the recipe asks for it; "" where it is."""
        return NOTHING_TO_TEACH if self.recipe.relearn and not self.naming else ""

    @contextmanager
    def moved(self, step: int, rates: Sequence[tuple[Tensor, float]]) -> Iterator[None]:
        """Inside, the parameters are where relearning would have taken them, in a step that
        rehearses; afterwards they are where they were.

        rates: each trained parameter with its learning rate
        """
        recipe = self.recipe
        first = FROM * recipe.steps
        if not recipe.relearn or not self.naming or step < first or step % EVERY:
            yield
            return
        rng = random.Random(f"{recipe.seed} {step}")
        taught = rng.sample(list(self.naming), min(TAUGHT, recipe.batch_size, len(self.naming)))
        before = [parameter.detach().clone() for parameter, _ in rates]
        try:
            for _ in range(rng.randint(1, recipe.relearn)):
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
            [one.turn for one in taught],
            [
                vlm.image_features(one.shown.image) if self.recipe.sees_anew else one.shown.features
                for one in taught
            ],
            micro_batch=vlm.budget.micro_batch,
        )
        labels = torch.cat([one.turn.labels for one in taught])
        loss = answer_loss(vlm, states, labels)
        moved = [parameter for parameter, _ in rates]
        gradients = torch.autograd.grad(loss, moved, allow_unused=True)
        with torch.no_grad():
            for (parameter, rate), gradient in zip(rates, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(rate * gradient.sign())
