"""The fused loss: cross-entropy and dual-masked KL from hidden states and a head.

Per row, with student Q, teacher P, kept vocabulary K (Eq. 2-5 of arXiv 2405.12523):

    CE = -log Q(label)        KL = temperature^2 * sum_{v in K} P(v) * log(P(v) / Q(v))

    loss = alpha * sum(a * CE) / sum(a over rows not ignored)  +  beta * sum(k * KL) / sum(k)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor, nn

from ..kernels.inputs import Head
from ..kernels.reference import accumulation
from . import calls, triton_ops
from .backend import LossOptions, by_vendor, chosen, why_not
from .checks import (
    Default,
    check_derivatives,
    check_labels,
    check_rows,
    check_teacher,
    check_types,
    inverse,
    settled_head,
)
from .head import check_head
from .in_parts import group_of, seat_of
from .ops import Options
from .teacher import TeacherCache

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Parts(NamedTuple):
    """What the loss is made of, row by row: detached, [N], fp32."""

    ce: Tensor  # unweighted; 0 on ignored rows
    kl: Tensor  # unweighted, with temperature^2; 0 without a teacher
    entropy: Tensor  # the student's, in nats, at temperature 1


class CallOptions(LossOptions, total=False):
    """All options of `fused_dmk_ce`, for type checkers."""

    backend: str
    return_parts: bool


@overload
def fused_dmk_ce(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    teacher: TeacherCache | None = None,
    *,
    backend: str = "auto",
    return_parts: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def fused_dmk_ce(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    teacher: TeacherCache | None = None,
    *,
    backend: str = "auto",
    return_parts: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Tensor, Parts]: ...


@overload
def fused_dmk_ce(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    teacher: TeacherCache | None = None,
    *,
    backend: str = "auto",
    return_parts: bool,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, Parts]: ...


def fused_dmk_ce(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    teacher: TeacherCache | None = None,
    *,
    alpha: float | Tensor = 0.9,
    beta: float | Tensor = 0.75,
    ce_weight: Tensor | None = None,
    kl_weight: Tensor | None = None,
    ce_denominator: float | Tensor | None = None,
    kl_denominator: float | Tensor | None = None,
    head_bias: Tensor | None = None,
    logit_scale: float = Default(1.0),
    logit_softcap: float | None = None,
    temperature: float = Default(1.0),
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    return_parts: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Parts]:
    """alpha * CE + beta * dual-masked KL at N supervised positions (arXiv 2405.12523, Eq. 2-5).

    hidden          [N, D] the student's final hidden states, any float dtype
    head_weight     [V, D] the student's head, any float dtype
    labels          [N] int64: labels[n] is the token that hidden[n] predicts, so shift before you
                    call
    teacher         the frozen model at the same N positions; None = CE alone
    alpha, beta     finite numbers of at least 0
    ce_weight       [N] bool or float, None = ones; no gradient
    kl_weight       [N] bool or float, None = ones; no gradient. The token mask K_S: 0 where the KL
                    must not look
    ce_denominator  number or 0-d tensor in place of the sum of weights that "mean" divides by, for
    kl_denominator  example the sum over all micro-batches and ranks; "sum" and "none" do not read
                    them. DDP averages gradients: there multiply the loss by the number of ranks.
    head_bias       [V]; z = softcap * tanh(x / softcap), x = logit_scale * (hidden @ head_weight.T
                    + head_bias)
    temperature     divides z on both sides of the KL only. Its default is the teacher's, as for
                    logit_scale, logit_softcap and head_bias.
    ignore_index    label of rows without CE; such a row counts in the KL unless its kl_weight is 0
    reduction       "mean"; "sum" without denominators; "none", [N], alpha * a * CE + beta * k * KL
    backend         "auto" or one of those of `why_not`
    return_parts    return (loss, Parts)
    group           the ranks that share the head, each with some of its rows: head_weight [V_r, D]
                    and head_bias [V_r] are this rank's. Its default is the teacher's. Everything
                    else is the same on all ranks, which call this and backward together; labels
                    count over the whole head. Loss and the gradient by hidden are those of the
                    whole head, on each rank; gradients by head_weight and head_bias are the rank's
                    rows. Not inside torch.compile: the call breaks the graph.

    The loss is fp32, fp64 for fp64 inputs; gradients reach hidden, head_weight and head_bias in
    their own dtypes. A zero denominator gives 0 and zero gradients. A row whose weights are both 0
    may hold anything, NaN too. Raises ValueError, one sentence, for anything that cannot be
    honoured.
    """
    ranks = group_of(group, teacher)

    def checked() -> tuple[Head, float]:
        check_types(labels, teacher, ce_weight, kl_weight, alpha, beta, ignore_index)
        head, tau = settled_head(
            head_weight, teacher, head_bias, logit_scale, logit_softcap, temperature
        )
        in_parts = ranks is not None
        check_head(hidden, head_weight, head.bias, head.scale, head.softcap, tau, in_parts)
        weights = dict(ce_weight=ce_weight, kl_weight=kl_weight)
        check_rows(hidden, labels, ignore_index, weights, None if in_parts else len(head_weight))
        check_derivatives(hidden, head_weight, head.bias)
        if teacher is not None:
            check_teacher(hidden, head_weight, teacher)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {reduction!r}: choose 'mean', 'sum' or 'none'.")
        if reason := why_not(
            backend,
            hidden,
            head_weight,
            teacher,
            head_bias=head.bias,
            logit_softcap=head.softcap,
            group=ranks,
        ):
            raise ValueError(reason)
        return head, tau

    seat = None
    if ranks is None:
        head, tau = checked()
    else:
        settings = (reduction, return_parts, ignore_index)
        (head, tau), seat = seat_of(ranks, checked, hidden, head_weight, labels, teacher, settings)
        check_labels(labels, ignore_index, seat.part.V)
        backend = "tiled"
    alpha, beta = float(alpha), float(beta)

    plan = chosen(hidden, head_weight, backend, teacher, head.bias)
    vendor = plan.backend == "tiled" and seat is None and by_vendor(hidden, head, teacher)
    if plan.backend == "triton" or vendor:
        mean = reduction == "mean"
        weights = (
            triton_ops.factor(alpha, ce_denominator, "ce_denominator", mean),
            triton_ops.factor(beta, kl_denominator, "kl_denominator", mean),
        )
        rows, parts = calls.triton(
            hidden, head, labels, teacher, tau, (ce_weight, kl_weight), weights, ignore_index,
            return_parts, vendor,
        )  # fmt: skip
        loss = rows if reduction == "none" else rows.sum()
        return (loss, Parts(*(x.float() for x in parts))) if return_parts else loss
    theirs = () if teacher is None else (teacher.hidden, teacher.head_weight)
    wide = accumulation(hidden, head_weight, head.bias, *theirs)
    used = labels != ignore_index
    a, k = (
        used.new_ones(used.shape, dtype=wide) if x is None else x.detach().to(wide)
        for x in (ce_weight, kl_weight)
    )
    a = a * used
    # the factors of each row's CE and KL
    u, w = alpha * a, beta * k if teacher is not None else torch.zeros_like(k)
    if reduction == "mean":
        u = u * inverse(a.sum() if ce_denominator is None else ce_denominator, u, "ce_denominator")
        w = w * inverse(k.sum() if kl_denominator is None else kl_denominator, w, "kl_denominator")

    dead = (u == 0) & (w == 0) & ~hidden.detach().isfinite().all(1)  # 0 * NaN would be NaN
    hidden = hidden.masked_fill(dead[:, None], 0)
    if plan.backend == "reference":
        rows, parts = calls.reference(hidden, head, labels, teacher, tau, u, w, ignore_index)
    else:
        options = Options(
            renormalize=teacher is not None and teacher.renormalize,
            logit_scale=head.scale,
            logit_softcap=head.softcap,
            temperature=tau,
            ignore_index=ignore_index,
            tile=plan.tile,
            backend=plan.backend,
        )
        rows, parts = calls.tiled(hidden, head, labels, teacher, u, w, options, return_parts, seat)
    loss = rows if reduction == "none" else rows.sum()
    return (loss, Parts(*(x.detach().float() for x in parts))) if return_parts else loss


class DMKCELoss(nn.Module):
    """`fused_dmk_ce` as a module without parameters. The constructor takes what stays the same
    between steps, the call takes tensors."""

    def __init__(
        self,
        alpha: float | Tensor = 0.9,
        beta: float | Tensor = 0.75,
        *,
        logit_scale: float = Default(1.0),
        logit_softcap: float | None = None,
        temperature: float = Default(1.0),
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.options = CallOptions(
            alpha=alpha,
            beta=beta,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            temperature=temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=backend,
            return_parts=return_parts,
        )

    def forward(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        teacher: TeacherCache | None = None,
        **options: Unpack[CallOptions],
    ) -> Tensor | tuple[Tensor, Parts]:
        """The arguments of `fused_dmk_ce`; those given here win over the constructor's."""
        together: Any = {**self.options, **options}
        return fused_dmk_ce(hidden, head_weight, labels, teacher, **together)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.options.items())
