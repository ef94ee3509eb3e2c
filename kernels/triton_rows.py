"""The per-row work of the loss in three kernels, where torch takes some 250 operations.

weights_kernel  One program: the factors u and w of each row's CE and KL, from weights, sums of
                weights and the upstream gradient.
prepare_kernel  One program per row: its logits at the held-out columns, how much they moved, and
                where the online softmax starts.
finish_kernel   One program per row and block of D, after `triton_sweep.visit`: merges the splits,
                stores CE, KL, entropy and the loss, and completes the gradient: adds the held-out
                rows of W and subtracts m.

The equations are those of README.md and of `tiled.shared`, which says more about them. Numbers per
row are fp64, [N, D] sums fp32 (fp64 for fp64). triton_frozen.py launches them for one frozen head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_sweep import NOWHERE
from .triton_tiles import tanh

LOWEST = tl.constexpr(-1e30)  # in place of a reference of -inf, whose differences would be NaN
NONE_HELD = tl.constexpr(NOWHERE)
# How a weight is divided: not at all, by its sum over the rows, by a number on the device.
BY_NOTHING, BY_SUM, BY_NUMBER = (tl.constexpr(i) for i in range(3))


# --------------------------------------------------------------------------------------------------
# kernels


@triton.jit
def factor(sum_of_weights, number_ptr, scale, BY: tl.constexpr):
    """scale / denominator, 0 where the denominator is 0; fp64"""
    d = sum_of_weights
    if BY == BY_NUMBER:
        d = tl.load(number_ptr).to(tl.float64)
    found = tl.where(d == 0, 0.0, 1.0 / tl.where(d == 0, 1.0, d))
    if BY == BY_NOTHING:
        found = tl.full((), 1.0, tl.float64)
    return found * scale


@triton.jit(do_not_specialize=["N", "alpha", "beta", "bound", "stride_g"])
def weights_kernel(
    label_ptr, ce_weight_ptr, kl_weight_ptr,  # [N] int64, [N], [N] of any dtype
    ce_number_ptr, kl_number_ptr,  # []
    g_ptr, C_ptr,  # [N]: upstream gradient, and the teacher's mass
    factor_ptr,  # [3, N]: u, w, and unit in the last row's first place
    N, alpha, beta, bound, stride_g,
    IGNORED: tl.constexpr,  # the label of rows without CE
    CE_BY: tl.constexpr, KL_BY: tl.constexpr, HAS_CE_WEIGHT: tl.constexpr,
    HAS_KL_WEIGHT: tl.constexpr, TEACHER: tl.constexpr, HAS_G: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """u = alpha a / (sum of a), w = beta k / (sum of k), both times the upstream gradient. In an
    ignored row a is 0.

    unit: a power of 2. No entry of dx times unit exceeds 2^14, so fp16 holds entries down to 2^-38
    of the largest."""
    at = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.float64)
    ce_sum, kl_sum = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for pass_ in tl.static_range(2):
        u, w = alpha, beta
        if pass_ == 1:
            u = factor(tl.sum(ce_sum, 0), ce_number_ptr, alpha, CE_BY)
            w = factor(tl.sum(kl_sum, 0), kl_number_ptr, beta, KL_BY)
        if pass_ == 1 or CE_BY == BY_SUM or KL_BY == BY_SUM:
            for first in range(0, N, BLOCK):
                n, row = first + at, first + at < N
                a, k = row.to(tl.float64), row.to(tl.float64)
                if HAS_CE_WEIGHT:
                    a = tl.load(ce_weight_ptr + n, mask=row, other=0).to(tl.float64)
                if HAS_KL_WEIGHT:
                    k = tl.load(kl_weight_ptr + n, mask=row, other=0).to(tl.float64)
                label = tl.load(label_ptr + n, mask=row, other=IGNORED)
                a = tl.where(label == IGNORED, 0.0, a)
                if pass_ == 0:
                    ce_sum += a
                    kl_sum += k
                else:
                    a, k = a * u, k * w
                    if not TEACHER:
                        k = k * 0
                    if HAS_G:
                        g = tl.load(g_ptr + n * stride_g, mask=row, other=0).to(tl.float64)
                        a, k = a * g, k * g
                    tl.store(factor_ptr + n, a.to(factor_ptr.dtype.element_ty), mask=row)
                    tl.store(factor_ptr + N + n, k.to(factor_ptr.dtype.element_ty), mask=row)
                    if UNIT:
                        C = a * 0
                        if TEACHER:
                            C = tl.load(C_ptr + n, mask=row, other=0).to(tl.float64)
                        most = tl.maximum(most, tl.abs(a) + (C + 1) * tl.abs(k))
    if UNIT:
        top = (tl.max(most, 0) * bound).to(tl.float32)
        unit = tl.exp2(14.0 - tl.ceil(tl.log2(tl.where(top > 0, top, 1.0))))
        unit = tl.where(top > 0, unit, 1.0).to(factor_ptr.dtype.element_ty)
        tl.store(factor_ptr + 2 * N, unit)


@triton.jit
def columns_of(n, label_ptr, top_ptr, p_ptr, IGNORED: tl.constexpr, K: tl.constexpr,
               HELD: tl.constexpr):  # fmt: skip
    """The held-out columns of row n: the teacher's top K, then the label; past them nothing.

    Returns columns [HELD] int64, P [HELD] fp64 at the top, which of them are held out, which is
    the label, and whether the label is not among the top."""
    j = tl.arange(0, HELD)
    label = tl.load(label_ptr + n)
    label = tl.where(label == IGNORED, 0, label)
    top = tl.load(top_ptr + n * K + j, mask=j < K, other=0)
    P = tl.load(p_ptr + n * K + j, mask=j < K, other=0.0).to(tl.float64)
    columns = tl.where(j < K, top, label)
    massive = P > 0  # a column without mass may be a placeholder
    own = tl.max((massive & (columns == label)).to(tl.int32), 0) == 0
    held = massive | ((j == K) & own)  # a label among the top must not count twice
    return columns, P, held, held & (columns == label), own


@triton.jit(do_not_specialize=["N"])
def prepare_kernel(
    h_ptr, W_ptr, bias_ptr, keep_ptr,  # [N, D], [V, D], [V], [V] int8
    label_ptr, ht_ptr, m_ptr, top_ptr, p_ptr,  # [N] int64, and the teacher's
    held_ptr, start_ptr,  # for sums_kernel; drift [N] follows start's channels
    z_ptr, still_ptr,  # [2, N, HELD]: z and dz; [N] int8
    factor_ptr, clean_ptr,  # [2, N], [N, D]: h without NaN and infinity in rows without weight
    N, D, stride_hn, stride_hd, stride_wv, stride_wd, stride_tn,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, NEAR: tl.constexpr, TAU_1: tl.constexpr,
    IGNORED: tl.constexpr,
    TEACHER: tl.constexpr,  # the loss needs dz and drift
    STILL: tl.constexpr,  # a row that has not moved has neither KL nor gradient
    MASKED: tl.constexpr,  # the softmax starts from a kept column
    CLEAN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, CHANNELS: tl.constexpr,
    K: tl.constexpr, HELD: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z at a row's held-out columns, dz = s <h - h_t, W_v>, drift = <h - h_t, m>, and the
    reference from which the sums over the other columns start"""
    n = tl.program_id(0).to(tl.int64)
    j, offs_d = tl.arange(0, HELD), tl.arange(0, BLOCK_D)
    columns, P, held, is_label, own = columns_of(n, label_ptr, top_ptr, p_ptr, IGNORED, K, HELD)
    z = tl.zeros((HELD, BLOCK_D), ACC)
    dz = tl.zeros((HELD, BLOCK_D), ACC)
    drift = tl.zeros((BLOCK_D,), ACC)
    moved = tl.zeros((BLOCK_D,), tl.int32)
    for d in range(0, D, BLOCK_D):
        unit = d + offs_d < D
        h = tl.load(h_ptr + n * stride_hn + (d + offs_d) * stride_hd, mask=unit, other=0).to(ACC)
        if CLEAN:
            weighs = (tl.load(factor_ptr + n) != 0) | (tl.load(factor_ptr + N + n) != 0)
            clean = tl.where(weighs, h, tl.where(tl.abs(h) < float("inf"), h, 0.0))
            at = clean_ptr + n * D + d + offs_d
            tl.store(at, clean.to(clean_ptr.dtype.element_ty), mask=unit)
        at = W_ptr + columns[:, None] * stride_wv + (d + offs_d)[None, :] * stride_wd
        W = tl.load(at, mask=(j <= K)[:, None] & unit[None, :], other=0).to(ACC)
        z += W * h[None, :]
        if TEACHER or STILL:
            step = h - tl.load(ht_ptr + n * stride_tn + d + offs_d, mask=unit, other=0).to(ACC)
            moved = moved | (step != 0).to(tl.int32)
            if TEACHER:
                m = tl.load(m_ptr + n * D + d + offs_d, mask=unit, other=0).to(ACC)
                dz += W * step[None, :]
                drift += step * m
    x = tl.sum(z, 1)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=j <= K, other=0).to(ACC)
    x = x * SCALE
    if HAS_SOFTCAP:
        x = SOFTCAP * tanh(x * (1.0 / SOFTCAP), NEAR)
    tl.store(z_ptr + n * HELD + j, x)
    if TEACHER:
        tl.store(z_ptr + (N + n) * HELD + j, tl.sum(dz, 1) * SCALE)
        tl.store(start_ptr + CHANNELS * N + n, tl.sum(drift, 0))
    if STILL:
        tl.store(still_ptr + n, (tl.max(moved, 0) == 0).to(tl.int8))
    inside = held
    if MASKED:
        # a dropped logit far above the kept ones would make their exponentials 0
        inside = held & (tl.load(keep_ptr + columns, mask=held, other=0) != 0)
    reference = tl.max(tl.where(inside, x, -float("inf")), 0)
    tl.store(start_ptr + n, tl.maximum(reference, LOWEST))
    if CHANNELS == 2:
        tl.store(start_ptr + N + n, tl.maximum(reference * (1.0 / TAU_1), LOWEST))
    tl.store(held_ptr + n * HELD + j, tl.sort(tl.where(held, columns, NONE_HELD).to(tl.int32)))


@triton.jit
def merged(m_ptr, total_ptr, entropy_ptr, n, N, splits, SPLITS: tl.constexpr,
           ENTROPY: tl.constexpr):  # fmt: skip
    """A channel's m, total and entropy of row n over all splits; log of exp(m) total. fp64"""
    s = tl.arange(0, SPLITS)
    m = tl.load(m_ptr + s * N + n, mask=s < splits, other=-float("inf")).to(tl.float64)
    top = tl.max(m, 0)
    r = tl.exp(m - top)
    totals = tl.load(total_ptr + s * N + n, mask=s < splits, other=0.0)
    total = tl.sum(r * totals, 0)
    entropy = total * 0
    if ENTROPY:
        entropies = tl.load(entropy_ptr + s * N + n, mask=s < splits, other=0.0)
        entropy = tl.sum(tl.where(s < splits, r * (entropies - (m - top) * totals), 0.0), 0)
    log = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
    return top, total, entropy, log


@triton.jit
def tell(found_ptr, n, N, u, w, ce, kl, H):
    """found [4, N] of row n: u CE + w KL, CE, KL and entropy"""
    loss = tl.where(u == 0, 0.0, u * ce) + tl.where(w == 0, 0.0, w * kl)
    tl.store(found_ptr + n, loss.to(found_ptr.dtype.element_ty))
    tl.store(found_ptr + N + n, ce.to(found_ptr.dtype.element_ty))
    tl.store(found_ptr + 2 * N + n, kl.to(found_ptr.dtype.element_ty))
    tl.store(found_ptr + 3 * N + n, H.to(found_ptr.dtype.element_ty))


@triton.jit
def share(m, total, lse):
    """exp(m - lse), the factor from e to a probability; 0 where nothing was added"""
    return tl.where(total > 0, tl.exp(m - lse), 0.0)


@triton.jit
def log_sum(x, a, b):
    """logsumexp of x [HELD] and two numbers, not all of them -inf; fp64"""
    top = tl.maximum(tl.max(x, 0), tl.maximum(a, b))
    return top + tl.log(tl.sum(tl.exp(x - top), 0) + tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def added(dh, f, part_ptr, reached_ptr, m, n, N, D, offs_d, unit, parts, P_SCALE: tl.constexpr):
    """dh [BLOCK_D] + f * (a channel's product, brought to the reference m)"""
    for s in range(0, parts):
        r = tl.exp(tl.load(reached_ptr + s * N + n).to(tl.float64) - m) * (f / P_SCALE)
        part = tl.load(part_ptr + (s * N + n) * D + offs_d, mask=unit, other=0.0)
        dh += part * r.to(dh.dtype)
    return dh


def finish_warps(dtype: torch.dtype) -> int:
    """Warps of `finish_kernel` for a head of this dtype. With 8, 16-bit heads spill on sm_80; with
    4, fp32 ones on sm_90."""
    return 4 if dtype.itemsize == 2 else 8


@triton.jit(do_not_specialize=["N", "splits", "parts"])
def finish_kernel(
    W_ptr, keep_ptr, label_ptr, top_ptr, p_ptr,
    m_rest_ptr, C_ptr, lse_t_ptr,  # the teacher's [N, D], [N], [N] fp64
    z_ptr, start_ptr, still_ptr, factor_ptr,  # as the kernels above left them
    m_ptr, total_ptr, entropy_ptr, part_ptr, reached_ptr,  # see triton_sweep.Visited
    found_ptr, dh_ptr,  # [4, N]: u CE + w KL, CE, KL, entropy; [N, D]
    N, D, splits, parts, stride_wv, stride_wd,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TAU: tl.constexpr, P_SCALE: tl.constexpr,
    IGNORED: tl.constexpr,
    TEACHER: tl.constexpr, STILL: tl.constexpr, MASKED: tl.constexpr,  # as in prepare_kernel
    HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, GRADIENT: tl.constexpr,
    CHANNELS: tl.constexpr,
    APART: tl.constexpr,  # channel 1 has the columns that channel 0 leaves out; else another tau
    K: tl.constexpr, HELD: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """u CE + w KL, CE, KL, entropy and d(u CE + w KL)/dh of a row: README.md, held-out columns"""
    n = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, HELD)
    columns, P, held, is_label, own = columns_of(n, label_ptr, top_ptr, p_ptr, IGNORED, K, HELD)
    u = tl.load(factor_ptr + n).to(tl.float64)
    w = tl.load(factor_ptr + N + n).to(tl.float64)
    m_0, total_0, entropy_0, log_0 = merged(m_ptr, total_ptr, entropy_ptr, n, N, splits, SPLITS,
                                            ENTROPY)  # fmt: skip
    m_1, total_1, entropy_1, log_1 = m_0, total_0, entropy_0, log_0
    if CHANNELS == 2:
        m_1, total_1, entropy_1, log_1 = merged(
            m_ptr + splits * N, total_ptr + splits * N, entropy_ptr + splits * N, n, N, splits,
            SPLITS, ENTROPY and APART)  # fmt: skip
    x = tl.load(z_ptr + n * HELD + j).to(tl.float64)
    z = tl.where(held, x, -float("inf"))
    z_label = tl.sum(tl.where(j == K, x, 0.0), 0)

    # cross-entropy, over the whole vocabulary at temperature 1
    log_apart = u * 0 - float("inf")  # not log_0 * 0: log_0 may be -inf
    if APART:
        log_apart = log_1
    lse = log_sum(z, log_0, log_apart)
    ignored = tl.load(label_ptr + n) == IGNORED
    ce = tl.where(ignored, 0.0, lse - z_label)
    Q = tl.exp(z - lse)
    f = u * (Q - is_label.to(tl.float64))  # of the held-out rows of W
    if HAS_SOFTCAP:  # without a teacher only
        f = tl.where(held, f * (1.0 - (x / SOFTCAP) * (x / SOFTCAP)), 0.0)
    f_0, f_1 = u * share(m_0, total_0, lse), u * 0
    H = u * 0
    if ENTROPY:
        H = tl.sum(tl.where(Q > 0, Q * (lse - x), 0.0), 0)
        H += share(m_0, total_0, lse) * ((lse - m_0) * total_0 + entropy_0)
    if APART:
        f_1 = u * share(m_1, total_1, lse)
        if ENTROPY:
            H += share(m_1, total_1, lse) * ((lse - m_1) * total_1 + entropy_1)

    kl, f_m = u * 0, u * 0
    if TEACHER:
        C, lse_t = tl.load(C_ptr + n).to(tl.float64), tl.load(lse_t_ptr + n)
        shift = tl.load(z_ptr + (N + n) * HELD + j).to(tl.float64) * (1.0 / TAU)
        shift = tl.where(P > 0, shift, 0.0)
        in_support = own
        if MASKED:
            y = tl.where(ignored, 0, tl.load(label_ptr + n))
            in_support = own & (tl.load(keep_ptr + y) != 0)
        log_q, m_q, total_q = log_0, m_0, total_0  # the channel of Q
        if CHANNELS == 2 and not APART:
            log_q, m_q, total_q = log_1, m_1, total_1
        # The student's exp(z / tau - lse_t) in three parts, as logarithms. Their sum is
        # S = exp(lse_s - lse_t): 1 for a row that has not moved.
        top = tl.where(P > 0, tl.log(tl.where(P > 0, P, 1.0)) + shift, -float("inf"))
        label = tl.where(in_support, z_label * (1.0 / TAU) - lse_t, -float("inf"))
        log_S = log_sum(top, label, log_q - lse_t)
        drift = tl.load(start_ptr + CHANNELS * N + n).to(tl.float64) * (SCALE / TAU)
        kl = TAU * TAU * (C * log_S - tl.sum(P * shift, 0) - drift)
        still = w == 0
        if STILL:
            not_moved = tl.load(still_ptr + n) != 0
            kl = tl.where(not_moved, 0.0, kl)
            still = still | not_moved
        f_m = tl.where(still, 0.0, w * TAU)
        of_top = tl.where(P > 0, C * tl.exp(top - log_S) - P, 0.0)
        of_label = tl.where(j == K, C * tl.exp(label - log_S), 0.0)
        f_q = f_m * C * share(m_q, total_q, lse_t + log_S)
        if TAU != 1:  # products of two temperatures
            f_1 = f_q
        else:
            f_0 += f_q
        f += f_m * (of_top + of_label)
        # a teacher's row may hold anything where it has no weight
        f = tl.where(still, u * (Q - is_label.to(tl.float64)), f)
        f_0 = tl.where(still, u * share(m_0, total_0, lse), f_0)
        if TAU != 1:
            f_1 = tl.where(still, 0.0, f_1)
    dead = (u == 0) & (w == 0)  # such a row may hold anything
    if tl.program_id(1) == 0:
        tell(found_ptr, n, N, u, w, ce, kl, H)
    if GRADIENT:
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        unit = offs_d < D
        dh = tl.zeros((BLOCK_D,), dh_ptr.dtype.element_ty)
        dh = added(dh, f_0, part_ptr, reached_ptr, m_0, n, N, D, offs_d, unit, parts, P_SCALE)
        if CHANNELS == 2:
            second = part_ptr + parts.to(tl.int64) * N * D
            dh = added(dh, f_1, second, reached_ptr + parts * N, m_1, n, N, D, offs_d, unit, parts,
                       P_SCALE)  # fmt: skip
        if TEACHER:
            m = tl.load(m_rest_ptr + n * D + offs_d, mask=unit, other=0)
            dh -= tl.where(still, 0.0, m.to(dh.dtype) * f_m.to(dh.dtype))
        at = W_ptr + columns[:, None] * stride_wv + offs_d[None, :] * stride_wd
        W = tl.load(at, mask=held[:, None] & unit[None, :], other=0).to(dh.dtype)
        dh += tl.sum(W * tl.where(held, f, 0.0).to(dh.dtype)[:, None], 0)
        tl.store(dh_ptr + n * D + offs_d, tl.where(dead, 0.0, dh * SCALE), mask=unit)


# --------------------------------------------------------------------------------------------------
# host


class Weights(NamedTuple):
    """What the loss makes of CE and KL of the rows: alpha a CE / (sum a) + beta k KL / (sum k).

    ce_weight, kl_weight            a and k, [N] of any dtype; None = ones
    ce_denominator, kl_denominator  a number on the device; None: the sum of weights if `mean`, else
                                    none: alpha and beta are divided already
    ignore_index                    the label of rows without CE
    """

    alpha: float
    beta: float
    ce_weight: Tensor | None
    kl_weight: Tensor | None
    ce_denominator: Tensor | None
    kl_denominator: Tensor | None
    ce_mean: bool
    kl_mean: bool
    ignore_index: int


def factors(
    labels: Tensor,
    weights: Weights,
    C: Tensor | None,
    acc: torch.dtype,
    g: Tensor | None = None,
    bound: float | None = None,
) -> Tensor:
    """[3, N]: u and w, the factors of each row's CE and KL; and unit in the first place of the last
    row.

    C      the teacher's; None without one
    g      [N], the upstream gradient
    bound  the most that u + (C + 1) w is multiplied by in dx; None: unit is not computed
    """
    (alpha, beta, a, k, ce_number, kl_number, ce_mean, kl_mean, ignored), N = weights, len(labels)
    made = labels.new_empty((3, N), dtype=acc)
    read = lambda x: labels if x is None else (x.view(torch.int8) if x.dtype == torch.bool else x)
    by = lambda number, mean: BY_NUMBER if number is not None else BY_SUM if mean else BY_NOTHING
    weights_kernel[(1,)](
        labels, read(a), read(k), read(ce_number), read(kl_number), read(g), read(C), made,
        N, alpha, beta, bound or 0.0, 0 if g is None else g.stride(0),
        IGNORED=ignored, CE_BY=by(ce_number, ce_mean), KL_BY=by(kl_number, kl_mean),
        HAS_CE_WEIGHT=a is not None, HAS_KL_WEIGHT=k is not None, TEACHER=C is not None,
        HAS_G=g is not None, UNIT=bound is not None, BLOCK=1024,
        num_warps=8,
    )  # fmt: skip
    return made
