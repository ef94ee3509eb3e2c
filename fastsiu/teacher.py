"""TeacherCache: what the frozen teacher says at N positions, small enough to keep for every training step."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass, replace
from numbers import Real
from os import PathLike

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .kernels import launch, tiled

FORMAT = "fastsiu-teacher-cache"
VERSION = "2"  # 1 had no top entries
STATISTICS = ("hidden", "m_rest", "C", "lse", "top", "p_top")


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """The teacher at N positions: hidden states and, over the kept vocabulary K, the statistics of P = softmax(z / temperature).

    hidden [N, D]   final hidden states, in their own dtype
    C      [N]      sum_K P(v), fp32 (fp64 for fp64 inputs); 1 when renormalised
    lse    [N]      logsumexp of z / temperature over the vocabulary, over K when renormalised; fp64, the bias is inside
    top    [N, k]   int64: the k = min(16, |K|) most likely kept columns, and p_top [N, k], fp64, their P
    m_rest [N, D]   sum of P(v) W_v over the kept columns that are not in top, like C
    m      [N, D]   a property: sum_K P(v) W_v

    With the student's head being this head, frozen, these replace the teacher's logits (DMK, Eq. 4 of arXiv 2405.12523):

        KL     = temperature^2 * (C * (lse_s - lse) - logit_scale / temperature * <h_s - h, m>)
        dKL/dh = temperature * logit_scale * (C * (Q W) - m)

    The top columns are kept out of m because C Q - P is formed for them one by one: near the teacher, both sums are nearly
    equal and rounded probabilities would leave no correct digit. `head_weight` is a reference, not a copy: a head that
    trains needs a frozen copy here. A softcap breaks the identity (the logits are no longer linear in h); the loss then
    recomputes the teacher's logits from `hidden`, N * D numbers, never N * V.
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
    head_stamp: tuple = ()  # of head and bias when the statistics were made

    @property
    def m(self) -> Tensor:
        m = self.m_rest.clone()
        with torch.no_grad(), torch.autocast(m.device.type, enabled=False):
            tiled.add_rows(m, self.head_weight, self.top, self.p_top)
        return m

    @property
    def is_stale(self) -> bool:
        """Has the head or its bias been written to since the statistics were made?"""
        return self.head_stamp != stamp(self.head_weight, self.head_bias)

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
        """Compute the statistics of teacher hidden states [N, D] under a head [V, D], one vocabulary tile at a time.

        vocab_keep: [V] bool, True = kept (the paper's K_V, Eq. 3); None keeps all
        Raises ValueError where a shape, dtype, device or option cannot be used, or vocab_keep keeps nothing.
        """
        check_head(hidden, head_weight, head_bias, logit_scale, logit_softcap, temperature)
        if hidden.device.type == "mps":
            raise ValueError("A teacher's cache needs a few fp64 numbers per row, which mps has not: make and use it on the CPU.")
        if vocab_keep is not None and not isinstance(vocab_keep, Tensor):
            raise ValueError(f"vocab_keep must be a bool tensor with True = kept, but is a {type(vocab_keep).__name__}.")
        if vocab_keep is not None:
            V = head_weight.shape[0]
            if vocab_keep.dtype != torch.bool or vocab_keep.shape != (V,):
                raise ValueError(
                    f"vocab_keep must be bool [{V}] with True = kept, but is {vocab_keep.dtype} {list(vocab_keep.shape)}."
                )
            if not vocab_keep.any():
                raise ValueError("vocab_keep keeps no token, so no KL is left: keep at least one.")
        with torch.inference_mode(False):  # what is made inside that mode could not be saved for a backward pass
            if vocab_keep is not None:  # all kept is no mask: then C is exactly 1
                vocab_keep = None if vocab_keep.all() else vocab_keep.to(head_weight.device, copy=True)
            hidden = hidden.detach().clone(memory_format=torch.contiguous_format)
            if head_bias is not None:
                head_bias = head_bias.clone() if head_bias.is_inference() else head_bias.detach()
            options = (head_bias, float(logit_scale), logit_softcap, float(temperature))
            made = statistics(hidden, head_weight.detach(), vocab_keep, bool(renormalize), *options)
            marks = stamp(head_weight, head_bias)
            return cls(hidden, *made, head_weight, vocab_keep, bool(renormalize), *options, marks)

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def __getitem__(self, rows) -> TeacherCache:
        """The rows of a slice, an index (int, list or int64 tensor) or a bool mask [N], as a cache; an int keeps one row."""
        if isinstance(rows, tuple):
            raise IndexError(f"rows must be a slice, an int, or one-dimensional, but are {len(rows)} indices.")
        many = isinstance(rows, bool | slice | list) or (isinstance(rows, Tensor) and (rows.ndim > 0 or rows.dtype == torch.bool))
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
                raise IndexError(f"rows must be a slice, an int, or one-dimensional, but have {rows.ndim} dimensions.")
        return replace(self, **{k: getattr(self, k)[rows] for k in STATISTICS})

    def to(
        self, device: torch.device | str | int, head_weight: Tensor | None = None, head_bias: Tensor | None = None
    ) -> TeacherCache:
        """The cache on `device`. Head and bias move too (a second copy, and another head than the model's to the loss) unless
        the model's own, already there, are given."""
        device = torch.device(device)
        move = lambda x: None if x is None else x.to(device)
        tensors = {k: move(getattr(self, k)) for k in (*STATISTICS, "vocab_keep")}
        weight = move(self.head_weight) if head_weight is None else head_weight
        bias = move(self.head_bias) if head_bias is None else head_bias.detach()
        marks = self.head_stamp if weight is self.head_weight and bias is self.head_bias else stamp(weight, bias)
        return replace(self, **tensors, head_weight=weight, head_bias=bias, head_stamp=marks)

    def save(self, path: str | PathLike) -> None:
        """Write everything except the head to one safetensors file."""
        tensors = {k: getattr(self, k) for k in (*STATISTICS, "vocab_keep", "head_bias")}
        tensors = {k: v.contiguous().clone() for k, v in tensors.items() if v is not None}  # clone: slices share storage
        options = {k: getattr(self, k) for k in ("renormalize", "logit_scale", "logit_softcap", "temperature")}
        head = json.dumps(list(self.head_weight.shape))
        save_file(tensors, path, metadata={"format": FORMAT, "version": VERSION, "options": json.dumps(options), "head": head})

    @classmethod
    def load(cls, path: str | PathLike, *, head_weight: Tensor) -> TeacherCache:
        """Read a saved cache onto the head's device. Raises ValueError for another file, version or head."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}): build the cache again.") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a teacher cache: give a file written by TeacherCache.save.")
        if metadata.get("version") != VERSION:
            raise ValueError(f"{path} has cache version {metadata.get('version')}, this is {VERSION}: build the cache again.")
        if list(head_weight.shape) != json.loads(metadata["head"]):
            shapes = f"{metadata['head']}, and not {list(head_weight.shape)}"
            raise ValueError(f"{path} was built with another head than the one given: pass the teacher's own, of shape {shapes}.")
        tensors = {k: v.to(head_weight.device) for k, v in tensors.items()}
        cache = cls(**tensors, head_weight=head_weight, **json.loads(metadata["options"]))
        cache = replace(cache, head_stamp=stamp(head_weight, cache.head_bias))
        if len(cache):  # m is a weighted sum of head rows, so one row of it recognises the head
            options = (cache.head_bias, cache.logit_scale, cache.logit_softcap, cache.temperature)
            made = statistics(cache.hidden[:1], head_weight.detach(), cache.vocab_keep, cache.renormalize, *options)
            again, saved = replace(cache[0], **dict(zip(STATISTICS[1:], made, strict=True))).m, cache[0].m
            if not (again - saved).norm() <= 0.02 * saved.norm() + 1e-6:
                raise ValueError(f"{path} was built with another head than the one given: pass the teacher's own head.")
        return cache


def stamp(*tensors: Tensor | None) -> tuple:
    """What changes when somebody writes to a tensor in place or swaps its data, without reading it."""
    return tuple(None if x is None or x.is_inference() else (x._version, x.dtype, x.shape) for x in tensors)


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
    plan = launch.launch(*hidden.shape[:1], *head_weight.shape, head_weight.dtype, head_weight.device.type)
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
    """Raise ValueError, one sentence each, where hidden states and head do not fit or an option of the head is out of range."""
    for name, x in (("hidden", hidden), ("head_weight", head_weight), ("head_bias", head_bias)):
        if not isinstance(x, Tensor) and not (x is None and name == "head_bias"):
            raise ValueError(f"{name} must be a tensor, but is a {type(x).__name__}.")
    for name, x in (("hidden", hidden), ("head_weight", head_weight)):
        if x.ndim != 2 or not x.dtype.is_floating_point:
            raise ValueError(f"{name} must be a two-dimensional float tensor, but is {x.dtype} {list(x.shape)}.")
    V, D = head_weight.shape
    if hidden.shape[1] != D:
        raise ValueError(f"hidden has D={hidden.shape[1]} but head_weight has D={D}: both must come from one model.")
    if V == 0 or D == 0:
        raise ValueError(f"head_weight is {list(head_weight.shape)}: a head needs at least one token and one feature.")
    if hidden.device != head_weight.device:
        raise ValueError(f"hidden is on {hidden.device} but head_weight on {head_weight.device}: move one of them.")
    if head_bias is not None and (head_bias.shape != (V,) or not head_bias.dtype.is_floating_point):
        raise ValueError(f"head_bias must be a float tensor [{V}], but is {head_bias.dtype} {list(head_bias.shape)}.")
    if head_bias is not None and head_bias.device != head_weight.device:
        raise ValueError(f"head_bias is on {head_bias.device} but head_weight on {head_weight.device}: move one of them.")
    for name, x in (("logit_scale", logit_scale), ("logit_softcap", logit_softcap), ("temperature", temperature)):
        if not (x is None and name == "logit_softcap") and not (isinstance(x, Real) and 0 < x < float("inf")):
            raise ValueError(f"{name} is {x}: it must be a finite number above 0.")
