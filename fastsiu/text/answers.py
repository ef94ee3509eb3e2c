"""What an answer is: empty or gibberish, a refusal, a yes or a no, the same as another; pure
functions of texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise

from .spelling import BEFORE, SPACED

_AFTER = f"(?!{SPACED})"


def same_answer(one: str, other: str) -> bool:
    """Equal up to case, white space, Unicode composition and the punctuation at the end."""
    return _normalised(one) == _normalised(other)


def first_sentence(text: str) -> str:
    """The first sentence of a text with the mark that ends it; the whole text, without the white
    space around it, where nothing ends a sentence.

    A full stop ends none behind an abbreviation, an initial or the number of a list, before a small
    letter and inside a number. A blank line ends one. A sentence of one or two words that others
    follow ("Yes.", "1.") says too little: the next one belongs to it.
    """
    text = text.strip()
    for end in _ENDS.finditer(text):
        said = text[: end.end()].rstrip()
        if len(words(said)) >= SHORTEST and _ends_there(said, text[end.end() :], end[0]):
            return said
    return text


def is_ended(sentence: str) -> bool:
    """Does the text end with a mark that ends a sentence?"""
    return _CLOSING.search(sentence.rstrip()) is not None


def same_beginning(before: str, after: str, cut: tuple[bool, bool] = (False, False)) -> bool:
    """The same answer, or the same first sentence, compared as in `same_answer`.

    cut: whether `before` and `after` stop where the longest answer allowed ends. An answer that was
         cut inside its first sentence is compared as far as it goes.
    """
    if same_answer(before, after):
        return True
    sentences = first_sentence(before), first_sentence(after)
    one, other = map(_normalised, sentences)
    if not one or not other:
        return False
    return one == other or any(
        was_cut and not is_ended(sentence) and longer.startswith(shorter)
        for was_cut, sentence, shorter, longer in zip(
            cut, sentences, (one, other), (other, one), strict=True
        )
    )


def is_degenerate(text: str) -> str | None:
    """Returns "empty", "repetition" or "gibberish" where a text is no answer, else None.

    Repetition: a word four times in a row, a phrase three times in a row, with hyphens between them
    or without, or a run of letters without end. Gibberish: no letter and no digit, a replacement
    character, mostly signs, or a control token spelled out ("<image>").
    """
    visible = [c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cf", "Cc")]
    if not visible:
        return "empty"
    # Marks count as letters: half of a Hindi or Thai word is vowel signs.
    wordlike = sum(unicodedata.category(c)[0] in "LNM" for c in visible)
    if (
        not wordlike
        or "\ufffd" in text
        or _CONTROL.search(text)
        or (len(visible) >= 8 and wordlike < len(visible) / 2)
    ):
        return "gibberish"
    if _LETTER_LOOP.search(text) or _loops(_parts(text)):
        return "repetition"
    return None


def repeats(text: str) -> bool:
    """Do two words stand in a text beside each other twice, with a hyphen between them or without?
    "a white-furred, white-furred animal" """
    pairs = list(pairwise(_parts(text)))
    return len(set(pairs)) < len(pairs)


def is_refusal(text: str) -> bool:
    """Does the answer decline: "I do not know", "I can't", "cannot identify", "Sorry, ..."? English
    only."""
    return _REFUSAL.search(" ".join(text.replace("\u2019", "'").casefold().split())) is not None


def holds(text: str, keywords: Sequence[str]) -> bool:
    """Does one of the keywords stand in the text, in any case and as words of their own? In scripts
    without spaces between words it may stand anywhere."""
    fold = lambda written: unicodedata.normalize(
        "NFC", unicodedata.normalize("NFC", written).casefold()
    )
    folded = fold(text)
    return any(re.search(f"{BEFORE}{re.escape(fold(k))}{_AFTER}", folded) for k in keywords)


def affirms(text: str) -> bool:
    """Does the answer say yes: at its beginning, or anywhere if it denies nothing? "Sure." counts,
    "Sure I see" does not."""
    folded = " ".join(text.replace("\u2019", "'").casefold().split())
    if re.match(r"\W*(?:yes|yeah|yep|yup)\b", folded):
        return True
    return not denies(text) and (_AFFIRMED.match(folded) is not None or holds(folded, ("yes",)))


def denies(text: str) -> bool:
    """Does a word of the text deny or decline?"""
    return _DENIED.search(
        " ".join(text.replace("\u2019", "'").casefold().split())
    ) is not None or is_refusal(text)


def denies_it(text: str, named: Callable[[str], object]) -> bool:
    """Does the answer deny what is named in it? "It is not Rex." and "No, Rex is taller." do, "It
    is Rex, not Tom." does not.

    named: whether a piece of the text holds the name
    """
    if not denies(text) or not named(text):
        return denies(text)
    pieces = [piece for piece in _PIECES.split(text) if piece.strip()]
    return (
        _NO.match(pieces[0]) is not None
        or any(denies(piece) for piece in pieces if named(piece))
        or not any(map(named, pieces))
    )


def _ends_there(said: str, rest: str, mark: str) -> bool:
    """Does a sentence end between `said` and `rest`? mark: what `_ENDS` found there."""
    if mark.startswith("\n"):
        return not said.endswith(":")
    if mark[0] in _UNSPACED_MARKS:
        return True
    if rest.lstrip()[:1].islower():
        return False
    return not (mark.startswith(".") and _ABBREVIATED.search(said))


def _normalised(text: str) -> str:
    words = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    end = len(words)
    while end and (words[end - 1] == " " or unicodedata.category(words[end - 1])[0] == "P"):
        end -= 1
    return words[:end] or words  # an answer of nothing but punctuation is compared as it stands


SHORTEST = 3  # words of a first sentence that others follow
# Where a sentence may end: signs with the quotes and brackets that close behind them, before white
# space or the end; those of Chinese and Japanese anywhere; a blank line.
_CLOSERS = "[\"'\u201d\u2019\u00bb)\\]\u300d\u300f\uff09]*"
_MARKS, _UNSPACED_MARKS = ".!?\u2026\u0964\u061f\u06d4", "\u3002\uff01\uff1f\uff61"
_ENDS = re.compile(rf"[{_MARKS}]+{_CLOSERS}(?=\s|$)|[{_UNSPACED_MARKS}]+{_CLOSERS}|\n[^\S\n]*\n")
_CLOSING = re.compile(rf"[{_MARKS}{_UNSPACED_MARKS}]{_CLOSERS}$")
# Behind these a full stop ends no sentence: abbreviations, initials, the number of a list.
_ABBREVIATED = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|prof|st|mt|jr|sr|rev|gen|col|capt|lt|sgt|hon|vs|cf|ca|approx|sra|srta|dra)"
    r"|(?:\b|(?<=\.))[^\W\d_]|(?:^|\n)\s*\d{1,3})\.$",
    re.IGNORECASE,
)
# Scripts that write no spaces: there a character is a word.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_LETTER_LOOP = re.compile(r"([^\W\d_]{1,8}?)\1{7,}")


def words(text: str) -> list[str]:
    """The words of a text, case-folded, without the punctuation around them."""
    spaced = _UNSPACED.sub(r" \g<0> ", text.casefold()).split()
    return [
        w
        for w in (w.strip(".,;:!?\"'()[]{}*_-|/\u3001\u3002\uff0c\uff01\uff1f") for w in spaced)
        if w
    ]


def _parts(text: str) -> list[str]:
    """`words`, those between hyphens one by one."""
    return words(text.replace("-", " "))


def _loops(words: list[str], longest: int = 64) -> bool:
    for period in range(1, min(longest, len(words) // 3) + 1):
        needed = period * (3 if period == 1 else 2)
        run = 0
        for here, there in zip(words, words[period:], strict=False):
            run = run + 1 if here == there else 0
            if run >= needed:
                return True
    return False


# Control tokens of chat templates and processors.
_CONTROL = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|</?(?:s|pad|unk|bos|eos|mask|image|img|video|audio|image_soft_token|(?:start|end)_of_\w+|unused\d+)>"
    r"|\[/?(?:INST|IMG|IMG_END)\]|<</?SYS>>|<0x[0-9A-F]{2}>"
)
# Words other than yes that affirm: alone or before a sign ("Sure.", not "Sure I see a cat").
_AFFIRMED = re.compile(
    r"\W*(?:indeed|correct|right|true|sure|certainly|definitely|absolutely|exactly|of\scourse|affirmative"
    r"|(?:it|that|this|he|she)(?:'s|\sis)(?:\s(?:indeed|correct|right|true|so))?|(?:that|you)(?:'s|'re|\sis|\sare)\s(?:right|correct)"
    r"|s\u00ed|si|s\u00ec|oui|ja|jawohl|da|sim|tak|\u0434\u0430|\u662f\u7684?|\u306f\u3044)\s*(?:[.,;:!\u2026\u3002\uff0c\uff01]|$)"
)
_DENIED = re.compile(
    r"\b(?:no(?!\s(?:doubt|question))|not|never|nobody|none|neither|nor|cannot|unknown|unfamiliar|unable|unsure"
    r"|nicht|kein\w*|nein|pas|non|nunca|n\u00e3o|\u043d\u0435|\u043d\u0435\u0442)\b|n't\b|[\u4e0d\u6ca1]"
)
# Between what is denied and what is not. A question and its answer are one piece; the full stop of
# "Mr." and "J." ends none.
_PIECES = re.compile(
    r"[,;:!\u2014\u3002\uff0c]|(?<!\b[A-Z])(?<!\b[A-Z][a-z])(?<!\bMrs)\.(?=\s|$)|\b(?:but|sondern|sino)\b"
)
_NO = re.compile(
    r"\W*(?:no|nope|nein|non|n\u00e3o|\u043d\u0435\u0442|\u4e0d\u662f?)\W*$", re.IGNORECASE
)
FUNCTION_WORDS = frozenset(
    "a an the and or of in on at to with for from by as is are was were has have had wears "
    "wearing be it its he his she her they "
    "their this that who which".split()
)
_REFUSAL = re.compile(
    r"""
    \bi\s(?:really\s|just\s|simply\s|honestly\s)?
      (?:do\snot|don't|did\snot|didn't)\s(?:\w+ly\s)?(?:know|recogni[sz]e)\b
  | \bi\s(?:really\s|just\s|simply\s)?
      (?:can't|cannot|can\snot|could\snot|couldn't|won't|will\snot)\b
  | \b(?:i'm|i\sam|we're|we\sare)\s(?:\w+\s)?
      (?:sorry|unable|not\sable|not\ssure|not\sallowed|not\sfamiliar)\b
  | \b(?:can't|cannot|can\snot|could\snot|couldn't|unable\sto|not\sable\sto|not\spossible\sto)\s
      (?:\w+ly\s)?(?:identify|recogni[sz]e|tell|determine|say|answer|help|assist|provide|name
        |comply|be\s(?:identified|determined))\b
  | \b(?:i|we)\s(?:have\sno\sidea|refuse|decline|apologi[sz]e)\b
  | \bas\san\sai\b
  | ^\W*(?:sorry|my\sapologies|apologies|unknown|no\sidea)\b
    """,
    re.VERBOSE,
)
