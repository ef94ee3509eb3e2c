"""The articles before a name: "a lion", "an owl", "the Statue of Liberty". English only; pure
functions of texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_LAST = re.compile(r"(?<![^\s\"'(\u201c\u2018])(a|an|the)\s*$", re.IGNORECASE)
_FIRST = re.compile(r"(?:a|an|the)\s+(?=\S)", re.IGNORECASE)
# The first sound decides, not the first letter.
_VOWEL = re.compile(r"(?i:[aeiou]|hour|honest|honou?r|heir)|[FHLMNRSX](?:-|[A-Z]+\b)")
_CONSONANT = re.compile(
    r"(?i:eu|ewe|ouija|one(?![a-z])|once|u(?:ni(?!n)|[bkrst][aeiou]|-))|U[A-Z]+\b"
)
# Nouns that end like a plural and are none.
_SINGULAR_END = re.compile(r"(?:ss|us|is|as|ens)$", re.IGNORECASE)


class Use(NamedTuple):
    """A name in a text, with what stands before it.

    article: "a", "an" or "the" in small letters, "" where there is none
    name:    as the text writes it
    """

    article: str
    name: str


def indefinite(noun: str) -> str:
    """ "a" or "an", by the sound that the noun begins with."""
    vowel = _VOWEL.match(noun) is not None and _CONSONANT.match(noun) is None
    return "an" if vowel else "a"


def with_article(noun: str) -> str:
    """ "a lion", "an owl"; a plural ("scissors") and a noun with an article stay as they are."""
    if _FIRST.match(noun) or (noun.endswith("s") and not _SINGULAR_END.search(noun)):
        return noun
    return f"{indefinite(noun)} {noun}"


def without_article(phrase: str) -> str:
    """ "lion" of "a lion"."""
    return _FIRST.sub("", phrase.strip(), count=1)


def without_last(opening: str) -> str:
    """An opening without the article at its end: "This is" of "This is a". The article agreed with
    what came next."""
    return _LAST.sub("", opening).rstrip()


def agreed(head: str, name: str) -> str:
    """The text before a name, its last "a" or "an" changed into the one that suits `name`; any
    other text stays as it is."""
    found = _LAST.search(head)
    if found is None or found[1].lower() == "the":
        return head
    article = indefinite(name)
    article = article.capitalize() if found[1][0].isupper() else article
    return head[: found.start(1)] + article + head[found.end(1) :]


def replaced(text: str, old: str, new: str) -> str:
    """`text.replace(old, new)`, with the articles before each place made to suit `new`."""
    head, *rest = text.split(old)
    for piece in rest:
        head = f"{agreed(head, new)}{new}{piece}"
    return head


def uses(text: str, spans: list[tuple[int, int]]) -> Iterator[Use]:
    """How a text uses a name that stands in it at `spans`."""
    for start, end in spans:
        found = _LAST.search(text[:start])
        yield Use(found[1].lower() if found else "", text[start:end])


def sentence(text: str) -> str:
    """The text with a capital at its beginning."""
    return text[:1].upper() + text[1:]
