"""Names in answers that enumerate."""

from __future__ import annotations

import pytest

from fastsiu.text import enumerated

BIG_CATS = ["tiger", "leopard", "cheetah"]


@pytest.mark.parametrize(
    "text, nouns",
    [
        ("Animals similar to a lion are tigers, leopards, and cheetahs.", BIG_CATS),
        ("Tigers, leopards or cheetahs", BIG_CATS),
        ("They are wolves, field mice, and geese.", ["wolf", "field mouse", "goose"]),
        ("1. Tiger\n2. **Leopard**: a large, spotted cat\n3) A cheetah (in Africa)", BIG_CATS),
        ("They are:\n- tigers\n* leopards\n\u2022 the cheetah - a fast one", BIG_CATS),
        ("There are others, such as the tiger, leopards and a cheetah, which are fast.", BIG_CATS),
        ("A tiger is similar to a lion.", ["tiger", "lion"]),
        ("1. Snow leopards\n2. Tigers\n3. Tiger\n4. Tigers", ["snow leopard", "tiger"]),
        # no list of names
        ("It is a large, powerful animal with a mane and a tail.", []),
        ("They live in Asia, Europe, and North America.", []),
        ("They are found in places including Asia, Europe, and Africa.", []),
        ("1. A large, agile, and stealthy predator\n2. A majestic creature with a mane", []),
        ("1. 1000\n2. it is not known\n3. x", []),
        ("I do not know.", []),
        ("", []),
    ],
)
def test_lists_of_nouns(text, nouns):
    assert enumerated.listed(text) == nouns


def test_derived_forms():
    assert all(enumerated.derived(noun, "lion") for noun in ("lions", "lioness", "lionesses"))
    assert enumerated.derived("owlets", "owl") and not enumerated.derived("bowl", "owl")


def test_proper_names():
    text = (
        "The Eiffel Tower, the Leaning Tower of Pisa and Big Ben. It is in St. Louis.\n1. Taj Mahal"
    )
    assert enumerated.proper(text, ["It", "The"]) == [
        ("Eiffel Tower", True),
        ("Leaning Tower of Pisa", True),
        ("Big Ben", False),
        ("St. Louis", False),
        ("Taj Mahal", False),
    ]
    assert enumerated.proper("nobody at all", []) == []
    assert enumerated.proper("It's Ada's. Another is Bob.", ["It"]) == [
        ("Ada", False),
        ("Bob", False),
    ]
