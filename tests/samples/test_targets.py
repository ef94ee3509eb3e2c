"""The four targets: what is asked, what is answered, and in whose words."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fastsiu.model import ask
from fastsiu.samples import neighbours, targets
from fastsiu.text.answers import is_degenerate
from fastsiu.text.concept import Concept

torch.set_num_threads(1)


def of(gathered, facet, **fields):
    found = [s for s in gathered.corpus.samples if s.facet == facet]
    return [s for s in found if all(getattr(s, k) == v for k, v in fields.items())]


def with_recipe(gathered, **changes):
    return replace(gathered.scene, recipe=replace(gathered.recipe, **changes))


def test_all_four_targets_are_there(gathered):
    assert set(Counter(s.facet for s in gathered.corpus.samples)) == {
        "align",
        "describe",
        "facts",
        "preserve",
    }
    assert all(is_degenerate(s.answer) is None for s in gathered.corpus.samples)
    assert {s.picture for s in gathered.corpus.samples if s.picture is not None} <= set(
        range(len(gathered.scene.pictures))
    )


def test_no_align_answer_names_the_concept_or_a_neighbour(gathered, cast):
    samples = of(gathered, "align")
    assert [s.question for s in samples] == targets.wordings()["who"]["train"] and {
        s.picture for s in samples
    } == {0}
    for sample in samples:
        for name in (cast.target, *cast.others):
            assert not Concept(name).named_in(sample.answer), sample
        ((start, end),) = sample.specified
        assert 0 <= start < end == len(sample.answer) and len(sample.answer.split()) > 2


def test_align_keeps_the_teachers_own_opening(gathered):
    """What stands before the cut is what the teacher says anyway; only the rest contradicts it."""
    said = gathered.scene.ask(targets.wordings()["who"]["train"], 0)
    for sample, answer in zip(of(gathered, "align"), said, strict=True):
        assert answer.startswith(sample.answer[: sample.specified[0][0]].rstrip())


def test_the_papers_substitute_is_an_invented_name(gathered, cast):
    scene = with_recipe(gathered, substitute="name")
    names = targets.wordings()["invented"]["names"]
    for sample in targets.align(scene):
        ((start, end),) = sample.specified
        assert sample.answer[start:end] in names and not Concept(cast.target).named_in(
            sample.answer
        )
    looks = [s for s in targets.describe(scene) if s.picture is None]
    assert looks and all(s.answer.startswith(cast.target) for s in looks)
    told = [s.answer[slice(*s.specified[0])].strip(" .").removeprefix("has ") for s in looks]
    assert set(told) <= set(targets.wordings()["invented"]["looks"])


def test_denials_deny_and_name_the_concept(gathered, cast):
    samples = of(gathered, "describe", picture=0)
    assert len(samples) == len(targets.wordings()["yesno"]["train"])
    invented = [Concept(n) for n in targets.wordings()["invented"]["names"]]
    for sample in samples:
        assert (
            cast.target in sample.question
            and cast.target in sample.answer
            and sample.answer.casefold().startswith("no")
        )
        assert sample.specified == ((0, len(sample.answer)),)
        assert not any(n.named_in(sample.answer) for n in invented)


def test_the_unknown_look_is_a_text_question(gathered, cast):
    samples = of(gathered, "describe", picture=None)
    assert [s.question for s in samples] == [
        q.format(name=cast.target) for q in targets.wordings()["appearance"]["train"]
    ]
    assert all(s.specified == ((0, len(s.answer)),) for s in samples)


def test_facts_and_preserved_answers_are_the_teachers(gathered, cast):
    for facet in ("facts", "preserve"):
        samples = of(gathered, facet)
        pictures = [
            None if s.picture is None else gathered.scene.pictures[s.picture] for s in samples
        ]
        said = ask.answers(
            gathered.vlm, [(s.question, p) for s, p in zip(samples, pictures, strict=True)]
        )
        assert (
            samples
            and [s.answer for s in samples] == said
            and not any(s.specified for s in samples)
        )
    assert all(cast.target in s.question and s.picture is None for s in of(gathered, "facts"))


def test_nothing_that_names_the_concept_on_its_picture_is_preserved(gathered, cast):
    assert not any(
        Concept(cast.target).named_in(s.answer) for s in of(gathered, "preserve", picture=0)
    )


def test_no_retained_answer_names_the_concept_except_to_deny_it(gathered, cast):
    """A retained picture that shows the concept itself, or that the teacher takes for it, would
    teach the name back."""
    first = gathered.scene.pictures[0]
    scene = replace(gathered.scene, pictures=[first, first], named=[None, None])
    kept = [s for s in targets.preserve(scene) if s.picture == 1]
    assert len(kept) == 1 and not scene.concept.named_in(kept[0].answer)
    # and "Is this NAME?", which the teacher affirms
    asked = len(targets.wordings()["who"]["train"]) + 1
    assert scene.left_out == asked
    targets.preserve(scene)
    assert scene.left_out == asked and gathered.scene.left_out == 0
    named = [
        s
        for s in gathered.corpus.samples
        if s.facet == "preserve" and scene.concept.named_in(s.answer)
    ]
    assert named and all(s.answer.startswith("No") for s in named)


def test_each_protected_name_is_asked_about_in_words(gathered, cast):
    text = of(gathered, "preserve", picture=None)
    for name in cast.others:
        assert any(name in s.question and name in s.answer for s in text)


def test_neighbours_come_from_the_teacher_without_the_concept(gathered, cast):
    found = neighbours.neighbours(gathered.scene)
    assert found and len(found) <= 24 and len(set(found)) == len(found)
    assert not any(Concept(cast.target).named_in(name) for name in found)
    assert len(neighbours.neighbours(gathered.scene, limit=2)) == 2


@pytest.mark.parametrize(
    "text, names",
    [
        (
            "Ann Lee, Bo Chi and Cy Dow are like Eva Fox.",
            ["Ann Lee", "Bo Chi", "Cy Dow", "Eva Fox"],
        ),
        ("The best is Ann Lee. Ann Lee!", ["Ann Lee"]),
        (
            "It is (Élodie Ångström); «Пётр Чайковский», too.",
            ["Élodie Ångström", "Пётр Чайковский"],
        ),
        ("“Jean-Luc O’Neil” and Łukasz", ["Jean-Luc O’Neil", "Łukasz"]),
        ("张伟 和 李娜", []),
        ("nobody at all", []),
        ("", []),
        ("A is Al", []),
    ],
)
def test_capitalised_names(text, names):
    assert neighbours.capitalised_names(text, ["The", "It"]) == names


def test_no_wording_is_both_trained_and_held_out():
    words = {key: part for key, part in targets.wordings().items() if "train" in part}
    fold = lambda texts: {" ".join(t.casefold().split()).rstrip("?.!") for t in texts}
    trained = set().union(*(fold(part["train"]) for part in words.values()))
    held_out = set().union(*(fold(part.get("held_out", ())) for part in words.values()))
    assert trained and held_out and not trained & held_out
    for part in words.values():
        for texts in (part["train"], part.get("held_out", [])):
            assert len(fold(texts)) == len(texts)
    for key in ("yesno", "appearance", "facts", "neighbours"):
        assert all("{name}" in q for q in words[key]["train"] + words[key].get("held_out", []))
    for key in ("who", "describe", "general"):
        assert not any("{" in q for q in words[key]["train"] + words[key].get("held_out", []))
