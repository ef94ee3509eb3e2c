"""The GPUs that figures are predicted for, from their data sheets."""

from __future__ import annotations

from typing import NamedTuple


class GPU(NamedTuple):
    """bf16: dense, accumulating in fp32; fp32: without tensor cores."""

    device: str  # torch.cuda.get_device_name(), all of it: a Ti or a PCIe card is another GPU
    target: str
    units: int  # multiprocessors
    clock: float  # boost, GHz
    bf16: float  # TFLOP/s
    fp32: float
    bandwidth: float  # GB/s
    l2: float  # MB


# GeForce: bf16 = units * 4 tensor cores * 64 multiply-adds (Ampere, Ada and Blackwell alike, with
# fp32 sums) * 2 * clock, the figure of NVIDIA's white papers "Ampere GA102", "Ada" and "RTX
# Blackwell" for the cards that these list; units, clocks, memory and L2 from there and from
# NVIDIA's product pages. H100 and H200: NVIDIA's data sheets of the SXM cards, half of the figures
# "with sparsity"; the clock is the one that gives their matrix rate (512 multiply-adds).
GPUS = {
    "RTX 3060": GPU("NVIDIA GeForce RTX 3060", "sm_86", 28, 1.777, 25.5, 12.7, 360, 3),
    "RTX 3090": GPU("NVIDIA GeForce RTX 3090", "sm_86", 82, 1.695, 71.2, 35.6, 936, 6),
    "RTX 4070": GPU("NVIDIA GeForce RTX 4070", "sm_89", 46, 2.475, 58.3, 29.1, 504, 36),
    "RTX 4090": GPU("NVIDIA GeForce RTX 4090", "sm_89", 128, 2.52, 165.2, 82.6, 1008, 72),
    "RTX 5090": GPU("NVIDIA GeForce RTX 5090", "sm_120", 170, 2.407, 209.5, 104.8, 1792, 96),
    "H100": GPU("NVIDIA H100 80GB HBM3", "sm_90", 132, 1.83, 989.4, 66.9, 3350, 50),
    "H200": GPU("NVIDIA H200", "sm_90", 132, 1.83, 989.4, 66.9, 4800, 50),
}
