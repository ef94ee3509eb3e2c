"""The scripts of India, whose blocks in Unicode have one order: nasals that are written in two
ways, and how a word sounds in Latin letters.

Each consonant has the vowel "a" unless a sign says otherwise. In the languages of the north this
vowel is silent at the end of a word and between two syllables.
"""

from __future__ import annotations

import re

from anyascii import anyascii

from .confusables import script

_BLOCKS = {
    "DEVANAGARI": 0x900,
    "BENGALI": 0x980,
    "GURMUKHI": 0xA00,
    "GUJARATI": 0xA80,
    "ORIYA": 0xB00,
    "TAMIL": 0xB80,
    "TELUGU": 0xC00,
    "KANNADA": 0xC80,
    "MALAYALAM": 0xD00,
}
SCRIPTS = frozenset(_BLOCKS)
_NORTH = frozenset("DEVANAGARI BENGALI GURMUKHI GUJARATI".split())
# Places in a block.
_CANDRABINDU, _ANUSVARA, _VISARGA, _FIRST, _LAST, _NUKTA, _VIRAMA = 1, 2, 3, 0x15, 0x39, 0x3C, 0x4D
_NASALS = (0x19, 0x1E, 0x23, 0x28, 0x2E)  # each of the four consonants before it, and N of all
_N, _P, _M = 0x28, 0x2A, 0x2E
_CONSONANTS = (
    "k kh g gh n ch chh j jh n t th d dh n t th d dh n n p ph b bh m y r r l l l v sh sh s h"
).split()
_DOTTED = {"j": "z", "d": "r", "dh": "rh"}  # what a dot below makes of a consonant
_VOCALIC_R = (0x0B, 0x43)


def _all(*places: int) -> str:
    """These places in the blocks of all scripts that have a sign for nasals."""
    return "".join(
        chr(block + p) for kind, block in _BLOCKS.items() if kind != "TAMIL" for p in places
    )


_NASAL = re.compile(
    f"(?:([{_all(*_NASALS)}])[{_all(_VIRAMA)}]|[{_all(_ANUSVARA)}])"
    f"(?=([{_all(*(n - k for n in _NASALS for k in (1, 2, 3, 4)))}]))"
)


def nasals(pattern: str) -> str:
    """A pattern of a word that has a nasal before a consonant either as a letter or as the sign
    above: "\u0928\u0930\u0947\u0928\u094d\u0926\u094d\u0930" and
    "\u0928\u0930\u0947\u0902\u0926\u094d\u0930"."""
    return _NASAL.sub(_either, pattern)


def _either(match: re.Match[str]) -> str:
    place = ord(match[2]) & 0x7F
    block = ord(match[2]) - place
    own = chr(block + next(n for n in _NASALS if place < n))
    letters = own + chr(block + _N)
    # A sign of another script is no way to write this nasal.
    of_one_script = all(block <= ord(c) < block + 0x80 for c in match[0])
    if not of_one_script or (match[1] and match[1] not in letters):
        return match[0]
    return f"(?:[{letters}]{chr(block + _VIRAMA)}|{chr(block + _ANUSVARA)})"


def without_nasals(word: str) -> list[str]:
    """The pieces of a word that both ways to write its nasals leave in place."""
    return _NASAL.sub(" ", word).split()


def spoken(word: str) -> list[str]:
    """Ways to write a word of these scripts in Latin letters. Empty for other scripts and for a
    word of several."""
    kinds = {kind for c in word if (kind := script(c))}
    if len(kinds) != 1 or not kinds <= SCRIPTS:
        return []
    kind = kinds.pop()
    pairs = _syllables(word, _BLOCKS[kind])
    if kind not in _NORTH:
        return [_joined(pairs)]
    *before, last = range(len(pairs))
    if before and pairs[last][1] == "a'" and pairs[last - 1][1]:
        pairs[last][1] = ""
    whole = _joined(pairs)
    for i in reversed(before[1:]):
        if pairs[i][1] == "a'" and pairs[i - 1][1] and all(pairs[i + 1]):
            pairs[i][1] = ""
    return list(dict.fromkeys((_joined(pairs), whole)))


def _syllables(word: str, block: int) -> list[list[str]]:
    """Consonant and vowel of each syllable; a vowel that is not written is "a'"."""
    pairs: list[list[str]] = []
    for i, c in enumerate(word):
        place = ord(c) - block
        if not 0 <= place < 0x80:
            continue
        if _FIRST <= place <= _LAST:
            pairs.append([_CONSONANTS[place - _FIRST], "a'"])
        elif place in _VOCALIC_R:
            consonant = pairs.pop()[0] if pairs and place > _LAST else ""
            pairs.append([consonant, "ri"])
        elif pairs and place in (_CANDRABINDU, _ANUSVARA):
            lips = _P <= ord(word[i + 1]) - block <= _M if i + 1 < len(word) else False
            pairs[-1][1] = pairs[-1][1].rstrip("'") + ("m" if lips else "n")
        elif pairs and place == _VISARGA:
            pairs[-1][1] = pairs[-1][1].rstrip("'") + "h"
        elif pairs and place == _NUKTA:
            pairs[-1][0] = _DOTTED.get(pairs[-1][0], pairs[-1][0])
        elif pairs and place == _VIRAMA:
            pairs[-1][1] = ""
        elif pairs and _NUKTA < place < _VIRAMA:
            pairs[-1][1] = anyascii(c)
        elif place < _FIRST:
            pairs.append(["", anyascii(c)])
        else:
            pairs.append([anyascii(c), ""])
    return pairs


def _joined(pairs: list[list[str]]) -> str:
    return "".join(consonant + vowel.rstrip("'") for consonant, vowel in pairs)
