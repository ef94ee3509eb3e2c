"""Results of GPUs that do not exist, in the format of benches/gpu.sh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastsiu.kernels.triton_launch import Blocks

SHAPES = [[256, 151936, 2048, "bfloat16"], [64, 151936, 2048, "bfloat16"]]
WIDE, STEP = Blocks(64, 256, 32, 8, 2), Blocks(64, 128, 64, 8, 2)  # rows that nobody predicts


def synthetic(path: Path, *, device="Synthetic GPU", quick=False, shapes=SHAPES, tuned=None):
    """A results file of a GPU that does not exist: triton wins at N = 64 and loses at 256."""
    stamp = dict(date="2026-01-02T03:04:05+00:00", commit="0123abc")
    made = [
        dict(
            kind="run",
            quick=quick,
            device=device,
            target="sm_90",
            units=132,
            shapes=SHAPES,
            **stamp,
        )
    ]
    made.append(dict(kind="step", name="tests", rc=0, failed=False, seconds=1.0, tail=""))
    for N in (64, 256):
        blocks = dict(
            sums=WIDE._replace(BLOCK_N=N), product=STEP._replace(BLOCK_N=N), waves=1, chunk=2**23
        )
        ms = dict(ms=[1.0, 2.0], predicted_ms=[1.5, 2.5], candidates=[])
        made.append(
            dict(
                kind="tune",
                device=tuned or device,
                target="sm_90",
                dtype="bfloat16",
                N=N,
                V=1000,
                D=[32, 64],
                **stamp,
            )
            | blocks
            | ms
        )
    for N, V, D, dtype in shapes:
        for name, median in (
            ("two GEMMs (the floor)", 1.0),
            ("fastsiu tiled", 2.0),
            ("fastsiu triton", N / 64),
            ("eager", 9.0),
        ):
            ours, ms = (
                name.startswith("fastsiu"),
                dict(median=median, min=median, max=median, rounds=3),
            )
            error = dict(
                term="KL",
                teacher="peaked",
                mask=False,
                level=1e-3,
                truth=1e-3,
                grad_error=1e-3,
                cosine=1.0,
            )
            made.append(
                dict(
                    kind="shape",
                    device=device,
                    gpu=True,
                    threads=1,
                    torch="2",
                    triton="3",
                    contender=name,
                    package="torch",
                    version="2",
                    terms="GEMM" if "GEMM" in name else "CE+KL",
                    how="one call",
                    keeps="-",
                    skips_dw=True,
                    fp32_logits=True,
                    ours=ours,
                    N=N,
                    V=V,
                    D=D,
                    dtype=dtype,
                    missing=None,
                    ms=ms,
                    x_floor=median,
                    teacher_mib=0.0,
                    mib=1.0,
                    accuracy=[] if "GEMM" in name else [error],
                    **stamp,
                )
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


MADE = dict(
    kind="made",
    variant=None,
    device="Synthetic GPU",
    missing=None,
    model="A Model",
    parameters=7e9,
    gb=13.2,
    seconds=dict(build=10.0, write=30.0, digests=13.0),
)


def real_row(variant, device="Synthetic GPU", **changes):
    """A row of benches/real.py that no run has made: 50 s and 10.5 GB, where 10.25 were planned."""
    seconds = dict(
        plan=8.0,
        load=5.0,
        samples=10.0,
        dreams=10.0,
        teacher=1.0,
        train=20.0,
        verdict=3.0,
        save=1.0,
    )
    recipe = dict(steps=60, batch_size=32, dreams=2, dream_steps=60)
    made = dict(
        kind="real",
        variant=variant,
        device=device,
        missing=None,
        quick=False,
        settings="nf4",
        steps=60,
        recipe=recipe,
        seconds=seconds,
        total=50.0,
        target_seconds=60,
        target_gb=11,
        peak=dict(used=10.5),
        budget=dict(micro_batch=None),
        planned=dict(peak=10.25 * 2**30, settings=dict(micro_batch=None)),
    )
    return made | dict(met_seconds=True, met_gb=True) | changes


def with_real(path: Path, *rows: dict[str, Any]) -> Path:
    run = dict(kind="run", quick=False, device="Synthetic GPU", shapes=[])
    path.write_text("".join(json.dumps(row) + "\n" for row in (run, MADE, *rows)))
    return path
