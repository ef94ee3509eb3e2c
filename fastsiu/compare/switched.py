"""Switched adapters for a sequence of requests, as LUMoE has them (arXiv 2606.12809).

Each request has an adapter of its own, trained from the untouched model. For each question a router
decides which adapter answers:

    said    the router's answer to "who is in this picture?"
    i       the request whose name stands in `said` (`match`)
    answer  of the untouched model with adapter i. Of the untouched model alone where no request
            matches, and where the question has no picture

The router is not the authors'. Their released code asks a stronger model (GLM-4V-plus), first for
the class of what is shown and then for the entity, and matches that name fuzzily to a request. Here
the untouched model itself is asked once, and the package's own matcher of names reads its answer.
So a picture that the untouched model does not name reaches no adapter, and gives no name either.

The weights forget nothing. Whoever has the untouched model has what it knows, and the router has to
recognise each person whom it hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..model import adapter, ask
from ..model.turns import Picture
from ..model.vlm import VLM
from ..request import BadInput
from ..text.concept import Concept

WHO = "Who is in this picture?"


@dataclass(frozen=True)
class Expert:
    """One request's adapter, a PEFT directory that adapts the language model."""

    concept: Concept
    directory: Path


def match(concepts: Sequence[Concept], said: str) -> int | None:
    """The place of the concept whose name stands in the router's answer; None where none does.

    A whole name goes before a part of a name, and that before a misspelt name. Of several the one
    that is named first; of those the longest name.
    """
    for parts in (False, True):
        places = [
            (start, -end, i)
            for i, concept in enumerate(concepts)
            for start, end in concept.spans(said, include_parts=parts)
        ]
        if places:
            return min(places)[-1]
    return next((i for i, concept in enumerate(concepts) if concept.leaks_in(said)), None)


def route(
    loaded: VLM, concepts: Sequence[Concept], pictures: Sequence[Picture | None]
) -> list[int | None]:
    """For each picture the place of the concept whose adapter answers; None: no adapter does. The
    model is asked with no adapter on, and about each picture once."""
    seen = {id(picture): picture for picture in pictures if picture is not None}
    with adapter.teacher(loaded):
        said = ask.answers(loaded, [(WHO, picture) for picture in seen.values()])
    found = dict(zip(seen, (match(concepts, text) for text in said), strict=True))
    return [None if picture is None else found[id(picture)] for picture in pictures]


def answers(
    loaded: VLM,
    questions: Sequence[ask.Question],
    *,
    experts: Sequence[Expert],
    begin: Sequence[str] | None = None,
) -> list[str]:
    """Greedy answers in the order of the questions, each by the adapter that the router chose.

    loaded: the untouched model; no adapter is on before or afterwards
    begin:  the first words of each answer, forced

    Raises BadInput where an adapter changes what a picture looks like: the router's picture would
    not be the adapter's.
    """
    begins = list(begin) if begin is not None else [""] * len(questions)
    chosen = route(loaded, [one.concept for one in experts], [shown for _, shown in questions])
    said: dict[int, str] = {}
    for number in (None, *range(len(experts))):
        members = [i for i, place in enumerate(chosen) if place == number]
        if not members:
            continue
        try:
            if number is not None:
                directory = experts[number].directory
                adapter.load(loaded, directory)
                if adapter.sees_anew(loaded):
                    raise BadInput(
                        f"The adapter in {directory} changes what the model sees: only adapters of "
                        "the language model can be switched."
                    )
            own = [questions[i] for i in members]
            texts = ask.answers(loaded, own, begin=[begins[i] for i in members])
        finally:
            adapter.detach(loaded)
        said |= zip(members, texts, strict=True)
    return [said[i] for i in range(len(questions))]
