"""A stand-alone model out of a base and an adapter, and the verdict repeated on it as it is loaded
from disk.

Each matrix is added up in fp32 and rounded once, to the dtype that it is stored in.
`evaluate.merge_verdict` asks the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from . import output as outputs
from .evaluate.attacks import not_asked
from .evaluate.merge_verdict import FORMS, Verifier, free
from .guards.first_read import first_reads_count
from .guards.strict_json import read_json
from .images import read_bytes
from .model import adapter, adapter_files, decode, licence, placement, source, vlm
from .model.fold import SHARD, fold, save
from .report import card
from .report.redact import MODEL, redacted
from .request import BadInput, Recipe, Request, names_of, path_of
from .samples.kinds import reported
from .session import Listener, timed
from .settings import ModelRef, ReportOptions, Settings
from .text.concept import Concept

SHAPE = {  # of what is read of an adapter's report, and of a manifest
    "concept": str,
    "aliases": [str],
    "as_word": bool,
    "kind": (str, [str]),
    "phrase": str,
    "redacted": bool,
    "verdict": (str, None),
    "reasons": [str],
    "caveats": [str],
    "dreams": [dict],
    "answers": [{"kind": str, "question": str, "picture": (str, None)}],
    "merge": dict,
}


@dataclass(frozen=True)
class Writing:
    """How a merged model is written.

    redact: names, questions, answers and file names stay out of what is written; so they do where
            the adapter's report has none
    shard:  the largest file of weights, GB of 10**9 bytes
    run:    the text of run.toml, the file that repeats the merge; no such file where it is empty
    """

    redact: bool = False
    shard: float = SHARD
    run: str = ""


@dataclass(frozen=True)
class Merged:
    """What `merge` returns.

    forgotten: in every form that was verified; None where nothing was
    report:    report.json; the figures of the merge alone where nothing was verified
    """

    forgotten: bool | None
    reasons: list[str]
    report: dict[str, Any]
    output: Path
    repeated: bool = False
    notes: list[str] = field(default_factory=list)


@first_reads_count()
def merge(
    adapter_dir: str | Path,
    output: str | Path,
    *,
    model: ModelRef = ModelRef(),
    image: str | Path | None = None,
    concept: str | None = None,
    aliases: tuple[str, ...] = (),
    images: str | Path | None = None,
    retain: str | Path | None = None,
    verify: Sequence[str] = FORMS,
    settings: Settings = Settings(),
    writing: Writing = Writing(),
    listener: Listener | None = None,
) -> Merged:
    """Writes the merged model to `output` in one transaction, readable by plain transformers, with
    the verdict on it.

    concept: what was forgotten; the adapter's report says it where it is left out
    verify:  in which forms the questions are asked, of `FORMS`; "stored" always is. Empty: nothing
             is asked, no picture is needed
    settings: `device`, and `dtype` of the weights written ("auto": the base's own); merging has no
             other
    Raises BadInput (nothing is written) and NumericFailure where the merged weights overflow.
    """
    listener, folder, forms = listener or Listener(), Path(adapter_dir), _forms(verify)
    name, dtype = model.name, settings.dtype
    device, said = placement.settled(settings.device)
    if said:
        listener.note(said)
    told, sealed = _json(folder / "report.json"), adapter_files.manifest_of(folder)
    redact = writing.redact or bool(told.get("redacted"))
    told = {} if told.get("redacted") else told
    about = told | {"kind": told.get("kind") or sealed.get("kind")}
    if not forms and not redact and (concept or aliases):
        raise BadInput(
            "--no-verify asks nothing, and without --redact no name is hidden, so --concept and "
            "--alias would not be read: leave them out."
        )
    request = _request(image, concept, aliases, images, retain, about) if forms else None
    source.check_options(dtype, None, None)
    config, _, revision = source.describe(name, model.revision)
    if getattr(config, "quantization_config", None) is not None:
        raise BadInput(
            f"{name} is stored quantised, and nothing can be added to that: give the model that "
            "it was made from."
        )
    kept = source.dtype_name(config, "auto", "cuda")  # as stored, on a CPU as well
    if kept not in source.DTYPES:
        raise BadInput(
            f"{name} is stored in {kept}, which cannot be merged into: give a copy in bfloat16 "
            "or float32."
        )
    stored = kept if dtype == "auto" else dtype
    weights = outputs.digest_model(name) if Path(name).is_dir() else {}
    if not (folder / adapter_files.ADAPTER).is_file():
        raise BadInput(
            f"{folder} holds no adapter ({adapter_files.ADAPTER} is missing): give the --output "
            "directory of a run."
        )
    own = adapter_files.check_files(folder, sealed)
    adapter_files.check_weights(folder, sealed, weights, name, revision)
    pictures = _pictures(request, redact)
    decides: dict[str, Any] = {"dtype": stored, "verify": forms}
    decides |= ReportOptions(redact).deciding
    decides |= {} if writing.shard == SHARD else {"shard": writing.shard}
    digest = _digest(name, revision, weights, own, request, pictures, decides)
    room = _size(name) if weights else outputs.ROOM
    with outputs.reserved(output, digest, size=room) as found:
        if found == "same":
            return _repeat(Path(output))
        seconds: dict[str, float] = {}
        caveats = _caveats(sealed, told)
        transaction = outputs.Transaction(output)
        with transaction as staging:
            verifier = None
            if request is not None:
                verifier = Verifier(
                    name, revision, staging, request, _seed(sealed), told, device, listener
                )
            listener.stage("Loading the model")
            with timed(seconds, "load"):
                loaded = vlm.load(name, revision=revision, device=device, dtype=kept)
            caveats += decode.remarks(loaded)
            beside = (
                Path(name)
                if weights
                else Path(str(cached_file(name, "config.json", revision=revision))).parent
            )
            weights = weights or outputs.digest_model(beside)
            adapter_files.check_weights(folder, sealed, weights, name, revision)
            if verifier:
                with timed(seconds, "verdict"):
                    verifier.first(loaded)
            listener.stage("Merging")
            with timed(seconds, "merge"):
                adapter.load(loaded, folder)
                change = fold(loaded, source.DTYPES[stored])
                # a base on the hub has more files than were fetched to load it
                terms = licence.terms_in(beside) if Path(name).is_dir() else None
                terms = terms or licence.terms_of_hub(name, revision)
                caveats += [terms.problem] if terms.problem else []
                save(
                    loaded,
                    staging,
                    beside,
                    source.DTYPES[stored],
                    legal=terms.files,
                    shard=writing.shard,
                )
                del loaded
                free()
            shown = source.shown_name(name)
            if redact and _tells(
                shown, concept or told.get("concept"), (*aliases, *told.get("aliases", [])), sealed
            ):
                shown, weights = (
                    MODEL,
                    {f"{n:03d}": sha for n, sha in enumerate(weights.values(), 1)},
                )
            figures = {"model": shown, "weights": change.as_dict(), "caveats": caveats}
            told_now: dict[str, Any] = figures
            if verifier:
                with timed(seconds, "verdict"):
                    rows = [verifier.row(form, kept, stored) for form in forms]
                caveats += [
                    *decode.told(*verifier.slow),
                    *(verifier.inquiry.remarks if verifier.inquiry else []),
                ]
                told_now = {
                    **_report(rows, request, figures),
                    "seconds": {k: round(v, 3) for k, v in seconds.items()},
                }
                outputs.write_reports(staging, told_now, redact=redact)
            outputs.write_card(
                staging, [told_now], _base(name, revision, shown, terms), merged=True, redact=redact
            )
            # An adapter without names makes an output without them, whatever the command line says.
            run = writing.run if redact == writing.redact else ""
            outputs.write_run(staging, run, named=shown != MODEL)
            written = redacted(told_now) if redact else told_now
            # A merge is no training: what the recipe and the masks were is in the adapter's own
            # manifest.
            made = outputs.manifest(
                recipe=Recipe(),
                model_id=shown,
                revision=revision,
                weights=weights,
                digest=digest,
                key=transaction.key,
                pictures=pictures,
                masks={},
                settings=decides,
            )
            made = {k: v for k, v in made.items() if k not in ("recipe", "seeds", "masks")}
            if about["kind"]:
                made["kind"] = about["kind"]
            transaction.commit({**made, "adapter": {"sha256": own}, "merge": change.as_dict()})
        forgotten = written["verdict"] == "forgotten" if verifier else None
        return Merged(
            forgotten, written.get("reasons", []), written, Path(output), notes=written["caveats"]
        )


def _base(name: str, revision: str | None, shown: str, terms: licence.Terms) -> card.Base:
    """The untouched model, for the model card. shown: its name in the report"""
    if shown == MODEL:
        return card.Base(shown)
    place, commit = (name, revision)
    if Path(name).is_dir():
        found = licence.place_on_hub(name)
        if found is None:
            return card.Base(shown, terms=terms.card)
        place, commit = found
    return card.Base(place, place, commit, terms.card)


def _report(
    rows: list[dict[str, Any]], request: Request | None, figures: dict[str, Any]
) -> dict[str, Any]:
    """report.json: what its weights as stored do, as `unlearn` has it; every form under
    "merged"."""
    first, caveats = rows[0], list(figures["caveats"])
    reasons = list(first["reasons"])
    for row in rows[1:]:
        reasons += [f"In {row['dtype']}: {reason}" for reason in row.get("reasons", [])]
        if row["verdict"] is None:
            caveats.append(f"Not verified in {row['dtype']}: {row['reason']}")
    kept = {
        k: first[k] for k in ("before", "after", "thresholds", "families", "headline", "answers")
    }
    return {
        **figures,
        "concept": request.concept if request else "",
        **({"kind": request.kind} if request and request.kind else {}),
        "verdict": "not forgotten" if reasons else "forgotten",
        "reasons": reasons,
        **kept,
        "not_asked": not_asked(),
        "caveats": caveats,
        "merged": rows,
    }


def _forms(verify: Sequence[str]) -> list[str]:
    if unknown := [form for form in verify if form not in FORMS]:
        raise BadInput(
            f"The form {unknown[0]!r} is unknown: choose from {', '.join(FORMS)} for --verify."
        )
    return [form for form in FORMS if form in verify or form == "stored"] if verify else []


def _request(
    image: str | Path | None,
    concept: str | None,
    aliases: tuple[str, ...],
    images: str | Path | None,
    retain: str | Path | None,
    told: Mapping[str, Any],
) -> Request:
    if image is None:
        raise BadInput(
            "The verdict needs the picture, which is never stored: give --image FILE, or "
            "--no-verify to go without."
        )
    concept = concept or told.get("concept")
    if not concept:
        raise BadInput(
            "The adapter's report names no concept: give --concept NAME, or --no-verify to go "
            "without a verdict."
        )
    asked = reported(Concept(concept.strip(), names_of(aliases, "aliases")), told)
    return Request(
        asked.name,
        Path(image),
        asked.aliases,
        images=path_of(images, "images"),
        retain=path_of(retain, "retain"),
        as_word=asked.as_word,
        kind=told.get("kind") if isinstance(told.get("kind"), str) else None,
    )


def _pictures(request: Request | None, redact: bool) -> dict[str, Path]:
    """By its label in the manifest, the file of each picture."""
    return {} if request is None else outputs.pictures_of(request, redact)


def _json(path: Path) -> dict[str, Any]:
    """A report or manifest, empty where there is no such file."""
    if not path.is_file():
        return {}
    remedy = "restore it, or remove it and give --concept"
    return dict(read_json(path, what=str(path), remedy=remedy, shape=SHAPE))


def _caveats(sealed: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    caveats = [
        "Only these weights were changed: the untouched model and its copies know what they knew."
    ]
    if not sealed.get("model", {}).get("sha256"):
        caveats.append(adapter_files.UNSEALED)
    if trained := sealed.get("settings", {}).get("quantize"):
        caveats.append(
            f"The adapter was trained on the model in {trained}, and merged into the weights "
            "that were not quantised."
        )
    return caveats


def _tells(
    model: str, concept: str | None, aliases: Sequence[str], sealed: Mapping[str, Any]
) -> bool:
    """Whether the model's name may tell the concept's; the adapter was made by someone who knew
    that, perhaps without names."""
    hidden = redacted({"model": model, "concept": concept, "aliases": aliases})["model"] == MODEL
    return hidden or sealed.get("model", {}).get("id") == MODEL


def _seed(sealed: Mapping[str, Any]) -> int:
    return int(sealed.get("seeds", {}).get("recipe", 0))


def _digest(
    name: str,
    revision: str | None,
    weights: Mapping[str, str],
    own: Mapping[str, str],
    request: Request | None,
    pictures: Mapping[str, Path],
    settings: Mapping[str, Any],
) -> str:
    """SHA-256 of everything that decides the result; equal requests write nothing again."""
    seen = sorted(
        (label.split("/")[0], hashlib.sha256(read_bytes(path)).hexdigest())
        for label, path in pictures.items()
    )
    who = None if request is None else [request.concept, sorted(set(request.aliases))]
    model = dict(weights) or [name, revision]  # a directory has many spellings
    content = {
        "merge": 1,
        "model": model,
        "adapter": dict(own),
        "concept": who,
        "pictures": seen,
        "settings": dict(settings),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _repeat(output: Path) -> Merged:
    report = outputs.read_report(output) if (output / outputs.REPORT).is_file() else {}
    note = f"{output} already holds the result of this very merge: nothing was done."
    forgotten = report["verdict"] == "forgotten" if report else None
    report = report or {"weights": _json(output / outputs.MANIFEST)["merge"], "caveats": []}
    return Merged(forgotten, report.get("reasons", []), report, output, True, [note])


def _size(directory: str) -> int:
    """Bytes of a model's weights, which the merged ones take as well."""
    files = (path for path in Path(directory).iterdir() if path.suffix in (".safetensors", ".bin"))
    return outputs.ROOM + sum(path.stat().st_size for path in files)
