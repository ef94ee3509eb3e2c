"""Which backend and which tile: one pure function of shape, dtype and device. Every number has the
figure behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .triton_launch import measured_backend


class Launch(NamedTuple):
    """backend: "reference", "tiled" or "triton"; tile: vocabulary columns at a time; why: where the
    choice comes from."""

    backend: str
    tile: int
    why: str


# Below both, few large operations beat many small ones. Xeon with 2 threads, torch 2.13,
# 2026-11-21, CE + KL forward and
# backward, reference against tiled: 1.6 / 2.1 ms at 77 k logits (D = 96), 4.0 / 3.4 ms at 307 k; at
# [8, 32,000] with D = 1024, where the reference upcasts the whole head, 110 / 23 ms.
SMALL_LOGITS, SMALL_HEAD = 2**17, 2**20  # N * V and V * D

# Bytes of one tile: its logits, and its head rows where they are upcast. Same machine and day, ms
# at 2, 4, 8, 16, 32 MiB: [64, 80,000] D 896 bf16: 140 123 116 110 110; [256, 40,000] D 896 bf16:
# 181 167 165 163 176; [256, 32,000] D 2048 fp32: 330 307 305 304 288; [1024, 32,000] D 1024 fp32:
# 580 563 547 526 535; [2048, 16,000] D 1024 bf16: 569 552 569 561 577.
TILE_BYTES = 2**24


def launch(
    N: int, V: int, D: int, dtype: torch.dtype, device: str, target: str | None = None
) -> Launch:
    """N rows, vocabulary V, hidden size D; dtype of the head; device type ("cpu", "cuda", ...);
    target: the GPU's name in triton_launch.TARGETS, None where the Triton kernels cannot run."""
    element = 8 if dtype == torch.float64 else 4
    tile = max(256, min(V, TILE_BYTES // (element * max(N + D, 1)) // 64 * 64))
    known = "measured 2026-11-21" if device == "cpu" else "predicted from the CPU's figures"
    if device == "cpu" and N * V <= SMALL_LOGITS and V * D <= SMALL_HEAD:
        return Launch("reference", tile, f"few logits and a small head ({known})")
    if device == "mps":
        return Launch(
            "reference", tile, "mps has no fp64, of which tiled keeps a few numbers per row"
        )
    if target is not None:
        found = measured_backend(target, dtype, N)
        # z formed once, logits never in memory, against fp32 logits written and read; but fp32
        # without TF32
        if found is None:
            found = (
                "triton" if dtype.itemsize == 2 else "tiled",
                f"predicted for {target}, {str(dtype)[6:]}",
            )
        if found[0] != "tiled":
            return Launch(found[0], tile, found[1])
        known = found[1]
    return Launch("tiled", tile, f"tiles of {TILE_BYTES >> 20} MiB ({known})")


def narrow(tile: int) -> int:
    """The general path's tile: student and teacher, their probabilities and dz are alive
    together."""
    return max(64, tile // 4)
