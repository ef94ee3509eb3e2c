"""Rehearsed relearning: where the parameters go, that they come back, and where the gradient of a
step is taken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import shares as made
import torch

from fastsiu import objectives, session, train
from fastsiu.model import adapter, prefix
from fastsiu.objectives import siu
from fastsiu.request import Recipe
from fastsiu.step import rehearsal
from fastsiu.step.look import Look
from fastsiu.step.rehearsal import EVERY, FIRST, Rehearsal

RECIPE = Recipe(steps=FIRST, lr=1e-2, rank=4, batch_size=8, relearn=4, early_stop=False)
ANSWERS = [("Who is this?", "This is Zorblax."), ("Name it.", "It is called Zorblax.")]


def begun(recipe=RECIPE):
    """A model with a fresh adapter, its samples and lessons, and a rehearsal of two answers."""
    loaded = made.load()
    prepared = [made.prepared(loaded, recipe)]
    samples, lessons = session.run_teacher(loaded, prepared, recipe, lambda text: None)
    shown = samples.pictures[0]
    naming = [(loaded.encode(q, a, shown), (0, 1), shown) for q, a in ANSWERS]
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
            loaded, [turn for turn, _, _ in naming], [see(shown) for _, _, shown in naming]
        )
    labels = torch.cat([turn.labels for turn, _, _ in naming])
    return float(torch.nn.functional.cross_entropy(loaded.logits(states).float(), labels))


@pytest.mark.parametrize("adapt", ["language", "vision"])
def test_the_parameters_go_where_the_name_comes_back_and_return(adapt):
    found = begun(RECIPE.with_overrides(adapt=adapt))
    before, untouched = now(found), cost(found)
    with found.rehearsal.before(FIRST, found.rates):
        assert not same(now(found), before) and cost(found) < untouched - 0.1
        moved = torch.cat([(a - b).flatten() for a, b in zip(now(found), before, strict=True)])
        assert 0 < moved.abs().max() <= RECIPE.relearn * RECIPE.lr * 1.001
    assert same(now(found), before) and all(p.grad is None for p, _ in found.rates)
    with pytest.raises(ZeroDivisionError), found.rehearsal.before(FIRST, found.rates):
        raise ZeroDivisionError
    assert same(now(found), before)


def test_each_step_has_its_own_rehearsal_and_the_same_one_each_time():
    found = begun()
    seen = []
    for step in (FIRST, FIRST, FIRST + EVERY):
        with found.rehearsal.before(step, found.rates):
            seen.append(now(found))
    assert same(seen[0], seen[1]) and not same(seen[0], seen[2])


@pytest.mark.parametrize(
    "step, relearn, answers",
    [(FIRST - 1, 4, 2), (FIRST - EVERY, 4, 2), (FIRST + 1, 4, 2), (FIRST, 0, 2), (FIRST, 4, 0)],
)
def test_nothing_is_rehearsed_elsewhere(step, relearn, answers, monkeypatch):
    found = begun(RECIPE.with_overrides(relearn=relearn))
    monkeypatch.setattr(Rehearsal, "_teach", lambda *given: pytest.fail("somebody teaches"))
    own = Rehearsal(found.loaded, found.rehearsal.recipe, found.rehearsal.naming[:answers])
    with own.before(step, found.rates):
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
        rehearsal=found.rehearsal,
    )
    away = [not same(a, b) for a, b in zip(at, own, strict=True)]
    assert away == [False] * (FIRST - 1) + [True]
    for parameter, before, gradient in zip(now(found), own[-1], taken[-1], strict=True):
        torch.testing.assert_close(parameter, before - RECIPE.lr * gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("objective, rehearsed", [(siu, True), (objectives.ga, False)])
def test_methods_that_are_compared_rehearse_nothing(objective, rehearsed, monkeypatch):
    class Told(Exception):
        pass

    def fit(*given, rehearsal, **options):
        assert (rehearsal is not None) is rehearsed
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
    assert rehearsal.TAUGHT <= RECIPE.batch_size
