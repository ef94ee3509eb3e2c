"""A model without storage: on the meta device for its sizes, on fake storage for a step."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..request import Recipe
from . import adapter, source
from .memory import Layout
from .placement import quantised_bytes
from .vlm import VLM, checkpoint_layers


def skeleton(config: Any, settings: Layout, recipe: Recipe) -> Any:
    """The model on the meta device with its adapter on. `Packed` stands in for quantised linears.

    Raises BadInput where transformers cannot build it, and where it has no language model that LoRA
    could adapt.
    """
    # Flash attention keeps what sdpa's kernels keep, and cannot be built without a GPU.
    attention = None if settings.attention == "flash_attention_2" else settings.attention
    base = source.on_meta(
        config, dtype=source.DTYPES[settings.dtype], attn_implementation=attention
    )
    base.requires_grad_(False)
    names = adapter.language_linears(base)
    adapter.attach(VLM("", None, base, base, None), recipe)
    if settings.quantize is not None:
        for name in names:
            adapted = base.get_submodule(name)
            if isinstance(adapted, nn.Linear):  # the factors are in front of the language model
                base.set_submodule(name, Packed(adapted, settings.quantize))
            else:
                adapted.base_layer = Packed(adapted.base_layer, settings.quantize)
    if settings.checkpointing:
        checkpoint_layers(base)
    return base


class Packed(nn.Module):
    """The memory of a quantised linear layer: its bytes, the weight that it unpacks at each use,
    the input that int8 keeps."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.shape, self.kind = linear.weight.shape, kind
        self.bias = linear.bias
        with torch.device("meta"):
            self.register_buffer(
                "packed", torch.empty(quantised_bytes(self.shape, kind), dtype=torch.uint8)
            )

    def forward(self, x: Tensor) -> Tensor:
        return _Unpack.apply(x, self.shape, self.kind == "int8")


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size, keep: bool) -> Tensor:
        ctx.shape = shape
        if keep:
            ctx.save_for_backward(x)
        return x @ x.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g @ g.new_empty(ctx.shape), None, None


def at_rest(base: Any) -> tuple[int, int]:
    """(bytes of what is frozen, bytes of what trains), each tensor once."""
    size = {True: 0, False: 0}
    for x in {id(x): x for x in (*base.parameters(), *base.buffers())}.values():
        size[x.requires_grad] += x.numel() * x.element_size()
    return size[False], size[True]


def materialise(base: Any) -> None:
    """Puts fake storage under every parameter and buffer, shared where they are tied."""
    fakes: dict[int, Tensor] = {}
    with fake_mode():
        for module in base.modules():
            for store in (module._parameters, module._buffers):
                for name, old in store.items():
                    if old is None:
                        continue
                    if id(old) not in fakes:
                        fakes[id(old)] = _fake(old)
                    store[name] = fakes[id(old)]


def _fake(x: Tensor) -> Tensor:
    new = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    return nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new


@cache
def fake_mode() -> FakeTensorMode:
    """Inside, operations work out shapes only. There is one mode, since tensors of two do not
    mix."""
    # Torch logs the whole stack of what it cannot follow; `simulation` says it in one sentence.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    return FakeTensorMode()


def largest_weight(config: Any) -> int:
    """Elements of the largest single weight, which loading holds beside what is loaded."""
    return max(p.numel() for p in source.on_meta(config).parameters())
