"""What reaches the terminal: text without control characters, on streams that cannot change how a
command ends.

Names, questions, answers and file names come from users and models, and a terminal obeys control
characters in them: an ESC moves the cursor, colours, sets titles; a bidi override shows text in
another order. So the terminal gets the escape of every control character. A closed pipe, a full
disk or an encoding that lacks a letter concerns the display only: the work is done, and its exit
code stands.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

NARROWEST = 40  # columns
# C0 but tab and newline, DEL and C1; marks, overrides and isolates of direction; line and paragraph
# separators; interlinear marks; tags, which are invisible; half surrogate pairs.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


# Libraries write warnings and bars past any console. Their colours and bars need: return, SGR, up,
# erase the line, show and hide the cursor. All other control characters become escapes.
_FOREIGN = re.compile(rf"(\r|\x1b\[[0-9;]*[mAK]|\x1b\[\?25[lh])|{_CONTROL.pattern}")


def visible(text: str) -> str:
    """The text with every control character as its escape: "\\x1b", "\\u202e". Tabs and newlines
    stay."""
    return _CONTROL.sub(lambda match: _escape(match[0]), text)


def as_json(value: Any, encoding: str = "utf-8", indent: int | None = 2) -> str:
    """JSON that is valid in any encoding, and harmless in a terminal."""
    return json_safe(
        json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False), encoding
    )


def json_safe(text: str, encoding: str = "utf-8") -> str:
    """The same JSON, with JSON's own escapes for characters that a terminal obeys or that
    `encoding` lacks. Such characters occur in strings only."""
    text = _CONTROL.sub(lambda match: _json_escape(match[0]), text)
    if _has_all(text, encoding):
        return text
    return "".join(char if _has_all(char, encoding) else _json_escape(char) for char in text)


class Terminal(Console):
    """A console that shows the control characters of its input as escapes. It writes its own, for
    colours and bars, as they are."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, **options)

    @property
    def size(self) -> ConsoleDimensions:
        """In fewer columns than `NARROWEST` a table would have no room for its words."""
        found = super().size
        return ConsoleDimensions(max(found.width, NARROWEST), found.height)

    @size.setter
    def size(self, given: tuple[int, int]) -> None:
        self._width, self._height = given

    def render_str(self, text: str, **options: Any) -> Text:
        """Escapes the text before the console measures it."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Escapes what came as a Text and not as a string."""
        for segment in super().render(renderable, options):
            if segment.control is None and _CONTROL.search(segment.text):
                segment = Segment(visible(segment.text), segment.style)
            yield segment


class Stream:
    """Standard output or error. A failure to write is stored in `problem` and never raised.

    stream:  the stream beneath, None where there is none
    problem: why the first write failed; from then on nothing is written
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.problem: str | None = None
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.errors = "backslashreplace"

    def write(self, text: str) -> int:
        text = _FOREIGN.sub(lambda match: match[0] if match[1] else _escape(match[0]), text)
        if not _has_all(text, self.encoding):
            text = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush(), needed=False)

    def isatty(self) -> bool:
        return self.problem is None and self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """Raises OSError where the stream has none."""
        if self._stream is None:
            raise OSError("there is no such stream")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def _try(self, call: Any, needed: bool = True) -> None:
        if self.problem is not None:
            return
        if self._stream is None:
            self.problem = "it is closed" if needed else None
            return
        try:
            call(self._stream)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.problem = (
                getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
            )

    def give_up(self) -> None:
        """Discards the rest of the stream's buffer. The interpreter would try to write it at its
        end, and fail."""
        if self.problem is None or self._stream is None:
            return
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def streams() -> Iterator[tuple[Stream, Stream]]:
    """Inside, sys.stdout and sys.stderr are a `Stream` each. Yields both."""
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield out, err
        finally:
            out.flush()
            err.flush()


def _has_all(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _escape(char: str) -> str:
    code = ord(char)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


def _json_escape(char: str) -> str:
    return json.dumps(char)[1:-1]
