"""Reads a benchmark's files: JSON, tables of Parquet, pictures.

The files come from a stranger. Every reader raises BadInput, with one sentence, where they are
damaged.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...guards.strict_json import check, read_json
from ...images import list_images, read_bytes
from ...request import BadInput
from .form import Photo

AGAIN = "download the set again"
CACHED = ("datasets--", "models--")  # how the hub's cache names the folder of a repository


def directory(root: Path, name: str, what: str) -> Path:
    """The directory `name` of a set. Raises BadInput, which says what it should hold."""
    place = root / name if name else root
    if not place.is_dir():
        raise BadInput(f"There is no directory {place} with {what}: {AGAIN}.")
    return place


def records(path: Path, needed: Mapping[str, Any], most_bytes: bool = True) -> list[dict[str, Any]]:
    """The objects of a JSON list. needed: each key with its shape (`strict_json.check`).

    Raises BadInput with the file and the entry where one is missing or of another type.
    """
    found = read_json(path, what=str(path), remedy=AGAIN, shape=[dict])
    for number, record in enumerate(found, 1):
        fits(f"{path}, entry {number}", record, needed)
    return found


def fits(place: str, record: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """Raises BadInput where a key is missing or a value has another shape."""
    for key, shape in needed.items():
        if key not in record:
            raise BadInput(f"{place}: {key!r} is missing: {AGAIN}.")
        try:
            check(record[key], shape, repr(key))
        except ValueError as error:
            raise BadInput(f"{place}: {error}: {AGAIN}.") from error


def text(place: str, value: Any, what: str) -> str:
    """Returns `value`. Raises BadInput unless it is a text with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{place}: {what} is no text: {AGAIN}.")
    return value.strip()


def photo(root: Path, written: str, place: str) -> Photo:
    """The picture at a path that is written in a set's file. Raises BadInput where no picture is
    there, and where the path leads out of the set.

    In the hub's cache (datasets--OWNER--NAME/snapshots/REVISION) files are links into the folder
    "blobs" beside "snapshots": those belong to the set.
    """
    path = root / written
    try:
        home, target = root.resolve(), path.resolve()
        cached = [
            one.parent / "blobs"
            for one in home.parents
            if one.name == "snapshots" and one.parent.name.startswith(CACHED)
        ]
        listed = Path(os.path.normpath(home / written)).is_relative_to(home)
        inside = listed and any(target.is_relative_to(one) for one in (home, *cached))
    except (OSError, RuntimeError):  # a link to itself
        inside = False
    if not inside:
        raise BadInput(f"{place}: the picture {written!r} lies outside {root}: {AGAIN}.")
    if not path.is_file():
        raise BadInput(f"{place}: there is no picture {path}: {AGAIN}.")
    return Photo(str(path), functools.partial(read_bytes, path))


def photos(place: Path) -> tuple[Photo, ...]:
    """All pictures of a directory, sorted by name."""
    return tuple(
        Photo(str(path), functools.partial(read_bytes, path)) for path in list_images(place)
    )


# Tables -------------------------------------------------------------------------------------------


def rows(
    folder: Path, needed: Mapping[str, Any], pictures: Mapping[str, bool]
) -> Iterator[tuple[str, dict[str, Any], dict[str, tuple[Photo, ...]]]]:
    """(place for a sentence, values, pictures by column) of each row of a table.

    folder:   holds *.parquet, as a data set of the hub has them (train-00000-of-00001.parquet)
    needed:   each column with the shape of its values
    pictures: each column of pictures; True: a list of them in a row

    A table's pictures stay on disk until they are needed. Raises BadInput.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise BadInput(f"There is no Parquet file in {folder}: {AGAIN}.")
    for path in files:
        table = _opened(path)
        columns = set(table.schema_arrow.names)
        for name in (*needed, *pictures):
            if name not in columns:
                raise BadInput(f"{path} has no column {name!r}: {AGAIN}.")
        count = 0
        for group in range(table.num_row_groups):
            part = _group(path, group, tuple(needed))
            lengths = _lengths(path, group, tuple(name for name, many in pictures.items() if many))
            for at, values in enumerate(part):
                count += 1
                place = f"{path}, row {count}"
                fits(place, values, needed)
                yield (
                    place,
                    values,
                    {
                        name: tuple(
                            Photo(
                                f"{place}, {name}" + (f" {k + 1}" if many else ""),
                                functools.partial(_picture, path, group, name, at, k, place),
                            )
                            for k in range(lengths[name][at] if many else 1)
                        )
                        for name, many in pictures.items()
                    },
                )


def has_pictures(folder: Path, column: str) -> bool:
    """Does the table have this column? Raises BadInput where there is no table."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise BadInput(f"There is no Parquet file in {folder}: {AGAIN}.")
    return column in _opened(files[0]).schema_arrow.names


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise BadInput(
            "Tables of Parquet need pyarrow, which is not installed: pip install "
            "'fastsiu[benchmarks]'."
        ) from error
    return pyarrow.parquet


def _opened(path: Path) -> Any:
    """The open table. It is opened anew when the file has changed."""
    return _open(path, _state(path))


def _state(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise _damaged(path, error) from error
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _open(path: Path, state: tuple[int, int, int]) -> Any:
    parquet = _parquet()
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise _damaged(path, error) from error


def _group(path: Path, group: int, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        return list(_opened(path).read_row_group(group, columns=list(columns)).to_pylist())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _pictures(path: Path, group: int, column: str) -> list[Any]:
    """A column of one group of rows: a few hundred pictures at a time."""
    return _column(path, _state(path), group, column)


@functools.lru_cache(maxsize=2)
def _column(path: Path, state: tuple[int, int, int], group: int, column: str) -> list[Any]:
    return [row[column] for row in _group(path, group, (column,))]


def _lengths(path: Path, group: int, columns: tuple[str, ...]) -> dict[str, list[int]]:
    found = {}
    for name in columns:
        values = _pictures(path, group, name)
        if not all(isinstance(value, list) for value in values):
            raise BadInput(f"{path}: the column {name!r} holds no lists of pictures: {AGAIN}.")
        found[name] = [len(value) for value in values]
    return found


def _picture(path: Path, group: int, column: str, at: int, k: int, place: str) -> bytes:
    value = _pictures(path, group, column)[at]
    value = value[k] if isinstance(value, list) else value
    data = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(data, bytes):
        raise BadInput(f"{place}: the column {column!r} holds no picture: {AGAIN}.")
    return data


def _damaged(path: Path, error: Exception) -> BadInput:
    detail = " ".join(str(error).split()).rstrip(".")[:200]
    return BadInput(f"{path} is no readable Parquet file ({detail}): {AGAIN}.")
