"""A teacher's cache as a file: writes and reads it, and checks what a stranger may have written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor

from ..kernels.parts import WHOLE, Part
from .head import LEAST, MOST, Stamp, readable, referred
from .meeting import Facts, added, by_first, check_group, digest, meet
from .tensor_file import FLOATS, INTEGERS, WIDE, TensorFile, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


FORMAT = "fastsiu-teacher-cache"
VERSION, READABLE = "3", ("2", "3")  # 1 had no top entries, 2 no digests
STATISTICS = ("hidden", "m_rest", "C", "lse", "top", "p_top")
OPTIONS = ("renormalize", "logit_scale", "logit_softcap", "temperature")


class Cache(Protocol):
    """What a file holds of a teacher's cache, beside `STATISTICS` and `OPTIONS`."""

    @property
    def head_weight(self) -> Tensor: ...

    @property
    def head_bias(self) -> Tensor | None: ...

    @property
    def part(self) -> Part: ...

    @property
    def stamp(self) -> Stamp: ...

    def comes_out_again(self) -> bool: ...


C = TypeVar("C", bound=Cache)


def write_cache(cache: Cache, path: str | PathLike[str]) -> None:
    """`TeacherCache.save`"""
    tensors = {k: getattr(cache, k) for k in (*STATISTICS, "vocab_keep", "head_bias")}
    if cache.head_bias is not None:
        tensors["head_bias"] = cache.part.all_rows(cache.head_bias.detach())
    head = dict(zip(("head", "head_dtype", "head_digest"), _words(cache), strict=True))
    options = {"options": json.dumps({k: getattr(cache, k) for k in OPTIONS})}
    present = {k: x for k, x in tensors.items() if x is not None}
    by_first(
        cache.part,
        cache.head_weight.device,
        lambda: write_tensors(path, present, FORMAT, VERSION, head | options),
    )


def _words(cache: Cache) -> tuple[str, str, str]:
    """Shape, dtype and digest of the whole head."""
    shape, dtype, number = cache.stamp.words()
    if cache.part.whole:
        return shape, dtype, number
    number = str(added(cache.part, int(number), cache.head_weight.device))
    return json.dumps([cache.part.V, cache.head_weight.shape[1]]), dtype, number


def read_cache(
    build: Callable[..., C],
    path: str | PathLike[str],
    head_weight: Tensor,
    group: ProcessGroup | None,
) -> C:
    """`TeacherCache.load`; `build` is the class, which takes statistics and options."""

    damaged = ValueError(f"{path} is damaged: build the cache again.")

    def check() -> None:
        if (
            not isinstance(head_weight, Tensor)
            or head_weight.ndim != 2
            or not head_weight.dtype.is_floating_point
        ):
            raise ValueError(
                "head_weight must be a two-dimensional float tensor: pass the teacher's own head."
            )
        if not readable(head_weight):
            raise ValueError(
                f"head_weight on {head_weight.device} has no numbers: load the model onto a "
                "device first."
            )

    def read(part: Part) -> tuple[TensorFile, C]:
        file = read_tensors(
            path,
            FORMAT,
            READABLE,
            "a teacher cache",
            "TeacherCache.save",
            dict(hidden=FLOATS, m_rest=WIDE, C=WIDE, lse=WIDE[1:], top=INTEGERS, p_top=WIDE[1:]),
            dict(vocab_keep=("BOOL",), head_bias=FLOATS),
        )
        try:
            shape, options = (
                json.loads(file.metadata["head"]),
                json.loads(file.metadata["options"]),
            )
        except (KeyError, ValueError, RecursionError) as error:
            raise damaged from error
        whole = [part.vocabulary(head_weight), head_weight.shape[1]]
        if shape != whole:
            short = isinstance(shape, list) and len(str(shape)) < 40
            written = f"of shape {shape}, " if short else ""
            raise ValueError(
                f"{path} was built with another head than the one given: pass the teacher's own, "
                f"{written}and not {whole}."
            )
        if not _possible_options(options) or not _possible(file.tensors, options, *whole):
            raise damaged
        with torch.inference_mode(False):
            t = {k: x.to(head_weight.device, copy=True) for k, x in file.tensors.items()}
            softcap = options["logit_softcap"]
            return file, build(
                t["hidden"],
                t["m_rest"],
                t["C"],
                t["lse"],
                t["top"],
                t["p_top"],
                head_weight=referred(head_weight),
                vocab_keep=t.get("vocab_keep"),
                renormalize=bool(options["renormalize"]),
                head_bias=part.mine(t.get("head_bias")),
                logit_scale=float(options["logit_scale"]),
                logit_softcap=None if softcap is None else float(softcap),
                temperature=float(options["temperature"]),
                part=part,
            )

    if group is None:
        check()
        file, cache = read(WHOLE)
    else:
        check_group(group)
        device = head_weight.device if isinstance(head_weight, Tensor) else torch.device("cpu")
        width = lambda _: Facts(D=head_weight.shape[1], kind=digest("load", head_weight.dtype))
        _, (part, _) = meet(group, device, check, width, head_weight)
        alike = lambda found: Facts(N=len(found[1]), kind=digest(sorted(found[0].metadata.items())))
        (file, cache), _ = meet(group, device, lambda: read(part), alike, head_weight)
    stamped = tuple(file.metadata.get(key) for key in ("head", "head_dtype", "head_digest"))
    if file.version != "2" and None in stamped:
        raise damaged
    comparable = file.version != "2" and stamped[1] == str(head_weight.dtype)
    if not (_words(cache) == stamped if comparable else cache.comes_out_again()):
        raise ValueError(
            f"{path} was built with another head than the one given: pass the teacher's own head."
        )
    return cache


def _possible_options(options: object) -> TypeGuard[dict[str, Any]]:
    """Can these be a cache's options? Names, types and ranges."""
    if not isinstance(options, dict) or set(options) != set(OPTIONS):
        return False
    if type(options["renormalize"]) is not bool:
        return False
    numbers = [options[k] for k in OPTIONS[1:] if k != "logit_softcap" or options[k] is not None]
    return all(type(x) in (int, float) and LEAST <= x <= MOST for x in numbers)


def _possible(t: Mapping[str, Tensor], options: Mapping[str, Any], V: int, D: int) -> bool:
    """Can these tensors be a cache of this head?

    It looks at shapes, dtypes and ranges. It cannot tell whether the numbers are right.
    """
    keep = t.get("vocab_keep")
    hidden, N = t["hidden"], t["hidden"].shape[0] if t["hidden"].ndim else -1
    if t["C"].dtype != t["m_rest"].dtype:
        return False
    if hidden.dtype == torch.float64 and t["C"].dtype != torch.float64:
        return False
    if keep is not None and (
        keep.shape != (V,) or int(keep.view(torch.uint8).amax()) > 1 or not keep.any()
    ):
        return False
    k = min(16, V if keep is None else int(keep.sum()))
    shapes: dict[str, tuple[int, ...]] = dict(
        hidden=(N, D), m_rest=(N, D), C=(N,), lse=(N,), top=(N, k), p_top=(N, k), head_bias=(V,)
    )
    if any(t[name].shape != shape for name, shape in shapes.items() if name in t):
        return False
    if N == 0:
        return True
    top, p, C = t["top"], t["p_top"], t["C"].double()
    if int(top.min()) < 0 or int(top.max()) >= V:
        return False
    # A row whose weights are 0 may have states that are not finite. Then its statistics are not
    # finite either.
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
    return not bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any())
