"""What the fused loss refuses, one sentence each, and which head's options count."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from ..kernels.inputs import Head, same
from .head import LARGEST, is_real, number
from .teacher import TeacherCache


class Default(float):
    """A float that the caller did not pass: the teacher's value counts where there is a teacher."""


def check_types(
    labels: object,
    teacher: object,
    ce_weight: object,
    kl_weight: object,
    alpha: object,
    beta: object,
    ignore_index: object,
) -> None:
    """Raises ValueError for an argument of another type, and for a factor out of range."""
    if not (isinstance(ignore_index, Integral) and -(2**63) <= int(ignore_index) < 2**63):
        raise ValueError(f"ignore_index is {ignore_index}: it must be a whole number of 64 bits.")
    for name, x in (("labels", labels), ("ce_weight", ce_weight), ("kl_weight", kl_weight)):
        if not isinstance(x, Tensor) and (x is not None or name == "labels"):
            raise ValueError(f"{name} must be a tensor, but is a {type(x).__name__}.")
    if not isinstance(teacher, TeacherCache | None):
        raise ValueError(
            f"teacher must be a TeacherCache, but is a {type(teacher).__name__}: see "
            "TeacherCache.from_hidden."
        )
    for name, factor in (("alpha", alpha), ("beta", beta)):
        if isinstance(factor, Tensor) and factor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but the loss has no gradient by it: weigh ce and kl with "
                "'none' yourself."
            )
        if isinstance(factor, Tensor) and factor.numel() != 1:
            raise ValueError(f"{name} must be one number, but has shape {list(factor.shape)}.")
        if isinstance(factor, Tensor) or is_real(factor):
            if 0 <= factor <= LARGEST:
                continue
        raise ValueError(f"{name} is {factor}: it must be a finite number of at least 0.")


def settled_head(
    head_weight: Tensor,
    teacher: TeacherCache | None,
    head_bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    temperature: float,
) -> tuple[Head, float]:
    """The student's head and the temperature; the teacher's options stand in for those that the
    caller did not pass. Raises ValueError where the two disagree."""
    scale, tau = number("logit_scale", logit_scale), number("temperature", temperature)
    softcap = None if logit_softcap is None else number("logit_softcap", logit_softcap)
    if teacher is None:
        return Head(head_weight, head_bias, float(scale), softcap), float(tau)
    for name, x in (("logit_scale", scale), ("logit_softcap", softcap), ("temperature", tau)):
        theirs = getattr(teacher, name)
        passed = not isinstance(x, Default) and not (x is None and name == "logit_softcap")
        if passed and x != theirs:
            raise ValueError(
                f"{name} is {x} but the teacher's is {theirs}: build the teacher's cache with "
                "the same."
            )
    bias = _settled_bias(head_weight, teacher, head_bias)
    return Head(head_weight, bias, teacher.logit_scale, teacher.logit_softcap), teacher.temperature


def check_derivatives(*tensors: Tensor | None) -> None:
    """Raises ValueError in forward-mode differentiation, where the loss would count as constant."""
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return
    unpack = torch.autograd.forward_ad.unpack_dual
    if any(x is not None and unpack(x).tangent is not None for x in tensors):
        raise ValueError(
            "fused_dmk_ce has no derivative in forward mode (jvp, dual numbers): use backward()."
        )


def _settled_bias(
    head_weight: Tensor, teacher: TeacherCache, head_bias: Tensor | None
) -> Tensor | None:
    theirs = teacher.head_bias
    if theirs is None:
        if head_bias is None:
            return None
        raise ValueError(
            "head_bias is given but the teacher has none: build the teacher's cache with its "
            "head's bias."
        )
    bias = theirs if head_bias is None else head_bias
    # A bias that trains or belongs to another head may differ from the teacher's. The bias of one
    # frozen head may not.
    frozen = not bias.requires_grad and not torch.compiler.is_compiling()
    if frozen and same(head_weight, teacher.head_weight) and not same(bias, theirs):
        if bias.device != theirs.device or not torch.equal(bias, theirs):
            raise ValueError(
                "head_bias differs from the teacher's under the same head: build the cache with "
                "this bias."
            )
        bias = theirs  # equal, as after loading: then the fast path sees one head
    # The teacher's bias may be the model's own, which trains.
    return bias if bias is head_bias else bias.detach()


def check_rows(
    hidden: Tensor,
    labels: Tensor,
    ignore_index: int,
    weights: Mapping[str, Tensor | None],
    V: int | None,
) -> None:
    """Raises ValueError where labels or weights do not fit the N rows of hidden.

    weights: ce_weight and kl_weight by their names; V: of the whole head, None where not known yet
    """
    N = hidden.shape[0]
    if labels.shape != (N,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [{N}], one per row of hidden, but are {labels.dtype} "
            f"{list(labels.shape)}."
        )
    for name, x in (("labels", labels), *weights.items()):
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{name} is on {x.device} but hidden on {hidden.device}: move one of them."
            )
    if V is not None:
        check_labels(labels, ignore_index, V)
    for name, x in weights.items():
        if x is not None and (x.shape != (N,) or x.is_complex()):
            raise ValueError(
                f"{name} must be bool or float [{N}], one per row of hidden, but is {x.dtype} "
                f"{list(x.shape)}."
            )


def check_labels(labels: Tensor, ignore_index: int, V: int) -> None:
    """Raises ValueError where the CPU sees a label that is no token of the vocabulary."""
    # Reading labels on a GPU would stall it, and fake tensors have none. An index out of range then
    # fails an assertion in the kernel.
    if labels.device.type == "cpu" and type(labels) is Tensor and not torch.compiler.is_compiling():
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= V))]
        if len(wrong):
            raise ValueError(
                f"labels hold {int(wrong[0])}, which is neither in 0..{V - 1} nor "
                f"ignore_index={ignore_index}."
            )


def check_teacher(hidden: Tensor, head_weight: Tensor, teacher: TeacherCache) -> None:
    """Raises ValueError where the teacher has other rows, another vocabulary, another device, or a
    head that has changed since its cache was built."""
    N, V = hidden.shape[0], head_weight.shape[0]
    if len(teacher) != N:
        raise ValueError(
            f"The teacher has {len(teacher)} rows but hidden has {N}: index the cache with the "
            "same rows."
        )
    if teacher.head_weight.shape[0] != V:
        raise ValueError(
            f"The teacher's head has V={teacher.head_weight.shape[0]} but head_weight has V={V}: "
            "pad or resize one."
        )
    if teacher.hidden.device != hidden.device or teacher.head_weight.device != hidden.device:
        where = f"The teacher is on {teacher.hidden.device} but hidden on {hidden.device}"
        raise ValueError(f"{where}: use teacher.to(device, head_weight).")
    # Fake tensors (those of a tracer, say) have no numbers to compare.
    real = type(hidden) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    if real and teacher.head_changed():
        raise ValueError(
            "The teacher's head has changed since its cache was built: build it with a frozen "
            "copy of the head."
        )


def device_number(denominator: float | Tensor, name: str) -> tuple[float, Tensor | None]:
    """(its value, None) for a denominator that the host knows, else (0, the number on its device).
    Raises ValueError for what is no finite number of at least 0, as far as the host can see it."""
    if not isinstance(denominator, Tensor):
        _check_number(denominator, name)
        return float(denominator), None
    if denominator.numel() != 1:
        raise ValueError(f"{name} must be one number, but has shape {list(denominator.shape)}.")
    if (
        type(denominator) is Tensor
        and denominator.device.type == "cpu"
        and not torch.compiler.is_compiling()
    ):
        _check_number(float(denominator), name)
        return float(denominator), None
    return 0.0, denominator.detach().reshape(())


def inverse(denominator: float | Tensor, like: Tensor, name: str) -> float | Tensor:
    """1 / denominator, or 0 where the denominator is 0; decided on the device, without a sync.
    Raises ValueError for what is no finite number of at least 0, as far as the host can see it."""
    known, number = device_number(denominator, name)
    if number is None:
        return 0.0 if known == 0 else 1.0 / known
    d = number.to(like.device, like.dtype)
    return torch.where(d == 0, 0.0, 1.0 / torch.where(d == 0, 1.0, d))


def _check_number(x: float, name: str) -> None:
    if not isinstance(x, Real) or not 0 <= x <= LARGEST:
        raise ValueError(f"{name} is {x}: it must be a finite number of at least 0.")
