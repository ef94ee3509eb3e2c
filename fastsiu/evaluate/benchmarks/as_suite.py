"""Writes a benchmark as a suite (`evaluate.suites.suite`), whose entities `fastsiu suite` can
unlearn and judge."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...disk.staging import Staging, check_new
from ...guards.strict_json import read_json
from ...images import SUFFIXES
from ...request import BadInput
from .. import questions
from ..exam import Question
from ..suites import suite
from .form import Benchmark, Entity, Item

# Training uses none of these questions. {name} becomes the entity's name.
ASKED = (
    Question("Who or what does this show?", "name"),
    Question("Does this show {name}?", "yesno"),
    Question("Describe what you see.", "describe"),
    Question("What does {name} look like?", "appearance"),
)


def names_of(file: Path) -> dict[str, str]:
    """By its id each entity's name, from a JSON file, for a set without names. Raises BadInput."""
    found: dict[str, str] = read_json(
        file, what=str(file), remedy='write {"ID": "name", ...}', shape={"*": str}
    )
    return found


def write(
    benchmark: Benchmark, directory: Path, names: Mapping[str, str] | None = None
) -> suite.Suite:
    """Writes the suite, all of it or nothing, and reads it back. The first picture of each entity
    becomes its training picture.

    names: by its id the name of an entity; it replaces the name that the benchmark has

    Raises BadInput where an entity has no name or two have the same, and where something is at
    `directory`.
    """
    known = {entity.id for entity in benchmark.entities}
    if unknown := sorted(set(names or {}) - known):
        raise BadInput(
            f"{benchmark.name} has no entity {unknown[0]!r}, which --names names: correct the file."
        )
    check_new(directory, "give another directory")
    place = Path(os.path.abspath(directory))
    with Staging(place.parent) as folder:
        subjects = []
        taken: set[str] = set()
        for entity in benchmark.entities:
            subject = _subject(benchmark, entity, folder, taken, names or {})
            subjects.append(subject)
        single = any(len(subject.images) < 2 for subject in subjects)
        made = suite.Suite(
            folder, benchmark.name, tuple(subjects), _common(benchmark), single=single
        )
        suite.write(made)
        suite.read(folder)
        os.rename(folder, place)
    os.chmod(place, 0o755)
    return suite.read(place)


def _common(benchmark: Benchmark) -> tuple[Question, ...]:
    """The questions that are asked about every entity; none where entities have questions of their
    own with keywords."""
    return () if _own(benchmark.items) else ASKED


def _own(items: tuple[Item, ...]) -> bool:
    return any(item.task == "EM" for item in items)


def _subject(
    benchmark: Benchmark,
    entity: Entity,
    folder: Path,
    taken: set[str],
    names: Mapping[str, str],
) -> suite.Subject:
    name = names.get(entity.id) or entity.name
    if name is None:
        raise BadInput(
            f"{benchmark.name} has no name of {entity.id!r}: give a file "
            '{"ID": "name", ...} with --names.'
        )
    if not entity.photos:
        raise BadInput(f"{benchmark.name} has no picture of {entity.id!r}: leave it out.")
    slug = _slug(name, taken)
    images = folder / "concepts" / slug / "images"
    images.mkdir(parents=True)
    paths = []
    for number, photo in enumerate(entity.photos):
        suffix = Path(photo.label).suffix.lower()
        path = images / f"{number:04d}{suffix if suffix in SUFFIXES else '.png'}"
        path.write_bytes(photo.read())
        paths.append(path)
    subject = suite.Subject(slug, name, (), (), paths[0], tuple(paths))
    own = [item for item in benchmark.of(benchmark.forget) if item.entity == entity.id]
    if not _own(tuple(own)):
        return subject
    lines = "".join(_line(item) for item in own)
    asked = questions.parse(folder / slug / "questions.jsonl", lines, subject.concept)
    return suite.Subject(slug, name, (), (), paths[0], tuple(paths), (), asked)


def _line(item: Item) -> str:
    record: dict[str, Any] = {"question": item.question, "keyword": item.answer}
    return json.dumps(record) + "\n"


def _slug(name: str, taken: set[str]) -> str:
    """A name for the entity's directory, different from those in `taken`."""
    base = re.sub(r"[^\w-]+", "-", name).strip("-_")[:56] or "entity"
    slug, number = base, 2
    while slug.casefold() in taken:
        slug, number = f"{base}-{number}", number + 1
    taken.add(slug.casefold())
    return slug
