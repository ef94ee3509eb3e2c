"""How the Triton kernels are launched: a pure function of shape, dtype and GPU. Rows in measured.py
win, the others are predicted; `why` says which."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import torch

from . import measured


class Blocks(NamedTuple):
    """One kernel's block sizes: rows, vocabulary columns and hidden units, with Triton's warps and
    stages."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """splits: into how many pieces programs divide a chunk's columns; chunk: vocabulary columns per
    launch where the gradient is wanted, whose [N, chunk] probabilities are kept at a time; why:
    where the numbers come from."""

    sums: Blocks
    product: (
        Blocks  # BLOCK_N as in sums, BLOCK_V its step along the columns, which divides that of sums
    )
    splits: int
    product_splits: int
    chunk: int
    why: str


TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
UNITS = dict(
    sm_80=108, sm_86=82, sm_89=128, sm_90=132, sm_100=148, sm_120=170, gfx942=304, gfx1100=96
)  # where not asked
SHARED_LIMIT = dict(  # bytes per block
    sm_80=166_912, sm_86=101_376, sm_89=101_376, sm_90=232_448, sm_100=232_448, sm_120=101_376,
    gfx942=65_536,
    gfx1100=65_536,
)  # fmt: skip
# Bytes of a chunk's probabilities. A chunk costs two launches, some 50 us of Python: chunks so
# small that the product finds their head rows in L2 would cost more in launches than they save in
# bytes (50 of them at [64, 151,936] with D 4096).
CHUNK = 2**26
WAVES = 2  # programs per multiprocessor

# Rows by family, ascending in BLOCK_N. All are predicted: the widest that compile without a spill
# and within the target's shared memory, by benches/compile_kernels.py with triton 3.7.0 on
# 2026-11-21. ampere: mma.sync; hopper: wgmma or tcgen05 from 64 rows.
SUMS = {
    "ampere": (
        Blocks(16, 128, 64, 4, 4),
        Blocks(32, 128, 64, 4, 3),
        Blocks(64, 128, 64, 8, 3),
        Blocks(128, 128, 32, 8, 4),
    ),
    "hopper": (
        Blocks(16, 128, 128, 4, 4),
        Blocks(32, 128, 32, 4, 4),
        Blocks(64, 128, 64, 8, 4),
        Blocks(128, 128, 64, 8, 4),
    ),
    "cdna": (
        Blocks(16, 128, 64, 4, 2),
        Blocks(32, 128, 64, 4, 2),
        Blocks(64, 128, 64, 8, 2),
        Blocks(128, 128, 32, 8, 2),
    ),
    "rdna": (Blocks(16, 128, 64, 4, 2), Blocks(64, 64, 64, 8, 2), Blocks(128, 64, 64, 8, 2)),
    "fp32": (
        Blocks(16, 32, 32, 8, 2),
    ),  # no matrix instructions: fp32 must not become TF32, and `tiled` should be faster
    "fp32 hopper": (Blocks(16, 32, 16, 4, 2),),
    "interpreter": (Blocks(16, 64, 64, 1, 1),),
}
PRODUCT = {
    "ampere": (
        Blocks(16, 64, 128, 4, 4),
        Blocks(32, 32, 128, 4, 4),
        Blocks(64, 64, 128, 8, 3),
        Blocks(128, 32, 128, 8, 4),
    ),
    "hopper": (
        Blocks(16, 64, 128, 4, 4),
        Blocks(32, 32, 128, 4, 4),
        Blocks(64, 64, 128, 8, 4),
        Blocks(128, 64, 128, 8, 3),
    ),
    "cdna": (
        Blocks(16, 64, 128, 4, 2),
        Blocks(32, 32, 128, 4, 2),
        Blocks(64, 64, 128, 8, 2),
        Blocks(128, 32, 128, 8, 2),
    ),
    "rdna": (Blocks(16, 32, 128, 4, 2), Blocks(64, 32, 128, 8, 2), Blocks(128, 32, 64, 8, 2)),
    "fp32": (Blocks(16, 32, 32, 4, 2),),
    "fp32 hopper": (Blocks(16, 32, 32, 4, 2),),
    "interpreter": (Blocks(16, 32, 64, 1, 1),),
}
FAMILY = dict(sm_80="ampere", sm_86="ampere", sm_89="ampere", sm_90="hopper", sm_100="hopper",
              sm_120="ampere", gfx942="cdna",
              gfx1100="rdna", interpreter="interpreter")  # fmt: skip
HEAVY = 64  # rows at most where a second Sums or a softcap needs registers: 128 rows spill


def _family(target: str, dtype: torch.dtype) -> str:
    family = FAMILY[target]
    if dtype.itemsize > 2 and family != "interpreter":
        family = "fp32 hopper" if family == "hopper" else "fp32"
    return family


def rows(target: str, dtype: torch.dtype) -> tuple[tuple[Blocks, ...], tuple[Blocks, ...]]:
    """What `triton_launch` chooses among: blocks of the sums and of the product, by ascending
    BLOCK_N."""
    family = _family(target, dtype)
    return SUMS[family], PRODUCT[family]


def triton_launch(
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    target: str,
    units: int | None = None,
    heavy: bool = False,
) -> Plan:
    """dtype: what is multiplied; target: a key of FAMILY; units: multiprocessors; heavy: two Sums,
    or a softcap."""
    units = units or UNITS.get(target, 2)
    found = (
        None if heavy else nearest(measured.PLANS, target, dtype, N)
    )  # measured with one Sums: two need more registers
    if found:
        sums, product, waves, chunk, why = found
        return plan_of(Blocks(*sums), Blocks(*product), waves, chunk, N, V, D, dtype, units, why)
    choices = [
        pair
        for pair in zip(*rows(target, dtype), strict=True)
        if not heavy or pair[0].BLOCK_N <= HEAVY
    ]
    sums, product = next((pair for pair in choices if pair[0].BLOCK_N >= N), choices[-1])
    return plan_of(sums, product, WAVES, CHUNK, N, V, D, dtype, units, f"predicted for {target}")


def plan_of(
    sums: Blocks,
    product: Blocks,
    waves: int,
    chunk: int,
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    units: int,
    why: str,
) -> Plan:
    """A row of blocks at a shape; waves: programs per multiprocessor that the splits aim at; chunk:
    bytes of probabilities."""
    up = lambda a, b: -(-a // b)
    blocks = up(N, sums.BLOCK_N)
    columns = (
        max(1, min(up(V, sums.BLOCK_V), chunk // (dtype.itemsize * max(N, 1) * sums.BLOCK_V)))
        * sums.BLOCK_V
    )
    splits = split(blocks, waves * units, columns // sums.BLOCK_V)
    product_splits = min(
        splits, split(blocks * up(D, product.BLOCK_D), units, columns // product.BLOCK_V)
    )
    return Plan(sums, product, splits, product_splits, columns, why)


def split(programs: int, slots: int, steps: int) -> int:
    """Into how many pieces the `steps` of each program go, where `slots` programs run at a time, so
    that the last one ends earliest; the fewest of equals, and at most one wave more than there
    would be."""
    up, programs = lambda a, b: -(-a // b), max(1, programs)  # without rows there are no programs
    most = min(steps, up(2 * slots, programs))
    return min(range(1, most + 1), key=lambda s: (up(programs * s, slots) * up(steps, s), s))


def measured_backend(target: str, dtype: torch.dtype, N: int) -> tuple[str, str] | None:
    """The faster of "tiled" and "triton" there and where that was measured; None where nothing
    was."""
    return nearest(measured.BACKENDS, target, dtype, N)


def nearest(
    table: dict[tuple[str, str, int], tuple], target: str, dtype: torch.dtype, N: int
) -> tuple | None:
    """The entry with the smallest measured N that is not below N, else the one with the largest."""
    found = sorted(key for key in table if key[:2] == (target, str(dtype).removeprefix("torch.")))
    return table[next((key for key in found if key[2] >= N), found[-1])] if found else None


def target_of(device: torch.device) -> str:
    """The one of TARGETS that this device is, or the nearest below it; "interpreter" for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return name if name in TARGETS else "gfx942" if name.startswith("gfx9") else "gfx1100"
    major, minor = torch.cuda.get_device_capability(device)
    older = [
        t for t in TARGETS if t.startswith("sm_") and int(t[3:]) <= 10 * major + minor
    ]  # TARGETS ascend
    return older[-1] if older else "sm_80"


def why_not(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run there, as one sentence; None if they can."""
    try:
        import triton
    except ImportError:
        return "The backend 'triton' needs the package triton: pip install 'fastsiu[triton]'."
    interpreted = triton.knobs.runtime.interpret
    if device.type == "cpu" and not interpreted:
        return (
            "The backend 'triton' needs a GPU: on a CPU it runs only in Triton's interpreter, "
            "with TRITON_INTERPRET=1."
        )
    if device.type not in ("cpu", "cuda"):
        return f"The backend 'triton' does not run on {device.type!r}: choose 'tiled'."
    if device.type == "cuda" and not (
        triton.knobs.build.cc or shutil.which("gcc") or shutil.which("clang")
    ):
        return (
            "The backend 'triton' needs a C compiler, with which it builds its launcher: "
            "install gcc, or choose 'tiled'."
        )
    if (
        device.type == "cuda"
        and not torch.version.hip
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return "The backend 'triton' needs compute capability 8.0 or higher: choose 'tiled'."
    if torch.float64 in dtypes and not interpreted:
        return "The backend 'triton' takes fp64 only in Triton's interpreter: choose 'tiled'."
    return None


# --------------------------------------------------------------------------------------------------
# the general path


class GeneralPlan(NamedTuple):
    """triton_general.py; splits: of the columns in its first pass; chunk: columns whose [N, chunk]
    dx are kept at a time."""

    pair: Blocks  # both logits of a tile: two accumulators
    product: (
        Blocks  # BLOCK_N as in pair, BLOCK_V its step along the columns, which divides that of pair
    )
    outer: Blocks  # a tile BLOCK_V x BLOCK_D of dW, BLOCK_N its step along the rows
    splits: int
    product_splits: int
    chunk: int
    why: str


# As above: predicted, by benches/compile_kernels.py.
PAIR = {
    "ampere": (Blocks(16, 128, 64, 4, 3), Blocks(64, 64, 64, 8, 3)),
    "hopper": (Blocks(16, 128, 64, 4, 3), Blocks(64, 64, 64, 8, 3)),
    "cdna": (Blocks(16, 128, 64, 4, 2), Blocks(64, 64, 64, 8, 2)),
    "rdna": (Blocks(16, 64, 64, 4, 2), Blocks(64, 32, 64, 8, 2)),
    "fp32": (Blocks(16, 32, 16, 8, 2),),
    "fp32 hopper": (Blocks(16, 32, 32, 4, 2),),
    "interpreter": (Blocks(16, 64, 64, 1, 1),),
}
OUTER = {
    "ampere": Blocks(32, 128, 64, 8, 3), "hopper": Blocks(64, 128, 128, 8, 3), "cdna": Blocks(32,
    128, 64, 8, 2),
    "rdna": Blocks(32, 64, 64, 8, 2), "fp32": Blocks(32, 32, 32, 4, 2), "fp32 hopper": Blocks(32,
    32, 32, 4, 2),
    "interpreter": Blocks(16, 128, 64, 1, 1),
}  # fmt: skip


def general_rows(
    target: str, dtype: torch.dtype
) -> tuple[tuple[Blocks, ...], tuple[Blocks, ...], Blocks]:
    """What `general_launch` chooses among: blocks of both logits and of the product, by ascending
    BLOCK_N; those of dW."""
    family = _family(target, dtype)
    sizes = {b.BLOCK_N: b for b in PRODUCT[family]}
    return PAIR[family], tuple(sizes[b.BLOCK_N] for b in PAIR[family]), OUTER[family]


def general_launch(
    N: int, V: int, D: int, dtype: torch.dtype, target: str, units: int | None = None
) -> GeneralPlan:
    """As `triton_launch`."""
    units = units or UNITS.get(target, 2)
    pairs, products, outer = general_rows(target, dtype)
    pair, product = next(
        (both for both in zip(pairs, products, strict=True) if both[0].BLOCK_N >= N),
        (pairs[-1], products[-1]),
    )
    up = lambda a, b: -(-a // b)
    blocks = up(N, pair.BLOCK_N)
    chunk = (
        max(1, min(up(V, pair.BLOCK_V), CHUNK // (dtype.itemsize * max(N, 1) * pair.BLOCK_V)))
        * pair.BLOCK_V
    )
    splits = split(blocks, WAVES * units, up(V, pair.BLOCK_V))
    product_splits = min(
        chunk // pair.BLOCK_V,
        split(blocks * up(D, product.BLOCK_D), units, chunk // product.BLOCK_V),
    )
    return GeneralPlan(
        pair, product, outer, splits, product_splits, chunk, f"predicted for {target}"
    )
