"""What is done with a suite, and what decides each concept's result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ... import output as outputs
from ...disk.request_file import first_sentence_of
from ...guards.strict_json import read_json
from ...images import read_bytes
from ...model import vlm
from ...model.memory import Layout, budget
from ...request import BadInput, Recipe
from ...session import Listener
from ...settings import ModelRef, load
from .. import eval_files
from ..exam import Exam
from ..inquiry import VERDICT
from ..observe import Observations
from . import exam as suite_exam
from . import suite

FORMAT = "fastsiu suite evaluation 1"


@dataclass(frozen=True)
class SuiteOptions:
    """What is done with each concept of a suite.

    concepts:    slugs, names or aliases; all when empty
    unlearn:     each is unlearned from its training picture first
    adapters:    DIR with an adapter of each concept in DIR/SLUG
    adapter_dir: one adapter for all of them
    per_other, limit: how many pictures (`suites.exam.exam_of`)
    untouched:   an earlier output of the same exams, with another adapter or recipe: the untouched
                 model is not asked again
    max_new_tokens: of an answer
    """

    concepts: tuple[str, ...] = ()
    unlearn: bool = False
    adapters: Path | None = None
    adapter_dir: Path | None = None
    per_other: int = 2
    limit: int | None = None
    untouched: Path | None = None
    max_new_tokens: int = 64

    @property
    def changes(self) -> bool:
        """Whether there is an unlearned model to be asked."""
        return self.unlearn or self.adapters is not None or self.adapter_dir is not None

    def check(self) -> None:
        """Raises BadInput for options that exclude each other and numbers out of their bounds."""
        if sum((self.unlearn, self.adapters is not None, self.adapter_dir is not None)) > 1:
            raise BadInput("--unlearn, --adapters and --adapter exclude each other: choose one.")
        if (self.limit is not None and self.limit < 1) or self.per_other < 0:
            raise BadInput(
                "--limit must be at least 1 and --per-other at least 0: give larger numbers."
            )


@dataclass(frozen=True)
class SuiteJob:
    """What every process needs to know.

    weights:  SHA-256 of the model's files, where it is a directory
    commit:   of a hub model, whatever branch or tag was asked for
    deciding: settings that decide the result
    limited:  whether there is a memory limit
    """

    given: suite.Suite
    options: SuiteOptions
    output: Path
    model: ModelRef
    recipe: Recipe
    origins: dict[str, str]
    weights: dict[str, str] | None
    commit: str | None
    layout: Layout
    deciding: dict[str, Any]
    limited: bool

    @property
    def shown(self) -> str:
        """The model in reports, where a path would tell whose machine it was."""
        return Path(self.model.name).name if self.model.is_directory else self.model.name

    def adapter_of(self, subject: suite.Subject) -> Path | None:
        options = self.options
        return options.adapter_dir or (options.adapters and options.adapters / subject.slug)

    def reason(self, error: BaseException) -> str:
        """Why a concept failed, for the table: a sentence without paths."""
        options = self.options
        places = {
            "the suite": self.given.directory,
            "the adapters": options.adapters,
            "the adapter": options.adapter_dir,
            "the model": Path(self.model.name) if self.model.is_directory else None,
        }
        return first_sentence_of(error, places)

    def exam_of(self, subject: suite.Subject) -> Exam:
        options = self.options
        return suite_exam.exam_of(
            self.given, subject, per_other=options.per_other, limit=options.limit
        )

    def load(self, listener: Listener) -> vlm.VLM:
        room = budget(self.layout, self.recipe.batch_size, self.limited)
        return load(self.model, self.layout, room, listener)

    def digest(self, subject: suite.Subject) -> str:
        """SHA-256 over everything that decides the result of one concept; files by their
        content."""
        place = self.adapter_of(subject)
        content = {
            "untouched": self.exam_digest(subject),
            "recipe": self.recipe.as_dict() if self.options.unlearn else None,
            "families": list(VERDICT) if self.options.changes else None,
            "adapter": place
            and {
                p.name: outputs.digest_file(p)
                for p in sorted(place.glob("adapter_*"))
                if p.is_file()
            },
        }
        return _sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())

    def exam_digest(self, subject: suite.Subject) -> str:
        """SHA-256 over everything that decides what the untouched model answers."""
        seen = suite_exam.seen(self.given, subject, self.options.per_other, self.options.limit)
        content = {
            "format": FORMAT,
            "observations": eval_files.FORMAT,
            "concept": [subject.name, *subject.aliases],
            "image": _sha256(read_bytes(subject.training)),
            "pictures": [
                (s.label, s.role, s.shows, _sha256(read_bytes(Path(str(s.source))))) for s in seen
            ],
            "questions": [asdict(q) for q in suite_exam.questions_of(self.given, subject)],
            "others": [(c.name, c.aliases) for c in suite_exam.others_of(self.given, subject)],
            "limit": self.options.limit,
            "longest": self.options.max_new_tokens,
            # a branch moves, and a directory has many spellings
            "model": self.weights or [self.model.name, self.commit],
            "settings": self.deciding,
        }
        return _sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())


def cached(job: SuiteJob, subject: suite.Subject) -> Observations | None:
    """What the untouched model was found to do in an earlier output. Raises BadInput where that was
    asked something else."""
    path = job.options.untouched and job.options.untouched / subject.slug / eval_files.UNTOUCHED
    if not path or not path.is_file():
        return None
    values = read_json(path, what=str(path), remedy="leave --untouched out", shape={"digest": str})
    if values.get("digest") == job.exam_digest(subject):
        try:
            found = Observations.from_dict(values)
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} is damaged: leave --untouched out.") from error
        exam = job.exam_of(subject)
        if len(found.replies) != len(exam.cells):
            raise BadInput(f"{path} is damaged: leave --untouched out.")
        return found
    raise BadInput(
        f"{path} is of another exam: the suite, --limit, --per-other or the model differ; leave "
        "--untouched out."
    )


def manifest(
    job: SuiteJob,
    subject: suite.Subject,
    key: bytes,
    masks: dict[str, Any],
    before: tuple[str, bytes] | None = None,
) -> dict[str, Any]:
    """before: the digest of the result and the training picture, as they were before the work,
    since files may change meanwhile; None reads them now"""
    digest, picture = before or (job.digest(subject), read_bytes(subject.training))
    whole = outputs.manifest(
        recipe=job.recipe,
        origins=job.origins,
        model_id=job.shown,
        revision=job.commit,
        weights=job.weights or {},
        digest=digest,
        key=key,
        pictures={"image": picture},
        masks=masks,
        settings=job.deciding,
    )
    if job.options.unlearn:
        return whole
    return {k: v for k, v in whole.items() if k not in eval_files.NOT_ASKED}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
