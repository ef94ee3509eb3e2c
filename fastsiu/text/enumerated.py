"""The names in an answer that enumerates: "tigers, leopards and cheetahs", "1. Eiffel Tower". Pure.

`listed` reads nouns in small letters out of a list, `proper` reads names with capitals out of any
text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .answers import FUNCTION_WORDS
from .articles import without_article
from .plurals import singular

LONGEST = 3  # words of a noun
FEWEST = 3  # items in a row within a sentence: fewer may be any two words joined by "and"

_MARKED = re.compile(r"^\s*(?:\d+\s*[.):]|[-*\u2022\u2013])\s*(.+)$", re.MULTILINE)
# Where the noun of a marked line ends: "1. **Tiger**: a large cat", "- tiger (Asia)".
_ITEM_END = re.compile(r"\s[-\u2013\u2014]\s|[:(;.!?\u2013\u2014]")
_SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")
_BETWEEN = re.compile(r"\s*[,;]\s*(?:and\s+|or\s+)?|\s+(?:and|or)\s+")
# What a list may follow within its sentence: "... are", "such as", "similar to".
_LEAD = re.compile(
    r".*\b(?:are|is|includes?|including|like|resembles?|such\sas|similar\sto|example|instance|be)\b:?",
    re.IGNORECASE | re.DOTALL,
)
# "A tiger is a large cat": the answer of a model that names one.
_SUBJECT = re.compile(r"^\s*(An?\s[^.,;:]*?)\s(?:is|are|looks?|has|have|can|would)\b")
_ALIKE = re.compile(r"\b(?:like|resembles?|such\sas|similar\sto)\s+$", re.IGNORECASE)
_NO_NOUN = FUNCTION_WORDS | frozenset(
    "i you we me my your our us them him not no yes do does did can could may might will would "
    "should must been being am what when where why how there here also but so if than then very "
    "more most many much some any other others another all both each such like similar known "
    "called named example examples same way ways etc look looks lot one ones thing things animal "
    "animals creature creatures something anything someone type types kind kinds sometimes often "
    "usually typically".split()
)
_SMALL = frozenset("of the de la le du del da di von van der and's".split())
_ABBREVIATED = re.compile(r"(?:[A-Z]|St|Mt|Ft|Dr|Mr|Mrs)\.")


def derived(noun: str, name: str) -> bool:
    """Whether a noun is another form of a name of one word: its plural, or the word for its female
    or its young ("lioness", "piglet")."""
    form = re.compile(rf"{re.escape(name.lower())}(?:ess|ette|l?et|ling)?")
    return any(form.fullmatch(word) for word in singular(noun).lower().split())


def listed(text: str) -> list[str]:
    """The nouns of a text's lists, each once, in small letters, without article and in the
    singular.

    A list is a run of numbered or marked lines, or of short pieces between commas, "and" and "or".
    A noun has at most `LONGEST` words; what has a verb or a pronoun in it is a sentence's fragment.
    Without marked lines what the text begins with counts, too: "A tiger is a large cat".
    """
    lines = _MARKED.findall(text)
    if lines:
        pieces = [_ITEM_END.split(line.replace("*", ""), maxsplit=1)[0] for line in lines]
        found = [noun for piece in pieces if (noun := _noun(piece))]
    else:
        subject = _SUBJECT.match(text)
        found = [noun for piece in subject.groups() if (noun := _noun(piece))] if subject else []
        found += [noun for sentence in _SENTENCE.split(text) for noun in _in_sentence(sentence)]
    return list(dict.fromkeys(found))


def _in_sentence(sentence: str) -> Iterator[str]:
    pieces = _BETWEEN.split(sentence.strip().rstrip(".!?"))
    run: list[str] = []
    for i, piece in enumerate(pieces):
        lead = _LEAD.match(piece)
        if lead is not None:  # the list begins behind these words, and what was before is another
            yield from run if len(run) >= FEWEST else ()
            behind = _noun(piece[lead.end() :], within=True)
            run = [behind] if behind else []
            if behind and len(pieces) == 1 and _ALIKE.search(piece[: lead.end()] + " "):
                yield behind
            continue
        noun = _noun(piece, within=i > 0)
        if noun is None:
            yield from run if len(run) >= FEWEST else ()
            run = []
        elif run or i == 0:
            run.append(noun)
    yield from run if len(run) >= FEWEST else ()


def _noun(piece: str, within: bool = False) -> str | None:
    """within: a sentence, where a capital makes a proper name."""
    words = without_article(piece.strip(" \t\"'*_.,:;()[]\u201c\u201d")).split()
    if not 1 <= len(words) <= LONGEST:
        return None
    if not all(re.fullmatch(r"[^\W\d_]+(?:-[^\W\d_]+)*", word) for word in words):
        return None
    if within and words[-1][0].isupper():
        return None
    if any(word.lower() in _NO_NOUN for word in words) or len("".join(words)) < 3:
        return None
    return singular(" ".join(words).lower())


def proper(text: str, not_names: Sequence[str]) -> list[tuple[str, bool]]:
    """(name, whether "the" stands before it) of the runs of capitalised words, each name once;
    "of", "the" and the like may stand within: "Leaning Tower of Pisa".

    not_names: words that have a capital and are no name
    """
    found: dict[str, bool] = {}
    run: list[str] = []
    small: list[str] = []  # words in small letters that may turn out to be within a name
    before = definite = ""

    def end() -> None:
        nonlocal run, small
        if run and len("".join(run)) >= 3:
            found.setdefault(" ".join(run), definite.lower() == "the")
        run, small = [], []

    for word in text.split():
        short = _ABBREVIATED.fullmatch(word) is not None
        bare = word if short else word.strip(".,;:!?\"'()[]*«»\u201c\u201d\u2018\u2019")
        bare = re.sub("['\u2019](?:s|re|ll|ve|d|m)$", "", bare)
        starts = bare not in not_names and bare.lower() not in _NO_NOUN
        if re.match(r"\d+[.)]$|[-*\u2022]$", word):
            end()
        elif bare[:1].isupper() and (starts or small):
            definite = definite if run else before
            run, small = [*run, *small, bare], []
        elif run and bare in _SMALL:
            small.append(bare)
        else:
            end()
        before = bare
        if word[-1:] in ".,;:!?)" and not short:
            end()
    end()
    return list(found.items())
