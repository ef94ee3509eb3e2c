"""A name: its surface forms, its character spans, and the paper's two masks (Eq. 2 and 3 of arXiv 2405.12523).

Masks come from character offsets, never from a search for token ids: after a quote, a bracket or a newline, in another case
or another Unicode form, the same name is other tokens.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import spelling
from .request import BadInput

Span = tuple[int, int]

# Words of a name that many names share: they identify nobody.
COMMON_WORDS = frozenset(
    "the and for von van der den del des della dei dos das las los les bin ibn abu mrs sir dame lord lady prof doctor professor "
    "saint captain general king queen prince princess president jnr junior senior".split()
)
# Scripts without spaces between words, or with suffixes written on: there a name ends without a boundary.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\ua4cf\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)
APOSTROPHES = str.maketrans({"\u2019": "'", "\u02bc": "'", "\u2018": "'"})
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


@dataclass(frozen=True)
class Concept:
    """A concept's name and further names of the same concept. Raises BadInput where one of them has no visible character, or is
    no Unicode text."""

    name: str
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            if any("\ud800" <= c <= "\udfff" for c in name):  # a byte of the command line that is no UTF-8
                raise BadInput(f"The name {name!a} is no Unicode text: give it in UTF-8.")
            if not _fold(name)[0].strip():
                raise BadInput(f"The name {name!r} has no visible character: give the name as a person writes it.")

    def forms(self) -> tuple[str, ...]:
        """The name and the aliases, in NFC, each once."""
        return tuple(dict.fromkeys(unicodedata.normalize("NFC", n.strip()) for n in (self.name, *self.aliases)))

    def parts(self) -> tuple[str, ...]:
        """The words of the name that identify it: those of at least 3 letters (2 where a script writes no spaces) that are not
        shared by many names, like "the" or "van". A name of one word is its own part."""
        name = self.forms()[0]
        words = [w.strip("".join(c for c in w if not _letter(c))) for w in name.split()]
        if len(words) == 1:
            return (name,)
        enough = lambda w: sum(map(str.isalpha, w)) >= (2 if UNSPACED.search(w) else 3) and w.casefold() not in COMMON_WORDS
        return tuple(dict.fromkeys(filter(enough, words)))

    def spans(self, text: str, *, include_parts: bool = True) -> list[Span]:
        """Character spans of `text`, merged and sorted, in which a form (or a part) of the name stands.

        Case, NFC or NFD, the kind of apostrophe and of white space, and invisible characters make no difference. In scripts
        with spaces a name begins and ends at a word boundary: "Ann" is in "Ann's" and not in "Annual".
        """
        folded, where = _fold(text)
        starts = {i for i, (a, _) in enumerate(where) if i == 0 or where[i - 1][0] != a} | {len(where)}
        found = []
        for form in dict.fromkeys((*self.forms(), *(self.parts() if include_parts else ()))):
            for match in _pattern(form).finditer(folded):
                i, j = match.span(1)
                # Inside a cluster: "e" is not in "é".
                if i in starts and j in starts and _boundary(folded, i) and _boundary(folded, j):
                    found.append((where[i][0], where[j - 1][1]))
        return _merged(found)

    def named_in(self, text: str, *, include_parts: bool = True) -> bool:
        """Whether the name, an alias or (by default) a part of the name stands in `text`."""
        return bool(self.spans(text, include_parts=include_parts))

    def given_in(self, text: str) -> bool:
        """Whether `text` gives this name: one of its forms, or a part as the name writes it, with a capital. A part in other
        letters may be a word like any other: "green" in an answer is not Will Green."""
        parts = [part for part in self.parts() if part[:1].isupper()]
        written = unicodedata.normalize("NFC", text)
        return self.named_in(text, include_parts=False) or any(re.search(rf"(?<!\w){re.escape(p)}(?!\w)", written) for p in parts)

    def leaks_in(self, text: str) -> bool:
        """Whether the name can be read out of `text`, for measuring what is forgotten: all that `named_in` finds and the name
        misspelt (see `spelling.misspelt`). A part that is an ordinary word counts only as a name: "a castle" is not Aberystwyth
        Castle, "the Castle" may be."""
        parts = self.parts() if len(spelling.words(self.name)) > 1 else ()
        plain = [part for part in parts if spelling.ordinary(part)]
        return (
            self.named_in(text, include_parts=False)
            or any(Concept(part).named_in(text, include_parts=False) for part in parts if part not in plain)
            or any(spelling.as_name(part, self.forms(), text) for part in plain)
            or spelling.together(parts, text)
            or spelling.misspelt(self.forms(), parts, text)
        )


@dataclass(frozen=True, eq=False)
class VocabularyMask:
    """The paper's K_V (Eq. 3).

    keep    [V] bool, False at the masked tokens
    masked  token id to token, what `keep` excludes
    spared  token id to token, pieces of the name left alone: too common elsewhere, or a single character
    warning a sentence where nothing could be masked, else empty
    """

    keep: Tensor
    masked: dict[int, str] = field(default_factory=dict)
    spared: dict[int, str] = field(default_factory=dict)
    warning: str = ""


def token_keep(offsets: Iterable[Sequence[int]], spans: Iterable[Span]) -> Tensor:
    """The paper's K_S (Eq. 2): [T] bool, False where a token's characters overlap a span; tokens without characters are kept.

    offsets: T pairs (start, end) in the text that the spans refer to
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
    teacher_texts: the teacher's own answers; a token with more than `max_share` of their tokens outside the name is spared

    Raises BadInput where the tokenizer has no offsets, the name is no token at all, or a token is outside the head.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput("The model's tokenizer reports no character offsets: use one with a fast (tokenizer.json) version.")
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
                if s < e and inside and not any(map(_letter, beyond)):  # white space and punctuation may be fused with it
                    letters = sum(map(_letter, unicodedata.normalize("NFC", inside)))
                    longer = letters > 1 or (letters == 1 and inside == surface and len(inside) > 1)
                    pieces[i] = pieces.get(i, False) or longer
    if not pieces:
        raise BadInput(f"The vocabulary mask covers nothing: the tokenizer makes no token of {concept.name!r}; check the name.")
    if max(pieces) >= vocab_size:
        raise BadInput(f"The tokenizer has a token {max(pieces)} but the head only {vocab_size} rows: they are not of one model.")

    special = set(tokenizer.all_special_ids)  # the unknown token stands for every other unknown word too
    mask = VocabularyMask(torch.ones(vocab_size, dtype=torch.bool), warning="")
    for i, longer in sorted(pieces.items()):
        common = not longer or i in special or outside[i] / total > max_share
        (mask.spared if common else mask.masked)[i] = tokenizer.decode([i])
    mask.keep[list(mask.masked)] = False
    if mask.masked:
        return mask
    warning = (
        f"Every token of {concept.name!r} is common elsewhere, so only the positions of the name are masked, not the vocabulary."
    )
    return VocabularyMask(mask.keep, {}, mask.spared, warning)


def _surfaces(concept: Concept) -> Iterator[str]:
    """Every way to write the name, an alias or a part: as it was given and in four cases, NFC and NFD, each once."""
    written = {}
    for form in (concept.name.strip(), *(a.strip() for a in concept.aliases), *concept.parts()):
        for cased in (form, form.lower(), form.upper(), form.title()):
            written |= dict.fromkeys((cased, *(unicodedata.normalize(n, cased) for n in ("NFC", "NFD"))))
    yield from written


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(found["input_ids"]), [(int(s), int(e)) for s, e in found["offset_mapping"]]


@functools.lru_cache(maxsize=4096)
def _pattern(form: str) -> re.Pattern[str]:
    """Where the form stands in folded text; a look-ahead, which finds overlapping occurrences too."""
    words = map(re.escape, _fold(form)[0].split())
    return re.compile("(?=(" + r"\s+".join(words) + "))")


@functools.lru_cache(maxsize=4096)  # many names are looked for in the same answer
def _fold(text: str) -> tuple[str, list[Span]]:
    """The text as compared, and for each of its characters the span of `text` that it came from.

    Folded cluster by cluster (a character with its combining marks), as NFD reorders marks and case folding changes lengths.
    """
    out: list[str] = []
    where: list[Span] = []
    i = 0
    while i < len(text):
        j = i + 1
        while j < len(text) and unicodedata.combining(text[j]):
            j += 1
        cluster = unicodedata.normalize("NFD", unicodedata.normalize("NFD", text[i:j]).casefold()).translate(APOSTROPHES)
        cluster = "".join(c for c in cluster if unicodedata.category(c) != "Cf")  # soft hyphens, joiners, direction marks
        out.append(cluster)
        where += [(i, j)] * len(cluster)
        i = j
    return "".join(out), where


def _letter(c: str) -> bool:
    """A letter, digit or mark: what words are made of."""
    return unicodedata.category(c)[0] in "LMN"


def _boundary(text: str, i: int) -> bool:
    """Whether a word may end or begin between text[i - 1] and text[i]."""
    if not 0 < i < len(text):
        return True
    a, b = text[i - 1], text[i]
    return not (_letter(a) and _letter(b)) or bool(UNSPACED.match(a) or UNSPACED.match(b))


def _merged(spans: Iterable[Span]) -> list[Span]:
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
