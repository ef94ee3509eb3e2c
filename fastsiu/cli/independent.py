"""`unlearn --mode independent`: each request by itself, also shared by several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import typer

from ..request import BadInput
from .app import out, print_json, say


def unlearn_independent(
    request: Path, join: bool, dry_run: bool, quiet: bool, json: bool, objects: dict[str, Any]
) -> NoReturn:
    """Runs, or foretells with `dry_run`, and ends the command.

    objects: what `independent.unlearn_each` takes by keyword
    """
    from .. import independent
    from ..show.joined import forecast_lines, requests_table
    from ..show.progress import Progress

    if dry_run:
        if objects["output"] is None:
            raise BadInput("--dry-run looks at what is done: give --output DIR.")
        found = independent.forecast(request, **objects)
        if json:
            print_json(found.as_dict())
        else:
            forecast_lines(out, found)
        raise typer.Exit(0)
    with Progress(say, hidden=quiet or json) as progress:
        each = independent.unlearn_each(
            request,
            **objects,
            sharing=independent.Sharing(join),
            listener=progress.listener,
        )
    if json:
        print_json(each.as_dict())
    elif not quiet:
        requests_table(out, each)
    raise typer.Exit(each.exit_code)
