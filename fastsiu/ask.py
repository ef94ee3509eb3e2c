"""The only place that asks a model anything: greedy answers, batched, and the probability of given words."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import decode
from .prefix import supervised_states
from .vlm import VLM, Encoded, Picture, collate

Question = tuple[str, Picture | None]
FEW = 3  # prompts from which on it is worth trying what is exact on a model
ROWS = 256  # supervised positions whose logits exist at a time


class Reply(NamedTuple):
    """An answer. closed: the model ended it itself; False where it was cut at the longest answer allowed."""

    text: str
    closed: bool = True


class Score(NamedTuple):
    """How likely the supervised tokens of a turn are.

    log_p: [n] log-probabilities, nats;  right: [n] bool, it is the most likely token;  rank: [n] int64, tokens that are likelier
    """

    log_p: Tensor
    right: Tensor
    rank: Tensor


def answers(vlm: VLM, questions: Sequence[Question], **options: Any) -> list[str]:
    """The texts of `replies`, which has the options."""
    return [reply.text for reply in replies(vlm, questions, **options)]


@torch.no_grad()
def replies(vlm: VLM, questions: Sequence[Question], *, begin: Sequence[str] | None = None, suppress: Sequence[int] = (),
            max_new_tokens: int = 64, batch_size: int = 64) -> list[Reply]:  # fmt: skip
    """Greedy answers, in the order of the questions.

    begin:    the first words of each answer, forced (they are part of what is returned)
    suppress: token ids that may not be generated

    Answers grow on shared prefixes (`decode`) where that is exact and the model's generation_config asks for nothing that is not
    known there, else in transformers' `generate`.
    """
    begins = list(begin) if begin is not None else [""] * len(questions)
    turns = _prompts(vlm, questions, begins)
    size, rules = min(batch_size, vlm.budget.ask_batch), decode.rules(vlm, suppress)
    said: dict[int, list[int]] = {}
    for pictured in (True, False):
        members = [i for i, (_, picture) in enumerate(questions) if (picture is not None) is pictured]
        pictures = [questions[i][1] for i in members]
        if rules is None or not members or (len(questions) < FEW and pictured not in vlm.decodes):
            continue
        if decode.exact(vlm, pictures):
            shown = [None if p is None else p.features for p in pictures]
            found = decode.greedy(vlm, [turns[i] for i in members], shown, rules, max_new_tokens, size)
            said |= {members[place]: tokens for place, tokens in found}
    rest = [i for i in range(len(questions)) if i not in said]
    found = generated(vlm, [turns[i] for i in rest], [questions[i][1] for i in rest], suppress, max_new_tokens, size)
    said |= dict(zip(rest, found, strict=True))
    ends = decode.ends(vlm)
    texts = vlm.tokenizer.batch_decode([said[i] for i in range(len(questions))], skip_special_tokens=True)
    whole = [f"{b} {text.strip()}" if text[:1].isspace() else f"{b}{text}" for b, text in zip(begins, texts, strict=True)]
    return [Reply(text.strip(), not ends.isdisjoint(said[i])) for i, text in enumerate(whole)]


def _prompts(vlm: VLM, questions: Sequence[Question], begins: Sequence[str]) -> list[Encoded]:
    """The prompts; the same words about pictures of the same size are one object."""

    @functools.cache
    def made(question: str, begin: str, size: tuple[int, int] | None, first: int) -> Encoded:
        return decode.prompt(vlm, question, questions[first][1], begin)

    sizes = [None if picture is None else picture.image.size for _, picture in questions]
    first = {size: i for i, size in reversed(list(enumerate(sizes)))}
    return [made(q, b, size, first[size]) for (q, _), b, size in zip(questions, begins, sizes, strict=True)]


def generated(vlm: VLM, turns: Sequence[Encoded], pictures: Sequence[Picture | None], suppress: Sequence[int],
              max_new_tokens: int, batch_size: int) -> list[list[int]]:  # fmt: skip
    """The ids of each answer, the one that ends it and padding included, by transformers' `generate`.

    Prompts of equal length are batched together, so no answer depends on padding or on its neighbours in the batch.
    """
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for i, (turn, picture) in enumerate(zip(turns, pictures, strict=True)):
        groups[turn.inputs["input_ids"].shape[1], picture is not None].append(i)
    out: list[list[int]] = [[]] * len(turns)
    options = {"suppress_tokens": sorted(suppress)} if suppress else {}
    for (length, _), members in groups.items():
        for at in range(0, len(members), batch_size):
            chosen = members[at : at + batch_size]
            inputs = collate([turns[i].inputs for i in chosen], vlm.tokenizer.pad_token_id)
            inputs = vlm.prompts(inputs, [p.features for i in chosen if (p := pictures[i]) is not None])
            tokens = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                                        pad_token_id=vlm.tokenizer.pad_token_id, **options)  # fmt: skip
            for i, row in zip(chosen, tokens[:, length:].tolist(), strict=True):
                out[i] = row
    return out


@torch.no_grad()
def label_scores(vlm: VLM, turns: Sequence[Encoded], pictures: Sequence[Picture | None], batch_size: int = 32) -> list[Score]:
    """Each turn's supervised tokens under the model as it is now, adapter on or off."""
    if not turns:
        return []
    features = [None if p is None else p.features for p in pictures]
    ways = vlm.shares
    if not ways and len(turns) >= FEW and decode.exact(vlm, pictures):  # nothing was planned, and nothing trains here
        ways = ("key/value",)
    states = supervised_states(vlm, turns, features, micro_batch=min(batch_size, vlm.budget.ask_batch), ways=ways)
    labels = torch.cat([turn.labels for turn in turns])
    found: list[list[Tensor]] = [[], [], []]
    for at in range(0, len(labels), ROWS):
        logits, wanted = vlm.logits(states[at : at + ROWS]), labels[at : at + ROWS, None]
        own = logits.gather(-1, wanted)
        found[0].append(logits.log_softmax(-1).gather(-1, wanted)[:, 0])
        found[1].append(logits.argmax(-1) == wanted[:, 0])
        found[2].append((logits > own).sum(-1))
    lengths = [len(turn.labels) for turn in turns]
    return [Score(*one) for one in zip(*(torch.cat(part).split(lengths) for part in found), strict=True)]
