"""Which backend and which tile: a pure function of shape, dtype and device. The comment above each
constant tells the measurement that it comes from."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .triton_launch import measured_backend


class Launch(NamedTuple):
    """How a loss is computed.

    backend: "reference", "tiled", "triton" or "cpu"
    tile:    vocabulary columns at a time
    why:     the reason for the backend, and the measurement behind it
    """

    backend: str
    tile: int
    why: str


# Below both, few large operations beat many small ones. CE + KL, forward and backward, reference
# against tiled (Xeon with 2 threads, torch 2.13, 2026-11-21): 1.6 / 2.1 ms at 77 k logits (D = 96),
# 4.0 / 3.4 ms at 307 k. At [8, 32,000] with D = 1024 it is 110 / 23 ms, because there the reference
# upcasts the whole head.
SMALL_LOGITS, SMALL_HEAD = 2**17, 2**20  # N * V and V * D

# Bytes of one tile: its logits, and its head rows where they are upcast. Same machine and day, ms:
#
#     MiB                           2    4    8   16   32
#     [64, 80,000]   D 896  bf16  140  123  116  110  110
#     [256, 40,000]  D 896  bf16  181  167  165  163  176
#     [256, 32,000]  D 2048 fp32  330  307  305  304  288
#     [1024, 32,000] D 1024 fp32  580  563  547  526  535
#     [2048, 16,000] D 1024 bf16  569  552  569  561  577
TILE_BYTES = 2**24

# Where the C++ is at least 1.1 times as fast as tiled at every shape of benches/cpu.py, with two
# threads (on AMD's with one, too): (maker and level of the processor, dtype of all operands) ->
# why. torch's fp32 products, on which tiled runs, take longer on AMD's processors than on Intel's.
CPU: dict[tuple[str | None, torch.dtype], str] = {
    ("Intel amx", torch.bfloat16): "measured 2026-11-29 with AMX: 2.2 to 3.9 times tiled",
    ("AMD avx512_bf16", torch.bfloat16): "measured 2026-11-30 on Zen 4: 1.6 to 2.1 times tiled",
    ("AMD avx512_bf16", torch.float32): "measured 2026-11-30 on Zen 4: 1.1 to 1.9 times tiled",
    ("AMD avx512", torch.bfloat16): "measured 2026-11-30 on Zen 4: 1.2 to 1.8 times tiled",
    ("AMD avx512", torch.float32): "measured 2026-11-30 on Zen 4: 1.2 to 1.5 times tiled",
}
# V * D from which on it is taken. The smallest head in benches/results/cpu.jsonl has 28 million
# entries; with few of them the start of the threads, at each call, takes as long as the work.
CPU_HEAD = 2**24


def launch(
    N: int, V: int, D: int, dtype: torch.dtype, device: str, target: str | None = None
) -> Launch:
    """The backend and the tile for N rows, vocabulary V and hidden size D.

    dtype   of the head
    device  its type: "cpu", "cuda", ...
    target  the GPU's name in triton_launch.TARGETS, or the CPU's maker and level
            (`cpu_sweep.processor`); None where neither kernel can run
    """
    element = 8 if dtype == torch.float64 else 4
    # a GPU multiplies bf16 as it is: no head rows beside the logits
    rows = N if device == "cuda" and dtype == torch.bfloat16 else N + D
    tile = max(256, min(V, TILE_BYTES // (element * max(rows, 1)) // 64 * 64))
    known = "measured 2026-11-21" if device == "cpu" else "predicted from the CPU's figures"
    if device == "cpu" and N * V <= SMALL_LOGITS and V * D <= SMALL_HEAD:
        return Launch("reference", tile, f"few logits and a small head ({known})")
    if device == "cpu":
        faster_cpu = CPU.get((target, dtype)) if V * D >= CPU_HEAD else None
        if faster_cpu is None:
            return Launch("tiled", tile, f"tiles of {TILE_BYTES >> 20} MiB ({known})")
        return Launch("cpu", tile, faster_cpu)
    if device == "mps":
        return Launch(
            "reference", tile, "mps has no fp64, of which tiled keeps a few numbers per row"
        )
    if target is not None:
        faster = measured_backend(target, dtype, N)
        if faster is None:
            # In 16 bit the Triton kernels keep logits out of memory, where tiled writes and reads
            # them in fp32. In fp32 they cannot use matrix instructions.
            backend = "triton" if dtype.itemsize == 2 else "tiled"
            faster = backend, f"predicted for {target}, {str(dtype)[6:]}"
        backend, known = faster
        if backend != "tiled":
            return Launch(backend, tile, known)
    return Launch("tiled", tile, f"tiles of {TILE_BYTES >> 20} MiB ({known})")


def narrow(tile: int) -> int:
    """The general path's tile, narrower because the logits and probabilities of student and teacher
    and dz exist together."""
    return max(64, tile // 4)
