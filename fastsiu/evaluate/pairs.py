"""The answers of two models to one cell of an exam, and what such a pair shows; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..judging.kept import kept
from ..text.answers import affirms, denies_it, holds
from ..text.concept import Concept
from ..verdict import gives
from . import noise
from .exam import OF_CONCEPT, Cell, Exam
from .observe import Observations


class Pair(NamedTuple):
    """A cell with the untouched model's answer and the answer of the model that is measured.

    cut, lost, floor: as `cut`, `lost` and `noise` of `verdict.Answer`
    """

    cell: Cell
    before: str
    after: str
    cut: tuple[bool, bool] = (False, False)
    lost: float | None = None
    floor: float | None = None

    @property
    def role(self) -> str | None:
        """The part that the picture plays; None without a picture."""
        return None if self.cell.seen is None else self.cell.seen.role

    @property
    def kind(self) -> str:
        return self.cell.question.kind

    @property
    def kept(self) -> bool:
        """Is the answer still the untouched model's (`judging.kept.kept`)?"""
        return kept(self.before, self.after, self.lost, self.cut)


def pairs(exam: Exam, untouched: Observations, model: Observations) -> list[Pair]:
    """Every cell with both answers. Raises ValueError where the observations are of another
    exam."""
    n = len(exam.cells)
    before, after = (list(of.sentences) or [None] * n for of in (untouched, model))
    floor = list(untouched.floor) or [None] * n
    return [
        Pair(c, b.text, a.text, (not b.closed, not a.closed), noise.lost(was, now), by_noise)
        for c, b, a, was, now, by_noise in zip(
            exam.cells, untouched.replies, model.replies, before, after, floor, strict=True
        )
    ]


def names_it(exam: Exam, pair: Pair) -> bool:
    """Does the measured model's answer give the concept's name?"""
    return gives(exam.concept, pair.after, pair.cell.question.keywords)


def named_it(exam: Exam, pair: Pair) -> bool:
    """Does the untouched model's answer give the concept's name?"""
    return gives(exam.concept, pair.before, pair.cell.question.keywords)


def confirmed(cell: Cell, text: str) -> bool:
    """Does the answer to a yes/no question say yes, a keyword of the question, or the name that
    was asked about?"""
    if affirms(text) or holds(text, cell.question.keywords):
        return True
    if cell.about is None:
        return False
    named_in = Concept(cell.about).named_in
    return named_in(text) and not denies_it(text, named_in)


def asks_about_concept(exam: Exam, pair: Pair) -> bool:
    """Does the question hold the concept's name, or no name at all?"""
    return pair.cell.about in (exam.concept.name, None)


def keeps(exam: Exam, pair: Pair) -> bool:
    """Does the answer about another's picture hold something to be kept? Not where the untouched
    model already took that picture for the concept's."""
    if pair.kind == "yesno" and asks_about_concept(exam, pair):
        return not confirmed(pair.cell, pair.before)
    return not named_it(exam, pair)


def kept_in_group(exam: Exam, pair: Pair) -> bool | None:
    """Is what stands beside the concept in a group picture still answered as before?

    Where the untouched model named the concept and others: are the others still named (whether the
    concept is, `groups_named` tells)? Where it named the concept alone, nothing can be kept: None.
    Elsewhere: is the answer kept?
    """
    if keeps(exam, pair):
        return pair.kept
    beside = [other for other in exam.others if other.given_in(pair.before)]
    if pair.kind == "yesno" or not beside:
        return None
    return all(other.given_in(pair.after) for other in beside)


def naming(exam: Exam, asked: Sequence[Pair], role: str) -> list[Pair]:
    """The answers about pictures of one role that must be free of the name: those to questions for
    it, and descriptions in which the untouched model gives it."""
    return [
        p
        for p in asked
        if p.role == role and (p.kind == "name" or (p.kind == "describe" and named_it(exam, p)))
    ]


def to_grade(exam: Exam, untouched: Observations, model: Observations) -> list[Pair]:
    """The answers about the concept's pictures in which the name would stand: what a judge is
    given, and what the verdict's efficacy and generality are about."""
    every = pairs(exam, untouched, model)
    return [p for part in OF_CONCEPT for p in naming(exam, every, part)]
