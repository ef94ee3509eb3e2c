"""The loop. It can be read from top to bottom; an objective is a plain function, a look
(`step.look`) says when the training may stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .model.faults import out_of_memory
from .model.vlm import VLM, checkpoint_layers
from .objectives import Objective
from .request import NumericFailure, OutOfMemory, Recipe
from .samples.corpus import Corpus
from .step.anchor import Anchor
from .step.batches import batches, forward, lesson_batches
from .step.directions import FREE, Directions
from .step.look import Glance, Look
from .step.rehearsal import Rehearsal

# Schedule "decay": the rate falls after the share FROM of the steps, down to DOWN_TO times itself.
# Schedule "gone": it falls as long, but earlier where the name is gone earlier.
FROM, DOWN_TO = 0.6, 0.1
CHECK_EVERY = 5  # steps between two looks
# So many looks in a row must be good before training stops: what few steps bend, more steps repair.
GOOD_ENOUGH = 8


@dataclass(frozen=True)
class Step:
    """One optimisation step.

    step:     its number, from 1
    loss:     the sum over the step's batches
    ce, kl:   the parts of the four targets' loss without their weights, in nats per token
    p_name:   of the last look (`Look.p_name`)
    retained: of the last look (`Look.retained`)
    strange:  KL of the lessons in nats per token, the sum of those that change something and those
              that keep
    anchored: the term that holds kept pictures (`step.anchor`), without unit

    With several requests a look sees one part of the probe set, in turns (`Look.shares`).
    """

    step: int
    loss: float
    ce: float
    kl: float
    p_name: float
    retained: float
    strange: float = 0.0
    anchored: float = 0.0


class StepBatch(NamedTuple):
    """One batch of a step: the chosen samples of a corpus, and what is minimised on them."""

    corpus: Corpus
    chosen: list[int]
    objective: Objective


class Aids(NamedTuple):
    """What stands by a training. Each may be missing.

    glance:    at the names. With the schedule "gone" the rate falls once they are gone. After the
               last step the adapter settles as far as they stay gone (`Directions.settle`). Without
               a glance it does neither
    held:      what the adapter may read, from before the first step on
    rehearsal: of relearning, in whose steps the gradient is taken elsewhere
    anchor:    of kept pictures, whose features each step holds
    """

    glance: Glance | None = None
    held: Directions = FREE
    rehearsal: Rehearsal | None = None
    anchor: Anchor | None = None


ALONE = Aids()


def fit(
    vlm: VLM,
    corpus: Corpus,
    objective: Objective,
    recipe: Recipe,
    probe: Callable[[], Look],
    on_step: Callable[[Step], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
    watch: Callable[[int], bool] | None = None,
    lessons: Sequence[tuple[Corpus, Objective]] = (),
    aids: Aids = ALONE,
) -> list[Step]:
    """Trains the adapter that is on; returns one Step per optimisation step. A step that does not
    fit into memory is repeated, first with half as many samples in a forward, and so on, then with
    activation checkpointing. The step is the same, and `vlm.budget` remembers what fits.

    probe:   a look at the model, in evaluation mode
    on_step: called with each step
    say:     called with a sentence where memory did not suffice
    watch:   called with the number of each finished step, the model in evaluation mode; True ends
             the training
    lessons: the lessons (`samples.lessons`) that change something and those that keep, each with
             its teacher and its objective. Every step has a batch of each. All steps are run then:
             the decay of the rate at the end is part of the method
    aids:    what stands by

    Raises NumericFailure on a loss or a gradient that is not finite, OutOfMemory where one sample
    at a time does not fit either.
    """
    groups = parameter_groups(vlm, recipe)
    rates = [(p, group["lr"]) for group in groups for p in group["params"]]
    trained = [p for p, _ in rates]
    optimiser = optimiser_of(groups, vlm.budget.optimizer)
    plan = Schedule(recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, plan.factor)
    history: list[Step] = []
    glance, held, rehearsal, anchor = aids
    held.hold()
    look, good = probe(), 0
    training_mode(vlm, recipe)
    torch.manual_seed(recipe.seed)
    steps = work_of_steps(corpus, objective, recipe, lessons)
    for step, work in zip(range(1, recipe.steps + 1), steps, strict=False):
        moved = partial(rehearsal.moved, step, rates) if rehearsal else nullcontext
        held_back = partial(anchor.backward, step) if anchor else lambda: None
        losses, anchored = _step_backward(vlm, work, recipe, optimiser, say, Ways(moved, held_back))
        loss, parts = losses[0]
        for further_loss, _ in losses[1:]:
            loss = loss + further_loss
        if anchored is not None:
            loss = loss + anchored.to(loss.device)
        if not torch.isfinite(loss):
            raise NumericFailure(
                f"The loss is {loss.item()} at step {step}: lower --lr or use --dtype float32."
            )
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if not torch.isfinite(norm):
            raise NumericFailure(
                f"The gradient is not finite at step {step}: lower --lr or use --dtype float32."
            )
        optimiser.step()
        held.hold()
        schedule.step()
        if glance is not None and plan.waits and step % CHECK_EVERY == 0:
            vlm.model.eval()
            if glance.gone():
                plan.fall(step)
            training_mode(vlm, recipe)
        if step == plan.last and glance is not None:
            vlm.model.eval()
            held.settle(glance.all_gone)
        due = step % CHECK_EVERY == 0 and not lessons  # with lessons no look can end the training
        if due or step == plan.last:
            vlm.model.eval()
            look = probe()
            training_mode(vlm, recipe)
            good = good + 1 if look.enough else 0
        strange = sum(part["kl"] for _, part in losses[1:])
        history.append(
            Step(
                step,
                loss.item(),
                parts["ce"],
                parts["kl"],
                look.p_name,
                look.retained,
                strange,
                0.0 if anchored is None else anchored.item(),
            )
        )
        if on_step:
            on_step(history[-1])
        if recipe.early_stop and not lessons and good >= max(GOOD_ENOUGH, look.shares):
            break
        if watch is not None:
            vlm.model.eval()
            if watch(step):
                if step < plan.last and glance is not None:
                    held.settle(glance.all_gone)
                break
            training_mode(vlm, recipe)
        if step >= plan.last:
            break
    vlm.model.eval()
    return history


def work_of_steps(
    corpus: Corpus,
    objective: Objective,
    recipe: Recipe,
    lessons: Sequence[tuple[Corpus, Objective]],
) -> Iterator[list[StepBatch]]:
    """Endless steps, each with a batch of the corpus and a batch of each of the lessons."""
    # With lessons, these alone keep the pictures of others.
    first = batches(corpus, recipe, ("preserve-picture",) if lessons else ())
    further = [lesson_batches(taught, recipe) for taught, _ in lessons]
    for chosen in first:
        work = [StepBatch(corpus, chosen, objective)]
        for (taught, how), own in zip(lessons, further, strict=True):
            work.append(StepBatch(taught, next(own), how))
        yield work


def parameter_groups(vlm: VLM, recipe: Recipe) -> list[dict[str, Any]]:
    """What trains, with its rates: the factors of LoRA, and a projector where it trains."""
    named = [(n, p) for n, p in vlm.model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if "lora_" in n], "lr": recipe.lr}]
    if slow := [p for n, p in named if "lora_" not in n]:
        groups.append({"params": slow, "lr": recipe.projector_lr})
    return groups


def training_mode(vlm: VLM, recipe: Recipe) -> None:
    """Training mode only where the adapter has dropout or layers checkpoint, which they do in no
    other mode. The model's own dropout stays off."""
    vlm.model.train(recipe.lora_dropout > 0 or vlm.budget.checkpointing)
    for name, module in vlm.model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.eval()


# (loss, its parts) of each batch of a step, and the term of what is held
Losses = tuple[list[tuple[Tensor, dict[str, float]]], Tensor | None]


class Ways(NamedTuple):
    """How a step takes its gradient.

    moved:     inside, the parameters are where it is to be taken
    held_back: adds the gradient of what is held and returns that term; None where nothing is
    """

    moved: Callable[[], AbstractContextManager[None]] = nullcontext
    held_back: Callable[[], Tensor | None] = lambda: None


def _step_backward(
    vlm: VLM,
    work: Sequence[StepBatch],
    recipe: Recipe,
    optimiser: torch.optim.Optimizer,
    say: Callable[[str], None],
    ways: Ways,
) -> Losses:
    """The losses of a step, with the gradients; in as little memory as it takes. Raises
    OutOfMemory."""
    while True:
        optimiser.zero_grad(set_to_none=True)
        losses = _attempt(vlm, work, recipe, ways)
        if losses is not None:
            return losses
        # Here, and not where the error was caught: there the traceback holds the failed step's
        # tensors.
        _use_less(vlm, max(len(batch.chosen) for batch in work), recipe, say)


def _attempt(
    vlm: VLM,
    work: Sequence[StepBatch],
    recipe: Recipe,
    ways: Ways,
) -> Losses | None:
    """The losses of a step, with the gradients; None where memory did not suffice, and then the
    random generators are as they were. One batch's graph is gone before the next one's is built."""
    devices = [device for device in vlm.devices if device.type == "cuda"]
    state = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
    try:
        losses = []
        with ways.moved():
            for corpus, chosen, objective in work:
                loss, parts = objective(
                    forward(vlm, corpus, chosen, recipe, vlm.budget.micro_batch), recipe
                )
                loss.backward()
                losses.append((loss.detach(), parts))
            return losses, ways.held_back()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    torch.set_rng_state(state[0])
    for device, before in zip(devices, state[1:], strict=True):
        torch.cuda.set_rng_state(before, device)
    return None


def _use_less(vlm: VLM, samples: int, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Makes `vlm.budget` smaller by one step. Raises OutOfMemory where it is the smallest
    already."""
    now = min(vlm.budget.micro_batch or samples, samples)
    if now > 1:
        vlm.budget = replace(vlm.budget, micro_batch=now // 2, sparing=True)
        say(f"Out of memory: going on with {now // 2} of {samples} samples at a time.")
    elif not vlm.budget.checkpointing:
        checkpoint_layers(vlm.base)
        vlm.budget = replace(vlm.budget, checkpointing=True)
        training_mode(vlm, recipe)
        say("Out of memory: going on with one sample at a time and activation checkpointing.")
    else:
        raise OutOfMemory(
            "Not even one sample at a time, with activation checkpointing, fits into memory: "
            "use --quantize nf4 or a smaller --rank; `fastsiu plan` tells what fits."
        )
    if vlm.device.type == "cuda":
        torch.cuda.empty_cache()


def optimiser_of(groups: list[dict[str, Any]], name: str) -> torch.optim.Optimizer:
    """The optimiser of a `Budget.optimizer`, without weight decay."""
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0)
    # the extra [quant]; nothing else here needs it
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kinds = {"adamw8bit": AdamW8bit, "paged_adamw8bit": PagedAdamW8bit}
    return kinds[name](groups, weight_decay=0.0)


class Schedule:
    """The rate of each step, as a share of the recipe's, and the last step.

    waits: whether the rate is to fall as soon as the name is gone (schedule "gone")
    last:  number of the last step
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.last = recipe, recipe.steps
        self.waits = recipe.schedule == "gone" and recipe.early_stop
        self._from = FROM  # the share of the steps after which the rate falls

    def fall(self, step: int) -> None:
        """The name is gone after `step` steps: the rate falls from here on, unless it does
        already."""
        self.waits = False
        if step < self._from * self.recipe.steps:
            self._from = step / self.recipe.steps
            self.last = step + round((1 - FROM) * self.recipe.steps)

    def factor(self, step: int) -> float:
        """What the rate is multiplied by, for the steps 0, 1, ..."""
        recipe = self.recipe
        warm = math.ceil(recipe.warmup * recipe.steps)
        if step < warm:
            return (step + 1) / warm
        if recipe.schedule == "constant":
            return 1.0
        if recipe.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))
        return 1.0 - (1 - DOWN_TO) * max(0.0, step / recipe.steps - self._from) / (1 - FROM)
