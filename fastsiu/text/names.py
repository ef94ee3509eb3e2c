"""Which of many names a name is, found without comparing it with each of them.

`Concept.same` decides, but is asked only where the matcher would look at all. That is where the
name's letters hold the letters of the other's words (`concept.keys_of`), or where it sounds like
them in another script (`sounds.Index`). Both are looked up.
"""

from __future__ import annotations

import unicodedata

from .concept import Concept, keys_of, words_of
from .confusables import alike, plain
from .sounds import Index


class Names:
    """Concepts, each under a number."""

    def __init__(self) -> None:
        self._concepts: dict[int, Concept] = {}
        self._forms: dict[str, set[int]] = {}
        # One key of a name, the rarest so far -> all its keys, and the number.
        self._keys: dict[str, list[tuple[tuple[str, ...], int]]] = {}
        self._lengths: set[int] = set()  # of these keys
        self._sounds = Index()

    def add(self, concept: Concept, number: int) -> None:
        self._concepts[number] = concept
        for form in concept.forms():
            self._forms.setdefault(form, set()).add(number)
            for keys in keys_of(form):
                taken = lambda key: (len(self._keys.get(key, ())), -len(key))
                rarest = min(keys or ("",), key=taken)
                self._keys.setdefault(rarest, []).append((keys, number))
                self._lengths.add(len(rarest))
            for words in words_of(form):
                self._sounds.add(words, number)

    def first(self, name: str) -> int | None:
        """The smallest number of a concept that `name` is the name of (`Concept.same`)."""
        for number in sorted(self._may_be(unicodedata.normalize("NFC", name.strip()))):
            if self._concepts[number].same(name):
                return number
        return None

    def _may_be(self, name: str) -> set[int]:
        """The numbers of all concepts that `name` could be the name of, and of a few others."""
        found = set(self._forms.get(name, ()))
        for reading in (plain(name), alike(name)):
            key = "" if reading is None else reading.key
            pieces = {key[i : i + n] for n in self._lengths for i in range(len(key) - n + 1)}
            for piece in pieces & self._keys.keys():
                found |= {n for keys, n in self._keys[piece] if all(k in key for k in keys)}
        return found | self._sounds.find(name)
