"""The story of one request: load, check, samples, teacher, train, verdict, save.

`unlearn` tells it from beginning to end; `session` has its middle, what happens on a model that is
already loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image
from transformers.utils import cached_file

from . import output as outputs
from .disk.staging import check_space
from .evaluate.attacks import not_asked
from .evaluate.held_out import decide
from .guards.first_read import first_reads_count
from .images import Beside, beside, load_image
from .model import adapter, adapter_files, ask, decode, source, vlm
from .model.memory import budget
from .report import card
from .report.redact import redacted
from .request import Recipe, Request
from .samples.beside import Prepared
from .samples.corpus import read_data
from .session import Listener, Trained, forget, prepare, timed
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
from .text.concept import ambiguous
from .verdict import Answer, Verdict


@dataclass(frozen=True)
class Result:
    """What `unlearn` returns. `forgotten` is the verdict; `report` is report.json; `output` the
    directory written; `repeated` whether the output held this very result already."""

    forgotten: bool
    reasons: list[str]
    report: dict[str, Any]
    output: Path | None
    repeated: bool = False
    notes: list[str] = field(default_factory=list)


@first_reads_count()
def unlearn(
    request: Request,
    *,
    model: ModelRef = ModelRef(),
    recipe: RecipeChoice = RecipeChoice(),
    settings: Settings = Settings(),
    report: ReportOptions = ReportOptions(),
    output: str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """Makes a model forget how one concept looks, from one picture.

    Writes the adapter, reports and manifest to `output` (default fastsiu-<random>/) in one
    transaction. The recipe comes from the command line, then the preset, then the model's own
    directory, then `Recipe`.

    Raises BadInput (the input cannot be used, or another run is writing to `output`; nothing is
    written), NumericFailure (training diverged) and OutOfMemory.
    """
    listener = listener or Listener()
    outputs.check_shown(report.redact, report.embed_image)
    chosen, origins = choose_recipe(model.name, recipe, model.revision)
    picture = load_image(request.image)
    destination = Path(output) if output is not None else outputs.random_directory()
    weights = outputs.digest_model(model.name) if model.is_directory else None
    layout = choose_layout(model, settings, chosen, picture, listener)
    decides = {"dtype": settings.dtype} | deciding(layout) | report.deciding
    digest = outputs.request_digest(
        request, chosen, model.name, model.revision, weights=weights, **decides
    )
    with outputs.reserved(destination, digest) as found:
        if found == "same":
            return _repeat(destination)
        check_space(destination.absolute(), _room(model, chosen.rank))
        # What is damaged is told now, not after the training.
        given = check_given(request)

        seconds: dict[str, float] = {}
        with timed(seconds, "load"):
            room = budget(layout, chosen.batch_size, settings.limited)
            loaded = load(model, layout, room, listener)
        sealed = Sealed(chosen, origins, digest, weights, decides, report.run)
        return unlearn_on(
            loaded,
            request,
            (picture, given),
            model.name,
            sealed,
            destination,
            listener=listener,
            seconds=seconds,
        )


@dataclass(frozen=True)
class Sealed:
    """What a manifest says of how an output was made.

    origins: where each hyper-parameter came from
    digest:  of the request and all that decides its result
    weights: SHA-256 of the model's files by name, where it is a directory
    settings: what else decides the result
    run:     the text of run.toml; "" for none
    """

    recipe: Recipe
    origins: dict[str, str]
    digest: str
    weights: dict[str, str] | None
    settings: dict[str, Any]
    run: str = ""


def unlearn_on(
    loaded: vlm.VLM,
    request: Request,
    pictures: tuple[Image, Beside],
    name: str,
    sealed: Sealed,
    destination: Path,
    *,
    listener: Listener,
    seconds: dict[str, float],
) -> Result:
    """`unlearn` on a model that is loaded; the model is untouched afterwards.

    pictures: the training picture, and those beside it
    name:     of the model, as it was asked for
    seconds:  of the stages before; the others are added
    """
    picture, given = pictures
    try:
        with vlm.threads(loaded):
            trained = forget(
                loaded, request, sealed.recipe, picture, listener=listener, seconds=seconds
            )
            listener.stage("Asking again, with the adapter on and off")
            with timed(seconds, "verdict"):
                verdict, answers = decide(trained.scene, given.more, given.rest)
        told = report_of(request, sealed.recipe, name, verdict, answers, trained)
        listener.stage("Writing the output")
        written = write(destination, loaded, [request], [told], sealed)[0]
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
    sealed: Sealed,
    *,
    made_of: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Adapter, reports and manifest in one transaction; each of several requests has its reports in
    a directory of its own.

    reports: of the last of the requests. Returns them as they were written.
    made_of: what the manifest says of the adapters that this one is the sum of. Nothing was trained
             then, so recipe, seeds and masks are theirs.
    """
    redact = sealed.settings.get("redact", False)
    embed = sealed.settings.get("embed_image", False)
    weights = sealed.weights
    written = [redacted(report) if redact else report for report in reports]
    named = all(was["model"] == now["model"] for was, now in zip(reports, written, strict=True))
    if weights and not named:  # a file of the model's directory may have any name
        weights = {f"{number:03d}": sha for number, sha in enumerate(weights.values(), 1)}
    pictures: dict[str, Path] = {}
    for number, request in enumerate(requests, 1):
        label = f"{number:03d}/" if len(requests) > 1 else ""
        found = outputs.pictures_of(request, redact)
        pictures |= {f"{label}{name}": path for name, path in found.items()}
    transaction = outputs.Transaction(destination)
    with transaction as staging:
        adapter.save(loaded, staging, named=named)
        outputs.write_card(
            staging, reports, base_of(loaded, written[0]["model"], named), redact=redact
        )
        outputs.write_run(staging, sealed.run, named=named)
        for number, (request, report) in enumerate(
            zip(requests[-len(reports) :], reports, strict=True), 1
        ):
            folder = staging / f"{number:03d}" if len(reports) > 1 else staging
            folder.mkdir(exist_ok=True)
            picture = load_image(request.image) if embed else None
            outputs.write_reports(folder, report, redact=redact, picture=picture)
        made = outputs.manifest(
            recipe=sealed.recipe,
            origins=sealed.origins,
            model_id=written[0]["model"],
            revision=loaded.revision,
            masks=written[0].get("masks", {}),
            weights=weights or outputs.digest_model(_snapshot(loaded)),
            digest=sealed.digest,
            key=transaction.key,
            pictures=pictures,
            settings=sealed.settings,
            kinds=[report["kind"] for report in written],
        )
        if made_of:
            made = {k: v for k, v in made.items() if k not in ("recipe", "seeds", "masks")}
            made["combined"] = list(made_of)
        transaction.commit(made)
    return written


def base_of(loaded: vlm.VLM, shown: str, named: bool = True) -> card.Base:
    """The untouched model, for the model card.

    shown: its name in reports
    named: whether that is its own
    """
    if not named:
        return card.Base(shown)
    place, revision = adapter.base_of(loaded)
    of_hub = not place.startswith("./")
    return card.Base(
        place if of_hub else shown,
        place if of_hub else None,
        revision,
        adapter.terms_of(loaded),
    )


@first_reads_count()
def prepared_for(
    request: Request,
    *,
    model: ModelRef = ModelRef(),
    recipe: RecipeChoice = RecipeChoice(),
    settings: Settings = Settings(),
    listener: Listener | None = None,
) -> Prepared:
    """What `unlearn` would train on, with nothing trained: samples with their masks, and
    lessons. Raises BadInput as there."""
    listener = listener or Listener()
    chosen, _ = choose_recipe(model.name, recipe, model.revision)
    picture = load_image(request.image)
    check_given(request)
    layout = choose_layout(model, settings, chosen, picture, listener)
    room = budget(layout, chosen.batch_size, settings.limited)
    loaded = load(model, layout, room, listener)
    with vlm.threads(loaded):
        return prepare(loaded, request, chosen, picture, listener=listener, seconds={})


def interview(
    questions: Sequence[str],
    *,
    model: ModelRef = ModelRef(),
    adapter_dir: str | Path | None = None,
    image: str | Path | None = None,
    compare: bool = False,
    settings: Settings = Settings(),
    max_new_tokens: int = 64,
    listener: Listener | None = None,
) -> list[dict[str, str]]:
    """Greedy answers, one record a question: `answer`, or `before` and `after` with `compare`.

    Raises BadInput for an adapter that does not belong to the model. Where its manifest names other
    files than a commit of the hub, the model's files are read for that, a second a gigabyte.
    """
    listener = listener or Listener()
    if adapter_dir is not None:
        adapter_files.check_directory(Path(adapter_dir))
    picture = load_image(Path(image)) if image is not None else None
    layout = choose_layout(model, settings, Recipe(), picture, listener)
    loaded = load(model, layout, vlm.Budget(), listener)
    if adapter_dir is not None:
        for note in adapter_files.check_belongs(Path(adapter_dir), model.name, loaded.revision):
            listener.note(note)
    listener.stage("Asking")

    def answers() -> list[str]:
        shown = None if picture is None else loaded.picture(picture)
        return ask.answers(loaded, [(q, shown) for q in questions], max_new_tokens=max_new_tokens)

    before = answers() if compare or adapter_dir is None else []
    after: list[str] = []
    if adapter_dir is not None:
        adapter.load(loaded, Path(adapter_dir))
        after = answers()
    for sentence in [*decode.remarks(loaded), *decode.told(why := decode.slow(loaded), why)]:
        listener.note(sentence)
    if compare and adapter_dir is not None:
        rows = zip(questions, before, after, strict=True)
        return [{"question": q, "before": b, "after": a} for q, b, a in rows]
    only = before if adapter_dir is None else after
    return [{"question": q, "answer": a} for q, a in zip(questions, only, strict=True)]


def report_of(
    request: Request,
    recipe: Recipe,
    model: str,
    verdict: Verdict,
    answers: list[Answer],
    trained: Trained,
) -> dict[str, Any]:
    """report.json of one request, ready for JSON: the verdict with the answers behind it, what was
    trained and how, and what a reader has to know (`caveats`)."""
    corpus, scene = trained.corpus, trained.scene
    caveats = [adapter.DROPPABLE] + [adapter.LEFT_OUT] * recipe.sees_anew
    if corpus.mask.warning:
        caveats.append(corpus.mask.warning)
    if told := ambiguous(scene.concept):
        caveats.append(told)
    caveats += [*scene.notes, *decode.remarks(scene.vlm)]
    if failed := [d["name"] for d in trained.dreamed if not d["accepted"]]:
        caveats.append(f"Not seen by the model, so protected in text only: {', '.join(failed)}.")
    if left_out := scene.left_out:
        caveats.append(
            f"{left_out} answers about dreamed or retained pictures named the concept and were "
            "not trained on."
        )
    if len(scene.pictures) == 1:
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
        **scene.kind.entries(request),
        "model": source.shown_name(model),
        **verdict.entries(answers),
        "not_asked": not_asked(),
        "recipe": recipe.as_dict(),
        "samples": dict(Counter(s.facet for s in corpus.samples)),
        **trained.told(),
        "caveats": caveats,
    }


def check_given(request: Request) -> Beside:
    """The pictures beside the training picture. Raises BadInput for them and for the user's own
    samples."""
    given = beside(request)
    if request.data is not None:
        read_data(request.data, request.image)
    return given


def _repeat(destination: Path) -> Result:
    report = outputs.read_report(destination)
    note = f"{destination} already holds the result of this very request: nothing was done."
    forgotten = report["verdict"] == "forgotten"
    return Result(forgotten, report["reasons"], report, destination, True, [note])


def _room(model: ModelRef, rank: int) -> int:
    """Bytes that an output takes, about: an adapter in fp32 on the four matrices of attention and
    the three of an MLP."""
    text = source.read_config(model.name, model.revision).get_text_config()
    width, layers = (getattr(text, key, None) or 0 for key in ("hidden_size", "num_hidden_layers"))
    inner = getattr(text, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * width
    return outputs.ROOM + 4 * rank * layers * (8 * width + 3 * (width + inner))


def _snapshot(loaded: vlm.VLM) -> Path:
    """Where in the hub's cache a loaded model's files are."""
    return Path(
        str(
            cached_file(loaded.name, "config.json", revision=loaded.revision, local_files_only=True)
        )
    ).parent
