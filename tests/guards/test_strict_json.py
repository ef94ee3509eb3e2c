"""JSON from outside: what is refused, with which reason, and what is read."""

from __future__ import annotations

import json

import pytest

from fastsiu.guards.strict_json import DEEPEST, check, parse_json, read_json
from fastsiu.request import BadInput

REMEDY = "write it again"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('{"a": NaN}', "NaN"),
        ('{"a": [-Infinity]}', "-Infinity"),
        ('{"a": 1e999}', "beyond 1e\\+300"),
        ("1e301", "beyond 1e\\+300"),
        ("9" * 21, "more than 20 digits"),
        ("9" * 5000, "more than 20 digits"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' stands twice"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "deeper than"),
        ("[" * 100_000, "deeper than"),
        ('{"a":' * 100_000, "deeper than"),
        ('{"a":' * 200 + "1" + "}" * 200, "deeper than"),
        ("1 2", "Extra data"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_json(text)
    with pytest.raises(BadInput, match=rf"^The list is no usable JSON \(.*{says}.*: {REMEDY}\.$"):
        read_json(text, what="The list", remedy=REMEDY)


@pytest.mark.parametrize("depth", [1, 2, DEEPEST])
def test_what_is_not_too_deep(depth):
    assert parse_json("[" * depth + "]" * depth) == json.loads("[" * depth + "]" * depth)


def test_a_file(tmp_path):
    file = tmp_path / "a.json"
    for data, says in (
        (None, "no such file"),
        (b"\xff\xfe[", "not UTF-8"),
        (b"[" + b" " * (64 * 2**20) + b"]", "larger than 64 MiB"),
    ):
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(BadInput, match=says):
            read_json(file, what=str(file), remedy=REMEDY)
    file.write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, null, true, "x"]}')
    assert read_json(file, what="x", remedy=REMEDY) == {"a": [1, 2.5, None, True, "x"]}
    with pytest.raises(BadInput, match="it is a directory"):
        read_json(tmp_path, what="x", remedy=REMEDY)


@pytest.mark.parametrize(
    ("value", "shape", "says"),
    [
        ([], {}, "it is a list, not an object"),
        ({"a": 1}, {"a": str}, "'a' is a whole number, not a string"),
        ({"a": True}, {"a": int}, "'a' is true or false, not a whole number"),
        ({"a": {"b": [1, "2"]}}, {"a": {"b": [int]}}, "entry 2 of 'b' is a string, not a whole"),
        ({"x": {"n": "1"}}, {"*": {"n": float}}, "'n' is a string, not a number"),
        ({"a": None}, {"a": (str, int)}, "'a' is null"),
        ({"a": 0}, {"a": None}, "'a' is a whole number, not null"),
        ([1], [{"a": int}], "entry 1 of it is a whole number, not an object"),
    ],
)
def test_another_shape(value, shape, says):
    with pytest.raises(ValueError, match=says):
        check(value, shape)
    with pytest.raises(BadInput, match=says):
        read_json(json.dumps(value), what="It", remedy=REMEDY, shape=shape)


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ({"a": 1, "more": []}, {"a": int, "b": str}),
        ({"a": 1}, {"a": float}),
        ({"a": None}, {"a": (None, str)}),
        ({"a": {"f": {"bytes": 3}}}, {"a": {"*": {"bytes": int}}}),
        ([[1.5], []], [[float]]),
        (True, bool),
    ],
)
def test_a_shape_that_fits(value, shape):
    check(value, shape)
