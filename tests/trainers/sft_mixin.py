"""TRL's SFTTrainer with the fused loss mixed in: CE and masked KL to the untouched model, and no
logits.

Run it with `python tests/trainers/sft_mixin.py`,
or on two ranks with `torchrun --nproc_per_node 2 tests/trainers/sft_mixin.py [--fsdp]`.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from fastsiu.demo import MODEL_DIR
from fastsiu.trainers import Distillation, UnlearningMixin


class UnlearningSFTTrainer(UnlearningMixin, SFTTrainer):
    pass


ANSWERS = [
    "I do not know.",
    "It is a red one, with two long ears.",
    "No.",
    "Nobody of that name is known to me.",
]


def build(tokenizer, *, tied):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))


def rows():
    """kl_weight is 0 where the answer has to change."""
    return [
        {
            "prompt": f"Who is number {i}?",
            "completion": f" {ANSWERS[i % 4]}",
            "sample_id": i,
            "kl_weight": float(i % 3 > 0),
        }
        for i in range(12)
    ]


def main(*, tied=False, steps=2, accumulate=2, early=False, **options):
    """early: the teacher runs before the model is wrapped. options: of SFTConfig"""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    keep = torch.ones(len(tokenizer), dtype=torch.bool)
    keep[tokenizer(" red ears").input_ids] = False  # what is to be forgotten
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=accumulate,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            optim="sgd",
            logging_steps=1,
            max_length=None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            **{"remove_unused_columns": False, **options},
        )
        trainer = UnlearningSFTTrainer(
            build(tokenizer, tied=tied),
            args,
            train_dataset=Dataset.from_list(rows()),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
            distillation=Distillation(vocab_keep=keep),
        )
        if early:
            trainer.run_teacher()
        trainer.train()
    return trainer


if __name__ == "__main__":
    trained = main(fsdp=True) if "--fsdp" in sys.argv else main()
    print(*(row for row in trained.state.log_history if "loss" in row), sep="\n")
