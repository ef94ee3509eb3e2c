"""Dreamed neighbours: pictures of protected names that nobody has to own.

Starting from the one picture's image features, features are optimised until the frozen teacher names the neighbour:

    minimise over f   CE(teacher(f, "who is this?"), "This is OTHER.")  +  decay * |(f - f_0) / sd|^2 / size

What the teacher says of a dream it should go on saying, which ties down the very image-to-name paths that unlearning
bends. The dream lives in feature space (what the projector hands to the language model), so any model that takes
precomputed image features can dream, and no picture of anyone is needed or made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import ask
from ..loss import fused_dmk_ce
from ..request import Recipe
from ..vlm import VLM, Picture, map_features

DECAY = 1e-3  # pull towards the picture the dream started from; keeps features on the scale the model knows


@dataclass(frozen=True)
class Dream:
    """One accepted dream: the teacher, asked in every training wording, names `name`."""

    name: str
    picture: Picture


def dream(vlm: VLM, start: Picture, names: Sequence[str], sentences: Sequence[tuple[str, str, str]],
          recipe: Recipe, batch: int = 32) -> list[Dream]:  # fmt: skip
    """Up to `recipe.dreams` dreams of each name, those that the teacher accepts.

    sentences: (question, the answer before the name, the answer after it): the teacher's own manner of naming
    Bounded: `recipe.dream_steps` optimiser steps for each group of `batch` dreams.
    """
    wanted = [name for name in names for _ in range(recipe.dreams)]
    generator = torch.Generator(device="cpu").manual_seed(recipe.seed)
    accepted: list[Dream] = []
    for at in range(0, len(wanted), batch):
        chosen = wanted[at : at + batch]
        accepted += _dream_batch(vlm, start, chosen, sentences, recipe, generator)
    return accepted


def _dream_batch(vlm: VLM, start: Picture, names: Sequence[str], sentences: Sequence[tuple[str, str, str]],
                 recipe: Recipe, generator: torch.Generator) -> list[Dream]:  # fmt: skip
    origin = start.features["pooler_output"]
    first = (origin if isinstance(origin, torch.Tensor) else torch.cat([x.reshape(-1, x.shape[-1]) for x in origin])).float()
    first = first.reshape(-1, first.shape[-1])
    spread = first.std(0, keepdim=True).clamp_min(1e-6)
    noise = torch.randn(len(names), *first.shape, generator=generator).to(first)
    free = (first + recipe.dream_noise * spread * noise).requires_grad_()
    turns = [[vlm.encode(q, f"{head}{name}{tail}", start) for name in names] for q, head, tail in sentences]
    # The rate is in units of the channels' spread over the patches, so that one number suits every projector.
    optimiser = torch.optim.Adam([free], lr=recipe.dream_lr * float(spread.mean()))

    def features() -> list[object]:
        return [_with(start, f) for f in free]

    for step in range(recipe.dream_steps):
        asked = turns[step % len(turns)]
        states = ask.supervised_states(vlm, asked, features())
        labels = torch.cat([t.labels for t in asked])
        loss = fused_dmk_ce(states, vlm.head_weight, labels, alpha=1.0, **vlm.head_options)
        loss = loss + DECAY * ((free - first) / spread).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    pictures = [Picture(start.image, _with(start, f.detach().clone())) for f in free]
    named = [True] * len(names)
    for asked in turns:
        for i, (_, right) in enumerate(ask.label_log_probabilities(vlm, asked, pictures)):
            named[i] = named[i] and bool(right.all())
    return [Dream(name, picture) for name, picture, ok in zip(names, pictures, named, strict=True) if ok]


def _with(start: Picture, flat: torch.Tensor) -> object:
    """The start picture's features with the projector's output replaced by `flat` [patches, D]."""
    taken = 0

    def change(x: torch.Tensor) -> torch.Tensor:
        nonlocal taken
        rows = x.numel() // x.shape[-1]
        piece = flat[taken : taken + rows].reshape(x.shape).to(x.dtype)
        taken += rows
        return piece

    return map_features(start.features, change)
