"""The head that turns hidden states into logits: can it be used, and is it still the same one?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor, nn

# What one call of the loss reads of the head, to see writes that torch does not count. On a CPU a
# call reads one of `shares(V, D)` shares. Elsewhere a call would have to wait for the answer, so
# every 64th call reads the whole head.
SHARES, SMALL, SELDOM = 256, 2**16, 64
LARGEST = sys.float_info.max
# Bounds of scale, softcap and temperature: the square of each must be a finite number above 0.
LEAST, MOST = 1e-100, 1e100

Kind = tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
Memory = tuple[int, tuple[int, ...], int | None]


def check_head(
    hidden: object,
    head_weight: object,
    head_bias: object,
    logit_scale: object,
    logit_softcap: object,
    temperature: object,
    in_parts: bool = False,
) -> None:
    """Raises ValueError, one sentence each, where hidden states and head do not fit, or where an
    option of the head is out of range. in_parts: head_weight may have no rows."""
    for name, x in (("hidden", hidden), ("head_weight", head_weight), ("head_bias", head_bias)):
        if not isinstance(x, Tensor) and not (x is None and name == "head_bias"):
            raise ValueError(f"{name} must be a tensor, but is a {type(x).__name__}.")
    assert isinstance(hidden, Tensor) and isinstance(head_weight, Tensor)
    for name, x in (("hidden", hidden), ("head_weight", head_weight)):
        if x.ndim != 2 or not x.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a two-dimensional float tensor, but is {x.dtype} {list(x.shape)}."
            )
    V, D = head_weight.shape
    if hidden.shape[1] != D:
        raise ValueError(
            f"hidden has D={hidden.shape[1]} but head_weight has D={D}: both must come from one "
            "model."
        )
    if (V == 0 and not in_parts) or D == 0:
        raise ValueError(
            f"head_weight is {list(head_weight.shape)}: a head needs at least one token and one "
            "feature."
        )
    if hidden.device != head_weight.device:
        raise ValueError(
            f"hidden is on {hidden.device} but head_weight on {head_weight.device}: move one of "
            "them."
        )
    if isinstance(head_bias, Tensor):
        if head_bias.shape != (V,) or not head_bias.dtype.is_floating_point:
            raise ValueError(
                f"head_bias must be a float tensor [{V}], but is {head_bias.dtype} "
                f"{list(head_bias.shape)}."
            )
        if head_bias.device != head_weight.device:
            raise ValueError(
                f"head_bias is on {head_bias.device} but head_weight on {head_weight.device}: move "
                "one of them."
            )
    options = dict(logit_scale=logit_scale, logit_softcap=logit_softcap, temperature=temperature)
    for name, x in options.items():
        if x is not None or name != "logit_softcap":
            number(name, x)


def number(name: str, x: object) -> float:
    """An option of the head. Raises ValueError where it is out of range."""
    if isinstance(x, float) and LEAST <= x <= MOST:
        return x  # almost always; tests/triton/test_launches.py counts the calls of a step
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(
            f"{name} requires grad, but the loss has no gradient by it: give its value (.item())."
        )
    if isinstance(x, Tensor) and x.numel() == 1:
        x = x.item()
    if not (is_real(x) and LEAST <= x <= MOST):
        raise ValueError(
            f"{name} is {x}: it must be a finite number above 0, from {LEAST} to {MOST}."
        )
    return x


def is_real(x: object) -> TypeGuard[float]:
    """A float, an int, or another number that can be compared with them, such as numpy.float32."""
    return isinstance(x, Real)


# --------------------------------------------------------------------------------------------------
# the stamp


class Stamp:
    """Recognises a head by a sum over the bits of its numbers, and remembers which memory held them
    when it was last read.

    Row v contributes r_v * sum_d c_d * bits(W_vd), with r and c odd and all products modulo 2^64.
    Any order of summation, any device and any layout give the same integer; any one changed bit
    gives another integer. The bias counts as one more column. `sums` has one number for each of K
    shares: share k holds the rows k, k + K, k + 2 K, ...

    `seen` is neither copied nor pickled, because a copy is other memory. All rows of a cache share
    one stamp.

    kind   shape and dtype of weight and bias
    sums   [K] int64, on the CPU; None where there are no numbers (meta and fake tensors)
    first  which row of the whole head the first one is: the stamps of a head's parts add up to the
           stamp of the whole
    """

    def __init__(self, kind: Kind, sums: Tensor | None, first: int = 0) -> None:
        self.kind, self.sums, self.first = kind, sums, first
        # for each device, the memory that held this head when it was last read there
        self.seen: dict[torch.device, tuple[Memory | None, Memory | None]] = {}
        self.calls = 0

    def __reduce__(self) -> tuple[type[Stamp], tuple[Kind, Tensor | None, int]]:
        return Stamp, (self.kind, self.sums, self.first)

    def words(self) -> tuple[str, str, str]:
        """Shape, dtype and digest of the weight for a file. The digest does not depend on the
        number of shares. Raises ValueError for a head without numbers."""
        weight = self.kind[0]
        if self.sums is None or weight is None:
            raise ValueError("The head has no numbers: load the model onto a device first.")
        shape, dtype = weight
        return json.dumps(list(shape)), str(dtype), str(int(self.sums.sum()))

    def differs(self, weight: Tensor, bias: Tensor | None, *, whole: bool = False) -> bool:
        """Does this head hold other numbers than the stamped one?

        Reads the whole head if `whole`, if its memory is not the one seen last, or if an operation
        that torch counts has written to that memory. Otherwise reads a part of it, without waiting
        for a device.
        """
        if self.sums is None or not readable(weight):
            return False
        if _kind(weight, bias) != self.kind:
            return True
        now, device = (_memory(weight), _memory(bias)), weight.device
        self.calls += 1
        if (
            whole
            or self.seen.get(device) != now
            or (device.type != "cpu" and self.calls % SELDOM == 0)
        ):
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return (
                    False  # a graph's capture can read no number; calls outside of it are checked
                )
            if not torch.equal(_sums(weight, bias, self.first), self.sums):
                return True
            self.seen[device] = now
        elif device.type == "cpu":
            share = self.calls % len(self.sums)
            parts = _rows(weight, bias, slice(share, None, len(self.sums)), self.first)
            return sum(int(x.sum()) for x in parts) % 2**64 != int(self.sums[share]) % 2**64
        return False


def stamp(weight: Tensor, bias: Tensor | None, first: int = 0) -> Stamp:
    """The stamp of a head, or of its rows from `first` on, as it is now. Reads all of it once, a
    piece at a time."""
    if not readable(weight):
        return Stamp(_kind(weight, bias), None, first)
    now = Stamp(_kind(weight, bias), _sums(weight, bias, first), first)
    now.seen[weight.device] = _memory(weight), _memory(bias)
    return now


def shares(V: int, D: int) -> int:
    """Into how many shares the rows of a head [V, D] are dealt."""
    return max(1, min(SHARES, V, V * D // SMALL))


def readable(x: Tensor) -> bool:
    """Does the tensor hold numbers? Meta tensors and those of a tracer hold none."""
    return type(x) in (Tensor, nn.Parameter) and not x.is_meta


def referred(x: Tensor) -> Tensor:
    """The tensor itself, so that a write under its `.data` is seen. The result of an operation is
    detached from its graph."""
    return x if x.is_leaf else x.detach()


def _kind(weight: Tensor, bias: Tensor | None) -> Kind:
    return tuple(None if x is None else (tuple(x.shape), x.dtype) for x in (weight, bias))


def _memory(x: Tensor | None) -> Memory | None:
    """Which memory a tensor is, and how many writes to it torch has counted."""
    if x is None:
        return None
    return x.data_ptr(), x.stride(), None if x.is_inference() else x._version


def odd(i: Tensor) -> Tensor:
    """Pseudo-random odd int64, the same on every device. Products wrap."""
    x = i * -0x61C8864680B583EB
    x = (x ^ (x >> 31)) * -0x3B314601E57A13AD
    return (x ^ (x >> 29)) | 1


def _bits(x: Tensor) -> Tensor:
    """The bits as integers.

    Trap: a sign in fp64 is bit 63. Modulo 2^64 that bit times any odd number is itself, so two
    changed signs would cancel. The upper half of fp64 therefore also goes into the lower half.
    """
    x = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return x ^ ((x >> 32) & 0xFFFFFFFF) if x.dtype == torch.int64 else x


@torch.no_grad()
def _rows(weight: Tensor, bias: Tensor | None, rows: slice, first: int) -> Iterator[Tensor]:
    """For the rows v of a slice, r_v * sum_d c_d * bits(W_vd): [n] int64 for each piece. r counts
    from `first`."""
    V, D = weight.shape
    columns = odd(torch.arange(D + 1, device=weight.device))
    start, _, step = rows.indices(V)
    # a piece stays in the cache
    most = max(1, (2**16 if weight.device.type == "cpu" else 2**22) // max(D, 1)) * step
    for at in range(start, V, most):
        piece = slice(at, min(at + most, V), step)
        sums = (_bits(weight[piece]) * columns[:D]).sum(1)
        if bias is not None:
            sums += _bits(bias[piece]) * columns[D]
        number = torch.arange(-1 - at, -1 - piece.stop, -step, device=weight.device)
        yield sums.mul_(odd(number - first))


def _sums(weight: Tensor, bias: Tensor | None, first: int) -> Tensor:
    V, D = weight.shape
    K = shares(V, D)
    # Allocate all rows at once. Many small tensors would lie between the large ones that are freed
    # and allocated again.
    rows, at = torch.zeros(V + -V % K, dtype=torch.int64, device=weight.device), 0
    for part in _rows(weight, bias, slice(0, None, 1), first):
        rows[at : at + len(part)] = part
        at += len(part)
    return rows.view(-1, K).sum(0).cpu()
