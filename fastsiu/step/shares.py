"""A step of training in shares, for ranks and micro-batches. The losses of the shares add up to the
step's.

Every mean divides by the counts of the whole step. Each rank has all samples and the same plan of
the steps, so it knows these counts without a message. If each rank divided by its own counts,
tokens of small shares would weigh more (measured: gradients off by 25 to 30 %).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..loss.model_head import head_of
from ..model import prefix
from ..model.vlm import VLM
from ..objectives import FAR, Whole, untouched_nats
from ..request import Recipe
from ..samples.corpus import Corpus
from ..train import StepBatch, training_mode
from .batches import draw_noise, forward

PARTS = ("ce", "kl", "strange")  # as in `train.Step`


class _Share(NamedTuple):
    """One share of one batch of a step."""

    work: StepBatch
    chosen: list[int]
    whole: Whole
    place: int  # of the batch in its step


class StepShares(nn.Module):
    """The loss of one share of a step, as one module.

    A share takes several forwards of the model: one for each batch and each way of sharing
    prefixes. DDP and FSDP wrap this module, and so see one forward. While FSDP2's root is in its
    forward, the head is whole: the loss takes the fast path, and LoRA on the head gets its gradient
    as all other adapters do.
    """

    def __init__(self, vlm: VLM, recipe: Recipe, steps: list[list[StepBatch]], shares: int) -> None:
        """shares: number of shares of one step, over all ranks and micro-batches"""
        super().__init__()
        self.model = vlm.model
        self._no_split_modules = list(vlm.base._no_split_modules or ())
        self.vlm, self.recipe, self.steps, self.shares = vlm, recipe, steps, shares
        # Under FSDP the number of ranks: they must call the model equally often.
        self.ranks: int | None = None
        self.corpora = list({id(work.corpus): work.corpus for work in steps[0]}.values())
        self._far = {id(c): _far_rows(vlm, c) for c in self.corpora[1:]}
        self._noise = _Noise(vlm, recipe, steps)

    def train(self, mode: bool = True) -> StepShares:
        self.training = mode
        if mode:
            training_mode(self.vlm, self.recipe)
        else:
            self.vlm.model.eval()
        return self

    def forward(self, share: int) -> tuple[Tensor, Tensor]:
        """Returns this share's summand of the step's loss, and its summands of `PARTS`, [3].

        share: (number of the step) * (shares of a step) + (number of the share in its step)
        """
        number, at = divmod(share, self.shares)
        noise = self._noise.of(number)
        weight, bias = head_of(self.vlm.model)
        options = self.vlm.head_options | {"head_bias": bias}
        parts = torch.zeros(len(PARTS), device=self.vlm.device)
        losses = []
        for work, chosen, whole, place in self._work(number, at):
            self._refer(work.corpus)
            batch = forward(self.vlm, work.corpus, chosen, self.recipe, noise=noise[place])
            batch = replace(batch, head_weight=weight, head_options=options, whole=whole)
            loss, told = work.objective(batch, self.recipe)
            losses.append(loss)
            if place == 0:
                parts += parts.new_tensor([told["ce"], told["kl"], 0.0])
            else:
                parts += parts.new_tensor([0.0, 0.0, told["kl"]])
        losses += [self._nothing() for _ in range(self._missing(number, at))]
        return torch.stack([loss.float() for loss in losses]).sum(), parts

    def _refer(self, corpus: Corpus) -> None:
        """Makes the teacher's statistics refer to the head again, if wrapping the model has moved
        it."""
        vlm, teacher = self.vlm, corpus.teacher
        assert teacher is not None
        if teacher.head_weight is not vlm.head_weight:
            corpus.teacher = teacher.to(teacher.hidden.device, vlm.head_weight, vlm.head_bias)

    def _work(self, number: int, at: int) -> Iterator[_Share]:
        for place, work in enumerate(self.steps[number]):
            chosen = deal(work.corpus, work.chosen, self.shares)[at]
            if chosen:
                yield _Share(work, chosen, self._whole(work), place)

    def _whole(self, work: StepBatch) -> Whole:
        corpus, far = work.corpus, self._far.get(id(work.corpus))
        return Whole(
            tokens=sum(len(corpus.turns[i].labels) for i in work.chosen),
            kept=sum(int(corpus.keep[i].sum()) for i in work.chosen),
            far=0
            if far is None
            else sum(
                int(far[corpus.rows(i).start : corpus.rows(i).stop].sum()) for i in work.chosen
            ),
        )

    def _missing(self, number: int, at: int) -> int:
        """How many empty forwards this share has to add.

        Under FSDP each forward gathers weights from all ranks, so all ranks must make the same
        number. Elsewhere a share without samples makes one, so that every weight gets a gradient.
        """
        own = self._calls(number, at)
        if self.ranks is None:
            return int(own == 0)
        first = at - at % self.ranks
        return max(1, *(self._calls(number, k) for k in range(first, first + self.ranks))) - own

    def _calls(self, number: int, at: int) -> int:
        called = 0
        for work, chosen, _, _ in self._work(number, at):
            corpus, shown = work.corpus, work.corpus.shown()
            turns = [corpus.turns[i] for i in chosen]
            called += prefix.forwards(self.vlm, turns, [shown[i] for i in chosen])
        return called

    def _nothing(self) -> Tensor:
        """An empty forward: of the shortest turn, times 0."""
        corpus = self.corpora[0]
        shortest = min(
            range(len(corpus.turns)), key=lambda i: corpus.turns[i].inputs["input_ids"].shape[1]
        )
        picture = corpus.shown()[shortest]
        features = [] if picture is None else [picture.features]
        hidden = self.vlm.hidden([corpus.turns[shortest].inputs], features)
        return 0.0 * hidden.float().sum()


def deal(corpus: Corpus, chosen: Sequence[int], shares: int) -> list[list[int]]:
    """Deals the samples into `shares` lists with about equally many tokens.

    Samples of one picture stay together, because they share its prefix. With one share the order
    stays as it is.
    """
    if shares == 1:
        return [list(chosen)]
    order = sorted(chosen, key=lambda i: (p := corpus.samples[i].picture) is not None and p + 1)
    sizes = [corpus.turns[i].inputs["input_ids"].shape[1] for i in order]
    dealt: list[list[int]] = [[] for _ in range(shares)]
    before, total = 0, sum(sizes)
    for i, size in zip(order, sizes, strict=True):
        dealt[min(shares - 1, (2 * before + size) * shares // (2 * total))].append(i)
        before += size
    return dealt


def _far_rows(vlm: VLM, corpus: Corpus) -> Tensor:
    """[rows of the teacher] bool, on the CPU: rows whose label costs it more than `FAR`."""
    teacher = corpus.teacher
    assert teacher is not None
    labels = torch.zeros(len(teacher), dtype=torch.int64)
    for i, turn in enumerate(corpus.turns):
        labels[corpus.rows(i).start : corpus.rows(i).stop] = turn.labels.cpu()
    here = teacher.to(vlm.device, vlm.head_weight, vlm.head_bias)
    return (untouched_nats(here, labels.to(vlm.device), vlm.head_options) > FAR).cpu()


class _Noise:
    """The noise on the pictures of each step: the noise of `train.fit` with the same seed.

    It depends neither on the number of ranks and micro-batches nor on the step at which a training
    is resumed.
    """

    def __init__(self, vlm: VLM, recipe: Recipe, steps: list[list[StepBatch]]) -> None:
        self._vlm, self._recipe, self._all = vlm, recipe, steps
        self._generator = torch.Generator(device=vlm.device)
        self._begin()

    def _begin(self) -> None:
        self._generator.manual_seed(self._recipe.seed)
        self._number, self._state = 0, self._generator.get_state()

    def of(self, number: int) -> list[dict[int, list[Tensor]]]:
        """The noise on the pictures of each batch of this step (`batches.draw_noise`)."""
        if number < self._number:
            self._begin()
        while True:
            self._generator.set_state(self._state)
            drawn = [
                draw_noise(self._vlm, work.corpus, work.chosen, self._generator)
                for work in self._all[self._number]
            ]
            if self._number == number:
                return drawn
            self._number, self._state = self._number + 1, self._generator.get_state()
