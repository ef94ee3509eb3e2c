"""Compiles every Triton kernel and every launch row to machine code for every GPU, on a machine
without one.

    python benches/compile_kernels.py [--target sm_86 ...] [--results FILE]

Prints registers, spills, shared memory, matrix instructions and predicted occupancy. Fails on a
spill, on shared memory above the target's limit (101,376 B on sm_86, 89 and 120), and on 16 bit
operands without matrix instructions. Figures are for aligned tensors with unit strides; the widest
row of each kernel is compiled for odd strides as well: it must compile and may spill.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsiu.kernels import triton_general, triton_sweep
from fastsiu.kernels.triton_launch import HEAVY, SHARED_LIMIT, TARGETS, Blocks, general_rows, rows

ALIGNED, ODD = "aligned", "odd strides"
# per multiprocessor
THREADS = dict(sm_80=2048, sm_86=1536, sm_89=1536, sm_90=2048, sm_100=2048, sm_120=1536)
# its shared memory
CAPACITY = dict(
    sm_80=167_936, sm_86=102_400, sm_89=102_400, sm_90=233_472, sm_100=233_472, sm_120=102_400
)
NVIDIA_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_\w+|v_wmma_\w+)"
POINTERS = dict(
    bias_ptr="fp32",
    keep_ptr="i8",
    held_ptr="i32",
    cuts_ptr="i32",
    shift_ptr="fp32",
    new_shift_ptr="fp32",
    start_ptr="fp32",
    total_ptr="fp64",
    entropy_ptr="fp64",
    m_ptr="fp32",
    list_ptr="i32",
    count_ptr="i32",
    part_ptr="fp32",
    factor_ptr="fp32",
    product_ptr="fp32",
    bias_t_ptr="fp32",
    lse_ptr="fp32",
    lse_q_ptr="fp32",
    lse_t_ptr="fp32",
    label_ptr="i64",
    u_ptr="fp32",
    w_ptr="fp32",
    C_ptr="fp32",
    unit_ptr="fp32",
    db_ptr="fp32",
    mass_ptr="fp64",
    gap_ptr="fp64",
)
# What users run: the loss alone with its entropy; CE + KL at temperature 1 with the gradient; and
# all options at once.
PLAIN = dict(
    COLUMNS_0=1,
    TAU_0=1.0,
    ENTROPY_0=False,
    PRODUCT_0=True,
    COLUMNS_1=0,
    TAU_1=1.0,
    ENTROPY_1=False,
    PRODUCT_1=False,
)
VARIANTS = {
    "loss": PLAIN | dict(ENTROPY_0=True, PRODUCT_0=False, HAS_BIAS=False, HAS_SOFTCAP=False),
    "gradient": PLAIN | dict(HAS_BIAS=False, HAS_SOFTCAP=False),
    "everything": PLAIN
    | dict(ENTROPY_0=True, COLUMNS_1=2, TAU_1=2.0, PRODUCT_1=True, HAS_BIAS=True, HAS_SOFTCAP=True),
}
# The general path: a softcap with a frozen head that both share, and a training head beside a
# teacher with its own.
BESIDE = dict(
    TAU=1.0,
    HAS_BIAS=False,
    HAS_BIAS_T=False,
    HAS_SOFTCAP=True,
    TEACHER=True,
    SAME_HEAD=True,
    MASKED=True,
)
APART = dict(
    TAU=2.0,
    HAS_BIAS=True,
    HAS_BIAS_T=True,
    HAS_SOFTCAP=True,
    TEACHER=True,
    SAME_HEAD=False,
    MASKED=True,
)
ONE = dict(
    COLUMNS_0=1, TAU_0=1.0, ENTROPY_0=True, COLUMNS_1=0, TAU_1=1.0, ENTROPY_1=False, JUMP=30.0
)
TWO = ONE | dict(COLUMNS_1=2, TAU_1=2.0)
PAIRS = {
    "shared": (BESIDE | ONE, BESIDE | dict(RENORMALIZE=False, NEED_B=False, ROUND=False)),
    "everything": (APART | TWO, APART | dict(RENORMALIZE=True, NEED_B=True, ROUND=False)),
}


def gpu(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


def source(kernel, constants: dict, dtype: str, layout: str, **pointers: str) -> ASTSource:
    """Signature by argument name: pointers, int32, and constants; where aligned, everything but N
    and its like divides by 16."""
    names, aligned = kernel.arg_names, layout == ALIGNED
    if aligned:
        constants = constants | {
            name: 1
            for name in names
            if name in ("stride_hd", "stride_wd", "stride_htd", "stride_wtd")
        }
    kind = lambda name: (
        "*" + (POINTERS | pointers).get(name, dtype) if name.endswith("_ptr") else "i32"
    )
    signature = {name: "constexpr" if name in constants else kind(name) for name in names}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    divides = [
        i for i, name in enumerate(names) if aligned and name not in constants and name not in free
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divides}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def jobs(target: str):
    """(kernel's name, variant, blocks, dtype, layout, source) for everything that is compiled for a
    target."""
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        dot = dict(ACC=tl.float32, DOT=tl.bfloat16 if dtype == "bf16" else tl.float32)
        sums_rows, product_rows = rows(target, torch_dtype)
        for blocks in sums_rows:
            given = dict(
                BLOCK_N=blocks.BLOCK_N,
                BLOCK_V=blocks.BLOCK_V,
                BLOCK_D=blocks.BLOCK_D,
                ROUND=False,
                NEAR=0.3,
                **dot,
            )
            given |= dict(SCALE=1.0, SOFTCAP=30.0, EPS=0.0, JUMP=30.0, P_SCALE=1.0)
            for variant, flags in VARIANTS.items():
                if variant == "everything" and blocks.BLOCK_N > HEAVY:
                    continue
                layouts = (
                    (ALIGNED, ODD)
                    if (variant, blocks) == ("gradient", sums_rows[-1])
                    else (ALIGNED,)
                )
                for layout in layouts:
                    yield (
                        "sums",
                        variant,
                        blocks,
                        dtype,
                        layout,
                        source(triton_sweep.sums_kernel, given | flags, dtype, layout),
                    )
            if dtype == "bf16":
                flags = (
                    given | VARIANTS["gradient"] | dict(DOT=tl.float16, JUMP=0.0, P_SCALE=2.0**15)
                )
                yield (
                    "sums",
                    "gradient",
                    blocks,
                    "fp16",
                    ALIGNED,
                    source(triton_sweep.sums_kernel, flags, "fp16", ALIGNED),
                )
        for blocks, wide in zip(product_rows, sums_rows, strict=True):
            given = dict(
                BLOCK_N=blocks.BLOCK_N,
                BLOCK_V=wide.BLOCK_V,
                BLOCK_K=blocks.BLOCK_V,
                BLOCK_D=blocks.BLOCK_D,
                **dot,
            )
            for layout in (ALIGNED, ODD) if blocks == product_rows[-1] else (ALIGNED,):
                yield (
                    "product",
                    "",
                    blocks,
                    dtype,
                    layout,
                    source(triton_sweep.product_kernel, given, dtype, layout),
                )
            if dtype == "bf16":  # with a teacher: probabilities in fp16, the head's tile converted
                given = given | dict(DOT=tl.float16)
                code = source(triton_sweep.product_kernel, given, dtype, ALIGNED, p_ptr="fp16")
                yield "product", "fp16 e", blocks, dtype, ALIGNED, code
        yield from general_jobs(target, dtype, general_rows(target, torch_dtype), dot)
    combine = source(triton_sweep.combine_kernel, dict(BLOCK_D=512), "fp32", ALIGNED)
    yield "combine", "", Blocks(1, 0, 512, 4, 2), "fp32", ALIGNED, combine


def general_jobs(target: str, dtype: str, found: tuple, dot: dict):
    """As jobs; the product is the same kernel, in these blocks too."""
    pairs, _, outer = found
    for blocks in pairs:
        given = dict(
            BLOCK_N=blocks.BLOCK_N,
            BLOCK_V=blocks.BLOCK_V,
            BLOCK_D=blocks.BLOCK_D,
            NEAR=0.3,
            SCALE=1.0,
            SOFTCAP=30.0,
        )
        given |= dict(DOT_T=dot["DOT"]) | dot
        for variant, (first, second) in PAIRS.items():
            for layout in (
                (ALIGNED, ODD) if (variant, blocks) == ("everything", pairs[-1]) else (ALIGNED,)
            ):
                made = source(triton_general.normalise_kernel, given | first, dtype, layout)
                yield "normalise", variant, blocks, dtype, layout, made
                made = source(triton_general.coefficient_kernel, given | second, dtype, layout)
                yield "coefficient", variant, blocks, dtype, layout, made
    given = (
        dict(BLOCK_K=outer.BLOCK_N, BLOCK_V=outer.BLOCK_V, BLOCK_D=outer.BLOCK_D, ROUND=False) | dot
    )
    for layout in (ALIGNED, ODD):
        yield (
            "outer",
            "",
            outer,
            dtype,
            layout,
            source(triton_general.outer_kernel, given, dtype, layout),
        )


def figures(target: str, blocks: Blocks, made) -> dict:
    """Registers per thread, bytes spilled, bytes of shared memory, matrix instructions, predicted
    blocks and warps per unit."""
    shared = made.metadata.shared
    if "cubin" in made.asm:
        registers, spilled = nvidia_usage(target, made)
        warps = blocks.num_warps
        per_warp = -(-registers * 32 // 256) * 256
        fit = min(
            65536 // (per_warp * warps),
            CAPACITY[target] // (shared + 1024),
            THREADS[target] // (32 * warps),
        )
        text, occupancy = made.asm["ptx"], fit * warps * 32 / THREADS[target]
    else:
        text = made.asm["amdgcn"]
        find = lambda name: max(map(int, re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)
        # scalars spill to lanes
        registers, spilled = (
            find("vgpr_count"),
            find("private_segment_fixed_size"),
        )
        wave64 = target.startswith("gfx9")
        simd_waves = min(8 if wave64 else 16, (512 if wave64 else 1536) // max(1, registers))
        fit = min(4 * simd_waves // blocks.num_warps, 65_536 // shared if shared else 99)
        occupancy = fit * blocks.num_warps / (4 * (8 if wave64 else 16))
    matrix = len(re.findall(MATRIX, text))
    found = dict(registers=registers, spilled=spilled, shared=shared, matrix=matrix)
    return found | dict(blocks_per_unit=fit, occupancy=round(occupancy, 2))


def nvidia_usage(target: str, made) -> tuple[int, int]:
    """Registers and spilled bytes; a kernel without a stack frame has spilled nothing, else ptxas
    says how much."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(made.asm["cubin"])
        usage = subprocess.run(
            [NVIDIA_BIN / "cuobjdump", "-res-usage", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        if not stack:
            return registers, 0
        ptx.write_text(made.asm["ptx"])
        ptxas = NVIDIA_BIN / ("ptxas-blackwell" if target in ("sm_100", "sm_120") else "ptxas")
        arch = re.search(r"\.target (\w+)", made.asm["ptx"])[1]
        command = [ptxas, "-v", f"-arch={arch}", ptx, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return registers, sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))


def wrong(target: str, kernel: str, dtype: str, layout: str, f: dict) -> list[str]:
    if layout == ODD:
        return []
    found = [f"spills {f['spilled']} B"] if f["spilled"] else []
    if f["shared"] > SHARED_LIMIT[target]:
        found.append(f"{f['shared']:,} B of shared memory, at most {SHARED_LIMIT[target]:,}")
    if dtype != "fp32" and kernel != "combine" and not f["matrix"]:
        found.append("no matrix instructions")
    return found


def compile_all(target: str) -> tuple[list[str], list[dict], int]:
    """A line and a record for everything that is compiled for a target, and how many of them
    fail."""
    lines, records, failures = [], [], 0
    for kernel, variant, blocks, dtype, layout, code in jobs(target):
        options = dict(num_warps=blocks.num_warps, num_stages=blocks.num_stages)
        try:
            f = figures(target, blocks, triton.compile(code, target=gpu(target), options=options))
            faults = wrong(target, kernel, dtype, layout, f)
        except (
            Exception
        ) as error:  # a row that a compiler cannot take is a failure to be reported with the others
            f, faults = (
                None,
                [
                    f"does not compile: {type(error).__name__}: "
                    f"{str(error).strip().splitlines()[-1][:200]}"
                ],
            )
        failures += bool(faults)
        shape = (
            f"{blocks.BLOCK_N:>3} {blocks.BLOCK_V:>4} {blocks.BLOCK_D:>4} "
            f"{blocks.num_warps:>5} {blocks.num_stages:>6}"
        )
        line = f"{target:8} {kernel:11} {variant:10} {dtype:5} {shape} "
        if f is not None:
            line += f"{f['registers']:>4} {f['spilled']:>5} {f['shared']:>7,} {f['matrix']:>6} "
            line += f"{f['blocks_per_unit']:>4}"
            line += f" {f['occupancy']:>9}"
        note = f"  ({layout})" if layout == ODD else ""
        lines.append(f"{line}{note}{'  FAILS: ' if faults else ''}{'; '.join(faults)}")
        record = dict(target=target, kernel=kernel, variant=variant, dtype=dtype, layout=layout)
        records.append(record | blocks._asdict() | (f or {}))
    return lines, records, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--results", type=Path, help="also write the figures there, as JSON lines")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="targets compiled at a time"
    )
    given = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing.")
    if missing := {gpu(t).backend for t in given.target} - {
        "cuda" if b == "nvidia" else "hip" for b in triton.backends.backends
    }:
        parser.error(f"This Triton has no backend for {', '.join(missing)}.")
    failures, records, began = 0, [], time.time()
    print(
        f"{'target':8} {'kernel':11} {'variant':10} dtype  N    V    D warps stages  reg spill  "
        "shared matrix  fit occupancy"
    )
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        for lines, found, failed in pool.map(compile_all, given.target):
            print("\n".join(lines), flush=True)
            records += found
            failures += failed
    print(
        f"{len(records)} compiled with triton {triton.__version__} in {time.time() - began:.0f} "
        f"s, {failures} failed"
    )
    if given.results:
        given.results.write_text("".join(json.dumps(r) + "\n" for r in records))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
