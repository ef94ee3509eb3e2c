"""A name: its forms and parts, and the character spans in which it stands in a text."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..request import BadInput, Request
from . import confusables, lists, skeleton, sounds, spelling, typos, usage
from .confusables import Span, plain
from .needles import Needle, apart, bare, place, ways

COMMON_WORDS = lists.SHARED
# Where numbers and words are run on: "Zorblax99", "VanGogh". "McDonald" is one word.
_NUMBERED = re.compile(r"(?<=[^\W\d_]{3})(?=\d+(?![^\W_]))")
_RUN_ON = re.compile(
    r"(?<=[a-z\u00df-\u00f6\u00f8-\u00ff])(?=[A-Z\u00c0-\u00d6\u00d8-\u00de])"
    r"(?<!\bMc)(?<!\bMac)(?<!\bDe)(?<!\bDi)(?<!\bLa)(?<!\bLe)(?<!\bFitz)"
)


@dataclass(frozen=True)
class Concept:
    """A concept's name and further names of the same concept.

    as_word: for a name of one word that is an ordinary word, too ("rose", "castle").
             True: it counts wherever it stands, as names of things do ("a castle").
             False: it counts only where it is used as a name ("This is Rose.", not "a red rose").
             None: as False if people, bands or firms have that name and it is given with a capital;
             otherwise as True.

    Raises BadInput where a name has no visible character or nothing but punctuation, or is no
    Unicode text.
    """

    name: str
    aliases: tuple[str, ...] = ()
    as_word: bool | None = None

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            # Trap: a byte of the command line that is no UTF-8 arrives as half a surrogate pair.
            if any("\ud800" <= c <= "\udfff" for c in name):
                raise BadInput(f"The name {name!a} is no Unicode text: give it in UTF-8.")
            visible = plain(name).text.strip()
            if not visible:
                raise BadInput(
                    f"The name {name!r} has no visible character: give the name as a person "
                    "writes it."
                )
            if all(unicodedata.category(c)[0] in "PMZ" for c in visible):
                raise BadInput(
                    f"The name {name!r} is punctuation, which stands in every text: give a name "
                    "with a letter."
                )

    def forms(self) -> tuple[str, ...]:
        """The name and the aliases, in NFC, each once."""
        return tuple(
            dict.fromkeys(
                unicodedata.normalize("NFC", n.strip()) for n in (self.name, *self.aliases)
            )
        )

    def parts(self) -> tuple[str, ...]:
        """The words of the name that identify it.

        A part has at least 3 letters (2 where a script writes no spaces), and many names do not
        share it, as they share "the", "van", a title or "German" before another word. A Korean,
        Japanese or Chinese name without a blank also has its given name as a part, and a family
        name of two characters. A name of one word is its own part.
        """
        name = self.forms()[0]
        words = [bare(w) for w in spelling.BREAKS.split(name)]
        if len(words) == 1:
            whole = (
                (name,) if words[0] in ("", name) or not _identifies(words[0]) else (name, words[0])
            )
            halves = [half for *both, known in spelling.divided(words[0]) if known for half in both]
            return tuple(dict.fromkeys((*whole, *(half for half in halves if len(half) > 1))))
        own = [w for w in words if w == words[-1] or plain(w).text not in lists.NATIONS]
        return tuple(dict.fromkeys(filter(_identifies, own)))

    def spans(self, text: str, *, include_parts: bool = True) -> list[Span]:
        """Character spans of `text`, merged and sorted, in which a form (or a part) of the name
        stands.

        The spelling makes no difference:
        - case, accents, the kind of apostrophe and of white space, invisible characters
        - letters that look alike ("Zorbl\u0430x"), letters by themselves ("Z.o.r"), repeated
          letters ("Zorblaaax")
        - digits and signs for letters ("Z0rblax", "Ke$ha" and "Kesha")
        - another script ("\u0418\u0432\u0430\u043d" is "Ivan"), a plural, the endings of its
          language

        A name begins and ends where a word does: "Ann" is in "Ann's" and not in "Annual". Particles
        and forms of address may be written on to it. A part that is an ordinary word counts where
        it is used as a name: "green" is not Will Green. Misspelt names are not here (see
        `leaks_in`).
        """
        return _merged(_places(self, text, include_parts))

    def named_in(self, text: str, *, include_parts: bool = True) -> bool:
        """Whether the name, an alias or (by default) a part of the name stands in `text`."""
        return any(True for _ in _places(self, text, include_parts))

    def given_in(self, text: str) -> bool:
        """Whether `text` gives this name: one of its forms, or a part with a capital. A part in
        small letters may be an ordinary word."""
        for start, end in _places(self, text, True):
            place = text[start:end]
            if place.lower() == place.upper() or place.lstrip("'\"*_(")[:1].isupper():
                return True
        return self.named_in(text, include_parts=False)

    def leaks_in(self, text: str) -> bool:
        """Whether a reader can take the name from `text`: where `named_in` is true, also of words
        that are run on ("VanGogh"), where its parts stand together, and where the name is misspelt
        (see `typos.misspelt`). For measuring what is forgotten."""
        numbered = _NUMBERED.sub(" ", text)
        parts = self.parts() if len(typos.words(self.name)) > 1 else ()
        return (
            any(map(self.named_in, dict.fromkeys((text, numbered, _RUN_ON.sub(" ", numbered)))))
            or typos.together(parts, text)
            or any(
                sounds.nearly_sounding(*spoken, text) or skeleton.sounds_in(spoken[0], text)
                for spoken in _spoken_in(self, text)
            )
            or typos.misspelt([f for f in self.forms() if not _used_as_name(self, f)], parts, text)
        )

    def same(self, name: str) -> bool:
        """Whether `name` is this name, however either is written: "zorblax QUINT" is, "Zorblax" and
        "Mr Zorblax Quint" are not."""
        name = unicodedata.normalize("NFC", name.strip())
        return name in self.forms() or any(
            _is_all_of(form, name) and _is_all_of(name, form) for form in self.forms()
        )


def _identifies(word: str) -> bool:
    """Whether a word of a name has enough letters and is not one that many names share."""
    # Trap: without spaces it is found inside words, too, and one consonant with its vowel signs is
    # a syllable of many.
    enough = (
        sum(map(str.isalpha, word)) >= 2
        if spelling.UNSPACED.search(word)
        else confusables.letters_in(word) >= 3
    )
    return enough and plain(word).text not in COMMON_WORDS


def _is_all_of(name: str, text: str) -> bool:
    return Concept(name, as_word=True).spans(text, include_parts=False) == [(0, len(text))]


def keys_of(form: str) -> set[tuple[str, ...]]:
    """What the key of a text (`confusables.key`) has to hold, so that the form may stand in it in
    its own script: all of one of these."""
    return {needle.keys for needle in ways(form, True, True, False)}


def words_of(form: str) -> list[tuple[str, ...]]:
    """The words of a form, as they are looked for in other scripts."""
    return [words for words, _ in _spoken(Concept(form, as_word=True))]


def concept_of(request: Request) -> Concept:
    """The concept that a request names."""
    return Concept(request.concept, request.aliases, request.as_word)


def ambiguous(concept: Concept) -> str:
    """A sentence for the user where a name of one word is an ordinary word and `as_word` does not
    say how to count it; else ""."""
    if concept.as_word is None:
        for form in concept.forms():
            if len(form.split()) == 1 and usage.ordinary(confusables.unstyled(plain(form).text)):
                how = (
                    "only where it is used as a name"
                    if _used_as_name(concept, form)
                    else "wherever it stands"
                )
                return (
                    f"{form!r} is a word like any other: it counts {how}; --as-word counts it "
                    "everywhere, "
                    "--as-name only as a name."
                )
    return ""


def _used_as_name(concept: Concept, form: str) -> bool:
    """Whether a form of one word counts only where it is used as a name."""
    if len(form.split()) > 1 or concept.as_word is not None:
        return len(form.split()) == 1 and concept.as_word is False
    word = confusables.unstyled(plain(form).text)
    return usage.ordinary(word) and usage.called(word) and form[:1].isupper()


# --------------------------------------------------------------------------------------------------
# the matcher


@functools.lru_cache(maxsize=4096)
def _needles(concept: Concept) -> tuple[Needle, ...]:
    given = (n.strip() for n in (concept.name, *concept.aliases))
    raw = dict.fromkeys((*concept.forms(), *given))
    out = [
        needle for form in raw for needle in ways(form, True, True, _used_as_name(concept, form))
    ]
    own = concept.forms()[0]
    for part in concept.parts():
        if part not in raw:
            only = (
                usage.ordinary(confusables.unstyled(plain(part).text))
                and concept.as_word is not True
            )
            out += ways(part, False, spelling.BREAKS.split(own)[-1].endswith(part), only)
    for form in concept.forms():
        for family, _, _ in spelling.divided(bare(form)) if len(form.split()) == 1 else ():
            pattern = spelling.honoured(family)
            text = plain(family).text
            out.append(Needle(family, text, pattern, (confusables.key(text),), False, False, False))
    return tuple(out)


def _places(concept: Concept, text: str, include_parts: bool) -> Iterator[Span]:
    """Every place of the name in the text, in no order. Places may overlap."""
    needles = _needles(concept)
    divided = confusables.unbroken(text)
    for reading in (plain(text), confusables.alike(text), divided):
        if reading is None:
            continue
        key = reading.key
        for needle in needles:
            if not (include_parts or needle.whole) or any(k not in key for k in needle.keys):
                continue
            if reading is divided and needle.only:
                continue  # how a divided word is used cannot be seen
            for match in needle.pattern.finditer(reading.text):
                if (span := place(needle, reading, match)) is not None:
                    yield span
            if not reading.spelled or needle.spelled is None:
                continue
            for match in needle.spelled.finditer(reading.text):
                if apart(needle, reading.text, match):
                    if (span := reading.span(*match.span(1))) is not None:
                        yield span
    for words, parts in _spoken_in(concept, text):
        for start, end, whole in sounds.sounding(words, parts, text):
            if include_parts or whole:
                yield start, end


Spoken = tuple[tuple[str, ...], tuple[str, ...]]  # words of a form, and parts


def _spoken_in(concept: Concept, text: str) -> tuple[Spoken, ...]:
    """The forms that may be written in another script in `text`."""
    if text.isascii() and concept.name.isascii() and not concept.aliases:
        return ()
    return _spoken(concept)


@functools.lru_cache(maxsize=4096)
def _spoken(concept: Concept) -> tuple[Spoken, ...]:
    """What is looked for in other scripts: the words of each form, and the parts with the first."""
    parts = tuple(p for p in concept.parts() if not usage.ordinary(p))
    out = []
    for n, form in enumerate(concept.forms()):
        words = tuple(w for w in map(bare, spelling.BREAKS.split(form)) if w)
        if words and not _used_as_name(concept, form):
            out.append((words, parts if n == 0 else ()))
    return tuple(out)


def _merged(spans: Iterable[Span]) -> list[Span]:
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
