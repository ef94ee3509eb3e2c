"""How a name sounds: where a name of one script stands in a text of another script."""

from __future__ import annotations

import bisect
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from anyascii import anyascii

from . import indic
from .confusables import MARKS, plain, script
from .lists import FACTS, families
from .spelling import KANA_END, KOREAN_END
from .typos import LETTERS, LONG, within
from .usage import ordinary

LONGEST = 80  # letters of the longest word that is read as another script's
WAYS = 27  # to say a name of several words

_LETTERS = rf"(?:[^\W\d_]|[{MARKS}])+"
_WRITTEN = re.compile(rf"{_LETTERS}(?:[-'\u2019\u02bc]{_LETTERS})*")
_VOICES = {
    "HANGUL": "hangul",
    "HIRAGANA": "kana",
    "KATAKANA": "kana",
    "ARABIC": "consonants",
    "HEBREW": "consonants",
    "CJK": "han",
}
_LEAST = {"": 4, "hangul": 4, "kana": 5, "consonants": 4, "han": 6}  # letters that tell a name
_PINYIN = re.compile("(?:(?:zh|ch|sh|[bpmfdtnlgkhjqxrzcsyw])?[aeiouv][aeiou]{0,2}(?:ng|n|r)?){2,4}")


def _rules(written: str) -> list[tuple[re.Pattern[str], str]]:
    """Pairs "pattern>what it becomes", in the order in which they are applied."""
    pairs = (rule.rpartition(">") for rule in written.split())
    return [(re.compile(pattern), to) for pattern, _, to in pairs]


_SOUNDS = _rules(
    """
    tsch|tch|cz>ch shch|sch>sh kh>h ph>f th>t dh>d gh>g zh>j x>ks q|ck>k w>v c(?=[eiy])>s c(?!h)>k
    (?<=[aeiou])j>i y>i ou|oo>u ee>i ff$>v ie|je>e (?<=[^aeiou])io(?=v$)>e
    """
)
_OTHER_SOUNDS = {
    "hangul": _rules(
        """
        ar(?=k)>a sh>s (?<=ch)y(?=[aeou])> (?<=j)y(?=[aeou])> y>i w>u eo|eu|oo|ou>u ee>i ae>e ui>i
        ch>j k>g t>d p>b r>l h(?=[^aeiou]|$)>
        """
    ),
    "kana": _rules(
        """
        y>i (?<=sh|ch)i+(?=[auo])|(?<=j)i+(?=[auo])> ou|oo|oh(?=[^aeiou]|$)>o m(?=[bp])>n l>r tsu>tu
        fu>hu
        """
    ),
    "consonants": _rules(
        """
        kh>h [aeiouywv]> ph>f q|c(?!h)|ck>k th>t dh>d gh>g p>b x>ks
        """
    ),
    "han": [],
}


@functools.lru_cache(65536)
def sound(word: str, voice: str) -> str:
    """What a word sounds like, in Latin letters. Different ways to transcribe the same sound become
    one."""
    # Armenian writes "u" with two letters
    word = unicodedata.normalize("NFC", word).replace("\u0578\u0582", "u")
    heard = "".join(c for c in anyascii(word).lower() if c.isascii() and c.isalpha())
    for pattern, to in _OTHER_SOUNDS.get(voice, _SOUNDS):
        heard = pattern.sub(to, heard)
    return heard if voice == "han" else re.sub(r"(.)\1+", r"\1", heard)


class Heard(NamedTuple):
    """A word of a text that may be a name of another script.

    capital: it may begin a name, because it has a capital, or because its script or the whole text
             has no capitals
    """

    start: int
    end: int
    word: str
    capital: bool


def heard(text: str, kind: str) -> list[Heard]:
    """The words of a text in one script."""
    small = text == text.lower()
    out = []
    for match in _WRITTEN.finditer(text):
        first = match[0][0]
        if script(first) == kind:
            capital = small or first.isupper() or first.lower() == first.upper()
            out.append(Heard(match.start(), match.end(), match[0], capital))
    return out


@functools.lru_cache(65536)
def _says(word: str, kind: str, voice: str) -> dict[str, int]:
    """What a word sounds like, with and without endings and particles that may be written on to it,
    and how many of its characters each sound takes."""
    ways = {word: len(word)}
    if len(word) > LONGEST:
        return {}
    if word[-2:].lower() in ("'s", "\u2019s"):  # English writes it on to any script
        word = word[:-2]
        ways[word] = len(word)
    size = len(word)
    if kind == "CYRILLIC":
        for ending in FACTS["endings"]["russian"].split():
            left = word.removesuffix(ending)
            if 4 <= len(left) < size:
                ways |= dict.fromkeys(
                    (left, left + "\u0430", left + "\u044f", left + "\u0438\u0439"), size
                )
    elif kind == "GEORGIAN":
        stems = (word.removesuffix(ending) for ending in FACTS["endings"]["georgian"].split())
        ways |= {
            way: size for left in stems if 4 <= len(left) < size for way in (left, left + "\u10d8")
        }
    elif kind in indic.SCRIPTS:
        ways |= dict.fromkeys(indic.spoken(word), size)
    elif kind in ("HANGUL", "HIRAGANA", "KATAKANA") and unicodedata.is_normalized("NFC", word):
        ends = KOREAN_END if kind == "HANGUL" else KANA_END
        ways |= {
            word[:n]: n for n in range(2, min(size, 12)) if re.match(ends, plain(word[n:]).text)
        }
    return {sound(way, voice): length for way, length in ways.items()}


@functools.lru_cache(4096)
def _begun(text: str, kind: str, voice: str) -> frozenset[str]:
    """The first two letters of every sound of the words in one script that may begin a name."""
    words = _WRITTEN.findall(text)
    if text != text.lower():
        words = [word for word in words if not word[0].islower()]
    return frozenset().union(
        *(_first(word, kind, voice) for word in words if script(word[0]) == kind)
    )


@functools.lru_cache(65536)
def _first(word: str, kind: str, voice: str) -> frozenset[str]:
    return frozenset(said[:2] for said in _says(word, kind, voice))


def sounding(
    words: tuple[str, ...], parts: tuple[str, ...], text: str
) -> Iterator[tuple[int, int, bool]]:
    """Where a name stands in `text` in another script: start, end, and whether it is the whole
    name.

    words: all words of the name
    parts: words that identify it by themselves

    anyascii transcribes each script. Han is read as Chinese, and only whole names that begin with a
    Chinese family name count. Arabic and Hebrew need four consonants or more.
    """
    own = _own(words)
    for kind in plain(text).scripts:
        voice = _voice(own, kind)
        if voice is None:
            continue
        keys = _said(words, parts, voice)
        if not keys:
            continue
        if kind == "CJK":
            if not _pinyin(text).isdisjoint(keys):
                yield from ((i, j, True) for i, j, sounded in _in_pinyin(text) if sounded in keys)
        elif own == "CJK" and not ({words[0][:1], words[0][:2]} & families("chinese")):
            continue
        else:
            begun = _begun(text, kind, voice)
            if not any(key[:2] in begun or key[:1] in begun for key in keys):
                continue
            listened = heard(text, kind)
            for i, word in enumerate(listened):
                if word.capital:
                    yield from _from(keys, listened, i, kind, voice)


def _own(words: tuple[str, ...]) -> str:
    """The script of a name; "" for one without letters."""
    return script(next((c for c in words[0] if c.isalpha()), " "))


def _voice(own: str, kind: str) -> str | None:
    """How names of one script are heard in words of another; None where they are not compared."""
    pair = {own, kind}
    if not own or kind == own or not ("LATIN" in pair or pair == {"HIRAGANA", "KATAKANA"}):
        return None
    return _VOICES.get(own) or _VOICES.get(kind, "")


def _transcribed(word: str) -> tuple[str, ...]:
    """A word of a name, or how it is written in Latin letters where that says more."""
    return (*indic.spoken(word), word)


@functools.lru_cache(4096)
def _said(words: tuple[str, ...], parts: tuple[str, ...], voice: str) -> dict[str, bool]:
    """The sounds of the parts and of the whole name; True for the whole name."""
    keys = {}
    if voice != "han":
        keys = {sound(way, voice): False for part in parts for way in _transcribed(part)}
    for ways in itertools.islice(itertools.product(*map(_transcribed, words)), WAYS):
        keys["".join(sound(way, voice) for way in ways)] = True
    if voice == "han":
        keys = {key: True for key in keys if _PINYIN.fullmatch(key)}
    return {key: whole for key, whole in keys.items() if len(key) >= _LEAST[voice]}


def nearly_sounding(words: tuple[str, ...], parts: tuple[str, ...], text: str) -> bool:
    """Whether a word of another script in `text` sounds nearly like the name or a part: one letter
    may differ from 6 letters on, two from 10 on. "Aleksandr" and "Alexander"."""
    own = _own(words)
    heard_as = (*parts, *words[: len(words) == 1])
    keys = {sound(way, "") for word in heard_as for way in _transcribed(word)}
    keys = {key for key in keys if len(key) >= LETTERS}
    for kind in plain(text).scripts if keys and own not in _VOICES else ():
        if kind == own or kind in _VOICES or "LATIN" not in (own, kind):
            continue
        for word in heard(text, kind):
            if word.capital and not ordinary(word.word):
                # Trap: no capital tells names from words there, and many are near ("mandir" is
                # a temple, Mandira a person).
                said_as = (
                    (sound(word.word, ""),) if kind in indic.SCRIPTS else _says(word.word, kind, "")
                )
                for said in said_as:
                    if any(within(key, said, 2 if len(key) >= LONG else 1) for key in keys):
                        return True
    return False


class Index:
    """Many names by what they sound like, each under a number: which of them `sounding` may find as
    a whole in a text."""

    def __init__(self) -> None:
        # script of the names and voice -> sounds in order, and the numbers of each
        self._sounds: dict[tuple[str, str], tuple[list[str], dict[str, set[int]]]] = {}

    def add(self, words: tuple[str, ...], number: int) -> None:
        own = _own(words)
        for voice in {_VOICES[own]} if own in _VOICES else {"", *_VOICES.values()}:
            for key in _said(words, (), voice):
                order, numbers = self._sounds.setdefault((own, voice), ([], {}))
                if key not in numbers:
                    bisect.insort(order, key)
                numbers.setdefault(key, set()).add(number)

    def find(self, text: str) -> set[int]:
        """The numbers of all names that `sounding` finds as a whole in `text`, and of a few
        others."""
        found: set[int] = set()
        for kind in plain(text).scripts:
            for (own, voice), (order, numbers) in self._sounds.items():
                if voice == _voice(own, kind):
                    for key in _heard_in(text, kind, voice, order):
                        found |= numbers.get(key, set())
        return found


def _begins(said: str, order: Sequence[str]) -> bool:
    """Whether one of the sounds in `order` begins so."""
    place = bisect.bisect_left(order, said)
    return place < len(order) and order[place].startswith(said)


def _heard_in(text: str, kind: str, voice: str, order: Sequence[str]) -> Iterator[str]:
    """What up to four words of a text in one script sound like, as far as one of the sounds in
    `order` begins so. As `_from` reads them, but with every way to say a word."""
    if kind == "CJK":
        yield from _pinyin(text)
        return
    words = heard(text, kind)
    for i in range(len(words)):
        now = {""}
        for last in range(i, min(i + 4, len(words))):
            if last > i and words[last].start - words[last - 1].end > 2:
                break
            more = _says(words[last].word, kind, voice)
            now = {one + said for one in now for said in more if _begins(one + said, order)}
            yield from now


def _from(
    keys: dict[str, bool], words: Sequence[Heard], i: int, kind: str, voice: str
) -> Iterator[tuple[int, int, bool]]:
    """The places of names that begin with the word words[i] and have up to four words."""
    first = words[i]
    for now, length in _says(first.word, kind, voice).items():
        if now in keys and not (kind == "LATIN" and ordinary(first.word)):
            yield first.start, first.start + length, keys[now]
        for last in range(i + 1, min(i + 4, len(words))):
            longer = [key for key in keys if key.startswith(now)]
            if not longer or words[last].start - words[last - 1].end > 2:
                break
            more = _says(words[last].word, kind, voice)
            said = next(
                (said for said in more if any(key.startswith(now + said) for key in longer)), None
            )
            if said is None:
                break
            now += said
            if now in keys:
                yield first.start, words[last].start + more[said], keys[now]


@functools.lru_cache(4096)
def _pinyin(text: str) -> frozenset[str]:
    return frozenset(said for _, _, said in _in_pinyin(text))


def _in_pinyin(text: str) -> Iterator[tuple[int, int, str]]:
    """Runs of two to four Han characters that begin with a Chinese family name, and their sound."""
    known = families("chinese")
    for i, c in enumerate(text):
        if c in known or text[i : i + 2] in known:
            said = ""
            for j in range(i, min(i + 4, len(text))):
                if script(text[j]) != "CJK":
                    break
                said += sound(text[j], "han")
                if j > i:
                    yield i, j + 1, said
