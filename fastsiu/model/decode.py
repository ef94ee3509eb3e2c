"""Greedy answers without transformers' `generate`: what prompts share is computed once, and many
answers grow side by side.

The prefix of each picture ("<bos> ... <image tokens>", or the beginning of a chat without a
picture) goes through the model once; its keys and values are copied to the rows of a batch, the
questions go in right-padded on top of them, then token by token for all rows at once. Each token
has its own row's position ids, and a mask hides the slots between a question and its answer. Rows
whose answer has ended leave the batch. Only the last state of each row reaches the head. Keys and
values are there once for each row, and once for each prefix as long as further batches grow on it;
of a copy, one layer is there twice.

Whether a model can be run like this is found out by numbers (`why_not`), before the first answers
and on their pictures.
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
from .prefix import Part, parts_of, recomputes
from .sharing import tolerance
from .vlm import HARMLESS, SIMPLE, VLM, Encoded, Picture, followed, out_of_memory

TRIED = ("Who is this?", "What is shown here, and where was it?")  # questions of unlike length
STEPS = 2  # tokens of each that are tried
CROWDED = 3 / 4  # a batch is made smaller when no more than this share of its rows still answers


@dataclass(frozen=True)
class Rules:
    """What decides about the next token beside the model.

    ends:     ids that end an answer;  suppress: ids that are never taken
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
    set_ = {
        k: v
        for k, v in vlm.base.generation_config.to_diff_dict().items()
        if k not in SIMPLE | HARMLESS
    }
    return sorted(k for k, v in set_.items() if v is not None and v is not False and v != [])


def slow(vlm: VLM) -> str:
    """Why this model was asked in transformers' `generate`; "" where it was not, or for a question
    or two before any trial."""
    if names := unknown(vlm):
        return f"its generation_config sets {', '.join(names)}"
    return next((why for why in vlm.decodes.values() if why), "")


def remarks(vlm: VLM) -> list[str]:
    """The sentence for a report on settings of the model that no answer here follows."""
    names = ", ".join(vlm.aside)
    return [f"The model's generation_config sets {names}: answers were made without that."] * bool(
        names
    )


def ends(vlm: VLM) -> frozenset[int]:
    """The ids that end an answer."""
    found = vlm.base.generation_config.eos_token_id
    return frozenset(
        () if found is None else found if isinstance(found, list | tuple) else (found,)
    )


def why_not(vlm: VLM, pictures: Sequence[Picture | None]) -> str:
    """ "" where the states of answers that grow on a shared prefix are those of plain forwards,
    else the difference or the error.

    Tried with two questions about the first of the pictures and one about another; kept in
    `vlm.decodes`, apart for prompts with a picture and without.
    """
    pictured = pictures[0] is not None
    if pictured not in vlm.decodes:
        vlm.decodes = vlm.decodes | {pictured: _trial(vlm, pictures)}
    return vlm.decodes[pictured]


def exact(vlm: VLM, pictures: Sequence[Picture | None]) -> bool:
    """Whether prompts with these pictures and without may share a prefix while nothing trains."""
    kinds = [
        kind
        for kind in ([p for p in pictures if p is not None], [None] * (None in pictures))
        if kind
    ]
    return not recomputes(vlm) and not any(why_not(vlm, kind) for kind in kinds)


def told(untouched: str, unlearned: str) -> list[str]:
    """The sentence for a report on how two models were asked: `slow` of each."""
    if bool(untouched) == bool(unlearned):
        return [
            f"Answers were made by transformers' generate, one length at a time: {unlearned}."
        ] * bool(unlearned)
    one, other = ("untouched", "unlearned") if untouched else ("unlearned", "untouched")
    return [
        f"Answers of the {one} model alone were made by transformers' generate, so that rounding "
        "may tell them from those of "
        f"the {other} model: {untouched or unlearned}."
    ]


@torch.no_grad()
def _trial(vlm: VLM, pictures: Sequence[Picture | None]) -> str:
    first = pictures[0]
    other = next(
        (p for p in pictures if p is not first and p.image.size == first.image.size), first
    )
    asked = [(TRIED[0], first), (TRIED[1], first), (TRIED[0], other)]
    turns = [prompt(vlm, question, picture) for question, picture in asked]
    shown = [None if p is None else p.features for _, p in asked]
    try:
        parts = parts_of(vlm, turns, shown)
        if len(parts) > 1 or not parts[0].length:
            return "questions have nothing in common before them"
        (part,), ours = parts, [[] for _ in turns]
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
        found = torch.stack([state for row in ours for state in row]).float()
        whole = [followed(turn.inputs, tokens) for turn, tokens in zip(turns, said, strict=True)]
        plain = vlm.hidden(whole, part.shown(range(len(turns))))
        expected = torch.cat(
            [plain[i, part.lengths[i] - 1 :][: len(row)] for i, row in enumerate(ours)]
        ).float()
    except Exception as error:
        # any: whatever a family's own forward thinks of such inputs; it is kept as the reason
        if out_of_memory(error):
            return "the trial does not fit into memory"
        return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    apart = float((found - expected).norm() / expected.norm())
    alike = apart <= tolerance(vlm, vlm.head_weight.dtype, gradients=False)  # false for NaN
    return "" if alike else f"hidden states differ by {apart:.1e}"


def prompt(vlm: VLM, question: str, picture: Picture | None, begin: str = "") -> Encoded:
    """A prompt as a turn of which nothing but what follows its last token is wanted."""
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
    """(place, ids of the answer) of each prompt that has a prefix, in any order; the id that ends
    an answer is its last.

    turns: from `prompt`;  features: one for each, None without a picture;  longest: ids of an
    answer;  batch_size: rows
    """
    for part in parts_of(vlm, turns, list(features)):
        if not part.length:
            continue
        for rows, members in _batches(part, batch_size, longest):
            said: list[list[int]] = [[] for _ in members]
            live = list(range(len(members)))  # which of them each row is
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

    states: [n, D] those that predict the next token
    seen:   [n, T] the ids of prompt and answer, padded with ids of the row's own
    """

    def __init__(
        self, part: Part, members: list[int], cache: Any, pictures: int, of: Tensor, last: bool
    ) -> None:
        inputs = prefix.suffixes(part, [[i] for i in members], cache)
        self.vlm, self.cache = part.vlm, prefix.fork(cache, pictures, of, spend=last)
        self.mask = inputs["attention_mask"]
        hidden, _ = self.vlm.run(inputs, past_key_values=self.cache, use_cache=True)
        rows, lengths = torch.arange(len(members)), torch.tensor([part.lengths[i] for i in members])
        last = lengths - 1 - part.length
        self.states = hidden[rows, last]
        self.positions = part.positions[..., members, lengths - 1][..., None] + 1
        start = (
            part.turns[members[0]].inputs["input_ids"][:, : part.length].expand(len(members), -1)
        )
        self.seen = torch.cat(
            [
                start,
                torch.where(self.mask[:, part.length :] == 1, inputs["input_ids"], start[:, :1]),
            ],
            1,
        )
        self.beside = {}
        # an answer looks at the tiles that the end of its prompt looks at
        if "cross_attention_mask" in inputs:
            self.beside["cross_attention_mask"] = inputs["cross_attention_mask"][rows, last][
                :, None
            ]

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
        hidden, _ = self.vlm.run(inputs, past_key_values=self.cache, use_cache=True)
        self.states, self.positions = hidden[:, -1], self.positions + 1

    def keep(self, rows: list[int]) -> None:
        """Only these rows stay."""
        at = torch.tensor(rows, device=self.states.device)
        self.cache = prefix.fork(self.cache, len(self.states), at, spend=True)
        self.states, self.seen, self.mask = self.states[at], self.seen[at], self.mask[at]
        self.positions = self.positions.index_select(-2, at)
        self.beside = {k: v[at] for k, v in self.beside.items()}


def _batches(part: Part, most: int | None, longest: int) -> Iterator[tuple[Rows, list[int]]]:
    """The prompts of a part in batches of at most `most` rows, of pictures whose prefixes are held
    meanwhile."""
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
    """The part's groups, as many at a time as fill a batch or are a quarter of one."""
    taken: list[list[int]] = []
    for group in part.groups:
        if taken and len(taken) >= most // 4 and sum(map(len, taken)) + len(group) > most:
            yield taken
            taken = []
        taken.append(group)
    yield taken


def _alike(part: Part, cache: DynamicCache, members: list[int], longest: int) -> list[list[int]]:
    """Prompts that may be in one batch: all, but where a layer cannot skip the slots between a
    question and its answer, which is one that carries a state from token to token or one whose
    window they would fill, those of equal length."""
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
