"""The exam of one concept of a suite: which pictures and questions, and whose names; pure but for
the training picture, which is read for its views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...images import load_image
from ...pictures.transforms import variants
from ...samples.kinds import wordings
from ...text.concept import Concept
from ..exam import Exam, Question, Seen, evenly
from .suite import Subject, Suite


def exam_of(
    suite: Suite, subject: Subject, *, per_other: int = 2, limit: int | None = None
) -> Exam:
    """What is asked about one subject.

    per_other: number of pictures of each other subject, taken evenly; never its training picture,
               since an adapter for several concepts was trained on that
    limit:     largest number of pictures of each role, taken evenly; the untouched view of the
               training picture is always among its views

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
    """The pictures of its exam that are files: all but the views of the training picture."""
    alike, rest = _apart(suite, subject)
    own: list[tuple[Path, str | None]] = [(path, subject.name) for path in subject.further]
    parts: dict[str, list[tuple[Path, str | None]]] = {
        "concept": own,
        "lookalike": _some_of_each(alike, per_other),
        "other": _some_of_each(rest, per_other),
        "group": [(path, subject.name) for path in subject.groups],
        "control": [(path, None) for path in suite.control],
    }
    return [
        Seen(path.relative_to(suite.directory).as_posix(), path, role, shows)
        for role, part in parts.items()
        for path, shows in evenly(part, limit)
    ]


def _some_of_each(others: Sequence[Subject], most: int) -> list[tuple[Path, str | None]]:
    """(picture, name of whom it shows): at most so many pictures of each."""
    return [(path, other.name) for other in others for path in evenly(other.further, most)]


def questions_of(suite: Suite, subject: Subject) -> tuple[Question, ...]:
    """The suite's questions and the subject's own, each once."""
    return tuple(dict.fromkeys((*suite.questions, *subject.questions)))


def others_of(suite: Suite, subject: Subject) -> tuple[Concept, ...]:
    """Whom a renamed concept could be called after: look-alikes first, also those without pictures
    in the suite."""
    alike, rest = _apart(suite, subject)
    absent = [
        Concept(name)
        for name in subject.lookalikes
        if not any(other.bears(name) for other in alike)
    ]
    return (*(other.concept for other in alike), *absent, *(other.concept for other in rest))


def stranger_of(suite: Suite) -> str | None:
    """An invented name that no concept of the suite bears or resembles; None where there is
    none."""
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
    alike = [other for other in others if any(other.bears(name) for name in subject.lookalikes)]
    return alike, [other for other in others if other not in alike]


def _missing(subject: Subject, pictures: Sequence[Seen]) -> dict[str, str]:
    """The metrics that this suite cannot give, each with what it would take."""
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
