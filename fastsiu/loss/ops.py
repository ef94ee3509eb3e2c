"""The loss as operators that torch knows: opaque to the compiler, with a gradient, whatever backend
is behind them.

Here the two ways through (README.md of kernels/) are told apart, and plain torch from Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from ..kernels import general, tiled
from ..kernels.launch import narrow


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """One and the same memory, seen without reading it."""
    if a is None or b is None:
        return a is b
    memory = lambda x: (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device)
    return a is b or memory(a) == memory(b)


def weighed(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, 0 where the weight is 0 whatever x is."""
    return torch.where(weight == 0, 0.0, weight * x)


def _unpack(
    head_weight,
    head_bias,
    logit_scale,
    logit_softcap,
    temperature,
    renormalize,
    t_hidden,
    t_m,
    t_C,
    t_lse,
    t_top,
    t_p,
    t_weight,
    t_bias,
    t_keep,
):
    head = tiled.Head(head_weight, head_bias, logit_scale, logit_softcap)
    if t_hidden is None:
        return head, None
    theirs = tiled.Head(t_weight, t_bias, logit_scale, logit_softcap)
    return head, tiled.Teacher(
        t_hidden, t_m, t_C, t_lse, t_top, t_p, theirs, t_keep, renormalize, temperature
    )


# torch.compile's caches on disk know an op by its name and not by its signature: a new signature
# takes a new name.
@library.custom_op("fastsiu::dmk_ce_v2", mutates_args=())
def tiled_dmk_ce(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    u: Tensor,
    w: Tensor,
    t_hidden: Tensor | None,
    t_m: Tensor | None,
    t_C: Tensor | None,
    t_lse: Tensor | None,
    t_top: Tensor | None,
    t_p: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    t_keep: Tensor | None,
    renormalize: bool,
    logit_scale: float,
    logit_softcap: float | None,
    temperature: float,
    ignore_index: int,
    tile: int,
    fused: bool,
    ahead: bool,
    trains: bool,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows u * CE + w * KL, CE, KL and entropy [N]; dh [N, D] if `ahead`, else [0, D]; both
    logsumexps [2, N].

    With a frozen head the gradient is made here, where the tiles are at hand, for an upstream
    gradient of 1: it scales by row. A head that trains needs the upstream gradient inside the sum
    over rows, so its gradients are made in the backward pass.
    """
    head, teacher = _unpack(
        head_weight,
        head_bias,
        logit_scale,
        logit_softcap,
        temperature,
        renormalize,
        t_hidden,
        t_m,
        t_C,
        t_lse,
        t_top,
        t_p,
        t_weight,
        t_bias,
        t_keep,
    )
    y, ignored = labels.masked_fill(labels == ignore_index, 0), labels == ignore_index
    one_head = teacher is None or (same(head_weight, t_weight) and same(head_bias, t_bias))
    dh, lse = None, u.new_zeros((2, len(hidden)), dtype=torch.float64)
    if fused:
        from ..kernels import triton_general, triton_sweep  # not every machine has triton
    with torch.autocast(hidden.device.type, enabled=False):
        if one_head and not trains and (teacher is None or logit_softcap is None):
            visit = tiled.sweep
            if fused:
                tile, visit = triton_sweep.chunk(hidden, head_weight), triton_sweep.sweep
            ce, kl, H, dh = tiled.shared(
                hidden, head, y, teacher, u, w, ahead, entropy, tile, visit
            )
        else:
            normalise, differentiate, tile = general.normalise, general.differentiate, narrow(tile)
            if fused:
                normalise, differentiate, tile = (
                    triton_general.normalise,
                    triton_general.differentiate,
                    None,
                )
            ce, kl, H, *lse = normalise(
                hidden, head, y, teacher, teacher is not None and not ahead, entropy, tile
            )
            still = _still(hidden, teacher, one_head)
            if ahead:
                moving = w if still is None else w.masked_fill(still, 0)
                kl, dh, _, _ = differentiate(
                    hidden, head, y, teacher, u, moving, *lse, True, False, False, tile
                )
            if still is not None:
                kl = kl.masked_fill(still, 0)
            lse = torch.stack(lse)
    ce = ce.masked_fill(ignored, 0)
    rows = weighed(u, ce.to(u.dtype)) + weighed(w, kl.to(u.dtype))
    dh = hidden.new_empty((0, hidden.shape[1]), dtype=u.dtype) if dh is None else dh.to(u.dtype)
    return rows, ce.to(u.dtype), kl.to(u.dtype), H.to(u.dtype), dh, lse


@tiled_dmk_ce.register_fake
def _(hidden, head_weight, head_bias, labels, u, *rest):
    ahead, N, D = rest[-3], *hidden.shape
    one = lambda: u.new_empty(N)
    return (
        one(),
        one(),
        one(),
        one(),
        u.new_empty((N if ahead else 0, D)),
        u.new_empty((2, N), dtype=torch.float64),
    )


@library.custom_op("fastsiu::dmk_ce_backward_v2", mutates_args=())
def tiled_dmk_ce_backward(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    u: Tensor,
    w: Tensor,
    lse: Tensor,
    t_hidden: Tensor | None,
    t_m: Tensor | None,
    t_C: Tensor | None,
    t_lse: Tensor | None,
    t_top: Tensor | None,
    t_p: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    t_keep: Tensor | None,
    renormalize: bool,
    logit_scale: float,
    logit_softcap: float | None,
    temperature: float,
    ignore_index: int,
    tile: int,
    fused: bool,
    need_h: bool,
    need_W: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh [N, D], dW [V, D] and db [V] of sum(u * CE + w * KL); those not needed have no rows."""
    head, teacher = _unpack(
        head_weight,
        head_bias,
        logit_scale,
        logit_softcap,
        temperature,
        renormalize,
        t_hidden,
        t_m,
        t_C,
        t_lse,
        t_top,
        t_p,
        t_weight,
        t_bias,
        t_keep,
    )
    still = _still(
        hidden,
        teacher,
        teacher is not None and same(head_weight, t_weight) and same(head_bias, t_bias),
    )
    w = w if still is None else w.masked_fill(still, 0)
    y = labels.masked_fill(labels == ignore_index, 0)
    differentiate, tile = general.differentiate, narrow(tile)
    if fused:
        from ..kernels import triton_general

        differentiate, tile = triton_general.differentiate, None
    with torch.autocast(hidden.device.type, enabled=False):
        _, dh, dW, db = differentiate(
            hidden, head, y, teacher, u, w, lse[0], lse[1], need_h, need_W, need_b, tile
        )
    none = lambda x: x.new_empty((0, *x.shape[1:]))
    return (
        none(hidden) if dh is None else dh.to(hidden.dtype),
        none(head_weight) if dW is None else dW,
        none(hidden[:, 0] if head_bias is None else head_bias) if db is None else db,
    )


@tiled_dmk_ce_backward.register_fake
def _(hidden, head_weight, head_bias, labels, u, w, lse, *rest):
    need_h, need_W, need_b = rest[-3:]
    bias = hidden[:, 0] if head_bias is None else head_bias
    return tuple(
        x.new_empty((x.shape[0] if need else 0, *x.shape[1:]))
        for x, need in ((hidden, need_h), (head_weight, need_W), (bias, need_b))
    )


def _still(hidden: Tensor, teacher: tiled.Teacher | None, one_head: bool) -> Tensor | None:
    """Rows [N] that have neither KL nor its gradient because nothing has moved and C is 1; None =
    no such rule here."""
    if teacher is None or not one_head or not teacher.whole:
        return None
    return (hidden == teacher.hidden).all(1)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, ctx.rest = inputs[:15], inputs[15:]
    *_, ctx.ahead, ctx.trains, _ = inputs
    ctx.save_for_backward(output[4], output[5], *(tensors if ctx.trains else ()))
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *unused: Any) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused_dmk_ce has no second derivative: use backend='reference' for create_graph=True."
        )
    nothing = [None] * 25
    if g is None:
        return tuple(nothing)
    dh, lse, *tensors = ctx.saved_tensors
    if ctx.ahead:
        nothing[0] = (dh * g[:, None]).to(ctx.dtype)
    elif ctx.trains:
        hidden, head_weight, head_bias, labels, u, w, *theirs = tensors
        need_h, need_W, need_b = (ctx.needs_input_grad[i] for i in range(3))
        made = tiled_dmk_ce_backward(
            hidden,
            head_weight,
            head_bias,
            labels,
            u * g,
            w * g,
            lse,
            *theirs,
            *ctx.rest[:-3],
            need_h,
            need_W,
            need_b,
        )
        nothing[:3] = (
            x if need else None for x, need in zip(made, (need_h, need_W, need_b), strict=True)
        )
    return tuple(nothing)


tiled_dmk_ce.register_autograd(_backward, setup_context=_setup)
