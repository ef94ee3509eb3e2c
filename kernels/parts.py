"""A head in parts: each rank of a process group holds some rows of it, and the ranks add up what
they compute from their rows.

All ranks have the same hidden states, labels, weights of rows and teacher statistics. Each rank has
its own rows of the head, its own entries of the bias, and the gradients by these. Outside of this
file a column of the vocabulary has its number in the whole head. A `Part` without a group is a
whole head: it sends nothing and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Part:
    """The rows start, start + 1, ..., start + rows - 1 of a head of V rows, on one rank of `group`.

    rows may be 0, and ranks may have unequal numbers of them. The ranks' rows follow each other in
    the order of the ranks.
    """

    group: ProcessGroup | None = None  # None: one process has the whole head
    start: int = 0
    rows: int = 0
    V: int = 0

    def __deepcopy__(self, memo: object) -> Part:
        return self  # a process group has no copies

    def __reduce__(self) -> tuple[type[Part], tuple[()]]:
        if self.group is None:
            return Part, ()
        raise TypeError(
            "The cache of a head in parts holds a process group, which cannot be pickled: use "
            "save and load."
        )

    @property
    def whole(self) -> bool:
        return self.group is None

    @property
    def first(self) -> bool:
        """Is this the rank that adds what must be added once?"""
        return self.group is None or torch.distributed.get_rank(self.group) == 0

    def vocabulary(self, head_weight: Tensor) -> int:
        """The number of rows of the whole head."""
        return len(head_weight) if self.group is None else self.V

    def owns(self, columns: Tensor) -> Tensor:
        """Which of these columns of the whole head this rank holds."""
        return (columns >= self.start) & (columns < self.start + self.rows)

    def local(self, columns: Tensor) -> Tensor:
        """Columns of the whole head, counted from this rank's first row."""
        return columns if self.group is None else columns - self.start

    def mine(self, x: Tensor | None) -> Tensor | None:
        """This rank's entries of a mask or bias [V]."""
        return x if x is None or self.group is None else x[self.start : self.start + self.rows]

    def all_rows(self, x: Tensor) -> Tensor:
        """A bias [V] from the entries [rows] of each rank."""
        if self.group is None:
            return x
        everything = x.new_zeros(self.V)
        everything[self.start : self.start + self.rows] = x
        self.sum(everything)
        return everything

    def sum(self, x: Tensor) -> None:
        """x becomes the sum over the ranks, bit for bit the same on each."""
        if self.group is not None and x.numel():
            torch.distributed.all_reduce(x, group=self.group)

    def max(self, x: Tensor) -> None:
        """x becomes the largest of the ranks."""
        if self.group is not None and x.numel():
            torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=self.group)

    def together(self, x: Tensor) -> Tensor:
        """[N, k] of each rank, side by side in the order of the ranks: [N, ranks * k]."""
        if self.group is None:
            return x
        size = torch.distributed.get_world_size(self.group)
        everyone = [torch.empty_like(x) for _ in range(size)]
        torch.distributed.all_gather(everyone, x.contiguous(), group=self.group)
        return torch.cat(everyone, 1)


WHOLE = Part()
