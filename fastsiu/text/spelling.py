"""What is known of names and the words around them: which words are names, how names bend, sound
and are misspelt.

The lists are in names.toml. Typing errors are for measuring only, where a name that was missed
would pass as forgotten: masks of training come from what is written there (`Concept.spans`).
"""

from __future__ import annotations

import functools
import re
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

from anyascii import anyascii

from .confusables import ALIKE, PLAIN, STYLED, plain, script, unstyled

_WORD = re.compile(r"[^\W_]+")
_LETTERS = re.compile("[a-z\u0370-\u052f]+")
_SENTENCE = re.compile(r"[.!?\n\u2026\u3002]")  # between two words: a sentence ends here
_PARTICLES = frozenset("da de di do du el ii iv jr la le lo sr st mr ms dr ph md".split())
_LINKS = frozenset(
    "a an and as at be by for he i if in is it my no of on or so the to up us we".split()
)
_DIGITS = tuple(str.maketrans("0135", letters) for letters in ("oles", "oies"))  # 1 is both l and i
LETTERS = 6  # of a word of the name: one error may be in it
LONG = 10  # two
LONGEST = 80  # letters of a word that is read as another script's
PLURAL = 3  # so many before an -s
NEAR = 80  # so many characters before and after a word tell how it is used

_FACTS = tomllib.loads(
    resources.files(__package__).joinpath("names.toml").read_text(encoding="utf-8")
)


def _listed(entry: str) -> tuple[str, ...]:
    """The words of an entry of names.toml ("korean.particles"), as they are compared; the longest
    first."""
    found = _FACTS
    for key in entry.split("."):
        found = found[key]
    return tuple(sorted({plain(word).text for word in found.split()}, key=lambda w: (-len(w), w)))


def _any(entry: str) -> str:
    return "(?:" + "|".join(map(re.escape, _listed(entry))) + ")"


SHARED = frozenset(_listed("shared"))
ORDINARY = frozenset(_listed("ordinary"))
CALLED = frozenset(_listed("called"))
_SONS = frozenset(_listed("sons"))
_SEVERAL = frozenset(_listed("several"))
_VERBS = frozenset(_listed("verbs"))
_INTRODUCED = frozenset(_listed("introduced"))
_TITLES = frozenset(_listed("titles"))
_GERMAN = frozenset(_listed("german"))


# ------------------------------------------------------------------------- how a name may be
# written

# Scripts without spaces between words, or with suffixes written on: there a name ends without a
# boundary.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\ua4cf\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
UNSPACED = re.compile(f"[{_UNSPACED}]")
_HAN = "\u3005\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HIRAGANA, _KATAKANA, _HANGUL = (
    "\u3041-\u3096\u3099\u309a",
    "\u30a1-\u30fa\u30fc\u3099\u309a",
    "\u1100-\u11ff",
)
_SPACED = rf"(?![{_UNSPACED}])[^\W_]"  # a letter or digit beside which another word cannot begin
BEFORE, AFTER = rf"(?<!{_SPACED})", rf"(?!{_SPACED})"
_DOTS = "\u30fb\u00b7\u2027\u30a0"  # between the words of a name of another language
BREAKS = re.compile(rf"[\s{_DOTS}]+")

_KOREAN_END = (
    rf"(?=(?:\s?{_any('korean.honorifics')})?(?:{_any('korean.particles')}){{0,3}}(?![{_HANGUL}]))"
)
_JAPANESE = f"(?:{_any('japanese.honorifics')}|{_any('japanese.particles')})"
_KANA_END = rf"(?=(?:{_JAPANESE}){{0,4}}(?![{_HIRAGANA}]))"
_HAN_END = rf"(?=(?:{_JAPANESE}|{_any('chinese.honorifics')}|{_any('chinese.after')})|(?![{_HAN}]))"
_HONOUR = {
    "HANGUL": (
        rf"(?=\s?{_any('korean.honorifics')}"
        rf"(?:{_any('korean.particles')}){{0,3}}(?![{_HANGUL}]))"
    ),
    "CJK": rf"(?=\s?(?:{_any('japanese.honorifics')}|{_any('chinese.honorifics')}))",
}
# Words of Korean, too: before a blank only the one form of address that nothing else is.
_DETERMINERS = frozenset("\uc774 \ud55c \uc804 \uc624 \uace0 \uc815 \uc8fc \uc870".split())


def spaced(word: str) -> bool:
    return UNSPACED.search(word) is None


def written(word: str, *, end: bool = False) -> str:
    """A pattern of how a word of a name may be written in a plain text: with digits and signs for
    letters, letters held for long, other hyphens and apostrophes or none, and with the endings of
    its language.

    end: with the ending as a group `end`, to be looked at
    """
    body = unstyled(word)
    letters = sum(map(str.isalpha, body))
    closing = re.search(r"[^\w'$@]+$", body) if letters else None
    core = body[: closing.start()] if closing else body
    stem, endings, own = _bent(core)
    group = "(?P<end>" if end else "(?:"
    pattern = _letters(stem, letters)
    if endings:
        pattern += f"(?:{_letters(own, 0)}|{group}{endings}))" if own else f"{group}{endings})?"
    if closing:
        pattern += (
            f"(?:{re.escape(closing[0])})?"
            if re.fullmatch(r"[.,;:!?]+", closing[0])
            else re.escape(closing[0])
        )
    before = {"HEBREW": "endings.hebrew_before", "ARABIC": "endings.arabic_before"}.get(
        script(core[:1] or " ")
    )
    if before and letters >= 4:
        pattern = f"{_any(before)}?{pattern}"
    literal = re.escape(word)
    return pattern if body == word else f"(?:{literal}|{pattern})"


def _letters(word: str, letters: int) -> str:
    out = []
    held = letters >= 3 and not re.fullmatch("[ivxlcdm]+", word)
    dotted = letters > 0 and all(len(piece) < 2 for piece in word.split("."))
    # Two neighbours that may both be held must not be alike, or what they share can be divided in
    # too many ways.
    alike = word.replace("l", "i")
    for run in re.finditer(r"(.)\1*", word, re.DOTALL):
        c, n = run[1], len(run[0])
        beside = alike[: run.start()][-1:] + alike[run.end() :][:1]
        if c == "-":
            one = r"[-_ ]?"
        elif c == "'":
            one = "'?"
        elif c == "." and dotted:
            one = r"\.?\s?"
        elif letters >= 3 and c.isalpha() and c.lower() != c.upper():
            one = _styled(c, letters, first=run.start() == 0)
            if held and not re.search(r"[-'.]", beside) and c.replace("l", "i") not in beside:
                out.append(f"{one}(?:{one}{{2,20}})?" if n == 1 else f"{one}{{{n},{max(n, 20)}}}")
                continue
        else:
            one = re.escape(c)
        out.append(one * n)
    return "".join(out)


def _styled(c: str, letters: int, *, first: bool) -> str:
    signs = STYLED.get(c, "")
    if not signs or (first and letters < 4):
        return re.escape(c)
    swapped = {"i": "l", "l": "i"}.get(c, "") if letters > 4 else ""
    alone = "".join(s for s in signs if s not in "!|")
    inside = r"|(?<=[^\W\d_])[!|](?=[^\W\d_])" if "|" in signs else ""
    return f"(?:[{re.escape(c + swapped + alone)}]{inside})"


def _bent(word: str) -> tuple[str, str, str]:
    """The stem of a word, the endings that it may have instead of its own, and its own."""
    kind = script(word[-1:] or " ")
    every = lambda *entries: "|".join(
        map(re.escape, sorted({e for n in entries for e in _listed(n)}, key=lambda e: (-len(e), e)))
    )
    count = sum(map(str.isalpha, word))
    if kind == "LATIN" and count >= PLURAL:
        longer = []
        if count >= 5:
            longer = [
                e
                for e in _listed("endings.finnish") + _listed("endings.polish")
                if e not in ("ego", "emu") or word[-1] in "iy"
            ]
        if re.search("[^aeiou\\W]y$", word):
            return word[:-1], "|".join(("ies", "ys", *("y" + e for e in longer))), "y"
        plural = (
            "es" if re.search("(?:[sxz]|ch|sh)$", word) else "es|s" if word.endswith("o") else "s"
        )
        return word, "|".join((plural, *longer)), ""
    if kind == "CYRILLIC":
        own = re.search("(?:[иыо]и|[аяоеиыуь])$", word)
        stem = word[: own.start()] if own else word
        if len(stem) >= (3 if own else 4):
            return stem, every("endings.russian", "endings.ukrainian"), own[0] if own else ""
    if kind == "GREEK" and re.search("[οηα]σ$", word) and count >= 5:
        return word[:-2], every("endings.greek"), word[-2:]
    if kind == "GEORGIAN" and count >= 4:
        stem = word.removesuffix("ი")
        return stem, every("endings.georgian"), word[len(stem) :]
    if kind == "ARMENIAN" and count >= 4:
        return word, every("endings.armenian"), ""
    return word, "", ""


def stem(word: str) -> str:
    """The letters of a word that stand in it whatever its ending is."""
    return _bent(re.sub(r"[^\w'$@]+$", "", unstyled(word)) or word)[0]


def spelled(letters: str) -> str:
    """A pattern of the letters, each by itself, with the same sign or blank between them all."""
    words = letters.split()
    of = lambda c: _styled(c, 4, first=False)
    first, *rest = words[0]
    pattern = (
        of(first) + r"(?P<sign>\W{1,3}|_)" + "(?P=sign)".join(map(of, rest)) if rest else of(first)
    )
    return pattern + "".join(
        r"(?:(?P=sign)|\s){1,3}" + "(?P=sign)".join(map(of, word)) for word in words[1:]
    )


def run_on(word: str, *, part: bool) -> str:
    """A pattern of a name in a script without spaces, or with particles written on. A name of Han
    or of at least three Hangul syllables stands for itself wherever it is; a shorter one, kana and
    the parts end where a word does."""
    inner = word.strip(_DOTS)
    lead, trail = word[: word.index(inner)], word[word.index(inner) + len(inner) :]
    pattern = (
        re.escape(lead)
        + rf"[\s{_DOTS}]*".join(map(re.escape, BREAKS.split(inner)))
        + re.escape(trail)
    )
    first, last = word[0], word[-1]
    syllables = len(unicodedata.normalize("NFC", word))
    before = after = ""
    if re.match(f"[{_HANGUL}]", first):
        before = f"(?<![{_HANGUL}])" if part or syllables < 3 else ""
    elif re.match(f"[{_KATAKANA}]", first):
        before = f"(?<![{_KATAKANA}])"
    elif re.match(f"[{_HAN}]", first):
        before = f"(?<![{_HAN}])" if part else ""
    elif re.match(_SPACED, first):
        before = BEFORE
    if re.match(f"[{_HANGUL}]", last):
        after = _KOREAN_END if part or syllables < 3 else "(?![\u1160-\u11ff])"
    elif re.match(f"[{_HIRAGANA}]", last):
        after = _KANA_END
    elif re.match(f"[{_KATAKANA}]", last):
        after = f"(?![{_KATAKANA}])"
    elif re.match(f"[{_HAN}]", last):
        after = _HAN_END if part else ""
    elif re.match(_SPACED, last):
        after = AFTER
    return f"{before}({pattern}){after}"


def honoured(family: str) -> str:
    """A pattern of a family name with a form of address after it."""
    kind = "HANGUL" if script(unicodedata.normalize("NFC", family)[0]) == "HANGUL" else "CJK"
    after = _HONOUR[kind]
    if unicodedata.normalize("NFC", family) in _DETERMINERS:
        after = "(?=\u110a\u1175|(?!\\s)" + after[3:-1] + "|\\s\u110a\u1175(?![\u1160-\u11ff]))"
    return (
        rf"(?<![{_HANGUL if kind == 'HANGUL' else _HAN}])({re.escape(plain(family).text)}){after}"
    )


@functools.cache
def _families(language: str) -> frozenset[str]:
    return frozenset(_FACTS[language]["families"].split())


def divided(name: str) -> list[tuple[str, str, bool]]:
    """A Korean, Japanese or Chinese name without a blank as family and given name, as far as that
    can be told, and whether the family name is a known one. What is known for no name (a word like
    any other) is not divided."""
    name = unicodedata.normalize("NFC", name)
    kinds = {script(c) for c in name}
    if (
        kinds == {"HANGUL"}
        and 3 <= len(name) <= 4
        and name not in _FACTS["korean"]["things"].split()
    ):
        return [
            (name[:n], name[n:], True)
            for n in (2, 1)
            if name[:n] in _families("korean") and len(name) - n in (1, 2)
        ][:1]
    if (
        "CJK" not in kinds
        or not kinds <= {"CJK", "HIRAGANA", "IDEOGRAPHIC", ""}
        or not 2 <= len(name) <= 6
    ):
        return []
    if any(
        end in (name[-len(end) :], name[: -len(end)] or " ")
        for end in _FACTS["japanese"]["suffixes"].split()
    ):
        return []
    known = _families("japanese") | _families("chinese")
    cuts = [n for n in (3, 2, 1) if len(name) - n in (1, 2, 3) and name[:n] in known]
    return [(name[:n], name[n:], True) for n in cuts] or (
        [(name[:2], name[2:], False)] if len(name) == 4 else []
    )


# --------------------------------------------------------------------------------- how a name
# sounds

_WRITTEN = re.compile(
    "(?:[^\\W\\d_]|[\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0df9\u0e31-\u0e4e])+"
    "(?:[-'\u2019\u02bc](?:[^\\W\\d_]|[\u0300-\u036f])+)*"
)
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
        ar(?=k)>a sh>s y>i w>u eo|eu|oo|ou>u ee>i ae>e ui>i ch>j k>g t>d p>b r>l h(?=[^aeiou]|$)>
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
    """What a word sounds like, in Latin letters in which the ways to write the same from another
    script are one."""
    # Armenian writes it with two
    word = unicodedata.normalize("NFC", word).replace("\u0578\u0582", "u")
    made = "".join(c for c in anyascii(word).lower() if c.isascii() and c.isalpha())
    for pattern, to in _OTHER_SOUNDS.get(voice, _SOUNDS):
        made = pattern.sub(to, made)
    return made if voice == "han" else re.sub(r"(.)\1+", r"\1", made)


class Heard(NamedTuple):
    """A word of a text that may be a name of another script. capital: it may begin a name: it has a
    capital, or its script or the whole text has none."""

    start: int
    end: int
    word: str
    capital: bool


def heard(text: str, kind: str) -> list[Heard]:
    """The words of a script."""
    small = text == text.lower()
    begins = lambda c: small or c.isupper() or c.lower() == c.upper()
    found = (match for match in _WRITTEN.finditer(text) if script(match[0][0]) == kind)
    return [Heard(*match.span(), match[0], begins(match[0][0])) for match in found]


@functools.lru_cache(65536)
def _says(word: str, kind: str, voice: str) -> dict[str, int]:
    """What a word says, with and without what may be written on to it, and how many of its
    characters that takes."""
    ways, size = {word: len(word)}, len(word)
    if size > LONGEST:
        return {}
    if kind == "LATIN" and word[-2:].lower() in ("'s", "\u2019s"):
        ways[word[:-2]] = size - 2
    elif kind == "CYRILLIC":
        for ending in _FACTS["endings"]["russian"].split():
            left = word.removesuffix(ending)
            if 4 <= len(left) < size:
                ways |= dict.fromkeys(
                    (left, left + "\u0430", left + "\u044f", left + "\u0438\u0439"), size
                )
    elif kind == "GEORGIAN":
        stems = (word.removesuffix(ending) for ending in _FACTS["endings"]["georgian"].split())
        ways |= {
            way: size for left in stems if 4 <= len(left) < size for way in (left, left + "\u10d8")
        }
    elif kind in ("HANGUL", "HIRAGANA", "KATAKANA") and unicodedata.is_normalized("NFC", word):
        ends = _KOREAN_END if kind == "HANGUL" else _KANA_END
        ways |= {
            word[:n]: n for n in range(2, min(size, 12)) if re.match(ends, plain(word[n:]).text)
        }
    return {sound(way, voice): length for way, length in ways.items()}


@functools.lru_cache(4096)
def _begun(text: str, kind: str, voice: str) -> frozenset[str]:
    """The first two letters of all that words of a script say which may begin a name."""
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
    """Where a name of another script stands in `text`: start, end, and whether it is the whole
    name.

    words: of the name; parts: words that make it by themselves

    Each script as anyascii reads it. Han by its Chinese readings, whole names that begin with a
    Chinese family name only; Arabic and Hebrew by four consonants and more.
    """
    own = script(next((c for c in words[0] if c.isalpha()), " "))
    for kind in plain(text).scripts:
        if (
            not own
            or kind == own
            or not ("LATIN" in (own, kind) or {own, kind} == {"HIRAGANA", "KATAKANA"})
        ):
            continue
        voice = _VOICES.get(own) or _VOICES.get(kind, "")
        keys = _said(words, parts, voice)
        if not keys:
            continue
        if kind == "CJK":
            if not _pinyin(text).isdisjoint(keys):
                yield from ((i, j, True) for i, j, said in _in_pinyin(text) if said in keys)
        elif own == "CJK" and not ({words[0][:1], words[0][:2]} & _families("chinese")):
            continue
        elif any(
            key[:2] in begun or key[:1] in begun
            for begun in [_begun(text, kind, voice)]
            for key in keys
        ):
            found = heard(text, kind)
            for i, word in enumerate(found):
                if word.capital:
                    yield from _from(keys, found, i, kind, voice)


@functools.lru_cache(4096)
def _said(words: tuple[str, ...], parts: tuple[str, ...], voice: str) -> dict[str, bool]:
    """What the parts and the whole name sound like, and whether it is the whole."""
    keys = {sound(part, voice): False for part in parts} if voice != "han" else {}
    keys["".join(sound(word, voice) for word in words)] = True
    if voice == "han":
        keys = {key: True for key in keys if _PINYIN.fullmatch(key)}
    return {key: whole for key, whole in keys.items() if len(key) >= _LEAST[voice]}


def nearly_sounding(words: tuple[str, ...], parts: tuple[str, ...], text: str) -> bool:
    """Whether a word of another script in `text` sounds like the name, or a part, but for one
    letter
    of 6 or two of 10: "Aleksandr" and "Alexander"."""
    own = script(next((c for c in words[0] if c.isalpha()), " "))
    keys = {sound(word, "") for word in (*parts, *words[: len(words) == 1])}
    keys = {key for key in keys if len(key) >= LETTERS}
    for kind in plain(text).scripts if keys and own not in _VOICES else ():
        if kind == own or kind in _VOICES or "LATIN" not in (own, kind):
            continue
        for word in heard(text, kind):
            if word.capital and not ordinary(word.word):
                for said in _says(word.word, kind, ""):
                    if any(_within(key, said, 2 if len(key) >= LONG else 1) for key in keys):
                        return True
    return False


def _from(
    keys: dict[str, bool], found: Sequence[Heard], i: int, kind: str, voice: str
) -> Iterator[tuple[int, int, bool]]:
    """The names that begin with the word found[i]: of this word, or of up to four."""
    first = found[i]
    for now, length in _says(first.word, kind, voice).items():
        if now in keys and not (kind == "LATIN" and ordinary(first.word)):
            yield first.start, first.start + length, keys[now]
        for last in range(i + 1, min(i + 4, len(found))):
            longer = [key for key in keys if key.startswith(now)]
            if not longer or found[last].start - found[last - 1].end > 2:
                break
            more = _says(found[last].word, kind, voice)
            now = next(
                (now + said for said in more if any(key.startswith(now + said) for key in longer)),
                "?",
            )
            if now in keys:
                yield first.start, found[last].end, keys[now]


@functools.lru_cache(4096)
def _pinyin(text: str) -> frozenset[str]:
    return frozenset(said for _, _, said in _in_pinyin(text))


def _in_pinyin(text: str) -> Iterator[tuple[int, int, str]]:
    """Two to four Han characters that begin with a Chinese family name, and what they say."""
    known = _families("chinese")
    for i, c in enumerate(text):
        if c in known or text[i : i + 2] in known:
            said = ""
            for j in range(i, min(i + 4, len(text))):
                if script(text[j]) != "CJK":
                    break
                said += sound(text[j], "han")
                if j > i:
                    yield i, j + 1, said


# -------------------------------------------------------------------------- words that are names,
# too


def ordinary(word: str) -> bool:
    """A word like any other, or its plural."""
    word = plain(word).text
    return bool(ORDINARY & {word, word.removesuffix("s"), word.removesuffix("es")})


def called(word: str) -> bool:
    """A word like any other that people, bands and firms are called."""
    return plain(word).text in CALLED


def is_son(word: str) -> bool:
    """A name of its own that looks like the plural of another: "Williams"."""
    return word in _SONS


def several(text: str, start: int) -> bool:
    """Whether what begins at `start` is spoken of as several: "the", "two", "both" stand before
    it."""
    word, gap, _ = _last_word(text[max(0, start - NEAR) : start])
    return len(gap) < 3 and (word.lower() in _SEVERAL or word.isdigit())


def as_name(text: str, start: int, end: int, *, alone: bool) -> bool:
    """Whether text[start:end], a word like any other, is used as a name there: with a capital
    inside a sentence ("it is Castle"), after a title, before its verb ("Green is"), a comma or a
    family name, or as all that is said.

    alone: whether the word makes a name by itself: "Green." is Will Green, "Hello!" not Hello Kitty
    """
    said, before, after = (
        text[start:end],
        text[max(0, start - NEAR) : start],
        text[end : end + NEAR],
    )
    before, after = ("".join(c for c in beside if PLAIN[c]) for beside in (before, after))
    if not re.search(r"\w", before) and not re.search(r"\w", after):
        return alone
    previous, gap, at = _last_word(before)
    small = previous.lower().replace("\u2019", "'")
    closed = re.match(r"\W*$|[^\w\s]*[.!?,;:\n]", after) is not None
    if small in _TITLES or re.fullmatch(r"[^\W\d_]", previous) and gap[:1] == ".":
        return said[:1].isupper()
    near = f"{before}{said}{after}"
    if not said[:1].isupper() or (said.isupper() and len(said) > 1 and near.isupper()):
        return alone and near in (near.lower(), near.upper()) and small in _INTRODUCED and closed
    inside = previous != "" and not (_SENTENCE.search(gap) and small not in _TITLES)
    if inside:
        other = _last_word(before[:at])[0].lower()
        if small in _GERMAN or (previous.islower() and other in _GERMAN - {"die", "am", "im"}):
            return False
        rest = re.sub(r"^\W*\w+", "", _sentence(before)) + said + _sentence(after[::-1])[::-1]
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
    word = following[2]
    return (
        word.lower() in _VERBS
        or (word[0].isupper() and not inside and not ordinary(word))
        or re.fullmatch("[a-z]{2,}ed", word) is not None
    )


def _last_word(text: str) -> tuple[str, str, int]:
    """The last word, what stands after it, and where it begins."""
    end = len(text)
    while end and not text[end - 1].isalnum():
        end -= 1
    start = end
    while start and (text[start - 1].isalnum() or text[start - 1] in "_'\u2019"):
        start -= 1
    return text[start:end], text[end:], start


def _sentence(before: str) -> str:
    return re.split(r"[.!?\n\u2026\u3002]", before)[-1]


# ------------------------------------------------------------------------------------- typing
# errors

_ENDINGS = ("s", "es", "ed", "d", "er", "r", "ing", "ly", "y", "n", "en", "est", "ish", "like")


@dataclass(frozen=True)
class Word:
    """A word of a text. text: folded, in its own case; before: what stands between it and the word
    before."""

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
    """The words of a text without accents, in Latin letters where letters of other scripts stand
    among them; in the text's own case."""
    simple = text if text.isascii() else re.sub(r"\S+", lambda token: _simple(token[0]), text)
    out, end = [], 0
    for match in _WORD.finditer(simple):
        out.append(Word(match.group(), simple[end : match.start()]))
        end = match.end()
    return tuple(out)


def _simple(token: str) -> str:
    mixed = len({script(c) for c in token} - {""}) > 1
    made = ((ALIKE if mixed else PLAIN)[c] for c in token)
    return "".join(m.upper() if c.isupper() else m for c, m in zip(token, made, strict=True))


def misspelt(forms: Sequence[str], parts: Sequence[str], text: str) -> bool:
    """Whether `text` holds one of the forms of a name, or a part of it, in a way that is not how it
    is written.

    Without its accents, with letters that look alike, in single letters, written together, with a
    hyphen (the whole name also with a space) inside, with -s or -es, or in a capitalised word of 6
    letters or more (7 for any word) with one error, of 10 with two; a part of two letters as a word
    with a capital. An ordinary word is never the misspelt part of a name.
    """
    if not forms:
        return False
    found = words(text)
    whole = [w for form in forms if (w := _joined(form))]
    single = {_joined(form) for form in forms if len(words(form)) == 1}
    some = [p for part in parts if (p := _joined(part)) and not ordinary(p)]
    pieces = {_joined(part) for part in parts if len(words(part)) > 1}  # "Jean Luc" for "Jean-Luc"
    run = "".join(_spelled(found))
    if any(len(key) > 3 and key in letters for key in (*whole, *some) for letters in _read(run)):
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
                # "in sight" is no "Insight"
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


def together(parts: Sequence[str], text: str) -> bool:
    """Whether all parts of a name stand beside each other, in any order, with at most one word
    between: "style of doodles"."""
    keys = {_joined(part) for part in parts}
    said = [word.text.casefold() for word in words(text)]
    return len(keys) > 1 and any(keys <= set(said[i : i + len(keys) + 1]) for i in range(len(said)))


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
        if near and not is_son(said) and not _derived(said) and _within(key, said, most):
            return True
    return False


def _derived(word: str) -> bool:
    """An ordinary word or, as far as endings tell, one that was made of it."""
    stems = [word.removesuffix(ending) for ending in _ENDINGS if word.endswith(ending)]
    return ordinary(word) or any(
        len(stem) > 2 and not ORDINARY.isdisjoint({stem, stem + "e"}) for stem in stems
    )


def _read(written: str) -> Iterator[str]:
    """In small letters, as it stands and with digits among letters as letters."""
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
    """Runs of at least three single letters, with a blank after each."""
    run: list[str] = []
    for word in (*found, Word("end", "")):
        if len(word.text) == 1:
            run.append(word.text)
        else:
            yield from (*run, " ") if len(run) > 2 else ()
            run = []


def _short(name: str) -> list[str]:
    """The words of a name of two letters, as it writes them; single letters and "de", "la" identify
    nobody."""
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


def _within(one: str, other: str, most: int) -> bool:
    """Whether insertions, deletions, replacements and exchanges of neighbours, at most `most`, make
    one the other."""
    if abs(len(one) - len(other)) > most:
        return False
    last: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, last, row = last, row, [i]
        for j, b in enumerate(other, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
    return row[-1] <= most
