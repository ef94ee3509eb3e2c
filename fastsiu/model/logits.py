"""What a model does between the product of its head and its logits: a scale and a softcap.

Measured, not read: configurations name transforms that the model's own forward ignores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..loss.rows import no_logits
from ..request import BadInput
from .faults import told_as_the_models_fault


@torch.no_grad()
def probe_head(model: Any, inputs: dict[str, Tensor]) -> tuple[float, float | None]:
    """(scale, softcap) of the logits, by a comparison of numbers: z = c tanh(s x / c) or z = s x,
    with x = head(hidden).

    inputs: a few tokens without a picture; this is the first forward that the model runs

    Raises BadInput for any other transform, for a head that is not a plain linear layer, and where
    the forward fails.
    """
    with no_logits(model) as kept:
        _first_forward(model, inputs)
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise BadInput(
            f"The model's output head is a {type(head).__name__}, not a plain linear layer: "
            "give a model whose head is neither quantised nor adapted."
        )
    x = head(kept["hidden"]).float()
    z = _first_forward(model, inputs).logits.float()
    tolerance = (1e-4 if head.weight.dtype == torch.float32 else 4e-3) * float(z.abs().max()) + 1e-6
    for cap in (None, *_named_caps(model.config)):
        # what the cap has not flattened
        free = z.abs() < 0.99 * cap if cap else torch.ones_like(z, dtype=torch.bool)
        u = z[free] if cap is None else cap * torch.atanh(z[free] / cap)
        scale = float((x[free] * u).sum() / x[free].square().sum()) if free.any() else 0.0
        scale = 1.0 if abs(scale - 1) < 1e-3 else scale
        fitted = scale * x if cap is None else cap * torch.tanh(scale * x / cap)
        if float((fitted - z).abs().max()) <= tolerance:
            return scale, cap
    raise BadInput(
        "The model transforms its logits after the head by more than a scale and a softcap: not "
        "supported."
    )


def _first_forward(model: Any, inputs: dict[str, Tensor]) -> Any:
    """The model's output. Raises BadInput where its code fails."""
    with told_as_the_models_fault(model, "without a"):
        return model(**inputs, use_cache=False)


def _named_caps(config: Any) -> list[float]:
    """Every number of a configuration whose name speaks of a cap. `probe_head` measures which of
    them, if any, is the cap of the logits."""
    numbers = [
        value
        for part in (config, config.get_text_config())
        for name, value in vars(part).items()
        if "cap" in name and isinstance(value, int | float)
    ]
    return sorted({float(value) for value in numbers if value > 0})
