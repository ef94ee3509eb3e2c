"""The address of a server that is asked, and the key for it: refused where others could read either
of them. Calls to it, one or a few at once."""

from __future__ import annotations

import queue
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from email.message import Message
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from ..request import BadInput
from .small_file import read_bytes, reason

LOCAL = ("localhost", "127.0.0.1", "::1")
LONGEST_KEY, LONGEST_REPLY = 4096, 4_000_000  # bytes

T = TypeVar("T")
R = TypeVar("R")


def is_local(url: str) -> bool:
    """Whether a URL, which `host_of` has taken, is this machine's own."""
    return urlsplit(url).hostname in LOCAL


def completions(url: str) -> str:
    """The whole URL of a server's chat completions, of that or of the server's base."""
    url = url.rstrip("/")
    return url if url.endswith("/chat/completions") else f"{url}/chat/completions"


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
            text = read_bytes(place, LONGEST_KEY, pipe=True).decode("utf-8-sig")
    except UnicodeDecodeError:  # its own sentence would show bytes of the key
        raise BadInput(f"{place} holds no API key: write the key into it, in one line.") from None
    except (OSError, ValueError) as error:
        raise BadInput(
            f"The API key in {place} cannot be read ({reason(error)}): give a file with the key "
            f"alone to {option}."
        ) from None
    key = text.strip()
    if not key or not key.isprintable() or not key.isascii() or " " in key:
        raise BadInput(f"{place} holds no API key: write the key into it, in one line.")
    return key


def read_within(reply: Any, seconds: float) -> bytes:
    """At most `LONGEST_REPLY` bytes of a reply. Raises TimeoutError where they are not there in
    time: a socket's own limit begins anew with each byte that comes.

    reply: of `urllib`, also an HTTPError
    """
    ends, pieces, size = time.monotonic() + seconds, list[bytes](), 0
    while size < LONGEST_REPLY and (piece := reply.read1(min(2**16, LONGEST_REPLY - size))):
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > ends:
            raise TimeoutError
    return b"".join(pieces)


def asked_to_wait(headers: Message) -> float:
    """The seconds for which a busy server asks to be left alone; 0 where it gives no number."""
    after = str(headers.get("Retry-After", ""))
    return float(after) if after.isascii() and after.isdecimal() else 0.0


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


class Caller:
    """Calls one server, with the key for it. No redirect is followed, and a call to this machine
    goes to no proxy.

    url:      one that `host_of` has taken
    key_file: with the key; None: there is none
    option:   the option that the file comes from

    Raises BadInput for a key that may not be used.
    """

    def __init__(self, url: str, key_file: Path | None, option: str) -> None:
        self._headers = {"User-Agent": "fastsiu"}
        if key_file is not None:
            self._headers["Authorization"] = f"Bearer {read_key(key_file, option)}"
        direct = [urllib.request.ProxyHandler({})] if is_local(url) else []
        self._opener = urllib.request.build_opener(NoRedirect, *direct)

    def call(self, url: str, seconds: float, data: bytes | None = None) -> bytes:
        """The reply to a GET or, with JSON in `data`, to a POST, within so many seconds. Raises
        what `urllib` raises."""
        kind = {} if data is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, self._headers | kind)
        with self._opener.open(request, timeout=seconds) as reply:
            return read_within(reply, seconds)


def a_few_at_once(
    work: Callable[[T, threading.Event], R], items: Sequence[T], most: int
) -> list[R]:
    """The results of `work` on each item, in their order; `most` run at once.

    work: gets an item, and an event that is set when it is no longer worth going on; it may set the
          event itself

    Raises the first failure at once, and begins no further item. So does Ctrl+C: neither waits for
    the calls that are under way. A `ThreadPoolExecutor` does, up to each call's own limit.
    """
    stop, over = threading.Event(), threading.Event()
    left, lock = iter(enumerate(items)), threading.Lock()
    done: queue.SimpleQueue[tuple[int, R | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        while True:
            with lock:
                found = None if over.is_set() else next(left, None)
            if found is None:
                return
            at, item = found
            try:
                done.put((at, work(item, stop), None))
            except BaseException as error:  # any: it is raised where the results are waited for
                with lock:
                    over.set()
                done.put((at, None, error))

    results: dict[int, Any] = {}
    try:
        for _ in range(min(max(1, most), len(items))):
            threading.Thread(target=run, daemon=True).start()
        while len(results) < len(items):
            at, result, error = done.get()
            if error is not None:
                raise error
            results[at] = result
    finally:
        over.set()
        if len(results) < len(items):
            stop.set()
    return [results[at] for at in range(len(items))]
