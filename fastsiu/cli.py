"""The verbs. No logic: options become a call, results become text, outcomes become exit codes.

Exit codes: 0 forgotten, 1 not forgotten, 2 bad input, 3 internal or numeric failure, 130
interrupted.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .guards.terminal import Terminal, as_json, json_safe, streams
from .request import NUMBERS, WHOLE, BadInput, NumericFailure, OutOfMemory
from .staging import OTHER_FILE, check_new, disk_full

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
say = Terminal(stderr=True)  # progress and remarks
out = Terminal()  # results


class Substitute(StrEnum):
    description = "description"
    name = "name"


class Mode(StrEnum):
    sequence = "sequence"
    joint = "joint"


class Preset(StrEnum):
    default = "default"
    paper = "paper"


def _finite(value: float | None) -> float | None:
    """Typer compares with bounds, and NaN is neither below nor above one."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


LONGEST = 4096  # bytes of a name in a file
MOST_TOKENS, MOST_PICTURES, MOST_PROCESSES, MOST_MEMORY = 65_536, 100_000, 256, 1e5  # GB

Concept = Annotated[
    str | None,
    typer.Option(help="The name, as a person writes it; - reads one line of standard input."),
]
ConceptFile = Annotated[
    Path | None,
    typer.Option(help="File with the name on its one line, so that no list of processes shows it."),
]
AsWord = Annotated[
    bool | None,
    typer.Option(
        "--as-word/--as-name",
        help="A name that is a word, too: count it everywhere, or only as a name.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(max=WHOLE["steps"][1], help="Ceiling on optimiser steps, for one request."),
]
Rate = Annotated[
    float | None, typer.Option(max=NUMBERS["lr"][1], callback=_finite, help="Learning rate.")
]
Rank = Annotated[int | None, typer.Option(max=WHOLE["rank"][1], help="LoRA rank.")]
BatchSize = Annotated[
    int | None, typer.Option(max=WHOLE["batch_size"][1], help="Samples in one step.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer.")]
Weight = lambda help: typer.Option(max=NUMBERS["alpha"][1], callback=_finite, help=help)
Model = Annotated[
    str | None,
    typer.Option(help="Hugging Face model id or directory; the embedded demo model when left out."),
]
Image = Annotated[Path, typer.Option(help="The one picture.")]
OneImage = Annotated[Path | None, typer.Option("--image", help="The one picture.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the first GPU when there is one.")
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Quantize = Annotated[
    str | None, typer.Option(help="nf4 or int8: the language model's weights in 4 or 8 bits.")
]
Attention = Annotated[
    str | None,
    typer.Option(help="sdpa, flash_attention_2 or eager; the model's own choice when left out."),
]
Memory = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=MOST_MEMORY,
        callback=_finite,
        help="The card's size in GB (24, 16, 12, 8 ...).",
    ),
]
Checkpointing = Annotated[
    bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Compute layers twice.")
]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=WHOLE["batch_size"][1],
        help="Samples in one forward; changes memory, not the result.",
    ),
]
Optimizer = Annotated[str | None, typer.Option(help="adamw, adamw8bit or paged_adamw8bit.")]
Published = Annotated[
    Preset, typer.Option("--preset", help="'paper' is the published set-up, for reproduction.")
]
Redact = Annotated[
    bool,
    typer.Option(
        "--redact", help="Leave names, questions, answers and file names out of what is written."
    ),
]
EmbedImage = Annotated[bool, typer.Option("--embed-image", help="Show the picture in report.html.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=WHOLE["seed"][1], help="Seed of everything random.")
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an internal failure.")
    ] = False,
) -> None:
    """Make a vision-language model forget how one concept looks: one image, one name, one GPU or
    none."""
    context.obj["debug"] = debug
    if version:
        out.print(f"fastsiu {__version__}")
        raise typer.Exit()


@app.command()
def unlearn(
    image: OneImage = None,
    concept: Concept = None,
    concept_file: ConceptFile = None,
    request: Annotated[
        Path | None, typer.Option(help="JSONL file with several requests, instead of one here.")
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(help="With --request: one after another (default), or all at once."),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to write; fastsiu-<random>/ when left out.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name of the concept; repeatable.")
    ] = None,
    as_word: AsWord = None,
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
    quiet: Annotated[bool, typer.Option(help="Print nothing but errors.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print report.json instead of the summary.")
    ] = False,
) -> None:
    """Make the model forget how CONCEPT looks, and write adapter, report and manifest."""
    concept = _name(concept, concept_file)
    own = dict(
        image=image,
        concept=concept,
        alias=alias,
        protect=protect,
        images=images,
        retain=retain,
        data=data,
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
    if request is None and (image is None or concept is None):
        raise BadInput(
            "There is nothing to forget: give --image and --concept, or several of them in a "
            "file with --request."
        )

    from . import driver
    from .show import Progress, several_table, summary

    if model is None and not quiet:
        say.print(driver.DEMO_NOTE)
    options = dict(
        model=model,
        revision=revision,
        output=output,
        preset=preset.value,
        device=device,
        dtype=dtype,
        substitute=substitute.value if substitute else None,
        alpha=alpha,
        beta=beta,
        steps=steps,
        lr=lr,
        rank=rank,
        lora_alpha=lora_alpha,
        batch_size=batch_size,
        renormalize=renormalize,
        seed=seed,
        memory=memory,
        quantize=quantize,
        attention=attention,
        checkpointing=checkpointing,
        micro_batch=micro_batch,
        optimizer=optimizer,
        redact=redact,
        embed_image=embed_image,
    )
    if request is not None:
        from .several import unlearn_several

        with Progress(say, hidden=quiet or json) as progress:
            several = unlearn_several(
                request, mode=(mode or Mode.sequence).value, listener=progress.listener, **options
            )
        if json:
            _print_json(several.as_dict())
        elif not quiet:
            several_table(out, several)
        raise typer.Exit(several.exit_code)
    with Progress(say, hidden=quiet or json) as progress:
        result = driver.unlearn(
            image,
            concept,
            aliases=tuple(alias or ()),
            as_word=as_word,
            protect=tuple(protect or ()),
            images=images,
            retain=retain,
            data=data,
            listener=progress.listener,
            **options,
        )
    if json:
        if result.repeated and not quiet:
            say.print(*result.notes, soft_wrap=True)
        _print_json(result.report)
    elif not quiet:
        summary(out, result)
    raise typer.Exit(0 if result.forgotten else 1)


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
    from . import driver
    from .show import Progress, answers_table

    if compare and adapter is None:
        raise BadInput("--compare needs an adapter to compare with: add --adapter DIR.")
    with Progress(say, hidden=json) as progress:
        rows = driver.interview(
            question,
            model=model,
            adapter_dir=adapter,
            image=image,
            compare=compare,
            revision=revision,
            device=device,
            dtype=dtype,
            quantize=quantize,
            attention=attention,
            max_new_tokens=max_new_tokens,
            listener=progress.listener,
        )
    if json:
        for row in rows:
            _print_json(row, indent=None)
    else:
        answers_table(out, rows)


@app.command(name="eval")
def evaluate(
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
        Path | None, typer.Option(help="untouched.json of an earlier --output; for --suite itself.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for the report; only printed when left out.")
    ] = None,
    suite: Annotated[
        Path | None,
        typer.Option(help="Directory with many concepts, instead of one here (docs/suite.md)."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="With --suite: read it, decode every picture, and stop.")
    ] = False,
    concepts: Annotated[
        list[str] | None,
        typer.Option(help="With --suite: only this one (slug or name); repeatable."),
    ] = None,
    unlearn: Annotated[
        bool,
        typer.Option("--unlearn", help="With --suite: unlearn each from its training picture."),
    ] = False,
    adapters: Annotated[
        Path | None, typer.Option(help="With --suite: directory with the adapter of each in SLUG.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_PICTURES, help="With --suite: at most so many pictures of each sort."
        ),
    ] = None,
    per_other: Annotated[
        int | None,
        typer.Option(
            min=0, max=MOST_PICTURES, help="With --suite: pictures of each other concept (2)."
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_PROCESSES, help="With --suite: concepts at once, a model each (1)."
        ),
    ] = None,
    preset: Published = Preset.default,
    steps: Steps = None,
    lr: Rate = None,
    rank: Rank = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    memory: Memory = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    attention: Attention = None,
    max_new_tokens: MaxNewTokens = 64,
    redact: Redact = False,
    embed_image: EmbedImage = False,
    judge: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible server that grades answers (G-Eval)."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="With --judge: its model.")] = None,
    judge_key: Annotated[
        Path | None, typer.Option(help="With --judge: file with the API key.")
    ] = None,
    judge_plain_http: Annotated[
        bool, typer.Option("--judge-plain-http", help="With --judge: http:// to elsewhere.")
    ] = False,
    allow_network: Annotated[
        bool, typer.Option("--allow-network", help="With --judge: what is told may be sent.")
    ] = False,
    attacks: Annotated[
        str | None, typer.Option(help="Try it: prompt,image,rank,probe,mia,relearn,weights or all.")
    ] = None,
    lmms_eval: Annotated[
        Path | None, typer.Option(help="With --base: directory for the public benchmarks' script.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print report.json instead of the table.")
    ] = False,
) -> None:
    """Measure what a model knows of CONCEPT, and what it has lost of all else. Exit code 1 when it
    is not forgotten."""
    concept = _name(concept, concept_file)
    one = dict(
        concept=concept,
        base=base,
        alias=alias,
        image=image,
        images=images,
        others=others,
        lookalikes=lookalikes,
        groups=groups,
        control=control,
        questions=questions,
        redact=redact or None,
        embed_image=embed_image or None,
        judge=judge,
        attacks=attacks,
        lmms_eval=lmms_eval,
        as_word=as_word,
    )
    many = dict(
        check=check,
        concepts=concepts,
        unlearn=unlearn,
        adapters=adapters,
        limit=limit,
        per_other=per_other,
        processes=processes,
        preset=preset is Preset.paper,
        steps=steps,
        lr=lr,
        rank=rank,
        batch_size=batch_size,
        seed=seed,
        memory=memory,
    )
    if suite is not None and (given := [name for name, value in one.items() if value is not None]):
        raise BadInput(
            f"--{given[0].replace('_', '-')} is about one concept, and --suite about many: leave "
            "one of them out."
        )
    if suite is None and (
        given := [name for name, value in many.items() if value is not None and value is not False]
    ):
        raise BadInput(
            f"--{given[0].replace('_', '-')} is about many concepts: give them with --suite DIR, "
            "or leave it out."
        )
    if suite is None and concept is None:
        raise BadInput(
            "There is nothing to measure: give --concept, or many concepts with --suite DIR."
        )
    if suite is not None and check:
        from .evaluate import suite as suites

        say.print(suites.told(suites.read(suite)), soft_wrap=True)
        return

    from .show import Progress, evaluation_table, suite_table

    if suite is not None:
        from .evaluate.suite_run import evaluate_suite

        with Progress(say, hidden=json) as progress:
            evaluated = evaluate_suite(
                suite,
                output=output,
                model=model,
                revision=revision,
                concepts=tuple(concepts or ()),
                unlearn=unlearn,
                adapters=adapters,
                adapter_dir=adapter,
                limit=limit,
                per_other=2 if per_other is None else per_other,
                processes=processes or 1,
                untouched=untouched,
                max_new_tokens=max_new_tokens,
                preset=preset.value,
                steps=steps,
                lr=lr,
                rank=rank,
                batch_size=batch_size,
                seed=seed,
                memory=memory,
                device=device,
                dtype=dtype,
                quantize=quantize,
                attention=attention,
                listener=progress.listener,
            )
        if json:
            _print_json(evaluated.report)
        else:
            suite_table(out, evaluated)
        raise typer.Exit(evaluated.exit_code)

    from .evaluate import run as evaluation
    from .evaluate.g_eval import Options

    if (judge is None) != (judge_model is None):
        raise BadInput(
            "A judge is a server and one of its models: give --judge URL and --judge-model NAME, "
            "or neither."
        )
    judged_by = judge and Options(
        judge, str(judge_model), judge_key, allow_network, judge_plain_http
    )
    with Progress(say, hidden=json) as progress:
        result = evaluation.evaluate(
            concept,
            model=model,
            adapter_dir=adapter,
            base=base,
            aliases=tuple(alias or ()),
            as_word=as_word,
            image=image,
            images=images,
            others=others,
            lookalikes=lookalikes,
            groups=groups,
            control=control,
            questions=questions,
            untouched=untouched,
            output=output,
            revision=revision,
            device=device,
            dtype=dtype,
            quantize=quantize,
            attention=attention,
            max_new_tokens=max_new_tokens,
            redact=redact,
            embed_image=embed_image,
            judged_by=judged_by or None,
            lmms_eval=lmms_eval,
            attacks=attacks,
            listener=progress.listener,
        )
    if json:
        _print_json(result.report)
    else:
        evaluation_table(out, result)
    raise typer.Exit(result.exit_code)


@app.command()
def merge(
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
    json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON instead of the summary.")
    ] = False,
) -> None:
    """A stand-alone model out of a base and an adapter, with the verdict repeated on it, also in 8
    and 4 bits."""
    from .merge import merge as make
    from .show import Progress, merged_summary

    concept = _name(concept, concept_file)
    forms = [] if no_verify else [form.strip() for form in verify.split(",") if form.strip()]
    if not forms and not no_verify:
        raise BadInput("--verify names no form: give stored, int8 or nf4, or --no-verify.")
    with Progress(say, hidden=json) as progress:
        result = make(
            adapter,
            output,
            model=model,
            revision=revision,
            image=image,
            concept=concept,
            aliases=tuple(alias or ()),
            images=images,
            retain=retain,
            dtype=dtype,
            verify=forms,
            redact=redact,
            device=device,
            listener=progress.listener,
        )
    if json:
        _print_json(result.report)
    else:
        merged_summary(out, result)
    raise typer.Exit(1 if result.forgotten is False else 0)


@app.command()
def compare(
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
            callback=_finite,
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
    chosen = [str(_name(one, None)) for one in concepts or []]
    chosen += [str(_name(None, concept_file))] if concept_file is not None else []
    if model is not None and suite is None:
        raise BadInput(
            "--model needs --suite: the embedded suite shows what the embedded model knows."
        )

    from .compare import front
    from .compare import run as comparison
    from .output import random_directory
    from .show import Progress
    from .staging import Staging

    directory = output or random_directory()
    check_new(directory, "name another --output")
    names = [name.strip() for name in methods.split(",")] if methods else []
    with Staging(_standing(directory)) as folder, Progress(say, hidden=json) as progress:
        if suite is None:
            from .demo.export import export

            export(folder / "demo")
            suite = folder / "demo" / "suite"
        report = comparison.compare(
            suite,
            model,
            names=names,
            concepts=chosen,
            seeds=seeds,
            floor=floor,
            processes=processes,
            quick=quick,
            device=device,
            dtype=dtype,
            scratch=folder,
            listener=progress.listener,
        )
    notes = comparison.write(report, directory)
    if json:
        _print_json(report)
    else:
        front.show(out, report)
        for note in (*notes, f"Written to {directory}."):
            say.print(note, soft_wrap=True)


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
    concept = _name(concept, concept_file)
    if concept is None:
        raise BadInput("There is no name: give --concept or --concept-file.")
    if output is not None and not output.parent.is_dir():
        raise BadInput(
            f"There is no directory {output.parent} to write to: create it or {OTHER_FILE}."
        )
    if output is not None:
        check_new(output, OTHER_FILE)

    from . import driver
    from .samples import corpus
    from .show import Progress, explanation
    from .staging import new_file

    with Progress(say, hidden=False) as progress:
        one = driver.prepared_for(
            image,
            concept,
            model=model,
            revision=revision,
            aliases=tuple(alias or ()),
            as_word=as_word,
            protect=tuple(protect or ()),
            retain=retain,
            data=data,
            preset=preset.value,
            device=device,
            dtype=dtype,
            memory=memory,
            quantize=quantize,
            attention=attention,
            substitute=substitute.value if substitute else None,
            seed=seed,
            listener=progress.listener,
        )
    every = [*one.corpus.samples, *(one.lessons.samples if one.lessons else ())]
    if explain:
        explanation(out, one.scene, one.corpus, one.lessons)
    elif output is not None:
        new_file(output, json_safe(corpus.as_jsonl(every)).encode("utf-8"))
        say.print(f"{len(every)} samples written to {output}.")
    else:
        sys.stdout.write(json_safe(corpus.as_jsonl(every), _encoding()))


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
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON, sizes in bytes, instead of the table.")
    ] = False,
) -> None:
    """Does it fit? From the model's configuration alone: no weight is read or fetched. Exit code 1
    when it does not."""
    from . import driver
    from .show import plan_table

    found = driver.plan_for(
        model,
        memory,
        revision=revision,
        dtype=dtype,
        quantize=quantize,
        attention=attention,
        checkpointing=checkpointing,
        micro_batch=micro_batch,
        optimizer=optimizer,
        image=image,
        image_tokens=image_tokens,
        device=device,
        rank=rank,
        batch_size=batch_size,
    )
    if json:
        _print_json(found.as_dict())
    else:
        plan_table(out, found)
    raise typer.Exit(0 if found.chosen is not None else 1)


@app.command()
def demo(
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
    if export is not None:
        from .demo.export import export as write

        write(export, per_concept, seed)
        say.print(f"Model, pictures and questions written to {export}.")
        return
    from .demo.story import tell

    raise typer.Exit(0 if tell(out, say, seed, output) else 1)


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
    from .upkeep import verify as check

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
    from . import upkeep
    from .staging import sweep_one

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
    for path in found.alive:
        out.print(f"Kept {path}: its run is at work.", soft_wrap=True)
    for path in found.results if everything else []:
        kept = upkeep.remove(path)
        out.print(f"Removed the result {path}.", soft_wrap=True)
        for other in kept:
            out.print(f"  Kept {other}, which FastSIU has not written.", soft_wrap=True)
    if not removed and not (everything and found.results):
        out.print(f"Nothing to remove in {directory}.", soft_wrap=True)


def main() -> None:
    """Entry point: turns exceptions into one sentence and an exit code."""
    # of libraries to their developers, not to whoever runs this command
    warnings.simplefilter("ignore", FutureWarning)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The command line as a function: returns the exit code, which says how the work ended,
    whatever becomes of the streams."""
    with streams() as (stdout, stderr):
        code = _run(arguments)
        stdout.flush()
        if stdout.problem is not None:
            say.print(
                f"fastsiu: Standard output could not be written ({stdout.problem}); "
                f"the exit code {code} tells how the work ended.",
                soft_wrap=True,
            )
    stdout.give_up()
    stderr.give_up()
    return code


def _run(arguments: list[str]) -> int:
    # says on every CPU that it has a faster kernel elsewhere
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    state = {"debug": False}
    try:
        result: Any = app(arguments, standalone_mode=False, prog_name="fastsiu", obj=state)
        if result == 130:  # what Typer makes of an interrupt
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except BadInput as error:
        say.print(f"fastsiu: {error}", soft_wrap=True)
        return 2
    except (NumericFailure, OutOfMemory) as error:
        say.print(f"fastsiu: {error}", soft_wrap=True)
        return 3
    except (KeyboardInterrupt, typer.Abort):
        say.print("fastsiu: interrupted; what was not finished was not written.")
        return 130
    except SystemExit as error:  # what Typer makes of a broken pipe, of a process of ours as well
        return _failed(error.__context__ or error, state["debug"])
    except Exception as error:
        # torch's, where no retry could help; torch may not be imported yet
        if type(error).__name__ == "OutOfMemoryError":
            first = (str(error).splitlines() or ["The memory is full."])[0]
            say.print(
                f"fastsiu: {first} `fastsiu plan --memory N` tells which settings fit.",
                soft_wrap=True,
            )
            return 3
        if hasattr(error, "format_message"):  # a usage error of the command line itself
            said = error.format_message().rstrip(".")
            say.print(f"fastsiu: {said}. Try 'fastsiu --help'.", soft_wrap=True)
            return 2
        if disk_full(error):
            said = (
                "fastsiu: The disk is full, and what was not finished was not written: free "
                "some, or write elsewhere."
            )
            say.print(said, soft_wrap=True)
            return 2
        return _failed(error, state["debug"])


def _failed(error: BaseException, debug: bool) -> int:
    """What may be shown to everybody of a failure of our own: a traceback's values and messages may
    hold the name."""
    kind = type(error).__name__
    if debug:
        say.print("".join(traceback.format_exception(error)), soft_wrap=True)
        say.print(
            f"fastsiu: internal failure ({kind}): please report the lines above, without what is "
            "private.",
            soft_wrap=True,
        )
        return 3
    where = ""
    try:
        handle, path = tempfile.mkstemp(prefix="fastsiu-failure-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in _places(error))
        where = f"its functions and lines, with no value, are in {path}; "
    except OSError:
        where = "its functions and lines could not be written; "
    say.print(
        f"fastsiu: internal failure ({kind}): {where}`fastsiu --debug` before the verb shows the "
        "whole traceback.",
        soft_wrap=True,
    )
    return 3


def _places(error: BaseException | None) -> Iterator[str]:
    """Types of exceptions, modules, lines and functions: no path, no message, no value."""
    yield f"fastsiu {__version__}, Python {sys.version_info.major}.{sys.version_info.minor}"
    while error is not None:
        yield type(error).__name__
        for frame, line in traceback.walk_tb(error.__traceback__):
            yield f"  {frame.f_globals.get('__name__', '?')}:{line} {frame.f_code.co_name}"
        error = error.__cause__ or error.__context__


def _print_json(value: Any, indent: int | None = 2) -> None:
    sys.stdout.write(as_json(value, _encoding(), indent) + "\n")


def _encoding() -> str:
    return sys.stdout.encoding or "utf-8"


def _standing(path: Path) -> Path:
    """The nearest directory above `path` that is there."""
    return next(parent for parent in Path(os.path.abspath(path)).parents if parent.is_dir())


def _name(concept: str | None, file: Path | None) -> str | None:
    """The name that was given, or that a file or, for "-", standard input has on its one line."""
    if concept is not None and file is not None:
        raise BadInput("--concept and --concept-file exclude each other: choose one.")
    if file is None and concept != "-":
        return concept
    place = "Standard input" if file is None else str(file)
    try:
        if file is None:
            data = _line()
        else:
            with file.open("rb") as stream:
                data = stream.read(LONGEST + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise BadInput(
            f"{place} cannot be read ({error.strerror}): give a file with the name on one line."
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{place} is not UTF-8 text: give the name on one line.") from error
    lines = text.strip().splitlines()
    if len(lines) != 1 or len(data) > LONGEST:
        raise BadInput(
            f"{place} holds {len(lines) if len(data) <= LONGEST else 'too many'} lines: give the "
            "name on one line."
        )
    return lines[0].strip()


def _line() -> bytes:
    """Standard input: one line where somebody types it, else all of it."""
    if sys.stdin is None:
        raise BadInput("Standard input is closed: give the name with --concept-file.")
    if sys.stdin.isatty():
        say.print("Name:", end=" ")
        return sys.stdin.readline().encode("utf-8", "surrogateescape")
    buffer = getattr(sys.stdin, "buffer", None)
    return (
        buffer.read(LONGEST + 1)
        if buffer is not None
        else sys.stdin.read(LONGEST + 1).encode("utf-8", "surrogateescape")
    )
