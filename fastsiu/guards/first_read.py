"""One content for each path, however often a run reads it.

A training takes longer than somebody needs to move a picture away, or to put another in its place.
What was read at first is what was trained on, so that is what manifest, digest and report are made
of, and nothing has to be there any more at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

from ..request import BadInput

T = TypeVar("T")
HELD = 256 * 2**20  # bytes of files that are kept in memory
_FOUND: ContextVar[dict[tuple[str, Path], Any] | None] = ContextVar("found", default=None)


@contextmanager
def first_reads_count() -> Iterator[None]:
    """Inside, `once` reads each path once. An inner block belongs to the outer one. What was read
    is kept in memory up to the end of the block; of files (`bytes_once`) at most `HELD`."""
    if _FOUND.get() is not None:
        yield
        return
    token = _FOUND.set({})
    try:
        yield
    finally:
        _FOUND.reset(token)


def once(what: str, path: Path, read: Callable[[], T]) -> T:
    """What `read` returns or, inside `first_reads_count`, what it returned for this path before.

    what: tells apart what different functions read from one path
    """
    found = _FOUND.get()
    if found is None:
        return read()
    key = what, path
    if key not in found:
        found[key] = read()
    return cast(T, found[key])


def bytes_once(path: Path, read: Callable[[], bytes]) -> bytes:
    """A file's bytes, as `once` has them. A file beyond `HELD` bytes in all is read again, and
    compared with the digest of the first reading.

    Raises BadInput where such a file has changed.
    """
    found = _FOUND.get()
    if found is None:
        return read()
    data, digest = found.get(("bytes", path), (None, None))
    if data is not None:
        return cast(bytes, data)
    data = read()
    now = hashlib.sha256(data).digest()
    if digest is None:
        held = sum(len(value[0] or b"") for (what, _), value in found.items() if what == "bytes")
        found["bytes", path] = (data if held + len(data) <= HELD else None, now)
    elif digest != now:
        raise BadInput(
            f"{str(path)!r} has changed since this run read it first: begin again, and leave a "
            "run's files as they are until its end."
        )
    return data
