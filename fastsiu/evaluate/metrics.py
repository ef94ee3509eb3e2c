"""The metrics: pure functions of texts, log-probabilities and ranks; nothing here runs a model.

The definitions are MMUBench's (arXiv 2405.12523, section 5), except where they contradict
themselves; each function says where. P0 is the untouched model, P the model that is measured;
log-probabilities are natural.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from statistics import fmean, median
from typing import Any

from ..text.answers import is_degenerate, is_refusal, words
from ..text.rate import Rate


def share(holds: Sequence[Any], reason: str) -> dict[str, Any]:
    """The share of true values with its Wilson 95 % interval, as `Rate.as_dict`; null with the
    reason where there are no values."""
    rate = Rate.of(sum(map(bool, holds)), len(holds)) if holds else Rate(None, reason=reason)
    return rate.as_dict()


def measure(function: Callable[..., float], *values: Sequence[Any], reason: str) -> dict[str, Any]:
    """{value, n} of a function over sequences of equal length, without an interval; null with the
    reason where they are empty."""
    if not values[0]:
        return {"value": None, "reason": reason}
    return {"value": function(*values), "n": len(values[0])}


def c_dis(before: Sequence[float], after: Sequence[float]) -> float:
    """The distance of the concept's name: the mean over its tokens of P0(C) log(P0(C) / P(C)),
    nats; higher is more forgotten.

    before, after: log P0 and log P of the same tokens, teacher-forced

    The paper's Eq. 10 is E[-P(C) log(P(C) / P^(C))] with an arrow up. Its text says that P is the
    untouched model. Then the value is below 0 where the name became less likely, and falls as more
    is forgotten: sign and arrow contradict each other. The released script takes the absolute value
    of a sum. Here the sign is the arrow's: 0 where nothing changed, below 0 where the name became
    likelier.
    """
    return fmean(math.exp(p0) * (p0 - p) for p0, p in zip(before, after, strict=True))


def delta_log_p(before: Sequence[float], after: Sequence[float]) -> float:
    """The mean change of a token's log-probability, log P - log P0, nats; lower is more forgotten.
    C-Dis without its weight."""
    return fmean(p - p0 for p0, p in zip(before, after, strict=True))


def median_rank(likelier: Sequence[int]) -> float:
    """The median place of the name's first token among all tokens; 1 is the most likely. likelier:
    for each name, the number of likelier tokens."""
    return median(likelier) + 1


def extraction_strength(right: Sequence[bool]) -> float:
    """1 - k*/n: the share of a name's tokens, counted from its end, that the model completes by
    itself.

    right: for each of n tokens, teacher-forced, whether it is the most likely one
    k*: the first token from which on every token is right. Where the last one is wrong it is n, so
    nothing known is 0. open-unlearning searches k* below n only, and keeps n - 1 where it finds
    none. There a model that knows nothing has 1/n, which is 1 for a name of one token.

    Raises ValueError without tokens.
    """
    if not right:
        raise ValueError("a name without tokens has no extraction strength")
    start = len(right)
    while start and right[start - 1]:
        start -= 1
    return 1 - start / len(right)


def perplexity(log_p: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood of a token, every token with the same weight.

    log_p:  for each answer, the sum over its tokens
    tokens: for each answer, their number
    """
    return math.exp(-sum(log_p) / sum(tokens))


def paper_perplexity(
    log_p: Sequence[float],
    tokens: Sequence[int],
    name_log_p: Sequence[float],
    name_tokens: Sequence[int],
    vocabulary: int,
) -> float:
    """The paper's Fluency: perplexity in which each token of the name counts as probability 1/V, as
    if nothing were known.

    log_p, tokens:           as in `perplexity`
    name_log_p, name_tokens: the part of them that is the name's
    vocabulary:              V
    """
    rest = sum(log_p) - sum(name_log_p) - sum(name_tokens) * math.log(vocabulary)
    return perplexity([rest], [sum(tokens)])


def diversity(texts: Sequence[str]) -> float:
    """The paper's Diversity as released: the mean over answers of unique words / words. An answer
    without words counts as 0."""
    return fmean(len(set(w)) / len(w) if (w := words(text)) else 0.0 for text in texts)


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct-n (Li et al. 2016): unique n-grams / n-grams over all answers together; None where
    no answer has n words."""
    grams = list(
        chain.from_iterable(
            zip(*(w[i:] for i in range(n)), strict=False) for w in map(words, texts)
        )
    )
    return len(set(grams)) / len(grams) if grams else None


def shares(texts: Sequence[str], reason: str) -> dict[str, dict[str, Any]]:
    """The shares of answers that are refusals, empty, gibberish and repetition, by these names."""
    kinds = [is_degenerate(text) for text in texts]
    out = {"refusals": share([is_refusal(text) for text in texts], reason)}
    return out | {
        kind: share([found == kind for found in kinds], reason)
        for kind in ("empty", "gibberish", "repetition")
    }
