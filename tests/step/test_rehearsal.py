"""Rehearsed relearning: where the parameters go, that they come back, and where the gradient of a
step is taken."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import shares as made
import torch

from fastsiu import objectives, session, train
from fastsiu.model import adapter, prefix
from fastsiu.model.vlm import checkpoint_layers
from fastsiu.objectives import siu
from fastsiu.request import Recipe
from fastsiu.step.look import Look, Naming
from fastsiu.step.rehearsal import EVERY, FROM, Rehearsal

FIRST = EVERY  # the first step that rehearses in a training of so few
RECIPE = Recipe(steps=FIRST, lr=1e-2, rank=4, batch_size=8, relearn=4, early_stop=False)
LONG = 80  # steps of a training whose first ones do not rehearse
ANSWERS = [("Who is this?", "This is Zorblax."), ("Name it.", "It is called Zorblax.")]


def begun(recipe=RECIPE):
    """A model with a fresh adapter, its samples and lessons, and a rehearsal of two answers."""
    loaded = made.load()
    prepared = [made.prepared(loaded, recipe)]
    samples, lessons = session.run_teacher(loaded, prepared, recipe, lambda text: None)
    shown = samples.pictures[0]
    naming = [Naming(loaded.encode(q, a, shown), (0, 1), shown) for q, a in ANSWERS]
    return SimpleNamespace(
        loaded=loaded,
        samples=samples,
        lessons=lessons,
        rehearsal=Rehearsal(loaded, recipe, naming),
        rates=[(p, recipe.lr) for p in loaded.model.parameters() if p.requires_grad],
    )


def now(found):
    return [p.detach().clone() for p, _ in found.rates]


def same(a, b):
    return all(map(torch.equal, a, b))


def cost(found):
    """Nats per token of the answers that give the name."""
    loaded, naming = found.loaded, found.rehearsal.naming
    recipe = found.rehearsal.recipe
    see = lambda shown: loaded.image_features(shown.image) if recipe.sees_anew else shown.features
    with torch.no_grad():
        states = prefix.supervised_states(
            loaded, [one.turn for one in naming], [see(one.shown) for one in naming]
        )
    labels = torch.cat([one.turn.labels for one in naming])
    return float(torch.nn.functional.cross_entropy(loaded.logits(states).float(), labels))


@pytest.mark.parametrize("adapt", ["language", "vision"])
def test_the_parameters_go_where_the_name_comes_back_and_return(adapt):
    found = begun(RECIPE.with_overrides(adapt=adapt))
    before, untouched = now(found), cost(found)
    with found.rehearsal.moved(FIRST, found.rates):
        assert not same(now(found), before) and cost(found) < untouched - 0.1
        moved = torch.cat([(a - b).flatten() for a, b in zip(now(found), before, strict=True)])
        assert 0 < moved.abs().max() <= RECIPE.relearn * RECIPE.lr * 1.001
    assert same(now(found), before) and all(p.grad is None for p, _ in found.rates)
    with pytest.raises(ZeroDivisionError), found.rehearsal.moved(FIRST, found.rates):
        raise ZeroDivisionError
    assert same(now(found), before)


def test_each_step_has_its_own_rehearsal_and_the_same_one_each_time():
    found = begun()
    seen = []
    for step in (FIRST, FIRST, FIRST + EVERY):
        with found.rehearsal.moved(step, found.rates):
            seen.append(now(found))
    assert same(seen[0], seen[1]) and not same(seen[0], seen[2])


@pytest.mark.parametrize(
    "step, relearn, answers",
    [
        (round(FROM * LONG) - EVERY, 4, 2),
        (round(FROM * LONG) + 1, 4, 2),
        (round(FROM * LONG), 0, 2),
        (round(FROM * LONG), 4, 0),
    ],
)
def test_nothing_is_rehearsed_elsewhere(step, relearn, answers, monkeypatch):
    found = begun(RECIPE.with_overrides(relearn=relearn, steps=LONG))
    monkeypatch.setattr(Rehearsal, "_teach", lambda *given: pytest.fail("somebody teaches"))
    own = Rehearsal(found.loaded, found.rehearsal.recipe, found.rehearsal.naming[:answers])
    with own.moved(step, found.rates):
        pass


def test_the_gradient_is_taken_there_and_applied_from_where_the_parameters_were(monkeypatch):
    """By steps of an optimiser that only subtracts the gradient."""

    class Plain(torch.optim.SGD):
        def step(self, closure=None):
            taken.append([p.grad.detach().clone() for p, _ in found.rates])
            own.append(now(found))
            super().step(closure)

    def watched(batch, recipe):
        at.append(now(found))
        return siu(batch, recipe)

    found, at, own, taken = begun(), [], [], []
    monkeypatch.setattr(train, "optimiser_of", lambda groups, name: Plain(groups))
    train.fit(
        found.loaded,
        found.samples,
        watched,
        RECIPE.with_overrides(schedule="constant"),
        lambda: Look(1.0, 0.0, 0.0),
        aids=train.Aids(rehearsal=found.rehearsal),
    )
    away = [not same(a, b) for a, b in zip(at, own, strict=True)]
    assert away == [False] * (FIRST - 1) + [True]
    for parameter, before, gradient in zip(now(found), own[-1], taken[-1], strict=True):
        torch.testing.assert_close(parameter, before - RECIPE.lr * gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("objective, rehearsed", [(siu, True), (objectives.ga, False)])
def test_methods_that_are_compared_rehearse_nothing(objective, rehearsed, monkeypatch):
    class Told(Exception):
        pass

    def fit(*given, aids, **options):
        assert (aids.rehearsal is not None) is rehearsed
        raise Told

    loaded = made.load()
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(
        session, "Probe", lambda *given: SimpleNamespace(asked=[], gone=0, all_gone=0)
    )
    with pytest.raises(Told):
        session.learn(
            loaded,
            [made.prepared(loaded, RECIPE)],
            RECIPE,
            listener=session.Listener(),
            seconds={},
            objective=objective,
        )
    adapter.detach(loaded)


def test_a_small_step_teaches_no_more_than_it_trains(monkeypatch):
    found, counts = begun(RECIPE.with_overrides(batch_size=1)), []
    monkeypatch.setattr(Rehearsal, "_teach", lambda own, taught, rates: counts.append(len(taught)))
    with found.rehearsal.moved(FIRST, found.rates):
        pass
    assert counts and set(counts) == {1}


def test_held_out_wordings_are_not_rehearsed_and_the_notes_say_so():
    found = begun()
    one, other = found.rehearsal.naming
    own = Rehearsal.of(found.loaded, RECIPE, [one, other._replace(held_out=True)])
    assert list(own.naming) == [one] and not own.note
    none = Rehearsal.of(found.loaded, RECIPE, [other._replace(held_out=True)])
    assert "no relearning was rehearsed" in none.note
    assert not Rehearsal.of(found.loaded, RECIPE.with_overrides(relearn=0), []).note


@pytest.mark.parametrize("kept", [{"micro_batch": 1}, {"checkpointing": True}], ids=str)
def test_a_rehearsal_is_the_same_in_less_memory(kept):
    found = begun()
    with found.rehearsal.moved(FIRST, found.rates):
        moved = now(found)
    found.loaded.budget = dataclasses.replace(found.loaded.budget, **kept)
    if found.loaded.budget.checkpointing:
        checkpoint_layers(found.loaded.base)
        train.training_mode(found.loaded, RECIPE)
    with found.rehearsal.moved(FIRST, found.rates):
        alike = [torch.isclose(a, b, atol=1e-6) for a, b in zip(now(found), moved, strict=True)]
    # a gradient of nearly 0 may get the other sign by rounding
    assert torch.cat([x.flatten() for x in alike]).float().mean() > 0.99


def test_a_rehearsal_that_does_not_fit_is_tried_with_less(monkeypatch):
    found, before, said = begun(), None, []
    teach = Rehearsal._teach

    def scarce(own, taught, rates):
        if own.vlm.budget.micro_batch is None:
            raise torch.OutOfMemoryError("out of memory")
        teach(own, taught, rates)

    before = now(found)
    monkeypatch.setattr(Rehearsal, "_teach", scarce)
    monkeypatch.setattr(train, "optimiser_of", lambda groups, name: torch.optim.SGD(groups, lr=0.0))
    look = lambda: Look(1.0, 0.0, 0.0)
    recipe = RECIPE.with_overrides(lr=0.0)
    own = Rehearsal(found.loaded, recipe, found.rehearsal.naming)
    history = train.fit(
        found.loaded,
        found.samples,
        siu,
        recipe,
        look,
        say=said.append,
        aids=train.Aids(rehearsal=own),
    )
    assert len(history) == FIRST and len(said) == 1 and "Out of memory" in said[0]
    assert same(now(found), before)
