"""The work of one of several processes that share an output directory: units are claimed one after
the other (`claims`), and each is done exactly once.

A worker does what nobody has claimed. When nothing is left to claim it waits for the others, so
that it can take over the unit of one that dies. All workers end when every unit is done or has
failed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from .claims import Claim, ClaimLost, Claims, duration, seconds_of, unit_of
from .request import BadInput, NumericFailure, OutOfMemory
from .session import Listener
from .settings import Settings

# of one unit; the others go on
FAILURES = (
    BadInput,
    NumericFailure,
    OutOfMemory,
    torch.OutOfMemoryError,
)
# Where launchers say which of the processes on this machine this one is.
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
POISON = (
    "{} workers stopped while they were at it, as a process killed for its memory does: run it "
    "alone, with less memory."
)


class Units(Protocol):
    """What is shared. A key is a line of a file of requests, or the slug of a concept."""

    def is_done(self, key: str) -> bool:
        """Whether its output is complete. Raises BadInput for an output of something else."""

    def do(self, key: str, listener: Listener) -> str:
        """Makes its output, and says in a few words what came out. Raises what is in FAILURES."""

    def reason(self, key: str, error: BaseException) -> str:
        """The sentence about a failure that is written down."""


@dataclass
class Share:
    """What one worker did.

    did:    the units that it finished
    failed: those that failed here
    stolen: how many of both were begun by a worker that has stopped
    lost:   how many were taken over by another worker while this one stood still
    drew:   whether this worker drew the table at the end
    """

    did: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stolen: int = 0
    lost: int = 0
    seconds: float = 0.0
    drew: bool = False

    def told(self, of: int) -> str:
        text = f"This worker did {len(self.did)} of {of} in {duration(self.seconds)}"
        if self.failed:
            text += f", {len(self.failed)} failed here"
        if self.stolen:
            text += f", {self.stolen} taken over from workers that had stopped"
        if self.lost:
            text += f", {self.lost} given up because another worker had taken them over"
        return f"{text}."


def work_off(claims: Claims, keys: Sequence[str], units: Units, listener: Listener) -> Share:
    """Takes part until every unit is done or has failed.

    Failures of an earlier run are tried again where nothing else was left to do when this worker
    began. Raises BadInput where an output belongs to something else.
    """
    worker = _Worker(claims, units, listener)
    begun = time.monotonic()
    waiting = [key for key in keys if not units.is_done(key)]
    failed = {key: claims.failure(key) for key in waiting}
    if all(failed.values()):
        worker.again = failed
    while waiting:
        busy = [key for key in waiting if not worker.settle(key)]
        if len(busy) == len(waiting):
            listener.stage(f"Waiting for other workers, which are at {len(busy)} units")
            time.sleep(claims.pace.pause)
        waiting = busy
    worker.share.seconds = time.monotonic() - begun
    return worker.share


class _Worker:
    """again: failures that are tried once more, as they were when this worker began"""

    def __init__(self, claims: Claims, units: Units, listener: Listener) -> None:
        self.claims, self.units, self.listener = claims, units, listener
        self.again: dict[str, dict[str, Any] | None] = {}
        self.share = Share()

    def settle(self, key: str) -> bool:
        """Whether a unit is done now or has failed, by this worker or by another."""
        if self._is_settled(key):
            return True
        claim = self.claims.take(key)
        if claim is None:
            return False
        try:
            # another worker may have ended between the two looks
            settled = self._is_settled(key) or self._do(key, claim)
        except BadInput:  # its output is there, and of something else
            claim.release()
            raise
        except (Exception, SystemExit):
            claim.abandon()  # another worker tries; `Pace.owners` is how often
            raise
        except BaseException:  # interrupted by its user: another worker need not wait
            claim.release()
            raise
        claim.release()
        return settled

    def _is_settled(self, key: str) -> bool:
        if self.units.is_done(key):
            return True
        failure = self.claims.failure(key)
        return failure is not None and failure != self.again.get(key)

    def _do(self, key: str, claim: Claim) -> bool:
        if claim.number >= self.claims.pace.owners:
            self._fail(key, OutOfMemory(POISON.format(claim.number)))
            return True
        claim.keep()
        begun = time.monotonic()
        try:
            came_out = self.units.do(key, _fenced(self.listener, claim))
        except ClaimLost:
            self._lose(key)
            return False
        except FAILURES as error:
            # what a worker that was robbed finds at its end: the output is there
            if not claim.held or self.units.is_done(key):
                self._lose(key)
                return False
            self._fail(key, error)
        else:
            self.claims.log(key, time.monotonic() - begun)
            self.claims.mend(key)
            self.share.did.append(key)
            self.listener.note(f"{key}: {came_out}")
        if claim.trouble is not None:
            self.listener.note(
                f"{key}: the heartbeat could not be written ({claim.trouble.strerror}), so another "
                "worker may have begun it as well."
            )
        self.share.stolen += claim.number > 0
        return True

    def _fail(self, key: str, error: BaseException) -> None:
        reason = self.units.reason(key, error)
        numeric = not isinstance(error, BadInput)
        self.claims.fail(key, {"reason": reason, "numeric": numeric, "worker": self.claims.owner})
        self.share.failed.append(key)
        self.listener.note(f"{key}: failed: {reason}")

    def _lose(self, key: str) -> None:
        self.share.lost += 1
        self.listener.note(
            f"{key}: another worker took it over while this one stood still; what was done here is "
            "discarded."
        )


def _fenced(listener: Listener, claim: Claim) -> Listener:
    """A listener that ends the work where the claim is lost, at its next stage or step."""

    def stage(text: str) -> None:
        claim.check()
        listener.stage(text)

    def step(one: Any, ceiling: int) -> None:
        claim.check()
        listener.step(one, ceiling)

    return replace(listener, stage=stage, step=step)


def draw_once(
    claims: Claims, is_drawn: Callable[[], bool], draw: Callable[[], None], key: str
) -> bool:
    """Whether this worker drew the table of everything that is done; False where it is there.

    is_drawn: whether the table on disk has every unit, as it ended
    """
    while not is_drawn():
        claim = claims.take(key)
        if claim is None:
            time.sleep(claims.pace.pause)
            continue
        claim.keep()
        try:
            if is_drawn():
                return False
            draw()
            return True
        finally:
            claim.release()
    return False


# How long -----------------------------------------------------------------------------------------


@dataclass
class Forecast:
    """How long the rest takes, from what is done.

    of, done, failed: numbers of units
    workers: claims at this moment
    took:    seconds of each unit whose time was written down
    """

    of: int
    done: int
    failed: int
    workers: int
    took: list[float]

    @property
    def left(self) -> int:
        return self.of - self.done - self.failed

    @property
    def seconds(self) -> float | None:
        """Of work that is left, for one worker; None where no time is known."""
        return self.left * statistics.fmean(self.took) if self.took else None

    def told(self) -> list[str]:
        lines = [
            f"{self.done} of {self.of} are done, {self.failed} failed, {self.left} are left; "
            f"{self.workers} claimed at this moment."
        ]
        if self.seconds is None:
            lines.append(
                "How long one takes is not known yet: let one worker finish one, then ask again."
            )
            return lines
        low, high = min(self.took), max(self.took)
        lines.append(
            f"One took {duration(statistics.fmean(self.took))} on average ({duration(low)} to "
            f"{duration(high)}, n {len(self.took)})."
        )
        for workers in sorted({1, 8, 64, max(1, self.workers)}):
            some = "one worker" if workers == 1 else f"{workers} workers"
            # whole rounds: the last unit is not shared out
            rounds = -(-self.left // workers) * statistics.fmean(self.took)
            lines.append(f"What is left takes {some} {duration(rounds)}.")
        return lines

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "left": self.left, "seconds": self.seconds}


def forecast(claims: Claims, keys: Sequence[str], units: Units, workers: int) -> Forecast:
    """How long the units take that are not done; nothing is claimed and nothing written."""
    known = seconds_of(claims.place.parent)
    done = [key for key in keys if units.is_done(key)]
    there = set(done)
    failed = sum(claims.failure(key) is not None for key in keys if key not in there)
    took = [known[unit] for key in done if (unit := unit_of(key)) in known]
    return Forecast(len(keys), len(done), failed, workers, took)


# Which card ---------------------------------------------------------------------------------------


def own_card(settings: Settings) -> Settings:
    """With a card of its own for each process that torchrun, accelerate or srun has started on this
    machine, where no device was asked for."""
    cards = torch.cuda.device_count()
    rank = next((os.environ[name] for name in LOCAL_RANKS if name in os.environ), "")
    if settings.device is not None or cards < 2 or not rank.isdecimal():
        return settings
    return replace(settings, device=f"cuda:{int(rank) % cards}")
