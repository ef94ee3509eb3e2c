"""How far a model turns away from the untouched model's first sentences, and how far the untouched
model itself does by rounding alone: the noise floor of what is kept.

Answers of a language model are long, are cut, and hang on near-ties: where two words are almost
equally likely, rounding decides. So the untouched model's answers are not generated again: the
first sentence of each is teacher-forced, all of them in one batched forward. Then each token counts
at which the model would say another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..model import ask
from ..model.ask import Reply
from ..model.rounding import rounded, rounds
from ..model.turns import Encoded, Picture, per_token
from ..model.vlm import VLM
from ..request import BadInput
from ..text.answers import first_sentence, is_ended

# How the noise floor was made: the layers rounded to bfloat16; for a model that computes in 16 bits
# anyway, the same in another order and with other padding.
ROUNDED, REORDERED = "rounded", "reordered"
SMALL_BATCH = 5  # turns in a forward of another order

Asked = Sequence[ask.Question]


class Sentence(NamedTuple):
    """The tokens of a first sentence under a model, teacher-forced.

    log_p:  log-probability of each token, nats
    behind: nats by which the likeliest token is ahead of each; 0 where it is the likeliest
    """

    log_p: list[float]
    behind: list[float]


class Kept:
    """What the untouched model, which is on when this is made, says to questions whose answers have
    to be kept; to be compared with what another model makes of it.

    turns: the first sentences (`beginnings`), None for a question that is not compared
    own:   what they are under the untouched model
    floor: `lost` of each by noise alone; None where it was not measured
    way:   `ROUNDED` or `REORDERED`; "" where nothing is compared
    """

    def __init__(
        self, vlm: VLM, compared: Sequence[bool], asked: Asked, replies: Sequence[Reply]
    ) -> None:
        """compared: whether each question is; replies: the untouched model's"""
        self.turns = beginnings(vlm, compared, asked, replies)
        pictures = [picture for _, picture in asked]
        self.own = scored(vlm, self.turns, pictures)
        self.way, self.floor = floor(vlm, self.turns, pictures, self.own)

    def again(self, vlm: VLM, asked: Asked) -> list[float | None]:
        """`lost` of each sentence under the model as it is now. asked: the same questions, with the
        pictures as it sees them"""
        after = scored(vlm, self.turns, [picture for _, picture in asked])
        return [lost(a, b) for a, b in zip(self.own, after, strict=True)]


def beginnings(
    vlm: VLM, compared: Sequence[bool], asked: Asked, replies: Sequence[Reply]
) -> list[Encoded | None]:
    """The first sentence of each answer, as the supervised tokens of its turn.

    It is None for an answer that is not compared, for one without words, and for one that the chat
    template changes, as it may change gibberish.

    The end of the turn is among the tokens where the model ended an answer that no mark ends.
    """
    return [
        _beginning(vlm, question, reply, picture) if wanted else None
        for wanted, (question, picture), reply in zip(compared, asked, replies, strict=True)
    ]


def scored(
    vlm: VLM, turns: Sequence[Encoded | None], pictures: Sequence[Picture | None], **options: object
) -> list[Sentence | None]:
    """Each of the `beginnings` under the model as it is now. options: of `ask.label_scores`"""
    there = [i for i, turn in enumerate(turns) if turn is not None]
    some = [turn for turn in turns if turn is not None]
    found: list[Sentence | None] = [None] * len(turns)
    scores = ask.label_scores(vlm, some, [pictures[i] for i in there], **options)  # type: ignore[arg-type]  # keywords of its own
    for i, score in zip(there, scores, strict=True):
        found[i] = Sentence(score.log_p.tolist(), score.behind.tolist())
    return found


def lost(before: Sentence | None, after: Sentence | None) -> float | None:
    """The nats by which a model turns away from a first sentence of the untouched model; None where
    one of the two was not measured or is not finite.

    before, after: the sentence under the untouched model and under the one that is measured

    The sum over the tokens in whose place the model would say another. Each counts with what it
    lost of its log-probability, or with how far the other is ahead of it (less what it was before),
    whichever is more. So 0 is the same sentence. A near-tie that turned costs next to nothing,
    however long the sentence is. A word that became unlikely, or another that became much likelier,
    cannot hide behind all the words that stayed.
    """
    if before is None or after is None:
        return None
    total = 0.0
    for was, led, now, leads in zip(*before, *after, strict=True):
        if not all(map(math.isfinite, (was, led, now, leads))):
            return None
        if leads > 0:
            total += max(0.0, was - now, leads - led)
    return total


def floor(
    vlm: VLM,
    turns: Sequence[Encoded | None],
    pictures: Sequence[Picture | None],
    own: Sequence[Sentence | None],
) -> tuple[str, list[float | None]]:
    """How far the untouched model turns away from its own sentences by noise alone.

    Returns the way in which noise was made (`ROUNDED` or `REORDERED`) and `lost` of each sentence;
    ("", all None) where there is no sentence. One more forward over the `beginnings`; no weight is
    written (`model.rounding`).

    own: what `scored` gave under the untouched model, which is on
    """
    if not any(own):
        return "", [None] * len(own)
    if rounds(vlm):
        with rounded(vlm):
            again = scored(vlm, turns, pictures)
        way = ROUNDED
    else:
        backwards = scored(vlm, turns[::-1], pictures[::-1], batch_size=SMALL_BATCH, ways=())
        again, way = backwards[::-1], REORDERED
    return way, [lost(a, b) for a, b in zip(own, again, strict=True)]


def _beginning(vlm: VLM, question: str, reply: Reply, picture: Picture | None) -> Encoded | None:
    answer = reply.text.strip()
    sentence = first_sentence(answer)
    if not sentence:
        return None
    try:
        turn = vlm.encode(question, answer, picture, reply.closed)
    except BadInput:
        return None
    ends = reply.closed and sentence == answer and not is_ended(sentence)
    n = len(turn.offsets) if ends else sum(start < len(sentence) for start, _ in turn.offsets)
    if not n:
        return None
    last = int(turn.rows[n - 1]) + 2  # what follows the last token decides nothing
    inputs = {k: v[:, :last] if per_token(turn.inputs, k) else v for k, v in turn.inputs.items()}
    return Encoded(inputs, turn.rows[:n], turn.labels[:n], turn.offsets[:n])
