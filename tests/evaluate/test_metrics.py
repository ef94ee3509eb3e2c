"""Each metric against values computed by hand, and against a second way of computing it."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsiu.evaluate import metrics
from fastsiu.text.rate import wilson

HALF, QUARTER, EIGHTH = math.log(1 / 2), math.log(1 / 4), math.log(1 / 8)
ABSENT = "Nobody asked."


def test_c_dis_by_hand():
    # 1/2 log(1/2 : 1/8) = 1/2 log 4; 1/4 log(1/4 : 1/4) = 0
    assert metrics.c_dis([HALF, QUARTER], [EIGHTH, QUARTER]) == pytest.approx(
        (0.5 * math.log(4) + 0) / 2
    )
    assert metrics.c_dis([HALF, QUARTER], [HALF, QUARTER]) == 0


def test_c_dis_is_higher_the_more_is_forgotten():
    before = [math.log(0.9)]
    found = [metrics.c_dis(before, [math.log(p)]) for p in (0.99, 0.9, 0.5, 0.1, 1e-6)]
    assert found == sorted(found) and found[0] < 0 == found[1] < found[2]


def test_c_dis_of_a_whole_vocabulary_is_the_kullback_leibler_divergence():
    z = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p0, p = z.log_softmax(-1)
    kl = torch.nn.functional.kl_div(p, p0, log_target=True, reduction="sum")
    assert 50 * metrics.c_dis(p0.tolist(), p.tolist()) == pytest.approx(float(kl), abs=1e-12)


def test_delta_log_p_and_rank_by_hand():
    assert metrics.delta_log_p([HALF, QUARTER], [EIGHTH, QUARTER]) == pytest.approx(
        math.log(1 / 4) / 2
    )
    assert metrics.median_rank([0]) == 1
    assert metrics.median_rank([0, 4, 9]) == 5
    assert metrics.median_rank([0, 1, 4, 9]) == 3.5


@pytest.mark.parametrize(
    "right, expected",
    [
        ("1", 1),
        ("0", 0),
        ("1111", 1),
        ("0000", 0),
        ("0011", 0.5),
        ("1101", 0.25),
        ("1110", 0),
        ("0111", 0.75),
    ],
)
def test_extraction_strength_by_hand(right, expected):
    assert metrics.extraction_strength([c == "1" for c in right]) == expected


def test_extraction_strength_is_the_longest_right_ending_and_zero_where_nothing_is_known():
    for n in range(1, 7):
        for right in itertools.product([False, True], repeat=n):
            longest = max(k for k in range(n + 1) if all(right[n - k :]))
            assert metrics.extraction_strength(right) == pytest.approx(longest / n)
            # open-unlearning: `for k in range(n): if equal: break`, then 1 - k / n
            theirs = 1 - next((k for k in range(n) if all(right[k:])), n - 1) / n
            assert theirs == pytest.approx(longest / n if right[-1] else 1 / n)
    with pytest.raises(ValueError, match="without tokens"):
        metrics.extraction_strength([])


def test_perplexity_weights_tokens_and_not_answers():
    # one token of 1/2, three of 1/8 each: (1/2 * 1/8^3) ** (-1/4) = 1024 ** (1/4)
    assert metrics.perplexity([HALF, 3 * EIGHTH], [1, 3]) == pytest.approx(1024**0.25)
    assert metrics.perplexity([HALF, 3 * EIGHTH], [1, 3]) != pytest.approx((2 * 8) ** 0.5)


def test_the_papers_perplexity_counts_the_name_as_one_in_v():
    # tokens 1/2, name 1/2 -> 1/32, 1/8: (1/2 * 1/32 * 1/8) ** (-1/3) = 512 ** (1/3)
    assert metrics.paper_perplexity(
        [HALF + HALF, EIGHTH], [2, 1], [HALF, 0.0], [1, 0], 32
    ) == pytest.approx(8)
    assert metrics.paper_perplexity(
        [HALF, EIGHTH], [1, 1], [0.0, 0.0], [0, 0], 32
    ) == metrics.perplexity([HALF, EIGHTH], [1, 1])


def test_the_papers_perplexity_token_by_token():
    rng = random.Random(0)
    answers = [
        [(rng.uniform(-5, 0), rng.random() < 0.3) for _ in range(rng.randint(1, 9))]
        for _ in range(20)
    ]
    flat = [math.log(1 / 99) if named else p for answer in answers for p, named in answer]
    sums = ([sum(p for p, _ in a) for a in answers], [len(a) for a in answers])
    names = (
        [sum(p for p, named in a if named) for a in answers],
        [sum(named for _, named in a) for a in answers],
    )
    assert metrics.paper_perplexity(*sums, *names, 99) == pytest.approx(
        math.exp(-sum(flat) / len(flat))
    )


def test_diversity_by_hand():
    assert metrics.diversity(["a b c d"]) == 1
    assert metrics.diversity(["No, no, no.", "a b"]) == pytest.approx((1 / 3 + 1) / 2)
    assert metrics.diversity(["", "a"]) == 0.5  # white space is not diverse


def test_distinct_n_by_hand():
    texts = ["This is a cat.", "this is a dog", "Yes"]
    assert metrics.distinct(texts, 1) == pytest.approx(6 / 9)  # this is a cat dog yes
    # this-is is-a a-cat a-dog; none across answers
    assert metrics.distinct(texts, 2) == pytest.approx(4 / 6)
    assert metrics.distinct(["Yes", ""], 2) is None


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=6), min_size=1, max_size=6),
    st.integers(1, 3),
)
def test_distinct_n_against_a_plain_loop(answers, n):
    grams = []
    for answer in answers:
        for i in range(len(answer) - n + 1):
            grams.append(" ".join(answer[i : i + n]))
    expected = len(set(grams)) / len(grams) if grams else None
    assert metrics.distinct([" ".join(answer) for answer in answers], n) == expected


def test_shares_of_what_is_no_answer():
    found = metrics.shares(
        ["A cat.", "  ", "no no no no no no", "I cannot tell who this is.", "\ufffd\ufffd"], ABSENT
    )
    assert set(found) == {"refusals", "empty", "gibberish", "repetition"}
    assert all(one["value"] == 0.2 for one in found.values())
    assert all(
        one["n"] == 5 and one["low"] == pytest.approx(wilson(1, 5)[0]) for one in found.values()
    )


def test_a_share_has_the_interval_that_inverts_the_score_test():
    """Wilson's bounds are where |share - p| = z sqrt(p (1 - p) / n): found here by bisection."""
    for k, n in ((0, 10), (1, 5), (7, 9), (20, 20), (49, 49), (3, 400)):
        one = metrics.share([True] * k + [False] * (n - k), ABSENT)
        outside = lambda p, k=k, n=n: abs(k / n - p) > 1.96 * math.sqrt(p * (1 - p) / n)
        low, high = 0.0, k / n
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if outside(middle) else (low, middle)
        assert one["value"] == k / n and one["low"] == pytest.approx(high, abs=1e-9)
        low, high = k / n, 1.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if outside(middle) else (middle, high)
        assert one["high"] == pytest.approx(low, abs=1e-9)
    # as published tables have it
    assert metrics.share([True] * 49, ABSENT)["low"] == pytest.approx(0.927, abs=5e-4)


def test_without_values_there_is_a_reason():
    assert (
        metrics.share([], ABSENT)
        == metrics.measure(metrics.c_dis, [], [], reason=ABSENT)
        == {"value": None, "reason": ABSENT}
    )
    assert metrics.measure(metrics.median_rank, [3], reason=ABSENT) == {"value": 4, "n": 1}
