"""Which ways of sharing a prefix (`prefix`) are exact on a model: each runs a few turns, and is
compared with the plain way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import sees_anew
from .faults import first_line, out_of_memory
from .features import feature_tensors, map_features
from .parts import parts_of, recomputes
from .prefix import RUN
from .turns import Encoded, Picture
from .vlm import VLM

# Relative differences that rounding explains; a wrong mask or position changes hidden states by the
# order of 1. fp64 is no exception: norms, and all of linear attention, compute in fp32 whatever the
# dtype (gradients 1e-8 to 2e-5 apart, nine families).
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# For states alone: rounding to bf16 moved them by up to 9e-3 (30 families), a position that is off
# by one moved Gemma 3's by 4e-2.
OF_STATES = TOLERANCE | {torch.bfloat16: 2e-2}
INT8 = 1e-1  # activations are rounded too, to 1 of 127 steps


def tolerance(vlm: VLM, dtype: torch.dtype, gradients: bool = True) -> float:
    """The largest relative difference that rounding explains between the hidden states of two ways.

    gradients: the adapter's gradients are compared as well
    """
    if any(type(m).__name__ == "Linear8bitLt" for m in vlm.base.modules()):
        return INT8
    return (TOLERANCE if gradients else OF_STATES)[dtype]


def plan_sharing(
    vlm: VLM,
    turns: Sequence[Encoded],
    pictures: Sequence[Picture | None],
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Compares each way with the plain one, by hidden states and gradients of the adapter, and
    keeps the ways that are exact in `vlm.shares`.

    A trial has two turns of one picture and one of another where there is one; a second trial has
    two turns without a picture. `say` gets a sentence for each way that is not exact.
    """
    shown = [None if p is None else p.features for p in pictures]
    trials = [
        chosen
        for with_picture in (True, False)
        if (chosen := _trial(vlm, turns, shown, with_picture))
    ]
    training = vlm.model.training
    vlm.model.train(vlm.budget.checkpointing)  # layers checkpoint in training mode only
    for module in vlm.model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # it would differ from forward to forward
    exact = []
    # recomputed layers drop the cache
    ways = ("packed",) if recomputes(vlm) else ("packed", "key/value", "packed key/value")
    for way in ways if trials else ():
        reasons = [
            r
            for chosen in trials
            if (r := _why_not(vlm, way, [turns[i] for i in chosen], [shown[i] for i in chosen]))
        ]
        if reasons:
            say(f"The {way} prefix cannot be used on this model: {reasons[0]}.")
        else:
            exact.append(way)
    if not exact:
        reason = (
            "no way of sharing is exact on this model"
            if trials
            else "no two turns have one in common"
        )
        say(f"Prefixes are not shared, since {reason}: plain padded batches.")
    vlm.model.train(training)
    vlm.shares = tuple(exact)
    return vlm.shares


def _trial(vlm: VLM, turns: Sequence[Encoded], shown: list[Any], with_picture: bool) -> list[int]:
    """The shortest and the longest turn of one picture, and one of another of the same layout."""
    members = [i for i, f in enumerate(shown) if (f is not None) is with_picture]
    for part in parts_of(vlm, [turns[i] for i in members], [shown[i] for i in members]):
        groups = sorted(part.groups, key=len, reverse=True)
        if part.length and len(groups[0]) > 1:
            by_length = sorted(groups[0], key=lambda i: part.lengths[i])
            return [
                members[part.index[i]]
                for i in (by_length[0], by_length[-1], *(g[0] for g in groups[1:2]))
            ]
    return []


def _why_not(vlm: VLM, way: str, turns: list[Encoded], shown: list[Any]) -> str | None:
    """How the hidden states or the adapter's gradients of `way` differ from those of the plain way,
    or the error; None where they do not."""
    # What trains in front of the language model needs the gradient of what this reads.
    shown, seen = _with_gradient(shown) if sees_anew(vlm) else (shown, [])
    (part,) = parts_of(vlm, turns, shown)
    trained = [p for p in vlm.model.parameters() if p.requires_grad] + seen
    # Where memory is bounded, two turns at a time: fewer share nothing.
    bounded = vlm.budget.checkpointing or vlm.budget.micro_batch is not None
    random = torch.Generator().manual_seed(0)

    def measure(way: str, direction: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        by_turn = dict(RUN[way](part, (1 if way == "plain" else 2) if bounded else None))
        states = torch.cat([by_turn[i] for i in range(len(turns))])
        if direction is None:
            direction = torch.randn(states.shape, generator=random).to(states)
        used = (
            torch.autograd.grad((states * direction).sum(), trained, allow_unused=True)
            if states.requires_grad
            else ()
        )
        return direction, [states.detach()], [g for g in used if g is not None]

    try:
        direction, *plain = measure("plain", None)
    except RuntimeError as error:
        if bounded or not out_of_memory(error):
            raise
        bounded = True
        direction, *plain = measure("plain", None)
    try:
        _, *ours = measure(way, direction)
    except Exception as error:
        # any: whatever a family's own forward thinks of such inputs; it becomes the reason
        if out_of_memory(error):
            return "the trial does not fit into memory"
        return first_line(error)
    if len(ours[1]) != len(plain[1]):
        return "other parameters get a gradient"
    off = [_relative(*pair) for pair in zip(ours, plain, strict=True)]
    if all(x <= tolerance(vlm, direction.dtype) for x in off):  # false for NaN
        return None
    return f"hidden states differ by {off[0]:.1e}, gradients by {off[1]:.1e}"


def _with_gradient(shown: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
    """Copies of the features that record a gradient, and their tensors; the same features give the
    same copy."""
    copies = {
        id(f): map_features(f, lambda x: x.detach().clone().requires_grad_())
        for f in shown
        if f is not None
    }
    return (
        [None if f is None else copies[id(f)] for f in shown],
        [x for copy in copies.values() for x in feature_tensors(copy) if x.requires_grad],
    )


def _relative(ours: list[Tensor], plain: list[Tensor]) -> float:
    """The norm of the difference, in parts of the norm of `plain`, over all tensors together."""
    norm = lambda tensors: sum(float(x.float().norm()) ** 2 for x in tensors) ** 0.5
    return norm(a - b for a, b in zip(ours, plain, strict=True)) / (norm(plain) or 1.0)
