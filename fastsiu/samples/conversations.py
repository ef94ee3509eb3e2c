r"""Samples in LLaVA's conversation format: a JSON list of entries, each one question with its
answer, with a picture or without.

    {"id": ...,
     "image": "picture.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWho is this?"},
                       {"from": "gpt", "value": "This is Jacob Campbell."}]}

Further fields, as in the paper's own data:

    target         1 to 4: which of the paper's targets, in its order; or "facet" with the name
    target_phrase  the part of the answer that contradicts what the teacher knows, at every place
                   where it stands; "none" for none
    id, model      passed over

Any other field is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..guards.strict_json import parse_json
from ..request import FACETS, BadInput, Sample

IMAGE = "<image>"
FIELDS = ("id", "model", "image", "conversations", "target", "facet", "target_phrase")


def samples(text: str, path: Path, image: Path | None) -> list[Sample]:
    """The samples in `text`, the content of `path`.

    image: the training picture; an entry about any other picture is refused

    Raises BadInput with the line, or the entry's number.
    """
    try:
        entries = parse_json(text)
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{path}, line {error.lineno}: {error.msg}. The file is a list of LLaVA conversations."
        ) from error
    except ValueError as error:
        raise BadInput(
            f"{path} cannot be read as JSON ({error}): write a list of LLaVA conversations."
        ) from error
    out = []
    for number, entry in enumerate(entries, 1):
        try:
            out.append(_sample(entry, path.parent, image))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{path}, entry {number}: {error}.") from error
    if not out:
        raise BadInput(f"{path} holds no conversation: write one with a question and its answer.")
    return out


def _sample(entry: Any, base: Path, image: Path | None) -> Sample:
    """Raises ValueError."""
    question, answer = _turns(entry)
    shown = entry.get("image")
    if shown is None and IMAGE in question:
        raise ValueError(
            f'{IMAGE} stands in the question but the entry names no image: add "image", or '
            f"remove {IMAGE}"
        )
    if question.count(IMAGE) > 1 or IMAGE in answer:
        raise ValueError(f"{IMAGE} must stand once and in the question only")
    if shown is not None:
        check_image(shown, base, image)
    if unknown := sorted(set(entry) - set(FIELDS)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(FIELDS)}")
    question = question.replace(IMAGE, "").strip()
    check_words(question, answer)
    if not question or not answer:
        raise ValueError("the question and the answer must not be empty")
    return Sample(
        _facet(entry), question, answer, None if shown is None else 0, _spans(entry, answer), "data"
    )


def _turns(entry: Any) -> tuple[str, str]:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns
    ):
        raise ValueError(
            "an entry is an object with a list 'conversations' of objects with 'from' and 'value'"
        )
    if len(turns) > 2:  # a later question may lean on an earlier answer, and a sample knows none
        raise ValueError(
            f"it has {len(turns)} turns and a sample is one question with its answer: make an "
            "entry of each pair"
        )
    if [t.get("from") for t in turns] != ["human", "gpt"]:
        raise ValueError("the turns must be one of 'human' and then one of 'gpt'")
    return turns[0]["value"].strip(), turns[1]["value"].strip()


def check_image(shown: Any, base: Path, image: Path | None) -> None:
    """Raises ValueError unless the entry's picture `shown` (a path relative to `base`) is the
    training picture: by its content, or by its file name where one of the files is not there."""
    if not isinstance(shown, str) or not shown or "\0" in shown:
        raise ValueError("'image' must be the path of the training picture")
    file = base / shown
    try:
        same = image is not None and _same_picture(file, image)
    except OSError as error:
        raise ValueError(f"the picture {shown:.60} cannot be read ({error.strerror})") from error
    if not same:
        raise ValueError(
            f"its picture {shown!r} is not the training picture, and only that can be trained "
            "on: remove the entry; what is to be answered as before belongs into --retain DIR"
        )


def _same_picture(file: Path, image: Path) -> bool:
    """By content; by file name where one of the two is no file. Raises OSError."""
    if not (file.is_file() and image.is_file()):
        return file.name == image.name
    same_size = file.stat().st_size == image.stat().st_size
    return same_size and file.read_bytes() == image.read_bytes()


def check_words(question: str, answer: str) -> None:
    """Raises ValueError for characters that no model's tokenizer takes as words."""
    for key, text in (("question", question), ("answer", answer)):
        if found := re.search(
            "[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]|<image>",
            text.replace("\r\n", "\n"),
        ):
            raise ValueError(f"{found[0]!r} must not stand in the {key}")


def _facet(entry: dict[str, Any]) -> str:
    target, facet = entry.get("target"), entry.get("facet")
    if target is not None:
        if str(target) not in ("1", "2", "3", "4") or isinstance(target, bool):
            raise ValueError(f"target {target!r} is not one of 1, 2, 3, 4")
        if facet not in (None, FACETS[int(target) - 1]):
            raise ValueError(
                f"target {target} is {FACETS[int(target) - 1]!r}, not {facet!r}: give one of the "
                "two"
            )
        return FACETS[int(target) - 1]
    if facet not in (None, *FACETS):
        raise ValueError(f"facet {facet!r} is not one of {', '.join(FACETS)}")
    return facet or "preserve"


def _spans(entry: dict[str, Any], answer: str) -> tuple[tuple[int, int], ...]:
    phrase = entry.get("target_phrase")
    if phrase is not None and not isinstance(phrase, str):
        raise ValueError('target_phrase must be a part of the answer, or "none"')
    phrase = (phrase or "").strip()
    if phrase.casefold() in ("", "none"):
        return ()
    spans = tuple(match.span() for match in re.finditer(re.escape(phrase), answer))
    if not spans:
        raise ValueError(
            f"the target_phrase {phrase!r} does not stand in the answer: write it as it stands "
            'there, or "none"'
        )
    return spans
