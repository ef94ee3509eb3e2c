"""Image features between the vision tower and the language model: where an output has them, how
they are joined for a batch, changed for a dream, and given to the forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..loss.rows import no_logits
from ..request import BadInput

# The keywords by which image features enter a model's forward; the first that it takes counts. The
# first puts features where the placeholders are. The second gives them to layers of their own, to
# which `cross_attention_mask` says which tokens look.
ENTRIES = ("mm_encoder_outputs", "cross_attention_states")
# The names under which an output has image features; the first that is there counts. It is the last
# hidden state where the projector runs inside the forward, and the last name where several layers
# of the language model take features, each its own.
READ = ("pooler_output", "last_hidden_state", "deepstack_features")


def join_features(parts: Sequence[Any]) -> Any:
    """The image features of several turns as one batch's."""
    joined = type(parts[0])(**{k: v for k, v in parts[0].items()})
    for key in set(joined):
        values = [p[key] for p in parts]
        if key == "deepstack_features":
            joined[key] = [_concatenate(layer) for layer in zip(*values, strict=True)]
        else:
            joined[key] = _concatenate(values)
    return joined


def _concatenate(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first[0], int):  # the layer that the features enter
        return first[0], _concatenate([value[1] for value in values])
    return type(first)(x for value in values for x in value)


def split_features(joined: Any, like: Sequence[Any]) -> list[Any]:
    """The image features of several pictures of one size, each its own, out of one output for all.

    like: features of as many pictures of that size, for their shapes

    Raises ValueError where the output's shape does not tell them apart.
    """
    out = [type(one)(**{k: v for k, v in one.items()}) for one in like]
    for key in READ:
        if like[0].get(key) is None:
            continue
        parts = _split(joined.get(key), like[0][key], len(like))
        for one, part in zip(out, parts, strict=True):
            one[key] = part
    return out


def _split(value: Any, own: Any, count: int) -> list[Any]:
    """A value for `count` pictures as one for each. own: what one picture has"""
    if isinstance(own, Tensor):
        if not isinstance(value, Tensor) or value.shape != (count * own.shape[0], *own.shape[1:]):
            raise ValueError("The tower's output for several pictures is no row of single ones.")
        return list(value.split(own.shape[0]))
    if isinstance(own, int):
        return [own] * count
    if value is None:
        raise ValueError("The tower's output for several pictures lacks what single ones have.")
    layers = bool(own) and not isinstance(own[0], Tensor)  # each with the layer it enters
    if len(value) == count * len(own) and not layers and count > 1:
        return [value[at : at + len(own)] for at in range(0, len(value), len(own))]
    if len(value) != len(own):
        raise ValueError("The tower's output for several pictures is no row of single ones.")
    split = [_split(x, y, count) for x, y in zip(value, own, strict=True)]
    return [type(own)(part) for part in zip(*split, strict=True)]


def map_features(features: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same features, but for `change` of what the language model reads first (`READ`)."""
    out = type(features)(**{k: v for k, v in features.items()})
    key = read_key(features)
    out[key] = _changed(features[key], change)
    return out


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return value if isinstance(value, int) else type(value)(_changed(x, change) for x in value)


def feature_tensors(features: Any) -> list[Tensor]:
    """The tensors that `map_features` changes, in its order."""
    tensors: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        tensors.append(x)
        return x

    map_features(features, keep)
    return tensors


def read_key(features: Any) -> str:
    """The name under which the language model reads an image's features. Raises BadInput where the
    output has none of the known names."""
    found = next((key for key in READ if features.get(key) is not None), None)
    if found is None:
        raise BadInput(
            f"The model's get_image_features gives {', '.join(features) or 'nothing'}: it would "
            f"need to give one of {', '.join(READ)}."
        )
    return found


def features_entry(base: Any) -> str:
    """The keyword of the model's forward that takes image features. Raises BadInput where it has
    none."""
    taken = inspect.signature(base.forward).parameters
    found = next((entry for entry in ENTRIES if entry in taken), None)
    if found is None:
        raise BadInput(
            f"{type(base).__name__} takes no precomputed image features: its forward would need "
            f"a parameter {ENTRIES[0]}, as most image-text models of transformers have."
        )
    if found == "mm_encoder_outputs" and not hasattr(base.base_model, "get_image_features"):
        raise BadInput(
            f"{type(base.base_model).__name__} would need a method get_image_features, which "
            f"makes what its forward takes as {found}."
        )
    return found


def crossed(base: Any, inputs: dict[str, Any]) -> Tensor:
    """The `cross_attention_states` [tiles, patches, D] that the model gives to its language model
    for inputs with pixels. Raises BadInput where it gives none."""
    given: dict[str, Any] = {}
    hook = base.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    try:
        with no_logits(base):
            base(**inputs, use_cache=False)
    finally:
        hook.remove()
    if "cross_attention_states" not in given:
        raise BadInput(
            f"{type(base).__name__} takes cross_attention_states and does not hand them to its "
            "decoder."
        )
    return given["cross_attention_states"]
