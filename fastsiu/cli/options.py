"""The options that several verbs have, each with its bounds and its line of help."""

from __future__ import annotations

import math
from collections.abc import Container
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..request import KINDS, NUMBERS, WHOLE, BadInput

if TYPE_CHECKING:
    from ..evaluate.grading import Grader


class Substitute(StrEnum):
    description = "description"
    name = "name"


class Part(StrEnum):
    language = "language"
    vision = "vision"
    projector = "projector"


class Mode(StrEnum):
    sequence = "sequence"
    joint = "joint"
    independent = "independent"


class Preset(StrEnum):
    default = "default"
    paper = "paper"


def finite(value: float | None) -> float | None:
    """Typer compares with bounds, and NaN is neither below nor above one."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


def refuse(context: typer.Context, sentence: str, unread: Container[str]) -> None:
    """Raises BadInput where an option was given that would not be read.

    sentence: with {} for the option
    unread:   names of parameters
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        given = source is not None and source.name not in ("DEFAULT", "PROMPT")
        if given and parameter.name in unread:
            raise BadInput(sentence.format(parameter.opts[0]))


def grader_of(
    judge: str | None, model: str | None, key: Path | None, plain_http: bool, allow: bool
) -> Grader | None:
    """Who grades answers, by the options of that; None where nobody does. Raises BadInput for half
    of a judge."""
    if (judge is None) != (model is None):
        raise BadInput(
            "A judge is a server and one of its models: give --judge URL and --judge-model NAME, "
            "or neither."
        )
    if judge is None:
        return None
    from ..evaluate.grading import Grader

    return Grader(judge, str(model), key, allow, plain_http)


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
Kind = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}; the model is asked when left out."),
]
KindMeasured = Annotated[
    str | None,
    typer.Option(
        "--kind",
        help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}; the adapter's when left out, else person.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(max=WHOLE["steps"][1], help="Ceiling on optimiser steps, for one request."),
]
Rate = Annotated[
    float | None, typer.Option(max=NUMBERS["lr"][1], callback=finite, help="Learning rate.")
]
Adapt = Annotated[
    Part | None,
    typer.Option(
        help="What is trained: the language model, all in front of it, or the projector alone."
    ),
]
Rank = Annotated[int | None, typer.Option(max=WHOLE["rank"][1], help="LoRA rank.")]
BatchSize = Annotated[
    int | None, typer.Option(max=WHOLE["batch_size"][1], help="Samples in one step.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer.")]
Weight = lambda help: typer.Option(max=NUMBERS["alpha"][1], callback=finite, help=help)
Model = Annotated[
    str | None,
    typer.Option(help="Hugging Face model id or directory; the embedded demo model when left out."),
]
Image = Annotated[Path, typer.Option(help="The one picture.")]
OneImage = Annotated[Path | None, typer.Option("--image", help="The one picture.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 ..., auto (over all GPUs); the first GPU if left out."),
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
        callback=finite,
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
Join = Annotated[
    bool,
    typer.Option("--join", help="Share --output with every other process that has --join."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="How long what is left takes, from what is done in --output."),
]
Judge = Annotated[
    str | None,
    typer.Option("--judge", help="URL of an OpenAI-compatible server that grades answers."),
]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="With --judge: its model.")]
JudgeKey = Annotated[
    Path | None, typer.Option("--judge-key", help="With --judge: file with the API key.")
]
JudgePlainHttp = Annotated[
    bool, typer.Option("--judge-plain-http", help="With --judge: http:// to elsewhere.")
]
AllowNetwork = Annotated[
    bool, typer.Option("--allow-network", help="With --judge: what is told may be sent.")
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=WHOLE["seed"][1], help="Seed of everything random.")
]
Log = Annotated[
    str | None,
    typer.Option(help="Curves of the training, on this machine: trackio, wandb or tensorboard."),
]
