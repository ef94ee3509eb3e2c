"""Tensor parallelism: each rank holds some rows of the head, and no rank ever has them all.

Run it with `torchrun --nproc_per_node 2 tests/trainers/head_in_parts.py`,
or in one process with `python tests/trainers/head_in_parts.py`: the losses are the same.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from fastsiu import TeacherCache, fused_dmk_ce, head_of, no_logits, supervised_rows

V, D = 161, 16  # a vocabulary that two ranks cannot share evenly
NAME = [7, 40, 155]  # the name's tokens
PLAN = {
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(V, D), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.lm_head = nn.Linear(D, V)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        x = self.embed(input_ids).cumsum(1)
        return self.lm_head(self.norm(x + self.down(torch.relu(self.up(x)))))


def build(train_head=False):
    torch.manual_seed(0)
    model = Model()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("up", "down")) or (train_head and "lm_head" in name))
    if dist.is_initialized():
        ranks = dist.get_world_size()
        mesh = dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("tensor",))
        parallelize_module(model, mesh, PLAN)
    return model


def main(steps=4, train_head=False):
    model = build(train_head)
    ids = torch.randint(V, (6, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    keep = torch.ones(V, dtype=torch.bool)
    keep[NAME] = False
    with torch.no_grad(), no_logits(model) as kept:  # the untouched model, once
        model(ids)
    rows = supervised_rows(kept["hidden"], labels)
    weight, bias, group = head_of(model, frozen=True, parts=True)
    teacher = TeacherCache.from_hidden(
        rows.hidden, weight, head_bias=bias, vocab_keep=keep, group=group
    )
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    history = []
    for _ in range(steps):
        with no_logits(model) as kept:
            model(ids)
        rows = supervised_rows(kept["hidden"], labels)
        weight, bias, group = head_of(model, parts=True)
        loss = fused_dmk_ce(rows.hidden, weight, rows.labels, teacher, head_bias=bias, group=group)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        history.append(loss.item())
    return model, history


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    _, history = main()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*history, sep="\n")
    if dist.is_initialized():
        dist.destroy_process_group()
