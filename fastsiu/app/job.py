"""One job, from the first question to the verdict: its state, what its worker process reports, how
it is stopped, and its result.

This file knows neither the page nor the model. A process of its own does the work (`work.serve`).
To stop the job is to kill that process: nothing can delay that, and it gives all memory back. The
page shows a `View`. A view never changes: every event makes a new one.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .. import process
from ..request import BadInput

RESULT, ARCHIVE = "result", "adapter.zip"  # below the job's directory: the output, and it packed


class Phase(StrEnum):
    """How far a job is. In a phase whose name ends in -ING the worker process is at work."""

    EMPTY = "empty"
    LOOKING = "looking"  # asking the model whom it sees
    UNKNOWN = "unknown"  # it does not name the concept
    KNOWN = "known"
    GATHERING = "gathering"  # building the samples
    READY = "ready"  # the samples can be read, nothing is trained
    TRAINING = "training"
    DONE = "done"  # there is a verdict, and both models can be asked


# Work -> where the job is after it was stopped or could not be done.
BACK = {
    Phase.LOOKING: Phase.EMPTY,
    Phase.GATHERING: Phase.KNOWN,
    Phase.TRAINING: Phase.READY,
}
# Work -> the phases that it may begin in.
FROM = {
    Phase.LOOKING: (Phase.EMPTY, Phase.UNKNOWN, Phase.KNOWN, Phase.READY, Phase.DONE),
    Phase.GATHERING: (Phase.KNOWN, Phase.READY),
    Phase.TRAINING: (Phase.READY,),
}


@dataclass(frozen=True)
class Asked:
    """What somebody wants forgotten.

    picture: a file
    model:   hub id or directory; "" is the embedded model
    kind:    of `request.KINDS`; None: the model is asked
    redact:  names, questions and answers stay out of the reports
    """

    concept: str
    picture: Path
    model: str = ""
    aliases: tuple[str, ...] = ()
    kind: str | None = None
    redact: bool = False


@dataclass(frozen=True)
class Exchange:
    """One question to both models.

    picture: a file; None for a question in words alone
    The answers are None until the models have answered.
    """

    question: str
    picture: Path | None = None
    before: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class View:
    """A job at one moment.

    stage:   what is going on now, in the words of `session.Listener.stage`
    since:   `time.monotonic()` when the work that goes on began
    notes:   sentences of `session.Listener.note`
    problem: why the last work was not done, one sentence; "" where it was
    stopped: the last work was stopped
    said:    (question, the untouched model's answer, whether it names the concept)
    samples: what `work.Work.gather` returns
    ceiling: the most steps of the training
    steps:   fields of `train.Step`
    looks:   (step, probability of the name, share of the rest that is kept), the last one newest
    result:  what `work.Work.train` returns
    chat:    the questions asked in the end
    version: grows with every change
    """

    phase: Phase = Phase.EMPTY
    asked: Asked | None = None
    stage: str = ""
    since: float = 0.0
    notes: tuple[str, ...] = ()
    problem: str = ""
    stopped: bool = False
    said: tuple[tuple[str, str, bool], ...] = ()
    samples: Mapping[str, Any] | None = None
    ceiling: int = 0
    steps: tuple[Mapping[str, float], ...] = ()
    looks: tuple[tuple[int, float, float], ...] = ()
    result: Mapping[str, Any] | None = None
    chat: tuple[Exchange, ...] = ()
    version: int = 0

    @property
    def asking(self) -> bool:
        """Does a question wait for its answers?"""
        return bool(self.chat) and self.chat[-1].after is None

    @property
    def busy(self) -> bool:
        return self.phase in BACK or self.asking


class Worker:
    """A process that does one command after another, and the thread that listens to it.

    take: called in that thread with (this worker, kind of event, value); with the kind "ended" when
          the process is gone
    """

    def __init__(
        self, target: Callable[..., None], options: tuple[Any, ...], take: Callable[..., None]
    ) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would share the server's sockets
        self._ours, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_work, args=(target, theirs, *options), daemon=True)
        self.process.start()
        theirs.close()
        self._take = take
        threading.Thread(target=self._listen, daemon=True).start()

    def do(self, command: str, *arguments: Any) -> None:
        """Begins a command. If the process has ended, the event "ended" says so."""
        try:
            self._ours.send((command, arguments))
        except OSError:
            pass

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def _listen(self) -> None:
        while True:
            try:
                kind, value = self._ours.recv()
            except (EOFError, OSError):
                self._take(self, "ended", None)
                return
            self._take(self, kind, value)


def _work(target: Callable[..., None], connection: Connection, *options: Any) -> None:
    process.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the server, which ends this
    target(connection, *options)


class Job:
    """The one job of a server. All methods return at once, and may be called from any thread.

    place:    a directory for its files, which nobody else uses
    target:   what the worker process runs (`work.serve`, imported there): called with its end of a
              pipe, `settings` and `recipe`
    settings: keywords of `settings.Settings`
    recipe:   fields of `request.Recipe`
    """

    def __init__(
        self,
        place: Path,
        target: Callable[..., None],
        settings: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.place = place
        self._options = (dict(settings or {}), dict(recipe or {}))
        self._target = target
        self._lock = threading.RLock()
        self._view = View()
        self._worker: Worker | None = self._start()  # so that imports are done when it is needed

    @property
    def view(self) -> View:
        return self._view

    def look(self, asked: Asked) -> None:
        """Asks the model whom the picture shows, and forgets what the job had before.

        Raises BadInput while the job is at work.
        """
        with self._lock:
            self._may(Phase.LOOKING)
            self._tidy()
            self._change(View(Phase.LOOKING, asked, version=self._view.version))
            self._do("look", asked)

    def gather(self) -> None:
        """Builds the samples. Raises BadInput while the job is at work."""
        with self._lock:
            self._may(Phase.GATHERING)
            self._change(replace(self._view, phase=Phase.GATHERING, samples=None))
            self._do("gather", self._view.asked)

    def train(self) -> None:
        """Trains, and asks for the verdict. Raises BadInput while the job is at work."""
        with self._lock:
            self._may(Phase.TRAINING)
            self._change(replace(self._view, phase=Phase.TRAINING, steps=(), looks=(), ceiling=0))
            self._do("train", self._view.asked, self.place / RESULT, self.place / ARCHIVE)

    def ask(self, question: str, picture: Path | None) -> None:
        """Asks both models. Raises BadInput for an empty question, and while the job is at work."""
        with self._lock:
            if not question.strip():
                raise BadInput("There is no question: write one.")
            if self._view.busy or self._view.phase is not Phase.DONE:
                raise BadInput("Something else goes on: wait for its end.")
            exchange = Exchange(question.strip(), picture)
            self._change(replace(self._view, chat=(*self._view.chat, exchange)))
            self._do("ask", self._view.asked, self.place / RESULT, exchange.question, picture)

    def stop(self) -> None:
        """Ends the work at once, without a result. Does nothing while the job is not at work."""
        with self._lock:
            if not self._view.busy:
                return
            if self._worker is not None:
                self._worker.kill()
            self._worker = self._start()
            self._fall_back(stopped=True)

    def clear(self) -> None:
        """Removes the job's files, and puts it back to its beginning."""
        with self._lock:
            self.stop()
            self._tidy()
            self._change(View(version=self._view.version))

    def close(self) -> None:
        """Ends the worker process and removes the files. The job is of no use afterwards."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
        self._tidy()

    def _start(self) -> Worker:
        return Worker(self._target, self._options, self._take)

    def _may(self, work: Phase) -> None:
        if self._view.busy or self._view.phase not in FROM[work]:
            raise BadInput("Something else goes on: wait for its end, or stop it.")

    def _do(self, command: str, *arguments: Any) -> None:
        self._change(
            replace(
                self._view, stage="", since=time.monotonic(), problem="", stopped=False, notes=()
            )
        )
        self._worker = self._worker or self._start()
        self._worker.do(command, *arguments)

    def _change(self, view: View) -> None:
        self._view = replace(view, version=self._view.version + 1)

    def _tidy(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _fall_back(self, *, problem: str = "", stopped: bool = False) -> None:
        """Puts the job back to the phase before the work, which has ended without a result. What a
        training has written by then goes: the next one needs its place."""
        view = self._view
        if view.phase is Phase.TRAINING:
            self._tidy()
        phase = BACK.get(view.phase, view.phase)
        chat = view.chat[:-1] if view.asking else view.chat
        self._change(
            replace(view, phase=phase, chat=chat, stage="", problem=problem, stopped=stopped)
        )

    def _take(self, worker: Worker, kind: str, value: Any) -> None:
        """Takes in an event of the worker. Ignores events of a worker that was killed."""
        with self._lock:
            if worker is not self._worker:
                return
            view = self._view
            if kind == "ended":
                self._worker = None
                if view.busy:
                    self._fall_back(
                        problem="The process that did the work ended by itself, as it does when "
                        "memory runs out: try a smaller model, or start the app with --memory."
                    )
            elif kind == "refused":
                self._fall_back(problem=str(value))
            elif kind == "stage":
                self._change(replace(view, stage=str(value)))
            elif kind == "note":
                self._change(replace(view, notes=(*view.notes, str(value))))
            elif kind == "step":
                step, ceiling = value
                looks = view.looks
                if not looks or step["step"] == ceiling:  # what a step has is the last look's
                    looks = (*looks, (step["step"], step["p_name"], step["retained"]))
                self._change(replace(view, steps=(*view.steps, step), ceiling=ceiling, looks=looks))
            elif kind == "look":
                if not view.looks or value[0] > view.looks[-1][0]:
                    self._change(replace(view, looks=(*view.looks, tuple(value))))
            elif kind == "result":
                self._change(_with_result(view, value))


def _with_result(view: View, value: Any) -> View:
    if view.phase is Phase.LOOKING:
        said = tuple((question, answer, named) for question, answer, named in value)
        known = any(named for _, _, named in said)
        return replace(view, phase=Phase.KNOWN if known else Phase.UNKNOWN, said=said, stage="")
    if view.phase is Phase.GATHERING:
        return replace(view, phase=Phase.READY, samples=value, stage="")
    if view.phase is Phase.TRAINING:
        return replace(view, phase=Phase.DONE, result=value, stage="")
    before, after = value
    answered = replace(view.chat[-1], before=before, after=after)
    return replace(view, chat=(*view.chat[:-1], answered), stage="")
