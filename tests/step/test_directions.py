"""The directions that the adapter may read: the best ones, the same however they are computed, and
never left while something trains."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import shares as made
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from fastsiu import session, train
from fastsiu.model import adapter, ask
from fastsiu.objectives import siu
from fastsiu.request import Recipe
from fastsiu.step import directions
from fastsiu.step.look import Look

RECIPE = Recipe(steps=3, lr=1e-2, rank=4, batch_size=8, directions=8, early_stop=False)


def begun(recipe=RECIPE, lora=None, **options):
    """A model with a fresh adapter, its samples and lessons with their teachers, and the lessons
    alone."""
    loaded = made.load(**options)
    prepared = [made.prepared(loaded, recipe)]
    samples, lessons = session.run_teacher(loaded, prepared, recipe, lambda text: None, lora)
    return loaded, samples, lessons, [half for half, _ in lessons]


def factors(loaded):
    return {
        name: module.lora_A["default"].weight
        for name, module in loaded.base.named_modules()
        if isinstance(module, LoraLayer)
    }


def named(loaded, found):
    """The bases by the layer's name."""
    names = {module: name for name, module in loaded.base.named_modules()}
    return {names[layer]: kept.basis for layer, kept in found.of.items()}


def same_space(a, b, tolerance=1e-4):
    """Whether two orthonormal bases span one space."""
    return a.shape == b.shape and bool(torch.linalg.svdvals(a.T @ b).min() > 1 - tolerance)


def moments(seed, d=24, n=60):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(d, generator=generator) * 3
    return torch.randn(n, d, generator=generator) * scale


# The best directions ------------------------------------------------------------------------------


def test_what_only_the_changing_inputs_have_comes_first():
    own, both = torch.zeros(10), torch.zeros(10)
    own[3], both[7] = 1.0, 1.0
    found, _, _ = directions.apart(
        torch.outer(own, own) + 50 * torch.outer(both, both), [torch.outer(both, both)], 1
    )
    assert abs(found[3, 0]) > 0.99


def test_they_are_the_eigenvectors_of_the_largest_ratios():
    """Beside fp64: the eigenvectors of S^(-1/2) C S^(-1/2)."""
    x, y, z = (moments(seed) for seed in range(3))
    own = lambda rows: (m := rows.double().T @ rows.double()) / m.trace()
    d, stay = x.shape[1], own(y) + own(z)
    values, vectors = torch.linalg.eigh(stay + directions.RIDGE * 2 / d * torch.eye(d).double())
    inverse = vectors @ torch.diag(values**-0.5) @ vectors.T
    best = inverse @ torch.linalg.eigh(inverse @ own(x) @ inverse)[1][:, -5:]
    found, _, _ = directions.apart(x.T @ x, [y.T @ y, z.T @ z], 5)
    assert same_space(found.double(), torch.linalg.qr(best).Q)
    torch.testing.assert_close(found.T @ found, torch.eye(5))


def test_calm_keeps_what_only_the_changing_inputs_read():
    """A direction where the changing inputs have all the energy stays as it is; one where both
    kinds have as much is halved. In full width: A C (C + 2 S)^-1 of what lies in the directions."""
    change = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0]))
    stay = torch.diag(torch.tensor([0.0, 1.0, 4.0, 0.0]))
    kept = directions.apart(change, [stay], 2)
    after = kept.basis @ kept.calm(1.0) @ kept.basis.T
    torch.testing.assert_close(after.diagonal(), torch.tensor([1.0, 0.5, 0, 0]), atol=1e-3, rtol=0)
    x, y = moments(0).double(), moments(1).double()
    own = lambda rows: (m := rows.T @ rows) / m.trace()
    kept = directions.apart(x.T @ x, [y.T @ y], 6)
    basis, d = kept.basis.double(), x.shape[1]
    stay = own(y) + directions.RIDGE / d * torch.eye(d).double()
    read = torch.randn(3, 6, generator=torch.Generator().manual_seed(2)).double() @ basis.T
    full = read @ own(x) @ torch.linalg.inv(own(x) + 2 * stay)
    found = read @ basis @ kept.calm(2.0).double() @ basis.T
    torch.testing.assert_close(found, full, atol=1e-4, rtol=1e-3)


def test_few_inputs_give_what_their_moments_give():
    x, y = moments(0, d=40, n=12), moments(1, d=40, n=15)
    few, whole = directions.apart_in_span(x, [y], 3), directions.apart(x.T @ x, [y.T @ y], 3)
    assert same_space(few.basis, whole.basis)
    turn = whole.basis.T @ few.basis  # one space, other axes
    torch.testing.assert_close(few.calm(1.0), turn.T @ whole.calm(1.0) @ turn, atol=1e-3, rtol=0)


def test_where_nothing_changes_nothing_is_read():
    found, _, _ = directions.apart(torch.zeros(6, 6), [torch.eye(6)], 2)
    assert found.shape == (6, 0)


def test_no_kept_inputs_are_no_reason_to_fail():
    found, _, _ = directions.apart(
        torch.diag(torch.tensor([1.0, 5.0, 2.0])), [torch.zeros(3, 3)], 1
    )
    assert abs(found[1, 0]) > 0.99


# On a model ---------------------------------------------------------------------------------------


def test_every_layer_of_the_language_model_has_its_directions():
    wanted = adapter.language_linears(made.load().base)
    loaded, _, _, corpora = begun()
    found = named(loaded, directions.find(loaded, corpora, RECIPE))
    assert set(found) == set(factors(loaded)) == set(wanted)
    for name, basis in found.items():
        assert basis.shape == (factors(loaded)[name].shape[1], 8)
    q, k, o = (found[f"model.language_model.layers.0.self_attn.{x}_proj"] for x in "qko")
    assert q is k and not same_space(q, o)  # queries and keys read the same input


def test_how_many_layers_go_at_a_time_changes_nothing(monkeypatch):
    loaded, _, _, corpora = begun()
    once = named(loaded, directions.find(loaded, corpora, RECIPE))
    monkeypatch.setattr(directions, "BYTES", 1)
    again = named(loaded, directions.find(loaded, corpora, RECIPE))
    assert all(same_space(once[name], again[name], 1e-3) for name in once)


def test_inputs_that_are_kept_as_they_are_tell_the_same(monkeypatch):
    monkeypatch.setattr(directions, "TOKENS", 100_000)  # every token counts, in either form
    loaded, _, _, corpora = begun()
    summed = named(loaded, directions.find(loaded, corpora, RECIPE))
    monkeypatch.setattr(directions, "WIDE", 127)
    kept = named(loaded, directions.find(loaded, corpora, RECIPE))
    assert kept.keys() == summed.keys()
    assert all(same_space(summed[name], kept[name], 1e-3) for name in kept)


@pytest.mark.parametrize("left_out", ["lessons that keep", "texts"])
def test_both_kinds_of_what_stays_count(left_out, monkeypatch):
    loaded, _, _, corpora = begun()
    both = named(loaded, directions.find(loaded, corpora, RECIPE))
    if left_out == "texts":
        monkeypatch.setattr(ask, "made_up", lambda *args: [])
    else:
        corpora = corpora[:1]
    one = named(loaded, directions.find(loaded, corpora, RECIPE))
    assert not any(same_space(both[name], one[name]) for name in both)


def test_training_leaves_nothing_outside_of_them():
    loaded, samples, lessons, corpora = begun()
    found = directions.find(loaded, corpora, RECIPE)
    look = lambda: Look(1.0, 0.0, 0.0)
    train.fit(loaded, samples, siu, RECIPE, look, lessons=lessons, aids=train.Aids(held=found))
    for name, basis in named(loaded, found).items():
        weight = factors(loaded)[name]
        assert weight.norm() > 0
        assert (weight - weight @ basis @ basis.T).norm() < 1e-5 * weight.norm()


def test_without_them_the_factors_read_everything():
    """The test before can fail."""
    loaded, samples, lessons, corpora = begun()
    found = directions.find(loaded, corpora, RECIPE)
    train.fit(loaded, samples, siu, RECIPE, lambda: Look(1.0, 0.0, 0.0), lessons=lessons)
    name, basis = next(iter(named(loaded, found).items()))
    weight = factors(loaded)[name]
    assert (weight - weight @ basis @ basis.T).norm() > 0.5 * weight.norm()


@pytest.fixture
def found():
    """A model with its directions, and its factors as they were."""
    loaded, _, _, corpora = begun()
    held = directions.find(loaded, corpora, RECIPE)
    held.hold()
    before = {name: weight.detach().clone() for name, weight in factors(loaded).items()}
    return SimpleNamespace(loaded=loaded, held=held, before=before)


@pytest.mark.parametrize(("answers", "weight"), [([1], 1.0), ([0, 1], 0.3), ([0, 0, 0], 0.0)])
def test_it_settles_as_far_as_the_names_stay_gone(found, answers, weight):
    asked = iter(answers)
    found.held.settle(lambda: bool(next(asked)))
    assert not list(asked)
    names = {module: name for name, module in found.loaded.base.named_modules()}
    for layer, kept in found.held.of.items():
        before, after = (x[names[layer]] for x in (found.before, factors(found.loaded)))
        if not weight:
            assert torch.equal(after, before)
            continue
        wanted = before @ kept.basis @ kept.calm(weight) @ kept.basis.T
        torch.testing.assert_close(after, wanted, atol=1e-6, rtol=0)
        assert (after - before).norm() > 1e-3 * before.norm()


def test_what_is_free_has_nothing_to_settle():
    directions.FREE.settle(lambda: pytest.fail("nobody asks"))


def test_training_settles_once_at_its_end():
    calls = []

    class Told(directions.Directions):
        def hold(self):
            calls.append("hold")

        def settle(self, gone):
            calls.append("settle" if gone() else "")

    look = lambda: calls.append("look") or Look(1.0, 0.0, 0.0)
    for last, watch in ((3, None), (2, lambda step: step == 2), (3, lambda step: step == 3)):
        loaded, samples, lessons, _ = begun()
        options = dict(
            lessons=lessons,
            watch=watch,
            aids=train.Aids(SimpleNamespace(all_gone=lambda: True), Told({})),
        )
        train.fit(loaded, samples, siu, RECIPE, look, **options)
        looks = ["look"] if last == 3 else []  # the last look sees what was settled
        assert calls == ["hold", "look", *["hold"] * last, "settle", *looks]
        calls.clear()


def test_layers_that_are_narrower_stay_free():
    recipe = Recipe(steps=1, rank=4, batch_size=8, directions=128)
    loaded, _, _, corpora = begun(recipe)
    found = named(loaded, directions.find(loaded, corpora, recipe))
    assert found and all(name.endswith("down_proj") for name in found)  # 320 wide, the rest 128


def test_neither_a_recipe_without_nor_lessons_that_change_nothing_hold_anything():
    loaded, _, _, corpora = begun()
    assert not directions.find(loaded, corpora, Recipe(directions=0)).of
    assert not directions.find(loaded, corpora[1:], RECIPE).of
    directions.Directions({}).hold()


def test_a_factor_on_the_head_stays_free():
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], exclude_modules=".*vision.*")
    loaded, _, _, corpora = begun(lora=lora, tied=False)
    found = named(loaded, directions.find(loaded, corpora, RECIPE))
    assert found and all(name.endswith("q_proj") for name in found)


# Texts that the model makes up --------------------------------------------------------------------


def test_made_up_turns_repeat_and_leave_the_random_numbers_alone(loaded):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (ask.made_up(loaded, 6, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    ids = lambda turns: [turn.inputs["input_ids"].tolist() for turn in turns]
    assert ids(first) == ids(again) != ids(other)
    assert 0 < len(first) <= 6


def test_made_up_questions_hold_no_token_that_no_person_writes(loaded):
    ends = [loaded.tokenizer.eos_token_id]
    assert loaded.words_of([300, 301, *ends, 302]) == loaded.tokenizer.decode([300, 301]).strip()
    assert loaded.words_of(ends) == ""


# In front of the language model -------------------------------------------------------------------


RIDGE = directions.RIDGE_IN_FRONT


def seen_by(loaded, images):
    """By adapted layer in front, what it reads of pictures in the untouched model, [n, d] fp64."""
    inside, read = set(loaded.base.get_decoder().modules()), {}
    layers = {
        name: module
        for name, module in loaded.base.named_modules()
        if isinstance(module, LoraLayer) and module not in inside
    }
    for name, module in layers.items():
        module.register_forward_pre_hook(
            lambda module, given, name=name: read.setdefault(name, []).append(
                given[0].reshape(-1, given[0].shape[-1]).double()
            )
        )
    with torch.no_grad(), adapter.teacher(loaded):
        for image in images:
            loaded.image_features(image)
    return {name: torch.cat(rows) for name, rows in read.items()}


def ratio(basis, x, y):
    """The sum of the energies of x against those of y in the best axes of a basis: few pictures of
    one colour leave several bases that are as good."""
    own = lambda rows: (m := rows.T @ rows) / m.trace()
    d, basis = x.shape[1], basis.double()
    stay = own(y) + RIDGE / d * torch.eye(d).double()
    change, stay = basis.T @ own(x) @ basis, basis.T @ stay @ basis
    return torch.linalg.eigvals(torch.linalg.solve(stay, change)).real.sum()


@pytest.mark.parametrize("adapt", ["projector", "vision"])
def test_in_front_they_are_those_of_the_pictures(adapt, monkeypatch):
    """Of the concept's pictures against others' by themselves, beside the moments in fp64."""
    monkeypatch.setattr(directions, "TOKENS", 10**6)
    recipe = RECIPE.with_overrides(adapt=adapt)
    loaded, _, _, corpora = begun(recipe)
    found = named(loaded, directions.find(loaded, corpora, recipe))
    assert found and all("language_model" not in name for name in found)
    assert all("projector" in name for name in found) is (adapt == "projector")
    shown = lambda facet: {
        id(image): image
        for corpus in corpora
        for sample in corpus.samples
        if sample.facet == facet and sample.picture is not None
        for image in [corpus.pictures[sample.picture].image]
    }
    own = seen_by(loaded, shown("stranger").values())
    kept = seen_by(loaded, shown("kept").values())
    for name, basis in found.items():
        x, y = (rows[name] for rows in (own, kept))
        best = directions.apart(x.T @ x, [y.T @ y], RECIPE.directions, ridge=RIDGE).basis
        assert basis.shape == best.shape
        torch.testing.assert_close(ratio(basis, x, y), ratio(best, x, y), rtol=1e-4, atol=0)


def test_a_training_in_front_stays_in_them():
    recipe = RECIPE.with_overrides(adapt="projector")
    loaded, samples, lessons, corpora = begun(recipe)
    held = directions.find(loaded, corpora, recipe)
    look = lambda: Look(1.0, 0.0, 0.0)
    train.fit(loaded, samples, siu, recipe, look, lessons=lessons, aids=train.Aids(held=held))
    bases, moved = named(loaded, held), factors(loaded)
    assert bases
    for name, basis in bases.items():
        factor = moved[name]
        torch.testing.assert_close(factor @ basis @ basis.T, factor, atol=1e-5, rtol=1e-4)


def test_an_adapter_on_both_sides_is_held_where_the_recipe_trains():
    """Layers on the other side stay free; held to nothing, they could not train."""
    both = LoraConfig(r=2, target_modules=r".*(q_proj|linear_1|linear_2)")
    for adapt, place in (("language", "language_model"), ("projector", "projector")):
        loaded, _, _, corpora = begun(RECIPE.with_overrides(adapt=adapt), lora=both)
        found = named(loaded, directions.find(loaded, corpora, RECIPE.with_overrides(adapt=adapt)))
        outside = [name for name in found if ("language_model" in name) is (adapt != "language")]
        assert found and outside == [] and any(place in name for name in found)
