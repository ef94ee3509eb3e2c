"""The kernels that visit the whole vocabulary: the softmax's sums, and their products with the
head.

    e = exp(z / tau - m)    total = sum e    entropy = -sum e log e    product = sum e dz/dx W

sums_kernel     One program per block of rows and split of the columns. Forms each tile of z on the
                chip, with bias, scale, softcap, masks and held-out columns, and updates m, total
                and entropy as an online softmax does. Logits never leave the chip. For the product
                it stores e dz/dx of one chunk of columns, in 16 bit, and which runs of tiles count.
product_kernel  One program per block of rows, block of D and split. Multiplies a chunk's e dz/dx by
                the head rows; accumulates in registers over the chunk, and in a partial of its own
                over the chunks. No atomics: bitwise reproducible.

m starts from the largest held-out logit, and moves only where a logit lies more than JUMP above it.
So all splits nearly always share m and nothing is rescaled. z is formed once: 2 N V D flops without
a gradient, 4 N V D with one. Where the GPU loads tiles by descriptor (TMA) and the tensors allow
it, both kernels do. triton_sweep.py launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, ALL, KEPT, DROPPED = (tl.constexpr(i) for i in range(4))  # which columns a channel sums over


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
def step(x_rows, W_ptr, row, offs_v, offs_d, V, D, stride_xd, stride_wv, stride_wd):
    """x [BLOCK_N, BLOCK_D] and W^T [BLOCK_D, BLOCK_V] of one step"""
    column, unit = offs_v < V, offs_d < D
    x = tl.load(x_rows + offs_d[None, :] * stride_xd, mask=row[:, None] & unit[None, :], other=0.0)
    at = W_ptr + offs_v.to(tl.int64)[None, :] * stride_wv + offs_d[:, None] * stride_wd
    return x, tl.load(at, mask=unit[:, None] & column[None, :], other=0.0)


@triton.jit
def transform(z, bias_ptr, offs_v, column, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
              NEAR: tl.constexpr,
              HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """z = softcap * tanh(x / softcap), x = scale * (h W^T + bias), of a tile h W^T"""
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=column, other=0.0).to(z.dtype)[None, :]
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
def hold_out(z, held_ptr, offs_n, offs_v, first, row, HELD: tl.constexpr, BLOCK_V: tl.constexpr):
    """A tile z, -inf at each row's held-out columns: held [N, HELD] int32, ascending"""
    rows = held_ptr + offs_n.to(tl.int64) * HELD
    columns = tl.load(rows[:, None] + tl.arange(0, HELD)[None, :], mask=row[:, None], other=2**30)
    before = tl.sum((columns < first).to(tl.int32), 1)
    here = tl.sum((columns < first + BLOCK_V).to(tl.int32), 1) - before
    for i in range(0, tl.max(here, 0)):  # rarely more than one
        column = tl.load(rows + before + i, mask=row & (i < here), other=-1)
        z = tl.where(column[:, None] == offs_v[None, :], -float("inf"), z)
    return z


@triton.jit
def leave(e, z, top, m, total, j, runs, live, moved, offs_n, offs_j, N, p_ptr, stride_pn, m_ptr,
          run_ptr,
          SOFTCAP: tl.constexpr, EPS: tl.constexpr, P_SCALE: tl.constexpr, ROUND: tl.constexpr,
          HAS_SOFTCAP: tl.constexpr,
          BLOCK_V: tl.constexpr):  # fmt: skip
    """Stores tile j of e dz/dx for product_kernel, and where a run of tiles that count begins or
    ends.

    runs: of this split so far; live: did the tile before count? moved: did m of any row move with
    this tile? A run has one m. Returns runs and live anew."""
    p = e
    if HAS_SOFTCAP:
        y = z * (1.0 / SOFTCAP)
        p = tl.where(e > 0, e * (1.0 - y * y), 0.0)  # e is 0 where z is -inf
    p = p * P_SCALE
    if ROUND:
        p = nearest_bf16(p)
    offs_p = offs_n.to(tl.int64)[:, None] * stride_pn + (j * BLOCK_V + offs_j)[None, :]
    tl.store(p_ptr + offs_p, p.to(p_ptr.dtype.element_ty), mask=(offs_n < N)[:, None])
    tl.store(m_ptr + j * N + offs_n, m, mask=offs_n < N)
    # the normaliser holds at least exp(m) and what is summed so far
    counts = (top > EPS * tl.maximum(total, 1.0).to(top.dtype)) & (offs_n < N)
    now = tl.max(counts.to(tl.int32), 0)
    ends = live * tl.maximum(moved, 1 - now)
    tl.store(run_ptr + 2 * runs + 1, j, mask=ends > 0)
    runs += ends
    tl.store(run_ptr + 2 * runs, j, mask=now * tl.maximum(ends, 1 - live) > 0)
    return runs, now


@triton.jit
def use(z, j, first_tile, m_0, total_0, entropy_0, m_1, total_1, entropy_1, runs_0, live_0, runs_1,
        live_1, offs_n, offs_j, row, N, V, room, bias_ptr, keep_ptr, held_ptr, p_ptr, stride_pc,
        stride_pn, m_ptr, run_0, run_1,
        SCALE: tl.constexpr, SOFTCAP: tl.constexpr, EPS: tl.constexpr, JUMP: tl.constexpr,
        P_SCALE: tl.constexpr, NEAR: tl.constexpr, HAS_BIAS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr, HELD: tl.constexpr,
        COLUMNS_0: tl.constexpr, TAU_0: tl.constexpr, ENTROPY_0: tl.constexpr,
        PRODUCT_0: tl.constexpr, COLUMNS_1: tl.constexpr, TAU_1: tl.constexpr,
        ENTROPY_1: tl.constexpr, PRODUCT_1: tl.constexpr, ROUND: tl.constexpr,
        BLOCK_V: tl.constexpr):  # fmt: skip
    """Adds tile j of h W^T, complete, to the sums of each channel, and stores its e dz/dx where a
    product is wanted. Returns the sums, runs and live anew."""
    offs_v = (first_tile + j) * BLOCK_V + offs_j
    column = offs_v < V
    z = transform(z, bias_ptr, offs_v, column, SCALE, SOFTCAP, NEAR, HAS_BIAS, HAS_SOFTCAP)
    z = tl.where(row[:, None] & column[None, :], z, -float("inf"))
    z = hold_out(z, held_ptr, offs_n, offs_v, (first_tile + j) * BLOCK_V, row, HELD, BLOCK_V)
    kept = column
    if COLUMNS_0 > ALL or COLUMNS_1 > ALL:
        kept = tl.load(keep_ptr + offs_v, mask=column, other=0) != 0
    x = only(z, kept, COLUMNS_0) * (1.0 / TAU_0)
    m = m_0
    e, top, m_0, total_0, entropy_0 = add(x, m_0, total_0, entropy_0, JUMP, ENTROPY_0)
    if PRODUCT_0:
        moved = tl.max((m_0 > m).to(tl.int32), 0)
        runs_0, live_0 = leave(e, z, top, m_0, total_0, j, runs_0, live_0, moved, offs_n, offs_j, N,
                               p_ptr, stride_pn, m_ptr, run_0,
                               SOFTCAP, EPS, P_SCALE, ROUND, HAS_SOFTCAP, BLOCK_V)  # fmt: skip
    if COLUMNS_1 != NONE:
        x = only(z, kept, COLUMNS_1) * (1.0 / TAU_1)
        m = m_1
        e, top, m_1, total_1, entropy_1 = add(x, m_1, total_1, entropy_1, JUMP, ENTROPY_1)
        if PRODUCT_1:
            moved = tl.max((m_1 > m).to(tl.int32), 0)
            runs_1, live_1 = leave(e, z, top, m_1, total_1, j, runs_1, live_1, moved, offs_n,
                                   offs_j, N, p_ptr + stride_pc, stride_pn, m_ptr + room * N, run_1,
                                   SOFTCAP, EPS, P_SCALE, ROUND, HAS_SOFTCAP,
                                   BLOCK_V)  # fmt: skip
    return (m_0, total_0, entropy_0, m_1, total_1, entropy_1, runs_0, live_0, runs_1, live_1)


@triton.jit(do_not_specialize=["N", "V", "first_tile", "tiles", "room"])
def sums_kernel(
    h_ptr, W_ptr, bias_ptr, keep_ptr,  # [N, D], [V, D], [V], [V] int8
    held_ptr,  # [N, HELD] int32, columns that take no part, ascending; 2**30: none
    start_ptr,  # [channels, N]: m before the first chunk
    # [channels, splits, N]: m before and after, and sums in place
    shift_ptr, new_shift_ptr, total_ptr, entropy_ptr,
    # [channels, N, room * BLOCK_V], [.., room, N], [.., row blocks, 2 (room + splits) or splits]
    p_ptr, m_ptr, run_ptr, count_ptr,
    # this launch: tiles first_tile .. first_tile + tiles, at most room
    N, V, D, first_tile, tiles, room,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_pc, stride_pn,
    FIRST: tl.constexpr,  # the first chunk: there are no sums yet
    TMA: tl.constexpr,  # h and W are tensor descriptors
    FLAT: tl.constexpr,  # tiles and their steps along D in one loop
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, EPS: tl.constexpr, JUMP: tl.constexpr,
    P_SCALE: tl.constexpr, NEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HELD: tl.constexpr,
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
    state = split * N + offs_n
    other = (splits + split) * N + offs_n  # of channel 1
    if FIRST:
        m_0 = tl.load(start_ptr + offs_n, mask=row, other=0.0)
        total_0 = tl.zeros((BLOCK_N,), dtype=tl.float64)
        entropy_0 = total_0
        m_1, total_1, entropy_1 = m_0, total_0, total_0
        if COLUMNS_1 != NONE:
            m_1 = tl.load(start_ptr + N + offs_n, mask=row, other=0.0)
    else:
        m_0 = tl.load(shift_ptr + state, mask=row, other=0.0)
        total_0 = tl.load(total_ptr + state, mask=row, other=0.0)
        entropy_0 = total_0
        if ENTROPY_0:
            entropy_0 = tl.load(entropy_ptr + state, mask=row, other=0.0)
        m_1, total_1, entropy_1 = m_0, total_0, total_0
        if COLUMNS_1 != NONE:
            m_1 = tl.load(shift_ptr + other, mask=row, other=0.0)
            total_1 = tl.load(total_ptr + other, mask=row, other=0.0)
            if ENTROPY_1:
                entropy_1 = tl.load(entropy_ptr + other, mask=row, other=0.0)
    share = tl.cdiv(tiles, splits)
    first = split * share  # counted from first_tile
    past = min(first + share, tiles)
    runs_0 = first * 0
    live_0, runs_1, live_1 = runs_0, runs_0, runs_0
    run_0 = run_ptr + block * 2 * (room + splits) + 2 * first
    run_1 = run_0 + blocks * 2 * (room + splits)
    if FLAT:
        # One loop over the steps of all tiles: the first loads of a tile run under the end of the
        # tile before. The pipeline takes it, since what has a loop of its own is inside an if.
        steps = tl.cdiv(D, BLOCK_D)
        j, k = first - 1, steps - 1
        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=ACC)
        for _ in range(0, (past - first) * steps):
            k = tl.where(k == steps - 1, 0, k + 1)
            j += tl.where(k == 0, 1, 0)
            d = k * BLOCK_D
            if TMA:
                x = h_ptr.load([block * BLOCK_N, d])
                W = W_ptr.load([(first_tile + j) * BLOCK_V, d]).T
            else:
                x, W = step(h_ptr + offs_n.to(tl.int64)[:, None] * stride_hn, W_ptr, row,
                            (first_tile + j) * BLOCK_V + offs_j, d + offs_d, V, D, stride_hd,
                            stride_wv, stride_wd)  # fmt: skip
            z = tl.dot(x.to(DOT), W.to(DOT), z, input_precision="ieee", out_dtype=ACC)
            if k == steps - 1:
                (m_0, total_0, entropy_0, m_1, total_1, entropy_1,
                 runs_0, live_0, runs_1, live_1) = use(
                    z, j, first_tile, m_0, total_0, entropy_0, m_1, total_1, entropy_1,
                    runs_0, live_0, runs_1, live_1, offs_n, offs_j, row, N, V, room,
                    bias_ptr, keep_ptr, held_ptr, p_ptr, stride_pc, stride_pn, m_ptr, run_0, run_1,
                    SCALE, SOFTCAP, EPS, JUMP, P_SCALE, NEAR, HAS_BIAS, HAS_SOFTCAP, HELD,
                    COLUMNS_0, TAU_0, ENTROPY_0, PRODUCT_0, COLUMNS_1, TAU_1, ENTROPY_1, PRODUCT_1,
                    ROUND, BLOCK_V)  # fmt: skip
                z = tl.zeros((BLOCK_N, BLOCK_V), dtype=ACC)
    else:
        for j in range(first, past):
            if TMA:
                z = tl.zeros((BLOCK_N, BLOCK_V), dtype=ACC)
                for d in range(0, D, BLOCK_D):
                    x = h_ptr.load([block * BLOCK_N, d])
                    W = W_ptr.load([(first_tile + j) * BLOCK_V, d])
                    z = tl.dot(x.to(DOT), W.T.to(DOT), z, input_precision="ieee", out_dtype=ACC)
            else:
                offs_v = (first_tile + j) * BLOCK_V + offs_j
                column = offs_v < V
                z = times_head(h_ptr + offs_n.to(tl.int64)[:, None] * stride_hn,
                               W_ptr + offs_v.to(tl.int64)[None, :] * stride_wv,
                               row, column, offs_d, D, stride_hd, stride_wd, ACC, DOT,
                               BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
            (m_0, total_0, entropy_0, m_1, total_1, entropy_1,
             runs_0, live_0, runs_1, live_1) = use(
                z, j, first_tile, m_0, total_0, entropy_0, m_1, total_1, entropy_1,
                runs_0, live_0, runs_1, live_1, offs_n, offs_j, row, N, V, room,
                bias_ptr, keep_ptr, held_ptr, p_ptr, stride_pc, stride_pn, m_ptr, run_0, run_1,
                SCALE, SOFTCAP, EPS, JUMP, P_SCALE, NEAR, HAS_BIAS, HAS_SOFTCAP, HELD,
                COLUMNS_0, TAU_0, ENTROPY_0, PRODUCT_0, COLUMNS_1, TAU_1, ENTROPY_1, PRODUCT_1,
                ROUND, BLOCK_V)  # fmt: skip
    tl.store(new_shift_ptr + state, m_0, mask=row)
    tl.store(total_ptr + state, total_0, mask=row)
    if ENTROPY_0:
        tl.store(entropy_ptr + state, entropy_0, mask=row)
    if PRODUCT_0:
        tl.store(run_0 + 2 * runs_0 + 1, past, mask=live_0 > 0)
        tl.store(count_ptr + block * splits + split, runs_0 + live_0)
    if COLUMNS_1 != NONE:
        tl.store(new_shift_ptr + other, m_1, mask=row)
        tl.store(total_ptr + other, total_1, mask=row)
        if ENTROPY_1:
            tl.store(entropy_ptr + other, entropy_1, mask=row)
        if PRODUCT_1:
            tl.store(run_1 + 2 * runs_1 + 1, past, mask=live_1 > 0)
            tl.store(count_ptr + (blocks + block) * splits + split, runs_1 + live_1)


@triton.jit
def operands(p_ptr, W_ptr, offs_n, offs_k, offs_d, k, v, row, unit, V, stride_pn, stride_wv,
             stride_wd,
             TMA: tl.constexpr, DOT: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """W^T [BLOCK_D, BLOCK_K] from head row v on, and p^T [BLOCK_K, BLOCK_N] from column k on"""
    if TMA:
        W = W_ptr.load([v, offs_d]).T
        p = p_ptr.load([offs_n, k]).T
    else:
        offs_v = v + offs_k
        at = W_ptr + offs_v.to(tl.int64)[None, :] * stride_wv + offs_d[:, None] * stride_wd
        W = tl.load(at, mask=unit[:, None] & (offs_v < V)[None, :], other=0.0)
        at = p_ptr + offs_n.to(tl.int64)[None, :] * stride_pn + (k + offs_k)[:, None]
        p = tl.load(at, mask=row[None, :], other=0.0)
    return W.to(DOT), p.to(DOT)


@triton.jit(do_not_specialize=["N", "V", "first_tile", "tiles", "room", "splits", "parts", "group"])
def product_kernel(
    p_ptr, W_ptr, part_ptr,  # [channels, N, chunk], [V, D], [channels, product splits, N, D]
    # [channels, row blocks, 2 (room + splits)], [.., row blocks, splits], [.., room, N], as
    # sums_kernel left them
    run_ptr, count_ptr, m_ptr,
    # [channels, N], [.., splits, N] twice: m at the very start, before and after this chunk
    start_ptr, shift_ptr, new_shift_ptr,
    reached_ptr,  # [channels, product splits, N]: the m that part refers to
    N, V, D, first_tile, tiles, room, splits,
    parts,  # product splits
    group,  # splits of sums_kernel that one program here takes
    stride_pn, stride_wv, stride_wd,
    FIRST: tl.constexpr,  # the first chunk: part holds nothing yet
    ALL_LIVE: tl.constexpr,  # no runs and no m: every tile counts, and m never moves
    TMA: tl.constexpr,  # p and W are tensor descriptors
    ACC: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """part = part * exp(m_before - m) + sum over the runs of exp(m_run - m) p W, with the largest m
    of the group's splits.

    The product is formed as W^T p^T: so W is the operand that may come from registers, where its
    conversion costs no way through shared memory. The innermost loop reads nothing that says what
    to read next. A run is nearly always a whole split."""
    block, block_d = tl.program_id(0), tl.program_id(1)
    channel, split = tl.program_id(2) // parts, tl.program_id(2) % parts
    blocks = tl.num_programs(0)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_d = tl.arange(0, BLOCK_K), block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    row, unit = offs_n < N, offs_d < D
    n, d = channel * N + offs_n, offs_d
    if TMA:  # descriptors take the first index
        n, d = channel * N + block * BLOCK_N, block_d * BLOCK_D
    share = tl.cdiv(tiles, splits)
    part = part_ptr + (tl.program_id(2).to(tl.int64) * N + offs_n)[None, :] * D + offs_d[:, None]
    inside = row[None, :] & unit[:, None]
    acc = tl.zeros((BLOCK_D, BLOCK_N), dtype=ACC)
    if ALL_LIVE:
        if not FIRST:
            acc = tl.load(part, mask=inside, other=0.0)
        past = min(split * share + share, tiles)
        for k in range(split * share * BLOCK_V, past * BLOCK_V, BLOCK_K):
            W, p = operands(p_ptr, W_ptr, n, offs_k, d, k, first_tile * BLOCK_V + k, row, unit, V,
                            stride_pn, stride_wv, stride_wd, TMA, DOT,
                            BLOCK_N, BLOCK_D)  # fmt: skip
            acc = tl.dot(W, p, acc, input_precision="ieee", out_dtype=ACC)
    else:
        begin, end = split * group, min(split * group + group, splits)
        first_split = channel * splits
        start = tl.load(start_ptr + channel * N + offs_n, mask=row, other=0.0)
        before, m = start, start
        for s in range(begin, end):
            if not FIRST:
                shift = tl.load(shift_ptr + (first_split + s) * N + offs_n, mask=row, other=0.0)
                before = tl.maximum(before, shift)
            shift = tl.load(new_shift_ptr + (first_split + s) * N + offs_n, mask=row, other=0.0)
            m = tl.maximum(m, shift)
        if not FIRST:
            acc = tl.load(part, mask=inside, other=0.0) * tl.exp(before - m)[None, :]
        line = channel * blocks + block
        for s in range(begin, end):
            runs = run_ptr + line * 2 * (room + splits) + s * 2 * share
            for r in range(0, tl.load(count_ptr + line * splits + s)):
                first, past = tl.load(runs + 2 * r), tl.load(runs + 2 * r + 1)
                # The run's m is below m only where a logit stood above all held-out ones; then acc
                # refers to it for a while. What lies 40 nats below m adds nothing to it.
                was = tl.load(m_ptr + (channel * room + first) * N + offs_n, mask=row, other=0.0)
                up = tl.minimum(m - was, 40.0)
                acc = acc * tl.exp(up)[None, :]
                for k in range(first * BLOCK_V, past * BLOCK_V, BLOCK_K):
                    W, p = operands(p_ptr, W_ptr, n, offs_k, d, k, first_tile * BLOCK_V + k, row,
                                    unit, V, stride_pn, stride_wv, stride_wd, TMA, DOT,
                                    BLOCK_N, BLOCK_D)  # fmt: skip
                    acc = tl.dot(W, p, acc, input_precision="ieee", out_dtype=ACC)
                acc = acc * tl.exp(-up)[None, :]
        if block_d == 0:
            tl.store(reached_ptr + tl.program_id(2) * N + offs_n, m, mask=row)
    tl.store(part, acc, mask=inside)
