"""The loss of one frozen head of student and teacher in Triton: `tiled.shared` on a GPU.

Five launches, of triton_rows.py and triton_tiles.py: weights, prepare, sums, product, finish. A
chunk of columns more costs two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton_vendor
from .tiled import Head, Teacher
from .triton_rows import Weights, factors, finish_kernel, prepare_kernel
from .triton_sweep import Channel, dtypes, on, operands_of, power_of_2, up, visit
from .triton_tiles import ALL, DROPPED, KEPT


def frozen(
    h: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    weights: Weights,
    gradient: bool,
    entropy: bool,
    vendor: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """u CE + w KL, CE, KL and entropy of the rows, [N], and d(sum u CE + w KL)/dh [N, D] if
    `gradient`; fp32 (fp64 for fp64).

    `tiled.shared` with the weights of the rows: one frozen head of student and teacher, without a
    softcap where there is a teacher. Rows whose weights are both 0 may hold anything.

    vendor: with the products of torch (triton_vendor.py)
    """
    (N, D), device, W = h.shape, h.device, head.weight
    acc = dtypes(h, W)[1]
    rows, ce, kl, H = h.new_empty((4, N), dtype=acc).unbind(0)
    dh = h.new_empty((N, D), dtype=acc) if gradient else None
    if N == 0:
        return rows, ce, kl, H, dh
    labels = labels.contiguous()
    taught, tau = teacher is not None, 1.0 if teacher is None else teacher.tau
    mask = None if teacher is None or not teacher.renormalize else teacher.keep
    # without a softcap the channel of CE at temperature 1 is that of the KL as well
    columns = ALL if mask is None else KEPT
    channels = [Channel(ALL if tau != 1 else columns, 1.0, entropy)]
    if tau != 1:
        channels.append(Channel(columns, tau, False))
    elif mask is not None:
        channels.append(Channel(DROPPED, 1.0, entropy))
    K = 0 if teacher is None else teacher.top.shape[1]
    HELD, BLOCK_D = power_of_2(K + 1), min(256, power_of_2(D))
    held = h.new_empty((N, HELD), dtype=torch.int32)
    z, dz = h.new_empty((2, N, HELD), dtype=acc).unbind(0)
    start, still = h.new_empty((len(channels) + 1, N), dtype=acc), h.new_empty(N, dtype=torch.int8)
    drift = start[-1]
    bias = h if head.bias is None else head.bias.contiguous()
    keep = h if mask is None else mask.contiguous().view(torch.int8)
    hidden, m, top, p, C, lse = (
        [h, h, labels, h, h, h] if teacher is None else
        [x.contiguous() for x in (
            teacher.hidden, teacher.m, teacher.top, teacher.p, teacher.C, teacher.lse)]
    )  # fmt: skip
    wide = operands_of(device.type == "cpu", acc)[0]
    shared = dict(
        SCALE=head.scale, SOFTCAP=1.0 if head.softcap is None else head.softcap,
        HAS_SOFTCAP=head.softcap is not None, IGNORED=weights.ignore_index, TEACHER=taught,
        STILL=teacher is not None and teacher.whole, MASKED=mask is not None,
        CHANNELS=len(channels), K=K, HELD=HELD, BLOCK_D=BLOCK_D, num_warps=8,
    )  # fmt: skip
    with on(device):
        u, w, _ = factors(labels, weights, None if teacher is None else C, acc)
        prepare_kernel[(N,)](
            h, W, bias, keep, labels, hidden, m, top, p, held, start, z, dz, drift, still,
            u, w, h, N, D, *h.stride(), *W.stride(), hidden.stride(0),
            NEAR=0.03 if acc == torch.float64 else 0.3, TAU_1=tau, CLEAN=False,
            HAS_BIAS=head.bias is not None, ACC=wide, **shared,
        )  # fmt: skip
        go = triton_vendor.visit if vendor else visit
        found = go(h, head, held, start, mask, channels, product=gradient, fine=taught)
        splits, parts = found.m.shape[1], h if found.parts is None else found.parts
        finish_kernel[(N, up(D, BLOCK_D) if gradient else 1)](
            W, keep, labels, top, p, m, C, lse, z, dz, drift, still, u, w,
            found.m, found.total, found.entropy, parts, found.reached,
            rows, ce, kl, H, h if dh is None else dh,
            N, D, splits, found.reached.shape[1], *W.stride(),
            TAU=tau, P_SCALE=found.scale, ENTROPY=entropy, GRADIENT=gradient,
            APART=mask is not None and tau == 1, SPLITS=power_of_2(splits), **shared,
        )  # fmt: skip
    return rows, ce, kl, H, dh
