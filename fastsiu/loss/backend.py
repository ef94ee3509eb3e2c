"""Which backend computes a loss, and why another one cannot.

`chosen` is what runs; `why_not` is the sentence for a backend that was asked for. The choice itself
is a pure function of shape, dtype and device (kernels/launch.py); here is what depends on the
machine: the GPU, the processor, a compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
from torch import Tensor, nn

from ..kernels import cpu_sweep, triton_launch
from ..kernels.inputs import Head, same
from ..kernels.launch import Launch, launch
from .teacher import TeacherCache

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BACKENDS = ("auto", "reference", "tiled", "triton", "cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LossOptions(TypedDict, total=False):
    """Options of `fused_dmk_ce` that say what is computed, for type checkers."""

    alpha: float | Tensor
    beta: float | Tensor
    ce_weight: Tensor | None
    kl_weight: Tensor | None
    ce_denominator: float | Tensor | None
    kl_denominator: float | Tensor | None
    head_bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None
    temperature: float
    ignore_index: int
    reduction: str
    group: ProcessGroup | None


def chosen(
    hidden: Tensor,
    head_weight: Tensor,
    backend: str = "auto",
    teacher: TeacherCache | None = None,
    head_bias: Tensor | None = None,
) -> Launch:
    """What fused_dmk_ce runs on these tensors: backend, vocabulary tile, and the reason for the
    choice."""
    # Operands of two dtypes are multiplied as fp32, where the Triton kernels are slow.
    target = None
    dtypes = {hidden.dtype, head_weight.dtype}
    if teacher is not None:
        dtypes |= {teacher.hidden.dtype, teacher.head_weight.dtype}
    if hidden.device.type == "cuda" and len(dtypes) == 1 and len(hidden):
        target = _target(hidden.device, hidden.dtype)
    elif hidden.device.type == "cpu":
        target = _processor()
    V, D = head_weight.shape
    plan = launch(len(hidden), V, D, head_weight.dtype, hidden.device.type, target)
    if backend != "auto":
        return plan._replace(backend=backend, why="asked for")
    if plan.backend == "cpu":
        reason = _left_to_tiled(hidden, head_weight, teacher, LossOptions(head_bias=head_bias))
        reason = reason or _cpu_library(log=True)
        if reason is not None:
            return plan._replace(backend="tiled", why=reason)
    if plan.backend == "reference" and torch.compiler.is_compiling():
        return plan._replace(
            backend="tiled", why="one operation to the compiler, where the reference is many"
        )
    return plan


def by_vendor(hidden: Tensor, head: Head, teacher: TeacherCache | None) -> bool:
    """Does `tiled` go through triton_vendor.py? On a GPU where Triton runs, in 16 bit, for one
    frozen head of both."""
    if hidden.device.type != "cuda" or hidden.dtype.itemsize != 2 or not len(hidden):
        return False
    if hidden.dtype != head.weight.dtype or _target(hidden.device, hidden.dtype) is None:
        return False
    if torch.is_grad_enabled() and (
        head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    ):
        return False
    t = teacher
    return t is None or (
        head.softcap is None and same(head.weight, t.head_weight) and same(head.bias, t.head_bias)
    )


@torch.compiler.assume_constant_result
def _target(device: torch.device, dtype: torch.dtype) -> str | None:
    """The GPU's name in triton_launch.TARGETS; None where the Triton kernels cannot run."""
    return triton_launch.target_of(device) if triton_launch.why_not(device, dtype) is None else None


@torch.compiler.assume_constant_result
def _processor() -> str | None:
    return cpu_sweep.processor()


@torch.compiler.assume_constant_result
def _cpu_library(log: bool = False) -> str | None:
    """Why "cpu" has no library on this machine; None if it has one."""
    reason = cpu_sweep.why_no_library()
    if log and reason is not None:
        cpu_sweep.log_once(reason)
    return reason


def _left_to_tiled(
    hidden: Tensor, head_weight: Tensor, teacher: TeacherCache | None, options: LossOptions
) -> str | None:
    """What of these "cpu" has no code for, as one sentence; None if it has it all."""
    bias, softcap = options.get("head_bias"), options.get("logit_softcap")
    tensors = {"hidden": hidden, "head_weight": head_weight}
    if teacher is not None:
        bias = teacher.head_bias if bias is None else bias
        softcap = teacher.logit_softcap
        tensors |= {"the teacher's states": teacher.hidden, "its head": teacher.head_weight}
    dtypes = {x.dtype for x in tensors.values()}
    wide = bias is not None and bias.dtype == torch.float64
    if hidden.device.type != "cpu":
        return f"The backend 'cpu' does not run on {hidden.device}: choose 'auto'."
    if len(dtypes) > 1 or wide or hidden.dtype not in (torch.float32, torch.bfloat16):
        found = ", ".join(f"{name} in {str(x.dtype)[6:]}" for name, x in tensors.items())
        return f"The backend 'cpu' takes fp32 or bf16 throughout, not {found}: choose 'tiled'."
    if torch.is_grad_enabled() and (
        head_weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return "The backend 'cpu' has no gradient for a head that trains: choose 'tiled'."
    if teacher is None:
        return None
    if softcap is not None:
        return "The backend 'cpu' has no softcap beside a teacher: choose 'tiled'."
    real = type(hidden) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    one_head = same(head_weight, teacher.head_weight) if real else True
    if real and not (one_head and same(bias, teacher.head_bias)):
        return "The backend 'cpu' needs one head for student and teacher: choose 'tiled'."
    return None


@torch.compiler.assume_constant_result
def _triton_why_not(device: torch.device, *dtypes: torch.dtype) -> str | None:
    return triton_launch.why_not(device, *dtypes)


def why_not(
    backend: str,
    hidden: Tensor,
    head_weight: Tensor,
    teacher: TeacherCache | None = None,
    **options: Unpack[LossOptions],
) -> str | None:
    """Why `backend` cannot compute this loss, as one sentence; None if it can. Options are those of
    fused_dmk_ce.

    "reference"  plain torch with full logits; any dtype of 16 bit or more, any device
    "tiled"      goes through the vocabulary in tiles and holds no [N, V] tensor; the same dtypes,
                 any device that has fp64
    "triton"     forms the tiles in its own kernels, on a GPU
    "cpu"        C++ for fp32 and bf16: one frozen head of student and teacher without a softcap, or
                 no teacher; the first call compiles it, once on a machine
    "auto"       chooses among these, see `chosen`; "triton" for 16 bit on a GPU; on a CPU "cpu"
                 for large heads where it was measured to be faster (`kernels.launch.CPU`)

    Only "cpu" leaves some options and teachers to "tiled". A head in parts (`group`, or a teacher
    that has one) is computed by "tiled" alone, on CPU and GPU, and "auto" is then "tiled".
    """
    if backend not in BACKENDS:
        return (
            f"The backend {backend!r} is unknown: choose one of {', '.join(map(repr, BACKENDS))}."
        )
    if backend == "tiled" and hidden.device.type == "mps":
        return (
            "The backend 'tiled' keeps a few fp64 numbers per row, which mps has not: move "
            "the tensors to the CPU."
        )
    for name, x in (("hidden", hidden), ("head_weight", head_weight)):
        if x.dtype not in DTYPES:
            return (
                f"The backend {backend!r} does not take {name} in {x.dtype}: convert it to a "
                "16, 32 or 64 bit float."
            )
    in_parts = options.get("group") is not None or (teacher is not None and not teacher.part.whole)
    if in_parts and backend not in ("auto", "tiled"):
        return (
            f"The backend {backend!r} has no code for a head in parts (group): choose 'tiled', or "
            "give the whole head."
        )
    if backend == "triton":
        return _triton_why_not(hidden.device, hidden.dtype, head_weight.dtype)
    if backend == "cpu":
        return _left_to_tiled(hidden, head_weight, teacher, options) or _cpu_library()
    return None
