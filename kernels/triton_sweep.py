"""`tiled.sweep` in Triton, and the launches behind it: sums_kernel and product_kernel of
triton_tiles.py over the whole vocabulary, one chunk of columns at a time.

`visit` is what the loss calls (triton_frozen.py); `sweep` adds what it finds to Sums, for the tuner
and for comparison with `tiled.sweep`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_launch
from .inputs import Head
from .tiled import Sums
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

    columns  the value of ALL, KEPT or DROPPED
    entropy  also -sum e log e
    """

    columns: int
    tau: float
    entropy: bool


class Visited(NamedTuple):
    """What `visit` leaves, for each channel and split of the columns.

    m        [C, splits, N] fp32 (fp64)
    total    [C, splits, N] fp64
    entropy  [C, splits, N] fp64; not written where a channel wants none
    parts    [C, product splits, N, D] fp32 (fp64), or None
    reached  [C, product splits, N]: the m that parts refer to; not written without parts
    scale    a factor in parts
    """

    m: Tensor
    total: Tensor
    entropy: Tensor
    parts: Tensor | None
    reached: Tensor
    scale: float


class Launches(NamedTuple):
    """What `visit` launches for one shape and one set of options.

    sums, product         grids of the two kernels
    tiles, room           of the vocabulary; of a chunk
    splits, parts, group  pieces of a chunk's columns in sums_kernel, in product_kernel, and how
                          many of the former make one of the latter
    e                     dtype of e
    scale                 P_SCALE
    first, later          constants of sums_kernel, then of product_kernel: in the first chunk, and
                          in those after it
    """

    sums: tuple[int, int]
    product: tuple[int, int, int]
    tiles: int
    room: int
    splits: int
    parts: int
    group: int
    e: torch.dtype
    scale: float
    first: tuple[dict[str, Any], dict[str, Any]]
    later: tuple[dict[str, Any], dict[str, Any]]


@lru_cache(maxsize=256)
def _launches(
    plan: Plan,
    shape: tuple[int, int, int],
    machine: tuple[int, bool],
    dots: tuple[torch.dtype, torch.dtype],
    options: tuple[float, float | None, bool],
    channels: tuple[Channel, ...],
    HELD: int,
    product: bool,
    fine: bool,
    tile: int | None,
    eps: float,
    tma: bool,
) -> Launches:
    """The launches of `visit`. They are cached for each set of arguments, because Python takes
    longer to make these dicts than `visit` does for all else.

    shape    N, V, D
    machine  multiprocessors, and whether it is the interpreter
    dots     dtypes of the operands and of sums
    options  the head's scale and softcap, and whether it has a bias
    tma      by tensor descriptors
    """
    (N, V, D), (dot, acc), (scale, softcap, has_bias) = shape, dots, options
    units, interpreted = machine
    BLOCK_N, BLOCK_V, BLOCK_D, num_warps, num_stages = plan.sums
    _, K, PRODUCT_D, product_warps, product_stages = plan.product
    C, blocks, tiles = len(channels), up(N, BLOCK_N), up(V, BLOCK_V)
    if product:
        room = min(max(1, (plan.chunk if tile is None else tile) // BLOCK_V), tiles)
        splits = min(plan.splits, room)
    else:
        room, splits = tiles, split(blocks, WAVES * units, tiles)
    group = up(splits, min(plan.product_splits, splits))
    parts = up(splits, group)

    half = torch.float16 if fine and dot == torch.bfloat16 else dot
    # fp16 is scaled to reach down to 2^-39. Unscaled, exp(11) overflows and exp(-17) vanishes.
    P_SCALE, JUMP = (2.0**15, 0.0) if half == torch.float16 else (1.0, 30.0)
    wide, DOT, HALF = operands_of(interpreted, acc, dot, half)
    sums: dict[str, Any] = dict(
        TMA=tma, FLAT=plan.flat, SCALE=scale, SOFTCAP=1.0 if softcap is None else softcap,
        EPS=eps, JUMP=JUMP, P_SCALE=P_SCALE, NEAR=0.03 if acc == torch.float64 else 0.3,
        HAS_BIAS=has_bias, HAS_SOFTCAP=softcap is not None, HELD=HELD, ACC=wide, DOT=DOT,
        ROUND=interpreted and half == torch.bfloat16,
        BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    for i in range(2):
        one = channels[i] if i < C else Channel(NONE.value, 1.0, False)
        sums[f"COLUMNS_{i}"], sums[f"TAU_{i}"] = one.columns, one.tau
        sums[f"ENTROPY_{i}"], sums[f"PRODUCT_{i}"] = one.entropy, product and i < C
    multiply: dict[str, Any] = dict(
        ALL_LIVE=False, TMA=tma, ACC=wide, DOT=HALF, BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_K=K,
        BLOCK_D=PRODUCT_D, num_warps=product_warps, num_stages=product_stages,
    )  # fmt: skip
    first, later = (
        (sums | dict(FIRST=first), multiply | dict(FIRST=first)) for first in (True, False)
    )
    return Launches((blocks, splits), (blocks, up(D, PRODUCT_D), C * parts), tiles, room, splits,
                    parts, group, half, P_SCALE, first, later)  # fmt: skip


def visit(
    h: Tensor,
    head: Head,
    held: Tensor,
    start: Tensor,
    keep: Tensor | None,
    channels: tuple[Channel, ...],
    *,
    product: bool,
    fine: bool,
    tile: int | None = None,
    eps: float = 0.0,
    plan: Plan | None = None,
) -> Visited:
    """Sums one or two channels over the whole vocabulary: z is formed once for both. Launches on
    the current device.

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
    (N, D), W, device, C = h.shape, head.weight, h.device, len(channels)
    V, both = W.shape[0], dtypes(h, W)
    dot, acc = both
    target, units = target_of(device), units_of(device)
    if plan is None:
        heavy = C > 1 or head.softcap is not None
        plan = triton_launch.triton_launch(N, V, D, dot, target, units, heavy)
    tma = target in triton_launch.TMA and describable(h) and describable(W)
    made = _launches(
        plan, (N, V, D), (units, device.type == "cpu"), both,
        (head.scale, head.softcap, head.bias is not None), channels, held.shape[1], product, fine,
        tile, eps, tma,
    )  # fmt: skip
    BLOCK_V, room, splits, parts = plan.sums.BLOCK_V, made.room, made.splits, made.parts
    blocks = made.sums[0]
    # m before a chunk, and after it
    shift = h.new_empty((C, splits, N), dtype=acc)
    new_shift = h.new_empty((C, splits, N), dtype=acc)
    total = entropy = h.new_empty((C, splits, N), dtype=torch.float64)
    if channels[0].entropy or channels[-1].entropy:
        entropy = h.new_empty((C, splits, N), dtype=torch.float64)
    products: Tensor | None = None
    p, m, run, count, reached = h, shift, held, held, shift
    if product:
        p = h.new_empty((C, N, room * BLOCK_V), dtype=made.e)
        m = h.new_empty((C, room, N), dtype=acc)
        run = h.new_empty((C, blocks, 2 * (room + splits)), dtype=torch.int32)
        count = h.new_empty((C, blocks, splits), dtype=torch.int32)
        reached = h.new_empty((C, parts, N), dtype=acc)
        products = h.new_empty((C, parts, N, D), dtype=acc)
    h_tiles, W_tiles, W_steps, p_tiles = h, W, W, p
    if tma:
        K, PRODUCT_D = plan.product.BLOCK_V, plan.product.BLOCK_D
        h_tiles = TensorDescriptor.from_tensor(h, [plan.sums.BLOCK_N, plan.sums.BLOCK_D])
        W_tiles = TensorDescriptor.from_tensor(W, [BLOCK_V, plan.sums.BLOCK_D])
        W_steps = TensorDescriptor.from_tensor(W, [K, PRODUCT_D])
        if product:
            p_tiles = TensorDescriptor.from_tensor(p.view(C * N, -1), [plan.sums.BLOCK_N, K])
    bias = h if head.bias is None else head.bias.contiguous()
    mask = h if keep is None else keep.contiguous().view(torch.int8)
    h_strides, W_strides, columns = h.stride(), W.stride(), room * BLOCK_V
    options = made.first
    for first in range(0, made.tiles, room):
        tiles = min(room, made.tiles - first)
        if first:
            shift, new_shift, options = new_shift, shift, made.later
        sums_kernel[made.sums](
            h_tiles, W_tiles, bias, mask, held, start, shift, new_shift, total, entropy, p, m,
            run, count,
            N, V, D, first, tiles, room, *h_strides, *W_strides, N * columns, columns, **options[0],
        )  # fmt: skip
        if products is not None:
            product_kernel[made.product](
                p_tiles, W_steps, products, run, count, m, start, shift, new_shift, reached,
                N, V, D, first, tiles, room, splits, parts, made.group, columns, *W_strides,
                **options[1],
            )  # fmt: skip
    return Visited(new_shift, total, entropy, products, reached, made.scale)


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
    columns = [ALL.value for _ in sums]
    if keep is not None:
        columns[-1] = KEPT.value
        if apart is not None:
            sums, columns = [*sums, apart], [*columns, DROPPED.value]
    if 0 in h.shape:
        return
    taken = torch.where(valid, held, NOWHERE).int().sort(1).values
    room = power_of_2(held.shape[1])
    taken = torch.nn.functional.pad(taken, (0, room - held.shape[1]), value=NOWHERE).contiguous()
    for i in range(0, len(sums), 2):
        some = sums[i : i + 2]
        channels = tuple(
            Channel(which, one.tau, one.entropy is not None)
            for one, which in zip(some, columns[i : i + 2], strict=True)
        )
        start = torch.stack([one.shift for one in some]).to(dtypes(h, head.weight)[1])
        product = any(one.product is not None for one in some)
        with on(h.device):
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
