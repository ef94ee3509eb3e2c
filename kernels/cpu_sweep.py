"""`tiled.sweep` in C++ (cpu/sweep.cpp): the sums of the softmax, and their products with the head,
over the whole vocabulary, in cache blocks.

    e = exp(z / tau - shift)    total = sum e    entropy = -sum e log e    product = sum e dz/dx W

Each thread takes a block of rows and a split of the vocabulary, and has sums of its own. The sums
of all threads are added in a fixed order. So equal inputs and as many threads give equal bits.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu_build
from .inputs import Head
from .tiled import Sums

ALL, KEPT, DROPPED = range(3)  # which columns a channel sums over
TILE_BYTES = 2**20  # of a packed tile of W: at most half of an L2 cache
# Bytes that all threads' products may take; two products are always allowed, however large.
PARTIALS = 2**24


class _Channel(ctypes.Structure):
    _fields_ = [
        ("shift", c_void_p), ("total", c_void_p), ("entropy", c_void_p), ("product", c_void_p),
        ("inverse_tau", c_float), ("columns", c_int32),
    ]  # fmt: skip


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("h", "W", "bias", "keep")),
        ("held_column", c_void_p), ("held_row", c_void_p), ("workspace", c_void_p),
        *((name, c_int64) for name in ("N", "V", "D", "held", "W_row", "W_column", "tile")),
        *((name, c_int32) for name in ("bf16", "row_groups", "splits", "channels")),
        ("scale", c_float), ("softcap", c_float), ("channel", _Channel * 2),
    ]  # fmt: skip


class Channel(NamedTuple):
    """One of up to two softmaxes of a sweep, and the arrays that the threads write, one row each.

    shift, total, entropy: [splits, N up to 16]
    product:               [splits, N up to 16, D up to 64 + 16]
    """

    sums: Sums
    columns: int
    shift: Tensor
    total: Tensor
    entropy: Tensor | None
    product: Tensor | None

    @classmethod
    def of(cls, sums: Sums, columns: int, splits: int, D: int) -> Channel:
        N = len(sums.total)
        rows, wide = up(N, 16), up(D, 64) + 16
        shift = torch.zeros((splits, rows), dtype=torch.float32)
        shift[:, :N] = sums.shift
        total = torch.empty((splits, rows), dtype=torch.float64)
        entropy = None if sums.entropy is None else torch.empty_like(total)
        product = None if sums.product is None else shift.new_empty((splits, rows, wide))
        return cls(sums, columns, shift, total, entropy, product)

    def struct(self) -> _Channel:
        arrays = (self.shift, self.total, self.entropy, self.product)
        return _Channel(*map(_address, arrays), 1 / self.sums.tau, self.columns)

    def add(self) -> None:
        """Adds the sums of all splits to `sums`."""
        sums, N = self.sums, len(self.sums.total)
        shift, total = self.shift[:, :N], self.total[:, :N]
        sums.rescale(shift.amax(0).to(sums.shift.dtype))
        away = shift.double() - sums.shift.double()  # [splits, N], never above 0
        r = torch.exp(away)
        sums.total += (total * r).sum(0)
        if sums.entropy is not None and self.entropy is not None:
            sums.entropy += (r * (self.entropy[:, :N] - away * total)).sum(0)
        if sums.product is not None and self.product is not None:
            for part, factor in zip(self.product, r.float(), strict=True):
                part = part[:N, : sums.product.shape[1]]
                sums.product.addcmul_(part, factor[:, None].to(part.dtype))


def best() -> str | None:
    """The level of this processor; None where there is none."""
    return cpu_build.executes()[0] if cpu_build.executes() else None


def processor() -> str | None:
    """Maker and level, as `launch.CPU` has them; None where there is no level."""
    return None if best() is None else f"{cpu_build.maker()} {best()}"


def why_no_library() -> str | None:
    """Returns None where the processor's library can be used, after building it if necessary; else
    why it cannot, as one sentence."""
    level = best()
    if level is None:
        return "The backend 'cpu' is for Linux and macOS: choose 'tiled'."
    return cpu_build.why_not(level)


@functools.cache
def log_once(reason: str) -> None:
    """Logs, once for each reason, why plain torch replaces the kernel."""
    logging.getLogger(__name__).warning("%s The loss runs on plain torch ('tiled').", reason)


def sweep(
    h: Tensor,
    head: Head,
    held: Tensor,
    valid: Tensor,
    keep: Tensor | None,
    sums: list[Sums],
    apart: Sums | None,
    tile: int,
    level: str | None = None,
) -> None:
    """`tiled.sweep`. h and head.weight are both fp32 or both bf16.

    tile   columns at a time, rounded up to 32
    level  one of `cpu_build.executes()`; the processor's best by default
    """
    code = cpu_build.load(level or cpu_build.executes()[0])
    N, (V, D) = len(h), head.weight.shape
    if N == 0:
        return
    row_groups, splits = shares(N, V, D, torch.get_num_threads())
    columns = [ALL] * (len(sums) - 1) + [ALL if keep is None else KEPT]
    channels = [Channel.of(one, kind, splits, D) for one, kind in zip(sums, columns, strict=True)]
    if apart is not None:
        channels.append(Channel.of(apart, DROPPED, splits, D))
    assert len(channels) <= 2

    row, slot = valid.nonzero(as_tuple=True)
    column, order = held[row, slot].sort()
    row = row[order]
    h, keep = h.contiguous(), None if keep is None else keep.contiguous()
    bias = None if head.bias is None else head.bias.to(torch.float32).contiguous()
    problem = _Problem(
        *map(_address, (h, head.weight, bias, keep, column, row)), None,
        N, V, D, len(row), *head.weight.stride(), up(tile, 32),
        h.dtype == torch.bfloat16, row_groups, splits, len(channels),
        head.scale, head.softcap or 0.0, (_Channel * 2)(*(c.struct() for c in channels)),
    )  # fmt: skip
    room = torch.empty(code.fastsiu_workspace(ctypes.byref(problem)) + 63, dtype=torch.uint8)
    problem.workspace = up(room.data_ptr(), 64)
    if code.fastsiu_sweep(ctypes.byref(problem)):
        raise RuntimeError("The system gives the CPU kernel no threads: torch.set_num_threads(1).")
    for channel in channels:
        channel.add()


def tile_of(D: int) -> int:
    """How many columns a tile has: as many as fit into TILE_BYTES, from 32 to 256."""
    return max(32, min(256, TILE_BYTES // (4 * up(D, 64)) // 32 * 32))


def shares(N: int, V: int, D: int, threads: int) -> tuple[int, int]:
    """(groups of rows, splits of the vocabulary), at most `threads` pairs.

    A split reads its part of W once but needs an [N, D] of its own; a group of rows needs none but
    reads W again. So splits come first, while their products fit into PARTIALS.
    """
    splits = min(threads, -(-V // 256))
    while splits > 1 and splits * N * D * 4 > max(PARTIALS, 2 * N * D * 4):
        splits = -(-splits // 2)
    return max(1, min(threads // splits, -(-N // 64))), splits


def up(x: int, to: int) -> int:
    return -(-x // to) * to


def _address(x: Any) -> int | None:
    return None if x is None else x.data_ptr()
