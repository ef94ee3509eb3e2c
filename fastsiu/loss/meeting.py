"""The ranks that share a head meet: before anything large is sent, one small message from each says
what it was given. Where a rank refuses its arguments or has other ones, all ranks raise.

On a CPU every call meets. On a GPU the host would have to wait for the answer in every step, so
there the first call of each kind meets: the same dtypes, sizes of the head and gradients wanted.
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
    """What all ranks must have alike, as int64."""

    N: int = 0
    D: int = 0
    kind: int = 0  # dtypes, options, which gradients are wanted: `digest` of their names
    content: int = 0  # labels, or the vocabulary mask


class Seat(NamedTuple):
    """What one meeting finds. part: this rank's rows of the whole head; shared: do student and
    teacher have one head?"""

    part: Part
    shared: bool


_met: WeakKeyDictionary[ProcessGroup, dict[tuple[int, ...], Seat]] = WeakKeyDictionary()


def check_group(group: object) -> None:
    """Raises ValueError, one sentence, where `group` is no process group of this process."""
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
    """An int64 of names and numbers that are to be the same on all ranks."""
    return zlib.crc32(repr(described).encode())


def content(x: Tensor | None) -> int:
    """An int64 of the numbers of an integer or bool tensor [n]; 0 for None and for tensors without
    numbers."""
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
    """What `check` found on this rank, and the rank's seat. All ranks of the group call this.

    check   raises ValueError or OSError for what cannot be used
    facts   what all ranks must have alike
    shared  do student and teacher have one head, as far as this rank's rows can tell? Given by
            the loss alone, whose later calls of one kind do not meet on a GPU

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
    """Raises ValueError, the same on all ranks, where one rank's facts are not rank 0's."""
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
    """Does something on the first rank of a head in parts, for all of them; a whole head's process
    does it itself. Raises OSError on all ranks where the first one fails."""
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
    """The sum of an int64 over the ranks, modulo 2^64."""
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
