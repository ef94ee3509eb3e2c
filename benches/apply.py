"""Makes launch rows, plots and the documents' tables of what benches/gpu.sh has measured.

    python benches/apply.py DIR    writes kernels/measured.py, rows in benches/results, plots in
                                   benches/plots, and tables in docs/

DIR is what benches/gpu.sh had as --output (or its gpu.jsonl); benches/gpu.py says what it holds. A
campaign that was cut short is applied as far as it came. The table of a device stands between
markers of its own; where a page has none yet, it is added at the end of its section. Figures of the
interpreter are refused.
Exit codes: 0 all went well, 1 a table could not be made, 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import runpy
import shlex
import shutil
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

from rows import INTERPRETER, Row, append, plans_of, provenance, read

ROOT = Path(__file__).resolve().parent.parent
LOSS_PAGE, LOSS_SECTION = "docs/performance.md", "The loss beside its rivals"
REAL_PAGE, REAL_SECTION = "docs/memory.md", "Measured at the real size"
REAL_KINDS = ("made", "real", "real step")
CHANGED = (LOSS_PAGE, REAL_PAGE, "kernels/measured.py", "benches/results/loss.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="DIR", help="what benches/gpu.sh has made")
    parser.add_argument(
        "--into", type=Path, default=ROOT, metavar="TREE", help="instead of this one: a copy"
    )
    parser.add_argument(
        "--no-plots", action="store_true", help="draw nothing (matplotlib is not needed then)"
    )
    parser.add_argument("--commit", metavar="NAME", help="of rows that do not know theirs")
    given = parser.parse_args()
    path = given.results / "gpu.jsonl" if given.results.is_dir() else given.results
    if not given.into.exists():
        copy(given.into)
    return apply(path, given.into, not given.no_plots, given.commit)


def stop(sentence: str) -> int:
    print(f"apply.py: {sentence}", file=sys.stderr)
    return 2


def copy(tree: Path) -> Path:
    """What `apply` changes, as it is now."""
    for name in CHANGED:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return tree


def apply(path: Path, into: Path, draw: bool, commit: str | None = None) -> int:
    """Puts results into a tree: launch rows, rows of the loss bench, plots and the device's
    tables. Says what it leaves as it is. Returns the exit code.

    commit: that of the copy without git's history in which the rows were measured
    """
    import loss

    if not path.is_file():
        return stop(f"{path} is not a file: give the results of benches/gpu.sh.")
    try:
        rows = read(path)
    except json.JSONDecodeError as error:
        return stop(
            f"{path} holds a line that is not JSON ({error}): give the results of benches/gpu.sh."
        )
    machine = next((r for r in rows if r.get("kind") == "run"), None)
    if machine is None:
        return stop(f"{path} has no row of kind 'run': give the results of benches/gpu.sh.")
    if machine["quick"] and into.resolve() == ROOT:
        return stop(
            f"{path} is a rehearsal, whose figures are the interpreter's: measure on a GPU, or "
            "name a copy with --into."
        )
    if commit is None and any(r.get("commit") == "unknown" for r in rows):
        return stop(
            f"{path} was measured in a copy without git's history: say with --commit what it was."
        )
    rows = [r | dict(commit=commit) if r.get("commit") == "unknown" else r for r in rows]
    machine = next(r for r in rows if r["kind"] == "run")
    if draw and importlib.util.find_spec("matplotlib") is None:
        return stop("The plots need matplotlib: pip install 'fastsiu[bench]', or give --no-plots.")
    launch_rows(machine, rows, into / "kernels" / "measured.py")
    real_rows(rows, into)

    loss.RESULTS, loss.PLOTS = (
        into / "benches" / "results" / "loss.jsonl",
        into / "benches" / "plots",
    )
    measured = [r for r in rows if r["kind"] in ("shape", "study")]
    there = loss.RESULTS.read_text(encoding="utf-8").splitlines() if loss.RESULTS.is_file() else []
    new = [r for r in measured if json.dumps(r) not in there]
    loss.append(new)
    print(f"{loss.RESULTS}: {len(new)} rows added")
    shapes = [tuple(shape) for shape in machine["shapes"]]
    if not shapes and not measured:
        return 0
    if lacking := [
        s
        for s in shapes
        if not complete([r for r in measured if (r["N"], r["V"], r["D"], r["dtype"]) == s])
    ]:
        where = "; ".join("N={}, V={}, D={}, {}".format(*s) for s in lacking)
        print(
            "apply.py: tables and plots are left as they are: floor and ours lack times at "
            f"{where}.",
            file=sys.stderr,
        )
        return 1
    device = next(r["device"] for r in measured)
    drawn = loss.plots(device) if draw else []
    for plot in drawn:
        print(plot)
    if not drawn:
        print("No plots: " + ("the shapes are none that are drawn." if draw else "--no-plots."))
    images = "".join(f"\n![{p.stem.replace('_', ' ')}](../benches/plots/{p.name})" for p in drawn)
    how = "As above, on a GPU with a cold L2: `benches/gpu.sh`, then `python benches/apply.py DIR`."
    text = f"{loss.tables(device, whole=machine['quick']).strip()}\n{images}"
    table(
        into / LOSS_PAGE,
        "python benches/loss.py --table --of",
        device,
        text,
        LOSS_SECTION,
        how,
    )
    return 0


def real_rows(rows: list[Row], into: Path) -> None:
    """Puts rows of benches/real.py into its results, and makes the device's table. A device on
    which no variant ran gets no table."""
    if not any(r["kind"] in REAL_KINDS for r in rows):
        return
    import real as bench_real  # it needs the whole package, which the loss does not

    path, newest = into / "benches" / "results" / "real.jsonl", bench_real.newest(rows, None)
    if not any(r["kind"] != "made" and not r.get("missing") for r in newest):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    new = [r for r in rows if r["kind"] in bench_real.KINDS and json.dumps(r) not in there]
    append(path, new)
    print(f"{path}: {len(new)} rows added")
    how = (
        "LLaVA-1.5-7B with random weights, from load to saved adapter, seconds by stage: "
        "`benches/gpu.sh --only real`, then "
        "`python benches/apply.py DIR`; `benches/real.py` says what differs from a run "
        "with real weights."
    )
    device = newest[-1]["device"]
    text = bench_real.tables(bench_real.newest(read(path), device))
    table(
        into / REAL_PAGE,
        "python benches/real.py --table --of",
        device,
        text,
        REAL_SECTION,
        how,
    )


def complete(rows: list[Row]) -> bool:
    from rivals import FLOOR

    ran = [r for r in rows if not r["missing"]]
    return any(r["contender"] == FLOOR for r in ran) and any(
        r["ours"] and r["terms"] == "CE+KL" for r in ran
    )


def launch_rows(machine: Row, rows: list[Row], path: Path) -> None:
    """Writes kernels/measured.py, new entries in place of those with the same key. Refuses what the
    interpreter has timed."""
    known = runpy.run_path(str(path))
    plans, backends = dict(known["PLANS"]), dict(known["BACKENDS"])
    tuned = [r for r in rows if r["kind"] == "tune"]
    if machine["device"] == INTERPRETER or any(r["device"] == INTERPRETER for r in tuned):
        print(
            f"{path}: refused, left as it is: these launch rows come from the interpreter, whose "
            "times mean nothing."
        )
        return
    plans |= plans_of(tuned)
    for (dtype, N), ratios in sorted(against_tiled(rows).items()):
        ratio = math.exp(statistics.mean(map(math.log, ratios)))
        shapes = f"{len(ratios)} shape{'s' if len(ratios) > 1 else ''}"
        why = (
            f"{provenance(machine)}, N={N}: triton takes {ratio:.2f} of tiled's time, "
            f"geometric mean of {shapes}"
        )
        backends[machine["target"], dtype, N] = ("triton" if ratio < 1 else "tiled", why)
    source = path.read_text(encoding="utf-8")
    for name, entries in (("PLANS", plans), ("BACKENDS", backends)):
        pattern, text = rf"^({name}: [^=]+= )\{{.*?\}}(?=\n\n|\n*\Z)", literal(entries)
        source, times = re.subn(
            pattern, lambda found, text=text: found[1] + text, source, flags=re.M | re.S
        )
        if times != 1:
            raise SystemExit(
                f"{path} has no assignment to {name} alone in its paragraph: restore the file."
            )
    path.write_text(source, encoding="utf-8")
    print(
        f"{path}: {len(plans_of(tuned))} launch rows, {len(against_tiled(rows))} choices of backend"
    )


def against_tiled(rows: list[Row]) -> dict[tuple[str, int], list[float]]:
    """triton's time over tiled's, CE + KL with a cold L2, by dtype and N: one ratio a shape."""
    ms: dict[tuple, dict[str, float]] = {}
    for r in rows:
        if r["kind"] == "shape" and not r["missing"]:
            ms.setdefault((r["dtype"], r["N"], r["V"], r["D"]), {})[r["contender"]] = r["ms"][
                "median"
            ]
    found: dict[tuple[str, int], list[float]] = {}
    for (dtype, N, *_), times in sorted(ms.items()):
        if {"fastsiu tiled", "fastsiu triton"} <= set(times):
            found.setdefault((dtype, N), []).append(
                times["fastsiu triton"] / times["fastsiu tiled"]
            )
    return found


def literal(table: dict[tuple, tuple]) -> str:
    """A dict as source, an entry a paragraph, its last field wrapped."""
    lines = []
    for key, (*numbers, why) in sorted(table.items()):
        wrapped = textwrap.wrap(why, 85, drop_whitespace=False)
        lines += [f"    {quoted(key)}: (", f"        {', '.join(map(quoted, numbers))},"]
        lines += [f"        {quoted(text)}" for text in wrapped[:-1]] + [
            f"        {quoted(wrapped[-1])},",
            "    ),",
        ]
    return "\n".join(["{", *lines, "}"]) if lines else "{}"


def quoted(value: Any) -> str:
    """repr with double quotes"""
    if isinstance(value, tuple):
        return f"({', '.join(map(quoted, value))})"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def table(page: Path, command: str, device: str, text: str, section: str, how: str) -> None:
    """The device's table between its own markers; where there are none, at the end of the section,
    introduced by `how`."""
    begin, end = f"<!-- table: {command} {shlex.quote(device)} -->", "<!-- end of table -->"
    whole, block = page.read_text(encoding="utf-8"), f"{begin}\n{text}\n{end}"
    if begin in whole:
        before, rest = whole.split(begin, 1)
        whole = before + block + rest.split(end, 1)[1]
    else:
        found = re.search(rf"^## {section}$.*?(?=^## |\Z)", whole, re.M | re.S)
        if found is None:
            raise SystemExit(
                f"{page} has no section {section!r}: put {begin} and {end} where the table goes."
            )
        before, after = whole[: found.end()].rstrip(), whole[found.end() :]
        whole = f"{before}\n\n### On {device}\n\n{how}\n\n{block}\n"
        whole += f"\n{after}" if after else ""
    page.write_text(whole, encoding="utf-8")
    print(f"{page}: the table of {device}, {section}")


if __name__ == "__main__":
    sys.exit(main())
