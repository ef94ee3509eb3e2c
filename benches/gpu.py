"""Tests, tunes and measures on this machine's GPU, into one results file.

    benches/gpu.sh [--output FILE]    every step within nine minutes, no network needed
    benches/gpu.sh --only real        some of the steps, here LLaVA-1.5-7B at its real size, which
                                      wants most of the time
    benches/gpu.sh --quick            rehearses the steps on a CPU, the kernels in Triton's
                                      interpreter, and benches/apply.py on a copy
    python benches/apply.py FILE      makes launch rows, plots and tables of the results

FILE has JSON lines of these kinds: `run`, first, is the machine; `step` has a step's exit code
(null: it did not run, and `tail` says why), its seconds and the end of what it printed; `tune` has
a launch row, its ms at each D and every candidate with its ms or its error; `shape` and `study` are
rows of benches/loss.py, `made`, `real` and `real step` of benches/real.py. A step that fails or
runs out of time has its row, and the next one runs. Exit codes: 0 all went well, 1 a step failed,
2 bad input.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from apply import INTERPRETER, Row, append, copy, plans_of, read, slug

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 515.0  # seconds for all steps together
LEAST = 10.0  # a step with less time than this is left out
TUNED = dict(V=151936, D=(1024, 2048), N=(16, 64, 256, 1024))
TUNED_QUICK = dict(V=600, D=(64,), N=(20,))
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# the loss through every kernel, at one small shape
SMALL = [
    "tests/triton/test_backend.py",
    "-k",
    "computes or graph",
]
CHUNKS, WAVES = [2**i for i in range(24, 29)], (1, 2, 3, 4)
# relative difference of two candidates' products: probabilities are rounded to 11 bits, in another
# order
AGREE = 2e-3
SOON = (
    "SOON"  # in a command: the seconds after which a part begins nothing more, SHARE of its limit
)
SHARE = 0.85


class Step(NamedTuple):
    name: str
    command: list[str]
    seconds: float
    env: dict[str, str] = {}
    optional: bool = False  # without time for it, nothing has failed
    absent: str | None = None  # why it cannot run here, which is no failure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="new; else benches/results/gpu-DEVICE-DATE.jsonl",
    )
    parser.add_argument("--quick", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps instead of all")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of the step real; else all that time allows",
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part == "real":
        return real(given.output, time.monotonic() + given.seconds, given.quick, given.variants)
    if given.part:
        return PARTS[given.part](given.output, time.monotonic() + given.seconds, given.quick)
    if importlib.util.find_spec("triton") is None and given.only != ["real"]:
        return stop(
            "There is no package triton here, whose kernels are to be measured: pip install "
            "'fastsiu[triton]'."
        )
    return measure(given.output, given.quick, given.only, given.variants)


def stop(sentence: str) -> int:
    print(f"gpu.py: {sentence}", file=sys.stderr)
    return 2


# --------------------------------------------------------------------------------------------------
# the steps


def measure(
    output: Path | None, quick: bool, only: list[str] | None = None, variants: Iterable[str] = ()
) -> int:
    """Runs all steps, one after the other; the later ones get what time the earlier ones left."""
    began = time.monotonic()
    import loss
    import torch

    if not quick and not torch.cuda.is_available():
        return stop(
            "There is no GPU here: run this on a machine with one, or rehearse it with --quick."
        )
    machine = machine_of(quick) if quick else apart(machine_of, quick)
    with tempfile.TemporaryDirectory() as work:
        if output is None:
            name = f"gpu-{slug(machine['device'])}-{datetime.now(UTC):%Y-%m-%dT%H%M}.jsonl"
            output = (Path(work) if quick else loss.RESULTS.parent) / name
        if output.exists():
            return stop(f"{output} exists: remove it or give another name with --output.")
        output = output.resolve()
        todo = steps(output, Path(work), quick, variants)
        if strange := sorted(set(only or ()) - {step.name for step in todo}):
            return stop(
                f"There is no step {strange[0]!r}: choose from "
                f"{', '.join(step.name for step in todo)}."
            )
        todo = [step for step in todo if not only or step.name in (*only, "apply")]
        if not {"bench", "peers"} & {step.name for step in todo}:
            machine["shapes"] = []
        output.parent.mkdir(parents=True, exist_ok=True)
        append(output, [machine])
        # so that `finally` ends the step in progress
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        failed = []
        for step in todo:
            row = run(step, min(step.seconds, BUDGET - (time.monotonic() - began)))
            append(output, [row])
            failed += [step.name] if row["failed"] else []
            state = "left out" if row["rc"] is None else "failed" if row["failed"] else "ok"
            print(f"{step.name}: {state}, {row['seconds']:.0f} s", flush=True)
            if state != "ok":
                print(textwrap.indent(row["tail"][-1500:].rstrip(), "    "), flush=True)
        where = output.relative_to(work) if output.is_relative_to(Path(work).resolve()) else output
        print(
            f"{where}: {time.monotonic() - began:.0f} s, "
            + (f"failed: {', '.join(failed)}" if failed else "nothing failed")
        )
    return int(bool(failed))


def apart(function: Callable, *given: Any) -> Any:
    """Its result from a process of its own: this one keeps no context on the GPU, whose memory
    would count as others'."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def machine_of(quick: bool) -> Row:
    import loss
    import torch

    from fastsiu.kernels.triton_launch import target_of

    names = dict(device=INTERPRETER, target=INTERPRETER, units=None)
    if not quick:
        units = torch.cuda.get_device_properties(0).multi_processor_count
        names = dict(
            device=loss.device_name("cuda"), target=target_of(torch.device("cuda")), units=units
        )
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    shapes = loss.QUICK if quick else loss.PEERS
    versions = dict(torch=torch.__version__, triton=triton, commit=loss.commit())
    return dict(
        kind="run",
        quick=quick,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        **names,
        **versions,
        shapes=shapes,
    )


def steps(output: Path, work: Path, quick: bool, variants: Iterable[str] = ()) -> list[Step]:
    mode, interpreted = (["--quick"], {"TRITON_INTERPRET": "1"}) if quick else ([], {})

    def part(name: str, seconds: float, **more: Any) -> Step:
        command = [
            sys.executable,
            __file__,
            "--part",
            name,
            "--output",
            str(output),
            "--seconds",
            SOON,
            *mode,
        ]
        return Step(name, command, seconds, **more)

    # its model goes with `work`
    whole_run = part("real", 90 if quick else 500, env={"TMPDIR": str(work)}, optional=not quick)
    whole_run.command.extend(["--variants", *variants] if variants else [])
    if quick:
        editor, into = Path(__file__).with_name("apply.py"), copy(work / "copy")
        again = [sys.executable, str(editor), str(output), "--into", str(into)]
        plots = [] if importlib.util.find_spec("matplotlib") else ["--no-plots"]
        return [
            Step("tests", [*PYTEST, *SMALL], 60, interpreted),
            part("tune", 40, env=interpreted),
            sanitizer("memcheck", 60, False, "A rehearsal has no GPU to check."),
            part("bench", 40),
            whole_run,
            Step("apply", again + plots, 40),
        ]
    return [
        part("tests", 180),
        part("tune", 150),
        sanitizer("memcheck", 60, False),
        part("bench", 60),
        part("compilers", 90),
        part("peers", 150),
        part("study", 60),
        sanitizer("racecheck", 60, True),
        whole_run,
    ]


def sanitizer(tool: str, seconds: float, optional: bool, absent: str | None = None) -> Step:
    """The loss through the kernels on small shapes. Without torch's caching every tensor is an
    allocation with bounds."""
    places = ("/usr/local/cuda/bin", "/opt/cuda/bin")
    found = shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places])
    )
    if not found and not absent:
        absent = (
            f"compute-sanitizer is neither on PATH nor in {' or '.join(places)}: it has "
            "checked nothing."
        )
    command = [str(found), "--tool", tool, "--error-exitcode", "9", *PYTEST, *SMALL]
    return Step(
        f"compute-sanitizer {tool}",
        command,
        seconds,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        optional,
        absent,
    )


def run(step: Step, seconds: float) -> Row:
    """A step's row. `seconds` is its limit, after which its whole process group is killed."""
    row = dict(
        kind="step",
        name=step.name,
        command=shlex.join(step.command),
        rc=None,
        failed=False,
        seconds=0.0,
        tail="",
    )
    if step.absent:
        return row | dict(tail=step.absent)
    if seconds < min(LEAST, step.seconds):
        return row | dict(
            failed=not step.optional, tail=f"No time is left for it: the budget is {BUDGET:.0f} s."
        )
    began = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | step.env
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    command = [str(round(SHARE * seconds, 1)) if word == SOON else word for word in step.command]
    group = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    try:
        said, _ = group.communicate(timeout=seconds)
        rc = group.returncode
    except subprocess.TimeoutExpired:
        os.killpg(group.pid, signal.SIGKILL)
        said, rc = group.communicate()[0] + f"\nKilled after {seconds:.0f} s.", 124
    finally:
        if group.poll() is None:
            os.killpg(group.pid, signal.SIGKILL)
    return row | dict(
        rc=rc, failed=rc != 0, seconds=round(time.monotonic() - began, 1), tail=said[-6000:]
    )


# --------------------------------------------------------------------------------------------------
# tests and benches


def tests(output: Path, until: float, quick: bool) -> int:
    """The kernels' tests dealt to several processes, since most of their time is compilation; and
    the contenders' accuracy."""
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
    with tempfile.TemporaryDirectory() as work:
        logs = [Path(work) / str(i) for i in range(len(jobs))]
        running = []
        for job, log in zip(jobs, logs, strict=True):
            with log.open("w") as stream:
                running.append(
                    subprocess.Popen(job, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
                )
        codes = [ended(one, until) for one in running]
        # failures last, where the tail keeps them
        for code, log in sorted(zip(codes, logs, strict=True)):
            said = log.read_text(encoding="utf-8", errors="replace").rstrip()
            print(f"exit code {code}: {said[-1500:]}" if code else said.splitlines()[-1])
    return max(map(abs, codes))


def processes(jobs: int) -> int:
    """How many at once: each has a context on the GPU, half a GB."""
    return max(1, min(12, jobs, (os.cpu_count() or 1) - 2))


def ended(one: subprocess.Popen, until: float) -> int:
    """Its exit code, 124 if it had to be killed."""
    try:
        return one.wait(timeout=max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        one.kill()
        one.wait()
        return 124


def bench(output: Path, until: float, quick: bool) -> int:
    """The first shape, with accuracy, for all contenders that do not compile; a rehearsal's shapes
    with three of them."""
    import loss
    from rivals import FLOOR, contenders

    if quick:
        few = [c for c in contenders() if c.name in (FLOOR, "fastsiu tiled", "eager")]
        few_rounds = dict(device="cpu", seconds=0.2, rounds=3, with_memory=False)
        return visit(
            [(shape, few, loss.LEVELS) for shape in loss.QUICK], output, until, **few_rounds
        )
    return visit(
        [(loss.PEERS[0], [c for c in contenders() if not c.compiles], loss.LEVELS)], output, until
    )


def compilers(output: Path, until: float, quick: bool) -> int:
    """The first shape for contenders whose first call compiles: one by one, since that takes most
    of a minute."""
    import loss
    from rivals import FLOOR, contenders

    floor = next(c for c in contenders() if c.name == FLOOR)
    return visit(
        [(loss.PEERS[0], [floor, c], loss.LEVELS) for c in contenders() if c.compiles],
        output,
        until,
    )


def peers(output: Path, until: float, quick: bool) -> int:
    """The other shapes; then, in what time is left and without accuracy, contenders that compile,
    if at the first shape they beat every rival that does not."""
    import loss
    from rivals import FLOOR, contenders

    first = {row["contender"]: row for row in read(output) if row["kind"] == "shape"}
    speed = lambda c: (
        math.inf if first.get(c.name, {}).get("missing", True) else first[c.name]["ms"]["median"]
    )
    bar = min(
        (speed(c) for c in contenders() if c.terms == "CE+KL" and not c.ours and not c.compiles),
        default=math.inf,
    )
    quickly = [c for c in contenders() if not c.compiles]
    slowly = [c for c in contenders() if c.name == FLOOR or (c.compiles and speed(c) < bar)]
    jobs = [(shape, quickly, loss.LEVELS) for shape in loss.PEERS[1:] + loss.FULL]
    return visit(
        jobs + [(shape, slowly, ()) for shape in loss.PEERS[1:] if len(slowly) > 1], output, until
    )


def visit(
    jobs: list[tuple],
    output: Path,
    until: float,
    device: str = "cuda",
    seconds: float = 1.0,
    rounds: int = 9,
    with_memory: bool = True,
) -> int:
    """Appends each shape's rows as soon as they are there. A shape that would not be done in time
    is named and left out. The kernels run with the launch rows that apply.py would
    make of what was tuned before."""
    import loss
    import torch

    from fastsiu.kernels import measured

    measured.PLANS.update({} if device == "cpu" else plans_of(read(output)))
    longest = 0.0
    for shape, found, levels in jobs:
        began, tell = time.monotonic(), "N={}, V={}, D={}, {}".format(*shape)
        if began + 1.2 * longest > until:
            print(f"{tell}: left out for lack of time ({', '.join(c.name for c in found)})")
            continue
        options = dict(
            device=device, seconds=seconds, rounds=rounds, levels=levels, with_memory=with_memory
        )
        try:
            rows = loss.bench(shape, found, **options)
        except torch.OutOfMemoryError as error:
            print(f"{tell}: left out, {loss.sentence(error)}")
            torch.cuda.empty_cache()
            continue
        append(output, rows)
        longest = max(longest, time.monotonic() - began)
        print(f"{tell}: {time.monotonic() - began:.0f} s\n{loss.table(rows)}\n", flush=True)
    return 0


def study(output: Path, until: float, quick: bool) -> int:
    import loss
    from rivals import contenders

    for shape in loss.STUDY:
        found = [c for c in contenders() if c.terms == "CE+KL" and not c.compiles]
        append(output, loss.study(shape, found, device="cuda"))
    return 0


def real(output: Path, until: float, quick: bool, variants: list[str]) -> int:
    """LLaVA-1.5-7B from load to saved adapter, variant by variant (benches/real.py); those without
    time for them say so."""
    import real as bench_real

    rows: list[Row] = []

    def emit(new: list[Row]) -> None:
        append(output, new)
        rows.extend(new)
        print(bench_real.told(new), flush=True)

    code = bench_real.every(bench_real.chosen(quick, variants), quick, False, until, emit)
    print(bench_real.tables(rows))
    return code


# --------------------------------------------------------------------------------------------------
# tuning


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
    import loss
    import torch

    from fastsiu.kernels.triton_launch import CHUNK, WAVES, rows, target_of

    shapes, dtype = TUNED_QUICK if quick else TUNED, torch.bfloat16
    target = target_of(torch.device("cpu" if quick else "cuda"))
    pairs = list(zip(*rows(target, dtype), strict=True))
    trials = {N: Trial(N, shapes["V"], shapes["D"], dtype, quick) for N in shapes["N"]}
    best: dict[int, Candidate] = {}
    for N in trials:
        at = next((i for i, (sums, _) in enumerate(pairs) if sums.BLOCK_N >= N), len(pairs) - 1)
        best[N] = Candidate(*pairs[at], WAVES, CHUNK)
        trials[N].start(best[N], pairs[max(0, at - 1) : at])
    for stage in (sums_like, product_like, launch_like):
        asked = {
            N: [c for b in trials[N].bases(best[N], stage) for c in stage(b, target)]
            for N in trials
        }
        asked = {
            N: [c for c in dict.fromkeys(some) if c not in trials[N].ms]
            for N, some in asked.items()
        }
        asked = {N: some[:1] for N, some in asked.items()} if quick else asked
        broken = (
            {}
            if quick or stage is launch_like
            else compiled([c for some in asked.values() for c in some], until)
        )
        for N, trial in trials.items():
            best[N] = trial.fastest(asked[N], broken, until)
    for N, trial in trials.items():
        found = best[N]
        stamp = dict(
            device=INTERPRETER if quick else loss.device_name("cuda"),
            commit=loss.commit(),
            target=target,
        )
        stamp |= dict(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            dtype=str(dtype).removeprefix("torch."),
        )
        row = dict(
            kind="tune",
            kernel="sweep",
            **stamp,
            N=N,
            V=shapes["V"],
            D=shapes["D"],
            **found._asdict(),
        )
        row |= dict(
            ms=trial.ms[found], predicted_ms=trial.ms[trial.predicted], candidates=trial.tried
        )
        append(output, [row])
        print(
            f"N={N}: {found}, {row['ms']} ms; predicted row {row['predicted_ms']} ms; "
            f"{len(trial.tried)} candidates"
        )
    return 0


class Trial:
    """One N at every D: the problems, the predicted row's results, and the ms of every candidate
    tried."""

    def __init__(self, N: int, V: int, Ds: tuple[int, ...], dtype: Any, quick: bool) -> None:
        self.quick, self.problems = quick, [problem(N, V, D, dtype, quick) for D in Ds]
        self.ms: dict[Candidate, list[float]] = {}
        self.tried: list[Row] = []

    def start(self, predicted: Candidate, others: list[tuple]) -> None:
        """Measures the predicted row, whose results the others have to give; an error here is an
        error of the whole."""
        self.predicted, self.others = predicted, others
        self.want = [results(p, predicted) for p in self.problems]
        self.ms[predicted] = [self.median(p, predicted) for p in self.problems]
        self.tried.append(predicted._asdict() | dict(ms=self.ms[predicted]))

    def bases(self, best: Candidate, stage: Callable) -> list[Candidate]:
        """Where a stage starts: the sums from the next narrower row as well, the others from the
        best so far."""
        more = (
            [best._replace(sums=sums, product=product) for sums, product in self.others]
            if stage is sums_like
            else []
        )
        return [best, *more]

    def fastest(
        self, asked: list[Candidate], broken: dict[Candidate, str], until: float
    ) -> Candidate:
        for c in asked:
            error = broken.get(c) or (
                "no time left" if time.monotonic() > until else self.attempt(c)
            )
            self.tried.append(c._asdict() | (dict(error=error) if error else dict(ms=self.ms[c])))
        return min(self.ms, key=lambda c: math.prod(self.ms[c]))

    def attempt(self, c: Candidate) -> str | None:
        """Times it at every D and returns None, or says why it is out."""
        try:
            for p, want in zip(self.problems, self.want, strict=True):
                if reason := differs(results(p, c), want):
                    return reason
            self.ms[c] = [self.median(p, c) for p in self.problems]
        except refusals() as error:
            return refusal(error)
        return None

    def median(self, p: tuple, c: Candidate) -> float:
        return round(
            statistics.median(milliseconds(p, c) for _ in range(1 if self.quick else 5)), 5
        )


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
    import torch

    from fastsiu.kernels.tiled import Head

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
    import torch

    from fastsiu.kernels import triton_sweep
    from fastsiu.kernels.tiled import Sums
    from fastsiu.kernels.triton_launch import UNITS, plan_of

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


def milliseconds(p: tuple, c: Candidate) -> float:
    """One sweep, with a cold L2 on a GPU."""
    import torch

    if not p[0].is_cuda:
        began = time.perf_counter()
        sweep(p, c)
        return 1e3 * (time.perf_counter() - began)
    torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    sweep(p, c)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def compiled(candidates: list[Candidate], until: float) -> dict[Candidate, str]:
    """Compiles them into Triton's cache on disk, in several processes. Returns those that could not
    be, with why."""
    pool = ProcessPoolExecutor(processes(len(candidates)), mp_context=get_context("spawn"))
    futures = {c: pool.submit(compiles, c) for c in dict.fromkeys(candidates)}
    # measuring and the later stages take time, too
    wait(futures.values(), timeout=max(0.0, 0.5 * (until - time.monotonic())))
    pool.shutdown(cancel_futures=True)
    broken = {}
    for c, future in futures.items():
        if future.cancelled():
            broken[c] = "not compiled in time"
        elif isinstance(future.exception(), BrokenProcessPool):
            broken[c] = "a compiler died, of this candidate or of one compiled at the same time"
        elif reason := future.result():
            broken[c] = reason
    return broken


def compiles(c: Candidate) -> str | None:
    import torch

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
    return [c._replace(waves=waves, chunk=chunk) for waves in WAVES for chunk in CHUNKS]


def around(blocks: Any, outputs: Callable, inputs: Callable, target: str) -> list[Any]:
    """Blocks that differ in one field, then those that differ in two, within shared memory and 128
    registers of accumulator."""
    from fastsiu.kernels.triton_launch import SHARED_LIMIT

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


PARTS = dict(
    tests=tests, tune=tune, bench=bench, compilers=compilers, peers=peers, study=study, real=real
)

if __name__ == "__main__":
    sys.exit(main())
