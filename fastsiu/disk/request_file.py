"""A file of requests: one JSON object a line, with the fields of `Request`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..guards.small_file import read_text
from ..guards.strict_json import parse_json
from ..request import BadInput, Request
from ..text.concept import concept_of
from ..text.names import Names

PATHS = ("image", "images", "retain", "data")
WORDS = {"image": "its picture", "images": "its images", "retain": "its retain", "data": "its data"}


def read_requests(path: Path) -> list[tuple[int, Request]]:
    """(line number, request) of each line: an object with "image" and "concept", and the other
    fields of `Request` as needed.

    Paths count from the file's own directory. Raises BadInput with the line's number.
    """
    text = read_text(path, remedy="give a JSONL file with one request a line")
    lines = text.split("\n")  # not splitlines: JSON strings may hold U+2028
    found: list[tuple[int, Request]] = []
    names = Names()  # of all requests but the last
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = _request(parse_json(line), path.parent)
        except (ValueError, TypeError) as error:
            text = str(error).rstrip(".")
            raise BadInput(
                f"{path}, line {number}: {text}. A line is an object with 'image' and 'concept'."
            ) from error
        earlier = names.first(request.concept)
        if earlier is None and found:
            last, other = found[-1]
            names.add(concept_of(other), last)
            earlier = names.first(request.concept)
        if earlier is not None:
            raise BadInput(
                f"{path}, line {number}: {request.concept} is asked for on line {earlier} "
                "already: remove one."
            )
        found.append((number, request))
    if not found:
        raise BadInput(
            f"{path} holds no request: write one JSON object with 'image' and 'concept' a line."
        )
    return found


def _request(record: Any, base: Path) -> Request:
    known = {f.name for f in fields(Request)}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(k), str) for k in ("image", "concept")
    ):
        raise ValueError("'image' and 'concept' must be strings")
    if unknown := sorted(set(record) - known):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(sorted(known))}")
    values: dict[str, Any] = {"concept": record["concept"].strip()}
    for key in PATHS:
        if record.get(key) is not None:
            if not record[key]:
                raise ValueError(f"{key!r} is empty: give a path, or leave it out")
            values[key] = base / record[key]
    for key in ("aliases", "protect"):
        names = record.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key} must be a list of names")
        values[key] = tuple(names)
    if not isinstance(record.get("as_word"), bool | None):
        raise ValueError("as_word must be true, false or null")
    values["as_word"] = record.get("as_word")
    values["kind"] = record.get("kind")
    return Request(**values)


def first_sentence_of(error: BaseException, places: Mapping[str, Path | None]) -> str:
    """An error's first line for a file that others may read: with words in place of the paths.

    places: the path that each of the words stands for
    """
    text = str(error).split("\n")[0] or type(error).__name__
    longest_first = sorted(places.items(), key=lambda place: -len(str(place[1])))
    for words, path in longest_first:
        for written in () if path is None else {str(path), repr(str(path))[1:-1]}:
            whole = rf"(?<![\w/\\.-]){re.escape(written)}(?![\w-])"
            text = re.sub(whole, words, text)  # the words have no backslash
    return text


def places_of(request: Request, model: str) -> dict[str, Path | None]:
    """The paths that a sentence about a request may hold, by the words for them. model: its
    directory, or the id of a hub model, which is no secret"""
    own: dict[str, Path | None] = {WORDS[key]: getattr(request, key) for key in PATHS}
    return own | {"the model": Path(model) if Path(model).is_dir() else None}
