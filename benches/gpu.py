"""Tests, measures and tunes on this machine's GPU, step by step, into one folder.

    benches/gpu.sh --output DIR                  tests, our kernels beside the floor, rivals,
                                                 tuning, our kernels as tuned
    benches/gpu.sh --output DIR --only real      LLaVA-1.5-7B at its real size
    benches/gpu.sh --wheels FOLDER ...           packages that are not installed here, as wheels
    benches/gpu.sh --seconds 520 ...             another limit for all steps together
    benches/gpu.sh --quick                       rehearses all steps on a CPU, the kernels in
                                                 Triton's interpreter, and apply.py on a copy
    python benches/apply.py DIR                  makes launch rows, plots and tables of the results

The first two commands together stay below 15 minutes, and each below nine. They need no network.
Packages are looked at before anything is made (packages.py).

DIR gets gpu.jsonl, and gpu.log, what the steps printed. A row is written as soon as it is known, so
that a kill at any second keeps what was measured. gpu.jsonl has these kinds: `run`, first, is the
machine; `step` has a step's exit code (null: it did not run, and `tail` says why), its seconds and
the end of what it printed; `shape` and `study` are rows of benches/loss.py; `candidate` is one set
of launch parameters with its ms at each D or its error, and `tune` the fastest so far for one N;
`made`, `real` and `real step` are rows of benches/real.py. A step that fails or runs out of time
has its row, and the next one runs. What a step leaves of its time goes to the later ones.
Exit codes: 0 all went well, 1 a step failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import packages
from packages import PYTEST, ROOT, BadInput
from rows import INTERPRETER, Row, append, slug

COMMAND = 540.0  # seconds that one command may take at most
ALL = 900.0  # both commands, with the starts of the machine and what is copied
START = 140.0  # of these, for the starts and the copies
LEAST = 10.0  # a step with less time than this is left out
# the loss through every kernel, at one small shape
SMALL = ["tests/triton/test_backend.py", "-k", "computes or graph"]
REHEARSED = [
    "tests/triton/test_backend.py",
    "tests/triton/test_rivals.py",
    "-k",
    "computes or KLDiv",
]
# in a command: the seconds after which a part begins nothing more, SHARE of its limit
SOON, SHARE = "SOON", 0.85
FIRST = ("tests", "ours", "rivals", "tune", "tuned")  # the steps of the first command
PARTS = (*FIRST, "study", "real")


class Step(NamedTuple):
    """command: what is run, in the repository's root; seconds: its limit; absent: why it cannot run
    here, which is no failure."""

    name: str
    command: list[str]
    seconds: float
    env: dict[str, str] = {}
    absent: str | None = None


class Options(NamedTuple):
    """What the command line gives. seconds: for all steps together, None: the sum of their limits;
    only: names of steps, empty: those of the first command; variants: of the step real."""

    output: Path | None = None
    quick: bool = False
    only: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    seconds: float | None = None
    wheels: Path | None = None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="else benches/results/gpu-DEVICE-DATE"
    )
    parser.add_argument("--quick", action="store_true", help="rehearse on a CPU")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="STEP",
        help=f"these steps instead: {', '.join(FIRST)}, real, memcheck, racecheck, study",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of the step real; else all that time allows",
    )
    parser.add_argument("--seconds", type=float, help="for all steps together")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="packages not installed here")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        return part_of(given)
    options = Options(
        given.output,
        given.quick,
        tuple(given.only),
        tuple(given.variants),
        given.seconds,
        given.wheels,
    )
    try:
        with tempfile.TemporaryDirectory() as work:
            return measure(options, Path(work).resolve())
    except BadInput as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2


def part_of(given: argparse.Namespace) -> int:
    """One step, in a process of its own: its file is imported only here."""
    until, output = time.monotonic() + given.seconds, given.output
    if given.part == "tune":
        import gpu_tune

        return gpu_tune.tune(output, until, given.quick)
    if given.part == "real":
        import gpu_real

        return gpu_real.real(output, until, given.quick, given.variants)
    import gpu_measure

    return getattr(gpu_measure, given.part)(output, until, given.quick)


# --------------------------------------------------------------------------------------------------
# the campaign


def measure(options: Options, work: Path) -> int:
    """Runs the steps, one after the other. work: a folder for what goes away afterwards. Raises
    BadInput before anything is made where something needed is not here."""
    began = time.monotonic()
    wheels = packages.unpack(options.wheels, work / "site") if options.wheels else []
    check(options)
    machine = machine_of(options.quick) if options.quick else apart(machine_of, options.quick)
    output = options.output or default_output(machine, work if options.quick else None)
    rows, log = (output.resolve() / name for name in ("gpu.jsonl", "gpu.log"))
    if rows.exists():
        raise BadInput(f"{output} has results: remove them or give another folder with --output.")
    todo = chosen(options, steps(rows, work, options))
    if not {"ours", "rivals", "tuned"} & {step.name for step in todo}:
        machine["shapes"] = []
    rows.parent.mkdir(parents=True, exist_ok=True)
    append(rows, [machine | dict(wheels=wheels, left_out=packages.left_out())])
    for line in packages.left_out():
        print(line, flush=True)
    # so that `finally` ends the step in progress
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed, limit = [], 0.0
    for step in todo:
        limit += step.seconds
        row = run(step, min(limit, budget(options, todo)) - (time.monotonic() - began), log)
        append(rows, [row])
        failed += [step.name] if row["failed"] else []
        state = "left out" if row["rc"] is None else "failed" if row["failed"] else "ok"
        print(f"{step.name}: {state}, {row['seconds']:.0f} s", flush=True)
        if state != "ok":
            print(textwrap.indent(row["tail"][-1500:].rstrip(), "    "), flush=True)
    told = rows.relative_to(work) if rows.is_relative_to(work) else rows
    ended = f"failed: {', '.join(failed)}" if failed else "nothing failed"
    print(f"{told}: {time.monotonic() - began:.0f} s, {ended}")
    return int(bool(failed))


def check(options: Options) -> None:
    """Raises BadInput where the whole campaign, or a step that was asked for, cannot run here."""
    for name in options.only or FIRST:
        if reason := packages.lacking(name):
            raise BadInput(reason)
    if options.quick and (reason := packages.no_interpreter()):
        raise BadInput(reason)
    if options.seconds is not None and not LEAST <= options.seconds <= COMMAND:
        raise BadInput(
            f"--seconds {options.seconds:g} is out of range: give {LEAST:.0f} to {COMMAND:.0f}."
        )
    import torch

    if not options.quick and not torch.cuda.is_available():
        raise BadInput(
            "There is no GPU here: run this on a machine with one, or rehearse it with --quick."
        )


def default_output(machine: Row, work: Path | None) -> Path:
    name = f"gpu-{slug(machine['device'])}-{datetime.now(UTC):%Y-%m-%dT%H%M}"
    return (work or ROOT / "benches" / "results") / name


def chosen(options: Options, known: list[Step]) -> list[Step]:
    """The steps that were asked for, in the campaign's order; their limits in proportion to
    --seconds. Without --only those of the first command; a rehearsal has all."""
    names = {step.name for step in known}
    if strange := sorted(set(options.only) - names):
        there = ", ".join(step.name for step in known)
        raise BadInput(f"There is no step {strange[0]!r}: choose from {there}.")
    first = names if options.quick else set(FIRST)
    wanted = {*options.only, "apply"} if options.only else first
    todo = [step for step in known if step.name in wanted]
    share = 1.0 if options.seconds is None else options.seconds / sum(s.seconds for s in todo)
    return [step._replace(seconds=share * step.seconds) for step in todo]


def budget(options: Options, todo: list[Step]) -> float:
    """Seconds for all of them; a rehearsal's machine may be slow."""
    whole = options.seconds or sum(step.seconds for step in todo)
    return whole if options.quick else min(COMMAND - 10, whole)


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
    versions = {name: packages.release(name) for name in ("triton", "transformers", "numpy")}
    return dict(
        kind="run",
        quick=quick,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        **names,
        python=platform.python_version(),
        torch=torch.__version__,
        **versions,
        commit=loss.commit(),
        shapes=loss.QUICK if quick else loss.GOAL,
    )


# --------------------------------------------------------------------------------------------------
# the steps


def steps(rows: Path, work: Path, options: Options) -> list[Step]:
    """All of them, in their order. The limits of FIRST and that of `real` are those of the two
    commands; the others are for whoever asks for them."""
    quick = options.quick
    mode, interpreted = (["--quick"], {"TRITON_INTERPRET": "1"}) if quick else ([], {})
    site = {"PYTHONPATH": str(work / "site")} if options.wheels else {}

    def part(name: str, seconds: float, env: dict[str, str] | None = None, *more: str) -> Step:
        command = [sys.executable, __file__, "--part", name, "--output", str(rows)]
        command += ["--seconds", SOON, *mode, *more]
        return Step(name, command, seconds, (env or {}) | site, packages.lacking(name))

    variants = ["--variants", *options.variants] if options.variants else []
    # its model goes with `work`
    real = part("real", 300 if quick else 330, {"TMPDIR": str(work)}, *variants)
    if quick:
        into = work / "copy"
        editor = [sys.executable, str(Path(__file__).with_name("apply.py")), str(rows.parent)]
        plots = [] if importlib.util.find_spec("matplotlib") else ["--no-plots"]
        apply = Step("apply", [*editor, "--into", str(into), *plots], 150, site)
        return [
            Step(
                "tests", [*PYTEST, *REHEARSED], 300, interpreted | site, packages.lacking("tests")
            ),
            part("ours", 150),
            part("rivals", 150),
            part("tune", 250, interpreted),
            part("tuned", 150),
            real,
            apply._replace(absent=packages.lacking("apply")),
        ]
    return [
        part("tests", 110),
        part("ours", 60),
        part("rivals", 110),
        part("tune", 110),
        part("tuned", 35),
        real,
        sanitizer("memcheck", site),
        sanitizer("racecheck", site),
        part("study", 90),
    ]


def sanitizer(tool: str, site: dict[str, str]) -> Step:
    """The loss through the kernels on small shapes. Without torch's caching every tensor is an
    allocation with bounds."""
    places = ("/usr/local/cuda/bin", "/opt/cuda/bin")
    found = shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places])
    )
    absent = packages.lacking(tool)
    if not found:
        absent = (
            f"compute-sanitizer is neither on PATH nor in {' or '.join(places)}: it has "
            "checked nothing."
        )
    command = [str(found), "--tool", tool, "--error-exitcode", "9", *PYTEST, *SMALL]
    return Step(tool, command, 120, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | site, absent)


def run(step: Step, seconds: float, log: Path) -> Row:
    """A step's row. `seconds` is its limit, after which its whole process group is killed. What it
    prints goes to the end of `log` at once."""
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
        return row | dict(failed=True, tail="No time is left for it.")
    began = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | step.env
    paths = (step.env.get("PYTHONPATH"), str(ROOT), os.environ.get("PYTHONPATH"))
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    command = [str(round(SHARE * seconds, 1)) if word == SOON else word for word in step.command]
    with log.open("ab") as stream:
        stream.write(f"== {step.name}, at most {seconds:.0f} s\n".encode())
        stream.flush()
        start, ended = stream.tell(), ""
        group = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            rc = group.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            rc, ended = 124, f"\nKilled after {seconds:.0f} s."
        finally:
            end(group)
    said = log.read_bytes()[start:].decode("utf-8", "replace") + ended
    return row | dict(
        rc=rc, failed=rc != 0, seconds=round(time.monotonic() - began, 1), tail=said[-6000:]
    )


def end(group: subprocess.Popen) -> None:
    """Kills what is left of a process group, and waits for it: the next step wants the GPU to
    itself. A zombie that nobody reaps is waited for 5 s."""
    for _ in range(50):
        try:
            os.killpg(group.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        group.poll()
        time.sleep(0.1)
    group.wait()


if __name__ == "__main__":
    sys.exit(main())
