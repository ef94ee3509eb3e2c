"""Which backend and which tile: one pure function of shape, dtype and device. A choice is a row with the figure behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """backend: "reference" or "tiled"; tile: vocabulary columns at a time; why: where the choice comes from."""

    backend: str
    tile: int
    why: str


SMALL = 2**18  # logits, N * V
BUDGET = 2**23  # bytes for one tile: its logits and its upcast head rows


def launch(N: int, V: int, D: int, dtype: torch.dtype, device: str) -> Launch:
    """N rows, vocabulary V, hidden size D; dtype of the head; device type ("cpu", "cuda", ...)."""
    element = 8 if dtype == torch.float64 else 4
    width = max(256, min(V, BUDGET // (element * max(N + D, 1)) // 64 * 64))
    if N * V <= SMALL:
        return Launch("reference", width, "predicted: all logits are small, and a few large operations beat many small ones")
    return Launch("tiled", width, "predicted")
