"""One content for each path, however often a run reads it.

A training takes longer than somebody needs to move a picture away, or to put another in its place.
What was read at first is what was trained on, so that is what manifest, digest and report are made
of, and nothing has to be there any more at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")
_FOUND: ContextVar[dict[tuple[str, Path], Any] | None] = ContextVar("found", default=None)


@contextmanager
def first_reads_count() -> Iterator[None]:
    """Inside, `once` reads each path once. An inner block belongs to the outer one. What was read
    is kept in memory up to the end of the block."""
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
