"""Compiles every Triton kernel and every launch row to machine code for every GPU, on a machine
without one, and reads how the loops around matrix instructions are pipelined.

    python benches/compile_kernels.py [--target sm_86 ...] [--results FILE]

Prints registers, spills, shared memory, matrix instructions and predicted occupancy. Fails on a
spill, on shared memory above the target's limit (101,376 B on sm_86, 89 and 120), and on 16 bit
operands without matrix instructions. On NVIDIA, 16 bit, it also fails where an innermost loop with
matrix instructions

    waits for all copies in flight (async_wait num = 0), or copies nothing ahead
    has fewer buffers in shared memory than stages - 1: with one wait per step one of them is free
    allocates shared memory from registers, which is a way through it that no copy needs
    waits for all its wgmma (pendings = 0)

Figures are for aligned tensors with unit strides: by pointers and, where the GPU has it, by tensor
descriptors (tma). The widest row of each kernel is compiled for odd strides as well: it must
compile and may spill.
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

from fastsiu.kernels import triton_pairs, triton_rows, triton_sweep, triton_tiles, triton_vendor
from fastsiu.kernels.triton_launch import (
    SHARED_LIMIT,
    TARGETS,
    TMA,
    Blocks,
    general_rows,
    heaviest,
    rows,
)

ALIGNED, DESCRIBED, ODD = "aligned", "tma", "odd strides"
# per multiprocessor
THREADS = dict(sm_80=2048, sm_86=1536, sm_89=1536, sm_90=2048, sm_100=2048, sm_120=1536)
# its shared memory
CAPACITY = dict(
    sm_80=167_936, sm_86=102_400, sm_89=102_400, sm_90=233_472, sm_100=233_472, sm_120=102_400
)
NVIDIA_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_\w+|v_wmma_\w+)"
POINTERS = (
    dict.fromkeys(
        "bias_ptr bias_t_ptr start_ptr shift_ptr new_shift_ptr m_ptr part_ptr reached_ptr "
        "factor_ptr product_ptr u_ptr w_ptr C_ptr unit_ptr db_ptr ce_weight_ptr kl_weight_ptr "
        "ce_number_ptr kl_number_ptr g_ptr z_ptr m_rest_ptr found_ptr dh_ptr".split(),
        "fp32",
    )
    | dict.fromkeys(
        "total_ptr entropy_ptr lse_ptr lse_q_ptr lse_t_ptr mass_ptr gap_ptr folded_ptr".split(),
        "fp64",
    )
    | dict.fromkeys("held_ptr run_ptr count_ptr".split(), "i32")
    | dict.fromkeys("label_ptr top_ptr".split(), "i64")
    | dict.fromkeys("keep_ptr still_ptr".split(), "i8")
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
    # the gradient with one loop over the steps of all tiles, where the GPU may gain by it
    "flat": PLAIN | dict(HAS_BIAS=False, HAS_SOFTCAP=False),
}
FLAT = {("sm_90", "bf16", 64)}  # target, dtype and rows of a block
# The general path: a softcap with a frozen head that both share, and a training head beside a
# teacher with its own.
FORWARD = dict(SCALE=1.0, SOFTCAP=30.0, NEAR=0.3)
BESIDE = dict(
    TAU=1.0,
    HAS_BIAS=False,
    HAS_BIAS_T=False,
    HAS_SOFTCAP=True,
    TEACHER=True,
    SAME_HEAD=True,
    MASKED=True,
)
APART = BESIDE | dict(TAU=2.0, HAS_BIAS=True, HAS_BIAS_T=True, SAME_HEAD=False)
ONE = dict(
    COLUMNS_0=1, TAU_0=1.0, ENTROPY_0=True, COLUMNS_1=0, TAU_1=1.0, ENTROPY_1=False, JUMP=30.0
)
TWO = ONE | dict(COLUMNS_1=2, TAU_1=2.0)
LITTLE = dict(RENORMALIZE=False, NEED_B=False, UNIT=False, STILL=True, NEED_KL=True, ROUND=False)
MUCH = dict(RENORMALIZE=True, NEED_B=True, UNIT=True, STILL=False, NEED_KL=False, ROUND=False)
PAIRS = {
    "shared": (BESIDE | ONE, BESIDE | LITTLE),
    "everything": (APART | TWO, APART | MUCH),
}


def gpu(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


def source(kernel, constants: dict, dtype: str, layout: str, **pointers: str) -> ASTSource:
    """Signature by argument name: pointers, descriptors, int32, fp32 and constants; where aligned,
    everything but N and its like divides by 16.

    pointers: the type of what a pointer points to, or a descriptor's, by the argument's name
    """
    names, aligned = kernel.arg_names, layout != ODD
    if aligned:
        constants = constants | {
            name: 1
            for name in names
            if name in ("stride_hd", "stride_wd", "stride_htd", "stride_wtd")
        }

    def kind(name: str) -> str:
        if not name.endswith("_ptr"):
            return "fp32" if name in ("alpha", "beta", "bound") else "i32"
        found = (POINTERS | pointers).get(name, dtype)
        return found if found.startswith("tensordesc") else "*" + found

    signature = {name: "constexpr" if name in constants else kind(name) for name in names}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    divides = [
        i
        for i, name in enumerate(names)
        if aligned
        and name not in constants
        and name not in free
        and signature[name][:2] in ("*f", "*b", "*i", "i3")
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divides}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def tile(dtype: str, *shape: int) -> str:
    return f"tensordesc<{dtype}[{', '.join(map(str, shape))}]>"


def layouts(target: str, dtype: str, widest: bool) -> list[str]:
    found = [ALIGNED] + [DESCRIBED] * (target in TMA and dtype != "fp32")
    return found + [ODD] * widest


def jobs(target: str):
    """(kernel's name, variant, blocks, dtype, layout, source) for everything that is compiled for a
    target."""
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        dot = dict(ACC=tl.float32, DOT=tl.bfloat16 if dtype == "bf16" else tl.float32)
        sums_rows, product_rows = rows(target, torch_dtype)
        for b in sums_rows:
            given = dict(BLOCK_N=b.BLOCK_N, BLOCK_V=b.BLOCK_V, BLOCK_D=b.BLOCK_D, ROUND=False)
            given |= FORWARD | dict(EPS=0.0, JUMP=30.0, P_SCALE=1.0, HELD=32, FIRST=False) | dot
            for variant, flags in VARIANTS.items():
                if variant == "everything" and b.BLOCK_N > heaviest(target):
                    continue
                flat = variant == "flat"
                if flat and (target, dtype, b.BLOCK_N) not in FLAT:
                    continue
                widest = (variant, b) == ("gradient", sums_rows[-1])
                for layout in layouts(target, dtype, widest):
                    made = given | flags | dict(TMA=layout == DESCRIBED, FLAT=flat)
                    types = {}
                    if dtype == "bf16":  # with a teacher
                        made |= dict(JUMP=0.0, P_SCALE=2.0**15)
                        types["p_ptr"] = "fp16"
                    if layout == DESCRIBED:
                        types |= dict(h_ptr=tile(dtype, b.BLOCK_N, b.BLOCK_D))
                        types |= dict(W_ptr=tile(dtype, b.BLOCK_V, b.BLOCK_D))
                    code = source(triton_tiles.sums_kernel, made, dtype, layout, **types)
                    yield "sums", variant, b, dtype, layout, code
        for b, wide in zip(product_rows, sums_rows, strict=True):
            given = dict(BLOCK_N=b.BLOCK_N, BLOCK_V=wide.BLOCK_V, BLOCK_K=b.BLOCK_V)
            given |= dict(BLOCK_D=b.BLOCK_D, FIRST=False, ALL_LIVE=False) | dot
            yield from products(target, "", b, dtype, given, b == product_rows[-1])
        yield from general_jobs(target, dtype, general_rows(target, torch_dtype), dot)
        yield from row_jobs(dtype)
    combine = source(triton_sweep.combine_kernel, dict(BLOCK_D=512), "fp32", ALIGNED)
    yield "combine", "", Blocks(1, 0, 512, 4, 2), "fp32", ALIGNED, combine


def products(target: str, variant: str, b: Blocks, dtype: str, given: dict, widest: bool):
    """The product with e in the head's dtype and, for bf16, in fp16 with the head's tile
    converted: with a teacher."""
    for e in [dtype] + ["fp16"] * (dtype == "bf16" and not given["ALL_LIVE"]):
        for layout in layouts(target, dtype, widest and e == dtype):
            types, made = dict(p_ptr=e), given | dict(TMA=layout == DESCRIBED)
            if e == "fp16":
                made |= dict(DOT=tl.float16)
            if layout == DESCRIBED:
                types |= dict(p_ptr=tile(e, b.BLOCK_N, b.BLOCK_V))
                types |= dict(W_ptr=tile(dtype, b.BLOCK_V, b.BLOCK_D))
            code = source(triton_tiles.product_kernel, made, dtype, layout, **types)
            yield "product", variant or ("fp16 e" if e != dtype else ""), b, dtype, layout, code


def general_jobs(target: str, dtype: str, found: tuple, dot: dict):
    """As jobs, for triton_general.py."""
    pairs, product_rows, outer = found
    for b in pairs:
        given = dict(BLOCK_N=b.BLOCK_N, BLOCK_V=b.BLOCK_V, BLOCK_D=b.BLOCK_D) | FORWARD
        given |= dict(DOT_T=dot["DOT"]) | dot
        for variant, (first, second) in PAIRS.items():
            for layout in (
                (ALIGNED, ODD) if (variant, b) == ("everything", pairs[-1]) else (ALIGNED,)
            ):
                made = source(triton_pairs.normalise_kernel, given | first, dtype, layout)
                yield "normalise", variant, b, dtype, layout, made
                made = source(triton_pairs.coefficient_kernel, given | second, dtype, layout)
                yield "coefficient", variant, b, dtype, layout, made
    for b, wide in zip(product_rows, pairs, strict=True):
        given = dict(BLOCK_N=b.BLOCK_N, BLOCK_V=wide.BLOCK_V, BLOCK_K=b.BLOCK_V)
        given |= dict(BLOCK_D=b.BLOCK_D, FIRST=False, ALL_LIVE=True) | dot
        yield from products(target, "all live", b, dtype, given, False)
    given = dict(BLOCK_K=outer.BLOCK_N, BLOCK_V=outer.BLOCK_V, BLOCK_D=outer.BLOCK_D)
    given |= dict(ROUND=False, UNIT=False) | dot
    for layout in (ALIGNED, ODD):
        code = source(triton_pairs.outer_kernel, given, dtype, layout, dW_ptr=dtype)
        yield "outer", "", outer, dtype, layout, code


def row_jobs(dtype: str):
    """The kernels of single rows, with every option."""
    one = dict(IGNORED=-100, STILL=True, MASKED=True, TEACHER=True, SOFTCAP=30.0)
    one |= dict(CHANNELS=2, SCALE=1.0, HAS_SOFTCAP=False, K=16, HELD=32, BLOCK_D=256)
    prepare = one | dict(NEAR=0.3, TAU_1=2.0, CLEAN=False, HAS_BIAS=True, ACC=tl.float32)
    general = dict(TEACHER=False, CLEAN=True, HAS_SOFTCAP=True, K=0, HELD=1, BLOCK_D=512)
    finish = one | dict(P_SCALE=2.0**15, ENTROPY=True, GRADIENT=True, SPLITS=256)
    settle = dict(TAU=1.0, IGNORED=-100, KL=True, STILL=True, ENTROPY=True, CHANNELS=2)
    gather = dict(TAU=1.0, KL=True, STILL=True, UNIT=True, ROUND=False, BLOCK_D=512)
    weights = dict(IGNORED=-100, CE_BY=1, KL_BY=2, HAS_CE_WEIGHT=True, HAS_KL_WEIGHT=True)
    warps = triton_rows.finish_warps(torch.bfloat16 if dtype == "bf16" else torch.float32)
    made = [
        ("prepare", "", 8, triton_rows.prepare_kernel, prepare, dict(p_ptr="fp64", m_ptr="fp32")),
        ("prepare", "general", 4, triton_rows.prepare_kernel, prepare | general,
         dict(p_ptr="fp64", m_ptr="fp32")),
        ("finish", "apart", warps, triton_rows.finish_kernel, finish | dict(TAU=1.0, APART=True),
         dict(p_ptr="fp64")),
        ("finish", "tau", warps, triton_rows.finish_kernel, finish | dict(TAU=2.0, APART=False),
         dict(p_ptr="fp64")),
    ]  # fmt: skip
    if dtype == "fp32":  # these take the same types with any dtype
        made += [
            ("epilogue", "", 8, triton_vendor.epilogue_kernel,
             FORWARD | dict(FIRST=False, COLUMNS=2, TAU=2.0, ENTROPY=True, PRODUCT=True, JUMP=0.0,
                            P_SCALE=2.0**15, HAS_BIAS=True, HAS_SOFTCAP=False, HELD=32,
                            ROUND=False, BLOCK=2048, BLOCK_D=1024), dict(p_ptr="fp16")),
            ("settle", "", 4, triton_pairs.settle_kernel,
             settle | dict(APART=True, HELD=1, SPLITS=256), {}),
            ("gather", "", 4, triton_pairs.gather_kernel, gather, {}),
            ("weights", "", 8, triton_rows.weights_kernel,
             weights | dict(TEACHER=True, HAS_G=True, UNIT=True, BLOCK=1024), {}),
            ("fold", "", 4, triton_pairs.fold_kernel, dict(FIRST=False, BLOCK_N=16, BLOCK=128), {}),
            ("bias", "", 4, triton_pairs.bias_kernel, dict(UNIT=True, ROUND=False, BLOCK=1024), {}),
        ]  # fmt: skip
    for name, variant, warps, kernel, given, types in made:
        blocks = Blocks(1, 0, given.get("BLOCK_D", 0), warps, 3)
        yield name, variant, blocks, dtype, ALIGNED, source(kernel, given, dtype, ALIGNED, **types)


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
    found |= dict(blocks_per_unit=fit, occupancy=round(occupancy, 2))
    return found | (pipeline(made.asm["ttgir"]) if "cubin" in made.asm else {})


DOT = re.compile(r"ttng\.warp_group_dot |ttng\.tc_gen5_mma |= tt\.dot ")


def pipeline(ir: str) -> dict:
    """Of the innermost loops with a matrix product (one without may be inside): smallest wait of
    asynchronous copies and of wgmma, copies issued, allocations from registers; and the fewest
    buffers of a ring."""
    lines, loops, open_ = ir.splitlines(), [], []
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if "scf.for" in line and line.rstrip().endswith("{"):
            open_.append((indent, i))
        elif open_ and indent == open_[-1][0] and line.lstrip().startswith("}"):
            _, start = open_.pop()
            loops.append("\n".join(lines[start : i + 1]))
    loops = [x for x in loops if DOT.search(x)]
    inner = [x for x in loops if not any(y in x and y is not x for y in loops)]
    if not inner:
        return {}
    each = lambda pattern: [list(map(int, re.findall(pattern, x))) for x in inner]
    waits = [n for one in each(r"async_wait [^{]*\{num = (\d+)") for n in one]
    rings = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:bf16|f16)", ir)
    pendings = [max(one, default=None) for one in each(r"pendings = (\d+)")]
    pendings = [n for n in pendings if n is not None]
    copies = [len(re.findall(r"async_copy_global_to_local|async_tma_copy", x)) for x in inner]
    return dict(
        waits=min(waits, default=None),
        copies=min(copies),
        buffers=min(map(int, rings), default=0),
        from_registers=sum(x.count("ttg.local_alloc %") for x in inner),
        pending=min(pendings, default=None),
    )


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


ROWS = ("combine", "weights", "prepare", "finish", "settle", "fold", "gather", "bias", "epilogue")


def wrong(target: str, kernel: str, b: Blocks, dtype: str, layout: str, f: dict) -> list[str]:
    if layout == ODD:
        return []
    found = [f"spills {f['spilled']} B"] if f["spilled"] else []
    if f["shared"] > SHARED_LIMIT[target]:
        found.append(f"{f['shared']:,} B of shared memory, at most {SHARED_LIMIT[target]:,}")
    if dtype == "fp32" or kernel in ROWS:
        return found
    if not f["matrix"]:
        found.append("no matrix instructions")
    if not target.startswith("sm_"):
        return found
    if not f.get("copies"):
        return [*found, "a loop copies nothing ahead"]
    if f["waits"] == 0:
        found.append("waits for all copies")
    if f["buffers"] < max(2, b.num_stages - 1):
        found.append(f"{f['buffers']} buffers for {b.num_stages} stages")
    if f["from_registers"]:
        found.append(f"{f['from_registers']} allocations from registers in a loop")
    if f["pending"] == 0:
        found.append("waits for all wgmma")
    return found


def compile_all(target: str) -> tuple[list[str], list[dict], int]:
    """A line and a record for everything that is compiled for a target, and how many of them
    fail."""
    lines, records, failures = [], [], 0
    for kernel, variant, blocks, dtype, layout, code in jobs(target):
        options = dict(num_warps=blocks.num_warps, num_stages=blocks.num_stages)
        try:
            f = figures(target, blocks, triton.compile(code, target=gpu(target), options=options))
            faults = wrong(target, kernel, blocks, dtype, layout, f)
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
            keys = ("waits", "copies", "buffers", "from_registers", "pending")
            told = ["-" if f.get(key) is None else str(f[key]) for key in keys]
            line += "  " + " ".join(f"{x:>2}" for x in told)
        note = f"  ({layout})" if layout != ALIGNED else ""
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
        "shared matrix  fit occupancy  waits copies buffers from_registers pending"
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
