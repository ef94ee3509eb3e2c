"""The only place that asks a model anything: greedy answers, batched, and the probability of given
words."""

from __future__ import annotations

import functools
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..request import BadInput, OutOfMemory
from ..text.answers import first_sentence
from . import decode
from .faults import out_of_memory
from .prefix import supervised_states
from .served import Served
from .turns import Encoded, Picture, collate
from .vlm import VLM

Question = tuple[str, Picture | None]
Model = VLM | Served  # what can be asked: loaded here, or served elsewhere
FEW = 3  # prompts from which on it is worth trying what is exact on a model
MADE_UP = 40  # tokens of a question that the model makes up, and of its answer
ROWS = 256  # supervised positions whose logits exist at a time


class Reply(NamedTuple):
    """An answer.

    closed: the model ended it itself; False where it was cut at the longest answer allowed
    """

    text: str
    closed: bool = True

    @property
    def opening(self) -> Reply:
        """What of it can be trained: an answer that was cut counts up to the end of its first
        sentence, and that it goes on there is left open. Where even that was cut, all its words."""
        if self.closed:
            return self
        return Reply(first_sentence(self.text), closed=False)


class Score(NamedTuple):
    """How likely the supervised tokens of a turn are.

    log_p:  [n] fp32, log-probabilities in nats
    right:  [n] bool, whether it is the most likely token
    rank:   [n] int64, the number of tokens that are likelier
    behind: [n] fp32, nats by which the most likely token is ahead of it
    """

    log_p: Tensor
    right: Tensor
    rank: Tensor
    behind: Tensor


def answers(vlm: Model, questions: Sequence[Question], **options: Any) -> list[str]:
    """The texts of `replies`, with its options."""
    return [reply.text for reply in replies(vlm, questions, **options)]


@torch.no_grad()
def replies(
    vlm: Model,
    questions: Sequence[Question],
    *,
    begin: Sequence[str] | None = None,
    suppress: Sequence[int] = (),
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[Reply]:
    """Greedy answers, in the order of the questions.

    begin:          the first words of each answer, forced; the reply contains them
    suppress:       token ids that may not be generated
    max_new_tokens: of an answer, beyond `begin`
    batch_size:     questions in one forward

    Answers grow on shared prefixes (`decode`) where that is exact and the model's generation_config
    sets nothing else than `decode.Rules` knows; otherwise transformers' `generate` answers. Where a
    batch does not fit into memory, smaller ones go on (`fitting`). A served model is asked through
    its server, one question at a time.

    Raises BadInput for a question that cannot be encoded, for a generation_config that transformers
    refuses and for a server without answers. Raises OutOfMemory where one question does not fit,
    and ValueError where a served model is to begin with given words or to leave tokens out.
    """
    if not questions:
        return []
    if isinstance(vlm, Served):
        if suppress or any(begin or ()):
            raise ValueError("a served model takes neither the first words of an answer nor tokens")
        return [Reply(*said) for said in vlm.replies(questions, max_new_tokens=max_new_tokens)]
    begins = list(begin) if begin is not None else [""] * len(questions)
    turns = _prompts(vlm, questions, begins)
    rules = decode.rules(vlm, suppress)
    said: dict[int, list[int]] = {}

    def take(
        members: Sequence[int], grow: Callable[..., Iterator[tuple[int, list[int]]]], *options: Any
    ) -> None:
        def answer(size: int) -> None:
            left = [i for i in members if i not in said]
            shown = [
                None if (picture := questions[i][1]) is None else picture.features for i in left
            ]
            for place, tokens in grow(
                vlm, [turns[i] for i in left], shown, *options, max_new_tokens, size
            ):
                said[left[place]] = tokens

        fitting(vlm, answer, min(batch_size, max(1, len(members))))

    for pictured in (True, False):
        members = [
            i for i, (_, picture) in enumerate(questions) if (picture is not None) is pictured
        ]
        pictures = [questions[i][1] for i in members]
        if rules is None or not members or (len(questions) < FEW and pictured not in vlm.decodes):
            continue
        if decode.exact(vlm, pictures):
            take(members, decode.greedy, rules)
    take(range(len(questions)), generated, suppress)
    ends = decode.ends(vlm)
    texts = vlm.tokenizer.batch_decode(
        [said[i] for i in range(len(questions))], skip_special_tokens=True
    )
    whole = [
        f"{b} {text.strip()}" if text[:1].isspace() else f"{b}{text}"
        for b, text in zip(begins, texts, strict=True)
    ]
    return [Reply(text.strip(), not ends.isdisjoint(said[i])) for i, text in enumerate(whole)]


@torch.no_grad()
def made_up(vlm: VLM, count: int, seed: int) -> list[Encoded]:
    """Turns of nothing in particular, without a picture, that the model makes up itself: what a
    person might ask, drawn at temperature 1 from where its chat template has the question, and the
    beginning of its own greedy answer. Two calls give the same turns.

    Fewer than `count` where a question has no word; none where the template begins with the
    question.
    """
    begun = vlm.before_question()
    if not begun["input_ids"].numel():
        return []

    def draw(rows: int) -> list[list[int]]:
        drawn = []
        for at in range(0, count, rows):
            many = min(rows, count - at)
            inputs = {k: v.expand(many, *v.shape[1:]) for k, v in begun.items()}
            drawing = dict(do_sample=True, temperature=1.0, top_k=0, top_p=0.95)
            ids = _generate(vlm, inputs, MADE_UP, **drawing)
            drawn += ids[:, begun["input_ids"].shape[1] :].tolist()
        return drawn

    with torch.random.fork_rng([d for d in vlm.devices if d.type == "cuda"]):
        torch.manual_seed(seed)
        drawn = fitting(vlm, draw, count)
    questions = [vlm.words_of(ids) for ids in drawn]
    asked: list[Question] = [(q, None) for q in questions if any(c.isalpha() for c in q)]
    said = [
        (question, reply)
        for (question, _), reply in zip(
            asked, replies(vlm, asked, max_new_tokens=MADE_UP), strict=True
        )
        if reply.text
    ]
    return [vlm.encode(question, reply.text, None, reply.closed) for question, reply in said]


def fitting(vlm: VLM, run: Callable[[int], Any], most: int) -> Any:
    """run(rows in one forward), with as many rows as `most` and `vlm.budget` allow; with half of
    them where they do not fit into memory, and so on. The budget remembers the number. No sentence
    says so, since results change by rounding only.

    Raises OutOfMemory where one row does not fit either.
    """
    while True:
        size = min(most, vlm.budget.ask_batch)
        try:
            return run(size)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Not in the handler: the traceback holds the tensors of the forward that did not fit.
        if size == 1:
            raise OutOfMemory(
                "Not even one question at a time fits into memory: use --quantize nf4, or ask "
                "for shorter answers."
            )
        vlm.budget = replace(vlm.budget, ask_batch=size // 2)
        gc.collect()
        if vlm.device.type == "cuda":
            torch.cuda.empty_cache()


def _prompts(vlm: VLM, questions: Sequence[Question], begins: Sequence[str]) -> list[Encoded]:
    """The prompts; the same words about pictures of the same size are one object."""

    @functools.cache
    def encode(question: str, begin: str, size: tuple[int, int] | None, first: int) -> Encoded:
        return decode.prompt(vlm, question, questions[first][1], begin)

    sizes = [None if picture is None else picture.image.size for _, picture in questions]
    first = {size: i for i, size in reversed(list(enumerate(sizes)))}
    return [
        encode(q, b, size, first[size])
        for (q, _), b, size in zip(questions, begins, sizes, strict=True)
    ]


def generated(
    vlm: VLM,
    turns: Sequence[Encoded],
    features: Sequence[Any],
    suppress: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[int, list[int]]]:
    """(place in `turns`, ids of the answer with its end and padding) of each prompt, by
    transformers' `generate`.

    A batch has prompts of equal length, so no answer depends on padding or on its neighbours.
    """
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for i, (turn, shown) in enumerate(zip(turns, features, strict=True)):
        groups[turn.inputs["input_ids"].shape[1], shown is not None].append(i)
    options = {"suppress_tokens": sorted(suppress)} if suppress else {}
    for (length, _), members in groups.items():
        for at in range(0, len(members), batch_size):
            chosen = members[at : at + batch_size]
            inputs = collate([turns[i].inputs for i in chosen], vlm.tokenizer.pad_token_id)
            inputs = vlm.prompts(inputs, [features[i] for i in chosen if features[i] is not None])
            ids = _generate(vlm, inputs, max_new_tokens, do_sample=False, **options)
            yield from zip(chosen, ids[:, length:].tolist(), strict=True)


def _generate(vlm: VLM, inputs: dict[str, Any], max_new_tokens: int, **options: Any) -> Tensor:
    """transformers' `generate` without a search. Raises BadInput where it refuses the model's
    generation_config."""
    pad = vlm.tokenizer.pad_token_id
    try:
        ids: Tensor = vlm.model.generate(
            **inputs, max_new_tokens=max_new_tokens, num_beams=1, pad_token_id=pad, **options
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadInput(
            "The model's generation_config.json asks for what transformers' generate refuses "
            f"({error}): mend it or remove it."
        ) from error
    return ids


@torch.no_grad()
def label_scores(
    vlm: VLM,
    turns: Sequence[Encoded],
    pictures: Sequence[Picture | None],
    batch_size: int = 32,
    ways: tuple[str, ...] | None = None,
) -> list[Score]:
    """Each turn's supervised tokens under the model as it is now, adapter on or off.

    ways: of sharing prefixes; left out, those that are exact on the model
    """
    if not turns:
        return []
    features = [None if p is None else p.features for p in pictures]
    if ways is None:
        ways = vlm.shares
        # Nobody has planned the sharing, and nothing trains here.
        if not ways and len(turns) >= FEW and decode.exact(vlm, pictures):
            ways = ("key/value",)
    run = lambda size: supervised_states(vlm, turns, features, micro_batch=size, ways=ways)
    states = fitting(vlm, run, min(batch_size, len(turns)))
    labels = torch.cat([turn.labels for turn in turns])
    log_p: list[Tensor] = []
    right: list[Tensor] = []
    rank: list[Tensor] = []
    behind: list[Tensor] = []
    for at in range(0, len(labels), ROWS):
        logits, wanted = vlm.logits(states[at : at + ROWS]), labels[at : at + ROWS, None]
        own = logits.gather(-1, wanted)
        log_p.append(logits.log_softmax(-1).gather(-1, wanted)[:, 0])
        right.append(logits.argmax(-1) == wanted[:, 0])
        rank.append((logits > own).sum(-1))
        behind.append(logits.amax(-1) - own[:, 0])
    lengths = [len(turn.labels) for turn in turns]
    by_turn = (torch.cat(values).split(lengths) for values in (log_p, right, rank, behind))
    return [Score(*values) for values in zip(*by_turn, strict=True)]
