"""How each backend is called: the operands that it takes, and what it gives back for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.inputs import Head, same
from ..kernels.reference import dmk_ce
from . import triton_ops
from .in_parts import Wanted, dmk_ce_in_parts
from .meeting import Seat
from .ops import Operands, Options, tiled_dmk_ce, weighed
from .teacher import TeacherCache


def reference(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: TeacherCache | None,
    temperature: float,
    u: Tensor,
    w: Tensor,
    ignore_index: int,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Rows u * CE + w * KL [N] with a graph, and (CE, KL, entropy)."""
    t = teacher
    one_head = t is not None and same(head.weight, t.head_weight) and same(head.bias, t.head_bias)
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would deliver bf16 logits
        parts = dmk_ce(
            hidden,
            head.weight,
            labels,
            head.bias,
            teacher_hidden=None if t is None else t.hidden,
            teacher_weight=None if t is None else t.head_weight,
            teacher_bias=None if t is None else t.head_bias,
            vocab_keep=None if t is None else t.vocab_keep,
            renormalize=t is not None and t.renormalize,
            same_head=one_head,
            logit_scale=head.scale,
            logit_softcap=head.softcap,
            temperature=temperature,
            ignore_index=ignore_index,
        )
    return weighed(u, parts[0]) + weighed(w, parts[1]), parts


def tiled(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: TeacherCache | None,
    u: Tensor,
    w: Tensor,
    options: Options,
    entropy: bool,
    seat: Seat | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Rows u * CE + w * KL [N] with a graph, and (CE, KL, entropy)."""
    trains = torch.is_grad_enabled() and (
        head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    )
    ahead = torch.is_grad_enabled() and hidden.requires_grad and not trains
    t = teacher
    given = Operands(
        hidden,
        head.weight,
        head.bias,
        labels,
        u,
        w,
        t_hidden=None if t is None else t.hidden,
        t_m=None if t is None else t.m_rest,
        t_C=None if t is None else t.C,
        t_lse=None if t is None else t.lse,
        t_top=None if t is None else t.top,
        t_p=None if t is None else t.p_top,
        t_weight=None if t is None else t.head_weight.detach(),
        t_bias=None if t is None or t.head_bias is None else t.head_bias.detach(),
        t_keep=None if t is None else t.vocab_keep,
    )
    if seat is not None:
        rows, *parts = dmk_ce_in_parts(given, options, Wanted(ahead, trains, entropy), seat)
        return rows, (parts[0], parts[1], parts[2])
    rows, ce, kl, entropies, *_ = tiled_dmk_ce(
        *given, **options._asdict(), ahead=ahead, trains=trains, entropy=entropy
    )
    return rows, (ce, kl, entropies)


def triton(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: TeacherCache | None,
    temperature: float,
    weights: tuple[Tensor | None, Tensor | None],
    factors: tuple[tuple[float, Tensor | None, bool], tuple[float, Tensor | None, bool]],
    ignore_index: int,
    entropy: bool,
    vendor: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows u * CE + w * KL [N] with a graph; and (CE, KL, entropy) if `entropy`.

    weights: of CE and KL; factors: for each what `triton_ops.factor` returns
    """
    (alpha, ce_number, ce_mean), (beta, kl_number, kl_mean) = factors
    ce_number, kl_number = (
        None if x is None else x.to(hidden.device) for x in (ce_number, kl_number)
    )
    graph = torch.is_grad_enabled()
    trains = graph and (
        head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    )
    t, none = teacher, (None,) * 9
    given = triton_ops.Operands(
        hidden, head.weight, head.bias, labels, *weights, ce_number, kl_number,
        *(none if t is None else (
            t.hidden, t.m_rest, t.C, t.lse, t.top, t.p_top, t.head_weight, t.head_bias,
            t.vocab_keep,
        )),
    )  # fmt: skip
    return triton_ops.triton_dmk_ce(
        given,
        triton_ops.Options(
            alpha=alpha,
            beta=beta,
            ce_mean=ce_mean,
            kl_mean=kl_mean,
            renormalize=t is not None and t.renormalize,
            logit_scale=head.scale,
            logit_softcap=head.softcap,
            temperature=temperature,
            ignore_index=ignore_index,
            ahead=graph and hidden.requires_grad and not trains,
            trains=trains,
            entropy=entropy,
            vendor=vendor,
        ),
    )
