"""Many requests from a JSONL file, each by itself: one adapter each, from the untouched model.

DIR/001, DIR/002, ... are complete outputs, each byte for byte the adapter that `fastsiu unlearn`
makes of that line alone; DIR/requests.json has what became of each. Any number of processes on any
number of machines may share DIR (`workers.joining`), and a run that was cut off goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import driver, manifest
from . import output as outputs
from .disk import staging
from .disk.request_file import PATHS, first_sentence_of, places_of, read_requests
from .guards.first_read import first_reads_count
from .guards.strict_json import read_json
from .images import load_image
from .model import vlm
from .model.memory import Layout, budget
from .report.redact import MODEL, redacted
from .report.sentences import sentence
from .report.words import CONCEPT
from .request import BadInput, Recipe, Request
from .session import Listener
from .settings import (
    ModelRef,
    RecipeChoice,
    ReportOptions,
    Settings,
    choose_layout,
    choose_recipe,
    deciding,
    load,
)
from .workers import joining
from .workers.claims import Claims, Pace, at_work

TABLE, FORMAT = "requests.json", "fastsiu requests 1"
SHAPE = {
    "format": str,
    "of": int,
    "requests": [
        {"line": int, "concept": str, "status": str, "reasons": [str], "output": (str, None)}
    ],
}


@dataclass
class Outcome:
    """What became of one line of the file.

    status:  "forgotten", "not forgotten" or "failed"; "" where it was not done yet
    output:  the name of its directory; None where there is none
    numeric: the computation failed, and not the input
    """

    line: int
    concept: str
    status: str = ""
    reasons: list[str] = field(default_factory=list)
    output: str | None = None
    numeric: bool = False


@dataclass
class Each:
    """What `unlearn_each` returns.

    outcomes: of all lines; empty where another worker writes the table
    share:    what this worker did
    resumed:  how many lines were done before it began
    of:       how many lines there are
    """

    outcomes: list[Outcome]
    output: Path
    share: joining.Share
    resumed: int
    of: int

    @property
    def forgotten(self) -> bool:
        return all(o.status == "forgotten" for o in self.outcomes)

    @property
    def exit_code(self) -> int:
        """0: all are forgotten, or another worker writes the table. 1: some are not forgotten. 2:
        every request failed because of its input. 3: every one failed, some in the computation."""
        if self.forgotten:
            return 0
        failed = [o for o in self.outcomes if o.status == "failed"]
        if len(failed) < len(self.outcomes):
            return 1
        return 3 if any(o.numeric for o in failed) else 2

    def as_dict(self) -> dict[str, Any]:
        return {
            "worker": vars(self.share),
            "requests": [vars(outcome) for outcome in self.outcomes],
            "forgotten": self.forgotten if self.outcomes else None,
        }


class Sharing(NamedTuple):
    """join: other workers may be at work in the same directory; pace: how often to look at them"""

    join: bool = False
    pace: Pace = Pace()


def unlearn_each(
    file: str | Path,
    *,
    model: ModelRef = ModelRef(),
    recipe: RecipeChoice = RecipeChoice(),
    settings: Settings = Settings(),
    report: ReportOptions = ReportOptions(),
    output: str | Path | None = None,
    sharing: Sharing = Sharing(),
    listener: Listener | None = None,
) -> Each:
    """Makes an adapter for each request of a file. Options are those of `driver.unlearn`.

    output: the directory of all outputs

    Run again, it does the requests that are missing, and those that failed and were mended since.
    If only failed requests are missing, it tries those again. Raises BadInput where the file or the
    output cannot be used, and where another run is at work in `output` but `sharing.join` is not
    set; no model is loaded then. A request that fails later stops no other: its `Outcome` says why
    it failed.
    """
    listener = listener or Listener()
    if sharing.join and output is None:
        raise BadInput("--join needs the directory that the processes share: give --output DIR.")
    if sharing.join:
        settings = joining.own_card(settings)
    if output is None:
        output = outputs.random_directory()
        listener.note(f"Writing to {output}: name it with --output to go on after an interruption.")
    work = _prepared(Path(file), Path(output), model, recipe, settings, report, listener)
    claims = Claims(work.output, sharing.pace, work.asked_under)
    work.begin()
    with nullcontext() if sharing.join else _alone(work.output):
        claims.open(work.digest_of_options())
        if report.run:
            run = report.run if work.names_the_model else outputs.without_model(report.run)
            staging.replace_file(work.output / outputs.RUN, run.encode("utf-8"))
        resumed = sum(map(work.is_done, work.lines))
        try:
            share = joining.work_off(claims, list(work.lines), work, listener)
        finally:
            work.loaded = None
        draw = lambda: work.draw(claims)
        share.drew = joining.draw_once(claims, lambda: work.is_drawn(claims), draw, TABLE)
        outcomes = [] if sharing.join and not share.drew else work.outcomes(claims)
    return Each(outcomes, work.output, share, resumed, len(work.lines))


def forecast(
    file: str | Path,
    *,
    model: ModelRef = ModelRef(),
    recipe: RecipeChoice = RecipeChoice(),
    settings: Settings = Settings(),
    report: ReportOptions = ReportOptions(),
    output: str | Path,
) -> joining.Forecast:
    """How long the requests that are left in `output` will take, from the times of those that are
    done. Loads nothing and writes nothing."""
    place = Path(output)
    work = _prepared(Path(file), place, model, recipe, settings, report, Listener())
    return joining.forecast(
        Claims(place, asked=work.asked_under), list(work.lines), work, len(at_work(place))
    )


def _prepared(
    file: Path,
    output: Path,
    model: ModelRef,
    recipe: RecipeChoice,
    settings: Settings,
    report: ReportOptions,
    listener: Listener,
) -> Requests:
    outputs.check_shown(report.redact, report.embed_image)
    asked = dict(read_requests(file))
    for number, request in asked.items():
        for key in PATHS:  # the worker that does a request reads its picture
            path = getattr(request, key)
            if path is not None and not path.exists():
                raise BadInput(f"{file}, line {number}: There is no {path}: mend the line.")
    chosen, origins = choose_recipe(model.name, recipe, model.revision)
    weights = outputs.digest_model(model.name) if model.is_directory else None
    largest = None
    if settings.limited:  # a plan is for the largest picture
        images = (load_image(request.image) for request in asked.values())
        largest = max(images, key=lambda image: image.width * image.height)
    layout = choose_layout(model, settings, chosen, largest, listener)
    decides = {"dtype": settings.dtype} | deciding(layout) | report.deciding
    room = budget(layout, chosen.batch_size, settings.limited)
    sealed = driver.Sealed(chosen, origins, "", weights, decides)
    lines = {f"{line:03d}": line for line in asked}
    return Requests(output, asked, lines, model, sealed, layout, room)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    with staging.claim(place, TABLE) as mine:
        if not mine:
            raise BadInput(
                f"Another run is at work in {place}: wait for its end, start both with --join, or "
                "choose another --output."
            )
        yield


@dataclass
class Requests:
    """The requests of a file as units of work (`workers.joining.Units`), and their table.

    A request's key is also the name of its output.

    lines:  by key, the line of the request in the file
    sealed: what decides each result; without the digest, which differs for each request
    loaded: the model; None until the first request begins
    done:   keys of the requests whose output was found complete
    """

    output: Path
    asked: dict[int, Request]
    lines: dict[str, int]
    model: ModelRef
    sealed: driver.Sealed
    layout: Layout
    room: vlm.Budget
    loaded: vlm.VLM | None = None
    done: set[str] = field(default_factory=set)

    @property
    def recipe(self) -> Recipe:
        return self.sealed.recipe

    @property
    def names_the_model(self) -> bool:
        """Whether its name may stand in what is redacted: it tells no concept's."""
        if not self.sealed.settings.get("redact"):
            return True
        told = ({"concept": r.concept, "aliases": r.aliases} for r in self.asked.values())
        return all(redacted({**one, "model": self.model.name})["model"] != MODEL for one in told)

    def begin(self) -> None:
        """Makes the directory and its empty table. Raises BadInput where it holds anything else."""
        path = self.output / TABLE
        if not path.is_file():
            try:
                outputs.check_destination(self.output, "")  # raises unless absent or empty
            except BadInput:
                if not path.is_file():  # else another worker has begun since the first look
                    raise
            self.output.mkdir(mode=0o700, exist_ok=True)
            try:
                staging.new_file(path, self._text([]))
            except FileExistsError:
                pass  # another worker has made the table
        self._table()
        staging.sweep(self.output)

    def digest_of_options(self) -> str:
        content = {
            "format": FORMAT,
            "recipe": self.recipe.as_dict(),
            "model": [self.model.name, self.model.revision, self.sealed.weights],
            "settings": self.sealed.settings,
        }
        return manifest.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())

    # as units of work

    def is_done(self, key: str) -> bool:
        if key not in self.done and (self.output / key).exists():
            if outputs.holds(self.output / key, self.digest(key)):
                self.done.add(key)
        return key in self.done

    def digest(self, key: str) -> str:
        """The digest that `driver.unlearn` would give to this request."""
        return outputs.request_digest(
            self.asked[self.lines[key]],
            self.recipe,
            self.model.name,
            self.model.revision,
            weights=self.sealed.weights,
            **self.sealed.settings,
        )

    def asked_under(self, key: str) -> str:
        """The digest of the key's request; "" for the table, and while a file cannot be read."""
        try:
            return self.digest(key) if key in self.lines else ""
        except BadInput:  # `do` says so
            return ""

    @first_reads_count()
    def do(self, key: str, listener: Listener) -> str:
        request = self.asked[self.lines[key]]
        image = load_image(request.image)
        given = driver.check_given(request)
        digest = self.digest(key)
        if self.loaded is None:
            self.loaded = load(self.model, self.layout, self.room, listener)
        loaded, shares = self.loaded, self.loaded.shares
        try:
            result = driver.unlearn_on(
                loaded,
                request,
                (image, given),
                self.model.name,
                driver.Sealed(
                    self.recipe,
                    self.sealed.origins,
                    digest,
                    self.sealed.weights,
                    self.sealed.settings,
                ),
                self.output / key,
                listener=listener,
                seconds={},
            )
        finally:
            # A training finds out which ways of sharing prefixes are exact. The next request starts
            # without that, so that its last digits do not depend on the order of the requests.
            loaded.shares = shares
        return "forgotten" if result.forgotten else "not forgotten"

    def reason(self, key: str, error: BaseException) -> str:
        """The error's first line without paths; redacted, also without the name."""
        places = places_of(self.asked[self.lines[key]], self.model.name)
        text = first_sentence_of(error, places)
        return sentence(text) if self.sealed.settings.get("redact") else text

    # the table

    def outcomes(self, claims: Claims) -> list[Outcome]:
        """What has become of each line, as the disk has it now."""
        hidden = self.sealed.settings.get("redact")
        found = []
        for key, line in self.lines.items():
            one = Outcome(line, CONCEPT if hidden else self.asked[line].concept)
            if self.is_done(key):
                report = outputs.read_report(self.output / key)
                one.status, one.reasons, one.output = report["verdict"], report["reasons"], key
            elif failure := claims.failure(key):
                one.status, one.reasons = "failed", [str(failure.get("reason"))]
                one.numeric = bool(failure.get("numeric"))
            found.append(one)
        return found

    def is_drawn(self, claims: Claims) -> bool:
        """Does the table have a verdict for every output, and "failed" for every other line?"""
        stored = {one["line"]: one["status"] for one in self._table()["requests"]}
        return all(
            stored.get(line, "") not in ("", "failed")
            if self.is_done(key)
            else stored.get(line) == "failed"
            for key, line in self.lines.items()
        )

    def draw(self, claims: Claims) -> None:
        staging.replace_file(self.output / TABLE, self._text(self.outcomes(claims)))

    def _text(self, outcomes: list[Outcome]) -> bytes:
        content: dict[str, Any] = {
            "format": FORMAT,
            "mode": "independent",
            "of": len(self.lines),
            "forgotten": sum(o.status == "forgotten" for o in outcomes),
            "requests": [vars(outcome) for outcome in outcomes],
        }
        content[manifest.SEAL] = manifest.seal(content)
        text = json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
        return text.encode("utf-8", "backslashreplace")

    def _table(self) -> dict[str, Any]:
        path = self.output / TABLE
        found = read_json(path, what=str(path), remedy="choose another --output", shape=SHAPE)
        if found.get("format") != FORMAT or "requests" not in found:
            raise BadInput(f"{path} is not a table of requests: choose another --output.")
        return dict(found)
