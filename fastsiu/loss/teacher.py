"""TeacherCache: what the frozen teacher says at N positions, small enough to keep for every
training step."""

from __future__ import annotations

import errno
import hashlib
import json
import operator
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from numbers import Real
from os import PathLike

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..kernels import launch, tiled

FORMAT = "fastsiu-teacher-cache"
VERSION, READABLE = "3", ("2", "3")  # 1 had no top entries, 2 no digests
STATISTICS = ("hidden", "m_rest", "C", "lse", "top", "p_top")
OPTIONS = ("renormalize", "logit_scale", "logit_softcap", "temperature")

# What a call of the loss reads of the head to find that it was written to behind torch's back: on a
# CPU one of `shares(V, D)` shares; elsewhere all of it at every 64th call, because the answer has
# to be waited for.
SHARES, SMALL, SELDOM = 256, 2**16, 64
LARGEST = sys.float_info.max
# of scale, softcap and temperature, whose square has to be a number, too
LEAST, MOST = (
    1e-100,
    1e100,
)


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """The teacher at N positions: hidden states and, over the kept vocabulary K, the statistics of
    P = softmax(z / temperature).

    hidden [N, D]   final hidden states, in their own dtype
    C      [N]      sum_K P(v), fp32 (fp64 for fp64 inputs); 1 when renormalised
    lse    [N]      logsumexp of z / temperature over the vocabulary, over K when renormalised;
    fp64, the bias is inside
    top    [N, k]   int64: the k = min(16, |K|) most likely kept columns, and p_top [N, k], fp64,
    their P
    m_rest [N, D]   sum of P(v) W_v over the kept columns that are not in top, like C
    m      [N, D]   a property: sum_K P(v) W_v

    With the student's head being this head, frozen, these replace the teacher's logits (DMK, Eq. 4
    of arXiv 2405.12523):

        KL     = temperature^2 * (C * (lse_s - lse) - logit_scale / temperature * <h_s - h, m>)
        dKL/dh = temperature * logit_scale * (C * (Q W) - m)

    The top columns are kept out of m because C Q - P is formed for them one by one: near the
    teacher, both sums are nearly equal and rounded probabilities would leave no correct digit. A
    softcap breaks the identity (the logits are no longer linear in h); the loss then recomputes the
    teacher's logits from `hidden`, N * D numbers, never N * V.

    `head_weight` and `head_bias` are references, not copies: a head that trains needs a frozen copy
    here. The cache knows its head by the head's numbers. Copies (copy, deepcopy, pickle,
    torch.save), moves to a device, and a broadcast of the same numbers (DDP) leave it valid. A
    changed head is told by the loss, with a ValueError:

    - at the next call: an operation in place, another tensor under `.data`, another dtype. That
      call reads the whole head.
    - What is written through `.data`, through NumPy, or to an inference tensor leaves no trace but
      the numbers. On a CPU each call reads every K-th row, in turn, K = min(256, V * D / 65,536),
      at least 1. So a change of all rows, or of K rows in a row, is told at the next call, and a
      change of one row after K calls at the latest; a head of less than 131,072 numbers has K = 1.
      On a GPU a call cannot read without waiting: every 64th call reads all rows.
    - never inside torch.compile: compiled code does not look. `is_stale` reads the whole head.
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
    head_stamp: Stamp | None = (
        None  # of head and bias when the statistics were made; None: as they are now
    )

    def __post_init__(self) -> None:
        if self.head_stamp is None:
            object.__setattr__(self, "head_stamp", stamp(self.head_weight, self.head_bias))

    @property
    def m(self) -> Tensor:
        m = self.m_rest.clone()
        with torch.no_grad(), torch.autocast(m.device.type, enabled=False):
            tiled.add_rows(m, self.head_weight, self.top, self.p_top)
        return m

    @property
    def is_stale(self) -> bool:
        """Have the head's numbers, or its bias's, changed since the statistics were made? Reads all
        of them."""
        return self.head_stamp.differs(self.head_weight, self.head_bias, whole=True)

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
    ) -> TeacherCache:
        """Compute the statistics of teacher hidden states [N, D] under a head [V, D], one
        vocabulary tile at a time.

        vocab_keep: [V] bool, True = kept (the paper's K_V, Eq. 3); None keeps all
        Raises ValueError where a shape, dtype, device or option cannot be used, or vocab_keep keeps
        nothing.
        """
        check_head(hidden, head_weight, head_bias, logit_scale, logit_softcap, temperature)
        for name, x in (("hidden", hidden), ("head_weight", head_weight), ("head_bias", head_bias)):
            if x is not None and x.dtype.itemsize < 2:  # the loss takes none of them either
                raise ValueError(f"{name} is {x.dtype}: convert it to a 16, 32 or 64 bit float.")
        if hidden.device.type == "mps":
            raise ValueError(
                "A teacher's cache needs a few fp64 numbers per row, which mps has not: make and "
                "use it on the CPU."
            )
        if vocab_keep is not None and not isinstance(vocab_keep, Tensor):
            raise ValueError(
                "vocab_keep must be a bool tensor with True = kept, but is a "
                f"{type(vocab_keep).__name__}."
            )
        if vocab_keep is not None:
            V = head_weight.shape[0]
            if vocab_keep.dtype != torch.bool or vocab_keep.shape != (V,):
                raise ValueError(
                    f"vocab_keep must be bool [{V}] with True = kept, but is {vocab_keep.dtype} "
                    f"{list(vocab_keep.shape)}."
                )
            if not vocab_keep.any():
                raise ValueError("vocab_keep keeps no token, so no KL is left: keep at least one.")
        # what is made inside that mode could not be saved for a backward pass
        with torch.inference_mode(False):
            if vocab_keep is not None:  # all kept is no mask: then C is exactly 1
                vocab_keep = (
                    None if vocab_keep.all() else vocab_keep.to(head_weight.device, copy=True)
                )
            hidden = hidden.detach().clone(memory_format=torch.contiguous_format)
            if head_bias is not None:
                head_bias = head_bias.clone() if head_bias.is_inference() else _referred(head_bias)
            softcap = None if logit_softcap is None else float(logit_softcap)
            options = (head_bias, float(logit_scale), softcap, float(temperature))
            made = statistics(hidden, head_weight.detach(), vocab_keep, bool(renormalize), *options)
            head_weight = _referred(head_weight)
            return cls(hidden, *made, head_weight, vocab_keep, bool(renormalize), *options)

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def __getitem__(self, rows) -> TeacherCache:
        """The rows of a slice, an index (int, list or int64 tensor) or a bool mask [N], as a cache;
        an int keeps one row."""
        if isinstance(rows, tuple):
            raise IndexError(
                f"rows must be a slice, an int, or one-dimensional, but are {len(rows)} indices."
            )
        many = isinstance(rows, bool | slice | list) or (
            isinstance(rows, Tensor) and (rows.ndim > 0 or rows.dtype == torch.bool)
        )
        if not many:
            rows = operator.index(rows)
            if not -len(self) <= rows < len(self):
                raise IndexError(f"row {rows} is out of range: the cache has {len(self)} rows.")
            rows = slice(rows % len(self), rows % len(self) + 1)
        elif not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.hidden.device)
            if rows.numel() == 0 and rows.dtype.is_floating_point:  # an empty list
                rows = rows.long()
            if rows.ndim != 1:
                raise IndexError(
                    f"rows must be a slice, an int, or one-dimensional, but have {rows.ndim} "
                    "dimensions."
                )
        return replace(self, **{k: getattr(self, k)[rows] for k in STATISTICS})

    def to(
        self,
        device: torch.device | str | int,
        head_weight: Tensor | None = None,
        head_bias: Tensor | None = None,
    ) -> TeacherCache:
        """The cache on `device`. Head and bias move too (a second copy, and another head than the
        model's to the loss) unless the model's own, already there, are given. Whether they are the
        cache's own the loss finds out, at its next call."""
        device = torch.device(device)

        def move(x: Tensor | None) -> Tensor | None:
            there = None if x is None else x.to(device)
            return x if there is x else there.detach()

        tensors = {k: move(getattr(self, k)) for k in (*STATISTICS, "vocab_keep")}
        weight = move(self.head_weight) if head_weight is None else _referred(head_weight)
        bias = move(self.head_bias) if head_bias is None else _referred(head_bias)
        return replace(self, **tensors, head_weight=weight, head_bias=bias)

    def save(self, path: str | PathLike) -> None:
        """Write everything except the head to one safetensors file."""
        tensors = {k: getattr(self, k) for k in (*STATISTICS, "vocab_keep", "head_bias")}
        head = dict(
            zip(("head", "head_dtype", "head_digest"), self.head_stamp.words(), strict=True)
        )
        options = {"options": json.dumps({k: getattr(self, k) for k in OPTIONS})}
        write_tensors(
            path,
            {k: x for k, x in tensors.items() if x is not None},
            FORMAT,
            VERSION,
            head | options,
        )

    @classmethod
    def load(cls, path: str | PathLike, *, head_weight: Tensor) -> TeacherCache:
        """Read a saved cache onto the head's device.

        head_weight: [V, D], the head that the cache was built with; in another dtype it is
        recognised by three rows that are
                     made again, in its own by every bit
        Raises ValueError for another file, version or head, and for a file that is damaged in any
        way: a digest of everything is in it. (Files of version 2 have none: of those, what is
        impossible is told, and three rows are made again.) Raises FileNotFoundError where there is
        no file.
        """
        if (
            not isinstance(head_weight, Tensor)
            or head_weight.ndim != 2
            or not head_weight.dtype.is_floating_point
        ):
            raise ValueError(
                "head_weight must be a two-dimensional float tensor: pass the teacher's own head."
            )
        if not _readable(head_weight):
            raise ValueError(
                f"head_weight on {head_weight.device} has no numbers: load the model onto a "
                "device first."
            )
        file = read_tensors(
            path,
            FORMAT,
            READABLE,
            "a teacher cache",
            "TeacherCache.save",
            dict(hidden=FLOATS, m_rest=WIDE, C=WIDE, lse=WIDE[1:], top=INTEGERS, p_top=WIDE[1:]),
            dict(vocab_keep=("BOOL",), head_bias=FLOATS),
        )
        damaged = ValueError(f"{path} is damaged: build the cache again.")
        try:
            shape, options = json.loads(file.metadata["head"]), json.loads(file.metadata["options"])
        except (KeyError, ValueError, RecursionError) as error:
            raise damaged from error
        if shape != list(head_weight.shape):
            written = (
                f"of shape {shape}, " if isinstance(shape, list) and len(str(shape)) < 40 else ""
            )
            raise ValueError(
                f"{path} was built with another head than the one given: pass the teacher's own, "
                f"{written}and not {list(head_weight.shape)}."
            )
        if not _possible(file.tensors, options, head_weight):
            raise damaged
        options = {k: float(x) if type(x) is int else x for k, x in options.items()}
        with torch.inference_mode(False):
            tensors = {k: x.to(head_weight.device, copy=True) for k, x in file.tensors.items()}
            cache = cls(**tensors, head_weight=_referred(head_weight), **options)
        written = tuple(file.metadata.get(key) for key in ("head", "head_dtype", "head_digest"))
        if file.version != "2" and None in written:
            raise damaged
        known = file.version != "2" and written[1] == str(head_weight.dtype)
        same_head = cache.head_stamp.words() == written if known else cache._remade()
        if not same_head:
            raise ValueError(
                f"{path} was built with another head than the one given: pass the teacher's own "
                "head."
            )
        return cache

    def _remade(self) -> bool:
        """Do three rows come out again? m is a weighted sum of head rows, so it recognises the
        head."""
        N = len(self)
        rows = self[
            [
                n
                for n in sorted({0, N // 2, N - 1})
                if 0 <= n < N and self.hidden[n].isfinite().all()
            ]
        ]
        options = (rows.head_bias, rows.logit_scale, rows.logit_softcap, rows.temperature)
        made = statistics(
            rows.hidden, rows.head_weight.detach(), rows.vocab_keep, rows.renormalize, *options
        )
        again = replace(rows, **dict(zip(STATISTICS[1:], made, strict=True)))
        return not len(rows) or bool(
            ((again.m - rows.m).norm(dim=1) <= 0.02 * rows.m.norm(dim=1) + 1e-6).all()
            and torch.allclose(again.lse, rows.lse, rtol=0.02, atol=0.05)
            and torch.allclose(again.C.double(), rows.C.double(), rtol=0.02, atol=0.02)
            and torch.allclose(again.p_top.sum(1), rows.p_top.sum(1), rtol=0.02, atol=0.02)
        )


# --------------------------------------------------------------------------------------------------
# the head


class Stamp:
    """What a head is known by again: a sum over its numbers' bits. And which memory was last found
    to hold them.

    Of row v, r_v * sum_d c_d * bits(W_vd), with r and c odd and all products modulo 2^64: any order
    of summation, any device and any layout give the same integer, and any one changed bit another.
    The bias counts as one more column. `sums` has one number for each of the K shares: share k is
    the rows k, k + K, k + 2 K, ... What was last seen is not
    copied and not pickled: a copy is other memory. The rows of a cache share one stamp.

    kind  shape and dtype of weight and bias
    sums  [K] int64, on the CPU; None where there are no numbers (meta and fake tensors)
    """

    def __init__(self, kind: tuple, sums: Tensor | None) -> None:
        self.kind, self.sums = kind, sums
        self.seen: dict[
            torch.device, tuple
        ] = {}  # device -> the memory that was found to be the head, there
        self.calls = 0

    def __reduce__(self) -> tuple:
        return Stamp, (self.kind, self.sums)

    def words(self) -> tuple[str, str, str]:
        """Shape, dtype and digest for a file; the digest does not depend on the number of
        shares."""
        (shape, dtype), *_ = self.kind
        return json.dumps(list(shape)), str(dtype), str(int(self.sums.sum()))

    def differs(self, weight: Tensor, bias: Tensor | None, *, whole: bool = False) -> bool:
        """Are these other numbers? All are read if `whole`, or if the memory is not what was seen
        last or was written to by an operation that torch counts; else a part of them, without
        waiting for a device."""
        if self.sums is None or not _readable(weight):
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
                    False  # no number can be read there; the same calls without a graph are checked
                )
            if not torch.equal(_sums(weight, bias), self.sums):
                return True
            self.seen[device] = now
        elif device.type == "cpu":
            share = self.calls % len(self.sums)
            parts = _rows(weight, bias, slice(share, None, len(self.sums)))
            return sum(int(x.sum()) for x in parts) % 2**64 != int(self.sums[share]) % 2**64
        return False


def stamp(weight: Tensor, bias: Tensor | None) -> Stamp:
    """The stamp of a head as it is now; reads all of it once, a piece at a time."""
    if not _readable(weight):
        return Stamp(_kind(weight, bias), None)
    made = Stamp(_kind(weight, bias), _sums(weight, bias))
    made.seen[weight.device] = _memory(weight), _memory(bias)
    return made


def shares(V: int, D: int) -> int:
    return max(1, min(SHARES, V, V * D // SMALL))


def _kind(weight: Tensor, bias: Tensor | None) -> tuple:
    return tuple(None if x is None else (tuple(x.shape), x.dtype) for x in (weight, bias))


def _memory(x: Tensor | None) -> tuple | None:
    """Which memory a tensor is, and how often torch saw it written to."""
    return (
        None if x is None else (x.data_ptr(), x.stride(), None if x.is_inference() else x._version)
    )


def _readable(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and not x.is_meta


def _referred(x: Tensor) -> Tensor:
    """The tensor itself, so that what is put under its .data is seen; without the graph that made
    it, if one did."""
    return x if x.is_leaf else x.detach()


def _odd(i: Tensor) -> Tensor:
    """Pseudo-random odd int64, the same everywhere; products wrap."""
    x = i * -0x61C8864680B583EB
    x = (x ^ (x >> 31)) * -0x3B314601E57A13AD
    return (x ^ (x >> 29)) | 1


def _bits(x: Tensor) -> Tensor:
    """The bits as integers. Of fp64 the upper half also goes into the lower one: modulo 2^64 a sign
    alone, which is the highest bit, is the same times any odd number, and two signs would cancel.
    """
    x = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return x ^ ((x >> 32) & 0xFFFFFFFF) if x.dtype == torch.int64 else x


@torch.no_grad()
def _rows(weight: Tensor, bias: Tensor | None, rows: slice) -> Iterator[Tensor]:
    """For some rows v of the head, r_v * sum_d c_d * bits(W_vd), [n] int64 a piece."""
    V, D = weight.shape
    columns = _odd(torch.arange(D + 1, device=weight.device))
    start, _, step = rows.indices(V)
    # a piece stays in the cache
    most = max(1, (2**16 if weight.device.type == "cpu" else 2**22) // max(D, 1)) * step
    for at in range(start, V, most):
        piece = slice(at, min(at + most, V), step)
        sums = (_bits(weight[piece]) * columns[:D]).sum(1)
        if bias is not None:
            sums += _bits(bias[piece]) * columns[D]
        yield sums.mul_(_odd(torch.arange(-1 - at, -1 - piece.stop, -step, device=weight.device)))


def _sums(weight: Tensor, bias: Tensor | None) -> Tensor:
    V, D = weight.shape
    K = shares(V, D)
    # Made whole at once: many small tensors would lie between the large ones that are freed and
    # made again.
    rows, at = torch.zeros(V + -V % K, dtype=torch.int64, device=weight.device), 0
    for part in _rows(weight, bias, slice(0, None, 1)):
        rows[at : at + len(part)] = part
        at += len(part)
    return rows.view(-1, K).sum(0).cpu()


# --------------------------------------------------------------------------------------------------
# tensors in files

FLOATS = ("F16", "BF16", "F32", "F64")
WIDE, INTEGERS = ("F32", "F64"), ("I64",)


@dataclass(frozen=True)
class TensorFile:
    version: str
    metadata: dict[str, str]
    tensors: dict[str, Tensor]  # on the CPU


def write_tensors(
    path: str | PathLike,
    tensors: dict[str, Tensor],
    form: str,
    version: str,
    metadata: dict[str, str],
) -> None:
    """One safetensors file that has a digest of all that is in it."""
    # clone: slices share storage
    tensors = {k: x.detach().cpu().contiguous().clone() for k, x in tensors.items()}
    metadata = metadata | {"format": form, "version": version}
    save_file(tensors, path, metadata=metadata | {"digest": _digest(tensors, metadata)})


def read_tensors(
    path: str | PathLike,
    form: str,
    versions: Collection[str],
    what: str,
    writer: str,
    needed: dict[str, Collection[str]],
    optional: dict[str, Collection[str]],
) -> TensorFile:
    """What write_tensors wrote, and older versions without a digest.

    needed, optional: names of tensors and the dtypes, as safetensors has them, that they may have
    Raises FileNotFoundError where there is no file, and ValueError, one sentence, for anything
    else.
    """
    name, thing = os.fsdecode(path), what.split()[-1]
    if not os.path.exists(name):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    if not os.path.isfile(name):
        raise ValueError(f"{path} is no file: give one written by {writer}.")
    unreadable = ValueError(
        f"{path} is not a readable safetensors file, or damaged: build the {thing} again."
    )
    damaged = ValueError(f"{path} is damaged: build the {thing} again.")
    try:
        with safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            pieces = {k: file.get_slice(k) for k in file.keys()}
            dtypes = {k: x.get_dtype() for k, x in pieces.items()}
            shapes = [x.get_shape() for x in pieces.values()]
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable from error
    if metadata.get("format") != form:
        raise ValueError(f"{path} is not {what}: give a file written by {writer}.")
    version = metadata.get("version", "")
    if version not in versions:
        named = version if version.isdecimal() and len(version) < 9 else "that is unknown here"
        raise ValueError(
            f"{path} has {thing} version {named}, this is {max(versions)}: build the {thing} again."
        )
    known = needed | optional
    if not set(needed) <= set(dtypes) <= set(known) or any(
        x not in known[k] for k, x in dtypes.items()
    ):
        raise damaged
    # [0, 2^63] is no shape to torch
    if any(len(shape) > 2 or max(shape, default=0) > 2**40 for shape in shapes):
        raise damaged
    try:
        with safe_open(name, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in dtypes}
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable from error
    digest = metadata.pop("digest", None)
    unproven = digest is None and version != max(versions)
    if not unproven and digest != _digest(tensors, metadata):
        raise damaged
    return TensorFile(version, metadata, tensors)


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, and of the metadata."""
    kinds = {k: [str(x.dtype), list(x.shape)] for k, x in tensors.items()}
    made = hashlib.sha256(json.dumps([kinds, metadata], sort_keys=True).encode())
    for _, x in sorted(tensors.items()):
        made.update(x.reshape(-1).view(torch.uint8).numpy())
    return made.hexdigest()


def _possible(tensors: dict[str, Tensor], options: object, head_weight: Tensor) -> bool:
    """Can these be a cache of this head? Shapes, dtypes, ranges; everything but whether the numbers
    are right."""
    (V, D), t, keep = head_weight.shape, tensors, tensors.get("vocab_keep")
    if (
        not isinstance(options, dict)
        or set(options) != set(OPTIONS)
        or type(options["renormalize"]) is not bool
    ):
        return False
    numbers = [options[k] for k in OPTIONS[1:] if k != "logit_softcap" or options[k] is not None]
    if any(type(x) not in (int, float) or not LEAST <= x <= MOST for x in numbers):
        return False
    hidden, N = t["hidden"], t["hidden"].shape[0] if t["hidden"].ndim else -1
    if t["C"].dtype != t["m_rest"].dtype or (
        hidden.dtype == torch.float64 and t["C"].dtype != torch.float64
    ):
        return False
    if keep is not None and (
        keep.shape != (V,) or int(keep.view(torch.uint8).amax()) > 1 or not keep.any()
    ):
        return False
    k = min(16, V if keep is None else int(keep.sum()))
    shapes = dict(
        hidden=(N, D), m_rest=(N, D), C=(N,), lse=(N,), top=(N, k), p_top=(N, k), head_bias=(V,)
    )
    if any(t[name].shape != shape for name, shape in shapes.items() if name in t):
        return False
    if N == 0:
        return True
    top, p, C = t["top"], t["p_top"], t["C"].double()
    if int(top.min()) < 0 or int(top.max()) >= V:
        return False
    # A row of states that are not finite, which a loss may have under a weight of 0, has statistics
    # that are not.
    whole = hidden.to(t["C"].dtype).isfinite().all(1)
    finite = (
        t["lse"].isfinite() & C.isfinite() & t["m_rest"].isfinite().all(1) & p.isfinite().all(1)
    )
    if (whole & ~finite).any() or (~whole & t["lse"].isfinite()).any():
        return False
    top, p, C = top[whole], p[whole], C[whole]
    whole_vocabulary = keep is None or options["renormalize"]
    if (C < 0).any() or (C > 1 + 1e-3).any() or (whole_vocabulary and (C != 1).any()):
        return False
    if (p < 0).any() or (p.sum(1) > C + 1e-3).any():
        return False
    if keep is not None and ((p > 0) & ~keep[top]).any():
        return False
    # a column without mass may be a placeholder
    ordered = top.masked_fill(p <= 0, -1).sort(1).values
    return not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


# --------------------------------------------------------------------------------------------------
# the statistics


def statistics(
    hidden: Tensor,
    head_weight: Tensor,
    vocab_keep: Tensor | None,
    renormalize: bool,
    head_bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """m_rest, C, lse, top and p_top, one vocabulary tile at a time: no [N, V] tensor."""
    plan = launch.launch(
        *hidden.shape[:1], *head_weight.shape, head_weight.dtype, head_weight.device.type
    )
    head = tiled.Head(head_weight, head_bias, logit_scale, logit_softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        return tiled.statistics(hidden, head, vocab_keep, renormalize, temperature, plan.tile)


def check_head(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    temperature: float,
) -> None:
    """Raise ValueError, one sentence each, where hidden states and head do not fit or an option of
    the head is out of range."""
    for name, x in (("hidden", hidden), ("head_weight", head_weight), ("head_bias", head_bias)):
        if not isinstance(x, Tensor) and not (x is None and name == "head_bias"):
            raise ValueError(f"{name} must be a tensor, but is a {type(x).__name__}.")
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
    if V == 0 or D == 0:
        raise ValueError(
            f"head_weight is {list(head_weight.shape)}: a head needs at least one token and one "
            "feature."
        )
    if hidden.device != head_weight.device:
        raise ValueError(
            f"hidden is on {hidden.device} but head_weight on {head_weight.device}: move one of "
            "them."
        )
    if head_bias is not None and (head_bias.shape != (V,) or not head_bias.dtype.is_floating_point):
        raise ValueError(
            f"head_bias must be a float tensor [{V}], but is {head_bias.dtype} "
            f"{list(head_bias.shape)}."
        )
    if head_bias is not None and head_bias.device != head_weight.device:
        raise ValueError(
            f"head_bias is on {head_bias.device} but head_weight on {head_weight.device}: move "
            "one of them."
        )
    for name, x in (
        ("logit_scale", logit_scale),
        ("logit_softcap", logit_softcap),
        ("temperature", temperature),
    ):
        if not (x is None and name == "logit_softcap") and not (
            isinstance(x, Real) and LEAST <= x <= MOST
        ):
            raise ValueError(
                f"{name} is {x}: it must be a finite number above 0, from {LEAST} to {MOST}."
            )
