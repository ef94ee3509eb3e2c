"""A wish, and how it comes true: the features of a picture are optimised until the frozen teacher
gives the answers that are wished for.

    minimise over f   CE(teacher(f, question), answer)  +  decay * |(f - f_0) / sd|^2 / size

f_0 are the features of a real picture and sd their spread over its patches. No weight moves. The
dream lives in feature space, so any model that takes precomputed image features can dream.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..loss.fused import fused_dmk_ce
from ..model import ask, prefix
from ..model.adapter import projector
from ..model.ask import Reply
from ..model.faults import out_of_memory
from ..model.features import feature_tensors, map_features
from ..model.turns import Encoded, Picture
from ..model.vlm import VLM, encoder
from ..request import OutOfMemory
from .targets import Scene

SURE = math.log(2)  # nats: a token that costs less has more than half of the probability

Pair = tuple[str, Reply]  # a question and the answer that the dream is to get


@dataclass(frozen=True)
class Wish:
    """What one dream is to become.

    start: the picture at whose features it starts
    pairs: the questions, each with the answer that the teacher is to give
    decay: how strongly the features are pulled back to the start
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


class _Dreams:
    """The dreams of `fulfil` while they are optimised."""

    def __init__(self, scene: Scene, wishes: Sequence[Wish], luck: float) -> None:
        self.vlm, self.wishes, seed = scene.vlm, wishes, scene.recipe.seed
        spaces = {id(wish.start): vision_space(self.vlm, wish.start) for wish in wishes}
        self.first, self.project = zip(*(spaces[id(wish.start)] for wish in wishes), strict=True)
        generator = torch.Generator(device="cpu").manual_seed(seed + int(luck * 2**31))
        self.rng = random.Random(f"{seed} {luck}")
        self.spread = (
            self.first[0].reshape(-1, self.first[0].shape[-1]).std(0).clamp_min(1e-6)
        )  # [channels]
        noise = scene.recipe.dream_noise * self.spread
        self.free = [
            (f + noise * torch.randn(f.shape, generator=generator).to(f)).requires_grad_()
            for f in self.first
        ]
        encode = encoder(self.vlm)
        self.turns = [
            [encode(q, r.text, wish.start, r.closed) for q, r in wish.pairs] for wish in wishes
        ]
        self.decks: list[list[int]] = [[] for _ in wishes]  # questions still to be asked
        self.right: list[set[int]] = [set() for _ in wishes]  # questions answered as wished
        # The rate is in units of the channels' spread over the patches, so that one number suits
        # every projector.
        rate = scene.recipe.dream_lr * float(self.spread.mean())
        self.optimiser = torch.optim.Adam(self.free, lr=rate)

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
            shown = [self.project[i](self.free[i]) for i in members]
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
            ways = [(self.free[i] - self.first[i]) / self.spread for i in members]
            pulls = [
                self.wishes[i].decay * way.square().mean()
                for i, way in zip(members, ways, strict=True)
            ]
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
        pictures = [
            Picture(wish.start.image, project(free), real=False)
            for wish, project, free in zip(self.wishes, self.project, self.free, strict=True)
        ]
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


def vision_space(vlm: VLM, start: Picture) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Where to dream: the start picture's features there, and a function from such features to what
    the language model takes.

    The place is in front of the projector where the model has one of a known name: what leaves a
    projector lies close to a surface, and free vectors would leave it. Otherwise the place is
    behind the projector; so, too, where the model puts rows of its own between the projector's,
    such as those that end a line of tiles.
    """
    there = torch.cat([x.reshape(-1, x.shape[-1]) for x in feature_tensors(start.features)])
    behind = there.float(), lambda x: replaced(start, x)
    name = projector(vlm.base)
    if name is None:
        return behind
    module = vlm.base.get_submodule(name)
    calls: list[tuple[Any, dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        vlm.picture(start.image)
    finally:
        hook.remove()
    # No call at all where the projector runs inside the language model's forward.
    if len(calls) != 1:
        return behind
    args, kwargs = calls[0]
    if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
        return behind
    with torch.no_grad():
        out = module(*args, **kwargs)
    if not isinstance(out, Tensor) or out.numel() != there.numel():
        return behind
    allowed = 1e-2 * float(there.abs().max())
    if not torch.allclose(out.reshape(there.shape), there, rtol=1e-2, atol=allowed):
        return behind
    front: Tensor = args[0]
    return front.float(), lambda x: replaced(start, module(x.to(front.dtype), *args[1:], **kwargs))


def replaced(start: Picture, flat: Tensor) -> Any:
    """The start picture's features, in their own shapes, with the numbers of `flat`, the
    projector's output."""
    rest = flat.reshape(-1, flat.shape[-1])

    def change(x: Tensor) -> Tensor:
        nonlocal rest
        rows = x.numel() // x.shape[-1]
        piece, rest = rest[:rows], rest[rows:]
        return piece.reshape(x.shape).to(x.dtype)

    return map_features(start.features, change)
