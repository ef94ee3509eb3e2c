"""The ranks that share a head compare their arguments before they compute: they meet.

Each rank sends one small message that says what it was given. If a rank refuses its arguments, or
has other ones than rank 0, all ranks raise, so that none waits for the others for ever.

On a CPU every call meets. On a GPU a meeting would make the host wait in every step. There only the
first call of each kind meets: calls with the same dtypes, sizes of the head and gradients.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..kernels.parts import Part
from .head import odd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Found = TypeVar("Found")


class Facts(NamedTuple):
    """What must be the same on all ranks, as int64."""

    N: int = 0  # rows
    D: int = 0  # hidden size
    kind: int = 0  # `digest` of dtypes, options, and which gradients are wanted
    content: int = 0  # `content` of the labels, or of the vocabulary mask


class Seat(NamedTuple):
    """What one rank knows after a meeting.

    part:   which rows of the whole head this rank has
    shared: do student and teacher have one head?
    """

    part: Part
    shared: bool


_met: WeakKeyDictionary[ProcessGroup, dict[tuple[int, ...], Seat]] = WeakKeyDictionary()


def check_group(group: object) -> None:
    """Raises ValueError where `group` is no process group that this process belongs to."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError(
            "group is given but torch.distributed is not initialised: call "
            "torch.distributed.init_process_group first, in each process that torchrun starts."
        )
    if group == torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "This process is not in the group: call the loss only on the ranks that share the head."
        )
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(
            f"group must be a torch.distributed.ProcessGroup, but is a {type(group).__name__}: "
            "of a device mesh give mesh.get_group()."
        )


def digest(*described: object) -> int:
    """A checksum of names and numbers that must be the same on all ranks."""
    return zlib.crc32(repr(described).encode())


def content(x: Tensor | None) -> int:
    """A checksum of an integer or bool tensor [n]; 0 for None and for a tensor on "meta"."""
    if x is None or x.is_meta:
        return 0
    return int((x.long() * odd(torch.arange(len(x), device=x.device))).sum()) ^ len(x)


def meet(
    group: ProcessGroup,
    device: torch.device,
    check: Callable[[], Found],
    facts: Callable[[Found], Facts],
    head_weight: object,
    shared: Callable[[Found], bool] | None = None,
) -> tuple[Found, Seat]:
    """Meets the other ranks. Returns what `check` found on this rank, and the rank's seat.

    All ranks of the group call this together.

    check   looks at this rank's arguments; raises ValueError or OSError where it refuses them
    facts   makes of what `check` found what must be the same on all ranks
    shared  tells whether student and teacher have one head, by this rank's rows. Only the loss
            gives it, and only with it later calls of one kind do not meet on a GPU

    Raises ValueError on all ranks if one of them refuses or has other facts.
    """
    problem: ValueError | OSError | None = None
    rows = head_weight.shape[0] if isinstance(head_weight, Tensor) and head_weight.ndim else 0
    here, one_head = Facts(), -1
    try:
        found = check()
        here = facts(found)
        if shared is not None and rows:  # a rank without rows cannot tell
            one_head = int(shared(found))
    except (ValueError, OSError) as error:
        problem = error
    key = (rows, here.D, here.kind, one_head)
    seldom = shared is not None and device.type != "cpu"
    if seldom and problem is None and key in _met.get(group, {}):
        return found, _met[group][key]
    every = _exchange(group, device, (int(problem is not None), rows, one_head, *here))
    if problem is not None:
        raise problem
    for rank, (refused, *_) in enumerate(every):
        if refused:
            raise ValueError(
                f"Rank {rank} of the group refused its arguments, so all ranks stop: see the "
                f"message of rank {rank}."
            )
    _compare([Facts(*numbers) for _, _, _, *numbers in every])
    told = {flag for _, _, flag, *_ in every} - {-1}
    counts, rank = [n for _, n, *_ in every], torch.distributed.get_rank(group)
    if not sum(counts):
        raise ValueError("The head has no rows on any rank of the group: give each rank its part.")
    part = Part(group, sum(counts[:rank]), counts[rank], sum(counts))
    seat = Seat(part, 0 not in told)
    if seldom:
        _met.setdefault(group, {})[key] = seat
    return found, seat


def _compare(every: list[Facts]) -> None:
    """Raises the same ValueError on all ranks where the facts of some rank are not rank 0's."""
    first = every[0]
    for rank, other in enumerate(every):
        for name in ("N", "D"):
            a, b = getattr(first, name), getattr(other, name)
            if a != b:
                raise ValueError(
                    f"The ranks of the group disagree: {name} is {a} on rank 0 but {b} on rank "
                    f"{rank}: give all ranks the same rows of hidden states, and parts of one head."
                )
        if other.kind != first.kind:
            raise ValueError(
                f"Rank {rank} of the group has other dtypes or options than rank 0, or wants other "
                "gradients: call the loss alike on all ranks."
            )
        if other.content != first.content:
            raise ValueError(
                f"Rank {rank} of the group has other labels, or another vocab_keep, than rank 0: "
                "ranks that share a head work on the same rows, so give them the same batch."
            )


def by_first(part: Part, device: torch.device, action: Callable[[], None]) -> None:
    """Runs `action` on the first rank of a head in parts, or here where the head is whole.

    All ranks call this together. Raises OSError on all of them where `action` fails.
    """
    if part.group is None:
        return action()
    problem: OSError | None = None
    if part.first:
        try:
            action()
        except OSError as error:
            problem = error
    failed = any(x for (x,) in _exchange(part.group, device, (int(problem is not None),)))
    if problem is not None:
        raise problem
    if failed:
        raise OSError("Rank 0 of the group could not write the file: see its message.")


def added(part: Part, number: int, device: torch.device) -> int:
    """The sum of `number` over the ranks, modulo 2^64. All ranks call this together."""
    x = torch.tensor(number, dtype=torch.int64, device=device)
    part.sum(x)
    return int(x)


def _exchange(
    group: ProcessGroup, device: torch.device, numbers: tuple[int, ...]
) -> list[list[int]]:
    """The numbers of each rank, in the order of the ranks: 8 bytes each."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(every, mine, group=group)
    return torch.stack(every).tolist()
