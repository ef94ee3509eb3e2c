"""A suite on disk: many concepts with their pictures and questions as plain files, in MMUBench's
shape, as docs/suite.md describes it.

    DIR/suite.json  DIR/questions.jsonl  DIR/control/*
    DIR/concepts/SLUG/ with concept.json, images/*, groups/* and questions.jsonl, for each concept

A suite may come from a stranger: nothing outside DIR is read, and every file is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...guards.small_file import read_text
from ...guards.strict_json import parse_json
from ...images import list_images, load_image, read_bytes
from ...request import BadInput
from ...text.concept import Concept
from ..exam import Question
from ..questions import MAX_NAME, clean, known, parse

FORMAT = "fastsiu suite 1"
# A slug is also the name of an output directory, so it has no dot: OUT/suite.json is ours.
_SLUG = re.compile(r"\w[\w-]{0,63}")


@dataclass(frozen=True)
class Subject:
    """One concept of a suite.

    slug:       the name of its directory
    lookalikes: names of concepts that look like it; the suite may have no picture of them
    training:   the picture to unlearn from, one of `images`
    groups:     pictures of it beside something else
    questions:  put to this concept only
    """

    slug: str
    name: str
    aliases: tuple[str, ...]
    lookalikes: tuple[str, ...]
    training: Path
    images: tuple[Path, ...]
    groups: tuple[Path, ...] = ()
    questions: tuple[Question, ...] = ()

    @property
    def concept(self) -> Concept:
        return Concept(self.name, self.aliases)

    @property
    def further(self) -> tuple[Path, ...]:
        """The pictures that nothing was trained on."""
        return tuple(path for path in self.images if path != self.training)

    def bears(self, name: str) -> bool:
        """Is `name` its name or an alias, in any case or Unicode form?"""
        return name.strip() != "" and self.concept.same(name)


@dataclass(frozen=True)
class Suite:
    """All concepts.

    questions: put to every subject
    control:   pictures of what no model has seen
    single:    a concept may have one picture, the training picture
    """

    directory: Path
    title: str
    subjects: tuple[Subject, ...]
    questions: tuple[Question, ...] = ()
    control: tuple[Path, ...] = ()
    single: bool = False

    def subject(self, wanted: str) -> Subject:
        """The subject with this slug, name or alias. Raises BadInput where there is none."""
        for subject in self.subjects:
            if wanted == subject.slug or subject.bears(wanted):
                return subject
        slugs = ", ".join(subject.slug for subject in self.subjects)
        raise BadInput(
            f"The suite {self.directory} has no concept {wanted!r}: choose from {slugs}."
        )


# Reading ------------------------------------------------------------------------------------------


def read(directory: str | Path) -> Suite:
    """The suite at `directory`, with everything checked but the pixels: `check` decodes the
    pictures.

    Raises BadInput with the file, the line and the remedy.
    """
    root = Path(directory)
    if not root.is_dir():
        raise BadInput(
            f"There is no directory {root}: give the directory of a suite, as docs/suite.md "
            "describes it."
        )
    title, single = _head(root)
    subjects = _subjects(root, least=1 if single else 2)
    control = _pictures(root, root / "control")
    questions = _questions(root, root / "questions.jsonl", None)
    for subject in subjects:
        if not any(question.kind == "name" for question in (*questions, *subject.questions)):
            raise BadInput(
                f"Nothing asks who {subject.slug} is: add a question of kind 'name' to "
                f"{root / 'questions.jsonl'}."
            )
    return Suite(root, title, tuple(subjects), questions, control, single)


def check(suite: Suite) -> int:
    """Decodes every picture and returns their number. Raises BadInput at the first that cannot be
    read."""
    paths = [
        *suite.control,
        *(path for subject in suite.subjects for path in (*subject.images, *subject.groups)),
    ]
    for path in paths:
        load_image(path)
    return len(paths)


def told(suite: Suite) -> str:
    """A sentence about what the suite holds, after `check`. Raises BadInput at the first picture
    that cannot be read."""
    pictures = check(suite)
    questions = len(suite.questions) + sum(len(subject.questions) for subject in suite.subjects)
    return (
        f"{suite.directory}: {len(suite.subjects)} concepts, {pictures} pictures, {questions} "
        "questions and no defect."
    )


def _head(root: Path) -> tuple[str, bool]:
    """The title, and whether a concept may have one picture only."""
    file = root / "suite.json"
    head = _object(root, file, ("format", "title", "single"))
    if head.get("format") != FORMAT:
        raise BadInput(f'{file}: the format is {head.get("format")!r}: write "format": "{FORMAT}".')
    single = head.get("single", False)
    if not isinstance(single, bool):
        raise BadInput(f"{file}: 'single' must be true or false: correct it.")
    return _text(file, "title", head.get("title", root.name), MAX_NAME), single


def _subjects(root: Path, least: int) -> list[Subject]:
    """Every concept, sorted by slug; no name belongs to two of them."""
    concepts = _within(root, root / "concepts")
    if not concepts.is_dir():
        raise BadInput(
            f"{root} has no directory concepts: make one with a directory of each concept in it."
        )
    subjects: list[Subject] = []
    for place in sorted(concepts.iterdir()):
        if place.name.startswith(".") or not place.is_dir():
            continue
        subject = _subject(root, place, least)
        for other in subjects:
            for form in (subject.name, *subject.aliases):
                if other.bears(form):
                    raise BadInput(
                        f"{place / 'concept.json'}: {form!r} is a name of {other.slug} already: "
                        "remove one."
                    )
        subjects.append(subject)
    if not subjects:
        raise BadInput(
            f"{concepts} holds no concept: make a directory with concept.json and images for each."
        )
    return subjects


def _subject(root: Path, place: Path, least: int) -> Subject:
    if not _SLUG.fullmatch(place.name):
        raise BadInput(
            f"{str(place)!r}: a concept's directory is named with at most 64 letters, digits, _ "
            "and -: rename it."
        )
    file = _within(root, place) / "concept.json"
    record = _object(root, file, ("name", "aliases", "lookalikes", "training"))
    if "name" not in record or "training" not in record:
        raise BadInput(f"{file}: 'name' and 'training' are needed: write both.")
    name = _name(file, "name", record["name"])
    aliases, lookalikes = (
        _names(file, key, record.get(key, [])) for key in ("aliases", "lookalikes")
    )
    images = _pictures(root, place / "images")
    inside = {path.relative_to(place).as_posix(): path for path in images}
    if images and record["training"] not in (*inside,):
        raise BadInput(
            f"{file}: the training picture {record['training']!r} is none of images: write one "
            "like "
            f'"{next(iter(inside))}".'
        )
    # A copy of the training picture would count as another picture of the concept.
    training = inside.get(record["training"])
    images = tuple(p for p in images if training and (p == training or not _copies(p, training)))
    if training is None or len(images) < least:
        raise BadInput(
            f"{place / 'images'} holds {len(images)} pictures: put the training picture and at "
            "least one more there, which is no copy of it."
        )
    groups = _pictures(root, place / "groups")
    subject = Subject(place.name, name, aliases, lookalikes, training, images, groups)
    for other in lookalikes:
        if subject.bears(other):
            raise BadInput(f"{file}: the look-alike {other!r} is the concept itself: remove it.")
    own = _questions(root, place / "questions.jsonl", subject.concept)
    return Subject(place.name, name, aliases, lookalikes, subject.training, images, groups, own)


def _questions(root: Path, file: Path, concept: Concept | None) -> tuple[Question, ...]:
    """The questions in `file`, none where it is absent. concept: whom they are about; None for the
    suite's own questions, which are about every concept."""
    if not _within(root, file).exists():
        return ()
    return parse(file, _read(root, file), concept)


def _pictures(root: Path, directory: Path) -> tuple[Path, ...]:
    """The pictures of a directory, sorted by name; none where it is absent or holds only hidden
    files."""
    if not _within(root, directory).exists():
        return ()
    if not directory.is_dir():
        raise BadInput(f"{directory} is not a directory: put the pictures into one of that name.")
    entries = [entry for entry in directory.iterdir() if not entry.name.startswith(".")]
    for entry in entries:
        _within(root, entry)
        if not entry.name.isprintable():
            raise BadInput(f"{str(entry)!r} has a control character in its name: rename it.")
    return tuple(list_images(directory)) if entries else ()


def _copies(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    return one.stat().st_size == other.stat().st_size and read_bytes(one) == read_bytes(other)


def _within(root: Path, path: Path) -> Path:
    """`path`, once it is sure that no link in it leads out of `root`. Raises BadInput where one
    does."""
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link to itself
        inside = False
    if not inside:
        raise BadInput(f"{path} is a link that leads out of {root}: put the file itself there.")
    return path


def _read(root: Path, file: Path) -> str:
    return read_text(_within(root, file), remedy="write it as docs/suite.md describes it")


def _object(root: Path, file: Path, keys: Sequence[str]) -> dict[str, Any]:
    text = _read(root, file)
    try:
        record = parse_json(text)
        if not isinstance(record, dict):
            raise ValueError("this is no object")
        known(record, keys)
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{file}, line {error.lineno}: {error.msg}. Write one JSON object."
        ) from error
    except ValueError as error:
        raise BadInput(f"{file}: {error}. Write one JSON object with {', '.join(keys)}.") from error
    return record


def _names(file: Path, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise BadInput(f"{file}: {key!r} must be a list of names: write [] for none.")
    return tuple(dict.fromkeys(_name(file, key, item) for item in value))


def _name(file: Path, key: str, value: Any) -> str:
    name = _text(file, key, value, MAX_NAME)
    try:
        Concept(name)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error
    return name


def _text(file: Path, key: str, value: Any, most: int) -> str:
    if (
        not isinstance(value, str)
        or not value.strip()
        or len(value) > most
        or not clean(value)
        or "\n" in value.strip()
    ):
        raise BadInput(f"{file}: {key!r} must be one line of 1 to {most} characters: correct it.")
    return value.strip()


# Writing ------------------------------------------------------------------------------------------


def write(suite: Suite) -> None:
    """Writes the JSON files of a suite whose pictures lie in its directory already. `read` then
    gives an equal suite."""
    single = {"single": True} if suite.single else {}
    _dump(suite.directory / "suite.json", [{"format": FORMAT, "title": suite.title, **single}])
    _dump(suite.directory / "questions.jsonl", map(_record, suite.questions))
    for subject in suite.subjects:
        place = suite.directory / "concepts" / subject.slug
        record = {
            "name": subject.name,
            "aliases": list(subject.aliases),
            "lookalikes": list(subject.lookalikes),
            "training": subject.training.relative_to(place).as_posix(),
        }
        _dump(place / "concept.json", [record])
        if subject.questions:
            _dump(place / "questions.jsonl", map(_record, subject.questions))


def _record(question: Question) -> dict[str, Any]:
    keywords = {"keywords": list(question.keywords)} if question.keywords else {}
    return {"question": question.text, "kind": question.kind, **keywords}


def _dump(file: Path, records: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        encoding="utf-8",
        newline="\n",
    )
