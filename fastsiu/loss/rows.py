"""From a [B, T] batch of any trainer to the loss: hidden states without logits, supervised rows,
the teacher's rows, the head.

    with no_logits(model) as kept:
        model(input_ids=..., attention_mask=...)
    rows = supervised_rows(kept["hidden"], labels, sample_ids, index)
    weight, bias = head_of(model)
    loss = fused_dmk_ce(rows.hidden, weight, rows.labels, teacher[rows.teacher], head_bias=bias)

Neither transformers nor peft is imported; a model is whatever has `get_output_embeddings()`,
wrapped or not.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .tensor_file import INTEGERS, read_tensors, write_tensors

FORMAT = "fastsiu-row-index"
VERSION, READABLE = "2", ("1", "2")  # 1 had no digest


class _Kept(dict[str, Tensor]):
    def __missing__(self, key: str) -> Tensor:
        raise RuntimeError(
            f"There is no {key!r}, the head was not reached: inside no_logits call the model "
            "without labels."
        )


@contextlib.contextmanager
def no_logits(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, the head is an identity that stores its input: the model runs as always and forms no
    logits.

    Yields a dict whose "hidden" is the head's last input, [B, T, D] with its graph. Call the
    wrapped model (PEFT, DDP, FSDP) as usual and without labels: a call of the inner model would
    skip the synchronisation of gradients. The head is restored however the context ends. In nested
    contexts the inner one stores the input.

    model: anything with `get_output_embeddings()`, also behind `.module`

    Raises ValueError for a model without a head and for torch's DataParallel.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "DataParallel runs copies of the head, whose inputs are lost: use one GPU a process "
            "(torchrun)."
        )
    head = _head(model)
    kept = _Kept()

    def keep(hidden: Tensor) -> Tensor:
        kept["hidden"] = hidden
        return hidden

    # accelerate puts its own forward on the instance: restore it, do not delete it
    hooked = head.__dict__.get("forward")
    head.forward = keep
    try:
        yield kept
    finally:
        if hooked is None:
            del head.forward
        else:
            head.forward = hooked


@dataclass(frozen=True, eq=False)
class SupervisedRows:
    """The N supervised positions of a batch, in the order of its samples and, within one, of its
    tokens.

    hidden   [N, D]  the states that predict the labels, with their graph
    labels   [N]     int64, none ignored
    at               two [N] int64: sample and token position of each label
    shape            (B, T) of the batch
    teacher  [N]     int64, rows of the teacher's cache: `cache[rows.teacher]`; None without an
                     index
    """

    hidden: Tensor
    labels: Tensor
    at: tuple[Tensor, Tensor]
    shape: tuple[int, int]
    teacher: Tensor | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def pick(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]: values that a batch has for each label, such as kl_weight and
        ce_weight. Raises ValueError for another batch's shape."""
        if x.shape[:2] != self.shape:
            raise ValueError(
                f"What is picked has shape {list(x.shape)}: it must have the labels' "
                f"{list(self.shape)}."
            )
        return x[self.at]

    def split(self) -> tuple[Tensor, ...]:
        """The labels of each of the B samples, on the CPU."""
        return self.labels.cpu().split(torch.bincount(self.at[0], minlength=self.shape[0]).tolist())


class RowIndex:
    """Which rows of a TeacherCache belong to which sample: built while the teacher runs, read by
    `supervised_rows`.

    The index finds a sample's rows by its id, whatever the order, size and padding of the batches.
    It stores the supervised tokens beside the id. A sample that changed since the teacher saw it
    (another truncation, template or id) is therefore an error and never gets another token's
    teacher. In data-parallel training every rank needs all samples: shuffling moves them between
    ranks.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Tensor]] = {}  # id -> first row, labels
        self._rows = 0

    def __len__(self) -> int:
        """The number of rows: that of the cache built from the same hidden states."""
        return self._rows

    def add(self, sample_ids: Tensor | Sequence[int], rows: SupervisedRows) -> None:
        """Gives the next `len(rows)` rows of the cache to these samples.

        sample_ids: [B] integers

        Raises ValueError for an id that the index already has.
        """
        ids = _integers(sample_ids, rows.shape[0])
        twice = [i for k, i in enumerate(ids) if i in self._seen or i in ids[:k]]
        if twice:
            raise ValueError(
                f"Sample {twice[0]} came to the teacher twice: run the teacher over each sample "
                "once."
            )
        for i, labels in zip(ids, rows.split(), strict=True):
            self._seen[i] = (self._rows, labels.clone())
            self._rows += len(labels)

    def find(self, sample_ids: Tensor | Sequence[int], rows: SupervisedRows) -> Tensor:
        """The cache's rows of a batch, [N] int64. Raises ValueError for a sample that the teacher
        did not see as it is now."""
        ids, places = _integers(sample_ids, rows.shape[0]), []
        for i, labels in zip(ids, rows.split(), strict=True):
            if i not in self._seen:
                raise ValueError(
                    f"The teacher never saw sample {i}: run it over every sample, on every rank, "
                    "with the same ids."
                )
            start, seen = self._seen[i]
            if len(labels) != len(seen):
                raise ValueError(
                    f"Sample {i} has {len(labels)} supervised tokens but had {len(seen)} when "
                    "the teacher saw it: "
                    "truncate and mask it the same way, or build the cache again."
                )
            if not torch.equal(labels, seen):
                raise ValueError(
                    f"Sample {i} is not the one that the teacher saw under this id, its "
                    "supervised tokens differ: "
                    "keep ids with their samples, or build the cache again."
                )
            places.append(torch.arange(start, start + len(seen)))
        return torch.cat(places).to(rows.labels.device) if places else rows.labels.new_zeros(0)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes one safetensors file, beside the cache's."""
        labels = [x for _, x in self._seen.values()]
        tensors = {
            "ids": torch.tensor(list(self._seen), dtype=torch.int64),
            "counts": torch.tensor([len(x) for x in labels], dtype=torch.int64),
            "labels": torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64),
        }
        write_tensors(path, tensors, FORMAT, VERSION, {})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RowIndex:
        """Reads a saved index. Raises ValueError for another file or version and for a damaged
        file, FileNotFoundError where there is none."""
        named = dict(ids=INTEGERS, counts=INTEGERS, labels=INTEGERS)
        file = read_tensors(path, FORMAT, READABLE, "a row index", "RowIndex.save", named, {})
        # clone: tensors of the file's own memory would keep the file mapped
        ids, counts, labels = (file.tensors[name].clone() for name in named)
        if not _sound(ids, counts, labels):
            raise ValueError(f"{path} is damaged: build the index again.")
        index = cls()
        for i, own in zip(ids.tolist(), labels.split(counts.tolist()), strict=True):
            index._seen[i] = (index._rows, own)
            index._rows += len(own)
        return index


def _sound(ids: Tensor, counts: Tensor, labels: Tensor) -> bool:
    """Can these be an index: one count for each id, and as many labels as the counts say?"""
    if not ids.ndim == counts.ndim == labels.ndim == 1 or len(ids) != len(counts):
        return False
    if ((counts < 0) | (counts > len(labels))).any() or counts.sum() != len(labels):
        return False
    return len(ids.unique()) == len(ids)


def supervised_rows(
    hidden: Tensor,
    labels: Tensor,
    sample_ids: Tensor | Sequence[int] | None = None,
    index: RowIndex | None = None,
    *,
    ignore_index: int = -100,
) -> SupervisedRows:
    """The positions of a causal language model's batch that have a label: labels[:, t] is what
    hidden[:, t - 1] predicts.

    hidden        [B, T, D] the states that feed the head, any float dtype
    labels        [B, T] int64, unshifted, as Hugging Face's collators make them; no state predicts
                  labels[:, 0]
    sample_ids    [B] integers, and `index`, the RowIndex built with the teacher: both, or neither
    ignore_index  label of positions without supervision (prompt, padding)

    Raises ValueError where the shapes do not fit or a sample is not as the teacher saw it.
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [B, T] beside hidden [B, T, D], but are {labels.dtype} "
            f"{list(labels.shape)} beside "
            f"{list(hidden.shape)}: use no logits_to_keep and no virtual tokens, and label every "
            "image token."
        )
    if labels.device != hidden.device:
        raise ValueError(
            f"labels are on {labels.device} but hidden on {hidden.device}: move one of them."
        )
    if (sample_ids is None) != (index is None):
        raise ValueError(
            "sample_ids and index belong together: give both to find the teacher's rows, or "
            "neither."
        )
    sample, token = (labels[:, 1:] != ignore_index).nonzero(as_tuple=True)
    B, T = labels.shape
    rows = SupervisedRows(
        hidden[sample, token], labels[sample, token + 1], (sample, token + 1), (B, T)
    )
    if index is None or sample_ids is None:
        return rows
    return replace(rows, teacher=index.find(sample_ids, rows))


class Head(NamedTuple):
    """What turns hidden states into logits: `hidden @ weight.T + bias`."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


def head_of(model: nn.Module, *, frozen: bool = False) -> Head:
    """The weight [V, D] and bias [V] that the model's head applies now, as `fused_dmk_ce` has to be
    given them.

    plain or tied linear   its own parameters; where they are frozen, they are also the teacher's
                           and the loss takes its fast path
    PEFT LoRA on the head  weight + sum of scale * B @ A over the active adapters, fp32 (fp64), with
                           a graph to A and B. Call this in each step, because each call computes
                           it. The head trains, so the loss takes its general path.
    PEFT modules_to_save   the active adapter's trainable copy
    adapters disabled      the base's, so that a teacher that runs inside `disable_adapter()` gets
                           its own head
    sharded (DTensor)      gathered, on all ranks at once; keep the result where the head is frozen

    frozen: for the teacher's cache: detached, and copied where the parameter trains, so that
            training does not move the teacher

    A scale or softcap after the head is not in the weight: give it to the loss. Raises ValueError
    where no such weight exists: a head that is quantised, no linear layer, offloaded or
    partitioned, another kind of adapter, LoRA with dropout in training or merged into its base.
    """
    weight, bias = _linear(_head(model))
    if frozen:
        return Head(_frozen(weight), None if bias is None else _frozen(bias))
    return Head(weight, bias)


def base_head_of(model: nn.Module) -> Head:
    """The weight and bias of the head under its adapters, which is the teacher's where an adapter
    trains and the base is frozen. No adapter has to be switched off for it.

    Raises ValueError as `head_of` does.
    """
    head: Any = _head(model)
    while type(head).__module__.startswith("peft."):
        head = getattr(head, "original_module", None) or head.base_layer
    return Head(*_linear(head))


def _frozen(x: Tensor) -> Tensor:
    return x.detach().clone() if x.requires_grad else x.detach()


def _head(model: Any) -> nn.Module:
    inner = model
    while not hasattr(inner, "get_output_embeddings") and isinstance(
        getattr(inner, "module", None), nn.Module
    ):
        inner = inner.module  # DDP, FSDP1, DeepSpeed, DataParallel
    try:
        head = inner.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{type(inner).__name__} has no output embeddings: give the model with its "
            "language-modelling head."
        )
    return head


def _linear(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    if type(head).__module__.startswith("peft."):
        return _adapted(head)
    # Quantised layers override forward; FSDP2's and torch's parametrised subclasses inherit it.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"The head is a {type(head).__name__}, not a plain linear layer: load the model with "
            "a plain head."
        )
    return _full(head.weight, 2), None if head.bias is None else _full(head.bias, 1)


def _adapted(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        active = [] if head.disable_adapters else head.active_adapters
        if not active or any(name not in head.modules_to_save for name in active):
            return _linear(head.original_module)
        return _linear(head.modules_to_save[active[0]])
    if not isinstance(head, LoraLinear) or type(head).forward is not LoraLinear.forward:
        kind = f"{type(head).__module__.removeprefix('peft.tuners.')}.{type(head).__name__}"
        raise ValueError(
            f"The adapter on the head is PEFT's {kind}, whose effective weight is not known here: "
            "adapt the head with plain LoRA or modules_to_save, or leave it out of target_modules."
        )
    if head.merged:
        raise ValueError(
            "The head's adapter is merged into its base, which is the teacher's too: call "
            "unmerge_adapter() first."
        )
    weight, bias = _linear(head.base_layer)
    if bias is None and any(head.lora_bias.values()):
        bias = weight.new_zeros(weight.shape[0])  # the teacher's, so that both have one
    if head.disable_adapters:
        return weight, bias
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if name in head.lora_variant:
            variant = head.lora_variant[name]
            kind = variant.__name__ if isinstance(variant, type) else type(variant).__name__
            raise ValueError(
                f"The adapter {name!r} on the head is a {kind}: adapt the head with plain "
                "LoRA, or leave it out."
            )
        dropout = head.lora_dropout[name]
        if getattr(dropout, "p", 0) > 0 and dropout.training:
            raise ValueError(
                f"The adapter {name!r} on the head has dropout {dropout.p}, which no weight can "
                "show: set it to 0."
            )
        A, B = _full(head.lora_A[name].weight, 2), _full(head.lora_B[name].weight, 2)
        scale = head.scaling[name]
        wide = torch.float64 if torch.float64 in (weight.dtype, A.dtype, B.dtype) else torch.float32
        # bf16 would round the small difference away
        with torch.autocast(weight.device.type, enabled=False):
            weight = weight.to(wide) + scale * (B.to(wide) @ A.to(wide))
            if head.lora_bias[name]:
                assert bias is not None  # zeros at least, from above
                bias = bias.to(wide) + scale * _full(head.lora_B[name].bias, 1).to(wide)
    return weight, bias


def _full(x: Any, ndim: int) -> Tensor:
    """A parameter as one plain float tensor on a device. Raises ValueError where it is none."""
    if hasattr(x, "full_tensor"):
        x = x.full_tensor()
    if type(x) not in (Tensor, nn.Parameter) or not x.dtype.is_floating_point:
        raise ValueError(
            f"The head's weight is quantised ({type(x).__name__}, {x.dtype}): load the model "
            "with a plain head."
        )
    if x.is_meta or x.ndim != ndim:
        where = "offloaded" if x.is_meta else f"partitioned, here {list(x.shape)}"
        raise ValueError(
            f"The head's weight is {where}: keep the head on a device, or gather it before this "
            "call."
        )
    return x


def _integers(sample_ids: Tensor | Sequence[int], B: int) -> list[int]:
    try:
        listed = sample_ids.tolist() if hasattr(sample_ids, "tolist") else sample_ids
        ids = [operator.index(i) for i in listed]
    except TypeError as error:
        raise ValueError(
            "sample_ids must be integers, one per sample of the batch: number the data set's "
            "samples."
        ) from error
    if len(ids) != B:
        raise ValueError(f"There are {len(ids)} sample_ids for {B} samples: give one for each.")
    return ids
