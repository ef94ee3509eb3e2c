"""Several requests in one load, from a JSONL file: one after another, or all at once.

sequence   every request has an output of its own, DIR/001, DIR/002, ...: an adapter that forgets
           everything up to there, trained from nothing on all of it.
joint      one training on all of them, one adapter: DIR/joint, with a report for each request.

After each training everything forgotten so far is asked again: DIR/matrix.json has who is still
forgotten, and the order in which it happened, from which an interrupted run goes on. A request that
fails costs the others nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import driver, session
from . import output as outputs
from .disk.request_file import read_requests
from .disk.several_state import Mode, Outcome, State
from .evaluate.held_out import decide
from .guards.first_read import first_reads_count
from .images import beside, load_image
from .model import adapter, ask, vlm
from .model.memory import budget
from .pictures.transforms import variants
from .request import BadInput
from .samples.beside import Prepared
from .samples.kinds import wordings
from .session import Listener, Trained
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
from .verdict import EFFICACY
from .workers.joining import FAILURES


@dataclass
class Several:
    """What `unlearn_several` returns.

    outcomes: one a request, in the file's order
    printed:  the same as they may be printed; redacted, without names
    matrix:   one row a training, in the order in which they happened: {"after": lines trained so
              far, "named": {line: share}}. The share is of answers about that line's picture, its
              held-out transforms and wordings: those that still name it
    """

    outcomes: list[Outcome]
    matrix: list[dict[str, Any]]
    output: Path
    resumed: int = 0
    printed: list[Outcome] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 all forgotten, 1 not, 2 where no request could even be trained."""
        return 0 if self.forgotten else 1 if any(o.output for o in self.outcomes) else 2

    def as_dict(self) -> dict[str, Any]:
        return {
            "forgotten": self.forgotten,
            "requests": [vars(o) for o in self.printed],
            "matrix": self.matrix,
        }

    @property
    def forgotten(self) -> bool:
        """Every request, at its own verdict and still at the end."""
        last = self.matrix[-1]["named"] if self.matrix else {}
        gone = all(last.get(str(o.line), 1.0) <= 1 - EFFICACY for o in self.outcomes)
        return gone and all(o.status == "forgotten" for o in self.outcomes)


@first_reads_count()
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
            driver.check_given(request)
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
    state = State(destination, mode, asked, model, chosen, weights, decides)
    done = state.resume()
    todo = [line for line in asked if line not in done]
    if todo or len(state.matrix) < (len(done) if mode == "sequence" else 1):
        room = budget(layout, chosen.batch_size, settings.limited)
        loaded = load(model, layout, room, listener)
        try:
            with vlm.threads(loaded), state.alone():
                _Job(state, loaded, origins, listener, report.run).run(done, todo)
        finally:
            adapter.detach(loaded)
    outcomes = [state.outcomes[line] for line in asked]
    printed = list(map(state.shown, outcomes))
    return Several(outcomes, state.matrix, state.output, len(done), printed)


def held_out(loaded: vlm.VLM, image: Path, seed: int, kind: str) -> list[ask.Question]:
    """What the matrix asks about a picture: wordings and transforms that training never used."""
    seen = [loaded.picture(view) for _, view in variants(load_image(image), seed, held_out=True)]
    asked = wordings(kind)["who"]["held_out"]
    return [(question, picture) for picture in seen for question in asked]


@dataclass
class _Job:
    """Trains what is missing, on a model that is loaded.

    origins: where each hyper-parameter came from
    repeats: the text of run.toml; "" for none
    put:     what the matrix asks about each line's picture
    """

    state: State
    loaded: vlm.VLM
    origins: dict[str, str]
    listener: Listener
    repeats: str = ""
    put: dict[int, list[ask.Question]] = field(default_factory=dict)

    def run(self, done: list[int], todo: list[int]) -> None:
        if self.state.mode == "joint":
            self.jointly(done, todo)
            return
        order: list[int] = list(done)
        ready: list[Prepared] = []
        self.state.save(order)
        if done and (not self.state.matrix or self.state.matrix[-1]["after"] != done):
            adapter.load(self.loaded, self.state.directory(done[-1]))
            self.look(done)
            self.state.save(order)
        for line in done if todo else ():  # what was trained on is not stored
            ready.append(self.prepare(line, [one.scene.concept for one in ready], {}))
        for line in todo:
            seconds: dict[str, float] = {}
            try:
                self.say(line)
                one = self.prepare(line, [before.scene.concept for before in ready], seconds)
                made, history = session.learn(
                    self.loaded,
                    [*ready, one],
                    self.state.recipe,
                    listener=self.listener,
                    seconds=seconds,
                )
                report = self.judge(line, Trained(one.scene, made, history, one.dreamed, seconds))
            except FAILURES as error:
                self.state.fail(line, error)
                self.state.save(order)
                continue
            ready.append(one)
            order.append(line)
            self.write(order, [report], self.state.digest(order))
            self.look(order)
            self.state.save(order)

    def jointly(self, done: list[int], todo: list[int]) -> None:
        if not todo:  # killed between the output and the matrix
            order = [line for line in done if self.state.outcomes[line].output]
            adapter.load(self.loaded, self.state.directory(order[0]))
            self.look(order)
            self.state.save(order)
            return
        ready: dict[int, Prepared] = {}
        seconds: dict[str, float] = {}
        for line in todo:
            others = [concept_of(r) for other, r in self.state.asked.items() if other != line]
            try:
                self.say(line)
                ready[line] = self.prepare(line, others, seconds)
            except FAILURES as error:
                self.state.fail(line, error)
        order = list(ready)
        # Written before the training: if the run is killed, this says what an output was trained
        # on.
        self.state.save(order)
        if not ready:
            return
        made, history = session.learn(
            self.loaded,
            list(ready.values()),
            self.state.recipe,
            listener=self.listener,
            seconds=seconds,
        )
        judged = [
            self.judge(n, Trained(o.scene, made, history, o.dreamed, seconds))
            for n, o in ready.items()
        ]
        self.write(order, judged, self.state.digest(order))
        self.look(order)
        self.state.save(order)

    def say(self, line: int) -> None:
        self.listener.note(
            f"Request {list(self.state.asked).index(line) + 1} of {len(self.state.asked)}: "
            f"{self.state.shown(self.state.outcomes[line]).concept}"
        )

    def prepare(self, line: int, others: Sequence[Concept], seconds: dict[str, float]) -> Prepared:
        request = self.state.asked[line]
        prepared = session.prepare(
            self.loaded,
            request,
            self.state.recipe,
            load_image(request.image),
            others=others,
            listener=self.listener,
            seconds=seconds,
        )
        self.state.kinds[line] = prepared.scene.kind.name
        return prepared

    def judge(self, line: int, trained: Trained) -> dict[str, Any]:
        """The report of one request, whose outcome it settles."""
        request = self.state.asked[line]
        self.listener.stage("Asking again, with the adapter on and off")
        given = beside(request)
        verdict, answers = decide(trained.scene, given.more, given.rest)
        self.state.decided(line, verdict.forgotten, verdict.reasons)
        return driver.report_of(
            request, self.state.recipe, self.state.model.name, verdict, answers, trained
        )

    def write(self, order: Sequence[int], reports: Sequence[dict[str, Any]], digest: str) -> None:
        """One output; its manifest lists the pictures of all requests that it was trained on."""
        place = self.state.directory(order[-1])
        requests = [self.state.asked[line] for line in order]
        driver.write(
            place,
            self.loaded,
            requests,
            reports,
            driver.Sealed(
                self.state.recipe,
                self.origins,
                digest,
                self.state.weights,
                self.state.settings,
                self.repeats,
            ),
        )
        for line in order[-len(reports) :]:
            self.state.outcomes[line].output = place.name

    def look(self, lines: Sequence[int]) -> None:
        """A row of the matrix: everything trained so far is asked again, in wordings and transforms
        that training never used."""
        self.listener.stage("Asking who is still forgotten")
        named = {}
        for line in lines:
            concept = concept_of(self.state.asked[line])
            # a trained projector sees differently
            if line not in self.put or self.state.recipe.sees_anew:
                image, kind = self.state.asked[line].image, self.state.kinds[line]
                self.put[line] = held_out(self.loaded, image, self.state.recipe.seed, kind)
            said = ask.answers(self.loaded, self.put[line])
            named[str(line)] = sum(concept.named_in(answer) for answer in said) / len(said)
        self.state.matrix.append({"after": list(lines), "named": named})
