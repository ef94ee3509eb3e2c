"""Whose turn it is: one visitor works, the others wait in the order in which they came.

A visitor is a browser. A cookie with a random key tells who it is, so a page that is loaded again
finds its job. The turn of a visitor ends when they start over, when they are away, or when they do
nothing for long while others wait.
"""

from __future__ import annotations

import base64
import io
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..images import load_image
from ..request import BadInput
from .job import Asked, Job, View

COOKIE = "fastsiu-visitor"  # has a visitor's key
# A visitor counts as away after so many seconds without a request. A browser lets a page in the
# background send one request a minute.
GONE = 150.0
IDLE = 900.0  # seconds without work after which a visitor gives way to those who wait
FORGET = 3600.0  # seconds without a sign of life after which nothing of a visitor is kept
PREVIEW = 480  # pixels of a preview's longer side


@dataclass(frozen=True)
class Example:
    """A concept that the embedded model knows, for visitors who have no picture at hand.

    picture: the file of a picture to forget it from
    other:   the file of another picture of it, to ask about afterwards
    """

    name: str
    picture: Path
    other: Path


@dataclass
class Shown:
    """A picture that a visitor gave. preview: a small JPEG as a data: address"""

    path: Path
    preview: str


@dataclass(eq=False)
class Visitor:
    """seen, acted: when it last gave a sign of life, and when it last did something
    picture: of what is to be forgotten;  other: the one to ask both models about
    waiting: what it wants forgotten as soon as it is its turn
    message: a sentence for it
    files:   number of pictures that it gave
    """

    place: Path
    seen: float
    acted: float
    picture: Shown | None = None
    other: Shown | None = None
    waiting: Asked | None = None
    message: str = ""
    files: int = 0


class Desk:
    """The visitors, and the one job.

    place: a directory for the visitors' pictures, which nobody else uses
    clock: seconds that only grow
    """

    def __init__(self, job: Job, place: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.job, self.place, self._clock = job, place, clock
        self._visitors: dict[str, Visitor] = {}
        self._owner: Visitor | None = None
        self._queue: list[Visitor] = []
        self._lock = threading.RLock()

    def visit(self, key: str) -> Visitor:
        """The visitor with this key, who has given a sign of life."""
        with self._lock:
            now = self._clock()
            if key not in self._visitors:
                folder = self.place / secrets.token_hex(8)
                self._visitors[key] = Visitor(folder, now, now)
            visitor = self._visitors[key]
            visitor.seen = now
            self._pass_on(now)
            return visitor

    def view(self, visitor: Visitor) -> View:
        """The job as this visitor may see it: nobody sees another's."""
        return self.job.view if visitor is self._owner else View()

    def ahead(self, visitor: Visitor) -> int | None:
        """How many visitors come before this one; None where this one does not wait."""
        with self._lock:
            return self._queue.index(visitor) + 1 if visitor in self._queue else None

    def owns(self, visitor: Visitor) -> bool:
        return visitor is self._owner

    def begin(self, visitor: Visitor, asked: Asked) -> None:
        """Begins the job, or puts the visitor into the queue.

        Raises BadInput while the visitor's own job is at work.
        """
        with self._lock:
            visitor.acted = self._clock()
            visitor.message = ""
            if self._owner in (None, visitor):
                self.job.look(asked)
                self._owner = visitor
                return
            visitor.waiting = asked
            if visitor not in self._queue:
                self._queue.append(visitor)

    def leave(self, visitor: Visitor) -> None:
        """Takes the visitor out of the queue or ends the job. Removes pictures and results."""
        with self._lock:
            self._release(visitor)
            self._remove_files(visitor)
            visitor.message = ""
            self._pass_on(self._clock())

    def act(self, visitor: Visitor) -> Job:
        """Returns the job. Raises BadInput where it is another visitor's turn."""
        with self._lock:
            if visitor is not self._owner:
                raise BadInput("It is not your turn any more: begin with the picture again.")
            visitor.acted = self._clock()
            return self.job

    def keep(self, visitor: Visitor, file: Path) -> Shown:
        """Moves a picture to the visitor's other files.

        Raises BadInput where it cannot be used, and removes it.
        """
        try:
            image = load_image(file)
        except BadInput as error:
            file.unlink(missing_ok=True)
            raise BadInput(str(error).replace(repr(str(file)), repr(file.name))) from error
        with self._lock:
            visitor.acted = self._clock()
            visitor.files += 1
            visitor.place.mkdir(mode=0o700, parents=True, exist_ok=True)
            kept = visitor.place / f"picture-{visitor.files}"
            shutil.move(file, kept)
        image.thumbnail((PREVIEW, PREVIEW))
        small = io.BytesIO()
        image.save(small, "JPEG", quality=85)
        data = base64.b64encode(small.getvalue()).decode()
        return Shown(kept, f"data:image/jpeg;base64,{data}")

    def keep_copy(self, visitor: Visitor, file: Path) -> Shown:
        """Does with a copy what `keep` does; the file itself stays."""
        with self._lock:
            visitor.place.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self.keep(visitor, Path(shutil.copy(file, visitor.place / "copy")))

    def _pass_on(self, now: float) -> None:
        """Ends the turn of a visitor who is away, or idle while others wait; begins the next."""
        for key, visitor in list(self._visitors.items()):
            if visitor is not self._owner and now - visitor.seen > FORGET:
                self._remove_files(self._visitors.pop(key))
        self._queue = [visitor for visitor in self._queue if now - visitor.seen <= GONE]
        owner = self._owner
        if owner is not None and self.job.view.busy:
            owner.acted = now
        elif owner is not None and self._queue:
            if now - owner.seen > GONE or now - owner.acted > IDLE:
                self._release(owner)
                self._remove_files(owner)
                owner.message = (
                    "Somebody else waited while you were away, so your turn has ended, and your "
                    "pictures and results were removed. You can begin again."
                )
        if self._owner is None and self._queue:
            visitor = self._queue.pop(0)
            asked, visitor.waiting = visitor.waiting, None
            visitor.acted, self._owner = now, visitor
            visitor.message = ""
            if asked is not None:
                self.job.look(asked)

    def _release(self, visitor: Visitor) -> None:
        if visitor in self._queue:
            self._queue.remove(visitor)
        visitor.waiting = None
        if visitor is self._owner:
            self.job.clear()
            self._owner = None

    def _remove_files(self, visitor: Visitor) -> None:
        shutil.rmtree(visitor.place, ignore_errors=True)
        visitor.picture = visitor.other = None
