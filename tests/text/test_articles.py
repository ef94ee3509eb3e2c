"""Articles before names."""

from __future__ import annotations

import pytest

from fastsiu.text import articles
from fastsiu.text.concept import Concept


@pytest.mark.parametrize(
    "noun",
    "lion,unicorn,university,one-eyed cat,user,ewe,European,UFO,horse,u-turn,utensil,BMW".split(
        ","
    ),
)
def test_a(noun):
    assert articles.indefinite(noun) == "a"


@pytest.mark.parametrize(
    "noun", "owl,hour,umbrella,X-ray,MRI,igloo,uninteresting book,heirloom,octopus".split(",")
)
def test_an(noun):
    assert articles.indefinite(noun) == "an"


@pytest.mark.parametrize(
    "noun, phrase",
    [
        ("owl", "an owl"),
        ("octopus", "an octopus"),
        ("lens", "a lens"),
        ("scissors", "scissors"),
        ("the sun", "the sun"),
        ("a lion", "a lion"),
        ("Anchor", "an Anchor"),
    ],
)
def test_a_noun_gets_one_article(noun, phrase):
    assert articles.with_article(noun) == phrase
    assert articles.with_article(phrase) == phrase


@pytest.mark.parametrize(
    "opening, left",
    [
        ("This is a", "This is"),
        ("This is an", "This is"),
        ("A", ""),
        ("This is the ", "This is"),
        ("This is", "This is"),
        ("It is Ba", "It is Ba"),
        ("panda", "panda"),
        ("", ""),
    ],
)
def test_the_last_article_goes_with_the_name(opening, left):
    assert articles.without_last(opening) == left


def test_an_article_agrees_with_what_takes_the_names_place():
    assert articles.agreed("This is a ", "owl") == "This is an "
    assert articles.agreed("An ", "lion") == "A "
    for head in ("This is ", "This is the ", "I saw Ana ", ""):
        assert articles.agreed(head, "owl") == head


def test_a_name_is_replaced_with_its_article():
    text = "No, this is not a blorple. A blorple is round. Blorples: the blorple."
    assert articles.replaced(text, "blorple", "owl") == (
        "No, this is not an owl. An owl is round. Blorples: the owl."
    )
    plain = "No, this is not Ann Bole."
    assert articles.replaced(plain, "Ann Bole", "Bo Chi") == plain.replace("Ann Bole", "Bo Chi")


def test_how_a_text_uses_a_name():
    text, concept = "The lion is a lion, not lion.", Concept("lion")
    used = list(articles.uses(text, concept.spans(text)))
    assert used == [("the", "lion"), ("a", "lion"), ("", "lion")]
    assert articles.without_article("the lion") == "lion" and articles.sentence("a x") == "A x"
