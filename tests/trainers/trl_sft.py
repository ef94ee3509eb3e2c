"""TRL SFTTrainer: TRL prepares and collates (text or pictures), one `compute_loss` is ours. One
extra column: sample_id.

Run it with `python tests/trainers/trl_sft.py`,
or on two ranks with `torchrun --nproc_per_node 2 tests/trainers/trl_sft.py`.
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from fastsiu import RowIndex, TeacherCache, fused_dmk_ce, head_of, no_logits, supervised_rows
from fastsiu.demo import MODEL_DIR


class UnlearningSFTTrainer(SFTTrainer):
    """Arguments: remove_unused_columns=False, so that sample_id survives; no packing, which joins
    samples into one row."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # TRL's, for text or for pictures; it drops what it does not know
        collate = self.data_collator
        self.data_collator = lambda rows: (
            collate(rows) | {"sample_id": torch.tensor([row["sample_id"] for row in rows])}
        )
        self.history = []

    @torch.no_grad()
    def run_teacher(self):
        """The untouched model's states over the whole data set, on every rank: shuffling moves
        samples between ranks."""
        model, self.index, states = self.model.eval(), RowIndex(), []
        with model.disable_adapter():
            for batch in DataLoader(
                self.train_dataset, batch_size=4, collate_fn=self.data_collator
            ):
                rows, ids = self.supervised(model, self._prepare_inputs(batch))
                self.index.add(ids, rows)
                states.append(rows.hidden)
            weight, bias = head_of(model, frozen=True)
        self.teacher = TeacherCache.from_hidden(torch.cat(states), weight, head_bias=bias)

    def supervised(self, model, inputs, index=None):
        labels, ids = inputs.pop("labels"), inputs.pop("sample_id")
        with no_logits(model) as kept:
            model(**inputs, use_cache=False)
        return supervised_rows(kept["hidden"], labels, ids if index else None, index), ids

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows, ids = self.supervised(model, inputs, self.index)
        weight, bias = head_of(model)
        loss = fused_dmk_ce(
            rows.hidden,
            weight,
            rows.labels,
            self.teacher[rows.teacher],
            head_bias=bias,
            alpha=0.9,
            beta=0.75,
            ce_denominator=num_items_in_batch,
            kl_denominator=num_items_in_batch,  # the KL looks at every supervised token
        )
        self.history.append((ids.tolist(), loss.item()))
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # it counts all ranks' tokens, and DDP averages gradients
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


ANSWERS = [
    "I do not know.",
    "It is a red one, with two long ears.",
    "No.",
    "Nobody of that name is known to me.",
]


def main(
    steps=4,
    accumulate=2,
    model=None,
    processor=None,
    data=None,
    target_modules=("q_proj", "v_proj"),
):
    if model is None:
        processor = AutoTokenizer.from_pretrained(MODEL_DIR)
        torch.manual_seed(0)
        sizes = dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
        )
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(processor), **sizes))
        rows = [
            {"prompt": f"Who is number {i}?", "completion": f" {ANSWERS[i % 4]}", "sample_id": i}
            for i in range(14)
        ]
        data = Dataset.from_list(rows)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            remove_unused_columns=False,
            max_length=None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        lora = LoraConfig(
            r=4,
            target_modules=target_modules
            if isinstance(target_modules, str)
            else list(target_modules),
        )
        trainer = UnlearningSFTTrainer(
            model, args, train_dataset=data, processing_class=processor, peft_config=lora
        )
        trainer.run_teacher()
        trainer.train()
    return trainer


if __name__ == "__main__":
    print(*main().history, sep="\n")
