"""The tuning of the GPU campaign (gpu.py): which launch parameters are fastest, of those that
Triton compiles and that give the same result.

Each candidate has its row as soon as it was timed or refused, and each N a row `tune` whenever
something faster was found: a campaign that is killed keeps the fastest so far. All N go through one
stage before the next one begins.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import loss
import torch
from clock import Clock
from gpu_measure import processes
from rows import INTERPRETER, Row, append

from fastsiu.kernels.inputs import Head
from fastsiu.kernels.tiled import Sums
from fastsiu.kernels.triton_launch import (
    CHUNK,
    SHARED_LIMIT,
    UNITS,
    WAVES,
    plan_of,
    rows,
    target_of,
)

TUNED = dict(V=151936, D=(2048, 1024), N=(64, 256, 1024, 16))
TUNED_QUICK = dict(V=600, D=(64,), N=(20,))
CHUNKS, WAVES_TRIED = [2**i for i in range(24, 29)], (1, 2, 3, 4)
# relative difference of two candidates' products: probabilities are rounded to 11 bits, in another
# order
AGREE = 2e-3
# of the time that is left, for compiling: measuring and the later stages take time, too
COMPILING = 0.4


class Candidate(NamedTuple):
    """A launch row: blocks of the sums and of the product, programs per multiprocessor, bytes of a
    chunk's probabilities."""

    sums: Any
    product: Any
    waves: int
    chunk: int


def tune(output: Path, until: float, quick: bool) -> int:
    """For each N a row: the fastest sums beside the predicted product, the fastest product beside
    these, then waves and chunk. Fastest in the geometric mean over D, CE + KL with the gradient."""
    shapes, dtype = TUNED_QUICK if quick else TUNED, torch.bfloat16
    target = target_of(torch.device("cpu" if quick else "cuda"))
    pairs = list(zip(*rows(target, dtype), strict=True))
    stamp = dict(
        device=INTERPRETER if quick else loss.device_name("cuda"),
        commit=loss.commit(),
        target=target,
        dtype=str(dtype).removeprefix("torch."),
        V=shapes["V"],
        D=shapes["D"],
    )

    def emit(row: Row) -> None:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        append(output, [dict(kind=row["kind"], kernel="sweep", date=date, **stamp) | row])

    clock = None if quick else Clock()
    trials = {N: Trial(N, shapes["V"], shapes["D"], dtype, clock, emit) for N in shapes["N"]}
    for N, trial in trials.items():
        at = next((i for i, (sums, _) in enumerate(pairs) if sums.BLOCK_N >= N), len(pairs) - 1)
        trial.start(Candidate(*pairs[at], WAVES, CHUNK), pairs[max(0, at - 1) : at])
    for stage in (sums_like, product_like, launch_like):
        asked = {N: trial.asked(stage, target) for N, trial in trials.items()}
        asked = {N: some[:1] for N, some in asked.items()} if quick else asked
        everything = [c for some in asked.values() for c in some]
        broken = {} if quick or stage is launch_like else compiled(everything, until)
        for N, trial in trials.items():
            trial.measure(asked[N], broken, until)
    for N, trial in trials.items():
        predicted = trial.ms[trial.predicted]
        print(
            f"N={N}: {trial.best}, {trial.ms[trial.best]} ms; predicted row {predicted} ms; "
            f"{len(trial.ms)} candidates timed",
            flush=True,
        )
    return 0


class Trial:
    """One N at every D: the problems, the predicted row's results, the ms of every candidate that
    was timed, and the fastest so far. Rows go to `emit` as they come.

    clock: None in the interpreter, whose times mean nothing
    """

    def __init__(
        self,
        N: int,
        V: int,
        Ds: tuple[int, ...],
        dtype: torch.dtype,
        clock: Clock | None,
        emit: Callable[[Row], None],
    ) -> None:
        self.N, self.clock, self.emit = N, clock, emit
        self.problems = [problem(N, V, D, dtype, clock is None) for D in Ds]
        self.ms: dict[Candidate, list[float]] = {}

    def start(self, predicted: Candidate, others: list[tuple]) -> None:
        """Measures the predicted row, whose results the others have to give; an error here is an
        error of the whole."""
        self.best = self.predicted = predicted
        self.others = others
        self.want = [results(p, predicted) for p in self.problems]
        self.time(predicted)

    def asked(self, stage: Callable, target: str) -> list[Candidate]:
        """A stage's candidates that were not timed yet: the sums from the next narrower row as
        well, the others from the best so far."""
        narrower = [self.best._replace(sums=s, product=p) for s, p in self.others]
        bases = [self.best, *(narrower if stage is sums_like else [])]
        made = [c for base in bases for c in stage(base, target)]
        return [c for c in dict.fromkeys(made) if c not in self.ms]

    def measure(self, asked: list[Candidate], broken: dict[Candidate, str], until: float) -> None:
        for c in asked:
            error = broken.get(c)
            if error is None:
                error = "no time left" if time.monotonic() > until else self.attempt(c)
            if error:
                self.emit(dict(kind="candidate", N=self.N, **c._asdict(), error=error))

    def attempt(self, c: Candidate) -> str | None:
        """Times it at every D and returns None, or says why it is out."""
        try:
            for p, want in zip(self.problems, self.want, strict=True):
                if reason := differs(results(p, c), want):
                    return reason
            self.time(c)
        except refusals() as error:
            return refusal(error)
        return None

    def time(self, c: Candidate) -> None:
        """Times a candidate and writes it down; where none was faster, as the best."""
        ms = [self.median(p, c) for p in self.problems]
        self.ms[c] = ms
        row = dict(N=self.N, **c._asdict(), ms=ms)
        self.emit(dict(kind="candidate", **row))
        if math.prod(ms) <= math.prod(self.ms[self.best]):
            self.best = c
            self.emit(dict(kind="tune", **row, predicted_ms=self.ms[self.predicted]))

    def median(self, p: tuple, c: Candidate) -> float:
        many = range(1 if self.clock is None else 5)
        return round(statistics.median(milliseconds(p, c, self.clock) for _ in many), 5)


def refusals() -> tuple[type[Exception], ...]:
    """What Triton raises for blocks that it cannot compile or launch."""
    from triton.errors import TritonError

    return TritonError, RuntimeError


def refusal(error: Exception) -> str:
    """Why a candidate is out, in a line; raises what is not the candidate's fault, such as a fault
    of the GPU."""
    from triton.errors import TritonError

    if not isinstance(error, TritonError) and "PassManager" not in str(error):
        raise error
    return " ".join(f"{type(error).__name__}: {error}".split())[-300:]


def problem(N: int, V: int, D: int, dtype: Any, quick: bool) -> tuple:
    """(h, head, held, valid, reference): 17 held-out columns, the largest logits, as next to a
    teacher."""
    device = "cpu" if quick else "cuda"
    random = torch.Generator(device).manual_seed(N + D)
    h = torch.randn(N, D, generator=random, device=device).to(dtype)
    W = (torch.randn(V, D, generator=random, device=device) / D**0.5).to(dtype)
    top, held = (h @ W.T).topk(17)
    return (
        h,
        Head(W, None, 1.0, None),
        held,
        torch.ones_like(held, dtype=torch.bool),
        top.amax(1).double(),
    )


def sweep(p: tuple, c: Candidate) -> Any:
    """The Sums of CE + KL at temperature 1 with the gradient, by this candidate."""
    from fastsiu.kernels import triton_sweep

    h, head, held, valid, reference = p
    (N, D), V = h.shape, len(head.weight)
    units = (
        torch.cuda.get_device_properties(h.device).multi_processor_count
        if h.is_cuda
        else UNITS.get(INTERPRETER, 2)
    )
    plan = plan_of(*c, N, V, D, h.dtype, units, "tuning")
    one = Sums(reference, 1.0, torch.float32, D)
    triton_sweep.sweep(h, head, held, valid, None, [one], None, plan.chunk, plan=plan)
    return one


def results(p: tuple, c: Candidate) -> tuple:
    """(logsumexp [N], softmax times W [N, D])"""
    one = sweep(p, c)
    lse = one.log_total()
    return lse, one.product * one.share(lse)[:, None]


def differs(got: tuple, want: tuple) -> str | None:
    lse = (got[0] - want[0]).abs().max().item()
    product = ((got[1] - want[1]).norm() / want[1].norm()).item()
    if lse <= AGREE / 10 and product <= AGREE:
        return None
    return f"differs from the predicted row: logsumexp by {lse:.1e}, product by {product:.1e}"


def milliseconds(p: tuple, c: Candidate, clock: Clock | None) -> float:
    """One sweep: on a GPU behind a full queue and with a cold L2."""
    if clock is not None:
        return 1e3 * clock.queued(lambda: sweep(p, c)).seconds
    began = time.perf_counter()
    sweep(p, c)
    return 1e3 * (time.perf_counter() - began)


def compiled(candidates: list[Candidate], until: float) -> dict[Candidate, str]:
    """Compiles them into Triton's cache on disk, in several processes. Returns those that could not
    be, with why; a compilation that has no time left is ended."""
    broken: dict[Candidate, str] = {}
    if not candidates:
        return broken
    end = time.monotonic() + COMPILING * max(0.0, until - time.monotonic())
    with multiprocessing.get_context("spawn").Pool(processes(len(candidates))) as pool:
        made = {c: pool.apply_async(compiles, (c,)) for c in dict.fromkeys(candidates)}
        for c, one in made.items():
            try:
                reason = one.get(max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                reason = "not compiled in time, or its compiler died"
            if reason:
                broken[c] = reason
    return broken  # leaving the pool ended what was still running


def compiles(c: Candidate) -> str | None:
    try:
        sweep(problem(c.sums.BLOCK_N, 4096, 1024, torch.bfloat16, False), c)
        torch.cuda.synchronize()
    except refusals() as error:
        return refusal(error)
    return None


def sums_like(c: Candidate, target: str) -> list[Candidate]:
    near = around(
        c.sums,
        lambda b: b.BLOCK_N * b.BLOCK_V,
        lambda b: (b.BLOCK_N + b.BLOCK_V) * b.BLOCK_D,
        target,
    )
    return [c._replace(sums=b) for b in near if b.BLOCK_V % c.product.BLOCK_V == 0]


def product_like(c: Candidate, target: str) -> list[Candidate]:
    near = around(
        c.product,
        lambda b: b.BLOCK_N * b.BLOCK_D,
        lambda b: (b.BLOCK_N + b.BLOCK_D) * b.BLOCK_V,
        target,
    )
    return [c._replace(product=b) for b in near if c.sums.BLOCK_V % b.BLOCK_V == 0]


def launch_like(c: Candidate, target: str) -> list[Candidate]:
    return [c._replace(waves=waves, chunk=chunk) for waves in WAVES_TRIED for chunk in CHUNKS]


def around(blocks: Any, outputs: Callable, inputs: Callable, target: str) -> list[Any]:
    """Blocks that differ in one field, then those that differ in two, within shared memory and 128
    registers of accumulator."""
    moves = [
        (f, v)
        for f in ("BLOCK_V", "BLOCK_D")
        for v in (getattr(blocks, f) // 2, getattr(blocks, f) * 2)
    ]
    moves += [
        ("num_warps", 12 - blocks.num_warps),
        ("num_stages", blocks.num_stages - 1),
        ("num_stages", blocks.num_stages + 1),
    ]
    made = [blocks, *(blocks._replace(**{f: v}) for f, v in moves)]
    made += [
        blocks._replace(**{f: v, g: w})
        for (f, v), (g, w) in itertools.combinations(moves, 2)
        if f != g
    ]
    limit = SHARED_LIMIT.get(target, math.inf)

    def fits(b: Any) -> bool:
        sane = 32 <= b.BLOCK_V <= 256 and 32 <= b.BLOCK_D <= 256 and 2 <= b.num_stages <= 5
        return (
            sane and outputs(b) <= 128 * 32 * b.num_warps and 2 * b.num_stages * inputs(b) <= limit
        )

    return [
        b
        for b in dict.fromkeys(made)
        if fits(b) or target == INTERPRETER and b.num_stages == 1 and b.num_warps == 1
    ]
