"""The files of a directory: are they still as written, are they what is deployed, and which of them
may go.

Only what this program wrote is ever removed: files whose names their manifest lists, and hidden
directories with a name of ours. Files of others beside them stay, and are named.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import manifest
from ..guards.strict_json import read_json
from ..manifest import KEY, MANIFEST, REPORT, TEMPLATES, loadable
from ..request import BadInput
from ..workers import claims
from ..workers.claims import Pace
from . import staging

# The table of a directory with several results -> the format that it names; `BESIDE` has the other
# files that are written beside it.
TABLES = {
    "suite.json": "fastsiu suite evaluation 1",
    "compare.json": "fastsiu comparison 1",
    "matrix.json": None,
    "requests.json": "fastsiu requests 1",
}
BESIDE = {
    "suite.json": ("report.md", "run.toml"),
    "compare.json": ("compare.md", "compare.png", "compare.svg", "run.toml"),
    "matrix.json": (),
    "requests.json": (),
}
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
OF_EVALUATION = (REPORT, "untouched.json")  # JSON that no loader reads


@dataclass
class Checked:
    """The result of `verify`.

    files: the number of files that were read
    wrong: a sentence for each file that is not as written
    """

    files: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass
class Found:
    """The result of `survey`.

    dead:    leftovers of killed runs
    alive:   unfinished results of runs that are at work, and claims of workers that are
    unknown: those among `alive` that this machine has not made, or not since it was last started
    stopped: claims of workers that have stopped (`workers.claims`)
    results: directories with a result
    """

    dead: list[Path] = field(default_factory=list)
    alive: list[Path] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)
    stopped: list[Path] = field(default_factory=list)
    results: list[Path] = field(default_factory=list)


def verify(directory: Path, model: Path | None = None) -> Checked:
    """Compares every file of an output, or of all outputs in a directory, with its manifest.

    model: a directory with the deployed files. Where the output is a merge, they must be the files
           that the merge wrote. Where it is an adapter, they must be the adapter's files; if
           `model` holds no adapter, the files of the model that the adapter was made for.

    Raises BadInput where there is no output, and where no manifest tells what `model` should be.
    """
    checked = Checked()
    places = _outputs(directory)
    checked.wrong += _lost(directory)
    for place in places:
        sealed = manifest.read(place)
        checked.files += len(sealed["files"]) + 1
        checked.wrong += [
            f"{place / name} {what}." for name, what in manifest.changed(place, sealed).items()
        ]
    if model is not None:
        if len(places) != 1:
            raise BadInput(
                f"{directory} holds {len(places)} outputs: give the one that {model} is to be "
                "compared with."
            )
        _compare(manifest.read(places[0]), model, checked)
    return checked


def claimed(directory: Path) -> list[Path]:
    """The claims of workers that share an output, in a directory and in the outputs in it."""
    if not directory.is_dir():
        return []
    places = [directory, *(p for p in _entries(directory) if p.is_dir() and not p.is_symlink())]
    return [path for place in places for path in claims.at_work(place)]


def survey(directory: Path, pace: Pace = Pace()) -> Found:
    """The files that can be purged. Where there are claims (`claimed`), it watches their heartbeats
    for `pace.patience` seconds. Raises BadInput where `directory` is no directory."""
    if not directory.is_dir():
        raise BadInput(
            f"There is no directory {directory}: give the one that runs were started in, or an "
            "--output."
        )
    left = staging.leftovers(directory)
    dead = [path for path in left if staging.is_dead(path)]
    results = (
        [directory] if _is_result(directory) else [p for p in _entries(directory) if _is_result(p)]
    )
    alive = [path for path in left if path not in dead]
    unknown = [path for path in alive if not staging.is_from_here(path)]
    taken = claimed(directory)
    stopped = claims.stopped(taken, pace)
    beating = [path for path in taken if path not in stopped]
    return Found(dead, [*alive, *beating], unknown, stopped, results)


def remove(result: Path) -> list[Path]:
    """Removes a result, its manifest last. Returns the files in it that this program did not write;
    they stay."""
    if (result / MANIFEST).is_file():
        listed = [result / name for name in manifest.read(result)["files"]]
        files = [*listed, result / KEY, result / MANIFEST]
    else:
        files = [
            result / name
            for table in TABLES
            for name in (*BESIDE[table], table)
            if (result / table).is_file()
        ]
        for place in _entries(result):
            if not place.is_symlink() and (place / MANIFEST).is_file() and _is_result(place):
                remove(place)
        files = [*claims.files(result), *files]  # the table last
    root = result.resolve()
    for path in files:
        # a directory in it may be a link to elsewhere
        inside = path.parent.resolve().is_relative_to(root)
        if inside and (path.is_file() or path.is_symlink()):
            path.unlink()
    for folder in sorted({path.parent for path in files}, reverse=True):
        if folder.resolve().is_relative_to(root) and not folder.is_symlink():
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()
    return sorted(result.rglob("*")) if result.is_dir() else []


def _outputs(directory: Path) -> list[Path]:
    if (directory / MANIFEST).is_file():
        return [directory]
    if any((directory / table).is_file() for table in TABLES):
        if found := [place for place in _entries(directory) if (place / MANIFEST).is_file()]:
            return found
    raise BadInput(
        f"{directory} is no output of FastSIU (it has no {MANIFEST}): give the --output "
        "directory of a run."
    )


def _lost(directory: Path) -> list[str]:
    """A sentence for a directory's table that was changed, and for each output that it names and
    that is not there."""
    table = next((name for name in TABLES if (directory / name).is_file()), None)
    if table is None or (directory / MANIFEST).is_file():
        return []
    shape = {"concepts": [dict], "requests": [dict]}
    stored = read_json(
        directory / table, what=str(directory / table), remedy="restore it", shape=shape
    )
    changed = [] if manifest.is_as_sealed(stored) else [f"{directory / table} is not as written."]
    done = [
        entry.get("slug") or entry.get("output")
        for entry in (*stored.get("concepts", ()), *stored.get("requests", ()))
        if entry.get("status") not in ("failed", "", None)
    ]
    return changed + [
        f"{directory / name} is missing, which {table} names."
        for name in done
        if isinstance(name, str) and not (directory / name / MANIFEST).is_file()
    ]


def _compare(sealed: dict[str, Any], model: Path, checked: Checked) -> None:
    """Adds to `checked` the files of `model` that are not those of the manifest."""
    if not model.is_dir():
        raise BadInput(
            f"There is no directory {model}: give the one with the files that are deployed."
        )
    written = {name: entry.get("sha256") for name, entry in sealed["files"].items()}
    if "merge" in sealed:
        expected = {
            n: sha
            for n, sha in written.items()
            if n.rpartition("/")[0] in ("", TEMPLATES) and n not in OF_EVALUATION and loadable(n)
        }
        here = _parts(model)
    elif any((model / name).is_file() for name in ADAPTER):
        expected = {name: sha for name, sha in written.items() if name in ADAPTER}
        here = {
            p.name: p
            for p in _entries(model)
            if p.is_file() and p.name.startswith("adapter_") and loadable(p.name)
        }
    else:
        expected = dict((sealed.get("model") or {}).get("sha256") or {})
        here = {p.name: p for p in _entries(model) if p.is_file() and p.suffix in manifest.OF_MODEL}
    for name in (*OF_EVALUATION, MANIFEST):
        here.pop(name, None)
    if not expected:
        raise BadInput(
            f"The manifest tells nothing of the files that {model} should have: give another "
            "output."
        )
    # of a redacted manifest: numbers stand for their names
    if all(name.isdigit() for name in expected):
        known = set(expected.values())
        digests = {name: manifest.digest_file(path) for name, path in here.items()}
        checked.wrong += [
            f"{here[name]} is none of the manifest's."
            for name, sha in digests.items()
            if sha not in known
        ]
        if missing := len(known - set(digests.values())):
            checked.wrong.append(f"{model} lacks {missing} of the manifest's files.")
    else:
        for name, sha in expected.items():
            if name not in here:
                checked.wrong.append(f"{model / name} is missing.")
            elif manifest.digest_file(here[name]) != sha:
                checked.wrong.append(f"{model / name} is not the manifest's.")
        checked.wrong += [f"{model / name} was added." for name in here if name not in expected]
    checked.files += len(expected)


def _parts(model: Path) -> dict[str, Path]:
    """The files of a model's directory that a loader may read, by their names in it."""
    templates = model / TEMPLATES
    places = [*_entries(model), *(_entries(templates) if templates.is_dir() else ())]
    return {
        path.relative_to(model).as_posix(): path
        for path in places
        if path.is_file() and loadable(path.name)
    }


def _is_result(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        if (path / MANIFEST).is_file():
            return bool(manifest.read(path))
        for table, form in TABLES.items():
            if (path / table).is_file():
                stored = read_json(path / table, what=table, remedy="leave it", shape=dict)
                return (
                    stored.get("format") == form
                    if form
                    else {"mode", "order", "matrix", "requests"} <= set(stored)
                )
    except (BadInput, OSError):
        pass
    return False


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())
