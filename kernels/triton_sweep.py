"""`tiled.sweep` in Triton, and the launches behind it: sums_kernel and product_kernel of
triton_tiles.py over the whole vocabulary, one chunk of columns at a time.

`visit` is what the loss calls (triton_frozen.py); `sweep` adds what it finds to Sums, for the tuner
and for comparison with `tiled.sweep`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_launch
from .tiled import Head, Sums
from .triton_launch import WAVES, Plan, split, target_of, units_of
from .triton_tiles import ALL, DROPPED, KEPT, NONE, product_kernel, sums_kernel

NOWHERE = 2**30  # a column that no head has


@triton.jit(do_not_specialize=["N", "splits"])
def combine_kernel(part_ptr, factor_ptr, product_ptr, N, D, splits, BLOCK_D: tl.constexpr):
    """product [N, D] += sum_s factor [splits, N] * part [splits, N, D], in the order of s"""
    n, offs_d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    product = tl.load(product_ptr + n * D + offs_d, mask=offs_d < D, other=0.0)
    for s in range(0, splits):
        part = tl.load(part_ptr + (s * N + n) * D + offs_d, mask=offs_d < D, other=0.0)
        product += (part * tl.load(factor_ptr + s * N + n)).to(product.dtype)
    tl.store(product_ptr + n * D + offs_d, product, mask=offs_d < D)


class Channel(NamedTuple):
    """One sum of e = exp(z / tau - m), over some columns.

    columns  ALL, KEPT or DROPPED
    entropy  also -sum e log e
    """

    columns: tl.constexpr
    tau: float
    entropy: bool


class Visited(NamedTuple):
    """What `visit` leaves, for each channel and split of the columns.

    m        [C, splits, N] fp32 (fp64)
    total    [C, splits, N] fp64
    entropy  [C, splits, N] fp64; not written where a channel wants none
    parts    [C, product splits, N, D] fp32 (fp64), or None
    reached  [C, product splits, N]: the m that parts refer to
    scale    a factor in parts
    """

    m: Tensor
    total: Tensor
    entropy: Tensor
    parts: Tensor | None
    reached: Tensor
    scale: float


def visit(
    h: Tensor,
    head: Head,
    held: Tensor,
    start: Tensor,
    keep: Tensor | None,
    channels: list[Channel],
    *,
    product: bool,
    fine: bool,
    tile: int | None = None,
    eps: float = 0.0,
    plan: Plan | None = None,
) -> Visited:
    """Sums one or two channels over the whole vocabulary: z is formed once for both.

    held   [N, power of 2] int32: each row's columns that no channel sees, ascending, then NOWHERE
    start  [C, N]: m to begin with
    product  also e dz/dx W of each channel
    fine   Next to the teacher a product is the small difference of two large ones, and e in bf16
           has too few digits. So e is fp16, and so is the head's tile, which loses no bit of a bf16
           above 2^-17 (and overflows above 65,504).
    tile   columns per chunk where products are wanted; None: the plan's
    eps    A product skips a tile if no row has a probability above eps in it: no e above eps times
           the larger of 1 and the row's total so far. Neither exceeds the row's normaliser, because
           start comes from a held-out logit. The product, scaled to probabilities, errs by at most
           (mass skipped) * max |W_v| <= eps * (columns skipped) * max |W_v|. With 0 it skips only
           what is exactly 0. Sums are always complete.
    plan   in place of triton_launch's own
    """
    (N, D), (V, _), device, C = h.shape, head.weight.shape, h.device, len(channels)
    W = head.weight
    dot, acc = dtypes(h, W)
    target, units = target_of(device), units_of(device)
    if plan is None:
        heavy = C > 1 or head.softcap is not None
        plan = triton_launch.triton_launch(N, V, D, dot, target, units, heavy)
    BLOCK_N, BLOCK_V, BLOCK_D, num_warps, num_stages = plan.sums
    _, K, PRODUCT_D, product_warps, product_stages = plan.product
    blocks, all_tiles = up(N, BLOCK_N), up(V, BLOCK_V)
    if product:
        # tiles of a chunk
        room = min(max(1, (plan.chunk if tile is None else tile) // BLOCK_V), all_tiles)
        splits = min(plan.splits, room)
    else:
        room, splits = all_tiles, split(blocks, WAVES * units, all_tiles)
    group = up(splits, min(plan.product_splits, splits))
    product_splits = up(splits, group)

    half = torch.float16 if fine and dot == torch.bfloat16 else dot
    # fp16 is scaled to reach down to 2^-39. Unscaled, exp(11) overflows and exp(-17) vanishes.
    P_SCALE, JUMP = (2.0**15, 0.0) if half == torch.float16 else (1.0, 30.0)
    shift = h.new_empty((C, splits, N), dtype=acc)  # before a chunk
    new_shift = h.new_empty((C, splits, N), dtype=acc)  # and after it
    wanted = any(one.entropy for one in channels)
    total = h.new_empty((C, splits, N), dtype=torch.float64)
    entropy = h.new_empty((C, splits, N), dtype=torch.float64) if wanted else total
    p = h.new_empty((C, N, room * BLOCK_V) if product else (1, 1, BLOCK_V), dtype=half)
    m = h.new_empty((C, room, N) if product else (1, 1, 1), dtype=acc)
    run = h.new_empty((C, blocks, 2 * (room + splits)), dtype=torch.int32)
    count = h.new_empty((C, blocks, splits), dtype=torch.int32)
    parts = h.new_empty((C, product_splits, N, D), dtype=acc) if product else None
    reached = h.new_empty((C, product_splits, N), dtype=acc)

    interpreted = device.type == "cpu"
    wide, DOT, HALF = operands_of(interpreted, acc, dot, half)
    options: dict[str, Any] = dict(
        SCALE=head.scale, SOFTCAP=1.0 if head.softcap is None else head.softcap, EPS=eps,
        JUMP=JUMP, P_SCALE=P_SCALE,
        NEAR=0.03 if acc == torch.float64 else 0.3, HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None, HELD=held.shape[1],
        ACC=wide, DOT=DOT, ROUND=interpreted and half == torch.bfloat16, BLOCK_N=BLOCK_N,
        BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    for i in range(2):
        one = channels[i] if i < C else Channel(NONE, 1.0, False)
        options[f"COLUMNS_{i}"], options[f"TAU_{i}"] = one.columns, one.tau
        options[f"ENTROPY_{i}"], options[f"PRODUCT_{i}"] = one.entropy, product and i < C
    h_tiles, W_tiles, W_steps, p_tiles = h, W, W, p
    tma = target in triton_launch.TMA and describable(h) and describable(W)
    if tma:
        h_tiles = TensorDescriptor.from_tensor(h, [BLOCK_N, BLOCK_D])
        W_tiles = TensorDescriptor.from_tensor(W, [BLOCK_V, BLOCK_D])
        W_steps = TensorDescriptor.from_tensor(W, [K, PRODUCT_D])
        if product:
            p_tiles = TensorDescriptor.from_tensor(p.view(C * N, -1), [BLOCK_N, K])
    bias = h if head.bias is None else head.bias.contiguous()
    mask = h if keep is None else keep.contiguous().view(torch.int8)
    with on(device):
        for first in range(0, all_tiles, room):
            tiles = min(room, all_tiles - first)
            if first:
                shift, new_shift = new_shift, shift
            sums_kernel[(blocks, splits)](
                h_tiles, W_tiles, bias, mask, held, start, shift, new_shift, total, entropy, p, m,
                run, count,
                N, V, D, first, tiles, room, *h.stride(), *W.stride(), *p.stride()[:2],
                FIRST=first == 0, TMA=tma, **options,
            )  # fmt: skip
            if parts is not None:
                product_kernel[(blocks, up(D, PRODUCT_D), C * product_splits)](
                    p_tiles, W_steps, parts, run, count, m, start, shift, new_shift, reached,
                    N, V, D, first, tiles, room, splits, product_splits, group, p.stride(1),
                    *W.stride(), FIRST=first == 0, ALL_LIVE=False, TMA=tma, ACC=wide, DOT=HALF,
                    BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_K=K, BLOCK_D=PRODUCT_D,
                    num_warps=product_warps, num_stages=product_stages,
                )  # fmt: skip
    return Visited(new_shift, total, entropy, parts, reached, P_SCALE)


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
    """`tiled.sweep`, with its arguments and those of `visit`."""
    columns = [ALL for _ in sums]
    if keep is not None:
        columns[-1] = KEPT
        if apart is not None:
            sums, columns = [*sums, apart], [*columns, DROPPED]
    if 0 in h.shape:
        return
    taken = torch.where(valid, held, NOWHERE).int().sort(1).values
    room = power_of_2(held.shape[1])
    taken = torch.nn.functional.pad(taken, (0, room - held.shape[1]), value=NOWHERE).contiguous()
    for i in range(0, len(sums), 2):
        some = sums[i : i + 2]
        channels = [
            Channel(which, one.tau, one.entropy is not None)
            for one, which in zip(some, columns[i : i + 2], strict=True)
        ]
        start = torch.stack([one.shift for one in some]).to(dtypes(h, head.weight)[1])
        product = any(one.product is not None for one in some)
        found = visit(h, head, taken, start, keep, channels, product=product,
                      fine=held.shape[1] > 1, tile=tile, eps=eps, plan=plan)  # fmt: skip
        for j, one in enumerate(some):
            _add(one, found, j)


def _add(one: Sums, found: Visited, channel: int) -> None:
    """Adds the sums of all splits to `one`."""
    m, total, entropy = found.m[channel], found.total[channel], found.entropy[channel]
    top = m.amax(0).to(one.shift.dtype)
    one.rescale(torch.maximum(top, one.shift))
    away = m.double() - one.shift.double()  # [splits, N], never above 0
    r = torch.exp(away)
    one.total += (total * r).sum(0)
    if one.entropy is not None:
        one.entropy += (r * (entropy - away * total)).sum(0)
    if found.parts is not None and one.product is not None:
        part = found.parts[channel]
        (splits, N, D), BLOCK_D = part.shape, 512
        factor = torch.exp(found.reached[channel] - one.shift) / found.scale
        combine_kernel[(N, up(D, BLOCK_D))](
            part, factor.contiguous(), one.product, N, D, splits, BLOCK_D=BLOCK_D
        )


def up(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(x: int) -> int:
    """The smallest that is not below x. Triton's own takes 2 us."""
    return 1 << (x - 1).bit_length()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def describable(x: Tensor) -> bool:
    """Can a tensor descriptor describe this matrix? 16 bit, rows without gaps, all of them aligned
    to 16 bytes."""
    return (
        x.element_size() == 2
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )


def operands_of(interpreted: bool, acc: torch.dtype, *dots: torch.dtype) -> list[Any]:
    """Triton's names of the dtype of sums and of those of operands.

    Trap: the interpreter multiplies bf16 as the integers that hold it. Widening the operands
    changes no value.
    """
    wide = tl.float64 if acc == torch.float64 else tl.float32
    narrow = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return [wide, *(wide if interpreted else narrow.get(dtype, wide) for dtype in dots)]


def dtypes(h: Tensor, W: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of operands and that of sums. Operands of one 16 bit dtype stay as they are, others
    become fp32; both are fp64 if either is."""
    acc = torch.float64 if torch.float64 in (h.dtype, W.dtype) else torch.float32
    return (h.dtype if h.dtype == W.dtype and h.dtype.itemsize == 2 else acc), acc
