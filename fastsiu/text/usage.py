"""Is a word like any other used as a name here? "Green is tall", not "the green door"."""

from __future__ import annotations

import re

from .confusables import PLAIN, plain
from .lists import CALLED, ORDINARY, listed

NEAR = 80  # characters before and after a word that tell how it is used

_SENTENCE = re.compile(r"[.!?\n\u2026\u3002]")  # between two words: a sentence ends here
_SONS = frozenset(listed("sons"))
_SEVERAL = frozenset(listed("several"))
_VERBS = frozenset(listed("verbs"))
_INTRODUCED = frozenset(listed("introduced"))
_TITLES = frozenset(listed("titles"))
_GERMAN = frozenset(listed("german"))


def ordinary(word: str) -> bool:
    """Whether a word is an ordinary word of the lists, or its plural."""
    word = plain(word).text
    return bool(ORDINARY & {word, word.removesuffix("s"), word.removesuffix("es")})


def called(word: str) -> bool:
    """Whether people, bands or firms have this ordinary word as their name."""
    return plain(word).text in CALLED


def is_son(word: str) -> bool:
    """Whether a word is a name of its own that looks like another's plural: "Williams"."""
    return word in _SONS


def several(text: str, start: int) -> bool:
    """Whether the word that begins at `start` is a plural: "the", "two", "both" or a number stands
    before it."""
    word, gap, _ = _last_word(text[max(0, start - NEAR) : start])
    return len(gap) < 3 and (word.lower() in _SEVERAL or word.isdigit())


def as_name(text: str, start: int, end: int, *, alone: bool) -> bool:
    """Is text[start:end], an ordinary word, used as a name there?

    It is where it has a capital inside a sentence ("it is Castle"), follows a title, or is the
    whole text. It also is where it precedes its verb ("Green is"), a comma or a family name.

    alone: whether the word makes a name by itself: "Green." is Will Green, "Hello!" not Hello Kitty
    """
    word = text[start:end]
    before = "".join(c for c in text[max(0, start - NEAR) : start] if PLAIN[c])
    after = "".join(c for c in text[end : end + NEAR] if PLAIN[c])
    if not re.search(r"\w", before) and not re.search(r"\w", after):
        return alone
    previous, gap, at = _last_word(before)
    small = previous.lower().replace("\u2019", "'")
    closed = re.match(r"\W*$|[^\w\s]*[.!?,;:\n]", after) is not None
    if small in _TITLES or re.fullmatch(r"[^\W\d_]", previous) and gap[:1] == ".":
        return word[:1].isupper()
    near = f"{before}{word}{after}"
    if not word[:1].isupper() or (word.isupper() and len(word) > 1 and near.isupper()):
        return alone and near in (near.lower(), near.upper()) and small in _INTRODUCED and closed
    inside = previous != "" and not (_SENTENCE.search(gap) and small not in _TITLES)
    if inside:
        other = _last_word(before[:at])[0].lower()
        if small in _GERMAN or (previous.islower() and other in _GERMAN - {"die", "am", "im"}):
            return False
        rest = re.sub(r"^\W*\w+", "", _sentence(before)) + word + _sentence(after[::-1])[::-1]
        long = re.findall(r"[^\W\d_]{3,}", rest)  # all with a capital: a title
        if previous[:1].isupper() and not ordinary(previous) and len(previous) > 1 and gap == " ":
            return True
        if len(long) < 2 or not all(w[0].isupper() for w in long):
            return True
    following = re.match(r"(['\u2019]s\b|,|\s*\()|\s+([^\W_]+)", after)
    if following is None:
        return alone and closed and not inside and ":" in gap
    if following[1]:
        return True
    behind = following[2]
    return (
        behind.lower() in _VERBS
        or (behind[0].isupper() and not inside and not ordinary(behind))
        or re.fullmatch("[a-z]{2,}ed", behind) is not None
    )


def _last_word(text: str) -> tuple[str, str, int]:
    """The last word of a text, the rest after it, and where the word begins."""
    end = len(text)
    while end and not text[end - 1].isalnum():
        end -= 1
    start = end
    while start and (text[start - 1].isalnum() or text[start - 1] in "_'\u2019"):
        start -= 1
    return text[start:end], text[end:], start


def _sentence(before: str) -> str:
    return re.split(r"[.!?\n\u2026\u3002]", before)[-1]
