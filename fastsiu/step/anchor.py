"""Holding what the language model reads of kept pictures, where a part in front of it is trained.

Lessons that keep say what is to be answered about a picture. Where the factors are in front of the
language model, there is a shorter way: what it reads of a kept picture is to stay as it was. Each
step adds, for a few kept pictures,

    weight * |f - f0|^2 / |f0|^2,    averaged over them,

with f what the language model reads now and f0 what it read before. No forward of the language
model is needed. No part of the paper; it is feature distillation (Romero et al., "FitNets", arXiv
1412.6550) towards the model's own past.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import adapter
from ..model.features import feature_tensors, map_features
from ..model.turns import Picture
from ..model.vlm import VLM
from ..request import CHANGES, Recipe
from ..samples import drawn
from ..samples.corpus import FORGET, Corpus

EACH_STEP = 16  # pictures whose features one step holds
VIEWS = 2  # of each kept picture, beside itself
# Facets that show a kept picture by itself.
SHOWN_ALONE = ("kept", "preserve")
NOTHING_TO_HOLD = (
    "No picture is kept whose features could be held: the anchor does nothing. Give pictures of "
    "others with --retain."
)


@dataclass(frozen=True)
class Anchor:
    """pictures: what is held, with the features that the untouched model makes of them, on the CPU;
    none: nothing is held"""

    vlm: VLM
    recipe: Recipe
    pictures: Sequence[Picture]

    @classmethod
    def of(cls, vlm: VLM, recipe: Recipe, corpora: Sequence[Corpus]) -> Anchor:
        """The pictures that samples keep, and views of each. A picture that is to be seen otherwise
        is none of them, nor are dreams in features, which have no pixels."""
        if not recipe.anchor:
            return cls(vlm, recipe, ())
        chosen: dict[int, Picture] = {}
        for corpus in corpora:
            changed = corpus.seen_in((*FORGET, *CHANGES))
            kept = corpus.seen_in(SHOWN_ALONE)
            chosen |= {key: picture for key, picture in kept.items() if key not in changed}
        held: list[Picture] = []
        with adapter.teacher(vlm):
            for one in chosen.values():
                views = drawn.views(one.image, recipe.seed, VIEWS)
                for picture in (one, *map(vlm.picture, views)):
                    cpu = map_features(picture.features, lambda x: x.to("cpu"))
                    held.append(Picture(picture.image, cpu))
        return cls(vlm, recipe, held)

    @property
    def note(self) -> str:
        """Why nothing is held although the recipe asks for it; "" where it is."""
        return NOTHING_TO_HOLD if self.recipe.anchor and not self.pictures else ""

    def backward(self, step: int) -> Tensor | None:
        """Adds the gradient of a step's term, one picture at a time; returns the term, fp32; None
        where nothing is held.

        step: its number; the same step holds the same pictures
        """
        if not self.pictures:
            return None
        rng = random.Random(f"anchor {self.recipe.seed} {step}")
        chosen = rng.sample(list(self.pictures), min(EACH_STEP, len(self.pictures)))
        whole = torch.zeros((), device=self.vlm.device)
        for picture in chosen:
            term = self.recipe.anchor / len(chosen) * self.moved(picture)
            term.backward()
            whole = whole + term.detach().to(whole.device)
        return whole

    def moved(self, picture: Picture) -> Tensor:
        """|f - f0|^2 / |f0|^2 of one held picture, fp32, with a graph."""
        now = feature_tensors(self.vlm.image_features(picture.image))
        before = [
            x.to(y.device) for x, y in zip(feature_tensors(picture.features), now, strict=True)
        ]
        apart = torch.stack(
            [(y.float() - x.float()).square().sum() for x, y in zip(before, now, strict=True)]
        )
        size = torch.stack([x.float().square().sum() for x in before])
        return apart.sum() / size.sum().clamp_min(torch.finfo(torch.float32).tiny)
