"""Holding the features of kept pictures: which they are, the term and its gradient against
differences in fp64, and that a training with it moves them less."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import shares as made
import torch

from fastsiu import objectives, session, train
from fastsiu.model import adapter
from fastsiu.model.features import feature_tensors
from fastsiu.objectives import siu
from fastsiu.request import BadInput, Recipe
from fastsiu.step.anchor import EACH_STEP, VIEWS, Anchor
from fastsiu.step.look import Look

RECIPE = Recipe(
    steps=6, lr=1e-2, rank=4, batch_size=8, adapt="projector", anchor=3.0, early_stop=False
)


def begun(recipe=RECIPE):
    """A model with a fresh adapter, its samples and lessons, and its anchor."""
    loaded = made.load()
    ready = [made.prepared(loaded, recipe)]
    samples, lessons = session.run_teacher(loaded, ready, recipe, lambda text: None)
    corpora = [samples, *(one for one, _ in lessons)]
    return SimpleNamespace(
        loaded=loaded, samples=samples, lessons=lessons, anchor=Anchor.of(loaded, recipe, corpora)
    )


def bent(loaded, by=0.1):
    """Moves the factors, so that features differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in loaded.model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))


def test_kept_pictures_are_held_and_the_concepts_is_not():
    found = begun()
    held = {picture.image.getpixel((0, 0)) for picture in found.anchor.pictures}
    concept = found.samples.pictures[0].image.getpixel((0, 0))
    kept = {p.image.getpixel((0, 0)) for p in found.samples.pictures[1:]}
    assert concept not in held and held & kept
    assert len(found.anchor.pictures) % (VIEWS + 1) == 0
    assert all(
        x.device.type == "cpu" for p in found.anchor.pictures for x in feature_tensors(p.features)
    )


def test_nothing_is_held_without_a_weight_or_a_picture():
    found = begun()
    plain = Anchor.of(found.loaded, RECIPE.with_overrides(anchor=0.0), [found.samples])
    assert plain.pictures == () and plain.note == "" and plain.backward(1) is None
    alone = found.samples.pick([0, 1, 2])
    none = Anchor.of(found.loaded, RECIPE, [alone])
    assert none.pictures == [] and "--retain" in none.note and none.backward(1) is None
    assert found.anchor.note == ""


def test_what_has_not_moved_costs_nothing_and_a_step_holds_so_many():
    found, seen = begun(), []
    assert found.anchor.backward(1) == 0
    many = Anchor(found.loaded, RECIPE, list(found.anchor.pictures) * 10)
    bent(found.loaded)
    moved = Anchor.moved
    count = lambda own, picture: seen.append(picture.image) or moved(own, picture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Anchor, "moved", count)
        first, again, other = (many.backward(step) for step in (1, 1, 2))
    assert first == again != other and len(seen) == 3 * EACH_STEP
    assert seen[:EACH_STEP] == seen[EACH_STEP : 2 * EACH_STEP] != seen[2 * EACH_STEP :]


def test_the_term_and_its_gradient_are_those_of_its_formula():
    """weight * mean of |f - f0|^2 / |f0|^2, differences of it in fp64."""
    found = begun()
    loaded, anchor = found.loaded, found.anchor
    loaded.model.double()
    bent(loaded)

    def term():
        total = 0.0
        for picture in anchor.pictures:
            with adapter.teacher(loaded), torch.no_grad():
                before = feature_tensors(loaded.seen(inputs(picture)))
            now = feature_tensors(loaded.seen(inputs(picture)))
            apart = sum((a - b).square().sum() for a, b in zip(now, before, strict=True))
            total = total + apart / sum(b.square().sum() for b in before)
        return RECIPE.anchor * total / len(anchor.pictures)

    def inputs(picture):
        given = loaded.image_inputs(picture.image)
        return {**given, "pixel_values": given["pixel_values"].double()}

    assert len(anchor.pictures) <= EACH_STEP
    loaded.model.zero_grad()
    found_term = anchor.backward(1)
    trained = [p for p in loaded.model.parameters() if p.requires_grad]
    taken = [p.grad.clone() for p in trained]
    with torch.no_grad():
        torch.testing.assert_close(found_term.double(), term(), rtol=1e-4, atol=1e-6)
        for p, gradient in zip(trained[:2], taken[:2], strict=True):
            at, step = (0, int(gradient[0].abs().argmax())), 1e-4
            p[at] += step
            up = term()
            p[at] -= 2 * step
            down = term()
            p[at] += step
            torch.testing.assert_close((up - down) / (2 * step), gradient[at], rtol=1e-3, atol=1e-6)


def trained(recipe):
    found = begun(recipe)
    history = train.fit(
        found.loaded,
        found.samples,
        siu,
        recipe,
        lambda: Look(1.0, 0.0, 0.0),
        lessons=found.lessons,
        aids=train.Aids(anchor=found.anchor),
    )
    return found, history


def test_a_training_with_an_anchor_moves_kept_pictures_less():
    held, history = trained(RECIPE.with_overrides(anchor=100.0))
    free, without = trained(RECIPE.with_overrides(anchor=0.0))
    pictures = held.anchor.pictures
    far = lambda one: sum(float(Anchor(one.loaded, RECIPE, ()).moved(p)) for p in pictures)
    with torch.no_grad():
        assert 0 < far(held) < 0.5 * far(free)
    assert all(step.anchored == 0 for step in without) and history[0].anchored == 0
    assert all(step.anchored > 0 for step in history[1:])
    parts = history[1].loss - without[1].loss
    assert abs(parts) > 0  # the term is part of the loss that is shown


def test_the_projector_alone_is_trained():
    loaded = begun().loaded
    named = [n for n, p in loaded.model.named_parameters() if p.requires_grad]
    assert named and all("projector" in name and "lora_" in name for name in named)
    assert adapter.sees_anew(loaded)


def test_a_recipe_that_holds_what_nothing_moves_is_refused():
    with pytest.raises(BadInput, match="nothing in front of the language model is trained"):
        Recipe(anchor=1.0)
    with pytest.raises(BadInput, match="'projector' adapts: leave projector_lr at 0"):
        Recipe(adapt="projector", projector_lr=1e-4)
    with pytest.raises(BadInput, match="anchor is -1"):
        Recipe(adapt="projector", anchor=-1)


def test_a_model_without_a_known_projector_is_refused(monkeypatch):
    loaded = made.load()
    monkeypatch.setattr(adapter, "PROJECTORS", ("nothing",))
    with pytest.raises(BadInput, match="no projector of a known name with linear layers"):
        adapter.attach(loaded, RECIPE)


def test_methods_that_are_compared_hold_nothing(monkeypatch):
    seen = []

    def fit(*given, aids, **options):
        seen.append(aids.anchor)
        return []

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(session, "Probe", lambda *given: SimpleNamespace(asked=[]))
    for objective in (siu, objectives.ga):
        loaded = made.load()
        session.learn(
            loaded,
            [made.prepared(loaded, RECIPE)],
            RECIPE,
            listener=session.Listener(),
            seconds={},
            objective=objective,
        )
    assert seen[0].pictures and seen[1] is None
