"""The application that the verbs belong to, its streams, and how names and JSON go in and out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..guards.small_file import read_text
from ..guards.terminal import Terminal, as_json
from ..request import BadInput

# The order of the verbs in --help, that of README's table, whatever file has them. A verb that is
# not here comes last.
ORDER = (
    *("unlearn", "ask", "eval", "suite", "benchmark", "merge", "combine", "audit", "push", "app"),
    *("data", "plan", "compare", "verify", "purge", "demo"),
)


class Verbs(TyperGroup):
    def list_commands(self, context: Any) -> list[str]:
        place = {verb: number for number, verb in enumerate(ORDER)}
        return sorted(super().list_commands(context), key=lambda verb: place.get(verb, len(place)))


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
say = Terminal(stderr=True)  # progress and remarks
out = Terminal()  # results
LONGEST = 4096  # bytes of a name in a file


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an internal failure.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with the options of a verb; before or behind the verb."),
    ] = None,
) -> None:
    """Make a vision-language model forget how one concept looks: one image, one name, one GPU or
    none."""
    context.obj["debug"] = debug
    if version:
        out.print(f"fastsiu {__version__}")
        raise typer.Exit()


def print_json(value: Any, indent: int | None = 2) -> None:
    sys.stdout.write(as_json(value, encoding(), indent) + "\n")


def encoding() -> str:
    return sys.stdout.encoding or "utf-8"


def read_name(concept: str | None, file: Path | None) -> str | None:
    """The name that was given, or that a file or, for "-", standard input has on its one line."""
    if concept is not None and file is not None:
        raise BadInput("--concept and --concept-file exclude each other: choose one.")
    if file is None and concept != "-":
        return concept
    if file is not None:
        remedy = "give a file with the name on one line, or the name to --concept -"
        return _one_line(str(file), read_text(file, remedy=remedy, most=LONGEST, pipe=True))
    place, data = "Standard input", _line()
    if len(data) > LONGEST:
        raise BadInput(f"{place} holds too many lines: give the name on one line.")
    try:
        return _one_line(place, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{place} is not UTF-8 text: give the name on one line.") from error


def _one_line(place: str, text: str) -> str:
    lines = text.strip().splitlines()
    if len(lines) != 1:
        raise BadInput(f"{place} holds {len(lines)} lines: give the name on one line.")
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
