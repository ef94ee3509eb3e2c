"""SIU beside other methods on the embedded world, each at its best setting: the README's second
table.

    python benches/compare.py                 run all, append to benches/results/compare.jsonl, draw
    benches/plots/compare.*
    python benches/compare.py --quick         one method, a few steps, under a minute; appends and
    draws nothing
    python benches/compare.py --table         print the table of the newest result

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
    options = parser.parse_args()

    from fastsiu.compare import front

    if options.table:
        if not RESULTS.is_file():
            parser.error("there are no results yet: run without --table first")
        print("\n".join(front.grid(front.COLUMNS, front.table(newest()))))
        return

    import torch
    import transformers

    from fastsiu.compare import run as compare
    from fastsiu.demo.export import export
    from fastsiu.session import Listener

    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder) / "demo")
        report = compare.compare(
            Path(folder) / "demo" / "suite",
            compare.Search(
                tuple(options.methods),
                tuple(options.concepts),
                options.seeds,
                quick=options.quick,
            ),
            processes=options.processes,
            earlier=newest() if options.retest else None,
            listener=Listener(stage=lambda text: print(text, flush=True)),
        )
    print("\n".join(front.grid(front.COLUMNS, front.table(report))))
    print(f"{report['seconds']['all']} s")
    if options.quick or options.dry:
        return
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **report,
    }
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
    for note in front.plot(report, PLOTS):
        print(note)


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
