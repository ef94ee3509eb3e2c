"""A file of questions, one JSON object a line: a suite's, a concept's in it, or the one of
`fastsiu eval --questions`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..guards.strict_json import parse_json
from ..request import BadInput
from ..text.concept import Concept
from .exam import TEXT, WITH_PICTURE, Question

KINDS = (*WITH_PICTURE, *TEXT)
MAX_TEXT = 4000  # characters of a question
MAX_NAME = 200
_LINE = "A line is an object with 'question', 'kind' and, if needed, 'keywords'"


def parse(
    file: Path, content: str, concept: Concept | None, default: str | None = None
) -> tuple[Question, ...]:
    """The questions in the content of `file`, each once.

    concept: whom all questions are about; its name in them becomes {name}
    default: the kind of a question without a kind and without keywords; None: such a question is
             refused

    Raises BadInput with the line's number.
    """
    found: list[Question] = []
    # not splitlines: JSON strings may hold U+2028
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                found.append(_question(parse_json(line), concept, default))
            except (ValueError, TypeError) as error:
                text = str(error).rstrip(".")
                raise BadInput(f"{file}, line {number}: {text}. {_LINE}.") from error
    return tuple(dict.fromkeys(found))


def _question(record: Any, concept: Concept | None, default: str | None) -> Question:
    """Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError("this is no object")
    known(record, ("question", "kind", "keywords", "keyword"))
    text = record.get("question")
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT or not clean(text):
        raise ValueError(
            f"'question' must be a text of 1 to {MAX_TEXT} characters without control characters"
        )
    if "keyword" in record and "keywords" in record:
        raise ValueError("'keyword' and 'keywords' mean the same: give one of them")
    keywords = record.get("keywords", record.get("keyword", []))
    keywords = [keywords] if isinstance(keywords, str) else keywords
    if not isinstance(keywords, list) or not all(
        isinstance(k, str) and k.strip() and len(k) <= MAX_NAME and clean(k) for k in keywords
    ):
        raise ValueError("'keywords' must be a list of words, none of them empty")
    words = tuple(dict.fromkeys(k.strip() for k in keywords))
    means_yes = bool(words) and all(k.casefold().rstrip(".!") == "yes" for k in words)
    if "kind" not in record and not words and default is None:
        raise ValueError("'kind' is missing")
    kind = record.get("kind", "yesno" if means_yes else "name")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    text = text.strip()
    if "<image>" in text:
        raise ValueError(
            "<image> must not stand in a question: leave it out, the model's own template puts the "
            "picture in"
        )
    # so that the same can be asked about others by their names
    if concept is not None and "{name}" not in text:
        for start, end in reversed(Concept(concept.name).spans(text, include_parts=False)):
            text = f"{text[:start]}{{name}}{text[end:]}"
    if (
        kind == "yesno"
        and "{name}" not in text
        and not (concept is not None and concept.named_in(text))
    ):
        raise ValueError(
            "a question of kind yesno must hold {name}: write it there, or make the question one "
            "of kind name"
        )
    if kind == "name" and "{name}" in text:
        raise ValueError(
            "a question of kind name must not give the name away: leave it out, or make it one of "
            "kind yesno"
        )
    if kind == "general" and "{name}" in text:
        raise ValueError(
            "a question of kind general is about nobody: leave {name} out, or make it one of kind "
            "fact"
        )
    if kind in ("appearance", "fact") and "{name}" not in text:
        raise ValueError(
            f"a question of kind {kind} is asked without a picture and must hold {{name}}"
        )
    return Question(text, kind, () if kind == "yesno" and means_yes else words)


def known(record: dict[str, Any], keys: Sequence[str]) -> None:
    """Raises ValueError for a key that is none of `keys`."""
    if unknown := sorted(set(record) - set(keys)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(keys)}")


def clean(text: str) -> bool:
    """Is it free of control characters, which would reach a terminal (the end of a line may stay),
    and of halves of surrogate pairs, which have no UTF-8?"""
    return not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
