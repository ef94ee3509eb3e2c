"""Which turns share their first tokens, how they can be packed, and what each way of sharing costs.

`prefix` runs the ways.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .turns import Encoded, collate, per_token
from .vlm import VLM

# What one more forward costs, in tokens: 87 on the embedded model, 55 at hidden 256 with four
# layers. Measured as a line through the times of batches of 1 to 24 turns (forward and backward,
# one thread of a Xeon, torch 2.13, 2026-11-21).
FORWARD = 64
# A way of sharing is worth it up to this share of the plain batch's cost: the estimate is no better
# than that.
WORTH = 0.9
# Rows of one forward are padded, so they are about as long: the shortest has at least this share of
# the longest one's tokens.
ALIKE = 0.8
# A row on top of keys and values holds suffixes of up to this share of the prefix. Longer rows copy
# less and attend to more.
SHORT = 1 / 3
# The estimated time of a way is multiplied by this before ways are compared, for the copies of keys
# and values that it holds: one for every suffix, or for every few. Assumed; under a memory limit
# `packed` is taken whatever it costs.
DEARER = {"packed": 1.0, "packed key/value": 1.05, "key/value": 1.2}


@dataclass(frozen=True, eq=False)
class Part:
    """Turns whose first `length` tokens are the same. Every image token is among these tokens, and
    no supervised row.

    features: the image features of each turn; None without a picture
    index:    the place of each turn in the caller's order
    groups:   positions in `turns`, by picture; all turns without a picture are one group
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
            counted = torch.arange(max(self.lengths), device=self.vlm.device)
            return counted.expand(len(self.turns), -1)
        batch = collate([turn.inputs for turn in self.turns], 0)
        return own(**{k: batch[k] for k in inspect.signature(own).parameters if k in batch})[0]

    def shown(self, members: Sequence[int]) -> list[Any]:
        """The features of those members that have a picture."""
        return [self.features[i] for i in members if self.features[i] is not None]

    def cheapest(self, most: int | None, exact: tuple[str, ...] | None = None) -> str:
        """The way of sharing to take, "plain" where none is worth it.

        most:  turns in one forward; None: all
        exact: the ways that are exact here; `vlm.shares` when left out
        """
        ways = self._that_run(self.vlm.shares if exact is None else exact)
        if self.vlm.budget.sparing and "packed" in ways:
            return "packed"
        if not ways:
            return "plain"
        cost = {way: self.cost(way, most) for way in ways}
        best = min(ways, key=lambda way: cost[way] * DEARER[way])
        return best if cost[best] < WORTH * self.cost("plain", most) else "plain"

    def _that_run(self, exact: tuple[str, ...]) -> tuple[str, ...]:
        """The ways that can be taken: none where turns share no prefix, and none that needs a cache
        where layers drop it."""
        if not self.length:
            return ()
        without_cache = tuple(way for way in exact if way == "packed")
        return without_cache if without_cache != exact and recomputes(self.vlm) else exact

    def cost(self, way: str, most: int | None) -> float:
        """The cost of all forwards, in tokens through the linear layers: a token takes 24 D^2 flops
        there, a pair of tokens 4 D."""
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
        """At most `most` turns each, turns of like length together."""
        chosen = range(len(self.turns)) if members is None else members
        order = sorted(chosen, key=lambda i: self.lengths[i])
        size = most or len(order)
        return [order[at : at + size] for at in range(0, len(order), size)]

    def packed_length(self, row: list[int]) -> int:
        """Tokens of the prefix and the suffixes of `row`."""
        return self.length + sum(self.lengths[i] - self.length for i in row)

    def short_rows(self, members: Sequence[int]) -> list[list[int]]:
        """Rows of turns, one picture in each. The suffixes of a row are together about `SHORT` of
        the prefix, or two of the longest; rows are about as long as each other, since they are
        padded."""
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
        """Forwards of rows of turns. A row has one picture; rows of one forward are about as long
        (`ALIKE`)."""
        rows = [
            g[at : at + (most or len(g))]
            for g in self.groups
            for at in range(0, len(g), most or len(g))
        ]
        forwards: list[list[list[int]]] = []
        for row in sorted(rows, key=self.packed_length, reverse=True):
            if forwards and self._joins(row, forwards[-1], most):
                forwards[-1].append(row)
            else:
                forwards.append([row])
        return forwards

    def _joins(self, row: list[int], forward: list[list[int]], most: int | None) -> bool:
        """Whether `row` may go into `forward`, whose longest row is its first."""
        alike = self.packed_length(row) >= ALIKE * self.packed_length(forward[0])
        return alike and (most is None or len(row) + sum(map(len, forward)) <= most)


def parts_of(vlm: VLM, turns: Sequence[Encoded], shown: list[Any]) -> list[Part]:
    """Puts turns together whose tokens before the question are the same: the placeholders of a
    picture of one size, or none.

    shown: the image features of each turn; None without a picture
    """
    image_token = getattr(vlm.base.config, "image_token_id", None)
    alike: dict[Any, list[int]] = {}
    ends: dict[int, int] = {}

    @functools.cache  # the same question about many pictures is one object
    def layout(turn: int, pictured: bool) -> tuple[int, Any]:
        inputs = turns[turn].inputs
        ids = inputs["input_ids"][0]
        placeholders = (
            (ids == image_token).nonzero().flatten().tolist()
            if pictured and image_token is not None
            else []
        )
        end = placeholders[-1] + 1 if placeholders else 0
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
    """How many first tokens all turns share, before the first supervised row of any.

    0 where what stands beside the tokens (token types) differs in the prefix, or is not the same
    all over the rest: one turn's mask would not be another's.
    """
    turns = list({id(turn): turn for turn in turns}.values())
    length = min(int(turn.rows[0]) for turn in turns)
    first = turns[0].inputs
    for turn in turns[1:]:
        same = first["input_ids"][0, :length] == turn.inputs["input_ids"][0, :length]
        length = length if bool(same.all()) else int(same.int().argmin())
    for key in first:
        if key != "input_ids" and per_token(first, key):
            prefix, rest = first[key][0, :length], first[key][0, -1]
            for beside in (turn.inputs[key][0] for turn in turns):
                if not torch.equal(beside[:length], prefix) or (beside[length:] != rest).any():
                    return 0
    return length


def recomputes(vlm: VLM) -> bool:
    """Whether layers are recomputed in the backward pass, which drops the cache."""
    return any(
        m.training and getattr(m, "gradient_checkpointing", False) for m in vlm.base.modules()
    )
