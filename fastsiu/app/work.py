"""What the worker process does: one command after another, on one loaded model.

A command is (name of a method of `Work`, its arguments). Its last event is ("result", value) or
("refused", sentence). Events before that are ("stage", text), ("note", sentence), ("step", (fields
of a step, most steps)) and ("look", (step, p_name, retained)). All values are plain numbers and
texts, so the server can read them without torch.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL.Image import Image

from .. import output as outputs
from .. import session
from ..driver import Sealed, report_of, write
from ..evaluate.held_out import decide
from ..guards.failure import places
from ..images import load_image
from ..manifest import KEY
from ..model import adapter, adapter_files, ask, vlm
from ..model.memory import Layout, budget
from ..report.summary import standing
from ..report.words import MEASURES, REMAINS
from ..request import BadInput, NumericFailure, OutOfMemory, Recipe, Request
from ..samples.beside import Prepared
from ..settings import (
    ModelRef,
    RecipeChoice,
    ReportOptions,
    Settings,
    choose_layout,
    choose_recipe,
    deciding,
    load,
)
from ..show.samples import explained, lesson_examples
from ..step.look import Look
from ..text.toml import string
from ..train import Step
from .job import Asked

SHOWN = 200  # most samples that are sent to the page


def serve(connection: Connection, settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Does commands until the other end is closed."""
    work = Work(lambda kind, value: connection.send((kind, value)), settings, recipe)
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        connection.send(_done(getattr(work, command), arguments))


def _done(command: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "result", command(*arguments)
    except (BadInput, NumericFailure, OutOfMemory) as error:
        return "refused", str(error)
    except Exception as error:  # any: the page says that it happened, and the terminal where
        print(*places(error), sep="\n", file=sys.stderr)
        return "refused", (
            f"FastSIU failed ({type(error).__name__}): please report the lines in the terminal "
            "that the app was started from."
        )


class Work:
    """A loaded model, and what was prepared on it.

    tell:     gets the events
    settings: keywords of `settings.Settings`
    recipe:   fields of `Recipe`
    """

    def __init__(
        self,
        tell: Callable[[str, Any], None],
        settings: Mapping[str, Any],
        recipe: Mapping[str, Any],
    ) -> None:
        self.settings, self.choice = Settings(**settings), RecipeChoice(changes=recipe)
        self.listener = session.Listener(
            stage=lambda text: tell("stage", text),
            note=lambda text: tell("note", text),
            step=lambda step, ceiling: tell("step", (_plain(step), ceiling)),
            look=lambda step, look: tell("look", (step, *_seen(look))),
        )
        self.loaded: vlm.VLM | None = None
        self.layout = Layout()
        self.files: tuple[Any, ...] = ()  # of the loaded model's directory, as they were then
        self.weights: dict[str, str] | None = None  # their SHA-256, by name
        self.planned = 0  # pixels of the largest picture that the layout is for
        self.prepared: tuple[Asked, Prepared] | None = None
        self.trained: Path | None = None  # the output whose adapter is on
        self.seconds: dict[str, float] = {}

    def look(self, asked: Asked) -> list[tuple[str, str, bool]]:
        """The questions whom the picture shows, the untouched model's answers, and whether each
        names the concept."""
        request, recipe = _request(asked), self._recipe(asked)[0]
        picture = load_image(asked.picture)
        loaded = self._model(asked, recipe, picture)
        with vlm.threads(loaded):
            self.listener.stage("Asking the model who this is")
            scene = session.introduce(loaded, request, recipe, picture)
            said = session.who_is_it(scene)
        return [(q, answer, bool(scene.concept.named_in(answer))) for q, answer in said]

    def gather(self, asked: Asked) -> dict[str, Any]:
        """The samples, as `show.samples.explained` has them."""
        request, recipe = _request(asked), self._recipe(asked)[0]
        picture = load_image(asked.picture)
        loaded = self._model(asked, recipe, picture)
        self.prepared, self.seconds = None, {}
        with vlm.threads(loaded):
            prepared = session.prepare(
                loaded,
                request,
                recipe,
                picture,
                listener=self.listener,
                seconds=self.seconds,
            )
        self.prepared = asked, prepared
        mask = prepared.corpus.mask
        rows = [
            (one.about, one.question, [tuple(piece) for piece in one.answer])
            for one in explained(prepared.scene, prepared.corpus)
        ]
        return {
            "rows": rows[:: max(1, -(-len(rows) // SHOWN))],
            "count": len(rows),
            "tokens": sorted(set(mask.masked.values())),
            "warning": mask.warning,
            "protected": list(prepared.scene.neighbours),
            "lessons": list(lesson_examples(prepared.lessons)),
        }

    def train(self, asked: Asked, destination: Path, archive: Path) -> dict[str, Any]:
        """Trains on the samples and returns the verdict.

        destination: directory for the output
        archive:     file to pack the output into, without its key
        """
        if self.prepared is None or self.prepared[0] != asked:
            self.gather(asked)
        assert self.prepared is not None and self.loaded is not None  # by the line before
        prepared, loaded = self.prepared[1], self.loaded
        recipe, origins = self._recipe(asked)
        model, shown = ModelRef(asked.model or None), ReportOptions(asked.redact)
        decides = {"dtype": self.settings.dtype} | deciding(self.layout) | shown.deciding
        digest = outputs.request_digest(
            prepared.request, recipe, model.name, None, weights=self.weights, **decides
        )
        with vlm.threads(loaded):
            samples, history = session.learn(
                loaded, [prepared], recipe, listener=self.listener, seconds=self.seconds
            )
            trained = session.Trained(
                prepared.scene, samples, history, prepared.dreamed, self.seconds
            )
            self.listener.stage("Asking again, with the adapter on and off")
            with session.timed(self.seconds, "verdict"):
                verdict, answers = decide(trained.scene)
        report = report_of(prepared.request, recipe, model.name, verdict, answers, trained)
        self.listener.stage("Writing adapter and report")
        run = run_file(asked, self.settings) if self.choice.is_default else ""
        sealed = Sealed(recipe, origins, digest, self.weights, decides, run)
        write(destination, loaded, [prepared.request], [report], sealed)
        _pack(destination, archive)
        self.trained = destination
        return {
            "forgotten": verdict.forgotten,
            "standing": standing(report),
            "reasons": verdict.reasons,
            "measures": [
                (heading, question, report["before"].get(kind), report["after"].get(kind))
                for kind, (heading, _, question) in MEASURES.items()
            ],
            "remains": REMAINS,
            "caveats": report["caveats"],
            "seconds": sum(self.seconds.values()),
        }

    def ask(
        self, asked: Asked, destination: Path, question: str, picture: Path | None
    ) -> tuple[str, str]:
        """The untouched and the unlearned model's answer.

        destination: holds the adapter, which this process may not have trained itself
        """
        image = None if picture is None else load_image(picture)
        if self.loaded is None or self.trained != destination:
            loaded = self._model(asked, self._recipe(asked)[0], load_image(asked.picture))
            adapter_files.check_belongs(destination, loaded.name, loaded.revision, self.weights)
            adapter.load(loaded, destination)
            self.trained = destination
        else:
            loaded = self.loaded
        self.listener.stage("Asking both models")

        def answer() -> str:
            seen = None if image is None else loaded.picture(image)
            return ask.answers(loaded, [(question, seen)])[0]

        with vlm.threads(loaded):
            with adapter.teacher(loaded):
                before = answer()
            return before, answer()

    def _recipe(self, asked: Asked) -> tuple[Recipe, dict[str, str]]:
        return choose_recipe(ModelRef(asked.model or None).name, self.choice)

    def _model(self, asked: Asked, recipe: Recipe, picture: Image) -> vlm.VLM:
        """The untouched model, loaded unless it is already: from the same files and, under a memory
        limit, for pictures as large as this one."""
        model = ModelRef(asked.model or None)
        files, pixels = _files(model), picture.width * picture.height
        self.trained = None
        if self.loaded is not None:
            adapter.detach(self.loaded)
            fits = not self.settings.limited or pixels <= self.planned
            if fits and (self.loaded.name, self.files) == (model.name, files):
                return self.loaded
        self.loaded = self.prepared = None  # there may be no room for two
        self.layout = choose_layout(model, self.settings, recipe, picture, self.listener)
        room = budget(self.layout, recipe.batch_size, self.settings.limited)
        self.weights = outputs.digest_model(model.name) if model.is_directory else None
        self.loaded = load(model, self.layout, room, self.listener)
        self.files, self.planned = files, pixels
        return self.loaded


def _files(model: ModelRef) -> tuple[Any, ...]:
    """What changes with the files of a model's directory; () for a hub model: its commit stays."""
    if not model.is_directory:
        return ()
    try:
        files = [path for path in sorted(Path(model.name).iterdir()) if path.is_file()]
        return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    except OSError:  # whoever loads it says so
        return ()


def _request(asked: Asked) -> Request:
    return Request(asked.concept, asked.picture, asked.aliases, kind=asked.kind)


def run_file(asked: Asked, settings: Settings) -> str:
    """The text of run.toml: the command that repeats the training. It lacks the picture, whose file
    here is removed, and where the output is redacted the names and the path of a model."""
    model = ModelRef(asked.model or None)
    private, told = {"concept": string(asked.concept)}, dict[str, str]()
    if asked.aliases:
        private["alias"] = f"[{', '.join(map(string, asked.aliases))}]"
    if asked.model and model.is_directory:
        private["model"] = string(os.path.abspath(model.name))
    elif asked.model:
        told["model"] = string(model.name)
    for key, value in (("kind", asked.kind), ("device", settings.device)):
        if value is not None:
            told[key] = string(value)
    if settings.memory is not None:
        told["memory"] = repr(settings.memory)
    lines = ["# Left out, since it came through a browser: image.", 'verb = "unlearn"']
    if asked.redact:
        told["redact"] = "true"
        lines.insert(0, f"# Left out, since the output is redacted: {', '.join(private)}.")
    else:
        told = private | told
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in told.items())]) + "\n"


def _plain(step: Step) -> dict[str, float]:
    return asdict(step)


def _seen(look: Look) -> tuple[float, float]:
    return look.p_name, look.retained


def _pack(directory: Path, archive: Path) -> None:
    """Packs an output, except the key, which could tell whose picture was used."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(directory.rglob("*")):
            if path.is_file() and path.name != KEY:
                packed.write(path, path.relative_to(directory).as_posix())
