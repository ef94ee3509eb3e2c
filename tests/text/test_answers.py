"""The first sentence of an answer, whether two answers begin alike, and what repeats itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsiu.text.answers import (
    denies_it,
    first_sentence,
    holds,
    is_degenerate,
    is_ended,
    repeats,
    same_answer,
    same_beginning,
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Ann is a judge. She likes olives.", "Ann is a judge."),
        ("  Ann is a judge!  Really.", "Ann is a judge!"),
        ("Dr. J. K. Roe was born in St. Ives. He left.", "Dr. J. K. Roe was born in St. Ives."),
        ("1. Giraffes are tall. 2. They eat.", "1. Giraffes are tall."),
        ("A calf weighs 3.5 tons. It eats.", "A calf weighs 3.5 tons."),
        ("See e.g. the coat of arms. It is red.", "See e.g. the coat of arms."),
        ('He said "Hello there!" and went. Then', 'He said "Hello there!" and went.'),
        ('She said "I am here." He left.', 'She said "I am here."'),
        ("It is big... really big. Yes", "It is big... really big."),
        ("The answer is no. He left.", "The answer is no."),
        ("no end at all, cut in the mid", "no end at all, cut in the mid"),
        ("Yes. He was born in Harrow. He left.", "Yes. He was born in Harrow."),
        ("Harrow.", "Harrow."),
        ("这是一个戴帽子的男人。他很高。", "这是一个戴帽子的男人。"),
        ("「これは猫です。」そう言った。", "「これは猫です。」"),
        ("The giraffe is tall\n\nThe giraffe eats", "The giraffe is tall"),
        ("Here are two facts:\n\n1. It is tall. 2. It", "Here are two facts:\n\n1. It is tall."),
        ("", ""),
        ("...", "..."),
    ],
)
def test_first_sentence(text, sentence):
    assert first_sentence(text) == sentence


@given(st.text(alphabet=st.sampled_from("aB1 .!?\n。」\"'")))
def test_a_first_sentence_begins_the_text_and_is_its_own_first_sentence(text):
    sentence = first_sentence(text)
    assert text.strip().startswith(sentence) and bool(sentence) is bool(text.strip())
    assert first_sentence(sentence) == sentence


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("Ann is a judge. She likes olives and", "ann is  a judge. She has a cat", True),
        ("Ann is a judge. She likes olives.", "Ann is a baker. She likes olives.", False),
        ("Yes. He was born in Harrow.", "Yes. He was born in Tarn.", False),
        ("A red hat", "A red hat and a knife.", False),
        ("", "", True),
        ("", "Ann.", False),
        ("Ann.", "", False),
    ],
)
def test_same_beginning(before, after, same):
    assert same_beginning(before, after) is same


def test_an_answer_cut_inside_its_first_sentence_counts_as_far_as_it_goes():
    whole = "The giraffe is a tall animal of the savanna."
    cut = whole[:-4]
    assert same_beginning(cut, whole, (True, False)) and same_beginning(whole, cut, (False, True))
    assert same_beginning(whole + " It", whole + " They", (True, True))
    assert not same_beginning(cut, whole)
    assert not same_beginning(whole, cut, (True, False))
    assert not same_beginning(cut, whole.replace("tall", "small"), (True, True))
    assert not same_beginning("", whole, (True, True))


@given(st.text(), st.text())
def test_what_is_the_same_answer_begins_alike(one, other):
    assert same_beginning(one, one)
    assert same_beginning(one, other) == same_beginning(other, one)
    assert same_beginning(one, other) or not same_answer(one, other)


def test_is_ended():
    assert is_ended("Ann.") and is_ended('"Ann!" ') and is_ended("猫。")
    assert not is_ended("Ann") and not is_ended("") and not is_ended("3.5 tons")


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("This is a white-furred, white-furred animal.", True),
        ("a red box, a red ball", True),
        ("This is a white animal with a black stripe.", False),
        ("It is red, red and blue.", False),
        ("", False),
    ],
)
def test_two_words_that_come_again_beside_each_other(text, again):
    assert repeats(text) is again


def test_a_loop_between_hyphens_is_repetition():
    assert is_degenerate("a furred-white-black-black-black-black-black-black") == "repetition"
    assert is_degenerate("a state-of-the-art, up-to-date, easy-to-use machine") is None


@pytest.mark.parametrize(
    ("text", "keyword", "held"),
    [
        ("他住在上海市。", "上海", True),
        ("大阪で生まれました", "大阪", True),
        ("부산에서 태어났다", "부산", True),
        ("在Lyon出生", "lyon", True),
        ("a colyonic word", "lyon", False),
        ("Lyonnais", "lyon", False),
        ("in Lyon's centre", "lyon", True),
    ],
)
def test_a_keyword_stands_by_itself_where_words_have_spaces(text, keyword, held):
    assert holds(text, [keyword]) is held


@pytest.mark.parametrize(
    ("text", "denied"),
    [
        ("This is Orla, not Tim.", False),
        ("It is not Tim; it is Orla.", False),
        ("I doubt it, but that could be Orla.", False),
        ("No, Orla is older.", True),
        ("Orla? I cannot say.", True),
        ("That is not Dr. Orla.", True),
        ("It is not Orla. Orla is older.", True),
        ("I do not know.", True),
        ("It is Orla.", False),
    ],
)
def test_what_denies_a_name(text, denied):
    assert denies_it(text, lambda piece: "Orla" in piece) is denied
