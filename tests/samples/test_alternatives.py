"""Names that the untouched model weighs for the picture: how they are read from an answer, and that
the embedded model gives names that it knows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastsiu.samples import alternatives
from fastsiu.text.concept import Concept

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "opening, answer, name",
    [
        ("This is a", "This is a tiger.", "tiger"),
        ("This is a", "This is a red panda. It lives in trees.", "red panda"),
        ("The picture shows", "The picture shows Mount Fuji, a mountain.", "Mount Fuji"),
        ("This is", "This is Jean-Luc.", "Jean-Luc"),
        ("This is a", "This is a very big and tall animal.", None),  # no name: too many words
        ("This is a", "This is a yellow", None),  # it was cut
        ("This is a", "This is a 7.", None),
        ("This is a", "This is a.", None),
        ("This is", "This is it.", None),  # too short to be a name worth protecting
    ],
)
def test_a_name_is_what_stands_in_its_place(opening, answer, name):
    assert alternatives.name_after(opening, answer) == name


def test_the_embedded_model_weighs_names_that_it_knows(gathered):
    scene = gathered.scene
    names = alternatives.alternatives(scene, 6)
    assert names and len(names) <= 6 and len(set(names)) == len(names)
    assert not any(scene.forgotten_in(name) for name in names)
    answers = scene.ask([f"Who is {name}?" for name in names[:3]])
    assert any(name in answer for name, answer in zip(names, answers, strict=False))


def test_what_shares_a_word_with_the_name_is_not_protected(gathered):
    scene = replace(gathered.scene, concept=Concept("red fox"))
    assert alternatives._kin(scene, "fox") and alternatives._kin(scene, "pink fox")
    assert not alternatives._kin(scene, "wolf")


def test_a_model_that_does_not_give_the_name_gives_no_other(gathered):
    scene = replace(gathered.scene, concept=Concept("Nobody Known"))
    assert alternatives.alternatives(scene, 6) == []
