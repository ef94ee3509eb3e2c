"""A picture of nobody: one in which the untouched model recognises no one.

Training, the verdict and the attacks that look inside the model all need such pictures. Each brings
its own candidates and its own wordings, so that no picture and no question of the verdict was
trained on. What makes a candidate a picture of nobody is the same for all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..model import ask
from ..model.turns import Picture
from ..text.answers import is_degenerate


def shows_nobody(
    vlm: ask.Model,
    pictures: Sequence[Picture],
    questions: Sequence[str],
    names_somebody: Callable[[str], bool],
    *,
    sane: bool = False,
    **options: Any,
) -> list[bool]:
    """For each picture: does the model, as it is now, name nobody in its answer to any question?

    names_somebody: whether an answer names anybody who counts
    sane:           a picture about which every answer is gibberish (`is_degenerate`) does not count
    options:        those of `ask.replies`
    """
    answers = ask.answers(vlm, [(q, p) for p in pictures for q in questions], **options)
    nobody = []
    for start in range(0, len(answers), len(questions)):
        own = answers[start : start + len(questions)]
        gibberish = sane and all(is_degenerate(answer) for answer in own)
        nobody.append(not gibberish and not any(map(names_somebody, own)))
    return nobody
