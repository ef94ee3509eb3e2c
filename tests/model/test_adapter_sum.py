"""Adapters added up: every weight changes by the sum, in fp64, whatever their ranks, scales and
layers are; and where PEFT's own concatenation does not hold."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from fastsiu.model import adapter_sum
from fastsiu.request import BadInput, NumericFailure

LANGUAGE = {"target_modules": ["q", "v"], "exclude_modules": r"^(?!language\.).*"}
VISION = {"target_modules": ["vision.q", "vision.v"], "exclude_modules": None}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(width, 6, bias=False), nn.Linear(width, 10, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.language = Block(5), Block(7)


@pytest.fixture
def stored(tmp_path):
    """stored(r=..., ...): a directory with an adapter of random factors."""

    def make(**options):
        number = len(list(tmp_path.iterdir()))
        torch.manual_seed(number)
        made = get_peft_model(Model(), LoraConfig(**{"lora_alpha": 3, **LANGUAGE, **options}))
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        made.save_pretrained(tmp_path / str(number))
        return tmp_path / str(number)

    return make


def deltas(model, name="default"):
    """In fp64, with PEFT's own scale; by the layer's name."""
    return {
        path.removeprefix("base_model.model."): layer.scaling[name]
        * (layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double())
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.lora_A
    }


def loaded(directory):
    return deltas(PeftModel.from_pretrained(Model(), directory))


def summed(directories):
    total = {}
    for directory in directories:
        for name, delta in loaded(directory).items():
            total[name] = total.get(name, 0) + delta
    return total


def furthest(one, other):
    """The largest difference of two adapters, beside the largest change."""
    assert one.keys() == other.keys()
    off = max(float((one[name] - other[name]).abs().max()) for name in one)
    return off / max(float(delta.abs().max()) for delta in other.values())


CASES = {
    "rank and alpha": [dict(r=2), dict(r=3, lora_alpha=7), dict(r=1)],
    "layers": [dict(r=2), dict(r=3, target_modules=["q"]), dict(r=2, **VISION)],
    "stabilised": [dict(r=2, use_rslora=True), dict(r=3)],
    "patterns": [
        dict(r=2, rank_pattern={"language.q": 5}, alpha_pattern={"v": 11}),
        dict(r=4, lora_alpha=1),
    ],
    "vision": [dict(r=2, **VISION)] * 2,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_weight_changes_by_the_sum(case, stored, tmp_path):
    given = [stored(**options) for options in CASES[case]]
    (tmp_path / "sum").mkdir()
    rank = adapter_sum.add_up(Model(), given, tmp_path / "sum")
    assert furthest(loaded(tmp_path / "sum"), summed(given)) < 1e-6
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == rank and not config["rank_pattern"]
    alike = case in ("rank and alpha", "stabilised", "patterns")
    assert (set(config["target_modules"]) == {"q", "v"}) == alike


def test_a_scale_that_is_a_power_of_two_rounds_nothing(stored, tmp_path):
    given = [stored(r=4, lora_alpha=8), stored(r=2, lora_alpha=1)]
    (tmp_path / "sum").mkdir()
    adapter_sum.add_up(Model(), given, tmp_path / "sum")
    key = "base_model.model.language.q.lora_{}.weight".format
    both = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    one, other = (load_file(place / "adapter_model.safetensors") for place in given)
    assert torch.equal(both[key("A")], torch.cat([2 * one[key("A")], 0.5 * other[key("A")]]))
    assert torch.equal(both[key("B")], torch.cat([one[key("B")], other[key("B")]], dim=1))


def peft_s_own(directories):
    model = PeftModel.from_pretrained(Model(), directories[0], adapter_name="0")
    names = [str(n) for n in range(len(directories))]
    for name, directory in zip(names[1:], directories[1:], strict=True):
        model.load_adapter(directory, adapter_name=name)
    model.add_weighted_adapter(names, [1.0] * len(names), "sum", combination_type="cat")
    return deltas(model, "sum")


def test_why_peft_s_own_concatenation_is_not_used(stored):
    """It holds for ranks and alphas. It loses the layers that the first adapter excludes, and
    scales as the first one does."""
    plain = [stored(**options) for options in CASES["rank and alpha"]]
    assert furthest(peft_s_own(plain), summed(plain)) < 1e-6
    apart = [stored(r=2), stored(r=2, **VISION)]
    assert summed(apart).keys() - peft_s_own(apart).keys() == {"vision.q", "vision.v"}
    stabilised = [stored(r=2, use_rslora=True), stored(r=3)]
    assert furthest(peft_s_own(stabilised), summed(stabilised)) > 0.5


def changed(directory, **fields):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_cannot_be_added_is_refused(stored, tmp_path):
    place = tmp_path / "sum"
    place.mkdir()
    add = lambda *given: adapter_sum.add_up(Model(), given, place)
    one = stored(r=2)
    for options, sentence in (
        ({"modules_to_save": ["vision"]}, "has trained the whole module 'vision'.*--mode joint"),
        ({"use_dora": True}, "use_dora is set"),
    ):
        with pytest.raises(BadInput, match=sentence):
            add(one, stored(r=2, **options))
    biased = stored(r=2)
    changed(biased, lora_bias=True)
    with pytest.raises(BadInput, match="lora_bias is set"):
        add(one, biased)
    for spoil, error, sentence in (
        (lambda k, v: {k: v, k.replace("weight", "bias"): torch.ones(2)}, BadInput, "not plain"),
        (lambda k, v: {} if "q.lora_B" in k else {k: v}, BadInput, "damaged"),
        (lambda k, v: {k: v * torch.nan}, NumericFailure, "NaN"),
        (lambda k, v: {k: v[:, :3] if "lora_A" in k else v}, BadInput, "another size"),
    ):
        other = stored(r=2)
        file = other / "adapter_model.safetensors"
        tensors = {}
        for key, tensor in load_file(file).items():
            tensors |= {k: v.contiguous() for k, v in spoil(key, tensor).items()}
        save_file(tensors, file)
        with pytest.raises(error, match=sentence):
            add(one, other)
    assert list(place.iterdir()) == []
