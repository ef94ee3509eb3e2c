"""A name: its surface forms, its character spans, and the paper's two masks (Eq. 2 and 3 of arXiv
2405.12523).

Masks come from character offsets, never from a search for token ids: after a quote, a bracket or a
newline, in another case or another Unicode form, the same name is other tokens.
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

from ..request import BadInput, Request
from . import confusables, spelling
from .confusables import Reading, Span, plain, script

COMMON_WORDS = spelling.SHARED  # words of a name that many names share: they identify nobody
UNSPACED = spelling.UNSPACED
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
_UMLAUTS = {"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa"}
_HONOUR = re.compile(
    r"(?<=\w)(?:-(?:san|sama|kun|chan|sensei|ssi|nim)|さん|様|さま|くん|ちゃん|先生|씨|님|선생님)$"
)


@dataclass(frozen=True)
class Concept:
    """A concept's name and further names of the same concept.

    as_word: for a name of one word that is a word like any other, too. True: it counts wherever it
             stands, as of things ("a castle");
             False: only where it is used as a name ("This is Rose.", not "a red rose"); None: as
             a name where people, bands or firms are called so and it is given with a capital, else
             wherever it stands

    Raises BadInput where a name has no visible character or nothing but punctuation, or is no
    Unicode text.
    """

    name: str
    aliases: tuple[str, ...] = ()
    as_word: bool | None = None

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            # a byte of the command line that is no UTF-8
            if any("\ud800" <= c <= "\udfff" for c in name):
                raise BadInput(f"The name {name!a} is no Unicode text: give it in UTF-8.")
            seen = plain(name).text.strip()
            if not seen:
                raise BadInput(
                    f"The name {name!r} has no visible character: give the name as a person "
                    "writes it."
                )
            if all(unicodedata.category(c)[0] in "PMZ" for c in seen):
                raise BadInput(
                    f"The name {name!r} is punctuation, which stands in every text: give a name "
                    "with a letter."
                )

    def forms(self) -> tuple[str, ...]:
        """The name and the aliases, in NFC, each once."""
        return tuple(
            dict.fromkeys(
                unicodedata.normalize("NFC", n.strip()) for n in (self.name, *self.aliases)
            )
        )

    def parts(self) -> tuple[str, ...]:
        """The words of the name that identify it: those of at least 3 letters (2 where a script
        writes no spaces) that are not shared by many names, like "the", "van" or a title; of a
        Korean, Japanese or Chinese name without a blank also the given name, and the family name of
        two characters. A name of one word is its own part."""
        name = self.forms()[0]
        words = [_bare(w) for w in spelling.BREAKS.split(name)]
        enough = lambda w: (
            sum(map(str.isalpha, w)) >= (2 if UNSPACED.search(w) else 3)
            and plain(w).text not in COMMON_WORDS
        )
        if len(words) == 1:
            whole = (name,) if words[0] in ("", name) or not enough(words[0]) else (name, words[0])
            halves = [half for *both, known in spelling.divided(words[0]) if known for half in both]
            return tuple(dict.fromkeys((*whole, *(half for half in halves if len(half) > 1))))
        return tuple(dict.fromkeys(filter(enough, words)))

    def spans(self, text: str, *, include_parts: bool = True) -> list[Span]:
        """Character spans of `text`, merged and sorted, in which a form (or a part) of the name
        stands.

        However it is written: case, accents, the kind of apostrophe and of white space, invisible
        characters, letters that look alike ("Zorbl\u0430x"), digits and signs for letters
        ("Z0rblax", "Ke$ha" and "Kesha"), letters by themselves ("Z.o.r"), letters held
        ("Zorblaaax"), another script ("\u0418\u0432\u0430\u043d" is "Ivan"), a plural or the
        endings of its language make no difference. A name begins and ends where a word does, before
        particles and forms of address where they are written on: "Ann" is in "Ann's" and not in
        "Annual". What is misspelt is not here (see `leaks_in`). A part that is a word like any
        other counts where it is used as a name: "green" is not Will Green.
        """
        return _merged(_found(self, text, include_parts))

    def named_in(self, text: str, *, include_parts: bool = True) -> bool:
        """Whether the name, an alias or (by default) a part of the name stands in `text`."""
        return any(True for _ in _found(self, text, include_parts))

    def given_in(self, text: str) -> bool:
        """Whether `text` gives this name: one of its forms, or a part with a capital. A part in
        small letters may be a word like any other."""
        for start, end in _found(self, text, True):
            if (
                text[start:end].lower() == text[start:end].upper()
                or text[start:end].lstrip("'\"*_(")[:1].isupper()
            ):
                return True
        return self.named_in(text, include_parts=False)

    def leaks_in(self, text: str) -> bool:
        """Whether the name can be read out of `text`, for measuring what is forgotten: all that
        `named_in` finds, all the parts together, and the name misspelt (see `spelling.misspelt`).
        """
        parts = self.parts() if len(spelling.words(self.name)) > 1 else ()
        return (
            self.named_in(text)
            or spelling.together(parts, text)
            or any(spelling.nearly_sounding(*spoken, text) for spoken in _spoken_in(self, text))
            or spelling.misspelt(
                [f for f in self.forms() if not _used_as_name(self, f)], parts, text
            )
        )

    def same(self, name: str) -> bool:
        """Whether `name` is this name, however either is written: "zorblax QUINT", not "Zorblax"
        nor "Mr Zorblax Quint"."""
        whole = lambda concept, text: concept.spans(text, include_parts=False) == [(0, len(text))]
        every = lambda names: Concept(names[0], tuple(names[1:]), as_word=True)
        name = unicodedata.normalize("NFC", name.strip())
        return name in self.forms() or any(
            whole(every([form]), name) and whole(every([name]), form) for form in self.forms()
        )


def concept_of(request: Request) -> Concept:
    """Whom a request is about."""
    return Concept(request.concept, request.aliases, request.as_word)


def ambiguous(concept: Concept) -> str:
    """A sentence where a name of one word is a word like any other and `as_word` does not say how
    to count it, else ""."""
    if concept.as_word is None:
        for form in concept.forms():
            if len(form.split()) == 1 and spelling.ordinary(confusables.unstyled(plain(form).text)):
                how = (
                    "only where it is used as a name"
                    if _used_as_name(concept, form)
                    else "wherever it stands"
                )
                return (
                    f"{form!r} is a word like any other: it counts {how}; --as-word counts it "
                    "everywhere, "
                    "--as-name only as a name."
                )
    return ""


def _used_as_name(concept: Concept, form: str) -> bool:
    """Whether a form of one word counts only where it is used as a name."""
    if len(form.split()) > 1 or concept.as_word is not None:
        return len(form.split()) == 1 and concept.as_word is False
    word = confusables.unstyled(plain(form).text)
    return spelling.ordinary(word) and spelling.called(word) and form[:1].isupper()


@dataclass(frozen=True, eq=False)
class VocabularyMask:
    """The paper's K_V (Eq. 3).

    keep:    [V] bool, False at the masked tokens
    masked:  token id to token, what `keep` excludes
    spared:  token id to token, pieces of the name left alone: too common elsewhere, or one
    character
    warning: a sentence where nothing could be masked, else empty
    """

    keep: Tensor
    masked: dict[int, str] = field(default_factory=dict)
    spared: dict[int, str] = field(default_factory=dict)
    warning: str = ""


def token_keep(offsets: Iterable[Sequence[int]], spans: Iterable[Span]) -> Tensor:
    """The paper's K_S (Eq. 2): [T] bool, False where a token's characters overlap a span; tokens
    without characters are kept.

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
    teacher_texts: the teacher's own answers; a token with more than `max_share` of their tokens
    outside the name is spared

    Raises BadInput where the tokenizer has no offsets, the name is no token at all, or a token is
    outside the head.
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
                # white space and punctuation may be fused with it
                if s < e and inside and not any(map(_letter, beyond)):
                    letters = sum(map(_letter, unicodedata.normalize("NFC", inside)))
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

    # the unknown token stands for every other unknown word too
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
    """Every way to write the name, an alias or a part: as it was given, without style and accents,
    and in four cases, NFC and NFD, each once."""
    written = {}
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
    made = confusables.unstyled(word.lower())
    return word if made == word.lower() else made.title() if word[:1].isupper() else made


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(found["input_ids"]), [(int(s), int(e)) for s, e in found["offset_mapping"]]


# ---------------------------------------------------------------------------------------- the
# matcher


@dataclass(frozen=True, eq=False)
class _Needle:
    """A form or a part, as it is looked for.

    pattern:  in a plain text, or one of letters that look alike; its group 1 is the name
    keys:     what is in the key of every text that holds it: looked at first
    whole:    a form, not a part
    last:     makes a name by itself: a form, or the last word of one
    only:     counts only where it is used as a name
    spelled:  the pattern of its letters one by one, where it has enough
    """

    form: str
    text: str
    pattern: re.Pattern[str]
    keys: tuple[str, ...]
    whole: bool
    last: bool
    only: bool
    spelled: re.Pattern[str] | None = None
    marked: bool = False  # the text has to write an umlaut

    @functools.cached_property
    def scripts(self) -> frozenset[str]:
        return frozenset(script(c) for c in self.form)

    @functools.cached_property
    def around(self) -> tuple[str, str]:
        """The invisible characters and marks before the first and after the last visible one of the
        form."""
        seen = [i for i, c in enumerate(self.form) if confusables.PLAIN[c].strip()]
        return self.form[: seen[0]], self.form[seen[-1] + 1 :]


@functools.lru_cache(maxsize=4096)
def _needles(concept: Concept) -> tuple[_Needle, ...]:
    raw = dict.fromkeys((*concept.forms(), *(n.strip() for n in (concept.name, *concept.aliases))))
    out = [
        needle for form in raw for needle in _ways(form, True, True, _used_as_name(concept, form))
    ]
    own = concept.forms()[0]
    for part in concept.parts():
        if part not in raw:
            only = (
                spelling.ordinary(confusables.unstyled(plain(part).text))
                and concept.as_word is not True
            )
            out += _ways(part, False, spelling.BREAKS.split(own)[-1].endswith(part), only)
    for form in concept.forms():
        for family, _, _ in spelling.divided(_bare(form)) if len(form.split()) == 1 else ():
            pattern = re.compile(spelling.honoured(family))
            text = plain(family).text
            out.append(
                _Needle(family, text, pattern, (confusables.key(text),), False, False, False)
            )
    return tuple(out)


def _ways(form: str, whole: bool, last: bool, only: bool) -> Iterator[_Needle]:
    text = " ".join(plain(form).text.split())
    if not text:  # a part that nobody sees
        return
    yield _needle(form, text, whole, last, only)
    simple = unicodedata.normalize("NFC", form).lower()
    other = "".join(_UMLAUTS.get(c, c) for c in simple)
    if other != simple:
        yield _needle(form, " ".join(plain(other).text.split()), whole, last, only)
    elif any(pair in text for pair in _UMLAUTS.values()) and spelling.spaced(text):
        bare = functools.reduce(lambda t, pair: t.replace(pair, pair[0]), _UMLAUTS.values(), text)
        yield _needle(form, bare, whole, last, only, marked=True)
    looks = confusables.alike(form)
    if (
        looks is not None
        and looks.text.split() != text.split()
        and len({script(c) for c in form} - {""}) > 1
    ):
        yield _needle(form, " ".join(looks.text.split()), whole, last, only)


def _needle(
    form: str, text: str, whole: bool, last: bool, only: bool, *, marked: bool = False
) -> _Needle:
    words = text.split()
    if not spelling.spaced(text):
        pattern = re.compile(spelling.run_on(text, part=not whole))
        return _Needle(
            form, text, pattern, (*map(confusables.key, words),), whole, last, only, None, marked
        )
    joined = "".join(words)
    together = "|" if len(joined) >= 8 and len(words) > 1 and not spelling.ordinary(joined) else ""
    between = rf"(?:\s+|[-_.\u00b7\u30fb]{together})"
    body = between.join(spelling.written(word, end=len(words) == 1) for word in words)
    first, final = confusables.unstyled(words[0])[0], confusables.unstyled(words[-1])
    closing = re.search(r"[.,;:!?]+$", final)
    edge = final[: closing.start()][-1:] if closing else final[-1]
    before = spelling.BEFORE if first.isalnum() else ""
    after = spelling.AFTER if edge.isalnum() else ""
    pattern = re.compile(f"{before}(?=({body}){after})")
    letters = re.sub(r"[^\w\s]|_", "", " ".join(map(confusables.unstyled, words))).strip()
    alphabet = all(c.lower() != c.upper() for c in letters if not c.isspace())
    apart = None
    if alphabet and len(letters.replace(" ", "")) > 2 and len(letters.split()[0]) > 1:
        apart = re.compile(rf"(?<![^\W_])({spelling.spelled(letters)})(?![^\W_])")
    keys = tuple(confusables.key(spelling.stem(word)) for word in words)
    return _Needle(form, text, pattern, keys, whole, last, only, apart, marked)


def _bare(word: str) -> str:
    """A word of a name without what is around it and without a form of address."""
    word = _HONOUR.sub("", word)
    return word.strip("".join(c for c in word if not _letter(c)))


def _found(concept: Concept, text: str, include_parts: bool) -> Iterator[Span]:
    """Every place of the name in the text, in no order; they may overlap."""
    needles = _needles(concept)
    for reading in (plain(text), confusables.alike(text)):
        if reading is None:
            break
        key = reading.key
        for needle in needles:
            if (
                needle.keys[0] not in key
                or not (include_parts or needle.whole)
                or any(k not in key for k in needle.keys)
            ):
                continue
            for match in needle.pattern.finditer(reading.text):
                if (span := _place(needle, reading, match)) is not None:
                    yield span
            if reading.spelled and needle.spelled is not None:
                for match in needle.spelled.finditer(reading.text):
                    if (
                        _apart(needle, reading.text, match)
                        and (span := reading.span(*match.span(1))) is not None
                    ):
                        yield span
    for words, parts in _spoken_in(concept, text):
        for start, end, whole in spelling.sounding(words, parts, text):
            if include_parts or whole:
                yield start, end


def _spoken_in(concept: Concept, text: str) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """The forms that may be written in another script in `text`."""
    if text.isascii() and concept.name.isascii() and not concept.aliases:
        return ()
    return _spoken(concept)


@functools.lru_cache(maxsize=4096)
def _spoken(concept: Concept) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """The words of each form and, of the first, the parts, as they are looked for in other
    scripts."""
    out = []
    for n, form in enumerate(concept.forms()):
        words = tuple(w for w in map(_bare, spelling.BREAKS.split(form)) if w)
        if words and not _used_as_name(concept, form):
            out.append(
                (
                    words,
                    tuple(p for p in concept.parts() if not spelling.ordinary(p)) if n == 0 else (),
                )
            )
    return tuple(out)


def _place(needle: _Needle, reading: Reading, match: re.Match[str]) -> Span | None:
    """The characters of the source for a match, or None where that is not the name."""
    i, j = match.span(1)
    span = reading.span(i, j)
    if span is None:
        return None
    start, end = span
    text, said = reading.source, reading.text[i:j]
    if i > 0 and needle.text[0].isalnum() and unicodedata.category(reading.text[i - 1])[0] == "M":
        if not UNSPACED.match(reading.text[i - 1]) and _letter(needle.text[0]):
            return None
    literal = said.split() == needle.text.split()
    if not literal and 2 * sum(map(str.isalpha, said)) < len(re.sub(r"[\s\-_.']", "", said)):
        return None  # hardly a letter of it
    if needle.marked and not any(
        c in "äöüøåÄÖÜØÅ" for c in unicodedata.normalize("NFC", text[start:end])
    ):
        return None
    if reading.text is not plain(text).text and _of_its_own_script(needle, text, start, end):
        return None
    ending = match.groupdict().get("end")
    if ending and not _bent(needle, text, start, end, said, ending):
        return None
    if needle.only and text[start:end].isalpha():
        alone = needle.whole or (needle.last and text[start].isupper())
        if not spelling.as_name(text, start, end, alone=alone):
            return None
    # What is invisible around the name is its own; some of it may be in the span already.
    before, after = needle.around
    for n in range(len(before) + 1):
        if text.endswith(before[:n], 0, start) and text.startswith(before[n:], start):
            start -= n
            break
    for n in range(len(after), -1, -1):
        if text.endswith(after[:n], 0, end) and text.startswith(after[n:], end):
            end += len(after) - n
            break
    return start, end


def _bent(needle: _Needle, text: str, start: int, end: int, said: str, ending: str) -> bool:
    """Whether a word with an ending is still the name: no other's ("Williams"), nor a word like any
    other ("robs")."""
    first = text[start:end][:1]
    capital = first.isupper() or first.lower() == first.upper() or not needle.form[:1].isupper()
    if ending in ("s", "es", "ies", "ys"):
        if spelling.is_son(said):
            return spelling.several(text, start)
        return (
            capital
            or len(needle.text) >= 5
            or spelling.ordinary(needle.text)
            or spelling.several(text, start)
        )
    return capital and not spelling.ordinary(said)


def _apart(needle: _Needle, text: str, match: re.Match[str]) -> bool:
    """Whether letters by themselves are the name; three are not within more: "R. A. N. N. E."."""
    i, j = match.span(1)
    sign = match["sign"]
    if len(needle.text) > 3:
        return True
    more = text.endswith(sign, 0, i) and text[max(0, i - len(sign) - 1) : i - len(sign)].isalnum()
    return not more and not (
        text.startswith(sign, j) and text[j + len(sign) : j + len(sign) + 1].isalnum()
    )


def _of_its_own_script(needle: _Needle, text: str, start: int, end: int) -> bool:
    """Whether letters that look like the name are a word of their own script: "\u0442\u043e\u043c"
    in Russian is no "Tom"."""
    inside = Counter(name for c in text[start:end] if (name := script(c)))
    if len(inside) != 1 or next(iter(inside)) in needle.scripts:
        return False
    every = plain(text).scripts
    own = next(iter(inside))
    return every[own] - inside[own] > sum(n for name, n in every.items() if name in needle.scripts)


def _letter(c: str) -> bool:
    """A letter, digit or mark: what words are made of."""
    return unicodedata.category(c)[0] in "LMN"


def _merged(spans: Iterable[Span]) -> list[Span]:
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
