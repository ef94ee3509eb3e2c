"""The last step of the GPU campaign (gpu.py): LLaVA-1.5-7B from load to saved adapter."""

from __future__ import annotations

from pathlib import Path

import real as bench_real
from rows import Row, append


def real(output: Path, until: float, quick: bool, variants: list[str]) -> int:
    """Variant by variant (benches/real.py), each with its rows as it ends; those without time for
    them say so."""
    rows: list[Row] = []
    try:
        wanted = bench_real.chosen(quick, variants)
    except bench_real.BadInput as error:
        print(error)
        return 2

    def emit(new: list[Row]) -> None:
        append(output, new)
        rows.extend(new)
        print(bench_real.told(new), flush=True)

    code = bench_real.every(wanted, quick, False, until, emit)
    print(bench_real.tables(rows))
    return code
