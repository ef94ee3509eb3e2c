"""A judge: a language model that grades texts, on any server that speaks OpenAI's chat completions,
local or not.

There is none unless the user asks for one. A sentence says what would leave the machine before
anything does, and nothing is sent without `allow_network`. No picture is ever sent.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..guards.endpoint import Caller, a_few_at_once, asked_to_wait, completions, host_of
from ..guards.strict_json import parse_json
from ..request import BadInput
from ..text.rate import wilson

LONGEST_WAIT = 60.0  # seconds that a server may ask to be left alone
GIVE_UP = 5  # texts without any reply, one after the other, after which no more are sent
NO_GRADE = "The judge graded no answer."
NO_ANSWER = "There was no answer to grade."


@dataclass(frozen=True)
class Grader:
    """The server and the model that grade answers, and how they are asked.

    url:           the server's base, such as https://host/v1, or its whole path to chat/completions
    key_file:      a file with the API key alone; it is no argument, because every process of the
                   machine can read arguments
    allow_network: what `announcement` tells may be sent to the server
    plain_http:    allows http:// to another machine; everybody on the way can read it
    timeout:       seconds for one reply
    attempts:      how often one text is sent at most
    wait:          seconds before the second attempt, doubled for each further one
    workers:       number of texts that are sent at once
    """

    url: str
    model: str
    key_file: Path | None = None
    allow_network: bool = False
    plain_http: bool = False
    timeout: float = 60.0
    attempts: int = 5
    wait: float = 1.0
    workers: int = 4

    @property
    def host(self) -> str:
        """Host and port. Raises BadInput for a URL that may not be used."""
        return host_of(self.url, "--judge", "--judge-key", "a judge", plain_http=self.plain_http)

    @property
    def path(self) -> str:
        """The whole URL that is asked."""
        return completions(self.url)

    @functools.cached_property
    def caller(self) -> Caller:
        """The one thing that talks to the network. The key is read once: its file may be a pipe.

        Raises BadInput for a URL or a key that may not be used.
        """
        _ = self.host
        return Caller(self.path, self.key_file, "--judge-key")


@dataclass(frozen=True)
class Scale:
    """What a judge is asked, and the grades that it may give.

    system: the instruction; it ends with the form of the reply
    whole:  whole numbers only; else at most two decimals
    """

    system: str
    least: float
    most: float
    whole: bool = True

    def read(self, text: str) -> float | None:
        """The grade in a reply that is nothing but it: "Score: 3", "**Score:** 3/5" or "3"; None
        for any other reply, also with a word more, and for a grade beyond the ends."""
        decimals = "" if self.whole else r"(?:\.[0-9]{1,2})?"
        found = re.fullmatch(
            rf"[\s*_`]*(?:score[\s*_`]*[:=][\s*_`]*)?((?:0|[1-9][0-9]*){decimals})"
            rf"(?:\s*/\s*{self.most:g})?[\s*_`]*\.?[\s*_`]*",
            text,
            re.IGNORECASE | re.ASCII,
        )
        if found is None or not self.least <= (value := float(found[1])) <= self.most:
            return None
        return int(value) if self.whole else value


@dataclass(frozen=True)
class Graded:
    """A grade, or None with the problem: "malformed", "refused (400)", "no reply (timeout)", "not
    sent" ..."""

    score: float | None
    problem: str | None = None


@dataclass(frozen=True)
class Text:
    """What is sent to be graded.

    body: as `body` makes it
    read: finds the grade in the judge's reply
    """

    body: dict[str, Any]
    read: Callable[[str], float | None]


class Refused(BadInput):
    """The server refuses whatever is sent: a wrong key, a wrong path, a redirect."""


def body(grader: Grader, system: str, asked: Mapping[str, str]) -> dict[str, Any]:
    """The request for one text. It is JSON, so that no answer can end it and begin another."""
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": json.dumps(asked, ensure_ascii=False)},
    ]
    return {"model": grader.model, "messages": messages, "temperature": 0}


def announcement(grader: Grader, what: str, size: int | None = None) -> str:
    """One sentence: what leaves this machine, and where to. size: in bytes, None before the answers
    are there.

    Raises BadInput without `allow_network`, and for a URL that may not be used.
    """
    amount = "" if size is None else f", {size / 1000:.1f} kB in all"
    told = (
        f"The judge {grader.model} at {grader.host} "
        f"{'is' if grader.allow_network else 'would be'} sent {what}{amount}, and no picture."
    )
    if not grader.allow_network:
        raise BadInput(f"{told} Nothing was sent: add --allow-network to agree.")
    return told


def size_of(texts: Sequence[Text]) -> int:
    """The bytes that are sent for them."""
    return sum(len(json.dumps(text.body)) for text in texts)


def grade(grader: Grader, texts: Sequence[Text]) -> list[Graded]:
    """A grade for each text, in their order; a few are under way at once.

    Raises BadInput without `allow_network`, and `Refused` where the server refuses altogether.
    """
    if not grader.allow_network:
        raise BadInput("Nothing may be sent to a judge: add --allow-network to agree.")
    _ = grader.caller
    silent = [0]  # texts in a row without a reply

    def one(text: Text, stop: threading.Event) -> Graded:
        if stop.is_set():
            return Graded(None, "not sent")
        graded = _ask(grader, text, stop)
        silent[0] = silent[0] + 1 if (graded.problem or "").startswith("no reply") else 0
        if silent[0] >= GIVE_UP:
            stop.set()
        return graded

    return a_few_at_once(one, texts, grader.workers)


def summary(scores: Sequence[float | None], least: float, most: float) -> dict[str, Any]:
    """Mean and 95 % interval of the grades; null with the reason where there are none.

    The interval is Wilson's of (mean - least) / (most - least). Grades between both ends spread at
    most as widely as grades of the ends alone with the same mean, so it is never too narrow, even
    where all are equal.
    """
    found = [s for s in scores if s is not None]
    if not found:
        return {"value": None, "reason": NO_GRADE if scores else NO_ANSWER}
    mean, n, width = sum(found) / len(found), len(found), most - least
    low, high = wilson(min(1.0, (mean - least) / width) * n, n)
    return {"value": mean, "n": n, "low": least + width * low, "high": least + width * high}


def _ask(grader: Grader, text: Text, stop: threading.Event) -> Graded:
    """The grade of one text, which is sent again where the server was busy, broken or silent."""
    data, problem = json.dumps(text.body).encode(), ""
    for attempt in range(grader.attempts):
        wait = 0.0
        try:
            return _graded(grader.caller.call(grader.path, grader.timeout, data), text)
        except urllib.error.HTTPError as error:
            with error:
                if 300 <= error.code < 400:
                    target = urlsplit(error.headers.get("Location", "")).netloc or "another path"
                    raise Refused(
                        f"The judge at {grader.host} sends on to {target}, and nothing is sent "
                        "there: give the right URL with --judge."
                    ) from error
                if error.code in (401, 403, 404):
                    raise Refused(
                        f"The judge at {grader.host} refuses ({error.code}): check --judge, "
                        "--judge-model and --judge-key."
                    ) from error
                if error.code != 429 and error.code < 500:
                    return Graded(None, f"refused ({error.code})")
                problem = f"no reply ({error.code})"
                wait = asked_to_wait(error.headers)
        except TimeoutError:
            problem = "no reply (timeout)"
        except HTTPException:
            problem = "no reply (broken off)"
        except OSError as error:
            # URLError among them: no connection, no such name, a certificate that does not hold
            timeout = isinstance(getattr(error, "reason", None), TimeoutError)
            problem = "no reply (timeout)" if timeout else "no reply (no connection)"
        if attempt + 1 < grader.attempts:
            stop.wait(min(LONGEST_WAIT, max(wait, grader.wait * 2**attempt)))
            if stop.is_set():
                break
    return Graded(None, problem)


def _graded(reply: bytes, text: Text) -> Graded:
    try:
        said = parse_json(reply.decode("utf-8"))["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return Graded(None, "malformed")
    found = text.read(said) if isinstance(said, str) else None
    return Graded(found, None if found is not None else "malformed")
