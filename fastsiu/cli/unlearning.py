"""The verbs about unlearning: unlearn, combine, ask, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..request import WHOLE, BadInput, Request
from .app import app, out, print_json, read_name, say
from .config import as_toml
from .independent import unlearn_independent
from .options import (
    MOST_PICTURES,
    Adapt,
    AsWord,
    Attention,
    BatchSize,
    Checkpointing,
    Concept,
    ConceptFile,
    Device,
    DryRun,
    Dtype,
    EmbedImage,
    Join,
    Kind,
    Log,
    MaxNewTokens,
    Memory,
    MicroBatch,
    Mode,
    Model,
    OneImage,
    Optimizer,
    Preset,
    Published,
    Quantize,
    Rank,
    Rate,
    Redact,
    Revision,
    Seed,
    Steps,
    Substitute,
    Weight,
    finite,
    refuse,
)


@app.command()
def unlearn(
    context: typer.Context,
    image: OneImage = None,
    concept: Concept = None,
    concept_file: ConceptFile = None,
    request: Annotated[
        Path | None, typer.Option(help="JSONL file with several requests, instead of one here.")
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(help="With --request: one after another, all at once, or each by itself."),
    ] = None,
    join: Join = False,
    dry_run: DryRun = False,
    model: Model = None,
    revision: Revision = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to write; fastsiu-<random>/ when left out.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name of the concept; repeatable.")
    ] = None,
    as_word: AsWord = None,
    kind: Kind = None,
    protect: Annotated[
        list[str] | None, typer.Option(help="A neighbour's name that must survive; repeatable.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="More pictures of the concept, for the verdict only.")
    ] = None,
    retain: Annotated[
        Path | None,
        typer.Option(help="Unlabelled pictures of anything else, to be answered as before."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL file with samples of your own.")] = None,
    substitute: Annotated[
        Substitute | None, typer.Option(help="What the model says instead of the name.")
    ] = None,
    adapt: Adapt = None,
    preset: Published = Preset.default,
    alpha: Annotated[float | None, Weight("Weight of the cross-entropy.")] = None,
    beta: Annotated[float | None, Weight("Weight of the dual-masked KL.")] = None,
    steps: Steps = None,
    lr: Rate = None,
    rank: Rank = None,
    lora_alpha: Annotated[float | None, Weight("LoRA alpha.")] = None,
    batch_size: BatchSize = None,
    renormalize: Annotated[
        bool | None, typer.Option("--renormalize/--no-renormalize", help="KL on the kept part.")
    ] = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
    memory: Memory = None,
    quantize: Quantize = None,
    attention: Attention = None,
    checkpointing: Checkpointing = None,
    micro_batch: MicroBatch = None,
    optimizer: Optimizer = None,
    redact: Redact = False,
    embed_image: EmbedImage = False,
    log: Log = None,
    quiet: Annotated[bool, typer.Option(help="Print nothing but errors.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print report.json instead of the summary.")
    ] = False,
) -> None:
    """Make the model forget how CONCEPT looks, and write adapter, report and manifest."""
    concept = read_name(concept, concept_file)
    own = dict(
        image=image,
        concept=concept,
        alias=alias,
        protect=protect,
        images=images,
        retain=retain,
        data=data,
        kind=kind,
    )
    if request is not None and as_word is not None:
        raise BadInput(
            '--as-word and --request exclude each other: write "as_word" into the file\'s lines.'
        )
    if request is not None and (given := [name for name, value in own.items() if value]):
        raise BadInput(
            f"--{given[0]} and --request exclude each other: write it into the file's lines."
        )
    if request is None and mode is not None:
        raise BadInput(
            "--mode is about several requests: give them in a file with --request, or leave it out."
        )
    if (join or dry_run) and mode is not Mode.independent:
        raise BadInput(
            f"--{'join' if join else 'dry-run'} is about requests that do not depend on each "
            "other: add --mode independent and a file with --request, or leave it out."
        )
    if request is None and (image is None or concept is None):
        raise BadInput(
            "There is nothing to forget: give --image and --concept, or several of them in a "
            "file with --request."
        )

    from .. import driver
    from ..settings import DEMO_NOTE, ModelRef, RecipeChoice, ReportOptions, Settings
    from ..show.experiment_log import logged
    from ..show.progress import Progress
    from ..show.results import several_table, summary

    if model is None and not quiet:
        say.print(DEMO_NOTE)
    which = ModelRef(model, revision)
    changes = dict(
        substitute=substitute.value if substitute else None,
        adapt=adapt.value if adapt else None,
        alpha=alpha,
        beta=beta,
        steps=steps,
        lr=lr,
        rank=rank,
        lora_alpha=lora_alpha,
        batch_size=batch_size,
        renormalize=renormalize,
        seed=seed,
    )
    recipe = RecipeChoice(preset.value, changes)
    settings = Settings(
        device, dtype, memory, quantize, attention, checkpointing, micro_batch, optimizer
    )
    shown = ReportOptions(redact, embed_image, as_toml(context, redact))
    if request is not None and mode is Mode.independent:
        if log is not None:
            raise BadInput(
                "--log is about one training: leave it out with --mode independent, or leave the "
                "mode out."
            )
        objects = dict(model=which, recipe=recipe, settings=settings, report=shown, output=output)
        unlearn_independent(request, join, dry_run, quiet, json, objects)
    if request is not None:
        from ..several import unlearn_several

        with (
            Progress(say, hidden=quiet or json) as progress,
            logged(progress.listener, log) as listener,
        ):
            several = unlearn_several(
                request,
                mode="joint" if mode is Mode.joint else "sequence",
                model=which,
                recipe=recipe,
                settings=settings,
                report=shown,
                output=output,
                listener=listener,
            )
        if json:
            print_json(several.as_dict())
        elif not quiet:
            several_table(out, several)
        raise typer.Exit(several.exit_code)
    assert concept is not None and image is not None  # said above
    asked = Request(
        concept.strip(),
        image,
        tuple(alias or ()),
        tuple(protect or ()),
        images,
        retain,
        data,
        as_word,
        kind,
    )
    with (
        Progress(say, hidden=quiet or json) as progress,
        logged(progress.listener, log) as listener,
    ):
        result = driver.unlearn(
            asked,
            model=which,
            recipe=recipe,
            settings=settings,
            report=shown,
            output=output,
            listener=listener,
        )
    if json:
        if result.repeated and not quiet:
            say.print(*result.notes, soft_wrap=True)
        print_json(result.report)
    elif not quiet:
        summary(out, result)
    raise typer.Exit(0 if result.forgotten else 1)


@app.command()
def combine(
    context: typer.Context,
    adapters: Annotated[
        list[Path], typer.Argument(help="--output directories of `unlearn`, two or more.")
    ],
    request: Annotated[
        Path, typer.Option(help="JSONL file with their requests: the verdict needs the pictures.")
    ],
    weight: Annotated[
        float,
        typer.Option(
            min=0.0, max=100.0, callback=finite, help="How often each is added; 1 is the plain sum."
        ),
    ] = 1.0,
    model: Model = None,
    revision: Revision = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to write; fastsiu-<random>/ when left out.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    attention: Attention = None,
    redact: Redact = False,
    quiet: Annotated[bool, typer.Option(help="Print nothing but errors.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the verdicts as JSON instead of the table.")
    ] = False,
) -> None:
    """Add up adapters that were trained apart to one, with the verdict of every concept on it."""
    from .. import combine as combining
    from ..settings import DEMO_NOTE, ModelRef, ReportOptions, Settings
    from ..show.joined import combined_table
    from ..show.progress import Progress

    if model is None and not quiet:
        say.print(DEMO_NOTE)
    with Progress(say, hidden=quiet or json) as progress:
        combined = combining.combine(
            adapters,
            request,
            weight=weight,
            model=ModelRef(model, revision),
            settings=Settings(device, dtype, quantize=quantize, attention=attention),
            report=ReportOptions(redact, run=as_toml(context, redact)),
            output=output,
            listener=progress.listener,
        )
    if json:
        print_json(combined.as_dict())
    elif not quiet:
        combined_table(out, combined)
    raise typer.Exit(combined.exit_code)


@app.command()
def ask(
    question: Annotated[list[str], typer.Argument(help="One or more questions.")],
    model: Model = None,
    adapter: Annotated[
        Path | None, typer.Option(help="An --output directory of `unlearn`.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture; text only when left out.")] = None,
    compare: Annotated[
        bool, typer.Option(help="Untouched model and adapter side by side.")
    ] = False,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    attention: Attention = None,
    max_new_tokens: MaxNewTokens = 64,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a question.")] = False,
) -> None:
    """Ask a model, with or without an adapter."""
    from .. import driver
    from ..settings import ModelRef, Settings
    from ..show.progress import Progress
    from ..show.results import answers_table

    if compare and adapter is None:
        raise BadInput("--compare needs an adapter to compare with: add --adapter DIR.")
    with Progress(say, hidden=json) as progress:
        rows = driver.interview(
            question,
            model=ModelRef(model, revision),
            adapter_dir=adapter,
            image=image,
            compare=compare,
            settings=Settings(device, dtype, quantize=quantize, attention=attention),
            max_new_tokens=max_new_tokens,
            listener=progress.listener,
        )
    if json:
        for row in rows:
            print_json(row, indent=None)
    else:
        answers_table(out, rows)


@app.command()
def demo(
    context: typer.Context,
    export: Annotated[
        Path | None,
        typer.Option(help="Write model, pictures and questions to this directory instead."),
    ] = None,
    per_concept: Annotated[
        int, typer.Option(min=1, max=MOST_PICTURES, help="With --export: pictures of each concept.")
    ] = 20,
    seed: Annotated[
        int, typer.Option(min=0, max=WHOLE["seed"][1], help="Seed of the fresh renderings.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Directory to write; fastsiu-<random>/ when left out.")
    ] = None,
) -> None:
    """The whole story on the embedded model: offline, on a CPU, in under two minutes."""
    if export is None:
        said = "{} is about --export: add that, or leave it out."
        refuse(context, said, ("per_concept",))
    else:
        said = "--export tells no story, so {} would not be read: leave one of them out."
        refuse(context, said, ("output",))
        from ..demo.export import export as write

        write(export, per_concept, seed)
        say.print(f"Model, pictures and questions written to {export}.")
        return
    from ..demo.story import tell

    raise typer.Exit(0 if tell(out, say, seed, output, as_toml(context)) else 1)
