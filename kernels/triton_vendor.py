"""`triton_sweep.visit` with the vendor's matrix products: what `tiled` is on a GPU with Triton.

For each chunk of columns torch multiplies z = h W^T in fp32. Then one kernel turns z into
e = exp(z / tau - m) and its sums, and torch adds e W to the product. The products are as fast as
the vendor has made them. The logits of a chunk are in memory, in fp32: that is 8 N V bytes more
than the kernels of triton_tiles.py move. W is read once from memory where a chunk of it stays in
L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inputs import Head
from .triton_sweep import Channel, Visited, dtypes
from .triton_tiles import ALL, nearest_bf16, only, transform

# Bytes of a chunk's logits, and of its head rows. Predicted: both stay in the L2 of an H100 (50 MB)
# or a 4090 (72 MB).
CHUNK = 2**25


@triton.jit
def masked(z_ptr, bias_ptr, keep_ptr, held_ptr, n, T, first, c, V, COLUMNS: tl.constexpr,
           SCALE: tl.constexpr, SOFTCAP: tl.constexpr, NEAR: tl.constexpr, HAS_BIAS: tl.constexpr,
           HAS_SOFTCAP: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Logits [1, BLOCK] of row n from column first + c on; -inf where a channel does not look"""
    at = c + tl.arange(0, BLOCK)
    v, column = first + at, (at < T) & (first + at < V)
    z = tl.load(z_ptr + n * T + at, mask=column, other=0.0)[None, :]
    z = transform(z, bias_ptr, v, column, SCALE, SOFTCAP, NEAR, HAS_BIAS, HAS_SOFTCAP)
    z = tl.where(column[None, :], z, -float("inf"))
    held = tl.load(held_ptr + n * HELD + tl.arange(0, HELD))
    before = tl.sum((held < first + c).to(tl.int32), 0)
    past = tl.sum((held < first + c + BLOCK).to(tl.int32), 0)
    for i in range(before, past):
        z = tl.where((v == tl.load(held_ptr + n * HELD + i))[None, :], -float("inf"), z)
    if COLUMNS > ALL:
        kept = tl.load(keep_ptr + v, mask=column, other=0) != 0
        z = only(z, kept, COLUMNS)
    return z


@triton.jit(do_not_specialize=["N", "V", "first"])
def epilogue_kernel(
    z_ptr, bias_ptr, keep_ptr, held_ptr,  # [N, T] fp32, [V], [V] int8, [N, HELD] as sums_kernel's
    start_ptr, m_ptr, total_ptr, entropy_ptr,  # [N] each, of this channel
    p_ptr, product_ptr,  # [N, T], [N, D]
    N, V, D, T, first,
    FIRST: tl.constexpr, COLUMNS: tl.constexpr, TAU: tl.constexpr, ENTROPY: tl.constexpr,
    PRODUCT: tl.constexpr, JUMP: tl.constexpr, P_SCALE: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, NEAR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HELD: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row and channel: e of a chunk into p, the sums in place; the product so far is rescaled
    where m moves"""
    n = tl.program_id(0).to(tl.int64)
    if FIRST:
        old = tl.load(start_ptr + n)
        total, entropy = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    else:
        old, total = tl.load(m_ptr + n), tl.load(total_ptr + n)
        entropy = total * 0
        if ENTROPY:
            entropy = tl.load(entropy_ptr + n)
    top = old - float("inf")
    for c in range(0, T, BLOCK):
        z = masked(z_ptr, bias_ptr, keep_ptr, held_ptr, n, T, first, c, V, COLUMNS, SCALE, SOFTCAP,
                   NEAR, HAS_BIAS, HAS_SOFTCAP, HELD, BLOCK)  # fmt: skip
        top = tl.maximum(top, tl.max(tl.max(z, 1), 0) * (1.0 / TAU))
    m = tl.where(top > old + JUMP, top, old)
    r = tl.exp(old - m)
    if ENTROPY:
        entropy = r.to(tl.float64) * (entropy - (old - m).to(tl.float64) * total)
    total = total * r.to(tl.float64)
    for c in range(0, T, BLOCK):
        z = masked(z_ptr, bias_ptr, keep_ptr, held_ptr, n, T, first, c, V, COLUMNS, SCALE, SOFTCAP,
                   NEAR, HAS_BIAS, HAS_SOFTCAP, HELD, BLOCK)  # fmt: skip
        x = z * (1.0 / TAU) - m
        e = tl.exp(x)
        total += tl.sum(tl.sum(e, 1), 0).to(tl.float64)
        if ENTROPY:
            entropy -= tl.sum(tl.sum(tl.where(e > 0, e * x, 0.0), 1), 0).to(tl.float64)
        if PRODUCT:
            if HAS_SOFTCAP:
                y = z * (1.0 / SOFTCAP)
                e = tl.where(e > 0, e * (1.0 - y * y), 0.0)
            e = e * P_SCALE
            if ROUND:
                e = nearest_bf16(e)
            at = c + tl.arange(0, BLOCK)
            p = e.to(p_ptr.dtype.element_ty)
            tl.store(p_ptr + n * T + at[None, :], p, mask=(at < T)[None, :])
    tl.store(m_ptr + n, m)
    tl.store(total_ptr + n, total)
    if ENTROPY:
        tl.store(entropy_ptr + n, entropy)
    if PRODUCT and not FIRST:
        if m > old:
            for d in range(0, D, BLOCK_D):
                at = d + tl.arange(0, BLOCK_D)
                product = tl.load(product_ptr + n * D + at, mask=at < D, other=0.0)
                tl.store(product_ptr + n * D + at, product * r, mask=at < D)


def columns(N: int, V: int, D: int) -> int:
    """Columns of a chunk."""
    return max(256, min(V, CHUNK // max(4 * N, 2 * D)) // 64 * 64)


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
) -> Visited:
    """`triton_sweep.visit`, with one split."""
    (N, D), W, C = h.shape, head.weight, len(channels)
    V, (dot, acc) = len(W), dtypes(h, W)
    half = torch.float16 if fine and dot == torch.bfloat16 else dot
    P_SCALE, JUMP = (2.0**15, 0.0) if half == torch.float16 else (1.0, 30.0)
    T = min(tile or columns(N, V, D), V)
    m = h.new_empty((C, 1, N), dtype=acc)
    total, entropy = h.new_empty((2, C, 1, N), dtype=torch.float64).unbind(0)
    parts = h.new_empty((C, 1, N, D), dtype=acc) if product else None
    p = h.new_empty((N, T), dtype=half)
    bias = h if head.bias is None else head.bias.contiguous()
    mask = h if keep is None else keep.contiguous().view(torch.int8)
    for first in range(0, V, T):
        rows = W[first : first + T]
        size = len(rows)
        z = times(h.to(dot), rows.to(dot).T, acc)
        converted = rows.to(half) if product else rows
        e = p if size == T else h.new_empty((N, size), dtype=half)
        for i, one in enumerate(channels):
            epilogue_kernel[(N,)](
                z, bias, mask, held, start[i], m[i], total[i], entropy[i], e,
                m if parts is None else parts[i], N, V, D, size, first,
                FIRST=first == 0, COLUMNS=one.columns, TAU=one.tau, ENTROPY=one.entropy,
                PRODUCT=product, JUMP=JUMP, P_SCALE=P_SCALE, SCALE=head.scale,
                SOFTCAP=1.0 if head.softcap is None else head.softcap,
                NEAR=0.03 if acc == torch.float64 else 0.3, HAS_BIAS=head.bias is not None,
                HAS_SOFTCAP=head.softcap is not None, HELD=held.shape[1],
                ROUND=h.device.type == "cpu" and half == torch.bfloat16, BLOCK=2048, BLOCK_D=1024,
                num_warps=8,
            )  # fmt: skip
            if parts is not None:
                add(parts[i, 0], e, converted, first == 0)
    return Visited(m, total, entropy, parts, m, P_SCALE)


def times(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed and delivered in dtype. Without a GPU torch has no such product of 16 bit."""
    if a.dtype == dtype:
        return a @ b
    if not a.is_cuda:
        return a.to(dtype) @ b.to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def add(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b"""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif first or not a.is_cuda:
        made = times(a, b, total.dtype)
        total.copy_(made if first else total + made)
    else:
        total.copy_(torch.addmm(total, a, b, out_dtype=total.dtype))
