"""`fastsiu suite DIR`: every concept of a suite on one model, one output each, and a table
of all at the end.

For each concept it measures the untouched model. Beside it, it measures the model after unlearning
from the concept's training picture, or with an adapter that exists already. It writes OUT/SLUG in
one transaction, once, so a run that was interrupted goes on with the concept that it was at. After
each concept it writes OUT/suite.json and OUT/report.md anew from all outputs.

Several runs on one machine may share an output: one of them claims each concept
(`disk.staging.claim`). The claim ends with its process. `suites.join` is for many machines.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import output as outputs
from ... import process, session
from ...disk import staging
from ...driver import base_of
from ...images import load_image, read_bytes
from ...model import adapter, adapter_files, source, vlm
from ...request import BadInput, OutOfMemory, Request
from ...session import Listener
from ...settings import ModelRef, RecipeChoice, Settings, choose_layout, choose_recipe, deciding
from ...workers.joining import FAILURES
from .. import attacking
from ..eval_files import UNTOUCHED
from ..eval_report import report_of
from ..observe import examine
from . import suite
from .job import FORMAT, SuiteJob, SuiteOptions, cached, manifest
from .table import Outcome, done_already, is_there, outcome_of, write_table

PAUSE = 0.5  # seconds between two looks at what another run is at


@dataclass
class Evaluated:
    """What `evaluate_suite` returns.

    resumed: how many concepts were done before
    report:  suite.json
    """

    outcomes: list[Outcome]
    report: dict[str, Any]
    output: Path
    resumed: int = 0

    @property
    def exit_code(self) -> int:
        """0: all are forgotten, or measured where nothing was to be forgotten. 1: some are not. 2:
        every concept failed because of its input. 3: every one failed, some in the computation."""
        failed = [o for o in self.outcomes if o.status == "failed"]
        if len(failed) == len(self.outcomes):
            return 3 if any(o.numeric for o in failed) else 2
        return 0 if all(o.status in ("forgotten", "untouched") for o in self.outcomes) else 1


def evaluate_suite(
    directory: str | Path,
    options: SuiteOptions = SuiteOptions(),
    *,
    model: ModelRef = ModelRef(),
    recipe: RecipeChoice = RecipeChoice(),
    settings: Settings = Settings(),
    processes: int = 1,
    output: str | Path | None = None,
    run: str = "",
    listener: Listener | None = None,
) -> Evaluated:
    """Evaluates a model on the concepts of a suite, each from beginning to end.

    processes: number of processes, each with a copy of the model and one thread
    run:       the text of run.toml; "" for none

    Run again, it does the concepts that are missing. Raises BadInput where the suite, a picture or
    the output cannot be used; no model is loaded then. A concept that fails later stops no other:
    its `Outcome` says why it failed.
    """
    listener = listener or Listener()
    if processes < 1:
        raise BadInput("--processes must be at least 1: give a larger number.")
    job, subjects = job_of(directory, options, model, recipe, settings, output, listener)
    done = done_already(job)
    todo = [subject for subject in subjects if subject.slug not in done]
    resumed = [subject.slug for subject in subjects if subject.slug in done]
    if resumed:
        listener.note(f"Done already: {', '.join(resumed)}.")
    failed = _work_off(job, done, todo, processes, listener)
    report = write_table(job, done, failed)
    write_run(job, run)
    outcomes = [failed.get(s.slug) or outcome_of(s, done[s.slug]) for s in subjects]
    return Evaluated(outcomes, report, job.output, len(resumed))


def job_of(
    directory: str | Path,
    options: SuiteOptions,
    model: ModelRef,
    recipe: RecipeChoice,
    settings: Settings,
    output: str | Path | None,
    listener: Listener,
) -> tuple[SuiteJob, list[suite.Subject]]:
    """What every process needs to know, and the concepts that are asked for. Raises BadInput as
    `evaluate_suite` does; nothing is loaded and nothing written."""
    options.check()
    if not options.unlearn and not recipe.is_default:
        raise BadInput("The recipe's options are about training: add --unlearn, or leave them out.")
    given = suite.read(directory)
    listener.stage("Reading the pictures")
    suite.check(given)
    wanted = [given.subject(name) for name in options.concepts] or given.subjects
    subjects = [subject for subject in given.subjects if subject in wanted]
    chosen, origins = choose_recipe(model.name, recipe, model.revision)
    images = (load_image(subject.training) for subject in subjects)
    largest = max(images, key=lambda image: image.width * image.height)
    layout = choose_layout(model, settings, chosen, largest, listener)
    destination = Path(output) if output is not None else outputs.random_directory()
    if output is None:
        listener.note(
            f"Writing to {destination}: name it with --output to go on after an interruption."
        )
    weights = outputs.digest_model(model.name) if model.is_directory else None
    commit = None if weights is not None else source.describe(model.name, model.revision)[2]
    job = SuiteJob(
        given,
        options,
        destination,
        model,
        chosen,
        origins,
        weights,
        commit,
        layout,
        {"dtype": settings.dtype} | deciding(layout),
        settings.limited,
    )
    for subject in subjects:
        place = job.adapter_of(subject)
        if place is not None and not (place / adapter_files.CONFIG).is_file():
            raise BadInput(
                f"{place} holds no adapter: give a directory that has one of each concept, or "
                "choose with --concepts."
            )
        if place is not None and job.weights is not None:  # a hub model's are not here yet
            adapter_files.check_belongs(place, model.name, None, job.weights)
        cached(job, subject)  # of another exam: said now
    return job, subjects


def write_run(job: SuiteJob, run: str) -> None:
    """Writes the text of run.toml beside the table; nothing where it is empty."""
    if run:
        staging.replace_file(job.output / outputs.RUN, run.encode("utf-8"))


def _work_off(
    job: SuiteJob,
    done: dict[str, dict[str, Any]],
    todo: Sequence[suite.Subject],
    processes: int,
    listener: Listener,
) -> dict[str, Outcome]:
    """Does the concepts in `todo` and puts their reports into `done`. Returns those that failed."""
    failed: dict[str, Outcome] = {}
    job.output.mkdir(mode=0o700, exist_ok=True)
    write_table(job, done, failed)
    at_once = processes > 1 and len(todo) > 1
    finished = (
        _in_processes(job, todo, processes, listener) if at_once else _in_turn(job, todo, listener)
    )
    for count, (subject, error) in enumerate(finished, 1):
        if error is None:
            done[subject.slug] = outputs.read_report(job.output / subject.slug)
            status = outcome_of(subject, done[subject.slug]).status
        else:
            reason = job.reason(error)
            failed[subject.slug] = Outcome(
                subject.slug, subject.name, "failed", [reason], not isinstance(error, BadInput)
            )
            status = f"failed: {reason}"
        listener.note(f"Concept {count} of {len(todo)}, {subject.slug}: {status}")
        write_table(job, done, failed)
    return failed


DIED = "A process died, as one killed for its memory does: run again with fewer --processes."
Finished = Iterator[tuple[suite.Subject, BaseException | None]]


def _in_turn(job: SuiteJob, todo: Sequence[suite.Subject], listener: Listener) -> Finished:
    if not todo:
        return
    loaded = job.load(listener)
    waiting = list(todo)
    while waiting:
        busy = []
        for subject in waiting:
            error: BaseException | None = None
            try:
                with vlm.threads(loaded):
                    done = _claimed(loaded, job, subject, listener)
            except FAILURES as failure:
                done, error = True, failure
            if done:
                yield subject, error
            else:
                busy.append(subject)
        _wait(waiting, busy, listener)
        waiting = busy


def _claimed(loaded: vlm.VLM, job: SuiteJob, subject: suite.Subject, listener: Listener) -> bool:
    """Whether the concept is done now, by this run or by another; False where another is at it."""
    with staging.claim(job.output, subject.slug) as mine:
        if mine and not is_there(job, subject):
            one(loaded, job, subject, listener)
        return mine


def _wait(
    waiting: Sequence[suite.Subject], busy: Sequence[suite.Subject], listener: Listener
) -> None:
    """Waits a while where other runs have claimed all that is left."""
    if len(busy) == len(waiting):
        listener.stage(
            f"Waiting for another run that is at {', '.join(subject.slug for subject in busy)}"
        )
        time.sleep(PAUSE)


def _in_processes(
    job: SuiteJob, todo: Sequence[suite.Subject], processes: int, listener: Listener
) -> Finished:
    """Yields each concept as its process ends it. If a process dies, its unfinished work is
    lost."""
    spawn = multiprocessing.get_context("spawn")
    packed = pickle.dumps((hold, job))
    pool = ProcessPoolExecutor(
        min(processes, len(todo)), mp_context=spawn, initializer=process.start, initargs=(packed,)
    )
    try:
        waiting = list(todo)
        while waiting:
            try:
                futures = {pool.submit(_one_here, subject.slug): subject for subject in waiting}
            except BrokenProcessPool:
                yield from ((subject, OutOfMemory(DIED)) for subject in waiting)
                return
            busy = []
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    error = OutOfMemory(DIED)
                if error is not None and not isinstance(error, FAILURES):
                    raise error
                if error is None and not future.result():
                    busy.append(futures[future])
                else:
                    yield futures[future], error
            _wait(waiting, busy, listener)
            waiting = busy
    finally:
        pool.shutdown(cancel_futures=True)


_HERE: dict[str, Any] = {}  # In a process of the pool: the job, and the model that is loaded.


def hold(job: SuiteJob) -> None:
    """In a process of the pool: loads the model that `_one_here` asks."""
    torch.set_num_threads(1)
    loaded = job.load(Listener())
    _HERE.update(job=job, loaded=loaded)


def _one_here(slug: str) -> bool:
    job = _HERE["job"]
    return _claimed(_HERE["loaded"], job, job.given.subject(slug), Listener())


def one(loaded: vlm.VLM, job: SuiteJob, subject: suite.Subject, listener: Listener) -> None:
    """One concept from beginning to end; the model is left untouched."""
    before = job.digest(subject), read_bytes(subject.training)
    exam, exam_digest = job.exam_of(subject), job.exam_digest(subject)
    # a training tries which are exact; left so, the next concept's last digits would depend on the
    # order
    shares = loaded.shares
    place = job.adapter_of(subject)
    try:
        unsealed = (
            []
            if place is None
            else adapter_files.check_belongs(place, job.model.name, loaded.revision, job.weights)
        )
        untouched = cached(job, subject)
        if untouched is None:
            listener.stage(f"{subject.slug}: asking the untouched model")
            untouched = examine(loaded, exam, max_new_tokens=job.options.max_new_tokens)
        besides = attacking.Attacked(attacking.OF_VERDICT if job.options.changes else ())
        given = any(seen.role == "control" for seen in exam.pictures)
        besides.first(loaded, exam, given, listener)
        with _changed(loaded, job, subject, listener) as extra:
            model = None
            if extra is not None:
                listener.stage(f"{subject.slug}: asking again")
                model = examine(loaded, exam, untouched, max_new_tokens=job.options.max_new_tokens)
                besides.again(loaded, exam, given, listener)
            adapted = model is not None
            caveats = [adapter.DROPPABLE] * adapted + unsealed + besides.caveats
            report = report_of(
                exam,
                job.shown,
                untouched,
                model,
                adapted=adapted,
                caveats=caveats,
                families=besides.families,
                of_nobody=besides.confirmed,
            )
            report |= besides.told
            listener.stage(f"{subject.slug}: writing the output")
            transaction = outputs.Transaction(job.output / subject.slug)
            with transaction as folder:
                if job.options.unlearn:
                    adapter.save(loaded, folder)
                    whole = [report | (extra or {})]
                    outputs.write_card(folder, whole, base_of(loaded, job.shown))
                outputs.write_reports(folder, report | (extra or {}))
                kept = {"format": FORMAT, "digest": exam_digest, **untouched.as_dict()}
                staging.write(
                    folder / UNTOUCHED, json.dumps(kept, allow_nan=False).encode() + b"\n"
                )
                masks = (extra or {}).get("masks", {})
                transaction.commit(manifest(job, subject, transaction.key, masks, before))
    finally:
        adapter.detach(loaded)
        loaded.shares = shares


@contextmanager
def _changed(
    loaded: vlm.VLM, job: SuiteJob, subject: suite.Subject, listener: Listener
) -> Iterator[dict[str, Any] | None]:
    """Puts an adapter on, trained or loaded, and returns what the report says of it. None where the
    model stays untouched."""
    place = job.adapter_of(subject)
    if place is not None:
        adapter.load(loaded, place)
        yield {}
    elif job.options.unlearn:
        request = Request(subject.name, subject.training, subject.aliases)
        trained = session.forget(
            loaded, request, job.recipe, load_image(subject.training), listener=listener
        )
        yield {"recipe": job.recipe.as_dict(), **trained.told()}
    else:
        yield None
