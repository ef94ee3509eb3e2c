"""The loop. It can be read from top to bottom; an objective is a plain function, a probe says when
it is enough."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .images import variants
from .model import adapter, ask, prefix
from .model.features import map_features
from .model.vlm import VLM, Encoded, Picture, Span, checkpoint_layers, out_of_memory
from .objectives import Batch, Objective, siu
from .request import CHANGES, NumericFailure, OutOfMemory, Recipe
from .samples.corpus import FORGET, Corpus
from .samples.targets import Scene, wordings

# Share of one step's samples. Half of a step keeps what must stay: with less, few steps bend the
# neighbours' names.
SHARES = {
    "align": 0.14,
    "describe": 0.14,
    "facts": 0.12,
    "preserve-text": 0.25,
    "preserve-picture": 0.35,
}
# Of a step's lessons (as many of those that change something as of those that keep, each a batch):
# pictures of each kind, and questions about each. Few pictures with several questions each: a
# picture's prefix is most of the work.
PICTURES = {"stranger": 8, "beside": 4, "kept": 7, "kept-beside": 4, "look": 3}
# of a batch of either
PARTS = {
    "stranger": 0.8,
    "beside": 0.2,
    "kept": 0.55,
    "kept-beside": 0.25,
    "look": 0.2,
}
# sd of each channel: noise on the picture of a lesson about one, anew in every step, while the
# teacher saw it without. Two beside each other are half as large, and fine looks finer still: there
# it blurs what is to be told.
NOISE, NOISY = 0.1, ("stranger", "kept")
# schedule "decay": the rate falls from this share of the steps on, to this share of it
FROM, DOWN_TO = (
    0.6,
    0.1,
)
CHECK_EVERY = 5  # steps between two looks at the probe
MARGIN = 0.1  # nats by which a retained answer may become less likely before it counts as bent
# looks in a row that must be good before training stops: what few steps bend, more steps repair
GOOD_ENOUGH = 8


@dataclass(frozen=True)
class Look:
    """What the probe saw.

    p_name:   the largest probability of the name on the picture and its transforms
    retained: share of the samples of targets 3 and 4 whose answer is still the most likely one,
    token by token, and hardly
              less likely than to the teacher: a margin, because dreams are not the neighbours' own
              pictures
    learned:  share of the samples of targets 1 and 2 whose answer is the most likely one
    shares:   of all there is to see one look sees so large a part, each look the next: of several
    requests' as much as of one's
    """

    p_name: float
    retained: float
    learned: float
    shares: int = 1

    @property
    def enough(self) -> bool:
        return self.p_name <= 0.01 and self.retained >= 0.99 and self.learned >= 0.9


@dataclass(frozen=True)
class Step:
    """One optimisation step: the loss and its unweighted parts (nats per token), and the last look
    at the probe.

    strange: the KL of the lessons, what changes and what stays together

    Of several requests a look sees one share, the next one the next (`Look.shares`).
    """

    step: int
    loss: float
    ce: float
    kl: float
    p_name: float
    retained: float
    strange: float = 0.0


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
) -> list[Step]:
    """Trains the adapter that is on; one Step per optimisation step. A step that does not fit into
    memory is done again with half as many samples in a forward, then with activation checkpointing:
    the same step, and `vlm.budget` keeps what fits.

    watch:   called with the number of each step that is done, the model in evaluation mode; True
    ends the training
    lessons: of target 5 (`samples.strangers`) what changes and what stays, each with its teacher
    and its objective: a batch of
             each is added to every step. All steps are run then, because the rate's decay at the
             end is part of it, and pictures of others are kept by lessons alone

    Raises NumericFailure on a loss that is not finite, OutOfMemory where one sample at a time does
    not fit either.
    """
    slow = [p for n, p in vlm.model.named_parameters() if p.requires_grad and "lora_" not in n]
    fast = [p for n, p in vlm.model.named_parameters() if p.requires_grad and "lora_" in n]
    groups = [{"params": fast, "lr": recipe.lr}] + (
        [{"params": slow, "lr": recipe.projector_lr}] if slow else []
    )
    optimiser = _optimiser(groups, vlm.budget.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _factor(step, recipe))
    history: list[Step] = []
    look, good = probe(), 0
    _training_mode(vlm, recipe)
    torch.manual_seed(recipe.seed)
    first = batches(corpus, recipe, ("preserve-picture",) if lessons else ())
    taught = [lesson_batches(some, recipe) for some, _ in lessons]
    for step, chosen, *learned in zip(range(1, recipe.steps + 1), first, *taught, strict=False):
        work = [
            (corpus, chosen, objective),
            *((some, half, how) for (some, how), half in zip(lessons, learned, strict=True)),
        ]
        found: list | None = None
        while found is None:
            optimiser.zero_grad(set_to_none=True)
            found = _attempt(vlm, work, recipe)
            # here, and not where it was caught: there the traceback holds the failed step's tensors
            if found is None:
                _use_less(vlm, max(len(samples) for _, samples, _ in work), recipe, say)
        loss, parts = sum(one for one, _ in found), found[0][1]
        if not torch.isfinite(loss):
            raise NumericFailure(
                f"The loss is {loss.item()} at step {step}: lower --lr or use --dtype float32."
            )
        norm = torch.nn.utils.clip_grad_norm_(fast + slow, 1.0)
        if not torch.isfinite(norm):
            raise NumericFailure(
                f"The gradient is not finite at step {step}: lower --lr or use --dtype float32."
            )
        optimiser.step()
        schedule.step()
        if (
            step % CHECK_EVERY == 0 and not lessons
        ) or step == recipe.steps:  # no look can end what has lessons
            vlm.model.eval()
            look = probe()
            _training_mode(vlm, recipe)
            good = good + 1 if look.enough else 0
        strange = sum(part["kl"] for _, part in found[1:])
        history.append(
            Step(step, loss.item(), parts["ce"], parts["kl"], look.p_name, look.retained, strange)
        )
        if on_step:
            on_step(history[-1])
        if recipe.early_stop and not lessons and good >= max(GOOD_ENOUGH, look.shares):
            break
        if watch is not None:
            vlm.model.eval()
            if watch(step):
                break
            _training_mode(vlm, recipe)
    vlm.model.eval()
    return history


def _training_mode(vlm: VLM, recipe: Recipe) -> None:
    """Layers checkpoint in training mode only; of dropout there is the adapter's alone."""
    vlm.model.train(recipe.lora_dropout > 0 or vlm.budget.checkpointing)
    for name, module in vlm.model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.eval()


def _attempt(
    vlm: VLM, work: Sequence[tuple[Corpus, list[int], Objective]], recipe: Recipe
) -> list | None:
    """(loss, parts) of each piece of a step, with the gradients made; None where memory did not
    suffice, and then nothing random has happened. One piece's graph is gone before the next one's
    is built."""
    devices = [vlm.device] if vlm.device.type == "cuda" else []
    state = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
    try:
        found = []
        for corpus, chosen, objective in work:
            loss, parts = objective(
                forward(vlm, corpus, chosen, recipe, vlm.budget.micro_batch), recipe
            )
            loss.backward()
            found.append((loss.detach(), parts))
        return found
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    torch.set_rng_state(state[0])
    for device, one in zip(devices, state[1:], strict=True):
        torch.cuda.set_rng_state(one, device)
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
        _training_mode(vlm, recipe)
        say("Out of memory: going on with one sample at a time and activation checkpointing.")
    else:
        raise OutOfMemory(
            "Not even one sample at a time, with activation checkpointing, fits into memory: "
            "use --quantize nf4 or a smaller --rank; `fastsiu plan` tells what fits."
        )
    if vlm.device.type == "cuda":
        torch.cuda.empty_cache()


def probe_for(scenes: Sequence[Scene], corpus: Corpus) -> Callable[[], Look]:
    """A look at training from outside its loss: are the names gone on the pictures and their
    transforms, does the rest hold?"""
    vlm, recipe, words = scenes[0].vlm, scenes[0].recipe, wordings()["who"]
    # the latter only where the teacher names the concept in no other wording
    questions = words["train"] + words["held_out"]
    asked: list[tuple[Encoded, Span, Picture]] = []
    with adapter.teacher(vlm):
        for scene in scenes:
            said = scene.ask(questions, 0)
            shown = [
                vlm.picture(image) for _, image in variants(scene.pictures[0].image, recipe.seed)
            ]
            naming = [
                (q, a, spans[0])
                for q, a in zip(questions, said, strict=True)
                if (spans := scene.concept.spans(a))
            ]
            naming = [n for n in naming if n[0] in words["train"]] or naming
            asked += [(vlm.encode(q, a, p), span, p) for q, a, span in naming for p in shown]
        untouched = [
            score.log_p.sum() for score in ask.label_scores(vlm, corpus.turns, corpus.shown())
        ]

    turn, shares = itertools.count(), len(scenes)

    def look() -> Look:
        share = slice(next(turn) % shares, None, shares)
        members = sorted(i for group in corpus.groups().values() for i in group[share])
        samples, turns = [corpus.samples[i] for i in members], [corpus.turns[i] for i in members]
        seen, asking = corpus.pictures, asked[share]
        if recipe.projector_lr > 0:  # a trained projector sees differently
            for p in {id(p): p for _, _, p in asking}.values():
                p.features = vlm.picture(p.image).features
            seen = [vlm.picture(p.image) if p.real else p for p in seen]
        found = ask.label_scores(vlm, [t for t, _, _ in asking], [p for _, _, p in asking])
        inside = [
            torch.tensor([s < span[1] and e > span[0] for s, e in t.offsets])
            for t, span, _ in asking
        ]
        p_name = max(
            float(s.log_p[rows.to(s.log_p.device)].sum().exp())
            for s, rows in zip(found, inside, strict=True)
        )
        pictures = [None if s.picture is None else seen[s.picture] for s in samples]
        scores = ask.label_scores(vlm, turns, pictures)
        right = [bool(score.right.all()) for score in scores]
        lost = [
            float(untouched[i] - score.log_p.sum())
            for i, score in zip(members, scores, strict=True)
        ]
        old = [
            r and x < MARGIN
            for r, x, s in zip(right, lost, samples, strict=True)
            if s.facet in ("facts", "preserve")
        ]
        new = [r for r, s in zip(right, samples, strict=True) if s.facet in ("align", "describe")]
        return Look(p_name, sum(old) / max(1, len(old)), sum(new) / max(1, len(new)), shares)

    return look


def forward(
    vlm: VLM, corpus: Corpus, chosen: list[int], recipe: Recipe, micro_batch: int | None = None
) -> Batch:
    """The supervised rows of some samples, each picture's prefix computed once; no logits exist.

    micro_batch: the most samples in one forward, for less memory; the batch and its gradients are
    the same (`prefix`)
    """
    features = {
        p: corpus.pictures[p].features
        for i in chosen
        if (p := corpus.samples[i].picture) is not None
    }
    # it changes what real pictures look like; dreams already live behind it
    if recipe.projector_lr > 0:
        features |= {
            p: vlm.image_features(corpus.pictures[p].image)
            for p in features
            if corpus.pictures[p].real
        }
    features = {p: map_features(seen, lambda x: x.to(vlm.device)) for p, seen in features.items()}
    noisy = lambda x: x + NOISE * x.reshape(-1, x.shape[-1]).std(0) * torch.randn_like(x)
    for p in dict.fromkeys(
        corpus.samples[i].picture for i in chosen if corpus.samples[i].facet in NOISY
    ):
        features[p] = map_features(features[p], noisy)
    shown = [None if (p := corpus.samples[i].picture) is None else features[p] for i in chosen]
    rows = torch.tensor([r for i in chosen for r in corpus.rows(i)], device=vlm.device)
    sample = torch.tensor(
        [at for at, i in enumerate(chosen) for _ in corpus.rows(i)], device=vlm.device
    )
    teacher = corpus.teacher[rows] if corpus.teacher is not None else None
    if teacher is not None and teacher.hidden.device != vlm.device:
        teacher = teacher.to(vlm.device, vlm.head_weight, vlm.head_bias)
    each = lambda holds: torch.tensor([holds(i) for i in chosen], device=vlm.device)[sample]
    return Batch(
        hidden=prefix.supervised_states(
            vlm, [corpus.turns[i] for i in chosen], shown, micro_batch=micro_batch
        ),
        labels=torch.cat([corpus.turns[i].labels for i in chosen]),
        teacher=teacher,
        kl_weight=torch.cat([corpus.keep[i] for i in chosen]).to(vlm.device),
        head_weight=vlm.head_weight,
        head_options=vlm.head_options,
        sample=sample,
        forget=each(lambda i: corpus.samples[i].facet in (*FORGET, *CHANGES)),
        decoupled=each(corpus.decoupled),
        pictured=each(lambda i: corpus.samples[i].picture is not None),
    )


def batches(corpus: Corpus, recipe: Recipe, without: Sequence[str] = ()) -> Iterator[list[int]]:
    """Endless steps of `batch_size` samples, each group at its share, shuffled, none repeated
    before all were seen.

    without: groups that are left out, and nothing in their place: a step is smaller by their share
    """
    rng = random.Random(recipe.seed)
    groups = corpus.groups()
    total = sum(SHARES[name] for name in groups)
    groups = {name: members for name, members in groups.items() if name not in without}
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


def lesson_batches(lessons: Corpus, recipe: Recipe) -> Iterator[list[int]]:
    """Endless batches of `batch_size` lessons, each kind at its part: some pictures, several
    questions each."""
    rng = random.Random(recipe.seed + 1)
    about: dict[str, dict[int, list[int]]] = {}
    for i, sample in enumerate(lessons.samples):
        about.setdefault(sample.facet, {}).setdefault(sample.picture, []).append(i)
    whole = sum(PARTS[name] for name in about)
    sizes = {name: max(1, round(recipe.batch_size * PARTS[name] / whole)) for name in about}
    while True:
        step = []
        for name, size in sizes.items():
            pictures = rng.sample(list(about[name]), min(PICTURES[name], len(about[name]), size))
            for k, picture in enumerate(pictures):
                own, count = about[name][picture], len(range(k, size, len(pictures)))
                step += rng.sample(own, min(count, len(own)))
        yield step


def saliency(
    vlm: VLM, corpus: Corpus, recipe: Recipe, most: int = 64
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """MMUnlearner's mask of each factor of the adapter that is on: 1 where E g_f^2 / E g_r^2 >= 1,
    over single samples' gradients of the NLL; at most `most` of D_r, drawn with the recipe's seed.

    Theirs is of full weights before the adapter is there. A fresh adapter's B is 0, where A has no
    gradient at all, so the gradients are taken with a B of tiny random entries: the model is the
    untouched one to rounding, A's gradient is that of the full weight seen through B, and the ratio
    does not depend on how large B is. B is 0 again afterwards.
    """
    factors = [(n, p) for n, p in vlm.model.named_parameters() if p.requires_grad and "lora_" in n]
    generator = torch.Generator().manual_seed(recipe.seed)
    before = {n: p.detach().clone() for n, p in factors if "lora_B" in n}
    with torch.no_grad():
        for n, p in factors:
            if n in before:
                p.copy_(1e-4 * torch.randn(p.shape, generator=generator))
    forget = [i for i, s in enumerate(corpus.samples) if s.facet in FORGET]
    kept = [i for i in range(len(corpus.samples)) if i not in set(forget)]
    kept = random.Random(recipe.seed).sample(kept, min(most, len(kept)))
    squares = []
    for members in (forget, kept):
        squares.append([torch.zeros_like(p) for _, p in factors])
        for i in members:
            loss, _ = siu(forward(vlm, corpus, [i], recipe), replace(recipe, alpha=1.0, beta=0.0))
            for total, g in zip(
                squares[-1], torch.autograd.grad(loss, [p for _, p in factors]), strict=True
            ):
                total += g.square() / len(members)
    with torch.no_grad():
        for n, p in factors:
            if n in before:
                p.copy_(before[n])
    return [(p, (f >= r).to(p.dtype)) for (_, p), f, r in zip(factors, *squares, strict=True)]


def _optimiser(groups: list[dict], name: str) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0)
    # the extra [quant]; nothing else here needs it
    from bitsandbytes.optim import (
        AdamW8bit,
        PagedAdamW8bit,
    )

    return {"adamw8bit": AdamW8bit, "paged_adamw8bit": PagedAdamW8bit}[name](
        groups, weight_decay=0.0
    )


def _factor(step: int, recipe: Recipe) -> float:
    warm = math.ceil(recipe.warmup * recipe.steps)
    if step < warm:
        return (step + 1) / warm
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "decay":
        return 1.0 - (1 - DOWN_TO) * max(0.0, step / recipe.steps - FROM) / (1 - FROM)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))
