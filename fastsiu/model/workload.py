"""What a run consists of, in tokens: the picture, the questions, and the forwards of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..request import DENIALS, SHARES
from .memory import Layout
from .parts import ALIKE, WORTH

Forward = tuple[int, int, int]  # (sequences, tokens of each, supervised rows in all)


@dataclass(frozen=True)
class Workload:
    """What a run consists of, in tokens.

    prefix:   a picture and what stands before its question, computed once for all its questions
    patches:  what the vision tower sees of the picture
    suffix:   a question and its answer
    rows:     supervised tokens of a suffix
    text:     a sample without a picture
    answer:   the longest that is generated
    pictures: distinct pictures in the whole run, the concept's and the dreams
    samples:  samples in the whole run
    """

    prefix: int
    patches: int
    suffix: int = 64
    rows: int = 40
    text: int = 80
    answer: int = 64
    pictures: int = 17
    samples: int = 120

    def forwards(self, settings: Layout, batch_size: int, in_front: bool = False) -> list[Forward]:
        """The forwards of one step whose graphs are alive at the same time. Under a micro-batch
        that is one forward, the largest.

        in_front: what trains is in front of the language model, so a text has no graph

        `SHARES` says which samples a step has. `parts` says how they go together: questions about
        one picture are one row, and rows of like length are one forward. Rows are plain where that
        saves too little time, and where a mask cannot keep suffixes apart.
        """
        most = settings.micro_batch or batch_size
        own, dreams, text = samples_of_a_step(batch_size)
        forwards, plain = self._packed(own, dreams, most), self._plain(own + dreams, most)
        worth = settings.sparing or _tokens(forwards) <= WORTH * _tokens(plain)
        if settings.attention == "flash_attention_2" or not worth:
            forwards = plain
        if text and not in_front:
            forwards.append((min(most, text), self.text, min(most, text) * self.rows))
        if settings.micro_batch is None:
            return forwards
        return [max(forwards, key=lambda forward: forward[0] * forward[1])]

    def _packed(self, own: int, dreams: int, most: int) -> list[Forward]:
        """`own` questions about the concept's picture and one about each dream, as packed rows."""
        forwards: list[list[int]] = []  # questions in each row of each forward
        for questions in [min(most, own - at) for at in range(0, own, most)] + [1] * dreams:
            if forwards and self._joins(questions, forwards[-1], most):
                forwards[-1].append(questions)
            else:
                forwards.append([questions])
        return [(len(rows), self._row(rows[0]), sum(rows) * self.rows) for rows in forwards]

    def _joins(self, questions: int, rows: list[int], most: int) -> bool:
        """Whether a row of so many questions may go into a forward with `rows`."""
        alike = self._row(questions) >= ALIKE * self._row(rows[0])
        return alike and sum(rows) + questions <= most

    def _plain(self, samples: int, most: int) -> list[Forward]:
        """Samples with a picture, each in a row of its own."""
        sizes = [min(most, samples - at) for at in range(0, samples, most)]
        return [(size, self._row(1), size * self.rows) for size in sizes]

    def _row(self, questions: int) -> int:
        return self.prefix + questions * self.suffix


def samples_of_a_step(batch_size: int) -> tuple[int, int, int]:
    """(about the concept's picture, each about another picture, without a picture): the samples of
    one step by `SHARES`. The share of the first is rounded up to a twentieth of the step."""
    share = SHARES["align"] + DENIALS * SHARES["describe"]
    own = math.ceil(math.ceil(share * 20) * batch_size / 20)
    others = round(SHARES["preserve-picture"] * batch_size)
    return own, others, batch_size - others - own


def _tokens(forwards: list[Forward]) -> int:
    return sum(sequences * tokens for sequences, tokens, _ in forwards)
