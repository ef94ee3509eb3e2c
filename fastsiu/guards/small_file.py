"""Small files from outside, read whole: within a bound of bytes, and not waited for without end.

A device never ends, and whoever opens a pipe waits until somebody writes into it.
"""

from __future__ import annotations

import os
import select
import stat
import time
from pathlib import Path
from typing import BinaryIO

from ..request import BadInput

MOST_BYTES = 64 * 2**20
SECONDS = 60.0  # of a pipe that somebody writes into: a person may have to type a passphrase
_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"):  # no system has all of them
    _FLAGS |= getattr(os, _name, 0)


class NotOrdinary(ValueError):
    """A directory, a pipe or a device, and the reason says which."""


class TooLarge(ValueError):
    """More bytes than the bound. The message is the bound, in words."""


def read_text(path: Path, *, remedy: str, most: int = MOST_BYTES, pipe: bool = False) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    remedy: ends the sentences
    pipe:   takes a pipe as well, as from a shell's `<(...)`: for what is read only once

    Raises BadInput for anything that `read_bytes` does not return, and for bytes that are no text.
    """
    try:
        return read_bytes(path, most, pipe=pipe).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {remedy}.") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(f"There is no file {path}: {remedy}.") from error
    except TooLarge as error:
        raise BadInput(f"{path} is larger than {error}: give a smaller file.") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({reason(error)}): {remedy}.") from error


def read_bytes(path: Path, most: int = MOST_BYTES, *, pipe: bool = False) -> bytes:
    """At most so many bytes of a file.

    pipe: takes a pipe as well, for at most `SECONDS`, where somebody writes into it

    Raises OSError, TooLarge, NotOrdinary, and ValueError for a path that no file can have.
    """
    with open_ordinary(path, pipe=pipe) as file:
        status = os.fstat(file.fileno())
        if stat.S_ISFIFO(status.st_mode):
            data = _from_pipe(file.fileno(), most)
        else:  # the size is asked first, to read nothing of a large file
            data = b"" if status.st_size > most else file.read(most + 1)
        if max(len(data), status.st_size) > most:
            raise TooLarge(f"{most // 2**20} MiB" if most >= 2**20 else f"{most} bytes")
    return data


def open_ordinary(path: Path, *, pipe: bool = False) -> BinaryIO:
    """An ordinary file, open for reading. One descriptor is checked and read, so that no other file
    can come between.

    pipe: takes a pipe as well, which is not waited for

    Raises OSError, NotOrdinary, and ValueError for a path that no file can have.
    """
    handle = os.open(path, _FLAGS)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise NotOrdinary("it is a directory")
        if stat.S_ISFIFO(mode) and not pipe:
            raise NotOrdinary("it is a pipe, not an ordinary file")
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise NotOrdinary("it is a device, not an ordinary file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def reason(error: Exception) -> str:
    """Why a file could not be read, for the brackets of a sentence."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "there is no such file"
    if isinstance(error, TooLarge):
        return f"it is larger than {error}"
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def _from_pipe(handle: int, most: int) -> bytes:
    """What comes out of a pipe that does not block, up to its end or one byte more than `most`."""
    ends, data = time.monotonic() + SECONDS, bytearray()
    while len(data) <= most:
        left = ends - time.monotonic()
        if left < 0:
            raise NotOrdinary(f"it is a pipe, and its end did not come within {SECONDS:g} s")
        try:
            piece = os.read(handle, min(2**16, most + 1 - len(data)))
        except BlockingIOError:  # somebody holds its other end, and has not written yet
            select.select([handle], [], [], left)
            continue
        if not piece:
            break
        data += piece
    if not data:
        raise NotOrdinary("it is a pipe, and nobody writes into it")
    return bytes(data)
