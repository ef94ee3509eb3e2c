"""The general path: a softcap, a head that trains, or a teacher with another head, where the
teacher's statistics do not suffice.

A first pass over the tiles of tiled.py gives the normalisers. A second pass forms both logits again
and from them dz = d loss / dz, exactly normalised, before anything is rounded or summed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .head_rows import held_logits
from .inputs import Head, Teacher, native, working_dtype
from .parts import WHOLE, Part
from .tiled import Sums, accumulate, dropped_in_tiles, entropy_of, meet, spread, tiles


def pairs(
    h: Tensor, head: Head, teacher: Teacher | None, tile: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """(first column, W, z, slope, t / tau or None) for each tile; see `tiled.tiles`."""
    if teacher is None:
        for start, W, z, slope in tiles(h, head, tile, dtype):
            yield start, W, z, slope, None
        return
    theirs = tiles(teacher.hidden, teacher.head, tile, dtype)
    for (start, W, z, slope), (_, _, t, _) in zip(tiles(h, head, tile, dtype), theirs, strict=True):
        yield start, W, z, slope, t if teacher.tau == 1 else t.div_(teacher.tau)


def gap(z: Tensor, t: Tensor, P: Tensor, tau: float) -> Tensor:
    """[N] fp64: the tile's share of sum_K P (t - z) / tau. KL / tau^2 is this sum plus
    C (lse_s - lse_t). The argument t is t / tau."""
    moved = t - z if tau == 1 else t - z / tau
    return moved.mul_(P).masked_fill_(P == 0, 0.0).sum(1).double()  # P = 0 where t is -inf


def probabilities(t: Tensor, start: int, teacher: Teacher) -> Tensor:
    """P of a tile whose first column is `start` of the whole head, 0 on dropped columns. The
    argument t is t / tau."""
    P = minus(t, teacher.lse).exp_()
    if teacher.keep is None:
        return P
    return P.masked_fill_(~teacher.keep[start : start + P.shape[1]], 0.0)


def minus(z: Tensor, lse: Tensor) -> Tensor:
    """z - lse, lse [N] fp64, in z's dtype. lse goes in two parts: once the leading digits have
    cancelled, z has room for the lower part."""
    high = lse.to(z.dtype)
    return (z - high[:, None]).sub_((lse - high.double()).to(z.dtype)[:, None])


def divergence(gaps: Tensor, mass: Tensor, lse_q: Tensor, teacher: Teacher) -> Tensor:
    """KL [N] from gaps = sum_K P (t - z) / tau and mass = sum_K P. The mass is C up to the rounding
    of t, which is not small for large t."""
    C, none = teacher.C.double(), mass == 0
    mass = mass.masked_fill(none, 1.0)
    kl = C * (gaps / mass + lse_q - teacher.lse - torch.log(mass / C.masked_fill(none, 1.0)))
    return teacher.tau**2 * kl.masked_fill(none, 0.0)


def added(gaps: Tensor, mass: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Both [N] over all ranks' columns."""
    if part.whole:
        return gaps, mass
    both = torch.stack([gaps, mass])
    part.sum(both)
    return both[0], both[1]


@torch.no_grad()
def normalise(
    h: Tensor,
    head: Head,
    y: Tensor,
    teacher: Teacher | None,
    with_kl: bool,
    entropy: bool,
    tile: int,
    part: Part = WHOLE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CE, KL (0 unless `with_kl`), entropy, and two logsumexps, all [N] fp64: of z over V at
    temperature 1, and of Q over its own columns at tau."""
    dtype = working_dtype(h, head.weight, head.bias)
    z_label = held_logits(h, head, y[:, None], dtype, part)[0][:, 0].double()
    tau = 1.0 if teacher is None else teacher.tau
    mask = teacher.keep if teacher is not None and teacher.renormalize else None
    within = z_label if mask is None else z_label.masked_fill(~mask[y], -torch.inf)
    ones, kl = Sums(within, 1.0, dtype, 0, entropy), torch.zeros_like(z_label)
    sums, mass = [ones] if tau == 1 else [ones, Sums(within, tau, dtype)], torch.zeros_like(z_label)
    apart = Sums(z_label, 1.0, dtype, 0, entropy) if mask is not None and tau == 1 else None
    cuts = dropped_in_tiles(part.mine(mask), len(head.weight), tile)
    for (start, W, z, _, t), dropped in zip(
        pairs(h, head, teacher if with_kl else None, tile, dtype), cuts, strict=True
    ):
        if t is not None and teacher is not None:
            P = probabilities(t, part.start + start, teacher)
            mass += P.sum(1)
            kl += gap(z, t, P, tau)
        spread(z, W, None, sums, dropped, apart)
    everything = [ones] if apart is None else [ones, apart]
    meet(sums if apart is None else [*sums, apart], part)
    lse = torch.logsumexp(torch.stack([x.log_total() for x in everything]), 0)
    lse_q = sums[-1].log_total()
    if with_kl and teacher is not None:
        kl, mass = added(kl, mass, part)
        kl = divergence(kl, mass, lse_q, teacher)
    return lse - z_label, kl, entropy_of(everything, lse), lse, lse_q


@torch.no_grad()
def differentiate(
    h: Tensor,
    head: Head,
    y: Tensor,
    teacher: Teacher | None,
    u: Tensor,
    w: Tensor,
    lse: Tensor,
    lse_q: Tensor,
    need_h: bool,
    need_W: bool,
    need_b: bool,
    tile: int,
    part: Part = WHOLE,
    need_kl: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """KL [N] fp64, and d(sum u CE + w KL) by h, W and b where needed. Each tile's dz is complete
    before it is multiplied. In a head in parts KL and dh are those of the whole head, dW and db
    those of the rank's rows."""
    dtype, (N, D) = working_dtype(h, head.weight, head.bias), h.shape
    tau, u = 1.0 if teacher is None else teacher.tau, u.to(dtype)[:, None]
    dh = h.new_zeros((N, D), dtype=dtype) if need_h else None
    # contiguous, whatever the head's strides
    dW = head.weight.new_empty(head.weight.shape) if need_W else None
    db = None
    if need_b and head.bias is not None:
        db = head.bias.new_empty(head.bias.shape)
    x = h if native(h, head.weight) and dtype == torch.float32 else h.to(dtype)
    kl, mass = lse.new_zeros(N), lse.new_zeros(N)
    if teacher is not None:
        C, w = teacher.C.to(dtype)[:, None], (w.to(dtype) * tau)[:, None]
    for start, W, z, slope, t in pairs(h, head, teacher, tile, dtype):
        columns = slice(start, start + len(W))
        first = part.start + start
        dz = minus(z, lse).exp_().mul_(u)
        if teacher is not None and t is not None:
            P = probabilities(t, first, teacher)
            mass += P.sum(1)
            kl += gap(z, t, P, tau)
            Q = minus(z.div_(tau), lse_q).exp_()
            if teacher.renormalize and teacher.keep is not None:
                Q.masked_fill_(~teacher.keep[first : first + len(W)], 0.0)
            dz.add_(Q.mul_(C).sub_(P).mul_(w))
        here = (y - first)[:, None]
        dz.scatter_add_(1, here.clamp(0, len(W) - 1), -u * ((here >= 0) & (here < len(W))))
        if slope is not None:
            dz.mul_(slope)
        if dh is not None:
            accumulate(dh, dz, W)
        if head.scale != 1:
            dz.mul_(head.scale)
        if dW is not None:
            dW[columns] = (
                dz.T @ x if x.dtype == dtype else torch.mm(dz.T.to(x.dtype), x, out_dtype=dtype)
            )
        if db is not None:
            db[columns] = dz.sum(0)
    if dh is not None:
        part.sum(dh)
        dh *= head.scale
    if teacher is not None and need_kl:
        kl, mass = added(kl, mass, part)
        kl = divergence(kl, mass, lse_q, teacher)
    return kl, dh, dW, db
