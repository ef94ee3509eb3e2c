"""PPU-Bench (arXiv 2605.08800): 500 public figures, facts to forget and facts to keep about the
same person, with the picture (vqa) and without (qa).

This file reads the data set closerG/ppu-bench of the hub, with a directory of tables for each task.
The splits from the authors' repository (github.com/guangjh/ppu-bench) belong beside them:

    DIR/ppu_eval_classification/*.parquet    sample_id, subject_id, subject, task_type, modality,
                                             question, answer_label, option_a to option_d, image
    DIR/ppu_eval_cloze/*.parquet             the same, with answer_text instead of the choice
    DIR/ppu_eval_generation/*.parquet
    DIR/split/complete_split.json            {"forget5": [subject_id, ...], ... "forget30"}
    DIR/split/selective_split.json           [{"subject_id": ..., "id": sample_id}, ...]
    DIR/split/persona_split.json             {"delete_ids": [{"id": ...}], "keep_ids": [...]}

The columns come from the authors' evaluation. They were not checked against the tables, which could
not be downloaded here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...guards.strict_json import read_json
from ...request import BadInput
from .. import metrics
from . import files, scores
from .form import Answered, Benchmark, Entity, Item, Photo, Row, Value, check_ids

NAME = "PPU-Bench"
SOURCE = "arXiv 2605.08800 and its released metric.py"
PUBLISHED = {"entities": 500, "persona forget": 3126, "persona retain": 9041, "selective": 3779}
TASKS = ("classification", "cloze", "generation")
SETTINGS = ("complete", "selective", "persona")
RATIOS = (5, 10, 15, 30)
MODALITIES = ("vqa", "qa")
_NEEDED = {
    "sample_id": str,
    "subject_id": str,
    "subject": str,
    "modality": str,
    "question": str,
}
_CHOICE = {"answer_label": str} | {f"option_{key}": str for key in "abcd"}


def read(root: Path, ratio: int = 5) -> Benchmark:
    """Reads all samples, in the sets "complete forget", "complete retain" and so on.

    Raises BadInput.

    ratio: the percentage of complete unlearning: 5, 10, 15 or 30
    """
    parts = _splits(root / "split", ratio)
    entities: dict[str, tuple[str, dict[str, Photo]]] = {}
    items: list[Item] = []
    for task in TASKS:
        folder = files.directory(root, f"ppu_eval_{task}", "a table of the set")
        needed: dict[str, Any] = _NEEDED | (
            _CHOICE if task == "classification" else {"answer_text": str}
        )
        for place, row, shown in files.rows(folder, needed, {"image": False}):
            if row["modality"] not in MODALITIES:
                raise BadInput(
                    f"{place}: the modality {row['modality']!r} is neither vqa nor qa: "
                    f"{files.AGAIN}."
                )
            name, faces = entities.setdefault(
                row["subject_id"], (files.text(place, row["subject"], "the subject"), {})
            )
            if name != row["subject"].strip():
                raise BadInput(
                    f"{place}: the subject {row['subject_id']!r} has two names: {files.AGAIN}."
                )
            face = shown["image"][0] if row["modality"] == "vqa" else None
            if face is not None and not faces:
                faces[face.label] = face
            items.append(_item(place, row, task, parts(row), face))
    check_ids(str(root), (item.id for item in items))
    people = [Entity(key, name, tuple(f.values())) for key, (name, f) in entities.items()]
    return Benchmark(NAME, tuple(people), tuple(items), "complete forget")


def _item(
    place: str, row: dict[str, Any], task: str, sets: frozenset[str], face: Photo | None
) -> Item:
    options: tuple[tuple[str, str], ...] = ()
    if task == "classification":
        options = tuple((key.upper(), row[f"option_{key}"]) for key in "abcd")
        if row["answer_label"].upper() not in "ABCD" or len(row["answer_label"]) != 1:
            raise BadInput(
                f"{place}: the right choice {row['answer_label']!r} is none of A to D: "
                f"{files.AGAIN}."
            )
    answer = row["answer_label"].upper() if options else row["answer_text"]
    return Item(
        f"{row['sample_id']}/{task}/{row['modality']}",
        row["subject_id"],
        frozenset(sets | {f"{one} {row['modality']}" for one in sets}),
        task,
        files.text(place, row["question"], "the question"),
        files.text(place, answer, "the answer"),
        face,
        options,
    )


def _splits(folder: Path, ratio: int) -> Any:
    """Returns a function that gives the sets of a row."""
    complete = read_json(
        folder / "complete_split.json",
        what=str(folder / "complete_split.json"),
        remedy=files.AGAIN,
        shape={"*": [str]},
    )
    files.fits(str(folder / "complete_split.json"), complete, {f"forget{ratio}": list})
    subjects = complete[f"forget{ratio}"]
    check_ids(f"forget{ratio} of {folder / 'complete_split.json'}", subjects)
    selective = _ids(folder / "selective_split.json", None)
    persona = {key: _ids(folder / "persona_split.json", key) for key in ("delete_ids", "keep_ids")}
    if both := sorted(persona["delete_ids"] & persona["keep_ids"]):
        raise BadInput(
            f"{folder / 'persona_split.json'} has {both[0]!r} to forget and to keep: {files.AGAIN}."
        )

    def parts(row: dict[str, Any]) -> frozenset[str]:
        sample = row["sample_id"]
        out = {
            "complete " + ("forget" if row["subject_id"] in set(subjects) else "retain"),
            "selective " + ("forget" if sample in selective else "retain"),
        }
        if sample in persona["delete_ids"]:
            out.add("persona forget")
        if sample in persona["keep_ids"]:
            out.add("persona retain")
        return frozenset(out)

    return parts


def _ids(file: Path, key: str | None) -> set[str]:
    shape: Any = [{"id": str}] if key is None else {"*": [{"id": str}]}
    record = read_json(file, what=str(file), remedy=files.AGAIN, shape=shape)
    if key is not None:
        files.fits(str(file), record, {key: list})
    listed = record if key is None else record[key]
    for number, entry in enumerate(listed, 1):
        files.fits(f"{file}, entry {number}", entry, {"id": str})
    check_ids(str(file), (entry["id"] for entry in listed))
    return {entry["id"] for entry in listed}


def prompt(item: Item) -> str:
    """The question, then its choices, one a line, then the kind of answer that is wanted."""
    if item.options:
        listed = "\n".join(f"{key}: {value}" for key, value in item.options)
        return f"{item.question}\n{listed}\nAnswer with one letter only."
    return item.question


def table(asked: Answered) -> list[Row]:
    """Metrics of both sets of each setting, with the picture (vqa) and without it (qa).

    Classification has Accuracy, cloze the exact match after normalisation, generation the recall of
    ROUGE-L.
    """
    out = []
    for setting in SETTINGS:
        for part in ("forget", "retain"):
            for modality in MODALITIES:
                label = f"{setting} {part} {modality}"
                if not any(label in item.sets for item in asked.items):
                    continue
                pairs = asked.of(label, "classification")
                out += [
                    Row(label, "Class.", scores.accuracy(pairs, scores.only_letter)),
                    Row(label, "Cloze", _same(asked.of(label, "cloze"))),
                    Row(
                        label,
                        "Gen. ROUGE-L",
                        scores.mean_rouge_l(asked.of(label, "generation"), 1, scores.plain_words),
                    ),
                ]
    return out


def _same(pairs: scores.Pairs) -> Value:
    words = scores.plain_words
    right = [words(item.answer) == words(answer.text) for item, answer in pairs]
    return metrics.share(right, scores.NO_ITEMS)
