"""Writes the training's curves with an experiment tracker: trackio, wandb or TensorBoard, on this
machine.

It logs numbers alone, also without --redact: no name, question, answer, picture, path or command
line.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from ..request import BadInput
from ..session import Listener
from ..train import Step

TRACKERS = ("trackio", "wandb", "tensorboard")
PROJECT = "fastsiu"
# If one of these is set, trackio sends what it logs to another machine.
_SENDS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")

Write = Callable[[dict[str, float], int], None]
# Begins a curve by its name; gives what writes to it and what ends it.
Begin = Callable[[str], tuple[Write, Callable[[], None]]]


@contextmanager
def logged(listener: Listener, tracker: str | None) -> Iterator[Listener]:
    """Inside the block, a listener that also logs each step: its loss, the loss's parts, P(name),
    and how much is retained.

    tracker: one of `TRACKERS`; None gives the listener as it is

    Several requests are one curve: the count of steps goes on. The first step begins it, so a run
    without one, such as a run whose output is already there, leaves nothing. trackio keeps its runs
    in its own directory, wandb in ./wandb, TensorBoard in ./runs. Raises BadInput for an unknown
    tracker, for one that is not installed, and where trackio is set up to send.
    """
    if tracker is None:
        yield listener
        return
    if tracker not in TRACKERS:
        raise BadInput(f"The tracker {tracker!r} is unknown: choose {', '.join(TRACKERS)}.")
    begin = _OPEN[tracker]()  # what is not installed is told before anything is loaded
    curve: tuple[Write, Callable[[], None]] | None = None
    count = 0

    def step(taken: Step, ceiling: int) -> None:
        nonlocal count, curve
        if curve is None:
            curve = begin(f"{PROJECT}-{secrets.token_hex(4)}")
        write, _ = curve
        count += 1
        values = {k: float(v) for k, v in asdict(taken).items() if k != "step"}
        write({f"train/{name}": value for name, value in values.items()}, count)
        listener.step(taken, ceiling)

    try:
        yield replace(listener, step=step)
    finally:
        if curve is not None:
            _, close = curve
            close()


def _missing(tracker: str, error: ImportError) -> BadInput:
    return BadInput(
        f"--log {tracker} needs {tracker}, which is not installed ({error}): pip install "
        "'fastsiu[log]'."
    )


def _trackio() -> Begin:
    if where := next((key for key in _SENDS if os.environ.get(key)), None):
        raise BadInput(
            f"{where} is set, and trackio would send the curves away: unset it; `trackio sync` "
            "can send them later."
        )
    try:
        import trackio
    except ImportError as error:
        raise _missing("trackio", error) from error

    def begin(name: str) -> tuple[Write, Callable[[], None]]:
        run: Any = trackio.init(
            PROJECT, name=name, embed=False, auto_log_gpu=False, auto_log_cpu=False
        )
        return (lambda values, step: run.log(values, step=step)), run.finish

    return begin


def _wandb() -> Begin:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb", error) from error

    def begin(name: str) -> tuple[Write, Callable[[], None]]:
        # Without these settings wandb stores the command line, which has the name, the host, the
        # user and the code.
        settings = wandb.Settings(
            mode="offline",
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        run = wandb.init(project=PROJECT, name=name, settings=settings)
        return (lambda values, step: run.log(values, step=step)), run.finish

    return begin


def _tensorboard() -> Begin:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard", error) from error

    def begin(name: str) -> tuple[Write, Callable[[], None]]:
        writer = SummaryWriter(log_dir=os.path.join("runs", name))

        def write(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return write, writer.close

    return begin


# Each checks that its tracker can be used here, and begins nothing.
_OPEN = {"trackio": _trackio, "wandb": _wandb, "tensorboard": _tensorboard}
