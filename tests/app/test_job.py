"""One job: its states, its events, its stop, its files. No browser, and no model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import app_worker
import pytest

from fastsiu.app.job import ARCHIVE, RESULT, Asked, Job, Phase, View
from fastsiu.request import BadInput


def until(job: Job, true: Callable[[View], bool], seconds: float = 60) -> View:
    end = time.monotonic() + seconds
    while not true(view := job.view):
        assert time.monotonic() < end, view
        time.sleep(0.01)
    return view


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("app") / "job", app_worker.serve)
    yield job
    job.close()


@pytest.fixture
def job(shared):
    shared.clear()
    return shared


@pytest.fixture
def asked(tmp_path):
    return lambda name="Ann Bole", **options: Asked(name, tmp_path / "picture", **options)


def trained(job: Job, asked: Asked) -> View:
    job.look(asked)
    until(job, lambda view: view.phase is Phase.KNOWN)
    job.gather()
    until(job, lambda view: view.phase is Phase.READY)
    job.train()
    return until(job, lambda view: view.phase is Phase.DONE)


def test_from_the_first_question_to_the_verdict(job, asked):
    job.look(asked())
    view = until(job, lambda view: not view.busy)
    assert view.phase is Phase.KNOWN
    assert view.said == (("Who is this?", "This is Ann Bole.", True),)
    job.gather()
    view = until(job, lambda view: not view.busy)
    assert view.phase is Phase.READY
    assert view.samples["count"] == 1
    assert view.notes == ("A <b>note</b>.",)
    job.train()
    assert job.view.phase is Phase.TRAINING
    view = until(job, lambda view: not view.busy)
    assert view.phase is Phase.DONE
    assert view.result["forgotten"]
    assert [step["step"] for step in view.steps] == [1, 2, 3, 4]
    assert view.ceiling == app_worker.STEPS
    assert (job.place / RESULT / "report.html").is_file()
    assert (job.place / ARCHIVE).is_file()


def test_looks_are_in_order_and_begin_and_end_with_a_steps_own(job, asked):
    looks = trained(job, asked()).looks
    assert [step for step, _, _ in looks] == [1, 2, 3, 4]
    assert looks[0] == (1, 0.9, 0.97)  # the look before the first step, which that step tells
    assert looks[1] == (2, pytest.approx(0.7), 0.98)
    assert looks[-1] == (4, 0.01, 0.97)  # the last step's


def test_a_concept_that_is_not_named_goes_no_further(job, asked):
    job.look(asked("unknown"))
    assert until(job, lambda view: not view.busy).phase is Phase.UNKNOWN
    with pytest.raises(BadInput, match="goes on"):
        job.gather()


def test_what_cannot_be_used_is_told_and_leads_back(job, asked):
    job.look(asked("refused"))
    view = until(job, lambda view: not view.busy)
    assert view.phase is Phase.EMPTY
    assert view.problem == "It cannot be used: give another."
    job.look(asked())
    assert until(job, lambda view: not view.busy).problem == ""


def test_a_stop_ends_the_process_and_leaves_nothing(job, asked):
    job.look(asked("slow"))
    until(job, lambda view: view.phase is Phase.KNOWN)
    job.gather()
    until(job, lambda view: view.phase is Phase.READY)
    job.train()
    until(job, lambda view: bool(view.steps))
    until(job, lambda view: (job.place / "unfinished").exists())
    pid = job._worker.process.pid
    begun = time.monotonic()
    job.stop()
    assert time.monotonic() - begun < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert job.view.phase is Phase.READY
    assert job.view.stopped
    assert list(job.place.iterdir()) == []
    steps = len(job.view.steps)
    time.sleep(0.3)
    assert len(job.view.steps) == steps  # nothing comes from the process that was killed


def test_after_a_stop_it_can_begin_again(job, asked):
    job.look(asked("endless"))
    job.stop()
    assert job.view.phase is Phase.EMPTY
    assert trained(job, asked()).result is not None


def test_a_process_that_dies_is_told_and_replaced(job, asked):
    job.look(asked("dies"))
    view = until(job, lambda view: not view.busy)
    assert "ended by itself" in view.problem
    assert view.phase is Phase.EMPTY
    job.look(asked())
    assert until(job, lambda view: not view.busy).phase is Phase.KNOWN


def test_a_training_that_ends_without_a_result_leaves_nothing(job, asked):
    """Else half an archive could be fetched, and every further training would find an output in
    its place when it is done."""
    job.look(asked("full"))
    until(job, lambda view: view.phase is Phase.KNOWN)
    job.gather()
    until(job, lambda view: view.phase is Phase.READY)
    job.train()
    view = until(job, lambda view: not view.busy)
    assert view.phase is Phase.READY and "No space left" in view.problem
    assert list(job.place.iterdir()) == []
    job.train()  # its output's place is free
    assert until(job, lambda view: not view.busy).phase is Phase.DONE


def test_only_one_thing_goes_on(job, asked):
    job.look(asked("endless"))
    with pytest.raises(BadInput, match="stop it"):
        job.look(asked())
    with pytest.raises(BadInput, match="goes on"):
        job.train()


def test_questions_to_both_models(job, asked, tmp_path):
    with pytest.raises(BadInput, match="goes on"):
        job.ask("Who is this?", None)
    trained(job, asked())
    job.ask("  Who is this? ", tmp_path / "other")
    assert job.view.asking
    view = until(job, lambda view: not view.busy)
    job.ask("Who is Ann Bole?", None)
    view = until(job, lambda view: not view.busy)
    assert [(one.question, one.before, one.after) for one in view.chat] == [
        ("Who is this?", "Ann Bole, with a picture.", "Nobody, with a picture."),
        ("Who is Ann Bole?", "Ann Bole, in words.", "Nobody, in words."),
    ]
    with pytest.raises(BadInput, match="no question"):
        job.ask("  ", None)


def test_what_was_made_is_removed_when_it_begins_anew_and_at_the_end(tmp_path, asked):
    job = Job(tmp_path / "job", app_worker.serve)
    trained(job, asked())
    job.look(asked("Bo"))
    assert not (job.place / RESULT).exists()
    assert job.view.result is None
    job.close()
    assert list(job.place.iterdir()) == []


def test_every_change_has_a_version_of_its_own(job, asked):
    before = job.view
    job.look(asked())
    after = until(job, lambda view: not view.busy)
    assert after.version > before.version
    with pytest.raises(FrozenInstanceError):
        after.phase = Phase.DONE
