"""The fused loss: cross-entropy and dual-masked KL from hidden states and a head.

Per row, with student Q, teacher P, kept vocabulary K (Eq. 2-5 of arXiv 2405.12523):

    CE = -log Q(label)        KL = temperature^2 * sum_{v in K} P(v) * log(P(v) / Q(v))

    loss = alpha * sum(a * CE) / sum(a over rows not ignored)  +  beta * sum(k * KL) / sum(k)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernels import reference
from .teacher import TeacherCache, check_head

BACKENDS = ("auto", "reference", "tiled", "triton", "cpu")


class Parts(NamedTuple):
    """What the loss is made of, row by row: detached, [N], fp32."""

    ce: Tensor  # unweighted; 0 on ignored rows
    kl: Tensor  # unweighted, with temperature^2; 0 without a teacher
    entropy: Tensor  # the student's, in nats, at temperature 1


class _Default(float):
    """A float that was not passed: then the teacher's value counts, where there is a teacher."""


def fused_dmk_ce(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    teacher: TeacherCache | None = None,
    *,
    alpha: float = 0.9,
    beta: float = 0.75,
    ce_weight: Tensor | None = None,
    kl_weight: Tensor | None = None,
    ce_denominator: float | Tensor | None = None,
    kl_denominator: float | Tensor | None = None,
    head_bias: Tensor | None = None,
    logit_scale: float = _Default(1.0),  # noqa: B008
    logit_softcap: float | None = None,
    temperature: float = _Default(1.0),  # noqa: B008
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, Parts]:
    """alpha * CE + beta * dual-masked KL at N supervised positions (arXiv 2405.12523, Eq. 2-5).

    hidden         [N, D] the student's final hidden states, any float dtype
    head_weight    [V, D] the student's head, any float dtype
    labels         [N] int64: labels[n] is the token that hidden[n] predicts, so shift before you call
    teacher        the frozen model at the same N positions; None = CE alone
    ce_weight      [N] bool or float, None = ones; no gradient
    kl_weight      [N] bool or float, None = ones: the token mask K_S, 0 where the KL must not look; no gradient
    ce_denominator, kl_denominator
                   number or 0-d tensor in place of the sums of the weights: the sum over all micro-batches or ranks
    head_bias      [V]; z = softcap * tanh(x / softcap), x = logit_scale * (hidden @ head_weight.T + head_bias)
    logit_scale, logit_softcap, head_bias, temperature
                   the teacher's by default; temperature divides z on both sides of the KL only
    ignore_index   label of rows without CE; their KL counts unless their kl_weight is 0
    reduction      "mean"; "sum" without denominators; "none", [N], alpha * a * CE + beta * k * KL
    backend        "auto" or one of those of `why_not`
    return_parts   return (loss, Parts)

    The loss is fp32, fp64 for fp64 inputs; gradients reach hidden, head_weight and head_bias in their own dtypes. A zero
    denominator gives 0 and zero gradients. Raises ValueError, one sentence, for anything that cannot be honoured.
    """
    given = dict(head_bias=head_bias, logit_scale=logit_scale, logit_softcap=logit_softcap, temperature=temperature)
    head_bias, logit_scale, logit_softcap, temperature = _head_options(head_weight, teacher, **given)
    check_head(hidden, head_weight, head_bias, logit_scale, logit_softcap, temperature)
    _check_rows(hidden, head_weight, labels, teacher, ignore_index, dict(ce_weight=ce_weight, kl_weight=kl_weight))
    for name, x in (("alpha", alpha), ("beta", beta)):
        if not 0 <= x < float("inf"):
            raise ValueError(f"{name} is {x}: it must be a finite number of at least 0.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}: choose 'mean', 'sum' or 'none'.")
    if reason := why_not(backend, hidden, head_weight, teacher, **given):
        raise ValueError(reason)

    with torch.autocast(hidden.device.type, enabled=False):  # autocast would deliver bf16 logits
        ce, kl, entropy = reference.dmk_ce(
            hidden,
            head_weight,
            labels,
            head_bias,
            *((None,) * 4 if teacher is None else (teacher.hidden, teacher.head_weight, teacher.head_bias, teacher.vocab_keep)),
            renormalize=teacher is not None and teacher.renormalize,
            same_head=teacher is not None and _same(head_weight, teacher.head_weight) and _same(head_bias, teacher.head_bias),
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            temperature=temperature,
            ignore_index=ignore_index,
        )

    dtype = ce.dtype
    ones = torch.ones_like(ce)
    a = ones if ce_weight is None else ce_weight.detach().to(dtype)
    k = ones if kl_weight is None else kl_weight.detach().to(dtype)
    a = a * (labels != ignore_index)
    ce_rows, kl_rows = alpha * a * ce, beta * k * kl
    if reduction == "none":
        loss = ce_rows + kl_rows
    elif reduction == "sum":
        loss = ce_rows.sum() + kl_rows.sum()
    else:
        loss = _divide(ce_rows.sum(), a.sum() if ce_denominator is None else ce_denominator, "ce_denominator")
        loss = loss + _divide(kl_rows.sum(), k.sum() if kl_denominator is None else kl_denominator, "kl_denominator")
    return (loss, Parts(*(x.detach().float() for x in (ce, kl, entropy)))) if return_parts else loss


def why_not(backend: str, hidden: Tensor, head_weight: Tensor, teacher: TeacherCache | None = None, **options: Any) -> str | None:
    """Why `backend` cannot compute this loss, as one sentence; None if it can. Options are those of fused_dmk_ce.

    backend: "auto" or "reference" (plain torch, full logits, any device and dtype)
    """
    if backend in ("auto", "reference"):
        return None
    if backend in BACKENDS:
        return f"The backend {backend!r} is not in this version: choose 'auto' or 'reference'."
    return f"The backend {backend!r} is unknown: choose one of {', '.join(map(repr, BACKENDS))}."


class DMKCELoss(nn.Module):
    """`fused_dmk_ce` as a module: what stays the same between steps is given here, tensors at the call. No parameters."""

    def __init__(
        self,
        alpha: float = 0.9,
        beta: float = 0.75,
        *,
        logit_scale: float = _Default(1.0),  # noqa: B008
        logit_softcap: float | None = None,
        temperature: float = _Default(1.0),  # noqa: B008
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.options = dict(alpha=alpha, beta=beta, logit_scale=logit_scale, logit_softcap=logit_softcap, temperature=temperature)
        self.options |= dict(ignore_index=ignore_index, reduction=reduction, backend=backend, return_parts=return_parts)

    def forward(
        self, hidden: Tensor, head_weight: Tensor, labels: Tensor, teacher: TeacherCache | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, Parts]:
        """The arguments of `fused_dmk_ce`; those given here win over the constructor's."""
        return fused_dmk_ce(hidden, head_weight, labels, teacher, **(self.options | options))

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.options.items())


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """One and the same memory, seen without reading it."""
    if a is None or b is None:
        return a is b
    memory = lambda x: (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device)
    return a is b or memory(a) == memory(b)


def _head_options(
    head_weight: Tensor,
    teacher: TeacherCache | None,
    head_bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    temperature: float,
) -> tuple[Tensor | None, float, float | None, float]:
    """The head's options with the teacher's in place of those not given. Raises ValueError where the two disagree."""
    if teacher is None:
        return head_bias, float(logit_scale), logit_softcap, float(temperature)
    for name, x in (("logit_scale", logit_scale), ("logit_softcap", logit_softcap), ("temperature", temperature)):
        theirs = getattr(teacher, name)
        if not isinstance(x, _Default) and not (x is None and name == "logit_softcap") and x != theirs:
            raise ValueError(f"{name} is {x} but the teacher's is {theirs}: build the teacher's cache with the same.")
    bias = teacher.head_bias if head_bias is None else head_bias
    if (bias is None) != (teacher.head_bias is None):
        raise ValueError("head_bias is given but the teacher has none: build the teacher's cache with its head's bias.")
    # A bias that trains, or belongs to another head, may differ from the teacher's; that of one frozen head may not.
    frozen = bias is not None and not bias.requires_grad and _same(head_weight, teacher.head_weight)
    if frozen and not _same(bias, teacher.head_bias) and not torch.equal(bias, teacher.head_bias):
        raise ValueError("head_bias differs from the teacher's under the same head: build the teacher's cache with this bias.")
    return bias, teacher.logit_scale, teacher.logit_softcap, teacher.temperature


def _check_rows(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    teacher: TeacherCache | None,
    ignore_index: int,
    weights: dict[str, Tensor | None],
) -> None:
    N, V = hidden.shape[0], head_weight.shape[0]
    if labels.shape != (N,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{N}], one per row of hidden, but are {labels.dtype} {list(labels.shape)}.")
    for name, x in (("labels", labels), *weights.items()):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device} but hidden on {hidden.device}: move one of them.")
    if not labels.is_cuda:  # reading labels on a GPU would stall it; there an index out of range asserts in the kernel
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= V))]
        if len(wrong):
            raise ValueError(f"labels hold {int(wrong[0])}, which is neither in 0..{V - 1} nor ignore_index={ignore_index}.")
    for name, x in weights.items():
        if x is not None and (x.shape != (N,) or x.is_complex()):
            raise ValueError(f"{name} must be bool or float [{N}], one per row of hidden, but is {x.dtype} {list(x.shape)}.")
    if teacher is None:
        return
    if len(teacher) != N:
        raise ValueError(f"The teacher has {len(teacher)} rows but hidden has {N}: index the cache with the same rows.")
    if teacher.head_weight.shape[0] != V:
        raise ValueError(f"The teacher's head has V={teacher.head_weight.shape[0]} but head_weight has V={V}: pad or resize one.")
    if teacher.hidden.device != hidden.device or teacher.head_weight.device != hidden.device:
        raise ValueError(f"The teacher is on {teacher.hidden.device} but hidden on {hidden.device}: use teacher.to(device).")


def _divide(total: Tensor, denominator: float | Tensor, name: str) -> Tensor:
    """total / denominator, or 0 with zero gradients where the denominator is 0; decided on the device, without a sync."""
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"{name} must be one number, but has shape {list(denominator.shape)}.")
        d = denominator.detach().reshape(()).to(total.device, total.dtype)
    else:
        if not 0 <= denominator < float("inf"):
            raise ValueError(f"{name} is {denominator}: it must be a finite number of at least 0.")
        d = total.new_tensor(float(denominator))
    return total / torch.where(d == 0, 1.0, d) * (d != 0)
