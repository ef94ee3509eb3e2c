"""The cache of keys and values: what transformers calls it, and a cache for other rows."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

# Transformers 5.24 calls it `cache`, in every forward, in the functions that make masks and in
# outputs; earlier releases know the other name only.
_TAKEN = inspect.signature(create_masks_for_generate).parameters
KEYWORD = "cache" if "cache" in _TAKEN else "past_key_values"


def as_keyword(cache: Any) -> dict[str, Any]:
    """The keyword that gives `cache` to a forward, to `generate` or to a function for masks."""
    return {KEYWORD: cache}


def cache_of(output: Any) -> Any:
    """The cache in the output of a forward; None where the model returned none."""
    return getattr(output, KEYWORD)


def fork(cache: Any, pictures: int, rows: Tensor, spend: bool = False) -> Any:
    """A new cache whose row k is row rows[k] of `cache`. Gradients go through it.

    pictures: the rows of `cache`
    rows:     [n] int64
    spend:    nobody needs `cache` any more: it loses its layers one by one, so that only one layer
              exists twice. Otherwise it stays as it is, for the next batch.

    Each layer's part lies on its layer's device.

    Transformers' own reordering would copy the prefix of every layer n times at once. For one
    picture a view is enough: each layer concatenates, and so copies, when its turn comes. Recurrent
    states are small, and layers write them in place: they are copied.
    """
    new, old = copy.copy(cache), cache.layers if spend else list(cache.layers)
    new.layers = []
    while old:
        new.layers.append(layer := copy.copy(old.pop(0)))
        for name, value in list(vars(layer).items()):
            if isinstance(value, Tensor) and value.ndim > 1:
                one = pictures == 1
                spread = (
                    value.expand(len(rows), *value.shape[1:])
                    if one
                    else value.index_select(0, rows.to(value.device))
                )
                setattr(layer, name, spread)
            elif isinstance(value, dict):
                states = {
                    k: v.index_select(0, rows.to(v.device)) if isinstance(v, Tensor) else v
                    for k, v in value.items()
                }
                setattr(layer, name, states)
        if hasattr(layer, "update_recurrent_state"):
            layer.update_recurrent_state = functools.partial(_replace, layer)
    return new


def _replace(layer: Any, states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    """`update_recurrent_state` of a forked layer: the original copies into the old state, which
    autograd still needs."""
    layer.recurrent_states[state_idx] = states
    layer.is_recurrent_states_initialized[state_idx] = True
    return states
