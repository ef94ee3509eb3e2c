"""The metrics of other people's benchmarks equal their definitions, worked by hand or by brute
force."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from fastsiu.evaluate.benchmarks import scores
from fastsiu.evaluate.benchmarks.form import Answer, Item


def item(answer: str, **fields) -> Item:
    return Item("i", "e", frozenset({"s"}), "t", "q", answer, **fields)


def longest_common(a: list[str], b: list[str]) -> int:
    """By trying every choice of words of `a`, in order."""
    for size in range(min(len(a), len(b)), 0, -1):
        for some in itertools.combinations(a, size):
            left = iter(b)
            if all(word in left for word in some):
                return size
    return 0


def test_rouge_l_is_the_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(60):
        a, b = ([rng.choice("uvwx") for _ in range(rng.randint(0, 7))] for _ in range(2))
        common = longest_common(a, b)
        precision, recall, f1 = scores.rouge_l(a, b)
        assert precision == (common / len(b) if b else 0)
        assert recall == (common / len(a) if a else 0)
        assert f1 == pytest.approx(2 * common / (len(a) + len(b)) if common else 0)


def test_rouge_splits_as_the_authors_do():
    assert scores.tokens("It's the B-52, née 1955!") == "it s the b 52 n e 1955".split()
    assert scores.tokens("doors door", lambda w: w[:4]) == ["door", "door"]
    assert scores.plain_words("It's  the B-52!") == ["its", "the", "b52"]


@pytest.mark.parametrize(
    ("said", "first", "apart"),
    [
        ("B", "B", "B"),
        ("b: Painter", "B", "B"),
        ("Bakers, so B", "B", "B"),
        ("The answer is C.", None, "C"),
        ("A or B", "A", None),
        ("", None, None),
        ("E", None, None),
    ],
)
def test_two_rules_read_a_letter(said, first, apart):
    assert scores.letter(said, "ABCD") == first
    assert scores.only_letter(said, "ABCD") == apart


def test_a_keyword_counts_in_any_case():
    assert scores.keyword_match("They paint RED doors", ["red", "doors", "roof"]) == 2 / 3
    with pytest.raises(ValueError, match="without keywords"):
        scores.keyword_match("x", [])


def test_truth_ratio_is_the_wrong_answers_geometric_mean_by_the_right_one():
    wrong = [0.2, 0.05, 0.1]
    answer = Answer("x", same=-math.log(0.4), wrong=tuple(-math.log(p) for p in wrong))
    expected = math.prod(wrong) ** (1 / 3) / 0.4
    assert math.exp(scores.log_truth_ratio(answer)) == pytest.approx(expected)
    pairs = [(item("a"), answer)]
    assert scores.truth_ratio_forget(pairs)["value"] == pytest.approx(expected)  # below 1
    assert scores.truth_ratio_retain(pairs)["value"] == pytest.approx(1 - expected)
    knows_nothing = Answer("x", same=2.0, wrong=(1.0, 1.0))
    assert scores.truth_ratio_forget([(item("a"), knows_nothing)])["value"] == pytest.approx(
        math.exp(-1)
    )
    assert scores.truth_ratio_retain([(item("a"), knows_nothing)])["value"] == 0
    assert scores.truth_ratio_forget([(item("a"), Answer("x"))])["value"] is None


@pytest.mark.parametrize("same, wrong", [(0.0, 800.0), (800.0, 0.0), (1e300, 0.0), (0.0, 1e300)])
def test_no_answer_is_too_unlikely(same, wrong):
    """Probabilities and ratios beyond the floats, which also a --retrained file may hold."""
    pairs = [(item("a"), Answer("x", nats=(same,), same=same, wrong=(wrong,)))]
    assert scores.truth_ratio_forget(pairs)["value"] == 0
    assert scores.truth_ratio_retain(pairs)["value"] == (same < wrong)
    assert scores.chosen_probability(pairs)["value"] == (same < wrong)
    assert scores.forget_quality(pairs, pairs)["value"] == 1


def test_forget_quality_compares_the_same_items():
    """Not all of ours with the few that --limit left of the other's."""
    items = [replace(item("a"), id=str(i)) for i in range(9)]
    asked = [(one, Answer("x", same=1.0, wrong=(i / 9,))) for i, one in enumerate(items)]
    few = scores.forget_quality(asked, asked[:3])
    assert few["value"] is None and "not asked all of these items" in few["reason"]
    assert scores.forget_quality(asked, [])["reason"] == few["reason"]
    assert scores.forget_quality(asked, asked)["value"] == 1


def test_probabilities_have_the_answers_length_taken_out():
    answer = Answer("x", nats=(1.0, 3.0), wrong=(2.0, 2.0))
    pairs = [(item("a"), answer)]
    assert scores.probability(pairs)["value"] == pytest.approx(math.exp(-2))
    assert scores.chosen_probability(pairs)["value"] == pytest.approx(1 / 3)


def ks_by_force(a, b) -> float:
    """Over all orders of the merged values."""

    def distance(marks) -> float:
        i = j = 0
        far = 0.0
        for mark in marks:
            i, j = (i + 1, j) if mark else (i, j + 1)
            far = max(far, abs(i / len(a) - j / len(b)))
        return far

    order = sorted([(x, True) for x in a] + [(x, False) for x in b])
    seen = distance([mark for _, mark in order])
    n = len(a) + len(b)
    every = [
        distance([k in chosen for k in range(n)])
        for chosen in map(set, itertools.combinations(range(n), len(a)))
    ]
    return sum(d >= seen - 1e-12 for d in every) / len(every)


def test_the_ks_p_value_is_the_share_of_orders_that_are_as_far_apart():
    rng = random.Random(1)
    for n, m in [(1, 1), (3, 4), (5, 5), (6, 3)]:
        for shift in (0.0, 0.5, 3.0):
            a = [rng.random() for _ in range(n)]
            b = [rng.random() + shift for _ in range(m)]
            assert scores.ks_p_value(a, b) == pytest.approx(ks_by_force(a, b), rel=1e-12)


def test_a_tiny_ks_p_value_keeps_its_digits():
    """Two samples that do not overlap: 2 of all orders are as far apart."""
    n = 60
    found = scores.ks_p_value(range(n), range(1000, 1000 + n))
    assert found == pytest.approx(2 / math.comb(2 * n, n), rel=1e-9) and found < 1e-30
    assert scores.ks_p_value([1.0, 2.0], [1.0, 2.0]) == 1.0
    with pytest.raises(ValueError, match="two samples"):
        scores.ks_p_value([], [1.0])


def test_min_k_weighs_the_least_likely_tokens():
    nats = [float(k) for k in range(10)]  # 10 % is one token, 50 % five
    worst = lambda k: math.exp(-sum(sorted(nats)[-k:]) / k)
    expected = 0.3 * worst(1) + 0.3 * worst(2) + 0.2 * worst(3) + 0.1 * worst(4) + 0.1 * worst(5)
    assert scores.min_k(nats) == pytest.approx(expected)
    assert scores.min_k([2.0]) == 0.0  # half a token is none
    assert scores.min_k([2.0, 4.0]) == pytest.approx(0.1 * math.exp(-4))


def test_utility_is_a_harmonic_mean():
    value = lambda x: {"value": x, "n": 1}
    assert scores.harmonic_mean([value(0.5), value(1.0)])["value"] == pytest.approx(2 / 3)
    assert scores.harmonic_mean([value(0.0), value(1.0)])["value"] == 0.0
    missing = {"value": None, "reason": "Nobody asked."}
    assert scores.harmonic_mean([value(1.0), missing]) == missing


def test_stems_need_a_package_that_is_named_where_it_is_missing(monkeypatch):
    import sys

    from fastsiu.request import BadInput

    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)
    with pytest.raises(BadInput, match=r"fastsiu\[benchmarks\]"):
        scores.porter()
