"""What the terminal shows of requests that were done apart: of work that several processes share,
and of adapters that were added up."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..combine import Combined
from ..independent import Each
from ..output import KEY
from ..workers.joining import Forecast, Share
from .results import before_publishing, cell

FEW = 20  # requests, up to which reasons are shown; DIR/NUMBER/report.md has them for any number


def requests_table(console: Console, each: Each) -> None:
    """What became of each request, where this worker has drawn the table; then what it did."""
    if each.outcomes:
        table = Table(title="One adapter for each request", title_justify="left")
        for heading in ("line", "concept", "verdict", "output"):
            table.add_column(heading, overflow="fold")
        for one in each.outcomes:
            table.add_row(str(one.line), cell(one.concept), one.status, one.output or "-")
        console.print(table)
        for one in each.outcomes if each.of <= FEW else ():
            for reason in one.reasons:
                console.print(f"  line {one.line}: {reason}", soft_wrap=True)
        if each.resumed:
            console.print(f"{each.resumed} of {each.of} were done already.")
        console.print("All forgotten." if each.forgotten else "Not all forgotten.")
    share_lines(console, each.share, each.of, each.output)


def combined_table(console: Console, combined: Combined) -> None:
    """The verdict of every concept, of its own adapter and of the sum."""
    table = Table(title="Each adapter by itself, and their sum", title_justify="left")
    for heading in (
        "line",
        "concept",
        "alone",
        "the sum",
        "name still given",
        "other pictures kept",
        "text kept",
    ):
        table.add_column(heading, overflow="fold")
    share = lambda value: "-" if value is None else f"{value:.0%}"
    for row in combined.rows:
        shares = (share(value) for value in (row.named, row.others, row.facts))
        table.add_row(str(row.line), cell(row.concept), row.alone, row.verdict, *shares)
    console.print(table)
    for row in combined.rows if len(combined.rows) <= FEW else ():
        for reason in row.reasons:
            console.print(f"  line {row.line}: {reason}", soft_wrap=True)
    for note in combined.notes:
        console.print(note, soft_wrap=True)
    console.print("All forgotten." if combined.forgotten else "Not all forgotten.")
    console.print(
        f"Rank {combined.rank}, written to {combined.output}. {before_publishing(f'its {KEY}')}",
        soft_wrap=True,
    )


def share_lines(console: Console, share: Share, of: int, output: Path) -> None:
    console.print(share.told(of), soft_wrap=True)
    if not share.drew:
        console.print(
            "The table of all is there; without --join the same command shows it.", soft_wrap=True
        )
    console.print(f"Written to {output}. {before_publishing(f'each {KEY}')}", soft_wrap=True)


def forecast_lines(console: Console, forecast: Forecast) -> None:
    for line in forecast.told():
        console.print(line, soft_wrap=True)
