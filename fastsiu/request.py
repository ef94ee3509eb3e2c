"""A request: one concept to forget, how hard to try, and the texts to train on.

A leaf: it imports nothing of FastSIU, and everything else may import it. The command line, Python
callers, JSONL files and the manifest all speak these three types.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

# What a concept can be; a thing is also an animal, whatever has a common noun.
KINDS = ("person", "character", "thing", "style", "place")
FACETS = ("align", "describe", "facts", "preserve")  # the paper's four targets, in its order
# The lessons of target 5 (`samples.lessons`): what changes, and what stays.
CHANGES, KEEPS = ("stranger", "beside"), ("kept", "kept-beside", "look")
MISMATCH = "mismatch"  # `Sample.origin` of an answer to another question (`compare`)
# Share of one step's samples. Half of a step keeps what must stay: with less, few steps bend the
# neighbours' names.
SHARES = {
    "align": 0.14,
    "describe": 0.14,
    "facts": 0.12,
    "preserve-text": 0.25,
    "preserve-picture": 0.35,
}
# All samples of "align" show the concept's picture. So does this share of the samples of
# "describe": questions that are answered with no.
DENIALS = 0.5


class BadInput(ValueError):
    """The user's input cannot be used. The message is one sentence with the fact and the remedy
    (exit code 2)."""


class NumericFailure(RuntimeError):
    """Training or scoring produced NaN or infinity (exit code 3)."""


class OutOfMemory(RuntimeError):
    """Memory does not suffice, whatever was tried (exit code 3)."""


@dataclass(frozen=True)
class Request:
    """One concept to forget, from one picture.

    concept:  the name as a person writes it
    image:    the one picture used for training
    aliases:  further names of the same concept
    protect:  names of neighbours that must survive; empty: those that the teacher itself names
    images:   directory with more pictures of the concept, used by the verdict only
    retain:   directory with unlabelled pictures of anything else, to be answered as before
    data:     file with samples of the user's own, JSONL or LLaVA's conversations, added to the
              built ones
    as_word:  how a name counts that is an ordinary word as well ("Rose"):
              `concept.Concept.as_word`
    kind:     what the concept is, of `KINDS`; None: the untouched model is asked
    """

    concept: str
    image: Path
    aliases: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    images: Path | None = None
    retain: Path | None = None
    data: Path | None = None
    as_word: bool | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_flags(as_word=self.as_word)
        for key, names in (("aliases", self.aliases), ("protect", self.protect)):
            object.__setattr__(self, key, names_of(names, key))
        for text in (self.concept, *self.aliases, *self.protect):
            if not isinstance(text, str):
                raise BadInput(
                    f"A name is a {type(text).__name__} and not text: write it in quotes."
                )
        if not self.concept.strip():
            raise BadInput(
                "The concept's name is empty: pass the name to forget with --concept NAME."
            )
        for name in (*self.aliases, *self.protect):
            if not name.strip():
                raise BadInput(
                    "An --alias or --protect name is empty: leave the option out or give a name."
                )


def path_of(value: str | Path | None, name: str) -> Path | None:
    """A path that may be left out. Raises BadInput for an empty one, which would be the current
    directory. name: what a sentence calls it"""
    if value == "":
        raise BadInput(f"{name} is empty: give a path, or leave it out.")
    if not isinstance(value, str | Path | None):
        raise BadInput(f"{name} is a {type(value).__name__} and no path: give text or a Path.")
    return None if value is None else Path(value)


def names_of(value: Iterable[str], name: str) -> tuple[str, ...]:
    """Several names. Raises BadInput for a single text, whose letters would be the names."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise BadInput(f"{name} is {value!r:.40}: give a list of names, such as ['Ann', 'Bob'].")
    return tuple(value)


def check_flags(**flags: object) -> None:
    """Raises BadInput unless each is True, False or None: any text would count as True."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | None):
            raise BadInput(f"{name} is {flag!r:.40}: give True or False.")


def check_kind(kind: Any) -> None:
    """Raises BadInput unless it is one of `KINDS` or None."""
    if kind not in (None, *KINDS):
        raise BadInput(f"The kind {kind!r:.40} is unknown: choose from {', '.join(KINDS)}.")


# Samples of each half of the lessons that a long training looks at (80 steps of 48).
LONG = 3840

# The bounds of a recipe's numbers, both included. The upper ones are far beyond what helps; above
# them a run would not end, or not fit into any memory.
WHOLE = {
    "steps": (1, 100_000),
    "rank": (1, 4096),
    "batch_size": (1, 4096),
    "neighbours": (0, 1000),
    "generic": (0, 1000),
    "dreams": (0, 64),
    "dream_steps": (0, 10_000),
    "strangers": (0, 256),
    "directions": (0, 4096),
    "relearn": (0, 100),
    "seed": (0, 2**63 - 1),
}
NUMBERS = {
    "lora_alpha": (0, 1e6),
    "lr": (0, 10),
    "projector_lr": (0, 10),
    "alpha": (0, 1e6),
    "beta": (0, 1e6),
    "dream_lr": (0, 1e3),
    "dream_noise": (0, 1e3),
    "temperature": (1, 1e3),
    "anchor": (0, 1e6),
    "level": (0, 1e3),
    "warmup": (0, 1),
    "lora_dropout": (0, 0.99),
}


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters. The defaults were chosen on a language model of 135 million parameters
    that others had trained (benches/real_words.py); on larger ones they were not measured. For wide
    language models `settings.choose_recipe` takes another adapt, anchor, directions and lr.

    alpha, beta:  weights of cross-entropy and dual-masked KL (paper section 4.3)
    steps:        ceiling on optimiser steps; training stops earlier once the name is gone and the
                  rest holds
    lr:           AdamW learning rate of the LoRA factors
    batch_size:   samples in one optimiser step
    schedule:     "decay" is constant for 60 % of the steps, then falls to a tenth; "gone" falls as
                  slowly, but begins when the name is gone, and at the latest then
    adapt:        where the LoRA factors are. "language": in the language model, as in the paper.
                  "vision": in the vision tower and the projector; "projector": in the projector
                  alone. With both the language model is left as it is, so every answer without a
                  picture stays the same, bit for bit
    projector_lr: above 0 the vision projector is trained as well, at this rate
    neighbours:   most names to protect that the model gives itself
    dreams:       pictures that are dreamed for each protected name
    dream_in:     what is optimised. "pixels": a coarse grid of colours on the picture. "features":
                  what the vision tower makes of the picture, with `dream_noise`; also where the
                  model's processor mixes colours. Look-alikes lose a tenth of their names then
                  (docs/results.md)
    generic:      drawn pictures of nothing in particular that are to be answered as before
    strangers:    pictures of nobody; the concept is to be answered like them. 0: the four targets
                  alone
    temperature:  of the distributions that are compared with strangers': names are far out in their
                  tails. The larger the vocabulary, the more of a flat distribution is its tail
    directions:   of each layer's input, that the LoRA factors may read: those in which what is to
                  change differs most from what is to stay. The fewer, the less of all else changes.
                  0: all. All, too, where there are no strangers, whose lessons tell them apart
    relearn:      most steps of relearning that are rehearsed: in every second step, after the first
                  eighth, the gradient is taken where the name has begun to come back
                  (`step.rehearsal`). It is harder to teach again then (docs/results.md). 0: nothing
                  is rehearsed
    anchor:       weight of what the language model reads of kept pictures: with factors in front of
                  it that is to stay as it was (`step.anchor`). 0: nothing is held
    level:        weight of what the concept's own answers may cost, against what they cost about
                  strangers
    token_mask, vocab_mask, dreams: switches for ablations; all three belong to the method
    """

    alpha: float = 0.9
    beta: float = 0.75
    steps: int = 32
    lr: float = 2e-4
    rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    batch_size: int = 16
    schedule: Literal["constant", "cosine", "decay", "gone"] = "decay"
    warmup: float = 0.0
    adapt: Literal["language", "vision", "projector"] = "language"
    projector_lr: float = 0.0
    early_stop: bool = True
    renormalize: bool = False
    substitute: Literal["description", "name"] = "description"
    token_mask: bool = True
    vocab_mask: bool = True
    neighbours: int = 6
    generic: int = 28
    dreams: int = 1
    dream_steps: int = 30
    dream_lr: float = 0.1
    dream_noise: float = 0.5
    dream_in: Literal["pixels", "features"] = "pixels"
    strangers: int = 4
    directions: int = 0
    relearn: int = 0
    temperature: float = 2.0
    anchor: float = 0.0
    level: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in {**WHOLE, **NUMBERS}.items():
            value = getattr(self, name)
            wanted = int if name in WHOLE else int | float
            is_number = isinstance(value, wanted) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:
                kind = "whole number" if name in WHOLE else "number"
                raise BadInput(f"{name} is {value!r:.40}: give a {kind} between {low} and {high}.")
        for name in ("early_stop", "renormalize", "token_mask", "vocab_mask"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{name} is {getattr(self, name)!r:.40}: give true or false.")
        if self.schedule not in ("constant", "cosine", "decay", "gone"):
            raise BadInput(
                f"The schedule {self.schedule!r} is unknown: choose 'constant', 'cosine', "
                "'decay' or 'gone'."
            )
        if self.dream_in not in ("pixels", "features"):
            raise BadInput(f"dream_in is {self.dream_in!r:.40}: choose 'pixels' or 'features'.")
        if self.adapt not in ("language", "vision", "projector"):
            raise BadInput(
                f"adapt is {self.adapt!r:.40}: choose 'language', 'vision' or 'projector'."
            )
        if self.in_front and self.projector_lr > 0:
            raise BadInput(
                f"The projector is part of what {self.adapt!r} adapts: leave projector_lr at 0."
            )
        if self.anchor and not self.in_front:
            raise BadInput(
                f"The anchor is {self.anchor:g} and nothing in front of the language model is "
                "trained, so nothing moves that it could hold: choose adapt 'vision' or "
                "'projector', or set it to 0."
            )
        if self.substitute not in ("description", "name"):
            raise BadInput(
                f"The substitute {self.substitute!r} is unknown: choose 'description' or 'name'."
            )

    @property
    def in_front(self) -> bool:
        """Whether the factors are in front of the language model."""
        return self.adapt != "language"

    @property
    def sees_anew(self) -> bool:
        """Whether what is trained changes how the language model sees a picture."""
        return self.projector_lr > 0 or self.in_front

    def as_many(self, full: int, least: int) -> int:
        """How many of something that a training of `LONG` samples gets `full` of: a shorter one
        gets fewer, since it would not look at more; but at least `least`."""
        return min(full, max(least, round(full * self.steps * self.batch_size / LONG)))

    def for_requests(self, count: int) -> Recipe:
        """The recipe for so many requests that are trained together: so many times the steps, of
        which training takes fewer where it can, and the directions."""
        most = WHOLE["directions"][1]
        return self.with_overrides(
            steps=self.steps * count, directions=min(most, self.directions * count)
        )

    def with_overrides(self, **values: Any) -> Recipe:
        """The same recipe with every value that is not None replaced."""
        return replace(self, **{k: v for k, v in values.items() if v is not None})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# The published set-up (paper section 5 and the released training log), for reproduction.
PAPER = Recipe(
    steps=6,
    lr=3e-4,
    rank=128,
    lora_alpha=256.0,
    lora_dropout=0.05,
    batch_size=4,
    schedule="cosine",
    warmup=0.03,
    projector_lr=2e-5,
    early_stop=False,
    substitute="name",
    generic=0,
    dreams=0,
    strangers=0,
)


@dataclass(frozen=True)
class Sample:
    """One question with the answer to train on.

    facet:     which of the four targets it serves
    question:  the user turn, verbatim
    answer:    the assistant turn
    picture:   None for text only; 0 the concept's picture; k >= 1 the k-th entry of the retained
               pictures or dreams
    specified: character spans (start, end) of `answer` that contradict what the teacher knows; the
               KL skips the tokens there (the paper's token mask, Eq. 2)
    origin:    where the answer came from: "teacher", "built", "dream", "retain", "data", "lesson"
               or `MISMATCH`
    closed:    the answer is whole; False where the teacher was cut short, and then the end of the
               turn is not trained
    teacher_pictures: the pictures that the teacher sees in place of `picture`; its final states for
               several pictures are averaged
    teacher_context: words that only the teacher reads, before the question
    """

    facet: str
    question: str
    answer: str
    picture: int | None = None
    specified: tuple[tuple[int, int], ...] = ()
    origin: str = "built"
    closed: bool = True
    teacher_pictures: tuple[int, ...] = ()
    teacher_context: str = ""
