"""The server of the page: where it listens, and what it lets in and out. It leaves no files behind.

It answers only the machine that it runs on, unless --expose allows others. It tells browsers to
load nothing from elsewhere, and refuses requests that other sites send. All its files are in one
hidden directory, which is removed at the end, or at the next start after a kill (`disk.staging`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.cookies import CookieError, SimpleCookie
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from ..disk.staging import Staging
from ..request import BadInput
from .desk import COOKIE, Desk, Example
from .job import ARCHIVE, RESULT, Job

LARGEST = "64mb"  # of an uploaded file
# The page's own scripts are inline, and Gradio compiles templates.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
FILES = {
    "adapter.zip": (ARCHIVE, "fastsiu-adapter.zip"),
    "report.html": (f"{RESULT}/report.html", "fastsiu-report.html"),
    "report.json": (f"{RESULT}/report.json", "fastsiu-report.json"),
}

Message = dict[str, Any]


def check(host: str, port: int, expose: bool) -> None:
    """Raises BadInput where Gradio is missing, and where other machines reach `host` without
    `expose`."""
    if importlib.util.find_spec("gradio") is None:
        raise BadInput("The app needs gradio, which is not installed: pip install 'fastsiu[app]'.")
    if not (is_loopback(host) or expose):
        raise BadInput(
            f"With --host {host} other machines reach port {port}, where anybody can load models "
            "of this machine and keep it busy, with no password and unencrypted: leave --host "
            "out, or add --expose to agree."
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    expose: bool = False,
    settings: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    examples: Callable[[Path], Sequence[Example]] = lambda place: (),
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serves the page until it is interrupted (Ctrl+C, SIGTERM).

    host, port: where to listen; port 0 is any free one
    expose:     other machines may reach it
    settings:   keywords of `settings.Settings`, for every job;  recipe: fields of `Recipe`
    examples:   makes the pictures that the page offers, in a directory that it is given
    ready:      called with the page's address once it can be opened

    Raises BadInput as `check` does, and for an address that cannot be listened on.
    """
    check(host, port, expose)
    with listening(host, port) as listener, ended_by_signals(), private(), _place() as place:
        # Read when Gradio is imported, and its only way to be told.
        os.environ["GRADIO_TEMP_DIR"] = str(place / "uploads")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import uvicorn

        job = Job(place / "job", work, settings, recipe)
        try:
            desk = Desk(job, place / "visitors")
            offered = place / "examples"
            offered.mkdir()
            bound = listener.getsockname()[1]
            hosts = None if expose else frozenset({host, "localhost", "127.0.0.1", "::1"})
            shown = f"[{host}]" if ":" in host else host
            server = uvicorn.Server(
                uvicorn.Config(
                    Guard(application(desk, examples(offered)), hosts),
                    log_level="error",
                    access_log=False,
                    timeout_graceful_shutdown=1,  # pages keep connections open
                )
            )
            ready(f"http://{shown}:{bound}")
            server.run(sockets=[listener])
        finally:
            job.close()


def work(connection: Connection, *options: Mapping[str, Any]) -> None:
    """The worker process. It imports torch and the model's code, so that the server need not."""
    from .work import serve

    serve(connection, *options)


def application(desk: Desk, examples: Sequence[Example]) -> Any:
    """The page and the results' files, as an ASGI application."""
    import fastapi
    import gradio
    from fastapi.responses import FileResponse

    from .page import build, looks

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    # A handler of Starlette's: FastAPI reads annotations, and those here are text, which it looks
    # up among this file's names, where `fastapi` is none.
    def result(request: Any) -> Any:
        visitor = desk.visit(request.cookies.get(COOKIE, ""))
        file, called = FILES.get(request.path_params["name"], ("", ""))
        path = desk.job.place / file
        if not (file and desk.owns(visitor) and path.is_file()):
            raise fastapi.HTTPException(404, "There is no such result.")
        return FileResponse(path, filename=None if "view" in request.query_params else called)

    app.add_route("/result/{name}", result, methods=["GET"])

    return gradio.mount_gradio_app(
        app,
        build(desk, examples),
        path="",
        max_file_size=LARGEST,
        footer_links=[],
        run_history=False,  # it would keep names and answers in the browser
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        **looks(),
    )


class Guard:
    """Refuses requests that this page never sends, gives every browser a key of its own, and tells
    browsers to load nothing from elsewhere.

    hosts: the host names that a request may have; None: any. Another site can make its own name
           point at this machine (DNS rebinding); its requests have that name and are refused
    """

    def __init__(self, app: Any, hosts: frozenset[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        known = key_of(headers.get("cookie", ""))
        acts = scope.get("method", "GET") not in ("GET", "HEAD")
        if scope["type"] != "http" or not self._may(headers) or (acts and not known):
            await _refuse(scope, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = [(k, v) for k, v in message["headers"] if k.decode().lower() not in HEADERS]
                given += [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                if not known:
                    key = secrets.token_urlsafe(32)
                    cookie = f"{COOKIE}={key}; Path=/; HttpOnly; SameSite=Strict"
                    given.append((b"set-cookie", cookie.encode()))
                message = {**message, "headers": given}
            await send(message)

        await self.app(scope, receive, answer)

    def _may(self, headers: Mapping[str, str]) -> bool:
        asked, origin = headers.get("host", ""), headers.get("origin")
        try:
            host = urlsplit(f"//{asked}").hostname
            sender = asked if origin is None else urlsplit(origin).netloc
        except ValueError:  # no address at all, such as "[x"
            return False
        return (self.hosts is None or host in self.hosts) and sender == asked


def key_of(cookie: str) -> str:
    """The visitor's key in a Cookie header, "" where there is none."""
    try:
        found = SimpleCookie(cookie).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


async def _refuse(scope: Message, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    text = b"This page answers browsers of the machine that it runs on, with its own cookie."
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": text})


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens. Raises BadInput where the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            raise BadInput(
                f"Port {port} of {host} cannot be listened on ({error.strerror}): choose another "
                "with --port."
            ) from error
        yield listener
    finally:
        listener.close()


@contextlib.contextmanager
def private() -> Iterator[None]:
    """Inside, only the owner may read new files (0600), also files that libraries make."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM interrupts as Ctrl+C does, so that the files are removed. Both end the block
    without an error."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """Makes a hidden directory among the machine's temporary files. First it removes those that
    killed servers have left."""
    hidden = Staging(Path(tempfile.gettempdir()))
    try:
        path = hidden.__enter__()
    except OSError as error:
        raise BadInput(
            f"The directory {str(hidden.place)!r} for what is uploaded cannot be written "
            f"({error.strerror}): set TMPDIR to another."
        ) from error
    try:
        yield path
    finally:
        hidden.__exit__(None, None, None)
