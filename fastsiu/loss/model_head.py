"""The head of any model, as the loss has to be given it: wrapped, adapted or sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from .sharded import OwnRows, alike, gathered, rows_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Head(NamedTuple):
    """What turns hidden states into logits: `hidden @ weight.T + bias`."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class HeadPart(NamedTuple):
    """This rank's rows of a head in parts; the whole head where `group` is None."""

    weight: Tensor  # [V_r, D]
    bias: Tensor | None  # [V_r]
    group: ProcessGroup | None  # the ranks that share the head: what the loss takes as `group`


@overload
def head_of(model: nn.Module, *, frozen: bool = False, parts: Literal[False] = False) -> Head: ...


@overload
def head_of(model: nn.Module, *, frozen: bool = False, parts: Literal[True]) -> HeadPart: ...


def head_of(model: nn.Module, *, frozen: bool = False, parts: bool = False) -> Head | HeadPart:
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
    sharded (DTensor)      gathered, on all ranks at once. Of a frozen head the same tensor comes
                           again while the teacher's cache, or anybody else, holds it: the loss then
                           takes its fast path, and nothing is sent
    tensor-parallel        with `parts`, this rank's rows and the ranks that share the head; without
                           it, gathered

    frozen: for the teacher's cache: detached, and copied where the parameter trains or FSDP owns
            its memory, so that training does not move the teacher
    parts:  return (weight, bias, group). group is None where the head is not sharded over
            tensor-parallel ranks; FSDP alone makes no parts, because its ranks have other samples

    A scale or softcap after the head is not in the weight: give it to the loss. Raises ValueError
    where no such weight exists: a head that is quantised, no linear layer, offloaded or
    partitioned, another kind of adapter, LoRA with dropout in training or merged into its base.
    """
    head = output_layer(model)
    under_fsdp = _owned_by_fsdp(model, head)
    parameter = getattr(_base(head), "weight", None)
    rows = rows_of(parameter, under_fsdp) if parts else None
    weight, bias = _linear(head, _Reading(rows, under_fsdp))
    if frozen:
        copied = under_fsdp and not hasattr(parameter, "full_tensor")
        weight, bias = _frozen(weight, copied), None if bias is None else _frozen(bias, copied)
    if not parts:
        return Head(weight, bias)
    return HeadPart(weight, bias, None if rows is None else rows.group)


def base_head_of(model: nn.Module) -> Head:
    """The weight and bias of the head under its adapters, which is the teacher's where an adapter
    trains and the base is frozen. No adapter has to be switched off for it.

    Raises ValueError as `head_of` does.
    """
    head = output_layer(model)
    return Head(*_linear(_base(head), _Reading(None, _owned_by_fsdp(model, head))))


def _frozen(x: Tensor, copied: bool) -> Tensor:
    if x.requires_grad or copied:
        return x.detach().clone()
    # the tensor itself, so that `gathered` knows that it is still held
    return x if type(x) is Tensor else x.detach()


def output_layer(model: Any) -> nn.Module:
    """The module that makes logits, of a model in any wrapping. Raises ValueError for a model
    without one."""
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


def _base(head: Any) -> Any:
    """The linear layer inside PEFT's wrappers, or whatever else there is."""
    while type(head).__module__.startswith("peft."):
        inner = getattr(head, "base_layer", None) or getattr(head, "original_module", None)
        if inner is None:
            break
        head = inner
    return head


def _owned_by_fsdp(model: nn.Module, head: nn.Module) -> bool:
    """Has `fully_shard` wrapped the head or a module around it?"""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    owners = (x for x in model.modules() if isinstance(x, FSDPModule))
    return any(inner is head for owner in owners for inner in owner.modules())


class _Reading(NamedTuple):
    """How parameters of the head are read: whole, or this rank's rows of them."""

    rows: OwnRows | None
    under_fsdp: bool

    def by_rows(self, x: Any, ndim: int) -> Tensor:
        """A parameter with one row for each token."""
        return gathered(x, ndim, self.under_fsdp) if self.rows is None else self.rows.of(x, ndim)

    def of_all(self, x: Any) -> Tensor:
        """A matrix that all rows share."""
        if self.rows is None:
            return gathered(x, 2, self.under_fsdp)
        return alike(x, self.rows.group)


def _linear(head: nn.Module, read: _Reading) -> tuple[Tensor, Tensor | None]:
    if type(head).__module__.startswith("peft."):
        return _adapted(head, read)
    # Quantised layers override forward; FSDP2's and torch's parametrised subclasses inherit it.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"The head is a {type(head).__name__}, not a plain linear layer: load the model with "
            "a plain head."
        )
    bias = None if head.bias is None else read.by_rows(head.bias, 1)
    return read.by_rows(head.weight, 2), bias


def _adapted(head: nn.Module, read: _Reading) -> tuple[Tensor, Tensor | None]:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        active = [] if head.disable_adapters else head.active_adapters
        if not active or any(name not in head.modules_to_save for name in active):
            return _linear(head.original_module, read)
        return _linear(head.modules_to_save[active[0]], read)
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
    weight, bias = _linear(head.base_layer, read)
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
        A, B = read.of_all(head.lora_A[name].weight), read.by_rows(head.lora_B[name].weight, 2)
        scale = head.scaling[name]
        wide = torch.float64 if torch.float64 in (weight.dtype, A.dtype, B.dtype) else torch.float32
        # bf16 would round the small difference away
        with torch.autocast(weight.device.type, enabled=False):
            weight = weight.to(wide) + scale * (B.to(wide) @ A.to(wide))
            if head.lora_bias[name]:
                assert bias is not None  # zeros at least, from above
                bias = bias.to(wide) + scale * read.by_rows(head.lora_B[name].bias, 1).to(wide)
    return weight, bias
