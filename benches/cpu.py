"""The C++ of the loss beside `tiled`, eager and the rivals, at each level of this processor.

    python benches/cpu.py                    every level with 1 and 2 threads, half an hour;
                                             appends to benches/results/cpu.jsonl, prints a table
    python benches/cpu.py --levels amx --threads 1 --shapes 64,49152,576,bfloat16 --dry
    python benches/cpu.py --table            the table of the newest results

A level below the processor's best runs in a process in which torch's own libraries (MKL, oneDNN)
are held to the same instructions, so that `tiled` and the two GEMMs are what such a processor would
have. Rivals run at the best level only. All contenders of a process are interleaved; ratios are
between medians, and `best` between the fastest rounds, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import loss
import torch
from rivals import FLOOR, contenders

from fastsiu.kernels import cpu_build

RESULTS = Path(__file__).parent / "results" / "cpu.jsonl"
SHAPES: list[loss.Shape] = [
    (256, 151936, 896, "bfloat16"),
    (256, 32000, 2048, "float32"),
    (64, 49152, 576, "float32"),
    (64, 49152, 576, "bfloat16"),
]
KL = (10.0, 1e-2, 1e-4)
OURS = (FLOOR, "fastsiu tiled", "fastsiu cpu")
# What holds MKL, oneDNN and ATen to a level; torch reads these when it starts.
HOLD = {
    "avx512_bf16": ("AVX512", "AVX512_CORE_BF16", "avx512"),
    "avx512": ("AVX512", "AVX512_CORE", "avx512"),
    "avx2": ("AVX2", "AVX2", "avx2"),
    "portable": ("SSE4_2", "SSE41", "default"),
}


def environment(level: str) -> dict[str, str]:
    if level == cpu_build.executes()[0]:
        return dict(os.environ)
    names = ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    return os.environ | dict(zip(names, HOLD[level], strict=True))


def measure(
    level: str, threads: int, shapes: list[loss.Shape], dry: bool, rivals: bool = True
) -> None:
    """All shapes at one level, in this process, which `environment` has prepared."""
    torch.set_num_threads(threads)
    executes = cpu_build.executes()
    best = level == executes[0]
    found = [c for c in contenders() if (best and rivals) or c.name in OURS]
    with mock.patch.object(cpu_build, "executes", lambda: executes[executes.index(level) :]):
        for shape in shapes:
            rows = loss.bench(shape, found, levels=KL, with_memory=best and rivals)
            rows = [row | dict(kind="cpu", level=level) for row in rows]
            if not dry:
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a", encoding="utf-8") as stream:
                    stream.writelines(json.dumps(row) + "\n" for row in rows)
            print(table(rows), flush=True)
            if best and rivals:
                print(loss.table(rows) + "\n", flush=True)


def table(rows: loss.Rows) -> str:
    """A line for each processor, shape, level and number of threads."""
    groups: dict[tuple[str, ...], dict[str, dict]] = {}
    for r in rows:
        maker = r["device"].split(",")[0].replace("(R)", "").removesuffix(" Processor")
        key = (maker, r["N"], r["V"], r["D"], r["dtype"], r["level"], r["threads"])
        groups.setdefault(key, {})[r["contender"]] = r
    lines = [
        "| processor | N, V, D | dtype | level, threads | two GEMMs | tiled | cpu | "
        "cpu / two GEMMs | tiled / cpu | best / best | error at KL 10, 0.01, 0.0001 |",
        "|" + "---|" * 11,
    ]
    for (maker, N, V, D, dtype, level, threads), found in groups.items():
        where = f"{maker} | {N}, {V}, {D} | {dtype} | {level}, {threads}"
        floor, tiled, cpu = (found[name] for name in OURS)
        if cpu["missing"]:
            lines.append(f"| {where} | {cpu['missing']} |")
            continue
        ms = [loss.milliseconds(r["ms"]["median"]) for r in (floor, tiled, cpu)]
        ratios = [
            cpu["ms"]["median"] / floor["ms"]["median"],
            tiled["ms"]["median"] / cpu["ms"]["median"],
            tiled["ms"]["min"] / cpu["ms"]["min"],
        ]
        errors = [loss.at(cpu, kl, "grad_error") for kl in KL]
        cells = [where, *(f"{x} ms" for x in ms)]
        cells += [f"{x:.2f}" for x in ratios]
        cells.append(", ".join("-" if x is None else f"{x:.1e}" for x in errors))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    levels = [level for level in cpu_build.executes() if level != "portable"]
    parser.add_argument("--levels", nargs="+", choices=cpu_build.executes(), default=levels)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shapes", nargs="+", type=loss.parse_shape, default=SHAPES)
    parser.add_argument("--dry", action="store_true", help="append nothing")
    parser.add_argument("--ours", action="store_true", help="without the rivals, some minutes")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
        print(table([json.loads(line) for line in text.splitlines()]))
    elif given.here:
        measure(given.levels[0], given.threads[0], given.shapes, given.dry, not given.ours)
    else:
        shapes = [",".join(map(str, shape)) for shape in given.shapes]
        for level in given.levels:
            for threads in given.threads:
                command = [sys.executable, __file__, "--here", "--levels", level]
                command += ["--threads", str(threads), "--shapes", *shapes]
                command += ["--dry"] if given.dry else []
                command += ["--ours"] if given.ours else []
                subprocess.run(command, env=environment(level), check=True)


if __name__ == "__main__":
    main()
