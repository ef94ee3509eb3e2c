"""The only place that asks a model anything: greedy answers, batched, and the probability of given words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .prefix import supervised_states
from .vlm import VLM, Encoded, Picture, collate

Question = tuple[str, Picture | None]
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

    Prompts of equal length are batched together, so no answer depends on padding or on its neighbours in the batch.
    """
    begins = list(begin) if begin is not None else [""] * len(questions)
    prompts = [vlm.encode_prompt(q, p, b) for (q, p), b in zip(questions, begins, strict=True)]
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for i, (prompt, (_, picture)) in enumerate(zip(prompts, questions, strict=True)):
        groups[prompt["input_ids"].shape[1], picture is not None].append(i)
    out = [Reply("")] * len(questions)
    batch_size = min(batch_size, vlm.budget.ask_batch)
    ends = torch.tensor(vlm.base.generation_config.eos_token_id or [], dtype=torch.int64, device=vlm.device)
    options = {"suppress_tokens": sorted(suppress)} if suppress else {}
    for (length, _), members in groups.items():
        for at in range(0, len(members), batch_size):
            chosen = members[at : at + batch_size]
            inputs = collate([prompts[i] for i in chosen], vlm.tokenizer.pad_token_id)
            features = [p.features for i in chosen if (p := questions[i][1]) is not None]
            inputs = vlm.prompts(inputs, features)
            tokens = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                                        pad_token_id=vlm.tokenizer.pad_token_id, **options)  # fmt: skip
            texts = vlm.tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
            closed = torch.isin(tokens[:, length:], ends).any(1).tolist()
            for i, text, ended in zip(chosen, texts, closed, strict=True):
                whole = f"{begins[i]} {text.strip()}" if text[:1].isspace() else f"{begins[i]}{text}"
                out[i] = Reply(whole.strip(), ended)
    return out


@torch.no_grad()
def label_scores(vlm: VLM, turns: Sequence[Encoded], pictures: Sequence[Picture | None], batch_size: int = 32) -> list[Score]:
    """Each turn's supervised tokens under the model as it is now, adapter on or off."""
    if not turns:
        return []
    features = [None if p is None else p.features for p in pictures]
    states = supervised_states(vlm, turns, features, micro_batch=min(batch_size, vlm.budget.ask_batch))
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
