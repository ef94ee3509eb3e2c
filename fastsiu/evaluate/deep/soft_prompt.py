"""A soft prompt: embeddings that no tokenizer has, put before the question and trained until the
model says the name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...model import prefix
from ...model.turns import Picture
from ...model.vlm import VLM
from ...objectives import answer_loss
from .target import Naming

PROMPT = 6  # embeddings
RATE = 0.1  # of Adam, in standard deviations of the model's embeddings
SIGNS = "@#%^&~=+$"  # stands in for words where a small tokenizer has too few


def placeholders(loaded: VLM, naming: Naming, picture: Picture) -> tuple[str, list[int]] | None:
    """(a text, `PROMPT` tokens of it); None where the tokenizer has no such text. Each token stands
    once in the text and nowhere else in the turn.

    The embeddings of these tokens are replaced, so what the text says does not matter.
    """
    plain = set(
        loaded.encode(naming.question, naming.answer, picture).inputs["input_ids"][0].tolist()
    )
    for text in (" ".join(_words(loaded, plain)), SIGNS):
        turn = loaded.encode(f"{text} {naming.question}", naming.answer, picture)
        ids = turn.inputs["input_ids"][0].tolist()
        single = [i for i in ids if i not in plain and ids.count(i) == 1]
        if len(single) >= PROMPT:
            return text, single[-PROMPT:]
    return None


def _words(loaded: VLM, taken: set[int]) -> list[str]:
    """The first words of the vocabulary that are single tokens behind a space: one more than
    `PROMPT`, since no space stands before the first of them."""

    def split(text: str) -> list[int]:
        return list(loaded.tokenizer(text, add_special_tokens=False).input_ids)

    words: list[str] = []
    for token in range(len(loaded.tokenizer)):
        word = loaded.tokenizer.decode([token]).strip()
        if (
            token in taken
            or len(word) < 2
            or not word.isalpha()
            or word in words
            or split(f"a {word}") != [*split("a"), token]
        ):
            continue
        words.append(word)
        if len(words) > PROMPT:
            break
    return words


@contextlib.contextmanager
def soft(loaded: VLM, tokens: Sequence[int]) -> Iterator[nn.Parameter]:
    """Inside, the embeddings of `tokens` are the rows of the yielded parameter, wherever the tokens
    stand: [n, D], fp32, with the model's own embeddings at first."""
    table = loaded.base.get_input_embeddings()
    ids = torch.tensor(list(tokens), device=loaded.device)
    with torch.no_grad():
        prompt = nn.Parameter(table(ids).detach().float().clone())

    def put(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        for i, token in enumerate(tokens):
            out = torch.where((given[0] == token)[..., None], prompt[i].to(out.dtype), out)
        return out

    hook = table.register_forward_hook(put)
    try:
        yield prompt
    finally:
        hook.remove()


def fit(loaded: VLM, naming: Naming, picture: Picture, prompt: nn.Parameter, steps: int) -> None:
    """Trains the prompt alone by cross-entropy towards the naming answer about the picture."""
    turn = loaded.encode(naming.question, naming.answer, picture)
    spread = float(loaded.base.get_input_embeddings().weight.float().std())
    optimiser = torch.optim.Adam([prompt], lr=RATE * spread)
    for _ in range(steps):
        states = prefix.supervised_states(loaded, [turn], [picture.features], ways=())
        loss = answer_loss(loaded, states, turn.labels)
        (prompt.grad,) = torch.autograd.grad(loss, [prompt])
        optimiser.step()
