"""Gives damaged bytes to a reader, under a limit of time and memory, and keeps as a file what it
did not take well.

`python tests/fuzz/run.py teacher --seconds 60 --corpus DIR` runs one target, without names all of
them. `python tests/fuzz/run.py teacher --input FILE` gives it one file again.

Targets are in the files fuzz_*.py beside this one. Such a file has

    TARGETS: dict[str, Callable[[bytes], None]]   by name, functions that read bytes
    ALLOWED: tuple[type[Exception], ...]          what they may raise; anything else is a failure,
    AssertionError too
    seeds(name) -> list[bytes]                    a few whole inputs, the same at each call
    mutate(name, data, rng) -> bytes              optional: damage that keeps the outer form; half
    of the inputs get it

The same --seed gives the same inputs. DIR/NAME may hold more seeds; failures are written there as
failed-HASH. What runs is in DIR/NAME/running, so that an input which kills the process is not lost:
the next run reports it. --results FILE gets a line of JSON for each target, and --table prints what
such lines of benches/results/fuzz.jsonl add up to. Do not stop a run by a signal and continue it:
the clock goes on, and what runs then counts as too long.

No coverage guides this: the readers that matter are C and Rust, of which a Python fuzzer sees
nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib.util
import json
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "benches" / "results" / "fuzz.jsonl"
LARGEST = 2**22  # bytes of an input
NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
WORDS = (
    b"\0",
    b"\n",
    b"\x1b[2J",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xf0\x9f\x98\x80",
    b'"',
    b"'",
    b"\\u0000",
    b"\\ud800",
    b"/../",
    b"[" * 2000,
    b'{"a":' * 2000,
    b"]",
    b"}",
    b",",
    b":",
    b"null",
    b"true",
    b"NaN",
    b"Infinity",
    b"-1",
    b"1e999",
    b"9" * 5000,
)


class TooLong(BaseException):
    """Past the limit of time; no handler of a target's takes it for its own."""


def targets() -> dict[str, tuple[Callable[[bytes], None], ModuleType]]:
    found = {}
    for path in sorted(HERE.glob("fuzz_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= {name: (target, module) for name, target in module.TARGETS.items()}
    return found


# --------------------------------------------------------------------------------------------------
# damage


def damaged(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """One to four changes of any kind."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(KINDS)(data, rng, others)[:LARGEST]
    return data


def _place(data: bytes, rng: random.Random, most: int = 64) -> tuple[int, int]:
    """A range; small ones are likelier, and so is the beginning, where headers are."""
    at = (
        rng.randrange(min(len(data), 512) + 1)
        if rng.random() < 0.5
        else rng.randrange(len(data) + 1)
    )
    return at, min(len(data), at + rng.choice((0, 1, 2, 4, 8, rng.randrange(most + 1))))


def flip(data, rng, others):
    if not data:
        return data
    at, _ = _place(data[:-1], rng)
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def set_bytes(data, rng, others):
    a, b = _place(data, rng)
    return data[:a] + rng.choice((bytes(b - a), b"\xff" * (b - a), rng.randbytes(b - a))) + data[b:]


def set_number(data, rng, others):
    size, at = rng.choice((1, 2, 4, 8)), _place(data, rng)[0]
    number = (rng.choice(NUMBERS) + rng.choice((-1, 0, 0, 1))) % 256**size
    return data[:at] + number.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


def set_digits(data, rng, others):
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data[:65536]))
    if not found:
        return data
    at = rng.choice(found)
    return (
        data[: at.start()]
        + str(rng.choice(NUMBERS) * rng.choice((1, -1, 10**300))).encode()
        + data[at.end() :]
    )


def delete(data, rng, others):
    a, b = _place(data, rng, 4096)
    return data[:a] + data[b:]


def cut(data, rng, others):
    return data[: rng.randrange(len(data) + 1)]


def insert(data, rng, others):
    at = _place(data, rng)[0]
    return data[:at] + rng.choice((rng.choice(WORDS), rng.randbytes(rng.randrange(64)))) + data[at:]


def repeat(data, rng, others):
    a, b = _place(data, rng, 256)
    return data[:a] + data[a:b] * rng.choice((2, 3, 100, 5000)) + data[b:]


def exchange(data, rng, others):
    (a, b), (c, d) = sorted((_place(data, rng), _place(data, rng)))
    return data if c < b else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def splice(data, rng, others):
    other = rng.choice(others)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


KINDS = (
    flip,
    flip,
    set_bytes,
    set_number,
    set_digits,
    delete,
    cut,
    insert,
    repeat,
    exchange,
    splice,
)


def inputs(name: str, module: ModuleType, more: list[bytes], seed: int) -> Iterator[bytes]:
    """The seeds as they are, then damage without end."""
    rng, whole = random.Random(f"{name} {seed}"), [*module.seeds(name), *more]
    yield from whole
    while True:
        data = rng.choice(whole)
        if hasattr(module, "mutate") and rng.random() < 0.5:
            yield module.mutate(name, data, rng)[:LARGEST]
        else:
            yield damaged(data, rng, whole)


# --------------------------------------------------------------------------------------------------
# a run


def _too_long(*_: object) -> None:
    raise TooLong


def attempt(
    target: Callable[[bytes], None], allowed: tuple, data: bytes, seconds: float, mib: int
) -> str | None:
    """What went wrong, as a traceback; None if nothing did.

    `seconds` counts the CPU's time, so that other work on the machine makes nothing slow. What
    waits without working may take 4 times that on the clock. Past 8 times, in a loop of C, the
    process ends."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + mib * 2**20
    faulthandler.dump_traceback_later(8 * seconds, exit=True)
    signal.signal(signal.SIGPROF, _too_long)
    signal.signal(signal.SIGALRM, _too_long)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 4 * seconds)
        target(data)
    except allowed:
        return None
    except (Exception, TooLong):
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        faulthandler.cancel_dump_traceback_later()
    return None


def kind(trace: str) -> str:
    """Two failures are of one kind if they end in the same exception from the same line."""
    lines = [line.strip() for line in trace.splitlines()]
    return (
        lines[-1].split(":")[0]
        + " "
        + next((line for line in reversed(lines) if line.startswith("File ")), "")
    )


def commit() -> str:
    """The commit of this file, with "-dirty" where the tree differs from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def run(
    name: str, target: Callable[[bytes], None], module: ModuleType, options: argparse.Namespace
) -> int:
    """Runs one target; the number of kinds of failures."""
    folder = options.corpus / name
    folder.mkdir(parents=True, exist_ok=True)
    running, kinds, done = folder / "running", set(), 0
    if running.exists():
        lost = running.rename(
            folder / f"failed-{hashlib.sha256(running.read_bytes()).hexdigest()[:12]}"
        )
        kinds.add("killed")
        print(f"{name}: {lost} ended the process of an earlier run.")
    more = [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]
    began = time.process_time()
    end = began + options.seconds
    for data in inputs(name, module, more, options.seed):
        if done == options.runs or (options.runs is None and time.process_time() > end):
            break
        running.write_bytes(data)
        trace = attempt(target, module.ALLOWED, data, options.input_seconds, options.input_mib)
        done += 1
        if trace is not None and kind(trace) not in kinds:
            kinds.add(kind(trace))
            kept = folder / f"failed-{hashlib.sha256(data).hexdigest()[:12]}"
            kept.write_bytes(data)
            print(f"{name}: {kept}, {len(data)} bytes:\n{trace}")
            if len(kinds) >= 20:
                break
    running.unlink(missing_ok=True)
    print(f"{name}: {done} inputs, {len(kinds)} kinds of failures.")
    if options.results:
        row = dict(date=datetime.now(UTC).date().isoformat(), commit=commit(), target=name)
        row |= dict(seed=options.seed, cpu_seconds=round(time.process_time() - began))
        with options.results.open("a") as file:
            file.write(json.dumps(row | dict(inputs=done, kinds_of_failures=len(kinds))) + "\n")
    return len(kinds)


def table(lines: list[str]) -> str:
    """Of each target the time and the inputs of all runs, and the kinds of failures of the newest
    commit that it ran at. Earlier ones were mended."""
    rows = [json.loads(line) for line in lines]
    out = ["| target | CPU-minutes | inputs | failures at the newest commit |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == name]
        minutes = sum(row["cpu_seconds"] for row in own) / 60
        failures = sum(r["kinds_of_failures"] for r in own if r["commit"] == own[-1]["commit"])
        inputs = sum(row["inputs"] for row in own)
        out.append(f"| {name} | {minutes:.0f} | {inputs:,} | {failures} |")
    return "\n".join(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = targets()
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU-seconds for each target")
    parser.add_argument("--runs", type=int, help="inputs for each target, instead of seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--corpus", type=Path, default=Path(tempfile.gettempdir()) / "fastsiu-fuzz", metavar="DIR"
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="append a line of JSON there")
    parser.add_argument(
        "--input-seconds", type=float, default=10.0, help="limit for one input, in CPU-seconds"
    )
    parser.add_argument(
        "--input-mib",
        type=int,
        default=512,
        help="limit for one input, beside what the process has",
    )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="give this one to one target, and show what happens",
    )
    parser.add_argument("--table", action="store_true", help="print what the results add up to")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(RESULTS.read_text().splitlines()))
        return 0
    if unknown := set(options.names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))} is no target: choose of {', '.join(known)}.")
    names = options.names or list(known)
    if options.input is not None:
        target, module = known[names[0]]
        target(options.input.read_bytes())
        return 0
    return int(sum(run(name, *known[name], options) for name in names) > 0)


if __name__ == "__main__":
    sys.exit(main())
