"""Puts an exam to a model, and notes its answers and how likely names are to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..guards.strict_json import check
from ..model import adapter, ask, decode
from ..model.ask import Reply
from ..model.turns import Encoded, Picture, Span
from ..model.vlm import VLM
from ..request import BadInput
from . import noise
from .exam import OF_CONCEPT, OF_OTHERS, Exam
from .noise import Sentence

PICTURES = 32  # pictures whose features exist at a time
SHAPE = {
    "format": str,
    "digest": str,
    "others": [str],
    "replies": [list],
    "names": [list],
    "fluency": [([float], None)],
    "vocabulary": int,
    "slow": str,
    "sentences": [([[float]], None)],
    "floor": [(float, None)],
    "noise": str,
}
FRAME = "This is {name}."  # carries the name where the untouched model never gives it itself


class Naming(NamedTuple):
    """The tokens of a name inside an answer, teacher-forced.

    cell:     index into `Exam.cells`
    answer:   the whole answer with the name in it
    log_p:    log-probability of each token, nats
    right:    whether each token is the most likely one
    likelier: number of tokens that are likelier than each (`ask.Score.rank`)
    """

    cell: int
    answer: str
    log_p: list[float]
    right: list[bool]
    likelier: list[int]


class Likelihood(NamedTuple):
    """How likely an answer is under the untouched model.

    log_p, tokens:           sum of log-probabilities (nats) over its tokens, and their number
    name_log_p, name_tokens: the same over the tokens of the name in it
    """

    log_p: float
    tokens: int
    name_log_p: float
    name_tokens: int


@dataclass(frozen=True)
class Observations:
    """What a model answered and how likely names were to it; plain data.

    replies:    one for each of `Exam.cells`
    names:      one for each answer of `carriers`
    fluency:    one for each reply; None for a reply without tokens or one that the chat template
                does not carry; all None where the untouched model was not at hand
    vocabulary: V, number of tokens in the head
    slow:       why transformers' `generate` answered; "" where answers grew on shared prefixes
    sentences:  one for each reply: the first sentence of the untouched model's, under this model;
                None where nothing has to be kept and where it has none
    floor:      of the untouched model, one for each reply: how far it turns away from that sentence
                by noise alone (`noise.floor`), nats; None where there is none
    noise:      how that noise was made; "" where it was not
    """

    replies: tuple[Reply, ...]
    names: tuple[Naming, ...]
    fluency: tuple[Likelihood | None, ...]
    vocabulary: int
    slow: str = ""
    sentences: tuple[Sentence | None, ...] = ()
    floor: tuple[float | None, ...] = ()
    noise: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "replies": [list(reply) for reply in self.replies],
            "names": [list(name) for name in self.names],
            "fluency": [one and list(one) for one in self.fluency],
            "vocabulary": self.vocabulary,
            "slow": self.slow,
            "sentences": [one and list(one) for one in self.sentences],
            "floor": list(self.floor),
            "noise": self.noise,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Observations:
        """The inverse of `as_dict`. Raises KeyError, TypeError or ValueError for anything else."""
        check(values, SHAPE)
        found = cls(
            tuple(Reply(*one) for one in values["replies"]),
            tuple(Naming(*one) for one in values["names"]),
            tuple(None if one is None else Likelihood(*one) for one in values["fluency"]),
            values["vocabulary"],
            values.get("slow", ""),
            tuple(None if one is None else Sentence(*one) for one in values["sentences"]),
            tuple(values["floor"]),
            values["noise"],
        )
        for reply in found.replies:
            check(reply._asdict(), {"text": str, "closed": bool})
        for name in found.names:
            shape = {
                "cell": int,
                "answer": str,
                "log_p": [float],
                "right": [bool],
                "likelier": [int],
            }
            check(name._asdict(), shape)
        if (
            len(found.fluency) != len(found.replies)
            or not all(0 <= n.cell < len(found.replies) for n in found.names)
            or any(one and len(one.log_p) != len(one.behind) for one in found.sentences)
            or not {len(found.sentences), len(found.floor)} <= {0, len(found.replies)}
        ):
            raise ValueError("its replies are not as many as what is told of them")
        return found


def examine(
    loaded: VLM, exam: Exam, untouched: Observations | None = None, *, max_new_tokens: int = 64
) -> Observations:
    """Asks the model as it is, its adapter on, off or absent, every question of the exam.

    untouched: the untouched model's observations; None where this is the untouched model

    Names are scored in the untouched model's answers. The likelihood of an answer is the one under
    the untouched model, which is this model with its adapter off. A model without an adapter, such
    as a merged one, gets no likelihoods here (`with_fluency` adds them). The first sentences of the
    untouched model's answers are scored where something has to be kept (`compared`).
    """
    itself = untouched is None
    replies = [Reply("")] * len(exam.cells)
    fluency: list[Likelihood | None] = [None] * len(exam.cells)
    sentences: list[Sentence | None] = [None] * len(exam.cells)
    floor: list[float | None] = [None] * len(exam.cells)
    ways = {""}
    wanted = compared(exam)
    for chosen in _by_picture(exam, range(len(exam.cells))):
        shown = _see(loaded, exam, chosen)
        said = ask.replies(
            loaded,
            [(exam.cells[i].text, p) for i, p in zip(chosen, shown, strict=True)],
            max_new_tokens=max_new_tokens,
        )
        first = noise.beginnings(
            loaded,
            [wanted[i] for i in chosen],
            [(exam.cells[i].text, p) for i, p in zip(chosen, shown, strict=True)],
            said if untouched is None else [untouched.replies[i] for i in chosen],
        )
        own = noise.scored(loaded, first, shown)
        for i, one in zip(chosen, own, strict=True):
            sentences[i] = one
        if untouched is None:
            way, by_noise = noise.floor(loaded, first, shown, own)
            ways.add(way)
            for i, nats in zip(chosen, by_noise, strict=True):
                floor[i] = nats
        likely: Sequence[Likelihood | None] = [None] * len(chosen)
        if itself or loaded.model is not loaded.base:
            with nullcontext() if itself else adapter.teacher(loaded):
                shown = (
                    _see(loaded, exam, chosen)
                    if not itself and adapter.sees_anew(loaded)
                    else shown
                )
                likely = _likelihoods(loaded, exam, chosen, shown, said)
        for i, reply, odds in zip(chosen, said, likely, strict=True):
            replies[i], fluency[i] = reply, odds
    texts = [reply.text for reply in (replies if untouched is None else untouched.replies)]
    names = tuple(_namings(loaded, exam, texts))
    return Observations(
        tuple(replies),
        names,
        tuple(fluency),
        loaded.head_weight.shape[0],
        decode.slow(loaded),
        tuple(sentences),
        tuple(floor) if itself else (),
        max(ways),
    )


def compared(exam: Exam) -> list[bool]:
    """Whether the answer to each cell of the exam has to stay the untouched model's: about pictures
    that do not show the concept alone, and in words about facts and nobody."""
    return [
        cell.question.kind in ("fact", "general")
        if cell.seen is None
        else cell.seen.role in (*OF_OTHERS, "group")
        for cell in exam.cells
    ]


def with_fluency(loaded: VLM, exam: Exam, model: Observations) -> Observations:
    """The observations `model` with the likelihoods of its answers under `loaded`, the untouched
    model."""
    fluency: list[Likelihood | None] = [None] * len(exam.cells)
    for chosen in _by_picture(exam, range(len(exam.cells))):
        found = _likelihoods(
            loaded, exam, chosen, _see(loaded, exam, chosen), [model.replies[i] for i in chosen]
        )
        for i, one in zip(chosen, found, strict=True):
            fluency[i] = one
    return replace(model, fluency=tuple(fluency))


def carriers(exam: Exam, said: Sequence[str]) -> list[tuple[int, str, Span]]:
    """(cell, answer, span of the name in it): the answers in which the name is scored.

    said: the untouched model's answers, one for each cell

    The questions are those whose answer would be the name. About pictures of the concept, an answer
    counts in which the untouched model gave the name in its own words: there something is known
    that can be forgotten. Where it gave the name nowhere, every such question counts, with `FRAME`
    as the answer. About control pictures the answer is the untouched model's commonest naming
    answer to that question: it shows how likely the name is, in the same words, where nobody sees
    the concept.
    """
    asked = [
        i
        for i, cell in enumerate(exam.cells)
        if cell.question.kind == "name" and cell.seen is not None
    ]
    own = [i for i in asked if role(exam, i) in OF_CONCEPT]
    carrying = [(i, said[i], span) for i in own if (span := _name_in(exam, said[i]))]
    carrying = carrying or [(i, *_framed(exam)) for i in own]
    common: dict[str, Counter[tuple[str, Span]]] = {}
    for i, text, span in carrying:
        common.setdefault(exam.cells[i].question.text, Counter())[text, span] += 1
    for i in asked:
        if role(exam, i) == "control":
            best = common.get(exam.cells[i].question.text)
            text, span = best.most_common(1)[0][0] if best else _framed(exam)
            carrying.append((i, text, span))
    return carrying


def _framed(exam: Exam) -> tuple[str, Span]:
    """`FRAME` with the name, and the span of the name in it."""
    before, after = FRAME.split("{name}")
    text = before + exam.concept.name + after
    return text, _name_in(exam, text) or (len(before), len(text) - len(after))


def _name_in(exam: Exam, text: str) -> Span | None:
    """The first span of the whole name, or of a part of it where it is nowhere whole."""
    spans = exam.concept.spans(text, include_parts=False) or exam.concept.spans(text)
    return spans[0] if spans else None


def role(exam: Exam, index: int) -> str | None:
    """The part that the picture of a cell plays; None for text alone."""
    seen = exam.cells[index].seen
    return None if seen is None else seen.role


def _by_picture(exam: Exam, indices: Sequence[int]) -> Iterator[list[int]]:
    """Groups of cells: those of `PICTURES` pictures together, then those of text alone. So calls
    are few, and the features of few pictures exist at a time."""
    groups: dict[int | None, list[int]] = {}
    for i in indices:
        seen = exam.cells[i].seen
        groups.setdefault(None if seen is None else id(seen), []).append(i)
    text = groups.pop(None, [])
    pictures = list(groups.values())
    for at in range(0, len(pictures), PICTURES):
        yield [i for members in pictures[at : at + PICTURES] for i in members]
    if text:
        yield text


def _see(loaded: VLM, exam: Exam, chosen: Sequence[int]) -> list[Picture | None]:
    """The picture of each cell, loaded and seen once."""
    found: dict[int, Picture] = {}
    out: list[Picture | None] = []
    for i in chosen:
        seen = exam.cells[i].seen
        if seen is not None and id(seen) not in found:
            found[id(seen)] = loaded.picture(seen.load())
        out.append(None if seen is None else found[id(seen)])
    return out


def _likelihoods(
    loaded: VLM,
    exam: Exam,
    chosen: Sequence[int],
    shown: Sequence[Picture | None],
    said: Sequence[Reply],
) -> list[Likelihood | None]:
    turns = [
        _turn(loaded, exam.cells[i].text, reply, p)
        for i, reply, p in zip(chosen, said, shown, strict=True)
    ]
    there = [(k, turn) for k, turn in enumerate(turns) if turn is not None]
    scores = ask.label_scores(loaded, [turn for _, turn in there], [shown[k] for k, _ in there])
    out: list[Likelihood | None] = [None] * len(chosen)
    for (k, turn), score in zip(there, scores, strict=True):
        named = _inside(turn, exam.concept.spans(said[k].text)).to(score.log_p.device)
        out[k] = Likelihood(
            float(score.log_p.sum()),
            len(score.log_p),
            float(score.log_p[named].sum()),
            int(named.sum()),
        )
    return out


def _turn(loaded: VLM, question: str, reply: Reply, picture: Picture | None) -> Encoded | None:
    """The encoded turn; None for an answer without words, and for one that the chat template
    changes, as it may change gibberish."""
    if not reply.text.strip():
        return None
    try:
        return loaded.encode(question, reply.text, picture, reply.closed)
    except BadInput:
        return None


def _namings(loaded: VLM, exam: Exam, said: Sequence[str]) -> Iterator[Naming]:
    planned = {i: (text, span) for i, text, span in carriers(exam, said)}
    for chosen in _by_picture(exam, list(planned)):
        shown = _see(loaded, exam, chosen)
        turns = [
            loaded.encode(exam.cells[i].text, planned[i][0], p)
            for i, p in zip(chosen, shown, strict=True)
        ]
        for i, turn, score in zip(
            chosen, turns, ask.label_scores(loaded, turns, shown), strict=True
        ):
            named = _inside(turn, [planned[i][1]]).to(score.log_p.device)
            found = (score.log_p, score.right, score.rank)
            yield Naming(i, planned[i][0], *(part[named].tolist() for part in found))


def _inside(turn: Encoded, spans: Sequence[Span]) -> torch.Tensor:
    """[n] bool: supervised tokens with characters inside one of the spans."""
    return torch.tensor(
        [any(s < b and e > a for a, b in spans) for s, e in turn.offsets], dtype=torch.bool
    )
