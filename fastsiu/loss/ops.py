"""The loss in plain torch as operators that torch knows: opaque to the compiler, with a gradient.

An operator chooses between the shared path and the general one (README.md of kernels/), and between
plain torch and C++. Triton has its own (triton_ops.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from ..kernels import cpu_sweep, general, tiled
from ..kernels.inputs import Head, Teacher, same
from ..kernels.launch import narrow
from ..kernels.parts import WHOLE, Part


class Operands(NamedTuple):
    """The tensors of both operators, in the order of their schema; the teacher's are None without a
    teacher."""

    hidden: Tensor  # [N, D]
    head_weight: Tensor  # [V, D]
    head_bias: Tensor | None  # [V]
    labels: Tensor  # [N] int64
    u: Tensor  # [N], factor on the row's CE
    w: Tensor  # [N], factor on the row's KL
    t_hidden: Tensor | None  # these as in kernels.inputs.Teacher
    t_m: Tensor | None
    t_C: Tensor | None
    t_lse: Tensor | None
    t_top: Tensor | None
    t_p: Tensor | None
    t_weight: Tensor | None
    t_bias: Tensor | None
    t_keep: Tensor | None


class Options(NamedTuple):
    """The numbers of both operators, which their schema takes by keyword."""

    renormalize: bool
    logit_scale: float
    logit_softcap: float | None
    temperature: float
    ignore_index: int
    tile: int  # vocabulary columns at a time
    backend: str  # "tiled" or "cpu"

    def head(self, given: Operands) -> Head:
        return Head(given.head_weight, given.head_bias, self.logit_scale, self.logit_softcap)

    def teacher(self, given: Operands) -> Teacher | None:
        _, _, _, _, _, _, hidden, m, C, lse, top, p, weight, bias, keep = given
        if hidden is None or weight is None:
            return None
        assert m is not None and C is not None and lse is not None
        assert top is not None and p is not None
        head = Head(weight, bias, self.logit_scale, self.logit_softcap)
        return Teacher(hidden, m, C, lse, top, p, head, keep, self.renormalize, self.temperature)


_TENSORS = (
    "Tensor hidden, Tensor head_weight, Tensor? head_bias, Tensor labels, Tensor u, Tensor w, "
    "Tensor? t_hidden, Tensor? t_m, Tensor? t_C, Tensor? t_lse, Tensor? t_top, Tensor? t_p, "
    "Tensor? t_weight, Tensor? t_bias, Tensor? t_keep"
)
_OPTIONS = (
    "bool renormalize, float logit_scale, float? logit_softcap, float temperature, "
    "SymInt ignore_index, SymInt tile, str backend"
)


NO_SECOND = "fused_dmk_ce has no second derivative: use backend='reference' for create_graph=True."


def weighed(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, 0 where the weight is 0 whatever x is."""
    return torch.where(weight == 0, 0.0, weight * x)


# Trap: torch.compile's caches on disk know an operator by its name and not by its schema. A new
# schema takes a new name.
@library.custom_op(
    "fastsiu::dmk_ce_v4",
    mutates_args=(),
    schema=f"({_TENSORS}, *, {_OPTIONS}, bool ahead, bool trains, bool entropy) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def tiled_dmk_ce(
    *tensors: Any, ahead: bool, trains: bool, entropy: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows u * CE + w * KL, CE, KL and entropy [N]; dh [N, D] if `ahead`, else [0, D]; both
    logsumexps [2, N].

    tensors, options: the fields of Operands and Options
    ahead:            compute dh here
    trains:           the head's gradients are wanted later
    entropy:          without it the entropy is 0

    With a frozen head the gradient is computed here, where the tiles are at hand, for an upstream
    gradient of 1: the upstream gradient scales it row by row. A head that trains needs the upstream
    gradient inside the sum over rows, so the backward pass computes its gradients.
    """
    given, how = Operands(*tensors), Options(**options)
    return forward(given, how, one_head(given), ahead, trains, entropy, WHOLE)


def forward(
    given: Operands,
    how: Options,
    shared: bool,
    ahead: bool,
    trains: bool,
    entropy: bool,
    part: Part,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `tiled_dmk_ce` returns. shared: student and teacher have one head; part: of the head
    that the operands hold."""
    head, teacher = how.head(given), how.teacher(given)
    hidden, u, w = given.hidden, given.u, given.w
    ignored = given.labels == how.ignore_index
    y = given.labels.masked_fill(ignored, 0)
    dh, lse = None, u.new_zeros((2, len(hidden)), dtype=torch.float64)
    with torch.autocast(hidden.device.type, enabled=False):
        if shared and not trains and (teacher is None or how.logit_softcap is None):
            tile, visit = _sweep(given, how)
            ce, kl, H, dh = tiled.shared(
                hidden, head, y, teacher, u, w, ahead, entropy, tile, visit, part
            )
        else:
            tile, with_kl = narrow(how.tile), teacher is not None and not ahead
            ce, kl, H, lse_1, lse_q = general.normalise(
                hidden, head, y, teacher, with_kl, entropy, tile, part
            )
            still = _still(hidden, teacher, shared)
            if ahead:
                moving = w if still is None else w.masked_fill(still, 0)
                kl, dh, _, _ = general.differentiate(
                    hidden,
                    head,
                    y,
                    teacher,
                    u,
                    moving,
                    lse_1,
                    lse_q,
                    True,
                    False,
                    False,
                    tile,
                    part,
                )
            if still is not None:
                kl = kl.masked_fill(still, 0)
            lse = torch.stack([lse_1, lse_q])
    ce = ce.masked_fill(ignored, 0)
    rows = weighed(u, ce.to(u.dtype)) + weighed(w, kl.to(u.dtype))
    dh = hidden.new_empty((0, hidden.shape[1]), dtype=u.dtype) if dh is None else dh.to(u.dtype)
    return rows, ce.to(u.dtype), kl.to(u.dtype), H.to(u.dtype), dh, lse


@tiled_dmk_ce.register_fake
def _(
    *tensors: Any, ahead: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = Operands(*tensors)
    u, (N, D) = given.u, given.hidden.shape
    return (
        u.new_empty(N),
        u.new_empty(N),
        u.new_empty(N),
        u.new_empty(N),
        u.new_empty((N if ahead else 0, D)),
        u.new_empty((2, N), dtype=torch.float64),
    )


@library.custom_op(
    "fastsiu::dmk_ce_backward_v4",
    mutates_args=(),
    schema=f"(Tensor lse, {_TENSORS}, *, {_OPTIONS}, bool need_h, bool need_W, bool need_b) "
    "-> (Tensor, Tensor, Tensor)",
)
def tiled_dmk_ce_backward(
    lse: Tensor, *tensors: Any, need_h: bool, need_W: bool, need_b: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dh [N, D], dW [V, D] and db [V] of sum(u * CE + w * KL); those not needed have no rows.

    lse: [2, N] fp64, both logsumexps as the forward operator returned them
    """
    given, how = Operands(*tensors), Options(**options)
    return backward(lse, given, how, one_head(given), (need_h, need_W, need_b), WHOLE)


def backward(
    lse: Tensor,
    given: Operands,
    how: Options,
    shared: bool,
    needs: tuple[bool, bool, bool],
    part: Part,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `tiled_dmk_ce_backward` returns; needs: of dh, dW and db."""
    need_h, need_W, need_b = needs
    head, teacher = how.head(given), how.teacher(given)
    hidden, w = given.hidden, given.w
    still = _still(hidden, teacher, shared)
    w = w if still is None else w.masked_fill(still, 0)
    y = given.labels.masked_fill(given.labels == how.ignore_index, 0)
    tile = narrow(how.tile)
    with torch.autocast(hidden.device.type, enabled=False):
        _, dh, dW, db = general.differentiate(
            hidden, head, y, teacher, given.u, w, lse[0], lse[1], need_h, need_W, need_b, tile,
            part, False,
        )  # fmt: skip
    return (
        _gradient(hidden, False) if dh is None else dh.to(hidden.dtype),
        _gradient(given.head_weight, False) if dW is None else dW,
        _gradient(_like_bias(given), False) if db is None else db,
    )


@tiled_dmk_ce_backward.register_fake
def _(
    lse: Tensor, *tensors: Any, need_h: bool, need_W: bool, need_b: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    given = Operands(*tensors)
    bias = _like_bias(given)
    return (
        _gradient(given.hidden, need_h),
        _gradient(given.head_weight, need_W),
        _gradient(bias, need_b),
    )


def _gradient(x: Tensor, needed: bool) -> Tensor:
    """Room for the gradient by x: contiguous whatever the strides of x, without rows if not
    needed."""
    return x.new_empty((x.shape[0] if needed else 0, *x.shape[1:]))


def _like_bias(given: Operands) -> Tensor:
    """The bias, or a tensor with the number of dimensions that its gradient would have."""
    return given.hidden[:, 0] if given.head_bias is None else given.head_bias


def one_head(given: Operands) -> bool:
    """Do student and teacher share weight and bias? True without a teacher."""
    return given.t_hidden is None or (
        same(given.head_weight, given.t_weight) and same(given.head_bias, given.t_bias)
    )


def _still(hidden: Tensor, teacher: Teacher | None, shared: bool) -> Tensor | None:
    """Rows [N] that have neither KL nor its gradient, because the state has not moved and C is 1;
    None where C may differ from 1 or the heads differ."""
    if teacher is None or not shared or not teacher.whole:
        return None
    return (hidden == teacher.hidden).all(1)


def _sweep(given: Operands, how: Options) -> tuple[int, Callable[..., None]]:
    """The tile and the sweep of the shared path."""
    if how.backend == "cpu":
        return min(how.tile, cpu_sweep.tile_of(given.hidden.shape[1])), cpu_sweep.sweep
    return how.tile, tiled.sweep


# --------------------------------------------------------------------------------------------------
# autograd


def _setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]
) -> None:
    _, _, _, _, dh, lse = output
    options = dict(keyword_only_inputs)
    ctx.ahead, ctx.trains, _ = (options.pop(k) for k in ("ahead", "trains", "entropy"))
    ctx.options = options
    ctx.save_for_backward(dh, lse, *(inputs if ctx.trains else ()))
    ctx.dtype = Operands(*inputs).hidden.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND)
    none = (None,) * (len(Operands._fields) - 3)
    if g is None:
        return None, None, None, *none
    dh, lse, *tensors = ctx.saved_tensors
    if ctx.ahead:
        return (dh * g[:, None]).to(ctx.dtype), None, None, *none
    if not ctx.trains:
        return None, None, None, *none
    given = Operands(*tensors)
    given = given._replace(u=given.u * g, w=given.w * g)
    need_h, need_W, need_b, *_ = ctx.needs_input_grad
    dh, dW, db = tiled_dmk_ce_backward(
        lse, *given, **ctx.options, need_h=need_h, need_W=need_W, need_b=need_b
    )
    return dh if need_h else None, dW if need_W else None, db if need_b else None, *none


tiled_dmk_ce.register_autograd(_backward, setup_context=_setup)
