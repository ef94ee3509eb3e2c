"""One adapter out of several that were trained apart: their sum, and the verdict of every concept
on it.

No adapter has seen what the others change, so the sum need not forget what each of them forgets,
nor keep what each of them keeps. The model with the sum is asked about every picture as after a
training (`evaluate.held_out.decide`), and its reports say what came out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from . import driver, manifest, session
from . import output as outputs
from .disk import staging
from .disk.request_file import read_requests
from .disk.staging import check_space
from .evaluate.attacks import not_asked
from .evaluate.held_out import decide
from .guards.first_read import first_reads_count
from .images import beside, commitment, load_image, read_bytes
from .model import adapter, adapter_files, adapter_sum, decode, source, vlm
from .report import card
from .report.words import CONCEPT
from .request import BadInput, Recipe, Request
from .samples.scene import Scene
from .session import Listener, timed
from .settings import ModelRef, ReportOptions, Settings, choose_layout, deciding, load
from .text.concept import ambiguous, concept_of
from .text.names import Names

SUM = (
    "The adapter is the sum of {} adapters that were trained apart: none of them has seen what the "
    "others change."
)
WEIGHED = "Each of the adapters was added {:g} times."
HEAVIEST = 100.0


@dataclass(frozen=True)
class Row:
    """One concept.

    line:    of its request in the file
    alone:   the verdict of its own adapter
    verdict: of the sum
    named:   the share of answers about its picture that still give the name; None: not asked
    others:  the share of answers about other pictures that are kept
    facts:   the share of answers without a picture that are kept
    folder:  where its reports are in the output
    """

    line: int
    concept: str
    alone: str
    verdict: str
    reasons: list[str]
    named: float | None
    others: float | None
    facts: float | None
    folder: str


@dataclass(frozen=True)
class Combined:
    """What `combine` returns. rows: in the order of the directories; rank: of the adapter."""

    rows: list[Row]
    rank: int
    output: Path
    repeated: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def forgotten(self) -> bool:
        return all(row.verdict == "forgotten" for row in self.rows)

    @property
    def exit_code(self) -> int:
        """That of the worst verdict: 0 all are forgotten, 1 not all."""
        return 0 if self.forgotten else 1

    def as_dict(self) -> dict[str, Any]:
        rows = [vars(row) for row in self.rows]
        return {"forgotten": self.forgotten, "rank": self.rank, "concepts": rows}


@dataclass(frozen=True)
class PartOfSum:
    """A finished output that is added up.

    sealed: its manifest
    own:    SHA-256 of the adapter's files, by name
    told:   its reports, one a concept
    """

    directory: Path
    sealed: dict[str, Any]
    own: dict[str, str]
    recipe: Recipe
    told: list[dict[str, Any]]


@dataclass(frozen=True)
class PartConcept:
    """One concept of a part, and its request, which has the picture for the verdict."""

    part: PartOfSum
    told: dict[str, Any]
    line: int
    request: Request


@first_reads_count()
def combine(
    directories: Sequence[str | Path],
    file: str | Path,
    *,
    weight: float = 1.0,
    model: ModelRef = ModelRef(),
    settings: Settings = Settings(),
    report: ReportOptions = ReportOptions(),
    output: str | Path | None = None,
    listener: Listener | None = None,
) -> Combined:
    """Adds up the adapters in `directories`, outputs of `unlearn`, and writes one standard PEFT
    adapter with a report for each concept, in one transaction.

    file:     JSONL file of requests, in which each concept is found by its name: pictures are never
              stored
    weight:   how often each adapter is added, above 0; 1 is the plain sum
    settings: `device`, `dtype`, `quantize` and `attention` of the model that is asked

    In case of an error nothing is written. Raises BadInput for:
    - another weight, and fewer than two directories
    - a directory that is not a finished output, or was changed
    - adapters of other weights, or that cannot be added
    - a concept that is there twice, or has no line in the file
    - a picture in which the untouched model does not name the concept

    Raises NumericFailure for an adapter with NaN or infinity.
    """
    listener = listener or Listener()
    outputs.check_shown(report.redact, report.embed_image)
    if not 0 < weight <= HEAVIEST:
        raise BadInput(
            f"The weight is {weight!r:.40}: give a number above 0, at most {HEAVIEST:g}."
        )
    asked = dict(read_requests(Path(file)))
    parts = [_part(Path(directory)) for directory in directories]
    if len(parts) < 2:
        raise BadInput("One adapter has nothing to be added to: give two --output directories.")
    chosen = _chosen(parts, asked, Path(file))
    if any(one.told.get("redacted") for one in chosen) and not report.redact:
        # reports without names make a report without names, and no file that repeats the command
        report = replace(report, redact=True, run="")
        outputs.check_shown(report.redact, report.embed_image)
    images = []
    for one in chosen:
        try:
            images.append(load_image(one.request.image))
            beside(one.request)
        except BadInput as error:
            raise BadInput(f"{file}, line {one.line}: {error}") from error
    weights = outputs.digest_model(model.name) if model.is_directory else None
    for part in parts if weights is not None else ():
        adapter_files.check_weights(
            part.directory, part.sealed, weights or {}, model.name, model.revision
        )
    largest = max(images, key=lambda image: image.width * image.height)
    layout = choose_layout(model, settings, parts[0].recipe, largest, listener)
    decides = {"dtype": settings.dtype} | deciding(layout) | report.deciding
    decides |= {"weight": weight} if weight != 1 else {}
    digest = _digest(chosen, model, weights, decides)
    destination = Path(output) if output is not None else outputs.random_directory()
    with outputs.reserved(destination, digest) as found:
        if found == "same":
            return _repeat(destination, chosen)
        check_space(destination.absolute(), _room(parts))
        seconds: dict[str, float] = {}
        with timed(seconds, "load"):
            loaded = load(model, layout, vlm.Budget(), listener)
        try:
            with vlm.threads(loaded), staging.Staging(destination.absolute().parent) as place:
                notes = [SUM.format(len(parts)), *([WEIGHED.format(weight)] if weight != 1 else [])]
                notes += _check_base(parts, loaded, model, weights)
                listener.stage("Asking the untouched model who is shown")
                scenes = [_scene(loaded, one, chosen) for one in chosen]
                listener.stage(f"Adding up {len(parts)} adapters")
                given = [part.directory for part in parts]
                rank = adapter_sum.add_up(loaded.base, given, place, weight=weight)
                adapter.load(loaded, place)
                reports = []
                for number, (one, scene) in enumerate(zip(chosen, scenes, strict=True), 1):
                    listener.stage(f"Asking about concept {number} of {len(chosen)}")
                    reports.append(_judged(one, scene, model.name, notes))
                listener.stage("Writing the output")
                written = driver.write(
                    destination,
                    loaded,
                    [one.request for one in chosen],
                    reports,
                    driver.Sealed(Recipe(), {}, digest, weights, decides, report.run),
                    made_of=[{"sha256": p.own, "manifest": p.sealed[manifest.SEAL]} for p in parts],
                )
        finally:
            adapter.detach(loaded)
    return Combined(_rows(chosen, written), rank, destination, notes=notes)


# What is given ------------------------------------------------------------------------------------


def _part(directory: Path) -> PartOfSum:
    sealed = manifest.read(directory)
    changed = manifest.changed(directory, sealed)
    changed.pop(card.NAME, None)  # a model card may be edited
    for name, what in changed.items():
        raise BadInput(
            f"{directory} is not as it was written ({name!r} {what}): give a result that `fastsiu "
            "verify` takes for whole."
        )
    listed = sealed["files"]
    if not {adapter_files.ADAPTER, adapter_files.CONFIG} <= set(listed) or "combined" in sealed:
        what = "is a sum already" if "combined" in sealed else "holds no adapter"
        raise BadInput(f"{directory} {what}: give the --output directories of `unlearn`.")
    adapter_sum.check(directory)
    places = sorted(n for n in listed if n.split("/")[-1] == outputs.REPORT)
    told = [outputs.read_report((directory / name).parent) for name in places]
    trained = len(_labels(sealed))
    if not told or trained != len(told):
        raise BadInput(
            f"{directory} forgets {trained} concepts and reports on {len(told)}, as a --mode "
            "sequence does: give outputs of --mode independent."
        )
    known = {f.name for f in fields(Recipe)}
    given = {k: v.get("value") for k, v in sealed.get("recipe", {}).items() if k in known}
    own = adapter_files.check_files(directory, sealed)
    return PartOfSum(directory, sealed, own, Recipe(**given), told)


def _labels(sealed: Mapping[str, Any]) -> list[str]:
    """The labels of the training pictures, one a concept, as `driver.write` makes them."""
    labels = [str(picture.get("label")) for picture in sealed.get("pictures", [])]
    return sorted(label for label in labels if label.split("/")[-1] == "image")


def _chosen(
    parts: Sequence[PartOfSum], asked: Mapping[int, Request], file: Path
) -> list[PartConcept]:
    names = Names()
    for line, request in asked.items():
        names.add(concept_of(request), line)
    chosen: list[PartConcept] = []
    for part in parts:
        for number, told in enumerate(part.told):
            line = _line(part, number, told, asked, names, file)
            for other in chosen:
                if other.line == line:
                    raise BadInput(
                        f"{part.directory} and {other.part.directory} forget the same concept "
                        f"({file}, line {line}): give one of them."
                    )
            chosen.append(PartConcept(part, told, line, asked[line]))
    return chosen


def _line(
    part: PartOfSum,
    number: int,
    told: Mapping[str, Any],
    asked: Mapping[int, Request],
    names: Names,
    file: Path,
) -> int:
    """The line about the concept of a report: the one with its name or, where the report has none,
    with its picture."""
    if told.get("redacted"):
        fits = [line for line, request in asked.items() if _shows(part, number, request)]
        if len(fits) != 1:
            raise BadInput(
                f"The report in {part.directory} has no name, and {len(fits)} lines of {file} have "
                "the picture that it was trained on: give a file with one such line."
            )
        return fits[0]
    name = str(told.get("concept") or "")
    line = names.first(name)
    if line is None:
        raise BadInput(
            f"{file} has no line about {name}, whom {part.directory} forgets: add it, with a "
            "picture for the verdict."
        )
    return line


def _shows(part: PartOfSum, number: int, request: Request) -> bool:
    """Whether a request has the picture that a part was trained on; its key file tells."""
    try:
        key = outputs.key_of(part.directory)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"The report in {part.directory} has no name, and its {outputs.KEY}, which tells the "
            "picture, is gone: restore it."
        ) from error
    label = _labels(part.sealed)[number]
    written = {p.get("label"): p.get("commitment") for p in part.sealed["pictures"]}
    return written[label] == commitment(read_bytes(request.image), key)


def _check_base(
    parts: Sequence[PartOfSum], loaded: vlm.VLM, model: ModelRef, weights: Mapping[str, str] | None
) -> list[str]:
    """What has to be said of adapters that no manifest ties to weights. Raises BadInput for one
    that was made for other weights."""
    found = [
        adapter_files.check_belongs(part.directory, model.name, loaded.revision, weights)
        for part in parts
    ]
    return list(dict.fromkeys(sentence for some in found for sentence in some))


def _digest(
    chosen: Sequence[PartConcept],
    model: ModelRef,
    weights: dict[str, str] | None,
    decides: Mapping[str, Any],
) -> str:
    """SHA-256 of all that decides the result; equal calls write nothing again."""
    each = [
        outputs.request_digest(
            one.request,
            one.part.recipe,
            model.name,
            model.revision,
            weights=weights,
            adapter=one.part.own,
            **decides,
        )
        for one in chosen
    ]
    return hashlib.sha256(json.dumps(["combine 1", *each]).encode()).hexdigest()


def _room(parts: Sequence[PartOfSum]) -> int:
    """Bytes that the output takes, about, and once more while it is made."""
    sizes = ((part.directory / adapter_files.ADAPTER).stat().st_size for part in parts)
    return outputs.ROOM + 2 * sum(sizes)


# What is asked ------------------------------------------------------------------------------------


def _scene(loaded: vlm.VLM, one: PartConcept, chosen: Sequence[PartConcept]) -> Scene:
    """The concept as its training saw it, with the others as further ones to forget."""
    recipe = one.part.recipe
    if any(other.part.recipe.sees_anew for other in chosen):
        recipe = recipe.with_overrides(adapt="vision")
    others = [concept_of(other.request) for other in chosen if other is not one]
    scene = session.introduce(loaded, one.request, recipe, load_image(one.request.image), others)
    session.check_known(scene, one.request)
    session.protect(scene, one.request)
    return scene


def _judged(one: PartConcept, scene: Scene, model: str, notes: Sequence[str]) -> dict[str, Any]:
    """The report of one concept, asked of the sum."""
    given = beside(one.request)
    verdict, answers = decide(scene, given.more, given.rest)
    left_out = [adapter.LEFT_OUT] * scene.recipe.sees_anew
    caveats = [adapter.DROPPABLE, *left_out, *notes, *given.notes]
    if told := ambiguous(scene.concept):
        caveats.append(told)
    caveats += [*decode.remarks(scene.vlm), *verdict.remarks]
    return {
        **scene.kind.entries(one.request),
        "model": source.shown_name(model),
        **verdict.entries(answers),
        "not_asked": not_asked(),
        "caveats": caveats,
    }


# What came out ------------------------------------------------------------------------------------


def _rows(chosen: Sequence[PartConcept], reports: Sequence[Mapping[str, Any]]) -> list[Row]:
    """reports: as they were written"""
    rows = []
    for number, (one, report) in enumerate(zip(chosen, reports, strict=True), 1):
        rate = {kind: report["after"].get(kind, {}).get("value") for kind in report["after"]}
        gone = rate.get("efficacy")
        rows.append(
            Row(
                one.line,
                CONCEPT if report.get("redacted") else one.request.concept,
                one.told["verdict"],
                report["verdict"],
                report["reasons"],
                None if gone is None else 1 - gone,
                rate.get("specificity"),
                rate.get("facts"),
                f"{number:03d}",
            )
        )
    return rows


def _repeat(destination: Path, chosen: Sequence[PartConcept]) -> Combined:
    reports = [
        outputs.read_report(destination / f"{number:03d}") for number in range(1, len(chosen) + 1)
    ]
    rank = adapter_sum.check(destination)["r"]
    note = f"{destination} already holds this very sum: nothing was done."
    return Combined(_rows(chosen, reports), rank, destination, True, [note])
