"""JSON from outside: bounded in size, depth and numbers, and of the shape that the reader expects.

Python's own reader takes NaN and Infinity, keeps the last of two equal keys, and dies of deep
nesting.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..request import BadInput
from .small_file import MOST_BYTES, read_bytes, reason

DEEPEST = 100  # lists and objects inside each other
LARGEST = 1e300  # of a number: sums of larger ones may be infinite

# What a value has to be:
#   a type                a value of that type (bool is no int here)
#   None                  null
#   (shape, shape)        one of several shapes
#   [shape]               a list of such values
#   {"*": shape}          an object with any keys
#   {"key": shape, ...}   an object; a value under one of these keys has that shape
Shape = Any


def read_json(source: Path | str, *, what: str, remedy: str, shape: Shape = None) -> Any:
    """The value in a file (a Path) or in a text (a str).

    what, remedy: for the sentence, "{what} is no usable JSON (...): {remedy}."
    shape:        what the value has to be (`check`); None: anything

    Raises BadInput for a file that cannot be read, for a text that is no JSON, and for another
    shape. Also for more than `MOST_BYTES`, for a nesting deeper than `DEEPEST`, and for a number
    that is not finite.
    """
    try:
        value = parse_json(_text(source) if isinstance(source, Path) else source)
        if shape is not None:
            check(value, shape)
    except (OSError, ValueError) as error:
        raise BadInput(f"{what} is no usable JSON ({reason(error)}): {remedy}.") from error
    return value


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError with a reason for what `read_json` refuses."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 2**20} MiB")
    try:
        value = json.loads(
            text.removeprefix("\ufeff"),
            parse_constant=_no_constant,
            parse_float=_float,
            parse_int=_int,
            object_pairs_hook=_object,
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    _check_depth(value)
    return value


def check(value: Any, shape: Shape, where: str = "it") -> None:
    """Raises ValueError, which names the place, where `value` does not have `shape`."""
    if isinstance(shape, tuple):
        if not any(_has(value, one) for one in shape):
            raise ValueError(f"{where} is {_kind(value)}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is {_kind(value)}, not a list")
        for number, item in enumerate(value, 1):
            check(item, shape[0], f"entry {number} of {where}")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {_kind(value)}, not an object")
        for key, item in value.items():
            if key in shape or "*" in shape:
                check(item, shape.get(key, shape.get("*")), repr(key))
    elif not _has(value, shape):
        wanted = "null" if shape is None else _NAMES[shape]
        raise ValueError(f"{where} is {_kind(value)}, not {wanted}")


_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _has(value: Any, shape: Shape) -> bool:
    if shape is None:
        return value is None
    if isinstance(shape, type):
        if shape is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
    try:
        check(value, shape)
    except ValueError:
        return False
    return True


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES[type(value)]


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise ValueError(f"it holds a number beyond {LARGEST:g}")
    return value


def _int(text: str) -> int:
    if len(text) > 20:
        raise ValueError("it holds a whole number of more than 20 digits")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


def _check_depth(value: Any) -> None:
    """Walks level by level: a recursive walk would need the deep stack that it has to forbid."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
        inside: list[Any] = []
        for one in level:
            if isinstance(one, dict | list):
                inside += one.values() if isinstance(one, dict) else one
        level = [one for one in inside if isinstance(one, dict | list)]
