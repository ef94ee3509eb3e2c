"""The shared path, one vocabulary tile at a time, in plain torch: any device, no [N, V] tensor, all
logits in fp32 (fp64 for fp64).

It serves one frozen head of student and teacher without a softcap, and cross-entropy alone. One
sweep over the vocabulary gives the softmax's sums and its product with W; the teacher enters
through its statistics. general.py has all other cases; README.md has letters and equations.

Held-out columns (the teacher's top entries and the label) never enter the running sums. Their
logits are fp32 dot products of single rows, and z - t = s <h - h_t, W_v> comes from the difference
of the hidden states. So nothing cancels next to the teacher, and the product with rounded
probabilities covers only the small remaining columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce

import torch
from torch import Tensor

from .head_rows import add_held_rows, held_logits
from .inputs import Head, Teacher, native, working_dtype
from .parts import WHOLE, Part

# A logit may lie this many nats above the softmax's reference before the sums are rescaled; exp(30)
# is far from 2^127.
JUMP = 30.0
FLOOR = -1e30  # in place of a reference of -inf, whose differences would be NaN


class Sums:
    """Running sums of e = exp(z / tau - shift) over columns, as in an online softmax. Columns of
    -inf add nothing.

    shift    [N] the working dtype: where a logit lies more than JUMP above it, it moves there
    total    [N] fp64: sum e
    entropy  [N] fp64: -sum e log e; None where it is not wanted
    product  [N, D] the working dtype: e @ W; None where it is not wanted
    """

    def __init__(
        self, reference: Tensor, tau: float, dtype: torch.dtype, D: int = 0, entropy: bool = False
    ) -> None:
        """reference [N]: logits that do not lie far above the largest; D: 0 = no product."""
        N = len(reference)
        self.tau, self.shift = tau, (reference / tau).clamp_min(FLOOR).to(dtype)
        self.total = reference.new_zeros(N, dtype=torch.float64)
        self.product = reference.new_zeros((N, D), dtype=dtype) if D else None
        self.entropy = torch.zeros_like(self.total) if entropy else None

    def add(self, z: Tensor, W: Tensor, slope: Tensor | None) -> None:
        """Adds a tile of logits z [N, T], which it overwrites, with its head rows W [T, D]. slope:
        dz/dx, a factor on the product."""
        if z.shape[1] == 0:
            return
        if self.tau != 1:
            z.div_(self.tau)
        top = z.amax(1)
        shift = torch.where(top > self.shift + JUMP, top, self.shift)
        # a GPU rescales always: to learn that nothing moved, the host would have to wait
        if z.is_cuda or not torch.equal(shift, self.shift):
            self.rescale(shift)
        e = z.sub_(self.shift[:, None]).exp_()
        self.total += e.sum(1)
        if self.entropy is not None:
            self.entropy += torch.special.entr(e).sum(1)
        if self.product is not None:
            accumulate(self.product, e if slope is None else e.mul_(slope), W)

    def rescale(self, shift: Tensor) -> None:
        """Refers all sums to another shift [N]."""
        r = torch.exp(self.shift - shift)
        if self.entropy is not None:  # -sum (r e) log(r e)
            self.entropy = r * (self.entropy - (self.shift - shift).double() * self.total)
        self.total, self.shift = self.total * r, shift
        if self.product is not None:
            self.product *= r[:, None]

    def scaled_product(self, factor: Tensor) -> Tensor:
        """[N, D]: the product, each row times its factor [N]."""
        assert self.product is not None
        return self.product * factor.to(self.product.dtype)[:, None]

    def log_total(self) -> Tensor:
        """[N] fp64: logsumexp of z / tau over the columns added; -inf for none."""
        return self.shift.double() + self.total.log()

    def share(self, lse: Tensor) -> Tensor:
        """[N] fp64: exp(shift - lse), the factor from e to a probability; 0 where nothing was
        added."""
        return torch.exp(self.shift.double() - lse).masked_fill(self.total == 0, 0.0)

    def entropy_share(self, lse: Tensor) -> Tensor:
        """[N] fp64: sum q (lse - log e - shift) over these columns, q = e * share; 0 where the
        entropy is not wanted."""
        if self.entropy is None:
            return torch.zeros_like(lse)
        return self.share(lse) * ((lse - self.shift.double()) * self.total + self.entropy)


def meet(sums: list[Sums], part: Part) -> None:
    """Makes shift, total and entropy those of all ranks' columns. Each product stays the rank's
    own, and refers to the common shift."""
    if part.whole:
        return
    shift = torch.stack([x.shift for x in sums])
    part.max(shift)
    for x, common in zip(sums, shift, strict=True):
        x.rescale(common)
    totals = torch.stack([y for x in sums for y in (x.total, x.entropy) if y is not None])
    part.sum(totals)
    found = iter(totals)
    for x in sums:
        x.total = next(found)
        x.entropy = None if x.entropy is None else next(found)


def entropy_of(sums: list[Sums], lse: Tensor) -> Tensor:
    """[N] fp64: the entropy of the softmax whose columns these sums share, lse [N] its
    normaliser."""
    entropy = torch.zeros_like(lse)
    for one in sums:
        entropy += one.entropy_share(lse)
    return entropy


# --------------------------------------------------------------------------------------------------
# tiles


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype.

    Where b is bf16, a goes in two bf16 parts. One part would leave 8 bits of it, and a product that
    is a small difference from the teacher's needs more (notes/held-out-columns.md).
    """
    if b.dtype == total.dtype:
        total.addmm_(a, b)
        return
    high = a.to(b.dtype)
    total += torch.mm(high, b, out_dtype=total.dtype)
    total += torch.mm((a - high).to(b.dtype), b, out_dtype=total.dtype)


def tiles(
    h: Tensor, head: Head, tile: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """(first column, W [T, D], z [N, T], dz/dx or None) for each tile. The next tile overwrites W
    and z."""
    (N, D), V = h.shape, len(head.weight)
    keep_bits = native(h, head.weight) and dtype == torch.float32
    x = h if keep_bits else h.to(dtype)
    tile = max(1, min(tile, V))  # a rank's part of a head may have no row
    z_buffer = h.new_empty((N, tile), dtype=dtype)
    W_buffer = (
        None if keep_bits or head.weight.dtype == dtype else h.new_empty((tile, D), dtype=dtype)
    )
    for start in range(0, V, tile):
        W = head.weight[start : start + tile]
        if W_buffer is not None:
            W = W_buffer[: len(W)].copy_(W)
        z = z_buffer if len(W) == tile else h.new_empty((N, len(W)), dtype=dtype)
        if keep_bits:
            z.copy_(torch.mm(x, W.T, out_dtype=dtype))
        else:
            torch.mm(x, W.T, out=z)
        slope = transform(z, head, start)
        yield start, W, z, slope


def transform(z: Tensor, head: Head, start: int) -> Tensor | None:
    """Applies bias, scale and softcap to a tile in place. Returns dz/dx if there is a softcap."""
    if head.bias is not None:
        z += head.bias[start : start + z.shape[1]].to(z.dtype)
    if head.scale != 1:
        z *= head.scale
    if head.softcap is None:
        return None
    z.div_(head.softcap).tanh_()
    slope = torch.addcmul(torch.ones_like(z), z, z, value=-1)
    z *= head.softcap
    return slope


def sweep(
    h: Tensor,
    head: Head,
    held: Tensor,
    valid: Tensor,
    keep: Tensor | None,
    sums: list[Sums],
    apart: Sums | None,
    tile: int,
) -> None:
    """Adds the whole vocabulary to all `sums`, without each row's columns held [N, k] where valid.

    The last of `sums` also leaves out the columns that `keep` [V] drops; `apart` gets those. In a
    head in parts the vocabulary is the rank's own rows, and columns outside of them change nothing.
    """
    cuts = dropped_in_tiles(keep, len(head.weight), tile)
    for (start, W, z, slope), dropped in zip(
        tiles(h, head, tile, sums[0].shift.dtype), cuts, strict=True
    ):
        hold_out(z, held, valid, start)
        spread(z, W, slope, sums, dropped, apart)


def hold_out(z: Tensor, columns: Tensor, valid: Tensor, start: int) -> None:
    """Sets a tile's z to -inf at each row's columns [N, k] where valid. Columns outside of the tile
    add 0 at its edge, so they collide with none inside."""
    here = columns - start
    inside = valid & (here >= 0) & (here < z.shape[1])
    z.scatter_add_(
        1,
        here.clamp(0, z.shape[1] - 1),
        torch.zeros_like(here, dtype=z.dtype).masked_fill(inside, -torch.inf),
    )


def dropped_in_tiles(keep: Tensor | None, V: int, tile: int) -> list[Tensor | None]:
    """For each tile its dropped columns, counted from its start; None where it keeps all."""
    starts = range(0, V, max(1, min(tile, V)))
    if keep is None:
        return [None] * len(starts)
    dropped = (~keep).nonzero()[:, 0]
    cuts = torch.searchsorted(dropped, torch.tensor([*starts, V], device=dropped.device)).tolist()
    return [
        dropped[a:b] - start if b > a else None
        for a, b, start in zip(cuts[:-1], cuts[1:], starts, strict=True)
    ]


def spread(
    z: Tensor,
    W: Tensor,
    slope: Tensor | None,
    sums: list[Sums],
    dropped: Tensor | None,
    apart: Sums | None,
) -> None:
    """Adds a tile to all `sums`, the last without the dropped columns; `apart` gets those.
    Overwrites z."""
    for one in sums[:-1]:
        one.add(z.clone(), W, slope)
    if dropped is not None:
        if apart is not None:
            apart.add(z[:, dropped], W[dropped], None if slope is None else slope[:, dropped])
        z.index_fill_(1, dropped, -torch.inf)
    sums[-1].add(z, W, slope)


# --------------------------------------------------------------------------------------------------
# the teacher


@torch.no_grad()
def statistics(
    hidden: Tensor,
    head: Head,
    keep: Tensor | None,
    renormalize: bool,
    tau: float,
    tile: int,
    held_out: int = 16,
    part: Part = WHOLE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """m, C, lse, top and p of a Teacher, in two sweeps: the first looks for the top entries, the
    second leaves them out."""
    N, D, V = len(hidden), head.weight.shape[1], part.vocabulary(head.weight)
    dtype = working_dtype(hidden, head.weight, head.bias)
    cuts = dropped_in_tiles(part.mine(keep), len(head.weight), tile)
    k = min(held_out, V if keep is None else int(keep.sum()))
    best = hidden.new_full((N, k), -torch.inf, dtype=dtype)
    top = torch.zeros((N, k), dtype=torch.int64, device=hidden.device)
    for (start, W, z, _), dropped in zip(tiles(hidden, head, tile, dtype), cuts, strict=True):
        if dropped is not None:
            z.index_fill_(1, dropped, -torch.inf)
        value, index = z.topk(min(k, len(W)), dim=1)
        best, order = torch.cat([best, value], 1).topk(k, dim=1)
        top = torch.cat([top, index + (part.start + start)], 1).gather(1, order)
    if not part.whole:
        best, order = part.together(best).topk(k, dim=1)
        top = part.together(top).gather(1, order)
    valid = best > -torch.inf  # a row with fewer finite kept logits than k holds placeholders
    z = held_logits(hidden, head, top, dtype, part)[0].double().masked_fill(~valid, -torch.inf)
    sums, others = Sums(z.amax(1), tau, dtype, D), Sums(z.amax(1), tau, dtype)
    for (start, W, tile_z, _), dropped in zip(tiles(hidden, head, tile, dtype), cuts, strict=True):
        hold_out(tile_z, part.local(top), valid, start)
        # m is no gradient: no slope
        spread(tile_z, W, None, [sums], dropped, None if renormalize else others)
    meet([sums] if keep is None or renormalize else [sums, others], part)
    kept = torch.logaddexp(torch.logsumexp(z / tau, 1), sums.log_total())
    lse = torch.logaddexp(kept, others.log_total())
    C = torch.ones_like(lse) if renormalize or keep is None else torch.exp(kept - lse)
    result = torch.float64 if torch.float64 in (hidden.dtype, head.weight.dtype) else torch.float32
    assert sums.product is not None
    m = sums.product * sums.share(lse).to(dtype)[:, None]
    part.sum(m)
    return m.to(result), C.to(result), lse, top, torch.exp(z / tau - lse[:, None])


# --------------------------------------------------------------------------------------------------
# shared head


@torch.no_grad()
def shared(
    h: Tensor,
    head: Head,
    y: Tensor,
    teacher: Teacher | None,
    u: Tensor,
    w: Tensor,
    gradient: bool,
    entropy: bool,
    tile: int,
    sweep: Callable[..., None] = sweep,
    part: Part = WHOLE,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """CE, KL and entropy [N] fp64, and d(u CE + w KL)/dh [N, D] if `gradient`.

    y      [N] int64, legal columns; u is 0 where the label is ignored
    sweep  visits the whole vocabulary, N * V * D flops and more; the rest of this function is
           N * k * D at most
    part   of the head, where it is in parts; the result is that of the whole head
    """
    dtype = working_dtype(h, head.weight, head.bias)
    tau = 1.0 if teacher is None else teacher.tau
    moved = None
    if teacher is None:
        held, own = y[:, None], torch.ones_like(y, dtype=torch.bool)
        valid = own[:, None]
    else:
        held = torch.cat([teacher.top, y[:, None]], 1)
        massive = teacher.p > 0  # a column without mass may be a placeholder
        # a label among the top must not count twice
        own = ~((teacher.top == y[:, None]) & massive).any(1)
        valid = torch.cat([massive, own[:, None]], 1)
        moved = h.to(dtype) - teacher.hidden.to(dtype)
    z, dz = held_logits(h, head, held, dtype, part, moved)
    z = z.double().masked_fill(~valid, -torch.inf)

    mask = teacher.keep if teacher is not None and teacher.renormalize else None
    # The sums start from a logit that is in them: a dropped logit far above would drive the kept
    # ones to 0.
    reference = (z if mask is None else z.masked_fill(~mask[held], -torch.inf)).amax(1)
    width = h.shape[1] if gradient else 0
    ones = Sums(reference, 1.0, dtype, width, entropy)
    sums = [ones] if tau == 1 else [ones, Sums(reference, tau, dtype, width)]
    apart = Sums(reference, 1.0, dtype, width, entropy) if mask is not None and tau == 1 else None
    sweep(h, head, part.local(held), valid, part.mine(mask), sums, apart, tile)
    everything = [ones] if apart is None else [ones, apart]
    meet(sums if apart is None else [*sums, apart], part)

    # Cross-entropy, over the whole vocabulary at temperature 1.
    lse = torch.logsumexp(
        torch.stack([torch.logsumexp(z, 1), *(x.log_total() for x in everything)]), 0
    )
    is_label = valid & (held == y[:, None])
    ce = lse - z.masked_fill(~is_label, -torch.inf).amax(1)
    Q = torch.exp(z - lse[:, None])  # [N, k + 1]
    H = torch.zeros_like(lse)
    if entropy:
        H = (Q * (lse[:, None] - z)).masked_fill(Q == 0, 0.0).sum(1) + entropy_of(everything, lse)
    u = u.double()
    factor = u[:, None] * (Q - is_label.double())  # of the held-out rows of W
    if head.softcap is not None:  # without a teacher only
        factor *= 1 - (z / head.softcap) ** 2
    kl, dh = torch.zeros_like(lse), None
    if gradient:
        dh = reduce(torch.add, (x.scaled_product(u * x.share(lse)) for x in everything))

    if teacher is not None and moved is not None:
        C, P, w = teacher.C.double(), teacher.p.double(), w.double() * tau
        dz = dz.double().masked_fill(~valid, 0.0)[:, :-1] / tau
        in_support = own if mask is None else own & mask[y]
        # The student's exp(z / tau - lse_t) in three parts, as logarithms. Their sum is
        # S = exp(lse_s - lse_t): 1 for a row that has not moved.
        top = torch.log(P) + dz
        label = (z[:, -1] / tau - teacher.lse).masked_fill(~in_support, -torch.inf)
        others = sums[-1].log_total() - teacher.lse
        log_S = torch.logsumexp(torch.cat([top, label[:, None], others[:, None]], 1), 1)
        drift = (moved * teacher.m.to(dtype)).sum(1).double() * (head.scale / tau)
        kl = tau**2 * (C * log_S - (P * dz).sum(1) - drift)
        if teacher.whole:
            still = (moved == 0).all(1)
            kl, w = kl.masked_fill(still, 0.0), w.masked_fill(still, 0.0)
        factor[:, :-1] += w[:, None] * (C[:, None] * torch.exp(top - log_S[:, None]) - P)
        factor[:, -1] += w * C * torch.exp(label - log_S)
        if dh is not None:
            dh += sums[-1].scaled_product(w * C * sums[-1].share(teacher.lse + log_S))
            if part.first:
                dh -= teacher.m.to(dtype) * w.to(dtype)[:, None]
    if dh is not None:
        add_held_rows(dh, head.weight, held, factor, part)
        part.sum(dh)
        dh *= head.scale
    return ce, kl, H, dh
