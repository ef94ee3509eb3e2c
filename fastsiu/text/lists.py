"""What is known of names: the lists of names.toml, as they are compared."""

from __future__ import annotations

import functools
import re
import tomllib
from importlib import resources
from typing import Any

from .confusables import plain

FACTS: dict[str, Any] = tomllib.loads(
    resources.files(__package__).joinpath("names.toml").read_text(encoding="utf-8")
)


def listed(entry: str) -> tuple[str, ...]:
    """The words of an entry of names.toml ("korean.particles"), folded as `plain` does, the longest
    first."""
    value: Any = FACTS
    for key in entry.split("."):
        value = value[key]
    return tuple(sorted({plain(word).text for word in value.split()}, key=longest_first))


def longest_first(word: str) -> tuple[int, str]:
    """A sort key: in a pattern of alternatives the longest has to be tried first."""
    return -len(word), word


def any_of(entry: str) -> str:
    """A pattern of one of the words of an entry."""
    return "(?:" + "|".join(map(re.escape, listed(entry))) + ")"


@functools.cache
def families(language: str) -> frozenset[str]:
    """Family names of "korean", "japanese" or "chinese", as they are written."""
    return frozenset(FACTS[language]["families"].split())


SHARED = frozenset(listed("shared"))  # words that many names share: they identify nobody
NATIONS = frozenset(listed("nations"))  # they identify nobody before another word
ORDINARY = frozenset(listed("ordinary"))  # words like any other that are parts of names, too
CALLED = frozenset(listed("called"))  # those of them that people, bands and firms are called
