"""The kernels of the general path: student and teacher meet on the chip.

normalise_kernel    One program per block of rows and split of the columns. Forms tiles of z and t,
                    from one load of the head where both share it; sums the online softmax of z, and
                    P and P (t - z). Nothing of [N, V] leaves the chip.
settle_kernel       One program per row: merges the splits; logsumexps, CE, KL, entropy, loss.
coefficient_kernel  One program per block of rows and tile. Forms z and t again, and from them dx =
                    d loss / dx, complete and exactly normalised before it is rounded. dx leaves the
                    chip for one chunk of columns at a time. db leaves as one partial per block of
                    rows.
outer_kernel        dW = dx^T h: one program per tile of dW, straight into the head's dtype
fold_kernel         the sums over a chunk's tiles that the KL needs, where the second pass makes it
gather_kernel       dh from the partials of product_kernel (triton_tiles.py), and that KL
bias_kernel         db from its partials

triton_general.py launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import merged, share, tell
from .triton_tiles import ALL, NONE, add, nearest_bf16, only, times_head, transform


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
def minus(z, lse_ptr, offs_n, row):
    """z - lse, with lse [N] fp64 in two parts: once the leading digits have cancelled, z has room
    for the lower part."""
    lse = tl.load(lse_ptr + offs_n, mask=row, other=0.0)
    high = lse.to(z.dtype)
    return (z - high[:, None]) - (lse - high.to(tl.float64)).to(z.dtype)[:, None]


@triton.jit
def teaching(t, z, kept, lse_t_ptr, offs_n, row, TAU: tl.constexpr, MASKED: tl.constexpr):
    """P of a tile, 0 on dropped columns, and the row sums [BLOCK_N] fp64 of P and of P (t - z) /
    tau"""
    P = tl.exp(minus(t * (1.0 / TAU), lse_t_ptr, offs_n, row))
    if MASKED:
        P = tl.where(kept[None, :], P, 0.0)
    gap = tl.where(P > 0, P * ((t - z) * (1.0 / TAU)), 0.0)  # P = 0 where t is -inf
    return P, tl.sum(P, 1).to(tl.float64), tl.sum(gap, 1).to(tl.float64)


@triton.jit(do_not_specialize=["N", "V", "tiles"])
def normalise_kernel(
    # [N, D], [V, D], [V], [N, Dt], [V, Dt], [V], [V] int8
    h_ptr, W_ptr, bias_ptr, ht_ptr, Wt_ptr, bias_t_ptr, keep_ptr,
    lse_t_ptr,  # [N] fp64, the teacher's logsumexp
    start_ptr,  # [channels, N]: m to begin with
    shift_ptr, total_ptr, entropy_ptr,  # [channels, splits, N]
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
    """m, total and entropy of each channel over this split's tiles, as in tiled.Sums.add. With a
    TEACHER also mass = sum P and gap = sum P (t - z) / tau, from which general.divergence makes the
    KL."""
    block, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j, offs_d = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    row = offs_n < N
    state = split * N + offs_n
    m_0 = tl.load(start_ptr + offs_n, mask=row, other=0.0)
    total_0 = tl.zeros((BLOCK_N,), dtype=tl.float64)
    entropy_0, mass, gap = total_0, total_0, total_0
    m_1, total_1, entropy_1 = m_0, total_0, total_0
    if COLUMNS_1 != NONE:
        m_1 = tl.load(start_ptr + N + offs_n, mask=row, other=0.0)
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
            _, p, g = teaching(t, z, kept, lse_t_ptr, offs_n, row, TAU, MASKED)
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
    # [N]: fp64, fp64, fp64, int64, then weights; int8
    lse_ptr, lse_q_ptr, lse_t_ptr, label_ptr, u_ptr, w_ptr, C_ptr, still_ptr,
    unit_ptr,  # []: factor on dx, so that fp16 holds it; not read without UNIT
    # [N, columns of a chunk], [row blocks, V], [row tiles, N] fp64 twice
    dx_ptr, db_ptr, mass_ptr, gap_ptr,
    N, V, D, Dt, first_tile,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_htn, stride_htd, stride_wtv, stride_wtd,
    stride_xn,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TAU: tl.constexpr, NEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    TEACHER: tl.constexpr, SAME_HEAD: tl.constexpr,
    MASKED: tl.constexpr, RENORMALIZE: tl.constexpr, NEED_B: tl.constexpr,
    UNIT: tl.constexpr,
    STILL: tl.constexpr,  # a row that has not moved has no KL
    NEED_KL: tl.constexpr,  # mass and gap are wanted
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
    w = tl.zeros((BLOCK_N,), ACC)
    dx = tl.exp(minus(z, lse_ptr, offs_n, row))
    dx = u[:, None] * tl.where(label[:, None] == offs_v[None, :], dx - 1.0, dx)
    if TEACHER:
        kept = column
        if MASKED:
            kept = tl.load(keep_ptr + offs_v, mask=column, other=0) != 0
        P, mass, gap = teaching(t, z, kept, lse_t_ptr, offs_n, row, TAU, MASKED)
        w = tl.load(w_ptr + offs_n, mask=row, other=0.0) * TAU
        C = tl.load(C_ptr + offs_n, mask=row, other=0.0).to(ACC)
        Q = tl.exp(minus(z * (1.0 / TAU), lse_q_ptr, offs_n, row))
        if MASKED and RENORMALIZE:
            Q = tl.where(kept[None, :], Q, 0.0)
        pull = w
        if STILL:
            pull = tl.where(tl.load(still_ptr + offs_n, mask=row, other=0) != 0, 0.0, w)
        # a teacher's row may hold anything where it has no weight
        dx += tl.where(pull[:, None] == 0, 0.0, pull[:, None] * (C[:, None] * Q - P))
        if NEED_KL:
            at = j.to(tl.int64) * N + offs_n
            tl.store(mass_ptr + at, mass, mask=row)
            tl.store(gap_ptr + at, gap, mask=row)
    if HAS_SOFTCAP:
        y = z * (1.0 / SOFTCAP)
        dx = tl.where(column[None, :], dx * (1.0 - y * y), 0.0)
    if UNIT:
        dx = dx * tl.load(unit_ptr)
    weighs = row & ((u != 0) | (w != 0))  # such a row may hold anything
    dx = tl.where(weighs[:, None], dx * SCALE, 0.0)
    if NEED_B:
        tl.store(db_ptr + block.to(tl.int64) * V + offs_v, tl.sum(dx, 0), mask=column)
    if ROUND:
        dx = nearest_bf16(dx)
    offs_x = offs_n.to(tl.int64)[:, None] * stride_xn + (j * BLOCK_V + offs_j)[None, :]
    tl.store(dx_ptr + offs_x, dx.to(dx_ptr.dtype.element_ty), mask=row[:, None])


@triton.jit(do_not_specialize=["N", "V", "first"])
def outer_kernel(
    # [N, columns of a chunk, a multiple of BLOCK_V], [N, D], [], [V, D]
    dx_ptr, h_ptr, unit_ptr, dW_ptr,
    N, V, D, first,  # the chunk's columns: first <= v < V
    stride_xn, stride_hn, stride_hd,
    UNIT: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, ROUND: tl.constexpr,
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
        dx = tl.load(dx_at, mask=row[None, :], other=0.0)
        h_at = h_ptr + offs_n.to(tl.int64)[:, None] * stride_hn + offs_d[None, :] * stride_hd
        h = tl.load(h_at, mask=row[:, None] & unit[None, :], other=0.0)
        acc = tl.dot(dx.to(DOT), h.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
    if UNIT:
        acc = acc / tl.load(unit_ptr)
    if ROUND:
        acc = nearest_bf16(acc)
    at = dW_ptr + offs_v.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(at, acc.to(dW_ptr.dtype.element_ty), mask=column[:, None] & unit[None, :])


@triton.jit
def divergence(gap, mass, lse_q, C, lse_t, TAU: tl.constexpr):
    """KL from gap = sum_K P (t - z) / tau and mass = sum_K P. The mass is C up to the rounding of
    t, which is not small for large t. fp64"""
    none = mass == 0
    mass = tl.where(none, 1.0, mass)
    kl = C * (gap / mass + lse_q - lse_t - tl.log(mass / tl.where(none, 1.0, C)))
    return tl.where(none, 0.0, TAU * TAU * kl)


@triton.jit(do_not_specialize=["N", "splits"])
def settle_kernel(
    label_ptr, z_ptr, still_ptr, factor_ptr,  # [N] int64, [N, HELD], [N] int8, [2, N]: u and w
    m_ptr, total_ptr, entropy_ptr, mass_ptr, gap_ptr,  # as normalise_kernel left them
    C_ptr, lse_t_ptr,
    lse_ptr, found_ptr,  # [2, N] fp64, [4, N] as finish_kernel's
    N, splits,
    TAU: tl.constexpr, IGNORED: tl.constexpr,
    KL: tl.constexpr,  # normalise_kernel had a teacher
    STILL: tl.constexpr, ENTROPY: tl.constexpr, CHANNELS: tl.constexpr, APART: tl.constexpr,
    HELD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """For one row: both logsumexps, CE, KL (0 without a teacher), entropy, and u CE + w KL"""
    n = tl.program_id(0).to(tl.int64)
    u = tl.load(factor_ptr + n).to(tl.float64)
    w = tl.load(factor_ptr + N + n).to(tl.float64)
    m_0, total_0, entropy_0, lse = merged(m_ptr, total_ptr, entropy_ptr, n, N, splits, SPLITS,
                                          ENTROPY)  # fmt: skip
    lse_q = lse
    m_1, total_1, entropy_1 = m_0, total_0, entropy_0
    if CHANNELS == 2:
        m_1, total_1, entropy_1, log_1 = merged(
            m_ptr + splits * N, total_ptr + splits * N, entropy_ptr + splits * N, n, N, splits,
            SPLITS, ENTROPY and APART)  # fmt: skip
        if APART:
            top = tl.maximum(lse, log_1)
            lse = top + tl.log(tl.exp(lse - top) + tl.exp(log_1 - top))
        else:
            lse_q = log_1
    H = u * 0
    if ENTROPY:
        H = share(m_0, total_0, lse) * ((lse - m_0) * total_0 + entropy_0)
        if APART:
            H += share(m_1, total_1, lse) * ((lse - m_1) * total_1 + entropy_1)
    ignored = tl.load(label_ptr + n) == IGNORED
    ce = tl.where(ignored, 0.0, lse - tl.load(z_ptr + n * HELD).to(tl.float64))
    kl = u * 0
    if KL:
        s = tl.arange(0, SPLITS)
        gap = tl.sum(tl.load(gap_ptr + s * N + n, mask=s < splits, other=0.0), 0)
        mass = tl.sum(tl.load(mass_ptr + s * N + n, mask=s < splits, other=0.0), 0)
        C = tl.load(C_ptr + n).to(tl.float64)
        kl = divergence(gap, mass, lse_q, C, tl.load(lse_t_ptr + n), TAU)
        if STILL:
            kl = tl.where(tl.load(still_ptr + n) != 0, 0.0, kl)
    tl.store(lse_ptr + n, lse)
    tl.store(lse_ptr + N + n, lse_q)
    tell(found_ptr, n, N, u, w, ce, kl, H)


@triton.jit(do_not_specialize=["N", "tiles"])
def fold_kernel(mass_ptr, gap_ptr, folded_ptr, N, tiles, FIRST: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """folded [2, N] (+)= the sums over a chunk's tiles of mass and gap [tiles, N]; fp64"""
    n, at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK)
    mass = tl.zeros((BLOCK, BLOCK_N), tl.float64)
    gap = mass
    for first in range(0, tiles, BLOCK):
        there = (first + at < tiles)[:, None] & (n < N)[None, :]
        offs = (first + at).to(tl.int64)[:, None] * N + n[None, :]
        mass += tl.load(mass_ptr + offs, mask=there, other=0.0)
        gap += tl.load(gap_ptr + offs, mask=there, other=0.0)
    both, more = tl.sum(mass, 0), tl.sum(gap, 0)
    if not FIRST:
        both += tl.load(folded_ptr + n, mask=n < N, other=0.0)
        more += tl.load(folded_ptr + N + n, mask=n < N, other=0.0)
    tl.store(folded_ptr + n, both, mask=n < N)
    tl.store(folded_ptr + N + n, more, mask=n < N)


@triton.jit(do_not_specialize=["N", "parts"])
def gather_kernel(
    part_ptr, unit_ptr, dh_ptr,  # [parts, N, D], [], [N, D]
    folded_ptr, lse_ptr, C_ptr, lse_t_ptr, still_ptr, w_ptr, found_ptr,  # for the KL
    N, D, parts,
    TAU: tl.constexpr, KL: tl.constexpr, STILL: tl.constexpr, UNIT: tl.constexpr,
    ROUND: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dh = sum of parts / unit; with a KL also the row's KL, and its share of the loss"""
    n = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dh = tl.zeros((BLOCK_D,), part_ptr.dtype.element_ty)
    for s in range(0, parts):
        dh += tl.load(part_ptr + (s * N + n) * D + offs_d, mask=offs_d < D, other=0.0)
    if UNIT:
        dh = dh / tl.load(unit_ptr)
    if ROUND:
        dh = nearest_bf16(dh)
    tl.store(dh_ptr + n * D + offs_d, dh.to(dh_ptr.dtype.element_ty), mask=offs_d < D)
    if KL and tl.program_id(1) == 0:
        w = tl.load(w_ptr + n).to(tl.float64)
        kl = divergence(tl.load(folded_ptr + N + n), tl.load(folded_ptr + n),
                        tl.load(lse_ptr + N + n), tl.load(C_ptr + n).to(tl.float64),
                        tl.load(lse_t_ptr + n), TAU)  # fmt: skip
        if STILL:
            kl = tl.where(tl.load(still_ptr + n) != 0, 0.0, kl)
        loss = tl.load(found_ptr + n).to(tl.float64) + tl.where(w == 0, 0.0, w * kl)
        tl.store(found_ptr + n, loss.to(found_ptr.dtype.element_ty))
        tl.store(found_ptr + 2 * N + n, kl.to(found_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["V", "blocks"])
def bias_kernel(part_ptr, unit_ptr, db_ptr, V, blocks, UNIT: tl.constexpr, ROUND: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """db [V] = sum of part [blocks, V] / unit"""
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    db = tl.zeros((BLOCK,), part_ptr.dtype.element_ty)
    at = part_ptr + v
    for _ in range(0, blocks):
        db += tl.load(at, mask=v < V, other=0.0)
        at += V
    if UNIT:
        db = db / tl.load(unit_ptr)
    if ROUND:
        db = nearest_bf16(db)
    tl.store(db_ptr + v, db.to(db_ptr.dtype.element_ty), mask=v < V)
