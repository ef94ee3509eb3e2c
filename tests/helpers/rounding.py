"""How far fp32 may be from the truth in the fused loss, by arithmetic: bounds for any processor.

Nothing here was measured. Processors differ in the order in which they add, and in little else, so
the bounds assume no order. With u = 2^-24, the rounding of one operation:

Sum of n terms. It passes through fewer than n roundings of partial sums, none of them larger than
S = sum |term|, each at most u S. All of one sign they would reach n u S. They are spread over half
an ulp, so one has a standard deviation of at most u / sqrt(3), and n of them reach 4 sqrt(n) u S,
6.9 deviations, about once in 10^11. `growth` takes the smaller of the two.

Exponent. x = scale (h W_v + bias_v) is a sum of D + 1 terms and at most 8 more roundings (scale,
softcap, temperature), and an error of x is a relative error of exp(x - shift). The shift is a logit
too, and lies at most 30 below the largest (tiled.JUMP). An exponential or a logarithm of a library
is taken to be right to 2 ulp, 4 u.

Everything else is first order: a result's error is the sum of what enters it, each error times the
derivative's size. Expm1 in place of the error itself covers higher orders. Names follow
kernels/README.md: Q is the student, P the teacher, C = sum_K P.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

U = 2.0**-24  # fp32
F64 = torch.float64
UNDERFLOW = 1e-30  # what probabilities below fp32's range may add up to


def growth(n: int) -> float:
    """Roundings of n operations in units of one: of one sign or independent, whichever is less."""
    return min(n, 4 * n**0.5)


class Softmax(NamedTuple):
    """Of one side: logits after softcap, and logs at temperature tau, each with what it is off."""

    z: Tensor  # [N, V]
    size: Tensor  # [N, V], scale (sum_d |h_d W_vd| + |b_v|)
    error: Tensor  # [N, V], of z
    log_p: Tensor  # [N, V], -inf outside the support
    p: Tensor  # [N, V]
    lse: Tensor  # [N]
    lse_error: Tensor  # [N]
    log_error: Tensor  # [N, V], of log p
    relative: Tensor  # [N, V], of p, where normaliser and logits were formed each for itself
    centred: Tensor  # [N, V], of p, where p sums to 1: what is all but certain cannot be far off


def softmax(c, h: Tensor, W: Tensor, b: Tensor | None, tau: float, over: Tensor | None) -> Softmax:
    """c: scale and softcap; over [V]: the support, None = all."""
    h, W = h.detach().to(F64), W.detach().to(F64)
    (N, D), V = h.shape, len(W)
    gone = torch.zeros(V, dtype=torch.bool) if b is None else b == -torch.inf
    b = torch.zeros(V, dtype=F64) if b is None else b.detach().to(F64).masked_fill(gone, 0.0)
    x, size = c.scale * (h @ W.T + b), c.scale * (h.abs() @ W.abs().T + b.abs())
    z = x if c.softcap is None else c.softcap * torch.tanh(x / c.softcap)
    error = (growth(D + 1) + 8) * U * size  # tanh makes no error larger
    gone = gone if over is None else gone | ~over
    scaled = (z / tau).masked_fill(gone, -torch.inf)
    log_p, lse = scaled.log_softmax(1), scaled.logsumexp(1)
    p, above = log_p.exp(), scaled.amax(1, keepdim=True) if N else scaled[:, :1]
    below = (above - scaled).masked_fill(gone, 0.0)  # the largest logit
    exponent = error / tau + 2 * U * (below + below.amax(1, keepdim=True).clamp(max=30)) + 8 * U
    mean = (p * exponent).sum(1, keepdim=True)
    summed = growth(V + 64) * U  # 64: sums of tiles, sums that are rescaled
    lse_error = mean + summed + 2 * U * lse.abs()[:, None]
    own = 2 * U * log_p.masked_fill(gone, 0.0).abs()
    log_error, small = exponent + lse_error + own, exponent + mean - 2 * p * exponent + summed + own
    relative, centred = (x.clamp(max=30).expm1() for x in (log_error, small))
    return Softmax(z, size, error, log_p, p, lse, lse_error[:, 0], log_error, relative, centred)


def case(h: Tensor, W: Tensor, y: Tensor, ht: Tensor | None = None, **options) -> SimpleNamespace:
    """What `bounds` takes, for a call with the defaults of the loss but for `options`."""
    usual = dict(
        b=None,
        Wt=None,
        bt=None,
        keep=None,
        renormalize=False,
        scale=1.0,
        softcap=None,
        tau=1.0,
        a=None,
        k=None,
        alpha=0.9,
        beta=0.75,
        reduction="mean",
        denominators=(None, None),
        ignore_index=-100,
    )
    return SimpleNamespace(h=h.detach(), W=W.detach(), y=y, ht=ht, **(usual | options))


def weights(c) -> tuple[Tensor, Tensor]:
    """[N], the factors of each row's CE and KL in the loss."""
    ones = torch.ones(len(c.h), dtype=F64)
    a, k = (ones if w is None else w.detach().to(F64) for w in (c.a, c.k))
    a = a * (c.y != c.ignore_index)
    if c.reduction == "mean":
        totals = zip((a, k), c.denominators, strict=True)
        totals = [w.sum() if d is None else torch.as_tensor(d, dtype=F64) for w, d in totals]
        a, k = (w / d.clamp(min=1e-30).squeeze() for w, d in zip((a, k), totals, strict=True))
    return c.alpha * a, c.beta * k * (c.ht is not None)


def bounds(c, upstream: Tensor) -> dict[str, Tensor]:
    """What fp32 may be off by in loss, ce, kl, entropy and the gradients h, W and b, one by one.

    c: a call of the loss (`case`, or Case of tests/loss/test_fused_hard.py)
    upstream: [N] or one number, the gradient that comes in
    The rounding of a result to its own dtype is not in it.
    """
    N, V, D, tau = len(c.h), *c.W.shape, c.tau
    summed, rows = growth(V + 64) * U, (growth(N) + 8) * U  # over the vocabulary, over the rows
    y = c.y.masked_fill(c.y == c.ignore_index, 0)[:, None]
    label = torch.zeros((N, V), dtype=F64).scatter_(1, y, 1.0)
    slope, slope_error = torch.ones((N, V), dtype=F64), torch.zeros((N, V), dtype=F64)

    one = softmax(c, c.h, c.W, c.b, 1.0, None)
    if c.softcap is not None:
        slope = 1 - (one.z / c.softcap) ** 2
        slope_error = 2 * one.error / c.softcap + 4 * U
    z_y, e_y = one.z.gather(1, y)[:, 0], one.error.gather(1, y)[:, 0]
    ce = (one.lse - z_y).abs()
    ce_error = one.lse_error + e_y + 2 * U * ce
    # -sum q log q, or lse - shift - sum q log e with e = exp(z - shift), where the shift is the
    # label's logit or above it, unless the label may be dropped.
    own = one.log_p.masked_fill(one.p == 0, 0.0).abs()
    lowest = one.z.amin(1) if c.renormalize and N else z_y
    above = (one.z - lowest[:, None]).clamp(0, 30).amax(1) if N else ce
    sizes = 1 + above + torch.tensor(V).log() + (one.p * own).sum(1)
    entropy = (one.p * (1 + own) * (one.relative + 4 * U)).sum(1) + 2 * summed * sizes

    u, w = weights(c)
    kl = kl_error = torch.zeros(N, dtype=F64)
    pull = pull_size = torch.zeros((N, V), dtype=F64)
    if c.ht is not None:
        keep = torch.ones(V, dtype=torch.bool) if c.keep is None else c.keep
        over = keep if c.renormalize else None
        Wt, bt = (c.W, c.b) if c.Wt is None else (c.Wt, c.bt)
        s, t = softmax(c, c.h, c.W, c.b, tau, over), softmax(c, c.ht, Wt, bt, tau, over)
        P = t.p * keep
        C = P.sum(1)
        log_P, log_Q = (torch.where(P > 0, x.log_p.clamp(min=-1e6), 0.0) for x in (t, s))
        apart = log_P - log_Q
        kl = tau**2 * (P * apart).sum(1)
        # The terms log P - log Q are formed as they stand here, as (t - z) / tau and lse_s - lse_t,
        # or, under one head, as scale <h - ht, W_v> / tau, whose summands may exceed their sum.
        drift = (s.lse - t.lse).abs()
        size = apart.abs() + drift[:, None]
        if c.Wt is None:
            size = size + c.scale / tau * ((c.h.to(F64) - c.ht.to(F64)).abs() @ Wt.to(F64).abs().T)
        off = t.centred + summed + (growth(D + 1) + 8) * U
        kl_error = (P * (size * off + t.log_error + s.log_error)).sum(1)
        kl_error = kl_error + C * (t.lse_error + s.lse_error)
        kl_error = kl_error + drift * ((P * t.centred).sum(1) + C * summed)
        kl_error = tau**2 * (kl_error + UNDERFLOW * (1 + drift) + 8 * U * (P * size).sum(1))
        C_error = (P * t.relative).sum(1) + C * summed
        pull_size = C[:, None] * s.p + P
        pull = s.p * (C[:, None] * (s.relative + 8 * U) + C_error[:, None])
        pull = pull + P * (t.relative + 8 * U)

    # dz, column by column: u (Q - label) + w tau (C Q - P), then times the slope. The factors u and
    # w are off by `rows`.
    factor = (torch.as_tensor(upstream, dtype=F64).abs() * torch.ones(N, dtype=F64))[:, None]
    u, w = u[:, None], w[:, None]
    size = u * (one.p + label) + w * tau * pull_size
    dz = u * (one.p * (one.relative + 8 * U) + label * 8 * U) + w * tau * pull + rows * size
    dz, size = factor * (dz * slope + size * slope_error), factor * size * slope
    h, W = c.h.to(F64).abs(), c.W.to(F64).abs()
    whole = rows * (u[:, 0] * ce + w[:, 0] * kl.abs())
    loss = u[:, 0] * ce_error + w[:, 0] * kl_error + whole
    through = lambda n: dz + (growth(n + 64) + 8) * U * size  # and a product that sums n of them
    return dict(
        loss=loss if c.reduction == "none" else (loss + whole).sum(),
        ce=ce_error + 2 * U * ce,
        kl=kl_error + 2 * U * kl.abs(),
        entropy=entropy,
        h=c.scale * through(V) @ W + UNDERFLOW,
        W=c.scale * through(N).T @ h + UNDERFLOW,
        b=c.scale * through(N).sum(0) + UNDERFLOW,
    )
