"""A head's parameter as a plain tensor, however it is sharded (torch's DTensor): gathered, or this
rank's rows of it.

Two kinds of ranks share a head. Ranks of FSDP have other samples each, so they gather the head.
Ranks of tensor parallelism work on the same samples, so each may use its rows alone: a head in
parts. FSDP shards a parameter over the first sharded dimension of its mesh, tensor parallelism over
the next one.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class OwnRows:
    """This rank's rows of a head in parts, of a mesh of tensor-parallel ranks."""

    group: ProcessGroup
    start: int
    stop: int

    def of(self, x: Any, ndim: int) -> Tensor:
        """These rows of a parameter [V, ...]: its shard, or a slice of a parameter that all ranks
        have. The gradient of the latter is summed over the ranks."""
        if not hasattr(x, "full_tensor"):
            return plain(alike(x, self.group), ndim)[self.start : self.stop]
        return plain(x.to_local(), ndim)


def rows_of(weight: Any, under_fsdp: bool) -> OwnRows | None:
    """Which rows of a head this rank has under tensor parallelism; None where it has all, or where
    only FSDP shards it. Raises ValueError for a sharding without such rows."""
    dims = _sharded(weight)[1 if under_fsdp else 0 :]
    if not dims:
        return None
    if len(dims) > 1 or under_fsdp or not weight.placements[dims[0]].is_shard(0):
        raise ValueError(
            f"The head is sharded as {tuple(weight.placements)}, of which no rank has rows of its "
            "own: shard lm_head by rows over one tensor-parallel mesh (ColwiseParallel), or call "
            "head_of without parts, which gathers it."
        )
    group, V = weight.device_mesh.get_group(dims[0]), weight.shape[0]
    each = -(-V // torch.distributed.get_world_size(group))  # as torch.chunk deals rows
    start = min(V, torch.distributed.get_rank(group) * each)
    return OwnRows(group, start, min(V, start + each))


def gathered(x: Any, ndim: int, under_fsdp: bool) -> Tensor:
    """A parameter as one plain tensor, on all ranks.

    While somebody holds what was gathered of a frozen parameter and its shards stay as they were,
    the next call gives the same tensor and gathers nothing. So the loss sees one head for student
    and teacher. All ranks call this together.

    under_fsdp: ranks have other samples, so the gradient is their mean, as FSDP has it
    """
    if not hasattr(x, "full_tensor"):
        return plain(x, ndim)
    if x.requires_grad and torch.is_grad_enabled():
        return plain(x.full_tensor(grad_placements=_of_gradient(x, under_fsdp)), ndim)
    with torch.no_grad():
        shard = x.to_local()
        state = shard.data_ptr(), shard._version
        held, seen = _gathered.get(x, (None, None))
        full = held() if held is not None and seen == state else None
        if not _everywhere(x, full is not None):
            full = x.full_tensor()
            _gathered[x] = weakref.ref(full), state
        assert full is not None
        return plain(full, ndim)


_gathered: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _everywhere(x: Any, here: bool) -> bool:
    """Is `here` true on all ranks that shard x?"""
    answer = torch.tensor(int(here), device=x.to_local().device)
    for dim in _sharded(x):
        group = x.device_mesh.get_group(dim)
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MIN, group=group)
    return bool(answer)


def _sharded(x: Any) -> list[int]:
    """The dimensions of its mesh over which a DTensor is sharded; none for a plain tensor."""
    if not hasattr(x, "placements"):
        return []
    return [i for i, placement in enumerate(x.placements) if not placement.is_replicate()]


def _of_gradient(x: Any, under_fsdp: bool) -> list[Any]:
    """How the gradient by a gathered x lies on the mesh: FSDP's ranks have parts of a mean."""
    from torch.distributed.tensor import Partial, Replicate

    fsdp = _sharded(x)[0] if under_fsdp and _sharded(x) else -1
    return [Partial("avg") if dim <= fsdp else Replicate() for dim in range(x.device_mesh.ndim)]


def plain(x: Any, ndim: int) -> Tensor:
    """A parameter that is one float tensor on a device. Raises ValueError where it is none."""
    if type(x) not in (Tensor, nn.Parameter) or not x.dtype.is_floating_point:
        raise ValueError(
            f"The head's weight is quantised ({type(x).__name__}, {x.dtype}): load the model "
            "with a plain head."
        )
    if x.is_meta or x.ndim != ndim:
        where = "offloaded" if x.is_meta else f"partitioned, here {list(x.shape)}"
        raise ValueError(
            f"The head's weight is {where}: keep the head on a device, or gather it before this "
            "call."
        )
    return x


def alike(x: Any, group: ProcessGroup) -> Tensor:
    """A parameter that all ranks of the group have alike, a DTensor or not, for a product with
    their own rows: each rank finds a part of its gradient, and the ranks add them up."""
    if hasattr(x, "full_tensor"):
        x = x.full_tensor()
    found: Tensor = _Alike.apply(x, group) if x.requires_grad and torch.is_grad_enabled() else x
    return found


class _Alike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        g = g.contiguous().clone()
        torch.distributed.all_reduce(g, group=ctx.group)
        return g, None
