"""general.py in Triton: a softcap, a head that trains, a teacher with another head. Student and
teacher meet on the chip.

normalise_kernel    One program per block of rows and split of the columns. Forms tiles of z and t,
                    from one load of the head where both share it; sums the online softmax of z, and
                    P and P (t - z). Nothing of [N, V] leaves the chip.
coefficient_kernel  One program per block of rows and tile. Forms z and t again, and from them dx =
                    d loss / dx, complete and exactly normalised before it is rounded. dx leaves the
                    chip for one chunk of columns at a time. db leaves as one partial per block of
                    rows.
product_kernel      dh += dx W, from triton_sweep.py
outer_kernel        dW = dx^T h: one program per tile of dW, straight into the head's dtype

No atomics, no locks, partials summed in a fixed order: bitwise reproducible. Flops: 2 N V D for
each product. A pass has one product, two with a teacher; dh and dW add one each.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .general import divergence
from .tiled import Head, Sums, Teacher, entropy_of, row_logits, same, working_dtype
from .triton_launch import GeneralPlan, general_launch, target_of
from .triton_sweep import (
    ALL,
    DROPPED,
    KEPT,
    NONE,
    Channel,
    _add,
    _dtypes,
    _units,
    add,
    nearest_bf16,
    only,
    product_kernel,
    times_head,
    transform,
)  # fmt: skip

# --------------------------------------------------------------------------------------------------
# kernels


@triton.jit
def pair(h_ptr, W_ptr, bias_ptr, ht_ptr, Wt_ptr, bias_t_ptr, offs_n, offs_v, offs_d, row, column,
         D, Dt,
         stride_hn, stride_hd, stride_wv, stride_wd, stride_htn, stride_htd, stride_wtv, stride_wtd,
         SCALE: tl.constexpr, SOFTCAP: tl.constexpr, NEAR: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
         HAS_BIAS: tl.constexpr,
         HAS_BIAS_T: tl.constexpr, TEACHER: tl.constexpr, SAME_HEAD: tl.constexpr,
         ACC: tl.constexpr, DOT: tl.constexpr,
         DOT_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
         BLOCK_D: tl.constexpr):  # fmt: skip
    """Tiles z and t (README.md), -inf outside of the matrix. Without a TEACHER t is z."""
    h_rows = h_ptr + offs_n.to(tl.int64)[:, None] * stride_hn
    W_rows = W_ptr + offs_v.to(tl.int64)[None, :] * stride_wv
    inside = row[:, None] & column[None, :]
    if SAME_HEAD:
        ht_rows = ht_ptr + offs_n.to(tl.int64)[:, None] * stride_htn
        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=ACC)
        t = tl.zeros((BLOCK_N, BLOCK_V), dtype=ACC)
        for d in range(0, D, BLOCK_D):
            unit = d + offs_d < D
            here = row[:, None] & unit[None, :]
            W = tl.load(
                W_rows + (d + offs_d)[:, None] * stride_wd,
                mask=unit[:, None] & column[None, :],
                other=0.0,
            ).to(DOT)
            h = tl.load(h_rows + (d + offs_d)[None, :] * stride_hd, mask=here, other=0.0).to(DOT)
            z = tl.dot(h, W, z, input_precision="ieee", out_dtype=ACC)
            ht = tl.load(ht_rows + (d + offs_d)[None, :] * stride_htd, mask=here, other=0.0).to(DOT)
            t = tl.dot(ht, W, t, input_precision="ieee", out_dtype=ACC)
    else:
        z = times_head(
            h_rows,
            W_rows,
            row,
            column,
            offs_d,
            D,
            stride_hd,
            stride_wd,
            ACC,
            DOT,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
        )
        t = z
        if TEACHER:
            ht_rows = ht_ptr + offs_n.to(tl.int64)[:, None] * stride_htn
            Wt_rows = Wt_ptr + offs_v.to(tl.int64)[None, :] * stride_wtv
            t = times_head(ht_rows, Wt_rows, row, column, offs_d, Dt, stride_htd, stride_wtd, ACC,
                           DOT_T,
                           BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
    z = transform(z, bias_ptr, offs_v, column, SCALE, SOFTCAP, NEAR, HAS_BIAS, HAS_SOFTCAP)
    if TEACHER:
        t = transform(t, bias_t_ptr, offs_v, column, SCALE, SOFTCAP, NEAR, HAS_BIAS_T, HAS_SOFTCAP)
    return tl.where(inside, z, -float("inf")), tl.where(inside, t, -float("inf"))


@triton.jit
def minus(z, lse_ptr, offs_n, row, N):
    """z - lse, with lse [2, N] in two parts: once the leading digits have cancelled, z has room for
    the lower part."""
    high = tl.load(lse_ptr + offs_n, mask=row, other=0.0)
    low = tl.load(lse_ptr + N + offs_n, mask=row, other=0.0)
    return (z - high[:, None]) - low[:, None]


@triton.jit
def teaching(t, z, kept, lse_t_ptr, offs_n, row, N, TAU: tl.constexpr, MASKED: tl.constexpr):
    """P of a tile, 0 on dropped columns, and the row sums [BLOCK_N] fp64 of P and of P (t - z) /
    tau"""
    P = tl.exp(minus(t * (1.0 / TAU), lse_t_ptr, offs_n, row, N))
    if MASKED:
        P = tl.where(kept[None, :], P, 0.0)
    gap = tl.where(P > 0, P * ((t - z) * (1.0 / TAU)), 0.0)  # P = 0 where t is -inf
    return P, tl.sum(P, 1).to(tl.float64), tl.sum(gap, 1).to(tl.float64)


@triton.jit(do_not_specialize=["N", "V", "tiles"])
def normalise_kernel(
    # [N, D], [V, D], [V], [N, Dt], [V, Dt], [V], [V] int8
    h_ptr, W_ptr, bias_ptr, ht_ptr, Wt_ptr, bias_t_ptr, keep_ptr,
    lse_t_ptr,  # [2, N]: the teacher's logsumexp in two parts, see _parts
    shift_ptr, total_ptr, entropy_ptr,  # [channels, splits, N], in place
    mass_ptr, gap_ptr,  # [splits, N] fp64: sum P, sum P (t - z) / tau
    N, V, D, Dt, tiles,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_htn, stride_htd, stride_wtv, stride_wtd,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TAU: tl.constexpr, JUMP: tl.constexpr,
    NEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    TEACHER: tl.constexpr, SAME_HEAD: tl.constexpr,
    MASKED: tl.constexpr,  # P is 0 on dropped columns
    COLUMNS_0: tl.constexpr, TAU_0: tl.constexpr, ENTROPY_0: tl.constexpr,
    COLUMNS_1: tl.constexpr, TAU_1: tl.constexpr, ENTROPY_1: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, DOT_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of each channel m, total and entropy as in triton_sweep.add, over this split's tiles; with a
    TEACHER also mass = sum P and gap = sum P (t - z) / tau, from which general.divergence has the
    KL."""
    block, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j, offs_d = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    row = offs_n < N
    state = split * N + offs_n
    m_0 = tl.load(shift_ptr + state, mask=row, other=0.0)
    total_0 = tl.zeros((BLOCK_N,), dtype=tl.float64)
    entropy_0, mass, gap = total_0, total_0, total_0
    m_1, total_1, entropy_1 = m_0, total_0, total_0
    if COLUMNS_1 != NONE:
        m_1 = tl.load(shift_ptr + splits * N + state, mask=row, other=0.0)
    share = tl.cdiv(tiles, splits)
    for tile in range(split * share, min(split * share + share, tiles)):
        offs_v = tile * BLOCK_V + offs_j
        column = offs_v < V
        z, t = pair(h_ptr, W_ptr, bias_ptr, ht_ptr, Wt_ptr, bias_t_ptr, offs_n, offs_v, offs_d,
                    row, column, D, Dt,
                    stride_hn, stride_hd, stride_wv, stride_wd, stride_htn, stride_htd, stride_wtv,
                    stride_wtd,
                    SCALE, SOFTCAP, NEAR, HAS_SOFTCAP, HAS_BIAS, HAS_BIAS_T, TEACHER, SAME_HEAD,
                    ACC, DOT, DOT_T,
                    BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
        kept = column
        if MASKED or COLUMNS_0 > ALL or COLUMNS_1 > ALL:
            kept = tl.load(keep_ptr + offs_v, mask=column, other=0) != 0
        if TEACHER:
            _, p, g = teaching(t, z, kept, lse_t_ptr, offs_n, row, N, TAU, MASKED)
            mass += p
            gap += g
        x = only(z, kept, COLUMNS_0) * (1.0 / TAU_0)
        _, _, m_0, total_0, entropy_0 = add(x, m_0, total_0, entropy_0, JUMP, ENTROPY_0)
        if COLUMNS_1 != NONE:
            x = only(z, kept, COLUMNS_1) * (1.0 / TAU_1)
            _, _, m_1, total_1, entropy_1 = add(x, m_1, total_1, entropy_1, JUMP, ENTROPY_1)
    tl.store(shift_ptr + state, m_0, mask=row)
    tl.store(total_ptr + state, total_0, mask=row)
    if ENTROPY_0:
        tl.store(entropy_ptr + state, entropy_0, mask=row)
    if COLUMNS_1 != NONE:
        tl.store(shift_ptr + splits * N + state, m_1, mask=row)
        tl.store(total_ptr + splits * N + state, total_1, mask=row)
        if ENTROPY_1:
            tl.store(entropy_ptr + splits * N + state, entropy_1, mask=row)
    if TEACHER:
        tl.store(mass_ptr + state, mass, mask=row)
        tl.store(gap_ptr + state, gap, mask=row)


@triton.jit(do_not_specialize=["N", "V", "first_tile"])
def coefficient_kernel(
    h_ptr, W_ptr, bias_ptr, ht_ptr, Wt_ptr, bias_t_ptr, keep_ptr,
    # [2, N] each, then [N]; label int64; w holds the factor tau
    lse_ptr, lse_q_ptr, lse_t_ptr, label_ptr, u_ptr, w_ptr, C_ptr,
    unit_ptr,  # []: factor on dx, so that fp16 holds it
    # [N, room * BLOCK_V], [row blocks, V], [row tiles, N] fp64 twice
    dx_ptr, db_ptr, mass_ptr, gap_ptr,
    N, V, D, Dt, first_tile,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_htn, stride_htd, stride_wtv, stride_wtd,
    stride_xn,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TAU: tl.constexpr, NEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    TEACHER: tl.constexpr, SAME_HEAD: tl.constexpr,
    MASKED: tl.constexpr, RENORMALIZE: tl.constexpr, NEED_B: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, DOT_T: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = s dz/dx (u (softmax(z) - 1[y]) + w tau (C Q - P)) of one tile, times unit, into the
    chunk's columns of dx"""
    block, j = tl.program_id(0), tl.program_id(1)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j, offs_d = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    offs_v = (first_tile + j) * BLOCK_V + offs_j
    row, column = offs_n < N, offs_v < V
    z, t = pair(h_ptr, W_ptr, bias_ptr, ht_ptr, Wt_ptr, bias_t_ptr, offs_n, offs_v, offs_d, row,
                column, D, Dt,
                stride_hn, stride_hd, stride_wv, stride_wd, stride_htn, stride_htd, stride_wtv,
                stride_wtd,
                SCALE, SOFTCAP, NEAR, HAS_SOFTCAP, HAS_BIAS, HAS_BIAS_T, TEACHER, SAME_HEAD, ACC,
                DOT, DOT_T,
                BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
    u = tl.load(u_ptr + offs_n, mask=row, other=0.0)
    label = tl.load(label_ptr + offs_n, mask=row, other=-1)
    dx = tl.exp(minus(z, lse_ptr, offs_n, row, N))
    dx = u[:, None] * tl.where(label[:, None] == offs_v[None, :], dx - 1.0, dx)
    if TEACHER:
        kept = column
        if MASKED:
            kept = tl.load(keep_ptr + offs_v, mask=column, other=0) != 0
        P, mass, gap = teaching(t, z, kept, lse_t_ptr, offs_n, row, N, TAU, MASKED)
        w = tl.load(w_ptr + offs_n, mask=row, other=0.0)
        C = tl.load(C_ptr + offs_n, mask=row, other=0.0)
        Q = tl.exp(minus(z * (1.0 / TAU), lse_q_ptr, offs_n, row, N))
        if MASKED and RENORMALIZE:
            Q = tl.where(kept[None, :], Q, 0.0)
        dx += w[:, None] * (C[:, None] * Q - P)
        at = j.to(tl.int64) * N + offs_n
        tl.store(mass_ptr + at, mass, mask=row)
        tl.store(gap_ptr + at, gap, mask=row)
    if HAS_SOFTCAP:
        y = z * (1.0 / SOFTCAP)
        dx = tl.where(column[None, :], dx * (1.0 - y * y), 0.0)
    dx = tl.where(row[:, None], dx * (SCALE * tl.load(unit_ptr)), 0.0)
    if NEED_B:
        tl.store(db_ptr + block.to(tl.int64) * V + offs_v, tl.sum(dx, 0), mask=column)
    if ROUND:
        dx = nearest_bf16(dx)
    offs_x = offs_n.to(tl.int64)[:, None] * stride_xn + (j * BLOCK_V + offs_j)[None, :]
    tl.store(dx_ptr + offs_x, dx.to(dx_ptr.dtype.element_ty), mask=row[:, None])


@triton.jit(do_not_specialize=["N", "V", "first"])
def outer_kernel(
    dx_ptr, h_ptr, unit_ptr, dW_ptr,  # [N, room * BLOCK_V], [N, D], [], [V, D]
    N, V, D, first,  # the chunk's columns: first <= v < V
    stride_xn, stride_hn, stride_hd,
    ACC: tl.constexpr, DOT: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dW [BLOCK_V, BLOCK_D] = dx^T h / unit, over all rows"""
    offs_j = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_k, offs_v, unit = tl.arange(0, BLOCK_K), first + offs_j, offs_d < D
    column = offs_v < V
    acc = tl.zeros((BLOCK_V, BLOCK_D), dtype=ACC)
    for k in range(0, N, BLOCK_K):
        offs_n = k + offs_k
        row = offs_n < N
        dx_at = dx_ptr + offs_n.to(tl.int64)[None, :] * stride_xn + offs_j[:, None]
        dx = tl.load(dx_at, mask=row[None, :] & column[:, None], other=0.0)
        h_at = h_ptr + offs_n.to(tl.int64)[:, None] * stride_hn + offs_d[None, :] * stride_hd
        h = tl.load(h_at, mask=row[:, None] & unit[None, :], other=0.0)
        acc = tl.dot(dx.to(DOT), h.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
    acc = acc / tl.load(unit_ptr)
    if ROUND:
        acc = nearest_bf16(acc)
    at = dW_ptr + offs_v.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(at, acc.to(dW_ptr.dtype.element_ty), mask=column[:, None] & unit[None, :])


# --------------------------------------------------------------------------------------------------
# host


def normalise(
    h: Tensor,
    head: Head,
    y: Tensor,
    teacher: Teacher | None,
    with_kl: bool,
    entropy: bool,
    plan: GeneralPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`general.normalise`: CE, KL (0 unless `with_kl`), entropy and both logsumexps, all [N]
    fp64."""
    (N, D), V, device = h.shape, len(head.weight), h.device
    dtype = working_dtype(h, head.weight, head.bias)
    z_label = row_logits(h, head, y[:, None], dtype)[0][:, 0].double()
    tau = 1.0 if teacher is None else teacher.tau
    mask = teacher.keep if teacher is not None and teacher.renormalize else None
    acc = _dtypes(h, head.weight)[1]
    within = z_label if mask is None else z_label.masked_fill(~mask[y], -torch.inf)
    ones = Sums(within, 1.0, acc, 0, entropy)
    sums = [ones] if tau == 1 else [ones, Sums(within, tau, acc)]
    channels = [Channel(one, ALL) for one in sums]
    everything = [ones]
    if mask is not None:
        channels[-1] = Channel(sums[-1], KEPT)
        if tau == 1:
            apart = Sums(z_label, 1.0, acc, 0, entropy)
            channels.append(Channel(apart, DROPPED))
            everything = [ones, apart]

    plan = plan or _plan(h, head)
    BLOCK_N, BLOCK_V, BLOCK_D, num_warps, num_stages = plan.pair
    blocks, tiles = -(-N // BLOCK_N), -(-V // BLOCK_V)
    splits = min(plan.splits, tiles)
    shift = torch.stack([one.sums.shift for one in channels])  # [channels, N]
    shift = shift[:, None].repeat(1, splits, 1)  # [channels, splits, N]
    total = torch.zeros_like(shift, dtype=torch.float64)
    entropies, mass, gap = (
        torch.zeros_like(total),
        torch.zeros_like(total[0]),
        torch.zeros_like(total[0]),
    )
    flags: dict[str, Any] = {}
    for i in range(2):
        one = channels[i] if i < len(channels) else None
        flags |= {
            f"COLUMNS_{i}": NONE if one is None else one.columns,
            f"TAU_{i}": 1.0 if one is None else one.sums.tau,
            f"ENTROPY_{i}": one is not None and one.sums.entropy is not None,
        }
    taught = teacher if with_kl else None
    lse_t = shift if taught is None else _parts(taught.lse, acc)
    tensors, strides, options = _pair(h, head, taught, mask_of(teacher), acc)
    with nullcontext() if device.type == "cpu" else torch.cuda.device(device):
        normalise_kernel[(blocks, splits)](
            *tensors, lse_t, shift, total, entropies, mass, gap, N, V, D, tensors[3].shape[1],
            tiles, *strides,
            TAU=tau, JUMP=30.0, **flags, **options, BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V,
            BLOCK_D=BLOCK_D,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    for i, one in enumerate(channels):
        _add(one.sums, shift[i], total[i], entropies[i], None, one.sums.shift, 1, 1.0)
    lse = torch.logsumexp(torch.stack([x.log_total() for x in everything]), 0)
    lse_q, kl = sums[-1].log_total(), torch.zeros_like(z_label)
    if taught is not None:
        kl = divergence(gap.sum(0), mass.sum(0), lse_q, taught)
    return lse - z_label, kl, entropy_of(everything, lse), lse, lse_q


def differentiate(
    h: Tensor,
    head: Head,
    y: Tensor,
    teacher: Teacher | None,
    u: Tensor,
    w: Tensor,
    lse: Tensor,
    lse_q: Tensor,
    need_h: bool,
    need_W: bool,
    need_b: bool,
    plan: GeneralPlan | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`general.differentiate`: KL [N] fp64, and d(sum u CE + w KL) by h, W and b where needed."""
    (N, D), V, device = h.shape, len(head.weight), h.device
    dot, acc = _dtypes(h, head.weight)
    tau = 1.0 if teacher is None else teacher.tau
    plan = plan or _plan(h, head)
    BLOCK_N, BLOCK_V, BLOCK_D, num_warps, num_stages = plan.pair
    _, K, PRODUCT_D, product_warps, product_stages = plan.product
    OUTER_N, OUTER_V, OUTER_D, outer_warps, outer_stages = plan.outer
    cdiv = lambda a, b: -(-a // b)
    blocks, all_tiles = cdiv(N, BLOCK_N), cdiv(V, BLOCK_V)
    # tiles of a chunk; at most 65,535, the most programs in a grid's second dimension
    room = min(max(1, plan.chunk // BLOCK_V), all_tiles, 65_535)
    splits = min(plan.product_splits, room)
    # contiguous: the kernels take no strides of these
    u, w, y = u.to(acc).contiguous(), (w.to(acc) * tau).contiguous(), y.contiguous()
    C = w if teacher is None else teacher.C.to(acc).contiguous()
    # No entry of dx exceeds the largest of u + (C + 1) w. fp16 is scaled so that this is 2^14: it
    # then reaches 2^-38 below.
    unit = torch.ones((), dtype=acc, device=device)
    if dot == torch.float16 and N:
        top = (u.abs() + (0 if teacher is None else (C + 1) * w.abs())).amax() * abs(head.scale)
        unit = torch.exp2(14 - torch.ceil(torch.log2(top))).masked_fill(top == 0, 1.0).to(acc)
    dx = h.new_empty((N, room * BLOCK_V), dtype=dot)
    parts = h.new_zeros((splits, N, D), dtype=acc) if need_h else None
    dW = head.weight.new_empty(head.weight.shape) if need_W else None
    db = h.new_empty((blocks, V) if need_b else (1, 1), dtype=acc)
    mass, gap = (h.new_zeros((room, N), dtype=torch.float64) for _ in range(2))
    masses, gaps = (h.new_zeros(N, dtype=torch.float64) for _ in range(2))
    tensors, strides, options = _pair(h, head, teacher, mask_of(teacher), acc)
    lse, lse_q = _parts(lse, acc), _parts(lse_q, acc)
    lse_t = lse if teacher is None else _parts(teacher.lse, acc)
    renormalize = teacher is not None and teacher.renormalize
    interpreted = device.type == "cpu"
    wide, DOT = options["ACC"], options["DOT"]
    # product_kernel's list of tiles, and its references, which do not move here
    numbers = torch.arange(room, device=device, dtype=torch.int32).repeat(blocks, 1)
    still = torch.zeros((room, N), dtype=acc, device=device)
    with nullcontext() if interpreted else torch.cuda.device(device):
        for first in range(0, all_tiles, room):
            tiles = min(room, all_tiles - first)
            coefficient_kernel[(blocks, tiles)](
                *tensors, lse, lse_q, lse_t, y, u, w, C, unit, dx, db, mass, gap, N, V, D,
                tensors[3].shape[1], first, *strides,
                dx.stride(0), TAU=tau, RENORMALIZE=renormalize, NEED_B=need_b,
                ROUND=interpreted and dot == torch.bfloat16,
                **options, BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D, num_warps=num_warps,
                num_stages=num_stages,
            )  # fmt: skip
            if teacher is not None:
                masses += mass[:tiles].sum(0)
                gaps += gap[:tiles].sum(0)
            if parts is not None:
                share = cdiv(tiles, splits)
                starts = torch.arange(splits, device=device, dtype=torch.int32) * share
                count = (tiles - starts).clamp(0, share).repeat(blocks, 1)
                product_kernel[(blocks, cdiv(D, PRODUCT_D), splits)](
                    dx, head.weight, parts, numbers + first, count, still, still, still, still,
                    N, V, D, tiles, room, splits, 1, dx.stride(0), *head.weight.stride(), ACC=wide,
                    DOT=DOT,
                    BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_K=K, BLOCK_D=PRODUCT_D,
                    num_warps=product_warps, num_stages=product_stages,
                )  # fmt: skip
            if dW is not None:
                outer_kernel[(cdiv(tiles * BLOCK_V, OUTER_V), cdiv(D, OUTER_D))](
                    dx, h, unit, dW, N, min(V, (first + tiles) * BLOCK_V), D, first * BLOCK_V,
                    dx.stride(0), *h.stride(),
                    ACC=wide, DOT=DOT, ROUND=interpreted and dW.dtype == torch.bfloat16,
                    BLOCK_K=OUTER_N, BLOCK_V=OUTER_V, BLOCK_D=OUTER_D, num_warps=outer_warps,
                    num_stages=outer_stages,
                )  # fmt: skip
    kl = masses if teacher is None else divergence(gaps, masses, lse_q.double().sum(0), teacher)
    dh = None if parts is None else parts.sum(0) / unit
    if not need_b or head.bias is None:
        return kl, dh, dW, None
    return kl, dh, dW, (db.sum(0) / unit).to(head.bias.dtype)


def _plan(h: Tensor, head: Head) -> GeneralPlan:
    (N, D), V = h.shape, len(head.weight)
    return general_launch(
        N, V, D, _dtypes(h, head.weight)[0], target_of(h.device), _units(h.device)
    )


def _parts(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """lse [N] fp64 as [2, N]: rounded, and what the rounding lost."""
    high = lse.to(dtype)
    return torch.stack([high, (lse - high.double()).to(dtype)])


def mask_of(teacher: Teacher | None) -> Tensor | None:
    return None if teacher is None else teacher.keep


def _pair(
    h: Tensor, head: Head, teacher: Teacher | None, keep: Tensor | None, acc: torch.dtype
) -> tuple[list[Tensor], list[int], dict[str, Any]]:
    """What both kernels take first: tensors, strides, and constants.

    teacher: None where no KL is wanted
    keep:    [V], the teacher's mask, which also limits the columns of Q without a KL
    """
    ht, theirs = h, head._replace(bias=None)
    if teacher is not None:
        ht, theirs = teacher.hidden, teacher.head
    tensors = [
        h,
        head.weight,
        h if head.bias is None else head.bias.to(acc).contiguous(),
        ht,
        theirs.weight,
        h if theirs.bias is None else theirs.bias.to(acc).contiguous(),
        h if keep is None else keep.contiguous().view(torch.int8),
    ]
    interpreted = h.device.type == "cpu"
    wide = tl.float64 if acc == torch.float64 else tl.float32
    # Trap: the interpreter multiplies bf16 as the integers that hold it. Widening the operands
    # changes no value.
    narrow = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    dots = [
        wide if interpreted else narrow.get(_dtypes(x, W)[0], wide)
        for x, W in ((h, head.weight), (ht, theirs.weight))
    ]
    taught = teacher is not None
    one_head = taught and same(head.weight, theirs.weight) and h.dtype == ht.dtype
    options = dict(
        SCALE=head.scale, SOFTCAP=1.0 if head.softcap is None else head.softcap,
        NEAR=0.03 if acc == torch.float64 else 0.3,
        HAS_BIAS=head.bias is not None, HAS_BIAS_T=theirs.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        TEACHER=taught, SAME_HEAD=one_head, MASKED=taught and keep is not None, ACC=wide,
        DOT=dots[0], DOT_T=dots[1],
    )  # fmt: skip
    strides = [*h.stride(), *head.weight.stride(), *ht.stride(), *theirs.weight.stride()]
    return tensors, strides, options
