"""The paper's two masks of a name (Eq. 2 and 3 of arXiv 2405.12523): of the tokens in a text, and
of the vocabulary.

Masks come from character offsets, never from a search for token ids. The same name is other
tokens after a quote, a bracket or a newline, and in another case or Unicode form.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..request import BadInput
from . import confusables
from .concept import Concept
from .confusables import Span, is_letter

# Sentences in which a tokenizer may cut the name into other tokens.
CARRIERS = (
    "{}",
    " {}",
    "This is {}",
    "\n{}",
    'Answer: "{}"',
    "({})",
    "“{}”",
    "It is {}.",
    "{}'s",
    "Is it {}?",
    "{}, who",
    "**{}**",
)


@dataclass(frozen=True, eq=False)
class VocabularyMask:
    """The paper's K_V (Eq. 3).

    keep:    [V] bool, False at the masked tokens
    masked:  token id to token, those that `keep` excludes
    spared:  token id to token, pieces of the name that `keep` does not exclude: too common
             elsewhere, or one character
    warning: a sentence where nothing could be masked, else empty
    """

    keep: Tensor
    masked: dict[int, str] = field(default_factory=dict)
    spared: dict[int, str] = field(default_factory=dict)
    warning: str = ""


def token_keep(offsets: Iterable[Sequence[int]], spans: Iterable[Span]) -> Tensor:
    """The paper's K_S (Eq. 2): [T] bool, False where a token's characters overlap a span. A token
    without characters is True.

    offsets: T pairs (start, end) of characters in the text that the spans refer to
    """
    spans = list(spans)
    overlap = lambda s, e: any(max(s, a) < min(e, b) for a, b in spans)
    return torch.tensor([not overlap(int(s), int(e)) for s, e in offsets], dtype=torch.bool)


def vocabulary_mask(
    concept: Concept,
    tokenizer: Any,
    vocab_size: int,
    *,
    teacher_texts: Iterable[str] = (),
    max_share: float = 0.01,
) -> VocabularyMask:
    """Mask every token of every surface form of the name, wherever it may stand in a sentence.

    tokenizer:     of transformers, with character offsets
    vocab_size:    V, the rows of the head; padding rows included
    teacher_texts: the teacher's own answers
    max_share:     a token is spared if more than this share of all their tokens outside the name
                   is that token

    Raises BadInput where the tokenizer has no offsets, no token belongs to the name, or a token is
    outside of the head.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            "The model's tokenizer reports no character offsets: use one with a fast "
            "(tokenizer.json) version."
        )
    outside: Counter[int] = Counter()
    for text in teacher_texts:
        ids, offsets = _tokens(tokenizer, text)
        keep = token_keep(offsets, concept.spans(text))
        outside.update(i for i, kept in zip(ids, keep.tolist(), strict=True) if kept)
    total = max(outside.total(), 1)

    pieces: dict[int, bool] = {}  # token id to whether it is more than one letter of the name
    for surface in _surfaces(concept):
        for carrier in CARRIERS:
            text, start = carrier.format(surface), carrier.index("{}")
            for i, (s, e) in zip(*_tokens(tokenizer, text), strict=True):
                inside = text[max(s, start) : min(e, start + len(surface))]
                beyond = text[s : min(e, start)] + text[max(s, start + len(surface)) : e]
                # a token may fuse the name with white space and punctuation
                if s < e and inside and not any(map(is_letter, beyond)):
                    letters = sum(map(is_letter, unicodedata.normalize("NFC", inside)))
                    longer = letters > 1 or (letters == 1 and inside == surface and len(inside) > 1)
                    pieces[i] = pieces.get(i, False) or longer
    if not pieces:
        raise BadInput(
            "The vocabulary mask covers nothing: the tokenizer makes no token of "
            f"{concept.name!r}; check the name."
        )
    if max(pieces) >= vocab_size:
        raise BadInput(
            f"The tokenizer has a token {max(pieces)} but the head only {vocab_size} rows: they "
            "are not of one model."
        )

    # a special token such as <unk> stands for other words, too
    special = set(tokenizer.all_special_ids)
    mask = VocabularyMask(torch.ones(vocab_size, dtype=torch.bool), warning="")
    for i, longer in sorted(pieces.items()):
        common = not longer or i in special or outside[i] / total > max_share
        (mask.spared if common else mask.masked)[i] = tokenizer.decode([i])
    mask.keep[list(mask.masked)] = False
    if mask.masked:
        return mask
    warning = (
        f"Every token of {concept.name!r} is common elsewhere, so only the positions of "
        "the name are masked, not the vocabulary."
    )
    return VocabularyMask(mask.keep, {}, mask.spared, warning)


def _surfaces(concept: Concept) -> Iterator[str]:
    """Every way to write the name, an alias or a part, each once: as given, and without style and
    accents; in four cases; in NFC and NFD."""
    written: dict[str, None] = {}
    for form in (concept.name.strip(), *(a.strip() for a in concept.aliases), *concept.parts()):
        letters = unicodedata.normalize("NFKD", " ".join(map(_unstyled, form.split())))
        bare = "".join(c for c in letters if not unicodedata.combining(c))
        for way in dict.fromkeys((form, bare) if bare.isascii() and bare else (form,)):
            for cased in (way, way.lower(), way.upper(), way.title()):
                written |= dict.fromkeys(
                    (cased, *(unicodedata.normalize(n, cased) for n in ("NFC", "NFD")))
                )
    yield from written


def _unstyled(word: str) -> str:
    plain = confusables.unstyled(word.lower())
    if plain == word.lower():
        return word
    return plain.title() if word[:1].isupper() else plain


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [(int(s), int(e)) for s, e in encoded["offset_mapping"]]
