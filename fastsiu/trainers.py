"""transformers' Trainer on the samples of a request.

The Trainer does DDP, FSDP2, gradient accumulation, checkpoints and the logs of trackio, wandb and
TensorBoard. Samples, masks, teacher, losses, rates and steps are those of `train.fit`. For trainers
with data of their own, such as TRL's SFTTrainer, `step.distillation` has the loss as a mix-in.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from peft import LoraConfig
from peft.utils import load_peft_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from . import session
from .model import adapter
from .model.vlm import VLM
from .objectives import siu
from .request import BadInput, NumericFailure, Recipe
from .samples.beside import Prepared
from .step import directions
from .step.distillation import Distillation, UnlearningMixin
from .step.shares import PARTS, StepShares
from .train import Schedule, optimiser_of, parameter_groups, work_of_steps

__all__ = ["Distillation", "UnlearningMixin", "UnlearningTrainer"]


class UnlearningTrainer(Trainer):
    """Trains a request's adapter as `session.learn` does, on as many ranks as there are.

    The recipe decides what a step is, its samples, losses and rate, and how many steps there are.
    The ranks and micro-batches of a step (`gradient_accumulation_steps`) share its samples, so the
    result does not depend on their number. All steps are run: nothing looks whether the name is
    gone. Afterwards the adapter is on; `save_model` writes it for PEFT.

    The loss is logged with its parts: `ce`, `kl` and `strange`, in nats per token (`train.Step`).
    """

    loss_is_scaled_for_ga = True  # by the counts of the whole step

    def __init__(
        self,
        loaded: VLM,
        prepared: Prepared | Sequence[Prepared],
        recipe: Recipe,
        args: TrainingArguments,
        *,
        lora: LoraConfig | None = None,
        note: Callable[[str], None] = lambda text: None,
        **options: Any,
    ) -> None:
        """Puts the adapter on and runs the teacher: before the Trainer wraps the model.

        loaded:   the model, whole, on this rank's device
        prepared: of `session.prepare`, the same on every rank; several requests are forgotten
                  jointly, in as many times the recipe's steps
        args:     the Trainer's. Not read: `learning_rate`, `lr_scheduler_type`, `warmup_steps`,
                  `weight_decay`, `optim`, `num_train_epochs` and `per_device_train_batch_size`,
                  which the recipe and the model's `Budget` have. `max_steps` may end the training
                  earlier
        lora:     the adapter, also one on the head; the recipe's when left out
        note:     gets sentences about sharing prefixes
        options:  further arguments of the Trainer, such as `callbacks`

        Raises BadInput where args or recipe ask for what cannot be done here, and where ranks have
        other samples.
        """
        requests = [prepared] if isinstance(prepared, Prepared) else list(prepared)
        recipe = recipe.for_requests(len(requests))
        _check(loaded, recipe, args)
        if lora is not None and lora.modules_to_save:
            raise BadInput(
                f"The adapter trains whole copies of {', '.join(lora.modules_to_save)}, whose "
                "teacher would move along: name them in target_modules instead."
            )
        samples, lessons = session.run_teacher(loaded, requests, recipe, note, lora)
        held = directions.find(loaded, [corpus for corpus, _ in lessons], recipe)
        shares = args.world_size * args.gradient_accumulation_steps
        steps = islice(work_of_steps(samples, siu, recipe, lessons), recipe.steps)
        step = StepShares(loaded, recipe, list(steps), shares)
        if args.max_steps <= 0:
            args.max_steps = recipe.steps
        # Every share reaches every factor, where they are all behind the pictures' features.
        if args.ddp_find_unused_parameters is None and lora is None and not recipe.sees_anew:
            args.ddp_find_unused_parameters = False
        super().__init__(model=step, args=args, **options)
        _check_alike(self, step)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise BadInput("FSDP 1 gathers no head: set version 2 in fsdp_config.")
        if self.is_fsdp_enabled:
            if recipe.sees_anew:
                raise BadInput(
                    "Under FSDP the ranks would look at another number of pictures: train what "
                    "lies in front of the language model with DDP."
                )
            step.ranks = args.world_size
        self.loaded, self.recipe = loaded, recipe
        # Every rank has found its own, equal but for rounding; all take those of the first. What
        # `settle` needs stays: nobody calls it here.
        for kept in held.of.values():
            broadcast(kept.basis)
        self.add_callback(_Hold(held))
        self._parts = torch.zeros(len(PARTS), device=args.device)
        self._logged = 0

    def train(self, *args: Any, **options: Any) -> TrainOutput:
        """What the Trainer's `train` does; afterwards the model is in evaluation mode."""
        done = super().train(*args, **options)
        self.loaded.model.eval()
        return done

    def get_train_dataloader(self) -> DataLoader:
        """Numbers of this rank's shares of the steps; every rank has all samples already."""
        args, (rank, ranks) = self.args, (self.args.process_index, self.args.world_size)
        micro = args.gradient_accumulation_steps
        shares = list(range(rank, self.recipe.steps * micro * ranks, ranks))
        return DataLoader(shares, batch_size=1, collate_fn=_numbered)  # type: ignore[arg-type]  # a list is a data set, too

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self.recipe.batch_size

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.loaded, self.recipe)
            self.optimizer = optimiser_of(groups, self.loaded.budget.optimizer)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            factor = Schedule(self.recipe).factor
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(), factor
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        loss, parts = model(inputs["share"])
        if not torch.isfinite(loss):
            raise NumericFailure(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}: lower the "
                "recipe's lr or load the model in float32."
            )
        self._parts += parts
        # DDP and FSDP average the gradients of the ranks
        loss = loss * self.args.world_size
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.accelerator.gather(self._parts[None]).sum(0).tolist()
            steps = max(1, self.state.global_step - self._logged)
            logs |= {name: x / steps for name, x in zip(PARTS, sums, strict=True)}
            self._parts.zero_()
            self._logged = self.state.global_step
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter as PEFT has it. Under FSDP all ranks have to call."""
        folder = output_dir or self.args.output_dir or "trainer_output"
        state = {
            name: _whole(p.detach())
            for name, p in self.loaded.model.named_parameters()
            if p.requires_grad
        }
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            adapter.save(self.loaded, Path(folder), state=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The Trainer would write the frozen model beside it.
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / "adapter_model.safetensors").is_file():
            raise BadInput(f"{folder} holds no adapter: give a checkpoint of this trainer.")
        stored = load_peft_weights(str(folder), device="cpu")
        trained = {n: p for n, p in self.loaded.model.named_parameters() if p.requires_grad}
        names = {_stored_name(name): name for name in trained}
        if stray := sorted(stored.keys() ^ names.keys()):
            raise BadInput(
                f"The checkpoint {folder} was made with another adapter ({stray[0]} has no "
                "counterpart): resume with the same recipe."
            )
        for key, name in names.items():
            if stored[key].shape != trained[name].shape:
                raise BadInput(
                    f"The checkpoint {folder} was made with another adapter ({key} has another "
                    "size): resume with the same recipe."
                )
            if not torch.isfinite(stored[key]).all():
                raise NumericFailure(
                    f"{key} of the checkpoint {folder} holds NaN or infinite numbers: resume from "
                    "an earlier one."
                )
        with torch.no_grad():
            for key, name in names.items():
                trained[name].copy_(_as(stored[key], trained[name]))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Hold(TrainerCallback):
    """Keeps the adapter's factors in their directions, as `train.fit` does; they do not
    settle, since nothing looks at the names."""

    def __init__(self, held: directions.Directions) -> None:
        self.held = held

    def on_train_begin(self, *args: Any, **options: Any) -> None:
        self.held.hold()

    def on_optimizer_step(self, *args: Any, **options: Any) -> None:
        self.held.hold()


def _numbered(shares: list[int]) -> dict[str, int]:
    return {"share": shares[0]}


def _check(loaded: VLM, recipe: Recipe, args: TrainingArguments) -> None:
    """Raises BadInput for what the trainer does not do."""
    if args.n_gpu > 1:
        raise BadInput(
            f"One process would use {args.n_gpu} GPUs, where the head's inputs are lost: start "
            f"one process for each with torchrun --nproc_per_node {args.n_gpu}."
        )
    here = {p.device for p in loaded.base.parameters()}
    if len(here) > 1:
        raise BadInput(
            f"The model lies on {len(here)} devices: load it whole on {args.device}, or use "
            "`fastsiu unlearn --device auto`."
        )
    if not _one_device(loaded.device, args.device):
        raise BadInput(
            f"The model is on {loaded.device} and this rank's device is {args.device}: load it "
            "with that device."
        )
    if recipe.schedule == "gone":
        raise BadInput(
            "The schedule 'gone' looks at the model as it trains, which the Trainer does not: "
            "choose 'decay'."
        )
    if recipe.relearn:
        raise BadInput(
            "The Trainer rehearses no relearning: set the recipe's relearn to 0, or use "
            "fastsiu.unlearn(..., relearn=N)."
        )
    if recipe.anchor:
        raise BadInput(
            "The Trainer holds no features of kept pictures: set the recipe's anchor to 0, or use "
            "fastsiu.unlearn(..., anchor=W)."
        )
    if args.max_steps > recipe.steps:
        raise BadInput(
            f"max_steps is {args.max_steps} and the recipe has {recipe.steps} steps: set the "
            "recipe's."
        )
    if getattr(args, "gradient_checkpointing", False) or getattr(
        args, "activation_checkpointing", False
    ):
        raise BadInput(
            "The Trainer cannot checkpoint the layers of this model: load it with "
            "Budget(checkpointing=True)."
        )


def _one_device(a: torch.device, b: torch.device) -> bool:
    def number(device: torch.device) -> int:
        if device.index is not None or device.type == "cpu":
            return device.index or 0
        return torch.accelerator.current_device_index()

    return a.type == b.type and number(a) == number(b)


def _check_alike(trainer: Trainer, step: StepShares) -> None:
    """Raises BadInput unless all ranks have the same samples: each asked the teacher itself."""
    digest = hashlib.sha256()
    for corpus in step.corpora:
        for sample, turn in zip(corpus.samples, corpus.turns, strict=True):
            digest.update(repr((sample, turn.inputs["input_ids"].tolist())).encode())
    number = int.from_bytes(digest.digest()[:7])
    mine = torch.tensor([number], device=trainer.args.device)
    if (trainer.accelerator.gather(mine) != number).any():
        raise BadInput(
            "The ranks have other samples than each other: prepare them on one rank and "
            "broadcast them."
        )


# The state of what trains ------------------------------------------------------------------------


def _stored_name(name: str) -> str:
    """A trained parameter's name as PEFT writes it."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def _whole(x: Any) -> Tensor:
    """A parameter that may be sharded (DTensor), on the CPU."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).cpu()


def _as(x: Tensor, like: Any) -> Tensor:
    """`x` laid out as `like`."""
    if not hasattr(like, "full_tensor"):
        return x.to(like)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device, like.dtype), like.device_mesh, like.placements)
