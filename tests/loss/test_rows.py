"""From batches to rows: no logits in any wrapping, the right positions, the right teacher rows, the
head that really applies."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from fastsiu import RowIndex, TeacherCache, fused_dmk_ce, head_of, no_logits, supervised_rows

torch.set_num_threads(1)

V, D = 53, 16
IDS = torch.arange(3, 27).reshape(3, 8)


def tiny(tie=False, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, initializer_range=0.3, tie_word_embeddings=tie)
    ).to(dtype)
    if bias:
        model.lm_head = nn.Linear(D, V).to(dtype)
    return model.eval()


def lora(model, targets=("q_proj", "lm_head"), **options):
    """LoRA far from zero, so that to forget it shows."""
    adapted = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), **options)
    ).eval()
    shake(adapted)
    return adapted


@torch.no_grad()
def shake(model):
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.copy_(0.3 * torch.randn(p.shape))


@pytest.fixture
def watched(monkeypatch):
    """Raises where a linear layer makes as many outputs as the vocabulary has tokens."""
    forward = nn.Linear.forward

    def call(self, x):
        assert self.out_features != V, "logits were made"
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", call)


class Wrapped(nn.Module):
    """As DDP, FSDP1 and DeepSpeed wrap."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


WRAPPINGS = {
    "plain": tiny,
    "tied": lambda: tiny(tie=True),
    "LoRA on the head": lambda: lora(tiny()),
    "a trainable copy of the head": lambda: lora(tiny(), ["q_proj"], modules_to_save=["lm_head"]),
    "wrapped twice": lambda: Wrapped(Wrapped(lora(tiny()))),
}


# ---- no_logits


@pytest.mark.parametrize("make", WRAPPINGS.values(), ids=WRAPPINGS)
def test_no_logits_reaches_the_head_of_any_wrapping_and_makes_none(make, watched, monkeypatch):
    model = make()
    with pytest.raises(AssertionError, match="logits were made"):
        model(input_ids=IDS)
    with no_logits(model) as kept:
        model(input_ids=IDS)
    assert kept["hidden"].shape == (3, 8, D) and kept["hidden"].requires_grad
    monkeypatch.undo()
    weight, bias = head_of(model)
    torch.testing.assert_close(
        F.linear(kept["hidden"], weight, bias), model(input_ids=IDS).logits, atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("make", WRAPPINGS.values(), ids=WRAPPINGS)
def test_the_head_is_restored_after_an_exception(make):
    model = make()
    expected = model(input_ids=IDS).logits
    with pytest.raises(KeyError, match="inside"), no_logits(model):
        raise KeyError("inside")
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_the_inner_of_nested_contexts_keeps():
    model = tiny()
    with no_logits(model) as outer:
        with no_logits(model) as inner:
            model(input_ids=IDS)
        assert "hidden" not in outer
        model(input_ids=IDS[:1])
    assert inner["hidden"].shape[0] == 3 and outer["hidden"].shape[0] == 1
    assert model(input_ids=IDS).logits.shape[-1] == V


def test_no_logits_in_distributed_data_parallel(one_process):
    model = lora(tiny())
    with one_process():
        ddp = nn.parallel.DistributedDataParallel(model)
        with no_logits(ddp) as kept:
            ddp(input_ids=IDS)
        kept["hidden"].pow(2).sum().backward()
    assert all(
        p.grad is not None for n, p in model.named_parameters() if "lora_" in n and "q_proj" in n
    )


def test_a_model_without_a_head_is_refused():
    sizes = dict(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    for model in (LlamaModel(LlamaConfig(**sizes)), nn.Linear(2, 2), Wrapped(nn.Linear(2, 2))):
        with (
            pytest.raises(ValueError, match="has no output embeddings: give the model with"),
            no_logits(model),
        ):
            pass
        with pytest.raises(ValueError, match="has no output embeddings"):
            head_of(model)
    with (
        pytest.raises(ValueError, match="DataParallel runs copies"),
        no_logits(nn.DataParallel(tiny())),
    ):
        pass


def test_a_head_that_was_not_reached_says_so():
    model = tiny()
    with no_logits(model) as kept:
        model.model(input_ids=IDS)
    with pytest.raises(RuntimeError, match="the head was not reached"):
        kept["hidden"]


# ---- supervised_rows and RowIndex


def padded(rows, side, extra=0):
    """Lists of (hidden [n, D], labels [n]) as one batch."""
    T = max(len(y) for _, y in rows) + extra
    hidden, labels = torch.zeros(len(rows), T, D), torch.full((len(rows), T), -100)
    for b, (h, y) in enumerate(rows):
        at = slice(0, len(y)) if side == "right" else slice(T - len(y), T)
        hidden[b, at], labels[b, at] = h, y
    return hidden, labels


def world(seed=0, n=7):
    """Samples of several lengths, one of them with no supervised token, one with holes."""
    g, rows = torch.Generator().manual_seed(seed), []
    for i in range(n):
        size = 2 + i % 5
        labels = torch.randint(0, V, (size,), generator=g)
        labels[: 1 + i % 2] = -100
        if i == 3:
            labels[:] = -100
        if i == 4:
            labels[3] = -100
        rows.append((torch.randn(size, D, generator=g), labels))
    return rows


def by_hand(rows):
    pairs = [(h[t - 1], y[t]) for h, y in rows for t in range(1, len(y)) if y[t] != -100]
    return torch.stack([h for h, _ in pairs]), torch.stack([y for _, y in pairs])


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_those_of_a_loop_over_positions(side):
    rows = world()
    hidden, labels = padded(rows, side, extra=2)
    found = supervised_rows(hidden, labels)
    expected = by_hand(rows)
    assert torch.equal(found.hidden, expected[0]) and torch.equal(found.labels, expected[1])
    assert len(found) == len(expected[1]) and found.teacher is None
    weights = torch.arange(labels.numel()).reshape(labels.shape)
    # a weight stands at its label, like labels
    assert torch.equal(found.pick(weights), weights[:, 1:][labels[:, 1:] != -100])
    assert torch.equal(found.pick(labels), found.labels)
    with pytest.raises(ValueError, match="must have the labels'"):
        found.pick(weights[:, 1:])


def test_the_first_label_is_predicted_by_nothing_and_ignore_index_counts():
    hidden, labels = torch.randn(1, 3, D), torch.tensor([[5, 6, 0]])
    assert supervised_rows(hidden, labels).labels.tolist() == [6, 0]
    assert supervised_rows(hidden, labels, ignore_index=0).labels.tolist() == [6]
    assert len(supervised_rows(hidden[:, :1], labels[:, :1])) == 0


def indexed(rows, batch=3):
    index, states = RowIndex(), []
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        found = supervised_rows(*padded(chunk, "right"))
        index.add(list(range(start, start + len(chunk))), found)
        states.append(found.hidden)
    return index, torch.cat(states)


@settings(max_examples=30, deadline=None)
@given(
    order=st.permutations(range(7)),
    size=st.integers(1, 7),
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 3),
)
def test_teacher_rows_follow_the_samples_through_any_batching(order, size, side, extra):
    rows = world()
    index, states = indexed(rows)
    for start in range(0, 7, size):
        ids = order[start : start + size]
        hidden, labels = padded([rows[i] for i in ids], side, extra)
        found = supervised_rows(hidden, labels, torch.tensor(ids), index)
        assert torch.equal(states[found.teacher], found.hidden)  # the "teacher" is the student here
    assert len(index) == len(states)


def test_a_sample_that_came_twice_in_one_batch_gets_its_rows_twice():
    rows = world()
    index, states = indexed(rows)
    found = supervised_rows(*padded([rows[2], rows[2]], "right"), [2, 2], index)
    assert torch.equal(states[found.teacher], found.hidden)


def test_what_the_teacher_did_not_see_is_an_error():
    rows = world()
    index, _ = indexed(rows)
    h, y = rows[6]
    with pytest.raises(
        ValueError,
        match="Sample 6 has 1 supervised tokens but had 2 when the teacher saw it: truncate",
    ):
        supervised_rows(*padded([(h[:-1], y[:-1])], "right"), [6], index)
    with pytest.raises(ValueError, match="Sample 6 is not the one .* keep ids with their samples"):
        supervised_rows(*padded([(h, y.where(y < 0, (y + 1) % V))], "right"), [6], index)
    with pytest.raises(
        ValueError, match="never saw sample 9: run it over every sample, on every rank"
    ):
        supervised_rows(*padded([rows[0]], "right"), [9], index)
    with pytest.raises(ValueError, match="Sample 1 came to the teacher twice"):
        index.add([1], supervised_rows(*padded([rows[1]], "right")))
    with pytest.raises(ValueError, match="Sample 11 came to the teacher twice"):
        index.add([11, 11], supervised_rows(*padded(rows[:2], "right")))


def test_bad_arguments_are_sentences():
    rows = world()
    hidden, labels = padded(rows, "right")
    index, _ = indexed(rows)
    for bad in (
        (hidden[:, 1:], labels),
        (hidden, labels[0]),
        (hidden, labels.int()),
        (hidden[0], labels),
    ):
        with pytest.raises(ValueError, match=r"labels must be int64 \[B, T\].*\.$"):
            supervised_rows(*bad)
    with pytest.raises(ValueError, match="labels are on meta but hidden on cpu"):
        supervised_rows(hidden, labels.to("meta"))
    for bad in ({"sample_ids": [0]}, {"index": index}):
        with pytest.raises(ValueError, match="belong together"):
            supervised_rows(hidden, labels, **bad)
    with pytest.raises(ValueError, match="There are 2 sample_ids for 7 samples"):
        supervised_rows(hidden, labels, [0, 1], index)
    with pytest.raises(ValueError, match="must be integers"):
        supervised_rows(hidden, labels, torch.zeros(7), index)


def test_an_index_is_the_same_after_saving(tmp_path):
    rows = world()
    index, _ = indexed(rows)
    index.save(tmp_path / "index.safetensors")
    again = RowIndex.load(tmp_path / "index.safetensors")
    batch = padded([rows[i] for i in (6, 3, 0)], "left")
    expected = supervised_rows(*batch, [6, 3, 0], index).teacher
    assert torch.equal(supervised_rows(*batch, [6, 3, 0], again).teacher, expected) and len(
        again
    ) == len(index)
    with pytest.raises(ValueError, match="came to the teacher twice"):
        again.add([3], supervised_rows(*padded([rows[3]], "left")))
    RowIndex().save(tmp_path / "empty.safetensors")
    assert len(RowIndex.load(tmp_path / "empty.safetensors")) == 0
    TeacherCache.from_hidden(torch.randn(2, D), torch.randn(V, D)).save(
        tmp_path / "cache.safetensors"
    )
    with pytest.raises(ValueError, match="is not a row index"):
        RowIndex.load(tmp_path / "cache.safetensors")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        RowIndex.load(tmp_path / "junk")


def loaded(path):
    """Loads, or raises ValueError with one sentence."""
    try:
        return RowIndex.load(path)
    except ValueError as error:
        text = str(error)
        assert text.startswith(str(path)) and text.endswith(".") and "\n" not in text
        return None


def seen(index):
    return {i: (start, labels.tolist()) for i, (start, labels) in index._seen.items()}


def test_a_damaged_index_is_told(tmp_path):
    index, _ = indexed(world())
    path, rng = tmp_path / "index.safetensors", random.Random(0)
    index.save(path)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 40)]
    for at in rng.sample(range(len(whole)), 200):
        damaged.append(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
    for data in damaged:
        path.write_bytes(data)
        again = loaded(path)
        assert again is None or seen(again) == seen(index)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        RowIndex.load(path)


WRONG = {
    "ids twice": lambda t: t["ids"].fill_(1),
    "a count below 0": lambda t: t["counts"].copy_(t["counts"] * -1),
    "counts too large": lambda t: t["counts"].fill_(2**62),
    "a count more": lambda t: t["counts"].__setitem__(0, 9),
    "a label less": lambda t: t.update(labels=t["labels"][1:].clone()),
    "no ids": lambda t: t.pop("ids"),
    "ids of another shape": lambda t: t.update(ids=t["ids"][None].clone()),
    "an id less": lambda t: t.update(ids=t["ids"][1:].clone()),
    "labels as floats": lambda t: t.update(labels=t["labels"].float()),
    "one more": lambda t: t.update(more=torch.ones(1)),
    "a count below 0, made up for": lambda t: t["counts"][:2].add_(
        (1 + t["counts"][0]) * torch.tensor([-1, 1])
    ),
    "counts whose sum runs over": lambda t: (
        t["counts"].zero_()[:5].add_(torch.tensor([2**62] * 4 + [len(t["labels"])]))
    ),
    "counts of no dimension": lambda t: t.update(counts=torch.tensor(3)),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_index_of_the_first_version_is_read_and_looked_at(what, tmp_path):
    index, _ = indexed(world())
    path = tmp_path / "index.safetensors"
    index.save(path)
    tensors, metadata = load_file(path), {"format": "fastsiu-row-index", "version": "1"}
    save_file(tensors, path, metadata=metadata)
    assert seen(RowIndex.load(path)) == seen(index)
    WRONG[what](tensors)
    save_file(tensors, path, metadata=metadata)
    assert loaded(path) is None


def test_an_index_does_not_live_in_its_file(tmp_path):
    index, _ = indexed(world())
    index.save(tmp_path / "index")
    again = RowIndex.load(tmp_path / "index")
    size = (tmp_path / "index").stat().st_size
    with open(tmp_path / "index", "r+b") as file:
        file.write(bytes(size))
    assert seen(again) == seen(index)


# ---- head_of


def test_a_plain_head_is_given_as_it_is():
    model = tiny(tie=True)
    assert head_of(model).weight is model.model.embed_tokens.weight and head_of(model).bias is None
    model = tiny(bias=True)
    assert head_of(model) == (model.lm_head.weight, model.lm_head.bias)
    model.requires_grad_(False)
    # the loss's fast path
    assert head_of(model, frozen=True).weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_the_teacher_of_a_head_that_trains_is_a_copy():
    model = tiny(bias=True)
    teacher = head_of(model, frozen=True)
    before = teacher.weight.clone()
    with torch.no_grad():
        model.lm_head.weight += 1
    assert (
        torch.equal(teacher.weight, before)
        and not teacher.weight.requires_grad
        and not teacher.bias.requires_grad
    )


def test_an_adapted_head_is_not_its_base():
    model = lora(tiny())
    base = model.get_output_embeddings().weight  # PEFT answers with the base's
    weight, _ = head_of(model)
    assert not torch.allclose(weight, base, atol=0.1) and weight.requires_grad
    with model.disable_adapter():
        assert head_of(model).weight is base
        expected = model(input_ids=IDS).logits
        with no_logits(model) as kept:
            model(input_ids=IDS)
        torch.testing.assert_close(
            F.linear(kept["hidden"], *head_of(model)), expected, atol=1e-5, rtol=0
        )
    model.base_model.set_adapter([])
    assert head_of(model).weight is base


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_every_active_adapter_counts(bias, lora_bias):
    model = lora(tiny(bias=bias), lora_bias=lora_bias)
    second = LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, target_modules=["lm_head"], lora_bias=lora_bias
    )
    model.add_adapter("second", second)
    model.add_adapter("elsewhere", LoraConfig(r=2, target_modules=["q_proj"]))
    shake(model)
    seen = []
    for active in (["default"], ["second"], ["default", "second"], ["elsewhere"]):
        model.base_model.set_adapter(active)
        with no_logits(model) as kept:
            model(input_ids=IDS)
        weight, b = head_of(model)
        torch.testing.assert_close(
            F.linear(kept["hidden"], weight, b), model(input_ids=IDS).logits, atol=5e-5, rtol=0
        )
        seen.append(weight)
    assert all(not torch.allclose(seen[i], seen[j], atol=1e-2) for i in range(4) for j in range(i))
    with model.disable_adapter():
        # both sides of the loss have one, or neither
        assert (head_of(model).bias is not None) == (bias or lora_bias)


@pytest.mark.parametrize("how", ["LoRA", "LoRA with a bias", "trainable copy", "full"])
def test_gradients_of_an_adapted_head_are_those_through_logits(how):
    model = tiny(bias=how == "LoRA with a bias")
    if how == "trainable copy":
        model = lora(model, ["q_proj"], modules_to_save=["lm_head"])
    elif how != "full":
        model = lora(model, lora_bias=how == "LoRA with a bias")
    off = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    labels = IDS.clone()
    labels[:, :3] = -100
    with torch.no_grad(), off:
        target = model(input_ids=IDS).logits
        with no_logits(model) as kept:
            model(input_ids=IDS)
        weight, bias = head_of(model, frozen=True)
        teacher = TeacherCache.from_hidden(
            supervised_rows(kept["hidden"], labels).hidden, weight, head_bias=bias
        )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape))
    with no_logits(model) as kept:
        model(input_ids=IDS)
    rows = supervised_rows(kept["hidden"], labels)
    weight, bias = head_of(model)
    loss = fused_dmk_ce(rows.hidden, weight, rows.labels, teacher, head_bias=bias)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    student, theirs = (
        x[:, 2:-1].flatten(0, 1).log_softmax(-1) for x in (model(input_ids=IDS).logits, target)
    )
    kl = F.kl_div(student, theirs, log_target=True, reduction="batchmean")
    expected = 0.9 * F.nll_loss(student, labels[:, 3:].flatten()) + 0.75 * kl
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs)
    on_head = [n for n in ours if "lm_head" in n]
    assert len(on_head) == {"LoRA": 2, "LoRA with a bias": 3, "trainable copy": 1, "full": 1}[how]
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_a_small_difference_survives_a_bf16_head():
    model = get_peft_model(
        tiny(dtype=torch.bfloat16), LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"])
    )
    layer = model.get_output_embeddings()
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(0.01)
        layer.lora_B["default"].weight.fill_(0.01)
    with torch.autocast("cpu", torch.bfloat16):
        weight, _ = head_of(model.eval())
    torch.testing.assert_close(
        weight - layer.base_layer.weight.float(), torch.full((V, D), 2e-4), atol=1e-7, rtol=0
    )


def test_the_copy_of_modules_to_save_is_given_and_the_original_when_off():
    model = lora(tiny(), ["q_proj"], modules_to_save=["lm_head"])
    wrapper = model.base_model.model.lm_head
    assert head_of(model).weight is wrapper.modules_to_save["default"].weight
    with model.disable_adapter():
        assert head_of(model).weight is wrapper.original_module.weight
    model.add_adapter("elsewhere", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("elsewhere")
    assert head_of(model).weight is wrapper.original_module.weight
    with no_logits(model) as kept:
        model(input_ids=IDS)
    torch.testing.assert_close(
        kept["hidden"] @ head_of(model).weight.T, model(input_ids=IDS).logits, atol=1e-5, rtol=0
    )


class Linear4bit(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def refused():
    quantised = tiny()
    quantised.lm_head = Linear4bit(D, V)
    yield "quantised layer", quantised, "a Linear4bit, not a plain linear layer"
    deep = tiny()
    deep.lm_head = nn.Sequential(deep.lm_head)
    yield "not linear", deep, "a Sequential, not a plain linear layer"
    integers = tiny()
    integers.lm_head.weight = nn.Parameter(
        torch.zeros(V, D, dtype=torch.uint8), requires_grad=False
    )
    yield "quantised weight", integers, r"quantised \(Parameter, torch.uint8\)"
    offloaded = tiny()
    offloaded.lm_head.to("meta")
    yield "offloaded", offloaded, "is offloaded: keep the head"
    flat = tiny()
    flat.lm_head.weight = nn.Parameter(torch.zeros(0))
    yield "partitioned", flat, r"partitioned, here \[0\]"
    yield "DoRA", lora(tiny(), use_dora=True), "is a DoraLinearVariant"
    yield (
        "dropout",
        lora(tiny(), lora_dropout=0.1).train(),
        "has dropout 0.1, which no weight can show",
    )
    yield (
        "IA3",
        get_peft_model(tiny(), IA3Config(target_modules=["lm_head"], feedforward_modules=[])),
        "PEFT's ia3.layer.Linear",
    )
    merged = lora(tiny())
    merged.merge_adapter()
    yield "merged", merged, r"call unmerge_adapter\(\) first"


@pytest.mark.parametrize(
    "model, message", [pytest.param(m, text, id=name) for name, m, text in refused()]
)
def test_a_head_without_such_a_weight_is_refused(model, message):
    with pytest.raises(ValueError, match=message + r"(.|\n)*\.$"):
        head_of(model)


def test_dropout_is_no_obstacle_outside_training():
    assert head_of(lora(tiny(), lora_dropout=0.1).eval()).weight.shape == (V, D)


def test_a_sharded_head_is_gathered(one_process):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    plain = tiny(bias=True)
    expected = plain.lm_head.weight.detach().clone(), plain.lm_head.bias.detach().clone()
    with one_process():
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(plain.lm_head, mesh=mesh)
        assert isinstance(plain.lm_head.weight, DTensor)
        weight, bias = head_of(plain)
        assert (
            type(weight) is torch.Tensor
            and torch.equal(weight, expected[0])
            and torch.equal(bias, expected[1])
        )
        (weight.sum() * 3).backward()
        assert torch.equal(plain.lm_head.weight.grad.full_tensor(), torch.full((V, D), 3.0))
