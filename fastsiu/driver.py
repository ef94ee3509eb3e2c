"""The story of one request: load, check, samples, teacher, train, verdict, save.

`unlearn` tells it from beginning to end; `session` has its middle, what happens on a model that is
already loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from . import images as pictures_in
from . import output as outputs
from .evaluate.attacks import not_asked
from .evaluate.held_out import Shown, examine
from .guards.strict_json import read_json
from .model import adapter, ask, decode, plan, source, vlm
from .model.memory import Settings, budget
from .report.redact import redacted
from .request import PAPER, BadInput, Recipe, Request
from .samples import corpus, targets
from .session import Listener, Prepared, Trained, forget, prepare, timed
from .staging import check_space
from .text.concept import ambiguous
from .verdict import Answer, Verdict

MODEL_RECIPE = (
    "fastsiu.json"  # what a model's own directory may say about the hyper-parameters it needs
)
# the path alone: what draws and trains it is the command line's
EMBEDDED = Path(__file__).parent / "demo" / "model"
CAVEAT = "The adapter can be dropped; only merged weights forget."
DEMO_NOTE = (
    "No --model was given: this is the embedded demo model, which knows only its own "
    "fictional creatures."
)


@dataclass(frozen=True)
class Result:
    """What `unlearn` returns. `forgotten` is the verdict; `report` is report.json; `output` the
    directory written."""

    forgotten: bool
    reasons: list[str]
    report: dict[str, Any]
    output: Path | None
    repeated: bool = False
    notes: list[str] = field(default_factory=list)


def unlearn(
    image: str | Path,
    concept: str,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    output: str | Path | None = None,
    aliases: tuple[str, ...] = (),
    protect: tuple[str, ...] = (),
    images: str | Path | None = None,
    retain: str | Path | None = None,
    data: str | Path | None = None,
    preset: str = "default",
    device: str | None = None,
    dtype: str = "auto",
    listener: Listener | None = None,
    quantize: str | None = None,
    attention: str | None = None,
    memory: float | None = None,
    checkpointing: bool | None = None,
    micro_batch: int | None = None,
    optimizer: str | None = None,
    redact: bool = False,
    embed_image: bool = False,
    as_word: bool | None = None,
    **overrides: Any,
) -> Result:
    """Makes a model forget how one concept looks, from one picture.

    redact: names, questions, answers and file names stay out of everything written
    (`report.redact`), and of the result
    embed_image: report.html shows the picture
    as_word: how a name counts that is a word like any other, too (`Request.as_word`)
    memory: GB that the run may take: picks the other settings of `memory.Settings` that are left
    out, and says so first
    overrides: fields of `Recipe`; what is left out comes from the preset, then the model's own
    directory, then `Recipe`. Writes the adapter, report and manifest to `output` (default
    fastsiu-<random>/) in one transaction.

    Raises BadInput (the input cannot be used; nothing is written) and NumericFailure (training
    diverged).
    """
    listener = listener or Listener()
    outputs.check_shown(redact, embed_image)
    request = Request(
        concept.strip(),
        Path(image),
        tuple(aliases),
        tuple(protect),
        *map(_path, (images, retain, data)),
        as_word,
    )
    name = str(EMBEDDED if model is None else model)
    recipe, origins = choose_recipe(name, preset, overrides)
    picture = pictures_in.load_image(request.image)
    destination = Path(output) if output is not None else outputs.random_directory()
    weights = outputs.digest_model(name) if Path(name).is_dir() else None
    chosen = choose_settings(
        name,
        memory,
        recipe,
        picture,
        listener,
        revision=revision,
        device=device,
        dtype=dtype,
        quantize=quantize,
        attention=attention,
        checkpointing=checkpointing,
        micro_batch=micro_batch,
        optimizer=optimizer,
    )
    settings = {"dtype": dtype} | deciding(chosen) | shown_as(redact, embed_image)
    digest = outputs.request_digest(request, recipe, name, revision, weights=weights, **settings)
    if outputs.check_destination(destination, digest) == "same":
        return _repeat(destination)
    check_space(destination.absolute(), _room(name, revision, recipe.rank))
    # a damaged picture is told now, not after the training
    more, rest = (
        shown(request.images),
        shown(request.retain),
    )

    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        loaded = load(
            name, revision, chosen, budget(chosen, recipe.batch_size, memory is not None), listener
        )
    try:
        with vlm.threads(loaded):
            trained = forget(loaded, request, recipe, picture, listener=listener, seconds=seconds)
            listener.stage("Asking again, with the adapter on and off")
            with timed(seconds, "verdict"):
                verdict, answers = examine(trained.scene, more, rest)
        report = report_of(request, recipe, name, verdict, answers, trained)
        written = write(
            destination, loaded, [request], [report], recipe, origins, digest, weights, settings
        )[0]
    finally:
        adapter.detach(loaded)
    return Result(
        verdict.forgotten, written["reasons"], written, destination, notes=written["caveats"]
    )


def write(
    destination: Path,
    loaded: vlm.VLM,
    requests: Sequence[Request],
    reports: Sequence[dict[str, Any]],
    recipe: Recipe,
    origins: dict[str, str],
    digest: str,
    weights: dict[str, str] | None,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Adapter, reports and manifest in one transaction; of several requests each has its reports in
    a directory of its own.

    weights: the model's files by digest, where it is a directory; settings: what else decides the
    result
    reports: of the last of the requests. Returns them as they were written.
    """
    redact, embed = settings.get("redact", False), settings.get("embed_image", False)
    written = [redacted(report) if redact else report for report in reports]
    named = all(was["model"] == now["model"] for was, now in zip(reports, written, strict=True))
    if weights and not named:  # a file of the model's directory may have any name
        weights = {f"{number:03d}": sha for number, sha in enumerate(weights.values(), 1)}
    pictures: dict[str, Path] = {}
    for number, request in enumerate(requests, 1):
        label = f"{number:03d}/" if len(requests) > 1 else ""
        pictures |= {f"{label}image": request.image}
        for kind, directory in (("images", request.images), ("retain", request.retain)):
            files = enumerate(_listed(directory), 1)
            pictures |= {f"{label}{kind}/{f'{n:03d}' if redact else p.name}": p for n, p in files}
    transaction = outputs.Transaction(destination)
    with transaction as staging:
        adapter.save(loaded, staging, named=named)
        for number, (request, report) in enumerate(
            zip(requests[-len(reports) :], reports, strict=True), 1
        ):
            folder = staging / f"{number:03d}" if len(reports) > 1 else staging
            folder.mkdir(exist_ok=True)
            outputs.write_reports(
                folder,
                report,
                redact=redact,
                picture=pictures_in.load_image(request.image) if embed else None,
            )
        transaction.commit(
            outputs.manifest(
                recipe=recipe,
                origins=origins,
                model_id=written[0]["model"],
                revision=loaded.revision,
                masks=written[0]["masks"],
                weights=weights or outputs.digest_model(_snapshot(loaded)),
                digest=digest,
                key=transaction.key,
                pictures={label: pictures_in.read_bytes(path) for label, path in pictures.items()},
                settings=settings,
            )
        )
    return written


def prepared_for(
    image: str | Path,
    concept: str,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    aliases: tuple[str, ...] = (),
    protect: tuple[str, ...] = (),
    retain: str | Path | None = None,
    data: str | Path | None = None,
    preset: str = "default",
    device: str | None = None,
    dtype: str = "auto",
    listener: Listener | None = None,
    quantize: str | None = None,
    attention: str | None = None,
    memory: float | None = None,
    as_word: bool | None = None,
    **overrides: Any,
) -> Prepared:
    """What `unlearn` would train on, with nothing trained: samples with their masks, and lessons.
    Options as there."""
    listener = listener or Listener()
    request = Request(
        concept.strip(), Path(image), aliases, protect, None, _path(retain), _path(data), as_word
    )
    name = str(EMBEDDED if model is None else model)
    recipe, _ = choose_recipe(name, preset, overrides)
    picture = pictures_in.load_image(request.image)
    chosen = choose_settings(
        name,
        memory,
        recipe,
        picture,
        listener,
        revision=revision,
        device=device,
        dtype=dtype,
        quantize=quantize,
        attention=attention,
    )
    loaded = load(
        name, revision, chosen, budget(chosen, recipe.batch_size, memory is not None), listener
    )
    with vlm.threads(loaded):
        return prepare(loaded, request, recipe, picture, listener=listener, seconds={})


def samples_for(
    image: str | Path, concept: str, **options: Any
) -> tuple[targets.Scene, corpus.Corpus]:
    """The scene and the samples of `prepared_for`, which has the options."""
    one = prepared_for(image, concept, **options)
    return one.scene, one.corpus


def interview(
    questions: Sequence[str],
    *,
    model: str | Path | None = None,
    adapter_dir: str | Path | None = None,
    image: str | Path | None = None,
    compare: bool = False,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    attention: str | None = None,
    max_new_tokens: int = 64,
    listener: Listener | None = None,
) -> list[dict[str, str]]:
    """Greedy answers, one record a question: `answer`, or `before` and `after` with `compare`.

    Raises BadInput for an adapter that does not belong to the model; where its manifest names other
    files than a commit of the hub, they are read for that, a second a gigabyte.
    """
    listener = listener or Listener()
    if adapter_dir is not None:
        adapter.check_directory(Path(adapter_dir))
    picture = pictures_in.load_image(Path(image)) if image is not None else None
    name = str(EMBEDDED if model is None else model)
    chosen = choose_settings(
        name,
        None,
        Recipe(),
        picture,
        listener,
        revision=revision,
        device=device,
        dtype=dtype,
        quantize=quantize,
        attention=attention,
    )
    loaded = load(name, revision, chosen, vlm.Budget(), listener)
    for note in (
        adapter.check_belongs(Path(adapter_dir), name, loaded.revision)
        if adapter_dir is not None
        else ()
    ):
        listener.note(note)
    listener.stage("Asking")

    def ask_all() -> list[str]:
        shown = None if picture is None else loaded.picture(picture)
        return ask.answers(loaded, [(q, shown) for q in questions], max_new_tokens=max_new_tokens)

    before = ask_all() if compare or adapter_dir is None else []
    after: list[str] = []
    if adapter_dir is not None:
        adapter.load(loaded, Path(adapter_dir))
        after = ask_all()
    for sentence in [*decode.remarks(loaded), *decode.told(why := decode.slow(loaded), why)]:
        listener.note(sentence)
    if adapter_dir is None:
        return [{"question": q, "answer": a} for q, a in zip(questions, before, strict=True)]
    if not compare:
        return [{"question": q, "answer": a} for q, a in zip(questions, after, strict=True)]
    return [
        {"question": q, "before": b, "after": a}
        for q, b, a in zip(questions, before, after, strict=True)
    ]


def load(
    name: str, revision: str | None, chosen: Settings, room: vlm.Budget, listener: Listener
) -> vlm.VLM:
    listener.stage("Loading the model")
    with listener.loading() as bars:
        return vlm.load(
            name,
            revision=revision,
            device=chosen.device,
            dtype=chosen.dtype,
            quantize=chosen.quantize,
            attention=chosen.attention,
            budget=room,
            bars=bars,
        )


def choose_settings(
    model: str,
    memory: float | None,
    recipe: Recipe,
    picture: Any,
    listener: Listener,
    *,
    revision: str | None,
    device: str | None,
    dtype: str,
    **given: Any,
) -> Settings:
    """What was asked for; under a memory limit the least sparing settings that fit it, which are
    said before anything is loaded.

    Raises BadInput where an option makes no sense or, under a limit, nothing fits.
    """
    given = {k: v for k, v in given.items() if v is not None}
    source.check_device(device)
    asked = Settings(
        dtype=dtype, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **given
    )
    source.check_options(dtype, asked.quantize, asked.attention, asked.optimizer)
    if memory is None:
        return asked
    source.check_directory(model)
    config, processor, _ = source.describe(model, revision)
    work = plan.workload_of(config, processor, picture)
    found = plan.plan(
        model, memory, asked, recipe=recipe, config=config, work=work, fixed=frozenset(given)
    )
    if found.chosen is None:
        raise BadInput(found.sentence)
    listener.note(found.sentence)
    return found.chosen.settings


def deciding(settings: Settings) -> dict[str, Any]:
    """Those settings that decide the result, as the manifest and the digest of a request have them;
    those left alone are not."""
    values = {"quantize": settings.quantize, "attention": settings.attention}
    values["optimizer"] = settings.optimizer if settings.optimizer != "adamw" else None
    return {k: v for k, v in values.items() if v is not None}


def shown_as(redact: bool, embed_image: bool) -> dict[str, bool]:
    """What the reports leave out or show, where it was asked for: part of the request, as one that
    was answered with names is not done for whoever wants none. Without either a request stays what
    it was."""
    return {
        name: True for name, asked in (("redact", redact), ("embed_image", embed_image)) if asked
    }


def plan_for(
    model: str | Path | None = None,
    memory: float | None = None,
    *,
    preset: str = "default",
    rank: int | None = None,
    batch_size: int | None = None,
    checkpointing: bool | None = None,
    micro_batch: int | None = None,
    image: Path | None = None,
    image_tokens: int | None = None,
    revision: str | None = None,
    **settings: Any,
) -> plan.Plan:
    """What a run would take, from the configuration alone. settings: further fields of
    `memory.Settings`; those given stay.

    image: a picture whose tokens are counted, for which the model's processor is loaded as well
    """
    name = str(EMBEDDED if model is None else model)
    recipe, _ = choose_recipe(name, preset, {"rank": rank, "batch_size": batch_size})
    try:
        torch.device(settings.get("device") or "cuda")
    except RuntimeError as error:
        raise BadInput(f"There is no device {settings['device']!r}: choose cuda or cpu.") from error
    given = settings | {"checkpointing": checkpointing, "micro_batch": micro_batch}
    given = {k: v for k, v in given.items() if v is not None}
    config = work = None
    if image is not None:
        picture = pictures_in.load_image(image)
        source.check_directory(name)
        config, processor, revision = source.describe(name, revision)
        work = plan.workload_of(config, processor, picture)
    return plan.plan(
        name,
        memory,
        Settings(**given),
        recipe=recipe,
        config=config,
        work=work,
        revision=revision,
        image_tokens=image_tokens,
        fixed=frozenset(given),
    )


def choose_recipe(
    model: str, preset: str, overrides: dict[str, Any]
) -> tuple[Recipe, dict[str, str]]:
    """The hyper-parameters and where each came from: command line, preset, the model's own
    directory, default."""
    known = {f.name for f in fields(Recipe)}
    given = {k: v for k, v in overrides.items() if v is not None}
    if unknown := sorted(set(given) - known):
        raise BadInput(
            f"There is no hyper-parameter {unknown[0]!r}: choose from {', '.join(sorted(known))}."
        )
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
    read = read_json(path, what=str(path), remedy="mend it or remove it", shape={"recipe": dict})
    if "recipe" not in read:
        raise BadInput(
            f"{path} is not a JSON object with an object 'recipe': mend it or remove it."
        )
    values = dict(read["recipe"])
    if unknown := sorted(set(values) - known):
        raise BadInput(f"{path} names an unknown hyper-parameter {unknown[0]!r}: remove it.")
    return values


def report_of(
    request: Request,
    recipe: Recipe,
    model: str,
    verdict: Verdict,
    answers: list[Answer],
    trained: Trained,
) -> dict[str, Any]:
    made = trained.corpus
    caveats = [CAVEAT]
    if made.mask.warning:
        caveats.append(made.mask.warning)
    if told := ambiguous(trained.scene.concept):
        caveats.append(told)
    caveats += [*trained.scene.notes, *decode.remarks(trained.scene.vlm)]
    if failed := [d["name"] for d in trained.dreamed if not d["accepted"]]:
        caveats.append(f"Not seen by the model, so protected in text only: {', '.join(failed)}.")
    if left_out := trained.scene.left_out:
        caveats.append(
            f"{left_out} answers about dreamed or retained pictures named the concept and were "
            "not trained on."
        )
    if len(trained.scene.pictures) == 1:
        caveats.append(
            "No picture and no dream of anything else was trained on: other concepts' "
            "recognition may suffer."
        )
    caveats += verdict.remarks
    if request.retain:
        caveats.append(
            "Specificity was measured on the retained pictures, which were trained on in other "
            "wordings."
        )
    return {
        "concept": request.concept,
        "aliases": list(request.aliases),
        **({} if request.as_word is None else {"as_word": request.as_word}),
        "model": Path(model).name if Path(model).is_dir() else model,
        "verdict": "forgotten" if verdict.forgotten else "not forgotten",
        "reasons": verdict.reasons,
        "before": verdict.before,
        "after": verdict.after,
        "thresholds": verdict.thresholds,
        "families": verdict.families,
        "headline": verdict.headline,
        "not_asked": not_asked(),
        "answers": [a.as_dict() for a in answers],
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
    report = outputs.read_report(destination)
    note = f"{destination} already holds the result of this very request: nothing was done."
    return Result(
        report["verdict"] == "forgotten", report["reasons"], report, destination, True, [note]
    )


def _listed(directory: Path | None) -> list[Path]:
    return pictures_in.list_images(directory) if directory else []


def shown(directory: Path | None) -> list[Shown]:
    """A directory's pictures with their names; none without a directory. Raises BadInput for one
    that is damaged."""
    return [(path.name, pictures_in.load_image(path)) for path in _listed(directory)]


def _room(name: str, revision: str | None, rank: int) -> int:
    """Bytes that an output takes, about: an adapter in fp32 on the four matrices of attention and
    the three of an MLP."""
    text = source.read_config(name, revision).get_text_config()
    width, layers = (getattr(text, key, None) or 0 for key in ("hidden_size", "num_hidden_layers"))
    inner = getattr(text, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * width
    return outputs.ROOM + 4 * rank * layers * (8 * width + 3 * (width + inner))


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _snapshot(loaded: vlm.VLM) -> Path:
    """Where in the hub's cache a loaded model's files are."""
    return Path(
        cached_file(loaded.name, "config.json", revision=loaded.revision, local_files_only=True)
    ).parent
