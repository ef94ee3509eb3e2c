"""The house: who may import whom, where a module's tests are, and how long a list of parameters may
be."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "fastsiu"
# From the ground up. A module imports from its own floor and from those below it.
FLOORS = (
    ("request",),
    ("guards", "text"),
    ("pictures",),
    ("images",),
    ("kernels",),
    ("loss",),
    ("disk", "manifest", "process", "workers"),
    ("model",),
    ("judging", "verdict", "objectives"),
    ("samples",),
    ("train", "step"),
    ("session",),
    ("trainers",),
    ("evaluate", "evaluate.suites.suite", "evaluate.suites.exam"),
    ("report",),
    ("output",),
    ("settings",),
    ("driver", "facade"),
    ("disk.several_state", "workers.joining", "evaluate.eval_files"),  # what several verbs need
    (  # verbs with a story of their own
        "several",
        "independent",
        "combine",
        "merge",
        "audit",
        "push",
        "evaluate.run",
        "evaluate.suites",
        "evaluate.benchmarks.run",
    ),
    ("compare",),
    ("show",),
    ("app",),
    ("demo",),
    ("cli",),
    ("__main__",),
)


@cache
def modules() -> dict[str, Path]:
    """Dotted names below fastsiu, packages by their own name; of kernels/ only that it is there."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "kernels" and parts != ("__init__",):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(name: str, path: Path) -> set[str]:
    """Dotted names below fastsiu that a module imports, anywhere in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    known, found = modules(), set()
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = package[: len(package) - node.level + 1]
        base = [*above, *(node.module.split(".") if node.module else [])]
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            found.add(whole if whole in known else ".".join(base))
    return found - {"", name}


def floor(name: str) -> int:
    """The floor of the longest entry that the name begins with."""
    fits = [
        (len(entry), number)
        for number, entries in enumerate(FLOORS)
        for entry in entries
        if name == entry or name.startswith(entry + ".")
    ]
    assert fits, f"{name} has no place in FLOORS: give it one"
    return max(fits)[1]


@pytest.mark.parametrize("name", modules())
def test_arrows_run_downwards_only(name):
    here = floor(name)
    upwards = {other for other in imports(name, modules()[name]) if floor(other) > here}
    assert not upwards, f"{name} imports from above: {sorted(upwards)}"


def test_no_circle():
    arrows = {name: imports(name, path) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(arrows.get(name, ())):
                visit(other, (*way, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


def test_it_is_known_where_a_module_is_tested():
    tests = ROOT.parent / "tests"
    table = tomllib.loads((tests / "where.toml").read_text(encoding="utf-8"))
    assert [file for file in table if not (tests / file).is_file()] == []
    listed = [name for names in table.values() for name in names]
    files = {name: path for name, path in modules().items() if path.name != "__init__.py"}
    mirrored = {
        name
        for name, path in files.items()
        if (tests / path.relative_to(ROOT).parent / f"test_{path.stem}.py").is_file()
    }
    assert sorted([*listed, *mirrored]) == sorted(files), "each module once: its own file or here"


def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{name}.{node.name}", node)
        for name, path in modules().items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef)
    ]


# The facade, the verbs, and what the contract of the loss has as keywords.
LONG = ("facade.unlearn", "cli.", "loss.")


def test_options_that_travel_together_are_one_object():
    long = {
        name: count
        for name, node in functions()
        if (count := len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)) > 12
    }
    assert not {name for name in long if not name.startswith(LONG)}, long
