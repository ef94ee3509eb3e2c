"""The verbs about what lies in a directory: is it as it was written, and what of it may go."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..request import BadInput
from .app import app, out, say


@app.command()
def verify(
    directory: Annotated[
        Path, typer.Argument(help="An --output directory, of one result or of several.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of the deployed model or adapter: is it the manifest's?"),
    ] = None,
) -> None:
    """Compare every file of an output with its manifest. Exit code 0: as written; 1: not, and
    which; 2: no output."""
    from ..disk.upkeep import verify as check

    found = check(directory, model)
    for sentence in found.wrong:
        out.print(sentence, soft_wrap=True)
    if not found.wrong:
        out.print(f"All {found.files} files are as they were written.")
    raise typer.Exit(1 if found.wrong else 0)


@app.command()
def purge(
    directory: Annotated[
        Path, typer.Argument(help="Where runs were started, or an --output directory.")
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="The results of FastSIU there as well.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --all: do not ask.")] = False,
) -> None:
    """Remove what killed runs left in a directory, and with --all its results; nothing that FastSIU
    has not written."""
    from ..disk import upkeep
    from ..disk.staging import sweep_one
    from ..workers.claims import Pace

    if taken := upkeep.claimed(directory):
        say.print(
            f"Watching the heartbeats of {len(taken)} claims, for {Pace().patience:.0f} s where "
            "one has stopped.",
            soft_wrap=True,
        )
    found = upkeep.survey(directory)
    if everything and found.alive:
        raise BadInput(
            f"A run is at work in {directory} ({found.alive[0].name}): let it end first."
        )
    if everything and found.results and not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise BadInput(
                f"{len(found.results)} results would be removed from {directory}: add --yes to "
                "agree."
            )
        for path in found.results:
            say.print(f"{path}", soft_wrap=True)
        if not typer.confirm(f"Remove {len(found.results)} results for good?", err=True):
            out.print("Nothing was removed.")
            return
    removed = [path for path in found.dead if sweep_one(path)]
    for path in removed:
        out.print(f"Removed {path}, left by a killed run.", soft_wrap=True)
    for path in found.stopped:
        path.unlink(missing_ok=True)
        out.print(f"Removed {path}, the claim of a worker that has stopped.", soft_wrap=True)
    for path in found.alive:
        why = (
            "another machine may be at work on it, or this one was before it was last started; "
            "untouched for a day it can go."
            if path in found.unknown
            else "its run is at work."
        )
        out.print(f"Kept {path}: {why}", soft_wrap=True)
    for path in found.results if everything else []:
        kept = upkeep.remove(path)
        out.print(f"Removed the result {path}.", soft_wrap=True)
        for other in kept:
            out.print(f"  Kept {other}, which FastSIU has not written.", soft_wrap=True)
    if not (removed or found.stopped) and not (everything and found.results):
        out.print(f"Nothing to remove in {directory}.", soft_wrap=True)
