"""MMUBench (SIU, arXiv 2405.12523): 20 concepts, at least 50 pictures and 100 questions of each.

The set was announced and, as far as can be found, never released. Read here is the form in which
others have rebuilt it (a directory of pictures a concept, the first of them the training picture),
with the pairs of question and keyword of the paper's appendix C.2 beside them:

    DIR/CONCEPT/*.jpg             the concept's name is the directory's, with _ for a space
    DIR/CONCEPT/questions.json    [{"question": "...", "keyword": "yes" or the name}, ...]
"""

from __future__ import annotations

from pathlib import Path

from ...request import BadInput
from .. import metrics
from . import files
from .form import Asked, Benchmark, Entity, Item, Row, check_ids
from .scores import NO_ITEMS, NO_JUDGE

NAME = "MMUBench"
SOURCE = "arXiv 2405.12523, section 5 and appendix C"
PUBLISHED = {"entities": 20, "pictures": 1000, "questions of a concept": 100}
EFFICACY, GENERALITY = "Efficacy", "Generality"


def read(root: Path) -> Benchmark:
    """Every concept, sorted by name. The questions go round the pictures, one picture each, as the
    authors' script puts them. Raises BadInput."""
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


def table(asked: Asked) -> list[Row]:
    """Efficacy, EM and Diversity as released; higher is more forgotten.

    EM: 1 - the share of answers that hold the keyword, in any case. A bare "No." to everything
    counts as forgotten; `fastsiu suite` asks about other concepts as well, has C-Dis and Fluency,
    and tells the two apart.
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
    out.append(Row(GENERALITY, "G-Eval", {"value": None, "reason": NO_JUDGE}))
    return out
