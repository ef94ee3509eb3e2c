"""What many turns share is computed once: "<bos> ... <image tokens>" with its gradient. Every
question then attends to it.

packed
    One row for each picture, prefix + s_1 + ... + s_k, under a 4-D mask. The mask is stitched from
    the model's own, so that sliding windows and image blocks that look both ways come out right.
    The least memory, and the only way under activation checkpointing. It also computes attention
    between suffixes, which the mask then throws away.
key/value
    The prefix of each picture in one batch, with a cache. Then all suffixes, right-padded, in a
    second batch on top of it, which holds a copy of the prefix's keys and values for every suffix.
    For hybrid models, whose state no mask can cut, and for flash attention, which takes no mask.
packed key/value
    A few suffixes packed in each row, on top of the prefix's keys and values, under the mask of
    `packed`: one copy for a few suffixes, and no attention between many.
plain
    Whole turns in a right-padded batch: where each has a picture of its own, and where no way of
    sharing is exact on the model.

All of them give the same hidden states and gradients up to rounding. `sharing` tries which of them
do on a model, by numbers, since configurations lie; a way that was not tried is not used.
`supervised_states` takes the cheapest for the turns at hand (`parts`).

`micro_batch` bounds memory: the graph of each forward is dropped, and built again, alone, when the
backward pass comes to it (torch's checkpointing around the whole forward). The price is one more
forward. With any bound the result is one [N, D] tensor with its graph, so every objective is exact,
also one that mixes samples. (A loss in parts with common denominators would be exact only for sums
over rows.) The keys and values of the prefix stay in memory. Their gradients are summed, and go
back through the prefix once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate

from .cache import as_keyword, cache_of, fork
from .parts import Part, parts_of
from .turns import Encoded, collate, per_token
from .vlm import VLM

# layers that a mask can cut between samples
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# What goes in with suffixes. Token types do not: they mark the picture, which is in the prefix.
# `cross_attention_mask` says for every token which tiles it looks at.
BESIDE = ("input_ids", "attention_mask", "cross_attention_mask")


def supervised_states(
    vlm: VLM,
    turns: Sequence[Encoded],
    features: Sequence[Any] = (),
    *,
    micro_batch: int | None = None,
    ways: tuple[str, ...] | None = None,
) -> Tensor:
    """The hidden states [N, D] at the supervised positions, in the order of the turns, with their
    graph.

    features:    one entry for each turn, None where it shows no picture; empty where no turn does.
                 Turns with the same object here show the same picture.
    micro_batch: the most turns (and prefixes) in one forward; all at once when left out
    ways:        the ways of sharing that are exact here; `vlm.shares` when left out
    """
    shown = list(features) or [None] * len(turns)
    states: dict[int, Tensor] = {}
    for part in parts_of(vlm, turns, shown):
        states.update(RUN[part.cheapest(micro_batch, ways)](part, micro_batch))
    return torch.cat([states[i] for i in range(len(turns))])


def forwards(vlm: VLM, turns: Sequence[Encoded], shown: Sequence[Any]) -> int:
    """How many times `supervised_states` calls the model, all turns at once.

    shown: for each turn what it shows, None where it shows no picture; pictures that are one object
           are one picture
    """
    called = 0
    for part in parts_of(vlm, turns, list(shown)):
        way = part.cheapest(None)
        called += len(part.packed_rows(None)) if way == "packed" else 1 if way == "plain" else 2
    return called


def _bounded(run: Callable[[], Any], bounded: bool) -> Any:
    """run(). Where memory is bounded, the backward pass builds its graph again, with the same
    dropout."""
    return checkpoint(run, use_reentrant=False) if bounded and torch.is_grad_enabled() else run()


# Plain --------------------------------------------------------------------------------------------


def _plain(part: Part, most: int | None) -> Iterator[tuple[int, Tensor]]:
    for members in part.chunks(most):

        def run(members: list[int] = members) -> list[Tensor]:
            hidden = part.vlm.hidden([part.turns[i].inputs for i in members], part.shown(members))
            return [hidden[row, part.turns[i].rows] for row, i in enumerate(members)]

        yield from zip(
            (part.index[i] for i in members), _bounded(run, most is not None), strict=True
        )


# Packed -------------------------------------------------------------------------------------------


def _packed(part: Part, most: int | None) -> Iterator[tuple[int, Tensor]]:
    masks = _own_masks(part)
    for rows in part.packed_rows(most):

        def run(rows: list[list[int]] = rows) -> list[Tensor]:
            hidden, _ = part.vlm.run(
                _pack(part, rows, masks), part.shown([row[0] for row in rows]), use_cache=False
            )
            return [
                hidden[at, part.turns[i].rows - part.length + start]
                for at, row in enumerate(rows)
                for i, start in zip(row, _starts(part, row), strict=True)
            ]

        yield from zip(
            (part.index[i] for row in rows for i in row),
            _bounded(run, most is not None),
            strict=True,
        )


def _starts(part: Part, row: list[int]) -> list[int]:
    """Where each suffix of a packed row begins."""
    return [part.packed_length(row[:k]) for k in range(len(row))]


def _pack(part: Part, rows: list[list[int]], masks: dict[str | None, Tensor]) -> dict[str, Any]:
    """The model's inputs for packed rows [R, T]: tokens, the position ids that each turn has on its
    own, the 4-D mask [R, 1, T, T]. masks: from `_own_masks`."""
    P, lines, positions = part.length, [], []
    for row in rows:
        lines.append(_joined([part.turns[i].inputs for i in row], P))
        suffixes = [part.positions[..., i, P : part.lengths[i]] for i in row]
        positions.append(torch.cat([part.positions[..., row[0], :P], *suffixes], -1))
    inputs = collate(lines, part.vlm.tokenizer.pad_token_id)
    R, T = inputs["input_ids"].shape
    inputs["position_ids"] = torch.stack(
        [nn.functional.pad(p, (0, T - p.shape[-1])) for p in positions], -2
    )
    packed = {}
    for kind, own in masks.items():
        mask = own.new_full((R, 1, T, T), torch.finfo(own.dtype).min)
        # Padding sees itself: a softmax over nothing would be NaN on some devices.
        mask.diagonal(dim1=-2, dim2=-1).zero_()
        for r, row in enumerate(rows):
            mask[r, 0, :P, :P] = own[:P, :P]
            for i, start in zip(row, _starts(part, row), strict=True):
                end, T_i = start + part.lengths[i] - P, part.lengths[i]
                mask[r, 0, start:end, :P] = own[P:T_i, :P]
                mask[r, 0, start:end, start:end] = own[P:T_i, P:T_i]
        packed[kind] = mask
    inputs["attention_mask"] = packed.get(None, packed)
    return inputs


def _joined(row: list[dict[str, Tensor]], P: int) -> dict[str, Tensor]:
    """The inputs of several turns as one turn's: prefix + s_1 + ... + s_k of what has an entry for
    each token, the rest (image grids) once."""
    whole = {
        k: torch.cat([row[0][k][:, :P], *(x[k][:, P:] for x in row)], 1)
        for k in row[0]
        if per_token(row[0], k)
    }
    return row[0] | whole


class _Eager:
    """A model's configuration as the mask functions read it, for eager attention. Eager attention
    alone has its mask written out always; others may leave it to the kernel."""

    def __init__(self, config: Any) -> None:
        self._config, self._text = config, copy.copy(config.get_text_config())
        self._text._attn_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def get_text_config(self, *args: Any, **options: Any) -> Any:
        return self._text


@torch.no_grad()
def _own_masks(part: Part) -> dict[str | None, Tensor]:
    """The model's additive masks [T, T] for the longest turn, by kind of layer; one mask under None
    where all are the same.

    The masks of shorter turns are the upper left corners: a mask depends on places and token types,
    and these agree.

    Raises ValueError where no mask can keep samples apart, and where the prefix looks at what
    follows it.
    """
    base, i = part.vlm.base, max(range(len(part.turns)), key=lambda i: part.lengths[i])
    config, inputs, T = base.config, part.turns[i].inputs, part.lengths[i]
    if odd := sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()) - ATTENTION):
        raise ValueError(f"its {', '.join(odd)} layers carry a state from token to token")
    if "flash" in (config.get_text_config()._attn_implementation or ""):
        raise ValueError("flash attention takes no 4-D mask")
    beside = {
        k: v
        for k, v in inputs.items()
        if per_token(inputs, k) and k not in ("input_ids", "attention_mask")
    }
    make = getattr(base, "create_masks_for_generate", create_masks_for_generate)
    made = make(
        config=_Eager(config),
        inputs_embeds=torch.zeros(1, T, 1, dtype=base.dtype, device=part.vlm.device),
        attention_mask=None,
        position_ids=None,
        is_first_iteration=True,
        **as_keyword(None),
        **beside,
    )
    by_kind: dict[str | None, Tensor] = made if isinstance(made, dict) else {None: made}
    masks = {kind: mask[0, 0] for kind, mask in by_kind.items()}
    if any((mask[: part.length, part.length :] == 0).any() for mask in masks.values()):
        raise ValueError("its prefix looks at what follows it")
    first = next(iter(masks.values()))
    return {None: first} if all(torch.equal(first, mask) for mask in masks.values()) else masks


# Key/value, alone and packed ----------------------------------------------------------------------


def _key_value(part: Part, most: int | None) -> Iterator[tuple[int, Tensor]]:
    return _on_prefixes(part, most, lambda members: [[i] for i in members], suffixes)


def _packed_key_value(part: Part, most: int | None) -> Iterator[tuple[int, Tensor]]:
    return _on_prefixes(
        part, most, part.short_rows, functools.partial(_packed_suffixes, masks=_own_masks(part))
    )


def _on_prefixes(
    part: Part,
    most: int | None,
    arrange: Callable[[list[int]], list[list[int]]],
    inputs: Callable[[Part, list[list[int]], Any], dict[str, Any]],
) -> Iterator[tuple[int, Tensor]]:
    """Suffixes on top of the keys and values of their pictures' prefixes.

    arrange: puts turns into rows
    inputs:  the model's inputs for rows on top of a cache
    """
    size = most or len(part.groups)
    for at in range(0, len(part.groups), size):
        groups = part.groups[at : at + size]
        # Where there are several batches of prefixes, only their keys and values stay.
        several = most is not None and size < len(part.groups)
        cache = _bounded(functools.partial(prefix_cache, part, [g[0] for g in groups]), several)
        picture = {i: row for row, group in enumerate(groups) for i in group}
        for members in part.chunks(most, list(picture)):
            rows = arrange(members)
            of = torch.tensor([picture[row[0]] for row in rows], device=part.vlm.device)

            def run(
                rows: list[list[int]] = rows,
                of: Tensor = of,
                cache: Any = cache,
                n: int = len(groups),
            ) -> list[Tensor]:
                own = as_keyword(fork(cache, n, of))
                hidden, _ = part.vlm.run(inputs(part, rows, cache), **own)
                return [
                    hidden[at, part.turns[i].rows - 2 * part.length + start]
                    for at, row in enumerate(rows)
                    for i, start in zip(row, _starts(part, row), strict=True)
                ]

            yield from zip(
                (part.index[i] for row in rows for i in row),
                _bounded(run, most is not None),
                strict=True,
            )


def prefix_cache(part: Part, heads: list[int]) -> Any:
    """The cache of one prefix for each picture, with its graph.

    heads: one turn of each picture

    Raises ValueError where the model returns no cache.
    """
    inputs = collate([part.turns[i].inputs for i in heads], 0)
    inputs = {k: v[:, : part.length] if per_token(inputs, k) else v for k, v in inputs.items()}
    inputs["position_ids"] = part.positions[..., heads, : part.length]
    # Not every model makes a cache of its own for `use_cache` alone.
    empty = DynamicCache(config=part.vlm.base.config.get_text_config())
    _, output = part.vlm.run(inputs, part.shown(heads), use_cache=True, **as_keyword(empty))
    cache = cache_of(output)
    if cache is None or cache.get_seq_length() != part.length:
        raise ValueError("it returns no cache of its keys and values")
    return cache


def _packed_suffixes(
    part: Part, rows: list[list[int]], cache: Any, masks: dict[str | None, Tensor]
) -> dict[str, Any]:
    """Packed rows without their prefix [R, L], under a mask [R, 1, L, P + L]. Layers with a sliding
    window drop what no later token sees: their mask covers as much of the prefix as they keep."""
    P, whole = part.length, _pack(part, rows, masks)
    cut = {k: whole[k][:, P:] for k in BESIDE if k in whole and k != "attention_mask"}
    kinds = getattr(part.vlm.base.config.get_text_config(), "layer_types", None) or []

    def below(kind: str | None, mask: Tensor) -> Tensor:
        kept = cache.layers[kinds.index(kind) if kind else 0].keys.shape[-2]
        return mask[:, :, P:, P - kept :]

    mask = whole["attention_mask"]
    mask = (
        {k: below(k, v) for k, v in mask.items()} if isinstance(mask, dict) else below(None, mask)
    )
    return {**cut, "attention_mask": mask, "position_ids": whole["position_ids"][..., P:]}


def suffixes(part: Part, rows: list[list[int]], cache: Any) -> dict[str, Tensor]:
    """A right-padded batch [n, L] of what follows the prefix, under a mask [n, P + L]."""
    P, members = part.length, [i for row in rows for i in row]
    L = max(part.lengths[i] for i in members) - P
    cut = [
        {k: part.turns[i].inputs[k][:, P:] for k in BESIDE if k in part.turns[i].inputs}
        for i in members
    ]
    inputs = collate(cut, part.vlm.tokenizer.pad_token_id)
    inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (P, 0), value=1)
    inputs["position_ids"] = part.positions[..., members, P : P + L]
    return inputs


RUN: dict[str, Callable[[Part, int | None], Iterator[tuple[int, Tensor]]]] = {
    "packed": _packed,
    "key/value": _key_value,
    "packed key/value": _packed_key_value,
    "plain": _plain,
}
