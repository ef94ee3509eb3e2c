"""The verbs about evidence: eval, merge, compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..disk.staging import check_new
from ..request import BadInput
from .app import app, out, print_json, read_name, say
from .config import as_toml
from .options import (
    MOST_PROCESSES,
    AllowNetwork,
    AsWord,
    Attention,
    Concept,
    ConceptFile,
    Device,
    Dtype,
    EmbedImage,
    Judge,
    JudgeKey,
    JudgeModel,
    JudgePlainHttp,
    KindMeasured,
    MaxNewTokens,
    Model,
    OneImage,
    Quantize,
    Redact,
    Revision,
    finite,
    grader_of,
    refuse,
)


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    concept: Concept = None,
    concept_file: ConceptFile = None,
    model: Model = None,
    adapter: Annotated[
        Path | None, typer.Option(help="An --output directory of `unlearn`.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The untouched model, where --model is merged.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name of the concept; repeatable.")
    ] = None,
    as_word: AsWord = None,
    kind: KindMeasured = None,
    image: Annotated[
        Path | None, typer.Option(help="The training picture; transforms of it are shown as well.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Other pictures of the concept.")] = None,
    others: Annotated[
        Path | None, typer.Option(help="Pictures of others: in sub-directories by name, or flat.")
    ] = None,
    lookalikes: Annotated[
        Path | None, typer.Option(help="Pictures of those who look like it, laid out as --others.")
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(help="Pictures of the concept beside others.")
    ] = None,
    control: Annotated[
        Path | None, typer.Option(help="Pictures of what no model has seen; else shuffled patches.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSONL file with questions of your own.")
    ] = None,
    untouched: Annotated[
        Path | None, typer.Option(help="untouched.json of an earlier --output.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for the report; only printed when left out.")
    ] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    attention: Attention = None,
    max_new_tokens: MaxNewTokens = 64,
    redact: Redact = False,
    embed_image: EmbedImage = False,
    judge: Judge = None,
    judge_model: JudgeModel = None,
    judge_key: JudgeKey = None,
    judge_plain_http: JudgePlainHttp = False,
    allow_network: AllowNetwork = False,
    attacks: Annotated[
        str | None, typer.Option(help="Try it: prompt,image,rank,probe,mia,relearn,weights or all.")
    ] = None,
    lmms_eval: Annotated[
        Path | None, typer.Option(help="With --base: directory for the public benchmarks' script.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print report.json instead of the table.")
    ] = False,
    suite: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what a model knows of CONCEPT, and what it has lost of all else. Exit code 1 when it
    is not forgotten."""
    if suite is not None:
        raise BadInput(f"Many concepts have a verb of their own: `fastsiu suite {suite}`.")
    concept = read_name(concept, concept_file)
    if concept is None:
        raise BadInput(
            "There is nothing to measure: give --concept, or many concepts to `fastsiu suite`."
        )
    judged_by = grader_of(judge, judge_model, judge_key, judge_plain_http, allow_network)

    from ..evaluate import run as evaluation
    from ..settings import ModelRef, ReportOptions, Settings
    from ..show.measured import evaluation_table
    from ..show.progress import Progress
    from ..text.concept import Concept as Name

    with Progress(say, hidden=json, notes=judged_by is not None) as progress:
        result = evaluation.evaluate(
            Name(concept.strip(), tuple(alias or ()), as_word),
            evaluation.ExamFiles(image, images, others, lookalikes, groups, control, questions),
            kind=kind,
            model=ModelRef(model, revision),
            adapter_dir=adapter,
            base=base,
            settings=Settings(device, dtype, quantize=quantize, attention=attention),
            report=ReportOptions(redact, embed_image, as_toml(context, redact)),
            extras=evaluation.Extras(attacks, judged_by, lmms_eval, max_new_tokens),
            untouched=untouched,
            output=output,
            listener=progress.listener,
        )
    if json:
        print_json(result.report)
    else:
        evaluation_table(out, result)
    raise typer.Exit(result.exit_code)


@app.command()
def merge(
    context: typer.Context,
    adapter: Annotated[Path, typer.Option(help="An --output directory of `unlearn`.")],
    output: Annotated[Path, typer.Option(help="Directory to write the merged model to.")],
    model: Model = None,
    revision: Revision = None,
    image: OneImage = None,
    concept: Concept = None,
    concept_file: ConceptFile = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name of the concept; repeatable.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="More pictures of the concept, for the verdict.")
    ] = None,
    retain: Annotated[
        Path | None, typer.Option(help="Pictures of anything else, for the verdict.")
    ] = None,
    verify: Annotated[
        str, typer.Option(help="Where the verdict is repeated: stored, int8, nf4.")
    ] = "stored,int8,nf4",
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Merge only; no picture is needed.")
    ] = False,
    redact: Redact = False,
    device: Device = None,
    dtype: Annotated[
        str,
        typer.Option(help="Of the weights written: auto (the base's), bfloat16, float16, float32."),
    ] = "auto",
    max_shard_size: Annotated[
        float,
        typer.Option(
            min=0.001, max=1e4, callback=finite, help="GB of the largest file of weights."
        ),
    ] = 5.0,
    json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON instead of the summary.")
    ] = False,
) -> None:
    """A stand-alone model out of a base and an adapter, with the verdict repeated on it, also in 8
    and 4 bits."""
    concept = read_name(concept, concept_file)
    forms = [] if no_verify else [form.strip() for form in verify.split(",") if form.strip()]
    if not forms and not no_verify:
        raise BadInput("--verify names no form: give stored, int8 or nf4, or --no-verify.")
    if no_verify:
        said = "--no-verify asks nothing, so {} would not be read: leave one of them out."
        refuse(context, said, ("image", "images", "retain", "verify"))

    from .. import merge as merging
    from ..settings import ModelRef, Settings
    from ..show.progress import Progress
    from ..show.results import merged_summary

    with Progress(say, hidden=json) as progress:
        result = merging.merge(
            adapter,
            output,
            model=ModelRef(model, revision),
            image=image,
            concept=concept,
            aliases=tuple(alias or ()),
            images=images,
            retain=retain,
            verify=forms,
            settings=Settings(device, dtype),
            writing=merging.Writing(redact, max_shard_size, as_toml(context, redact)),
            listener=progress.listener,
        )
    if json:
        print_json(result.report)
    else:
        merged_summary(out, result)
    raise typer.Exit(1 if result.forgotten is False else 0)


@app.command()
def compare(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option(help="Directory to write; fastsiu-<random>/ when left out.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names, separated by commas; all when left out.")
    ] = None,
    suite: Annotated[
        Path | None, typer.Option(help="Directory of a suite; the embedded world when left out.")
    ] = None,
    concepts: Annotated[
        list[str] | None,
        typer.Option(
            "--concepts",
            "--concept",
            help="A concept of the suite, repeatable; - reads one line of standard input; two "
            "when left out.",
        ),
    ] = None,
    concept_file: ConceptFile = None,
    model: Model = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Trainings of each method at its best setting.")
    ] = 3,
    floor: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            callback=finite,
            help="Share of others' names and of facts that a setting must keep.",
        ),
    ] = 0.95,
    processes: Annotated[
        int,
        typer.Option(min=1, max=MOST_PROCESSES, help="Processes, each with a model of its own."),
    ] = 2,
    quick: Annotated[
        bool, typer.Option(help="One method, rate, concept and seed, few steps: does it run?")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="Print compare.json instead of the table.")
    ] = False,
) -> None:
    """SIU beside other methods, each at its best setting: what is forgotten, what is retained."""
    chosen = [str(read_name(one, None)) for one in concepts or []]
    chosen += [str(read_name(None, concept_file))] if concept_file is not None else []
    if model is not None and suite is None:
        raise BadInput(
            "--model needs --suite: the embedded suite shows what the embedded model knows."
        )

    from ..compare import front
    from ..compare import run as comparison
    from ..disk.staging import Staging, alone
    from ..output import random_directory
    from ..settings import ModelRef, Settings
    from ..show.progress import Progress

    directory = output or random_directory()
    check_new(directory, "name another --output")
    names = [name.strip() for name in methods.split(",")] if methods else []
    place, remedy = _standing(directory), "name another --output"
    with (
        alone(place, os.path.abspath(directory), directory, remedy),
        Staging(place) as folder,
        Progress(say, hidden=json) as progress,
    ):
        if suite is None:
            from ..demo.export import export

            export(folder / "demo")
            suite = folder / "demo" / "suite"
        report = comparison.compare(
            suite,
            comparison.Search(tuple(names), tuple(chosen), seeds, floor, quick=quick),
            model=ModelRef(model),
            settings=Settings(device, dtype),
            processes=processes,
            scratch=folder,
            listener=progress.listener,
        )
        notes = comparison.write(report, directory, as_toml(context))
    if json:
        print_json(report)
    else:
        front.show(out, report)
        for note in (*notes, f"Written to {directory}."):
            say.print(note, soft_wrap=True)


def _standing(path: Path) -> Path:
    """The nearest directory above `path` that is there."""
    return next(parent for parent in Path(os.path.abspath(path)).parents if parent.is_dir())
