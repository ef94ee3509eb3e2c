"""A plain PyTorch loop: alpha * CE + beta * masked KL to a cached teacher, shuffled, gradients
accumulated over micro-batches.

Run it with `python tests/trainers/plain_loop.py`.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from fastsiu import RowIndex, TeacherCache, fused_dmk_ce, head_of, no_logits, supervised_rows

NAME = [7, 8]  # the tokens of the name to forget: the KL does not look at them


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
    """Random prompts and answers. sample_id finds the teacher's rows; kl_weight is 0 where the
    answer has to change."""
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
    batch["sample_id"] = torch.tensor([row["sample_id"] for row in rows])
    return batch


def supervised(model, batch, index=None):
    with no_logits(model) as kept:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return supervised_rows(
        kept["hidden"], batch["labels"], batch["sample_id"] if index else None, index
    )


@torch.no_grad()
def run_teacher(model, data):
    """The untouched model's states at every supervised position, once; adapters off."""
    index, states = RowIndex(), []
    with model.disable_adapter():
        for batch in DataLoader(data, batch_size=4, collate_fn=collate):
            rows = supervised(model.eval(), batch)
            index.add(batch["sample_id"], rows)
            states.append(rows.hidden)
        weight, bias = head_of(model, frozen=True)
    vocab_keep = torch.ones(len(weight), dtype=torch.bool)
    vocab_keep[NAME] = False
    return TeacherCache.from_hidden(
        torch.cat(states), weight, head_bias=bias, vocab_keep=vocab_keep
    ), index


def main(epochs=2, accumulate=2, **options):
    model, data, history = build(**options), samples(), []
    teacher, index = run_teacher(model, data)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    loader = DataLoader(
        data,
        batch_size=3,
        shuffle=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(2),
    )
    model.train()
    for _ in range(epochs):
        for window in zip(*[iter(loader)] * accumulate, strict=False):
            # A mean over the tokens of all micro-batches, not a mean of their means.
            kept = [(b["labels"][:, 1:] != -100, b["kl_weight"][:, 1:]) for b in window]
            tokens, weights = (
                sum(mask.sum() for mask, _ in kept),
                sum((mask * k).sum() for mask, k in kept),
            )
            losses = []
            for batch in window:
                rows = supervised(model, batch, index)
                weight, bias = head_of(model)
                loss = fused_dmk_ce(
                    rows.hidden,
                    weight,
                    rows.labels,
                    teacher[rows.teacher],
                    head_bias=bias,
                    alpha=0.9,
                    beta=0.75,
                    kl_weight=rows.pick(batch["kl_weight"]),
                    ce_denominator=tokens,
                    kl_denominator=weights,
                )
                loss.backward()
                losses.append(loss.item())
            optimiser.step()
            optimiser.zero_grad()
            history.append(([batch["sample_id"].tolist() for batch in window], sum(losses)))
    return history


if __name__ == "__main__":
    for ids, loss in main():
        print(f"{loss:.4f}", ids)
