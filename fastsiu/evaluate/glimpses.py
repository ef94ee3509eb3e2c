"""How likely the name is in a served model's answers, from the likeliest tokens that a server tells
at each place of an answer. Only `glimpses` asks; the rest is pure.

A server does not score a given text, so the family "likelihood" cannot be asked there. Where the
server gives log-probabilities (`model.served.Served.openings`), this replaces it: the likeliest
token that begins the name. It sees nothing of a name that is not among the likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from ..judging.family import Family
from ..model.served import Openings, Served
from ..model.turns import Picture
from ..text.concept import Concept
from ..text.rate import Rate
from . import attack_results

UNSEEN = -20.0  # nats, for a name that is among the likeliest tokens of no place
PLACES = 16  # tokens of an answer that are looked at
LEAST = 2  # letters of a name that a token must have to begin it


class Glimpses(NamedTuple):
    """Log-probabilities, nats, one for each picture: the mean over the questions."""

    own: list[float]
    strange: list[float]


def glimpses(
    served: Served,
    concept: Concept,
    questions: Sequence[str],
    own: Sequence[Picture],
    strange: Sequence[Picture],
) -> Glimpses | None:
    """Asks about pictures of the concept and of strangers. None where the server gives no
    log-probabilities."""
    pairs = [(q, picture) for picture in [*own, *strange] for q in questions]
    found = served.openings(pairs, max_new_tokens=PLACES)
    if found is None:
        return None
    values = [nearest(concept, places) for places in found]
    size = len(questions)
    means = [fmean(values[i : i + size]) for i in range(0, len(values), size)]
    return Glimpses(means[: len(own)], means[len(own) :])


def nearest(concept: Concept, places: Openings) -> float:
    """The largest log-probability of a token that begins the name, at any place of an answer."""
    names = [form.casefold() for form in concept.forms()]
    begins = lambda token: len(token) >= LEAST and any(name.startswith(token) for name in names)
    there = [
        log_p
        for place in places
        for token, log_p in place.items()
        if begins(token.strip().casefold())
    ]
    return max(there, default=UNSEEN)


def family(before: Glimpses, after: Glimpses) -> Family:
    """The family "likelihood", from what both models let see."""
    apart = lambda seen: Rate(
        attack_results.auc(seen.own, seen.strange), len(seen.own) * len(seen.strange)
    )
    was, now = apart(before), apart(after)
    return attack_results.scored("likelihood", was, now, Rate(0.5, was.n))
