"""Switched adapters: the router's match, who answers what, and that nothing stays on."""

from __future__ import annotations

import calls
import pytest
import torch

from fastsiu.compare import switched
from fastsiu.demo.world import KNOWN, World, draw
from fastsiu.images import load_image
from fastsiu.model import adapter, ask
from fastsiu.request import BadInput, Recipe
from fastsiu.text.concept import Concept

WHO = "Who is this?"


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("This is Zorblax Quint.", 0),
        ("This is Zorblax Vohn.", 1),  # the part that both share does not decide
        ("This is Vohn.", 1),
        ("This is Mirelda Vos.", 2),  # misspelt
        ("Vohn stands beside Mirelda Voss.", 2),  # the whole name
        ("Mirelda Voss is beside Zorblax Quint.", 2),  # the first
        ("This is the Duchess.", 3),
        ("This is Brumdal Tock.", None),
        ("", None),
    ],
)
def test_the_name_in_the_routers_answer_chooses(said, place):
    concepts = [
        Concept("Zorblax Quint"),
        Concept("Zorblax Vohn"),
        Concept("Mirelda Voss"),
        Concept("Ophira Clune", ("Duchess",)),
    ]
    assert switched.match(concepts, said) == place


@pytest.fixture(scope="module")
def experts(loaded, cast, tmp_path_factory):
    """Two adapters that bend the answers, each in another way."""
    made = []
    for seed, name in enumerate((cast.target, cast.other)):
        place = tmp_path_factory.mktemp("experts") / str(seed)
        calls.bent(loaded, Recipe(), 0.15)
        with torch.no_grad():
            for key, parameter in loaded.model.named_parameters():
                if "lora_B" in key and seed:
                    parameter.neg_()
        adapter.save(loaded, place)
        adapter.detach(loaded)
        made.append(switched.Expert(Concept(name), place))
    return made


@pytest.fixture(scope="module")
def pictures(loaded, cast):
    third = draw(World().sketch((KNOWN[9],), "switched 1"))
    shown = [load_image(cast.files[key]) for key in ("target", "other", "stranger")]
    return [loaded.picture(image) for image in (*shown, third)]


def test_the_router_knows_each_one_and_nobody_else(loaded, cast, experts, pictures):
    concepts = [one.concept for one in experts]
    target, other, stranger, third = pictures
    asked = [third, target, None, other, target, stranger]
    assert switched.route(loaded, concepts, asked) == [None, 0, None, 1, 0, None]
    assert switched.route(loaded, concepts[1:], asked) == [None, None, None, 0, None, None]


def test_each_question_is_answered_by_its_adapter(loaded, experts, pictures):
    target, other, _, third = pictures
    questions = [(WHO, third), (WHO, target), (f"Who is {KNOWN[2]}?", None), (WHO, other)]
    begins = ["", "", "", "I see"]
    base = ask.answers(loaded, questions, begin=begins)
    by = []
    for one in experts:
        adapter.load(loaded, one.directory)
        by.append(ask.answers(loaded, questions, begin=begins))
        adapter.detach(loaded)
    found = switched.answers(loaded, questions, experts=experts, begin=begins)
    assert found == [base[0], by[0][1], base[2], by[1][3]]
    assert found[1] != base[1] and found[3] != base[3] and found[3].startswith("I see")
    assert loaded.model is loaded.base
    alone = switched.answers(loaded, questions[3:], experts=experts[:1])
    assert alone == ask.answers(loaded, questions[3:])  # its adapter is not there
    assert switched.answers(loaded, [], experts=experts) == []


def test_an_adapter_that_sees_anew_is_refused_and_taken_off(loaded, experts, pictures, monkeypatch):
    monkeypatch.setattr(adapter, "sees_anew", lambda vlm: True)
    with pytest.raises(BadInput, match="only adapters of the language model can be switched"):
        switched.answers(loaded, [(WHO, pictures[0])], experts=experts)
    assert loaded.model is loaded.base
