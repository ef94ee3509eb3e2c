"""What an evaluation loads and leaves on disk: models, what an adapter's manifest says, the
untouched model's observations, and the output."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .. import output as outputs
from ..disk.staging import write
from ..guards.strict_json import read_json
from ..model import adapter_files, source, vlm
from ..model.memory import Layout
from ..report.redact import redacted
from ..request import BadInput, Recipe, check_kind
from ..samples.kinds import Kind, recorded, reported
from ..session import Listener
from ..settings import ModelRef, deciding, load
from ..text.concept import Concept
from . import directories
from .exam import Exam
from .observe import Observations

FORMAT = "fastsiu observations 2"
UNTOUCHED = "untouched.json"  # the untouched model's observations, in the output
NOT_ASKED = ("recipe", "seeds", "masks")  # of a manifest: nothing was trained


@dataclass(frozen=True)
class Loadable:
    """A model that can be loaded; several of them never at once."""

    ref: ModelRef
    layout: Layout
    listener: Listener

    @property
    def name(self) -> str:
        return self.ref.name

    @functools.cached_property
    def weights(self) -> dict[str, str]:
        """Its files by digest, where it is a directory; about a second per gigabyte."""
        return outputs.digest_model(self.name) if self.ref.is_directory else {}

    @functools.cached_property
    def commit(self) -> str | None:
        """The commit of a hub model, whatever branch or tag was asked for."""
        return None if self.weights else source.describe(self.name, self.ref.revision)[2]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers: its files or its commit, and how it computes."""
        files: Any = self.weights or [self.name, self.commit]
        # "auto" is another dtype on another device.
        config = source.read_config(self.name, self.ref.revision)
        dtype = source.dtype_name(config, self.layout.dtype, self.layout.device)
        return {"model": files, "dtype": dtype} | deciding(self.layout)

    @contextmanager
    def loaded(self) -> Iterator[vlm.VLM]:
        model = load(self.ref, self.layout, vlm.Budget(), self.listener)
        with vlm.threads(model):
            yield model


def evaluated(
    concept: Concept,
    given: str | None,
    adapter_dir: Path | None,
    model: ModelRef,
    base: str | Path | None,
) -> tuple[Concept, Kind]:
    """The concept and its kind: given, or else as they were when it was unlearned. Raises BadInput
    for an unknown kind, and for a report that cannot be used."""
    check_kind(given)
    made = adapter_dir if base is None else Path(model.name)
    if made is None:
        return concept, recorded(concept, given, {})
    sealed, report, told = adapter_files.manifest_of(made), made / outputs.REPORT, dict[str, Any]()
    if report.is_file():
        remedy = "restore it or remove it"
        told = dict(read_json(report, what=str(report), remedy=remedy, shape=dict))
    return reported(concept, told), recorded(concept, given or sealed.get("kind"), {})


def rate_of(adapter_dir: Path | None) -> float:
    """The learning rate in the manifest of an adapter's directory, the default one where nothing
    says it."""
    recipe = {} if adapter_dir is None else adapter_files.manifest_of(adapter_dir).get("recipe")
    entry = recipe.get("lr") if isinstance(recipe, dict) else None
    value = entry.get("value") if isinstance(entry, dict) else None
    return float(value) if isinstance(value, int | float) and value > 0 else Recipe.lr


def digest_of(
    exam: Exam, settings: dict[str, Any], merged: Loadable | None, adapter_dir: Path | None
) -> str:
    """SHA-256 of everything that decides the report."""
    adapted = None
    if adapter_dir is not None:
        files = [
            adapter_dir / file for file in ("adapter_config.json", "adapter_model.safetensors")
        ]
        adapted = [outputs.digest_file(file) for file in files if file.is_file()]
    keywords = [question.keywords for question in exam.questions]
    return directories.digest(
        exam, **settings, adapter=adapted, merged=merged and merged.identity, keywords=keywords
    )


def read_untouched(path: Path) -> dict[str, Any]:
    """The content of an untouched.json (`untouched_file`). Raises BadInput for any other file."""
    values = read_json(
        path,
        what=str(path),
        remedy=f"give the {UNTOUCHED} of an earlier --output, or leave --untouched out",
    )
    try:
        if (
            values["format"] != FORMAT
            or not isinstance(values["digest"], str)
            or not isinstance(values["others"], list)
        ):
            raise ValueError
        Observations.from_dict(values)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{str(path)!r} is not the {UNTOUCHED} of an earlier --output: leave --untouched out."
        ) from error
    return dict(values)


def same_exam(cached: dict[str, Any], key: str, path: Path, exam: Exam) -> Observations:
    """The observations in the content of an untouched.json. Raises BadInput where they are of
    another exam than the one that `key` stands for."""
    if cached["digest"] != key:
        raise BadInput(
            f"{str(path)!r} is of another exam: the model's files, pictures, questions, names, "
            "dtype or answer length differ; leave --untouched out."
        )
    found = Observations.from_dict(cached)
    if len(found.replies) != len(exam.cells):
        raise BadInput(f"{str(path)!r} is damaged: leave --untouched out.")
    return found


def untouched_file(exam: Exam, before: Observations, key: str) -> dict[str, Any]:
    """What untouched.json holds. key: of all that decides the observations
    (`directories.digest`)."""
    return {
        "format": FORMAT,
        "digest": key,
        "others": [other.name for other in exam.others],
        **before.as_dict(),
    }


def write_output(
    destination: Path,
    report: dict[str, Any],
    kept: dict[str, Any],
    digest: str,
    model: Loadable,
    settings: dict[str, Any],
    pictures: dict[str, bytes],
    picture: Image.Image | None,
    run: str = "",
) -> dict[str, Any]:
    """Writes reports, untouched.json and manifest to `destination` in one transaction.

    kept:     the content of untouched.json. A redacted report has none beside it, because it holds
              names and answers
    digest:   of all that decides the report (`digest_of`)
    model:    the model that was measured
    settings: what decides the answers and how the report looks
    pictures: for the manifest, the bytes of each by its label
    picture:  what report.html shows, if anything
    run:      the text of run.toml; "" for none

    Returns the report as it was written. Raises BadInput where nothing can be written there.
    """
    redact = settings.get("redact", False)
    written = redacted(report) if redact else report
    weights, named = model.weights, written["model"] == report["model"]
    if not named:  # a file of the model's directory may have any name
        weights = {f"{number:03d}": sha for number, sha in enumerate(weights.values(), 1)}
    transaction = outputs.Transaction(destination)
    with transaction as staging:
        outputs.write_reports(staging, report, redact=redact, picture=picture)
        outputs.write_run(staging, run, named=named)
        if not redact:
            write(
                staging / UNTOUCHED,
                json.dumps(kept, ensure_ascii=True, allow_nan=False).encode() + b"\n",
            )
        whole = outputs.manifest(
            recipe=Recipe(),
            model_id=written["model"],
            revision=model.commit,
            weights=weights,
            digest=digest,
            key=transaction.key,
            pictures=pictures,
            masks={},
            settings={k: v for k, v in settings.items() if k != "model"},
        )
        transaction.commit({k: v for k, v in whole.items() if k not in NOT_ASKED})
    return written
