"""Which ways of sharing a prefix (`prefix`) are exact on a model: each is tried on a few turns,
beside the plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .prefix import RUN, parts_of, recomputes
from .vlm import VLM, Encoded, Picture, out_of_memory

# Relative differences that rounding explains; what a wrong mask or position does to hidden states
# is of the order of 1. In fp64
# as well: norms, and all of linear attention, compute in fp32 whatever the dtype (gradients 1e-8 to
# 2e-5 apart, nine families).
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of states alone: rounding to bf16 moved them by up to 9e-3 (30 families), a position that is off
# by one Gemma 3's by 4e-2.
OF_STATES = TOLERANCE | {torch.bfloat16: 2e-2}
INT8 = 1e-1  # activations are rounded too, to 1 of 127 steps


def tolerance(vlm: VLM, dtype: torch.dtype, gradients: bool = True) -> float:
    """How far apart hidden states, and gradients where they are compared, may be in two ways that
    differ by rounding only."""
    rounded = any(type(m).__name__ == "Linear8bitLt" for m in vlm.base.modules())
    return INT8 if rounded else (TOLERANCE if gradients else OF_STATES)[dtype]


def plan_sharing(
    vlm: VLM,
    turns: Sequence[Encoded],
    pictures: Sequence[Picture | None],
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Tries each way against the plain one and keeps in `vlm.shares` those that are exact: states,
    and gradients of the adapter.

    Two turns of one picture and one of another where there is one; two turns without a picture.
    What is not exact is said.
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
    """None where `way` gives the plain path's hidden states and adapter gradients, else the
    difference or the error."""
    (part,) = parts_of(vlm, turns, shown)
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    # two turns at a time are the fewest that share
    bounded = vlm.budget.checkpointing or vlm.budget.micro_batch is not None
    random = torch.Generator().manual_seed(0)

    def measure(way: str, direction: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        found = dict(RUN[way](part, (1 if way == "plain" else 2) if bounded else None))
        states = torch.cat([found[i] for i in range(len(turns))])
        if direction is None:
            direction = torch.randn(states.shape, generator=random).to(states)
        used = (
            torch.autograd.grad((states * direction).sum(), trained, allow_unused=True)
            if trained
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
        return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    if len(ours[1]) != len(plain[1]):
        return "other parameters get a gradient"
    norm = lambda tensors: sum(float(x.float().norm()) ** 2 for x in tensors) ** 0.5
    off = [
        norm(a - b for a, b in zip(*pair, strict=True)) / (norm(pair[1]) or 1.0)
        for pair in zip(ours, plain, strict=True)
    ]
    if all(x <= tolerance(vlm, direction.dtype) for x in off):  # false for NaN
        return None
    return f"hidden states differ by {off[0]:.1e}, gradients by {off[1]:.1e}"
