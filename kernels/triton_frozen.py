"""The loss of one frozen head of student and teacher in Triton: `tiled.shared` on a GPU.

Five launches, of triton_rows.py and triton_tiles.py: weights, prepare, sums, product, finish. A
chunk of columns more costs two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton_vendor
from .inputs import Head, Teacher
from .triton_rows import Weights, factors, finish_kernel, finish_warps, prepare_kernel
from .triton_sweep import Channel, dtypes, on, operands_of, power_of_2, up, visit
from .triton_tiles import ALL, DROPPED, KEPT


class Constants(NamedTuple):
    """What the kernels of single rows are launched with, for one set of options.

    channels         of `visit`
    HELD             room for a row's held-out columns
    blocks           of D
    prepare, finish  constants of the two kernels
    """

    channels: tuple[Channel, ...]
    HELD: int
    blocks: int
    prepare: dict[str, Any]
    finish: dict[str, Any]


@lru_cache(maxsize=256)
def _constants(
    D: int,
    acc: torch.dtype,
    interpreted: bool,
    head: tuple[float, float | None, bool],
    teacher: tuple[int, float, bool, bool] | None,
    ignored: int,
    gradient: bool,
    entropy: bool,
) -> Constants:
    """Made once for each set of arguments.

    head     scale, softcap, and whether there is a bias
    teacher  the number of its top columns, its temperature, whether C is exactly 1, and whether
             the softmax of the KL leaves out the columns that are not kept
    """
    scale, softcap, has_bias = head
    K, tau, whole, masked = teacher or (0, 1.0, False, False)
    # without a softcap the channel of CE at temperature 1 is that of the KL as well
    columns = KEPT.value if masked else ALL.value
    channels: tuple[Channel, ...] = (Channel(ALL.value if tau != 1 else columns, 1.0, entropy),)
    if tau != 1:
        channels += (Channel(columns, tau, False),)
    elif masked:
        channels += (Channel(DROPPED.value, 1.0, entropy),)
    HELD, BLOCK_D = power_of_2(K + 1), min(256, power_of_2(D))
    shared: dict[str, Any] = dict(
        SCALE=scale, SOFTCAP=1.0 if softcap is None else softcap, HAS_SOFTCAP=softcap is not None,
        IGNORED=ignored, TEACHER=teacher is not None, STILL=whole, MASKED=masked,
        CHANNELS=len(channels), K=K, HELD=HELD, BLOCK_D=BLOCK_D,
    )  # fmt: skip
    prepare = shared | dict(
        num_warps=8,
        NEAR=0.03 if acc == torch.float64 else 0.3, TAU_1=tau, CLEAN=False, HAS_BIAS=has_bias,
        ACC=operands_of(interpreted, acc)[0],
    )  # fmt: skip
    finish = shared | dict(TAU=tau, ENTROPY=entropy, GRADIENT=gradient, APART=masked and tau == 1)
    return Constants(channels, HELD, up(D, BLOCK_D) if gradient else 1, prepare, finish)


def frozen(
    h: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    weights: Weights,
    gradient: bool,
    entropy: bool,
    vendor: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """[4, N]: u CE + w KL, CE, KL and entropy of the rows; and d(sum u CE + w KL)/dh [N, D] if
    `gradient`; fp32 (fp64 for fp64).

    `tiled.shared` with the weights of the rows: one frozen head of student and teacher, without a
    softcap where there is a teacher. Rows whose weights are both 0 may hold anything.

    vendor: with the products of torch (triton_vendor.py)
    """
    (N, D), device, W = h.shape, h.device, head.weight
    acc = dtypes(h, W)[1]
    made = h.new_empty((4, N), dtype=acc)
    dh = h.new_empty((N, D), dtype=acc) if gradient else None
    if N == 0:
        return made, dh
    labels, t = labels.contiguous(), teacher
    mask: Tensor | None = None
    given: tuple[int, float, bool, bool] | None = None
    hidden, m, top, p, C, lse = h, h, labels, h, h, h
    if t is not None:
        hidden, m, top, p, C, lse = (
            x.contiguous() for x in (t.hidden, t.m, t.top, t.p, t.C, t.lse)
        )
        mask = t.keep if t.renormalize else None
        given = top.shape[1], t.tau, t.whole, mask is not None
    fixed = _constants(
        D, acc, device.type == "cpu", (head.scale, head.softcap, head.bias is not None), given,
        weights.ignore_index, gradient, entropy,
    )  # fmt: skip
    held = h.new_empty((N, fixed.HELD), dtype=torch.int32)
    z = h.new_empty((2, N, fixed.HELD), dtype=acc)
    start = h.new_empty((len(fixed.channels) + 1, N), dtype=acc)
    still = h.new_empty(N, dtype=torch.int8)
    bias = h if head.bias is None else head.bias.contiguous()
    keep = h if mask is None else mask.contiguous().view(torch.int8)
    strides = W.stride()
    with on(device):
        factor = factors(labels, weights, None if t is None else C, acc)
        prepare_kernel[(N,)](
            h, W, bias, keep, labels, hidden, m, top, p, held, start, z, still,
            factor, h, N, D, *h.stride(), *strides, hidden.stride(0), **fixed.prepare,
        )  # fmt: skip
        go = triton_vendor.visit if vendor else visit
        found = go(h, head, held, start, mask, fixed.channels, product=gradient, fine=t is not None)
        splits, parts = found.m.shape[1], h if found.parts is None else found.parts
        finish_kernel[(N, fixed.blocks)](
            W, keep, labels, top, p, m, C, lse, z, start, still, factor,
            found.m, found.total, found.entropy, parts, found.reached,
            made, h if dh is None else dh,
            N, D, splits, found.reached.shape[1], *strides,
            P_SCALE=found.scale, SPLITS=power_of_2(splits), num_warps=finish_warps(W.dtype),
            **fixed.finish,
        )  # fmt: skip
    return made, dh
