"""The verb about other people's benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..request import BadInput
from .app import app, out, print_json, say
from .config import as_toml
from .options import (
    MOST_PICTURES,
    AllowNetwork,
    Attention,
    Device,
    Dtype,
    Judge,
    JudgeKey,
    JudgeModel,
    JudgePlainHttp,
    MaxNewTokens,
    Model,
    Quantize,
    Revision,
    grader_of,
    refuse,
)


@app.command()
def benchmark(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(help="mmubench, mlubench, fiubench, clear, mllmu or ppubench."),
    ],
    directory: Annotated[Path, typer.Argument(help="Where its files lie (docs/benchmarks.md).")],
    check: Annotated[
        bool, typer.Option("--check", help="Read it, decode every picture, and stop.")
    ] = False,
    suite: Annotated[
        Path | None, typer.Option(help="Write it as a suite to this directory, and stop.")
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(help='With --suite: JSON file {"ID": "name"}, for a set without names.'),
    ] = None,
    ratio: Annotated[
        int | None, typer.Option(help="Percentage to forget; the authors' first when left out.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Only this set of it; repeatable.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PICTURES, help="At most so many items of each set."),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    adapter: Annotated[
        Path | None, typer.Option(help="An --output directory of `unlearn`.")
    ] = None,
    retrained: Annotated[
        Path | None,
        typer.Option(help="--output for a model that never learned it, for the KS test."),
    ] = None,
    stem: Annotated[
        bool, typer.Option("--stem", help="ROUGE compares stems, as the authors do; needs nltk.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file for the table and the answers; FILE.toml beside it repeats the run."
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    attention: Attention = None,
    max_new_tokens: MaxNewTokens = 64,
    judge: Judge = None,
    judge_model: JudgeModel = None,
    judge_key: JudgeKey = None,
    judge_plain_http: JudgePlainHttp = False,
    allow_network: AllowNetwork = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the JSON instead of the table.")
    ] = False,
) -> None:
    """Read somebody else's benchmark: check it, make a suite of it, or ask a model and print its
    own metrics under its own names."""
    if names is not None and suite is None:
        raise BadInput("--names is about the suite that is written: add --suite DIR, or leave it.")

    asking = {str(parameter.name) for parameter in context.command.params}
    asking -= {"name", "directory", "ratio", "check", "suite", "names"}
    if check:
        said = "--check reads the set and stops, so {} would not be read: leave one of them out."
        refuse(context, said, asking | {"suite", "names"})
    if suite is not None:
        said = "--suite writes a suite and stops, so {} would not be read: leave one of them out."
        refuse(context, said, asking)

    from ..evaluate.benchmarks import as_suite, run

    if check:
        say.print(run.told(run.read(name, directory, ratio)), soft_wrap=True)
        return
    if suite is not None:
        found = run.read(name, directory, ratio)
        given = as_suite.names_of(names) if names is not None else None
        made = as_suite.write(found, suite, given)
        say.print(
            f"{found.name} with {len(made.subjects)} concepts written to {suite}: "
            f"`fastsiu suite {suite}`.",
            soft_wrap=True,
        )
        return

    judged_by = grader_of(judge, judge_model, judge_key, judge_plain_http, allow_network)
    if judged_by is None:
        said = "{} is about a judge: add --judge URL and --judge-model NAME, or leave it out."
        refuse(context, said, ("judge_key", "judge_plain_http", "allow_network"))

    from ..disk.staging import check_new, new_file
    from ..settings import ModelRef, Settings
    from ..show.measured import benchmark_table
    from ..show.progress import Progress

    if output is not None:
        check_new(run.repeating(output), "give another --output")
    with Progress(say, hidden=json, notes=judged_by is not None) as progress:
        measured = run.measure(
            name,
            directory,
            run.Choice(tuple(sets or ()), limit),
            ratio=ratio,
            model=ModelRef(model, revision),
            adapter_dir=adapter,
            settings=Settings(device, dtype, quantize=quantize, attention=attention),
            max_new_tokens=max_new_tokens,
            scoring=run.Scoring(stem, retrained, judged_by),
            output=output,
            listener=progress.listener,
        )
    if output is not None:
        new_file(run.repeating(output), as_toml(context).encode())
    if json:
        print_json(measured.report)
    else:
        benchmark_table(out, measured.report)
