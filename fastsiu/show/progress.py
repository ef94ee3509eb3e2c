"""The line that says what is going on, and the bar during training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich import progress as bars
from rich.console import Console

from ..guards.terminal import visible
from ..session import Listener
from ..train import Step


class Progress:
    """One line that says what is going on; during training a bar with the loss parts, P(name) and
    the time left.

    Where the console is no terminal only the sentences that should stay are printed.

    hidden: nothing is shown
    notes:  the sentences that should stay are printed, hidden or not
    """

    def __init__(self, console: Console, hidden: bool, notes: bool = False) -> None:
        self._silent, self._live = hidden and not notes, console.is_terminal and not hidden
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=None, visible=False)
        self.listener = Listener(
            stage=self._stage, note=self._note, step=self._step, loading=self._loading
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @contextmanager
    def _loading(self) -> Iterator[bool]:
        """A live line and the bars of transformers cannot share a terminal: the line makes room."""
        self._bar.stop()
        try:
            yield self._live
        finally:
            self._bar.start()

    def _stage(self, text: str) -> None:
        self._bar.reset(self._task, description=visible(text), total=None, visible=True)

    def _note(self, text: str) -> None:
        if not self._silent:
            self._bar.console.print(text, soft_wrap=True)

    def _step(self, step: Step, ceiling: int) -> None:
        text = (
            f"Training  CE {step.ce:.3f}  KL {step.kl:.3f}  P(name) {step.p_name:.3f}  "
            f"retained {step.retained:.0%}"
        )
        self._bar.update(self._task, description=text, total=ceiling, completed=step.step)
