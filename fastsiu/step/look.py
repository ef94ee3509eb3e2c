"""A look at training from outside its loss: are the names gone, and does the rest hold?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..model import adapter, ask
from ..model.turns import Encoded, Picture
from ..pictures.transforms import variants
from ..samples.corpus import Corpus
from ..samples.scene import Scene

GONE = 0.01  # a name that is at most so likely is gone
MARGIN = 0.1  # nats by which a retained answer may become less likely before it counts as bent


class Naming(NamedTuple):
    """An answer of the untouched model that gives the name.

    turn:     the question and the answer
    span:     characters of the name in the answer
    shown:    the picture it is about
    held_out: whether the question has a held-out wording
    """

    turn: Encoded
    span: tuple[int, int]
    shown: Picture
    held_out: bool = False


@dataclass(frozen=True)
class Look:
    """What the probe saw.

    p_name:   the largest probability of a name, over the pictures and their transforms
    retained: share of the samples of targets 3 and 4 that hold. One holds where each token of the
              answer is still the most likely one, and the answer costs less than `MARGIN` more nats
              than it costs the teacher. The margin is there because dreams are not the neighbours'
              own pictures
    learned:  share of the samples of targets 1 and 2 whose answer is the most likely one, token by
              token
    shares:   number of parts that the probe set is split into (the number of requests). Each look
              scores one part, in turns, so a look costs the same for ten requests as for one;
              training may stop only after every part was good
    """

    p_name: float
    retained: float
    learned: float
    shares: int = 1

    @property
    def enough(self) -> bool:
        return self.p_name <= GONE and self.retained >= 0.99 and self.learned >= 0.9


class Glance(Protocol):
    """A glance at the names alone."""

    def gone(self) -> bool:
        """Whether those whose turn it is are gone, and all others were when it was theirs."""

    def all_gone(self) -> bool:
        """Whether all are."""


class Probe:
    """Looks at the model in the middle of a training.

    A look asks for the names on the scenes' pictures and their transforms, and scores the samples
    of `corpus`. With several scenes it takes one share of both at a time.

    asked: the untouched model's answers that give the names
    """

    def __init__(self, scenes: Sequence[Scene], corpus: Corpus) -> None:
        self.vlm, self.recipe, self.shares = scenes[0].vlm, scenes[0].recipe, len(scenes)
        self.corpus = corpus
        self.asked: list[Naming] = []
        with adapter.teacher(self.vlm):
            for scene in scenes:
                self.asked += _naming(scene)
            self._untouched = [
                score.log_p.sum()
                for score in ask.label_scores(self.vlm, corpus.turns, corpus.shown())
            ]
        self._looks = itertools.count()
        self._glances = itertools.count()
        self._good = 0  # glances in a row at which the names were gone

    def __call__(self) -> Look:
        """Looks at names and samples."""
        return self._look(slice(next(self._looks) % self.shares, None, self.shares))

    def whole(self) -> Look:
        """Looks at all names and samples; whose turn it is in `__call__` stays as it is."""
        return self._look(slice(None))

    def _look(self, share: slice) -> Look:
        corpus = self.corpus
        members = sorted(i for group in corpus.groups().values() for i in group[share])
        samples, seen = [corpus.samples[i] for i in members], corpus.pictures
        p_name = self._p_name(share)
        if self.recipe.sees_anew:
            seen = [self.vlm.picture(p.image) if p.real else p for p in seen]
        scores = ask.label_scores(
            self.vlm,
            [corpus.turns[i] for i in members],
            [None if s.picture is None else seen[s.picture] for s in samples],
        )
        retained, learned = [], []
        for i, sample, score in zip(members, samples, scores, strict=True):
            right = bool(score.right.all())
            if sample.facet in ("facts", "preserve"):
                retained.append(right and float(self._untouched[i] - score.log_p.sum()) < MARGIN)
            elif sample.facet in ("align", "describe"):
                learned.append(right)
        return Look(
            p_name,
            sum(retained) / max(1, len(retained)),
            sum(learned) / max(1, len(learned)),
            self.shares,
        )

    def gone(self) -> bool:
        """A glance at the names alone: are they gone, and were they when each of the other shares
        was looked at?"""
        share = slice(next(self._glances) % self.shares, None, self.shares)
        self._good = self._good + 1 if self._p_name(share) <= GONE else 0
        return self._good >= self.shares

    def all_gone(self) -> bool:
        """A glance at all names: whether they are gone."""
        return self._p_name(slice(None)) <= GONE

    def _p_name(self, share: slice) -> float:
        asked = self.asked[share]
        if self.recipe.sees_anew:  # what trains sees differently
            for picture in {id(one.shown): one.shown for one in asked}.values():
                picture.features = self.vlm.picture(picture.image).features
        scores = ask.label_scores(
            self.vlm, [one.turn for one in asked], [one.shown for one in asked]
        )
        return max(
            float(score.log_p[_inside(one.turn, one.span).to(score.log_p.device)].sum().exp())
            for score, one in zip(scores, asked, strict=True)
        )


def _naming(scene: Scene) -> list[Naming]:
    """The teacher's answers that give the name, each on the scene's picture and every transform of
    it, with the characters of the name. Held-out wordings are used only where the teacher gives the
    name in no training wording."""
    vlm, words = scene.vlm, scene.words["who"]
    questions = words["train"] + words["held_out"]
    answers = scene.ask(questions, 0)
    views = variants(scene.pictures[0].image, scene.recipe.seed)
    pictures = [vlm.picture(image) for _, image in views]
    found = [
        (question, answer, spans[0])
        for question, answer in zip(questions, answers, strict=True)
        if (spans := scene.concept.spans(answer))
    ]
    found = [one for one in found if one[0] in words["train"]] or found
    return [
        Naming(vlm.encode(question, answer, picture), span, picture, question not in words["train"])
        for question, answer, span in found
        for picture in pictures
    ]


def _inside(turn: Encoded, span: tuple[int, int]) -> torch.Tensor:
    """[supervised tokens] bool: the token has a character of the span."""
    start, end = span
    return torch.tensor([s < end and e > start for s, e in turn.offsets])
