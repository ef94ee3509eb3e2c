"""A name with typing errors: can it be read out of a text all the same, and does a text give it?

For measuring only, where a name that the matcher misses would pass as forgotten. The masks of
training cover what is written there (`Concept.spans`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .confusables import ALIKE, MARKS, PLAIN, script
from .lists import ORDINARY
from .spelling import PLURAL
from .usage import is_son, ordinary

LETTERS = 6  # a word of a name with so many letters may have one error
LONG = 10  # with so many, two
# For a whole name (`nearly`): least letters of all its words, and of a word that may have one
# error.
WHOLE, WORD = 8, 4

_WORD = re.compile(rf"(?:[^\W_]|[{MARKS}])+")
# What an apostrophe joins to a word in English: "Ive" is not in "I've", nor "Don" in "don't".
_NOT = re.compile(r"[^\W\d_]+'t(?![^\W_])", re.IGNORECASE)
_SHORT_VERB = re.compile(r"(?<=[^\W_])'(?:ve|ll|re|d|m)(?![^\W_])", re.IGNORECASE)
# "Z as in zebra", "Z for Zulu"
_CALLED_AS = re.compile(
    r"(?<![^\W_])([^\W\d_])(?:,? (?:as in|for|like|is for))? ['\"(]?\1[^\W_]+[)'\"]?",
    re.IGNORECASE,
)
_LETTERS = re.compile("[a-z\u0370-\u052f]+")
_PARTICLES = frozenset("da de di do du el ii iv jr la le lo sr st mr ms dr ph md".split())
_LINKS = frozenset(
    "a an and as at be by for he i if in is it my no of on or so the to up us we".split()
)
_DIGITS = tuple(str.maketrans("0135", letters) for letters in ("oles", "oies"))  # 1 is both l and i
_ENDINGS = ("s", "es", "ed", "d", "er", "r", "ing", "ly", "y", "n", "en", "est", "ish", "like")


@dataclass(frozen=True)
class Word:
    """A word of a text.

    text:   without accents, in its own case
    before: the characters between it and the previous word
    """

    text: str
    before: str

    @property
    def capital(self) -> bool:
        return self.text[0].isupper()

    @property
    def tight(self) -> bool:
        """Joined to the word before: "Zor-blax"."""
        return 0 < len(self.before) <= 2 and not re.search(r"\s", self.before)


@functools.lru_cache(4096)
def words(text: str) -> tuple[Word, ...]:
    """The words of a text, in its own case and without accents. A word that mixes scripts is read
    in Latin letters."""
    simple = text if text.isascii() else re.sub(r"\S+", lambda token: _simple(token[0]), text)
    if "'" in simple:
        simple = _SHORT_VERB.sub("", _NOT.sub("not", simple))
    out, end = [], 0
    for match in _WORD.finditer(simple):
        out.append(Word(match.group(), simple[end : match.start()]))
        end = match.end()
    return tuple(out)


def _simple(token: str) -> str:
    mixed = len({script(c) for c in token} - {""}) > 1
    folded = ((ALIKE if mixed else PLAIN)[c] for c in token)
    return "".join(m.upper() if c.isupper() else m for c, m in zip(token, folded, strict=True))


def misspelt(forms: Sequence[str], parts: Sequence[str], text: str) -> bool:
    """Whether `text` holds a form or a part of a name in another spelling.

    Other spellings:
    - without accents, or with letters that look alike
    - in single letters, as one word, with a hyphen inside (the whole name also with a space)
    - with -s or -es
    - with one error in a capitalised word of 6 letters or more (7 for any word), with two from 10
      letters on
    - a part of two letters as a word with a capital

    An ordinary word is never the misspelt part of a name.
    """
    if not forms:
        return False
    found = words(text)
    # "C++" is not "C"
    whole = [w for form in forms if len(w := _joined(form)) > 1]
    single = {_joined(form) for form in forms if len(words(form)) == 1}
    some = [p for part in parts if (p := _joined(part)) and not ordinary(p)]
    pieces = {_joined(part) for part in parts if len(words(part)) > 1}  # "Jean Luc" for "Jean-Luc"
    spelled = _spelled(words(_CALLED_AS.sub(r"\1", text)))
    runs = [letters for run in spelled for letters in (*_read(run), re.sub(r"\d", "", run.lower()))]
    if any(len(key) > 3 and key in run for key in (*whole, *some) for run in runs):
        return True
    longest = max(len(words(form)) for form in forms) + 2
    for start in range(len(found)):
        first = found[start].text.casefold()
        begins = any(key.startswith(first) for key in (*whole, *some)) or any(
            c in "0135" for c in first
        )
        for end in range(start + 1, min(start + (longest if begins else 1), len(found)) + 1):
            inside = found[start:end]
            keys = [*whole, *some]
            if not all(word.tight for word in inside[1:]):
                if any(not word.tight and word.before != " " for word in inside[1:]):
                    break
                # "in sight" is not "Insight"
                linked = any(word.text.casefold() in _LINKS for word in inside)
                keys = [
                    key
                    for key in keys
                    if key in pieces or (key in whole and not (key in single and linked))
                ]
            if any(_same(key, inside) for key in keys):
                return True
    short = _short(forms[0])
    return bool(short) and any(word.capital and word.text in short for word in found)


# Two questions, so two rules. `misspelt` asks what a reader can take from a text about a name that
# shall be gone: a part suffices, and doubt counts against forgetting. `nearly` says that a text
# calls somebody by another's name: only the whole name says whose it is, and doubt must not count.
def nearly(forms: Sequence[str], text: str) -> bool:
    """Whether `text` gives a whole form with typing errors: at most one wrong, missing or extra
    letter in each word of 4 letters or more. The form has 8 letters or more, and a capital at every
    word."""
    said = words(text)
    for form in forms:
        own = [word.text.casefold() for word in words(form)]
        if sum(map(len, own)) < WHOLE:
            continue
        for start in range(len(said) - len(own) + 1):
            if all(map(_typed, own, said[start : start + len(own)])):
                return True
    return False


def _typed(own: str, word: Word) -> bool:
    most = 1 if len(own) >= WORD else 0
    return word.capital and within(own, word.text.casefold(), most, exchanges=False)


def together(parts: Sequence[str], text: str) -> bool:
    """Whether all parts of a name stand beside each other, in any order, with at most one word
    between ("style of doodles"), or two neighbours as a name ("The Great Wall")."""
    keys = [_joined(part) for part in parts]
    said = [word.text.casefold() for word in words(text)]
    size = len(set(keys))
    if size > 1 and any(set(keys) <= set(said[i : i + size + 1]) for i in range(len(said))):
        return True
    pairs = set(pairwise(keys))
    return any(
        one.capital and other.capital and other.before.isspace() and both in pairs
        for (one, other), both in zip(pairwise(words(text)), pairwise(said), strict=True)
    )


def _same(key: str, inside: Sequence[Word]) -> bool:
    return _reads(key, "".join(word.text for word in inside), inside[0].capital, len(inside) > 1)


@functools.lru_cache(65536)
def _reads(key: str, written: str, capital: bool, several: bool) -> bool:
    for said in _read(written):
        plural = (
            several
            and len(key) >= PLURAL
            and said in (key + "s", key + "es", key.removesuffix("y") + "ies")
        )
        if (said == key or plural) and (several or ordinary(key) or not _derived(said)):
            return not (plural and is_son(said))
        least, most = (LETTERS if capital else LETTERS + 1), (2 if len(key) >= LONG else 1)
        near = (
            not several
            and len(key) >= least
            and abs(len(key) - len(said)) <= most
            and _LETTERS.fullmatch(key)
        )
        if near and not is_son(said) and not _derived(said) and within(key, said, most):
            return True
    return False


def _derived(word: str) -> bool:
    """An ordinary word, or one that is an ordinary word with an ending."""
    stems = [word.removesuffix(ending) for ending in _ENDINGS if word.endswith(ending)]
    return ordinary(word) or any(
        len(stem) > 2 and not ORDINARY.isdisjoint({stem, stem + "e"}) for stem in stems
    )


def _read(written: str) -> Iterator[str]:
    """A word in small letters: as it stands, and with letters for the digits among its letters."""
    said = written.casefold()
    yield said
    if (
        not said.isdigit()
        and (len(said) > 3 or not said[:1].isdigit())
        and any(c in "0135" for c in said)
    ):
        yield from (said.translate(table) for table in _DIGITS)


def _joined(form: str) -> str:
    """The letters of a form in one word."""
    return "".join(word.text for word in words(form)).casefold()


def _spelled(found: Sequence[Word]) -> Iterator[str]:
    """Runs of at least three single letters. An "and" and the numbers of a list end none."""
    run: list[str] = []
    for word in (*found, Word("end", "")):
        if len(word.text) == 1:
            run.append(word.text)
        elif not (word.text == "and" or word.text.isdigit()):
            if len(run) > 2:
                yield "".join(run)
            run = []


def _short(name: str) -> list[str]:
    """The words of two letters in a name, as it writes them. Single letters and words such as "de"
    and "la" identify nobody."""
    own = [word.text for word in words(name)]
    return [
        w
        for w in own
        if len(own) > 1
        and len(w) == 2
        and w[0].isupper()
        and w.isalpha()
        and w.casefold() not in ORDINARY | _PARTICLES
    ]


def within(one: str, other: str, most: int, *, exchanges: bool = True) -> bool:
    """Whether at most `most` insertions, deletions, replacements and exchanges of neighbours turn
    one into the other. exchanges: whether an exchange is one error; otherwise it is two."""
    if abs(len(one) - len(other)) > most:
        return False
    last: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, last, row = last, row, [i]
        for j, b in enumerate(other, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a != b))
            if exchanges and i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
    return row[-1] <= most
