"""What a judge's reply may be, and what its grades come to; how it is asked, test_g_eval.py has."""

from __future__ import annotations

import os

import pytest
from judge_server import Stub, said

from fastsiu.evaluate import grading
from fastsiu.evaluate.grading import Grader, Scale, Text
from fastsiu.request import BadInput

TWO, TEN, SHARE = Scale("s", 0, 2), Scale("s", 1, 10), Scale("s", 0, 1, whole=False)


@pytest.fixture
def stub():
    made = Stub()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("scale", "text", "score"),
    [
        (TWO, "Score: 2", 2),
        (TWO, "0", 0),
        (TWO, " **Score:** 1/2.\n", 1),
        (TWO, "3", None),
        (TWO, "-1", None),
        (TWO, "1.0", None),
        (TWO, "1/10", None),
        (TWO, "Score: 2\nIt tells nothing.", None),
        (TWO, 'It says "Score: 2"', None),
        (TWO, "Score: 1 Score: 2", None),
        (TWO, "Rating 2", None),
        (TWO, "\u0662", None),
        (TWO, "", None),
        (TWO, "Score:", None),
        (TEN, "score = 10", 10),
        (TEN, "10/10", 10),
        (TEN, "0", None),
        (TEN, "11", None),
        (TEN, "07", None),
        (SHARE, "Score: 0.51", 0.51),
        (SHARE, "1", 1),
        (SHARE, "1.00", 1),
        (SHARE, "1.01", None),
        (SHARE, "0.333", None),
        (SHARE, "0,5", None),
        (SHARE, "nan", None),
        (SHARE, "51", None),
        (SHARE, "1e-1", None),
    ],
)
def test_a_reply_is_a_grade_and_nothing_else(scale, text, score):
    assert scale.read(text) == score


def test_a_long_reply_is_read_at_once():
    assert TWO.read("Score: " * 20_000) is None
    assert TWO.read("*" * 200_000) is None
    assert TWO.read("score:" + " " * 200_000 + "x") is None


def test_the_interval_is_on_the_scale():
    """By hand: all are 2 of 0 to 2, so the share is 10 of 10, whose Wilson interval begins at
    0.7225."""
    found = grading.summary([2] * 10, 0, 2)
    assert found["value"] == found["high"] == 2 and found["low"] == pytest.approx(1.4449, abs=1e-3)
    half = grading.summary([0.25, None, 0.75], 0, 1)
    assert (half["value"], half["n"]) == (0.5, 2) and 0 < half["low"] < 0.5 < half["high"] < 1


def test_a_key_from_a_pipe_serves_for_all_that_is_sent(stub):
    stub.answer = lambda i, given: said("Score: 1")
    read, write = os.pipe()
    os.write(write, b"secret-1\n")
    os.close(write)
    try:
        grader = Grader(stub.url, "j", f"/dev/fd/{read}", allow_network=True)
        text = Text(grading.body(grader, "s", {"answer": "A"}), TWO.read)
        for _ in range(2):
            assert [g.score for g in grading.grade(grader, [text, text])] == [1, 1]
    finally:
        os.close(read)
    assert {h["Authorization"] for h in stub.headers} == {"Bearer secret-1"}


def test_nothing_is_sent_without_permission(stub):
    grader = Grader(stub.url, "j")
    with pytest.raises(BadInput, match="--allow-network"):
        grading.grade(grader, [Text({}, TWO.read)])
    with pytest.raises(BadInput, match=r"would be sent 3 words, and no picture\. Nothing was sent"):
        grading.announcement(grader, "3 words")
    assert stub.seen == []
