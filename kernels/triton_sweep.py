"""`tiled.sweep` in Triton: the sums of the softmax, and their products with the head, over the
whole vocabulary.

    e = exp(z / tau - m)    total = sum e    entropy = -sum e log e    product = sum e dz/dx W

sums_kernel     One program per block of rows and split of the columns. Forms each tile of z on the
                chip, with bias, scale, softcap, masks and held-out columns, and updates m, total
                and entropy as an online softmax does. Logits never leave the chip. For the product
                it stores e dz/dx of one chunk of columns, in 16 bit, without the skipped tiles.
product_kernel  One program per block of rows, block of D and split. Multiplies a chunk's e dz/dx by
                the head rows; accumulates in registers over the chunk, and in a partial of its own
                over the chunks. No atomics: bitwise reproducible.
combine_kernel  Sums the partials in a fixed order.

m starts from the Sums' shift, the largest held-out logit, and moves only where a logit lies more
than JUMP above it. So all splits nearly always share m and rescale nothing; where m moves,
product_kernel takes its loop with a factor per tile. z is formed once: 2 N V D flops without a
gradient, 4 N V D with one. The device sorts the held-out columns once, so that a tile visits only
those that lie in it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiled import Head, Sums
from .triton_launch import WAVES, Plan, split, target_of, triton_launch

NONE, ALL, KEPT, DROPPED = (tl.constexpr(i) for i in range(4))  # which columns a channel sums over


# --------------------------------------------------------------------------------------------------
# kernels


@triton.jit
def tanh(x, NEAR: tl.constexpr):
    """tanh with a relative error of a few eps. Below NEAR a series, because 1 - exp(-2 x) cancels.
    (The interpreter has no libdevice.)"""
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    s = x * x
    near = x * (
        1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0))))
    )
    return tl.where(s < NEAR * NEAR, near, tl.where(x < 0, -far, far))


@triton.jit
def times_head(x_rows, W_rows, row, column, offs_d, D, stride_xd, stride_wd, ACC: tl.constexpr,
               DOT: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One tile x W^T [BLOCK_N, BLOCK_V]"""
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=ACC)
    for d in range(0, D, BLOCK_D):
        unit = d + offs_d < D
        x = tl.load(
            x_rows + (d + offs_d)[None, :] * stride_xd, mask=row[:, None] & unit[None, :], other=0.0
        )
        W = tl.load(
            W_rows + (d + offs_d)[:, None] * stride_wd,
            mask=unit[:, None] & column[None, :],
            other=0.0,
        )
        z = tl.dot(x.to(DOT), W.to(DOT), z, input_precision="ieee", out_dtype=ACC)
    return z


@triton.jit
def transform(z, bias_ptr, offs_v, column, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
              NEAR: tl.constexpr,
              HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """z = softcap * tanh(x / softcap), x = scale * (h W^T + bias), of a tile h W^T"""
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=column, other=0.0)[None, :]
    z = z * SCALE
    if HAS_SOFTCAP:
        z = SOFTCAP * tanh(z * (1.0 / SOFTCAP), NEAR)
    return z


@triton.jit
def nearest_bf16(x):
    """fp32 rounded to the nearest bf16, ties to even, still in fp32. Trap: the interpreter's own
    cast truncates, where hardware rounds."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def only(z, kept, COLUMNS: tl.constexpr):
    """z [BLOCK_N, BLOCK_V], -inf at columns that a channel leaves out; kept [BLOCK_V] bool"""
    if COLUMNS == KEPT:
        z = tl.where(kept[None, :], z, -float("inf"))
    if COLUMNS == DROPPED:
        z = tl.where(kept[None, :], -float("inf"), z)
    return z


@triton.jit
def add(x, m, total, entropy, JUMP: tl.constexpr, ENTROPY: tl.constexpr):
    """Adds a tile x = z / tau [BLOCK_N, BLOCK_V] to running sums [BLOCK_N], total and entropy fp64.
    Returns e, its row maxima, and the new m, total and entropy."""
    top = tl.max(x, 1)
    new = tl.where(top > m + JUMP, top, m)
    r = tl.exp(m - new).to(tl.float64)
    x = x - new[:, None]
    e = tl.exp(x)
    if ENTROPY:  # -sum (r e) log(r e) for what was there
        entropy = r * (entropy - (m - new).to(tl.float64) * total)
        entropy -= tl.sum(tl.where(e > 0, e * x, 0.0), 1).to(tl.float64)
    total = r * total + tl.sum(e, 1).to(tl.float64)
    return e, tl.exp(top - new), new, total, entropy


@triton.jit
def leave(e, z, top, m, total, tile, first, slots, offs_n, offs_j, N, p_ptr, stride_pn, m_ptr,
          list_ptr,
          SOFTCAP: tl.constexpr, EPS: tl.constexpr, P_SCALE: tl.constexpr, ROUND: tl.constexpr,
          HAS_SOFTCAP: tl.constexpr,
          BLOCK_V: tl.constexpr):  # fmt: skip
    """Stores a tile of e dz/dx for product_kernel in its split's next slot. Where the tile is
    skipped, the next tile overwrites it.

    first: the split's first slot; slots: how many are in use. Returns their new number."""
    p = e
    if HAS_SOFTCAP:
        y = z * (1.0 / SOFTCAP)
        p = tl.where(e > 0, e * (1.0 - y * y), 0.0)  # e is 0 where z is -inf
    p = p * P_SCALE
    if ROUND:
        p = nearest_bf16(p)
    at = first + slots
    offs_p = offs_n.to(tl.int64)[:, None] * stride_pn + (at * BLOCK_V + offs_j)[None, :]
    tl.store(p_ptr + offs_p, p.to(p_ptr.dtype.element_ty), mask=(offs_n < N)[:, None])
    tl.store(m_ptr + at * N + offs_n, m, mask=offs_n < N)
    tl.store(list_ptr + at, tile)
    # the normaliser holds at least exp(m) and what is summed so far
    live = top > EPS * tl.maximum(total, 1.0).to(top.dtype)
    return slots + tl.max((live & (offs_n < N)).to(tl.int32), 0)


@triton.jit(do_not_specialize=["N", "V", "first_tile", "tiles", "room", "all_tiles"])
def sums_kernel(
    h_ptr, W_ptr, bias_ptr, keep_ptr,  # [N, D], [V, D], [V], [V] int8
    # [row blocks, held] int32, column * BLOCK_N + row, ascending; [row blocks, all_tiles + 1],
    # where each tile's begin
    held_ptr, cuts_ptr,
    # [channels, splits, N]: m before and after, and sums in place
    shift_ptr, new_shift_ptr, total_ptr, entropy_ptr,
    # [channels, N, room * BLOCK_V], [.., room, N], [.., row blocks, room or splits]
    p_ptr, m_ptr, list_ptr, count_ptr,
    # this launch: tiles first_tile .. first_tile + tiles, at most room
    N, V, D, first_tile, tiles, room, all_tiles,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_pc, stride_pn, stride_held,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, EPS: tl.constexpr, JUMP: tl.constexpr,
    P_SCALE: tl.constexpr, NEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    COLUMNS_0: tl.constexpr, TAU_0: tl.constexpr, ENTROPY_0: tl.constexpr, PRODUCT_0: tl.constexpr,
    COLUMNS_1: tl.constexpr, TAU_1: tl.constexpr, ENTROPY_1: tl.constexpr, PRODUCT_1: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """m, total and entropy of each channel over this split's tiles, and e dz/dx where a product is
    wanted"""
    block, split = tl.program_id(0), tl.program_id(1)
    blocks, splits = tl.num_programs(0), tl.num_programs(1)
    rows, offs_j, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    offs_n = block * BLOCK_N + rows
    row = offs_n < N
    h_rows = h_ptr + offs_n.to(tl.int64)[:, None] * stride_hn
    state = split * N + offs_n
    m_0 = tl.load(shift_ptr + state, mask=row, other=0.0)
    total_0 = tl.load(total_ptr + state, mask=row, other=0.0)
    entropy_0 = tl.load(entropy_ptr + state, mask=row, other=0.0)
    m_1, total_1, entropy_1 = m_0, total_0, entropy_0
    if COLUMNS_1 != NONE:
        m_1 = tl.load(shift_ptr + splits * N + state, mask=row, other=0.0)
        total_1 = tl.load(total_ptr + splits * N + state, mask=row, other=0.0)
        entropy_1 = tl.load(entropy_ptr + splits * N + state, mask=row, other=0.0)
    share = tl.cdiv(tiles, splits)
    first = split * share  # counted from first_tile, as slots are
    slots_0 = first * 0
    slots_1 = slots_0
    for j in range(first, min(first + share, tiles)):
        tile = first_tile + j
        offs_v = tile * BLOCK_V + offs_j
        column = offs_v < V
        W_rows = W_ptr + offs_v.to(tl.int64)[None, :] * stride_wv
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
        z = transform(z, bias_ptr, offs_v, column, SCALE, SOFTCAP, NEAR, HAS_BIAS, HAS_SOFTCAP)
        z = tl.where(row[:, None] & column[None, :], z, -float("inf"))
        cut = cuts_ptr + block.to(tl.int64) * (all_tiles + 1) + tile
        for i in range(tl.load(cut), tl.load(cut + 1)):
            key = tl.load(held_ptr + block.to(tl.int64) * stride_held + i)
            here = (rows == key % BLOCK_N)[:, None] & (offs_v == key // BLOCK_N)[None, :]
            z = tl.where(here, -float("inf"), z)
        kept = column
        if COLUMNS_0 > ALL or COLUMNS_1 > ALL:
            kept = tl.load(keep_ptr + offs_v, mask=column, other=0) != 0
        x = only(z, kept, COLUMNS_0) * (1.0 / TAU_0)
        e, top, m_0, total_0, entropy_0 = add(x, m_0, total_0, entropy_0, JUMP, ENTROPY_0)
        if PRODUCT_0:
            slots_0 = leave(e, z, top, m_0, total_0, tile, first, slots_0, offs_n, offs_j, N,
                            p_ptr, stride_pn, m_ptr,
                            list_ptr + block * room, SOFTCAP, EPS, P_SCALE, ROUND, HAS_SOFTCAP,
                            BLOCK_V)  # fmt: skip
        if COLUMNS_1 != NONE:
            x = only(z, kept, COLUMNS_1) * (1.0 / TAU_1)
            e, top, m_1, total_1, entropy_1 = add(x, m_1, total_1, entropy_1, JUMP, ENTROPY_1)
            if PRODUCT_1:
                slots_1 = leave(e, z, top, m_1, total_1, tile, first, slots_1, offs_n, offs_j, N,
                                p_ptr + stride_pc, stride_pn,
                                m_ptr + room * N, list_ptr + (blocks + block) * room, SOFTCAP, EPS,
                                P_SCALE, ROUND, HAS_SOFTCAP, BLOCK_V)  # fmt: skip
    tl.store(new_shift_ptr + state, m_0, mask=row)
    tl.store(total_ptr + state, total_0, mask=row)
    if ENTROPY_0:
        tl.store(entropy_ptr + state, entropy_0, mask=row)
    if PRODUCT_0:
        tl.store(count_ptr + block * splits + split, slots_0)
    if COLUMNS_1 != NONE:
        tl.store(new_shift_ptr + splits * N + state, m_1, mask=row)
        tl.store(total_ptr + splits * N + state, total_1, mask=row)
        if ENTROPY_1:
            tl.store(entropy_ptr + splits * N + state, entropy_1, mask=row)
        if PRODUCT_1:
            tl.store(count_ptr + (blocks + block) * splits + split, slots_1)


@triton.jit(do_not_specialize=["N", "V", "tiles", "room", "splits", "group"])
def product_kernel(
    p_ptr, W_ptr, part_ptr,  # [N, chunk], [V, D], [product splits, N, D]
    # [row blocks, room], [row blocks, splits], [room, N], as sums_kernel left them
    list_ptr, count_ptr, m_ptr,
    # [N], [splits, N], [splits, N]: m at the very start, before and after this chunk
    start_ptr, shift_ptr, new_shift_ptr,
    N, V, D, tiles, room, splits, group,  # group: splits of sums_kernel that one program here takes
    stride_pn, stride_wv, stride_wd,
    ACC: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """part = part * exp(m_before - m) + sum over the live tiles of exp(m_tile - m) p W, with the
    largest m of the group's splits"""
    block, block_d, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_d = tl.arange(0, BLOCK_K), block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    row, unit = offs_n < N, offs_d < D
    begin, end = split * group, min(split * group + group, splits)
    start = tl.load(start_ptr + offs_n, mask=row, other=0.0)
    before, m = start, start
    for s in range(begin, end):
        before = tl.maximum(before, tl.load(shift_ptr + s * N + offs_n, mask=row, other=0.0))
        m = tl.maximum(m, tl.load(new_shift_ptr + s * N + offs_n, mask=row, other=0.0))
    part = part_ptr + (split.to(tl.int64) * N + offs_n)[:, None] * D + offs_d[None, :]
    acc = tl.load(part, mask=row[:, None] & unit[None, :], other=0.0) * tl.exp(before - m)[:, None]
    share = tl.cdiv(tiles, splits)
    W_columns = W_ptr + offs_d[None, :] * stride_wd
    moved = tl.max(tl.where(row, m - start, 0.0), 0) > 0
    for s in range(begin, end):
        first = s * share
        p_rows = p_ptr + offs_n.to(tl.int64)[:, None] * stride_pn + first * BLOCK_V
        steps = tl.load(count_ptr + block * splits + s) * (BLOCK_V // BLOCK_K)
        if moved:
            for i in range(0, steps):
                slot = first + i // (BLOCK_V // BLOCK_K)
                offs_v = (
                    tl.load(list_ptr + block * room + slot) * BLOCK_V
                    + i % (BLOCK_V // BLOCK_K) * BLOCK_K
                    + offs_k
                )
                p = tl.load(p_rows + (i * BLOCK_K + offs_k)[None, :], mask=row[:, None], other=0.0)
                W_rows = W_columns + offs_v.to(tl.int64)[:, None] * stride_wv
                W = tl.load(W_rows, mask=(offs_v < V)[:, None] & unit[None, :], other=0.0)
                r = tl.exp(tl.load(m_ptr + slot * N + offs_n, mask=row, other=0.0) - m)
                acc += r[:, None] * tl.dot(
                    p.to(DOT), W.to(DOT), input_precision="ieee", out_dtype=ACC
                )
        else:
            for i in range(0, steps):
                slot = first + i // (BLOCK_V // BLOCK_K)
                offs_v = (
                    tl.load(list_ptr + block * room + slot) * BLOCK_V
                    + i % (BLOCK_V // BLOCK_K) * BLOCK_K
                    + offs_k
                )
                p = tl.load(p_rows + (i * BLOCK_K + offs_k)[None, :], mask=row[:, None], other=0.0)
                W_rows = W_columns + offs_v.to(tl.int64)[:, None] * stride_wv
                W = tl.load(W_rows, mask=(offs_v < V)[:, None] & unit[None, :], other=0.0)
                acc = tl.dot(p.to(DOT), W.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
    tl.store(part, acc, mask=row[:, None] & unit[None, :])


@triton.jit(do_not_specialize=["N", "splits"])
def combine_kernel(part_ptr, factor_ptr, product_ptr, N, D, splits, BLOCK_D: tl.constexpr):
    """product [N, D] += sum_s factor [splits, N] * part [splits, N, D], in the order of s"""
    n, offs_d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    product = tl.load(product_ptr + n * D + offs_d, mask=offs_d < D, other=0.0)
    for s in range(0, splits):
        part = tl.load(part_ptr + (s * N + n) * D + offs_d, mask=offs_d < D, other=0.0)
        product += (part * tl.load(factor_ptr + s * N + n)).to(product.dtype)
    tl.store(product_ptr + n * D + offs_d, product, mask=offs_d < D)


# --------------------------------------------------------------------------------------------------
# host


class Channel(NamedTuple):
    """One Sums and the columns that it sums over."""

    sums: Sums
    columns: tl.constexpr


def sweep(
    h: Tensor,
    head: Head,
    held: Tensor,
    valid: Tensor,
    keep: Tensor | None,
    sums: list[Sums],
    apart: Sums | None,
    tile: int,
    eps: float = 0.0,
    plan: Plan | None = None,
) -> None:
    """`tiled.sweep`, with its arguments and two more.

    tile  columns per chunk where products are wanted: [N, tile] probabilities of 16 bit (32 for
          fp32) exist at a time
    eps   A product skips a tile if no row has a probability above eps in it: no e above eps times
          the larger of 1 and the row's total so far. Neither exceeds the row's normaliser, because
          shift comes from a held-out logit. The product, scaled to probabilities, errs by at most
          (mass skipped) * max |W_v| <= eps * (columns skipped) * max |W_v|. With 0 it skips only
          what is exactly 0. Sums are always complete.
    plan  in place of triton_launch's own
    """
    channels = [Channel(one, ALL) for one in sums]
    if keep is not None:
        channels[-1] = Channel(sums[-1], KEPT)
        if apart is not None:
            channels.append(Channel(apart, DROPPED))
    if 0 in h.shape:
        return
    for i in range(0, len(channels), 2):
        _visit(h, head, held, valid, keep, channels[i : i + 2], tile, eps, plan)


def chunk(h: Tensor, W: Tensor) -> int:
    """The `tile` for `sweep`: vocabulary columns per chunk."""
    (N, D), V = h.shape, len(W)
    return triton_launch(N, V, D, _dtypes(h, W)[0], target_of(h.device), _units(h.device)).chunk


def _visit(
    h: Tensor,
    head: Head,
    held: Tensor,
    valid: Tensor,
    keep: Tensor | None,
    channels: list[Channel],
    tile: int,
    eps: float,
    plan: Plan | None = None,
) -> None:
    """`sweep` for one or two channels: z is formed once for both."""
    (N, D), V, device = h.shape, len(head.weight), h.device
    dot, acc = _dtypes(h, head.weight)
    heavy = len(channels) > 1 or head.softcap is not None
    plan = plan or triton_launch(N, V, D, dot, target_of(device), _units(device), heavy)
    (BLOCK_N, BLOCK_V, BLOCK_D, num_warps, num_stages), C = plan.sums, len(channels)
    cdiv = lambda a, b: -(-a // b)
    blocks, all_tiles = cdiv(N, BLOCK_N), cdiv(V, BLOCK_V)
    products = [one.sums.product is not None for one in channels]
    if any(products):
        room = min(max(1, tile // BLOCK_V), all_tiles)  # tiles of a chunk
        splits = min(plan.splits, room)
    else:
        room, splits = all_tiles, split(blocks, WAVES * _units(device), all_tiles)
    group = cdiv(splits, min(plan.product_splits, splits))
    product_splits = cdiv(splits, group)

    start = torch.stack([one.sums.shift.to(acc) for one in channels])  # [C, N]
    shift = start[:, None].repeat(1, splits, 1)
    total = torch.zeros_like(shift, dtype=torch.float64)
    entropy = total
    if any(one.sums.entropy is not None for one in channels):
        entropy = torch.zeros_like(total)
    # Next to the teacher a product is the small difference of two large ones, and e in bf16 has too
    # few digits. With columns held out for a KL it is fp16, and so is the head's tile, which loses
    # no bit of a bf16 above 2^-17 (and overflows above 65,504).
    half = torch.float16 if dot == torch.bfloat16 and held.shape[1] > 1 else dot
    # fp16 is scaled to reach down to 2^-39. Unscaled, exp(11) overflows and exp(-17) vanishes.
    P_SCALE, JUMP = (2.0**15, 0.0) if half == torch.float16 else (1.0, 30.0)
    p = h.new_empty((C, N, room * BLOCK_V) if any(products) else (1, 1, BLOCK_V), dtype=half)
    m = h.new_empty((C, room, N) if any(products) else 1, dtype=acc)
    live = h.new_empty((C, blocks, room), dtype=torch.int32)
    count = h.new_empty((C, blocks, splits), dtype=torch.int32)
    parts = [
        h.new_zeros((product_splits, N, D), dtype=acc) if wanted else None for wanted in products
    ]
    keys, cuts = _sorted(held, valid, BLOCK_N, BLOCK_V, all_tiles, blocks)
    bias = h if head.bias is None else head.bias.to(acc).contiguous()
    mask = h if keep is None else keep.contiguous().view(torch.int8)

    interpreted = device.type == "cpu"
    wide = tl.float64 if acc == torch.float64 else tl.float32
    # Trap: the interpreter multiplies bf16 as the integers that hold it. Widening the operands
    # changes no value.
    narrow = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    DOT, HALF = (wide if interpreted else narrow.get(dtype, wide) for dtype in (dot, half))
    flags: dict[str, Any] = {}
    for i in range(2):
        one = channels[i] if i < C else None
        flags |= {
            f"COLUMNS_{i}": NONE if one is None else one.columns,
            f"TAU_{i}": 1.0 if one is None else one.sums.tau,
            f"ENTROPY_{i}": one is not None and one.sums.entropy is not None,
            f"PRODUCT_{i}": one is not None and products[i],
        }
    options = dict(
        SCALE=head.scale, SOFTCAP=1.0 if head.softcap is None else head.softcap, EPS=eps,
        JUMP=JUMP, P_SCALE=P_SCALE,
        NEAR=0.03 if wide == tl.float64 else 0.3, HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None, **flags,
        ACC=wide, DOT=DOT, ROUND=interpreted and half == torch.bfloat16, BLOCK_N=BLOCK_N,
        BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip

    with nullcontext() if interpreted else torch.cuda.device(device):
        for first in range(0, all_tiles, room):
            tiles, new_shift = min(room, all_tiles - first), torch.empty_like(shift)
            sums_kernel[(blocks, splits)](
                h, head.weight, bias, mask, keys, cuts, shift, new_shift, total, entropy, p, m,
                live, count,
                N, V, D, first, tiles, room, all_tiles, *h.stride(), *head.weight.stride(),
                p.stride(0), p.stride(1),
                keys.stride(0), **options,
            )  # fmt: skip
            for i, part in enumerate(parts):
                if part is not None:
                    _, K, BLOCK, warps, stages = plan.product
                    product_kernel[(blocks, cdiv(D, BLOCK), product_splits)](
                        p[i], head.weight, part, live[i], count[i], m[i], start[i], shift[i],
                        new_shift[i],
                        N, V, D, tiles, room, splits, group, p.stride(1), *head.weight.stride(),
                        ACC=wide, DOT=HALF,
                        BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_K=K, BLOCK_D=BLOCK,
                        num_warps=warps, num_stages=stages,
                    )  # fmt: skip
            shift = new_shift
        for i, one in enumerate(channels):
            _add(one.sums, shift[i], total[i], entropy[i], parts[i], start[i], group, P_SCALE)


def _add(
    one: Sums,
    m: Tensor,
    total: Tensor,
    entropy: Tensor,
    part: Tensor | None,
    start: Tensor,
    group: int,
    scale: float,
) -> None:
    """Adds the sums of all splits to `one`: m, total and entropy [splits, N], part [product splits,
    N, D].

    start:  [N], the m of the first chunk
    group:  splits of sums_kernel that one program of product_kernel took
    scale:  the factor in part
    """
    top = m.amax(0).to(one.shift.dtype)
    one.rescale(top)
    away = m.double() - top.double()  # [splits, N], never above 0
    r = torch.exp(away)
    one.total += (total * r).sum(0)
    if one.entropy is not None:
        one.entropy += (r * (entropy - away * total)).sum(0)
    if part is not None:
        (splits, N, D), BLOCK_D = part.shape, 512
        # the m to which product_kernel refers each part
        reached = torch.stack([torch.maximum(x.amax(0), start) for x in m.split(group)])
        factor = torch.exp(reached - top) / scale
        combine_kernel[(N, -(-D // BLOCK_D))](
            part, factor, one.product, N, D, splits, BLOCK_D=BLOCK_D
        )


def _sorted(
    held: Tensor, valid: Tensor, BLOCK_N: int, BLOCK_V: int, tiles: int, blocks: int
) -> tuple[Tensor, Tensor]:
    """For each row block its held-out columns as column * BLOCK_N + row in the block, ascending,
    and where each tile's begin."""
    N, k = held.shape
    past = tiles * BLOCK_V * BLOCK_N  # belongs to no tile
    row = torch.arange(N, device=held.device)[:, None] % BLOCK_N
    keys = held.new_full((blocks * BLOCK_N, k), past, dtype=torch.int32)  # columns below 2^24
    keys[:N] = torch.where(valid, held * BLOCK_N + row, past)
    keys = keys.view(blocks, BLOCK_N * k).sort(1).values
    edges = torch.arange(tiles + 1, device=held.device, dtype=torch.int32) * (BLOCK_V * BLOCK_N)
    return keys, torch.searchsorted(keys, edges.repeat(blocks, 1), out_int32=True)


def _dtypes(h: Tensor, W: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of operands and that of sums. Operands of one 16 bit dtype stay as they are, others
    become fp32; both are fp64 if either is."""
    acc = torch.float64 if torch.float64 in (h.dtype, W.dtype) else torch.float32
    return (h.dtype if h.dtype == W.dtype and h.dtype.itemsize == 2 else acc), acc


def _units(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 in the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
