"""SIU beside other methods on the embedded world, each at its best setting: the README's second
table.

    python benches/compare.py                 run all, append to benches/results/compare.jsonl, draw
    benches/plots/compare.*
    python benches/compare.py --quick         one method, a few steps, under a minute; appends and
    draws nothing
    python benches/compare.py --table         print the table of the newest result
    python benches/compare.py --renew METHOD ...
    measure these methods alone, as the newest result's were: append a result with their rows and
    its others; each row keeps the date and the commit that measured it

The work is `fastsiu compare`'s: two concepts, one of them with a look-alike, three seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "compare.jsonl"
WORLD = "fastsiu/demo"
PLOTS = Path(__file__).parent / "plots"


def newest() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8").splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one method, a few steps; appends and draws nothing"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the newest result")
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--concepts", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="append and draw nothing")
    parser.add_argument(
        "--retest",
        action="store_true",
        help="take the newest result's search, and test its choices anew",
    )
    parser.add_argument(
        "--renew",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="measure these alone, beside the newest result's rows of the others",
    )
    options = parser.parse_args()
    if options.renew and (options.methods or options.retest or options.quick):
        parser.error(
            "--renew names the methods, and searches as the newest result did: leave --methods, "
            "--retest and --quick out"
        )

    from fastsiu.compare import front

    if (options.table or options.renew) and not RESULTS.is_file():
        parser.error("there are no results yet: run without --table and --renew first")
    if options.table:
        print(shown(newest()))
        return
    beside = newest() if options.renew else None
    if beside is not None and (changed := other_world(beside)):
        parser.error(f"{changed}: measure all methods anew")

    import torch
    import transformers

    from fastsiu.compare import renewed
    from fastsiu.compare import run as compare
    from fastsiu.demo.export import export
    from fastsiu.session import Listener

    at = commit()
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder) / "demo")
        report = compare.compare(
            Path(folder) / "demo" / "suite",
            compare.Search(
                tuple(options.renew or options.methods),
                tuple(options.concepts),
                options.seeds,
                quick=options.quick,
            ),
            processes=options.processes,
            earlier=newest() if options.retest else None,
            beside=beside,
            listener=Listener(stage=lambda text: print(text, flush=True)),
        )
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": at,
        "device": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **report,
    }
    if beside is not None:
        record = renewed.renewed(record, beside)
    print(shown(record))
    print(f"{report['seconds']['all']} s")
    if options.quick or options.dry:
        return
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
    for note in front.plot(record, PLOTS):
        print(note)


def shown(record: dict[str, Any]) -> str:
    """The table, and below it which rows were measured when, where it was not all at once."""
    from fastsiu.compare import front, renewed

    note = renewed.note(record)
    lines = front.grid(front.COLUMNS, front.table(record))
    return "\n".join([*lines, *(["", note] if note else [])])


def other_world(record: dict[str, Any]) -> str:
    """Why the embedded world and model may not be those that a record's rows were measured on, as
    git knows them; "" where they are."""
    runs = [record, *(row["measured"] for row in record["rows"] if "measured" in row)]
    for at in dict.fromkeys(run["commit"].removesuffix("-dirty") for run in runs):
        done = git("diff", "--quiet", at, "--", WORLD)
        if done.returncode == 1:
            return f"the embedded world is another one than at commit {at}"
        if done.returncode:
            return f"git knows no commit {at}, so that its world cannot be compared"
    return ""


def commit() -> str:
    return git("describe", "--always", "--dirty").stdout.strip() or "unknown"


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )


if __name__ == "__main__":
    main()
