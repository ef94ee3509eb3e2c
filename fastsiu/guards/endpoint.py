"""The address of a server that is asked, and the key for it: refused where others could read either
of them."""

from __future__ import annotations

import sys
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from ..request import BadInput

LOCAL = ("localhost", "127.0.0.1", "::1")
LONGEST_KEY = 4096  # bytes


def is_local(url: str) -> bool:
    """Whether a URL, which `host_of` has taken, is this machine's own."""
    return urlsplit(url).hostname in LOCAL


def host_of(url: str, option: str, key: str, what: str, *, plain_http: bool) -> str:
    """Host and port of a server's URL.

    option:     the option that the URL comes from
    key:        the option for a file with the key
    what:       the server, in words
    plain_http: allows http:// to another machine, where everybody on the way reads along

    Raises BadInput for a URL that may not be used.
    """
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        raise BadInput(
            f"{option} is no URL: give the server's base, such as http://localhost:8000/v1."
        ) from None
    named = f"{parts.hostname}{port}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(
            f"{option} is no http:// or https:// URL: give the server's base, such as "
            "http://localhost:8000/v1."
        )
    if parts.username or parts.password or parts.query:
        raise BadInput(
            f"{option} holds a user, a password or a query, which others can see: put the key into "
            f"a file, {key}."
        )
    if parts.scheme == "http" and parts.hostname not in LOCAL and not plain_http:
        raise BadInput(
            f"http://{named} is read by everybody on the way: use https://, or {what} on this "
            "machine."
        )
    return named


def read_key(place: Path, option: str) -> str:
    """The API key that a file, or for "-" the first line of standard input, holds alone. Raises
    BadInput where there is none."""
    try:
        if str(place) == "-":
            text = "" if sys.stdin is None else sys.stdin.readline(LONGEST_KEY)
        else:
            text = place.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise BadInput(
            f"The API key in {place} cannot be read: give a file with the key alone to {option}."
        ) from None
    key = text.strip()
    if not key or not key.isprintable() or not key.isascii() or " " in key:
        raise BadInput(f"{place} holds no API key: write the key into it, in one line.")
    return key


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """No redirect is followed: urllib would go to any host, and take the key along."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> None:
        return None
