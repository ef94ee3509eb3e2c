"""Which packages the GPU campaign has, and whether they are the releases that its steps need:
looked at before anything is made.

What is needed stands in pyproject.toml and nowhere else. A machine without a network gets missing
packages as wheels in a folder (`benches/gpu.sh --wheels DIR`): they are unpacked beside everything
else, and come first on the path of the steps.

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d DIR \\
        'transformers==5.24.0' 'anyascii<0.3.4' bitsandbytes liger-kernel orda-kernel \\
        cut-cross-entropy flash-linear-attention fla-core
"""

from __future__ import annotations

import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# The loss knows neither transformers nor any tokenizer; its tests want these as well.
LOSS, TESTS = ("torch", "numpy"), ("pytest", "hypothesis", "pytest-benchmark")
NEEDS = {  # a step's distributions, of those in pyproject.toml; None: all that the package requires
    "tests": (*LOSS, "triton", *TESTS),
    "ours": (*LOSS, "triton"),
    "rivals": (*LOSS, "triton"),
    "tune": (*LOSS, "triton"),
    "tuned": (*LOSS, "triton"),
    "memcheck": (*LOSS, "triton", *TESTS),
    "racecheck": (*LOSS, "triton", *TESTS),
    "study": (*LOSS, "triton"),
    "real": None,
    "apply": None,
}
EXTRAS = ("triton", "test")  # of pyproject.toml, where NEEDS has names from
OPTIONAL = {  # what is left out without it
    "bitsandbytes": "the variants in NF4",
    "liger-kernel": "rivals of Liger",
    "orda-kernel": "the rival orda",
    "flash-linear-attention": "the rival fla",
    "cut-cross-entropy": "the rival Cut Cross-Entropy",
    "unsloth-zoo": "the rival unsloth_zoo",
    "flash-attn": "the variant with flash-attn",
}


class BadInput(Exception):
    """One sentence: fact and remedy."""


def unpack(folder: Path, into: Path) -> list[str]:
    """Unpacks a folder's wheels and puts them first on this process's path; returns "name version"
    of each. Raises BadInput where one is not for this Python or there twice."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder: give one with wheels.")
    paths = sorted(folder.glob("*.whl"))
    if not paths:
        raise BadInput(f"{folder} has no wheels: give another one.")
    known, found = set(sys_tags()), {}
    for path in paths:
        try:
            name, release, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            raise BadInput(f"{path} has not the name of a wheel: remove it.") from None
        if not tags & known:
            python = ".".join(map(str, sys.version_info[:2]))
            raise BadInput(f"{path} is not for Python {python} on this machine: take another one.")
        if name in found:
            raise BadInput(f"{folder} holds {name} twice: keep one of them.")
        found[name] = str(release)
        with zipfile.ZipFile(path) as wheel:
            if any(member.split("/")[0].endswith(".data") for member in wheel.namelist()):
                raise BadInput(f"{path} has to be installed and not unpacked: leave it out.")
            wheel.extractall(into)
    sys.path.insert(0, str(into))
    return [f"{name} {release}" for name, release in found.items()]


def required() -> tuple[dict[str, Requirement], tuple[str, ...]]:
    """pyproject.toml's requirements by name, and the names of those that the package itself has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    named = lambda lines: {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    own = named(project["dependencies"])
    return named(extras) | own, tuple(own)


def release(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def lacking(step: str) -> str | None:
    """Why a step cannot run with the packages that are here, as one sentence; None if it can."""
    wanted, own = required()
    names = NEEDS.get(step, ())
    wrong = []
    for name in own if names is None else names:
        needed, here = wanted[canonicalize_name(name)], release(name)
        if here is None:
            wrong.append(f"{needed} (not installed)")
        elif not needed.specifier.contains(here, prereleases=True):
            wrong.append(f"{needed} (here is {here})")
    if not wrong:
        return None
    return (
        f"The step {step} needs {', '.join(wrong)}: put a wheel of each into the folder --wheels."
    )


def left_out() -> list[str]:
    """A line for each optional package that is not here."""
    return [
        f"{name} is not installed: {what} left out"
        for name, what in OPTIONAL.items()
        if release(name) is None
    ]


def no_interpreter() -> str | None:
    """Why Triton's interpreter cannot rehearse here, as one sentence; None if it can."""
    triton, numpy = release("triton"), release("numpy")
    older = lambda text, than: tuple(map(int, (text or "0").split(".")[:2])) < than
    if triton and older(triton, (3, 7)) and not older(numpy, (2, 4)):
        return (
            f"The interpreter of triton {triton} fails with numpy {numpy}: rehearse with numpy "
            "below 2.4. (On a GPU the pair works.)"
        )
    return None
