"""Times on a GPU without the host's: behind a full queue, and of a replayed graph.

A GPU that waits for Python measures Python. `Clock.queued` launches the work behind fills of a
large buffer that take longer than launching it, so that the GPU finds every kernel waiting; the
fills also leave the L2 cold. `captured` makes a graph of the work, whose replay is one launch. The
host's own time is returned, too: without a graph and with an empty queue a caller pays it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

FILL = 2**28  # bytes: five times the largest L2
MOST = 400  # fills before one piece of work: some 25 ms on an H200
AHEAD = 2.0  # times the host's time: it varies


class Time(NamedTuple):
    """seconds: of the GPU; host: of Python until the last kernel was launched; full: whether all
    was launched before the GPU began with the work."""

    seconds: float
    host: float
    full: bool


class Clock:
    """Measures work on the current CUDA device."""

    def __init__(self) -> None:
        self.buffer = torch.empty(FILL, dtype=torch.uint8, device="cuda")
        self.fill()
        self.fill_seconds = self.between(lambda: [self.fill() for _ in range(8)]) / 8

    def fill(self) -> None:
        self.buffer.zero_()

    def between(self, work: Callable[[], object]) -> float:
        """Seconds from an idle GPU, the host's included."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3

    def launching(self, work: Callable[[], object]) -> float:
        """Seconds that the host needs until the work is launched."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        host = time.perf_counter() - began
        torch.cuda.synchronize()
        return host

    def queued(self, work: Callable[[], object], hot: bool = False) -> Time:
        """The time of work behind a full queue. hot: the same work ran just before it, else the L2
        holds nothing of it."""
        host = self.launching(work)
        wait = AHEAD * host * (2 if hot else 1)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(min(MOST, 1 + math.ceil(wait / self.fill_seconds))):
            self.fill()
        if hot:
            work()
        first.record()
        work()
        last.record()
        full = not first.query()  # the GPU is still busy with what lies before
        torch.cuda.synchronize()
        return Time(first.elapsed_time(last) / 1e3, host, full)


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """The work as a graph: the result replays it. Raises what CUDA says where the work asks the GPU
    for a number or copies from memory that is not pinned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what allocates or compiles at first
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
