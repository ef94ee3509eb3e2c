"""A model behind an OpenAI-compatible server: asked by chat completions, pictures as data URLs.

Greedy decoding (temperature 0). A reply is text alone: no hidden state, and log-probabilities only
where the server gives them (`Served.openings`). `ask.replies` takes a `Served` wherever it takes a
loaded model.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from PIL import Image

from ..guards.endpoint import (
    Caller,
    a_few_at_once,
    asked_to_wait,
    completions,
    host_of,
    is_local,
    read_within,
)
from ..guards.strict_json import check, parse_json
from ..guards.terminal import visible
from ..request import BadInput
from .turns import Picture

LONGEST_WAIT = 30.0  # seconds that a server may ask to be left alone
FIRST_WAIT = 0.5  # seconds before the second attempt, doubled for each further one
ALTERNATIVES = 20  # the most that OpenAI's interface gives for a token
SHOWN = 160  # characters of a server's own words in a sentence

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Endpoint:
    """A server, and how it is asked.

    url:           its base, such as http://localhost:8000/v1, or its whole path to chat/completions
    key_file:      a file with the API key alone, "-" for standard input; it is no argument, because
                   every process of the machine can read arguments
    allow_network: pictures and names may be sent to another machine
    plain_http:    allows http:// to another machine; everybody on the way can read it
    timeout:       seconds for one reply
    within:        seconds for all replies together
    attempts:      how often one question is sent
    at_once:       questions that are under way at once
    """

    url: str
    key_file: Path | None = None
    allow_network: bool = False
    plain_http: bool = False
    timeout: float = 120.0
    within: float = 3600.0
    attempts: int = 3
    at_once: int = 2

    @property
    def host(self) -> str:
        """Host and port. Raises BadInput for a URL that may not be used."""
        return host_of(self.url, "--url", "--url-key", "a server", plain_http=self.plain_http)

    @property
    def path(self) -> str:
        return completions(self.url)


class Said(NamedTuple):
    """An answer. closed: the model ended it itself; `model.ask.Reply` has the same two fields."""

    text: str
    closed: bool = True


# For each token of an answer, the log-probabilities (nats) of the likeliest tokens by their text.
Openings = list[dict[str, float]]


class Connection:
    """What the models of one server share: the key, the time that is left, and what the server
    calls its models.

    Raises BadInput for a URL or a key that may not be used, and where a picture would leave this
    machine without `allow_network`.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.host = endpoint, endpoint.host
        if not is_local(endpoint.url) and not endpoint.allow_network:
            raise BadInput(
                f"The pictures, and questions with the name, would be sent to {self.host}. Nothing "
                "was sent: add --allow-network to agree."
            )
        self._caller = Caller(endpoint.url, endpoint.key_file, "--url-key")
        self._ends = time.monotonic() + endpoint.within
        self.called: dict[str, str] = {}  # model's name -> what replies call it

    def post(self, body: dict[str, Any], stop: threading.Event) -> dict[str, Any]:
        """Sends one body and returns the reply. Sends it again where the server is busy, broken or
        silent. Raises BadInput where no reply can be used."""
        data, problem = json.dumps(body).encode(), ""
        for attempt in range(self.endpoint.attempts):
            left = self._ends - time.monotonic()
            if left <= 0:
                raise BadInput(
                    f"The server at {self.host} did not answer everything within "
                    f"{self.endpoint.within:g} s: give it more with --within, or ask less with "
                    "--share."
                )
            wait = 0.0
            try:
                return self._read(data, min(self.endpoint.timeout, left))
            except urllib.error.HTTPError as error:
                with error:
                    told = _words(error, min(self.endpoint.timeout, left))
                    if error.code != 429 and error.code < 500:
                        raise self._refused(error.code, error.headers, told, body) from error
                    problem = f"{error.code}{told and ': ' + told}"
                    wait = asked_to_wait(error.headers)
            except TimeoutError:
                problem = "timeout"
            except HTTPException:
                problem = "broken off"
            except OSError as error:
                reason = getattr(error, "reason", error)
                problem = "timeout" if isinstance(reason, TimeoutError) else _reason(reason)
            if attempt + 1 < self.endpoint.attempts:
                most = max(0.0, self._ends - time.monotonic())
                stop.wait(min(LONGEST_WAIT, most, max(wait, FIRST_WAIT * 2**attempt)))
                if stop.is_set():
                    break
        if problem == "timeout":
            raise BadInput(
                f"The server at {self.host} gave no answer within {self.endpoint.timeout:g} s, "
                f"{self.endpoint.attempts} times: give it more with --timeout, or look at its log."
            )
        if problem[:1].isdigit():
            raise BadInput(
                f"The server at {self.host} fails on {body['model']!r} ({problem}): check --model, "
                "or look at the server's log."
            )
        raise BadInput(
            f"Nothing answers at {self.host} ({problem}): start the server, or check --url."
        )

    def _read(self, data: bytes, timeout: float) -> dict[str, Any]:
        text = self._caller.call(self.endpoint.path, timeout, data)
        try:
            value = parse_json(text.decode("utf-8"))
            if not isinstance(value["choices"][0]["message"], dict):
                raise ValueError
        except (ValueError, KeyError, IndexError, TypeError):
            raise BadInput(
                f"{self.endpoint.path} answers with no chat completion: give the base of a server "
                "that speaks OpenAI's chat completions, such as http://localhost:8000/v1."
            ) from None
        return dict(value)

    def _refused(self, code: int, headers: Message, told: str, body: dict[str, Any]) -> BadInput:
        if 300 <= code < 400:
            target = urlsplit(headers.get("Location", "")).netloc or "another path"
            return BadInput(
                f"The server at {self.host} sends on to {target}, and nothing is sent there: give "
                "the right URL with --url."
            )
        if code in (401, 403):
            return BadInput(f"The server at {self.host} refuses the key ({code}): check --url-key.")
        known = self.models() if code in (400, 404) else []
        if known and body["model"] not in known:
            return BadInput(
                f"The server at {self.host} has no model {body['model']!r} (it lists "
                f"{', '.join(known[:5])}): give the name that it is served by."
            )
        return BadInput(
            f"The server at {self.host} refuses a question to {body['model']!r} "
            f"({code}{told and ': ' + told}): check --url and the name that the model is served by."
        )

    def models(self) -> list[str]:
        """The names that the server lists; none where it lists nothing of use."""
        place = self.endpoint.path.removesuffix("/chat/completions") + "/models"
        try:
            text = self._caller.call(place, self.endpoint.timeout)
            listed = parse_json(text.decode("utf-8"))["data"]
            return [visible(str(one["id"])) for one in listed]
        except (OSError, HTTPException, ValueError, KeyError, TypeError):
            return []  # it only serves to make a sentence clearer

    def each(self, work: Callable[[T, threading.Event], R], items: Sequence[T]) -> list[R]:
        """The results of `work` on each item, in their order; a few run at once. Raises the first
        failure at once, and begins no further item."""
        return a_few_at_once(work, items, self.endpoint.at_once)


class Served:
    """One model of a server. name: what the server calls it"""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection, self.name = connection, name

    @property
    def called(self) -> str | None:
        """What the server's replies call the model; None before the first reply, and where they do
        not say."""
        return self.connection.called.get(self.name)

    def picture(self, image: Image.Image) -> Picture:
        """The picture as it is sent, without features."""
        return Picture(image, None)

    def replies(
        self, questions: Sequence[tuple[str, Picture | None]], *, max_new_tokens: int = 64
    ) -> list[Said]:
        """Greedy answers, in the order of the questions. Raises BadInput where the server does not
        answer."""
        send = lambda one, stop: _said(self._ask(one, max_new_tokens, {}, stop))
        return self.connection.each(send, self._pairs(questions))

    def openings(
        self, questions: Sequence[tuple[str, Picture | None]], *, max_new_tokens: int
    ) -> list[Openings] | None:
        """The likeliest tokens at each place of the greedy answers; None where the server gives no
        log-probabilities."""
        more = {"logprobs": True, "top_logprobs": ALTERNATIVES}
        send = lambda one, stop: _openings(self._ask(one, max_new_tokens, more, stop))
        pairs = self._pairs(questions)
        try:
            first = self.connection.each(send, pairs[:1])
        except BadInput:  # a server may refuse what it does not know
            return None
        if not first or first[0] is None:
            return None
        found = [*first, *self.connection.each(send, pairs[1:])]
        given = [one for one in found if one is not None]
        return given if len(given) == len(found) else None

    def _pairs(
        self, questions: Sequence[tuple[str, Picture | None]]
    ) -> list[tuple[str, str | None]]:
        """The same with pictures as data URLs; each picture is encoded once."""
        urls: dict[int, str] = {}
        for _, picture in questions:
            if picture is not None and id(picture) not in urls:
                urls[id(picture)] = data_url(picture.image)
        return [(q, None if p is None else urls[id(p)]) for q, p in questions]

    def _ask(
        self, one: tuple[str, str | None], longest: int, more: dict[str, Any], stop: threading.Event
    ) -> dict[str, Any]:
        reply = self.connection.post(body(self.name, *one, longest) | more, stop)
        if isinstance(called := reply.get("model"), str):
            self.connection.called[self.name] = called
        return reply


def body(model: str, question: str, picture: str | None, longest: int) -> dict[str, Any]:
    """What is sent for one question. picture: a data URL"""
    content: Any = question
    if picture is not None:
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": question},
        ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": longest,
        "seed": 0,
    }


def data_url(image: Image.Image) -> str:
    """The picture's pixels alone as a PNG, which loses none of them."""
    buffer = io.BytesIO()
    clean = Image.new("RGB", image.size)  # no EXIF, comment or profile comes along
    clean.paste(image)
    clean.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _said(reply: dict[str, Any]) -> Said:
    choice = reply["choices"][0]
    text = choice["message"].get("content")
    return Said(
        text.strip() if isinstance(text, str) else "", choice.get("finish_reason") != "length"
    )


def _openings(reply: dict[str, Any]) -> Openings | None:
    """None where the reply holds no log-probabilities in OpenAI's form."""
    try:
        places = reply["choices"][0]["logprobs"]["content"]
        check(places, [{"top_logprobs": [{"token": str, "logprob": float}]}])
        return [
            {one["token"]: float(one["logprob"]) for one in place["top_logprobs"]}
            for place in places
        ]
    except (KeyError, TypeError, ValueError):
        return None


def _words(error: urllib.error.HTTPError, seconds: float) -> str:
    """The server's own words about a refusal, on one short line. They may hold anything. They are
    read for at most so many seconds."""
    try:
        text = read_within(error, seconds).decode("utf-8", "replace")
        value = parse_json(text)
        for key in ("error", "detail", "message"):
            if isinstance(value, dict) and key in value:
                value = value[key]
        text = value if isinstance(value, str) else ""
    except (OSError, HTTPException, ValueError):
        return ""
    line = visible(" ".join(text.split()))
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


def _reason(error: Any) -> str:
    """Why there is no connection, in the system's words, without an address."""
    return str(getattr(error, "strerror", None) or type(error).__name__).lower()
