"""The model as it is, computed with other rounding: what an answer may change by when nothing was
learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .vlm import VLM

WIDE = (torch.float32, torch.float64)


def rounds(vlm: VLM) -> bool:
    """Whether the model computes in more than 16 bits, so that `rounded` changes something."""
    return vlm.head_weight.dtype in WIDE


@contextmanager
def rounded(vlm: VLM) -> Iterator[None]:
    """Inside, the layers compute about as in bfloat16: the weights of each and what it returns are
    rounded, with their dtype as before. Both, since many weights were stored in bfloat16 and are
    exact in it. The head's logits are not rounded.

    The weights in memory are never written. While a layer runs, its parameters point to a rounded
    copy, which is dropped when it returns; so the copies of one layer exist at a time. Where a
    layer fails, they point back when the block ends.
    """
    originals: dict[nn.Parameter, Tensor] = {}

    def enter(module: nn.Module, given: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in WIDE and parameter not in originals:
                originals[parameter] = parameter.data
                parameter.data = _rounded(parameter.data)

    def leave(module: nn.Module, given: Any, output: Any) -> Any:
        for parameter in module.parameters(recurse=False):
            if parameter in originals:
                parameter.data = originals.pop(parameter)
        return _rounded(output) if isinstance(output, Tensor) and output.dtype in WIDE else output

    layers = [m for m in vlm.base.modules() if any(True for _ in m.parameters(recurse=False))]
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in originals.items():
            parameter.data = data


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).to(tensor.dtype)
