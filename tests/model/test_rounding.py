"""The model computed with other rounding, and its weights afterwards."""

import pytest
import torch

from fastsiu.model import ask, rounding, vlm

QUESTIONS = ["Who is Zorblax Quint?", "What is two plus three?", "What is the capital of Italy?"]


@pytest.fixture(scope="module")
def loaded(demo_dir):
    """The embedded model with weights that are not exact in 16 bits, as they are stored."""
    model = vlm.load(str(demo_dir), device="cpu")
    with torch.no_grad():
        for parameter in model.base.parameters():
            parameter.mul_(
                1 + 2e-3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    return model


@pytest.fixture
def turns(loaded):
    asked = [(question, None) for question in QUESTIONS]
    said = ask.answers(loaded, asked)
    return [loaded.encode(q, a, None) for q, a in zip(QUESTIONS, said, strict=True)]


def bits(loaded) -> dict[str, tuple[int, torch.Tensor]]:
    """Where each weight is in memory, and a copy of it."""
    return {k: (p.data_ptr(), p.detach().clone()) for k, p in loaded.base.named_parameters()}


def assert_untouched(loaded, before) -> None:
    for key, parameter in loaded.base.named_parameters():
        place, copy = before[key]
        assert parameter.data_ptr() == place and torch.equal(parameter, copy), key
    hooks = [
        hook
        for module in loaded.base.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert not [hook for hook in hooks if hook.__module__ == rounding.__name__]


def test_rounding_changes_a_little_and_no_weight(loaded, turns):
    before, plain = bits(loaded), ask.label_scores(loaded, turns, [None] * 3)
    assert rounding.rounds(loaded)
    with rounding.rounded(loaded):
        other = ask.label_scores(loaded, turns, [None] * 3)
    assert_untouched(loaded, before)
    apart = max(float((a.log_p - b.log_p).abs().max()) for a, b in zip(plain, other, strict=True))
    assert 1e-4 < apart < 0.3
    again = ask.label_scores(loaded, turns, [None] * 3)
    assert all(torch.equal(a.log_p, b.log_p) for a, b in zip(plain, again, strict=True))


def test_weights_that_are_exact_in_16_bits_move_as_well(demo_dir, turns):
    """What a layer returns is rounded, too."""
    model = vlm.load(str(demo_dir), device="cpu")
    weights = list(model.base.parameters())
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in weights)
    plain = ask.label_scores(model, turns, [None] * 3)
    with rounding.rounded(model):
        other = ask.label_scores(model, turns, [None] * 3)
    assert any(not torch.equal(a.log_p, b.log_p) for a, b in zip(plain, other, strict=True))


def test_a_layer_runs_on_rounded_weights_one_layer_at_a_time(loaded, turns):
    layers = [m for m in loaded.base.modules() if isinstance(m, torch.nn.Linear)]
    assert not torch.equal(layers[-2].weight, layers[-2].weight.bfloat16().float())
    seen = []

    def look(module, given, output):
        seen.append(
            (
                torch.equal(module.weight, module.weight.bfloat16().float()),
                sum(m.weight.data_ptr() != places[m] for m in layers),
            )
        )

    places = {m: m.weight.data_ptr() for m in layers}
    with rounding.rounded(loaded):
        # before the hook that gives the weights back
        hook = layers[-2].register_forward_hook(look, prepend=True)
        ask.label_scores(loaded, turns[:1], [None])
        hook.remove()
    assert seen and set(seen) == {(True, 1)}


def test_weights_come_back_where_a_layer_fails(loaded, turns, monkeypatch):
    before = bits(loaded)
    inner = [m for m in loaded.base.modules() if isinstance(m, torch.nn.Linear)][-2]

    def fail(*given):
        assert inner.weight.data_ptr() != before[name][0]
        raise KeyboardInterrupt

    name = next(k for k, p in loaded.base.named_parameters() if p is inner.weight)
    monkeypatch.setattr(inner, "forward", fail)
    with pytest.raises(KeyboardInterrupt), rounding.rounded(loaded):
        ask.label_scores(loaded, turns[:1], [None])
    monkeypatch.undo()
    assert_untouched(loaded, before)
