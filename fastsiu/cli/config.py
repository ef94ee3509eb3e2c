"""Runs as files: `--config FILE` fills the options of a verb, and `as_toml` writes the file that
repeats a run.

A file is TOML; its keys are the verb's options without their dashes, and its arguments by their
names in --help. What the command line gives counts before the file's. Paths are seen from where the
command is started, as on the command line.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Any

import typer

from ..request import BadInput
from ..text.toml import string as _string

OPTION = "--config"
VERB = "verb"  # may stand in a file, to say which verb it is for
MOST_BYTES = 2**20
# What no file repeats: it is about this run alone, or a secret's place.
NOT_REPEATED = frozenset({"output", "json", "quiet", "judge_key", "url_key", "context"})
AT_A_SERVER = ("model", "untouched")  # with --url: a server's names of models, and no path of ours
# What a redacted output may tell. Everything else could name somebody: pictures, names, paths.
HARMLESS = frozenset(
    """revision device dtype quantize attention checkpointing micro_batch optimizer memory preset
    mode substitute adapt kind alpha beta steps lr rank lora_alpha batch_size renormalize seed
    weight redact max_new_tokens attacks limit per_other processes no_verify verify
    unlearn share timeout within at_once""".split()
)


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
        filled[parameter.name] = _value(file, key, value, parameter)
    return ([*before, *rest] if given else [*before, verb, *rest]), {verb: filled}


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.is_file() and file.stat().st_size > MOST_BYTES:
            raise BadInput(f"{file} is larger than {MOST_BYTES // 2**20} MiB: write less.")
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise BadInput(
            f"The file {file} cannot be read ({error.strerror}): give a TOML file with options."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
    return [str(one) for one in values] if several else value if flag else str(value)


def as_toml(context: typer.Context, redact: bool = False) -> str:
    """The file that repeats the verb that runs: what was given, from wherever, with absolute paths.

    redact: only what names nobody; what is left out is said by the option's name
    """
    lines = [f'{VERB} = "{context.info_name}"']
    left_out = []
    for parameter in context.command.params:
        name = str(parameter.name)
        value = context.params.get(name)
        source = context.get_parameter_source(name)
        given = source is not None and source.name not in ("DEFAULT", "PROMPT")
        if name in NOT_REPEATED or not given or value in (None, [], ()):
            continue
        served = name in AT_A_SERVER and context.params.get("url") is not None
        hub = name == "model" and not served and not os.path.exists(str(value))
        if (redact and name not in HARMLESS and not hub) or value == "-":
            left_out.append(_key(parameter))
            continue
        lines.append(f"{_key(parameter)} = {_literal(value if served else _absolute(value))}")
    if left_out:
        why = "since the output is redacted" if redact else "since it came from standard input"
        lines.insert(0, f"# Left out, {why}: {', '.join(left_out)}.")
    return "\n".join(lines) + "\n"


def _absolute(value: Any) -> Any:
    if isinstance(value, Path):
        return os.path.abspath(value)
    if isinstance(value, list | tuple):
        return [_absolute(one) for one in value]
    # a model or a base by its directory
    return os.path.abspath(value) if isinstance(value, str) and os.path.isdir(value) else value


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
