"""The story of one request: load, check, samples, teacher, train, verdict, save.

`unlearn` tells it from beginning to end. `forget` is its middle for a model that is already loaded, and leaves the
adapter on so that the caller can look before it is taken off.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from . import adapter, ask, corpus, train, vlm
from . import images as pictures_in
from . import output as outputs
from .concept import Concept
from .facets import dreams, targets
from .facets.held_out import Shown, examine
from .objectives import Objective, siu
from .request import PAPER, BadInput, Recipe, Request, Sample
from .verdict import Answer, Verdict

MODEL_RECIPE = "fastsiu.json"  # what a model's own directory may say about the hyper-parameters it needs
EMBEDDED = Path(__file__).parent / "demo" / "model"  # the path alone: what draws and trains it is the command line's
CAVEAT = "The adapter can be dropped; only merged weights forget."
DEMO_NOTE = "No --model was given: this is the embedded demo model, which knows only its own fictional creatures."


@dataclass
class Listener:
    """Where progress goes. Every field may be left as it is: then nothing is said."""

    stage: Callable[[str], None] = lambda text: None
    step: Callable[[train.Step, int], None] = lambda step, ceiling: None


@dataclass
class Trained:
    """What `forget` made: the adapter is on the model, and this is how it came to be."""

    scene: targets.Scene
    corpus: corpus.Corpus
    history: list[train.Step]
    dreamed: list[dict[str, Any]]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Result:
    """What `unlearn` returns. `forgotten` is the verdict; `report` is report.json; `output` the directory written."""

    forgotten: bool
    reasons: list[str]
    report: dict[str, Any]
    output: Path | None
    repeated: bool = False
    notes: list[str] = field(default_factory=list)


def unlearn(image: str | Path, concept: str, *, model: str | Path | None = None, revision: str | None = None,
            output: str | Path | None = None, aliases: tuple[str, ...] = (), protect: tuple[str, ...] = (),
            images: str | Path | None = None, retain: str | Path | None = None, data: str | Path | None = None,
            preset: str = "default", device: str | None = None, dtype: str = "auto", listener: Listener | None = None,
            **overrides: Any) -> Result:  # fmt: skip
    """Makes a model forget how one concept looks, from one picture.

    overrides: fields of `Recipe`; what is left out comes from the preset, then the model's own directory, then `Recipe`.
    Writes the adapter, report and manifest to `output` (default fastsiu-<random>/) in one transaction.

    Raises BadInput (the input cannot be used; nothing is written) and NumericFailure (training diverged).
    """
    listener = listener or Listener()
    request = Request(concept.strip(), Path(image), tuple(aliases), tuple(protect), *map(_path, (images, retain, data)))
    name = str(EMBEDDED if model is None else model)
    recipe, origins = choose_recipe(name, preset, overrides)
    picture = pictures_in.load_image(request.image)
    destination = Path(output) if output is not None else outputs.random_directory()
    weights = outputs.digest_model(name) if Path(name).is_dir() else None
    digest = outputs.request_digest(request, recipe, name, revision, weights=weights, dtype=dtype)
    if outputs.check_destination(destination, digest) == "same":
        return _repeat(destination)
    more, rest = _shown(request.images), _shown(request.retain)  # a damaged picture is told now, not after the training

    seconds: dict[str, float] = {}
    listener.stage("Loading the model")
    with _timed(seconds, "load"):
        loaded = vlm.load(name, revision=revision, device=device, dtype=dtype)
    try:
        trained = forget(loaded, request, recipe, picture, listener=listener, seconds=seconds)
        listener.stage("Asking again, with the adapter on and off")
        with _timed(seconds, "verdict"):
            verdict, answers = examine(trained.scene, more, rest)
        report = _report(request, recipe, name, verdict, answers, trained)
        pictures = {"image": request.image} | {f"images/{p.name}": p for p in _listed(request.images)}
        pictures |= {f"retain/{p.name}": p for p in _listed(request.retain)}
        transaction = outputs.Transaction(destination)
        with transaction as staging:
            adapter.save(loaded, staging)
            outputs.write_reports(staging, report)
            transaction.commit(outputs.manifest(
                recipe=recipe, origins=origins, model_id=report["model"], revision=loaded.revision, masks=report["masks"],
                weights=weights or outputs.digest_model(_snapshot(loaded)), digest=digest, key=transaction.key,
                pictures={label: pictures_in.read_bytes(path) for label, path in pictures.items()}, settings={"dtype": dtype},
            ))  # fmt: skip
    finally:
        adapter.detach(loaded)
    return Result(verdict.forgotten, verdict.reasons, report, destination, notes=report["caveats"])


def forget(loaded: vlm.VLM, request: Request, recipe: Recipe, picture: Any, *, objective: Objective = siu,
           listener: Listener | None = None, seconds: dict[str, float] | None = None) -> Trained:  # fmt: skip
    """Samples, teacher and training on a loaded model; `picture` is the RGB image. The adapter is on afterwards."""
    listener, seconds = listener or Listener(), seconds if seconds is not None else {}
    scene = targets.Scene(loaded, Concept(request.concept, request.aliases), recipe, [loaded.picture(picture)])
    check_known(scene, request)

    samples, dreamed = gather(scene, request, listener, seconds)
    listener.stage("Running the teacher")
    with _timed(seconds, "teacher"):
        made = corpus.build(loaded, scene.concept, samples, scene.pictures, recipe)
        adapter.attach(loaded, recipe)
        corpus.run_teacher(loaded, made, recipe)
    listener.stage("Training")
    with _timed(seconds, "train"):
        history = train.fit(loaded, made, objective, recipe, train.probe_for(scene, made),
                            lambda step: listener.step(step, recipe.steps))  # fmt: skip
    return Trained(scene, made, history, dreamed, seconds)


def samples_for(image: str | Path, concept: str, *, model: str | Path | None = None, revision: str | None = None,
                aliases: tuple[str, ...] = (), protect: tuple[str, ...] = (), retain: str | Path | None = None,
                data: str | Path | None = None, preset: str = "default", device: str | None = None, dtype: str = "auto",
                **overrides: Any) -> tuple[targets.Scene, corpus.Corpus]:  # fmt: skip
    """The samples and masks that `unlearn` would train on, with nothing trained."""
    request = Request(concept.strip(), Path(image), aliases, protect, None, _path(retain), _path(data))
    name = str(EMBEDDED if model is None else model)
    recipe, _ = choose_recipe(name, preset, overrides)
    picture = pictures_in.load_image(request.image)
    loaded = vlm.load(name, revision=revision, device=device, dtype=dtype)
    scene = targets.Scene(loaded, Concept(request.concept, request.aliases), recipe, [loaded.picture(picture)])
    check_known(scene, request)
    samples, _ = gather(scene, request, Listener(), {})
    return scene, corpus.build(loaded, scene.concept, samples, scene.pictures, recipe)


def interview(questions: Sequence[str], *, model: str | Path | None = None, adapter_dir: str | Path | None = None,
              image: str | Path | None = None, compare: bool = False, revision: str | None = None, device: str | None = None,
              dtype: str = "auto", max_new_tokens: int = 64) -> list[dict[str, str]]:  # fmt: skip
    """Greedy answers, one record a question: `answer`, or `before` and `after` with `compare`."""
    picture = pictures_in.load_image(Path(image)) if image is not None else None
    loaded = vlm.load(str(EMBEDDED if model is None else model), revision=revision, device=device, dtype=dtype)

    def ask_all() -> list[str]:
        shown = None if picture is None else loaded.picture(picture)
        return ask.answers(loaded, [(q, shown) for q in questions], max_new_tokens=max_new_tokens)

    before = ask_all() if compare or adapter_dir is None else []
    if adapter_dir is None:
        return [{"question": q, "answer": a} for q, a in zip(questions, before, strict=True)]
    adapter.load(loaded, Path(adapter_dir))
    after = ask_all()
    if not compare:
        return [{"question": q, "answer": a} for q, a in zip(questions, after, strict=True)]
    return [{"question": q, "before": b, "after": a} for q, b, a in zip(questions, before, after, strict=True)]


def check_known(scene: targets.Scene, request: Request) -> None:
    """Raises BadInput unless the untouched model names the concept in the picture: there would be nothing to forget."""
    words = targets.wordings()["who"]
    said = scene.ask(words["train"] + words["held_out"], 0)
    if not any(scene.concept.named_in(answer) for answer in said):
        raise BadInput(f"The model does not name {request.concept} in {request.image} (it says {said[0]!r}): "
                       "give a picture and a name that it recognises.")  # fmt: skip


def gather(scene: targets.Scene, request: Request, listener: Listener,
           seconds: dict[str, float]) -> tuple[list[Sample], list[dict[str, Any]]]:  # fmt: skip
    """The samples of all four targets, and what became of the dreams."""
    own = corpus.read_jsonl(request.data) if request.data else []
    for name in request.protect:
        if scene.concept.named_in(name, include_parts=False):
            raise BadInput(f"{name} cannot be forgotten and protected at once: leave it out of --protect.")
    listener.stage("Finding the names to protect")
    with _timed(seconds, "samples"):
        first = corpus.vocabulary_mask(scene.concept, scene.vlm.tokenizer, scene.vlm.head_weight.shape[0])
        scene.masked = frozenset(first.masked)
        scene.neighbours = list(request.protect) or targets.neighbours(scene)
    listener.stage(f"Dreaming {len(scene.neighbours)} neighbours")
    with _timed(seconds, "dreams"):
        transforms = pictures_in.variants(scene.pictures[0].image, scene.recipe.seed)[1:]
        scene.views = [scene.vlm.picture(view) for _, view in transforms]
        dreamed = _dream(scene)
    for path in _listed(request.retain):
        scene.pictures.append(scene.vlm.picture(pictures_in.load_image(path)))
        scene.named.append(None)
    listener.stage("Asking the teacher for the samples")
    with _timed(seconds, "samples"):
        samples = [sample for facet in targets.TARGETS for sample in facet(scene)]
    # A sample of the user's own takes the place of the built one with the same question about the same picture.
    taken = {(s.question, s.picture) for s in own}
    return [s for s in samples if (s.question, s.picture) not in taken] + own, dreamed


def choose_recipe(model: str, preset: str, overrides: dict[str, Any]) -> tuple[Recipe, dict[str, str]]:
    """The hyper-parameters and where each came from: command line, preset, the model's own directory, default."""
    known = {f.name for f in fields(Recipe)}
    given = {k: v for k, v in overrides.items() if v is not None}
    if unknown := sorted(set(given) - known):
        raise BadInput(f"There is no hyper-parameter {unknown[0]!r}: choose from {', '.join(sorted(known))}.")
    if preset not in ("default", "paper"):
        raise BadInput(f"The preset {preset!r} is unknown: choose 'default' or 'paper'.")
    own = _model_recipe(model) if preset == "default" else {}
    start = PAPER if preset == "paper" else Recipe()
    recipe = start.with_overrides(**own).with_overrides(**given)
    origin = {k: "preset paper" if preset == "paper" else "default" for k in known}
    origin |= dict.fromkeys(own, "model directory") | dict.fromkeys(given, "command line")
    return recipe, origin


def _model_recipe(model: str) -> dict[str, Any]:
    path = Path(model) / MODEL_RECIPE
    if not path.is_file():
        return {}
    known = {f.name for f in fields(Recipe)}
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8"))["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not a JSON object with an object 'recipe': mend it or remove it.") from error
    if unknown := sorted(set(values) - known):
        raise BadInput(f"{path} names an unknown hyper-parameter {unknown[0]!r}: remove it.")
    return values


def _dream(scene: targets.Scene) -> list[dict[str, Any]]:
    """Adds accepted dreams to the scene. A name that the teacher itself proposed but cannot see is not protected further."""
    if not scene.neighbours or not scene.recipe.dreams:
        return []
    made = dreams.dream(scene)
    for one in made:
        scene.pictures.append(one.picture)
        scene.named.append(one.name)
    accepted = Counter(one.name for one in made)
    return [{"name": n, "accepted": accepted[n], "of": scene.recipe.dreams} for n in scene.neighbours]


def _report(request: Request, recipe: Recipe, model: str, verdict: Verdict, answers: list[Answer],
            trained: Trained) -> dict[str, Any]:  # fmt: skip
    made = trained.corpus
    caveats = [CAVEAT]
    if made.mask.warning:
        caveats.append(made.mask.warning)
    if failed := [d["name"] for d in trained.dreamed if not d["accepted"]]:
        caveats.append(f"Not seen by the model, so protected in text only: {', '.join(failed)}.")
    if left_out := trained.scene.left_out:
        caveats.append(f"{left_out} answers about dreamed or retained pictures named the concept and were not trained on.")
    if len(trained.scene.pictures) == 1:
        caveats.append("No picture and no dream of anything else was trained on: other concepts' recognition may suffer.")
    if request.retain:
        caveats.append("Specificity was measured on the retained pictures, which were trained on in other wordings.")
    return {
        "concept": request.concept,
        "model": Path(model).name if Path(model).is_dir() else model,
        "verdict": "forgotten" if verdict.forgotten else "not forgotten",
        "reasons": verdict.reasons,
        "before": verdict.before,
        "after": verdict.after,
        "thresholds": verdict.thresholds,
        "answers": [asdict(a) for a in answers],
        "training": [asdict(s) for s in trained.history],
        "recipe": recipe.as_dict(),
        "samples": dict(Counter(s.facet for s in made.samples)),
        "masks": {
            "tokens_masked": int(sum((~k).sum() for k in made.keep)),
            "tokens": int(sum(len(k) for k in made.keep)),
            "vocabulary_masked": len(made.mask.masked),
            "spared": sorted(made.mask.spared.values()),
        },
        "dreams": trained.dreamed,
        "seconds": {k: round(v, 3) for k, v in trained.seconds.items()},
        "caveats": caveats,
    }


def _repeat(destination: Path) -> Result:
    report = json.loads((destination / "report.json").read_text(encoding="utf-8"))
    note = f"{destination} already holds the result of this very request: nothing was done."
    return Result(report["verdict"] == "forgotten", report["reasons"], report, destination, True, [note])


def _listed(directory: Path | None) -> list[Path]:
    return pictures_in.list_images(directory) if directory else []


def _shown(directory: Path | None) -> list[Shown]:
    return [(path.name, pictures_in.load_image(path)) for path in _listed(directory)]


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _snapshot(loaded: vlm.VLM) -> Path:
    """Where in the hub's cache a loaded model's files are."""
    return Path(cached_file(loaded.name, "config.json", revision=loaded.revision, local_files_only=True)).parent


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
