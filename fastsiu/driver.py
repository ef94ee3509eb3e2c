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

import torch
from transformers.utils import cached_file

from . import adapter, ask, corpus, train, vlm
from . import images as pictures_in
from . import output as outputs
from .concept import Concept
from .facets import dreams, targets
from .objectives import Objective, siu
from .request import PAPER, BadInput, Recipe, Request, Sample
from .verdict import Answer, Verdict, judge

MODEL_RECIPE = "fastsiu.json"  # what a model's own directory may say about the hyper-parameters it needs
MARGIN = 0.1  # nats by which a retained answer may become less likely before it counts as bent
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
    name = str(model) if model is not None else _embedded()
    recipe, origins = choose_recipe(name, preset, overrides)
    picture = pictures_in.load_image(request.image)
    destination = Path(output) if output is not None else outputs.random_directory()
    digest = outputs.request_digest(request, recipe, name, revision, dtype=dtype)
    if outputs.check_destination(destination, digest) == "same":
        return _repeat(destination)

    for path in (*_listed(request.images), *_listed(request.retain)):
        pictures_in.load_image(path)  # a damaged picture is told now, not after the training

    seconds: dict[str, float] = {}
    listener.stage("Loading the model")
    with _timed(seconds, "load"):
        loaded = vlm.load(name, revision=revision, device=device, dtype=dtype)
    try:
        trained = forget(loaded, request, recipe, picture, listener=listener, seconds=seconds)
        listener.stage("Asking again, with the adapter on and off")
        with _timed(seconds, "verdict"):
            verdict, answers = examine(loaded, trained, request)
        report = _report(request, recipe, name, verdict, answers, trained)
        pictures = {"image": request.image} | {f"images/{p.name}": p for p in _listed(request.images)}
        pictures |= {f"retain/{p.name}": p for p in _listed(request.retain)}
        transaction = outputs.Transaction(destination)
        with transaction as staging:
            adapter.save(loaded, staging)
            outputs.write_reports(staging, report)
            transaction.commit(outputs.manifest(
                recipe=recipe, origins=origins, model_id=report["model"], revision=revision, masks=report["masks"],
                weights=outputs.digest_model(_model_directory(name, revision)), digest=digest, key=transaction.key,
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
        history = train.fit(loaded, made, objective, recipe, probe_for(scene, made, picture),
                            lambda step: listener.step(step, recipe.steps))  # fmt: skip
    return Trained(scene, made, history, dreamed, seconds)


def samples_for(image: str | Path, concept: str, *, model: str | Path | None = None, revision: str | None = None,
                aliases: tuple[str, ...] = (), protect: tuple[str, ...] = (), retain: str | Path | None = None,
                data: str | Path | None = None, device: str | None = None, dtype: str = "auto",
                **overrides: Any) -> tuple[targets.Scene, corpus.Corpus]:  # fmt: skip
    """The samples and masks that `unlearn` would train on, with nothing trained."""
    request = Request(concept.strip(), Path(image), aliases, protect, None, _path(retain), _path(data))
    name = str(model) if model is not None else _embedded()
    recipe, _ = choose_recipe(name, "default", overrides)
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
    loaded = vlm.load(str(model) if model is not None else _embedded(), revision=revision, device=device, dtype=dtype)

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


def probe_for(scene: targets.Scene, made: corpus.Corpus, picture: Any) -> Callable[[], train.Look]:
    """A look at training from outside its loss: is the name gone on the picture and its transforms, does the rest hold?"""
    loaded, words = scene.vlm, targets.wordings()["who"]
    questions = words["train"] + words["held_out"]  # the latter only where the teacher names the concept in no other wording
    with adapter.teacher(loaded):
        said = scene.ask(questions, 0)
        shown = [loaded.picture(p) for _, p in pictures_in.variants(picture, scene.recipe.seed)]
    naming = [(q, a, spans[0]) for q, a in zip(questions, said, strict=True) if (spans := scene.concept.spans(a))]
    naming = [n for n in naming if n[0] in words["train"]] or naming
    asked = [(loaded.encode(q, a, p), span, p) for q, a, span in naming for p in shown]
    with adapter.teacher(loaded):
        plain = [None if s.picture is None else made.pictures[s.picture] for s in made.samples]
        untouched = [log_p.sum() for log_p, _ in ask.label_log_probabilities(loaded, made.turns, plain)]

    def look() -> train.Look:
        if scene.recipe.projector_lr > 0:  # a trained projector sees differently
            for p in shown:
                p.features = loaded.picture(p.image).features
        found = ask.label_log_probabilities(loaded, [t for t, _, _ in asked], [p for _, _, p in asked])
        inside = [torch.tensor([s < span[1] and e > span[0] for s, e in t.offsets]) for t, span, _ in asked]
        p_name = max(float(log_p[rows.to(log_p.device)].sum().exp()) for (log_p, _), rows in zip(found, inside, strict=True))
        seen = [loaded.picture(made.pictures[0].image), *made.pictures[1:]] if scene.recipe.projector_lr > 0 else made.pictures
        pictures = [None if s.picture is None else seen[s.picture] for s in made.samples]
        scores = ask.label_log_probabilities(loaded, made.turns, pictures)
        right = [bool(ok.all()) for _, ok in scores]
        held = [r and float(b - log_p.sum()) < MARGIN for r, (log_p, _), b in zip(right, scores, untouched, strict=True)]
        old = [h for h, s in zip(held, made.samples, strict=True) if s.facet in ("facts", "preserve")]
        new = [r for r, s in zip(right, made.samples, strict=True) if s.facet in ("align", "describe")]
        return train.Look(p_name, sum(old) / max(1, len(old)), sum(new) / max(1, len(new)))

    return look


def examine(loaded: vlm.VLM, trained: Trained, request: Request) -> tuple[Verdict, list[Answer]]:
    """The same questions to the untouched and to the unlearned model: wordings that no sample has, and transforms of the
    picture at which neither the dreams nor the early stop has looked."""
    scene, words = trained.scene, targets.wordings()
    asked: list[tuple[str, str, str | None, Any]] = []
    for label, image in pictures_in.variants(scene.pictures[0].image, scene.recipe.seed, held_out=True):
        asked += [("efficacy", q, label, image) for q in words["who"]["held_out"]]
        asked += [("recognition", q.format(name=request.concept), label, image) for q in words["yesno"]["held_out"]]
    asked += [("recognition", q.format(name=request.concept), None, None) for q in words["appearance"]["held_out"]]
    for path in _listed(request.images):
        asked += [("generality", q, path.name, pictures_in.load_image(path)) for q in words["who"]["held_out"]]
    for path in _listed(request.retain):
        asked += [("specificity", q, path.name, pictures_in.load_image(path)) for q in words["who"]["held_out"]]
    names = [request.concept, *scene.neighbours]
    asked += [("facts", q.format(name=n), None, None) for n in names for q in words["facts"]["held_out"]]
    asked += [("facts", q, None, None) for q in words["general"]["held_out"]]
    pictures: dict[int, Any] = {}

    def ask_all() -> list[str]:
        for _, _, _, image in asked:
            if image is not None and id(image) not in pictures:
                pictures[id(image)] = loaded.picture(image)
        return ask.answers(loaded, [(q, None if i is None else pictures[id(i)]) for _, q, _, i in asked])

    with adapter.teacher(loaded):
        before = ask_all()
    if scene.recipe.projector_lr > 0:
        pictures.clear()  # a trained projector sees differently
    after = ask_all()
    answers = [Answer(kind, q, label, b, a) for (kind, q, label, _), b, a in zip(asked, before, after, strict=True)]
    missing = {
        "generality": "One picture cannot show it: give more pictures of the concept with --images DIR.",
        "specificity": "No picture of anything else was given: give some with --retain DIR.",
    }
    return judge(answers, scene.concept, reasons_for_null=missing), answers


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


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _model_directory(name: str, revision: str | None) -> Path:
    """Where the loaded model's files are: the directory itself, or the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    return Path(cached_file(name, "config.json", revision=revision, local_files_only=True)).parent


def _embedded() -> str:
    from .demo import MODEL_DIR  # only its path: the demo itself is imported by the command line alone

    return str(MODEL_DIR)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
