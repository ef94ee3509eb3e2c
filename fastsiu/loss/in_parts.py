"""The loss where the head is in parts, on one rank.

It is the tiled loss of the rank's own rows of the head; kernels/parts.py adds up what the ranks
find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.inputs import Head, same
from . import ops
from .meeting import Facts, Seat, check_group, content, digest, meet
from .teacher import TeacherCache

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Wanted(NamedTuple):
    """Which results are wanted.

    ahead:   the gradient by the hidden states, in the forward pass already
    trains:  the gradients by the head, in the backward pass
    entropy: the student's entropy of each row
    """

    ahead: bool
    trains: bool
    entropy: bool


def group_of(group: ProcessGroup | None, teacher: object) -> ProcessGroup | None:
    """The ranks that share the head: `group`, or the teacher's where it is None.

    Raises ValueError where `group` is no process group.
    """
    if group is not None:
        check_group(group)
        return group
    return teacher.part.group if isinstance(teacher, TeacherCache) else None


def seat_of(
    group: ProcessGroup,
    checked: Callable[[], tuple[Head, float]],
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    teacher: TeacherCache | None,
    settings: tuple[object, ...],
) -> tuple[tuple[Head, float], Seat]:
    """Meets the other ranks. Returns what `checked` found here, and this rank's seat.

    checked:  looks at this rank's arguments; gives head and temperature, or raises ValueError
    settings: further options that must be the same on all ranks

    Raises ValueError on all ranks where one of them cannot go on.
    """

    def check() -> tuple[Head, float]:
        found = checked()
        if teacher is not None:
            _check_same_ranks(group, teacher)
        return found

    def facts(found: tuple[Head, float]) -> Facts:
        head, tau = found
        tensors = [hidden, head.weight, head.bias]
        trains = torch.is_grad_enabled() and [x is not None and x.requires_grad for x in tensors]
        dtypes = [None if x is None else x.dtype for x in tensors]
        theirs = None
        if teacher is not None:
            statistics = (teacher.hidden, teacher.head_weight)
            theirs = teacher.renormalize, [x.dtype for x in statistics]
        kind = digest("loss", trains, dtypes, theirs, head.scale, head.softcap, tau, *settings)
        N, D = hidden.shape
        return Facts(N, D, kind, content(labels) if labels.device.type == "cpu" else 0)

    def one_head(found: tuple[Head, float]) -> bool:
        head, t = found[0], teacher
        return t is None or (same(head.weight, t.head_weight) and same(head.bias, t.head_bias))

    device = hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")
    return meet(group, device, check, facts, head_weight, one_head)


def _check_same_ranks(group: ProcessGroup, teacher: TeacherCache) -> None:
    theirs = teacher.part.group
    if theirs is None:
        raise ValueError(
            "group is given but the teacher's cache has a whole head: build it with "
            "TeacherCache.from_hidden(..., group=group) from this rank's rows of the head."
        )
    ranks = torch.distributed.get_process_group_ranks
    if ranks(theirs) != ranks(group):
        raise ValueError(
            f"group has the ranks {ranks(group)} but the teacher's has {ranks(theirs)}: share both "
            "heads among the same ranks."
        )


@torch.compiler.disable
def dmk_ce_in_parts(
    given: ops.Operands, how: ops.Options, wanted: Wanted, seat: Seat
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows u * CE + w * KL [N] with a graph; CE, KL and entropy [N]. The same on all ranks.

    given: head_weight, head_bias and the teacher's are the rank's rows; labels, t_top and t_keep
           count over the whole head
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _InParts.apply(how, wanted, seat, *given)
    return found


class _InParts(torch.autograd.Function):
    """`ops.tiled_dmk_ce` with its gradient, for one rank."""

    @staticmethod
    def forward(
        ctx: Any, how: ops.Options, wanted: Wanted, seat: Seat, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, ce, kl, entropy, dh, lse = ops.forward(
            ops.Operands(*tensors), how, seat.shared, *wanted, seat.part
        )
        ctx.how, ctx.wanted, ctx.seat, ctx.dtype = how, wanted, seat, tensors[0].dtype
        ctx.save_for_backward(dh, lse, *(tensors if wanted.trains else ()))
        ctx.mark_non_differentiable(ce, kl, entropy)
        return rows, ce, kl, entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(ops.NO_SECOND)
        none: list[Tensor | None] = [None] * len(ops.Operands._fields)
        dh, lse, *tensors = ctx.saved_tensors
        if ctx.wanted.ahead:
            none[0] = (dh * g[:, None]).to(ctx.dtype)
        if ctx.wanted.trains:
            given = ops.Operands(*tensors)
            given = given._replace(u=given.u * g, w=given.w * g)
            needs = ctx.needs_input_grad[3:6]
            seat = ctx.seat
            found = ops.backward(lse, given, ctx.how, seat.shared, needs, seat.part)
            none[:3] = [x if need else None for x, need in zip(found, needs, strict=True)]
        return None, None, None, *none
