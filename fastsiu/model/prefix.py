"""What many turns share is computed once: "<bos> ... <image tokens>" with its gradient, and every
question attends to it.

    packed      one row for each picture, prefix + s_1 + ... + s_k, under a 4-D mask that is
    stitched from the model's own, so
                that sliding windows and image blocks that look both ways come out right. The least
                memory, and the only way under activation checkpointing. Costs attention between
                suffixes, which the mask then throws away.
    key/value   the prefix of each picture in one batch with a cache, then all suffixes,
    right-padded, in a second batch on top
                of it, which holds a copy of the prefix's keys and values for every suffix: for
                hybrid models, whose state no mask can cut, and for flash attention, which takes
                none.
    packed key/value    a few suffixes packed in each row on top of the prefix's keys and values,
    under the mask of packed: a copy
                for a few of them, and no attention between many.
    plain       whole turns in a right-padded batch: one picture each, or nothing was found exact on
    this model.

All of them give the same hidden states and gradients up to rounding. `sharing` finds out which do
on a model, by numbers: configurations lie. What no one checked is not used. `supervised_states`
then takes the cheapest for the turns at hand.

Memory is bounded by `micro_batch`: each forward's graph is dropped and made again, alone, when the
backward pass comes to it (torch's checkpointing around the whole forward). The result is one [N, D]
tensor with its graph whatever the bound, so it is exact for every objective, also for one that
mixes samples; splitting a loss by its denominators would be so only for sums over rows. It costs
one more forward. The keys and values of the prefix stay, and their gradients are summed before they
go back through it, once.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate

from .vlm import VLM, Encoded, collate

# layers that a mask can cut between samples
ATTENTION = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
}

# What one more forward costs, in tokens: 87 on the embedded model, 55 at hidden 256 with four
# layers (forward and backward, one thread of a Xeon, torch 2.13, 2026-11-21: time of batches of 1
# to 24 turns, a line through it).
FORWARD = 64
# share of the plain batch's cost from which on sharing is worth it: the estimate is no better than
# that
WORTH = 0.9
# What goes in with suffixes. Token types mark the picture, which is in the prefix; which tiles a
# token looks at across is said of every token.
BESIDE = ("input_ids", "attention_mask", "cross_attention_mask")
# of the prefix: what a row on top of its keys and values may hold; longer rows copy less and attend
# to more
SHORT = 1 / 3
# What the time of a way is multiplied by before it is compared, for the copies of keys and values
# that it holds: one for every suffix, or for every few. Assumed; under a memory limit packed is
# taken whatever it costs.
DEARER = {"packed": 1.0, "packed key/value": 1.05, "key/value": 1.2}


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

    features:    one entry per turn, None where it shows no picture, or none at all. Turns show the
    same picture where they have
                 the same object here.
    micro_batch: the most turns (and prefixes) in one forward; all at once when left out
    ways:        the ways of sharing that are exact here; `vlm.shares` when left out
    """
    shown = list(features) or [None] * len(turns)
    found: dict[int, Tensor] = {}
    for part in parts_of(vlm, turns, shown):
        found.update(RUN[part.cheapest(micro_batch, ways)](part, micro_batch))
    return torch.cat([found[i] for i in range(len(turns))])


@dataclass(frozen=True, eq=False)
class Part:
    """Turns whose first `length` tokens are the same, every image token among them and no
    supervised row.

    index:  where each stands in the caller's order
    groups: positions in `turns`, by picture; all turns without a picture are one group
    """

    vlm: VLM
    turns: list[Encoded]
    features: list[Any]
    index: list[int]
    groups: list[list[int]]
    length: int

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each whole turn."""
        return [turn.inputs["input_ids"].shape[1] for turn in self.turns]

    @functools.cached_property
    def positions(self) -> Tensor:
        """The model's own position ids for all turns, right-padded: [n, T], or [3, n, T] where they
        are three-dimensional."""
        own = getattr(self.vlm.base.base_model, "get_rope_index", None)
        # without a picture all three dimensions count tokens
        if own is None or self.features[0] is None:
            return torch.arange(max(self.lengths), device=self.vlm.device).expand(
                len(self.turns), -1
            )
        batch = collate([turn.inputs for turn in self.turns], 0)
        return own(**{k: batch[k] for k in inspect.signature(own).parameters if k in batch})[0]

    def shown(self, members: Sequence[int]) -> list[Any]:
        return [self.features[i] for i in members if self.features[i] is not None]

    def cheapest(self, most: int | None, exact: tuple[str, ...] | None = None) -> str:
        exact = self.vlm.shares if exact is None else exact
        ways = [
            way for way in exact if self.length and not (way != "packed" and recomputes(self.vlm))
        ]
        if self.vlm.budget.sparing and "packed" in ways:
            return "packed"
        cost = {way: self.cost(way, most) for way in ways}
        best = min(ways, key=lambda way: cost[way] * DEARER[way], default="plain")
        return (
            best if best != "plain" and cost[best] < WORTH * self.cost("plain", most) else "plain"
        )

    def cost(self, way: str, most: int | None) -> float:
        """Of a forward, in tokens through the linear layers. A token takes 24 D^2 flops there, a
        pair of tokens 4 D."""
        P, pair = self.length, 1 / (6 * self.vlm.base.config.get_text_config().hidden_size)
        if way == "packed":
            sizes = [
                (len(rows), max(self.packed_length(row) for row in rows))
                for rows in self.packed_rows(most)
            ]
            return sum(FORWARD + n * (T + T * T * pair) for n, T in sizes)
        whole = [(len(c), max(self.lengths[i] for i in c)) for c in self.chunks(most)]
        if way == "plain":
            return sum(FORWARD + n * (T + T * T * pair) for n, T in whole)
        if way == "packed key/value":
            chunks = [
                [self.packed_length(row) for row in self.short_rows(c)] for c in self.chunks(most)
            ]
            whole = [(len(lengths), max(lengths)) for lengths in chunks]
        suffixes = sum(FORWARD + n * (T - P) * (1 + T * pair) for n, T in whole)
        return suffixes + FORWARD + len(self.groups) * P * (1 + P * pair)

    def chunks(self, most: int | None, members: Sequence[int] | None = None) -> list[list[int]]:
        """At most so many turns each, those of like length together."""
        order = sorted(
            range(len(self.turns)) if members is None else members, key=lambda i: self.lengths[i]
        )
        return [
            order[at : at + (most or len(order))] for at in range(0, len(order), most or len(order))
        ]

    def packed_length(self, row: list[int]) -> int:
        return self.length + sum(self.lengths[i] - self.length for i in row)

    def short_rows(self, members: Sequence[int]) -> list[list[int]]:
        """Rows of turns of one picture whose suffixes are together about SHORT of the prefix or two
        of the longest, and which are about as long as each other, since they are padded."""
        suffix = lambda i: self.lengths[i] - self.length
        room = max(SHORT * self.length, 2 * max(map(suffix, members)))
        rows: list[list[int]] = []
        for group in self.groups:
            own = sorted(set(group) & set(members), key=suffix, reverse=True)
            of_one: list[list[int]] = [[] for _ in range(math.ceil(sum(map(suffix, own)) / room))]
            for i in own:
                min(of_one, key=self.packed_length).append(i)
            rows += of_one
        return rows

    def packed_rows(self, most: int | None) -> list[list[list[int]]]:
        """Forwards of rows of turns. A row has one picture; rows of one forward are about as long,
        since they are padded."""
        rows = [
            g[at : at + (most or len(g))]
            for g in self.groups
            for at in range(0, len(g), most or len(g))
        ]
        forwards: list[list[list[int]]] = []
        for row in sorted(rows, key=self.packed_length, reverse=True):
            same = forwards and self.packed_length(row) >= 0.8 * self.packed_length(forwards[-1][0])
            if same and (most is None or len(row) + sum(map(len, forwards[-1])) <= most):
                forwards[-1].append(row)
            else:
                forwards.append([row])
        return forwards


def parts_of(vlm: VLM, turns: Sequence[Encoded], shown: list[Any]) -> list[Part]:
    """The turns by what stands before their questions: the placeholders of one picture, those of a
    larger one, none."""
    image_token = getattr(vlm.base.config, "image_token_id", None)
    alike: dict[Any, list[int]] = {}
    ends: dict[int, int] = {}

    @functools.cache  # the same question about many pictures is one object
    def layout(turn: int, pictured: bool) -> tuple[int, Any]:
        inputs = turns[turn].inputs
        ids = inputs["input_ids"][0]
        at = (ids == image_token).nonzero() if pictured and image_token is not None else ()
        end = int(at[-1]) + 1 if len(at) else 0
        other = tuple(
            (k, *v.flatten().tolist()) for k, v in inputs.items() if not per_token(inputs, k)
        )
        return end, (pictured, tuple(ids[:end].tolist()), other)

    first: dict[int, int] = {}
    for i, (turn, features) in enumerate(zip(turns, shown, strict=True)):
        ends[i], key = layout(first.setdefault(id(turn), i), features is not None)
        alike.setdefault(key, []).append(i)
    parts = []
    for members in alike.values():
        groups: dict[int, list[int]] = {}
        for place, i in enumerate(members):
            groups.setdefault(id(shown[i]), []).append(place)
        own = [turns[i] for i in members]
        length = _common(own)
        # An image token behind the prefix (or one that nobody knows) would be filled from another
        # turn's features.
        if shown[members[0]] is not None and not 0 < ends[members[0]] <= length:
            length = 0
        parts.append(
            Part(vlm, own, [shown[i] for i in members], members, list(groups.values()), length)
        )
    return parts


def _common(turns: list[Encoded]) -> int:
    """How many first tokens all turns share, before anyone's first supervised row; 0 where what
    stands beside the tokens (token types) differs in the prefix or is not the same all over the
    rest, so that one turn's mask would not be another's."""
    turns = list({id(turn): turn for turn in turns}.values())
    length = min(int(turn.rows[0]) for turn in turns)
    first = turns[0].inputs
    for turn in turns[1:]:
        same = first["input_ids"][0, :length] == turn.inputs["input_ids"][0, :length]
        length = length if bool(same.all()) else int(same.int().argmin())
    for key in first:
        if key != "input_ids" and per_token(first, key):
            prefix, rest, all_ = (
                first[key][0, :length],
                first[key][0, -1],
                [turn.inputs[key][0] for turn in turns],
            )
            if any(not torch.equal(x[:length], prefix) or (x[length:] != rest).any() for x in all_):
                return 0
    return length


def per_token(inputs: dict[str, Tensor], key: str) -> bool:
    return inputs[key].shape[:2] == inputs["input_ids"].shape


def recomputes(vlm: VLM) -> bool:
    """Whether layers are recomputed in the backward pass, which drops the cache."""
    return any(
        m.training and getattr(m, "gradient_checkpointing", False) for m in vlm.base.modules()
    )


def _bounded(run: Callable[[], Any], bounded: bool) -> Any:
    """run(), and where memory is bounded its graph is made again in the backward pass (the same
    dropout included)."""
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
    """The model's inputs for packed rows [R, T]: tokens, position ids of each turn's own, the 4-D
    mask [R, 1, T, T]."""
    P, lines, positions = part.length, [], []
    for row in rows:
        lines.append(_joined([part.turns[i].inputs for i in row], P))
        own = [part.positions[..., i, P : part.lengths[i]] for i in row]
        positions.append(torch.cat([part.positions[..., row[0], :P], *own], -1))
    inputs = collate(lines, part.vlm.tokenizer.pad_token_id)
    R, T = inputs["input_ids"].shape
    inputs["position_ids"] = torch.stack(
        [nn.functional.pad(p, (0, T - p.shape[-1])) for p in positions], -2
    )
    packed = {}
    for kind, own in masks.items():
        mask = own.new_full((R, 1, T, T), torch.finfo(own.dtype).min)
        mask.diagonal(
            dim1=-2, dim2=-1
        ).zero_()  # padding sees itself: a softmax over nothing would be NaN on some devices
        for r, row in enumerate(rows):
            mask[r, 0, :P, :P] = own[:P, :P]
            for i, start in zip(row, _starts(part, row), strict=True):
                length = part.lengths[i] - P
                mask[r, 0, start : start + length, :P] = own[P : P + length, :P]
                mask[r, 0, start : start + length, start : start + length] = own[
                    P : P + length, P : P + length
                ]
        packed[kind] = mask
    inputs["attention_mask"] = packed.get(None, packed)
    return inputs


def _joined(row: list[dict[str, Tensor]], P: int) -> dict[str, Tensor]:
    """Several turns' inputs as one: what stands beside each token prefix + s_1 + ... + s_k, the
    rest (image grids) once."""
    whole = {
        k: torch.cat([row[0][k][:, :P], *(x[k][:, P:] for x in row)], 1)
        for k in row[0]
        if per_token(row[0], k)
    }
    return row[0] | whole


class _Eager:
    """A model's configuration as the mask functions read it, for eager attention: the only one
    whose mask is always written out, where others leave it to the kernel."""

    def __init__(self, config: Any) -> None:
        self._config, self._text = config, copy.copy(config.get_text_config())
        self._text._attn_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def get_text_config(self, *args: Any, **options: Any) -> Any:
        return self._text


@torch.no_grad()
def _own_masks(part: Part) -> dict[str | None, Tensor]:
    """The model's additive masks [T, T] for its longest turn, by kind of layer, or one under None
    where they are all the same.

    Those of shorter turns are their upper left corners: a mask depends on places and token types,
    and these agree. Raises ValueError where no mask can keep samples apart or the prefix looks at
    what follows it.
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
    found = make(
        config=_Eager(config),
        inputs_embeds=torch.zeros(1, T, 1, dtype=base.dtype, device=part.vlm.device),
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        is_first_iteration=True,
        **beside,
    )
    masks = {
        kind: mask[0, 0]
        for kind, mask in (found if isinstance(found, dict) else {None: found}).items()
    }
    if any((mask[: part.length, part.length :] == 0).any() for mask in masks.values()):
        raise ValueError("its prefix looks at what follows it")
    one = next(iter(masks.values()))
    return {None: one} if all(torch.equal(one, mask) for mask in masks.values()) else masks


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
    """Rows of suffixes, as `arrange` has them, on top of the keys and values of their pictures'
    prefixes."""
    size = most or len(part.groups)
    for at in range(0, len(part.groups), size):
        groups = part.groups[at : at + size]
        # A single prefix is run once; of several batches of prefixes only the keys and values stay.
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
                hidden, _ = part.vlm.run(
                    inputs(part, rows, cache), past_key_values=fork(cache, n, of)
                )
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
    """The cache of one prefix for each picture, with its graph. Raises ValueError where the model
    returns none."""
    inputs = collate([part.turns[i].inputs for i in heads], 0)
    inputs = {k: v[:, : part.length] if per_token(inputs, k) else v for k, v in inputs.items()}
    inputs["position_ids"] = part.positions[..., heads, : part.length]
    # Given, since not every model makes its own where only `use_cache` is asked for.
    empty = DynamicCache(config=part.vlm.base.config.get_text_config())
    _, output = part.vlm.run(inputs, part.shown(heads), use_cache=True, past_key_values=empty)
    cache = output.past_key_values
    if cache is None or cache.get_seq_length() != part.length:
        raise ValueError("it returns no cache of its keys and values")
    return cache


def _packed_suffixes(
    part: Part, rows: list[list[int]], cache: Any, masks: dict[str | None, Tensor]
) -> dict[str, Any]:
    """Packed rows without their prefix [R, L]; the mask [R, 1, L, P + L] covers both, or as much of
    the prefix as is kept by the
    layers that it is for: those with a sliding window drop what no later token sees."""
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
    """A right-padded batch [n, L] of what follows the prefix; the mask [n, P + L] covers both."""
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


def fork(cache: Any, pictures: int, rows: Tensor, spend: bool = False) -> Any:
    """A cache with row rows[k] of another's in row k, differentiable; the other stays as it is, for
    the next batch.

    spend: the other is wanted no more. It loses its layers one by one, so that only one of them is
    there twice.

    Transformers' own reordering would copy the prefix of every layer n times at once; a view is
    enough for one picture, since each layer concatenates, and so copies, when its turn comes.
    Recurrent states are small and written in place: copies.
    """
    fork, old = copy.copy(cache), cache.layers if spend else list(cache.layers)
    fork.layers = []
    while old:
        fork.layers.append(layer := copy.copy(old.pop(0)))
        for name, value in list(vars(layer).items()):
            if isinstance(value, Tensor) and value.ndim > 1:
                spread = (
                    value.expand(len(rows), *value.shape[1:])
                    if pictures == 1
                    else value.index_select(0, rows)
                )
                setattr(layer, name, spread)
            elif isinstance(value, dict):
                setattr(
                    layer,
                    name,
                    {
                        k: v.index_select(0, rows) if isinstance(v, Tensor) else v
                        for k, v in value.items()
                    },
                )
        if hasattr(layer, "update_recurrent_state"):
            layer.update_recurrent_state = functools.partial(_replace, layer)
    return fork


def _replace(layer: Any, states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    """`update_recurrent_state` of a forked layer: the original copies into the old state, which
    autograd still needs."""
    layer.recurrent_states[state_idx] = states
    layer.is_recurrent_states_initialized[state_idx] = True
    return states


RUN: dict[str, Callable[[Part, int | None], Iterator[tuple[int, Tensor]]]] = {
    "packed": _packed,
    "key/value": _key_value,
    "packed key/value": _packed_key_value,
    "plain": _plain,
}
