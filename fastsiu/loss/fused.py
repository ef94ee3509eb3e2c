"""The fused loss: cross-entropy and dual-masked KL from hidden states and a head.

Per row, with student Q, teacher P, kept vocabulary K (Eq. 2-5 of arXiv 2405.12523):

    CE = -log Q(label)        KL = temperature^2 * sum_{v in K} P(v) * log(P(v) / Q(v))

    loss = alpha * sum(a * CE) / sum(a over rows not ignored)  +  beta * sum(k * KL) / sum(k)
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import reference, triton_launch
from ..kernels.launch import Launch, launch
from ..kernels.reference import accumulation
from .ops import same, tiled_dmk_ce, weighed
from .teacher import LARGEST, TeacherCache, check_head

BACKENDS = ("auto", "reference", "tiled", "triton", "cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    labels         [N] int64: labels[n] is the token that hidden[n] predicts, so shift before you
    call
    teacher        the frozen model at the same N positions; None = CE alone
    ce_weight      [N] bool or float, None = ones; no gradient
    kl_weight      [N] bool or float, None = ones: the token mask K_S, 0 where the KL must not look;
    no gradient ce_denominator, kl_denominator
                   number or 0-d tensor in place of the sums of the weights that "mean" divides by,
                   say the sum over all micro-batches and ranks ("sum" and "none" divide by nothing
                   and leave these unread). Under DDP, which averages gradients, multiply the loss
                   by the number of ranks.
    head_bias      [V]; z = softcap * tanh(x / softcap), x = logit_scale * (hidden @ head_weight.T +
    head_bias) logit_scale, logit_softcap, head_bias, temperature
                   the teacher's by default; temperature divides z on both sides of the KL only
    ignore_index   label of rows without CE; their KL counts unless their kl_weight is 0
    reduction      "mean"; "sum" without denominators; "none", [N], alpha * a * CE + beta * k * KL
    backend        "auto" or one of those of `why_not`
    return_parts   return (loss, Parts)

    The loss is fp32, fp64 for fp64 inputs; gradients reach hidden, head_weight and head_bias in
    their own dtypes. A zero denominator gives 0 and zero gradients. A row whose weights are both 0
    may hold anything, NaN too. Raises ValueError, one sentence, for anything that cannot be
    honoured.
    """
    _check_types(labels, teacher, ce_weight, kl_weight, alpha, beta)
    given = dict(
        head_bias=head_bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
    )
    head_bias, logit_scale, logit_softcap, temperature = _head_options(
        head_weight, teacher, **given
    )
    check_head(hidden, head_weight, head_bias, logit_scale, logit_softcap, temperature)
    _check_rows(
        hidden,
        head_weight,
        labels,
        teacher,
        ignore_index,
        dict(ce_weight=ce_weight, kl_weight=kl_weight),
    )
    alpha, beta = float(alpha), float(beta)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}: choose 'mean', 'sum' or 'none'.")
    if reason := why_not(backend, hidden, head_weight, teacher, **given):
        raise ValueError(reason)

    plan = chosen(hidden, head_weight, backend, teacher)
    wide = accumulation(
        hidden,
        head_weight,
        head_bias,
        *(() if teacher is None else (teacher.hidden, teacher.head_weight)),
    )
    used = labels != ignore_index
    a, k = (
        used.new_ones(used.shape, dtype=wide) if x is None else x.detach().to(wide)
        for x in (ce_weight, kl_weight)
    )
    a = a * used
    # the factors of each row's CE and KL
    u, w = (
        alpha * a,
        beta * k if teacher is not None else torch.zeros_like(k),
    )
    if reduction == "mean":
        u = u * _inverse(a.sum() if ce_denominator is None else ce_denominator, u, "ce_denominator")
        w = w * _inverse(k.sum() if kl_denominator is None else kl_denominator, w, "kl_denominator")

    options = dict(
        head_bias=head_bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
    )
    dead = (u == 0) & (w == 0) & ~hidden.detach().isfinite().all(1)  # 0 * NaN would be NaN
    hidden = hidden.masked_fill(dead[:, None], 0)
    if plan.backend == "reference":
        rows, parts = _reference(hidden, head_weight, labels, teacher, u, w, ignore_index, options)
    else:
        rows, parts = _tiled(
            hidden, head_weight, labels, teacher, u, w, ignore_index, options, plan, return_parts
        )
    loss = rows if reduction == "none" else rows.sum()
    return (loss, Parts(*(x.detach().float() for x in parts))) if return_parts else loss


def chosen(
    hidden: Tensor, head_weight: Tensor, backend: str = "auto", teacher: TeacherCache | None = None
) -> Launch:
    """What fused_dmk_ce runs on these tensors: backend, vocabulary tile and the reason for the
    choice."""
    # operands of two dtypes are multiplied as fp32, which is not what the Triton kernels are for
    target = None
    alike = {hidden.dtype, head_weight.dtype} | (
        set() if teacher is None else {teacher.hidden.dtype, teacher.head_weight.dtype}
    )
    if hidden.device.type == "cuda" and len(alike) == 1 and len(hidden):
        target = _target(hidden.device, hidden.dtype)
    plan = launch(len(hidden), *head_weight.shape, head_weight.dtype, hidden.device.type, target)
    if backend == "auto" and plan.backend == "reference" and torch.compiler.is_compiling():
        return plan._replace(
            backend="tiled", why="one operation to the compiler, where the reference is many"
        )
    return plan if backend == "auto" else plan._replace(backend=backend, why="asked for")


@torch.compiler.assume_constant_result
def _target(device: torch.device, dtype: torch.dtype) -> str | None:
    """Which GPU this is to the Triton kernels; None if they cannot run there."""
    return triton_launch.target_of(device) if triton_launch.why_not(device, dtype) is None else None


@torch.compiler.assume_constant_result
def _triton_why_not(device: torch.device, *dtypes: torch.dtype) -> str | None:
    return triton_launch.why_not(device, *dtypes)


def why_not(
    backend: str,
    hidden: Tensor,
    head_weight: Tensor,
    teacher: TeacherCache | None = None,
    **options: Any,
) -> str | None:
    """Why `backend` cannot compute this loss, as one sentence; None if it can. Options are those of
    fused_dmk_ce.

    "reference" is plain torch with full logits; "tiled" goes through the vocabulary in tiles and
    holds no [N, V] tensor; both run in fp16, bf16, fp32 and fp64, on any device that has fp64.
    "triton" forms the tiles in its own kernels, on a GPU; "auto" takes it for 16 bit, see `chosen`.
    Every backend takes every option and teacher, so these change nothing today.
    """
    if backend not in BACKENDS:
        return (
            f"The backend {backend!r} is unknown: choose one of {', '.join(map(repr, BACKENDS))}."
        )
    if backend == "cpu":
        return (
            f"The backend {backend!r} is not in this version: choose 'auto', 'tiled' or "
            "'reference'."
        )
    if backend == "tiled" and hidden.device.type == "mps":
        return (
            "The backend 'tiled' keeps a few fp64 numbers per row, which mps has not: move "
            "the tensors to the CPU."
        )
    for name, x in (("hidden", hidden), ("head_weight", head_weight)):
        if x.dtype not in DTYPES:
            return (
                f"The backend {backend!r} does not take {name} in {x.dtype}: convert it to a "
                "16, 32 or 64 bit float."
            )
    return (
        _triton_why_not(hidden.device, hidden.dtype, head_weight.dtype)
        if backend == "triton"
        else None
    )


class DMKCELoss(nn.Module):
    """`fused_dmk_ce` as a module: what stays the same between steps is given here, tensors at the
    call. No parameters."""

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
        self.options = dict(
            alpha=alpha,
            beta=beta,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            temperature=temperature,
        )
        self.options |= dict(
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
        **options: Any,
    ) -> Tensor | tuple[Tensor, Parts]:
        """The arguments of `fused_dmk_ce`; those given here win over the constructor's."""
        return fused_dmk_ce(hidden, head_weight, labels, teacher, **(self.options | options))

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.options.items())


def _check_types(
    labels: Any, teacher: Any, ce_weight: Any, kl_weight: Any, alpha: Any, beta: Any
) -> None:
    for name, x in (("labels", labels), ("ce_weight", ce_weight), ("kl_weight", kl_weight)):
        if not isinstance(x, Tensor) and (x is not None or name == "labels"):
            raise ValueError(f"{name} must be a tensor, but is a {type(x).__name__}.")
    if not isinstance(teacher, TeacherCache | None):
        raise ValueError(
            f"teacher must be a TeacherCache, but is a {type(teacher).__name__}: see "
            "TeacherCache.from_hidden."
        )
    for name, x in (("alpha", alpha), ("beta", beta)):
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{name} requires grad, but the loss has no gradient by it: weigh ce and kl with "
                "'none' yourself."
            )
        if isinstance(x, Tensor) and x.numel() != 1:
            raise ValueError(f"{name} must be one number, but has shape {list(x.shape)}.")
        if not isinstance(x, Tensor | Real) or not 0 <= x <= LARGEST:
            raise ValueError(f"{name} is {x}: it must be a finite number of at least 0.")


def _head_options(
    head_weight: Tensor,
    teacher: TeacherCache | None,
    head_bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    temperature: float,
) -> tuple[Tensor | None, float, float | None, float]:
    """The head's options with the teacher's in place of those not given. Raises ValueError where
    the two disagree."""
    if teacher is None:
        return head_bias, float(logit_scale), logit_softcap, float(temperature)
    for name, x in (
        ("logit_scale", logit_scale),
        ("logit_softcap", logit_softcap),
        ("temperature", temperature),
    ):
        theirs = getattr(teacher, name)
        if (
            not isinstance(x, _Default)
            and not (x is None and name == "logit_softcap")
            and x != theirs
        ):
            raise ValueError(
                f"{name} is {x} but the teacher's is {theirs}: build the teacher's cache with "
                "the same."
            )
    bias = teacher.head_bias if head_bias is None else head_bias
    if (bias is None) != (teacher.head_bias is None):
        raise ValueError(
            "head_bias is given but the teacher has none: build the teacher's cache with its "
            "head's bias."
        )
    # A bias that trains, or belongs to another head, may differ from the teacher's; that of one
    # frozen head may not.
    frozen = bias is not None and not bias.requires_grad and not torch.compiler.is_compiling()
    if frozen and same(head_weight, teacher.head_weight) and not same(bias, teacher.head_bias):
        if bias.device != teacher.head_bias.device or not torch.equal(bias, teacher.head_bias):
            raise ValueError(
                "head_bias differs from the teacher's under the same head: build the cache with "
                "this bias."
            )
        bias = teacher.head_bias  # equal, as after loading: then the fast path sees one head
    if bias is not None and bias is not head_bias:
        bias = bias.detach()  # the teacher's may be the model's own, which trains
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
        raise ValueError(
            f"labels must be int64 [{N}], one per row of hidden, but are {labels.dtype} "
            f"{list(labels.shape)}."
        )
    for name, x in (("labels", labels), *weights.items()):
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{name} is on {x.device} but hidden on {hidden.device}: move one of them."
            )
    # Reading labels on a GPU would stall it, and fake ones have none: there an index out of range
    # asserts in the kernel.
    if labels.device.type == "cpu" and type(labels) is Tensor and not torch.compiler.is_compiling():
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= V))]
        if len(wrong):
            raise ValueError(
                f"labels hold {int(wrong[0])}, which is neither in 0..{V - 1} nor "
                f"ignore_index={ignore_index}."
            )
    for name, x in weights.items():
        if x is not None and (x.shape != (N,) or x.is_complex()):
            raise ValueError(
                f"{name} must be bool or float [{N}], one per row of hidden, but is {x.dtype} "
                f"{list(x.shape)}."
            )
    if teacher is None:
        return
    if len(teacher) != N:
        raise ValueError(
            f"The teacher has {len(teacher)} rows but hidden has {N}: index the cache with the "
            "same rows."
        )
    if teacher.head_weight.shape[0] != V:
        raise ValueError(
            f"The teacher's head has V={teacher.head_weight.shape[0]} but head_weight has V={V}: "
            "pad or resize one."
        )
    if teacher.hidden.device != hidden.device or teacher.head_weight.device != hidden.device:
        where = f"The teacher is on {teacher.hidden.device} but hidden on {hidden.device}"
        raise ValueError(f"{where}: use teacher.to(device, head_weight).")
    # Fake tensors (those of a tracer, say) have no numbers to compare.
    real = type(hidden) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    if real and teacher.head_stamp.differs(teacher.head_weight, teacher.head_bias):
        raise ValueError(
            "The teacher's head has changed since its cache was built: build it with a frozen "
            "copy of the head."
        )


def _inverse(denominator: float | Tensor, like: Tensor, name: str) -> Tensor:
    """1 / denominator, or 0 where the denominator is 0; decided on the device, without a sync."""
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"{name} must be one number, but has shape {list(denominator.shape)}.")
        if (
            type(denominator) is Tensor
            and denominator.device.type == "cpu"
            and not torch.compiler.is_compiling()
        ):
            _inverse(float(denominator), like, name)
        d = denominator.detach().reshape(()).to(like.device, like.dtype)
    else:
        if not isinstance(denominator, Real) or not 0 <= denominator <= LARGEST:
            raise ValueError(f"{name} is {denominator}: it must be a finite number of at least 0.")
        d = like.new_tensor(float(denominator))
    return torch.where(d == 0, 0.0, 1.0 / torch.where(d == 0, 1.0, d))


# --------------------------------------------------------------------------------------------------
# backends


def _reference(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    teacher: TeacherCache | None,
    u: Tensor,
    w: Tensor,
    ignore_index: int,
    options: dict[str, Any],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Rows u * CE + w * KL [N] with a graph, and (CE, KL, entropy)."""
    theirs = (
        {}
        if teacher is None
        else dict(
            teacher_hidden=teacher.hidden,
            teacher_weight=teacher.head_weight,
            teacher_bias=teacher.head_bias,
            vocab_keep=teacher.vocab_keep,
            renormalize=teacher.renormalize,
            same_head=same(head_weight, teacher.head_weight)
            and same(options["head_bias"], teacher.head_bias),
        )
    )
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would deliver bf16 logits
        parts = reference.dmk_ce(
            hidden, head_weight, labels, ignore_index=ignore_index, **options, **theirs
        )
    return weighed(u, parts[0]) + weighed(w, parts[1]), parts


def _tiled(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    teacher: TeacherCache | None,
    u: Tensor,
    w: Tensor,
    ignore_index: int,
    options: dict[str, Any],
    plan: Launch,
    entropy: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Rows u * CE + w * KL [N] with a graph, and (CE, KL, entropy)."""
    bias = options["head_bias"]
    trains = torch.is_grad_enabled() and (
        head_weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    ahead = torch.is_grad_enabled() and hidden.requires_grad and not trains
    t = teacher
    theirs = (
        (None,) * 9
        if t is None
        else (
            t.hidden,
            t.m_rest,
            t.C,
            t.lse,
            t.top,
            t.p_top,
            t.head_weight.detach(),
            None if t.head_bias is None else t.head_bias.detach(),
            t.vocab_keep,
        )
    )
    rows, ce, kl, entropies, *_ = tiled_dmk_ce(
        hidden,
        head_weight,
        bias,
        labels,
        u,
        w,
        *theirs,
        t is not None and t.renormalize,
        options["logit_scale"],
        options["logit_softcap"],
        options["temperature"],
        ignore_index,
        plan.tile,
        plan.backend == "triton",
        ahead,
        trains,
        entropy,
    )
    return rows, (ce, kl, entropies)
