"""`fastsiu compare`: SIU beside other methods, each at its best setting, on the concepts of a suite.

    prepare   samples, dreams and the untouched model's answers, once per (concept, seed), shared by all methods
    search    every method x the same learning rates, looked at after the same numbers of steps, on SEARCH pictures
    choose    per method, over all concepts: the lowest share of the name still given among settings that keep the utility floor
    test      new seeds (and dreams) at that setting, on TEST pictures that neither training nor the search has seen
"""

from __future__ import annotations

import json
import pickle
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import driver, methods, vlm
from .evaluate.exam import Exam, Seen
from .evaluate.suite import Subject, Suite, evenly, read
from .images import load_image
from .request import BadInput, NumericFailure, Recipe, Request
from .session import Listener
from .verdict import Rate, is_degenerate, same_answer

FORMAT = "fastsiu comparison 1"
LRS = (0.3, 1.0, 3.0)  # times the recipe's
LOOKS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 64, 80)  # steps; the recipe's ceiling cuts them
RUIN = 0.5  # a run that keeps less than this at two looks in a row is not trained further
SEARCH_SEED = 0
COUNTS = ("named", "others", "lookalikes", "facts", "broken")


@dataclass(frozen=True)
class Size:
    """How many pictures and questions: of the concept, of each other concept and of a look-alike; name questions and fact
    questions, and others that facts are asked about. None is all."""

    own: int
    other: int
    alike: int
    names: int | None
    facts: int | None
    about: int | None


SEARCH, TEST = Size(8, 1, 4, 3, 4, 5), Size(10, 3, 10, None, None, None)


@dataclass(frozen=True)
class Point:
    """One setting. counts: (hits, of how many) of COUNTS: answers with the name to pictures of the concept; others' names, and
    look-alikes', still given where the untouched model gives them; facts answered as before; degenerate answers of all."""

    lr: float
    step: int
    counts: Mapping[str, tuple[int, int]]

    @property
    def named(self) -> float:
        return _share(self.counts["named"])

    @property
    def kept(self) -> float:
        """What the floor is about: the smaller of others' naming (look-alikes included) and facts."""
        return min(_share(_sum(self.counts["others"], self.counts["lookalikes"])), _share(self.counts["facts"]))


# What is decided, from counts alone -----------------------------------------------------------------------------------------


def choose(points: Sequence[Point], floor: float) -> tuple[Point, bool]:
    """The point with the lowest share of the name still given among those that keep the floor, and True; where none does, the one
    that keeps most, and False. Among equals the one that keeps more, then fewer steps, then the lower rate."""
    good = [p for p in points if p.kept >= floor]
    if good:
        return min(good, key=lambda p: (p.named, -p.kept, p.step, p.lr)), True
    return min(points, key=lambda p: (-p.kept, p.named, p.step, p.lr)), False


def pooled(points: Iterable[Point], runs: int) -> list[Point]:
    """Points of the same setting added up; a setting that fewer than `runs` runs reached is left out."""
    found: dict[tuple[float, int], list[Point]] = {}
    for point in points:
        found.setdefault((point.lr, point.step), []).append(point)
    return [Point(*key, _added(p.counts for p in some)) for key, some in sorted(found.items()) if len(some) == runs]


def front(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which rows no other beats: none keeps at least as much and gives the name at most as often, one of the two strictly."""
    place = [(row["kept"]["value"], -row["named"]["value"]) for row in rows]
    beats = lambda a, b: a != b and a[0] >= b[0] and a[1] >= b[1]
    return [not any(beats(other, own) for other in place) for own in place]


def beaten_clearly(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The methods that beat a row by more than its and their 95 % intervals on one axis, and are not behind on the other."""
    found = []
    for other in rows:
        less, more = other["named"]["value"] <= row["named"]["value"], other["kept"]["value"] >= row["kept"]["value"]
        clear = other["named"]["high"] < row["named"]["low"] or other["kept"]["low"] > row["kept"]["high"]
        if less and more and clear:
            found.append(other["method"])
    return found


def _sum(*counts: tuple[int, int]) -> tuple[int, int]:
    return sum(hits for hits, _ in counts), sum(n for _, n in counts)


def _share(count: tuple[int, int]) -> float:
    """Nothing asked, nothing lost."""
    return count[0] / count[1] if count[1] else 1.0


def _added(counts: Iterable[Mapping[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    some = list(counts)
    return {key: _sum(*(c[key] for c in some)) for key in COUNTS}


# What is asked --------------------------------------------------------------------------------------------------------------


def exam(suite: Suite, subject: Subject, part: str) -> Exam:
    """Name questions about pictures, fact questions without. The two parts have no picture in common, and none with training:
    of every concept's further pictures, "search" has every second one and "test" the others."""
    size = SEARCH if part == "search" else TEST
    half = lambda one: one.further[part != "search" :: 2]
    seen = lambda path, role, name: Seen(path.relative_to(suite.directory).as_posix(), path, role, name)
    rest = [s for s in suite.subjects if s is not subject]
    alike = [s for s in rest if s.name in subject.lookalikes]
    pictures = [seen(p, "concept", subject.name) for p in evenly(half(subject), size.own)]
    for role, some, most in (("lookalike", alike, size.alike), ("other", [s for s in rest if s not in alike], size.other)):
        pictures += [seen(p, role, s.name) for s in some for p in evenly(half(s), most)]
    asked = dict.fromkeys((*suite.questions, *subject.questions))
    of = lambda kind, most: evenly([q for q in asked if q.kind == kind], most)
    questions = (*of("name", size.names), *of("fact", size.facts))
    return Exam(subject.concept, tuple(pictures), questions, tuple(s.concept for s in evenly([*alike, *rest], size.about)))


def count(asked: Exam, suite: Suite, before: Sequence[str], after: Sequence[str]) -> dict[str, tuple[int, int]]:
    """COUNTS of one model's answers, `before` the untouched model's."""
    concepts = {s.name: s.concept for s in suite.subjects}
    found = {key: [0, 0] for key in COUNTS}

    def add(key: str, hit: bool) -> None:
        found[key][0] += hit
        found[key][1] += 1

    for cell, was, now in zip(asked.cells, before, after, strict=True):
        add("broken", is_degenerate(now) is not None and is_degenerate(was) is None)
        if cell.seen is None:
            add("facts", same_answer(was, now))
        elif cell.seen.role == "concept":
            add("named", asked.concept.named_in(now))
        elif concepts[cell.seen.shows].named_in(was) and not asked.concept.named_in(was):
            key = "lookalikes" if cell.seen.role == "lookalike" else "others"
            add(key, concepts[cell.seen.shows].named_in(now) and not asked.concept.named_in(now))
    return {key: (hits, n) for key, (hits, n) in found.items()}


# Who does it ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What every process is told. folder: where prepared material lies, of this run alone."""

    suite: Path
    model: str
    device: str | None
    dtype: str
    recipe: Recipe
    folder: Path


class Workbench:
    """One process: a loaded model and what was last needed of each kind."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.suite = settings, read(settings.suite)
        self.loaded = vlm.load(settings.model, device=settings.device, dtype=settings.dtype)
        self.made: dict[tuple[str, int, str], Any] = {}
        self.unit: tuple[tuple[str, int], methods.Material] | None = None
        self.asking = cache(self._asking)

    def prepare(self, slug: str, seed: int) -> float:
        subject = self.suite.subject(slug)
        recipe = replace(self.settings.recipe, seed=seed)
        request = Request(subject.name, subject.training, subject.aliases)
        with vlm.threads(self.loaded):
            material = methods.prepare(self.loaded, request, recipe, load_image(subject.training))
        with self._file(slug, seed).open("wb") as stream:
            pickle.dump(material, stream)
        return material.seconds

    def run(self, slug: str, seed: int, name: str, lr: float, looks: Sequence[int], part: str) -> tuple[list[Point], float]:
        """A point for each look, and the seconds of training; fewer points where the run was ruined or diverged."""
        points: list[Point] = []
        with vlm.threads(self.loaded):
            asked, pictures, before = self.asking(slug, part)
            material = self._material(slug, seed)
            if (slug, seed, name) not in self.made:
                self.made = {(slug, seed, name): methods.build(self.loaded, name, material)}

            def watch(step: int) -> bool:
                if step in looks:
                    points.append(Point(lr, step, count(asked, self.suite, before, self._answers(asked, pictures))))
                return len(points) > 1 and all(p.kept < RUIN for p in points[-2:])

            try:
                seconds = methods.fit(self.loaded, name, self.made[slug, seed, name], material, lr, max(looks), watch)
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
        from . import ask

        return ask.answers(self.loaded, [(c.text, pictures[c.seen.label] if c.seen else None) for c in asked.cells])

    def _material(self, slug: str, seed: int) -> methods.Material:
        if self.unit is None or self.unit[0] != (slug, seed):
            with self._file(slug, seed).open("rb") as stream:  # written by this run, read by nobody else
                self.unit = (slug, seed), pickle.load(stream)
        return self.unit[1]

    def _file(self, slug: str, seed: int) -> Path:
        return self.settings.folder / f"{slug}-{seed}.pickle"


_bench: Workbench | None = None  # of a worker process


def _start(settings: Settings) -> None:
    global _bench
    _bench = Workbench(settings)


def _do(job: tuple[str, tuple]) -> Any:
    verb, arguments = job
    return getattr(_bench, verb)(*arguments)


class Pool:
    """Jobs on several processes, or here with one; results in the order of the jobs."""

    def __init__(self, settings: Settings, processes: int) -> None:
        self._pool = None
        if processes > 1:
            self._pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start, initargs=(settings,))
        else:
            self._bench = Workbench(settings)

    def map(self, verb: str, jobs: Sequence[tuple]) -> Iterator[Any]:
        if self._pool is None:
            return (getattr(self._bench, verb)(*job) for job in jobs)
        return self._pool.map(_do, [(verb, job) for job in jobs])

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


# The story ------------------------------------------------------------------------------------------------------------------


def compare(
    suite: Path, model: str, *, names: Sequence[str] = (), concepts: Sequence[str] = (), seeds: int = 3, floor: float = 0.95,
    processes: int = 2, lrs: Sequence[float] = LRS, steps: int | None = None, device: str | None = None, dtype: str = "auto",
    listener: Listener | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The report of a comparison (`FORMAT`), ready for JSON.

    names:    of `methods.METHODS`; all when empty
    concepts: slugs or names of the suite; when empty its first concept with a look-alike in it and its first without
    seeds:    trainings at the chosen setting, with seeds 1, 2, ... (the search has seed 0)
    floor:    what the chosen setting must keep of others' naming and of facts, as a share of the untouched model's
    lrs:      the grid, times the recipe's rate
    steps:    ceiling, the recipe's when None

    Raises BadInput for names that do not exist, a suite too small for a search and a test, or a concept the model does not name.
    """
    listener, started = listener or Listener(), time.perf_counter()
    chosen = list(names) or list(methods.METHODS)
    if unknown := [n for n in chosen if n not in methods.METHODS]:
        raise BadInput(f"There is no method {unknown[0]!r}: choose from {', '.join(methods.METHODS)}.")
    if not 0 < floor <= 1 or seeds < 1 or processes < 1:
        raise BadInput("The floor must be above 0 and at most 1, seeds and processes at least 1: correct the numbers.")
    held = read(suite)
    subjects = [held.subject(c) for c in dict.fromkeys(concepts)] or _some(held)
    for one in held.subjects:
        if len(one.further) < 2:
            raise BadInput(f"{one.slug} has {len(one.further)} pictures besides the training picture: the search and the test "
                           "need at least one each.")  # fmt: skip
    recipe, _ = driver.choose_recipe(model, "default", {"steps": steps})
    if recipe.schedule != "constant" or recipe.warmup:
        raise BadInput("The search looks at a run as it goes, which needs a constant rate: set schedule 'constant' and warmup 0.")
    looks = tuple(dict.fromkeys([*(k for k in LOOKS if k < recipe.steps), recipe.steps]))
    slugs, rates = [s.slug for s in subjects], [recipe.lr * x for x in lrs]
    with tempfile.TemporaryDirectory(prefix="fastsiu-compare-") as folder:
        pool = Pool(Settings(Path(suite), model, device, dtype, recipe, Path(folder)), processes)
        try:
            units = [(slug, seed) for seed in range(SEARCH_SEED, SEARCH_SEED + seeds + 1) for slug in slugs]
            prepared = sum(_told(listener, "Preparing", pool.map("prepare", units), units))
            jobs = [(s, SEARCH_SEED, name, lr, looks, "search") for s in slugs for name in chosen for lr in rates]
            trajectories = list(_told(listener, "Searching", pool.map("run", jobs), jobs))
            found = {name: pooled((p for job, (points, _) in zip(jobs, trajectories, strict=True) if job[2] == name
                                   for p in points), len(slugs)) for name in chosen}  # fmt: skip
            settings = {name: choose(points, floor) for name, points in found.items() if points}
            jobs = [(s, seed, name, point.lr, (point.step,), "test") for s, seed in units if seed != SEARCH_SEED
                    for name, (point, _) in settings.items()]  # fmt: skip
            tested = list(zip(jobs, _told(listener, "Testing", pool.map("run", jobs), jobs), strict=True))
            untouched = _added(pool.map("untouched", [(slug,) for slug in slugs]))
        finally:
            pool.close()
    rows = [_row(name, settings.get(name), [(job, points, s) for job, (points, s) in tested if job[2] == name], found[name])
            for name in chosen]  # fmt: skip
    ran = [row for row in rows if row["named"]["value"] is not None]
    for row, best in zip(ran, front(ran), strict=True):
        row |= {"front": best, "clearly_beaten_by": beaten_clearly(row, ran)}
    return {
        "format": FORMAT, "suite": held.title, "concepts": [s.name for s in subjects], "model": model, "floor": floor,
        "recipe": recipe.as_dict(),
        "search": {"lr": rates, "steps": list(looks), "seed": SEARCH_SEED, "ruin": RUIN, "asked": asdict(SEARCH)},
        "test": {"seeds": list(range(1, seeds + 1)), "asked": asdict(TEST)},
        "untouched": _rates(untouched), "rows": rows, "processes": processes,
        "seconds": {"prepare": round(prepared, 1), "all": round(time.perf_counter() - started, 1)},
    }  # fmt: skip


def write(report: Mapping[str, Any], directory: Path) -> list[str]:
    """DIR/compare.json, compare.md, and compare.png and .svg where matplotlib is installed; sentences about what is missing."""
    from .report import front as drawn

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "compare.json").write_text(json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False) + "\n", "utf-8")
    (directory / "compare.md").write_text(drawn.markdown(report), "utf-8")
    return drawn.plot(report, directory)


def _some(suite: Suite) -> list[Subject]:
    names = {s.name for s in suite.subjects}
    alike = next((s for s in suite.subjects if names & set(s.lookalikes)), None)
    alone = next((s for s in suite.subjects if not names & set(s.lookalikes)), None)
    return [s for s in (alike, alone) if s is not None]


def _told(listener: Listener, what: str, results: Iterable[Any], jobs: Sequence[Any]) -> Iterator[Any]:
    for number, result in enumerate(results):
        listener.stage(f"{what}: {number + 1} of {len(jobs)}")
        yield result


def _rates(counts: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Shares with intervals; `kept` is the smaller of naming (others and look-alikes) and facts, with that one's interval."""
    rate = lambda count: (Rate.of(*count) if count[1] else Rate(None, reason="Nothing was asked.")).as_dict()
    naming = _sum(counts["others"], counts["lookalikes"])
    kept = min(filter(lambda c: c[1], (naming, counts["facts"])), key=_share, default=(0, 0))
    return {"kept": rate(kept), "naming": rate(naming), **{key: rate(counts[key]) for key in COUNTS}}


def _row(name: str, setting: tuple[Point, bool] | None, runs: Sequence[tuple], points: Sequence[Point]) -> dict[str, Any]:
    """One method's row; without a setting (it diverged everywhere) or a finished run, with no value and the reason."""
    row: dict[str, Any] = {"method": name, "about": methods.METHODS[name].about}
    searched = [{"lr": p.lr, "step": p.step, "named": round(p.named, 4), "kept": round(p.kept, 4)} for p in points]
    done = [(job, found[-1], s) for job, found, s in runs if found]
    if setting is None or not done:
        none = {"value": None, "reason": "It diverged in every run."}
        return row | {"named": none, "kept": none, "front": False, "searched": searched}
    point, met = setting
    seeds = {seed: _added(p.counts for job, p, _ in done if job[1] == seed) for seed in dict.fromkeys(job[1] for job, *_ in done)}
    single = [{"seed": seed, **{k: Point(0, 0, c).named if k == "named" else Point(0, 0, c).kept for k in ("named", "kept")}}
              for seed, c in seeds.items()]  # fmt: skip
    return row | {
        "lr": point.lr, "steps": point.step, "floor_met": met, "search": {"named": point.named, "kept": point.kept},
        "diverged": len(runs) - len(done), "seeds": single, **_rates(_added(seeds.values())),
        "seconds": round(sum(s for *_, s in done) / len(done), 1), "searched": searched,
    }  # fmt: skip


