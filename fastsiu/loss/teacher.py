"""TeacherCache: what the frozen teacher says at N positions, small enough to keep for every
training step."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor

from ..kernels import head_rows, launch, tiled
from ..kernels.inputs import Head
from ..kernels.parts import WHOLE, Part
from .head import Stamp, check_head, referred, stamp
from .meeting import Facts, check_group, content, digest, meet
from .teacher_file import read_cache, write_cache

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """The teacher at N positions: hidden states and, over the kept vocabulary K, the statistics of
    P = softmax(z / temperature).

    hidden  [N, D]  final hidden states, in their own dtype
    C       [N]     sum_K P(v), fp32 (fp64 for fp64 inputs); 1 when renormalised
    lse     [N]     fp64: logsumexp of z / temperature over the vocabulary, over K when
                    renormalised; the bias is inside
    top     [N, k]  int64: the k = min(16, |K|) most likely kept columns
    p_top   [N, k]  fp64: P at `top`
    m_rest  [N, D]  sum of P(v) W_v over the kept columns that are not in `top`; dtype as C
    m       [N, D]  a property: sum_K P(v) W_v

    Where the student's head is this head, frozen, the statistics replace the teacher's logits (DMK,
    Eq. 4 of arXiv 2405.12523):

        KL     = temperature^2 * (C * (lse_s - lse) - logit_scale / temperature * <h_s - h, m>)
        dKL/dh = temperature * logit_scale * (C * (Q W) - m)

    Near the teacher C (Q W) and m are nearly equal, and their difference would have no correct
    digit if probabilities were rounded. So the loss forms C Q - P for the top columns one by one,
    and m_rest leaves these columns out. A softcap breaks the identity, because the logits are no
    longer linear in h. Then the loss recomputes the teacher's logits from `hidden`: it keeps N * D
    numbers, never N * V.

    Where a head is in parts (`from_hidden(group=...)`), each rank's cache has that rank's rows of
    the head and of its bias. The statistics are those of the whole head, and the same on all ranks.
    A column has its number in the whole head. All ranks call `m`, `save` and `load` together.

    `head_weight` and `head_bias` are references, not copies: give a frozen copy where the head
    trains. The cache recognises its head by the head's numbers. It stays valid through copies
    (copy, deepcopy, pickle, torch.save), moves to a device, and a broadcast of the same numbers
    (DDP). Where the head has changed, the loss raises ValueError:

    - At the next call, after an operation in place, another tensor under `.data`, or another dtype.
      That call reads the whole head.
    - Later, after a write through `.data` or NumPy, or to an inference tensor: only the numbers
      show it. On a CPU each call reads every K-th row, in turn, with K = min(256, V * D / 65,536),
      at least 1. The next call therefore sees a change of all rows, or of K rows in a row, and one
      of the next K calls sees a change of one row. A head of less than 131,072 numbers has K = 1.
      On a GPU a call would have to wait for the answer, so every 64th call reads all rows.
    - Never inside torch.compile: compiled code does not look. `is_stale` reads the whole head.
    """

    hidden: Tensor
    m_rest: Tensor
    C: Tensor
    lse: Tensor
    top: Tensor
    p_top: Tensor
    head_weight: Tensor
    vocab_keep: Tensor | None = None
    renormalize: bool = False
    head_bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    temperature: float = 1.0
    # of head and bias when the statistics were computed; None: of both as they are now
    head_stamp: Stamp | None = None
    part: Part = WHOLE  # which rows of the whole head `head_weight` and `head_bias` are

    def __post_init__(self) -> None:
        if self.head_stamp is None:
            made = stamp(self.head_weight, self.head_bias, self.part.start)
            object.__setattr__(self, "head_stamp", made)

    @property
    def m(self) -> Tensor:
        """[N, D]: sum_K P(v) W_v, in m_rest's dtype."""
        m = self.m_rest.clone()
        with torch.no_grad(), torch.autocast(m.device.type, enabled=False):
            if self.part.whole:
                head_rows.add_rows(m, self.head_weight, self.top, self.p_top)
                return m
            top = torch.zeros_like(m)
            head_rows.add_held_rows(top, self.head_weight, self.top, self.p_top, self.part)
            self.part.sum(top)
        return m + top

    @property
    def is_stale(self) -> bool:
        """Have the numbers of the head or its bias changed since the statistics were computed?
        Reads all of them."""
        return self.head_changed(whole=True)

    def head_changed(self, *, whole: bool = False) -> bool:
        """What one call of the loss sees of `is_stale`: it reads a part of the head unless
        `whole`."""
        return self.stamp.differs(self.head_weight, self.head_bias, whole=whole)

    @property
    def stamp(self) -> Stamp:
        assert self.head_stamp is not None  # since __post_init__
        return self.head_stamp

    @classmethod
    def from_hidden(
        cls,
        hidden: Tensor,
        head_weight: Tensor,
        *,
        vocab_keep: Tensor | None = None,
        renormalize: bool = False,
        head_bias: Tensor | None = None,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        temperature: float = 1.0,
        group: ProcessGroup | None = None,
    ) -> TeacherCache:
        """Computes the statistics of teacher hidden states, one vocabulary tile at a time.

        hidden       [N, D] final hidden states, any float dtype of 16 bit or more
        head_weight  [V, D], the same
        vocab_keep   [V] bool, True = kept (the paper's K_V, Eq. 3); None keeps all
        renormalize  P over the kept vocabulary, not over all of it
        head_bias    [V]; z = softcap * tanh(x / softcap), x = logit_scale * (hidden @ head_weight.T
                     + head_bias)
        temperature  divides z
        group        the ranks that share the head, each with some of its rows, in the order of the
                     ranks: head_weight [V_r, D] and head_bias [V_r] are this rank's, hidden and
                     vocab_keep [V] are the same on all ranks. All of them call this together.

        Raises ValueError where a shape, dtype, device or option cannot be used, or where vocab_keep
        keeps nothing; with a group on all ranks alike.
        """
        options = (logit_scale, logit_softcap, temperature)

        def check() -> None:
            check_head(hidden, head_weight, head_bias, *options, group is not None)
            tensors = dict(hidden=hidden, head_weight=head_weight, head_bias=head_bias)
            for name, x in tensors.items():
                if x is not None and x.dtype.itemsize < 2:  # the loss takes no 8 bit floats either
                    raise ValueError(
                        f"{name} is {x.dtype}: convert it to a 16, 32 or 64 bit float."
                    )
            if hidden.device.type == "mps":
                raise ValueError(
                    "A teacher's cache needs a few fp64 numbers per row, which mps has not: make "
                    "and use it on the CPU."
                )
            if vocab_keep is not None:
                _check_keep(vocab_keep, head_weight.shape[0] if group is None else None)

        part = WHOLE
        if group is None:
            check()
        else:
            check_group(group)
            dtypes = [getattr(x, "dtype", None) for x in (hidden, head_weight, head_bias)]
            kind = digest("teacher", dtypes, renormalize, *options, vocab_keep is None)
            device = hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")
            _, (part, _) = meet(
                group,
                device,
                check,
                lambda _: Facts(len(hidden), hidden.shape[1], kind, content(vocab_keep)),
                head_weight,
            )
            if vocab_keep is not None:
                _check_keep(vocab_keep, part.V)
        # Trap: autograd cannot save an inference tensor for a backward pass.
        with torch.inference_mode(False):
            if vocab_keep is not None:  # a mask that keeps all becomes None: then C is exactly 1
                vocab_keep = (
                    None if vocab_keep.all() else vocab_keep.to(head_weight.device, copy=True)
                )
            hidden = hidden.detach().clone(memory_format=torch.contiguous_format)
            if head_bias is not None:
                head_bias = head_bias.clone() if head_bias.is_inference() else referred(head_bias)
            softcap = None if logit_softcap is None else float(logit_softcap)
            head = Head(head_weight.detach(), head_bias, float(logit_scale), softcap)
            m_rest, C, lse, top, p_top = _statistics(
                hidden, head, vocab_keep, bool(renormalize), float(temperature), part
            )
            return cls(
                hidden,
                m_rest,
                C,
                lse,
                top,
                p_top,
                head_weight=referred(head_weight),
                vocab_keep=vocab_keep,
                renormalize=bool(renormalize),
                head_bias=head_bias,
                logit_scale=float(logit_scale),
                logit_softcap=softcap,
                temperature=float(temperature),
                part=part,
            )

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def __getitem__(
        self, rows: slice | SupportsIndex | list[int] | list[bool] | Tensor
    ) -> TeacherCache:
        """The rows of a slice, an index (int, list or int64 tensor) or a bool mask [N], as a cache.
        An int keeps one row. Raises IndexError for anything else."""
        if isinstance(rows, tuple):
            raise IndexError(
                f"rows must be a slice, an int, or one-dimensional, but are {len(rows)} indices."
            )
        many = isinstance(rows, bool | slice | list) or (
            isinstance(rows, Tensor) and (rows.ndim > 0 or rows.dtype == torch.bool)
        )
        if not many:
            row = operator.index(rows)  # type: ignore[arg-type]  # a Tensor [] of an integer is one
            if not -len(self) <= row < len(self):
                raise IndexError(f"row {row} is out of range: the cache has {len(self)} rows.")
            rows = slice(row % len(self), row % len(self) + 1)
        elif not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.hidden.device)
            if rows.numel() == 0 and rows.dtype.is_floating_point:  # an empty list
                rows = rows.long()
            if rows.ndim != 1:
                raise IndexError(
                    f"rows must be a slice, an int, or one-dimensional, but have {rows.ndim} "
                    "dimensions."
                )
        return self._with_rows(lambda x: x[rows])

    def _with_rows(self, change: Callable[[Tensor], Tensor]) -> TeacherCache:
        """This cache with `change` applied to the tensors that have N rows."""
        return replace(
            self,
            hidden=change(self.hidden),
            m_rest=change(self.m_rest),
            C=change(self.C),
            lse=change(self.lse),
            top=change(self.top),
            p_top=change(self.p_top),
        )

    def to(
        self,
        device: torch.device | str | int,
        head_weight: Tensor | None = None,
        head_bias: Tensor | None = None,
    ) -> TeacherCache:
        """The cache on `device`.

        head_weight, head_bias: the model's own, already on `device`. Without them the cache's head
        moves too: that is a second copy, and to the loss another head than the model's. The next
        call of the loss checks whether they hold the cache's numbers.
        """
        device = torch.device(device)

        def move(x: Tensor) -> Tensor:
            there = x.to(device)
            return x if there is x else there.detach()

        weight = move(self.head_weight) if head_weight is None else referred(head_weight)
        bias = self.head_bias if head_bias is None else referred(head_bias)
        if head_bias is None and bias is not None:
            bias = move(bias)
        keep = None if self.vocab_keep is None else move(self.vocab_keep)
        return replace(self._with_rows(move), vocab_keep=keep, head_weight=weight, head_bias=bias)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes everything except the head to one safetensors file. Of a head in parts all ranks
        call this, and the first one writes the file, which is that of the whole head."""
        write_cache(self, path)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        head_weight: Tensor,
        group: ProcessGroup | None = None,
    ) -> TeacherCache:
        """Reads a saved cache onto the head's device.

        head_weight  [V, D], the head that the cache was built with. In the same dtype every bit of
                     it is compared; in another dtype three rows are computed again.
        group        the ranks that share the head, each with some of its rows, as in `from_hidden`.
                     A file may be read by other ranks than those that wrote it, or by one process.

        Raises FileNotFoundError where there is no file. Raises ValueError for another file, version
        or head, and for a file that is damaged in any way: the file holds a digest of everything in
        it. A file of version 2 holds none: there load refuses impossible numbers and computes three
        rows again.
        """
        return read_cache(cls, path, head_weight, group)

    def comes_out_again(self) -> bool:
        """Do three rows give the same statistics again? m is a weighted sum of head rows, so it
        recognises the head."""
        N = len(self)
        three = [n for n in sorted({0, N // 2, N - 1}) if 0 <= n < N]
        rows = self[[n for n in three if self.hidden[n].isfinite().all()]]
        if not len(rows):
            return True
        head = Head(rows.head_weight.detach(), rows.head_bias, rows.logit_scale, rows.logit_softcap)
        m_rest, C, lse, top, p_top = _statistics(
            rows.hidden, head, rows.vocab_keep, rows.renormalize, rows.temperature, rows.part
        )
        again = replace(rows, m_rest=m_rest, C=C, lse=lse, top=top, p_top=p_top)
        return bool(
            ((again.m - rows.m).norm(dim=1) <= 0.02 * rows.m.norm(dim=1) + 1e-6).all()
            and torch.allclose(again.lse, rows.lse, rtol=0.02, atol=0.05)
            and torch.allclose(again.C.double(), rows.C.double(), rtol=0.02, atol=0.02)
            and torch.allclose(again.p_top.sum(1), rows.p_top.sum(1), rtol=0.02, atol=0.02)
        )


def _statistics(
    hidden: Tensor,
    head: Head,
    keep: Tensor | None,
    renormalize: bool,
    temperature: float,
    part: Part,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """m_rest, C, lse, top and p_top, one vocabulary tile at a time: no [N, V] tensor."""
    V, D = head.weight.shape
    plan = launch.launch(len(hidden), V, D, head.weight.dtype, head.weight.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        return tiled.statistics(hidden, head, keep, renormalize, temperature, plan.tile, part=part)


# --------------------------------------------------------------------------------------------------
# what is refused


def _check_keep(vocab_keep: object, V: int | None) -> None:
    """V: of the whole head; None where it is not known yet."""
    if not isinstance(vocab_keep, Tensor):
        raise ValueError(
            "vocab_keep must be a bool tensor with True = kept, but is a "
            f"{type(vocab_keep).__name__}."
        )
    if V is None and vocab_keep.dtype == torch.bool and vocab_keep.ndim == 1:
        V = len(vocab_keep)
    if vocab_keep.dtype != torch.bool or vocab_keep.shape != (V,):
        raise ValueError(
            f"vocab_keep must be bool [{'V' if V is None else V}] with True = kept, but is "
            f"{vocab_keep.dtype} {list(vocab_keep.shape)}."
        )
    if not vocab_keep.any():
        raise ValueError("vocab_keep keeps no token, so no KL is left: keep at least one.")
