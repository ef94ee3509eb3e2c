"""`fastsiu suite DIR --join`: one of several processes that share the concepts of a suite.

They may run on one machine or on many, and share one output directory (`workers.joining`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import manifest
from ... import output as outputs
from ...guards.strict_json import read_json
from ...model import vlm
from ...request import BadInput
from ...session import Listener
from ...settings import ModelRef, RecipeChoice, Settings
from ...workers import joining
from ...workers.claims import Claims, Pace, at_work
from . import run as suite_run
from . import suite
from .job import FORMAT, SuiteJob, SuiteOptions
from .run import Evaluated, job_of, write_run
from .table import SUITE, Outcome, begin, outcome_of, write_table

SHAPE = {"concepts": [{"slug": str, "status": str}]}


@dataclass
class Joined:
    """What `join_suite` returns.

    evaluated: the table of all concepts; None where another worker writes it
    of:        the number of concepts that are shared
    """

    share: joining.Share
    evaluated: Evaluated | None
    output: Path
    of: int

    @property
    def exit_code(self) -> int:
        """The code of `Evaluated` where this worker wrote the table; 0 for the other workers."""
        return 0 if self.evaluated is None else self.evaluated.exit_code


def join_suite(
    directory: str | Path,
    options: SuiteOptions = SuiteOptions(),
    *,
    model: ModelRef = ModelRef(),
    recipe: RecipeChoice = RecipeChoice(),
    settings: Settings = Settings(),
    output: str | Path | None = None,
    pace: Pace = Pace(),
    run: str = "",
    listener: Listener | None = None,
) -> Joined:
    """Works on a suite, with others, until every concept is done or has failed.

    Options and errors are those of `evaluate_suite`; `output` is the directory that is shared.
    """
    listener = listener or Listener()
    if output is None:
        raise BadInput("--join needs the directory that the processes share: give --output DIR.")
    settings = joining.own_card(settings)
    job, subjects = job_of(directory, options, model, recipe, settings, output, listener)
    begin(job)
    job.output.mkdir(mode=0o700, exist_ok=True)
    if not (job.output / SUITE).is_file():
        write_table(job, {}, {})
    work = _Concepts(job)
    claims = Claims(job.output, pace, work.asked_under)
    claims.open(_digest_of_options(job))
    write_run(job, run)
    keys = [subject.slug for subject in subjects]
    resumed = sum(map(work.is_done, keys))
    try:
        share = joining.work_off(claims, keys, work, listener)
    finally:
        work.loaded = None
    drawn: list[dict[str, Any]] = []
    share.drew = joining.draw_once(
        claims,
        lambda: work.is_drawn(keys),
        lambda: drawn.append(work.draw(claims)),
        SUITE,
    )
    if not share.drew:
        return Joined(share, None, job.output, len(keys))
    done, failed = work.found(claims)
    outcomes = [failed.get(s.slug) or outcome_of(s, done[s.slug]) for s in subjects]
    return Joined(share, Evaluated(outcomes, drawn[0], job.output, resumed), job.output, len(keys))


def forecast(
    directory: str | Path,
    options: SuiteOptions = SuiteOptions(),
    *,
    model: ModelRef = ModelRef(),
    recipe: RecipeChoice = RecipeChoice(),
    settings: Settings = Settings(),
    output: str | Path,
) -> joining.Forecast:
    """How long the concepts that are left in `output` will take, from the times of those that are
    done. Loads nothing and writes nothing."""
    job, subjects = job_of(directory, options, model, recipe, settings, output, Listener())
    keys = [subject.slug for subject in subjects]
    work = _Concepts(job)
    claims = Claims(job.output, asked=work.asked_under)
    return joining.forecast(claims, keys, work, len(at_work(job.output)))


def _digest_of_options(job: SuiteJob) -> str:
    options = job.options
    content = {
        "format": FORMAT,
        "model": [job.model.name, job.commit, job.weights],
        "recipe": job.recipe.as_dict() if options.unlearn else None,
        "settings": job.deciding,
        "asked": [options.unlearn, options.limit, options.per_other, options.max_new_tokens],
    }
    return manifest.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())


@dataclass
class _Concepts:
    """The concepts of a suite as units of work (`workers.joining.Units`), and their table.

    loaded: the model; None until the first concept begins
    """

    job: SuiteJob
    loaded: vlm.VLM | None = None
    done: set[str] = field(default_factory=set)

    def is_done(self, slug: str) -> bool:
        place = self.job.output / slug
        if slug not in self.done and place.exists():
            if outputs.holds(place, self.job.digest(self.job.given.subject(slug))):
                self.done.add(slug)
        return slug in self.done

    def asked_under(self, key: str) -> str:
        """The digest of what is done with the concept; "" for the table, and while a file cannot be
        read."""
        try:
            return "" if key == SUITE else self.job.digest(self.job.given.subject(key))
        except BadInput:  # `do` says so
            return ""

    def do(self, slug: str, listener: Listener) -> str:
        subject = self.job.given.subject(slug)
        if self.loaded is None:
            self.loaded = self.job.load(listener)
        with vlm.threads(self.loaded):
            suite_run.one(self.loaded, self.job, subject, listener)
        return outcome_of(subject, outputs.read_report(self.job.output / slug)).status

    def reason(self, slug: str, error: BaseException) -> str:
        return self.job.reason(error)

    def found(self, claims: Claims) -> tuple[dict[str, dict[str, Any]], dict[str, Outcome]]:
        """The reports of the concepts that are done, and those that failed, by slug."""
        done: dict[str, dict[str, Any]] = {}
        failed: dict[str, Outcome] = {}
        for subject in self.job.given.subjects:
            if self.is_done(subject.slug):
                done[subject.slug] = outputs.read_report(self.job.output / subject.slug)
            elif failure := claims.failure(subject.slug):
                failed[subject.slug] = _failed(subject, failure)
        return done, failed

    def draw(self, claims: Claims) -> dict[str, Any]:
        return write_table(self.job, *self.found(claims))

    def is_drawn(self, keys: list[str]) -> bool:
        """Does the table have every concept, and "failed" for those without an output?"""
        path = self.job.output / SUITE
        table = read_json(path, what=str(path), remedy="remove it", shape=SHAPE)
        stored = {one["slug"]: one["status"] for one in table.get("concepts", [])}
        return all(
            stored.get(slug, "failed") != "failed"
            if self.is_done(slug)
            else stored.get(slug) == "failed"
            for slug in keys
        )


def _failed(subject: suite.Subject, failure: dict[str, Any]) -> Outcome:
    reason, numeric = str(failure.get("reason")), bool(failure.get("numeric"))
    return Outcome(subject.slug, subject.name, "failed", [reason], numeric)
