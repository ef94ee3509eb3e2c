"""A wish, and how it comes true: a picture is optimised until the frozen teacher gives the answers
that are wished for.

    minimise over x   CE(teacher(x, question), answer)  +  decay * |(x - x_0) / sd|^2 / size

x_0 is a real picture, or its features, and sd its spread; `spaces` says which. No weight moves.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..loss.fused import fused_dmk_ce
from ..model import ask, prefix
from ..model.ask import Reply
from ..model.faults import out_of_memory
from ..model.turns import Encoded, Picture
from ..model.vlm import encoder
from ..request import OutOfMemory
from .scene import Scene
from .spaces import space_of

SURE = math.log(2)  # nats: a token that costs less has more than half of the probability

Pair = tuple[str, Reply]  # a question and the answer that the dream is to get


@dataclass(frozen=True)
class Wish:
    """What one dream is to become.

    start: the picture at which it starts
    pairs: the questions, each with the answer that the teacher is to give
    decay: how strongly the dream is pulled back to the start
    must:  how many of an answer's characters the teacher has to give, token by token, or else the
           dream is refused; 0 where the answer is not required
    """

    start: Picture
    pairs: Sequence[Pair]
    decay: float
    must: Callable[[Reply], int] = lambda reply: len(reply.text) + 1  # and the end


def fulfil(
    scene: Scene, wishes: Sequence[Wish], luck: float = 0.0, share: float = 1.0
) -> list[Picture | None]:
    """For each wish the dreamed picture; None where the teacher does not give every answer that it
    `must`.

    luck:  between 0 and 1; the noise and the order of the questions follow from it and the seed
    share: of `recipe.dream_steps`; at most so many steps are taken

    In each step each dream is asked one of its questions. A dream is done, and is not optimised
    further, once the teacher gave each answer when it was asked last.

    Raises OutOfMemory where not even one dream at a time fits into memory.
    """
    if not wishes:
        return []
    work = _Dreams(scene, wishes, luck)
    vlm = scene.vlm
    vlm.model.train(vlm.budget.checkpointing)  # layers checkpoint in training mode only
    for _ in range(round(share * scene.recipe.dream_steps)):
        if not work.step():
            break
    vlm.model.eval()
    return work.accepted()


def in_features(scene: Scene) -> Scene:
    """The scene with dreams in features, whatever its recipe has: they get further than few cells
    of a picture, and may look like nothing."""
    return replace(scene, recipe=scene.recipe.with_overrides(dream_in="features"))


class _Dreams:
    """The dreams of `fulfil` while they are optimised."""

    def __init__(self, scene: Scene, wishes: Sequence[Wish], luck: float) -> None:
        self.vlm, self.wishes, recipe = scene.vlm, wishes, scene.recipe
        starts = [wish.start for wish in wishes]
        self.space = space_of(self.vlm, recipe, starts, recipe.seed + int(luck * 2**31))
        self.rng = random.Random(f"{recipe.seed} {luck}")
        encode = encoder(self.vlm)
        self.turns = [
            [encode(q, r.text, wish.start, r.closed) for q, r in wish.pairs] for wish in wishes
        ]
        self.decks: list[list[int]] = [[] for _ in wishes]  # questions still to be asked
        self.right: list[set[int]] = [set() for _ in wishes]  # questions answered as wished
        self.optimiser = self.space.optimiser(recipe.dream_lr)

    def step(self) -> bool:
        """One optimisation step of every dream that is not done; False where all are done. Raises
        OutOfMemory."""
        members = [i for i, turns in enumerate(self.turns) if len(self.right[i]) < len(turns)]
        if not members:
            return False
        for i in members:
            questions = range(len(self.turns[i]))
            self.decks[i] = self.decks[i] or self.rng.sample(questions, len(questions))
        chosen = [self.decks[i].pop() for i in members]
        asked = [self.turns[i][k] for i, k in zip(members, chosen, strict=True)]
        while (nats := self._differentiate(members, asked)) is None:
            self._use_less(len(asked))
        self.optimiser.step()
        for i, k, own in zip(members, chosen, nats, strict=True):
            if bool((own < SURE).all()):
                self.right[i].add(k)
            else:
                self.right[i].discard(k)
        return True

    def _differentiate(
        self, members: Sequence[int], asked: Sequence[Encoded]
    ) -> tuple[Tensor, ...] | None:
        """Leaves the gradients; gives for each dream the nats of its supervised tokens. None where
        memory does not suffice."""
        vlm = self.vlm
        self.optimiser.zero_grad(set_to_none=True)  # a dream that is not asked does not move
        try:
            shown = self.space.shown(members)
            states = prefix.supervised_states(vlm, asked, shown, micro_batch=vlm.budget.dream_batch)
            nats = fused_dmk_ce(
                states,
                vlm.head_weight,
                torch.cat([turn.labels for turn in asked]),
                alpha=1.0,
                reduction="none",
                **vlm.head_options,
            )
            # A dream's own mean, so that no dream's rate depends on how many others there are.
            parts = nats.split([len(turn.labels) for turn in asked])
            pulls = [self.wishes[i].decay * self.space.pull(i) for i in members]
            costs = [part.mean() + pull for part, pull in zip(parts, pulls, strict=True)]
            torch.stack(costs).sum().backward()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
        return tuple(part.detach() for part in parts)

    def _use_less(self, dreams: int) -> None:
        """Halves how many dreams go through the model at a time. Raises OutOfMemory at one."""
        now = min(self.vlm.budget.dream_batch or dreams, dreams)
        if now == 1:
            raise OutOfMemory(
                "Not even one dream at a time fits into memory: use --checkpointing or "
                "--quantize nf4; `fastsiu plan` tells what fits."
            )
        self.vlm.budget = replace(self.vlm.budget, dream_batch=now // 2)

    @torch.no_grad()
    def accepted(self) -> list[Picture | None]:
        """The dreamed pictures; None for each that the teacher denies an answer it `must` give."""
        pictures = [self.space.picture(i) for i in range(len(self.wishes))]
        required = [
            (i, turn, wish.must(reply))
            for i, wish in enumerate(self.wishes)
            for turn, (_, reply) in zip(self.turns[i], wish.pairs, strict=True)
            if wish.must(reply)
        ]
        scores = ask.label_scores(
            self.vlm, [turn for _, turn, _ in required], [pictures[i] for i, _, _ in required]
        )
        refused = set()
        for (i, turn, end), score in zip(required, scores, strict=True):
            needed = torch.tensor([start < end for start, _ in turn.offsets])
            if not bool(score.right.cpu()[needed].all()):
                refused.add(i)
        return [None if i in refused else picture for i, picture in enumerate(pictures)]
