"""How the Triton kernels are launched: a pure function of shape, dtype and GPU. A row of
measured.py is used where there is one, else a predicted row; `why` in the plan says which."""

from __future__ import annotations

import shutil
from functools import cache, lru_cache
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
    """How triton_sweep.py is launched.

    sums            blocks of sums_kernel
    product         blocks of product_kernel: BLOCK_N as in sums; BLOCK_V is its step along the
                    columns and divides that of sums
    splits          into how many pieces sums_kernel divides a chunk's columns
    product_splits  the same of product_kernel
    chunk           vocabulary columns per launch where the gradient is wanted; [N, chunk]
                    probabilities exist at a time
    why             where the numbers come from
    flat            sums_kernel has one loop over the steps of all its tiles; nobody has measured it
    """

    sums: Blocks
    product: Blocks
    splits: int
    product_splits: int
    chunk: int
    why: str
    flat: bool = False


TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
# multiprocessors, where no device is at hand
UNITS = dict(
    sm_80=108, sm_86=82, sm_89=128, sm_90=132, sm_100=148, sm_120=170, gfx942=304, gfx1100=96
)
SHARED_LIMIT = dict(  # bytes per block
    sm_80=166_912,
    sm_86=101_376,
    sm_89=101_376,
    sm_90=232_448,
    sm_100=232_448,
    sm_120=101_376,
    gfx942=65_536,
    gfx1100=65_536,
)
# Which load tiles by descriptor. Predicted to be faster: no addresses in registers, no masks.
# sm_120 has descriptors as well; with them the product of 64 rows spills.
TMA = ("sm_90", "sm_100")
# Bytes of a chunk's probabilities. A chunk costs two launches, some 50 us of Python. Chunks so
# small that their head rows stay in L2 for the product would cost more in launches than they save
# in bytes (50 chunks at [64, 151,936] with D 4096).
CHUNK = 2**26
WAVES = 2  # programs per multiprocessor

# Rows by family, ascending in BLOCK_N. All are predicted: the widest blocks that compile without a
# spill, with triton 3.6 and with 3.7, and within the target's shared memory
# (benches/compile_kernels.py). ampere: mma.sync; hopper: wgmma or tcgen05, which take 64 rows, so
# that a block of 32 gains nothing (notes/triton-sweep.md).
SUMS = {
    "ampere": (
        Blocks(16, 128, 64, 4, 4),
        Blocks(32, 128, 32, 4, 4),
        Blocks(64, 128, 64, 8, 3),
        Blocks(128, 128, 32, 8, 3),
    ),
    "hopper": (
        Blocks(16, 64, 64, 4, 4),
        Blocks(64, 128, 64, 8, 4),
        Blocks(128, 128, 64, 8, 4),
    ),
    "cdna": (
        Blocks(16, 128, 64, 4, 2),
        Blocks(32, 128, 64, 4, 2),
        Blocks(64, 128, 64, 8, 2),
        Blocks(128, 128, 32, 8, 2),
    ),
    "rdna": (Blocks(16, 128, 64, 4, 2), Blocks(64, 64, 64, 8, 2)),
    # no matrix instructions, since fp32 must not become TF32; `tiled` should be faster
    "fp32": (Blocks(16, 128, 16, 16, 2),),
    "fp32 amd": (Blocks(16, 32, 32, 8, 2),),
    "fp32 hopper": (Blocks(16, 256, 16, 8, 2),),
    "interpreter": (Blocks(16, 64, 64, 1, 1),),
}
PRODUCT = {
    "ampere": (
        Blocks(16, 64, 128, 8, 3),
        Blocks(32, 32, 128, 4, 4),
        Blocks(64, 64, 128, 8, 4),
        Blocks(128, 32, 128, 8, 4),
    ),
    "hopper": (
        Blocks(16, 64, 128, 8, 4),
        Blocks(64, 64, 128, 8, 4),
        Blocks(128, 64, 128, 8, 4),
    ),
    "cdna": (
        Blocks(16, 64, 128, 4, 2),
        Blocks(32, 32, 128, 4, 2),
        Blocks(64, 64, 128, 8, 2),
        Blocks(128, 32, 128, 8, 2),
    ),
    "rdna": (Blocks(16, 32, 128, 4, 2), Blocks(64, 32, 128, 8, 2)),
    "fp32": (Blocks(16, 32, 32, 8, 2),),
    "fp32 amd": (Blocks(16, 32, 32, 8, 2),),
    "fp32 hopper": (Blocks(16, 32, 64, 4, 2),),
    "interpreter": (Blocks(16, 32, 64, 1, 1),),
}
FAMILY = dict(
    sm_80="ampere",
    sm_86="ampere",
    sm_89="ampere",
    sm_90="hopper",
    sm_100="hopper",
    sm_120="ampere",
    gfx942="cdna",
    gfx1100="rdna",
    interpreter="interpreter",
)
FP32 = dict(ampere="fp32", hopper="fp32 hopper", cdna="fp32 amd", rdna="fp32 amd")
# Most rows of a block where a second Sums or a softcap needs registers: a larger block spills.
HEAVY = dict(ampere=32, hopper=64, cdna=64, rdna=64, interpreter=64)


def heaviest(target: str) -> int:
    return HEAVY[FAMILY[target]]


def _family(target: str, dtype: torch.dtype) -> str:
    family = FAMILY[target]
    return FP32.get(family, family) if dtype.itemsize > 2 else family


def rows(target: str, dtype: torch.dtype) -> tuple[tuple[Blocks, ...], tuple[Blocks, ...]]:
    """The blocks that `triton_launch` chooses from: of the sums and of the product, by ascending
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
    """The plan of triton_sweep.py for N rows, vocabulary V and hidden size D.

    dtype   of the operands of the products
    target  a key of FAMILY
    units   multiprocessors; None: the target's in UNITS
    heavy   two Sums, or a softcap
    """
    # plans are measured with one Sums; two need more registers
    row = None if heavy else nearest(measured.PLANS, target, dtype, N)
    return _planned(row, N, V, D, dtype, target, units or UNITS.get(target, 2), heavy, CHUNK)


@lru_cache(maxsize=4096)
def _planned(
    row: tuple | None,
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    target: str,
    units: int,
    heavy: bool,
    most: int,
) -> Plan:
    """`triton_launch`, computed once for each shape: `split` tries hundreds of numbers, which
    takes some 200 us.

    row   of measured.PLANS
    most  bytes of a chunk where there is no such row
    """
    if row:
        blocks, product_blocks, waves, chunk, why = row
        sums, product = Blocks(*blocks), Blocks(*product_blocks)
        return plan_of(sums, product, waves, chunk, N, V, D, dtype, units, why)
    choices = [
        pair
        for pair in zip(*rows(target, dtype), strict=True)
        if not heavy or pair[0].BLOCK_N <= heaviest(target)
    ]
    sums, product = next((pair for pair in choices if pair[0].BLOCK_N >= N), choices[-1])
    return plan_of(sums, product, WAVES, most, N, V, D, dtype, units, f"predicted for {target}")


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
    """The plan of one row of blocks at a shape.

    waves  programs per multiprocessor that the splits aim at
    chunk  bytes of probabilities
    """
    up = lambda a, b: -(-a // b)
    blocks = up(N, sums.BLOCK_N)
    columns = _columns(N, V, sums.BLOCK_V, chunk, dtype)
    splits = split(blocks, waves * units, columns // sums.BLOCK_V)
    product_splits = min(
        splits, split(blocks * up(D, product.BLOCK_D), units, columns // product.BLOCK_V)
    )
    return Plan(sums, product, splits, product_splits, columns, why)


def _columns(N: int, V: int, BLOCK_V: int, chunk: int, dtype: torch.dtype) -> int:
    """Vocabulary columns whose [N, columns] numbers take about `chunk` bytes: a multiple of
    BLOCK_V."""
    tiles = min(-(-V // BLOCK_V), chunk // (dtype.itemsize * max(N, 1) * BLOCK_V))
    return max(1, tiles) * BLOCK_V


def split(programs: int, slots: int, steps: int) -> int:
    """Into how many pieces to divide the `steps` of each program, so that the last piece ends
    earliest where `slots` programs run at a time. Chooses the fewest pieces among equals, and adds
    at most one wave of programs."""
    up, programs = lambda a, b: -(-a // b), max(1, programs)  # without rows there are no programs
    most = min(steps, up(2 * slots, programs))
    return min(range(1, most + 1), key=lambda s: (up(programs * s, slots) * up(steps, s), s))


def measured_backend(target: str, dtype: torch.dtype, N: int) -> tuple[str, str] | None:
    """The faster of "tiled" and "triton" on a target, and the place of the measurement; None
    without a measurement."""
    return nearest(measured.BACKENDS, target, dtype, N)


def nearest(
    table: dict[tuple[str, str, int], tuple], target: str, dtype: torch.dtype, N: int
) -> tuple | None:
    """The entry with the smallest measured N that is not below N. Where all are below, the one with
    the largest."""
    if not table:
        return None
    keys = sorted(key for key in table if key[:2] == (target, str(dtype).removeprefix("torch.")))
    if not keys:
        return None
    return table[next((key for key in keys if key[2] >= N), keys[-1])]


def target_of(device: torch.device) -> str:
    """The device's name in TARGETS, or the nearest one below it; "interpreter" for a CPU."""
    return "interpreter" if device.type != "cuda" else _target(device)


@cache
def _target(device: torch.device) -> str:
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if name in TARGETS:
            return name
        return "gfx942" if name.startswith("gfx9") else "gfx1100"
    major, minor = _capability(device)
    known = [t for t in TARGETS if t.startswith("sm_")]  # ascending
    older = [t for t in known if int(t[3:]) <= 10 * major + minor]
    return older[-1] if older else "sm_80"


@cache
def units_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 in the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _compiler() -> bool:
    """Is there a C compiler, with which Triton builds its launcher? A search through PATH."""
    import triton

    return bool(triton.knobs.build.cc or shutil.which("gcc") or shutil.which("clang"))


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on a device, as one sentence; None if they can."""
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
    if device.type == "cuda" and not _compiler():
        return (
            "The backend 'triton' needs a C compiler, with which it builds its launcher: "
            "install gcc, or choose 'tiled'."
        )
    if device.type == "cuda" and not torch.version.hip and _capability(device) < (8, 0):
        return "The backend 'triton' needs compute capability 8.0 or higher: choose 'tiled'."
    if torch.float64 in dtypes and not interpreted:
        return "The backend 'triton' takes fp64 only in Triton's interpreter: choose 'tiled'."
    return None


# --------------------------------------------------------------------------------------------------
# the general path


class GeneralPlan(NamedTuple):
    """How triton_general.py is launched.

    pair            blocks of both logits of a tile: two accumulators
    product         BLOCK_N as in pair; BLOCK_V is its step along the columns and divides that of
                    pair
    outer           a tile BLOCK_V x BLOCK_D of dW; BLOCK_N is its step along the rows
    splits          into how many pieces the first pass divides the columns
    product_splits  the same of product_kernel, within a chunk
    chunk           vocabulary columns per launch of the second pass; dx [N, chunk] exists at a time
    why             where the numbers come from
    """

    pair: Blocks
    product: Blocks
    outer: Blocks
    splits: int
    product_splits: int
    chunk: int
    why: str


# Predicted, as above, by benches/compile_kernels.py.
PAIR = {
    "ampere": (Blocks(16, 128, 64, 4, 3), Blocks(64, 64, 64, 8, 3)),
    "hopper": (Blocks(16, 128, 64, 4, 3), Blocks(64, 64, 64, 8, 3)),
    "cdna": (Blocks(16, 128, 64, 4, 2), Blocks(64, 64, 64, 8, 2)),
    "rdna": (Blocks(16, 64, 64, 4, 2), Blocks(64, 32, 64, 8, 2)),
    "fp32": (Blocks(16, 32, 16, 8, 2),),
    "fp32 amd": (Blocks(16, 32, 16, 8, 2),),
    "fp32 hopper": (Blocks(16, 64, 32, 8, 2),),
    "interpreter": (Blocks(16, 64, 64, 1, 1),),
}
OUTER = {
    "ampere": Blocks(32, 128, 64, 8, 3),
    "hopper": Blocks(64, 128, 128, 8, 3),
    "cdna": Blocks(32, 128, 64, 8, 2),
    "rdna": Blocks(32, 64, 64, 8, 2),
    "fp32": Blocks(32, 32, 32, 4, 2),
    "fp32 amd": Blocks(32, 32, 32, 4, 2),
    "fp32 hopper": Blocks(32, 32, 32, 4, 2),
    "interpreter": Blocks(16, 128, 64, 1, 1),
}


def general_rows(
    target: str, dtype: torch.dtype
) -> tuple[tuple[Blocks, ...], tuple[Blocks, ...], Blocks]:
    """The blocks that `general_launch` chooses from: of both logits and of the product, by
    ascending BLOCK_N; and the blocks of dW."""
    family = _family(target, dtype)
    sizes = {b.BLOCK_N: b for b in PRODUCT[family]}
    return PAIR[family], tuple(sizes[b.BLOCK_N] for b in PAIR[family]), OUTER[family]


def general_launch(
    N: int, V: int, D: int, dtype: torch.dtype, target: str, units: int | None = None
) -> GeneralPlan:
    """The plan of triton_general.py; arguments as `triton_launch`."""
    return _generally_planned(N, V, D, dtype, target, units or UNITS.get(target, 2), CHUNK)


@lru_cache(maxsize=4096)
def _generally_planned(
    N: int, V: int, D: int, dtype: torch.dtype, target: str, units: int, most: int
) -> GeneralPlan:
    pairs, products, outer = general_rows(target, dtype)
    pair, product = next(
        (both for both in zip(pairs, products, strict=True) if both[0].BLOCK_N >= N),
        (pairs[-1], products[-1]),
    )
    up = lambda a, b: -(-a // b)
    blocks = up(N, pair.BLOCK_N)
    chunk = _columns(N, V, pair.BLOCK_V, most, dtype)
    splits = split(blocks, WAVES * units, up(V, pair.BLOCK_V))
    product_splits = min(
        chunk // pair.BLOCK_V,
        split(blocks * up(D, product.BLOCK_D), units, chunk // product.BLOCK_V),
    )
    return GeneralPlan(
        pair, product, outer, splits, product_splits, chunk, f"predicted for {target}"
    )
