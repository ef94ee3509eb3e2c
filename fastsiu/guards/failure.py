"""What may be shown to everybody of a failure of our own: a traceback's values and messages may
hold the name."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator

from .. import __version__


def places(error: BaseException | None) -> Iterator[str]:
    """Types of exceptions, modules, lines and functions: no path, no message, no value."""
    yield f"fastsiu {__version__}, Python {sys.version_info.major}.{sys.version_info.minor}"
    while error is not None:
        yield type(error).__name__
        for frame, line in traceback.walk_tb(error.__traceback__):
            yield f"  {frame.f_globals.get('__name__', '?')}:{line} {frame.f_code.co_name}"
        error = error.__cause__ or error.__context__
