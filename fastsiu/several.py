"""Several requests in one load, from a JSONL file: one after another, or all at once.

sequence   every request has an output of its own, DIR/001, DIR/002, ...: an adapter that forgets
           everything up to there, trained from nothing on all of it.
joint      one training on all of them, one adapter: DIR/joint, with a report for each request.

After each training everything forgotten so far is asked again: DIR/matrix.json has who is still
forgotten, and the order in which it happened, from which an interrupted run goes on. A request that
fails costs the others nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from . import driver, session, staging
from . import output as outputs
from .evaluate.held_out import decide
from .guards.strict_json import read_json
from .images import load_directory, load_image
from .model import adapter, ask, vlm
from .model.memory import budget
from .report.sentences import sentence
from .report.words import CONCEPT
from .request import BadInput, NumericFailure, OutOfMemory, Recipe, Request
from .request_file import read_requests
from .samples.kinds import DEFAULT, wordings
from .session import Listener, Prepared, Trained
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
from .text.concept import Concept, concept_of
from .transforms import variants
from .verdict import EFFICACY

Mode = Literal["sequence", "joint"]
MATRIX = "matrix.json"
# of one request; the others go on
FAILURES = (
    BadInput,
    NumericFailure,
    OutOfMemory,
    torch.OutOfMemoryError,
)
SHAPE = {
    "mode": str,
    "order": [int],
    "matrix": [{"after": [int], "named": {"*": float}}],
    "requests": [
        {"line": int, "concept": str, "status": str, "reasons": [str], "output": (str, None)}
    ],
}


@dataclass
class Outcome:
    """What became of one line. status: "forgotten", "not forgotten" or "failed", with the reasons;
    output: where, if it is."""

    line: int
    concept: str
    status: str = ""
    reasons: list[str] = field(default_factory=list)
    output: str | None = None


@dataclass
class Several:
    """What `unlearn_several` returns.

    outcomes: one a request, in the file's order
    matrix:   one row a training, in the order in which they happened: {"after": lines trained so
    far, "named": {line: share}},
              the share of answers about that line's picture, its held-out transforms and wordings,
              that still name it
    """

    outcomes: list[Outcome]
    matrix: list[dict[str, Any]]
    output: Path
    resumed: int = 0

    @property
    def exit_code(self) -> int:
        """0 all forgotten, 1 not, 2 where no request could even be trained."""
        return 0 if self.forgotten else 1 if any(o.output for o in self.outcomes) else 2

    def as_dict(self) -> dict[str, Any]:
        return {
            "forgotten": self.forgotten,
            "requests": [vars(o) for o in self.outcomes],
            "matrix": self.matrix,
        }

    @property
    def forgotten(self) -> bool:
        """Every request, at its own verdict and still at the end."""
        last = self.matrix[-1]["named"] if self.matrix else {}
        gone = all(last.get(str(o.line), 1.0) <= 1 - EFFICACY for o in self.outcomes)
        return gone and all(o.status == "forgotten" for o in self.outcomes)


def unlearn_several(
    file: str | Path,
    *,
    mode: Mode = "sequence",
    model: ModelRef = ModelRef(),
    recipe: RecipeChoice = RecipeChoice(),
    settings: Settings = Settings(),
    report: ReportOptions = ReportOptions(),
    output: str | Path | None = None,
    listener: Listener | None = None,
) -> Several:
    """Makes a model forget everything that a file asks for. Options as in `driver.unlearn`; output:
    the directory of all outputs.

    Run again, it does what is missing. Raises BadInput where the file, a picture or the output
    cannot be used: then nothing is loaded. What fails later, for one request, is that request's
    outcome.
    """
    listener = listener or Listener()
    outputs.check_shown(report.redact, report.embed_image)
    if mode not in ("sequence", "joint"):
        raise BadInput(f"The mode {mode!r} is unknown: choose 'sequence' or 'joint'.")
    asked = dict(read_requests(Path(file)))
    for number, request in asked.items():
        try:
            load_image(request.image)
            for directory in (request.images, request.retain):
                load_directory(directory)
        except BadInput as error:
            raise BadInput(f"{file}, line {number}: {error}") from error
    chosen, origins = choose_recipe(model.name, recipe, model.revision)
    weights = outputs.digest_model(model.name) if model.is_directory else None
    images = (load_image(request.image) for request in asked.values())
    largest = max(images, key=lambda image: image.width * image.height)
    layout = choose_layout(model, settings, chosen, largest, listener)
    destination = Path(output) if output is not None else outputs.random_directory()
    if output is None:
        listener.note(
            f"Writing to {destination}: name it with --output to go on after an interruption."
        )
    decides = {"dtype": settings.dtype, "mode": mode} | deciding(layout) | report.deciding
    job = _Job(destination, mode, asked, model, chosen, origins, weights, decides, listener)
    done = job.resume()
    todo = [line for line in asked if line not in done]
    if todo or len(job.matrix) < (len(done) if mode == "sequence" else 1):
        room = budget(layout, chosen.batch_size, settings.limited)
        loaded = load(model, layout, room, listener)
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
    model: ModelRef
    recipe: Recipe
    origins: dict[str, str]
    weights: dict[str, str] | None
    settings: dict[str, Any]  # what else decides the result
    listener: Listener
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    # what the matrix asks about each line's picture
    put: dict[int, list[ask.Question]] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)  # of each line's concept
    matrix: list[dict[str, Any]] = field(default_factory=list)

    def directory(self, line: int) -> Path:
        return self.output / (f"{line:03d}" if self.mode == "sequence" else "joint")

    def digest(self, lines: Sequence[int]) -> str:
        """Of the training that ends with the last of these lines: all before it, in their order,
        are part of it."""
        # unlike outputs of adapters that were trained on
        chain = "all anew" if self.mode == "sequence" else ""
        for line in lines:
            chain = outputs.request_digest(
                self.asked[line],
                self.recipe,
                self.model.name,
                self.model.revision,
                weights=self.weights,
                before=chain,
                **self.settings,
            )
        return chain

    def resume(self) -> list[int]:
        """The lines that are done, in the order in which they were trained. Raises BadInput for an
        output of other requests."""
        path = self.output / MATRIX
        self.outcomes = {
            line: Outcome(line, request.concept) for line, request in self.asked.items()
        }
        if not path.is_file():
            outputs.check_destination(self.output, "")  # absent or empty, or it raises
            return []
        staging.sweep(self.output)
        record = read_json(path, what=str(path), remedy="choose another --output", shape=SHAPE)
        try:
            order, self.matrix = [int(line) for line in record["order"]], list(record["matrix"])
            stored = {o["line"]: Outcome(**o) for o in record["requests"]}
            same = record["mode"] == self.mode and all(line in stored for line in order)
            if not all({"after", "named"} <= set(row) for row in self.matrix):
                raise KeyError("after")
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} is damaged: choose another --output.") from error
        if not same or not all(line in self.asked for line in order):
            raise BadInput(
                f"{self.output} holds the results of other requests, or the lines of the file "
                "have moved: "
                "choose another --output, or put them back."
            )
        return (
            self._resume_joint(order, stored)
            if self.mode == "joint"
            else self._resume_sequence(order, stored)
        )

    def _resume_joint(self, order: list[int], stored: dict[int, Outcome]) -> list[int]:
        # cut off before its one training was over
        if not order or not self.directory(order[0]).exists():
            return []
        if {line: o.concept for line, o in stored.items()} != {
            line: self.shown(o).concept for line, o in self.outcomes.items()
        }:
            raise BadInput(
                f"{self.output} holds a joint training of other lines, and nothing can be added "
                "to it: choose another "
                "--output."
            )
        outputs.check_destination(self.directory(order[0]), self.digest(order))
        self.outcomes |= {line: self.restored(one) for line, one in stored.items()}
        for number, line in enumerate(order, 1):
            folder = (
                self.directory(line) / f"{number:03d}" if len(order) > 1 else self.directory(line)
            )
            self._adopt(line, folder / "report.json")
        return order + [line for line in self.asked if line not in order]

    def _resume_sequence(self, order: list[int], stored: dict[int, Outcome]) -> list[int]:
        for i in range(len(order)):  # raises where the directory holds anything but this
            if (
                outputs.check_destination(self.directory(order[i]), self.digest(order[: i + 1]))
                != "same"
            ):
                raise BadInput(
                    f"{self.directory(order[i])} is missing: restore it, or choose another "
                    "--output."
                )
        self.outcomes |= {line: self.restored(stored[line]) for line in order}
        for line in order:
            self.kinds[line] = outputs.read_report(self.directory(line)).get("kind", DEFAULT)
        for line in self.asked:  # killed after the output and before the matrix: the output counts
            place = self.directory(line)
            if (
                line not in order
                and place.exists()
                and outputs.check_destination(place, self.digest([*order, line])) == "same"
            ):
                self._adopt(line, place / "report.json")
                order.append(line)
        return order

    def _adopt(self, line: int, report: Path) -> None:
        found, place = outputs.read_report(report.parent), self.directory(line).name
        self.outcomes[line] = replace(
            self.outcomes[line], status=found["verdict"], reasons=found["reasons"], output=place
        )
        self.kinds[line] = found.get("kind", DEFAULT)

    def shown(self, outcome: Outcome) -> Outcome:
        """As matrix.json has it: without names where none are to be written."""
        if not self.settings.get("redact"):
            return outcome
        return replace(
            outcome, concept=CONCEPT, reasons=[sentence(reason) for reason in outcome.reasons]
        )

    def restored(self, stored: Outcome) -> Outcome:
        return replace(stored, concept=self.asked[stored.line].concept)

    def save(self, order: Sequence[int]) -> None:
        content = {
            "mode": self.mode,
            "order": list(order),
            "matrix": self.matrix,
            "requests": [vars(self.shown(self.outcomes[line])) for line in self.asked],
        }
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        staging.replace_file(self.output / MATRIX, text.encode("utf-8", "backslashreplace"))

    def run(self, loaded: vlm.VLM, done: list[int], todo: list[int]) -> None:
        self.output.mkdir(mode=0o700, exist_ok=True)
        with staging.claim(self.output, MATRIX) as mine:
            if not mine:
                raise BadInput(
                    f"Another run is at work in {self.output}: wait for its end, or choose "
                    "another --output."
                )
            self._run(loaded, done, todo)

    def _run(self, loaded: vlm.VLM, done: list[int], todo: list[int]) -> None:
        if self.mode == "joint":
            self.jointly(loaded, done, todo)
            return
        order: list[int] = list(done)
        ready: list[Prepared] = []
        self.save(order)
        if done and (not self.matrix or self.matrix[-1]["after"] != done):
            adapter.load(loaded, self.directory(done[-1]))
            self.look(loaded, done)
            self.save(order)
        for line in done if todo else ():  # what was trained on is not stored
            ready.append(self.prepare(loaded, line, [one.scene.concept for one in ready], {}))
        for line in todo:
            seconds: dict[str, float] = {}
            try:
                self.say(line)
                one = self.prepare(
                    loaded, line, [before.scene.concept for before in ready], seconds
                )
                made, history = session.learn(
                    loaded, [*ready, one], self.recipe, listener=self.listener, seconds=seconds
                )
                report = self.judge(line, Trained(one.scene, made, history, one.dreamed, seconds))
            except FAILURES as error:
                self.fail(line, error)
                self.save(order)
                continue
            ready.append(one)
            order.append(line)
            self.write(loaded, order, [report], self.digest(order))
            self.look(loaded, order)
            self.save(order)

    def jointly(self, loaded: vlm.VLM, done: list[int], todo: list[int]) -> None:
        if not todo:  # killed between the output and the matrix
            order = [line for line in done if self.outcomes[line].output]
            adapter.load(loaded, self.directory(order[0]))
            self.look(loaded, order)
            self.save(order)
            return
        ready: dict[int, Prepared] = {}
        seconds: dict[str, float] = {}
        for line in todo:
            others = [concept_of(r) for other, r in self.asked.items() if other != line]
            try:
                self.say(line)
                ready[line] = self.prepare(loaded, line, others, seconds)
            except FAILURES as error:
                self.fail(line, error)
        order = list(ready)
        self.save(order)  # of which training the output will be, should nothing else be written
        if not ready:
            return
        made, history = session.learn(
            loaded, list(ready.values()), self.recipe, listener=self.listener, seconds=seconds
        )
        judged = [
            self.judge(n, Trained(o.scene, made, history, o.dreamed, seconds))
            for n, o in ready.items()
        ]
        self.write(loaded, order, judged, self.digest(order))
        self.look(loaded, order)
        self.save(order)

    def fail(self, line: int, error: BaseException) -> None:
        """Without the picture's path: matrix.json may be shown to others."""
        reason = str(error).split("\n")[0].replace(str(self.asked[line].image), "its picture")
        self.outcomes[line] = replace(self.outcomes[line], status="failed", reasons=[reason])

    def say(self, line: int) -> None:
        self.listener.note(
            f"Request {list(self.asked).index(line) + 1} of {len(self.asked)}: "
            f"{self.asked[line].concept}"
        )

    def prepare(
        self, loaded: vlm.VLM, line: int, others: Sequence[Concept], seconds: dict[str, float]
    ) -> Prepared:
        request = self.asked[line]
        prepared = session.prepare(
            loaded,
            request,
            self.recipe,
            load_image(request.image),
            others=others,
            listener=self.listener,
            seconds=seconds,
        )
        self.kinds[line] = prepared.scene.kind.name
        return prepared

    def judge(self, line: int, trained: Trained) -> dict[str, Any]:
        """The report of one request, whose outcome it settles."""
        request = self.asked[line]
        self.listener.stage("Asking again, with the adapter on and off")
        verdict, answers = decide(
            trained.scene, load_directory(request.images), load_directory(request.retain)
        )
        status = "forgotten" if verdict.forgotten else "not forgotten"
        self.outcomes[line] = replace(
            self.outcomes[line], status=status, reasons=list(verdict.reasons)
        )
        return driver.report_of(request, self.recipe, self.model.name, verdict, answers, trained)

    def write(
        self, loaded: vlm.VLM, order: Sequence[int], reports: Sequence[dict[str, Any]], digest: str
    ) -> None:
        """One output; its manifest lists the pictures of all requests that it was trained on."""
        place = self.directory(order[-1])
        requests = [self.asked[line] for line in order]
        driver.write(
            place,
            loaded,
            requests,
            reports,
            driver.Sealed(self.recipe, self.origins, digest, self.weights, self.settings),
        )
        for line in order[-len(reports) :]:
            self.outcomes[line].output = place.name

    def look(self, loaded: vlm.VLM, lines: Sequence[int]) -> None:
        """A row of the matrix: everything trained so far is asked again, in wordings and transforms
        that training never used."""
        self.listener.stage("Asking who is still forgotten")
        named = {}
        for line in lines:
            concept = concept_of(self.asked[line])
            # a trained projector sees differently
            if line not in self.put or self.recipe.projector_lr > 0:
                views = variants(
                    load_image(self.asked[line].image), self.recipe.seed, held_out=True
                )
                seen = [loaded.picture(image) for _, image in views]
                self.put[line] = [
                    (question, picture)
                    for picture in seen
                    for question in wordings(self.kinds[line])["who"]["held_out"]
                ]
            said = ask.answers(loaded, self.put[line])
            named[str(line)] = sum(concept.named_in(answer) for answer in said) / len(said)
        self.matrix.append({"after": list(lines), "named": named})
