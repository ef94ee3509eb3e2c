"""What all ways through the loss take: a head, a teacher, and the dtype that they compute in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """z = softcap * tanh(x / softcap), x = scale * (h @ weight.T + bias)"""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None


class Teacher(NamedTuple):
    """What the loss needs of a TeacherCache; fp32 (fp64 for fp64), lse always fp64."""

    hidden: Tensor  # [N, Dt]
    m: Tensor  # [N, Dt], over the kept columns that are not in top
    C: Tensor  # [N]
    lse: Tensor  # [N]
    top: Tensor  # [N, k] int64
    p: Tensor  # [N, k] fp64, P at top; 0 marks a placeholder
    head: Head
    keep: Tensor | None  # [V] bool
    renormalize: bool
    tau: float

    @property
    def whole(self) -> bool:
        """Is C exactly 1? Then a row that has not moved has neither KL nor gradient."""
        return self.keep is None or self.renormalize


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """One and the same memory, seen without reading it."""
    if a is None or b is None:
        return a is b
    if a is b:
        return True
    return (a.data_ptr(), a.shape, a.stride(), a.dtype, a.device) == (
        b.data_ptr(),
        b.shape,
        b.stride(),
        b.dtype,
        b.device,
    )


def exact(device: torch.device) -> bool:
    """Are fp32 products fp32 on this device? Trap: torch.set_float32_matmul_precision("high" or
    "medium") rounds them, on a CPU too."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")


def native(h: Tensor, W: Tensor) -> bool:
    """Does torch multiply these in bf16 and deliver fp32? It has no such product on a CPU, where
    the tile is upcast."""
    return h.is_cuda and h.dtype == W.dtype == torch.bfloat16


def working_dtype(h: Tensor, W: Tensor, *others: Tensor | None) -> torch.dtype:
    """fp32; fp64 if any tensor is, or where fp32 products would be rounded."""
    if any(x is not None and x.dtype == torch.float64 for x in (h, W, *others)):
        return torch.float64
    return torch.float32 if native(h, W) or exact(h.device) else torch.float64
