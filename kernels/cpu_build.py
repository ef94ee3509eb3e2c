"""The C++ of cpu/sweep.cpp as a library: built by ninja, one for each level of the processor.

Where torch is installed, setup.py builds all levels into the package. Elsewhere the first use
builds the processor's level into a cache directory (notes/cpu-kernel.md says why). The library has
a plain C interface, without the headers of Python or torch, so one build serves every version of
both. This file imports only the standard library, because setup.py loads it without the package.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "cpu" / "sweep.cpp"
FLAGS = "-std=c++17 -O3 -fPIC -shared -fvisibility=hidden -ffp-contract=fast -pthread"
# Level -> (what the processor must have, as Linux names it; the compiler's flags), best first.
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
_HAS_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
LEVELS: dict[str, tuple[tuple[str, ...], str]] = {
    "amx": (
        (*_HAS_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"),
        f"{_AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
    ),
    "avx512_bf16": ((*_HAS_AVX512, "avx512_bf16"), f"{_AVX512} -mavx512bf16"),
    "avx512": (_HAS_AVX512, _AVX512),
    "avx2": (("avx2", "fma"), "-mavx2 -mfma"),
    "portable": ((), ""),
}


class CannotBuild(Exception):
    """Why there is no library, as one sentence."""


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; nothing on other systems."""
    if sys.platform != "linux":
        return {}
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}


def maker() -> str:
    """Who made the processor: "Intel", "AMD", or "another" where Linux names neither."""
    vendor = _cpuinfo().get("vendor_id", "")
    return {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}.get(vendor, "another")


@functools.cache
def executes() -> tuple[str, ...]:
    """The levels that this processor executes, best first; none on an unknown operating system."""
    if sys.platform not in ("linux", "darwin"):
        return ()
    has = set(_cpuinfo().get("flags", "").split()) if platform.machine() == "x86_64" else set()
    return tuple(level for level, (needs, _) in LEVELS.items() if has.issuperset(needs))


def compiles() -> tuple[str, ...]:
    """All levels for this kind of processor, also those that this one cannot execute."""
    return tuple(LEVELS) if platform.machine() in ("x86_64", "AMD64") else ("portable",)


def build(directory: Path, levels: tuple[str, ...]) -> list[Path]:
    """Compiles the levels into `directory`, in parallel, and returns the libraries.

    Raises CannotBuild where compiler or ninja are missing or fail.
    """
    compiler, ninja = _compiler(), _ninja()
    directory.mkdir(parents=True, exist_ok=True)
    escaped = str(SOURCE).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
    rules = [
        "rule library",
        f"  command = {shlex.quote(compiler).replace('$', '$$')} {FLAGS} $flags $in -o $out",
    ]
    for level in levels:
        rules += [f"build {name_of(level)}: library {escaped}", f"  flags = {LEVELS[level][1]}"]
    (directory / "build.ninja").write_text("\n".join(rules) + "\n", encoding="utf-8")
    done = subprocess.run([ninja, "-C", str(directory)], capture_output=True, text=True)
    for rest in ("build.ninja", ".ninja_log", ".ninja_deps"):
        (directory / rest).unlink(missing_ok=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        errors = [line for line in said if "error" in line] or said[-1:] or ["it says nothing"]
        raise CannotBuild(f"The compiler {compiler} fails on the CPU kernel: {errors[0][:200]}.")
    return [directory / name_of(level) for level in levels]


def name_of(level: str) -> str:
    return f"sweep_{level}.so"


@functools.cache
def load(level: str) -> ctypes.CDLL:
    """The loaded library of a level; builds it where there is none yet.

    Raises CannotBuild, with one sentence, where that is not possible.
    """
    ahead = SOURCE.parent / name_of(level)  # from setup.py
    loaded = ctypes.CDLL(str(ahead if ahead.exists() else _cached(level)))
    loaded.fastsiu_workspace.restype = ctypes.c_int64
    if loaded.fastsiu_prepare():
        raise CannotBuild(f"The operating system does not let a process use {level}.")
    return loaded


@functools.cache
def why_not(level: str) -> str | None:
    """Loads the library of a level. Returns None, or why there is none, as one sentence."""
    try:
        load(level)
    except CannotBuild as error:
        return str(error)
    except OSError as error:
        return f"The CPU kernel's library cannot be written or loaded: {error}."
    return None


def _cached(level: str) -> Path:
    """The library in the cache directory, which is built where it is missing.

    The name of its directory is a digest of the source, the flags and the compiler.
    """
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [SOURCE.read_text(encoding="utf-8"), FLAGS, LEVELS[level][1], compiler, version]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsiu"
    found = home / f"cpu-{key}" / name_of(level)
    if found.exists():
        return found
    logging.getLogger(__name__).warning(
        "Compiling the CPU kernel of the loss (%s) once, a few seconds, into %s.",
        level,
        found.parent,
    )
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        made = build(Path(scratch) / "made", (level,))[0].parent
        try:
            made.rename(found.parent)  # so that nobody sees half of it
        except OSError:
            if not found.exists():  # another process has been faster
                raise
    return found


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise CannotBuild("The CPU kernel needs a C++ compiler: install g++ or clang++.")


def _ninja() -> str:
    if path := shutil.which("ninja"):
        return path
    beside = Path(sys.executable).parent / "ninja"  # pip's, in an environment that is not activated
    if beside.exists():
        return str(beside)
    raise CannotBuild("The CPU kernel is built by ninja: pip install ninja.")
