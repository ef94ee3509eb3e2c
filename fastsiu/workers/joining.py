"""What one worker does, where several processes share an output directory.

It claims one unit after the other (`claims`), so that each unit is done exactly once. When no unit
is left to claim it waits for the other workers. If one of them dies, it takes over that worker's
unit. All workers end when every unit is done or has failed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ..request import BadInput, NumericFailure, OutOfMemory
from ..session import Listener
from ..settings import Settings
from .claims import Claim, ClaimLost, Claims, duration, seconds_of

# Where one of these is raised, the unit has failed, and the worker goes on with the next one.
FAILURES = (BadInput, NumericFailure, OutOfMemory, torch.OutOfMemoryError)
# Launchers write the number of a process on its machine into one of these variables.
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
POISON = (
    "{} workers stopped while they were at it, as a process killed for its memory does: run it "
    "alone, with less memory."
)


class Units(Protocol):
    """The work that is shared. A key is a line of a file of requests, or the slug of a concept."""

    def is_done(self, key: str) -> bool:
        """Is its output complete? Raises BadInput where its place holds another output."""

    def do(self, key: str, listener: Listener) -> str:
        """Makes its output. Returns the result in a few words. Raises one of FAILURES."""

    def reason(self, key: str, error: BaseException) -> str:
        """The sentence that is written down about a failure."""


@dataclass
class Share:
    """What one worker did.

    did:    keys of the units that it finished
    failed: keys of the units that failed in its hands
    stolen: how many of `did` and `failed` it took over from a worker that had died
    lost:   how many units another worker took over from this one
    drew:   whether this worker wrote the table at the end
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
    """Works until every unit is done or has failed, by this worker or by others.

    If all units that are not done had failed before this worker began, it tries those again. Raises
    BadInput where the place of an output holds another one.
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
    """again: by key the earlier failures that are tried once more"""

    def __init__(self, claims: Claims, units: Units, listener: Listener) -> None:
        self.claims, self.units, self.listener = claims, units, listener
        self.again: dict[str, dict[str, Any] | None] = {}
        self.share = Share()

    def settle(self, key: str) -> bool:
        """Does a unit if nobody has claimed it. Returns whether it is done or has failed now."""
        if self._is_settled(key):
            return True
        claim = self.claims.take(key)
        if claim is None:
            return False
        try:
            # another worker may have finished it since the first look
            settled = self._is_settled(key) or self._do(key, claim)
        except BadInput:  # the place of its output holds another one
            claim.release()
            raise
        except (Exception, SystemExit):
            claim.abandon()  # other workers try, up to `Pace.owners` in all
            raise
        except BaseException:  # interrupted by the user: another worker may begin at once
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
            # Another worker has taken the unit over, and its output may be there already.
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
    """A listener that raises ClaimLost at the next stage or step after the claim is lost."""

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
    """Writes the table of all results, unless another worker has. Returns whether this one did.

    is_drawn: whether the table on disk has the result of every unit
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
    """How long the units that are left will take, from the times of those that are done.

    of, done, failed: numbers of units
    workers: number of claims at this moment
    took:    seconds of each unit whose time is known
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
        """How long one worker needs for the units that are left; None where no time is known."""
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
            # a round is one unit for each worker; the last round takes as long as the others
            rounds = -(-self.left // workers) * statistics.fmean(self.took)
            lines.append(f"What is left takes {some} {duration(rounds)}.")
        return lines

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "left": self.left, "seconds": self.seconds}


def forecast(claims: Claims, keys: Sequence[str], units: Units, workers: int) -> Forecast:
    """How long the units that are left will take. Claims nothing and writes nothing."""
    known = seconds_of(claims.place.parent)
    done = [key for key in keys if units.is_done(key)]
    there = set(done)
    failed = sum(claims.failure(key) is not None for key in keys if key not in there)
    took = [known[unit] for key in done if (unit := claims.unit(key)) in known]
    return Forecast(len(keys), len(done), failed, workers, took)


# Which GPU ----------------------------------------------------------------------------------------


def own_card(settings: Settings) -> Settings:
    """The settings with a GPU of its own for each process on this machine.

    It reads the number that torchrun, accelerate or srun has given to the process. Settings that
    name a device stay as they are.
    """
    cards = torch.cuda.device_count()
    rank = next((os.environ[name] for name in LOCAL_RANKS if name in os.environ), "")
    if settings.device is not None or cards < 2 or not rank.isdecimal():
        return settings
    return replace(settings, device=f"cuda:{int(rank) % cards}")
