"""The loop. It can be read from top to bottom; an objective is a plain function, a probe says when it is enough."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import ask
from .corpus import Corpus
from .objectives import Batch, Objective
from .request import NumericFailure, Recipe
from .vlm import VLM

# Share of one step's samples. Half of a step keeps what must stay: with less, few steps bend the neighbours' names.
SHARES = {"align": 0.14, "describe": 0.14, "facts": 0.12, "preserve-text": 0.25, "preserve-picture": 0.35}
CHECK_EVERY = 5  # steps between two looks at the probe
GOOD_ENOUGH = 8  # looks in a row that must be good before training stops: what few steps bend, more steps repair


@dataclass(frozen=True)
class Look:
    """What the probe saw.

    p_name:   the largest probability of the name on the picture and its transforms
    retained: share of the samples of targets 3 and 4 whose answer is still the most likely one, token by token, and hardly
              less likely than to the teacher: a margin, because dreams are not the neighbours' own pictures
    learned:  share of the samples of targets 1 and 2 whose answer is the most likely one
    """

    p_name: float
    retained: float
    learned: float

    @property
    def enough(self) -> bool:
        return self.p_name <= 0.01 and self.retained >= 0.99 and self.learned >= 0.9


@dataclass(frozen=True)
class Step:
    """One optimisation step: the loss and its unweighted parts (nats per token), and the last look at the probe."""

    step: int
    loss: float
    ce: float
    kl: float
    p_name: float
    retained: float


def fit(vlm: VLM, corpus: Corpus, objective: Objective, recipe: Recipe, probe: Callable[[], Look],
        on_step: Callable[[Step], None] | None = None) -> list[Step]:  # fmt: skip
    """Trains the adapter that is on; one Step per optimisation step. Raises NumericFailure on a loss that is not finite."""
    slow = [p for n, p in vlm.model.named_parameters() if p.requires_grad and "lora_" not in n]
    fast = [p for n, p in vlm.model.named_parameters() if p.requires_grad and "lora_" in n]
    groups = [{"params": fast, "lr": recipe.lr}] + ([{"params": slow, "lr": recipe.projector_lr}] if slow else [])
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _factor(step, recipe))
    history: list[Step] = []
    look, good = probe(), 0
    vlm.model.train(recipe.lora_dropout > 0)
    torch.manual_seed(recipe.seed)
    for step, chosen in zip(range(1, recipe.steps + 1), batches(corpus, recipe), strict=False):
        loss, parts = objective(forward(vlm, corpus, chosen, recipe), recipe)
        if not torch.isfinite(loss):
            raise NumericFailure(f"The loss is {loss.item()} at step {step}: lower --lr or use --dtype float32.")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(fast + slow, 1.0)
        if not torch.isfinite(norm):
            raise NumericFailure(f"The gradient is not finite at step {step}: lower --lr or use --dtype float32.")
        optimiser.step()
        schedule.step()
        if step % CHECK_EVERY == 0 or step == recipe.steps:
            vlm.model.eval()
            look = probe()
            vlm.model.train(recipe.lora_dropout > 0)
            good = good + 1 if look.enough else 0
        history.append(Step(step, loss.item(), parts["ce"], parts["kl"], look.p_name, look.retained))
        if on_step:
            on_step(history[-1])
        if recipe.early_stop and good >= GOOD_ENOUGH:
            break
    vlm.model.eval()
    return history


def forward(vlm: VLM, corpus: Corpus, chosen: list[int], recipe: Recipe) -> Batch:
    """The supervised rows of some samples. Text and picture samples are two forwards; no logits exist."""
    with_picture = [i for i in chosen if corpus.samples[i].picture is not None]
    text = [i for i in chosen if corpus.samples[i].picture is None]
    fresh = vlm.image_features(corpus.pictures[0].image) if recipe.projector_lr > 0 and with_picture else None
    states = []
    for members in (with_picture, text):
        if members:
            seen = [corpus.samples[i].picture for i in members]
            # A trained projector changes what the one real picture looks like; dreams already live behind it.
            features = [fresh if p == 0 and fresh is not None else corpus.pictures[p].features for p in seen if p is not None]
            states.append(ask.supervised_states(vlm, [corpus.turns[i] for i in members], features))
    order = with_picture + text
    rows = torch.tensor([r for i in order for r in corpus.rows(i)], device=vlm.device)
    return Batch(
        hidden=torch.cat(states),
        labels=torch.cat([corpus.turns[i].labels for i in order]),
        teacher=corpus.teacher[rows] if corpus.teacher is not None else None,
        kl_weight=torch.cat([corpus.keep[i] for i in order]).to(vlm.device),
        head_weight=vlm.head_weight,
        head_options=vlm.head_options,
    )


def batches(corpus: Corpus, recipe: Recipe) -> Iterator[list[int]]:
    """Endless steps of `batch_size` samples, each group at its share, shuffled, none repeated before all were seen."""
    rng = random.Random(recipe.seed)
    groups = corpus.groups()
    total = sum(SHARES[name] for name in groups)
    decks: dict[str, list[int]] = {name: [] for name in groups}
    carried = dict.fromkeys(groups, 0.0)
    while True:
        step: list[int] = []
        for name, members in groups.items():
            carried[name] += recipe.batch_size * SHARES[name] / total
            while carried[name] >= 1:
                if not decks[name]:
                    decks[name] = rng.sample(members, len(members))
                step.append(decks[name].pop())
                carried[name] -= 1
        if step:
            yield step


def _factor(step: int, recipe: Recipe) -> float:
    warm = math.ceil(recipe.warmup * recipe.steps)
    if step < warm:
        return (step + 1) / warm
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))
