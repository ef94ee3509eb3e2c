"""general.py in Triton: a softcap, a head that trains, a teacher with another head.

No atomics, no locks, partials summed in a fixed order: bitwise reproducible. Flops: 2 N V D for
each product. A pass has one product, two with a teacher; dh and dW add one each. Launches: forward
4, with the gradient of a frozen head 8; backward 3, for a head that trains 5 or 6. A chunk more
costs 2 or 3. The kernels are in triton_pairs.py and triton_rows.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_launch
from .inputs import Head, Teacher, same
from .triton_launch import GeneralPlan, target_of, units_of
from .triton_pairs import (
    bias_kernel,
    coefficient_kernel,
    fold_kernel,
    gather_kernel,
    normalise_kernel,
    outer_kernel,
    settle_kernel,
)
from .triton_rows import Weights, factors, prepare_kernel
from .triton_sweep import describable, dtypes, on, operands_of, power_of_2, up
from .triton_tiles import ALL, DROPPED, KEPT, NONE, product_kernel


class Settled(NamedTuple):
    """What the backward pass of a head that trains takes from the forward pass.

    h      [N, D], contiguous, without NaN and infinity in rows without weight
    u, w   [N]: the factors of each row's CE and KL
    lse    [2, N] fp64: of z over the vocabulary at temperature 1, and of Q over its own columns
    still  [N] int8: rows that have neither KL nor its gradient
    """

    h: Tensor
    u: Tensor
    w: Tensor
    lse: Tensor
    still: Tensor


def forward(
    h: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    weights: Weights,
    one_head: bool,
    gradient: bool,
    trains: bool,
    entropy: bool,
) -> tuple[Tensor, Tensor | None, Settled]:
    """[4, N]: u CE + w KL, CE, KL and entropy of the rows; d(sum u CE + w KL)/dh [N, D] if
    `gradient`; and what `backward` needs if the head `trains`.

    one_head: do student and teacher share weight and bias?
    """
    (N, D), V, device, W = h.shape, len(head.weight), h.device, head.weight
    dot, acc = dtypes(h, W)
    made = h.new_empty((4, N), dtype=acc)
    lse = h.new_empty((2, N), dtype=torch.float64)
    still = h.new_empty(N, dtype=torch.int8)
    if N == 0:
        none = h.new_empty((0, D), dtype=acc) if gradient else None
        return made, none, Settled(h, made[0], made[0], lse, still)
    plan = _plan(h, W)
    labels, tau = labels.contiguous(), 1.0 if teacher is None else teacher.tau
    mask = None if teacher is None or not teacher.renormalize else teacher.keep
    stands = teacher is not None and one_head and teacher.whole
    taught = None if gradient else teacher  # with a gradient the second pass has the KL
    channels, apart = 1 if mask is None and tau == 1 else 2, mask is not None and tau == 1
    blocks, tiles = up(N, plan.pair.BLOCK_N), up(V, plan.pair.BLOCK_V)
    splits = min(plan.splits, tiles)

    clean = h.new_empty((N, D)) if trains else h
    z, start = h.new_empty(N, dtype=acc), h.new_empty((channels, N), dtype=acc)
    held = h.new_empty(N, dtype=torch.int32)
    shift = h.new_empty((channels, splits, N), dtype=acc)
    total, entropies, masses = h.new_empty(
        (3, max(channels, 2), splits, N), dtype=torch.float64
    ).unbind(0)
    tensors, strides, options = _pair(
        clean, head, taught, None if teacher is None else teacher.keep, plan
    )
    numbers = [h, h] if teacher is None else [teacher.C.contiguous(), teacher.lse.contiguous()]
    bias, keep = tensors[2], tensors[6]
    hidden = h if teacher is None else teacher.hidden.contiguous()
    with on(device):
        C = None if teacher is None else numbers[0]
        bound = abs(head.scale) * max(1.0, tau) if gradient and dot == torch.float16 else None
        factor = factors(labels, weights, C, acc, bound=bound)
        prepare_kernel[(N,)](
            h, W, bias, keep, labels, hidden, h, labels, h, held, start, z, still,
            factor, clean, N, D, *h.stride(), *W.stride(), hidden.stride(0),
            SCALE=head.scale, SOFTCAP=options["SOFTCAP"], NEAR=options["NEAR"], TAU_1=tau,
            IGNORED=weights.ignore_index, TEACHER=False, STILL=stands,
            MASKED=mask is not None, CLEAN=trains, HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None, CHANNELS=channels, K=0, HELD=1,
            ACC=options["ACC"], BLOCK_D=min(512, power_of_2(D)), num_warps=4,
        )  # fmt: skip
        normalise_kernel[(blocks, splits)](
            *tensors, numbers[1], start,
            shift, total, entropies, masses[0], masses[1], N, V, D, tensors[3].shape[1], tiles,
            *strides, TAU=tau, JUMP=30.0, **options, **_channels(tau, mask is not None, entropy),
        )  # fmt: skip
        settle_kernel[(N,)](
            labels, z, still, factor, shift, total, entropies, masses[0], masses[1], *numbers,
            lse, made, N, splits, TAU=tau, IGNORED=weights.ignore_index,
            KL=taught is not None, STILL=stands, ENTROPY=entropy, CHANNELS=channels, APART=apart,
            HELD=1, SPLITS=power_of_2(splits),
        )  # fmt: skip
        u, w, unit = factor.unbind(0)
        found = Settled(clean, u, w, lse, still)
        dh = None
        if gradient:
            dh = h.new_empty((N, D), dtype=acc)
            _differentiate(head, labels, teacher, found, unit, stands, plan, dh, None, None, bound,
                           made)  # fmt: skip
    return made, dh, found


def backward(
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    found: Settled,
    g: Tensor,
    one_head: bool,
    need_h: bool,
    need_W: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum g (u CE + w KL) by h, W and b where needed, in their own dtypes; g [N]."""
    h, W = found.h, head.weight
    acc, (N, _) = dtypes(h, W)[1], h.shape
    dh = h.new_empty(h.shape) if need_h else None
    # contiguous, whatever the head's strides
    dW = W.new_empty(W.shape) if need_W else None
    db = head.bias.new_empty(head.bias.shape) if need_b and head.bias is not None else None
    if N == 0:
        dW, db = (None if x is None else x.zero_() for x in (dW, db))
        return dh, dW, db
    tau = 1.0 if teacher is None else teacher.tau
    bound = abs(head.scale) * max(1.0, tau) if dtypes(h, W)[0] == torch.float16 else None
    labels = labels.contiguous()
    weights = Weights(1.0, 1.0, found.u, found.w, None, None, False, False, NO_LABEL)
    with on(h.device):
        C = None if teacher is None else teacher.C.contiguous()
        u, w, unit = factors(labels, weights, C, acc, g, bound).unbind(0)
        stands = teacher is not None and one_head and teacher.whole
        _differentiate(head, labels, teacher, found._replace(u=u, w=w), unit, stands, _plan(h, W),
                       dh, dW, db, bound, None)  # fmt: skip
    return dh, dW, db


def _differentiate(
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    found: Settled,
    unit: Tensor,
    stands: bool,
    plan: GeneralPlan,
    dh: Tensor | None,
    dW: Tensor | None,
    db: Tensor | None,
    bound: float | None,
    made: Tensor | None,
) -> None:
    """Writes dh, dW and db where they are not None. made: as `forward` returns it, to which the KL
    is added."""
    h, u, w, lse, still = found
    (N, D), V, W = h.shape, len(head.weight), head.weight
    dot, acc = dtypes(h, W)
    tau = 1.0 if teacher is None else teacher.tau
    BLOCK_N, BLOCK_V, *_ = plan.pair
    _, K, PRODUCT_D, product_warps, product_stages = plan.product
    OUTER_N, OUTER_V, OUTER_D, outer_warps, outer_stages = plan.outer
    blocks, all_tiles = up(N, BLOCK_N), up(V, BLOCK_V)
    # tiles of a chunk; at most 65,535, the most programs in a grid's second dimension
    room = min(max(1, plan.chunk // BLOCK_V), all_tiles, 65_535)
    splits = min(plan.product_splits, room)
    wanted = made is not None and teacher is not None
    dx = h.new_empty((N, up(room * BLOCK_V, OUTER_V) * OUTER_V), dtype=dot)
    parts = None if dh is None else h.new_empty((splits, N, D), dtype=acc)
    partial = h.new_empty((blocks, V) if db is not None else (1, 1), dtype=acc)
    mass, gap = h.new_empty((2, room if wanted else 1, N), dtype=torch.float64).unbind(0)
    folded = h.new_empty((2, N), dtype=torch.float64)
    tensors, strides, options = _pair(
        h, head, teacher, None if teacher is None else teacher.keep, plan
    )
    C, lse_t = [h, h] if teacher is None else [teacher.C.contiguous(), teacher.lse.contiguous()]
    interpreted, has_unit = h.device.type == "cpu", bound is not None
    tma = target_of(h.device) in triton_launch.TMA and describable(W) and describable(dx)
    dx_steps, W_steps = dx, W
    if tma:
        dx_steps = TensorDescriptor.from_tensor(dx, [BLOCK_N, K])
        W_steps = TensorDescriptor.from_tensor(W, [K, PRODUCT_D])
    for first in range(0, all_tiles, room):
        tiles = min(room, all_tiles - first)
        coefficient_kernel[(blocks, tiles)](
            *tensors, lse[0], lse[1], lse_t, labels, u, w, C, still, unit, dx, partial, mass, gap,
            N, V, D, tensors[3].shape[1], first, *strides, dx.stride(0),
            TAU=tau, RENORMALIZE=teacher is not None and teacher.renormalize,
            NEED_B=db is not None, UNIT=has_unit, STILL=stands, NEED_KL=wanted,
            ROUND=interpreted and dot == torch.bfloat16, **options,
        )  # fmt: skip
        if wanted:
            fold_kernel[(up(N, 16),)](mass, gap, folded, N, tiles, FIRST=first == 0, BLOCK_N=16,
                                      BLOCK=128)  # fmt: skip
        if parts is not None:
            product_kernel[(blocks, up(D, PRODUCT_D), splits)](
                dx_steps, W_steps, parts, labels, labels, u, u, u, u, u,
                N, V, D, first, tiles, room, splits, splits, 1, dx.stride(0),
                *W.stride(),
                FIRST=first == 0, ALL_LIVE=True, TMA=tma, ACC=options["ACC"], DOT=options["DOT"],
                BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_K=K, BLOCK_D=PRODUCT_D,
                num_warps=product_warps, num_stages=product_stages,
            )  # fmt: skip
        if dW is not None:
            outer_kernel[(up(tiles * BLOCK_V, OUTER_V), up(D, OUTER_D))](
                dx, h, unit, dW, N, min(V, (first + tiles) * BLOCK_V), D, first * BLOCK_V,
                dx.stride(0), *h.stride(), UNIT=has_unit,
                ACC=options["ACC"], DOT=options["DOT"],
                ROUND=interpreted and dW.dtype == torch.bfloat16,
                BLOCK_K=OUTER_N, BLOCK_V=OUTER_V, BLOCK_D=OUTER_D, num_warps=outer_warps,
                num_stages=outer_stages,
            )  # fmt: skip
    if dh is not None and parts is not None:
        size = min(512, power_of_2(D))
        gather_kernel[(N, up(D, size))](
            parts, unit, dh, folded, lse, C, lse_t, still, w, u if made is None else made,
            N, D, splits,
            TAU=tau, KL=wanted, STILL=stands, UNIT=has_unit,
            ROUND=interpreted and dh.dtype == torch.bfloat16, BLOCK_D=size,
        )  # fmt: skip
    if db is not None:
        bias_kernel[(up(V, 1024),)](partial, unit, db, V, blocks, UNIT=has_unit,
                                    ROUND=interpreted and db.dtype == torch.bfloat16,
                                    BLOCK=1024)  # fmt: skip


NO_LABEL = -(2**62)  # in place of ignore_index where u is 0 already


def _plan(h: Tensor, W: Tensor) -> GeneralPlan:
    (N, D), V = h.shape, len(W)
    return triton_launch.general_launch(
        N, V, D, dtypes(h, W)[0], target_of(h.device), units_of(h.device)
    )


def _pair(
    h: Tensor, head: Head, teacher: Teacher | None, keep: Tensor | None, plan: GeneralPlan
) -> tuple[list[Tensor], list[int], dict[str, Any]]:
    """What normalise_kernel and coefficient_kernel take first: tensors, strides, and constants.

    teacher: None where no KL is wanted
    keep:    [V], the teacher's mask, which also limits the columns of Q without a KL
    """
    ht, theirs = h, head._replace(bias=None)
    if teacher is not None:
        ht, theirs = teacher.hidden, teacher.head
    tensors = [
        h,
        head.weight,
        h if head.bias is None else head.bias.contiguous(),
        ht,
        theirs.weight,
        h if theirs.bias is None else theirs.bias.contiguous(),
        h if keep is None else keep.contiguous().view(torch.int8),
    ]
    (dot, acc), taught = dtypes(h, head.weight), teacher is not None
    one_head = taught and same(head.weight, theirs.weight) and h.dtype == ht.dtype
    options = _constants(
        plan, (head.scale, head.softcap), (head.bias is not None, theirs.bias is not None),
        (taught, one_head, taught and keep is not None), acc,
        (dot, dtypes(ht, theirs.weight)[0]), h.device.type == "cpu",
    )  # fmt: skip
    strides = [*h.stride(), *head.weight.stride(), *ht.stride(), *theirs.weight.stride()]
    return tensors, strides, options


@lru_cache(maxsize=256)
def _constants(
    plan: GeneralPlan,
    head: tuple[float, float | None],
    biases: tuple[bool, bool],
    teacher: tuple[bool, bool, bool],
    acc: torch.dtype,
    dots: tuple[torch.dtype, torch.dtype],
    interpreted: bool,
) -> dict[str, Any]:
    """Made once for each set of arguments: head, scale and softcap; biases, of both heads; teacher,
    TEACHER, SAME_HEAD and MASKED; dots, dtypes of the operands of z and t."""
    (scale, softcap), (bias, bias_t), (taught, one_head, masked) = head, biases, teacher
    wide, dot, dot_t = operands_of(interpreted, acc, *dots)
    BLOCK_N, BLOCK_V, BLOCK_D, num_warps, num_stages = plan.pair
    return dict(
        SCALE=scale, SOFTCAP=1.0 if softcap is None else softcap, HAS_SOFTCAP=softcap is not None,
        NEAR=0.03 if acc == torch.float64 else 0.3, HAS_BIAS=bias, HAS_BIAS_T=bias_t,
        TEACHER=taught, SAME_HEAD=one_head, MASKED=masked, ACC=wide, DOT=dot, DOT_T=dot_t,
        BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _channels(tau: float, masked: bool, entropy: bool) -> dict[str, Any]:
    """The same of normalise_kernel's channels. masked: Q has the kept columns only."""
    columns, apart = [ALL.value, NONE.value], masked and tau == 1
    if tau != 1:
        columns[1] = KEPT.value if masked else ALL.value
    elif masked:
        columns = [KEPT.value, DROPPED.value]
    return dict(
        COLUMNS_0=columns[0], TAU_0=1.0, ENTROPY_0=entropy,
        COLUMNS_1=columns[1], TAU_1=1.0 if apart else tau, ENTROPY_1=entropy and apart,
    )  # fmt: skip
