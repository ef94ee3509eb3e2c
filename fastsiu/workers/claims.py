"""Who does which unit of work, where several processes share one output directory.

It works on one machine and on many, without file locks, and the machines' clocks need not agree.
The workers tell each other what they do in files of OUT/.fastsiu.join/:

    settings        SHA-256 of the settings, which must be the same for all workers
    UNIT.0, UNIT.1  the claims on a unit: who has it, and the number of its last heartbeat
    UNIT.failed     why a unit failed
    WORKER.done     a JSON line for each unit that a worker has finished, with its seconds

UNIT is a digest of the unit's key and of what is asked under it now. So a failure counts no longer
where its request was mended, and workers with other requests do not believe each other's claims.
WORKER is random. No file is named after a concept.

A claim is a file that its owner creates (O_EXCL: the file server lets one process win). The claim
with the highest number counts. The owner writes a new heartbeat into it every `Pace.beat` seconds.
A worker that sees the same heartbeat for `Pace.patience` seconds of its own clock steals the unit:
it creates the claim with the next number. The first owner may only have been suspended. When it
goes on, it finds a higher number than its own and discards its work. If two workers finish one unit
nevertheless, the first one wins: a rename puts an output in its place, and it fails where an output
is there already.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..disk import staging
from ..request import BadInput

SETTINGS = "settings"
_CLAIM = re.compile(r"([0-9a-f]{16})\.(\d{1,6})")
_FAILED = re.compile(r"[0-9a-f]{16}\.failed")
_DONE = re.compile(r"[0-9a-f]{16}\.done")


class ClaimLost(Exception):
    """Another worker has stolen the unit, because this worker sent no heartbeat for too long."""


@dataclass(frozen=True)
class Pace:
    """How often workers look and how long they wait: seconds, except `owners`, a count.

    beat:     from one heartbeat of an owner to the next
    patience: a claim is stolen after so long without a heartbeat; several times `beat`
    pause:    from one look of a waiting worker to the next
    owners:   a unit counts as failed when so many of its owners have died, because the unit itself
              may have killed them
    """

    beat: float = 10.0
    patience: float = 45.0
    pause: float = 2.0
    owners: int = 3


class Mark(NamedTuple):
    """A claim as others see it. content: the owner and its last heartbeat."""

    number: int
    content: bytes

    @property
    def owner(self) -> str:
        return self.content[:16].decode("ascii", "replace")


class _Watch(NamedTuple):
    mark: Mark
    looked: float  # time.monotonic() of the last look
    unchanged: float  # seconds


class Claims:
    """One worker's side of a shared output directory.

    place: the output directory; `open` makes the directory below it
    asked: from a unit's key, a digest of what is asked under it; called once for each key
    """

    def __init__(
        self, place: Path, pace: Pace = Pace(), asked: Callable[[str], str] = lambda key: ""
    ) -> None:
        self.place, self.pace = place / staging.JOIN, pace
        self.owner = secrets.token_hex(8)
        self._asked, self._units = asked, dict[str, str]()
        self._watched: dict[str, _Watch] = {}

    def open(self, digest: str) -> None:
        """Joins the work.

        digest: SHA-256 of the settings, hexadecimal; they must be the same for all workers

        Raises BadInput where the workers of this directory have other settings.
        """
        self.place.mkdir(mode=0o700, exist_ok=True)
        path = self.place / SETTINGS
        try:
            staging.new_file(path, digest.encode() + b"\n")
        except FileExistsError:
            if path.read_text(encoding="ascii", errors="replace").strip() != digest:
                raise BadInput(
                    f"{self.place.parent} is shared by runs with another model or other options: "
                    "give the same ones, or choose another --output."
                ) from None

    def unit(self, key: str) -> str:
        """How files call the unit with this key."""
        if key not in self._units:
            self._units[key] = unit_of(key, self._asked(key))
        return self._units[key]

    def take(self, key: str) -> Claim | None:
        """Claims a unit. Returns None where another worker has it.

        To steal the unit of a worker that has died, call `take` again and again. Each call looks at
        the heartbeat once, and the claim is stolen after `Pace.patience` seconds without a new one.
        """
        unit = self.unit(key)
        old = _latest(self.place, unit)
        if old is not None and not self._has_stopped(unit, old):
            return None
        number = 0 if old is None else old.number + 1
        path = self.place / f"{unit}.{number}"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return None
        claim = Claim(self, unit, number, handle)
        claim.beat()
        if old is not None and _read(self.place / f"{unit}.{old.number}") != old.content:
            claim.release()  # the old owner sent a heartbeat, or finished, at this very moment
            return None
        return claim

    def _has_stopped(self, unit: str, mark: Mark) -> bool:
        """Has a heartbeat been missing for too long, by this process's own clock?"""
        now, seen = time.monotonic(), self._watched.get(unit)
        if seen is None or seen.mark != mark:
            self._watched[unit] = _Watch(mark, now, 0.0)
            return False
        # A longer gap may mean that this whole machine was suspended, with the owner on it.
        unchanged = seen.unchanged + min(now - seen.looked, self.pace.beat)
        self._watched[unit] = _Watch(mark, now, unchanged)
        return unchanged >= self.pace.patience

    def fail(self, key: str, failure: dict[str, Any]) -> None:
        """Writes down why a unit failed. Only the owner of its claim may call this."""
        text = json.dumps(failure, ensure_ascii=False) + "\n"
        staging.write(
            self.place / f"{self.unit(key)}.failed", text.encode("utf-8", "backslashreplace")
        )

    def failure(self, key: str) -> dict[str, Any] | None:
        """What `fail` has written; None where there is nothing, or only a part of it yet."""
        content = _read(self.place / f"{self.unit(key)}.failed")
        try:
            found = json.loads(content) if content else None
        except ValueError:  # its writer was killed
            return None
        return found if isinstance(found, dict) else None

    def mend(self, key: str) -> None:
        """Removes what `fail` has written, because the unit is done now."""
        (self.place / f"{self.unit(key)}.failed").unlink(missing_ok=True)

    def log(self, key: str, seconds: float) -> None:
        """Writes down that this worker has finished a unit, and in how many seconds."""
        line = json.dumps({"unit": self.unit(key), "seconds": round(seconds, 3)}) + "\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with open(os.open(self.place / f"{self.owner}.done", flags, 0o600), "ab") as file:
            file.write(line.encode())


class Claim:
    """A unit that this worker has, until `release` or `abandon`.

    number:  how many earlier owners have died while they had it
    trouble: why the last heartbeat could not be written; None where it was written
    """

    def __init__(self, claims: Claims, unit: str, number: int, handle: int) -> None:
        self.number = number
        self.trouble: OSError | None = None
        self._claims, self._unit, self._handle = claims, unit, handle
        self._beats, self._ended = 0, threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self) -> None:
        """Starts a thread that sends the heartbeats."""
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        while not self._ended.wait(self._claims.pace.beat):
            try:
                self.beat()
                self.trouble = None
            except OSError as error:  # the next heartbeat may succeed; if none does, others steal
                self.trouble = error

    def beat(self) -> None:
        """Writes one heartbeat. Raises OSError."""
        self._beats += 1
        os.lseek(self._handle, 0, os.SEEK_SET)
        os.write(self._handle, f"{self._claims.owner} {self._beats:012d}\n".encode())
        os.fsync(self._handle)

    @property
    def held(self) -> bool:
        """Does this worker still have the unit?"""
        latest = _latest(self._claims.place, self._unit)
        return latest is not None and (latest.number, latest.owner) == (
            self.number,
            self._claims.owner,
        )

    def check(self) -> None:
        """Raises ClaimLost where another worker has stolen the unit."""
        if not self.held:
            raise ClaimLost(self._unit)

    def release(self) -> None:
        """Removes the claim, because the unit is done or another worker should do it."""
        mine = self.held
        self.abandon()
        if mine:  # the highest number goes last, so that it counts until the others are gone
            for number, path in sorted(_numbered(self._claims.place, self._unit)):
                if number <= self.number:
                    path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Stops the heartbeats and leaves the claim in place, as a worker that dies does."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def unit_of(key: str, asked: str = "") -> str:
    text = f"{key}\0{asked}" if asked else key
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _latest(place: Path, unit: str) -> Mark | None:
    for number, path in sorted(_numbered(place, unit), reverse=True):
        content = _read(path)
        if content is not None:
            return Mark(number, content)
    return None


def _numbered(place: Path, unit: str) -> list[tuple[int, Path]]:
    found = ((_CLAIM.fullmatch(name), name) for name in os.listdir(place))
    return [(int(m[2]), place / name) for m, name in found if m is not None and m[1] == unit]


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


# What lies there, for those who only look ---------------------------------------------------------


def at_work(place: Path) -> list[Path]:
    """The claims in an output directory: of workers that are at work, and of workers that died."""
    folder = place / staging.JOIN
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(folder / name for name in names if _CLAIM.fullmatch(name))


def stopped(paths: list[Path], pace: Pace = Pace()) -> list[Path]:
    """The claims of workers that have died: without a new heartbeat for `Pace.patience` seconds.

    It waits as long as that, and returns earlier when every claim has had a new heartbeat.
    """
    before = {path: _read(path) for path in paths}
    still, end = list(paths), time.monotonic() + pace.patience
    while still and time.monotonic() < end:
        time.sleep(min(pace.pause, max(0.0, end - time.monotonic())))
        still = [path for path in still if _read(path) == before[path]]
    return still


def seconds_of(place: Path) -> dict[str, float]:
    """By `Claims.unit` of its key, the seconds of each finished unit, as its worker wrote them."""
    return {
        record["unit"]: float(record["seconds"])
        for path in sorted((place / staging.JOIN).glob("*.done"))
        if _DONE.fullmatch(path.name)
        for record in _records(path)
    }


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a worker that was killed
            continue
        if isinstance(record, dict) and {"unit", "seconds"} <= set(record):
            yield record


def duration(seconds: float) -> str:
    """A time in words, with two units: "3 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if hours < 1:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    if days < 1:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(days)} d {int(hours % 24)} h"


def files(place: Path) -> list[Path]:
    """The files that this module has written into an output directory, and no others."""
    folder = place / staging.JOIN
    if folder.is_symlink() or not folder.is_dir():
        return []
    mine = lambda n: n == SETTINGS or any(p.fullmatch(n) for p in (_CLAIM, _FAILED, _DONE))
    return sorted(path for path in folder.iterdir() if mine(path.name))
