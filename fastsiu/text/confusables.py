"""How a text is compared with a name: without case, accents and style, and with Latin letters for
those that look like them. Chinese characters count in every way in which they are written.

Each reading folds character by character, so that a name inside a text reads as the name alone
does. The file confusables.txt, Unicode's own table, says which letters look alike. The package
anyascii says how letters of other scripts sound.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

from anyascii import anyascii

Span = tuple[int, int]

# Accents of Latin, Greek and Cyrillic, vowels of Hebrew and Arabic, Devanagari's dot for sounds of
# Persian: plain writing omits them.
_ACCENTS = re.compile(
    "[\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a"
    "\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed\u093c]"
)
# Characters without a look of their own that Unicode does not call format characters; Arabic's
# lengthening.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\u0640\U000e0100-\U000e01ef]"
)
_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_SAME = str.maketrans(
    {
        "\u2019": "'",
        "\u02bc": "'",
        "\u2018": "'",
        "\u02b9": "'",
        "`": "'",
        "\u05f3": "'",
        "\u2010": "-",
        "\u2011": "-",
        "\u2012": "-",
        "\u2013": "-",
        "\ufe63": "-",
        "\u05be": "-",
        "\u00ad": "",
        "\u0901": "\u0902",
        "\u06cc": "\u064a",
        "\u0629": "\u0647",
        "\u06a9": "\u0643",
        "\uff65": "\u30fb",
    }
)


def _han() -> dict[int, str]:
    """A Chinese character to the one that stands for all ways to write it."""
    rows = resources.files(__package__).joinpath("han.txt").read_text(encoding="utf-8")
    groups = re.sub("^#.*$", "", rows, flags=re.MULTILINE).split()
    return {ord(c): group[0] for group in groups for c in group[1:]}


_SAME |= _han()
# What stands for a letter in a stylised name; an "!" or "|" only between letters.
STYLED = {
    "a": "4@",
    "b": "8",
    "e": "3€",
    "g": "9",
    "i": "1!|",
    "l": "1|",
    "o": "0",
    "s": "5$",
    "t": "7",
}
_STYLES = {symbol: letter for letter, symbols in reversed(STYLED.items()) for symbol in symbols}
_KEY = {ord(symbol): {"l": "i"}.get(letter, letter) for symbol, letter in _STYLES.items()} | {
    ord("l"): "i"
}
_FLAG = re.compile(  # two such letters are a flag
    "(?<![\U0001f1e6-\U0001f1ff])[\U0001f1e6-\U0001f1ff]{2}(?![\U0001f1e6-\U0001f1ff])"
)
_DIVIDED = re.compile(r"(?<=[^\W\d_])[-\u00ad\u2010\u2011][ \t]*(?:\r\n?|\n)[ \t]*(?=[^\W\d_])")
_TWICE = re.compile(r"(.)\1+")
_SPELLED = re.compile(r"(?<![^\W_])[^\W_](\W{1,3}|_)[^\W_]\1[^\W_](?![^\W_])")


class _Table(dict[str, str]):
    """What a rule makes of a character, computed once for each character."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self.rule = rule

    def __missing__(self, c: str) -> str:
        self[c] = folded = self.rule(c)
        return folded


class _Key(dict[int, str | None]):
    """For str.translate: letters and digits stay, all else is removed."""

    def __missing__(self, c: int) -> str | None:
        self[c] = folded = chr(c) if chr(c).isalnum() else None
        return folded


_key = _Key(_KEY)
# All marks, for a pattern's class of characters: accents, vowel signs, viramas.
MARKS = "".join(c for c in map(chr, range(0x300, 0x1E950)) if unicodedata.category(c)[0] == "M")


@functools.cache
def _looks() -> dict[str, str]:
    """A character to the Latin letters or digits that it looks like."""
    written = resources.files(__package__).joinpath("confusables.txt").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in written.splitlines() if not line.startswith("#"))
    return {c: letters for letters, characters in rows for c in characters}


def _plain(c: str) -> str:
    if c.isspace():
        return "\n" if c in _BREAKS else " "
    if unicodedata.category(c) in ("Cf", "Cc") or _INVISIBLE.match(c):
        return ""
    small = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", c).casefold())
    # an accent by itself, a whole phrase in one character
    if any(part.isspace() for part in small):
        small = c.casefold()
    folded = "".join(
        _latin(part)
        for part in small.translate(_SAME)
        if not _ACCENTS.match(part) and not _INVISIBLE.match(part)
    )
    if any(unicodedata.combining(part) for part in folded):
        _MARKED.add(c)
    return folded


def _latin(c: str) -> str:
    """Strokes, ligatures, small capitals and framed letters as plain ones."""
    if c.isascii() or "LATIN" not in unicodedata.name(c, ""):
        return c
    ascii_letters = anyascii(c).casefold()
    return ascii_letters if ascii_letters.isalnum() else c


def _alike(c: str) -> str:
    if "\U0001f1e6" <= c <= "\U0001f1ff":  # the letters of flags
        return chr(ord(c) - 0x1F1E6 + ord("a"))
    if c.isascii() or script(c) == "LATIN":
        return PLAIN[c]
    small = PLAIN[c]
    looks = _looks().get(c) or "".join(map(_like, small))
    return "i" if looks == "l" and _looks().get(small) == "i" else looks


def _like(part: str) -> str:
    """What a small letter, or its capital, looks like."""
    return _looks().get(part) or _looks().get(part.upper(), part)


_MARKED: set[str] = set()  # characters whose plain form keeps a combining mark
PLAIN = _Table(_plain)
ALIKE = _Table(_alike)


def _script(c: str) -> str:
    """The script of a letter, as its Unicode name begins; empty for what is no letter."""
    if not c.isalpha():
        return ""
    if c.isascii():
        return "LATIN"
    first = unicodedata.name(c, "?").partition(" ")[0]
    return {
        "FULLWIDTH": "LATIN",
        "MATHEMATICAL": "LATIN",
        "MODIFIER": "LATIN",
        "KATAKANA-HIRAGANA": "KATAKANA",
    }.get(first, first)


_SCRIPTS = _Table(_script)


def is_letter(c: str) -> bool:
    """A letter, digit or mark: what words consist of."""
    return unicodedata.category(c)[0] in "LMN"


def script(c: str) -> str:
    return _SCRIPTS[c]


def letters_in(word: str) -> int:
    """How many letters a word has. Vowel signs are letters ("\u0916\u093e\u0928" has three),
    accents are none."""
    return sum(c.isalpha() or (unicodedata.category(c)[0] == "M" and PLAIN[c] != "") for c in word)


@dataclass(frozen=True, eq=False)
class Reading:
    """A text as it is compared with names.

    source: the text itself
    text:   its folded characters, which are compared
    where:  for each of these the index in `source`; None where the indices are equal
    """

    source: str
    text: str
    where: Sequence[int] | None

    def span(self, i: int, j: int) -> Span | None:
        """The characters of the source for text[i:j]; None where i or j divides a character of the
        source, or a letter from its marks."""
        text = self.text
        if j < len(text) and unicodedata.category(text[j])[0] == "M":
            return None
        if self.where is None:
            start, end = i, j
        else:
            where = self.where
            if (i > 0 and where[i - 1] == where[i]) or (j < len(text) and where[j] == where[j - 1]):
                return None
            start, end = where[i], where[j - 1] + 1
        while end < len(self.source) and unicodedata.category(self.source[end])[0] == "M":
            end += 1  # the accents of the last letter
        return start, end

    @functools.cached_property
    def key(self) -> str:
        """Its letters and digits alone, none twice in a row, with letters for the signs that stand
        for them. A text whose key lacks the key of a name does not hold the name."""
        return key(self.text)

    @functools.cached_property
    def spelled(self) -> bool:
        """Whether it has letters that stand by themselves: "Z o r", "Z.o.r"."""
        return _SPELLED.search(self.text) is not None

    @functools.cached_property
    def scripts(self) -> Counter[str]:
        """How many letters the source has of each script."""
        letters = Counter(map(_SCRIPTS.__getitem__, self.source))
        del letters[""]
        return letters


def key(text: str) -> str:
    return _TWICE.sub(r"\1", text.translate(_key))


def unstyled(word: str) -> str:
    """A word of a stylised name in letters: "ke$ha" is "kesha", "p!nk" is "pink". Other words stay
    as they are. No letters: a "!" at the end, several digits at the end ("agent 007"), and digits
    after few letters ("u2")."""
    letters = letters_in(word)
    inside = letters == 2 and len(word) == 4 and word[0].isalpha() and word[-1].isalpha()  # "l33t"
    if not (letters > 2 or inside) or not any(c in _STYLES for c in word):
        return word
    body = word.rstrip("!|")
    tail = re.search(r"\d+$", body)
    if tail and (len(tail[0]) > 1 or letters < 4 or len(body) - len(tail[0]) != letters):
        body = body[: tail.start()]
    return "".join(_STYLES.get(c, c) for c in body) + word[len(body) :]


@functools.lru_cache(4096)  # many names are looked for in the same answer
def plain(text: str) -> Reading:
    """The text without case, accents, style, control and format characters."""
    if text.isascii() and (
        text.isprintable() or not any(c < " " or c == "\x7f" for c in text if c not in "\t\n\r")
    ):
        return Reading(
            text, text.lower().replace("`", "'").replace("\r", "\n").replace("\t", " "), None
        )
    return _read(text, PLAIN)


@functools.lru_cache(4096)
def alike(text: str) -> Reading | None:
    """As `plain`, with Latin letters for all that look like them; None where that changes
    nothing."""
    if text.isascii():
        return None
    looks = _read(_FLAG.sub("\u2691\u2691", text), ALIKE)
    if looks.text == plain(text).text:
        return None
    return dataclasses.replace(looks, source=text)


@functools.lru_cache(4096)
def unbroken(text: str) -> Reading | None:
    """As `plain`, without the hyphens and line ends that divide words ("Zorb-", "lax"); None where
    there are none."""
    if "\n" not in text and "\r" not in text:
        return None
    pieces: list[str] = []
    kept: list[int] = []
    end = 0
    for match in _DIVIDED.finditer(text):
        pieces.append(text[end : match.start()])
        kept += range(end, match.start())
        end = match.end()
    if not end:
        return None
    whole = plain("".join(pieces) + text[end:])
    kept += range(end, len(text))
    return Reading(text, whole.text, [kept[i] for i in whole.where or range(len(kept))])


def _read(text: str, table: _Table) -> Reading:
    pieces = list(map(table.__getitem__, text))
    folded = "".join(pieces)
    where: Sequence[int] | None = None
    if len(folded) != len(text) or "" in pieces:
        where = [i for i, piece in enumerate(pieces) for _ in piece]
    if not _MARKED.isdisjoint(text):
        folded = _ordered(folded)
    return Reading(text, folded, where)


def _ordered(text: str) -> str:
    """Puts marks into Unicode's order. The indices of `Reading.where` stay valid, because a name
    never ends between marks."""
    out, run = [], ""
    for c in (*text, ""):
        if c and unicodedata.combining(c):
            run += c
            continue
        out.append("".join(sorted(run, key=unicodedata.combining)) + c)
        run = ""
    return "".join(out)
