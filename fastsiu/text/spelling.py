"""How a name may be written: patterns of its spellings, its endings and its particles, and where a
name without a blank divides into family and given name."""

from __future__ import annotations

import re
import unicodedata

from . import indic
from .confusables import STYLED, letters_in, plain, script, unstyled
from .lists import FACTS, any_of, families, listed, longest_first

PLURAL = 3  # letters that a word must have before an -s

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
SPACED = rf"(?![{_UNSPACED}])[^\W_]"  # a letter or digit beside which another word cannot begin
BEFORE = rf"(?<!{SPACED})"
AFTER = rf"(?!{SPACED}|'t(?!{SPACED}))"  # "Don" is not in "don't"
_DOTS = "\u30fb\u00b7\u2027\u30a0"  # between the words of a name of another language
BREAKS = re.compile(rf"[\s{_DOTS}]+")

_KOREAN = f"(?:{any_of('korean.particles')})"
KOREAN_END = rf"(?=(?:\s?{any_of('korean.honorifics')})?{_KOREAN}{{0,3}}(?![{_HANGUL}]))"
_JAPANESE = f"(?:{any_of('japanese.honorifics')}|{any_of('japanese.particles')})"
KANA_END = rf"(?=(?:{_JAPANESE}){{0,4}}(?![{_HIRAGANA}]))"
_CHINESE = f"(?:{any_of('chinese.honorifics')}|{any_of('chinese.after')})"
_HAN_END = rf"(?=(?:{_JAPANESE}|{_CHINESE})|(?![{_HAN}]))"
_HONOUR = {
    "HANGUL": rf"(?=\s?{any_of('korean.honorifics')}{_KOREAN}{{0,3}}(?![{_HANGUL}]))",
    "CJK": rf"(?=\s?(?:{any_of('japanese.honorifics')}|{any_of('chinese.honorifics')}))",
}
_YEH = "\u064a\u0649"  # one letter at the end of a word in Egypt
# Family names that are words of Korean, too: after a blank only one form of address shows a name.
_DETERMINERS = frozenset("\uc774 \ud55c \uc804 \uc624 \uace0 \uc815 \uc8fc \uc870".split())


def spaced(word: str) -> bool:
    """Whether no letter is of a script that writes no spaces or writes suffixes on."""
    return UNSPACED.search(word) is None


def written(word: str, *, end: bool = False) -> str:
    """A pattern of how a word of a name may be written in a plain text.

    It may have digits and signs for letters, repeated letters, other hyphens and apostrophes or
    none, and the endings of its language.

    end: put the ending into a group `end`
    """
    body = unstyled(word)
    letters = letters_in(body)
    closing = re.search(r"[^\w'$@]+$", body) if letters else None
    core = body[: closing.start()] if closing else body
    stem, endings, own = _bent(core)
    group = "(?P<end>" if end else "(?:"
    pattern = indic.nasals(_letters(stem, letters))
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
    if before and letters >= 3:
        short = () if letters > 3 else listed("endings.words_with_prefix")
        allowed = listed(before if letters > 3 else f"{before}_short")
        ways = [prefix for prefix in allowed if prefix + body not in short]
        pattern = f"(?:{'|'.join(ways)})?{pattern}" if ways else pattern
    literal = re.escape(word)
    return pattern if body == word else f"(?:{literal}|{pattern})"


def _letters(word: str, letters: int) -> str:
    out = []
    held = letters >= 3 and not re.fullmatch("[ivxlcdm]+", word)
    dotted = letters > 0 and all(len(piece) < 2 for piece in word.split("."))
    # Trap: two like neighbours that may both repeat match the same run in exponentially many ways.
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
    count = letters_in(word)
    if kind == "LATIN" and count >= PLURAL:
        longer: list[str] = []
        if count >= 5:
            longer += listed("endings.finnish") + listed("endings.polish")
        if word[-1] not in "iy":
            longer = [e for e in longer if e not in ("ego", "emu")]
        if re.search("[^aeiou\\W]y$", word):
            return word[:-1], "|".join(("ies", "ys", *("y" + e for e in longer))), "y"
        plural = "es|s" if word.endswith("o") else "s"
        if re.search("(?:[sxz]|ch|sh)$", word):
            plural = "es"
        return word, "|".join((plural, *longer)), ""
    if kind == "CYRILLIC":
        own = re.search("(?:[иыо]и|[аяоеиыуь])$", word)
        stem = word[: own.start()] if own else word
        if len(stem) >= (3 if own else 4):
            return stem, _endings("endings.russian", "endings.ukrainian"), own[0] if own else ""
    if kind == "GREEK" and re.search("[οηα]σ$", word) and count >= 5:
        return word[:-2], _endings("endings.greek"), word[-2:]
    if kind == "GREEK" and re.search("[\u03b1\u03b7\u03c9]$", word) and count >= 4:
        return word, "\u03c3", ""
    if kind == "ARABIC" and word[-1] in _YEH and count >= 4:
        return word[:-1], "|".join(_YEH), word[-1]
    if kind == "GEORGIAN" and count >= 4:
        stem = word.removesuffix("ი")
        return stem, _endings("endings.georgian"), word[len(stem) :]
    if kind == "ARMENIAN" and count >= 4:
        return word, _endings("endings.armenian"), ""
    return word, "", ""


def _endings(*entries: str) -> str:
    endings = {ending for entry in entries for ending in listed(entry)}
    return "|".join(map(re.escape, sorted(endings, key=longest_first)))


def stem(word: str) -> str:
    """The letters of a word that every ending leaves in place."""
    return _bent(re.sub(r"[^\w'$@]+$", "", unstyled(word)) or word)[0]


def spelled(letters: str) -> str:
    """A pattern of the letters, each by itself, with the same sign or blank between them all."""
    words = [[_styled(c, 4, first=False) for c in word] for word in letters.split()]
    pattern, rest = words[0][0], words[0][1:]
    if rest:
        pattern += r"(?P<sign>\W{1,3}|_)" + "(?P=sign)".join(rest)
    return pattern + "".join(
        r"(?:(?P=sign)|\s){1,3}" + "(?P=sign)".join(word) for word in words[1:]
    )


def run_on(word: str, *, part: bool) -> str:
    """A pattern of a name in a script that writes no spaces or writes particles on. A name of Han,
    or of at least three Hangul syllables, counts wherever it stands. Shorter Hangul names, kana and
    parts must end where a word does."""
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
    elif re.match(SPACED, first):
        before = BEFORE
    if re.match(f"[{_HANGUL}]", last):
        after = KOREAN_END if part or syllables < 3 else "(?![\u1160-\u11ff])"
    elif re.match(f"[{_HIRAGANA}]", last):
        after = KANA_END
    elif re.match(f"[{_KATAKANA}]", last):
        after = f"(?![{_KATAKANA}])"
    elif re.match(f"[{_HAN}]", last):
        after = _HAN_END if part else ""
    elif re.match(SPACED, last):
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


def divided(name: str) -> list[tuple[str, str, bool]]:
    """Ways to divide a Korean, Japanese or Chinese name without a blank: family name, given name,
    and whether the family name is in the lists. Empty for words that the lists know as no name."""
    name = unicodedata.normalize("NFC", name)
    kinds = {script(c) for c in name}
    if (
        kinds == {"HANGUL"}
        and 3 <= len(name) <= 4
        and name not in FACTS["korean"]["things"].split()
    ):
        return [
            (name[:n], name[n:], True)
            for n in (2, 1)
            if name[:n] in families("korean") and len(name) - n in (1, 2)
        ][:1]
    if (
        "CJK" not in kinds
        or not kinds <= {"CJK", "HIRAGANA", "IDEOGRAPHIC", ""}
        or not 2 <= len(name) <= 6
    ):
        return []
    if any(
        end in (name[-len(end) :], name[: -len(end)] or " ")
        for end in FACTS["japanese"]["suffixes"].split()
    ):
        return []
    known = families("japanese") | families("chinese")
    cuts = [n for n in (3, 2, 1) if len(name) - n in (1, 2, 3) and name[:n] in known]
    return [(name[:n], name[n:], True) for n in cuts] or (
        [(name[:2], name[2:], False)] if len(name) == 4 else []
    )
