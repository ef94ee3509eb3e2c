"""The saliency mask of MMUnlearner (arXiv 2502.11051), a method that SIU is compared with."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from ..model.vlm import VLM
from ..objectives import siu
from ..request import Recipe
from ..samples.corpus import FORGET, Corpus
from ..step.batches import forward


def saliency(
    vlm: VLM, corpus: Corpus, recipe: Recipe, most: int = 64
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each factor of the adapter that is on, with its mask: 1 where E g_f^2 / E g_r^2 >= 1, else 0,
    in the factor's shape and dtype. The means are over single samples' gradients of the NLL; at
    most `most` samples of D_r are drawn with the recipe's seed.

    The authors compute it for full weights, before there is an adapter. B of a fresh adapter is 0,
    and there A has no gradient at all. So the gradients are taken with a B of tiny random entries.
    Up to rounding that is the untouched model, and A's gradient is the full weight's, multiplied by
    B. The ratio does not depend on how large B is. B is 0 again afterwards.
    """
    factors = [(n, p) for n, p in vlm.model.named_parameters() if p.requires_grad and "lora_" in n]
    generator = torch.Generator().manual_seed(recipe.seed)
    before = {n: p.detach().clone() for n, p in factors if "lora_B" in n}
    with torch.no_grad():
        for n, p in factors:
            if n in before:
                p.copy_(1e-4 * torch.randn(p.shape, generator=generator))
    forget = [i for i, s in enumerate(corpus.samples) if s.facet in FORGET]
    kept = [i for i in range(len(corpus.samples)) if i not in set(forget)]
    kept = random.Random(recipe.seed).sample(kept, min(most, len(kept)))
    squares: list[list[torch.Tensor]] = []
    for members in (forget, kept):
        squares.append([torch.zeros_like(p) for _, p in factors])
        for i in members:
            loss, _ = siu(forward(vlm, corpus, [i], recipe), replace(recipe, alpha=1.0, beta=0.0))
            for total, g in zip(
                squares[-1], torch.autograd.grad(loss, [p for _, p in factors]), strict=True
            ):
                total += g.square() / len(members)
    with torch.no_grad():
        for n, p in factors:
            if n in before:
                p.copy_(before[n])
    return [(p, (f >= r).to(p.dtype)) for (_, p), f, r in zip(factors, *squares, strict=True)]
