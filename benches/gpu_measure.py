"""The steps of the GPU campaign (gpu.py) that test and measure: the kernels' tests, our kernels
beside the floor, rivals, and the study of accuracy.

Of each part the first shapes are those that the goal is about (loss.GOAL), so that a campaign that
is cut short has them.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import loss
import torch
from packages import PYTEST, ROOT
from rivals import FLOOR, Contender, contenders
from rows import Row, append, plans_of, read

from fastsiu.kernels import measured

MINE = ("fastsiu triton", "fastsiu tiled", "fastsiu triton, CE alone")


def tests(output: Path, until: float, quick: bool) -> int:
    """The kernels' tests dealt to several processes, since most of their time is compilation; and
    the contenders' accuracy. Each process is told as it ends."""
    listed = subprocess.run(
        [*PYTEST, "--collect-only", "tests/triton"], cwd=ROOT, capture_output=True, text=True
    )
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if listed.returncode or not names:
        print(listed.stdout + listed.stderr)
        return listed.returncode or 1
    hands = processes(len(names))
    jobs = [[*PYTEST, *names[i::hands]] for i in range(hands)]
    jobs.append([*PYTEST, "benches/test_loss.py", "-k", "accuracy or memory or level"])
    return together(jobs, until)


def together(jobs: list[list[str]], until: float) -> int:
    """Runs commands side by side and prints the end of what each said when it ends. Returns the
    largest exit code, 124 where one had to be killed."""
    with tempfile.TemporaryDirectory() as work:
        running: dict[int, tuple[subprocess.Popen, Path]] = {}
        for i, job in enumerate(jobs):
            log = Path(work) / str(i)
            with log.open("w") as stream:
                one = subprocess.Popen(job, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
            running[i] = one, log
        codes = []
        while running:
            late = time.monotonic() > until
            for i, (one, log) in list(running.items()):
                if late and one.poll() is None:
                    one.kill()
                    one.wait()
                elif one.poll() is None:
                    continue
                code = 124 if late and one.returncode < 0 else abs(one.returncode)
                said = log.read_text(encoding="utf-8", errors="replace").rstrip()
                last = said.splitlines()[-1] if said else "It said nothing."
                print(f"exit code {code}: {said[-1500:]}" if code else last, flush=True)
                codes.append(code)
                del running[i]
            time.sleep(0.1)
    return max(codes)


def processes(jobs: int) -> int:
    """How many at once: each has a context on the GPU, half a GB."""
    return max(1, min(12, jobs, (os.cpu_count() or 1) - 2))


def ours(output: Path, until: float, quick: bool) -> int:
    """Our kernels beside the floor: where the goal is, with accuracy; then other shapes."""
    if quick:
        return rehearsed(("fastsiu tiled",), output, until)
    mine = named(FLOOR, *MINE)
    jobs = [(shape, mine, loss.LEVELS) for shape in loss.GOAL]
    jobs += [(shape, mine, ()) for shape in loss.PEERS if shape not in loss.GOAL]
    return visit(jobs, output, until)


def tuned(output: Path, until: float, quick: bool) -> int:
    """Our kernels again where the goal is, with the launch rows that tuning has found."""
    if quick:
        return rehearsed(("fastsiu tiled",), output, until)
    mine = named(FLOOR, *MINE)
    return visit([(shape, mine, loss.LEVELS) for shape in loss.GOAL], output, until)


def rivals(output: Path, until: float, quick: bool) -> int:
    """Everybody else beside the floor: where the goal is, those that compile one by one, since that
    takes most of a minute each; then other shapes."""
    if quick:
        return rehearsed(("eager",), output, until)
    theirs = [c for c in contenders() if c.name == FLOOR or not c.ours and c.terms != "GEMM"]
    quickly = [c for c in theirs if not c.compiles]
    first, *goal = loss.GOAL
    jobs = [(first, quickly, loss.LEVELS)]
    jobs += [(shape, quickly, ()) for shape in goal]
    jobs += [(first, [*named(FLOOR), c], loss.LEVELS) for c in theirs if c.compiles]
    jobs += [(shape, quickly, ()) for shape in loss.PEERS if shape not in loss.GOAL]
    return visit(jobs, output, until)


def study(output: Path, until: float, quick: bool) -> int:
    """Errors at every distance from the teacher; no times."""
    for shape in loss.STUDY:
        found = [c for c in contenders() if c.terms == "CE+KL" and not c.compiles]
        append(output, loss.study(shape, found, device="cuda"))
    return 0


def named(*names: str) -> list[Contender]:
    return [c for c in contenders() if c.name in names]


def rehearsed(names: tuple[str, ...], output: Path, until: float) -> int:
    """Small shapes on a CPU."""
    few = dict(device="cpu", seconds=0.2, rounds=3, with_memory=False)
    found = named(FLOOR, *names)
    near = loss.LEVELS[-1:]
    return visit([(shape, found, near) for shape in loss.QUICK], output, until, **few)


def visit(
    jobs: list[tuple[loss.Shape, list[Contender], tuple[float, ...]]],
    output: Path,
    until: float,
    device: str = "cuda",
    seconds: float = 0.5,
    rounds: int = 9,
    with_memory: bool = True,
) -> int:
    """Appends each shape's rows as soon as they are there. A shape that would not be done in time
    is named and left out. The kernels run with the launch rows that apply.py would
    make of what was tuned before."""
    measured.PLANS.update({} if device == "cpu" else plans_of(read(output)))
    longest = 0.0
    for shape, found, levels in jobs:
        began, tell = time.monotonic(), "N={}, V={}, D={}, {}".format(*shape)
        if began + 1.2 * longest > until:
            names = ", ".join(c.name for c in found)
            print(f"{tell}: left out for lack of time ({names})", flush=True)
            continue
        options = dict(
            device=device, seconds=seconds, rounds=rounds, levels=levels, with_memory=with_memory
        )
        try:
            rows: list[Row] = loss.bench(shape, found, **options)
        except torch.OutOfMemoryError as error:
            print(f"{tell}: left out, {loss.sentence(error)}", flush=True)
            torch.cuda.empty_cache()
            continue
        append(output, rows)
        longest = max(longest, time.monotonic() - began)
        print(f"{tell}: {time.monotonic() - began:.0f} s\n{loss.table(rows)}\n", flush=True)
    return 0
