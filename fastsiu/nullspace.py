"""Where the adapter may act: outside of what words alone do in the language model.

A LoRA factor A reads the input x of a linear layer, whose output moves by B A x. Texts without a
picture give inputs that lie, but for little, in the span of some directions U. Where A is zero on
U, what the model says in words moves by that little only, however far B and A are trained for
pictures. (Projection into the null space of what is kept: Wang et al., CVPR 2021, for continual
learning; Fang et al., AlphaEdit, ICLR 2025, for editing facts.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .model import adapter
from .model.turns import Encoded, collate
from .model.vlm import VLM

# Inputs of a layer that its directions are taken from, at most; more cost memory and tell little.
MOST_INPUTS = 4096
# Share of a layer's directions that are taken, at most: an adapter needs room to act.
MOST_TAKEN = 0.75


class NullSpace:
    """The directions that are taken out of an adapter's factors.

    directions: for each adapted layer, by its name in `vlm.model`, U [D, k] fp32 with orthonormal
                columns; layers that read the same input share one
    """

    def __init__(self, vlm: VLM, directions: dict[str, Tensor]) -> None:
        self.vlm, self.directions = vlm, directions

    @classmethod
    def of(cls, vlm: VLM, turns: Sequence[Encoded], rest: float) -> NullSpace:
        """From texts without a picture. An adapter is on; it is switched off meanwhile.

        turns: the texts, prompts with answers
        rest:  share of the inputs' squared length that may lie outside of the directions
        """
        inputs = _inputs(vlm, turns)
        known: dict[int, Tensor] = {}
        directions = {}
        for name, rows in inputs.items():
            if id(rows) not in known:
                known[id(rows)] = _main(rows, rest)
            directions[name] = known[id(rows)]
        return cls(vlm, directions)

    @torch.no_grad()
    def project(self) -> None:
        """Takes the directions out of every factor A: A <- A - (A U) U^T."""
        for name, directions in self.directions.items():
            factor = self.vlm.model.get_submodule(name).lora_A["default"].weight
            factor.sub_((factor @ directions) @ directions.T)


def _main(rows: Tensor, rest: float) -> Tensor:
    """The fewest directions [D, k] outside of which lies at most the share `rest` of the rows'
    squared length, but at most `MOST_TAKEN` of D. rows: [n, D]"""
    _, lengths, directions = torch.linalg.svd(rows.float(), full_matrices=False)
    left = 1 - lengths.square().cumsum(0) / lengths.square().sum()
    count = min(int((left > rest).sum()) + 1, int(MOST_TAKEN * rows.shape[1]))
    return directions[:count].T.contiguous()


@torch.no_grad()
def _inputs(vlm: VLM, turns: Sequence[Encoded]) -> dict[str, Tensor]:
    """Of each adapted layer the inputs that the turns' tokens give it, [n, D] with n at most
    `MOST_INPUTS`. Layers that read the same tensor get the same rows."""
    found: dict[str, list[Tensor]] = {}
    chosen: Tensor
    seen: tuple[Tensor, Tensor] | None = None  # the last input, and its rows

    def watch(name: str) -> object:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            nonlocal seen
            (x,) = given[:1]
            if seen is None or seen[0] is not x:
                seen = (x, x.reshape(-1, x.shape[-1])[chosen])
            found.setdefault(name, []).append(seen[1])

        return hook

    layers = {n: m for n, m in vlm.model.named_modules() if isinstance(m, LoraLayer)}
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    lengths = [turn.inputs["input_ids"].shape[1] for turn in turns]
    share = min(1.0, MOST_INPUTS / max(1, sum(lengths)))
    size = vlm.budget.ask_batch
    picker = torch.Generator().manual_seed(0)
    try:
        with adapter.teacher(vlm):
            for at in range(0, len(turns), size):
                batch = collate(
                    [t.inputs for t in turns[at : at + size]], vlm.tokenizer.pad_token_id
                )
                there = batch["attention_mask"].reshape(-1).bool()
                some = torch.rand(len(there), generator=picker) < share
                chosen = (there & some.to(there.device)).nonzero()[:, 0]
                seen = None
                vlm.run(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    whole: dict[tuple[int, ...], Tensor] = {}
    out = {}
    for name, parts in found.items():
        key = tuple(map(id, parts))
        if key not in whole:
            whole[key] = torch.cat(parts)
        out[name] = whole[key]
    return out
