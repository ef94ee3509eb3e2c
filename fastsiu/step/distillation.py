"""The fused loss as a mix-in for trainers of transformers and TRL, with the user's own data.

The loss is a mean over all ranks and micro-batches of a step. If each rank divided by its own
counts, tokens of short batches would weigh more (measured: gradients off by 25 to 30 %).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..loss.fused import fused_dmk_ce
from ..loss.model_head import base_head_of, head_of
from ..loss.rows import RowIndex, SupervisedRows, no_logits, supervised_rows
from ..loss.teacher import TeacherCache
from ..request import BadInput

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


@dataclass(frozen=True)
class Distillation:
    """What is minimised: alpha * CE + beta * KL to the untouched model (`fused_dmk_ce`).

    vocab_keep:  [V] bool, False at the tokens of the name; None keeps all
    renormalize: the KL is between distributions over the kept vocabulary
    temperature: of the KL
    logit_scale, logit_softcap: what the model does between its head and the logits
    """

    alpha: float = 0.9
    beta: float = 0.75
    vocab_keep: Tensor | None = None
    renormalize: bool = False
    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def of_teacher(self) -> dict[str, Any]:
        return {
            "vocab_keep": self.vocab_keep,
            "renormalize": self.renormalize,
            "temperature": self.temperature,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }


@dataclass(frozen=True)
class _Teacher:
    """The untouched model at all supervised positions of the training data.

    index:    which rows of the cache belong to which sample
    own_head: the cache has a copy of the head, because the model's head trains
    """

    cache: TeacherCache
    index: RowIndex
    own_head: bool


@dataclass
class _WithIds:
    """A trainer's collator that keeps two columns which the trainer's own one drops: `sample_id`
    and `kl_weight`."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] = field(repr=False)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.collate(rows))
        ids = [row.get("sample_id") for row in rows]
        try:
            # Whatever a row holds is given to `index`, which refuses what is no integer.
            batch["sample_id"] = torch.tensor([operator.index(i) for i in ids])  # type: ignore[arg-type]
        except TypeError as error:
            raise BadInput(
                f"A row has {_first_other(ids, int)!r:.40} as its sample_id: give each row of the "
                "data the column sample_id with an integer of its own."
            ) from error
        given = [row.get("kl_weight") for row in rows]
        if any(weight is not None for weight in given):
            batch["kl_weight"] = _beside(given, batch["labels"], batch.get("attention_mask"))
        return batch


def _first_other(values: list[Any], kind: type) -> Any:
    return next((value for value in values if not isinstance(value, kind)), None)


def _beside(given: list[Any], labels: Tensor, real: Tensor | None) -> Tensor:
    """Weights [B, T] of a batch, from one number for each sample, or one for each of its tokens.

    real: [B, T] of the collator, 0 at padding, which may stand on either side
    """
    out = torch.zeros(labels.shape)
    for n, one in enumerate(given):
        try:
            weight = torch.as_tensor(one, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadInput(
                f"A row has {one!r:.40} as its kl_weight: give each row a number, or one for each "
                "of its tokens."
            ) from error
        places = torch.arange(labels.shape[1])
        if weight.ndim and real is not None:
            places = real[n].cpu().nonzero()[:, 0]
        if weight.ndim > 1 or weight.ndim and len(weight) != len(places):
            raise BadInput(
                f"kl_weight has {len(weight)} numbers for a row of {len(places)} tokens: give a "
                "number for each token that the collator leaves in the row, or one for the row."
            )
        out[n, places] = weight
    return out


if TYPE_CHECKING:
    _Mixed = Trainer
else:
    _Mixed = object


class UnlearningMixin(_Mixed):
    """The fused loss for a trainer of transformers or TRL whose batches have labels:

        class UnlearningSFTTrainer(UnlearningMixin, SFTTrainer): ...

        trainer = UnlearningSFTTrainer(model, args, train_dataset=data, peft_config=lora,
                                       distillation=Distillation(vocab_keep=keep))

    The model is a PEFT model; with its adapters off it is the teacher. Shuffling moves samples from
    rank to rank, so every rank runs the teacher over all of the training data. It does so before
    the first loss, when the model is wrapped, or earlier where `run_teacher` is called.

    The data has two further columns:

        sample_id  an integer that no other sample has
        kl_weight  the token mask: one number for each sample, or one for each of its tokens; 0
                   where the KL must not look. Without this column all are 1

    `remove_unused_columns` must be False, and no row may hold several samples (no packing).
    """

    loss_is_scaled_for_ga = True  # by the counts of the whole step

    def __init__(
        self,
        model: Any = None,  # what the trainer takes: TRL's take a name as well
        args: TrainingArguments | None = None,
        *rest: Any,
        distillation: Distillation | None = None,
        **options: Any,
    ) -> None:
        # Trap: the loss uses LoRA on the head after the model's forward. Where DDP looks for unused
        # parameters, it looks at the end of the forward, takes LoRA for unused, and fails.
        if args is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        super().__init__(model, args, *rest, **options)
        if not isinstance(self.model, PeftModel):
            raise BadInput(
                "The teacher is the model with its adapters off, and this model has none: give a "
                "PEFT model or a peft_config."
            )
        if self.args.remove_unused_columns:
            raise BadInput("The column sample_id has to stay: set remove_unused_columns to False.")
        self.distillation = distillation or Distillation()
        self.data_collator = _WithIds(self.data_collator)
        self._teacher: _Teacher | None = None
        self._counts: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def run_teacher(self) -> None:
        """The untouched model's statistics at every supervised position of the training data."""
        from torch.distributed.fsdp import FSDPModule

        model: Any = self.model
        training = model.training
        sharded = isinstance(model, FSDPModule)
        if self.is_fsdp_enabled and not sharded:
            model.to(self.args.device)
        model.eval()
        samples: Any = self.train_dataset
        loader = DataLoader(
            samples,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
        )
        if sharded:
            # Trap: FSDP2 makes the gathered parameters in its first forward and remembers which of
            # them train, and PEFT freezes the adapters that it switches off.
            self._supervised(model, self._prepare_inputs(next(iter(loader))))
        index, states = RowIndex(), []
        with model.disable_adapter():
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                rows, ids, _ = self._supervised(model, inputs)
                index.add(ids, rows)
                states.append(rows.hidden)
            weight, bias = head_of(model, frozen=True)
            self._check_logits(model, inputs, weight, bias)
        own_head = base_head_of(model).weight.requires_grad
        cache = TeacherCache.from_hidden(
            torch.cat(states), weight, head_bias=bias, **self.distillation.of_teacher
        )
        self._teacher = _Teacher(cache, index, own_head)
        model.train(training)

    def _check_logits(
        self, model: Any, inputs: dict[str, Any], weight: Tensor, bias: Tensor | None
    ) -> None:
        """Raises BadInput where the model does more after its head than `Distillation` says."""
        if "logits_to_keep" not in inspect.signature(model.get_base_model().forward).parameters:
            return
        own = {k: v for k, v in inputs.items() if k not in ("labels", "sample_id", "kl_weight")}
        own |= {"logits_to_keep": 4, "use_cache": False}
        with no_logits(model) as kept:
            model(**own)
        z, x = model(**own).logits.float(), kept["hidden"].float() @ weight.float().T
        scale, cap = self.distillation.logit_scale, self.distillation.logit_softcap
        x = scale * (x if bias is None else x + bias.float())
        x = x if cap is None else cap * torch.tanh(x / cap)
        narrow = self.args.bf16 or self.args.fp16 or weight.dtype.itemsize < 4
        if float((x - z).abs().max()) > (1e-2 if narrow else 1e-4) * float(z.abs().max()) + 1e-6:
            raise BadInput(
                f"The model's logits are not its head's product with logit_scale {scale:g} and "
                f"logit_softcap {cap}: give Distillation what the model does after its head, as "
                "its configuration may say."
            )

    def _supervised(
        self, model: nn.Module, inputs: dict[str, Any], index: RowIndex | None = None
    ) -> tuple[SupervisedRows, Tensor, Tensor | None]:
        """The supervised rows of a batch, the samples' ids, and the weights of the KL."""
        inputs = dict(inputs)
        labels, ids = inputs.pop("labels"), inputs.pop("sample_id")
        weights = inputs.pop("kl_weight", None)
        with no_logits(model) as kept:
            model(**inputs, use_cache=False)
        rows = supervised_rows(kept["hidden"], labels, None if index is None else ids, index)
        return rows, ids, weights

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(2, device=device)
        for batch in batches:
            used = batch["labels"][:, 1:] != -100
            weights = batch.get("kl_weight")
            counts[0] += used.sum()
            counts[1] += used.sum() if weights is None else (used * weights[:, 1:]).sum()
        tokens, kept = self.accelerator.gather(counts[None]).sum(0)
        self._counts = tokens, kept
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        if self._teacher is None:
            self.run_teacher()
        teacher, chosen = self._teacher, self.distillation
        assert teacher is not None
        rows, _, weights = self._supervised(model, inputs, teacher.index)
        assert rows.teacher is not None  # there is an index
        weight, bias = head_of(model)
        cache = teacher.cache[rows.teacher]
        if not teacher.own_head:  # where the head is now: FSDP gathers it anew
            cache = cache.to(rows.hidden.device, *base_head_of(model))
        # an evaluation divides by its own counts
        tokens, kept = self._counts if model.training and self._counts else (None, None)
        loss = fused_dmk_ce(
            rows.hidden,
            weight,
            rows.labels,
            cache,
            head_bias=bias,
            alpha=chosen.alpha,
            beta=chosen.beta,
            kl_weight=None if weights is None else rows.pick(weights),
            ce_denominator=tokens,
            kl_denominator=kept,
        )
        if model.training:
            # DDP and FSDP average the gradients of the ranks
            loss = loss * self.args.world_size
        return (loss, {}) if return_outputs else loss
