"""CLEAR (arXiv 2410.18057): 200 invented authors of TOFU with 3,770 drawn pictures, real faces and
facts about the world.

This file reads the data set therem/CLEAR of the hub. Each part is a directory that has
train-00000-of-00001.parquet (the set's card has the columns and the numbers of rows):

    forget10, retain90, ...                 image, caption, name
    forget10_perturbed, retain_perturbed    also perturbed_captions, paraphrased_caption,
                                            perturbed_names
    real_faces                              image, answer, options
    real_world                              image, question, answer, options

The columns of the last two come from the authors' evaluation (config/mm/eval.yaml). They were not
checked against the rows, which could not be downloaded here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...request import BadInput
from . import files, scores
from .form import Answered, Benchmark, Entity, Item, Photo, Row

NAME = "CLEAR"
SOURCE = "arXiv 2410.18057 and its released calculate_metrics.py"
PUBLISHED = {
    "forget01_perturbed": 35,
    "forget05_perturbed": 188,
    "forget10_perturbed": 378,
    "retain_perturbed": 395,
    "real_faces": 151,
    "real_world": 367,
}
DESCRIBE = "What can you see in this picture?"
WHO = "What is the name of the person in the picture?"
# The authors' names of the parts.
CAPTION, NAMING = "caption", "facerec"
PARTS = {
    "Forget": ("forget", CAPTION),
    "Forget FaceRec": ("forget", NAMING),
    "Retain": ("retain_perturbed", CAPTION),
    "Retain FaceRec": ("retain_perturbed", NAMING),
    "Real Faces": ("real_faces", NAMING),
    "Real World": ("real_world", "question"),
}
_PERTURBED = {
    "caption": str,
    "name": str,
    "perturbed_captions": [str],
    "paraphrased_caption": str,
    "perturbed_names": [str],
}


def read(root: Path, ratio: int = 10) -> Benchmark:
    """Reads the parts that the authors evaluate. Raises BadInput.

    ratio: the percentage to forget: 1, 5 or 10
    """
    forget = f"forget{ratio:02d}_perturbed"
    entities: dict[str, list[Photo]] = {}
    items: list[Item] = []
    for part in (forget, "retain_perturbed"):
        folder = files.directory(root, part, "a table of the set")
        for number, (place, row, shown) in enumerate(
            files.rows(folder, _PERTURBED, {"image": False}), 1
        ):
            name, face = files.text(place, row["name"], "the name"), shown["image"][0]
            entities.setdefault(name, []).append(face)
            caption = files.text(place, row["caption"], "the caption")
            items += [
                Item(
                    f"{part}/{number}/{CAPTION}",
                    name,
                    frozenset({part}),
                    CAPTION,
                    DESCRIBE,
                    caption,
                    face,
                    same=row["paraphrased_caption"],
                    wrong=tuple(row["perturbed_captions"]),
                ),
                Item(
                    f"{part}/{number}/{NAMING}",
                    name,
                    frozenset({part}),
                    NAMING,
                    WHO,
                    name,
                    face,
                    wrong=tuple(row["perturbed_names"]),
                ),
            ]
    items += _real(root, "real_faces", None)
    items += _real(root, "real_world", "question")
    authors = [Entity(name, name, tuple(faces)) for name, faces in entities.items()]
    return Benchmark(NAME, tuple(authors), tuple(items), forget)


def _real(root: Path, part: str, question: str | None) -> Iterator[Item]:
    folder = files.directory(root, part, "a table of the set")
    needed: dict[str, Any] = {"answer": str, "options": [str]}
    if question is not None:
        needed[question] = str
    for number, (place, row, shown) in enumerate(files.rows(folder, needed, {"image": False}), 1):
        answer = files.text(place, row["answer"], "the answer")
        if not (wrong := tuple(o for o in row["options"] if o.strip() != answer)):
            raise BadInput(f"{place}: the options hold no wrong answer: {files.AGAIN}.")
        yield Item(
            f"{part}/{number}",
            "",
            frozenset({part}),
            NAMING if question is None else "question",
            WHO if question is None else files.text(place, row[question], "the question"),
            answer,
            shown["image"][0],
            wrong=wrong,
        )


def prompt(item: Item) -> str:
    return item.question


def table(asked: Answered) -> list[Row]:
    """ROUGE (recall), Prob. and Truth Ratio of each part, Model Utility and the KS test.

    Model Utility is the harmonic mean of all metrics except those of the forget set. A truth ratio
    compares a right answer with the mean over wrong ones. The authors take the mean over the whole
    part; here it is over the item's own wrong answers, as in TOFU, which defined the metric.
    """
    out, utility = [], []
    forget = next(
        (name for item in asked.items for name in item.sets if name.startswith("forget")), ""
    )
    for label, (kind, task) in PARTS.items():
        pairs = asked.of(forget if kind == "forget" else kind, task)
        gone = label.startswith("Forget")
        real = label.startswith("Real ") or task == NAMING
        ratio = scores.truth_ratio_forget if gone else scores.truth_ratio_retain
        chance = scores.chosen_probability if real else scores.probability
        values = {
            "ROUGE": scores.mean_rouge_l(pairs, 1, asked.split),
            "Prob.": chance(pairs),
            "Truth Ratio": ratio(pairs),
        }
        out += [Row(label, metric, value) for metric, value in values.items()]
        if not gone:
            utility += [*values.values()]
    out.append(Row("", "Model Utility", scores.harmonic_mean(utility)))
    pairs, theirs = asked.of(forget, CAPTION), asked.retrained
    retrained = None if theirs is None else [(i, theirs[i.id]) for i, _ in pairs if i.id in theirs]
    out.append(Row("Forget", "KS test p-value", scores.forget_quality(pairs, retrained)))
    return out
