"""What lies in a suite's output: the concepts that are done, and the table of all of them.

OUT/suite.json and OUT/report.md are drawn from what is there, whichever run has done it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import output as outputs
from ...disk import staging
from ...guards.strict_json import read_json
from ...manifest import SEAL, seal
from ...request import BadInput
from ..pooled import markdown, pooled
from . import suite
from .job import FORMAT, SuiteJob

SUITE = "suite.json"


@dataclass
class Outcome:
    """What became of one concept.

    status:  "forgotten", "not forgotten", "untouched" (only measured) or "failed"
    numeric: the computation failed, and not the input
    """

    slug: str
    concept: str
    status: str
    reasons: list[str] = field(default_factory=list)
    numeric: bool = False  # it failed in the computation, not because of what was given


def is_there(job: SuiteJob, subject: suite.Subject) -> bool:
    place = job.output / subject.slug
    return place.exists() and outputs.check_destination(place, job.digest(subject)) == "same"


def done_already(job: SuiteJob) -> dict[str, dict[str, Any]]:
    """The reports of the concepts whose outputs are complete. Raises BadInput where the directory
    holds anything else."""
    if not begin(job):
        return {}
    return {
        s.slug: outputs.read_report(job.output / s.slug)
        for s in job.given.subjects
        if is_there(job, s)
    }


def begin(job: SuiteJob) -> bool:
    """Begins the output. Returns whether an earlier run has begun it already. Raises BadInput where
    it holds anything else, or cannot be written."""
    if not _begun(job.output):
        try:
            outputs.check_destination(job.output, "")  # absent or empty, or it raises
            return False
        except BadInput:
            if not _begun(job.output):  # else another run began between the two looks
                raise
    table = job.output / SUITE
    if table.is_file():  # a suite itself has a file of this name
        stored = read_json(table, what=str(table), remedy=outputs.OTHER, shape=dict)
        if stored.get("format") != FORMAT:
            raise BadInput(f"{table} is not the table of an evaluation: {outputs.OTHER}.")
    staging.sweep(job.output)
    staging.check_writable(job.output / SUITE, outputs.OTHER)
    return True


def _begun(place: Path) -> bool:
    """Does the directory hold a suite's table, or only the unfinished files of a run that has just
    begun?"""
    if (place / SUITE).is_file():
        return True
    try:
        names = os.listdir(place)
    except OSError:  # absent, or no directory: whoever needs it says so
        return False
    return SUITE in names or (bool(names) and all(staging.is_ours(name) for name in names))


def outcome_of(subject: suite.Subject, report: dict[str, Any]) -> Outcome:
    status = report["verdict"] if report["adapter"] else "untouched"
    return Outcome(
        subject.slug, subject.name, status, list(report["reasons"]) if report["adapter"] else []
    )


def write_table(
    job: SuiteJob, done: dict[str, dict[str, Any]], failed: dict[str, Outcome]
) -> dict[str, Any]:
    """Writes suite.json and report.md from all concepts that are done, by this run or by others."""
    with staging.claim(job.output, SUITE, wait=True):
        for subject in job.given.subjects:
            if subject.slug not in done and is_there(job, subject):
                done[subject.slug] = outputs.read_report(job.output / subject.slug)
                failed.pop(subject.slug, None)
        content = _drawn(job, done, failed)
        content[SEAL] = seal(content)
        text = json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
        staging.replace_file(job.output / SUITE, text.encode("utf-8", "backslashreplace"))
        staging.replace_file(job.output / "report.md", markdown(content).encode("utf-8", "replace"))
    return content


def _drawn(
    job: SuiteJob, done: dict[str, dict[str, Any]], failed: dict[str, Outcome]
) -> dict[str, Any]:
    subjects = [s for s in job.given.subjects if s.slug in done or s.slug in failed]
    outcomes = [failed.get(s.slug) or outcome_of(s, done[s.slug]) for s in subjects]
    return {
        "format": FORMAT,
        "suite": job.given.title,
        "model": job.shown,
        "of": len(job.given.subjects),
        "concepts": [
            {
                "slug": o.slug,
                "concept": o.concept,
                "status": o.status,
                "reasons": o.reasons,
                "headline": done.get(o.slug, {}).get("headline"),
                "rows": done[o.slug]["rows"] if o.slug in done else {},
            }
            for o in outcomes
        ],
        "pooled": pooled([done[s.slug]["rows"] for s in subjects if s.slug in done]),
    }
