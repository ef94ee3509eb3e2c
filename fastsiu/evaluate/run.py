"""The story behind `fastsiu eval`: load, ask the untouched and the unlearned model, make rows of
it, write the report."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import output as outputs
from ..images import picture_of, read_bytes
from ..model import adapter, adapter_files, decode, vlm
from ..report.redact import redacted
from ..request import BadInput, Recipe
from ..samples.neighbours import neighbours
from ..samples.scene import Scene
from ..session import Listener
from ..settings import ModelRef, ReportOptions, Settings, choose_layout
from ..text.concept import Concept
from . import attacking, directories, g_eval, lmms
from .eval_files import (
    Loadable,
    digest_of,
    evaluated,
    rate_of,
    read_untouched,
    same_exam,
    untouched_file,
    write_output,
)
from .eval_report import report_of
from .exam import OF_CONCEPT, Exam
from .grading import Grader
from .observe import Observations, examine, with_fluency
from .pairs import to_grade

MERGED = "This model was merged by fastsiu, so it is not the untouched one: give that with --base."


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns. forgotten: None where only the untouched model was asked; report:
    report.json."""

    forgotten: bool | None
    report: dict[str, Any]
    output: Path | None
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 1 if self.forgotten is False else 0


@dataclass(frozen=True)
class ExamFiles:
    """The pictures and questions of an exam, as files and directories (`directories.exam_of`)."""

    image: Path | None = None
    images: Path | None = None
    others: Path | None = None
    lookalikes: Path | None = None
    groups: Path | None = None
    control: Path | None = None
    questions: Path | None = None


@dataclass(frozen=True)
class Extras:
    """What is done besides the exam.

    attacks:   what tries to get the concept back, words of `attacking.chosen`; None: nothing
    judged_by: who grades the answers about the concept's pictures (G-Eval); what leaves the machine
               is told first
    lmms_eval: where the script for the public benchmarks is written, or where its results are read;
               for a merged model
    max_new_tokens: of an answer
    """

    attacks: str | None = None
    judged_by: Grader | None = None
    lmms_eval: Path | None = None
    max_new_tokens: int = 64


def evaluate(
    concept: Concept,
    files: ExamFiles = ExamFiles(),
    *,
    kind: str | None = None,
    model: ModelRef = ModelRef(),
    adapter_dir: Path | None = None,
    base: str | Path | None = None,
    settings: Settings = Settings(),
    report: ReportOptions = ReportOptions(),
    extras: Extras = Extras(),
    untouched: Path | None = None,
    output: Path | None = None,
    listener: Listener | None = None,
) -> Evaluation:
    """What a model knows of a concept, and what it has lost of all else.

    concept:     gets the aliases in the report of the adapter or of the merged model beside its own
    kind:        of the concept, of `request.KINDS`; None: what the manifest of the adapter or of
                 the merged model says, else "person"
    adapter_dir: an --output directory of `unlearn`; the untouched model is `model` without it
    base:        the untouched model where `model` is merged, unlearned already; they are loaded one
                 after the other
    untouched:   an untouched.json, which every output has: the untouched model is not asked again
    output:      a directory for the report in one transaction; nothing is written without

    Without adapter and base only `model` is asked, as the untouched one. Where no picture says who
    else there is, the untouched model is asked whom it takes for alike.

    Raises BadInput (the input cannot be used; nothing is written) and NumericFailure.
    """
    listener, image, longest = listener or Listener(), files.image, extras.max_new_tokens
    if not concept.name.strip():
        raise BadInput("The concept's name is empty: pass the name with --concept NAME.")
    _check(files, adapter_dir, base, report, extras, output)
    tried = attacking.chosen(extras.attacks)
    concept, as_was = evaluated(concept, kind, adapter_dir, model, base)
    training = None if image is None else read_bytes(image)
    exam = directories.exam_of(concept, **vars(files), kind=as_was)
    for seen in exam.pictures:
        seen.load()  # a damaged picture is told now, not after an hour

    def of(ref: ModelRef) -> Loadable:
        return Loadable(ref, choose_layout(ref, settings, Recipe(), None, listener), listener)

    measured = of(model)
    first = measured if base is None else of(ModelRef(base, model.revision))
    name = model.name
    remembered = output is not None or untouched is not None  # else no digest is of use
    decides = {"max_new_tokens": longest} | (first.identity if remembered else {})
    judged_by = extras.judged_by
    if judged_by is not None:  # without permission it ends here, before anybody waits for answers
        asked = sum(
            1
            for cell in exam.cells
            if cell.seen and cell.seen.role in OF_CONCEPT and cell.question.kind == "name"
        )
        models = 1 if base is None and adapter_dir is None else 2
        g_eval.announcement(judged_by, exam.concept.name, asked * models)
        _ = judged_by.caller
    benchmarks = None
    if extras.lmms_eval is not None:
        benchmarks = _benchmarks(extras.lmms_eval, first.name, measured.name)
    cached = read_untouched(untouched) if untouched is not None else None
    shown: dict[str, Any] = {
        **report.deciding,
        **({} if judged_by is None else {"judge": [judged_by.url, judged_by.model]}),
        **({} if benchmarks is None else {"benchmarks": benchmarks}),
        **({"attacks": list(tried)} if tried else {}),
    }
    merged = measured if base is not None else None
    digest = "" if output is None else digest_of(exam, decides | shown, merged, adapter_dir)
    place = nullcontext("free") if output is None else outputs.reserved(output, digest)
    with place as found:
        if found == "same" and output is not None:
            return _repeat(output)
        after: Observations | None = None
        besides = attacking.Attacked(tried, lr=rate_of(adapter_dir))
        caveats = [adapter.DROPPABLE] * (adapter_dir is not None)
        caveats += [directories.COUNTERFACTUAL] * (files.control is None)
        if (
            base is None
            and adapter_dir is None
            and "merge" in adapter_files.manifest_of(Path(name))
        ):
            caveats.append(MERGED)
        with first.loaded() as loaded:
            caveats += decode.remarks(loaded)
            if adapter_dir is not None:
                caveats += adapter_files.check_belongs(
                    adapter_dir, name, loaded.revision, first.weights
                )
            if not exam.others:
                listener.stage("Finding the names of others")
                exam = directories.with_others(exam, _alike(loaded, exam, cached))
            key = directories.digest(exam, **decides) if remembered else ""
            before = same_exam(cached, key, untouched, exam) if cached and untouched else None
            if before is None:
                listener.stage(f"Asking the untouched model {len(exam.cells)} questions")
                before = examine(loaded, exam, max_new_tokens=longest)
            besides.first(loaded, exam, files.control is not None, listener)
            if adapter_dir is not None:
                adapter.load(loaded, adapter_dir)
                listener.stage(f"Asking the unlearned model {len(exam.cells)} questions")
                after = examine(loaded, exam, before, max_new_tokens=longest)
                besides.again(loaded, exam, files.control is not None, listener)
        if base is not None:
            del loaded
            gc.collect()  # before the next is loaded: there may be room for one only
            with measured.loaded() as loaded:
                listener.stage(f"Asking the unlearned model {len(exam.cells)} questions")
                after = examine(loaded, exam, before, max_new_tokens=longest)
                besides.again(loaded, exam, files.control is not None, listener)
            del loaded
            gc.collect()
            with first.loaded() as loaded:
                listener.stage("Scoring its answers under the untouched model")
                after = with_fluency(loaded, exam, after)
        graded = {} if judged_by is None else _graded(judged_by, exam, before, after, listener)
        told = report_of(
            exam,
            name,
            before,
            after,
            adapted=adapter_dir is not None,
            caveats=[*caveats, *besides.caveats],
            graded=graded,
            families=besides.families,
            of_nobody=besides.confirmed,
        )
        told |= besides.told
        if benchmarks is not None:
            told["benchmarks"] = benchmarks
        if output is not None:
            told = write_output(
                output,
                told,
                untouched_file(exam, before, key),
                digest,
                measured,
                decides | report.deciding,
                {} if training is None else {"image": training},
                picture_of(training, image) if report.embed_image and training and image else None,
                report.run,
            )
        elif report.redact:  # what is printed may go to a file, too
            told = redacted(told)
        return Evaluation(None if after is None else told["verdict"] == "forgotten", told, output)


def _check(
    files: ExamFiles,
    adapter_dir: Path | None,
    base: str | Path | None,
    report: ReportOptions,
    extras: Extras,
    output: Path | None,
) -> None:
    """Raises BadInput for options that exclude or need each other, and for an adapter that cannot
    be used."""
    if base is not None and adapter_dir is not None:
        raise BadInput(
            "--adapter and --base exclude each other: the untouched model is --model without the "
            "adapter."
        )
    outputs.check_shown(report.redact, report.embed_image)
    if report.embed_image and (files.image is None or output is None):
        raise BadInput(
            "--embed-image shows the training picture in report.html: give it with --image, and an "
            "--output."
        )
    if extras.lmms_eval is not None and base is None:
        raise BadInput(
            "--lmms-eval compares a merged model with the untouched one: give them with --model "
            "and --base."
        )
    if adapter_dir is not None:
        adapter_files.check_directory(adapter_dir)


def _repeat(output: Path) -> Evaluation:
    report = outputs.read_report(output)
    forgotten = report["verdict"] == "forgotten" if "unlearned" in report["rows"] else None
    note = f"{output} already holds this very evaluation: nothing was done."
    return Evaluation(forgotten, report, output, [note])


def _alike(loaded: vlm.VLM, exam: Exam, cached: dict[str, Any] | None) -> list[str]:
    if cached is not None:
        return list(cached["others"])
    return neighbours(Scene(loaded, exam.concept, Recipe(), [], kind=exam.kind))


def _graded(
    grader: Grader,
    exam: Exam,
    before: Observations,
    after: Observations | None,
    listener: Listener,
) -> dict[str, Any]:
    """By row: the judge's mean score of its answers, beside the untouched model's own."""
    sides = {"untouched": before} | ({} if after is None else {"unlearned": after})
    listener.stage(f"Asking the judge {grader.model}")
    found = {}
    for side, said in sides.items():
        given = [
            g_eval.ToGrade(p.cell.text, p.after, p.before) for p in to_grade(exam, before, said)
        ]
        found[side] = g_eval.grade_answers(grader, exam.concept.name, given, listener.note)
    return found


def _benchmarks(directory: Path, untouched: str, merged: str) -> dict[str, Any]:
    """What lmms-eval found there; where it has not been told yet what to do, it is."""
    if not (directory / lmms.FOLDER).exists():
        lmms.write(directory, untouched, merged)
    return lmms.read_results(directory)
