"""How fast the loss can be on each GPU, and how fast its kernels are predicted to be, beside what
was measured.

    python benches/roofline.py               all GPUs and shapes: CE + KL with a frozen head,
    forward and backward python benches/roofline.py --gpu "RTX 4090" H200 --shape 256,151936,2048
    64,32000,1024,float32
    python benches/roofline.py --general     a head that trains, a teacher with a head of its own
    python benches/roofline.py --json FILE   the same rows, with the assumptions, as JSON

floor      each product once at the data sheet's peak, or each weight moved once at its bandwidth,
whichever takes longer:
           max(4 N V D / peak, bytes of W / bandwidth); with a training head 8 N V D, and W, the
           teacher's W and dW.
predicted  from the launch row that triton_launch.py chooses, and the rates assumed below.
measured   the newest "fastsiu triton" of results/loss.jsonl on that GPU at that shape, cold L2.
share      floor / time
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loss import FULL, PEERS, RESULTS, Shape
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsiu.kernels import tiled
from fastsiu.kernels.triton_launch import general_launch, triton_launch


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

# Assumed, not measured: what is reached of a data sheet's figure.
MATMUL = 0.7  # of the peak: on an H200 torch's own products reach 0.8, 788 TFLOP/s
COPY = 0.9  # of the bandwidth: 4.3 of an H200's 4.8 TB/s in a copy
L2_RATE = 32  # bytes per clock and multiprocessor: half of the 64 that its port takes
L2_KEPT = 0.5  # of the L2 holds what the next kernel reads again; the rest is passed through
# s of Python for a torch operation, for a Triton launch (triton_launch.py, CHUNK)
HOST_OPERATION, HOST_LAUNCH = (
    5e-6,
    25e-6,
)
DEVICE_OPERATION = 2e-6  # s of the GPU for a kernel however small
# torch operations: of loss.py, forward and backward, and of _visit, _sorted and _add in
# triton_sweep.py
OUTSIDE = 66 + 36
OUTSIDE_GENERAL = 66 + 115  # the same with triton_general.py, without what it does for each chunk

SHAPES: list[Shape] = list(dict.fromkeys(sorted(PEERS, key=lambda s: (*s[1:3], s[0])) + FULL))
DTYPES = ("bfloat16", "float32")


class BadInput(Exception):
    """One sentence: fact and remedy."""


def up(a: int, b: int) -> int:
    return -(-a // b)


class Cost(NamedTuple):
    """Of one kernel. busy: the fraction of the multiprocessors that work, on average until the last
    one is done; each runs one program at a time, as benches/compile_kernels.py predicts for nearly
    all rows."""

    flops: float
    dram: float  # bytes
    l2: float = 0.0  # bytes from or to it, those that go on to memory included
    busy: float = 1.0

    def seconds(self, gpu: GPU, peak: float) -> dict[str, float]:
        return {
            "matmul": self.flops / (MATMUL * peak * self.busy),
            "memory": self.dram / (COPY * gpu.bandwidth * 1e9),
            "L2": self.l2 / (L2_RATE * gpu.clock * 1e9 * gpu.units * self.busy),
        }


class Work(NamedTuple):
    costs: list[Cost]  # one after the other
    launches: int  # of Triton kernels
    operations: int  # of torch


# --------------------------------------------------------------------------------------------------
# what is done


def frozen(shape: Shape, gpu: GPU) -> Work:
    """`triton_sweep.sweep` for one Sums with a product, chunk by chunk, and `tiled.shared` around
    it."""
    N, V, D, name = shape
    dtype = getattr(torch, name)
    E = dtype.itemsize  # of h and W, and of e
    plan, kept = triton_launch(N, V, D, dtype, gpu.target, gpu.units), L2_KEPT * gpu.l2 * 1e6
    (BLOCK_N, BLOCK_V, BLOCK_D, *_), BLOCK = plan.sums, plan.product.BLOCK_D
    blocks, tiles, slices = up(N, BLOCK_N), up(V, BLOCK_V), up(D, BLOCK)
    room = min(max(1, plan.chunk // BLOCK_V), tiles)  # these four as in _visit
    splits = min(plan.splits, room)
    group = up(splits, min(plan.product_splits, splits))
    parts = up(splits, group)
    again = up(blocks, gpu.units)  # row blocks that do not run at the same time read W again
    costs = []
    for first in range(0, tiles, room):
        n = min(room, tiles - first)
        columns = min(n * BLOCK_V, V - first * BLOCK_V)
        W, p, share = columns * D * E, N * columns * E, up(n, splits)
        logits = blocks * BLOCK_N * n * BLOCK_V  # whole tiles are multiplied
        # sums_kernel: W once, which the row blocks of a split read side by side out of L2; h once,
        # and once per tile out of L2; leave() stores e and, per tile and row, m.
        waves = up(blocks * up(n, share), gpu.units)
        costs.append(
            Cost(
                flops=2 * logits * up(D, BLOCK_D) * BLOCK_D,
                dram=again * W + N * D * E + p + 4 * N * n,
                l2=blocks * W + n * N * D * E + p,
                busy=blocks * n / (gpu.units * waves * share),
            )
        )
        # product_kernel: W again, unless the chunk's W and e are still in L2; e once per slice of
        # BLOCK_D, out of L2 for the slices that run at once; the partial sums are read and written.
        most = min(group * share, n)
        waves = up(blocks * slices * up(n, group * share), gpu.units)
        partial = 2 * 4 * parts * N * D
        costs.append(
            Cost(
                flops=2 * logits * slices * BLOCK,
                dram=partial
                + (0 if W + p <= kept else again * W + (1 if p <= kept else waves) * p),
                l2=partial + blocks * W + slices * p,
                busy=blocks * slices * n / (gpu.units * waves * most),
            )
        )
    # combine_kernel: partials, and product read and written
    costs.append(Cost(0, dram=4 * (parts + 2) * N * D))
    # tiled.shared: gathers the held-out rows of W twice, in slices of 8 GATHERED numbers, and
    # multiplies them in fp32.
    operations, touched = around(N, D, name)
    least = 2 * N * HELD * D * E + (2 * E + 8) * N * D  # these rows; h, h_t, m and dh
    costs.append(
        Cost(
            0,
            dram=least if min(8 * tiled.GATHERED, N * HELD * D) * (E + 4) <= kept else touched,
            l2=touched,
        )
    )
    return Work(costs, launches=len(range(0, tiles, room)) * 2 + 1, operations=operations + OUTSIDE)


def trained(shape: Shape, gpu: GPU) -> Work:
    """`triton_general.normalise` in the forward and `differentiate`, by h and W, in the backward
    pass. The teacher's head is a frozen copy."""
    N, V, D, name = shape
    dtype = getattr(torch, name)
    E, plan, kept = (
        dtype.itemsize,
        general_launch(N, V, D, dtype, gpu.target, gpu.units),
        L2_KEPT * gpu.l2 * 1e6,
    )
    (BLOCK_N, BLOCK_V, BLOCK_D, *_), BLOCK, (OUTER_N, OUTER_V, OUTER_D, *_) = (
        plan.pair,
        plan.product.BLOCK_D,
        plan.outer,
    )
    blocks, tiles, slices, outer_slices = (
        up(N, BLOCK_N),
        up(V, BLOCK_V),
        up(D, BLOCK),
        up(D, OUTER_D),
    )
    room, again = min(max(1, plan.chunk // BLOCK_V), tiles), up(blocks, gpu.units)
    splits = min(plan.product_splits, room)
    # flops of z and t, whole tiles
    pairs = lambda n: 2 * 2 * blocks * BLOCK_N * n * BLOCK_V * up(D, BLOCK_D) * BLOCK_D
    # normalise_kernel: both heads once, which the row blocks of a split read side by side out of
    # L2; h and h_t once per tile.
    W, share = V * D * E, up(tiles, min(plan.splits, tiles))
    costs = [
        Cost(
            flops=pairs(tiles),
            dram=2 * again * W + 2 * N * D * E,
            l2=2 * blocks * W + 2 * tiles * N * D * E,
            busy=blocks * tiles / (gpu.units * up(blocks * up(tiles, share), gpu.units) * share),
        )
    ]
    for first in range(0, tiles, room):
        n = min(room, tiles - first)
        columns = min(n * BLOCK_V, V - first * BLOCK_V)
        W, p, share = columns * D * E, N * columns * E, up(n, splits)
        # coefficient_kernel: the same again, a program per tile; stores dx and, per tile and row,
        # two fp64.
        costs.append(
            Cost(
                flops=pairs(n),
                dram=2 * again * W + 2 * N * D * E + p + 16 * N * n,
                l2=2 * blocks * W + 2 * n * N * D * E + p,
                busy=blocks * n / (gpu.units * up(blocks * n, gpu.units)),
            )
        )
        # product_kernel: as in `frozen`, one split after the other.
        waves = up(blocks * slices * up(n, share), gpu.units)
        partial = 2 * 4 * splits * N * D
        costs.append(
            Cost(
                flops=2 * blocks * BLOCK_N * n * BLOCK_V * slices * BLOCK,
                dram=partial
                + (0 if 2 * W + p <= kept else again * W + (1 if p <= kept else waves) * p),
                l2=partial + blocks * W + slices * p,
                busy=blocks * slices * n / (gpu.units * waves * share),
            )
        )
        # outer_kernel: dx once per slice of OUTER_D, out of memory if a chunk of it does not fit,
        # since all columns of one slice come before the next slice; h once per block of columns out
        # of L2; writes dW.
        wide = up(n * BLOCK_V, OUTER_V)
        waves = up(wide * outer_slices, gpu.units)
        costs.append(
            Cost(
                flops=2 * up(N, OUTER_N) * OUTER_N * wide * OUTER_V * outer_slices * OUTER_D,
                dram=(1 if p <= kept else min(waves, outer_slices)) * p + N * D * E + W,
                l2=outer_slices * p + wide * N * D * E + W,
                busy=wide * outer_slices / (gpu.units * waves),
            )
        )
    chunks = len(range(0, tiles, room))
    return Work(costs, launches=1 + 3 * chunks, operations=OUTSIDE_GENERAL + 10 * chunks)


# --------------------------------------------------------------------------------------------------
# counting torch

HELD = 17  # the teacher's 16 and the label


class Tally(TorchDispatchMode):
    """Counts the operations that do something, views and allocations aside, and the bytes that they
    read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, result = func(*args, **(kwargs or {})), func._schema.returns
        alias = result[0].alias_info if result else None
        if (alias is None or alias.is_write) and "empty" not in func.__name__:
            self.operations += 1
            # a gather does not read all of W
            moved = (out, out) if "index_select" in func.__name__ else (args, kwargs, out)
            self.bytes += sum(
                x.numel() * x.element_size()
                for x in tree_leaves(moved)
                if isinstance(x, torch.Tensor)
            )
        return out


def given(N: int, V: int, D: int, dtype: torch.dtype, device: str) -> tuple:
    """hidden, head, labels, teacher and both weights, all zeros: what `tiled.shared` takes."""
    zeros = functools.partial(torch.zeros, device=device)
    double, y = functools.partial(zeros, dtype=torch.float64), zeros(N, dtype=torch.int64)
    head = tiled.Head(zeros(V, D, dtype=dtype), None, 1.0, None)
    top, h = zeros(N, HELD - 1, dtype=torch.int64), zeros(N, D, dtype=dtype)
    teacher = tiled.Teacher(
        h, zeros(N, D), zeros(N), double(N), top, double(N, HELD - 1), head, None, False, 1.0
    )
    return h, head, y, teacher, zeros(N), zeros(N)


@functools.lru_cache
def around(N: int, D: int, dtype: str) -> tuple[int, int]:
    """Operations and bytes of `tiled.shared` without its sweep, on tensors without data."""
    problem = given(N, 2 * HELD, D, getattr(torch, dtype), "meta")
    with Tally() as tally:
        tiled.shared(*problem, True, False, 1, lambda *sweep: None)
    return tally.operations, tally.bytes


# --------------------------------------------------------------------------------------------------
# rows


def peak(gpu: GPU, dtype: str) -> float:
    """flops per second; fp32 is not rounded to TF32."""
    return 1e12 * (gpu.fp32 if dtype == "float32" else gpu.bf16)


def floor(shape: Shape, gpu: GPU, training: bool = False) -> dict[str, float]:
    """Seconds for the products, and for the weights."""
    N, V, D, dtype = shape
    products, weights = (8, 3) if training else (4, 1)
    moved = weights * V * D * getattr(torch, dtype).itemsize
    return {
        "matmul": products * N * V * D / peak(gpu, dtype),
        "memory": moved / (gpu.bandwidth * 1e9),
    }


def ridge(gpu: GPU, training: bool = False, reads: int = 1) -> float:
    """Tokens from which bf16 products take longer than the weights, the floor's or `reads` times as
    many."""
    times = floor((1, 1, 1, "bfloat16"), gpu, training)
    return reads * times["memory"] / times["matmul"]


def predict(shape: Shape, gpu: GPU, training: bool = False) -> dict[str, Any]:
    """ms, what bounds it, and what is done for it. The host runs ahead of the GPU, so that the
    slower of the two counts."""
    work = (trained if training else frozen)(shape, gpu)
    slowest: dict[str, float] = {}
    for cost in work.costs:
        by, seconds = max(cost.seconds(gpu, peak(gpu, shape[3])).items(), key=lambda item: item[1])
        slowest[by] = slowest.get(by, 0.0) + seconds
    kernels = work.operations + work.launches
    slowest["small kernels"] = kernels * DEVICE_OPERATION
    device = sum(slowest.values())
    host = work.operations * HOST_OPERATION + work.launches * HOST_LAUNCH
    by = "host" if host > device else max(slowest, key=slowest.__getitem__)
    total = lambda key: sum(getattr(cost, key) for cost in work.costs)
    done = dict(flops=total("flops"), dram=total("dram"), l2=total("l2"), kernels=kernels)
    return dict(
        ms=1e3 * max(device, host), by=by, device_ms=1e3 * device, host_ms=1e3 * host, **done
    )


def measured(path: Path) -> dict[tuple, float]:
    """ms of the newest run of the Triton kernels, by device and shape."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        r = json.loads(line)
        if r["kind"] == "shape" and r["contender"] == "fastsiu triton" and not r["missing"]:
            found[r["device"], r["N"], r["V"], r["D"], r["dtype"]] = r["ms"]["median"]
    return found


def rows(
    gpus: Sequence[str], shapes: Sequence[Shape], training: bool, results: Path
) -> list[dict[str, Any]]:
    known, found = {} if training else measured(results), []  # no bench times a head that trains
    for name in gpus:
        for shape in shapes:
            gpu, ms = GPUS[name], known.get((GPUS[name].device, *shape))
            times = floor(shape, gpu, training)
            least, by = 1e3 * max(times.values()), max(times, key=times.__getitem__)
            predicted = predict(shape, gpu, training)
            found.append(
                dict(
                    gpu=name,
                    **dict(zip("NVD", shape, strict=False)),
                    dtype=shape[3],
                    floor_ms=least,
                    floor_by=by,
                    predicted=predicted,
                    predicted_share=least / predicted["ms"],
                    measured_ms=ms,
                    measured_share=None if ms is None else least / ms,
                )
            )
    return found


# --------------------------------------------------------------------------------------------------
# output


def short(x: float) -> str:
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def percent(x: float) -> str:
    return f"{100 * x:.0f} %" if x >= 0.1 else f"{100 * x:.2g} %"


def markdown(lines: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def ridges(gpus: Sequence[str], training: bool) -> str:
    lines = [
        [
            "GPU",
            "bf16, TFLOP/s",
            "GB/s",
            "L2, MB",
            "ridge of the floor, tokens",
            "ridge where the weights move twice",
        ]
    ]
    for name in gpus:
        gpu = GPUS[name]
        lines.append(
            [
                name,
                f"{gpu.bf16:g}",
                f"{gpu.bandwidth:g}",
                f"{gpu.l2:g}",
                f"{ridge(gpu, training):.0f}",
                f"{ridge(gpu, training, 2):.0f}",
            ]
        )
    return markdown(lines)


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        [
            "GPU",
            "N, V, D",
            "dtype",
            "floor, ms",
            "by",
            "TFLOP done",
            "GB, memory",
            "GB, L2",
            "kernels",
            "predicted, ms",
            "by",
            "predicted share",
            "measured, ms",
            "measured share",
        ]
    ]
    for r in found:
        p, never = r["predicted"], r["measured_ms"] is None
        lines.append(
            [
                r["gpu"],
                f"{r['N']}, {r['V']}, {r['D']}",
                r["dtype"],
                short(r["floor_ms"]),
                r["floor_by"],
                short(p["flops"] / 1e12),
                short(p["dram"] / 1e9),
                short(p["l2"] / 1e9),
                str(p["kernels"]),
                short(p["ms"]),
                p["by"],
                percent(r["predicted_share"]),
                "not measured" if never else short(r["measured_ms"]),
                "-" if never else percent(r["measured_share"]),
            ]
        )
    return markdown(lines)


ASSUMED = dict(
    matmul=MATMUL,
    copy=COPY,
    l2_bytes_per_clock_and_unit=L2_RATE,
    l2_kept=L2_KEPT,
    host_operation_s=HOST_OPERATION,
    host_launch_s=HOST_LAUNCH,
    device_operation_s=DEVICE_OPERATION,
)


def gpu_named(text: str) -> str:
    for name in GPUS:
        if text.lower() in (name.lower(), name.lower().removeprefix("rtx ")):
            return name
    raise BadInput(f"There are no peaks for the GPU {text!r}: choose among {', '.join(GPUS)}.")


def shape_named(text: str) -> Shape:
    numbers, dtype = (parts := text.split(","))[:3], (parts[3:] or ["bfloat16"])
    if (
        len(numbers) == 3
        and len(parts) <= 4
        and all(x.isdecimal() and int(x) for x in numbers)
        and dtype[0] in DTYPES
    ):
        return *map(int, numbers), dtype[0]
    raise BadInput(
        f"{text!r} is not a shape: give N,V,D or N,V,D,DTYPE, positive integers and one of "
        f"{', '.join(DTYPES)}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpu", nargs="+", metavar="NAME", default=list(GPUS), help=", ".join(GPUS)
    )
    parser.add_argument("--shape", nargs="+", metavar="N,V,D[,DTYPE]", help="bfloat16 by default")
    parser.add_argument("--general", action="store_true", help="a head that trains")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what loss.py appended")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    try:
        gpus = [gpu_named(text) for text in options.gpu]
        shapes = [shape_named(text) for text in options.shape] if options.shape else SHAPES
        found = rows(gpus, shapes, options.general, options.results)
        if options.json:
            text = json.dumps(dict(general=options.general, assumed=ASSUMED, rows=found), indent=1)
            options.json.write_text(text + "\n", encoding="utf-8")
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"{error.filename} cannot be used ({error.strerror}): give another file.",
            file=sys.stderr,
        )
        return 2
    print(ridges(gpus, options.general), table(found), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
