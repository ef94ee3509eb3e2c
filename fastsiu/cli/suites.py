"""The verb about many concepts: suite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..request import BadInput
from .app import app, out, print_json, say
from .config import as_toml
from .options import (
    MOST_PICTURES,
    MOST_PROCESSES,
    Attention,
    BatchSize,
    Device,
    DryRun,
    Dtype,
    Join,
    Log,
    MaxNewTokens,
    Memory,
    Model,
    Preset,
    Published,
    Quantize,
    Rank,
    Rate,
    Revision,
    Seed,
    Steps,
    refuse,
)

if TYPE_CHECKING:
    from ..evaluate.suites.job import SuiteOptions


@app.command()
def suite(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(help="Directory with many concepts (docs/suite.md).")
    ],
    model: Model = None,
    revision: Revision = None,
    adapter: Annotated[
        Path | None, typer.Option(help="An --output directory of `unlearn`.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for the report; only printed when left out.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read it, decode every picture, and stop.")
    ] = False,
    concepts: Annotated[
        list[str] | None,
        typer.Option(help="Only this one (slug or name); repeatable."),
    ] = None,
    unlearn: Annotated[
        bool,
        typer.Option("--unlearn", help="Unlearn each from its training picture."),
    ] = False,
    adapters: Annotated[
        Path | None, typer.Option(help="Directory with the adapter of each in SLUG.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PICTURES, help="At most so many pictures of each sort."),
    ] = None,
    per_other: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_PICTURES, help="Pictures of each other concept (2)."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PROCESSES, help="Concepts at once, a model each (1)."),
    ] = None,
    join: Join = False,
    dry_run: DryRun = False,
    untouched: Annotated[
        Path | None,
        typer.Option(help="An earlier --output of the same exams."),
    ] = None,
    preset: Published = Preset.default,
    steps: Steps = None,
    lr: Rate = None,
    rank: Rank = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    memory: Memory = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    attention: Attention = None,
    max_new_tokens: MaxNewTokens = 64,
    log: Log = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print report.json instead of the table.")
    ] = False,
) -> None:
    """Measure many concepts, and with --unlearn forget each first; run again, it does what is
    missing. Exit code 1 when one is not forgotten."""
    if check:
        others = {str(parameter.name) for parameter in context.command.params}
        said = "--check reads the suite and stops, so {} would not be read: leave one of them out."
        refuse(context, said, others - {"directory", "check"})
        from ..evaluate.suites import suite as suites

        say.print(suites.told(suites.read(directory)), soft_wrap=True)
        return
    if log is not None and (not unlearn or join or dry_run or (processes or 1) > 1):
        raise BadInput(
            "--log is about the training of one process: add --unlearn and leave --processes, "
            "--join and --dry-run out, or leave --log out."
        )

    from ..evaluate.suites.job import SuiteOptions
    from ..evaluate.suites.run import evaluate_suite
    from ..settings import ModelRef, RecipeChoice, Settings
    from ..show.experiment_log import logged
    from ..show.measured import suite_table
    from ..show.progress import Progress

    changes = dict(steps=steps, lr=lr, rank=rank, batch_size=batch_size, seed=seed)
    options = SuiteOptions(
        tuple(concepts or ()),
        unlearn,
        adapters,
        adapter,
        2 if per_other is None else per_other,
        limit,
        untouched,
        max_new_tokens,
    )
    objects: dict[str, Any] = dict(
        model=ModelRef(model, revision),
        recipe=RecipeChoice(preset.value, changes),
        settings=Settings(device, dtype, memory, quantize, attention),
        output=output,
    )
    if join or dry_run:
        if processes is not None:
            raise BadInput(
                "--processes belongs to one run alone: start the command with --join as often as "
                "there shall be processes."
            )
        _joined(directory, options, objects, as_toml(context), dry_run, json)
    with (
        Progress(say, hidden=json) as progress,
        logged(progress.listener, log) as listener,
    ):
        evaluated = evaluate_suite(
            directory,
            options,
            **objects,
            processes=processes or 1,
            run=as_toml(context),
            listener=listener,
        )
    if json:
        print_json(evaluated.report)
    else:
        suite_table(out, evaluated)
    raise typer.Exit(evaluated.exit_code)


def _joined(
    directory: Path,
    options: SuiteOptions,
    objects: dict[str, Any],
    run: str,
    dry_run: bool,
    json: bool,
) -> NoReturn:
    """Runs, or foretells with `dry_run`, and ends the command.

    objects: what `evaluate.suites.join.join_suite` takes by keyword
    """
    from ..evaluate.suites import join as suite_join
    from ..show.joined import forecast_lines, share_lines
    from ..show.measured import suite_table
    from ..show.progress import Progress

    if dry_run:
        if objects["output"] is None:
            raise BadInput("--dry-run looks at what is done: give --output DIR.")
        found = suite_join.forecast(directory, options, **objects)
        if json:
            print_json(found.as_dict())
        else:
            forecast_lines(out, found)
        raise typer.Exit(0)
    with Progress(say, hidden=json) as progress:
        joined = suite_join.join_suite(
            directory, options, **objects, run=run, listener=progress.listener
        )
    if json:
        print_json(joined.evaluated.report if joined.evaluated else {"worker": vars(joined.share)})
    else:
        if joined.evaluated is not None:
            suite_table(out, joined.evaluated)
        share_lines(out, joined.share, joined.of, joined.output)
    raise typer.Exit(joined.exit_code)
