"""Runs as files: `--config FILE` fills the options of a verb, and `as_toml` writes the file that
repeats a run.

A file is TOML; its keys are the verb's options without their dashes, and its arguments by their
names in --help. What the command line gives counts before the file's. Paths are seen from where the
command is started, as on the command line.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Any

import typer

from ..guards.small_file import read_text
from ..request import BadInput
from ..text.toml import string as _string

OPTION = "--config"
VERB = "verb"  # may stand in a file, to say which verb it is for
MOST_BYTES = 2**20
# What no file repeats: it is about this run alone, or a secret's place.
NOT_REPEATED = frozenset({"output", "json", "quiet", "judge_key", "url_key", "context"})
# Options of text that take a directory as well. A text of any other option stays as it is, though a
# directory may be called as it is.
PLACES = frozenset({"model", "base"})
NAMES = frozenset({"concept", "concepts"})  # where - is one line of standard input
AT_A_SERVER = ("model", "untouched")  # with --url: a server's names of models, and no path of ours
# What a redacted output may tell. Everything else could name somebody: pictures, names, paths.
HARMLESS = frozenset(
    """revision device dtype quantize attention checkpointing micro_batch optimizer memory preset
    mode substitute adapt kind alpha beta steps lr rank lora_alpha batch_size renormalize seed
    weight redact max_new_tokens attacks limit per_other processes no_verify verify
    unlearn share timeout within at_once""".split()
)


def no_empty(arguments: Sequence[str]) -> None:
    """Raises BadInput for an argument without text: an unset variable of the shell gives one, and
    an empty path would be the current directory."""
    before = ""
    for argument in arguments:
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            option = argument[:-1] or (before if before.startswith("-") else "an argument")
            raise BadInput(
                f"{option} is empty: give it a value, or leave it out (is a variable of the shell "
                "not set?)."
            )
        before = argument


def split(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The command line without `--config FILE`, and the file. Raises BadInput where it is given
    twice or without a file."""
    rest: list[str] = []
    files: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument == "--":
            rest += [argument, *left]
        elif argument == OPTION:
            if (file := next(left, None)) is None:
                raise BadInput(f"{OPTION} needs a file: write it behind.")
            files.append(file)
        elif argument.startswith(f"{OPTION}="):
            files.append(argument.removeprefix(f"{OPTION}="))
        else:
            rest.append(argument)
    if len(files) > 1:
        raise BadInput(f"{OPTION} is given {len(files)} times: give one file.")
    return rest, Path(files[0]) if files else None


def defaults(group: Any, arguments: Sequence[str], file: Path) -> tuple[list[str], dict[str, Any]]:
    """Returns the command line with its verb, and the verb's options from the file.

    Where the command line has no verb, the file names it. The options replace the verb's defaults,
    so options of the command line win over them.

    group: the application as Click sees it

    Raises BadInput with the file and the key.
    """
    values = _read(file)
    named = values.pop(VERB, None)
    if named is not None and named not in group.commands:
        raise BadInput(f"{file}: there is no verb {named!r}: {_near(str(named), group.commands)}")
    # Only flags may stand before the verb: what stands later is somebody's value, such as a name.
    flags = {name for parameter in group.params for name in parameter.opts}
    before = list(takewhile(flags.__contains__, arguments))
    rest = list(arguments[len(before) :])
    given = rest[0] if rest and rest[0] in group.commands else None
    verb = given or named
    if verb is None:
        raise BadInput(
            f'There is no verb: write it on the command line, or {VERB} = "..." in {file}.'
        )
    if named is not None and named != verb:
        raise BadInput(f"{file} is for `fastsiu {named}`, not for `fastsiu {verb}`.")
    known = {_key(parameter): parameter for parameter in group.commands[verb].params}
    filled = {}
    for key, value in values.items():
        parameter = known.get(key.replace("_", "-"))
        if parameter is None or key == "help":
            raise BadInput(
                f"{file}: {key!r} is no option of `fastsiu {verb}`: "
                f"{_near(key.replace('_', '-'), known)}"
            )
        if parameter.name in filled:
            raise BadInput(
                f"{file} has {key.replace('_', '-')!r} in two spellings, with - and with _: keep "
                "one."
            )
        filled[parameter.name] = _value(file, key, value, parameter)
    return ([*before, *rest] if given else [*before, verb, *rest]), {verb: filled}


def _read(file: Path) -> dict[str, Any]:
    text = read_text(file, remedy="give a TOML file with options", most=MOST_BYTES, pipe=True)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise BadInput(f"{file} is no TOML (it is nested too deep): correct it.") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{file} is no TOML ({str(error).rstrip('.')}): correct it.") from error


def _key(parameter: Any) -> str:
    """An option's long name without dashes; an argument's name."""
    long = [name for name in parameter.opts if name.startswith("--")]
    return long[0].removeprefix("--") if long else str(parameter.name).replace("_", "-")


def _near(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, [*known], n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "`--help` lists what there is."


def _value(file: Path, key: str, value: Any, parameter: Any) -> Any:
    """As Click takes it; a list for what may be given several times. Raises BadInput."""
    several = bool(getattr(parameter, "multiple", False)) or parameter.nargs == -1
    flag = bool(getattr(parameter, "is_flag", False))
    values = value if isinstance(value, list) and several else [value]
    for one in values:
        if flag != isinstance(one, bool) or not isinstance(one, str | int | float):
            wanted = "true or false" if flag else "a text or a number"
            wanted += ", or a list of them" if several else ""
            raise BadInput(f"{file}: {key!r} must be {wanted}: correct it.")
        if one == "":
            raise BadInput(f"{file}: {key!r} is empty: give it a value, or leave it out.")
    return [str(one) for one in values] if several else value if flag else str(value)


def as_toml(context: typer.Context, redact: bool = False) -> str:
    """The file that repeats the verb that runs: what was given, from wherever, with absolute paths.

    redact: only what names nobody; what is left out is said by the option's name
    """
    lines = [f'{VERB} = "{context.info_name}"']
    left_out: dict[str, list[str]] = {}
    for parameter in context.command.params:
        name = str(parameter.name)
        value = context.params.get(name)
        source = context.get_parameter_source(name)
        given = source is not None and source.name not in ("DEFAULT", "PROMPT")
        if name in NOT_REPEATED or not given or value in (None, [], ()):
            continue
        served = name in AT_A_SERVER and context.params.get("url") is not None
        hub = name == "model" and not served and not os.path.exists(str(value))
        hidden = redact and name not in HARMLESS and not hub
        why = "the output is redacted" if hidden else _not_repeatable(name, value)
        if why:
            left_out.setdefault(why, []).append(_key(parameter))
            continue
        lines.append(f"{_key(parameter)} = {_literal(value if served else _absolute(name, value))}")
    remarks = [f"# Left out, since {why}: {', '.join(keys)}." for why, keys in left_out.items()]
    return "\n".join([*remarks, *lines]) + "\n"


def _not_repeatable(name: str, value: Any) -> str | None:
    """Why a file cannot give an option the same value again; None where it can."""
    values = value if isinstance(value, list | tuple) else [value]
    if name in NAMES and "-" in values:
        return "it came from standard input"
    if any(isinstance(one, Path) and _is_pipe(one) for one in values):
        return "it came from a pipe"
    written = "".join(str(_absolute(name, one)) for one in values)
    if any("\ud800" <= character <= "\udfff" for character in written):
        return "it is no UTF-8, which TOML needs"
    return None


def _is_pipe(path: Path) -> bool:
    try:
        return path.is_fifo()
    except OSError:  # whoever reads it says so
        return False


def _absolute(name: str, value: Any) -> Any:
    """A value with absolute paths. name: the option's"""
    if isinstance(value, list | tuple):
        return [_absolute(name, one) for one in value]
    place = isinstance(value, Path) or (name in PLACES and os.path.isdir(value))
    return os.path.abspath(value) if place else value


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, Enum):
        return _literal(value.value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return _string(str(value))
