"""Hugging Face Trainer: `compute_loss` overridden; token counts are those of the whole accumulation
window and of all ranks.

Run it with `python tests/trainers/hf_trainer.py`,
or on two ranks with `torchrun --nproc_per_node 2 tests/trainers/hf_trainer.py`.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fastsiu import RowIndex, TeacherCache, fused_dmk_ce, head_of, no_logits, supervised_rows


class UnlearningTrainer(Trainer):
    """Data-set columns: input_ids, labels, attention_mask, sample_id, kl_weight (0 where the KL
    must not look)."""

    loss_is_scaled_for_ga = True  # by the two denominators below

    @torch.no_grad()
    def run_teacher(self):
        """The untouched model's states over the whole data set, on every rank: shuffling moves
        samples between ranks."""
        model, self.index, states = self.model.eval(), RowIndex(), []
        with model.disable_adapter():
            for batch in DataLoader(
                self.train_dataset, batch_size=4, collate_fn=self.data_collator
            ):
                batch = self._prepare_inputs(batch)
                with no_logits(model) as kept:
                    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                rows = supervised_rows(kept["hidden"], batch["labels"])
                self.index.add(batch["sample_id"], rows)
                states.append(rows.hidden)
            weight, bias = head_of(model, frozen=True)
        self.teacher = TeacherCache.from_hidden(torch.cat(states), weight, head_bias=bias)
        self.history = []

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        supervised = [(b["labels"][:, 1:] != -100, b["kl_weight"][:, 1:]) for b in batches]
        counts = torch.tensor(
            [[mask.sum(), (mask * k).sum()] for mask, k in supervised], device=device
        ).sum(0)
        # tokens and KL weights; `items` has the tokens only
        self.counts = self.accelerator.gather(counts[None]).sum(0)
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, ids, keep = (inputs.pop(k) for k in ("labels", "sample_id", "kl_weight"))
        tokens, weights = self.counts if model.training else (None, None)  # None: the batch's own
        with no_logits(model) as kept:
            model(**inputs)
        rows = supervised_rows(kept["hidden"], labels, ids, self.index)
        weight, bias = head_of(model)
        loss = fused_dmk_ce(
            rows.hidden,
            weight,
            rows.labels,
            self.teacher[rows.teacher],
            head_bias=bias,
            alpha=0.9,
            beta=0.75,
            kl_weight=rows.pick(keep),
            ce_denominator=tokens,
            kl_denominator=weights,
        )
        self.history.append((ids.tolist(), loss.item()))
        if model.training:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over ranks
        return (loss, {}) if return_outputs else loss


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
        keep = (torch.arange(len(labels)) % 3 > 0).float()
        made.append(
            {
                "sample_id": i,
                "input_ids": torch.cat([prompt, answer]),
                "labels": labels,
                "kl_weight": keep,
            }
        )
    return made


def collate(rows):
    fill = {"input_ids": 0, "labels": -100, "kl_weight": 0.0}
    batch = {
        k: pad_sequence([row[k] for row in rows], batch_first=True, padding_value=v)
        for k, v in fill.items()
    }
    lengths = torch.tensor([len(row["labels"]) for row in rows])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch | {"sample_id": torch.tensor([row["sample_id"] for row in rows])}


def main(steps=4, accumulate=2, **options):
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            remove_unused_columns=False,
            prediction_loss_only=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = UnlearningTrainer(
            build(**options), args, data_collator=collate, train_dataset=samples()
        )
        trainer.run_teacher()
        trainer.train()
    return trainer


if __name__ == "__main__":
    print(*main().history, sep="\n")
