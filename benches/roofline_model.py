"""The model behind benches/roofline.py: seven GPUs, what the loss's kernels do on one of them at a
shape, and how long that takes.

`floor`         what a data sheet allows
`two_products`  what the vendor's library would take
`predict`       what the kernels take, as triton_launch.py launches them: what a step of each loop
                multiplies and loads, whether the compiled loop loads ahead (PIPELINED), bytes,
                loads that are waited for, small kernels, Python
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gpus import GPU
from loss import Shape

from fastsiu.kernels.triton_launch import general_launch, triton_launch

# Assumed, not measured: what is reached of a data sheet's figure.
VENDOR = {"sm_90": 0.8}  # of the peak, by the vendor's products: 788 TFLOP/s on an H200
OURS = {"sm_90": 0.85}  # of that, by a Triton loop that waits for nothing
USUALLY = (0.9, 0.95)  # the same of the others
NARROW = 0.63  # of the peak, by what wgmma cannot do: below 64 rows
COPY = 0.9  # of the bandwidth: 4.3 of an H200's 4.8 TB/s in a copy
L2_RATE = 32  # bytes per clock and multiprocessor: half of the 64 that its port takes
L2_KEPT = 0.5  # of the L2 holds what the next kernel reads again; the rest is passed through
LATENCY = 700  # clocks from a load to its data
ROWS_AT_ONCE = 2  # programs of a per-row kernel on a multiprocessor: 128 registers, 256 threads
DEVICE_OPERATION = 2e-6  # s of the GPU for a kernel however small
HOST_LAUNCH = 25e-6  # s that Triton takes for a launch (triton_launch.py, CHUNK)


class Around(NamedTuple):
    """What a call does beside its launches for each chunk, forward and backward.
    tests/triton/test_roofline.py counts again.

    launches: of Triton's per-row kernels; kernels: of torch; host: s of Python, without what Triton
    takes for a launch
    """

    launches: int
    kernels: int
    host: float


# Python: CPU time of a step at [16, 64] with the kernels left out, 0.18 to 0.20 ms for the forward
# pass of either, 0.29 and 0.38 ms with the backward pass (Xeon, 2 busy cores, torch 2.13, triton
# 3.6, 2026-11-29), rounded.
FROZEN, GENERAL = Around(3, 3, 3e-4), Around(6, 2, 4e-4)
# Does the compiled loop load ahead? As Triton's intermediate code says (async_wait, number of
# buffers); tests/triton/test_roofline.py reads it again.
PIPELINED = dict(sums=True, product=True, pair=True, outer=True)

HELD = 17  # the teacher's 16 columns and the label


def up(a: int, b: int) -> int:
    return -(-a // b)


class Pipe(NamedTuple):
    """A kernel's loop: flops and bytes of a step, the rows of its sums as the matrix instructions
    see them, its stages, and whether it loads ahead."""

    flops: float
    bytes: float
    rows: int
    stages: int
    ahead: bool

    def reached(self, gpu: GPU, peak: float) -> tuple[float, str]:
        """(fraction of the peak, what bounds it). One program at a time has the multiprocessor."""
        per_clock = peak / (gpu.units * gpu.clock * 1e9)
        wide = gpu.target != "sm_90" or self.rows >= 64
        multiply = self.flops / per_clock / (vendor(gpu) * ours(gpu) if wide else NARROW)
        load = self.bytes / L2_RATE
        # of the stages one is being multiplied, where the tensor cores read registers
        buffers = self.stages if gpu.target == "sm_90" and wide else self.stages - 1
        if not self.ahead:
            clocks = multiply + load + LATENCY
            return self.flops / per_clock / clocks, "waiting for loads"
        times = {"matmul": multiply, "L2": load, "waiting for loads": LATENCY / max(1, buffers)}
        by = max(times, key=times.__getitem__)
        return self.flops / per_clock / times[by], by


def vendor(gpu: GPU) -> float:
    return VENDOR.get(gpu.target, USUALLY[0])


def ours(gpu: GPU) -> float:
    return OURS.get(gpu.target, USUALLY[1])


class Cost(NamedTuple):
    """Of one kernel. busy: the fraction of the multiprocessors that work, on average until the last
    one is done; each runs one program at a time, as benches/compile_kernels.py predicts for nearly
    all rows. waits: loads outside of `pipe` that are waited for, one after the other."""

    kernel: str
    flops: float
    dram: float  # bytes
    l2: float = 0.0  # bytes from or to it, those that go on to memory included
    busy: float = 1.0
    pipe: Pipe | None = None
    waits: int = 0

    def seconds(self, gpu: GPU, peak: float) -> dict[str, float]:
        reached, by = self.pipe.reached(gpu, peak) if self.pipe else (1.0, "matmul")
        times = {
            "memory": self.dram / (COPY * gpu.bandwidth * 1e9),
            "L2": self.l2 / (L2_RATE * gpu.clock * 1e9 * gpu.units * self.busy),
            "waiting for loads": self.waits * LATENCY / (gpu.clock * 1e9),
        }
        times[by] = max(times.get(by, 0.0), self.flops / (reached * peak * self.busy))
        return times


class Work(NamedTuple):
    costs: list[Cost]  # one after the other
    launches: int  # of Triton kernels
    operations: int  # of torch
    host: float  # s of Python for these


# --------------------------------------------------------------------------------------------------
# what is done


def frozen(shape: Shape, gpu: GPU) -> Work:
    """`triton_frozen.frozen` with a teacher at temperature 1: `triton_sweep.visit` for one channel
    with a product, chunk by chunk, between the kernels for the rows."""
    N, V, D, name = shape
    dtype = getattr(torch, name)
    E = dtype.itemsize  # of h and W, and of e
    plan, kept = triton_launch(N, V, D, dtype, gpu.target, gpu.units), L2_KEPT * gpu.l2 * 1e6
    (BLOCK_N, BLOCK_V, BLOCK_D, *_), BLOCK = plan.sums, plan.product.BLOCK_D
    blocks, tiles, slices = up(N, BLOCK_N), up(V, BLOCK_V), up(D, BLOCK)
    room = min(max(1, plan.chunk // BLOCK_V), tiles)  # these four as in visit
    splits = min(plan.splits, room)
    group = up(splits, min(plan.product_splits, splits))
    parts = up(splits, group)
    again = up(blocks, gpu.units)  # row blocks that do not run at the same time read W again
    step, stages = plan.product.BLOCK_V, (plan.sums.num_stages, plan.product.num_stages)
    sums_pipe = pipe("sums", (BLOCK_N, BLOCK_V, BLOCK_D), E, stages[0])
    product_pipe = pipe("product", (BLOCK, BLOCK_N, step), E, stages[1])  # W^T p^T
    # prepare_kernel: a program per row reads h, h_t, m and its held-out rows of W, a piece after
    # the other. A row of W that many rows hold out comes from memory once.
    piece = min(256, 1 << (D - 1).bit_length())
    pieces, held, rows = up(D, piece), HELD * N * D * E, (2 * E + 4) * N * D
    costs = [
        Cost(
            "prepare",
            0,
            dram=min(held, V * D * E) + rows,
            l2=held + rows,
            waits=(2 + pieces) * waves_of(N, gpu),
        )
    ]
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
                "sums",
                flops=2 * logits * up(D, BLOCK_D) * BLOCK_D,
                dram=again * W + N * D * E + p + 4 * N * n,
                l2=blocks * W + n * N * D * E + p,
                busy=blocks * n / (gpu.units * waves * share),
                pipe=sums_pipe,
            )
        )
        # product_kernel: W again, unless the chunk's W and e are still in L2; e once per slice of
        # BLOCK_D, out of L2 for the slices that run at once; partial sums are written, and read
        # before that in all but the first chunk.
        most = min(group * share, n)
        waves = up(blocks * slices * up(n, group * share), gpu.units)
        partial = (2 if first else 1) * 4 * parts * N * D
        costs.append(
            Cost(
                "product",
                flops=2 * logits * slices * BLOCK,
                dram=partial
                + (0 if W + p <= kept else again * W + (1 if p <= kept else waves) * p),
                l2=partial + blocks * W + slices * p,
                busy=blocks * slices * n / (gpu.units * waves * most),
                pipe=product_pipe,
            )
        )
    # finish_kernel: a program per row and piece of D reads all splits' sums, the partial products,
    # m and the held-out rows of W again, and writes dh in fp32; torch scales it into h's dtype.
    rows = (4 * parts + 4 + 4 + 4 + E) * N * D
    costs.append(
        Cost(
            "finish",
            0,
            dram=min(held, V * D * E) + rows,
            l2=held + rows + 12 * splits * N * pieces,
            waits=(2 + parts) * waves_of(N * pieces, gpu),
        )
    )
    chunks = len(range(0, tiles, room))
    return Work(costs, FROZEN.launches + 2 * chunks, FROZEN.kernels, FROZEN.host)


def waves_of(programs: int, gpu: GPU) -> int:
    """Of a per-row kernel."""
    return up(programs, ROWS_AT_ONCE * gpu.units)


def pipe(kernel: str, tile: tuple[int, int, int], E: int, stages: int) -> Pipe:
    """The loop of a product of `tile` rows and columns, in steps of its third number."""
    rows, columns, depth = tile
    loaded = (rows + columns) * depth * E
    return Pipe(2 * rows * columns * depth, loaded, rows, stages, PIPELINED[kernel])


def trained(shape: Shape, gpu: GPU) -> Work:
    """`triton_general.forward`, and `backward` by h and W. The teacher's head is a frozen copy."""
    N, V, D, name = shape
    dtype = getattr(torch, name)
    E, kept = dtype.itemsize, L2_KEPT * gpu.l2 * 1e6
    plan = general_launch(N, V, D, dtype, gpu.target, gpu.units)
    (BLOCK_N, BLOCK_V, BLOCK_D, *_), BLOCK = plan.pair, plan.product.BLOCK_D
    OUTER_N, OUTER_V, OUTER_D, *_ = plan.outer
    blocks, tiles = up(N, BLOCK_N), up(V, BLOCK_V)
    slices, outer_slices = up(D, BLOCK), up(D, OUTER_D)
    room, again = min(max(1, plan.chunk // BLOCK_V), tiles, 65_535), up(blocks, gpu.units)
    splits, step = min(plan.product_splits, room), plan.product.BLOCK_V
    # two heads: the logits of student and teacher have a loop each
    pair_pipe = pipe("pair", (BLOCK_N, BLOCK_V, BLOCK_D), E, plan.pair.num_stages)
    stages = plan.product.num_stages, plan.outer.num_stages
    product_pipe = pipe("product", (BLOCK, BLOCK_N, step), E, stages[0])
    outer_pipe = pipe("outer", (OUTER_V, OUTER_D, OUTER_N), E, stages[1])
    # flops of z and t, whole tiles
    pairs = lambda n: 2 * 2 * blocks * BLOCK_N * n * BLOCK_V * up(D, BLOCK_D) * BLOCK_D
    # normalise_kernel: both heads once, which the row blocks of a split read side by side out of
    # L2; h and h_t once per tile.
    W, share = V * D * E, up(tiles, min(plan.splits, tiles))
    # prepare_kernel reads h and the label's row of W, and writes h.
    pieces, rows = up(D, min(512, 1 << (D - 1).bit_length())), 3 * N * D * E
    costs = [
        Cost("prepare", 0, dram=rows, l2=rows, waits=(2 + pieces) * waves_of(N, gpu)),
        Cost(
            "normalise",
            flops=pairs(tiles),
            dram=2 * again * W + 2 * N * D * E,
            l2=2 * blocks * W + 2 * tiles * N * D * E,
            busy=blocks * tiles / (gpu.units * up(blocks * up(tiles, share), gpu.units) * share),
            pipe=pair_pipe,
        ),
    ]
    for first in range(0, tiles, room):
        n = min(room, tiles - first)
        columns = min(n * BLOCK_V, V - first * BLOCK_V)
        W, p, share = columns * D * E, N * columns * E, up(n, splits)
        # coefficient_kernel: the same again, a program per tile; stores dx.
        costs.append(
            Cost(
                "coefficient",
                flops=pairs(n),
                dram=2 * again * W + 2 * N * D * E + p,
                l2=2 * blocks * W + 2 * n * N * D * E + p,
                busy=blocks * n / (gpu.units * up(blocks * n, gpu.units)),
                pipe=pair_pipe,
            )
        )
        # product_kernel: as in `frozen`, one split after the other.
        waves = up(blocks * slices * up(n, share), gpu.units)
        partial = (2 if first else 1) * 4 * splits * N * D
        costs.append(
            Cost(
                "product",
                flops=2 * blocks * BLOCK_N * n * BLOCK_V * slices * BLOCK,
                dram=partial
                + (0 if 2 * W + p <= kept else again * W + (1 if p <= kept else waves) * p),
                l2=partial + blocks * W + slices * p,
                busy=blocks * slices * n / (gpu.units * waves * share),
                pipe=product_pipe,
            )
        )
        # outer_kernel: dx once per slice of OUTER_D, out of memory if a chunk of it does not fit,
        # since all columns of one slice come before the next slice; h once per block of columns out
        # of L2; writes dW.
        wide = up(n * BLOCK_V, OUTER_V)
        waves = up(wide * outer_slices, gpu.units)
        costs.append(
            Cost(
                "outer",
                flops=2 * up(N, OUTER_N) * OUTER_N * wide * OUTER_V * outer_slices * OUTER_D,
                dram=(1 if p <= kept else min(waves, outer_slices)) * p + N * D * E + W,
                l2=outer_slices * p + wide * N * D * E + W,
                busy=wide * outer_slices / (gpu.units * waves),
                pipe=outer_pipe,
            )
        )
    # gather_kernel: dh from the partial products
    rows, waits = (4 * splits + E) * N * D, splits * waves_of(N * pieces, gpu)
    costs.append(Cost("gather", 0, dram=rows, l2=rows, waits=waits))
    chunks = len(range(0, tiles, room))
    return Work(costs, GENERAL.launches + 3 * chunks, GENERAL.kernels, GENERAL.host)


# --------------------------------------------------------------------------------------------------
# how long it takes


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


def two_products(shape: Shape, gpu: GPU) -> float:
    """Seconds of the vendor's two products one after the other: logits and their product with W."""
    N, V, D, dtype = shape
    E = getattr(torch, dtype).itemsize
    multiply = 2 * N * V * D / (vendor(gpu) * peak(gpu, dtype))
    move = (V * D + N * V + N * D) * E / (COPY * gpu.bandwidth * 1e9)
    return 2 * (max(multiply, move) + DEVICE_OPERATION)


def predict(shape: Shape, gpu: GPU, training: bool = False) -> dict[str, Any]:
    """ms of a call and of the GPU alone, what bounds it, and what is done for it. The host runs
    ahead of the GPU, so that the slower of the two counts.

    parts: [what bounds it, kernel, ms], the longest first
    """
    work = (trained if training else frozen)(shape, gpu)
    parts: dict[tuple[str, str], float] = {}
    for cost in work.costs:
        by, seconds = max(cost.seconds(gpu, peak(gpu, shape[3])).items(), key=lambda item: item[1])
        parts[by, cost.kernel] = parts.get((by, cost.kernel), 0.0) + 1e3 * seconds
    kernels = work.operations + work.launches
    parts["small kernels", ""] = 1e3 * kernels * DEVICE_OPERATION
    device = sum(parts.values())
    host = 1e3 * (work.host + work.launches * HOST_LAUNCH)
    bounds = sorted({by for by, _ in parts})
    taken = {by: sum(ms for (other, _), ms in parts.items() if other == by) for by in bounds}
    total = lambda key: sum(getattr(cost, key) for cost in work.costs)
    done = dict(flops=total("flops"), dram=total("dram"), l2=total("l2"), kernels=kernels)
    return dict(
        ms=max(device, host),
        by="host" if host > device else max(taken, key=taken.__getitem__),
        device_ms=device,
        host_ms=host,
        parts=[[*key, ms] for key, ms in sorted(parts.items(), key=lambda item: -item[1])],
        **done,
    )


ASSUMED = dict(
    vendor=VENDOR | {"others": USUALLY[0]},
    ours_of_vendor=OURS | {"others": USUALLY[1]},
    narrow=NARROW,
    pipelined=PIPELINED,
    latency_clocks=LATENCY,
    rows_at_once=ROWS_AT_ONCE,
    copy=COPY,
    l2_bytes_per_clock_and_unit=L2_RATE,
    l2_kept=L2_KEPT,
    frozen=FROZEN._asdict(),
    general=GENERAL._asdict(),
    host_launch_s=HOST_LAUNCH,
    device_operation_s=DEVICE_OPERATION,
)
