"""What one optimisation step trains on: which samples, and their supervised rows as a `Batch`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import prefix
from ..model.features import feature_tensors, map_features
from ..model.vlm import VLM
from ..objectives import Batch
from ..request import CHANGES, MISMATCH, SHARES, Recipe
from ..samples.corpus import FORGET, Corpus

# A step has two batches of lessons, of those that change something and of those that keep. Of each
# facet a batch of `WHOLE_BATCH` samples shows so many pictures: few, each with several questions,
# because a picture's prefix is most of the work. A smaller batch shows fewer.
WHOLE_BATCH = 48
PICTURES = {"stranger": 8, "beside": 4, "kept": 7, "kept-beside": 4, "look": 3}
# For each facet its share of the samples of its batch.
PARTS = {
    "stranger": 0.8,
    "beside": 0.2,
    "kept": 0.55,
    "kept-beside": 0.25,
    "look": 0.2,
}
# Noise on the picture of a lesson about one, in units of each channel's standard deviation: new in
# every step, while the teacher saw the picture without it. Two beside each other are half as large,
# and fine looks finer still: there the noise would blur what is to be told.
NOISE, NOISY = 0.1, ("stranger", "kept")


def batches(corpus: Corpus, recipe: Recipe, without: Sequence[str] = ()) -> Iterator[list[int]]:
    """Endless steps: indices of `batch_size` samples, each group at its share, shuffled. No sample
    comes again before all of its group came.

    without: groups that are left out; a step is smaller by their share
    """
    rng = random.Random(recipe.seed)
    groups = corpus.groups()
    total = sum(SHARES[name] for name in groups)
    groups = {name: members for name, members in groups.items() if name not in without}
    decks: dict[str, list[int]] = {name: [] for name in groups}
    carried = dict.fromkeys(groups, 0.0)
    while True:
        step: list[int] = []
        for name, members in groups.items():
            carried[name] += recipe.batch_size * SHARES[name] / total
            while carried[name] >= 1:
                if not decks[name]:
                    decks[name] = rng.sample(members, len(members))
                step.append(decks[name].pop())
                carried[name] -= 1
        if step:
            yield step


def lesson_batches(lessons: Corpus, recipe: Recipe) -> Iterator[list[int]]:
    """Endless batches: indices of about `batch_size` lessons, each facet at its part. A batch shows
    few pictures and asks several questions about each."""
    rng = random.Random(recipe.seed + 1)
    about: dict[str, dict[int | None, list[int]]] = {}
    for i, sample in enumerate(lessons.samples):
        about.setdefault(sample.facet, {}).setdefault(sample.picture, []).append(i)
    whole = sum(PARTS[name] for name in about)
    sizes = {name: max(1, round(recipe.batch_size * PARTS[name] / whole)) for name in about}
    while True:
        step = []
        for name, size in sizes.items():
            most = max(1, round(PICTURES[name] * recipe.batch_size / WHOLE_BATCH))
            pictures = rng.sample(list(about[name]), min(most, len(about[name]), size))
            for k, picture in enumerate(pictures):
                own, count = about[name][picture], len(range(k, size, len(pictures)))
                step += rng.sample(own, min(count, len(own)))
        yield step


def forward(
    vlm: VLM,
    corpus: Corpus,
    chosen: Sequence[int],
    recipe: Recipe,
    micro_batch: int | None = None,
    noise: Mapping[int, Sequence[Tensor]] | None = None,
) -> Batch:
    """The supervised rows of some samples. Each picture's prefix is computed once, and no logits
    are.

    micro_batch: the most samples in one forward, for less memory; the batch and its gradients are
                 the same (`prefix`)
    noise:       of `draw_noise`, where the samples are a share of a step; drawn here when left out
    """
    device, samples = vlm.device, [corpus.samples[i] for i in chosen]
    features = _features(vlm, corpus, chosen, recipe, noise)
    shown = [None if s.picture is None else features[s.picture] for s in samples]
    rows = torch.tensor([row for i in chosen for row in corpus.rows(i)], device=device)
    sample = torch.tensor(
        [place for place, i in enumerate(chosen) for _ in corpus.rows(i)], device=device
    )
    teacher = corpus.teacher[rows] if corpus.teacher is not None else None
    if teacher is not None and teacher.hidden.device != device:
        teacher = teacher.to(device, vlm.head_weight, vlm.head_bias)

    def by_row(of_samples: list[bool]) -> Tensor:
        return torch.tensor(of_samples, device=device)[sample]

    return Batch(
        hidden=prefix.supervised_states(
            vlm, [corpus.turns[i] for i in chosen], shown, micro_batch=micro_batch
        ),
        labels=torch.cat([corpus.turns[i].labels for i in chosen]),
        teacher=teacher,
        kl_weight=torch.cat([corpus.keep[i] for i in chosen]).to(device),
        head_weight=vlm.head_weight,
        head_options=vlm.head_options,
        sample=sample,
        forget=by_row([s.facet in (*FORGET, *CHANGES) for s in samples]),
        decoupled=by_row([corpus.decoupled(i) for i in chosen]),
        pictured=by_row([s.picture is not None for s in samples]),
        mismatched=by_row([s.origin == MISMATCH for s in samples]),
    )


def draw_noise(
    vlm: VLM, corpus: Corpus, chosen: Sequence[int], generator: torch.Generator
) -> dict[int, list[Tensor]]:
    """The noise on the pictures of a whole step, by `Sample.picture`: for each tensor of the
    picture's features one of its shape. Every share of the step then has the noise that the whole
    step would have, whatever its samples are."""
    drawn: dict[int, list[Tensor]] = {}
    for p in _noisy_pictures(corpus, chosen):
        for x in feature_tensors(corpus.pictures[p].features):
            new = torch.randn(x.shape, dtype=x.dtype, device=vlm.device, generator=generator)
            drawn.setdefault(p, []).append(new)
    return drawn


def _noisy_pictures(corpus: Corpus, chosen: Sequence[int]) -> list[int]:
    samples = [corpus.samples[i] for i in chosen]
    noisy = [p for s in samples if s.facet in NOISY and (p := s.picture) is not None]
    return list(dict.fromkeys(noisy))


def _features(
    vlm: VLM,
    corpus: Corpus,
    chosen: Sequence[int],
    recipe: Recipe,
    noise: Mapping[int, Sequence[Tensor]] | None,
) -> dict[int, Any]:
    """The image features of the chosen samples' pictures on the model's device, by
    `Sample.picture`; those of `NOISY` facets with noise."""
    samples = [corpus.samples[i] for i in chosen]
    features = {p: corpus.pictures[p].features for s in samples if (p := s.picture) is not None}
    # A projector that trains changes what real pictures look like. Dreams live behind it already.
    if recipe.sees_anew:
        features |= {
            p: vlm.image_features(corpus.pictures[p].image)
            for p in features
            if corpus.pictures[p].real
        }
    features = {p: map_features(seen, lambda x: x.to(vlm.device)) for p, seen in features.items()}

    for p in _noisy_pictures(corpus, chosen):
        given = None if noise is None else iter(noise[p])

        def noisy(x: Tensor, given: Iterator[Tensor] | None = given) -> Tensor:
            drawn = torch.randn_like(x) if given is None else next(given)
            return x + NOISE * x.reshape(-1, x.shape[-1]).std(0) * drawn

        features[p] = map_features(features[p], noisy)
    return features
