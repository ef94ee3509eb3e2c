"""The specification: cross-entropy and dual-masked KL per row, with full logits in plain torch.

Slow and large on purpose: it forms the [N, V] logits of student and teacher, and autograd computes
the gradients. Every other backend is tested against this file. Equations 2-5 of arXiv 2405.12523;
README.md explains the letters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of statistics: fp64 if any input is fp64, else fp32."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, delivered in `dtype`; never rounded to bf16 or TF32 on the way.

    Trap: torch.set_float32_matmul_precision("high" or "medium") rounds fp32 operands, on a CPU too,
    forward and backward.
    """
    backend = torch.backends.cuda if a.is_cuda else torch.backends.mkldnn
    exact = dtype == torch.float64 or backend.matmul.fp32_precision in ("none", "ieee")
    wide = dtype if exact else torch.float64
    return Product.apply(a.to(wide), b.to(wide)).to(dtype)


class Product(torch.autograd.Function):
    """a @ b. Its backward pass leaves the caller's autocast region, which would round to 16 bit."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        with torch.autocast(g.device.type, enabled=False):
            return g @ b.T if need_a else None, a.T @ g if need_b else None


def logits(
    hidden: Tensor,  # [N, D]
    head_weight: Tensor,  # [V, D]
    head_bias: Tensor | None,  # [V]
    logit_scale: float,
    logit_softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:  # [N, V]
    """z = softcap * tanh(x / softcap), x = scale * (hidden @ head_weight.T + bias)"""
    x = product(hidden, head_weight.T, dtype)
    if head_bias is not None:
        x = x + head_bias.to(dtype)
    x = logit_scale * x
    return x if logit_softcap is None else logit_softcap * torch.tanh(x / logit_softcap)


def dmk_ce(
    hidden: Tensor,  # [N, D]
    head_weight: Tensor,  # [V, D]
    labels: Tensor,  # [N] int64
    head_bias: Tensor | None = None,  # [V]
    teacher_hidden: Tensor | None = None,  # [N, Dt]; None = no KL
    teacher_weight: Tensor | None = None,  # [V, Dt]
    teacher_bias: Tensor | None = None,  # [V]
    vocab_keep: Tensor | None = None,  # [V] bool
    renormalize: bool = False,
    same_head: bool = False,  # teacher and student share one head and transform
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """CE, KL and the student's entropy of each row: three [N] tensors, fp32 or fp64. CE and KL
    carry a graph."""
    dtype = accumulation(hidden, head_weight, head_bias, teacher_hidden, teacher_weight)
    z = logits(hidden, head_weight, head_bias, logit_scale, logit_softcap, dtype)
    ce = F.cross_entropy(z, labels, ignore_index=ignore_index, reduction="none")
    entropy = torch.special.entr(z.detach().softmax(-1)).sum(-1)
    if teacher_hidden is None or teacher_weight is None:
        return ce, torch.zeros_like(ce), entropy

    with torch.no_grad():
        t = logits(teacher_hidden, teacher_weight, teacher_bias, logit_scale, logit_softcap, dtype)
    keep = slice(None) if vocab_keep is None else vocab_keep
    if renormalize:  # over the kept vocabulary: a true KL
        log_p = (t[:, keep] / temperature).log_softmax(-1)
        log_q = (z[:, keep] / temperature).log_softmax(-1)
    else:
        # Eq. 4: a partial sum of probabilities normalised over the full vocabulary, which can be
        # negative
        log_p = (t / temperature).log_softmax(-1)[:, keep]
        log_q = (z / temperature).log_softmax(-1)[:, keep]
    gap = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
    kl = temperature**2 * (log_p.exp() * gap).sum(-1)
    if same_head and (renormalize or vocab_keep is None):
        # Where C = 1, a row that has not moved has exactly no KL and no gradient. No order of
        # summation gives that for free.
        kl = kl.masked_fill((hidden == teacher_hidden).all(-1), 0.0)
    return ce, kl, entropy
