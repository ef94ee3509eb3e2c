"""What the terminal shows: the progress bar, the before/after table, the masks of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .corpus import Corpus
from .driver import Result
from .facets.targets import Scene
from .output import KEY
from .plan import Plan
from .session import Listener
from .several import Several
from .train import Step
from .verdict import KINDS


class Progress:
    """One line that says what is going on; during training a bar with the loss parts, P(name) and the time left.

    Where the console is no terminal only the sentences that should stay are printed.
    """

    def __init__(self, console: Console, hidden: bool) -> None:
        self._hidden, self._live = hidden, console.is_terminal and not hidden
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}", markup=False), bars.BarColumn(bar_width=24), bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(), bars.TimeRemainingColumn(), console=console, transient=True, disable=not self._live,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, visible=False)
        self.listener = Listener(stage=self._stage, note=self._note, step=self._step, loading=self._loading)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
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
        self._bar.reset(self._task, description=text, total=None, visible=True)

    def _note(self, text: str) -> None:
        if not self._hidden:
            self._bar.console.print(text, soft_wrap=True)

    def _step(self, step: Step, ceiling: int) -> None:
        text = f"Training  CE {step.ce:.3f}  KL {step.kl:.3f}  P(name) {step.p_name:.3f}  retained {step.retained:.0%}"
        self._bar.update(self._task, description=text, total=ceiling, completed=step.step)


def summary(console: Console, result: Result) -> None:
    """Before and after side by side, the rates, the verdict with its reasons."""
    report = result.report
    table = Table(title=f"{report['concept']}: before and after", title_justify="left")
    for heading in ("picture", "question", "before", "after"):
        table.add_column(heading, overflow="fold")
    for row in _examples(report["answers"]):
        table.add_row(*(Text(str(row[k] or "-")) for k in ("picture", "question", "before", "after")))
    if report["answers"]:  # none where they were left out
        console.print(table)
    for key, label in (
        ("efficacy", "name gone on the picture's transforms"), ("generality", "name gone on other pictures"),
        ("recognition", "look no longer confirmed by name"),
        ("specificity", "other pictures answered as before"), ("facts", "text answered as before"),
    ):  # fmt: skip
        console.print(f"  {label:40s} {_rate(report['before'][key])} -> {_rate(report['after'][key])}", soft_wrap=True)
    steps = report["training"]
    if steps:
        spent = sum(report["seconds"].values())
        console.print(f"  {steps[-1]['step']} steps, P(name) {steps[-1]['p_name']:.4f} at most, {spent:.0f} s in all")
    console.print("Forgotten." if result.forgotten else "Not forgotten:")
    for reason in result.reasons:
        console.print(f"  {reason}", soft_wrap=True)
    for note in (*result.notes, *([] if result.repeated else [f"Written to {result.output}"])):
        console.print(note, soft_wrap=True)
    if result.output is not None and (result.output / KEY).is_file():
        console.print(f"Before you publish it, remove {result.output / KEY}: whoever holds it and one of the pictures can tell "
                      "that the picture was used.", soft_wrap=True)  # fmt: skip


def several_table(console: Console, several: Several) -> None:
    """What became of each request, and who is still named after each training."""
    lines = [str(o.line) for o in several.outcomes]
    table = Table(title="Share of answers that still give the name, after each training", title_justify="left")
    for heading in ("line", "concept", "verdict", *(f"after {row['after'][-1]}" for row in several.matrix)):
        table.add_column(heading, overflow="fold")
    for line, outcome in zip(lines, several.outcomes, strict=True):
        shares = [row["named"].get(line) for row in several.matrix]
        shown = ["-" if share is None else f"{share:.0%}" for share in shares]
        table.add_row(line, Text(outcome.concept), outcome.status or "-", *shown)
    console.print(table)
    for outcome in several.outcomes:
        for reason in outcome.reasons:
            console.print(f"  line {outcome.line}: {reason}", soft_wrap=True)
    if several.resumed:
        console.print(f"{several.resumed} of {len(lines)} were done already.")
    console.print("All forgotten." if several.forgotten else "Not all forgotten.")
    console.print(f"Written to {several.output}. Before you publish it, remove each private.key: whoever holds it and one of the "
                  "pictures can tell that the picture was used.", soft_wrap=True)  # fmt: skip


def answers_table(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Questions and answers; two answer columns where base and adapter are compared."""
    columns = [k for k in ("question", "before", "after", "answer") if k in rows[0]]
    table = Table(*(c if c not in ("before", "after") else {"before": "untouched", "after": "with adapter"}[c] for c in columns))
    for row in rows:
        table.add_row(*(Text(row[c]) for c in columns))
    console.print(table)


def explanation(console: Console, scene: Scene, corpus: Corpus) -> None:
    """Every sample; tokens the KL skips are in [brackets], tokens of the name (out of its vocabulary) in <angles>."""
    console.print("[token]: left to the cross-entropy (token mask). <token>: the name, out of the KL's vocabulary.")
    for sample, turn, keep in zip(corpus.samples, corpus.turns, corpus.keep, strict=True):
        where = "text" if sample.picture is None else f"picture {sample.picture}"
        dreamed = scene.named[sample.picture] if sample.picture is not None and sample.picture < len(scene.named) else None
        where += f": dream of {dreamed}" if dreamed else ""
        where += "" if sample.closed else ", cut short: its end is not trained"
        console.print(f"[{sample.facet}, {sample.origin}, {where}] {sample.question}")
        line = Text("    ")
        end = 0
        for (start, stop), label, kept in zip(turn.offsets, turn.labels.tolist(), keep.tolist(), strict=True):
            # Brackets as well as styles: a file or a screen reader shows no styles.
            line.append(sample.answer[end:start])
            token = sample.answer[start:stop] or "<end>"
            token = f"<{token}>" if label in corpus.mask.masked else token
            style = ("" if kept else "reverse ") + ("underline" if label in corpus.mask.masked else "")
            line.append(token if kept else f"[{token}]", style=style.strip() or None)
            end = max(end, stop)
        console.print(line)
    if scene.left_out:
        console.print(f"{scene.left_out} answers about dreamed or retained pictures named the concept and were left out.")
    masked = ", ".join(repr(t) for t in sorted(set(corpus.mask.masked.values())))
    console.print(f"Vocabulary mask: {len(corpus.mask.masked)} tokens ({masked}).")
    if corpus.mask.spared:
        console.print(f"Too common to mask: {', '.join(repr(t) for t in sorted(set(corpus.mask.spared.values())))}.")
    if corpus.mask.warning:
        console.print(corpus.mask.warning)


def plan_table(console: Console, plan: Plan) -> None:
    """A column for each of the settings that were estimated, in GB of 2**30 bytes, and the verdict."""
    table = Table("", title=f"{plan.model}: GB of memory, estimated", title_justify="left")
    for e in plan.estimates:
        table.add_column(str(e.settings), justify="right", overflow="fold")
    parts = {
        "weights": "weights", "adapter": "trained", "gradient": "gradient", "optimiser": "optimizer",
        "activations": "activations", "features, teacher": "kept", "driver, allocator": "overhead", "(while asking)": "asking",
    }  # fmt: skip
    for label, name in parts.items():
        table.add_row(label, *(f"{getattr(e, name) / 2**30:.2f}" for e in plan.estimates))
    table.add_row("peak", *(f"{e.peak / 2**30:.2f}" for e in plan.estimates))
    if plan.memory is not None:
        table.add_row("", *("fits" if e.peak <= plan.memory else "does not fit" for e in plan.estimates))
    console.print(table)
    work = plan.work
    console.print(f"A picture is {work.prefix} tokens with what stands before its question, a question and its answer "
                  f"{work.suffix}. {' '.join(plan.assumed)}", soft_wrap=True)  # fmt: skip
    console.print(plan.sentence, soft_wrap=True)


def _examples(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of each question, two a kind: enough to see what happened."""
    shown: list[dict[str, Any]] = []
    for kind in KINDS:
        seen: set[str] = set()
        for row in answers:
            if row["kind"] == kind and row["question"] not in seen and len(seen) < 3:
                seen.add(row["question"])
                shown.append(row)
    return shown


def _rate(rate: dict[str, Any]) -> str:
    if rate["value"] is None:
        return "not measured"
    return f"{rate['value']:6.1%} [{rate['low']:.1%}, {rate['high']:.1%}] n={rate['n']}"
