"""`fastsiu eval --attacks`: which attacks are chosen, on which pictures of an exam they run, and
which entries of the report they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..judging.family import Family
from ..model.vlm import VLM
from ..request import BadInput, Recipe
from ..session import Listener
from ..text.rate import Rate
from . import deep, inquiry
from .attacks import not_asked, table
from .exam import Exam
from .inquiry import After, Inquiry

SCORED = ("rank", "likelihood")
DEEP = tuple(deep.ATTACKS)
ASKED = ("prompt", "image", "rank")
OF_VERDICT = ("prompt", "rank")  # together the families of `inquiry.VERDICT`
MERGED = (
    "The weights are merged: what looks inside needs the adapter, with which the untouched model "
    "is at hand as well."
)


def chosen(text: str | None) -> tuple[str, ...]:
    """The attacks that --attacks names, in a fixed order; "all" is every attack. Raises BadInput
    for an unknown word."""
    if text is None:
        return ()
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    known = (*ASKED, *DEEP)
    if unknown := [word for word in wanted if word not in (*known, "all")] or (
        [] if wanted else [text]
    ):
        raise BadInput(
            f"There is no attack {unknown[0]!r}: choose from {', '.join(known)} or all for "
            "--attacks."
        )
    return tuple(word for word in known if word in wanted or "all" in wanted)


def families(attacks: Sequence[str]) -> tuple[str, ...]:
    """The keys of the families that belong to the chosen attacks."""
    groups = {"image": ("pictures",), "rank": SCORED}
    groups["prompt"] = tuple(key for key in table()["family"] if key not in (*SCORED, "pictures"))
    return tuple(key for word in attacks for key in groups.get(word, ()))


def prepare(loaded: VLM, exam: Exam, attacks: Sequence[str], given: bool) -> Inquiry:
    """Asks the untouched model. given: the exam's control pictures are the user's own, of somebody
    whom no model has seen."""
    shown = {
        role: [(seen.label, seen.load()) for seen in exam.pictures if seen.role == role]
        for role in ("training", "concept", "group", "control")
    }
    own = shown["training"][:1] or shown["concept"][:1]
    more = [one for one in shown["concept"] if one is not own[0]]
    names, strange = [other.name for other in exam.others], shown["control"] if given else ()
    return inquiry.inquire(
        loaded,
        exam.concept,
        own[0][1],
        neighbours=names,
        more=more,
        grouped=shown["group"],
        given=strange,
        families=families(attacks),
        kind=exam.kind,
    )


def inside(
    loaded: VLM, exam: Exam, found: Inquiry, attacks: Sequence[str], given: bool, lr: float
) -> list[dict[str, Any]]:
    """Rows of the chosen attacks that look inside the model, whose adapter is on; none where there
    is no adapter.

    given: as in `prepare`
    lr:    the rate at which the model is trained again: the one that it was unlearned with
    """
    which = [key for key in attacks if key in DEEP]
    if not which or loaded.model is loaded.base:
        return []
    shown = lambda *roles: [seen for role in roles for seen in exam.pictures if seen.role == role]
    own = [seen.load() for seen in shown("training", "concept")]
    strangers = (
        [seen.load() for seen in shown("control")]
        if given
        else [image for _, image in found.strange["one"]]
    )
    others = [(seen.shows, seen.load()) for seen in shown("other", "lookalike") if seen.shows]
    target = deep.Target(
        exam.concept,
        own,
        strangers,
        found.neighbours,
        others,
        seed=found.seed,
        kind=exam.kind,
    )
    return deep.run(loaded, target, which, lr=lr)


@dataclass
class Attacked:
    """The results of the attacks, first of the untouched model, then of the unlearned one.

    tried: the attacks, as `chosen` gives them
    lr:    the rate that the adapter was trained with
    """

    tried: tuple[str, ...]
    inquiry: Inquiry | None = None
    after: After | None = None
    inside: list[dict[str, Any]] = field(default_factory=list)
    lr: float = Recipe.lr

    def first(self, loaded: VLM, exam: Exam, given: bool, listener: Listener) -> None:
        if self.tried:
            listener.stage("Asking the untouched model in other ways")
            self.inquiry = prepare(loaded, exam, self.tried, given)

    def again(self, loaded: VLM, exam: Exam, given: bool, listener: Listener) -> None:
        if self.inquiry:
            listener.stage("Trying to get it back")
            self.after = self.inquiry.again(loaded)
            self.inside = inside(loaded, exam, self.inquiry, self.tried, given, self.lr)

    @property
    def families(self) -> list[Family] | None:
        return self.inquiry.families(self.after) if self.inquiry else None

    @property
    def confirmed(self) -> Mapping[str, Rate]:
        """As `Inquiry.confirmed`."""
        return self.inquiry.confirmed if self.inquiry else {}

    @property
    def caveats(self) -> list[str]:
        deeper = any(key in DEEP for key in self.tried)
        return (
            [*self.inquiry.remarks, *([MERGED] if deeper and not self.inside else [])]
            if self.inquiry
            else []
        )

    @property
    def told(self) -> dict[str, Any]:
        """Further entries of report.json."""
        if not self.inquiry:
            return {}
        done = {row["attack"] for row in self.inside}
        return {"not_asked": not_asked(tuple(done))} | (
            {"inside": self.inside} if self.inside else {}
        )
