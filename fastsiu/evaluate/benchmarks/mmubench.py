"""MMUBench (SIU, arXiv 2405.12523): 20 concepts, at least 50 pictures and 100 questions of each.

The set was announced and, as far as can be found, never released. This file reads the form in which
others have rebuilt it: a directory of pictures for each concept, the first one for training. The
pairs of question and keyword are those of the paper's appendix C.2:

    DIR/CONCEPT/*.jpg             the concept's name is the directory's, with _ for a space
    DIR/CONCEPT/questions.json    [{"question": "...", "keyword": "yes" or the name}, ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...request import BadInput
from .. import g_eval, metrics
from ..grading import Scale
from . import files
from .form import Answered, Benchmark, Entity, Item, Row, check_ids
from .judged import Judged
from .scores import NO_ITEMS, graded

NAME = "MMUBench"
SOURCE = "arXiv 2405.12523, section 5 and appendix C"
PUBLISHED = {"entities": 20, "pictures": 1000, "questions of a concept": 100}
EFFICACY, GENERALITY = "Efficacy", "Generality"
GRADES = Scale(g_eval.SYSTEM, g_eval.LEAST, g_eval.MOST)  # low is forgotten


def read(root: Path) -> Benchmark:
    """Reads every concept, sorted by name. Raises BadInput.

    Each question is about one picture, and the next question about the next picture, as in the
    authors' script.
    """
    entities: list[Entity] = []
    items: list[Item] = []
    for place in sorted(p for p in files.directory(root, "", "concepts").iterdir() if p.is_dir()):
        if place.name.startswith("."):
            continue
        name = place.name.replace("_", " ")
        photos = files.photos(place)
        if len(photos) < 2:
            raise BadInput(
                f"{place} holds {len(photos)} pictures: put the training picture and at least one "
                "more there."
            )
        entities.append(Entity(place.name, name, photos))
        file = place / "questions.json"
        asked = files.records(file, {"question": str, "keyword": str})
        if not asked:
            raise BadInput(f"{file} holds no question: {files.AGAIN}.")
        for part, shown in ((EFFICACY, photos[:1]), (GENERALITY, photos[1:])):
            items += [
                Item(
                    f"{place.name}/{part}/{number}",
                    place.name,
                    frozenset({part}),
                    "EM",
                    files.text(f"{file}, entry {number + 1}", record["question"], "the question"),
                    files.text(f"{file}, entry {number + 1}", record["keyword"], "the keyword"),
                    shown[number % len(shown)],
                )
                for number, record in enumerate(asked)
            ]
    if not entities:
        raise BadInput(f"{root} holds no directory of a concept: {files.AGAIN}.")
    check_ids(str(root), (entity.name.casefold() for entity in entities if entity.name))
    return Benchmark(NAME, tuple(entities), tuple(items), GENERALITY)


def prompt(item: Item) -> str:
    return item.question


def table(asked: Answered) -> list[Row]:
    """Efficacy, EM and Diversity as released; higher is more forgotten.

    EM is 1 minus the share of answers that contain the keyword, in upper or lower case. So a model
    that answers "No." to every question counts as forgotten. `fastsiu suite` notices such a model,
    because it also asks about other concepts, and measures C-Dis and Fluency.
    """
    out = []
    for part, metric in ((EFFICACY, "Efficacy"), (GENERALITY, "EM")):
        pairs = asked.of(part)
        gone = [item.answer.strip().lower() not in a.text.lower() for item, a in pairs]
        out.append(Row(part, metric, metrics.share(gone, NO_ITEMS)))
    texts = [a.text for _, a in asked.of(GENERALITY)]
    out.append(
        Row(
            GENERALITY,
            "Diversity",
            metrics.measure(metrics.diversity, texts, reason=NO_ITEMS),
        )
    )
    out.append(Row(GENERALITY, "G-Eval", graded(asked, GENERALITY, "G-Eval")))
    return out


def judged(items: Sequence[Item]) -> list[Judged]:
    """G-Eval of the answers that EM and Diversity are about, 1 to 5 (Fig. 8), as `fastsiu eval` has
    it: what the untouched model said is the reference, since a keyword may be "yes"."""
    shown = tuple(item for item in items if GENERALITY in item.sets)
    return [Judged(GENERALITY, "G-Eval", GRADES, shown, named=True, by_untouched=True)]
