"""Lightning: a module whose training step is the loss; the teacher runs when fitting starts, on
each rank's own device.

Run it with `python tests/trainers/lightning_module.py`,
or on two ranks with `torchrun --nproc_per_node 2 tests/trainers/lightning_module.py`.
"""

import os

import lightning
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from fastsiu import RowIndex, TeacherCache, fused_dmk_ce, head_of, no_logits, supervised_rows


class Unlearning(lightning.LightningModule):
    """`data` is the whole training set, unsharded. A step's loss is a mean over the tokens of all
    ranks' batches: use a larger batch rather than accumulate_grad_batches, whose mean of means
    weighs the tokens of short batches more."""

    def __init__(self, model, data):
        super().__init__()
        self.model, self.data, self.history = model, data, []

    def supervised(self, batch, index=None):
        with no_logits(self.model) as kept:
            self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )
        return supervised_rows(
            kept["hidden"], batch["labels"], batch["sample_id"] if index else None, index
        )

    @torch.no_grad()
    def on_fit_start(self):
        """The untouched model's states at every supervised position, once; adapters off."""
        self.index, states = RowIndex(), []
        self.model.eval()
        with self.model.disable_adapter():
            for batch in DataLoader(self.data, batch_size=4, collate_fn=collate):
                rows = self.supervised({k: v.to(self.device) for k, v in batch.items()})
                self.index.add(batch["sample_id"], rows)
                states.append(rows.hidden)
            weight, bias = head_of(self.model, frozen=True)
        self.teacher = TeacherCache.from_hidden(torch.cat(states), weight, head_bias=bias)
        self.model.train()

    def training_step(self, batch, _):
        rows = self.supervised(batch, self.index)
        weight, bias = head_of(self.model)
        tokens = self.all_gather(torch.tensor(len(rows), device=self.device)).sum()
        loss = fused_dmk_ce(
            rows.hidden,
            weight,
            rows.labels,
            self.teacher[rows.teacher],
            head_bias=bias,
            alpha=0.9,
            beta=0.75,
            ce_denominator=tokens,
            kl_denominator=tokens,
        )
        self.history.append((batch["sample_id"].tolist(), loss.item()))
        return loss * self.trainer.world_size  # DDP averages gradients over ranks

    def configure_optimizers(self):
        return torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
        )


def build(target_modules=("q_proj", "v_proj")):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, tie_word_embeddings=False))
    return get_peft_model(model, LoraConfig(r=4, target_modules=list(target_modules)))


def samples(n=14):
    generator, made = torch.Generator().manual_seed(1), []
    for i in range(n):
        prompt, answer = (
            torch.randint(3, 160, (k,), generator=generator) for k in (2 + i % 4, 3 + i % 5)
        )
        labels = torch.cat([torch.full_like(prompt, -100), answer])
        made.append({"sample_id": i, "input_ids": torch.cat([prompt, answer]), "labels": labels})
    return made


def collate(rows):
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        k: pad_sequence([row[k] for row in rows], batch_first=True, padding_value=v)
        for k, v in fill.items()
    }
    lengths = torch.tensor([len(row["labels"]) for row in rows])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch | {"sample_id": torch.tensor([row["sample_id"] for row in rows])}


def main(epochs=1, **options):
    data = samples()
    module = Unlearning(build(**options), data)
    quiet = dict(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", devices=ranks, **quiet)
    trainer.fit(module, DataLoader(data, batch_size=3, shuffle=True, collate_fn=collate))
    return module


if __name__ == "__main__":
    print(*main().history, sep="\n")
