"""The shared prefix against separate forwards: hidden states and gradients of the adapter, family
by family, way by way."""

from __future__ import annotations

import copy
import inspect
import io
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForImageTextToText

from fastsiu import session, train
from fastsiu.images import load_image
from fastsiu.model import adapter, ask, parts, prefix, sharing
from fastsiu.model.features import join_features, map_features
from fastsiu.model.turns import Encoded, Picture
from fastsiu.model.vlm import VLM, Budget, checkpoint_layers
from fastsiu.objectives import siu
from fastsiu.request import OutOfMemory, Recipe, Request
from fastsiu.samples import corpus
from fastsiu.show import progress
from fastsiu.step.look import Look

torch.set_num_threads(1)

# Tiny models from their configurations, with tokens in the processor's stead ----------------------

IMAGE, PIXELS = 90, torch.Generator().manual_seed(0)


def text(kind, **more):
    return {
        "model_type": kind,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def vision(kind, **more):
    return {
        "model_type": kind,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        **more,
    }


def picture_of(*shape):
    return {"pixel_values": torch.randn(*shape, 3, 28, 28, generator=PIXELS)}


def llava():
    config = transformers.LlavaConfig(
        vision_config=vision("clip_vision_model", projection_dim=16),
        text_config=text("llama"),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return config, picture_of(1)


def gemma3():
    """Sliding windows, and image tokens that see one another both ways."""
    layers = text(
        "gemma3_text", sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    )
    config = transformers.Gemma3Config(
        text_config=layers,
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=92,
        eoi_token_index=93,
    )
    return config, picture_of(1)


def qwen2_5_vl():
    """Three-dimensional positions."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    seen = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "num_heads": 2,
        "patch_size": 14,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text("qwen2_5_vl_text", rope_parameters=rope),
        vision_config=seen,
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    pixels = torch.randn(16, 6 * 14 * 14, generator=PIXELS)
    return config, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}


WAYS = ("packed", "key/value", "packed key/value")
FAMILIES = (llava, gemma3, qwen2_5_vl)  # all the others, through their processors: test_families.py


@dataclass
class Case:
    """A tiny model with an adapter far from zero, and turns about two pictures and about none, in
    no particular order."""

    vlm: VLM
    turns: list[Encoded]
    shown: list[Any]

    @property
    def pictures(self):
        return [None if f is None else Picture(None, f) for f in self.shown]

    def states(self, **options):
        return prefix.supervised_states(self.vlm, self.turns, self.shown, **options)

    def separate(self):
        """Every turn alone: there is nothing to share, to pad or to mask."""
        return torch.cat(
            [
                self.vlm.hidden([t.inputs], [f] if f is not None else [])[0, t.rows]
                for t, f in zip(self.turns, self.shown, strict=True)
            ]
        )


def gradients(vlm, states):
    """The states, and the gradient of the adapter for an upstream gradient that no permutation of
    the rows leaves as it is."""
    vlm.model.zero_grad(set_to_none=True)
    direction = torch.linspace(-1, 2, states.numel(), dtype=states.dtype).view_as(states).sin()
    (states * direction).sum().backward()
    return states.detach(), torch.cat(
        [p.grad.flatten() for p in vlm.model.parameters() if p.grad is not None]
    )


def apart(found, expected):
    return max(
        float((a - b).detach().norm() / b.detach().norm())
        for a, b in zip(found, expected, strict=True)
    )


def build(family, dtype=torch.float32, dropout=0.0):
    torch.manual_seed(0)
    config, pixels = family()
    base = (
        AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=dtype)
        .eval()
        .requires_grad_(False)
    )
    for parameter in base.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    if dtype == torch.float64:
        families.without_rounding(base)
    loaded = VLM(
        "tiny", None, base, base, SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    )
    adapter.attach(loaded, Recipe(rank=4, lora_dropout=dropout))
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    encoder = base.base_model.get_image_features

    def features(number):
        random = torch.Generator().manual_seed(number)
        other = {
            k: torch.randn(v.shape, generator=random).to(dtype) if v.is_floating_point() else v
            for k, v in pixels.items()
        }
        with torch.no_grad():
            made = encoder(
                **{k: other[k] for k in inspect.signature(encoder).parameters if k in other},
                return_dict=True,
            )
        for key in set(made) - {"pooler_output", "deepstack_features"}:
            made[key] = None
        return made

    def turn(length, with_picture):
        tail = torch.randint(
            20, 80, (length,), generator=torch.Generator().manual_seed(length)
        ).tolist()
        ids = torch.tensor(
            [[1, 5, 6, *([92, IMAGE, IMAGE, IMAGE, IMAGE, 93] if with_picture else []), 7, *tail]]
        )
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "image_grid_thw" in pixels:
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
            inputs |= {"image_grid_thw": pixels["image_grid_thw"]} if with_picture else {}
        if family is gemma3:
            inputs["token_type_ids"] = (ids == IMAGE).long()
        rows = torch.arange(ids.shape[1] - 4, ids.shape[1] - 1)
        return Encoded(inputs, rows, ids[0, rows + 1])

    one, two = features(1), features(2)
    made = [
        (6, one),
        (5, None),
        (9, two),
        (14, one),
        (8, None),
        (7, one),
        (11, two),
        (10, one),
        (6, None),
    ]
    return Case(loaded, [turn(n, f is not None) for n, f in made], [f for _, f in made])


@pytest.fixture
def always(monkeypatch):
    """Sharing is used wherever it was found exact, at these sizes too."""
    monkeypatch.setattr(parts, "WORTH", float("inf"))
    monkeypatch.setattr(parts, "FORWARD", 0)


def planned(case):
    said = []
    return sharing.plan_sharing(case.vlm, case.turns, case.pictures, said.append), said


# Exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, near", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_states_and_gradients_are_those_of_separate_forwards(family, dtype, near, always):
    case = build(family, dtype)
    assert planned(case) == (WAYS, [])
    expected = gradients(case.vlm, case.separate())
    for way in (*WAYS, "plain"):
        case.vlm.shares = (way,) if way != "plain" else ()
        for micro_batch in (None, 2, 1):
            found = gradients(case.vlm, case.states(micro_batch=micro_batch))
            assert apart(found, expected) < near, (way, micro_batch)
        with torch.no_grad():
            assert apart((case.states(micro_batch=3),), expected[:1]) < near, way


def test_bfloat16_passes_the_check():
    """Rounding alone must not cost the sharing."""
    case = build(llava, torch.bfloat16)
    assert planned(case) == (WAYS, [])


@pytest.mark.parametrize("family", [llava, qwen2_5_vl, gemma3], ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_the_features(family, way, always):
    """Dreams are optimised through the same path."""
    case = build(family)
    free = {
        id(f): (
            f["pooler_output"]
            if torch.is_tensor(f["pooler_output"])
            else torch.cat(list(f["pooler_output"]))
        )
        .clone()
        .requires_grad_()
        for f in case.shown
        if f is not None
    }
    new = {
        key: map_features(f, lambda x, key=key: free[key].view_as(x))
        for f in case.shown
        if (key := id(f)) in free
    }
    case.shown = [None if f is None else new[id(f)] for f in case.shown]
    found = {}
    for ways, states in (((way,), case.states), ((), case.separate)):
        case.vlm.shares = ways
        for x in free.values():
            x.grad = None
        gradients(case.vlm, states())
        found[ways] = [x.grad for x in free.values()]
    assert apart(found[way,], found[()]) < 1e-5 and all(float(g.norm()) > 0.1 for g in found[()])


def test_the_embedded_model(adapted, always):
    made, loaded = adapted.corpus, adapted.vlm
    said = []
    try:
        assert (
            sharing.plan_sharing(loaded, made.turns, made.shown(), said.append) == WAYS and not said
        )
        chosen = range(0, len(made.samples), 3)
        turns, shown = (
            [made.turns[i] for i in chosen],
            [p and p.features for i in chosen for p in [made.shown()[i]]],
        )
        case = Case(loaded, turns, shown)
        expected = gradients(loaded, case.separate())
        for way in (*WAYS, None):
            loaded.shares = (way,) if way else ()
            assert apart(gradients(loaded, case.states()), expected) < 1e-5, way
            assert apart(gradients(loaded, case.states(micro_batch=7)), expected) < 1e-5, way
    finally:
        loaded.shares = ()


# What is computed, and how often ------------------------------------------------------------------


@pytest.fixture
def tokens(monkeypatch):
    """tokens(case): a list that records the shape [B, T] of every forward."""

    def record(case):
        shapes = []
        hook = lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape))
        case.vlm.base.register_forward_pre_hook(hook, with_kwargs=True)
        return shapes

    return record


def only(case, *chosen):
    return replace(
        case, turns=[case.turns[i] for i in chosen], shown=[case.shown[i] for i in chosen]
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_prefix_is_computed_once(way, always, tokens):
    # suffixes of 6, 14, 7, 10 tokens, and of 9, 11 to another picture; prefix of 10
    case = only(build(llava), 0, 3, 5, 7, 2, 6)
    case.vlm.shares = (way,)
    shapes = tokens(case)
    case.states()
    assert (
        sorted(shapes)
        == {
            "packed": [(1, 10 + 20), (1, 10 + 37)],
            "key/value": [(2, 10), (6, 14)],
            "packed key/value": [
                (2, 10),
                (3, 14 + 6),
            ],  # about as long as two of the longest: 14 + 6, 10 + 7, 11 + 9
        }[way]
    )
    shapes.clear()
    only(case, 0, 1, 2, 3).states(micro_batch=2)
    assert (
        sorted(shapes)
        == {
            "packed": [(1, 10 + 17), (1, 10 + 20)],
            "key/value": [(1, 10), (2, 7), (2, 14)],
            "packed key/value": [(1, 10), (1, 6 + 7), (1, 10 + 14)],
        }[way]
    )


def test_what_nobody_checked_is_not_shared(always, tokens):
    case = build(llava)
    shapes = tokens(case)
    case.states()
    assert sorted(shapes) == [(3, 12), (6, 24)]


def test_sharing_has_to_pay(tokens):
    """A picture each: nothing is shared. A long prefix and many short questions: it is."""
    case = build(llava)
    case.vlm.shares = WAYS
    short = only(case, 0, 2)
    shapes = tokens(case)
    short.states()
    assert shapes == [(2, 19)]
    shapes.clear()
    replace(case, turns=[case.turns[0]] * 40, shown=[case.shown[0]] * 40).states()
    assert sum(b * t for b, t in shapes) < 0.5 * 40 * 16


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("width, way", [(4096, "packed"), (256, "packed key/value")])
def test_the_way_is_chosen_by_what_it_costs(rows, width, way, monkeypatch):
    """LLaVA's proportions: at full width the packed row's useless attention is cheap, at a small
    one it is not."""
    case = build(llava)
    case.vlm.shares = WAYS
    monkeypatch.setattr(case.vlm.base.config.text_config, "hidden_size", width)
    inputs = {"input_ids": torch.tensor([[1, *[IMAGE] * 576, *range(20, 60)]])}
    turns = [Encoded(inputs, torch.arange(600, 616), torch.arange(16))] * rows
    (part,) = parts.parts_of(case.vlm, turns, [case.shown[0]] * rows)
    part = replace(part, length=577)
    assert part.cheapest(None) == way
    case.vlm.budget = Budget(sparing=True)
    assert part.cheapest(None) == "packed"


def test_pictures_of_several_sizes(always):
    """Twice as many image tokens are another layout: their own prefix, and never the other's
    features."""
    case = build(llava)
    case.vlm.shares = WAYS
    large = join_features([case.shown[0], case.shown[2]])
    large["pooler_output"] = (torch.cat(list(large["pooler_output"])),)
    for i, n in ((0, 8), (3, 9)):
        ids = torch.tensor([[1, 5, 6, 92, *[IMAGE] * 8, 93, 7, *range(30 + n, 30 + 2 * n)]])
        rows = torch.arange(ids.shape[1] - 3, ids.shape[1] - 1)
        case.turns[i] = Encoded(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, rows, ids[0, rows + 1]
        )
        case.shown[i] = large
    assert sorted(p.length for p in parts.parts_of(case.vlm, case.turns, case.shown)) == [
        4,
        10,
        14,
    ]
    expected = gradients(case.vlm, case.separate())
    assert apart(gradients(case.vlm, case.states()), expected) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_answers_to_one_question(way, always):
    """The prefix ends before the first supervised row, however much more is the same; and so it
    does for equal turns."""
    case = only(build(llava), 3, 3, 3)
    case.turns[1] = copy.deepcopy(case.turns[1])
    case.turns[1].inputs["input_ids"][0, -1] = 17  # the last token of the answer
    case.vlm.shares = (way,)
    (part,) = parts.parts_of(case.vlm, case.turns, case.shown)
    assert part.length == int(case.turns[0].rows[0])
    assert apart(gradients(case.vlm, case.states()), gradients(case.vlm, case.separate())) < 1e-5


def test_an_image_behind_the_question_is_not_shared(always):
    case = only(build(llava), 0, 3, 5)
    case.vlm.shares = WAYS
    for turn in case.turns:
        turn.inputs["input_ids"] = torch.cat(
            [turn.inputs["input_ids"][:, 10:13], turn.inputs["input_ids"]], 1
        )
        turn.inputs["attention_mask"] = torch.ones_like(turn.inputs["input_ids"])
        turn.rows = turn.rows + 3
    assert len(parts.parts_of(case.vlm, case.turns, case.shown)) == 3
    # a model that does not say which its tokens are
    unknown = SimpleNamespace(base=SimpleNamespace(config=SimpleNamespace()))
    assert [part.length for part in parts.parts_of(unknown, case.turns, case.shown)] == [0]
    assert apart((case.states(),), (case.separate(),)) < 1e-5


# The check at the start ---------------------------------------------------------------------------


def test_a_wrong_mask_makes_the_check_take_the_next_way(monkeypatch, always):
    case = build(llava)
    real = prefix._own_masks

    def leaky(part):
        # everyone sees what follows
        return {kind: torch.zeros_like(mask) for kind, mask in real(part).items()}

    monkeypatch.setattr(prefix, "_own_masks", leaky)
    exact, said = planned(case)
    assert exact == ("key/value",) == case.vlm.shares
    assert len(said) == 2 and said[0].startswith(
        "The packed prefix cannot be used on this model: hidden states differ by "
    )
    assert apart((case.states(),), (case.separate(),)) < 1e-5


def test_a_gradient_that_does_not_reach_the_prefix_is_found(monkeypatch):
    """The hidden states are right: only gradients tell."""
    case = build(llava)
    real = prefix.prefix_cache

    def cut(part, heads):
        cache = real(part, heads)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return cache

    monkeypatch.setattr(prefix, "prefix_cache", cut)
    exact, said = planned(case)
    assert exact == ("packed",) and "gradients by" in said[0]


def test_when_every_way_fails_plain_batches_are_said_once(monkeypatch, tokens, always):
    case = build(llava)
    real = parts.Part.positions.func
    wrong = property(lambda self: real(self) * 0)
    monkeypatch.setattr(parts.Part, "positions", wrong)
    exact, said = planned(case)
    assert (
        exact == ()
        and len(said) == 4
        and said[-1].endswith("no way of sharing is exact on this model: plain padded batches.")
    )
    shapes = tokens(case)
    case.states()
    assert sorted(shapes) == [(3, 12), (6, 24)]


def test_an_error_is_said_and_so_is_a_lack_of_memory(monkeypatch):
    case = build(llava)

    def fails(error):
        def run(part, most):
            raise error

        return run

    monkeypatch.setitem(
        prefix.RUN, "packed", fails(RuntimeError("The wrapper takes no such mask.\nMore of it."))
    )
    exact, said = planned(case)
    assert exact == WAYS[1:]
    assert said == [
        "The packed prefix cannot be used on this model: The wrapper takes no such mask."
    ]
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        monkeypatch.setitem(prefix.RUN, "packed", fails(error))
        exact, said = planned(case)
        assert exact == WAYS[1:] and "does not fit into memory" in said[0]
    monkeypatch.setitem(prefix.RUN, "plain", fails(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):  # there is nothing smaller to go on with
        planned(case)


@pytest.mark.parametrize(
    "budget, most",
    [
        (Budget(), [None, None]),
        (Budget(micro_batch=8), [1, 2]),
        (Budget(checkpointing=True), [1, 2]),
    ],
)
def test_the_trial_stays_within_the_budget(monkeypatch, budget, most):
    case, seen = build(llava), []
    case.vlm.budget = budget
    if budget.checkpointing:
        checkpoint_layers(case.vlm.base)
    for way, run in dict(prefix.RUN).items():
        monkeypatch.setitem(
            prefix.RUN,
            way,
            lambda part, most, run=run, way=way: seen.append((way, most)) or run(part, most),
        )
    exact, said = planned(case)
    assert exact == (("packed",) if budget.checkpointing else WAYS) and not said
    assert {way: n for way, n in seen} == {"plain": most[0]} | dict.fromkeys(exact, most[1])


@pytest.mark.parametrize("way", WAYS)
def test_nan_is_not_exact(monkeypatch, way):
    """A mask that leaves a row nothing to look at gives NaN on some devices, and NaN is not above
    any tolerance."""
    case = build(llava)
    real = prefix.RUN[way]
    broken = lambda part, most: (
        (i, x * float("nan") if i == 1 else x) for i, x in real(part, most)
    )
    monkeypatch.setitem(prefix.RUN, way, broken)
    exact, said = planned(case)
    assert exact == tuple(w for w in WAYS if w != way) and "hidden states differ by nan" in said[0]


def test_with_no_two_turns_of_one_picture_nothing_is_tried():
    case = only(build(llava), 0, 1)
    assert planned(case) == (
        (),
        ["Prefixes are not shared, since no two turns have one in common: plain padded batches."],
    )


def test_the_check_leaves_dropout_on_and_is_not_disturbed_by_it():
    case = build(llava, dropout=0.3)
    case.vlm.model.train()
    assert planned(case) == (WAYS, []) and case.vlm.model.training


# Memory -------------------------------------------------------------------------------------------


def test_activation_checkpointing_goes_with_packed(always, tokens, monkeypatch):
    case = build(llava)
    assert planned(case)[0] == WAYS
    expected = gradients(case.vlm, case.separate())
    monkeypatch.setitem(parts.DEARER, "key/value", 0.01)  # key/value, if it were possible
    assert all(
        p.cheapest(None) == "key/value" for p in parts.parts_of(case.vlm, case.turns, case.shown)
    )
    case.vlm.base.activation_checkpointing_enable()
    case.vlm.model.train()
    layers, shapes = [], tokens(case)
    case.vlm.base.get_decoder().layers[0].self_attn.register_forward_pre_hook(
        lambda *_: layers.append(1)
    )
    found = gradients(case.vlm, case.states())
    assert apart(found, expected) < 1e-5
    assert len(layers) == 2 * len(shapes), "nothing was recomputed"
    assert all(b * t in (10 + 37, 10 + 20, 4 + 19) for b, t in shapes)  # packed


@pytest.mark.parametrize("way", [*WAYS, None])
def test_a_micro_batch_bounds_what_is_kept_for_the_backward_pass(way, always):
    case = build(llava)
    case = replace(
        case, turns=[case.turns[i] for i in (0, 3, 5, 7)] * 8, shown=[case.shown[0]] * 32
    )
    case.vlm.shares = (way,) if way else ()
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    def numbers(micro_batch):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            states = case.states(micro_batch=micro_batch)
        return states, sum(kept)

    (whole, much), (small, little) = numbers(None), numbers(4)
    assert little < 0.3 * much
    assert apart(gradients(case.vlm, small), gradients(case.vlm, whole)) < 1e-5


@pytest.mark.parametrize("way", [*WAYS, None])
def test_dropout_is_the_same_when_a_micro_batch_is_computed_again(way, always, monkeypatch):
    case = build(llava, dropout=0.3)
    case.vlm.shares = (way,) if way else ()
    case.vlm.model.train()
    found = []
    for bounded in (prefix._bounded, lambda run, bounded: run()):
        monkeypatch.setattr(prefix, "_bounded", bounded)
        torch.manual_seed(0)
        found.append(gradients(case.vlm, case.states(micro_batch=2)))
    assert apart(*found) < 1e-6
    torch.manual_seed(1)
    assert apart((case.states(micro_batch=2).detach(),), found[0][:1]) > 1e-2


# In training --------------------------------------------------------------------------------------


def raises(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("this module must not run during training")


@pytest.fixture
def trainable(adapted):
    """The embedded model with its teacher run and its ways checked."""
    sharing.plan_sharing(
        adapted.vlm, adapted.corpus.turns, adapted.corpus.shown(), lambda text: None
    )
    corpus.run_teacher(adapted.vlm, adapted.corpus, adapted.recipe)
    yield adapted
    adapted.vlm.shares = ()
    adapted.corpus.teacher = None


def fitted(case, steps=3, say=lambda text: None, **budget):
    """(losses, the adapter's weights) after training, from the same weights each time, which are
    put back."""
    case.vlm.budget = Budget(**budget)
    trained = [p for p in case.vlm.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    recipe = replace(case.recipe, steps=steps, batch_size=24)
    history = train.fit(case.vlm, case.corpus, siu, recipe, lambda: Look(1, 1, 0), say=say)
    after = torch.cat([p.detach().flatten() for p in trained])
    with torch.no_grad():
        for p, value in zip(trained, before, strict=True):
            p.copy_(value)
    return torch.tensor([s.loss for s in history]), after


def test_neither_head_nor_vision_tower_runs_in_training(trainable, monkeypatch):
    base = trainable.vlm.base
    monkeypatch.setattr(base.get_output_embeddings(), "forward", raises)
    monkeypatch.setattr(base.model.vision_tower, "forward", raises)
    monkeypatch.setattr(base.model.multi_modal_projector, "forward", raises)
    losses, _ = fitted(trainable)
    assert len(losses) == 3 and losses.isfinite().all()
    with pytest.raises(AssertionError, match="must not run"):
        base(input_ids=torch.ones(1, 3, dtype=torch.int64))


def test_training_is_the_same_whatever_is_shared_and_whatever_the_micro_batch(trainable, always):
    shares = trainable.vlm.shares
    assert shares == WAYS
    expected = None
    for ways in ((), *((way,) for way in shares)):
        for micro_batch in (None, 5):
            trainable.vlm.shares = ways
            losses, weights = fitted(trainable, micro_batch=micro_batch)
            expected = expected or (losses, weights)
            # Adam's first steps are signs: where a gradient is about zero, rounding decides them.
            assert torch.allclose(losses, expected[0], rtol=1e-3), (ways, micro_batch)
            assert float((weights - expected[1]).norm() / expected[1].norm()) < 2e-3, (
                ways,
                micro_batch,
            )


@pytest.fixture
def roomless(trainable, monkeypatch):
    """roomless(most, where): forwards of more than `most` rows (0: any that keeps its layers'
    activations) run out of memory, in the forward or in the backward pass, the message that torch
    has for a GPU or for a CPU. Layers are given back afterwards."""
    base, run = trainable.vlm.base, VLM.run
    refused = []

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            refused.append("backward")
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 1 bytes."
            )

    def arrange(most, where):
        def limited(self, inputs, features=(), **options):
            hidden, output = run(self, inputs, features, **options)
            keeps = not (base.is_activation_checkpointing and self.model.training)
            if torch.is_grad_enabled() and (len(hidden) > most if most else keeps):
                if where == "backward":
                    return Late.apply(hidden), output
                refused.append("forward")
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return hidden, output

        monkeypatch.setattr(VLM, "run", limited)
        return refused

    yield arrange
    base.activation_checkpointing_disable()
    trainable.vlm.budget = Budget()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_does_not_fit_is_the_same_step_in_pieces(trainable, roomless, where):
    trainable.vlm.shares, said = (), []
    losses, weights = fitted(trainable)
    refused = roomless(7, where)
    found, ours = fitted(trainable, say=said.append)
    halved = [Budget(micro_batch=n, sparing=True) for n in (5, 6)]
    assert trainable.vlm.budget in halved and set(refused) == {where}
    # not in every step: it keeps what fits
    assert len(said) == len(refused) == 2 and "samples at a time" in said[-1]
    assert (
        torch.allclose(found, losses, rtol=1e-4)
        and float((ours - weights).norm() / weights.norm()) < 2e-3
    )


def test_checkpointing_is_the_last_resort_and_the_step_still_the_same(trainable, roomless):
    trainable.vlm.shares, said = (), []
    losses, weights = fitted(trainable, steps=2)
    roomless(0, "forward")
    found, ours = fitted(trainable, steps=2, say=said.append)
    assert trainable.vlm.budget == Budget(micro_batch=1, checkpointing=True, sparing=True)
    assert (
        4 <= len(said) <= 6
        and "checkpointing" in said[-1]
        and not any("checkpointing" in text for text in said[:-1])
    )
    assert (
        torch.allclose(found, losses, rtol=1e-4)
        and float((ours - weights).norm() / weights.norm()) < 2e-3
    )


def test_what_fits_in_no_way_is_said_and_other_errors_are_not_taken_for_it(
    trainable, roomless, monkeypatch
):
    trainable.vlm.shares = ()
    monkeypatch.setattr(
        trainable.vlm.base, "gradient_checkpointing_enable", lambda: None, raising=False
    )
    monkeypatch.setattr(
        trainable.vlm.base, "activation_checkpointing_enable", lambda: None, raising=False
    )
    roomless(0, "forward")
    with pytest.raises(OutOfMemory, match="fastsiu plan"):
        fitted(trainable, steps=1)

    def broken(self, *given, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(VLM, "run", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fitted(trainable, steps=1)


def test_what_the_check_finds_reaches_the_user(loaded, cast, monkeypatch):
    """Once, as a line that stays on the screen, whatever the progress bar does."""

    def refuse(part, most):
        raise ValueError("no such mask")

    monkeypatch.setitem(prefix.RUN, "packed", refuse)
    screen = io.StringIO()
    recipe = Recipe(steps=1, dreams=0, strangers=0, batch_size=8)
    try:
        with progress.Progress(Console(file=screen, width=200), hidden=False) as shown:
            session.forget(
                loaded,
                Request(cast.target, cast.image, protect=cast.others[:1]),
                recipe,
                load_image(cast.image),
                listener=shown.listener,
            )
        assert loaded.shares == WAYS[1:]
        assert (
            screen.getvalue().count("The packed prefix cannot be used on this model: no such mask.")
            == 1
        )
    finally:
        adapter.detach(loaded)
        loaded.shares = ()


def test_teacher_and_scores_go_through_the_shared_prefix(trainable, tokens):
    made, loaded = trainable.corpus, trainable.vlm
    shared, hidden = ask.label_scores(loaded, made.turns, made.shown()), made.teacher.hidden
    shapes = tokens(trainable)
    corpus.run_teacher(loaded, made, trainable.recipe)
    few = sum(b * t for b, t in shapes)
    loaded.shares = ()
    shapes.clear()
    corpus.run_teacher(loaded, made, trainable.recipe)
    assert few < 0.75 * sum(b * t for b, t in shapes)
    assert torch.allclose(made.teacher.hidden, hidden, atol=1e-5)
    for one, other in zip(shared, ask.label_scores(loaded, made.turns, made.shown()), strict=True):
        assert torch.allclose(one.log_p, other.log_p, atol=1e-4) and torch.equal(
            one.right, other.right
        )
