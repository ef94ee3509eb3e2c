"""Time, memory and accuracy of the fused loss beside every rival that runs here (rivals.py), two
bare GEMMs being the floor.

    python benches/loss.py                       quick shapes, prints a table, appends nothing
    python benches/loss.py --full                the shapes, sweeps and accuracy study; appends to
    benches/results/loss.jsonl python benches/loss.py --full --parts shapes --shapes
    256,151936,896,bfloat16 --contenders fastsiu eager
    python benches/loss.py --table [--all]       the tables of the newest results
    python benches/loss.py --plots               draw benches/plots/loss_*.png from the newest
    results

time       forward and backward, all contenders interleaved round by round in one process after a
warm-up that pays for
           compilation; ratios are to the floor of the same run. On a GPU behind a full queue
           (clock.py) with a cold L2; `hot` without flushing it; `graph` replayed, where a graph can
           hold it; `host` is what Python takes until the last kernel is launched.
memory     peak above what was resident before the call, the gradient included. On a CPU the
kernel's high-water mark in a fresh
           process for each contender, so that no allocator's cache hides anything.
accuracy   gradient of hidden states (in their dtype) and value against the `reference` backend on
fp64 copies, of the KL alone
           and the CE alone, cosines in fp64; at most 64 rows, since rows are independent.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import importlib.metadata
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from clock import Clock, captured
from rivals import FLOOR, TWO_CALLS, Contender, Problem, Step, contenders

import fastsiu

RESULTS = Path(__file__).parent / "results" / "loss.jsonl"
PLOTS = Path(__file__).parent / "plots"
Shape = tuple[int, int, int, str]  # N, V, D, dtype
Rows = list[dict[str, Any]]
QUICK: list[Shape] = [(32, 8003, 128, "bfloat16"), (16, 5000, 96, "float32")]
FULL: list[Shape] = [
    (256, 151936, 896, "bfloat16"),
    (64, 151936, 896, "bfloat16"),
    (1024, 32000, 1024, "bfloat16"),
    (256, 32000, 2048, "float32"),
    (256, 262144, 1152, "bfloat16"),
    (1024, 128256, 1024, "float32"),
]
OVER_N: list[Shape] = [(N, 32000, 1024, "bfloat16") for N in (16, 64, 256, 1024, 4096)]
OVER_V: list[Shape] = [(256, V, 1024, "bfloat16") for V in (8000, 32000, 64000, 128000, 256000)]
# What rivals publish for GPUs, all N at one head before the next head; first of all where the goal
# on GPUs is.
PEERS: list[Shape] = [
    (N, V, D, "bfloat16")
    for V, D in ((151936, 2048), (151936, 1024), (128256, 4096), (262144, 1152), (32000, 2048))
    for N in (64, 256, 1024, 128, 512, 2048)
]
GOAL = PEERS[:3]
STUDY: list[Shape] = [(64, 32000, 1024, "bfloat16"), (64, 32000, 1024, "float32")]
LEVELS, FINE_LEVELS = (1e-1, 1e-2, 1e-3), (1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
ALPHA, BETA = 0.9, 0.75
PARTS = ["shapes", "sweeps", "accuracy"]

# --------------------------------------------------------------------------------------------------
# problems


def problem(
    shape: Shape,
    level: float = 1e-2,
    *,
    peaked: bool = True,
    mask: bool = False,
    device: str = "cpu",
    rows: int = 0,
    seed: int = 0,
    exact: bool = True,
) -> Problem:
    """A student at mean KL `level` from its teacher. Flat: logits of unit variance; peaked: the
    teacher's top P is near 0.95, and the labels are these tokens. exact=False does not search for
    the level (it costs fp64 GEMMs), for timing only."""
    N, V, D, dtype = shape
    N, dtype = min(N, rows) if rows else N, getattr(torch, dtype)
    head, random = head_of(V, D, dtype, device, seed), torch.Generator().manual_seed(seed + 1)
    normal = lambda *size: torch.randn(*size, generator=random)
    labels = torch.randint(0, V, (N,), generator=random).to(device)
    teacher = normal(N, D).to(device)
    if peaked:
        teacher += (math.log(V) + 3) * head[labels].float()
    else:
        labels = labels.roll(1)
    teacher, noise = teacher.to(dtype), normal(N, D).to(device)
    keep = None
    if mask:  # 37 scattered tokens and every row's label: what forgetting hides
        keep = torch.ones(V, dtype=torch.bool, device=device)
        keep[torch.randint(0, V, (37,), generator=random).to(device)] = False
        keep[labels[: max(1, N // 4)]] = False
    step = (2 * level) ** 0.5
    if exact:
        step = find(level, step, teacher, noise, head)
    return Problem((teacher.float() + step * noise).to(dtype), head, labels, teacher, keep)


@functools.lru_cache(maxsize=1)  # drawing it takes longer than the rest, and all levels share it
def head_of(V: int, D: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    return (torch.randn(V, D, generator=torch.Generator().manual_seed(seed)) / D**0.5).to(
        device, dtype
    )


def find(
    level: float, step: float, teacher: torch.Tensor, noise: torch.Tensor, head: torch.Tensor
) -> float:
    """The size of the perturbation whose mean KL is `level`, after rounding to the inputs' dtype;
    secants in log-log."""
    W = head.double()
    log_p = (teacher.double() @ W.T).log_softmax(-1)
    p = log_p.exp()

    def kl(step: float) -> float:
        moved = (teacher.float() + step * noise).to(teacher.dtype)
        return max(
            (p * (log_p - (moved.double() @ W.T).log_softmax(-1))).sum(-1).mean().item(), 1e-30
        )

    for _ in range(12):
        found = kl(step)
        if abs(math.log(found / level)) < 0.05:
            break
        step *= min(max((level / found) ** 0.5, 0.2), 5.0)
    return step


def run(step: Step, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient of hidden); what every contender is timed at. A floor's result is its own
    gradient."""
    h = hidden.detach().requires_grad_()
    loss = step(h)
    if not loss.requires_grad:
        return loss, loss
    loss.backward()
    return loss.detach(), h.grad


# --------------------------------------------------------------------------------------------------
# accuracy


def accuracy(
    found: list[Contender],
    shape: Shape,
    levels: tuple[float, ...],
    *,
    peaked: bool = True,
    mask: bool = False,
    device: str = "cpu",
    rows: int = 64,
) -> dict[str, Rows]:
    """For each contender: the errors of the KL at each level; once, those of the CE and of the sum
    that is timed."""
    results: dict[str, Rows] = {c.name: [] for c in found}
    torch.compiler.reset()  # Dynamo gives up, silently, after eight shapes of one function
    for level in levels:
        p = problem(shape, level, peaked=peaked, mask=mask, device=device, rows=rows)
        for term, alpha, beta in (("KL", 0.0, 1.0), ("CE", 1.0, 0.0), ("CE+KL", ALPHA, BETA))[
            : 3 if level == levels[0] else 1
        ]:
            truth = truth_of(p, alpha, beta)
            for c in found:
                if c.terms not in (term, "CE+KL") or c.why_missing(p):
                    continue
                row = dict(
                    term=term, teacher="peaked" if peaked else "flat", mask=mask, level=level
                )
                try:
                    results[c.name].append(
                        row | compare(*run(c.build(p, alpha, beta), p.hidden), *truth)
                    )
                except Exception as error:  # a rival that breaks is part of the result
                    results[c.name].append(row | dict(error=sentence(error)))
    return results


def truth_of(p: Problem, alpha: float, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    q = p.double()
    teacher = fastsiu.TeacherCache.from_hidden(q.teacher_hidden, q.head, vocab_keep=q.keep)
    loss = lambda h: fastsiu.fused_dmk_ce(
        h, q.head, q.labels, teacher, alpha=alpha, beta=beta, backend="reference"
    )
    return run(loss, q.hidden)


def compare(
    loss: torch.Tensor, gradient: torch.Tensor, truth: torch.Tensor, exact: torch.Tensor
) -> dict[str, float]:
    g, size = gradient.double(), exact.norm().clamp_min(1e-300)
    return {
        "truth": truth.item(),
        "value_error": (abs(loss.double() - truth) / abs(truth).clamp_min(1e-300)).item(),
        "grad_error": ((g - exact).norm() / size).item(),
        "cosine": ((g * exact).sum() / (g.norm() * size).clamp_min(1e-300)).item(),
    }


# --------------------------------------------------------------------------------------------------
# time, memory


def times(
    found: list[Contender], p: Problem, seconds: float, rounds: int
) -> dict[str, dict[str, Any]]:
    """Interleaved: every round visits every contender, in turning order. At least 3 rounds, fewer
    than `rounds` for the slow."""
    steps, plan, results = {}, {}, {}
    clock = Clock() if p.head.is_cuda else None
    torch.compiler.reset()
    for c in found:
        reason = c.why_missing(p)
        try:
            if not reason:
                steps[c.name] = c.build(p, ALPHA, BETA)
                run(steps[c.name], p.hidden)
                run(steps[c.name], p.hidden)
                plan[c.name] = max(3, min(rounds, int(seconds / timed(steps[c.name], p, clock)[0])))
        except Exception as error:  # as above
            reason = f"It fails: {sentence(error)}"
        results[c.name] = dict(missing=reason) if reason else dict(missing=None, ms=[])
    for number in range(max(plan.values(), default=0)):
        names = [n for n in plan if number < plan[n]]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cold, host, full = timed(steps[name], p, clock)
            results[name]["ms"].append(cold)
            if clock is not None:
                hot = clock.queued(lambda name=name: run(steps[name], p.hidden), hot=True)
                results[name].setdefault("ms_hot", []).append(hot.seconds)
                results[name].setdefault("ms_host", []).append(host)
                results[name]["full"] = full and hot.full and results[name].get("full", True)
    for c in found if clock is not None else []:
        if c.graphs and not results[c.name]["missing"]:  # last: a failed one may leave traces
            results[c.name] |= replayed(steps[c.name], p, clock, plan[c.name])
    for r in results.values():
        for key in [key for key, value in r.items() if isinstance(value, list)]:
            ms = [1e3 * s for s in r[key]]
            r[key] = dict(median=statistics.median(ms), min=min(ms), max=max(ms), rounds=len(ms))
    return results


def timed(step: Step, p: Problem, clock: Clock | None) -> tuple[float, float, bool]:
    """(seconds, of these or beside them the host's, whether a GPU's queue was full)"""
    if clock is not None:
        return clock.queued(lambda: run(step, p.hidden))
    start = time.perf_counter()
    run(step, p.hidden)
    return time.perf_counter() - start, 0.0, False


def replayed(step: Step, p: Problem, clock: Clock, rounds: int) -> dict[str, Any]:
    """{"ms_graph": seconds of each round} or {"graph_missing": why}"""
    try:
        replay = captured(lambda: run(step, p.hidden))
        return {"ms_graph": [clock.queued(replay).seconds for _ in range(rounds)]}
    except RuntimeError as error:
        return {"graph_missing": sentence(error)}


def memory(c: Contender, shape: Shape, device: str) -> dict[str, Any]:
    """{"mib": peak extra memory} or {"mib_missing": why}. Runs in a process of its own on a CPU."""
    if device != "cpu":
        return peak(c, problem(shape, device=device, exact=False))
    job = json.dumps([c.name, list(shape), torch.get_num_threads()])
    done = subprocess.run(
        [sys.executable, __file__, "--memory", job], capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines()
    return (
        json.loads(lines[-1])
        if done.returncode == 0 and lines
        else {"mib_missing": done.stderr.strip()[-300:]}
    )


def peak(c: Contender, p: Problem) -> dict[str, Any]:
    if reason := c.why_missing(p):
        return {"mib_missing": reason}
    first = lambda x: x[:8].clone()  # a small problem loads libraries and starts threads
    small = Problem(
        first(p.hidden),
        p.head[:600].clone(),
        first(p.labels) % min(600, len(p.head)),
        first(p.teacher_hidden),
    )
    if not p.head.is_cuda:
        run(c.build(small, ALPHA, BETA), small.hidden)
    step = c.build(p, ALPHA, BETA)
    if c.compiles:
        run(step, p.hidden)
    gc.collect()
    if p.head.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(step, p.hidden)
        return {"mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # the high-water mark starts again from the resident size
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        run(step, p.hidden)
        return {"mib": (resident("VmHWM") - before) / 2**10}
    except (OSError, AttributeError) as error:
        return {"mib_missing": f"This system has no high-water mark that can be reset ({error})."}


def resident(key: str) -> int:
    return next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key)
    )


# --------------------------------------------------------------------------------------------------
# rows


def bench(
    shape: Shape,
    found: list[Contender],
    *,
    device: str = "cpu",
    seconds: float = 6.0,
    rounds: int = 11,
    levels: tuple[float, ...] = LEVELS,
    with_memory: bool = True,
) -> Rows:
    """One row a contender: time, memory and errors at one shape, missing ones with their reason."""
    p = problem(shape, device=device, exact=False)
    timing = times(found, p, seconds, rounds)
    here = [c for c in found if not timing[c.name]["missing"]]
    errors = accuracy(here, shape, levels, device=device) if levels else {}
    floor = timing.get(FLOOR, {})
    rows = []
    for c in found:
        row = dict(
            kind="shape",
            **stamp(c, shape, device),
            **timing[c.name],
            teacher_mib=kept(c, p),
            accuracy=errors.get(c.name),
        )
        if not row["missing"]:
            row["x_floor"] = ratio(row, floor, "ms")
            if "ms_graph" in row:
                row["x_floor_graph"] = ratio(row, floor, "ms_graph")
            row |= memory(c, shape, device) if with_memory else {}
        rows.append(row)
    return rows


def ratio(row: dict[str, Any], floor: dict[str, Any], key: str) -> float | None:
    return row[key]["median"] / floor[key]["median"] if key in floor else None


def study(
    shape: Shape,
    found: list[Contender],
    levels: tuple[float, ...] = FINE_LEVELS,
    device: str = "cpu",
) -> Rows:
    """Rows with errors at every level, flat and peaked, with and without a vocabulary mask; no
    time."""
    errors: dict[str, Rows] = {c.name: [] for c in found}
    p = problem((1, 8, 8, shape[3]), device=device, exact=False)
    for peaked in (False, True):
        for mask in (False, True):
            for name, rows in accuracy(
                found, shape, levels, peaked=peaked, mask=mask, device=device
            ).items():
                errors[name] += rows
    return [
        dict(
            kind="study",
            **stamp(c, shape, device),
            missing=c.why_missing(p),
            accuracy=errors[c.name],
        )
        for c in found
    ]


def stamp(c: Contender, shape: Shape, device: str) -> dict[str, Any]:
    versions = {}
    for name in ("torch", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "gpu": device != "cpu",
        "threads": torch.get_num_threads(),
        **versions,
        "contender": c.name,
        "package": c.package,
        "version": c.version(),
        "terms": c.terms,
        "how": c.how,
        "keeps": c.keeps,
        "skips_dw": c.skips_dw,
        "fp32_logits": c.fp32_logits,
        "ours": c.ours,
        "N": shape[0],
        "V": shape[1],
        "D": shape[2],
        "dtype": shape[3],
    }


def kept(c: Contender, p: Problem) -> float:
    """MiB that the teacher costs between steps, the head aside."""
    (N, D), V, E = p.hidden.shape, len(p.head), p.head.element_size()
    statistics = N * (D * (4 + E) + 16 * 16 + 12)
    bytes_ = {
        "hidden": N * D * E,
        "statistics": statistics,
        "one [N, D]": 4 * N * D,
        "probabilities": N * V * E,
    }
    return bytes_.get(c.keeps, 0) / 2**20


def commit() -> str:
    """What git says of this tree; "unknown" in a copy without its history, or without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        return (
            f"{model}, {'AMX' if 'amx_bf16' in flags else torch.backends.cpu.get_cpu_capability()}"
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def sentence(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# --------------------------------------------------------------------------------------------------
# tables


def at(row: dict[str, Any], level: float, key: str, term: str = "KL") -> float | None:
    for a in row.get("accuracy") or []:
        if a["term"] == term and a["level"] == level and a["teacher"] == "peaked" and not a["mask"]:
            return a.get(key)
    return None


def milliseconds(value: float) -> str:
    """Three digits or more."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def table(rows: Rows) -> str:
    """Markdown for the rows of one shape: fastest first, missing ones last."""
    head = [
        "",
        "computes",
        "teacher kept",
        "time",
        "to floor",
        "memory",
        "gradient error, KL 0.1",
        "0.01",
        "0.001",
        "cosine",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    show = lambda x, form: "-" if x is None else format(x, form)
    graphs = any("ms_graph" in r for r in rows)
    if graphs:
        head[5:5] = ["graph", "to floor"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted((r for r in rows if not r["missing"]), key=lambda r: r["ms"]["median"]):
        name = f"**{row['contender']}**" if row["ours"] else row["contender"]
        name += "" if row["package"] in ("torch", "fastsiu") else f" {row['version']}"
        name += "" if row["skips_dw"] else " (forms dW too)"
        cells = [
            name,
            row["terms"] + (", two calls" if row["how"] == TWO_CALLS else ""),
            f"{row['teacher_mib']:.1f} MiB" if row["keeps"] != "-" else "-",
            f"{milliseconds(row['ms']['median'])} ms",
            show(row["x_floor"], ".2f"),
            f"{row['mib']:.0f} MiB" if row.get("mib") is not None else "-",
        ]
        if graphs:
            ms = f"{milliseconds(row['ms_graph']['median'])} ms" if "ms_graph" in row else "-"
            cells[5:5] = [ms, show(row.get("x_floor_graph"), ".2f")]
        cells += [show(at(row, level, "grad_error"), ".1e") for level in LEVELS] + [
            show(at(row, 1e-3, "cosine"), ".4f")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines + absent(rows))


def absent(rows: Rows) -> list[str]:
    """Who did not run, by reason."""
    reasons: dict[str, list[str]] = {}
    for r in rows:
        if r["missing"]:
            reasons.setdefault(r["missing"], []).append(r["contender"])
    return [f"\nNot run: {'; '.join(names)}. {reason}" for reason, names in reasons.items()]


def summary(groups: dict[Shape, Rows]) -> str:
    """Per shape the fastest of ours, and of the rivals that compute CE + KL: of any accuracy, and
    of equal accuracy, which is a gradient error at KL 0.001 of at most 1e-3 or twice ours,
    whichever is larger."""
    head = [
        "N, V, D",
        "dtype",
        "floor",
        "ours",
        "fastest rival of equal accuracy",
        "fastest rival",
        "its error",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    ms = lambda r: f"{r['ms']['median']:.{0 if r['ms']['median'] >= 20 else 2}f} ms"
    for (N, V, D, dtype), rows in groups.items():
        ran = sorted((r for r in rows if not r["missing"]), key=lambda r: r["ms"]["median"])
        full = [r for r in ran if r["terms"] == "CE+KL"]
        mine = [r for r in full if r["ours"]]
        others = [r for r in full if not r["ours"]]
        floor = next((r for r in ran if r["contender"] == FLOOR), None)
        if not mine or not others or not floor:
            continue
        bar = max(1e-3, 2 * (at(mine[0], 1e-3, "grad_error") or 0))
        errors = {r["contender"]: at(r, 1e-3, "grad_error") for r in others}
        equal = next(
            (
                r
                for r in others
                if errors[r["contender"]] is not None and errors[r["contender"]] <= bar
            ),
            None,
        )
        tell = lambda r: f"{r['contender']}, {ms(r)} ({r['x_floor']:.2f})" if r else "none"
        error = at(others[0], 1e-3, "grad_error")
        lines.append(
            f"| {N}, {V}, {D} | {dtype} | {ms(floor)} | {tell(mine[0])} | {tell(equal)} "
            f"| {tell(others[0])} | {'-' if error is None else format(error, '.1e')} |"
        )
    return "\n".join(lines)


def tables(device: str | None = None, whole: bool = False) -> str | None:
    """The table of the first shape, or of all of them, and the summary of all; None where there are
    no results."""
    groups = {s: rows for s, rows in newest("shape", device).items() if s in FULL + PEERS or whole}
    shown = list(groups) if whole else list(groups)[:1]
    found = [
        "N={}, V={}, D={}, {}\n\n".format(*shape) + table(groups[shape]) + "\n\n" for shape in shown
    ]
    return "".join(found) + summary(groups) if groups else None


def newest(kind: str, device: str | None = None) -> dict[Shape, Rows]:
    """The newest row of every contender at every shape, on the CPU of the newest row unless a
    device is named."""
    rows = (
        [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
        if RESULTS.is_file()
        else []
    )
    rows = [
        r
        for r in rows
        if r["kind"] == kind and (device in r["device"] if device else not r.get("gpu"))
    ]
    groups: dict[Shape, dict[str, dict[str, Any]]] = {}
    for r in rows:
        if r["device"] == rows[-1]["device"]:
            group = groups.setdefault((r["N"], r["V"], r["D"], r["dtype"]), {})
            old = group.get(r["contender"], {})
            # a sweep times only: it must not hide a row with errors, nor a time one with memory; a
            # floor's errors are []
            if r["accuracy"] is not None or not old:
                group[r["contender"]] = {
                    k: v for k, v in old.items() if k == "mib" and not r["missing"]
                } | r
    return {shape: list(found.values()) for shape, found in groups.items()}


# --------------------------------------------------------------------------------------------------
# plots

OURS, THEIRS, TEXT, GROUND = "#c2410c", "#6b7280", "#374151", "#ffffff"
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3))]


def plots(device: str | None = None) -> list[Path]:
    """Time and memory against V and N, errors against KL, time and error on one; what the results
    hold of these."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9ca3af",
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
        "axes.grid": True,
        "grid.color": "#e5e7eb",
        "figure.facecolor": GROUND,
        "axes.facecolor": GROUND,
        "savefig.dpi": 160,
        "savefig.bbox": "tight",
    }
    PLOTS.mkdir(exist_ok=True)
    shapes, studies, written = newest("shape", device), newest("study", device), []
    first = next((rows[0] for rows in [*shapes.values(), *studies.values()]), {})
    end = (
        re.sub(r"[^a-z0-9]+", "-", f"-{first['device']}".lower()).rstrip("-")
        if first.get("gpu")
        else ""
    )

    def save(figure: Any, name: str, where: str) -> None:
        figure.text(0.5, -0.01, where, ha="center", va="top", color="#6b7280", fontsize=8)
        written.append(PLOTS / f"{name}{end}.png")
        figure.savefig(written[-1])
        plt.close(figure)

    def where(row: dict[str, Any]) -> str:
        return (
            f"{row['device']}, {row['threads']} threads, torch {row['torch']}, "
            f"{row['date'][:10]}, {row['commit']}"
        )

    over_n, over_v = ([s for s in some if s in shapes] for some in (OVER_N, OVER_V))
    over_n = over_n or sorted(s for s in PEERS if s in shapes and s[1:3] == PEERS[0][1:3])
    sweeps = [(0, "N, tokens", over_n), (1, "V, vocabulary", over_v)]
    sweeps = [(index, label, found) for index, label, found in sweeps if len(found) > 1]
    if sweeps:
        figure, axes = plt.subplots(
            2, len(sweeps), figsize=(6.4 * len(sweeps), 8.4), squeeze=False, layout="constrained"
        )
        for column, (index, label, found) in enumerate(sweeps):
            for line, (key, title) in enumerate(
                (("ms", "time, ms"), ("mib", "peak extra memory, MiB"))
            ):
                curves: dict[str, tuple[bool, list[float], list[float]]] = {}
                for shape in found:
                    for r in shapes[shape]:
                        y = (
                            None
                            if r["missing"]
                            else r["ms"]["median"]
                            if key == "ms"
                            else r.get("mib")
                        )
                        if y and (
                            r["terms"] == "CE+KL" or (r["contender"] == FLOOR and key == "ms")
                        ):
                            curve = curves.setdefault(r["contender"], (r["ours"], [], []))
                            curve[1].append(shape[index])
                            curve[2].append(max(y, 0.1))
                lines(axes[line][column], curves, label, title)
        fixed = (
            "Left: V=32000, D=1024; right: N=256, D=1024; bfloat16. " if len(sweeps) == 2 else ""
        )
        fixed = fixed or ("V={}, D={}, {}. ".format(*over_n[0][1:]) if over_n else "")
        save(figure, "loss_scaling", fixed + where(shapes[sweeps[0][2][0]][0]))

    for shape, rows in studies.items():
        figure, axes = plt.subplots(
            1, 2, figsize=(12.8, 4.6), squeeze=False, layout="constrained", sharey=True
        )
        for axis, teacher in zip(axes[0], ("flat", "peaked"), strict=True):
            curves = {}
            for r in rows:
                kl = [
                    a
                    for a in r["accuracy"] or []
                    if a["term"] == "KL" and not a["mask"] and "grad_error" in a
                ]
                points = sorted(
                    (-a["truth"], max(a["grad_error"], 1e-8)) for a in kl if a["teacher"] == teacher
                )
                if points:
                    curves[r["contender"]] = (
                        r["ours"],
                        [-x for x, _ in points],
                        [y for _, y in points],
                    )
            lines(
                axis,
                curves,
                "KL to the teacher, nats",
                "relative error of the KL's gradient",
                reverse=True,
            )
            axis.set_title(f"{teacher} teacher", fontsize=9)
        N, V, D, dtype = shape
        save(figure, f"loss_accuracy_{dtype}", f"N={N}, V={V}, D={D}, {dtype}. " + where(rows[0]))

    main = next((s for s in (PEERS + FULL if end else FULL) if s in shapes), None)
    if main:
        figure, axis = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
        points = {
            r["contender"]: (r["ours"], r["x_floor"], at(r, 1e-3, "grad_error"))
            for r in shapes[main]
            if not r["missing"]
            and r["terms"] == "CE+KL"
            and at(r, 1e-3, "grad_error")
            and r["x_floor"]
        }
        scatter(axis, points)
        save(
            figure,
            "loss_tradeoff",
            f"N={main[0]}, V={main[1]}, D={main[2]}, {main[3]}. " + where(shapes[main][0]),
        )
    return written


def emphasis(name: str, ours: bool) -> dict[str, Any]:
    """How a name is written: ours stands out, the specification is not what anybody should use."""
    return dict(
        color=OURS if ours else TEXT,
        fontweight="bold" if ours and "reference" not in name else "normal",
    )


def lines(
    axis: Any,
    curves: dict[str, tuple[bool, list[float], list[float]]],
    x: str,
    y: str,
    reverse: bool = False,
) -> None:
    """Curves with their names at their right ends; curves that end at the same height share a
    label."""
    if not curves:
        axis.set_axis_off()
        return
    axis.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    if reverse:
        axis.invert_xaxis()
    else:
        values = sorted({x for _, xs, _ in curves.values() for x in xs})
        axis.set_xticks(values, [f"{v:g}" for v in values])
        axis.xaxis.minorticks_off()
    for number, (name, (ours, xs, ys)) in enumerate(sorted(curves.items(), key=lambda c: c[1][0])):
        style = (
            dict(color=OURS, zorder=3)
            if ours
            else dict(color=THEIRS, ls=DASHES[number % len(DASHES)])
        )
        axis.plot(
            xs,
            ys,
            marker="o",
            ms=3,
            lw=2.4 if emphasis(name, ours)["fontweight"] == "bold" else 1.1,
            **style,
        )
    low, high = (math.log10(v) for v in axis.get_ylim())
    labels: list[list[Any]] = []  # [height of the end, x, names, ours]
    for height, end, name, ours in sorted(
        (math.log10(ys[-1]), xs[-1], name, ours) for name, (ours, xs, ys) in curves.items()
    ):
        if (
            labels
            and not ours
            and not labels[-1][3]
            and height - labels[-1][0] < 0.012 * (high - low)
        ):
            labels[-1][2].append(name)
        else:
            labels.append([height, end, [name], ours])
    gap, places = 0.042 * (high - low), []
    for height, *_ in labels:
        places.append(max(height, places[-1] + gap) if places else height)
    for (height, end, names, ours), place in zip(labels, places, strict=True):
        spot = dict(xytext=(1.03, (place - low) / (high - low)), textcoords=axis.transAxes)
        axis.annotate(
            " / ".join(names),
            (end, 10**height),
            **spot,
            fontsize=7.5,
            va="center",
            annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color="#d1d5db", lw=0.6),
            **emphasis(names[0], ours),
        )


def scatter(axis: Any, points: dict[str, tuple[bool, float, float]]) -> None:
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="time, as a multiple of two bare GEMMs",
        ylabel="gradient error at KL 0.001",
    )
    for ours, x, y in points.values():
        axis.scatter([x], [y], color=OURS if ours else THEIRS, s=46 if ours else 22, zorder=3)
    axis.margins(x=0.3, y=0.15)
    axis.axvline(1, color="#9ca3af", lw=1, ls=":")
    axis.figure.canvas.draw()
    spots = {name: axis.transData.transform((x, y)) for name, (_, x, y) in points.items()}
    taken = [(u - 5, v - 5, u + 5, v + 5) for u, v in spots.values()]
    for name, (ours, x, y) in sorted(points.items(), key=lambda item: not item[1][0]):
        (u, v), width = spots[name], 6.2 * len(name)
        for lift in (0, 14, -14, 28, -28, 42, -42, 56, -56):
            box = (u + 6, v + lift - 6, u + 6 + width, v + lift + 6)
            if not any(
                box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken
            ):
                break
        taken.append(box)
        points_per_pixel = 72 / axis.figure.dpi
        axis.annotate(
            name,
            (x, y),
            xytext=(7, lift * points_per_pixel),
            textcoords="offset points",
            va="center",
            fontsize=8,
            **emphasis(name, ours),
        )
    ticks = [
        t
        for t in (0.25, 0.5, 1, 2, 3, 5, 10, 20, 50)
        if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]
    ]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()


# --------------------------------------------------------------------------------------------------
# command line


def everything(
    parts: list[str],
    shapes: list[Shape] | None,
    found: list[Contender],
    device: str,
    full: bool,
    with_memory: bool = True,
) -> Iterator[Rows]:
    """Rows, one shape after the other."""
    timing = dict(seconds=6.0, rounds=11) if full else dict(seconds=0.5, rounds=7)
    for shape in (shapes or (FULL if full else QUICK)) if "shapes" in parts else []:
        yield bench(shape, found, device=device, with_memory=with_memory, **timing)
    for shape in dict.fromkeys(OVER_N + OVER_V) if "sweeps" in parts else []:
        chosen = [c for c in found if c.terms == "CE+KL" or c.name == FLOOR]
        yield bench(
            shape, chosen, device=device, seconds=3.0, rounds=7, levels=(), with_memory=with_memory
        )
    for shape in STUDY if "accuracy" in parts else []:
        yield study(shape, [c for c in found if c.terms == "CE+KL"], device=device)


def append(rows: Rows) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def parse_shape(text: str) -> Shape:
    N, V, D, dtype = text.split(",")
    return int(N), int(V), int(D), dtype


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all with --full, else shapes")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        metavar="N,V,D,DTYPE",
        help="instead of the mode's own",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="PREFIX",
        help="only names that start so; the floor always",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="torch's own choice by default")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--dry", action="store_true", help="append nothing")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--all", action="store_true", help="with --table: the table of every shape")
    parser.add_argument("--plots", action="store_true")
    parser.add_argument(
        "--of",
        metavar="DEVICE",
        help="with --table and --plots: a device whose name holds this, else the CPU",
    )
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        name, shape, threads = json.loads(options.memory)
        torch.set_num_threads(threads)
        print(
            json.dumps(
                peak(
                    next(c for c in contenders() if c.name == name),
                    problem(tuple(shape), exact=False),
                )
            )
        )
        return
    if options.table or options.plots:
        text = tables(options.of, options.all)
        if text is None:
            parser.error("there are no results yet: run with --full first")
        if options.table:
            print(text)
        for path in plots(options.of) if options.plots else []:
            print(path)
        return
    torch.set_num_threads(options.threads) if options.threads else None
    starts = tuple(options.contenders or [""])
    found = [c for c in contenders() if c.name == FLOOR or c.name.startswith(starts)]
    parts = options.parts or (PARTS if options.full else PARTS[:1])
    for rows in everything(
        parts, options.shapes, found, options.device, options.full, not options.no_memory
    ):
        if options.full and not options.dry:
            append(rows)
        first = rows[0]
        print(
            f"{first['kind']} N={first['N']}, V={first['V']}, D={first['D']}, {first['dtype']}, "
            f"{first['device']}, "
            f"{first['threads']} threads",
            flush=True,
        )
        print((table(rows) if first["kind"] == "shape" else study_table(rows)) + "\n", flush=True)


def study_table(rows: Rows) -> str:
    """The gradient errors of one study, a line for each contender, teacher and mask."""
    levels = list(dict.fromkeys(a["level"] for r in rows for a in r["accuracy"]))
    lines = [
        "| gradient error at KL | teacher | mask | " + " | ".join(f"{x:g}" for x in levels) + " |"
    ]
    lines.append("|" + "---|" * (len(levels) + 3))
    for r in rows:
        for teacher in ("flat", "peaked"):
            for mask in (False, True):
                points = {
                    a["level"]: a
                    for a in r["accuracy"]
                    if (a["term"], a["teacher"], a["mask"]) == ("KL", teacher, mask)
                }
                cells = [
                    f"{points[x]['grad_error']:.1e}"
                    if x in points and "grad_error" in points[x]
                    else "-"
                    for x in levels
                ]
                if points:
                    lines.append(
                        f"| {r['contender']} | {teacher} | {'yes' if mask else 'no'} | "
                        + " | ".join(cells)
                        + " |"
                    )
    return "\n".join(lines + absent(rows))


if __name__ == "__main__":
    main()
