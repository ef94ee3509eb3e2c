"""Greedy answers without transformers' `generate`: what prompts share is computed once, and many
answers grow side by side.

The prefix of each picture ("<bos> ... <image tokens>", or the beginning of a chat without a
picture) goes through the model once. Its keys and values are copied to the rows of a batch, and the
questions go in right-padded on top of them. Then comes one token at a time, for all rows at once.
Each token has its own row's position ids, and a mask hides the slots between a question and its
answer. Rows whose answer has ended leave the batch. Only the last state of each row reaches the
head.

Memory holds keys and values once for each row, and once for each prefix as long as further batches
grow on it. While they are copied, one layer exists twice.

`why_not` tries by numbers whether a model can be run like this, before the first answers and on
their pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from . import prefix
from .cache import as_keyword, fork
from .faults import first_line, out_of_memory
from .generation import HARMLESS, SIMPLE, settings_of
from .parts import Part, parts_of, recomputes
from .sharing import tolerance
from .turns import Encoded, Picture, followed
from .vlm import VLM

TRIED = ("Who is this?", "What is shown here, and where was it?")  # questions of unlike length
STEPS = 2  # tokens of each that are tried
CROWDED = 3 / 4  # a batch is made smaller when no more than this share of its rows still answers


@dataclass(frozen=True)
class Rules:
    """What decides about the next token beside the model.

    ends:     ids that end an answer
    suppress: ids that are never taken
    penalty:  makes ids less likely that stand in the row's prompt or answer (transformers'
              repetition penalty); 1: none
    """

    ends: frozenset[int] = frozenset()
    suppress: tuple[int, ...] = ()
    penalty: float = 1.0

    def next(self, vlm: VLM, states: Tensor, seen: Tensor) -> Tensor:
        """[n, D] states and [n, T] ids so far -> [n] the likeliest ids."""
        scores = vlm.base.get_output_embeddings()(states)
        if self.penalty != 1:  # not the same before a softcap as after it
            scores = RepetitionPenaltyLogitsProcessor(self.penalty)(
                seen, vlm.transformed(scores.float())
            )
        if self.suppress:
            scores[:, self.suppress] = -torch.inf
        return scores.argmax(-1)


def rules(vlm: VLM, suppress: Sequence[int] = ()) -> Rules | None:
    """The rules that the model's generation_config sets; None where it sets more than `Rules`
    knows."""
    if unknown(vlm):
        return None
    return Rules(
        ends(vlm), tuple(sorted(suppress)), vlm.base.generation_config.repetition_penalty or 1.0
    )


def unknown(vlm: VLM) -> list[str]:
    """What the model's generation_config sets beyond what `Rules` knows."""
    return sorted(set(settings_of(vlm.base.generation_config)) - SIMPLE - HARMLESS)


def slow(vlm: VLM) -> str:
    """Why transformers' `generate` answers for this model; "" where it does not, or only for a
    question or two before any trial."""
    if names := unknown(vlm):
        return f"its generation_config sets {', '.join(names)}"
    return next((why for why in vlm.decodes.values() if why), "")


def remarks(vlm: VLM) -> list[str]:
    """The sentence for a report on settings of the model that no answer follows; empty where there
    are none."""
    if not vlm.aside:
        return []
    names = ", ".join(vlm.aside)
    return [f"The model's generation_config sets {names}: answers were made without that."]


def ends(vlm: VLM) -> frozenset[int]:
    """The ids that end an answer."""
    found = vlm.base.generation_config.eos_token_id
    return frozenset(
        () if found is None else found if isinstance(found, list | tuple) else (found,)
    )


def why_not(vlm: VLM, pictures: Sequence[Picture | None]) -> str:
    """Why answers may not grow on a shared prefix: how their states differ from those of plain
    forwards, or the error; "" where they may.

    The trial asks two questions about the first of the pictures and one about another, once for
    prompts with a picture and once for prompts without; `vlm.decodes` keeps the results.
    """
    pictured = pictures[0] is not None
    if pictured not in vlm.decodes:
        vlm.decodes = vlm.decodes | {pictured: _trial(vlm, pictures)}
    return vlm.decodes[pictured]


def exact(vlm: VLM, pictures: Sequence[Picture | None]) -> bool:
    """Whether prompts with these pictures, None for a prompt without, may share a prefix while
    nothing trains."""
    kinds: list[Sequence[Picture | None]] = [[p for p in pictures if p is not None]]
    if None in pictures:
        kinds.append([None])
    return not recomputes(vlm) and not any(why_not(vlm, kind) for kind in kinds if kind)


def told(untouched: str, unlearned: str) -> list[str]:
    """The sentence for a report on how two models were asked; empty where both were asked here.

    untouched, unlearned: `slow` of each model
    """
    if not untouched and not unlearned:
        return []
    if untouched and unlearned:
        return [f"Answers were made by transformers' generate, one length at a time: {unlearned}."]
    one, other = ("untouched", "unlearned") if untouched else ("unlearned", "untouched")
    return [
        f"Answers of the {one} model alone were made by transformers' generate, so that rounding "
        f"may tell them from those of the {other} model: {untouched or unlearned}."
    ]


def _of_one_size(a: Picture | None, b: Picture | None) -> bool:
    return a is not None and b is not None and a.image.size == b.image.size


@torch.no_grad()
def _trial(vlm: VLM, pictures: Sequence[Picture | None]) -> str:
    first = pictures[0]
    other = next((p for p in pictures if p is not first and _of_one_size(p, first)), first)
    asked = [(TRIED[0], first), (TRIED[1], first), (TRIED[0], other)]
    turns = [prompt(vlm, question, picture) for question, picture in asked]
    shown = [None if p is None else p.features for _, p in asked]
    try:
        parts = parts_of(vlm, turns, shown)
        if len(parts) > 1 or not parts[0].length:
            return "questions have nothing in common before them"
        (part,) = parts
        ours: list[list[Tensor]] = [[] for _ in turns]
        said = [turn.inputs["input_ids"][0, -STEPS:] for turn in turns]  # any words will do
        for rows, members in _batches(part, None, STEPS):
            for step in range(STEPS + 1):
                for i, state in zip(members, rows.states, strict=True):
                    ours[i].append(state)
                if step == STEPS - 1 and len(members) > 1:
                    members = members[1:]
                    rows.keep(list(range(1, 1 + len(members))))
                if step < STEPS:
                    rows.go(torch.stack([said[i][step] for i in members]))
        grown = torch.stack([state for row in ours for state in row]).float()
        whole = [followed(turn.inputs, tokens) for turn, tokens in zip(turns, said, strict=True)]
        plain = vlm.hidden(whole, part.shown(range(len(turns))))
        expected = torch.cat(
            [plain[i, part.lengths[i] - 1 :][: len(row)] for i, row in enumerate(ours)]
        ).float()
    except Exception as error:
        # any: whatever a family's own forward thinks of such inputs; it is kept as the reason
        if out_of_memory(error):
            return "the trial does not fit into memory"
        return first_line(error)
    apart = float((grown - expected).norm() / expected.norm())
    alike = apart <= tolerance(vlm, vlm.head_weight.dtype, gradients=False)  # false for NaN
    return "" if alike else f"hidden states differ by {apart:.1e}"


def prompt(vlm: VLM, question: str, picture: Picture | None, begin: str = "") -> Encoded:
    """A prompt as a turn: its one supervised row is its last token, and it has no label."""
    inputs = vlm.encode_prompt(question, picture, begin)
    ids = inputs["input_ids"]
    return Encoded(inputs, torch.tensor([ids.shape[1] - 1], device=ids.device), ids.new_zeros(0))


@torch.no_grad()
def greedy(
    vlm: VLM,
    turns: Sequence[Encoded],
    features: Sequence[Any],
    rules: Rules,
    longest: int,
    batch_size: int,
) -> Iterator[tuple[int, list[int]]]:
    """(place in `turns`, ids of the answer) of each prompt that shares a prefix, in any order.
    Where the model ended the answer, its last id is the one that ends it.

    turns:      from `prompt`
    features:   one entry for each turn, None without a picture
    longest:    ids of an answer
    batch_size: rows
    """
    for part in parts_of(vlm, turns, list(features)):
        if not part.length:
            continue
        for rows, members in _batches(part, batch_size, longest):
            said: list[list[int]] = [[] for _ in members]
            live = list(range(len(members)))  # the place in `members` of each row
            for step in range(longest):
                tokens = rules.next(vlm, rows.states, rows.seen)
                for row, token in zip(live, tokens.tolist(), strict=True):
                    if not said[row] or said[row][-1] not in rules.ends:
                        said[row].append(token)
                left = [at for at, row in enumerate(live) if said[row][-1] not in rules.ends]
                if not left or step == longest - 1:
                    break
                if len(left) <= CROWDED * len(live):
                    rows.keep(left)
                    live, tokens = [live[at] for at in left], tokens[left]
                rows.go(tokens)
            del rows  # before the next batch is made
            yield from zip((part.index[i] for i in members), said, strict=True)


class Rows:
    """Prompts of one part side by side, each with as much of its answer as it has.

    states: [n, D], which predict the next token
    seen:   [n, T] int64, the ids of prompt and answer, padded with ids of the row's own
    """

    def __init__(
        self, part: Part, members: list[int], cache: Any, pictures: int, of: Tensor, last: bool
    ) -> None:
        """cache: of the prefixes of so many `pictures`; of: [n], each row's picture; last: no
        further batch needs `cache`."""
        inputs = prefix.suffixes(part, [[i] for i in members], cache)
        self.vlm, self.cache = part.vlm, fork(cache, pictures, of, spend=last)
        self.mask = inputs["attention_mask"]
        hidden, _ = self.vlm.run(inputs, use_cache=True, **as_keyword(self.cache))
        rows, lengths = torch.arange(len(members)), torch.tensor([part.lengths[i] for i in members])
        ends = lengths - 1 - part.length
        self.states = hidden[rows, ends]
        self.positions = part.positions[..., members, lengths - 1][..., None] + 1
        start = part.turns[members[0]].inputs["input_ids"][:, : part.length]
        start = start.expand(len(members), -1)
        asked = self.mask[:, part.length :] == 1
        self.seen = torch.cat([start, torch.where(asked, inputs["input_ids"], start[:, :1])], 1)
        self.beside: dict[str, Tensor] = {}
        # an answer looks at the tiles that the end of its prompt looks at
        if "cross_attention_mask" in inputs:
            tiles = inputs["cross_attention_mask"][rows, ends]
            self.beside["cross_attention_mask"] = tiles[:, None]

    def go(self, tokens: Tensor) -> None:
        """One more token, [n]."""
        self.seen = torch.cat([self.seen, tokens[:, None]], 1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        inputs = {
            "input_ids": tokens[:, None],
            "attention_mask": self.mask,
            "position_ids": self.positions,
            **self.beside,
        }
        hidden, _ = self.vlm.run(inputs, use_cache=True, **as_keyword(self.cache))
        self.states, self.positions = hidden[:, -1], self.positions + 1

    def keep(self, rows: list[int]) -> None:
        """Only these rows stay."""
        at = torch.tensor(rows, device=self.states.device)
        self.cache = fork(self.cache, len(self.states), at, spend=True)
        self.states, self.seen, self.mask = self.states[at], self.seen[at], self.mask[at]
        self.positions = self.positions.index_select(-2, at)
        self.beside = {k: v[at] for k, v in self.beside.items()}


def _batches(part: Part, most: int | None, longest: int) -> Iterator[tuple[Rows, list[int]]]:
    """The prompts of a part in batches of at most `most` rows. Memory holds the prefixes of their
    pictures meanwhile."""
    most = most or len(part.turns)
    for groups in _pictures(part, most):
        cache = prefix.prefix_cache(part, [g[0] for g in groups])
        picture = {i: row for row, group in enumerate(groups) for i in group}
        chunks = [
            chunk
            for alike in _alike(part, cache, list(picture), longest)
            for chunk in part.chunks(most, alike)
        ]
        for members in chunks:
            of = torch.tensor([picture[i] for i in members], device=part.vlm.device)
            yield Rows(part, members, cache, len(groups), of, members is chunks[-1]), members


def _pictures(part: Part, most: int) -> Iterator[list[list[int]]]:
    """The part's groups, at a time as many as fill a batch or, of groups of one prompt, a quarter
    of one."""
    taken: list[list[int]] = []
    for group in part.groups:
        if taken and len(taken) >= most // 4 and sum(map(len, taken)) + len(group) > most:
            yield taken
            taken = []
        taken.append(group)
    yield taken


def _alike(part: Part, cache: DynamicCache, members: list[int], longest: int) -> list[list[int]]:
    """Prompts that may be in one batch: all or, where a layer cannot skip the slots between a
    question and its answer, those of equal length. Such a layer carries a state from token to
    token, or has a window that the slots would fill."""
    total = max(part.lengths[i] for i in members) + longest

    def skips(layer: Any) -> bool:
        return type(layer) is DynamicLayer or (
            type(layer) is DynamicSlidingWindowLayer and total <= layer.sliding_window
        )

    if all(map(skips, cache.layers)):
        return [members]
    alike: dict[int, list[int]] = {}
    for i in members:
        alike.setdefault(part.lengths[i], []).append(i)
    return list(alike.values())
