"""An exam from a user's own files: pictures in directories, questions in a file, and the embedded
wordings for other kinds of questions."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..guards.small_file import read_text
from ..images import content, list_images, load_image, read_bytes
from ..pictures.transforms import variants
from ..request import BadInput
from ..samples.kinds import PERSON, Kind
from ..text.concept import Concept
from .exam import OF_CONCEPT, Exam, Question, Seen
from .questions import parse

# Kind of question -> the entry of wordings.toml whose held-out wordings no sample has.
SOURCES = {
    "name": "who",
    "yesno": "yesno",
    "describe": "describe",
    "appearance": "appearance",
    "fact": "facts",
    "general": "general",
}
NULL = {
    "efficacy": "The training picture was not given: give it with --image.",
    "generality": "One picture cannot show it: give more pictures of the concept with --images "
    "DIR.",
    "specificity": "No picture of anything else was given: give some with --others DIR.",
    "others": "No picture of anyone else was given: give some with --others DIR.",
    "lookalikes": "No picture of a look-alike was given: give some with --lookalikes DIR.",
    "groups": "No picture of the concept beside others was given: give some with --groups DIR.",
}
NULL["groups_named"] = NULL["groups"]
COUNTERFACTUAL = (
    "No --control was given: the never-seen control is the concept's own pictures, cut into 64 "
    "patches and shuffled, which keep its colours."
)
CONTROLS = 8  # pictures that are shuffled
GRID = 8  # patches a side


def exam_of(
    concept: Concept,
    *,
    image: Path | None = None,
    images: Path | None = None,
    others: Path | None = None,
    lookalikes: Path | None = None,
    groups: Path | None = None,
    control: Path | None = None,
    questions: Path | None = None,
    kind: Kind = PERSON,
) -> Exam:
    """What is asked about `concept`.

    image:      the picture that was trained on; its held-out transforms are asked about, too
    images:     other pictures of the concept; a copy of `image` among them is left out
    others:     pictures of anyone else, in sub-directories by name, or flat without names. A
                sub-directory with the concept's own name and copies of its pictures are left out,
                so that one directory of everyone will do
    lookalikes: the same for those who look like the concept
    groups:     pictures of the concept beside others
    control:    pictures of what no model has seen; None: `shuffled` pictures of the concept
    questions:  a file for `read_questions`; a kind of question in it replaces the embedded wordings
                of that kind
    kind:       of the concept: its wordings are asked

    Raises BadInput where nothing shows the concept, a directory holds no picture, or a file cannot
    be read.
    """
    if image is None and images is None:
        raise BadInput(
            f"No picture of {concept.name} was given: give the training picture with --image or "
            "others with --images."
        )
    seen = [
        Seen(f"training picture, {label}", view, "training", concept.name)
        for label, view in (variants(load_image(image), held_out=True) if image else ())
    ]
    own = {_digest(image), content(load_image(image))} if image else set()
    for path in list_images(images) if images else ():
        copies = {_digest(path), content(load_image(path))}
        if not copies & own:
            seen.append(Seen(path.name, path, "concept", concept.name))
        own |= copies
    named: list[str] = []
    for directory, role in ((others, "other"), (lookalikes, "lookalike")):
        for name, path in _by_name(directory, concept) if directory else ():
            if _digest(path) not in own:
                seen.append(
                    Seen(path.name if name is None else f"{name}, {path.name}", path, role, name)
                )
                named += [] if name is None else [name]
    seen += [
        Seen(path.name, path, "group")
        for path in (list_images(groups) if groups else ())
        if _digest(path) not in own
    ]
    if control is not None:
        seen += [
            Seen(path.name, path, "control")
            for path in list_images(control)
            if _digest(path) not in own
        ]
    else:
        shown = [
            s
            for s in seen
            if s.role in OF_CONCEPT and s.label.rpartition(", ")[2] in (s.label, "original")
        ][:CONTROLS]
        seen += [
            Seen(f"{s.label}, shuffled", shuffled(s.load(), i), "control")
            for i, s in enumerate(shown)
        ]
    asked = read_questions(questions, concept) if questions else ()
    given = {question.kind for question in asked}
    asked = (*asked, *(q for q in default_questions(kind) if q.kind not in given))
    return Exam(
        concept,
        tuple(seen),
        asked,
        tuple(map(Concept, dict.fromkeys(named))),
        stranger(concept, kind),
        NULL,
        kind,
    )


def default_questions(kind: Kind = PERSON) -> tuple[Question, ...]:
    """The wordings that no training sample has."""
    return tuple(
        Question(text, asked)
        for asked, source in SOURCES.items()
        for text in kind.words[source]["held_out"]
    )


def stranger(concept: Concept, kind: Kind = PERSON) -> str:
    """An invented name without a word of the concept's."""
    names = kind.words["invented"]["names"]
    return next(name for name in names if not concept.named_in(name))


def shuffled(image: Image.Image, seed: int = 0, grid: int = GRID) -> Image.Image:
    """The picture cut into grid x grid patches in a random order: its colours and textures, and
    nobody. Where a side is no multiple of `grid` pixels, the rest is cut off."""
    width, height = (max(1, side // grid) for side in image.size)
    columns, rows = (min(grid, side) for side in image.size)
    boxes = [
        (x * width, y * height, (x + 1) * width, (y + 1) * height)
        for y in range(rows)
        for x in range(columns)
    ]
    order = random.Random(seed).sample(boxes, len(boxes))
    out = Image.new("RGB", (columns * width, rows * height))
    for box, source in zip(boxes, order, strict=True):
        out.paste(image.crop(source), box[:2])
    return out


def read_questions(path: Path, concept: Concept | None = None) -> tuple[Question, ...]:
    """The questions of a JSONL file, in a suite's format (`questions.parse`): `question`, where
    {name} stands for the name; `kind` (default name); `keywords`, further words that count as the
    name in its answers.

    Raises BadInput with the line's number, and where the file cannot be read or is empty.
    """
    content = read_text(path, remedy="give a JSONL file with one question a line", pipe=True)
    out = parse(path, content, concept, "name")
    if not out:
        raise BadInput(f"{path} holds no question: write one JSON object with 'question' a line.")
    return out


def digest(exam: Exam, **more: Any) -> str:
    """SHA-256, in hex, over everything that decides what a model answers: the cells with the bytes
    of their pictures, the names and `more` (JSON values). Labels, keywords and paths do not
    count."""
    pictures = {id(seen): _digest(seen.source) for seen in exam.pictures}
    cells = [
        [c.question.kind, c.text, c.seen and [c.seen.role, pictures[id(c.seen)]]]
        for c in exam.cells
    ]
    content = {"names": exam.concept.forms(), "cells": cells, **more}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def with_others(exam: Exam, names: list[str]) -> Exam:
    """The exam with the names of others, of whom there is no picture."""
    return replace(exam, others=tuple(map(Concept, names)))


def _by_name(directory: Path, concept: Concept) -> Iterator[tuple[str | None, Path]]:
    """(name or None, picture) of everything in a directory that holds pictures, or directories of
    pictures by name."""
    if not directory.is_dir():
        list_images(directory)  # raises BadInput, which says what it is instead
    inside = sorted(
        entry for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    for entry in inside:
        name = " ".join(entry.name.replace("_", " ").split())
        if not concept.named_in(name, include_parts=False):
            yield from ((name, path) for path in list_images(entry))
    if not inside or any(
        entry.is_file() and not entry.name.startswith(".") for entry in directory.iterdir()
    ):
        yield from ((None, path) for path in list_images(directory))


def _digest(source: Path | Image.Image) -> str:
    if isinstance(source, Path):
        return hashlib.sha256(read_bytes(source)).hexdigest()
    return content(source)
