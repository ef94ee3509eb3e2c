"""The trainers of `fastsiu.trainers`: the losses and the adapter of our own loop, the same on two
ranks under DDP and FSDP2 as in one process, and checkpoints that go on where they stopped."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))  # torchrun knows no pytest
import calls
import shares as made

from fastsiu import session, train
from fastsiu.model import adapter
from fastsiu.objectives import siu
from fastsiu.request import BadInput, NumericFailure, Recipe
from fastsiu.step import directions
from fastsiu.step.look import Look

FOLDER = Path(__file__).parent
RECIPE = Recipe(steps=3, lr=1e-3, rank=4, batch_size=8, early_stop=False)
HELD = dataclasses.replace(RECIPE, directions=32)
PARTS = ("loss", "ce", "kl", "strange")
ADAPTED = ("q_proj", "v_proj", "lm_head")


def example(name):
    spec = importlib.util.spec_from_file_location(f"trainers_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(model):
    """What trains, whole, as one vector."""
    whole = lambda p: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
    return torch.cat([whole(p).flatten() for p in model.parameters() if p.requires_grad])


def told(trainer):
    return [[row[k] for k in PARTS if k in row] for row in trainer.state.log_history if "ce" in row]


def arguments(folder, **options):
    from transformers import TrainingArguments

    quiet = dict(report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True)
    return TrainingArguments(str(folder), logging_steps=1, **(quiet | options))


def trainer_of(folder, recipe=RECIPE, *, tied=True, head=False, **options):
    from fastsiu.trainers import UnlearningTrainer

    loaded = made.load(tied=tied)
    lora = LoraConfig(r=4, target_modules=list(ADAPTED), exclude_modules=".*vision.*")
    return UnlearningTrainer(
        loaded,
        made.prepared(loaded, recipe),
        recipe,
        arguments(folder, **options),
        lora=lora if head else None,
    )


# One process -------------------------------------------------------------------------------------


def ours(recipe):
    """(parts of each step, weights) of our own loop."""
    loaded = made.load()
    samples, lessons = session.run_teacher(
        loaded, [made.prepared(loaded, recipe)], recipe, lambda text: None
    )
    held = directions.find(loaded, [half for half, _ in lessons], recipe)
    look = lambda: Look(1.0, 0.0, 0.0)
    steps = train.fit(
        loaded, samples, siu, recipe, look, lessons=lessons, aids=train.Aids(held=held)
    )
    return [[s.loss, s.ce, s.kl, s.strange] for s in steps], weights(loaded.model)


@pytest.fixture(scope="module")
def own():
    return ours(RECIPE)


@pytest.fixture(scope="module")
def with_head(tmp_path_factory):
    """(parts of each step, weights) of one process whose adapter is on the head as well."""
    trainer = trainer_of(tmp_path_factory.mktemp("head"), head=True)
    trainer.train()
    return told(trainer), weights(trainer.loaded.model)


def check(found, expected):
    """Parts and weights agree to 1e-5; the weights of our recipe's steps are about 1."""
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


@pytest.mark.parametrize("micro", [1, 3])
def test_the_steps_are_those_of_our_own_loop(own, tmp_path, micro):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=micro)
    trainer.train()
    check((told(trainer), weights(trainer.loaded.model)), own)
    assert trainer.model.shares == micro  # uneven: 8 samples, and lessons, in 3 shares
    assert not trainer.loaded.model.training


def test_the_factors_stay_where_our_own_loop_holds_them(own, tmp_path):
    trainer = trainer_of(tmp_path, HELD)
    trainer.train()
    expected = ours(HELD)
    check((told(trainer), weights(trainer.loaded.model)), expected)
    assert (expected[1] - own[1]).norm() > 0.1 * own[1].norm()  # it is another training


def test_a_share_divided_by_its_own_counts_would_show(own, tmp_path, monkeypatch):
    """The comparison above can fail."""
    from fastsiu.step import shares

    monkeypatch.setattr(shares.StepShares, "_whole", lambda self, work: None)
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=3)
    trainer.train()
    with pytest.raises(AssertionError):
        check((told(trainer), weights(trainer.loaded.model)), own)


def test_a_checkpoint_is_an_adapter_and_training_goes_on_from_it(own, tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    kept = tmp_path / "checkpoint-2"
    files = {file.name for file in kept.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= files
    assert "model.safetensors" not in files and max(f.stat().st_size for f in kept.iterdir()) < 2e6
    again = trainer_of(tmp_path / "again")
    again.train(resume_from_checkpoint=str(kept))
    check((told(trainer), weights(again.loaded.model)), own)


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({"schedule": "gone"}, {}, "schedule 'gone' looks at the model"),
        ({"relearn": 3}, {}, "rehearses no relearning"),
        ({}, {"max_steps": 4}, "max_steps is 4 and the recipe has 3"),
        ({}, {"activation_checkpointing": True}, "Budget\\(checkpointing=True\\)"),
    ],
)
def test_what_the_trainer_does_not_do_is_refused(loaded, tmp_path, change, options, sentence):
    from fastsiu.trainers import UnlearningTrainer

    recipe = dataclasses.replace(RECIPE, **change)
    with pytest.raises(BadInput, match=sentence):
        UnlearningTrainer(loaded, [None], recipe, arguments(tmp_path, **options))


@pytest.mark.parametrize(
    "stored, error, sentence",
    [
        ((1, 1.0), BadInput, "has another size"),  # which copying would stretch without a word
        ((2, 1.0), BadInput, "has another size"),
        ((4, float("nan")), NumericFailure, "NaN or infinite"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(loaded, tmp_path, stored, error, sentence):
    from fastsiu.trainers import UnlearningTrainer

    (rank, number), before = stored, {}
    go_on = UnlearningTrainer._load_from_checkpoint
    trainer = SimpleNamespace(loaded=loaded)
    try:
        calls.bent(loaded, Recipe(rank=rank), number)
        adapter.save(loaded, tmp_path)
        adapter.detach(loaded)
        calls.bent(loaded, Recipe(rank=4), 0.5)
        before = weights(loaded.model).clone()
        with pytest.raises(error, match=sentence):
            go_on(trainer, str(tmp_path))
        assert torch.equal(weights(loaded.model), before)
    finally:
        adapter.detach(loaded)


# The mix-in --------------------------------------------------------------------------------------


def mixed(folder, *, tied, early=False, accumulate=2, **options):
    """transformers' own Trainer with the loss mixed in and LoRA on the head, which TRL refuses."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer

    from fastsiu.trainers import Distillation, UnlearningMixin

    class Mixed(UnlearningMixin, Trainer):
        pass

    hf, keep = example("hf_trainer"), torch.arange(160) % 7 > 0
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    given = dict(
        max_steps=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        remove_unused_columns=False,
    )
    trainer = Mixed(
        get_peft_model(LlamaForCausalLM(config), lora),
        arguments(folder, **given, **options),
        data_collator=hf.collate,
        train_dataset=hf.samples(12),
        distillation=Distillation(vocab_keep=keep),
    )
    if early:
        trainer.run_teacher()
    trainer.train()
    return trainer


def test_the_mixin_is_full_logits_with_both_masks(tmp_path):
    trainer = mixed(tmp_path, tied=False)
    data, model = trainer.train_dataset, trainer.model.eval()
    batch = trainer.data_collator([data[i] for i in (3, 4, 7)])
    with torch.no_grad():
        found = float(trainer.compute_loss(model, dict(batch)))
        read = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        student = model(**read).logits[:, :-1].double().log_softmax(-1)
        with model.disable_adapter():
            teacher = model(**read).logits[:, :-1].double().log_softmax(-1)
    labels, used = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    ce = -student[used].gather(1, labels[used][:, None]).mean()
    keep = trainer.distillation.vocab_keep
    kl = (teacher.exp() * (teacher - student))[..., keep].sum(-1)
    token = used * batch["kl_weight"][:, 1:]
    assert float(kl[used].abs().max()) > 1e-4
    assert abs(found - float(0.9 * ce + 0.75 * (token * kl).sum() / token.sum())) < 1e-5


def test_the_mixin_needs_an_adapter_and_the_ids():
    pytest.importorskip("trl")
    sft = example("sft_mixin")
    with pytest.raises(BadInput, match="set remove_unused_columns to False"):
        sft.main(remove_unused_columns=True)


def scaled(folder, **options):
    """A Trainer of a model that divides its head's product by 4, with the loss mixed in."""
    from peft import get_peft_model
    from transformers import GraniteConfig, GraniteForCausalLM, Trainer

    from fastsiu.trainers import Distillation, UnlearningMixin

    class Mixed(UnlearningMixin, Trainer):
        pass

    hf = example("hf_trainer")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = GraniteConfig(vocab_size=160, num_key_value_heads=4, logits_scaling=4.0, **sizes)
    return Mixed(
        get_peft_model(GraniteForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj"])),
        arguments(folder, max_steps=1, remove_unused_columns=False),
        data_collator=hf.collate,
        train_dataset=hf.samples(6),
        distillation=Distillation(**options),
    )


def test_what_a_model_does_after_its_head_has_to_be_said(tmp_path):
    scaled(tmp_path, logit_scale=0.25).run_teacher()
    for wrong in ({}, {"logit_scale": 4.0}, {"logit_scale": 0.25, "logit_softcap": 0.5}):
        with pytest.raises(BadInput, match="The model's logits are not its head's product with"):
            scaled(tmp_path, **wrong).run_teacher()


def padded(side):
    def collate(rows):
        batch = {}
        longest = max(len(row["input_ids"]) for row in rows)
        for key, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
            own = [row["input_ids"] if key != "attention_mask" else [1] * 9 for row in rows]
            own = [x[: len(row["input_ids"])] for x, row in zip(own, rows, strict=True)]
            fills = [[fill] * (longest - len(x)) for x in own]
            joined = [f + x if side == "left" else x + f for f, x in zip(fills, own, strict=True)]
            batch[key] = torch.tensor(joined)
        return batch

    return collate


@pytest.mark.parametrize("side", ["left", "right"])
def test_weights_of_tokens_stand_where_the_collator_puts_the_tokens(side):
    from fastsiu.step.distillation import _WithIds

    rows = [
        {"input_ids": [5, 6, 7], "sample_id": 3, "kl_weight": [1.0, 0.0, 0.5]},
        {"input_ids": [5, 6, 7, 8, 9], "sample_id": 4, "kl_weight": 0.25},
    ]
    batch = _WithIds(padded(side))(rows)
    first = [0.0, 0.0, 1.0, 0.0, 0.5] if side == "left" else [1.0, 0.0, 0.5, 0.0, 0.0]
    assert batch["kl_weight"].tolist() == [first, [0.25] * 5]
    assert batch["sample_id"].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sample_id": None}, "A row has None as its sample_id: give each row"),
        ({"sample_id": "7"}, "A row has '7' as its sample_id"),
        ({"sample_id": 7.0}, "A row has 7.0 as its sample_id"),
        ({"kl_weight": None}, "A row has None as its kl_weight"),
        ({"kl_weight": "no"}, "A row has 'no' as its kl_weight"),
        ({"kl_weight": [1.0, 0.0]}, "kl_weight has 2 numbers for a row of 4 tokens"),
        ({"kl_weight": [[1.0] * 4]}, "kl_weight has 1 numbers for a row of 4 tokens"),
    ],
)
def test_columns_that_no_loss_can_use_are_told(change, says):
    from fastsiu.step.distillation import _WithIds

    rows = [{"input_ids": [5] * 4, "sample_id": i, "kl_weight": 1.0} for i in range(2)]
    with pytest.raises(BadInput, match=re.escape(says)):
        _WithIds(padded("right"))([rows[0], rows[1] | change])


# Two ranks ---------------------------------------------------------------------------------------

TRAINED = [  # wrapped how, tied, an adapter on the head
    ("ddp", True, True),
    ("fsdp", True, False),
    ("fsdp", True, True),
    ("fsdp", False, False),
    ("fsdp", False, True),
]
RESUMED = TRAINED[1]
MIXED = [  # the same, and whether the teacher runs before the model is wrapped
    ("ddp", True, True, False),
    ("fsdp", False, True, True),
    ("fsdp", True, True, False),
    ("fsdp", True, False, False),
    ("fsdp", False, False, True),
]


def fsdp(wrap):
    return {"fsdp": True} if wrap == "fsdp" else {}


def train_as_a_rank(folder, *kinds):
    """What torchrun runs on each of two ranks; parts and weights go into files."""
    out = {}
    for case in MIXED if "mixin" in kinds else ():
        wrap, tied, head, early = case
        if head or importlib.util.find_spec("trl"):
            trainer = of_mixin(f"{folder}/run", tied, head, early=early, **fsdp(wrap))
            out[case] = losses(trainer), weights(trainer.model)
    for case in TRAINED if "unlearning" in kinds else ():
        wrap, tied, head = case
        options = dict(tied=tied, head=head, gradient_accumulation_steps=2, **fsdp(wrap))
        if case == RESUMED:
            options |= dict(save_strategy="steps", save_steps=2)
        trainer = trainer_of(f"{folder}/run", **options)
        trainer.train()
        out[case] = told(trainer), weights(trainer.loaded.model)
        if case == RESUMED:
            again = trainer_of(f"{folder}/again", **options | dict(save_strategy="no"))
            again.train(resume_from_checkpoint=f"{folder}/run/checkpoint-2")
            out["resumed"] = told(trainer), weights(again.loaded.model)
    for wrap in ("ddp", "fsdp") if "unlearning" in kinds else ():
        trainer = trainer_of(f"{folder}/run", HELD, **fsdp(wrap))
        trainer.train()
        out["held", wrap] = told(trainer), weights(trainer.loaded.model), outside(trainer)
    torch.save(out, f"{folder}/{os.environ['RANK']}.pt")


def outside(trainer):
    """The largest share of a factor A that lies in no direction which it may read."""
    (held,) = (one.held for one in trainer.callback_handler.callbacks if hasattr(one, "held"))
    shares = []
    for layer, kept in held.of.items():
        weight = layer.lora_A["default"].weight
        weight = (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()
        shares.append(float((weight - weight @ kept.basis @ kept.basis.T).norm() / weight.norm()))
    return max(shares)


def of_mixin(folder, tied, head, **options):
    """TRL's trainer, or transformers' where LoRA is on the head."""
    if head:
        return mixed(folder, tied=tied, **options)
    return example("sft_mixin").main(tied=tied, **options)


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(the folder, what each of two ranks left there) of all cases in one start."""
    folder = tmp_path_factory.mktemp("ranks")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # The folder of a script is searched for modules, and this one has a `triton`.
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [*run, __file__, str(folder), "mixin", "unlearning"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, check=False, env=env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, *(torch.load(folder / f"{rank}.pt") for rank in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_two_ranks_train_as_one_process(case, own, with_head, ranks):
    _, one, other = ranks
    assert torch.equal(one[case][1], other[case][1])
    check(one[case], with_head if case[2] else own)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_two_ranks_hold_the_factors_in_one_ranks_directions(wrap, ranks):
    """Parts as in our own loop. Weights are the same on both ranks, and nothing of them is outside
    of the directions."""
    _, one, other = ranks
    found, again = one["held", wrap], other["held", wrap]
    assert torch.equal(found[1], again[1])
    torch.testing.assert_close(found[0], ours(HELD)[0], atol=1e-5, rtol=0)
    assert max(found[2], again[2]) < 1e-5


@pytest.mark.slow
def test_sharded_training_goes_on_from_a_checkpoint_without_frozen_weights(own, ranks):
    folder, one, _ = ranks
    check(one["resumed"], own)
    kept = folder / "run/checkpoint-2"
    assert (kept / "adapter_model.safetensors").is_file()
    assert max(file.stat().st_size for file in kept.iterdir()) < 2e6


@pytest.mark.slow
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_the_mixin_on_two_ranks_is_that_of_one_process(case, ranks, tmp_path):
    _, tied, head, _ = case
    if not head:
        pytest.importorskip("trl")
    alone = of_mixin(tmp_path, tied, head, accumulate=4)
    _, one, other = ranks
    assert torch.equal(one[case][1], other[case][1])
    torch.testing.assert_close(one[case][0], losses(alone), atol=1e-5, rtol=0)
    expected = weights(alone.model)
    assert (one[case][1] - expected).norm() < 1e-5 * expected.norm()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_as_a_rank(*sys.argv[1:])
