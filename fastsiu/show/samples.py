"""What the terminal shows of samples: each with its masked tokens, and the lessons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from ..guards.terminal import visible
from ..samples.corpus import Corpus
from ..samples.scene import Scene
from .results import cell

LESSON_EXAMPLES = 4  # of each kind of lesson: there are hundreds
LESSON_KINDS = {
    "stranger": "about a view of it, the teacher looks at strangers",
    "beside": "about it beside another, the teacher looks at a stranger there",
    "kept": "about others and strangers, as before",
    "kept-beside": "about two that are not it, as before",
    "look": "about what is visible of it, as before",
}


class Piece(NamedTuple):
    """A piece of an answer.

    kept:   the KL covers it; False where the token mask leaves it to the cross-entropy
    masked: it is a token of the name, which the vocabulary mask takes out of the KL
    """

    text: str
    kept: bool = True
    masked: bool = False


class Explained(NamedTuple):
    """A sample as a reader sees it.

    about: its target, where its answer came from, and its picture
    """

    about: str
    question: str
    answer: list[Piece]


def explained(scene: Scene, corpus: Corpus) -> Iterator[Explained]:
    """Every sample of the four targets, its answer in pieces."""
    for sample, turn, keep in zip(corpus.samples, corpus.turns, corpus.keep, strict=True):
        where = "text" if sample.picture is None else f"picture {sample.picture}"
        dreamed = (
            scene.named[sample.picture]
            if sample.picture is not None and sample.picture < len(scene.named)
            else None
        )
        where += f": dream of {dreamed}" if dreamed else ""
        where += "" if sample.closed else ", cut short: its end is not trained"
        answer: list[Piece] = []
        end = 0
        named = [label in corpus.mask.masked for label in turn.labels.tolist()]
        for start, stop, kept, masked in pieces(turn.offsets, keep.tolist(), named):
            if end < start:
                answer.append(Piece(visible(sample.answer[end:start])))
            answer.append(Piece(visible(sample.answer[start:stop]) or "<end>", kept, masked))
            end = max(end, stop)
        yield Explained(f"{sample.facet}, {sample.origin}, {where}", sample.question, answer)


def lesson_examples(lessons: Corpus | None) -> Iterator[tuple[str, int, list[tuple[str, str]]]]:
    """For each kind of lesson: what it is about, how many there are, some questions and answers."""
    for kind, about in LESSON_KINDS.items():
        own = [sample for sample in (lessons.samples if lessons else ()) if sample.facet == kind]
        some = own[:: max(1, len(own) // LESSON_EXAMPLES)][:LESSON_EXAMPLES]
        if own:
            yield about, len(own), [(sample.question, sample.answer) for sample in some]


def explanation(
    console: Console, scene: Scene, corpus: Corpus, lessons: Corpus | None = None
) -> None:
    """Every sample; tokens the KL skips are in [brackets], tokens of the name (out of its
    vocabulary) in <angles>. Then some lessons, whose KL is over all tokens and the whole
    vocabulary."""
    console.print(
        "[token]: left to the cross-entropy (token mask). <token>: the name, out of the KL's "
        "vocabulary."
    )
    for one in explained(scene, corpus):
        console.print(f"[{one.about}] {one.question}")
        line = Text("    ")
        for text, kept, masked in one.answer:
            # Brackets as well as styles: a file or a screen reader shows no styles.
            token = f"<{text}>" if masked else text
            style = ("" if kept else "reverse ") + ("underline" if masked else "")
            line.append(token if kept else f"[{token}]", style=style.strip() or None)
        console.print(line)
    if scene.left_out:
        console.print(
            f"{scene.left_out} answers about dreamed or retained pictures named the concept and "
            "were left out."
        )
    vocabulary = ", ".join(repr(t) for t in sorted(set(corpus.mask.masked.values())))
    console.print(f"Vocabulary mask: {len(corpus.mask.masked)} tokens ({vocabulary}).")
    if corpus.mask.spared:
        console.print(
            "Too common to mask: "
            f"{', '.join(repr(t) for t in sorted(set(corpus.mask.spared.values())))}."
        )
    if corpus.mask.warning:
        console.print(corpus.mask.warning)
    for about, count, some in lesson_examples(lessons):
        console.print(f"{count} lessons {about}, such as:", soft_wrap=True)
        for question, answer in some:
            console.print(cell(f"    {question} {answer}"), soft_wrap=True)


def pieces(
    offsets: Iterable[Sequence[int]], keep: Iterable[bool], masked: Iterable[bool]
) -> list[tuple[int, int, bool, bool]]:
    """(start, stop, kept, masked) of each piece of the text, in its order and each character in one
    of them: a byte-level tokenizer cuts a character into several tokens, all of which have the
    character's place. Kept where all of them are, masked where one is."""
    found: list[tuple[int, int, bool, bool]] = []
    for (start, stop), kept, named in zip(offsets, keep, masked, strict=True):
        last = found[-1] if found else None
        if last is not None and start < stop and start < last[1] and last[0] < stop:
            found[-1] = (
                min(start, last[0]),
                max(stop, last[1]),
                kept and last[2],
                named or last[3],
            )
        else:
            found.append((start, stop, kept, named))
    return found
