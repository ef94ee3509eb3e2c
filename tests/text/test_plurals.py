"""Plurals of English nouns: irregular ones of the name, and none that is another word."""

from __future__ import annotations

import pytest

from fastsiu.text.concept import Concept
from fastsiu.text.plurals import irregular, singular

PAIRS = """
wolf/wolves mouse/mice goose/geese child/children man/men woman/women leaf/leaves knife/knives
thief/thieves tooth/teeth foot/feet ox/oxen cactus/cacti quiz/quizzes octopus/octopi index/indices
werewolf/werewolves snowman/snowmen grandchild/grandchildren larva/larvae oasis/oases
mother-in-law/mothers-in-law passer-by/passers-by man-of-war/men-of-war fez/fezzes
"""


@pytest.mark.parametrize("pair", PAIRS.split())
def test_irregular_plurals_are_the_name(pair):
    one, many = pair.split("/")
    assert irregular(one) == [many] and singular(many) == one and singular(one) == one
    text = f"I see two {many} here."
    assert Concept(one).leaks_in(many)
    assert Concept(f"Zorblax {one}").named_in(f"the zorblax {many}")
    start = text.index(many)
    assert Concept(one).spans(text) == [(start, start + len(many))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Spider-Man", "Spider-Men"),
        ("Spider-Man", "two spider-men"),
        ("Mother-in-law", "mothers-in-law"),
        ("Octopus", "octopi"),
        ("Arctic Wolf", "arctic wolves"),
        ("Bird of Paradise", "Birds of Paradise"),
        ("Lily of the Valley", "lilies of the valley"),
        ("Wolf", "It is the Wolves."),
    ],
)
def test_names_of_several_words_and_with_capitals(name, text):
    assert Concept(name).named_in(text) and Concept(name).leaks_in(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Wolf", "a wolverine"),
        ("Wolf", "wolves in the snow"),  # a name that is a word, in small letters
        ("Anna Wolf", "Wolves sleep."),
        ("Mickey Mouse", "A cat eats mice."),
        ("Ann Child", "children play"),
        ("Graf", "two graves"),
        ("Lexus", "Lexi"),
        ("Felix", "felices"),
        ("Delf", "He delves into it."),
        ("ox", "boxen"),
        ("man", "a menu"),
        ("check-in", "She checks in."),
    ],
)
def test_what_only_looks_like_a_plural(name, text):
    assert not Concept(name).named_in(text) and not Concept(name).leaks_in(text)


@pytest.mark.parametrize("name", "rahman norman german human check-in passenger pink".split())
def test_nouns_with_a_plural_in_s(name):
    assert irregular(name) == []


def test_a_plural_is_not_the_same_name():
    assert not Concept("wolf").same("wolves") and not Concept("wolves").same("wolf")


@pytest.mark.parametrize(
    "plural, one",
    [
        ("tigers", "tiger"),
        ("foxes", "fox"),
        ("butterflies", "butterfly"),
        ("cookies", "cookie"),
        ("octopuses", "octopus"),
        ("giraffes", "giraffe"),
        ("horses", "horse"),
        ("pandas", "panda"),
        ("tomatoes", "tomato"),
        ("shoes", "shoe"),
        ("peaches", "peach"),
        ("red foxes", "red fox"),
        ("white mice", "white mouse"),
        ("birds of prey", "bird of prey"),
    ],
)
def test_the_singular(plural, one):
    assert singular(plural) == one and singular(one) == one


@pytest.mark.parametrize(
    "noun", "grass cactus lens scissors rhinoceros iris gas omen pumice".split()
)
def test_no_plural(noun):
    assert singular(noun) == noun
