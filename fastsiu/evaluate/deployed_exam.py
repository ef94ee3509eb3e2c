"""What an audit asks both models.

It asks the verdict's questions, tries the attacks that need no weights, and looks at the likeliest
tokens that a server tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL.Image import Image

from ..judging.family import Family
from ..model import ask, decode
from ..model.ask import Question, Reply
from ..model.served import ALTERNATIVES, Served
from ..samples.kinds import Kind
from ..session import Listener
from ..text.concept import Concept
from ..text.rate import Rate
from ..verdict import Answer
from . import held_out, inquiry, noise
from .exam import evenly
from .glimpses import Glimpses, family, glimpses

FEWEST = 8  # at least so many questions of each kind of the verdict, however small the share
FRAMES = 4  # so many naming questions have their likeliest tokens searched for the name
NO_LIKELIHOOD = "The server gives no log-probabilities, so how likely the name is was not compared."
ONE_SIDE = (
    "Only one of the two models tells log-probabilities here, so how likely the name is was not "
    "compared."
)
GLIMPSED = (
    f"How likely the name is was read from the {ALTERNATIVES} likeliest tokens that the server "
    "tells."
)


@dataclass(frozen=True)
class Asking:
    """How much an audit asks.

    share:   part of the verdict's questions of each kind, and of each attack's, 0 to 1
    attacks: whether attacks try to get the name and the facts back
    """

    share: float = 1.0
    attacks: bool = True


@dataclass
class DeployedExam:
    """The questions, and what both models answered.

    asked: (kind of the verdict, question, picture)
    names: of others that the model knows
    """

    asked: list[tuple[str, str, held_out.Shown | None]]
    image: Image
    more: Sequence[held_out.Shown]
    concept: Concept
    kind: Kind
    names: list[str]
    seed: int
    asking: Asking
    listener: Listener
    before: list[Reply] = field(default_factory=list)
    after: list[Reply] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    families: list[Family] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    way: str = ""
    _kept: noise.Kept | None = None
    _lost: list[float | None] = field(default_factory=list)
    _found: inquiry.Inquiry | None = None
    _seen: Glimpses | None = None

    def first(self, untouched: ask.Model, families: Sequence[str]) -> None:
        """Asks the untouched model everything."""
        self.listener.stage(f"Asking the untouched model {len(self.asked)} questions")
        put = self._put(untouched)
        self.before = ask.replies(untouched, put)
        if not isinstance(untouched, Served) and families == inquiry.VERDICT:
            self.caveats += decode.remarks(untouched)
            compared = [kind in held_out.KEPT for kind, _, _ in self.asked]
            self._kept = noise.Kept(untouched, compared, put, self.before)
            self.way = self._kept.way
        if not self.asking.attacks:
            return
        self.listener.stage("Asking the untouched model in other ways")
        self._found = inquiry.inquire(
            untouched,
            self.concept,
            self.image,
            neighbours=self.names,
            more=self.more,
            families=families,
            seed=self.seed,
            kind=self.kind,
            share=self.asking.share,
        )
        self._seen = self._glimpse(untouched)

    def again(self, deployed: ask.Model) -> None:
        """Asks the deployed model the same."""
        self.listener.stage(f"Asking the deployed model {len(self.asked)} questions")
        put = self._put(deployed)
        self.after = ask.replies(deployed, put)
        if self._kept is not None and not isinstance(deployed, Served):
            self._lost = self._kept.again(deployed, put)
        if self._found is None:
            return
        self.listener.stage("Trying to get it back")
        self.families = self._found.families(self._found.again(deployed))
        by_text = isinstance(deployed, Served)
        self.remarks = [r for r in self._found.remarks if not (by_text and r == inquiry.NO_FRAME)]
        if by_text and len(self._found.strange["one"]) >= inquiry.FEWEST_STRANGERS:
            now = self._glimpse(deployed)
            if now is not None and self._seen is not None:
                self.families.append(family(self._seen, now))
                self.remarks.append(GLIMPSED)
            else:
                self.remarks.append(NO_LIKELIHOOD if now is None else ONE_SIDE)

    def put(self, model: ask.Model) -> list[Reply]:
        """Asks another model the verdict's questions and returns its answers."""
        return ask.replies(model, self._put(model))

    def _put(self, model: ask.Model) -> list[Question]:
        images = {id(shown[1]): shown[1] for _, _, shown in self.asked if shown}
        seen = {key: model.picture(image) for key, image in images.items()}
        return [(q, seen[id(shown[1])] if shown else None) for _, q, shown in self.asked]

    def _glimpse(self, model: ask.Model) -> Glimpses | None:
        if not isinstance(model, Served) or self._found is None:
            return None
        strange = self._found.strange["one"]
        own = [model.picture(image) for _, image in self._found.own["one"]]
        questions = self.kind.words["who"]["held_out"][:FRAMES]
        return glimpses(
            model, self.concept, questions, own, [model.picture(image) for _, image in strange]
        )

    @property
    def confirmed(self) -> Mapping[str, Rate]:
        """As `Inquiry.confirmed`."""
        return self._found.confirmed if self._found is not None else {}

    @property
    def answers(self) -> list[Answer]:
        """Both models' answers, in the form that `verdict.judge` takes."""
        nothing: list[float | None] = [None] * len(self.asked)
        floor = self._kept.floor if self._kept is not None else nothing
        return [
            Answer(
                kind,
                q,
                shown and shown[0],
                b.text,
                a.text,
                part=held_out.part(kind, q, self.concept),
                cut=(not b.closed, not a.closed),
                lost=lost,
                noise=by_noise,
            )
            for (kind, q, shown), b, a, lost, by_noise in zip(
                self.asked, self.before, self.after, self._lost or nothing, floor, strict=True
            )
        ]


def thinned(
    asked: list[tuple[str, str, held_out.Shown | None]], share: float
) -> list[tuple[str, str, held_out.Shown | None]]:
    """A `share` of the questions of each kind, at even distances, but at least `FEWEST` of them."""
    kept: list[tuple[str, str, held_out.Shown | None]] = []
    for kind in dict.fromkeys(kind for kind, _, _ in asked):
        own = [one for one in asked if one[0] == kind]
        kept += evenly(own, max(FEWEST, round(share * len(own))))
    return kept
