"""Processes that share an output: each unit is done exactly once, whoever dies or stands still."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from fastsiu.disk import staging
from fastsiu.request import BadInput, NumericFailure
from fastsiu.session import Listener
from fastsiu.workers import claims, joining
from fastsiu.workers.claims import Claims, Pace

FAST = Pace(beat=0.05, patience=0.5, pause=0.02)
UNITS = [f"unit {number}" for number in range(12)]


class Stub:
    """Units without a model. A unit takes `stages` moments; its output is a directory that is
    renamed into place, as `output.Transaction` does. What was begun and what was put in place
    stands in a file."""

    def __init__(self, place: Path, name: str = "one", stages: int = 4, moment: float = 0.02):
        self.place, self.name, self.stages, self.moment = place, name, stages, moment
        self.fails: dict[str, Exception] = {}

    def is_done(self, key):
        return (self.place / "out" / key).exists()

    def note(self, what, key):
        with (self.place / "notes").open("a") as file:
            file.write(f"{what}\t{self.name}\t{key}\n")

    def do(self, key, listener):
        self.note("began", key)
        for _ in range(self.stages):
            listener.stage("working")
            time.sleep(self.moment)
        if key in self.fails:
            raise self.fails[key]
        own = self.place / f"staging {self.name} {random.random()}"
        own.mkdir()
        (own / "result").write_text(f"result of {key}")
        try:
            os.rename(own, self.place / "out" / key)
        except OSError:
            raise BadInput("Something appeared.") from None
        self.note("published", key)
        return "done"

    def reason(self, key, error):
        return str(error)


def begin(place: Path, pace: Pace = FAST) -> Claims:
    (place / "out").mkdir(exist_ok=True)
    worker = Claims(place / "out", pace)
    worker.open("alike")
    return worker


def notes(place: Path, what: str) -> list[tuple[str, str]]:
    lines = (place / "notes").read_text().splitlines() if (place / "notes").exists() else []
    return [tuple(line.split("\t")[1:]) for line in lines if line.startswith(what)]


def results(place: Path) -> dict[str, str]:
    return {key: (place / "out" / key / "result").read_text() for key in UNITS}


def forked(place: Path, name: str, **options) -> int:
    """A worker in a process of its own; its share and its notes stand in a file."""
    child = os.fork()
    if child:
        return child
    try:
        told: list[str] = []
        work, listener = Stub(place, name, **options), Listener(note=told.append)
        share = joining.work_off(begin(place), UNITS, work, listener)
        (place / f"{name}.json").write_text(json.dumps({**vars(share), "notes": told}))
        os._exit(0)
    except BaseException as error:
        (place / f"{name}.error").write_text(repr(error))
        os._exit(3)


def until(true, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_three_workers_one_killed_one_frozen(tmp_path):
    """Each unit is put in place exactly once, the results are one worker's, and nobody reports a
    failure."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    joining.work_off(begin(alone), UNITS, Stub(alone, moment=0.0), Listener())
    begin(together)
    children = {name: forked(together, name, moment=0.1) for name in ("killed", "frozen", "calm")}
    try:
        until(lambda: {name for name, _ in notes(together, "began")} == set(children))
        os.kill(children["killed"], signal.SIGKILL)
        os.kill(children["frozen"], signal.SIGSTOP)
        # what they were at when they stopped is done by the third
        until(lambda: all((together / "out" / key).exists() for key in UNITS))
        os.kill(children["frozen"], signal.SIGCONT)
    finally:
        codes = {name: os.waitpid(child, 0)[1] for name, child in children.items()}
    assert codes == {"killed": signal.SIGKILL, "frozen": 0, "calm": 0}
    assert sorted(key for _, key in notes(together, "published")) == sorted(UNITS)
    assert results(together) == results(alone)
    told = {
        name: json.loads((together / f"{name}.json").read_text()) for name in ("frozen", "calm")
    }
    assert not any(one["failed"] for one in told.values())
    assert not any("failed" in line for one in told.values() for line in one["notes"])
    assert told["calm"]["stolen"] >= 1
    by = Counter(name for name, _ in notes(together, "published"))
    assert by["calm"] == len(told["calm"]["did"]) and by["frozen"] == len(told["frozen"]["did"])
    left = {p.name for p in (together / "out" / staging.JOIN).iterdir()}
    assert not [name for name in left if "." in name and not name.endswith(".done")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_frozen_worker_that_wakes_discards_its_work_and_says_so(tmp_path):
    child = forked(tmp_path, "frozen", stages=20, moment=0.05)
    until(lambda: notes(tmp_path, "began"))
    os.kill(child, signal.SIGSTOP)
    joining.work_off(begin(tmp_path), UNITS, Stub(tmp_path, "thief", moment=0.0), Listener())
    os.kill(child, signal.SIGCONT)
    assert os.waitpid(child, 0)[1] == 0
    told = json.loads((tmp_path / "frozen.json").read_text())
    assert told["lost"] == 1 and told["did"] == told["failed"] == []
    assert "another worker took it over" in told["notes"][0]
    assert [name for name, _ in notes(tmp_path, "published")] == ["thief"] * len(UNITS)


@pytest.mark.parametrize("seed", range(60))
def test_of_any_order_of_events_one_worker_has_a_unit_and_all_ends(tmp_path, monkeypatch, seed):
    """Four workers, three units, a clock of the test's own: they claim, beat, stand still for any
    time, wake, publish and die in any order."""
    rng, now = random.Random(seed), [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(claims.os, "fsync", lambda handle: None)
    pace = Pace(beat=1.0, patience=3.0, pause=0.5)
    units, published = ["a", "b", "c"], Counter()
    workers = [begin(tmp_path, pace) for _ in range(4)]
    at: dict[int, tuple[str, claims.Claim]] = {}
    asleep: dict[int, float] = {}
    for event in range(600):
        now[0] += rng.choice((0.0, 0.3, 1.0))
        n = rng.randrange(4)
        if asleep.get(n, 0.0) > now[0]:
            continue
        if n not in at:
            key = rng.choice(units)
            claim = None if published[key] else workers[n].take(key)
            if claim is not None:
                at[n] = (key, claim)
        else:
            key, claim = at[n]
            roll = rng.random()
            if roll < 0.5:
                claim.beat()
            elif roll < 0.65 and event < 500:
                asleep[n] = now[0] + rng.choice((1.0, 5.0, 20.0))  # stands still
            elif roll < 0.75 and event < 500:
                del at[n]
                claim.abandon()  # dies; the next take is another process's
                workers[n] = begin(tmp_path, pace)
            else:
                if claim.held and not published[key]:
                    published[key] += 1
                claim.release()
                del at[n]
        holders = Counter(key for key, claim in at.values() if claim.held)
        assert max(holders.values(), default=0) <= 1
    assert published == Counter(units)


def test_of_many_processes_at_once_one_gets_a_claim(tmp_path):
    workers = [begin(tmp_path) for _ in range(20)]
    taken = [claim for worker in workers if (claim := worker.take("a"))]
    assert len(taken) == 1 and taken[0].held
    taken[0].release()
    assert claims.at_work(tmp_path / "out") == []


def test_a_long_sleep_of_the_one_who_looks_steals_nothing(tmp_path, monkeypatch):
    """A machine that is suspended stops the owner as well as the one who looks."""
    now = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    owner, other = (begin(tmp_path, Pace()) for _ in range(2))
    claim = owner.take("a")
    assert other.take("a") is None
    now[0] += 3600
    assert other.take("a") is None
    claim.beat()
    for _ in range(4):
        now[0] += 10
        assert other.take("a") is None
    claim.abandon()
    now[0] += 10
    assert other.take("a") is None
    now[0] += 10
    stolen = other.take("a")
    assert stolen.number == 1 and stolen.held and not claim.held


def test_a_failure_is_written_once_and_tried_again_by_the_next_run_alone(tmp_path):
    work = Stub(tmp_path, moment=0.0)
    work.fails = {UNITS[3]: NumericFailure("It is nan.")}
    first = joining.work_off(begin(tmp_path), UNITS, work, Listener())
    assert first.failed == [UNITS[3]] and len(first.did) == 11
    found = begin(tmp_path).failure(UNITS[3])
    assert (found["reason"], found["numeric"]) == ("It is nan.", True)
    # another run finds it as it is while anything else is to be done
    more = joining.work_off(begin(tmp_path), [*UNITS, "one more"], work, Listener())
    assert (more.did, more.failed) == (["one more"], [])
    again = joining.work_off(begin(tmp_path), UNITS, work, Listener())
    assert again.failed == [UNITS[3]]
    work.fails = {}
    last = joining.work_off(begin(tmp_path), UNITS, work, Listener())
    assert last.did == [UNITS[3]] and begin(tmp_path).failure(UNITS[3]) is None


def stops_at(worker: Claims, key: str) -> bool:
    claim = worker.take(key)
    if claim is not None:
        claim.abandon()
    return claim is not None


def test_a_unit_that_stops_every_worker_fails_after_three(tmp_path):
    pace = Pace(beat=0.01, patience=0.05, pause=0.01)
    for number in range(3):
        worker = begin(tmp_path, pace)
        until(lambda w=worker: stops_at(w, UNITS[0]))
        assert len(claims.at_work(tmp_path / "out")) == number + 1
    share = joining.work_off(begin(tmp_path, pace), UNITS[:1], Stub(tmp_path), Listener())
    assert share.failed == UNITS[:1] and notes(tmp_path, "began") == []
    assert "3 workers stopped" in begin(tmp_path).failure(UNITS[0])["reason"]


def test_a_bug_ends_one_worker_and_its_user_s_interrupt_gives_the_unit_back(tmp_path):
    work = Stub(tmp_path)
    for error, left in ((ZeroDivisionError(), 1), (KeyboardInterrupt(), 1)):
        work.fails = {UNITS[1 if left and isinstance(error, KeyboardInterrupt) else 0]: error}
        key = next(iter(work.fails))
        with pytest.raises(type(error)):
            joining.work_off(begin(tmp_path), [key], work, Listener())
        assert len(claims.at_work(tmp_path / "out")) == left  # the first one's


def test_runs_with_other_options_are_refused(tmp_path):
    begin(tmp_path)
    with pytest.raises(BadInput, match="shared by runs with another model"):
        Claims(tmp_path / "out").open("different")


def test_the_forecast_counts_and_multiplies(tmp_path):
    work = Stub(tmp_path, moment=0.0)
    worker = begin(tmp_path)
    empty = joining.forecast(worker, UNITS, work, 0)
    assert empty.left == 12 and empty.seconds is None and "not known yet" in empty.told()[1]
    for key, seconds in ((UNITS[0], 10.0), (UNITS[1], 30.0)):
        (tmp_path / "out" / key).mkdir()
        worker.log(key, seconds)
    with (worker.place / f"{worker.owner}.done").open("a") as file:
        file.write('{"unit": "cut o')  # its writer was killed
    worker.fail(UNITS[2], {"reason": "x"})
    found = joining.forecast(worker, UNITS, work, 3)
    assert (found.done, found.failed, found.left, found.seconds) == (2, 1, 9, 9 * 20.0)
    told = "\n".join(found.told())
    assert "takes one worker 3 min 0 s" in told and "takes 3 workers 1 min 0 s" in told
    assert "takes 8 workers 40 s" in told  # two whole rounds


def test_each_process_of_a_machine_has_its_own_card(monkeypatch):
    from fastsiu.settings import Settings

    monkeypatch.setattr(joining.torch.cuda, "device_count", lambda: 4)
    for name in joining.LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    assert joining.own_card(Settings()).device is None
    for name in joining.LOCAL_RANKS:
        with monkeypatch.context() as patch:
            patch.setenv(name, "6")
            assert joining.own_card(Settings()).device == "cuda:2"
            assert joining.own_card(Settings("cpu")).device == "cpu"


def test_purge_tells_claims_that_beat_from_those_that_stopped(tmp_path):
    from fastsiu.disk import upkeep

    worker = begin(tmp_path)
    alive, dead = worker.take("a"), worker.take("b")
    alive.keep()
    try:
        found = upkeep.survey(tmp_path, FAST)
    finally:
        alive.abandon()
    assert [p.name for p in found.stopped] == [f"{claims.unit_of('b')}.0"] and dead.held
    assert [p.name for p in found.alive] == [f"{claims.unit_of('a')}.0"]


def test_an_output_of_something_else_ends_the_worker_and_leaves_no_claim(tmp_path):
    work, asked = Stub(tmp_path), []

    def is_done(key):
        asked.append(key)
        if len(asked) > 2:
            raise BadInput("It holds the result of another request.")
        return False

    work.is_done = is_done
    with pytest.raises(BadInput, match="another request"):
        joining.work_off(begin(tmp_path), UNITS[:1], work, Listener())
    assert claims.at_work(tmp_path / "out") == []
