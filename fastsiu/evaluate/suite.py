"""Many concepts with their pictures and questions as plain files: MMUBench's shape on disk, told in
docs/suite.md.

DIR/suite.json, DIR/questions.jsonl, DIR/control/*, and of each concept DIR/concepts/SLUG/ with
concept.json, images/*, groups/* and questions.jsonl. A suite may come from a stranger: nothing
outside DIR is read, and nothing in it is taken on trust.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..guards.strict_json import parse_json
from ..images import list_images, load_image, variants
from ..request import BadInput
from ..samples.targets import wordings
from ..text.concept import Concept
from .exam import Exam, Question, Seen
from .questions import MAX_NAME, clean, known, parse

FORMAT = "fastsiu suite 1"
MAX_BYTES = 64 * 2**20  # of a JSON file
# the name of an output directory, too; no dot: OUT/suite.json is ours
_SLUG = re.compile(r"\w[\w-]{0,63}")

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """One concept of a suite. training is one of images; lookalikes may be names of which the suite
    has no picture."""

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


@dataclass(frozen=True)
class Suite:
    """directory: where it lies; questions: put to every subject; control: pictures of what no model
    has seen."""

    directory: Path
    title: str
    subjects: tuple[Subject, ...]
    questions: tuple[Question, ...] = ()
    control: tuple[Path, ...] = ()

    def subject(self, wanted: str) -> Subject:
        """By slug, name or alias. Raises BadInput where the suite has none."""
        for subject in self.subjects:
            if wanted == subject.slug or _same(subject, wanted):
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
    head = _object(root, root / "suite.json", ("format", "title"))
    if head.get("format") != FORMAT:
        raise BadInput(
            f'{root / "suite.json"}: the format is {head.get("format")!r}: write "format": '
            f'"{FORMAT}".'
        )
    title = _text(root / "suite.json", "title", head.get("title", root.name), MAX_NAME)
    concepts = _within(root, root / "concepts")
    if not concepts.is_dir():
        raise BadInput(
            f"{root} has no directory concepts: make one with a directory of each concept in it."
        )
    places = [
        place
        for place in sorted(concepts.iterdir())
        if not place.name.startswith(".") and place.is_dir()
    ]
    subjects: list[Subject] = []
    for place in places:
        subject = _subject(root, place)
        for other in subjects:
            for form in (subject.name, *subject.aliases):
                if _same(other, form):
                    raise BadInput(
                        f"{place / 'concept.json'}: {form!r} is a name of {other.slug} already: "
                        "remove one."
                    )
        subjects.append(subject)
    if not subjects:
        raise BadInput(
            f"{concepts} holds no concept: make a directory with concept.json and images for each."
        )
    control = _pictures(root, root / "control")
    suite = Suite(
        root, title, tuple(subjects), _questions(root, root / "questions.jsonl", None), control
    )
    for subject in subjects:
        if not any(question.kind == "name" for question in (*suite.questions, *subject.questions)):
            raise BadInput(
                f"Nothing asks who {subject.slug} is: add a question of kind 'name' to "
                f"{root / 'questions.jsonl'}."
            )
    return suite


def check(suite: Suite) -> int:
    """Decodes every picture; how many there are. Raises BadInput at the first that cannot be
    read."""
    paths = [
        *suite.control,
        *(path for subject in suite.subjects for path in (*subject.images, *subject.groups)),
    ]
    for path in paths:
        load_image(path)
    return len(paths)


def told(suite: Suite) -> str:
    """What there is, after `check`. Raises BadInput at the first picture that cannot be read."""
    pictures = check(suite)
    questions = len(suite.questions) + sum(len(subject.questions) for subject in suite.subjects)
    return (
        f"{suite.directory}: {len(suite.subjects)} concepts, {pictures} pictures, {questions} "
        "questions and no defect."
    )


def _subject(root: Path, place: Path) -> Subject:
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
    if len(images) < 2:
        raise BadInput(
            f"{place / 'images'} holds {len(images)} pictures: put the training picture and at "
            "least one more there."
        )
    inside = {path.relative_to(place).as_posix(): path for path in images}
    if record["training"] not in (*inside,):
        raise BadInput(
            f"{file}: the training picture {record['training']!r} is none of images: write one "
            "like "
            f'"{next(iter(inside))}".'
        )
    groups = _pictures(root, place / "groups")
    subject = Subject(
        place.name, name, aliases, lookalikes, inside[record["training"]], images, groups
    )
    for other in lookalikes:
        if _same(subject, other):
            raise BadInput(f"{file}: the look-alike {other!r} is the concept itself: remove it.")
    own = _questions(root, place / "questions.jsonl", subject.concept)
    return Subject(place.name, name, aliases, lookalikes, subject.training, images, groups, own)


def _same(subject: Subject, name: str) -> bool:
    """Whether `name` is the subject's name or an alias, written in any case or Unicode form."""
    return name.strip() != "" and subject.concept.same(name)


def _questions(root: Path, file: Path, concept: Concept | None) -> tuple[Question, ...]:
    """None for a concept's: the suite's own. Absent is empty."""
    if not _within(root, file).exists():
        return ()
    return parse(file, _read(root, file), concept)


def _pictures(root: Path, directory: Path) -> tuple[Path, ...]:
    """Sorted by name; none where the directory is absent or holds only hidden files."""
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


def _within(root: Path, path: Path) -> Path:
    """`path`, of which no link leads out of `root`. Raises BadInput where one does."""
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link to itself
        inside = False
    if not inside:
        raise BadInput(f"{path} is a link that leads out of {root}: put the file itself there.")
    return path


def _read(root: Path, file: Path) -> str:
    if not _within(root, file).is_file():  # a pipe or a device would block
        raise BadInput(f"There is no file {file}: write it as docs/suite.md describes it.")
    try:
        if file.stat().st_size > MAX_BYTES:
            raise BadInput(f"{file} is larger than {MAX_BYTES // 2**20} MiB: make it smaller.")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 text: save it as UTF-8.") from error
    except OSError as error:
        raise BadInput(
            f"{file} cannot be read ({error.strerror}): check its permissions."
        ) from error


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
    """The JSON files of a suite whose pictures lie in its directory already: what `read` reads is
    equal to `suite`."""
    _dump(suite.directory / "suite.json", [{"format": FORMAT, "title": suite.title}])
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


# The exam -----------------------------------------------------------------------------------------


def exam_of(
    suite: Suite, subject: Subject, *, per_other: int = 2, limit: int | None = None
) -> Exam:
    """What is asked about one subject.

    per_other: pictures of each other subject, taken evenly; never its training picture, on which an
    adapter of several
               concepts was trained
    limit:     at most so many pictures of each role, taken evenly; of the training picture's views
    the untouched one is in

    Raises BadInput for a training picture that cannot be read.
    """
    views = evenly(variants(load_image(subject.training), held_out=True), limit)
    training = [
        Seen(f"training, {label}", image, "training", subject.name) for label, image in views
    ]
    rest = seen(suite, subject, per_other, limit)
    questions, others = questions_of(suite, subject), others_of(suite, subject)
    return Exam(
        subject.concept,
        (*training, *rest),
        questions,
        others,
        stranger_of(suite),
        null=_missing(subject, rest),
    )


def seen(suite: Suite, subject: Subject, per_other: int, limit: int | None) -> list[Seen]:
    """The pictures of its exam that are files: all but the training picture's views."""
    alike, rest = _apart(suite, subject)
    of = lambda others, role: [
        (path, role, other.name) for other in others for path in evenly(other.further, per_other)
    ]
    parts = (
        [(path, "concept", subject.name) for path in subject.further],
        of(alike, "lookalike"),
        of(rest, "other"),
        [(path, "group", subject.name) for path in subject.groups],
        [(path, "control", None) for path in suite.control],
    )
    label = lambda path: path.relative_to(suite.directory).as_posix()
    return [
        Seen(label(path), path, role, shows)
        for part in parts
        for path, role, shows in evenly(part, limit)
    ]


def questions_of(suite: Suite, subject: Subject) -> tuple[Question, ...]:
    return tuple(dict.fromkeys((*suite.questions, *subject.questions)))


def others_of(suite: Suite, subject: Subject) -> tuple[Concept, ...]:
    """Look-alikes first, those without pictures in the suite among them."""
    alike, rest = _apart(suite, subject)
    absent = [
        Concept(name)
        for name in subject.lookalikes
        if not any(_same(other, name) for other in alike)
    ]
    return (*(other.concept for other in alike), *absent, *(other.concept for other in rest))


def stranger_of(suite: Suite) -> str | None:
    """A name that no model knows and no concept of the suite bears or resembles."""
    known = [subject.concept for subject in suite.subjects]
    return next(
        (
            name
            for name in wordings()["invented"]["names"]
            if not any(c.named_in(name) for c in known)
        ),
        None,
    )


def _apart(suite: Suite, subject: Subject) -> tuple[list[Subject], list[Subject]]:
    """Every other subject: those that look like it, and the rest."""
    others = [other for other in suite.subjects if other.slug != subject.slug]
    alike = [other for other in others if any(_same(other, name) for name in subject.lookalikes)]
    return alike, [other for other in others if other not in alike]


def _missing(subject: Subject, pictures: Sequence[Seen]) -> dict[str, str]:
    """Metrics that this suite cannot give, and what it would take."""
    place, roles = f"concepts/{subject.slug}", {seen.role for seen in pictures}
    why = {
        "others": ("other", "The suite has no other concept: add one to concepts."),
        "lookalikes": (
            "lookalike",
            "The suite has no picture of a look-alike: name a concept of it in "
            f"{place}/concept.json.",
        ),
        "groups": ("group", f"The suite has no group picture of it: put some into {place}/groups."),
    }
    return {metric: sentence for metric, (role, sentence) in why.items() if role not in roles}


def evenly(items: Sequence[T], most: int | None) -> list[T]:
    """`most` of the items (all for None) at even distances, the first among them."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]
