"""The patterns of a name's form, for texts as `confusables` reads them; and whether a match is the
name."""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from . import confusables, indic, plurals, spelling, usage
from .confusables import Reading, Span, is_letter, letters_in, plain, script

_UMLAUTS = {"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa"}
_HONOUR = re.compile(
    r"(?<=\w)(?:-(?:san|sama|kun|chan|sensei|ssi|nim)|さん|様|さま|くん|ちゃん|先生|씨|님|선생님)$"
)


@dataclass(frozen=True, eq=False)
class Needle:
    """One way to look for a form or a part of a name in a `Reading`.

    form:     as the name writes it
    text:     as the pattern writes it, folded
    written:  the source of `pattern`, which is compiled when it is first searched: most names are
              looked for in no text that could hold them
    keys:     a text whose key lacks one of these cannot hold the name; a cheap test before the
              pattern
    whole:    a form, not a part
    last:     makes a name by itself: a form, or the last word of one
    only:     counts only where it is used as a name
    letters:  the source of `spelled`; None for too few letters
    marked:   counts only where the text writes an umlaut
    many:     an irregular plural of the form
    """

    form: str
    text: str
    written: str
    keys: tuple[str, ...]
    whole: bool
    last: bool
    only: bool
    letters: str | None = None
    marked: bool = False
    many: bool = False

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Searched in the reading's text; its group 1 is the name."""
        return re.compile(self.written)

    @functools.cached_property
    def spelled(self) -> re.Pattern[str] | None:
        """The pattern of its letters one by one."""
        return None if self.letters is None else re.compile(self.letters)

    @functools.cached_property
    def scripts(self) -> frozenset[str]:
        return frozenset(script(c) for c in self.form)

    @functools.cached_property
    def around(self) -> tuple[str, str]:
        """The invisible characters and marks before the first and after the last visible one of the
        form."""
        visible = [i for i, c in enumerate(self.form) if confusables.PLAIN[c].strip()]
        return self.form[: visible[0]], self.form[visible[-1] + 1 :]


def ways(form: str, whole: bool, last: bool, only: bool) -> Iterator[Needle]:
    """The needles of a form or a part: as it is, with "ae" for "ä" or the reverse, with Latin
    letters for those that look like them, and a form's irregular plurals. The flags are those of
    Needle."""
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
    for several in plurals.irregular(text) if whole else ():
        yield dataclasses.replace(_needle(form, several, whole, last, only), many=True)
    looks = confusables.alike(form)
    if (
        looks is not None
        and looks.text.split() != text.split()
        and len({script(c) for c in form} - {""}) > 1
    ):
        yield _needle(form, " ".join(looks.text.split()), whole, last, only)


def _needle(
    form: str, text: str, whole: bool, last: bool, only: bool, *, marked: bool = False
) -> Needle:
    words = text.split()
    if not spelling.spaced(text):
        pattern = spelling.run_on(text, part=not whole)
        return Needle(
            form, text, pattern, (*map(confusables.key, words),), whole, last, only, None, marked
        )
    joined = "".join(words)
    together = "|" if len(joined) >= 8 and len(words) > 1 and not usage.ordinary(joined) else ""
    between = rf"(?:\s+|[-_.\u00b7\u30fb]{together})"
    body = between.join(spelling.written(word, end=len(words) == 1) for word in words)
    first, final = confusables.unstyled(words[0])[0], confusables.unstyled(words[-1])
    closing = re.search(r"[.,;:!?]+$", final)
    edge = final[: closing.start()][-1:] if closing else final[-1]
    before = spelling.BEFORE if first.isalnum() else ""
    after = spelling.AFTER if edge and is_letter(edge) else ""
    pattern = f"{before}(?=({body}){after})"
    letters = re.sub(r"[^\w\s]|_", "", " ".join(map(confusables.unstyled, words))).strip()
    alphabet = all(c.lower() != c.upper() for c in letters if not c.isspace())
    one_by_one = None
    if alphabet and len(letters.replace(" ", "")) > 2 and len(letters.split()[0]) > 1:
        one_by_one = rf"(?<![^\W_])({spelling.spelled(letters)})(?![^\W_])"
    pieces = [piece for word in words for piece in indic.without_nasals(spelling.stem(word))]
    keys = tuple(map(confusables.key, pieces))
    return Needle(form, text, pattern, keys, whole, last, only, one_by_one, marked)


def bare(word: str) -> str:
    """A word of a name without the punctuation around it and without a form of address."""
    word = _HONOUR.sub("", word)
    return word.strip("".join(c for c in word if not is_letter(c)))


def place(needle: Needle, reading: Reading, match: re.Match[str]) -> Span | None:
    """The characters of the source for a match; None where the match is not the name."""
    i, j = match.span(1)
    span = reading.span(i, j)
    if span is None:
        return None
    start, end = span
    text, matched = reading.source, reading.text[i:j]
    if i > 0 and needle.text[0].isalnum() and unicodedata.category(reading.text[i - 1])[0] == "M":
        if not spelling.UNSPACED.match(reading.text[i - 1]) and is_letter(needle.text[0]):
            return None
    literal = matched.split() == needle.text.split()
    letters, characters = letters_in(matched), re.sub(r"[\s\-_.']", "", matched)
    if not literal and 2 * letters < len(characters):
        return None
    if needle.marked and not any(
        c in "äöüøåÄÖÜØÅ" for c in unicodedata.normalize("NFC", text[start:end])
    ):
        return None
    if reading.text is not plain(text).text and _of_its_own_script(needle, text, start, end):
        return None
    ending = match.groupdict().get("end")
    if ending and not _bent(needle, text, start, end, matched, ending):
        return None
    if needle.many and not _bent(needle, text, start, end, matched, "s"):
        return None
    if needle.only and letters_in(text[start:end]) == end - start:
        alone = needle.whole or (needle.last and text[start].isupper())
        if not usage.as_name(text, start, end, alone=alone):
            return None
    # Invisible characters around the name belong to it; the span may already have some of them.
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


def _bent(needle: Needle, text: str, start: int, end: int, matched: str, ending: str) -> bool:
    """Whether a word with an ending is still the name, and neither another name ("Williams") nor an
    ordinary word ("robs")."""
    first = text[start:end][:1]
    capital = first.isupper() or first.lower() == first.upper() or not needle.form[:1].isupper()
    if ending in ("s", "es", "ies", "ys"):
        if usage.is_son(matched):
            return usage.several(text, start)
        return (
            capital
            or len(needle.form) >= 5
            or usage.ordinary(needle.form)
            or usage.several(text, start)
        )
    return capital and not usage.ordinary(matched)


def apart(needle: Needle, text: str, match: re.Match[str]) -> bool:
    """Whether letters by themselves are the name. Three letters are not the name within a longer
    run: "R. A. N. N. E."."""
    i, j = match.span(1)
    sign = match["sign"]
    if len(needle.text) > 3:
        return True
    more = text.endswith(sign, 0, i) and text[max(0, i - len(sign) - 1) : i - len(sign)].isalnum()
    return not more and not (
        text.startswith(sign, j) and text[j + len(sign) : j + len(sign) + 1].isalnum()
    )


def _of_its_own_script(needle: Needle, text: str, start: int, end: int) -> bool:
    """Whether letters that look like the name are a word of their own script: "\u0442\u043e\u043c"
    in Russian is no "Tom"."""
    inside = Counter(name for c in text[start:end] if (name := script(c)))
    if len(inside) != 1 or next(iter(inside)) in needle.scripts:
        return False
    every = plain(text).scripts
    own = next(iter(inside))
    return every[own] - inside[own] > sum(n for name, n in every.items() if name in needle.scripts)
