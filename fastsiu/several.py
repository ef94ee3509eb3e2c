"""Several requests in one load, from a JSONL file: one after another, or all at once.

sequence   each request goes on training the adapter of those before it, and what made them forget is trained on again. Every
           request has an output of its own, DIR/001, DIR/002, ...: an adapter that forgets everything up to there.
joint      one training on all of them, one adapter: DIR/joint, with a report for each request.

After each training everything forgotten so far is asked again: DIR/matrix.json has who is still forgotten, and the order in
which it happened, from which an interrupted run goes on. A request that fails costs the others nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from . import adapter, ask, driver, plan, vlm
from . import images as pictures_in
from . import output as outputs
from .concept import Concept
from .driver import Listener, Prepared
from .facets.held_out import examine, questions
from .request import BadInput, NumericFailure, Recipe, Request
from .verdict import EFFICACY

Mode = Literal["sequence", "joint"]
MATRIX = "matrix.json"
PATHS = ("image", "images", "retain", "data")


@dataclass
class Outcome:
    """What became of one line. status: "forgotten", "not forgotten" or "failed", with the reasons; output: where, if it is."""

    line: int
    concept: str
    status: str = ""
    reasons: list[str] = field(default_factory=list)
    output: str | None = None


@dataclass
class Several:
    """What `unlearn_several` returns.

    outcomes: one a request, in the file's order
    matrix:   one row a training, in the order in which they happened: {"after": lines trained so far, "named": {line: share}},
              the share of answers about that line's picture, its held-out transforms and wordings, that still name it
    """

    outcomes: list[Outcome]
    matrix: list[dict[str, Any]]
    output: Path
    resumed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {"forgotten": self.forgotten, "requests": [vars(o) for o in self.outcomes], "matrix": self.matrix}

    @property
    def forgotten(self) -> bool:
        """Every request, at its own verdict and still at the end."""
        last = self.matrix[-1]["named"] if self.matrix else {}
        gone = all(last.get(str(o.line), 1.0) <= 1 - EFFICACY for o in self.outcomes)
        return gone and all(o.status == "forgotten" for o in self.outcomes)


def read_requests(path: Path) -> list[tuple[int, Request]]:
    """(line number, request) of each line: an object with "image" and "concept", and the other fields of `Request` as needed.

    Paths count from the file's own directory. Raises BadInput with the line's number.
    """
    if not path.is_file():
        raise BadInput(f"There is no file {path}: give a JSONL file with one request a line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON strings may hold U+2028
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: give a JSONL file with one request a line.") from error
    found: list[tuple[int, Request]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = _request(json.loads(line), path.parent)
        except (ValueError, TypeError) as error:
            text = str(error).rstrip(".")
            raise BadInput(f"{path}, line {number}: {text}. A line is an object with 'image' and 'concept'.") from error
        for earlier, other in found:
            if Concept(other.concept, other.aliases).named_in(request.concept, include_parts=False):
                raise BadInput(f"{path}, line {number}: {request.concept} is asked for on line {earlier} already: remove one.")
        found.append((number, request))
    if not found:
        raise BadInput(f"{path} holds no request: write one JSON object with 'image' and 'concept' a line.")
    return found


def _request(record: Any, base: Path) -> Request:
    known = {f.name for f in fields(Request)}
    if not isinstance(record, dict) or not all(isinstance(record.get(k), str) for k in ("image", "concept")):
        raise ValueError("'image' and 'concept' must be strings")
    if unknown := sorted(set(record) - known):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(sorted(known))}")
    values: dict[str, Any] = {"concept": record["concept"].strip()}
    for key in PATHS:
        if record.get(key) is not None:
            values[key] = base / record[key]
    for key in ("aliases", "protect"):
        names = record.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key} must be a list of names")
        values[key] = tuple(names)
    return Request(**values)


def unlearn_several(file: str | Path, *, mode: Mode = "sequence", output: str | Path | None = None,
                    model: str | Path | None = None, revision: str | None = None, preset: str = "default",
                    device: str | None = None, dtype: str = "auto", listener: Listener | None = None,
                    quantize: str | None = None, attention: str | None = None, memory: float | None = None,
                    checkpointing: bool | None = None, micro_batch: int | None = None, optimizer: str | None = None,
                    **overrides: Any) -> Several:  # fmt: skip
    """Makes a model forget everything that a file asks for. Options as in `driver.unlearn`; output: the directory of all outputs.

    Run again, it does what is missing. Raises BadInput where the file, a picture or the output cannot be used: then nothing is
    loaded. What fails later, for one request, is that request's outcome.
    """
    listener = listener or Listener()
    if mode not in ("sequence", "joint"):
        raise BadInput(f"The mode {mode!r} is unknown: choose 'sequence' or 'joint'.")
    asked = dict(read_requests(Path(file)))
    for number, request in asked.items():
        try:
            pictures_in.load_image(request.image)
            for directory in (request.images, request.retain):
                driver.shown(directory)
        except BadInput as error:
            raise BadInput(f"{file}, line {number}: {error}") from error
    name = str(driver.EMBEDDED if model is None else model)
    recipe, origins = driver.choose_recipe(name, preset, overrides)
    weights = outputs.digest_model(name) if Path(name).is_dir() else None
    first = pictures_in.load_image(next(iter(asked.values())).image)
    chosen = driver.choose_settings(
        name, memory, recipe, first, listener, revision=revision, device=device, dtype=dtype, quantize=quantize,
        attention=attention, checkpointing=checkpointing, micro_batch=micro_batch, optimizer=optimizer,
    )  # fmt: skip
    destination = Path(output) if output is not None else outputs.random_directory()
    settings = {"dtype": dtype, "mode": mode} | driver.deciding(chosen)
    job = _Job(destination, mode, asked, name, revision, recipe, origins, weights, settings, listener)
    done = job.resume()
    todo = [line for line in asked if line not in done]
    if todo or len(job.matrix) < (len(done) if mode == "sequence" else 1):
        listener.stage("Loading the model")
        loaded = vlm.load(name, revision=revision, device=device, dtype=dtype, quantize=chosen.quantize,
                          attention=chosen.attention, budget=plan.budget(chosen, recipe.batch_size))  # fmt: skip
        try:
            with vlm.threads(loaded):
                job.run(loaded, done, todo)
        finally:
            adapter.detach(loaded)
    return Several([job.outcomes[line] for line in asked], job.matrix, job.output, len(done))


@dataclass
class _Job:
    output: Path
    mode: Mode
    asked: dict[int, Request]
    name: str
    revision: str | None
    recipe: Recipe
    origins: dict[str, str]
    weights: dict[str, str] | None
    settings: dict[str, Any]  # what else decides the result
    listener: Listener
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    put: dict[int, list[ask.Question]] = field(default_factory=dict)  # what the matrix asks about each line's picture
    matrix: list[dict[str, Any]] = field(default_factory=list)

    def directory(self, line: int) -> Path:
        return self.output / (f"{line:03d}" if self.mode == "sequence" else "joint")

    def digest(self, lines: Sequence[int]) -> str:
        """Of the training that ends with the last of these lines: all before it, in their order, are part of it."""
        chain = ""
        for line in lines:
            chain = outputs.request_digest(self.asked[line], self.recipe, self.name, self.revision, weights=self.weights,
                                           before=chain, **self.settings)  # fmt: skip
        return chain

    def resume(self) -> list[int]:
        """The lines that are done, in the order in which they were trained. Raises BadInput for an output of other requests."""
        path = self.output / MATRIX
        self.outcomes = {line: Outcome(line, request.concept) for line, request in self.asked.items()}
        if not path.is_file():
            outputs.check_destination(self.output, "")  # absent or empty, or it raises
            return []
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            order = [int(line) for line in record["order"]]
            stored, matrix = {o["line"]: Outcome(**o) for o in record["requests"]}, list(record["matrix"])
            same = record["mode"] == self.mode and all(line in self.asked for line in order)
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} is damaged: choose another --output.") from error
        if not same:
            raise BadInput(f"{self.output} holds the results of other requests: choose another --output.")
        ends = [order] if self.mode == "joint" and order else [order[: i + 1] for i in range(len(order))]
        for lines in ends:  # raises where the directory holds anything but this
            if outputs.check_destination(self.directory(lines[-1]), self.digest(lines)) != "same":
                raise BadInput(f"{self.directory(lines[-1])} is missing: restore it, or choose another --output.")
        self.matrix = matrix
        if self.mode == "joint" and order:  # its one training is over: what failed before it is not in it
            self.outcomes |= stored
            return list(self.asked)
        self.outcomes |= {line: stored[line] for line in order}
        for line in self.asked:  # killed after the output and before the matrix: the output counts
            place = self.directory(line)
            if line not in order and place.exists() and outputs.check_destination(place, self.digest([*order, line])) == "same":
                report = json.loads((place / "report.json").read_text(encoding="utf-8"))
                outcome = replace(self.outcomes[line], status=report["verdict"], reasons=report["reasons"], output=place.name)
                self.outcomes[line] = outcome
                order.append(line)
        return order

    def save(self, order: Sequence[int]) -> None:
        content = {
            "mode": self.mode, "order": list(order), "matrix": self.matrix,
            "requests": [vars(self.outcomes[line]) for line in self.asked],
        }  # fmt: skip
        path = self.output / MATRIX
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, path)

    def run(self, loaded: vlm.VLM, done: list[int], todo: list[int]) -> None:
        order, seconds = list(done), {}
        earlier: list[Prepared] = []
        for line in done:  # the adapter remembers; what it was trained on is made again
            earlier.append(self.prepare(loaded, line, [one.scene.concept for one in earlier], seconds))
        self.output.mkdir(exist_ok=True)
        self.save(order)
        if self.mode == "joint":
            self.jointly(loaded, todo)
            return
        if done:
            adapter.load(loaded, self.directory(done[-1]), trainable=True)
            if self.matrix[-1:] == [] or self.matrix[-1]["after"] != done:
                self.look(loaded, dict(zip(done, earlier, strict=True)))
                self.save(order)
        for line in todo:
            before = adapter.state(loaded)
            seconds = {}
            try:
                self.say(line)
                one = self.prepare(loaded, line, [e.scene.concept for e in earlier], seconds)
                made, history = driver.learn(loaded, [one], self.recipe, earlier=earlier, listener=self.listener, seconds=seconds)
            except (BadInput, NumericFailure) as error:
                adapter.restore(loaded, before)
                self.outcomes[line] = replace(self.outcomes[line], status="failed", reasons=[str(error)])
                self.save(order)
                continue
            trained = driver.Trained(one.scene, made, history, one.dreamed, seconds)
            earlier.append(one)
            order.append(line)
            self.finish(loaded, line, trained, self.directory(line), self.digest(order))
            self.look(loaded, dict(zip(order, earlier, strict=True)))
            self.save(order)

    def jointly(self, loaded: vlm.VLM, todo: list[int]) -> None:
        ready: dict[int, Prepared] = {}
        seconds: dict[str, float] = {}
        for line in todo:
            others = [Concept(r.concept, r.aliases) for other, r in self.asked.items() if other != line]
            try:
                self.say(line)
                ready[line] = self.prepare(loaded, line, others, seconds)
            except BadInput as error:
                self.outcomes[line] = replace(self.outcomes[line], status="failed", reasons=[str(error)])
        if not ready:
            self.save([])
            return
        made, history = driver.learn(loaded, list(ready.values()), self.recipe, listener=self.listener, seconds=seconds)
        order, reports = list(ready), {}
        for line, one in ready.items():
            trained = driver.Trained(one.scene, made, history, one.dreamed, seconds)
            reports[line] = self.judge(line, trained)
        destination = self.directory(order[0])
        driver.write(destination, loaded, [self.asked[line] for line in order], list(reports.values()), self.recipe, self.origins,
                     self.digest(order), self.weights, self.settings)  # fmt: skip
        for line in order:
            self.outcomes[line].output = destination.name
        self.look(loaded, ready)
        self.save(order)

    def say(self, line: int) -> None:
        self.listener.note(f"Request {list(self.asked).index(line) + 1} of {len(self.asked)}: {self.asked[line].concept}")

    def prepare(self, loaded: vlm.VLM, line: int, others: Sequence[Concept], seconds: dict[str, float]) -> Prepared:
        request = self.asked[line]
        return driver.prepare(loaded, request, self.recipe, pictures_in.load_image(request.image), others=others,
                              listener=self.listener, seconds=seconds)  # fmt: skip

    def judge(self, line: int, trained: driver.Trained) -> dict[str, Any]:
        """The report of one request, whose outcome it settles."""
        request = self.asked[line]
        self.listener.stage("Asking again, with the adapter on and off")
        verdict, answers = examine(trained.scene, driver.shown(request.images), driver.shown(request.retain))
        status = "forgotten" if verdict.forgotten else "not forgotten"
        self.outcomes[line] = replace(self.outcomes[line], status=status, reasons=list(verdict.reasons))
        return driver.report_of(request, self.recipe, self.name, verdict, answers, trained)

    def finish(self, loaded: vlm.VLM, line: int, trained: driver.Trained, destination: Path, digest: str) -> None:
        report = self.judge(line, trained)
        driver.write(destination, loaded, [self.asked[line]], [report], self.recipe, self.origins, digest, self.weights,
                     self.settings)  # fmt: skip
        self.outcomes[line].output = destination.name

    def look(self, loaded: vlm.VLM, trained: dict[int, Prepared]) -> None:
        """A row of the matrix: everything trained so far is asked again."""
        self.listener.stage("Asking who is still forgotten")
        named = {}
        for line, one in trained.items():
            if line not in self.put or self.recipe.projector_lr > 0:  # a trained projector sees differently
                asked = [(q, picture[1]) for kind, q, picture in questions(one.scene) if kind == "efficacy" and picture]
                seen = {id(image): loaded.picture(image) for _, image in asked}
                self.put[line] = [(q, seen[id(image)]) for q, image in asked]
            said = ask.answers(loaded, self.put[line])
            named[str(line)] = sum(one.scene.concept.named_in(a) for a in said) / len(said)
        self.matrix.append({"after": list(trained), "named": named})
