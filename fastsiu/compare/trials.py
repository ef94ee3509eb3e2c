"""Trains one method and looks at the model after several numbers of steps: what a look asks, what
it counts, and the processes that train."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .. import process
from ..disk.staging import write
from ..evaluate.exam import Exam, Seen, evenly
from ..evaluate.suites.suite import Subject, Suite, read
from ..images import load_image
from ..model import ask, vlm
from ..request import NumericFailure, Recipe, Request
from ..samples.corpus import Corpus
from ..text.answers import is_degenerate, same_beginning
from . import methods, sculpting

# A run ends early in two cases. Ruined: five looks in a row keep less than a fifth, while the steps
# have at least tripled. (Methods with a retained part first bend others' names, to a third and
# less, and mend them later.) Done: at five looks in a row no answer gives the name and the floor is
# kept.
RUIN, RUINED, DONE = 0.2, 5, 5
COUNTS = ("named", "others", "lookalikes", "facts", "broken")


@dataclass(frozen=True)
class Size:
    """How much a look asks; None means all.

    own, other, alike: pictures of the concept, of each other concept, of each look-alike
    names, facts:      name questions and fact questions
    about:             others about whom facts are asked
    """

    own: int
    other: int
    alike: int
    names: int | None
    facts: int | None
    about: int | None


SEARCH, TEST = Size(10, 1, 5, 4, 4, 5), Size(10, 3, 10, None, None, None)


@dataclass(frozen=True)
class Point:
    """What one look counted.

    lr, step: the setting, with k
    k:        of a method that sculpts
    counts:   (hits, of how many), by COUNTS:
              named       answers about the concept's pictures that give the name
              others      answers about others that still give their names, where the untouched
                          model gives them
              lookalikes  the same about look-alikes
              facts       answers about facts whose first sentence is the untouched model's
              broken      answers that became degenerate
    """

    lr: float
    step: int
    counts: Mapping[str, tuple[int, int]]
    k: float = sculpting.K

    @property
    def named(self) -> float:
        return share(self.counts["named"])

    @property
    def kept(self) -> float:
        """What is compared with the floor: the smaller one of two shares, of others' names (with
        look-alikes) and of facts."""
        return min(
            share(added(self.counts["others"], self.counts["lookalikes"])),
            share(self.counts["facts"]),
        )


def over(points: Sequence[Point], floor: float) -> bool:
    """Is a run ruined or done, so that more steps show nothing new? floor: least `Point.kept`"""
    ruined = len(points) >= RUINED and points[-1].step >= 3 * points[-RUINED].step
    ruined = ruined and all(p.kept < RUIN for p in points[-RUINED:])
    return ruined or (
        len(points) >= DONE and all(p.named == 0 and p.kept >= floor for p in points[-DONE:])
    )


def added(*counts: tuple[int, int]) -> tuple[int, int]:
    return sum(hits for hits, _ in counts), sum(n for _, n in counts)


def share(count: tuple[int, int]) -> float:
    """The share of hits; 1 where nothing was asked, since nothing is lost."""
    return count[0] / count[1] if count[1] else 1.0


def total(counts: Iterable[Mapping[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    some = list(counts)
    return {key: added(*(c[key] for c in some)) for key in COUNTS}


# What is asked ------------------------------------------------------------------------------------


def exam(suite: Suite, subject: Subject, part: str) -> Exam:
    """Name questions about pictures, and fact questions without.

    part: "search" has every second one of each concept's further pictures, "test" has the others.
          Training uses none of them.
    """
    size = SEARCH if part == "search" else TEST

    def half(one: Subject) -> Sequence[Path]:
        return one.further[part != "search" :: 2]

    def seen(path: Path, role: str, name: str) -> Seen:
        return Seen(path.relative_to(suite.directory).as_posix(), path, role, name)

    alike = [s for s in suite.subjects if any(map(s.bears, subject.lookalikes))]
    rest = [s for s in suite.subjects if s is not subject and s not in alike]
    pictures = [seen(p, "concept", subject.name) for p in evenly(half(subject), size.own)]
    for role, some, most in (("lookalike", alike, size.alike), ("other", rest, size.other)):
        pictures += [seen(p, role, s.name) for s in some for p in evenly(half(s), most)]
    asked = dict.fromkeys((*suite.questions, *subject.questions))
    names = evenly([q for q in asked if q.kind == "name"], size.names)
    facts = evenly([q for q in asked if q.kind == "fact"], size.facts)
    return Exam(
        subject.concept,
        tuple(pictures),
        (*names, *facts),
        tuple(s.concept for s in evenly([*alike, *rest], size.about)),
    )


def count(
    asked: Exam, suite: Suite, before: Sequence[str], after: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """By COUNTS, (hits, of how many). before: the untouched model's answers; after: the answers of
    the model that is measured."""
    concepts = {s.name: s.concept for s in suite.subjects}
    counts = {key: [0, 0] for key in COUNTS}

    def add(key: str, hit: bool) -> None:
        counts[key][0] += hit
        counts[key][1] += 1

    for cell, was, now in zip(asked.cells, before, after, strict=True):
        add("broken", is_degenerate(now) is not None and is_degenerate(was) is None)
        if cell.seen is None:
            add("facts", same_beginning(was, now))
        elif cell.seen.role == "concept":
            add("named", asked.concept.named_in(now))
        elif cell.seen.shows is not None:
            other = concepts[cell.seen.shows]
            if other.named_in(was) and not asked.concept.named_in(was):
                key = "lookalikes" if cell.seen.role == "lookalike" else "others"
                add(key, other.named_in(now) and not asked.concept.named_in(now))
    return {key: (hits, n) for key, (hits, n) in counts.items()}


# Who does it --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assignment:
    """What every process needs to know. folder: has the prepared material; only this run writes
    there, and only this user can."""

    suite: Path
    model: str
    device: str | None
    dtype: str
    recipe: Recipe
    floor: float
    folder: Path


class Workbench:
    """What one process has: a loaded model, and the material, corpus and exams of its last job,
    which the next job may need again."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment, self.suite = assignment, read(assignment.suite)
        self.loaded = vlm.load(assignment.model, device=assignment.device, dtype=assignment.dtype)
        self.corpora: dict[tuple[str, int, str], Corpus] = {}
        self.unit: tuple[tuple[str, int], methods.Material] | None = None
        self.asking = cache(self._asking)

    def prepare(self, slug: str, seed: int) -> float:
        subject = self.suite.subject(slug)
        recipe = replace(self.assignment.recipe, seed=seed)
        request = Request(subject.name, subject.training, subject.aliases)
        with vlm.threads(self.loaded):
            material = methods.prepare(self.loaded, request, recipe, load_image(subject.training))
        write(self._file(slug, seed), pickle.dumps(material))
        return material.seconds

    def run(
        self,
        slug: str,
        seed: int,
        name: str,
        lr: float,
        looks: Sequence[int],
        part: str,
        k: float = sculpting.K,
    ) -> tuple[list[Point], float]:
        """Trains one method at one rate. Returns a point for each look, fewer where the run was
        ruined, done or diverged, and the seconds of training.

        looks: the steps after which the model is asked;  part: see `exam`;  k: where it sculpts
        """
        points: list[Point] = []
        with vlm.threads(self.loaded):
            asked, pictures, before = self.asking(slug, part)
            material = self._material(slug, seed)
            if (slug, seed, name) not in self.corpora:
                self.corpora = {(slug, seed, name): methods.build(self.loaded, name, material)}

            def watch(step: int) -> bool:
                if step in looks:
                    points.append(
                        Point(
                            lr,
                            step,
                            count(asked, self.suite, before, self._answers(asked, pictures)),
                            k,
                        )
                    )
                return over(points, self.assignment.floor)

            try:
                seconds = methods.fit(
                    self.loaded,
                    name,
                    self.corpora[slug, seed, name],
                    material,
                    lr,
                    max(looks),
                    watch,
                    k,
                )
            except NumericFailure:
                return points, 0.0
        return points, seconds

    def untouched(self, slug: str) -> dict[str, tuple[int, int]]:
        with vlm.threads(self.loaded):
            asked, _, before = self.asking(slug, "test")
        return count(asked, self.suite, before, before)

    def _asking(self, slug: str, part: str) -> tuple[Exam, dict[str, vlm.Picture], list[str]]:
        asked = exam(self.suite, self.suite.subject(slug), part)
        pictures = {seen.label: self.loaded.picture(seen.load()) for seen in asked.pictures}
        return asked, pictures, self._answers(asked, pictures)

    def _answers(self, asked: Exam, pictures: Mapping[str, vlm.Picture]) -> list[str]:
        return ask.answers(
            self.loaded, [(c.text, pictures[c.seen.label] if c.seen else None) for c in asked.cells]
        )

    def _material(self, slug: str, seed: int) -> methods.Material:
        if self.unit is None or self.unit[0] != (slug, seed):
            # The file was written by this run, in a folder that only this user can write.
            with self._file(slug, seed).open("rb") as stream:
                self.unit = (slug, seed), pickle.load(stream)
        return self.unit[1]

    def _file(self, slug: str, seed: int) -> Path:
        """A path with the concept's number in the suite: a file's name must not tell the
        concept."""
        number = self.suite.subjects.index(self.suite.subject(slug))
        return self.assignment.folder / f"{number}-{seed}.pickle"


_bench: Workbench | None = None  # of a worker process


def _begin(assignment: Assignment) -> None:
    global _bench
    _bench = Workbench(assignment)


def _do(job: tuple[str, tuple]) -> Any:
    verb, arguments = job
    return getattr(_bench, verb)(*arguments)


class Pool:
    """Jobs in several processes or, with one, in this process; results in the order of the jobs.

    A job is the name of a method of `Workbench` with its arguments.
    """

    def __init__(self, assignment: Assignment, processes: int) -> None:
        self._pool = None
        if processes > 1:
            packed = pickle.dumps((_begin, assignment))
            self._pool = ProcessPoolExecutor(
                processes, get_context("spawn"), initializer=process.start, initargs=(packed,)
            )
        else:
            self._bench = Workbench(assignment)

    def map(self, verb: str, jobs: Sequence[tuple]) -> Iterator[Any]:
        if self._pool is None:
            return (getattr(self._bench, verb)(*job) for job in jobs)
        return self._pool.map(_do, [(verb, job) for job in jobs])

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
