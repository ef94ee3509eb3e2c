"""The metrics that several benchmarks share: pure functions of texts and of what tokens cost.

nats: -log p of one token, or its mean over the tokens of an answer, as the name says.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence

from ...request import BadInput
from ..metrics import share
from .form import Answer, Answered, Item, Value, mean

NO_ITEMS = "No item of this part was asked."
NO_WRONG = "The items of this part have no wrong answers."
NO_RETRAINED = "It compares with a model that never learned the set: give its answers."
NOT_THE_SAME = "The other model was not asked all of these items: ask it the same ones."
NO_JUDGE = "It is graded by a language model, and none was asked."
# FIUBench's weights of the lowest 10, 20, 30, 40 and 50 % of an answer's tokens.
MIN_K = ((0.1, 0.3), (0.2, 0.3), (0.3, 0.2), (0.4, 0.1), (0.5, 0.1))

Pairs = Sequence[tuple[Item, Answer]]
Stem = Callable[[str], str]
Split = Callable[[str], list[str]]


def porter() -> Stem:
    """Porter's stemmer for words of more than three letters, as the authors' ROUGE has it. Raises
    BadInput where nltk is not installed."""
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError as error:
        raise BadInput(
            "Stemmed ROUGE needs nltk, which is not installed: pip install 'fastsiu[benchmarks]', "
            "or leave out --stem."
        ) from error
    stemmer = PorterStemmer()
    return lambda word: stemmer.stem(word) if len(word) > 3 else word


def tokens(text: str, stem: Stem | None = None) -> list[str]:
    """Lower-case runs of a-z and 0-9, as the authors' ROUGE splits a text; other scripts have
    none."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return words if stem is None else [stem(word) for word in words]


def plain_words(text: str) -> list[str]:
    """Lower-case words without ASCII punctuation, which parts no word (PPU-Bench's rule)."""
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


def rouge_l(a: Sequence[str], b: Sequence[str]) -> tuple[float, float, float]:
    """ROUGE-L (Lin 2004): precision, recall and F1 of the longest common subsequence of the words
    of the right answer, `a`, and of what was said, `b`."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b, 1):
            row[j] = before[j - 1] + 1 if word == other else max(before[j], row[j - 1])
    if not row[-1]:
        return 0.0, 0.0, 0.0
    precision, recall = row[-1] / len(b), row[-1] / len(a)
    return precision, recall, 2 * precision * recall / (precision + recall)


def mean_rouge_l(asked: Pairs, part: int, split: Split) -> Value:
    """The mean of `rouge_l`'s precision (0), recall (1) or F1 (2). split: a text's words."""
    return mean([rouge_l(split(item.answer), split(a.text))[part] for item, a in asked], NO_ITEMS)


def letter(said: str, options: Sequence[str]) -> str | None:
    """The option that an answer chooses: its first character in upper case; None for any other
    (MLLMU-Bench's rule)."""
    first = said.strip()[:1].upper()
    return first if first and first in options else None


def only_letter(said: str, options: Sequence[str]) -> str | None:
    """The option that an answer chooses: the only one that stands apart in it, in any case; None
    where there are several or none (PPU-Bench's rule)."""
    found = {word for word in re.findall(r"\b[A-Z]\b", said.upper()) if word in options}
    return found.pop() if len(found) == 1 else None


def accuracy(asked: Pairs, choice: Callable[[str, Sequence[str]], str | None] = letter) -> Value:
    """The share of choices that name the right letter, with its Wilson interval."""
    right = [choice(a.text, [key for key, _ in i.options]) == i.answer for i, a in asked]
    return share(right, NO_ITEMS)


def contains(asked: Pairs) -> Value:
    """The share of answers that hold the right one, in any case (MLLMU-Bench's cloze)."""
    return share([i.answer.lower() in a.text.lower() for i, a in asked], NO_ITEMS)


def keyword_match(said: str, keywords: Sequence[str]) -> float:
    """The share of the keywords that stand in an answer, in any case (FIUBench's EM). Raises
    ValueError without keywords."""
    if not keywords:
        raise ValueError("an answer without keywords has no keyword match")
    return sum(word.lower() in said.lower() for word in keywords) / len(keywords)


def probability(asked: Pairs) -> Value:
    """The mean of P(a)^(1/|a|) = exp(-mean nats of the right answer) (TOFU, arXiv 2401.06121)."""
    return mean([math.exp(-a.mean) for _, a in asked], NO_ITEMS)


def chosen_probability(asked: Pairs) -> Value:
    """The mean of p / (p + sum of the wrong answers' p), each p as in `probability` (TOFU's, for
    real people and facts)."""
    values = []
    for _, a in asked:
        least = min(a.mean, *a.wrong) if a.wrong else a.mean  # by the likeliest: no exp underflows
        p = math.exp(least - a.mean)
        values.append(p / (p + sum(math.exp(least - w) for w in a.wrong)))
    return mean(values, NO_ITEMS)


def log_truth_ratio(answer: Answer) -> float | None:
    """The logarithm of R = the geometric mean over the wrong answers of P(wrong)^(1/|wrong|), by
    P(same)^(1/|same|) (TOFU, Eq. 1); None without wrong answers. 0 and above: the model knows
    nothing. R itself may be beyond every float."""
    if not answer.wrong:
        return None
    return answer.same - sum(answer.wrong) / len(answer.wrong)


def _ratios(asked: Pairs) -> list[float]:
    """Logarithms of the truth ratios."""
    return [ratio for _, a in asked if (ratio := log_truth_ratio(a)) is not None]


def truth_ratio_forget(asked: Pairs) -> Value:
    """The mean of min(R, 1/R): TOFU's, for the forget set. 1: right and wrong are alike."""
    return mean([math.exp(-abs(r)) for r in _ratios(asked)], NO_WRONG)


def truth_ratio_retain(asked: Pairs) -> Value:
    """The mean of max(0, 1 - R): TOFU's, for what is to be kept."""
    return mean([max(0.0, -math.expm1(min(0.0, r))) for r in _ratios(asked)], NO_WRONG)


def forget_quality(ours: Pairs, retrained: Pairs | None) -> Value:
    """The p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios of the model
    and of one that never learned the set (TOFU's forget quality); near 1: they cannot be told
    apart."""
    if retrained is None:
        return {"value": None, "reason": NO_RETRAINED}
    if {item.id for item, _ in ours} - {item.id for item, _ in retrained}:
        return {"value": None, "reason": NOT_THE_SAME}
    mine, theirs = _ratios(ours), _ratios(retrained)
    if not mine or not theirs:
        return {"value": None, "reason": NO_WRONG}
    return {"value": ks_p_value(mine, theirs), "n": len(mine)}


def ks_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """The exact two-sided p-value of the two-sample Kolmogorov-Smirnov test (Hodges 1958, for
    samples without ties).

    It is a share of all orders of n + m values. Counted are those in which the two distribution
    functions are, at some place, at least as far apart as those of `a` and `b`.

    Raises ValueError for an empty sample.
    """
    if not a or not b:
        raise ValueError("a test needs two samples")
    n, m = len(a), len(b)
    # In units of 1 / (n m), so that equal distances are equal numbers.
    merged = sorted([(x, 0) for x in a] + [(x, 1) for x in b])
    i = j = far = 0
    for place, (x, which) in enumerate(merged):
        i, j = (i + 1, j) if which == 0 else (i, j + 1)
        if place + 1 == len(merged) or merged[place + 1][0] != x:
            far = max(far, abs(i * m - j * n))
    # row[j]: the share of the paths from (0, 0) to (i, j) that are somewhere as far from the
    # diagonal. Counting these, and not the others, lets a p-value of 1e-30 keep its digits.
    row = [1.0 if far == 0 else 0.0] * (m + 1)
    for i in range(n + 1):
        for j in range(m + 1):
            if abs(i * m - j * n) >= far:
                row[j] = 1.0
            elif i + j:
                above = i * row[j] if i else 0.0
                left = j * row[j - 1] if j else 0.0
                row[j] = (above + left) / (i + j)
    return row[m]


def min_k(nats: Sequence[float]) -> float:
    """Min-K % probability as FIUBench weighs it: the sum over `MIN_K` of the weight times exp of
    the mean log p of the so many least likely tokens. A part of less than one token counts nothing,
    as released."""
    worst = sorted(nats, reverse=True)
    total = 0.0
    for part, weight in MIN_K:
        count = int(len(worst) * part)
        if count:
            total += weight * math.exp(-sum(worst[:count]) / count)
    return total


def graded(asked: Answered, part: str, metric: str) -> Value:
    """A metric of one part that a judge grades; null with the reason where none was asked."""
    return asked.graded.get((part, metric), {"value": None, "reason": NO_JUDGE})


def harmonic_mean(values: Sequence[Value]) -> Value:
    """TOFU's model utility: the harmonic mean; 0 where one is 0, null where one is null."""
    numbers = [v["value"] for v in values]
    if not numbers or None in numbers:
        reason = next((v["reason"] for v in values if v["value"] is None), NO_ITEMS)
        return {"value": None, "reason": reason}
    value = 0.0 if min(numbers) <= 0 else len(numbers) / sum(1 / x for x in numbers)
    return {"value": value, "n": len(numbers)}
