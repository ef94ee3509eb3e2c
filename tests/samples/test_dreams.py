"""Dreamed neighbours: accepted only where the teacher names them, the same for the same seed, and
no weight learns."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsiu import session
from fastsiu.model import features
from fastsiu.model.ask import Reply
from fastsiu.model.turns import Picture
from fastsiu.samples import dreams, spaces, targets
from fastsiu.samples.spaces import vision_space
from fastsiu.samples.wishes import Wish, fulfil
from fastsiu.text.concept import Concept

torch.set_num_threads(1)


def numbers(picture):
    pooled = picture.features["pooler_output"]
    return (
        pooled
        if isinstance(pooled, torch.Tensor)
        else torch.cat([x.reshape(-1, x.shape[-1]) for x in pooled])
    )


def again(gathered, **changes):
    """The dreams of a scene that has none yet."""
    recipe, pictures = replace(gathered.recipe, **changes), gathered.scene.pictures[:1]
    scene = replace(gathered.scene, recipe=recipe, pictures=pictures, named=[None])
    record = session._dream(scene)
    return scene, record


def test_the_teacher_names_every_dream_in_every_training_wording(gathered, cast):
    scene = gathered.scene
    dreamed = [(i, name) for i, name in enumerate(scene.named) if name]
    assert dreamed and len(dreamed) <= len(cast.others)
    for index, name in dreamed:
        assert name in cast.others
        questions = targets.wordings()["who"]["train"]
        for question, answer in zip(questions, scene.ask(questions, index), strict=True):
            assert Concept(name).named_in(answer), (question, answer)
            assert not scene.concept.named_in(answer)


@pytest.mark.slow
def test_dreams_repeat_for_a_seed_and_not_for_another(gathered):
    one, record = again(gathered)
    two, _ = again(gathered)
    other, _ = again(gathered, seed=1)
    assert one.named == two.named == gathered.scene.named
    for a, b in zip(one.pictures[1:], two.pictures[1:], strict=True):
        assert torch.equal(numbers(a), numbers(b))
    assert record == [
        {"name": n, "accepted": Counter(one.named)[n], "of": 1} for n in gathered.scene.neighbours
    ]
    if len(other.pictures) > 1:
        assert not torch.equal(numbers(one.pictures[1]), numbers(other.pictures[1]))


def test_no_weight_learns_or_changes_while_dreaming(gathered):
    before = {k: v.clone() for k, v in gathered.vlm.base.state_dict().items()}
    scene, _ = again(gathered, dream_steps=3)
    assert all(p.grad is None and not p.requires_grad for p in gathered.vlm.base.parameters())
    assert all(torch.equal(v, before[k]) for k, v in gathered.vlm.base.state_dict().items())
    assert not any(numbers(p).requires_grad for p in gathered.scene.pictures)


def test_a_dream_that_the_teacher_does_not_name_is_dropped(gathered):
    """Without a step of optimisation the teacher still names the concept."""
    scene, record = again(gathered, dream_steps=0, dream_noise=0.0)
    assert (
        len(scene.pictures) == 1
        and scene.named == [None]
        and all(r["accepted"] == 0 for r in record)
    )


def test_no_dreams_on_request(gathered):
    scene, record = again(gathered, dreams=0)
    assert record == [] and len(scene.pictures) == 1


def test_a_dream_need_not_end_what_the_teacher_did_not_end(gathered, cut):
    """The longest answer allowed is just too short for the end of "This is NAME.", which the
    teacher then says of no dream."""
    said = dreams.told(gathered.scene)
    assert all(reply.closed for pairs in said.values() for _, reply in pairs)
    question = targets.wordings()["who"]["train"][0]
    turn = gathered.vlm.encode(
        question, gathered.scene.ask([question], 0)[0], gathered.scene.pictures[0]
    )
    cut(len(turn.labels) - 2)
    for name, pairs in dreams.told(gathered.scene).items():
        (reply,) = (reply for asked, reply in pairs if asked == question)
        assert name in reply.text and not reply.closed


def test_vision_space_starts_at_the_picture(gathered):
    """The function from where one dreams to the language model's features maps the picture's own
    point to its features."""
    start = gathered.scene.pictures[0]
    first, project = vision_space(gathered.vlm, start)
    with torch.no_grad():
        made = Picture(start.image, project(first))
    assert torch.allclose(numbers(made), numbers(start), atol=1e-5)


def test_a_dream_is_accepted_by_the_name_alone_whatever_follows(gathered):
    """What the model says after the name varies; a name that it does not give refuses the dream."""
    scene, start = gathered.scene, gathered.scene.pictures[0]
    question = scene.words["who"]["train"][0]
    said = scene.ask([question], 0)[0]
    name = scene.concept.name
    end = said.index(name) + len(name)
    still = replace(scene, recipe=replace(scene.recipe, dream_steps=0, dream_noise=0.0))
    ramble = Reply(said[:end] + " who wears seventeen hats", closed=False)
    wrong = Reply(said.replace(name, "Nobody Known"))
    wish = lambda reply, must: Wish(start, [(question, reply)], 0.0, must=must)
    by_name, by_all, other = fulfil(
        still,
        [
            wish(ramble, dreams._gives(name)),
            wish(ramble, lambda reply: len(reply.text) + 1),
            wish(wrong, dreams._gives("Nobody Known")),
        ],
    )
    assert by_name is not None and by_all is None and other is None


def test_a_frame_ends_with_its_first_sentence():
    long = Reply("This is Ann. Ann is a big purple thing and Ann", closed=False)
    assert dreams._opening(long) == Reply("This is Ann.", closed=False)
    assert dreams._opening(Reply("This is Ann.")) == Reply("This is Ann.")


def dreamer(gathered, **changes):
    """The wishes of a few dreams, each of another name, at the picture and a view of it."""
    scene = replace(gathered.scene, recipe=replace(gathered.recipe, **changes))
    told = dreams.told(scene)
    starts = [scene.pictures[0], scene.views[0], scene.pictures[0]]
    names = [*told, *told][: len(starts)]
    return scene, [
        Wish(start, told[name], 1e-3, must=dreams._gives(name))
        for start, name in zip(starts, names, strict=True)
    ]


def test_a_dream_in_pixels_is_a_picture_that_the_tower_sees(gathered):
    """A dream is what the tower makes of its picture, in 8 bits; only a part of it changed."""
    scene, wishes = dreamer(gathered, dream_steps=20, dream_in="pixels")
    found = [picture for picture in fulfil(scene, wishes) if picture is not None]
    assert found and all(picture.real for picture in found)
    for picture in found:
        again = gathered.vlm.picture(picture.image)
        assert torch.equal(numbers(again), numbers(picture))
        start = min(
            (wish.start for wish in wishes if wish.start.image.size == picture.image.size),
            key=lambda one: float((levels(one.image) - levels(picture.image)).abs().mean()),
        )
        moved = (levels(start.image) - levels(picture.image)).abs().amax(-1)
        assert 0 < float((moved > 2).float().mean()) < 0.9


def levels(image):
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32))


@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("at_once", [None, 2])
def test_dreams_together_have_the_gradients_of_each_alone(gathered, at_once, light):
    """Also where the tower's graph is built again for a few at a time."""
    vlm, scene = gathered.vlm, gathered.scene
    starts = [scene.pictures[0], scene.views[0], scene.views[1]]
    members = range(len(starts))

    def gradients(together, dream_batch):
        space = spaces.space_of(vlm, replace(scene.recipe, dream_in="pixels"), starts, 0)
        assert isinstance(space, spaces.InPixels) and space.at_once
        space.at_once, space.light = together, light
        before, vlm.budget = vlm.budget, replace(vlm.budget, dream_batch=dream_batch)
        try:
            seen = [features.feature_tensors(one)[0] for one in space.shown(members)]
            sum((k + 1) * x.square().sum() for k, x in enumerate(seen)).backward()
        finally:
            vlm.budget = before
        return [x.detach() for x in seen], [grid.grad for grid in space.grids]

    for one, own in zip(gradients(True, at_once), gradients(False, None), strict=True):
        assert all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(one, own, strict=True)
        )
        assert all(bool(x.any()) for x in own)


def test_a_graph_of_the_tower_is_kept_where_it_is_light(gathered, monkeypatch):
    vlm, scene = gathered.vlm, gathered.scene
    recipe, starts = replace(scene.recipe, dream_in="pixels"), [scene.pictures[0], scene.views[0]]
    space = spaces.space_of(vlm, recipe, starts, 0)
    pixels = space.inputs[0]["pixel_values"]
    assert space.light and space._graph() > pixels.nbytes
    monkeypatch.setattr(spaces, "LIGHT", 2 * space._graph() - 1)
    assert not spaces.space_of(vlm, recipe, starts, 0).light
    monkeypatch.undo()
    monkeypatch.setattr(vlm, "budget", replace(vlm.budget, sparing=True))
    assert not spaces.space_of(vlm, recipe, starts, 0).light


def test_few_cells_move_and_those_that_matter_most(gathered):
    grid = torch.zeros(3, 4, 4, requires_grad=True)
    optimiser = spaces.FewCells([{"params": [grid], "lr": 1.0}])
    slope = torch.full((3, 4, 4), 1e-3)
    slope[:, 1, 2] = -1.0
    for _ in range(5):
        grid.grad = slope.clone()
        optimiser.step()
    assert torch.nonzero(grid.detach().norm(dim=0)).tolist() == [[1, 2]]
    assert (grid[:, 1, 2] > 0).all()


def test_where_no_processor_can_be_looked_through_dreams_are_features(gathered, monkeypatch):
    monkeypatch.setattr(spaces, "lens", lambda vlm, size: None)
    scene, record = again(gathered, dream_in="pixels")
    assert session.MIXED in scene.notes and record
    assert all(not picture.real for picture in scene.pictures[1:])
    vision = replace(gathered.scene.recipe, adapt="vision", dream_in="pixels")
    bare = replace(gathered.scene, recipe=vision, pictures=gathered.scene.pictures[:1])
    assert session._dream(bare) == []


def test_a_view_that_cannot_be_looked_through_is_told_as_well(gathered, monkeypatch):
    """Dreams start at views, too, which may have another size."""
    scene, own = gathered.scene, gathered.scene.pictures[0].image.size
    assert any(view.image.size != own for view in scene.views)
    real = spaces.lens
    monkeypatch.setattr(spaces, "lens", lambda vlm, size: real(vlm, size) if size == own else None)
    vision = replace(scene.recipe, adapt="vision", dream_in="pixels")
    bare = replace(scene, recipe=vision, pictures=scene.pictures[:1], notes=[])
    assert session._dream(bare) == [] and session.MIXED in bare.notes


@pytest.mark.parametrize("error", [ValueError, IndexError, AssertionError, TypeError])
def test_a_tower_that_takes_one_picture_sees_one_at_a_time(gathered, monkeypatch, error):
    vlm, scene = gathered.vlm, gathered.scene
    recipe, starts = replace(scene.recipe, dream_in="pixels"), [scene.pictures[0], scene.views[0]]
    seen = vlm.seen

    def single(inputs):
        if len(inputs["pixel_values"]) > 1:
            raise error("one picture")
        return seen(inputs)

    monkeypatch.setattr(vlm, "seen", single)
    space = spaces.space_of(vlm, recipe, starts, 0)
    assert not space.at_once and len(space.shown([0, 1])) == 2


def test_a_tower_that_mixes_pictures_sees_one_at_a_time(gathered, monkeypatch):
    """Two pictures at once have to get the features that each gets alone."""
    vlm, scene = gathered.vlm, gathered.scene
    recipe, starts = replace(scene.recipe, dream_in="pixels"), [scene.pictures[0], scene.views[0]]
    assert spaces.space_of(vlm, recipe, starts, 0).at_once
    seen = vlm.seen

    def mixing(inputs):
        found = seen(inputs)
        return features.map_features(found, lambda x: x + 0.1 * x.mean(0, keepdim=True))

    monkeypatch.setattr(vlm, "seen", mixing)
    assert not spaces.space_of(vlm, recipe, starts, 0).at_once
