"""What has to be kept, and whether it is: answers that are still the untouched model's. Pure.

What noise alone turns is not counted as a loss: the untouched model, computed with other rounding,
says how much that is (`evaluate.noise`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..text.answers import same_beginning
from ..text.rate import wilson
from .family import percent

# Nats by which the unlearned model may turn away from the untouched model's first sentence. Layers
# in bfloat16 turn SmolLM2-135M away by 0.04 at most. Of a word that the untouched model says with a
# probability above 0.64, no flip is excused: it would have to fall below one half, which costs
# more. So only near-ties are.
LOST = 0.25
# The same for drawn pictures. No name is at stake there, and what a model says of shapes hangs on
# little: an honest run turns it by up to a nat, a model that says one thing of everything by more.
DRAWN, DRAWN_LOST = "drawn pictures", 1.0
# Noise that keeps less than this share excuses no more: then the answers say little anyway.
FLOOR = 0.5
# A part is lost where even the upper end of its interval lies below what is demanded. Among many
# parts one is low by chance, so the interval is the 99.9 % one. 1 of 3 answers that agree is no
# loss, 0 of 6 or 3 of 9 is.
PART_Z = 3.29


class Compared(Protocol):
    """One question with both models' answers, as `verdict.Answer` says."""

    @property
    def before(self) -> str: ...
    @property
    def after(self) -> str: ...
    @property
    def part(self) -> str: ...
    @property
    def cut(self) -> tuple[bool, bool]: ...
    @property
    def lost(self) -> float | None: ...
    @property
    def noise(self) -> float | None: ...


def kept(
    before: str,
    after: str,
    lost: float | None = None,
    cut: tuple[bool, bool] = (False, False),
    most: float = LOST,
) -> bool:
    """Is the answer `after` still the untouched model's, `before`? The first sentence is the same,
    or the unlearned model turns away from it by no more than `most` nats.

    lost, cut: as in `verdict.Answer`
    """
    return same_beginning(before, after, cut) or (lost is not None and lost <= most)


def is_kept(answer: Compared, most: float) -> bool:
    most = max(most, DRAWN_LOST) if answer.part == DRAWN else most
    return kept(answer.before, answer.after, answer.lost, answer.cut, most)


def kept_by_noise(answer: Compared, most: float) -> bool:
    """Whether the untouched model, computed with other rounding, keeps its own answer; True where
    that was not measured."""
    return answer.noise is None or answer.noise <= most


def demanded(least: float, floor: float | None) -> float:
    """The share that has to be kept where noise alone keeps the share `floor`: `least` of that."""
    return least * max(FLOOR, 1.0 if floor is None else floor)


def losses(given: Sequence[Compared], what: str, least: float, most: float) -> list[str]:
    """A sentence where too few of the answers are kept; where enough are, one for each part that is
    lost.

    what:  the answers, in words
    least: the share that has to be kept
    most:  nats, as in `kept`
    """
    if not given:
        return []
    whole = _Count.of(given, most)
    if whole.share < whole.demanded(least):
        return [f"Only {whole.told(what, least)}."]
    parts: dict[str, list[Compared]] = {}
    for answer in given:
        parts.setdefault(answer.part, []).append(answer)
    counts = {name: _Count.of(some, most) for name, some in parts.items() if name}
    return [
        f"Of {what} a part is lost: only {part.told('', least)}, those about {name}."
        for name, part in counts.items()
        if wilson(part.kept, part.n, PART_Z)[1] < part.demanded(least)
    ]


@dataclass(frozen=True)
class _Count:
    """How many of n answers are kept, and how many noise alone keeps; None: not measured."""

    n: int
    kept: int
    by_noise: int | None

    @classmethod
    def of(cls, given: Sequence[Compared], most: float) -> _Count:
        measured = any(a.noise is not None for a in given)
        return cls(
            len(given),
            sum(is_kept(a, most) for a in given),
            sum(kept_by_noise(a, most) for a in given) if measured else None,
        )

    @property
    def share(self) -> float:
        return self.kept / self.n

    def demanded(self, least: float) -> float:
        return demanded(least, None if self.by_noise is None else self.by_noise / self.n)

    def told(self, what: str, least: float) -> str:
        """The numbers as a part of a sentence."""
        start = f"{self.kept} of {self.n} {what}".rstrip() + " agree with the untouched model"
        if self.by_noise is None:
            return f"{start} ({percent(self.share)}; at least {percent(least)} is required)"
        return (
            f"{start} ({percent(self.share)}; noise alone keeps {self.by_noise}, so at least "
            f"{percent(self.demanded(least))} is required)"
        )
