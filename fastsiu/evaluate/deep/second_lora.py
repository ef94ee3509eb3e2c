"""Training on top of the unlearned model: a second LoRA that leaves nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, LoraModel, PeftModel

from ...model import prefix
from ...model.turns import Encoded, Picture
from ...model.vlm import VLM
from ...objectives import answer_loss
from ...request import BadInput

BATCH = 16  # samples in a step
RANK = 16  # of the second LoRA
NAME = "again"  # PEFT's name of the second LoRA


@contextlib.contextmanager
def fresh(loaded: VLM, rank: int = RANK, seed: int = 0) -> Iterator[None]:
    """Inside, a second LoRA is on top of the adapter, on the same layers. At first it has no
    effect. Nothing else is trained.

    Afterwards the model, its adapter, its requires_grad flags and torch's random state are as they
    were before. Raises BadInput without an adapter, TypeError for one that is no LoRA.
    """
    model = loaded.model
    if not isinstance(model, PeftModel):
        raise BadInput("There is no adapter on the model to train on top of: put it on.")
    layers = model.base_model  # switches adapters on and off
    if not isinstance(layers, LoraModel):
        raise TypeError(f"the adapter's model is {type(layers).__name__}, not LoraModel")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    active = list(model.active_adapters)
    config = _like_the_first(model, rank)
    try:
        with torch.random.fork_rng(devices=[loaded.device] if loaded.device.type == "cuda" else []):
            torch.manual_seed(seed)
            model.add_adapter(NAME, config)
        layers.set_adapter([*active, NAME])
        for name, p in model.named_parameters():
            p.requires_grad_(f".{NAME}." in name)
        model.eval()
        yield
    finally:
        if NAME in model.peft_config:
            layers.set_adapter(active)
            model.delete_adapter(NAME)
            layers.set_adapter(active)
        for p, flag in flags:
            p.requires_grad_(flag)


def _like_the_first(model: PeftModel, rank: int) -> LoraConfig:
    """A LoRA on the layers of the adapter that is on. Raises TypeError where that is no LoRA."""
    first = model.peft_config["default"]
    if not isinstance(first, LoraConfig):
        raise TypeError(f"the adapter is {type(first).__name__}, not LoraConfig")
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        bias="none",
        target_modules=first.target_modules,
        exclude_modules=first.exclude_modules,
    )


def taught(
    loaded: VLM,
    turns: Sequence[Encoded],
    pictures: Sequence[Picture | None],
    lr: float,
    steps: Sequence[int],
    seed: int = 0,
) -> Iterator[int]:
    """Trains the parameters that require a gradient, by cross-entropy. Yields after each of
    `steps`, with the model in evaluation mode.

    lr: AdamW's rate

    A step has all turns. Where there are more than `BATCH`, it has `BATCH` of them, drawn with the
    seed.
    """
    optimiser = torch.optim.AdamW(
        [p for p in loaded.model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(seed)
    features = [None if p is None else p.features for p in pictures]
    for step in range(1, max(steps) + 1):
        chosen = list(range(len(turns)))
        if len(turns) > BATCH:
            chosen = torch.randperm(len(turns), generator=generator)[:BATCH].tolist()
        loaded.model.train(loaded.budget.checkpointing)  # layers checkpoint in training mode only
        optimiser.zero_grad()
        states = prefix.supervised_states(
            loaded,
            [turns[i] for i in chosen],
            [features[i] for i in chosen],
            micro_batch=loaded.budget.micro_batch,
        )
        labels = torch.cat([turns[i].labels for i in chosen])
        answer_loss(loaded, states, labels).backward()
        optimiser.step()
        loaded.model.eval()
        if step in steps:
            yield step
