"""TeacherCache: what the frozen teacher says at N positions, small enough to keep for every training step."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from os import PathLike

import torch
from safetensors import safe_open
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

    @property
    def m(self) -> Tensor:
        m = self.m_rest.clone()
        tiled.add_rows(m, self.head_weight.detach(), self.top, self.p_top)
        return m

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
        if vocab_keep is not None:
            V = head_weight.shape[0]
            if vocab_keep.dtype != torch.bool or vocab_keep.shape != (V,):
                raise ValueError(
                    f"vocab_keep must be bool [{V}] with True = kept, but is {vocab_keep.dtype} {list(vocab_keep.shape)}."
                )
            vocab_keep = vocab_keep.to(head_weight.device)
            if not vocab_keep.any():
                raise ValueError("vocab_keep keeps no token, so no KL is left: keep at least one.")
        hidden = hidden.detach().contiguous()
        head_bias = None if head_bias is None else head_bias.detach()
        options = (head_bias, float(logit_scale), logit_softcap, float(temperature))
        made = statistics(hidden, head_weight.detach(), vocab_keep, bool(renormalize), *options)
        return cls(hidden, *made, head_weight, vocab_keep, bool(renormalize), *options)

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def __getitem__(self, rows) -> TeacherCache:
        """The rows of a slice, an index (int, list or int64 tensor) or a bool mask [N], as a cache; an int keeps one row."""
        if isinstance(rows, int) and not isinstance(rows, bool):
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

    def to(self, device: torch.device | str | int, head_weight: Tensor | None = None) -> TeacherCache:
        """The cache on `device`. The head moves too, unless a head already there is given (a moved head is a second copy)."""
        move = lambda x: None if x is None else x.to(device)
        tensors = {k: move(getattr(self, k)) for k in (*STATISTICS, "vocab_keep", "head_bias")}
        return replace(self, **tensors, head_weight=move(self.head_weight) if head_weight is None else head_weight)

    def save(self, path: str | PathLike) -> None:
        """Write everything except the head to one safetensors file."""
        tensors = {k: getattr(self, k) for k in (*STATISTICS, "vocab_keep", "head_bias")}
        tensors = {k: v.contiguous().clone() for k, v in tensors.items() if v is not None}  # clone: slices share storage
        options = {k: getattr(self, k) for k in ("renormalize", "logit_scale", "logit_softcap", "temperature")}
        save_file(tensors, path, metadata={"format": FORMAT, "version": VERSION, "options": json.dumps(options)})

    @classmethod
    def load(cls, path: str | PathLike, *, head_weight: Tensor) -> TeacherCache:
        """Read a saved cache onto the head's device. Raises ValueError for another file, version or head."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}): build the cache again.") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a teacher cache: give a file written by TeacherCache.save.")
        if metadata.get("version") != VERSION:
            raise ValueError(f"{path} has cache version {metadata.get('version')}, this is {VERSION}: build the cache again.")
        tensors = {k: v.to(head_weight.device) for k, v in tensors.items()}
        cache = cls(**tensors, head_weight=head_weight, **json.loads(metadata["options"]))
        V = cache.head_weight.shape[0]
        sizes = [len(x) for x in (cache.vocab_keep, cache.head_bias) if x is not None]
        if head_weight.ndim != 2 or head_weight.shape[1] != cache.hidden.shape[1] or any(n != V for n in sizes):
            raise ValueError(f"{path} was built with another head than the one given, whose shape is {list(head_weight.shape)}.")
        if len(cache):  # m is a weighted sum of head rows, so one row of it recognises the head
            options = (cache.head_bias, cache.logit_scale, cache.logit_softcap, cache.temperature)
            made = statistics(cache.hidden[:1], head_weight.detach(), cache.vocab_keep, cache.renormalize, *options)
            again, saved = replace(cache[0], **dict(zip(STATISTICS[1:], made, strict=True))).m, cache[0].m
            if not (again - saved).norm() <= 0.02 * saved.norm() + 1e-6:
                raise ValueError(f"{path} was built with another head than the one given: pass the teacher's own head.")
        return cache


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
        if not (x is None and name == "logit_softcap") and not 0 < x < float("inf"):
            raise ValueError(f"{name} is {x}: it must be a finite number above 0.")
