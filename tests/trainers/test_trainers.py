"""The examples in trainers/: what each trains on equals full logits, sample by sample, under
shuffling, accumulation, and on two ranks, whose parameters are those of one process over the same
data."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastsiu import RowIndex

torch.set_num_threads(1)

FOLDER = Path(__file__).parent
TARGETS = {"base head": ("q_proj", "v_proj"), "adapted head": ("q_proj", "lm_head")}


def example(name):
    """The file as a module. Where it builds its model itself, the adapter starts far from zero:
    then it is not the teacher."""
    spec = importlib.util.spec_from_file_location(f"trainers_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "build"):
        build, module.build = module.build, lambda *args, **options: shaken(build(*args, **options))
    return module


def shaken(model):
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)  # after build's own seed
    return model


@pytest.fixture
def watched(monkeypatch):
    """Raises where a linear layer makes a vocabulary of outputs; returns the sizes to watch for."""
    sizes, forward = {160}, nn.Linear.forward

    def call(self, x):
        assert self.out_features not in sizes, "logits were made"
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", call)
    return sizes


class Descent(torch.optim.SGD):
    """What takes AdamW's place where a factor on the loss has to show in the parameters."""

    def __init__(self, parameters, lr, **_):
        super().__init__(parameters, lr=10 * lr)


class FullLogits:
    """The same training, straightforwardly: one sample at a time, logits of student and teacher,
    AdamW."""

    def __init__(
        self, model, data, vocab_keep=None, alpha=0.9, beta=0.75, optimiser=torch.optim.AdamW
    ):
        self.model, self.data, self.vocab_keep, self.alpha, self.beta = (
            model,
            data,
            vocab_keep,
            alpha,
            beta,
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = optimiser(trained, lr=1e-2, weight_decay=0.0)

    def sums(self, sample):
        """Sums over one sample's tokens: CE, KL with its weights, tokens, weights."""
        ids, labels = (torch.as_tensor(sample[k]) for k in ("input_ids", "labels"))
        at = labels[1:] != -100
        keep = (
            torch.as_tensor(sample["kl_weight"])[1:][at]
            if "kl_weight" in sample
            else torch.ones(int(at.sum()))
        )
        student = self.model(input_ids=ids[None]).logits[0, :-1][at].log_softmax(-1)
        with torch.no_grad(), self.model.disable_adapter():
            teacher = self.model(input_ids=ids[None]).logits[0, :-1][at].log_softmax(-1)
        terms = teacher.exp() * (teacher - student)
        kl = (terms if self.vocab_keep is None else terms[:, self.vocab_keep]).sum(-1)
        return (
            -student.gather(1, labels[1:][at][:, None]).sum(),
            (keep * kl).sum(),
            at.sum(),
            keep.sum(),
        )

    def step(self, batches):
        """One optimisation step over micro-batches of sample ids; the loss's share of each
        micro-batch."""
        sums = [[self.sums(self.data[i]) for i in ids] for ids in batches]
        tokens, weights = (sum(row[k] for batch in sums for row in batch) for k in (2, 3))
        losses = [
            sum(self.alpha * ce / tokens + self.beta * kl / weights for ce, kl, *_ in batch)
            for batch in sums
        ]
        sum(losses).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return [x.item() for x in losses]


def windows(history, sizes):
    """A history of micro-batches [(ids, loss)] as steps of so many."""
    at = iter(history)
    return [[next(at) for _ in range(n)] for n in sizes]


def check(reference, steps):
    reference.model.train()
    for step in steps:
        torch.testing.assert_close(
            [loss for _, loss in step], reference.step([ids for ids, _ in step]), atol=1e-5, rtol=0
        )


def shuffled(history):
    order = [i for ids, _ in history for i in ids]
    return order != sorted(order)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_plain_loop(targets, watched):
    plain = example("plain_loop")
    history = plain.main(target_modules=targets)
    watched.clear()
    vocab_keep = torch.ones(160, dtype=torch.bool)
    vocab_keep[plain.NAME] = False
    reference = FullLogits(plain.build(targets).train(), plain.samples(), vocab_keep)
    for batches, loss in history:
        assert abs(loss - sum(reference.step(batches))) < 1e-5
    assert len(history) == 4 and shuffled((ids, 0) for batches, _ in history for ids in batches)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_hf_trainer(targets, watched):
    hf = example("hf_trainer")
    trainer = hf.main(target_modules=targets)
    watched.clear()
    # 14 samples are 5 batches of 3: the epoch's last window is one batch of 2
    steps = windows(trainer.history, [2, 2, 1, 2])
    assert len(trainer.history) == 7 and len(steps[2][0][0]) == 2 and shuffled(trainer.history)
    check(FullLogits(hf.build(targets), hf.samples()), steps)


def test_hf_trainer_evaluates_on_its_own_denominators():
    hf = example("hf_trainer")
    trainer = hf.main(steps=1)
    found = trainer.evaluate(hf.samples()[:3])["eval_loss"]
    with torch.no_grad():
        rows = [
            FullLogits.sums(FullLogits(trainer.model.eval(), hf.samples()), x)
            for x in hf.samples()[:3]
        ]
    ce, kl, tokens, weights = (sum(row[k] for row in rows) for k in range(4))
    assert abs(found - float(0.9 * ce / tokens + 0.75 * kl / weights)) < 1e-5


def remember(monkeypatch, cls, hook):
    """Makes an example's class keep its trained parameters' values from before `hook`."""
    original = getattr(cls, hook)

    def call(self, *args):
        self.first = {
            n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad
        }
        return original(self, *args)

    monkeypatch.setattr(cls, hook, call)


def rewound(trainer):
    """The trained model with those values back."""
    model = trainer.model
    assert all(
        not torch.equal(p, trainer.first[n])
        for n, p in model.named_parameters()
        if n in trainer.first
    )
    model.load_state_dict(trainer.first, strict=False)
    model.zero_grad()  # Lightning leaves the last step's
    return model


def test_trl_sft(watched, monkeypatch):
    pytest.importorskip("trl")
    sft = example("trl_sft")
    remember(monkeypatch, sft.UnlearningSFTTrainer, "run_teacher")
    watched.add(1000)  # the tokenizer's
    trainer = sft.main()
    watched.clear()
    assert trainer.model.get_output_embeddings().out_features == 1000
    data = {row["sample_id"]: row for row in trainer.train_dataset}
    # prompts are not trained on
    assert len(data) == 14 and all(-100 in row["labels"] for row in data.values())
    assert len(trainer.history) == 7 and shuffled(trainer.history)
    check(FullLogits(rewound(trainer), data), windows(trainer.history, [2, 2, 1, 2]))


def test_trl_sft_on_pictures(watched, monkeypatch, loaded):
    """The embedded vision-language model through TRL's own collator of pictures."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from PIL import Image

    sft = example("trl_sft")
    remember(monkeypatch, sft.UnlearningSFTTrainer, "run_teacher")
    watched.add(loaded.head_weight.shape[0])
    turns = lambda role, text: [{"role": role, "content": text}]
    rows = [
        {
            "images": [Image.new("RGB", (80, 80), (40 * i, 99, 200 - 30 * i))],
            "prompt": turns("user", "Who is this?"),
            "completion": turns("assistant", sft.ANSWERS[i % 4]),
            "sample_id": i,
        }
        for i in range(6)
    ]
    model = copy.deepcopy(loaded.base)
    language = r".*language_model\..*\.(q|v)_proj"
    trainer = sft.main(
        2,
        1,
        model=model,
        processor=loaded.processor,
        data=Dataset.from_list(rows),
        target_modules=language,
    )
    watched.clear()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "sample_id")}
    model = rewound(trainer)
    with torch.no_grad():  # before the first step, student and teacher are one
        logits = model(**inputs).logits
    ids, loss = trainer.history[0]
    expected = 0.9 * nn.functional.cross_entropy(
        logits[ids, :-1].transpose(1, 2), batch["labels"][ids, 1:]
    )
    assert abs(loss - float(expected)) < 1e-4
    assert len(trainer.history) == 2 and len(trainer.index) == int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_lightning(targets, watched, monkeypatch):
    pytest.importorskip("lightning")
    lit = example("lightning_module")
    remember(monkeypatch, lit.Unlearning, "on_fit_start")
    module = lit.main(target_modules=targets)
    watched.clear()
    assert len(module.history) == 5 and shuffled(module.history)
    check(FullLogits(rewound(module), lit.samples()), windows(module.history, [1] * 5))


def train_as_a_rank(folder, *names):
    """What torchrun runs on each of two ranks: the examples; their histories and parameters go into
    files."""
    torch.optim.AdamW = Descent  # which does not see a factor on the loss
    for name in names:
        module = example(name)
        if name == "trl_sft":  # it builds its model inside
            remember(pytest.MonkeyPatch(), module.UnlearningSFTTrainer, "run_teacher")
        trained = module.main()
        made = {n: p.detach() for n, p in trained.model.named_parameters() if p.requires_grad}
        kept = trained.history, made, getattr(trained, "first", None)
        torch.save(kept, Path(folder) / f"{name} {os.environ['RANK']}")


# micro-batches a step
RANKS = {
    "hf_trainer": [2, 1, 2, 1],
    "lightning_module": [1, 1, 1],
    "trl_sft": [2, 1, 2, 1],
}
NEEDS = {"trl_sft": "trl", "lightning_module": "lightning"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder that two ranks left, which trained with all examples whose packages are there."""
    folder = tmp_path_factory.mktemp("ranks")
    names = [name for name in RANKS if importlib.util.find_spec(NEEDS.get(name, "torch"))]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    # The folder of a script is searched for modules, and this one has a `triton`.
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONSAFEPATH": "1",
    }
    command = [*torchrun, __file__, str(folder), *names]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_train_the_parameters_of_one_process(name, ranks):
    """DDP's broadcast counts as a write to the head, but changes nothing; the teacher was built
    before it."""
    pytest.importorskip(NEEDS.get(name, "torch"))
    (one, made, first), (other, also, _) = (
        torch.load(ranks / f"{name} {rank}") for rank in range(2)
    )
    assert made and all(torch.equal(also[n], p) for n, p in made.items())
    assert len(one) == len(other) == sum(RANKS[name]) and one != other
    module = example(name)
    if first is None:
        model, data = module.build(), module.samples()
    else:
        trainer = module.main(steps=1)
        model, data = trainer.model, {row["sample_id"]: row for row in trainer.train_dataset}
        model.load_state_dict(first, strict=False)
        model.zero_grad()
    reference = FullLogits(model, data, optimiser=Descent)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    check(
        reference,
        [
            a + b
            for a, b in zip(windows(one, RANKS[name]), windows(other, RANKS[name]), strict=True)
        ],
    )
    # Both add the same fp32 numbers in another order: apart by 4e-6 of the way, as measured.
    for n, p in model.named_parameters():
        if p.requires_grad:
            way = (p - before[n]).abs().max()
            assert 1e-4 < way and (made[n] - p).abs().max() < 1e-3 * way, n


def test_wrong_teacher_rows_would_show(monkeypatch):
    """The comparison above can fail: with the rows in the order of the batch, not of the samples,
    the losses differ."""
    hf = example("hf_trainer")
    with monkeypatch.context() as patch:
        patch.setattr(RowIndex, "find", lambda self, ids, rows: torch.arange(len(rows)))
        history = hf.main(steps=1).history
    with pytest.raises(AssertionError):
        check(FullLogits(hf.build(), hf.samples()), windows(history, [2]))


if __name__ == "__main__":
    train_as_a_rank(*sys.argv[1:])
