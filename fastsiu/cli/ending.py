"""How a command ends: exceptions become one sentence and an exit code.

Exit codes: 0 forgotten, 1 not forgotten, 2 bad input, 3 internal or numeric failure, 130
interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import traceback
import warnings
from typing import Any

import typer

from ..disk.staging import disk_failure, disk_full
from ..guards.failure import places
from ..guards.terminal import streams
from ..request import BadInput, NumericFailure, OutOfMemory
from . import (  # noqa: F401  with their verbs
    beforehand,
    benchmarks,
    browser,
    config,
    deployed,
    evidence,
    suites,
    unlearning,
    upkeep,
)
from .app import app, say


def main() -> None:
    """Entry point: turns exceptions into one sentence and an exit code."""
    # of libraries to their developers, not to whoever runs this command
    warnings.simplefilter("ignore", FutureWarning)
    _fill_gaps()
    try:
        code = run(sys.argv[1:])
    except Exception as error:  # in a failure's own report, as where the memory is full
        code = 3  # Python itself would end with 1, and that is a verdict
        with contextlib.suppress(OSError):
            os.write(2, f"fastsiu: internal failure ({type(error).__name__}).\n".encode())
    sys.exit(code)


def _fill_gaps() -> None:
    """Opens the null device under the number of each standard stream that is closed. Else the next
    file that is opened has that number, and gets what a library writes to its standard error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


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
        config.no_empty(arguments)
        _check_place()
        arguments, file = config.split(arguments)
        filled: dict[str, Any] = {}
        if file is not None:
            arguments, filled = config.defaults(typer.main.get_command(app), arguments, file)
        result: Any = app(
            arguments,
            standalone_mode=False,
            prog_name="fastsiu",
            obj=state,
            default_map=filled,
        )
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
    except SystemExit as error:
        if error.code in (0, None):  # completion ends so
            return 0
        # what Typer makes of a broken pipe, of a process of ours as well
        return _failed(error.__context__ or error, state["debug"])
    except Exception as error:
        # torch's, where no retry could help; torch may not be imported yet
        if type(error).__name__ == "OutOfMemoryError" or _memory_is_full(error):
            lines = [] if _memory_is_full(error) else str(error).splitlines()
            first = (lines or ["The memory is full."])[0]
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
        # a file of somebody's, in a directory without permission for instance
        if isinstance(error, OSError) and isinstance(error.filename, str | bytes):
            if state["debug"]:
                say.print("".join(traceback.format_exception(error)), soft_wrap=True)
            say.print(
                f"fastsiu: {os.fsdecode(error.filename)!r} cannot be used ({error.strerror}): "
                "check the path and its permissions.",
                soft_wrap=True,
            )
            return 2
        if failure := disk_failure(error):
            said = (
                f"fastsiu: The disk cannot be used ({failure}), and what was not finished was not "
                "written: write elsewhere."
            )
            say.print(said, soft_wrap=True)
            return 2
        return _failed(error, state["debug"])


def _memory_is_full(error: Exception) -> bool:
    """Whether it was this machine's memory, and not a GPU's."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _check_place() -> None:
    """Raises BadInput in a directory that somebody has removed: no relative path leads anywhere."""
    try:
        os.getcwd()
    except OSError as error:
        raise BadInput(
            f"The current directory cannot be used ({error.strerror}): change to another one."
        ) from error


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
            file.writelines(f"{line}\n" for line in places(error))
        where = f"its functions and lines, with no value, are in {path}; "
    except OSError:
        where = "its functions and lines could not be written; "
    say.print(
        f"fastsiu: internal failure ({kind}): {where}`fastsiu --debug` before the verb shows the "
        "whole traceback.",
        soft_wrap=True,
    )
    return 3
