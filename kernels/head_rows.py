"""Single rows of the head: the logits of a token's own few columns, and sums of their rows of W.

Held-out columns go through here (tiled.py says why): k of them for each of N tokens, so all of it
is N * k * D at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .inputs import Head, exact
from .parts import Part

# Numbers in the head rows gathered at a time; 8 times that on a GPU, where operations cost more
# than memory.
GATHERED = 2**20


def chunks(columns: Tensor, D: int) -> Iterator[slice]:
    """Slices of the rows of columns [N, k], so small that their head rows [n, k, D] are about as
    large as a tile's logits."""
    N, k = columns.shape
    step = max(1, (GATHERED if columns.device.type == "cpu" else 8 * GATHERED) // (k * D))
    return (slice(start, start + step) for start in range(0, N, step))


def gather(W: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """W[columns] [n, k, D]. index_select copies whole rows, many times faster than indexing."""
    return W.index_select(0, columns.reshape(-1)).to(dtype).view(*columns.shape, W.shape[1])


def row_logits(
    h: Tensor, head: Head, columns: Tensor, dtype: torch.dtype, moved: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z [N, k] at each row's own columns [N, k], and s <moved, W_v> [N, k]: how much x grows where
    h moves by `moved` [N, D]."""
    z, dz = h.new_empty(columns.shape, dtype=dtype), h.new_zeros(columns.shape, dtype=dtype)
    wide = dtype if exact(h.device) else torch.float64
    for n in chunks(columns, h.shape[1]):
        x = h[n].to(wide)[:, :, None]  # [n, D, 1]
        x = x if moved is None else torch.cat([x, moved[n].to(wide)[:, :, None]], 2)
        both = torch.bmm(gather(head.weight, columns[n], wide), x)
        z[n] = both[:, :, 0]
        if moved is not None:
            dz[n] = both[:, :, 1]
    if head.bias is not None:
        z += head.bias[columns].to(dtype)
    z *= head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z, dz * head.scale


def held_logits(
    h: Tensor,
    head: Head,
    columns: Tensor,
    dtype: torch.dtype,
    part: Part,
    moved: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`row_logits` at columns [N, k] of the whole head, each from the rank that has its row."""
    if part.whole:
        return row_logits(h, head, columns, dtype, moved)
    pair = h.new_zeros((1 if moved is None else 2, *columns.shape), dtype=dtype)
    if part.rows:
        at = part.local(columns).clamp(0, part.rows - 1)
        found = torch.stack(row_logits(h, head, at, dtype, moved)[: len(pair)])
        pair = found.masked_fill(~part.owns(columns), 0.0)
    part.sum(pair)
    return pair[0], pair[1] if moved is not None else torch.zeros_like(pair[0])


def add_rows(total: Tensor, W: Tensor, columns: Tensor, factors: Tensor) -> None:
    """total [N, D] += sum_j factors[:, j] * W[columns[:, j]]"""
    wide = total.dtype if exact(total.device) else torch.float64
    factors = factors.to(wide)[:, None, :]  # [N, 1, k]
    for n in chunks(columns, W.shape[1]):
        total[n] += torch.bmm(factors[n], gather(W, columns[n], wide))[:, 0]


def add_held_rows(total: Tensor, W: Tensor, columns: Tensor, factors: Tensor, part: Part) -> None:
    """`add_rows` of those columns [N, k] of the whole head that this rank has."""
    if part.whole:
        add_rows(total, W, columns, factors)
    elif part.rows:
        at = part.local(columns).clamp(0, part.rows - 1)
        add_rows(total, W, at, factors.masked_fill(~part.owns(columns), 0.0))
