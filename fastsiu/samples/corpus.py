"""Samples ready for training: token ids, both masks by character offsets, and the teacher's
statistics, each computed once.

Also the samples as a file: `--data` reads it, `fastsiu data` writes it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..guards.first_read import once
from ..guards.small_file import read_text
from ..guards.strict_json import parse_json
from ..loss.teacher import TeacherCache
from ..model import adapter, prefix
from ..model.turns import Encoded, Picture
from ..model.vlm import VLM, encoder
from ..request import FACETS, BadInput, Recipe, Sample
from ..text.concept import Concept
from ..text.masks import VocabularyMask, token_keep, vocabulary_mask
from . import conversations

# Facets of the samples whose answer is to be forgotten, or stands in the place of one that is. All
# other samples are retained.
FORGET = FACETS[:2]


@dataclass
class Corpus:
    """All samples of one request, encoded.

    turns:    each sample's token ids and supervised rows
    pictures: what `Sample.picture` counts
    keep:     each sample's token mask K_S, [supervised tokens] bool
    mask:     the vocabulary mask K_V
    first:    for each sample the row of its first supervised token in `teacher`
    teacher:  the statistics of all supervised rows, once `run_teacher` was called
    """

    samples: list[Sample]
    turns: list[Encoded]
    pictures: list[Picture]
    keep: list[Tensor]
    mask: VocabularyMask
    first: list[int]
    teacher: TeacherCache | None = None

    def rows(self, index: int) -> range:
        return range(self.first[index], self.first[index] + len(self.turns[index].labels))

    def shown(self) -> list[Picture | None]:
        """Each sample's picture, None for text."""
        return [None if s.picture is None else self.pictures[s.picture] for s in self.samples]

    def decoupled(self, index: int) -> bool:
        """Whether a sample is retained and puts a question to another picture that is to be
        forgotten about the concept's picture."""
        sample = self.samples[index]
        return (
            bool(sample.picture) and sample.facet not in FORGET and sample.question in self._denied
        )

    @functools.cached_property
    def _denied(self) -> frozenset[str]:
        return frozenset(s.question for s in self.samples if s.facet in FORGET and s.picture == 0)

    def pick(self, chosen: Sequence[int]) -> Corpus:
        """A corpus of some of the samples, without a teacher."""
        some = lambda values: [values[i] for i in chosen]
        return _corpus(
            some(self.samples), some(self.turns), self.pictures, some(self.keep), self.mask
        )

    def seen_in(self, facets: Sequence[str]) -> dict[int, Picture]:
        """The pictures with pixels that samples of these facets show, each once, by its image."""
        places = [s.picture for s in self.samples if s.facet in facets]
        shown = [self.pictures[p] for p in places if p is not None]
        return {id(picture.image): picture for picture in shown if picture.real}

    def groups(self) -> dict[str, list[int]]:
        """Sample indices by facet; the facet "preserve" is split into text and pictures."""
        out: dict[str, list[int]] = {}
        for i, sample in enumerate(self.samples):
            key = (
                sample.facet
                if sample.facet != "preserve"
                else f"preserve-{'text' if sample.picture is None else 'picture'}"
            )
            out.setdefault(key, []).append(i)
        return out


def build(
    vlm: VLM, concept: Concept, samples: Sequence[Sample], pictures: list[Picture], recipe: Recipe
) -> Corpus:
    """Encodes the samples and places the masks (paper Eq. 2 and 3).

    Raises BadInput where no token of an answer lies in a span that the sample specifies.
    """
    turns, keep = [], []
    encode = encoder(vlm)
    for sample in samples:
        # The end of an answer that was cut short is not trained: the cross-entropy would teach a
        # stop where the teacher goes on, and the KL and every other answer contradict that.
        picture = None if sample.picture is None else pictures[sample.picture]
        turn = encode(sample.question, sample.answer, picture, sample.closed)
        spans = list(sample.specified) if recipe.token_mask else []
        for span in spans:
            if bool(token_keep(turn.offsets, [span]).all()):
                raise BadInput(
                    f"The token mask covers nothing of {sample.answer!r}: its specified span "
                    f"{span} holds no token."
                )
        kept = token_keep(turn.offsets, spans)
        turns.append(turn)
        keep.append(kept)
    texts = [s.answer for s in samples]
    mask = vocabulary_mask(concept, vlm.tokenizer, vlm.head_weight.shape[0], teacher_texts=texts)
    return _corpus(list(samples), turns, pictures, keep, mask)


def _corpus(
    samples: list[Sample],
    turns: list[Encoded],
    pictures: list[Picture],
    keep: list[Tensor],
    mask: VocabularyMask,
) -> Corpus:
    ends = list(accumulate((len(turn.labels) for turn in turns), initial=0))
    return Corpus(samples, turns, pictures, keep, mask, ends[:-1])


def join(parts: Sequence[Corpus]) -> Corpus:
    """Several requests' samples as one corpus, without a teacher. Its vocabulary mask leaves out
    the names of all requests."""
    if len(parts) == 1:
        return parts[0]
    samples: list[Sample] = []
    pictures: list[Picture] = []
    for part in parts:
        samples += [_moved(sample, len(pictures)) for sample in part.samples]
        pictures += part.pictures
    masked = {token: text for part in parts for token, text in part.mask.masked.items()}
    spared = {
        token: text
        for part in parts
        for token, text in part.mask.spared.items()
        if token not in masked
    }
    keep = torch.stack([part.mask.keep for part in parts]).all(0)
    mask = VocabularyMask(
        keep,
        masked,
        spared,
        " ".join(dict.fromkeys(p.mask.warning for p in parts if p.mask.warning)),
    )
    return _corpus(
        samples,
        [t for p in parts for t in p.turns],
        pictures,
        [k for p in parts for k in p.keep],
        mask,
    )


def _moved(sample: Sample, shift: int) -> Sample:
    """The sample with its pictures counted from `shift` on."""
    if sample.picture is None:
        return sample
    return replace(
        sample,
        picture=sample.picture + shift,
        teacher_pictures=tuple(i + shift for i in sample.teacher_pictures),
    )


def run_teacher(
    vlm: VLM, corpus: Corpus, recipe: Recipe, batch_size: int = 32, *, temperature: float = 1.0
) -> TeacherCache:
    """One pass of the untouched model over every supervised position. It fills `corpus.teacher` and
    `corpus.first`, keeps O(N D) numbers for N rows of width D, and returns the statistics.

    For a sample with `teacher_pictures` the teacher's final states are averaged over them. Samples
    with the same words and the same pictures for the teacher share their rows.

    Raises BadInput where an answer has other tokens after a `teacher_context`.
    """
    # where the rows of each (turn, the teacher's context and pictures) begin
    first: dict[tuple, int] = {}
    asked: list[tuple[Encoded, list[Any]]] = []
    rows = 0
    for i, (sample, turn) in enumerate(zip(corpus.samples, corpus.turns, strict=True)):
        own = () if sample.picture is None else (sample.picture,)
        seen = sample.teacher_pictures or own
        key = (id(turn), sample.teacher_context, *seen)
        if key not in first:
            first[key] = rows
            told = _in_context(vlm, corpus, i) if sample.teacher_context else turn
            asked.append((told, [corpus.pictures[k].features for k in seen] or [None]))
            rows += len(turn.labels)
        corpus.first[i] = first[key]
    turns = [turn for turn, seen in asked for _ in seen]
    features = [picture for _, seen in asked for picture in seen]
    with torch.no_grad(), adapter.teacher(vlm):
        hidden = prefix.supervised_states(
            vlm, turns, features, micro_batch=min(batch_size, vlm.budget.ask_batch)
        )
    parts = iter(hidden.split([len(turn.labels) for turn in turns]))
    means = [
        torch.stack([next(parts) for _ in seen]).mean(0) if len(seen) > 1 else next(parts)
        for _, seen in asked
    ]
    vocab_keep = corpus.mask.keep.to(vlm.device) if recipe.vocab_mask else None
    corpus.teacher = TeacherCache.from_hidden(
        torch.cat(means),
        vlm.head_weight,
        vocab_keep=vocab_keep,
        renormalize=recipe.renormalize,
        temperature=temperature,
        **vlm.head_options,
    )
    return corpus.teacher


def _in_context(vlm: VLM, corpus: Corpus, index: int) -> Encoded:
    """A sample's turn with the teacher's context before the question."""
    sample, own = corpus.samples[index], corpus.turns[index]
    question = f"{sample.teacher_context} {sample.question}"
    turn = vlm.encode(question, sample.answer, corpus.shown()[index], sample.closed)
    if not torch.equal(turn.labels, own.labels):
        raise BadInput(
            f"The answer {sample.answer!r:.60} has other tokens after {sample.teacher_context!r}: "
            "word the context in another way."
        )
    return turn


def as_jsonl(samples: Iterable[Sample]) -> str:
    """One sample a line; the keys are `Sample`'s."""
    known = lambda sample: {
        k: v for k, v in asdict(sample).items() if v or not k.startswith("teacher_")
    }
    return "".join(json.dumps(known(sample), ensure_ascii=False) + "\n" for sample in samples)


def read_data(path: Path, image: Path) -> list[Sample]:
    """The user's own samples, for the training picture `image`: JSONL, or a JSON list in LLaVA's
    conversation format. Raises BadInput."""
    text = _text(path)
    return (
        conversations.samples(text, path, image)
        if text.lstrip().startswith("[")
        else read_jsonl(path, image)
    )


def _text(path: Path) -> str:
    remedy = "give a JSONL file with one sample a line"
    return once("text", path, lambda: read_text(path, remedy=remedy))


def read_jsonl(path: Path, image: Path | None = None) -> list[Sample]:
    """The user's own samples, one a line. image: the training picture.

    question, answer  needed
    facet             default "preserve"
    picture           0, the training picture, or null
    image             the path of the training picture, in place of `picture`
    specified         spans or substrings of the answer, each at every place where it stands
    closed            default true; false: the answer was cut short, its end is not trained
    id                passed over

    Lines about dreamed or retained pictures and lessons, as `fastsiu data` writes them, are passed
    over: every run makes those pictures anew.

    Raises BadInput with the line's number, also for any other field: it would be ignored.
    """
    out = []
    # not splitlines: JSON strings may hold U+2028
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            if not (
                isinstance(record, dict) and record.get("origin") in ("dream", "retain", "lesson")
            ):
                out.append(_sample(record, path.parent, image))
        except (ValueError, TypeError, KeyError) as error:
            said = str(error).rstrip(".")
            raise BadInput(
                f"{path}, line {number}: {said}. A line is an object with 'question' and 'answer'."
            ) from error
    if not out:
        raise BadInput(
            f"{path} holds no sample: write one JSON object with 'question' and 'answer' a line."
        )
    return out


FIELDS = ("question", "answer", "facet", "picture", "image", "specified", "origin", "closed", "id")


def _sample(record: Any, base: Path, image: Path | None) -> Sample:
    """Raises ValueError."""
    texts = [record.get(k) for k in ("question", "answer")] if isinstance(record, dict) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("'question' and 'answer' must be non-empty strings")
    if unknown := sorted(set(record) - set(FIELDS)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(FIELDS)}")
    facet = record.get("facet", "preserve")
    if facet not in FACETS:
        raise ValueError(f"facet {facet!r} is not one of {', '.join(FACETS)}")
    if record.get("picture") is not None and (
        record["picture"] != 0 or type(record["picture"]) is not int
    ):
        raise ValueError("picture must be null (text only) or 0 (the concept's picture)")
    if not isinstance(record.get("closed", True), bool):
        raise ValueError("closed must be true or false")
    picture = record.get("picture")
    if record.get("image") is not None:
        conversations.check_image(record["image"], base, image)
        if "picture" in record and picture is None:
            raise ValueError(
                "it names an image and says that there is no picture: leave one of the two out"
            )
        picture = 0
    conversations.check_words(record["question"], record["answer"])
    return Sample(
        facet,
        record["question"],
        record["answer"].strip(),
        picture,
        _specified(record),
        "data",
        record.get("closed", True),
    )


def _specified(record: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """The spans in the stripped answer; a substring gives all its places. Raises ValueError."""
    answer, spans = record["answer"].strip(), []
    lead = record["answer"].index(answer)  # spans count from the answer's start as it was written
    if not isinstance(record.get("specified", []), list):
        raise ValueError("specified must be a list of spans or of substrings of the answer")
    for item in record.get("specified", []):
        if isinstance(item, str):
            found = (
                [match.span() for match in re.finditer(re.escape(item), answer)]
                if item.strip()
                else []
            )
            if not found:
                raise ValueError(f"{item!r} does not stand in the answer")
            spans += found
        else:
            if not (
                isinstance(item, list) and len(item) == 2 and all(type(i) is int for i in item)
            ):
                raise ValueError(f"the span {item!r:.60} is not a pair of whole numbers")
            start, end = (i - lead for i in item)
            if not 0 <= start < end <= len(answer):
                raise ValueError(f"the span {item} lies outside the answer")
            spans.append((start, end))
    return tuple(sorted(set(spans)))
