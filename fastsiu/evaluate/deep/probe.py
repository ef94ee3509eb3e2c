"""What the unlearned model's states still tell at the position where the name would start, read
through its own head and by a linear probe.

The same words stand before that position for every picture (the untouched model's naming answer up
to the name), so the states differ by the picture alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...model import adapter
from ...model.turns import Picture, collate
from ...model.vlm import VLM
from ...pictures.transforms import variants
from ...text.rate import Rate
from .target import (
    NO_OTHER,
    NO_STRANGER,
    Naming,
    Row,
    Shown,
    Target,
    adapted,
    at_name,
    complete,
    namings,
    on_cpu,
    see,
)

BATCH = 16  # turns in one forward
TRAIN_VIEWS = 6  # views of a picture that the probe is trained on
RIDGE = 1e-2  # of the probe, as a share of the mean squared length of its samples
NO_LAYERS = (
    "The model's language model has no list of layers whose last output leads to the head, so no "
    "layer could be read."
)
ONE_TOKEN = "All known names start with the same token, so the first token tells nothing."
NO_NAMES = "No name of anyone else is known, so there is nothing to rank among."


def run(loaded: VLM, target: Target) -> list[dict[str, Any]]:
    """Rows of the logit lens and of the linear probe, for each layer.

    logit lens:   a layer's output goes through the model's last norm and head. Among the first
                  tokens of all known names: how often the concept's is the likeliest, and its mean
                  rank (1 is the first)
    linear probe: ridge regression in fp64, trained on the untouched model's states to tell the
                  concept from others and from every second stranger: how often it recognises the
                  concept in pictures (or views) that it was not trained on

    Null with the reason where the layers cannot be located, no other name is known, or there is no
    picture of anyone else. Raises BadInput without an adapter, and where the untouched model does
    not name the concept.
    """
    adapted(loaded)
    target = complete(loaded, target)
    asked = namings(loaded, target)
    found = find_layers(loaded, asked[0], see(loaded, target.pictures[:1])[0])
    if isinstance(found, str):
        return [
            Row.null("probe", "logit lens", found).as_dict(),
            Row.null("probe", "linear probe", found).as_dict(),
        ]
    return [
        row.as_dict()
        for row in (*_lens(loaded, target, asked, found), *_probe(loaded, target, asked, found))
    ]


# The layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """The language model's layers in their order, and `norm`: from the last layer's output to the
    states that feed the head."""

    layers: Sequence[nn.Module]
    norm: Callable[[Tensor], Tensor]


def find_layers(loaded: VLM, naming: Naming, picture: Picture) -> Layers | str:
    """The layers and the norm, or a sentence where they cannot be located.

    FastSIU finds the norm by values, not by names: its input is the last layer's output, and its
    output is the states that feed the head.
    """
    decoder = loaded.base.get_decoder()
    lists = [
        (name.count("."), -len(m), m)
        for name, m in decoder.named_modules()
        if isinstance(m, nn.ModuleList) and len(m)
    ]
    if not lists:
        return NO_LAYERS
    layers = list(min(lists, key=lambda x: x[:2])[2])
    inside = {id(m) for layer in layers for m in layer.modules()}
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, given: Any, out: Any) -> None:
        if (
            given
            and isinstance(given[0], Tensor)
            and isinstance(out, Tensor)
            and given[0].shape == out.shape
        ):
            seen.append((module, given[0], out))

    head = loaded.base.get_output_embeddings()
    outside = [
        m for m in decoder.modules() if id(m) not in inside and m is not decoder and m is not head
    ]
    hooks = [m.register_forward_hook(note) for m in outside if not isinstance(m, nn.ModuleList)]
    turn = loaded.encode(naming.question, naming.answer, picture)
    try:
        with torch.no_grad(), _outputs(layers) as kept:
            states = loaded.hidden([turn.inputs], [picture.features])
    finally:
        for hook in hooks:
            hook.remove()
    last = kept.get(len(layers) - 1)
    if len(kept) < len(layers) or last is None or last.shape != states.shape:
        return NO_LAYERS
    # Compared at the answer's positions: some models add the picture's features to the output of
    # their first layers.
    there = lambda x: x[0, turn.rows].float()
    same = lambda a, b: (
        a.shape == b.shape and torch.allclose(there(a), there(b), rtol=1e-3, atol=1e-3)
    )
    if same(last, states):
        return Layers(layers, lambda x: x)
    norms = [module for module, given, out in seen if same(given, last) and same(out, states)]
    return Layers(layers, norms[-1]) if norms else NO_LAYERS


@contextmanager
def _outputs(layers: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Yields a dict of each layer's newest output [B, T, D], by its index."""
    kept: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            kept[index] = out if isinstance(out, Tensor) else out[0]

        return hook

    hooks = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def states_at(
    loaded: VLM, found: Layers, asked: Sequence[Naming], shown: Sequence[Shown]
) -> Tensor:
    """[layers, pictures x questions, D]: each layer's output where the name would start, under the
    model as it is now."""
    pictures = [p for p in see(loaded, shown) for _ in asked]
    turns = [
        at_name(loaded, naming, p)[0]
        for p, naming in zip(pictures, [*asked] * len(shown), strict=True)
    ]
    # Only pictures of one size fit into one batch.
    order = sorted(
        range(len(turns)),
        key=lambda i: (pictures[i].image.size, turns[i].inputs["input_ids"].shape[1]),
    )
    states: dict[int, Tensor] = {}
    for at in range(0, len(order), BATCH):
        for size in {pictures[i].image.size for i in order[at : at + BATCH]}:
            chosen = [i for i in order[at : at + BATCH] if pictures[i].image.size == size]
            inputs = collate([turns[i].inputs for i in chosen], loaded.tokenizer.pad_token_id)
            with _outputs(found.layers) as kept:
                loaded.run(inputs, [pictures[i].features for i in chosen], use_cache=False)
            for b, i in enumerate(chosen):
                states[i] = torch.stack(
                    [kept[k][b, turns[i].rows[0]] for k in range(len(found.layers))]
                )
    return torch.stack([states[i] for i in range(len(turns))], 1)


# Read through the head ----------------------------------------------------------------------------


def _lens(loaded: VLM, target: Target, asked: Sequence[Naming], found: Layers) -> Iterator[Row]:
    if not target.others:
        yield Row.null("probe", "logit lens", NO_NAMES)
        return
    firsts = [_first_tokens(loaded, target, naming) for naming in asked]
    if any(len(tokens) < 2 for tokens in firsts):
        yield Row.null("probe", "logit lens", ONE_TOKEN)
        return
    for side, shown, teacher in (
        ("untouched", target.shown, True),
        ("unlearned", target.shown, False),
        ("control", target.strangers, False),
    ):
        if not shown:
            yield Row.null("probe", "logit lens", NO_STRANGER, side)
            continue
        if teacher:
            with adapter.teacher(loaded):
                states = states_at(loaded, found, asked, shown)
        else:
            states = states_at(loaded, found, asked, shown)
        for k, layer in enumerate(states):
            with torch.no_grad():
                logits = loaded.logits(found.norm(layer))
            names = [row[firsts[i % len(asked)]] for i, row in enumerate(logits)]
            ranks = [1 + int((z[1:] > z[0]).sum()) for z in names]
            setting = f"logit lens, layer {k + 1} of {len(states)}"
            yield Row.share(
                "probe",
                f"{setting}, name first",
                side,
                Rate.of(sum(r == 1 for r in ranks), len(ranks)),
            )
            yield Row(
                "probe", f"{setting}, mean rank of {len(names[0])}", side, fmean(ranks), len(ranks)
            )


def _first_tokens(loaded: VLM, target: Target, naming: Naming) -> list[int]:
    """The tokens with which the known names start in the answer: first the concept's, then those of
    others that differ from it."""
    (picture,) = see(loaded, target.pictures[:1])
    own, *rest = (
        int(at_name(loaded, naming.of(name), picture)[0].labels[0])
        for name in (target.concept.name, *target.others)
    )
    return [own, *sorted(set(rest) - {own})]


# A linear probe -----------------------------------------------------------------------------------


def _probe(loaded: VLM, target: Target, asked: Sequence[Naming], found: Layers) -> Iterator[Row]:
    if not target.other_pictures:
        yield Row.null("probe", "linear probe", NO_OTHER)
        return
    train = _views(target.pictures[0], target.seed)
    others = [view for _, shown in target.other_pictures for view in _views(shown, target.seed)]
    # Every second stranger is trained on as well: without any, whoever is unlike the others may
    # pass for the concept.
    others, unseen = others + list(target.strangers[1::2]), target.strangers[::2]
    with adapter.teacher(loaded):
        own, rest = states_at(loaded, found, asked, train), states_at(loaded, found, asked, others)
        before = states_at(loaded, found, asked, target.tests)
    after = states_at(loaded, found, asked, target.tests)
    strange = states_at(loaded, found, asked, unseen) if unseen else None
    for k in range(len(found.layers)):
        finds = fitted(on_cpu(own[k]), on_cpu(rest[k]))
        setting = f"linear probe, layer {k + 1} of {len(found.layers)}"
        for side, states in (("untouched", before), ("unlearned", after), ("control", strange)):
            if states is None:
                yield Row.null("probe", setting, NO_STRANGER, side)
                continue
            said = finds(on_cpu(states[k]))
            yield Row.share("probe", setting, side, Rate.of(int(said.sum()), len(said)))


def _views(shown: Shown, seed: int) -> list[Shown]:
    """A picture and some of its transforms; a dream has none."""
    return (
        [shown]
        if isinstance(shown, Picture)
        else [view for _, view in variants(shown, seed)[:TRAIN_VIEWS]]
    )


def fitted(own: Tensor, rest: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression between two classes of equal weight, fp64. own, rest: [n, D] states of each.

    Returns a function from states [n, D] to [n] bool: are they like `own`?
    """
    x, y = (
        torch.cat([own, rest]),
        torch.cat([torch.ones(len(own)), -torch.ones(len(rest))]).double(),
    )
    weight = torch.cat(
        [torch.full((len(own),), 0.5 / len(own)), torch.full((len(rest),), 0.5 / len(rest))]
    ).double()
    mean = weight @ x
    spread = (weight @ (x - mean).square()).sqrt().clamp_min(1e-9)
    unit = (x - mean) / spread
    scaled = unit * weight.sqrt()[:, None]
    # Solved in the space of the samples, which are fewer than the channels of a large model:
    # w = X' (X X' + r I)^-1 y.
    gram = scaled @ scaled.T
    shift = RIDGE * gram.diagonal().sum()
    solved = torch.linalg.solve(
        gram + shift * torch.eye(len(gram), dtype=gram.dtype), y * weight.sqrt()
    )
    direction = scaled.T @ solved
    return lambda states: ((states - mean) / spread) @ direction > 0
