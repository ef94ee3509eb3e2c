"""`fastsiu compare`: SIU beside other methods, each at its best setting, on the concepts of a
suite.

prepare   samples, dreams and the untouched model's answers, once per (concept, seed), shared by all
          methods
search    every method x the same learning rates, looked at after the same numbers of steps, on
          pictures of all concepts held apart for that; `smfa` also x the values of its k
choose    per method: the lowest share of the name still given among settings that keep the utility
          floor
test      on all concepts: new seeds, and dreams, at that setting, on pictures that neither training
          nor the search has seen
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..disk.staging import Staging, check_new
from ..disk.staging import write as write_file
from ..evaluate.suites.suite import Subject, Suite, read
from ..model import placement
from ..output import write_run
from ..request import BadInput
from ..session import Listener
from ..settings import EMBEDDED, ModelRef, RecipeChoice, Settings, choose_recipe
from ..text.rate import Rate
from . import methods, renewed, sculpting, trials
from .choice import choose, marked, over_concepts
from .trials import (
    COUNTS,
    DONE,
    RUIN,
    RUINED,
    SEARCH,
    TEST,
    Point,
    Pool,
    added,
    share,
    total,
)

FORMAT = "fastsiu comparison 1"
LRS = (0.3, 1.0, 3.0)  # times the recipe's
LOOKS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 64, 80)  # steps; the recipe's ceiling cuts them
SEARCH_SEED = 0


@dataclass(frozen=True)
class Search:
    """What is compared, and how each method's best setting is looked for.

    names:    of `methods.METHODS`; all when empty
    concepts: slugs or names of the suite; when empty its first concept with a look-alike in it and
              its first without
    seeds:    trainings at the chosen setting, with seeds 1, 2, ... (the search has seed 0)
    floor:    what the chosen setting must keep of others' naming and of facts, as a share of the
              untouched model's
    lrs:      the grid, times the recipe's rate
    steps:    ceiling, the recipe's when None
    quick:    one method, rate, concept and seed, 8 steps: whether it runs, and nothing else
    """

    names: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()
    seeds: int = 3
    floor: float = 0.95
    lrs: tuple[float, ...] = LRS
    steps: int | None = None
    quick: bool = False

    def resolved(self) -> Search:
        """With the names of all methods where none was given, and what `quick` means.

        Raises BadInput for a method that does not exist and numbers out of their bounds.
        """
        names = tuple(dict.fromkeys(self.names))
        if unknown := [name for name in names if name not in methods.METHODS]:
            raise BadInput(
                f"There is no method {unknown[0]!r}: choose from {', '.join(methods.METHODS)}."
            )
        if not 0 < self.floor <= 1 or self.seeds < 1:
            raise BadInput(
                "The floor must be above 0 and at most 1, and seeds at least 1: correct the "
                "numbers."
            )
        if self.quick:
            return replace(self, names=names[:1] or ("siu",), lrs=(1.0,), steps=8, seeds=1)
        return replace(self, names=names or tuple(methods.METHODS))


def compare(
    suite: Path,
    search: Search = Search(),
    *,
    model: ModelRef = ModelRef(),
    settings: Settings = Settings(),
    processes: int = 2,
    earlier: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    scratch: Path | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """The report of a comparison (`FORMAT`), ready for JSON.

    settings: device and dtype; a comparison has no other
    processes: each with a model of its own; one with `search.quick`
    earlier:  an earlier report of the same concepts and recipe, whose search is taken instead of a
              new one
    beside:   an earlier report, whose rows of other methods the new ones will stand beside
    scratch:  an empty directory for what the processes share, which the caller removes; one of its
              own, in the directory that the command runs in, when None

    Raises BadInput for names that do not exist, a suite too small for a search and a test, a
    concept the model does not name, and where `beside` is not comparable (`renewed.check`).
    """
    listener, started = listener or Listener(), time.perf_counter()
    if processes < 1:
        raise BadInput("--processes must be at least 1: give a larger number.")
    search = search.resolved()
    processes = 1 if search.quick else processes
    held = read(suite)
    wanted = {s.slug: s for s in map(held.subject, search.concepts)}  # a concept has several names
    subjects = [*wanted.values()] or _some(held)
    subjects = subjects[:1] if search.quick else subjects
    for one in held.subjects:
        if len(one.further) < 2:
            raise BadInput(
                f"{one.slug} has {len(one.further)} pictures besides the training picture: the "
                "search and the test need at least one each."
            )
    device, said = placement.settled(settings.device)
    if said:
        listener.note(said)
    # A run is looked at as it goes, which needs a constant rate. Lessons from strangers are no part
    # of any of these methods, nor are the directions that they tell apart, and their rate. Nor does
    # any rehearse, or hold features.
    changes = dict(steps=search.steps, schedule="constant", warmup=0.0, strangers=0)
    changes |= dict(relearn=0, anchor=0)
    recipe, _ = choose_recipe(model.name, RecipeChoice(changes=changes))
    same = lambda one: (one["concepts"], one["search"]["asked"])
    if earlier and not (
        same(earlier) == ([s.name for s in subjects], asdict(SEARCH))
        and renewed.same_recipe(recipe.as_dict(), earlier["recipe"])
    ):
        raise BadInput(
            "The earlier search was of other concepts, another recipe or another size: search anew."
        )
    looks = tuple(dict.fromkeys([*(k for k in LOOKS if k < recipe.steps), recipe.steps]))
    slugs, rates = [s.slug for s in subjects], [recipe.lr * x for x in search.lrs]
    plan = {
        "format": FORMAT,
        "suite": held.title,
        "concepts": [s.name for s in subjects],
        "model": "embedded" if model.name == str(EMBEDDED) else model.name,
        "floor": search.floor,
        "recipe": recipe.as_dict(),
        "search": {
            "concepts": [s.name for s in subjects],
            "lr": rates,
            "steps": list(looks),
            "seed": SEARCH_SEED,
            "ruin": [RUIN, RUINED],
            "done": DONE,
            "asked": asdict(SEARCH),
        },
        "test": {"seeds": list(range(1, search.seeds + 1)), "asked": asdict(TEST)},
    }
    if beside is not None:
        renewed.check(plan, beside)
    ks_of = lambda name: (not search.quick and methods.METHODS[name].sculpt) or (sculpting.K,)
    with contextlib.nullcontext(scratch) if scratch is not None else Staging(Path.cwd()) as folder:
        bench = trials.Assignment(
            suite, model.name, device, settings.dtype, recipe, search.floor, folder
        )
        pool = Pool(bench, processes)
        try:
            units = [
                (slug, seed)
                for seed in range(SEARCH_SEED, SEARCH_SEED + 1 + search.seeds)
                for slug in slugs
            ]
            first, rest = units[: len(slugs)], units[len(slugs) :]
            units = rest if earlier else units
            prepared = sum(_told(listener, "Preparing", pool.map("prepare", units), units))
            untouched = total(pool.map("untouched", [(slug,) for slug in slugs]))
            if beside is not None:
                renewed.check({"untouched": _rates(untouched)}, beside)
            if not any(untouched[key][1] for key in ("others", "lookalikes", "facts")):
                raise BadInput(
                    "Nothing could be retained: add a concept that the model names, or a "
                    "question of kind 'fact'."
                )
            points_of: dict[str, list[Point]] = {
                name: _searched(earlier, name) if earlier else [] for name in search.names
            }
            jobs = (
                []
                if earlier
                else [
                    (*u, name, lr, looks, "search", k)
                    for name in search.names
                    for lr in rates
                    for k in ks_of(name)
                    for u in first
                ]
            )
            searched = _told(listener, "Searching", pool.map("run", jobs), jobs)
            runs: dict[tuple[str, float, float], list[list[Point]]] = defaultdict(list)
            for (_, _, name, lr, *_, k), (points, _) in zip(jobs, searched, strict=True):
                runs[name, lr, k].append(points)
            for (name, *_), some in runs.items():
                points_of[name] += over_concepts(some)
            best = {
                name: choose(points, search.floor) for name, points in points_of.items() if points
            }
            jobs = [
                (*unit, name, point.lr, (point.step,), "test", point.k)
                for unit in rest
                for name, (point, _) in best.items()
            ]
            tested = list(
                zip(jobs, _told(listener, "Testing", pool.map("run", jobs), jobs), strict=True)
            )
        finally:
            pool.close()
    rows = [
        _row(
            name,
            best.get(name),
            [(job, points, s) for job, (points, s) in tested if job[2] == name],
            points_of[name],
        )
        for name in search.names
    ]
    return {
        **plan,
        "untouched": _rates(untouched),
        "rows": marked(rows),
        "processes": processes,
        "seconds": {"prepare": round(prepared, 1), "all": round(time.perf_counter() - started, 1)},
    }


def write(report: Mapping[str, Any], directory: Path, run: str = "") -> list[str]:
    """DIR/compare.json, compare.md, and compare.png and .svg where matplotlib is installed;
    sentences about what is missing.

    run: the text of run.toml; "" for none

    All at once, for their owner alone. Raises BadInput where DIR exists or cannot be written.
    """
    from . import front

    check_new(directory, "name another --output")
    directory.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    with Staging(directory.parent) as folder:
        for name, content in (("compare.json", text), ("compare.md", front.markdown(report))):
            write_file(folder / name, content.encode("utf-8", "replace"))
        write_run(folder, run)
        notes = front.plot(report, folder)
        os.rename(folder, directory)
    return notes


def _searched(report: Mapping[str, Any], name: str) -> list[Point]:
    """The points of an earlier report's search."""
    points: list[dict[str, Any]] = next(
        (row["searched"] for row in report["rows"] if row["method"] == name), []
    )
    return [
        Point(
            p["lr"],
            p["step"],
            {
                "named": (p["named"], 1),
                "others": (p["kept"], 1),
                "lookalikes": (0, 0),
                "facts": (1, 1),
                "broken": (0, 1),
            },
            p.get("k", sculpting.K),
        )
        for p in points
    ]


def _some(suite: Suite) -> list[Subject]:
    """One concept that has a look-alike in the suite, and one that has none."""
    has = {
        s.slug: any(other.bears(name) for other in suite.subjects for name in s.lookalikes)
        for s in suite.subjects
    }
    alike = next((s for s in suite.subjects if has[s.slug]), None)
    alone = next((s for s in suite.subjects if not has[s.slug]), None)
    return [s for s in (alike, alone) if s is not None]


def _told(
    listener: Listener, what: str, results: Iterable[Any], jobs: Sequence[Any]
) -> Iterator[Any]:
    for number, result in enumerate(results):
        listener.stage(f"{what}: {number + 1} of {len(jobs)}")
        yield result


def _rates(counts: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Shares with intervals; `kept` is the smaller of naming (others and look-alikes) and facts,
    with that one's interval."""
    rate = lambda count: (
        Rate.of(*count) if count[1] else Rate(None, reason="Nothing was asked.")
    ).as_dict()
    naming = added(counts["others"], counts["lookalikes"])
    kept = min(filter(lambda c: c[1], (naming, counts["facts"])), key=share, default=(0, 0))
    return {
        "kept": rate(kept),
        "naming": rate(naming),
        **{key: rate(counts[key]) for key in COUNTS},
    }


def _row(
    name: str, setting: tuple[Point, bool] | None, runs: Sequence[tuple], points: Sequence[Point]
) -> dict[str, Any]:
    """One method's row; without a setting (it diverged everywhere) or a finished run, with no value
    and the reason."""
    row: dict[str, Any] = {"method": name, "about": methods.METHODS[name].about}
    k_of: Callable[[Point], dict[str, float]] = lambda p: (
        {"k": p.k} if methods.METHODS[name].sculpt else {}
    )
    searched = [
        {"lr": p.lr, "step": p.step, "named": round(p.named, 4), "kept": round(p.kept, 4)} | k_of(p)
        for p in points
    ]
    done = [(job, found[-1], s) for job, found, s in runs if found]
    if setting is None or not done:
        none = {"value": None, "reason": "It diverged in every run."}
        return row | {"named": none, "kept": none, "front": False, "searched": searched}
    point, met = setting
    seeds = {
        seed: total(p.counts for job, p, _ in done if job[1] == seed)
        for seed in dict.fromkeys(job[1] for job, *_ in done)
    }
    single = [
        {
            "seed": seed,
            **{
                k: Point(0, 0, c).named if k == "named" else Point(0, 0, c).kept
                for k in ("named", "kept")
            },
        }
        for seed, c in seeds.items()
    ]
    return row | {
        "lr": point.lr,
        "steps": point.step,
        **k_of(point),
        "floor_met": met,
        "search": {"named": point.named, "kept": point.kept},
        "diverged": len(runs) - len(done),
        "seeds": single,
        **_rates(total(seeds.values())),
        "seconds": round(sum(s for *_, s in done) / len(done), 1),
        "searched": searched,
    }
