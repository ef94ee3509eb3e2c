"""`fastsiu eval --attacks`: which attacks are meant, of what pictures of an exam, and those that look inside the model.

Those that look inside are modules of `evaluate.deep`, each with a function

    run(loaded, inquiry) -> list[dict]

loaded: the unlearned model, its adapter on where it has one; inquiry: an `inquiry.Inquiry`, with the concept, the pictures of it
and of strangers, the names of others and the seed. What it returns goes into the report as rows of JSON values.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from ..request import BadInput
from ..vlm import VLM
from . import inquiry
from .attacks import table
from .exam import Exam
from .inquiry import Inquiry

SCORED = ("rank", "likelihood")
DEEP = ("probe", "mia", "relearn", "weights")
ASKED = ("prompt", "image", "rank")
MISSING = "Nothing here can try this attack yet: {key}."


def chosen(text: str | None) -> tuple[str, ...]:
    """What --attacks names, in a fixed order; "all" is everything that can be tried. Raises BadInput for a word that is none."""
    if text is None:
        return ()
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    known = (*ASKED, *DEEP)
    if unknown := [word for word in wanted if word not in (*known, "all")] or ([] if wanted else [text]):
        raise BadInput(f"There is no attack {unknown[0]!r}: choose from {', '.join(known)} or all for --attacks.")
    every = [word for word in known if "all" in wanted and (word in ASKED or there(word))]
    return tuple(word for word in known if word in wanted or word in every)


def families(attacks: Sequence[str]) -> tuple[str, ...]:
    """The keys of the families that belong to the chosen attacks."""
    groups = {"image": ("pictures",), "rank": SCORED}
    groups["prompt"] = tuple(key for key in table()["family"] if key not in (*SCORED, "pictures"))
    return tuple(key for word in attacks for key in groups.get(word, ()))


def prepare(loaded: VLM, exam: Exam, attacks: Sequence[str], given: bool) -> Inquiry:
    """Asks the untouched model. given: the exam's control pictures are the user's own, of what no model has seen."""
    shown = {role: [(seen.label, seen.load()) for seen in exam.pictures if seen.role == role]
             for role in ("training", "concept", "group", "control")}  # fmt: skip
    own = shown["training"][:1] or shown["concept"][:1]
    more = [one for one in shown["concept"] if one is not own[0]]
    names, strange = [other.name for other in exam.others], shown["control"] if given else ()
    return inquiry.inquire(loaded, exam.concept, own[0][1], neighbours=names, more=more, grouped=shown["group"], given=strange,
                           families=families(attacks))  # fmt: skip


def deep(loaded: VLM, found: Inquiry, attacks: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """By attack, what those that look inside the model found; those that are not there are left out."""
    rows = {}
    for key in attacks:
        if key in DEEP and there(key):
            rows[key] = importlib.import_module(f"{__package__}.deep.{key}").run(loaded, found)
    return rows


def there(key: str) -> bool:
    """Whether an attack that looks inside the model can be tried."""
    package = f"{__package__}.deep"
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(f"{package}.{key}") is not None


def missing(attacks: Sequence[str]) -> list[str]:
    """A sentence for each chosen attack that cannot be tried."""
    return [MISSING.format(key=key) for key in attacks if key in DEEP and not there(key)]
