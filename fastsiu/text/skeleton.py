"""The consonants of a name, by which Japanese, Korean and Russian write foreign names: "Tom Cruise"
in katakana is "tomu kuruuzu".

For measuring only: names that sound alike have the same consonants, so a whole name has to fit.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

from anyascii import anyascii

from .confusables import plain, script
from .spelling import KOREAN_END

# Consonants that these scripts do not keep apart are one letter: P (b, p, v, f), T (t, d), K (k,
# g), S (s, z, sh, ch, j), N (n, m), L (l, r). Vowels and "h" are left out but for a first vowel, A.
_LETTERS = str.maketrans("bpvftdkgqszjcnmlr", "PPPPTTKKKSSSKNNLL")
_HISSED = re.compile("dzh|tsh|ch|sh|zh|ts")
# How the letters of a name may be heard: the first that fits.
_WAYS = (
    ("tsch|sch|sh|zh|cz|tz", "S"),
    ("ch", "[KS]"),
    ("th", "[TS]"),
    ("gh", "K?"),
    ("ph", "P"),
    ("ng(?![aeiou])", "NK?"),
    ("c(?=[eiy])", "S"),
    ("g(?=[eiy])", "[KS]"),
    ("x", "K?S"),
    ("qu", "KP?"),
    ("^w", "A?P?"),
    ("w", "P?"),
    ("^h", "K?"),
    ("t(?=e?s)", "T?"),
    ("r(?![aeiouy])", "L?"),
    ("r", "L"),
    ("j", "S"),
    ("[hy]", ""),
)
_SPELLED = re.compile("|".join(f"({pattern})" for pattern, _ in _WAYS) + "|(.)")
LEAST = {"KATAKANA": 4, "CYRILLIC": 4, "HANGUL": 5}  # consonants that tell a name of several words
ALONE = 6  # the same of a name in one word

_WORDS = {
    "KATAKANA": re.compile("[\u30a1-\u30fa\u30fc]+"),
    "CYRILLIC": re.compile("[^\\W\\d_]+"),
    "HANGUL": re.compile("[\uac00-\ud7a3]+"),
}
_GAP = re.compile(r"[\s=\u30fb\u00b7\uff1d-]{1,2}")


def sounds_in(words: tuple[str, ...], text: str) -> bool:
    """Whether a text of one of these scripts holds all words of a Latin name beside each other, by
    their consonants."""
    ways = _patterns(words)
    if ways is None:
        return False
    patterns, joined, consonants = ways
    for kind in plain(text).scripts:
        if kind not in _WORDS or consonants < LEAST[kind]:
            continue
        said = [m for m in _WORDS[kind].finditer(text) if script(m[0][0]) == kind]
        if kind == "CYRILLIC":
            said = [m for m in said if m[0][0].isupper()]
        if consonants >= ALONE:
            for match in said:
                if any(map(joined.fullmatch, _skeletons(match[0], kind, True))):
                    return True
        for first in range(len(said) - len(words) + 1 if len(words) > 1 else 0):
            run = said[first : first + len(words)]
            if all(_GAP.fullmatch(text[a.end() : b.start()]) for a, b in pairwise(run)) and all(
                any(map(pattern.fullmatch, _skeletons(m[0], kind, m is run[-1])))
                for pattern, m in zip(patterns, run, strict=True)
            ):
                return True
    return False


@functools.lru_cache(4096)
def _patterns(words: tuple[str, ...]) -> tuple[list[re.Pattern[str]], re.Pattern[str], int] | None:
    """A pattern of each word and of all in one, and how many consonants are certain; None for a
    name in another script."""
    if any(script(c) not in ("LATIN", "") for word in words for c in word):
        return None
    sources = [_pattern(word) for word in words]
    joined = sources[0] + "".join(source.removeprefix("A") for source in sources[1:])
    certain = len(re.findall(r"(?:\[\w+\]|[A-Z])(?!\?)", "".join(sources)))
    return [re.compile(source) for source in sources], re.compile(joined), certain


def _pattern(word: str) -> str:
    letters = re.sub("[^a-z]", "", anyascii(plain(word).text).lower())
    out = "A" if letters[:1] in tuple("aeiou") else ""
    before = ""
    for match in _SPELLED.finditer(re.sub(r"(.)\1+", r"\1", letters.replace("ck", "k"))):
        place = match.lastindex or 0
        piece = _WAYS[place - 1][1] if place <= len(_WAYS) else match[0].translate(_LETTERS)
        if piece.isupper() or "[" in piece:
            if piece != before:
                out += piece
            before = piece
        else:
            before = ""
    return out


@functools.lru_cache(65536)
def _skeletons(word: str, kind: str, last: bool) -> tuple[str, ...]:
    """The consonants of a word; of the last word of a name also without particles or endings."""
    return tuple(dict.fromkeys(map(_heard, _cut(word, kind, last))))


def _cut(word: str, kind: str, last: bool) -> Iterator[str]:
    yield word
    if kind == "HANGUL" and last:
        for n in range(2, min(len(word), 12)):
            if re.match(KOREAN_END, plain(word[n:]).text):
                yield word[:n]
    if kind == "CYRILLIC" and word[-2:] in ("ом", "ем", "ым", "им"):
        yield word[:-2]


_S_TO_T = 12  # places in Unicode between syllables that end in "s" and in "t"


def _ends_in_s(c: str) -> bool:
    return "\uac00" <= c <= "\ud7a3" and (ord(c) - 0xAC00) % 28 == 19


def _heard(word: str) -> str:
    # Katakana's small "tu" doubles the next consonant. An "s" that ends a Korean syllable is a "t".
    word = unicodedata.normalize("NFC", word).replace("\u30c3", "")
    word = "".join(chr(ord(c) - _S_TO_T) if _ends_in_s(c) else c for c in word)
    heard = anyascii(word).lower()
    first = "A" if heard[:1] in tuple("aeiou") else ""
    heard = _HISSED.sub("s", heard.replace("hu", "fu"))
    letters = re.sub("[aeiouhwy]", " ", re.sub("[^a-z]", "", heard)).translate(_LETTERS)
    return first + re.sub(r"([A-Z])\1+", r"\1", letters).replace(" ", "")
