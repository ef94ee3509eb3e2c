"""The verbs that look before anything is trained: data, plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..disk.staging import OTHER_FILE, check_new
from ..guards.terminal import json_safe
from ..request import BadInput, Request
from .app import app, encoding, out, print_json, read_name, say
from .options import (
    MOST_TOKENS,
    Adapt,
    AsWord,
    Attention,
    BatchSize,
    Checkpointing,
    Concept,
    ConceptFile,
    Device,
    Dtype,
    Image,
    Kind,
    Memory,
    MicroBatch,
    Model,
    Optimizer,
    Preset,
    Published,
    Quantize,
    Rank,
    Revision,
    Seed,
    Substitute,
)


@app.command()
def data(
    image: Image,
    concept: Concept = None,
    concept_file: ConceptFile = None,
    model: Model = None,
    revision: Revision = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name of the concept; repeatable.")
    ] = None,
    as_word: AsWord = None,
    kind: Kind = None,
    protect: Annotated[
        list[str] | None, typer.Option(help="A neighbour's name; repeatable.")
    ] = None,
    retain: Annotated[
        Path | None, typer.Option(help="Unlabelled pictures of anything else.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL file with samples of your own.")] = None,
    substitute: Annotated[
        Substitute | None, typer.Option(help="What the model says instead of the name.")
    ] = None,
    adapt: Adapt = None,
    preset: Published = Preset.default,
    output: Annotated[
        Path | None, typer.Option(help="JSONL file to write; standard output when left out.")
    ] = None,
    explain: Annotated[
        bool, typer.Option(help="Show every sample with its masked tokens instead.")
    ] = False,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
    memory: Memory = None,
    quantize: Quantize = None,
    attention: Attention = None,
) -> None:
    """The training samples and their masks, before anything is trained."""
    concept = read_name(concept, concept_file)
    if concept is None:
        raise BadInput("There is no name: give --concept or --concept-file.")
    if output is not None and not output.parent.is_dir():
        raise BadInput(
            f"There is no directory {output.parent} to write to: create it or {OTHER_FILE}."
        )
    if output is not None:
        check_new(output, OTHER_FILE)

    from .. import driver
    from ..disk.staging import new_file
    from ..samples import corpus
    from ..settings import ModelRef, RecipeChoice, Settings
    from ..show.progress import Progress
    from ..show.samples import explanation

    asked = Request(
        concept.strip(),
        image,
        tuple(alias or ()),
        tuple(protect or ()),
        None,
        retain,
        data,
        as_word,
        kind,
    )
    changes = {
        "substitute": substitute.value if substitute else None,
        "adapt": adapt.value if adapt else None,
        "seed": seed,
    }
    with Progress(say, hidden=False) as progress:
        prepared = driver.prepared_for(
            asked,
            model=ModelRef(model, revision),
            recipe=RecipeChoice(preset.value, changes),
            settings=Settings(device, dtype, memory, quantize, attention),
            listener=progress.listener,
        )
    samples = [*prepared.corpus.samples, *(prepared.lessons.samples if prepared.lessons else ())]
    if explain:
        explanation(out, prepared.scene, prepared.corpus, prepared.lessons)
    elif output is not None:
        new_file(output, json_safe(corpus.as_jsonl(samples)).encode("utf-8"))
        say.print(f"{len(samples)} samples written to {output}.")
    else:
        sys.stdout.write(json_safe(corpus.as_jsonl(samples), encoding()))


@app.command()
def plan(
    model: Model = None,
    memory: Memory = None,
    revision: Revision = None,
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), bfloat16, float16 or float32.")
    ] = "auto",
    quantize: Quantize = None,
    attention: Attention = None,
    checkpointing: Checkpointing = None,
    micro_batch: MicroBatch = None,
    optimizer: Optimizer = None,
    adapt: Adapt = None,
    rank: Rank = None,
    batch_size: BatchSize = None,
    image: Annotated[
        Path | None,
        typer.Option(help="A picture whose tokens are counted with the model's processor."),
    ] = None,
    image_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_TOKENS,
            help="Tokens of a picture, where the configuration does not say.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cpu or auto.")] = "cuda",
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON, sizes in bytes, instead of the table.")
    ] = False,
) -> None:
    """Does it fit? From the model's configuration alone: no weight is read or fetched. Exit code 1
    when it does not."""
    from ..settings import ModelRef, RecipeChoice, Settings, plan_for
    from ..show.results import plan_table

    found = plan_for(
        ModelRef(model, revision),
        Settings(device, dtype, memory, quantize, attention, checkpointing, micro_batch, optimizer),
        RecipeChoice(changes=dict(adapt=adapt and adapt.value, rank=rank, batch_size=batch_size)),
        image=image,
        image_tokens=image_tokens,
    )
    if json:
        print_json(found.as_dict())
    else:
        plan_table(out, found)
    raise typer.Exit(0 if found.chosen is not None else 1)
