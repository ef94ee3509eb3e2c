"""`fastsiu eval --attacks`: which attacks are meant, of what pictures of an exam, and those that look inside the model
(`evaluate.deep`), whose rows go into the report as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..request import BadInput
from ..vlm import VLM
from . import deep, inquiry
from .attacks import table
from .exam import Exam
from .inquiry import Inquiry

SCORED = ("rank", "likelihood")
DEEP = tuple(deep.ATTACKS)
ASKED = ("prompt", "image", "rank")
MERGED = "The weights are merged: what looks inside needs the adapter, with which the untouched model is at hand as well."


def chosen(text: str | None) -> tuple[str, ...]:
    """What --attacks names, in a fixed order; "all" is everything that can be tried. Raises BadInput for a word that is none."""
    if text is None:
        return ()
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    known = (*ASKED, *DEEP)
    if unknown := [word for word in wanted if word not in (*known, "all")] or ([] if wanted else [text]):
        raise BadInput(f"There is no attack {unknown[0]!r}: choose from {', '.join(known)} or all for --attacks.")
    return tuple(word for word in known if word in wanted or "all" in wanted)


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


def inside(loaded: VLM, exam: Exam, found: Inquiry, attacks: Sequence[str], given: bool, lr: float) -> list[dict[str, Any]]:
    """Rows of the chosen attacks that look inside the model, whose adapter is on; none where there is no adapter.

    given: as in `prepare`;  lr: the rate at which the model is trained again, the one it was unlearned with
    """
    which = [key for key in attacks if key in DEEP]
    if not which or loaded.model is loaded.base:
        return []
    shown = lambda *roles: [seen for role in roles for seen in exam.pictures if seen.role == role]
    own = [seen.load() for seen in shown("training", "concept")]
    strangers = [seen.load() for seen in shown("control")] if given else [image for _, image in found.strange["one"]]
    others = [(seen.shows, seen.load()) for seen in shown("other", "lookalike") if seen.shows]
    target = deep.Target(exam.concept, own, strangers, found.neighbours, others, seed=found.seed)
    return deep.run(loaded, target, which, lr=lr)
