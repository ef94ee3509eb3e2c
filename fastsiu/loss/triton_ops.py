"""The loss in Triton: an autograd function for eager code, an operator for torch.compile.

Both do the same. An operator of Python costs 300 us per call, more than the kernels take at 64
rows; a compiler needs one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from ..kernels.inputs import Head, Teacher, same
from .checks import device_number

NO_SECOND = "fused_dmk_ce has no second derivative: use backend='reference' for create_graph=True."


class Operands(NamedTuple):
    """The tensors of the operator, in the order of its schema; the teacher's are None without a
    teacher."""

    hidden: Tensor  # [N, D]
    head_weight: Tensor  # [V, D]
    head_bias: Tensor | None  # [V]
    labels: Tensor  # [N] int64
    ce_weight: Tensor | None  # [N] of any dtype; None = ones
    kl_weight: Tensor | None
    ce_denominator: Tensor | None  # one number on the device; None: see Options
    kl_denominator: Tensor | None
    t_hidden: Tensor | None  # these as in kernels.inputs.Teacher
    t_m: Tensor | None
    t_C: Tensor | None
    t_lse: Tensor | None
    t_top: Tensor | None
    t_p: Tensor | None
    t_weight: Tensor | None
    t_bias: Tensor | None
    t_keep: Tensor | None


class Options(NamedTuple):
    """The numbers of the operator, which its schema takes by keyword.

    alpha, beta       divided already where a denominator is a number on the host
    ce_mean, kl_mean  divide by the sum of the weights
    ahead             a frozen head, and the gradient by hidden is wanted: it is made in the forward
                      pass for an upstream gradient of 1, which then scales it row by row
    trains            the head's gradients are wanted in the backward pass
    entropy           without it the entropy is 0
    vendor            with the products of torch, for one frozen head of both
    """

    alpha: float
    beta: float
    ce_mean: bool
    kl_mean: bool
    renormalize: bool
    logit_scale: float
    logit_softcap: float | None
    temperature: float
    ignore_index: int
    ahead: bool
    trains: bool
    entropy: bool
    vendor: bool


def factor(
    alpha: float, denominator: float | Tensor | None, name: str, mean: bool
) -> tuple[float, Tensor | None, bool]:
    """(alpha, a denominator on the device, does the sum of weights divide?). What the host knows
    goes into alpha, so nothing is copied to the device. Raises ValueError for what is no finite
    number of at least 0, as far as the host can see it."""
    if not mean:
        return alpha, None, False
    if denominator is None:
        return alpha, None, True
    known, number = device_number(denominator, name)
    if number is None:
        return (0.0 if known == 0 else alpha / known), None, False
    return alpha, number, False


def triton_dmk_ce(given: Operands, how: Options) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows u CE + w KL [N] with a graph; and CE, KL and entropy [N] if `how.entropy`."""
    if torch.compiler.is_compiling():
        rows, ce, kl, H, *_ = operator(*given, **how._asdict())
        return rows, (ce, kl, H)
    found = Loss.apply(how, given, given.hidden, given.head_weight, given.head_bias)
    return (found[0], found[1:]) if how.entropy else (found, ())


def _parts(given: Operands, how: Options) -> tuple[Head, Teacher | None, bool]:
    """The head, the teacher, and whether they share weight and bias."""
    head = Head(given.head_weight, given.head_bias, how.logit_scale, how.logit_softcap)
    _, _, _, _, _, _, _, _, hidden, m, C, lse, top, p, weight, bias, keep = given
    if hidden is None or weight is None:
        return head, None, True
    assert m is not None and C is not None and lse is not None
    assert top is not None and p is not None
    theirs = Head(weight, bias, how.logit_scale, how.logit_softcap)
    one_head = same(head.weight, weight) and same(head.bias, bias)
    teacher = Teacher(hidden, m, C, lse, top, p, theirs, keep, how.renormalize, how.temperature)
    return head, teacher, one_head


def _forward(given: Operands, how: Options) -> tuple[Tensor, Tensor | None, Any]:
    """[4, N]: rows, CE, KL and entropy; dh if `ahead`; and the state of the backward pass if
    `trains`."""
    from ..kernels import triton_frozen, triton_general, triton_rows  # not every machine has triton

    head, teacher, one_head = _parts(given, how)
    weights = triton_rows.Weights(
        how.alpha, how.beta, given.ce_weight, given.kl_weight, given.ce_denominator,
        given.kl_denominator, how.ce_mean, how.kl_mean, how.ignore_index,
    )  # fmt: skip
    if one_head and not how.trains and (teacher is None or how.logit_softcap is None):
        return *triton_frozen.frozen(
            given.hidden,
            head,
            given.labels,
            teacher,
            weights,
            how.ahead,
            how.entropy,
            how.vendor,
        ), None
    return triton_general.forward(
        given.hidden, head, given.labels, teacher, weights, one_head, how.ahead, how.trains,
        how.entropy,
    )  # fmt: skip


def _backward(
    given: Operands, how: Options, state: Any, g: Tensor, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh, dW and db of a head that trains."""
    from ..kernels import triton_general

    head, teacher, one_head = _parts(given, how)
    return triton_general.backward(head, given.labels, teacher, state, g, one_head, *need)


def _scaled(dh: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """g dh, rounded once."""
    if dtype == dh.dtype:
        return dh * g[:, None]
    return torch.mul(dh, g[:, None], out=dh.new_empty(dh.shape, dtype=dtype))


class Loss(torch.autograd.Function):
    """Only what may have a gradient is an argument of its own: autograd looks at each of them."""

    @staticmethod
    def forward(
        ctx: Any,
        how: Options,
        given: Operands,
        hidden: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
    ) -> Tensor | tuple[Tensor, ...]:
        found, dh, state = _forward(given, how)
        ctx.how, ctx.dtype = how, hidden.dtype
        if how.ahead:
            ctx.save_for_backward(dh)
        elif how.trains:
            ctx.save_for_backward(*state, *given)
        ctx.set_materialize_grads(False)
        if not how.entropy:
            return found[0]
        rows, *parts = found.unbind(0)
        ctx.mark_non_differentiable(*parts)
        return rows, *parts

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        if g is None or not (ctx.how.ahead or ctx.how.trains):
            return None, None, None, None, None
        if ctx.how.ahead:
            (dh,) = ctx.saved_tensors
            return None, None, _scaled(dh, g, ctx.dtype), None, None
        from ..kernels.triton_general import Settled

        saved = ctx.saved_tensors
        state, given = Settled(*saved[:5]), Operands(*saved[5:])
        need = ctx.needs_input_grad[2:]
        return None, None, *_backward(given, ctx.how, state, g, need)


# --------------------------------------------------------------------------------------------------
# for torch.compile

_TENSORS = (
    "Tensor hidden, Tensor head_weight, Tensor? head_bias, Tensor labels, Tensor? ce_weight, "
    "Tensor? kl_weight, Tensor? ce_denominator, Tensor? kl_denominator, "
    "Tensor? t_hidden, Tensor? t_m, Tensor? t_C, Tensor? t_lse, Tensor? t_top, Tensor? t_p, "
    "Tensor? t_weight, Tensor? t_bias, Tensor? t_keep"
)
_OPTIONS = (
    "float alpha, float beta, bool ce_mean, bool kl_mean, bool renormalize, float logit_scale, "
    "float? logit_softcap, float temperature, SymInt ignore_index, bool ahead, bool trains, "
    "bool entropy, bool vendor"
)


# Trap: torch.compile's caches on disk know an operator by its name and not by its schema. A new
# schema takes a new name.
@library.custom_op(
    "fastsiu::dmk_ce_triton_v1",
    mutates_args=(),
    schema=f"({_TENSORS}, *, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def operator(*tensors: Any, **options: Any) -> tuple[Tensor, ...]:
    """Rows, CE, KL and entropy [N], each in memory of its own; dh [N, D], without rows unless
    `ahead`; and the fields of Settled, without rows unless `trains`."""
    given, how = Operands(*tensors), Options(**options)
    found, dh, state = _forward(given, how)
    rest = list(_empty(given, how))
    if how.ahead and dh is not None:
        rest[0] = dh
    if how.trains:
        h, u, w, lse, still = state
        rest[1:] = [h, u.clone(), w.clone(), lse, still]
    return *(x.clone() for x in found), *rest


@operator.register_fake
def _(*tensors: Any, **options: Any) -> tuple[Tensor, ...]:
    given, how = Operands(*tensors), Options(**options)
    N, acc = len(given.hidden), _accumulation(given)
    four = (given.hidden.new_empty(N, dtype=acc) for _ in range(4))
    return *four, *_empty(given, how)


def _accumulation(given: Operands) -> torch.dtype:
    wide = torch.float64 in (given.hidden.dtype, given.head_weight.dtype)
    return torch.float64 if wide else torch.float32


def _empty(given: Operands, how: Options) -> tuple[Tensor, ...]:
    """dh, h, u, w, lse, still with the shapes that the operator returns."""
    h, acc = given.hidden, _accumulation(given)
    N, D = h.shape
    n = N if how.trains else 0
    return (
        h.new_empty((N if how.ahead else 0, D), dtype=acc),
        h.new_empty((n, D)),
        h.new_empty(n, dtype=acc),
        h.new_empty(n, dtype=acc),
        h.new_empty((2, n), dtype=torch.float64),
        h.new_empty(n, dtype=torch.int8),
    )


@library.custom_op(
    "fastsiu::dmk_ce_triton_backward_v1",
    mutates_args=(),
    schema="(Tensor h, Tensor u, Tensor w, Tensor lse, Tensor still, Tensor g, "
    f"{_TENSORS}, *, {_OPTIONS}, bool need_h, bool need_W, bool need_b) -> "
    "(Tensor, Tensor, Tensor)",
)
def backward_operator(
    h: Tensor,
    u: Tensor,
    w: Tensor,
    lse: Tensor,
    still: Tensor,
    g: Tensor,
    *tensors: Any,
    need_h: bool,
    need_W: bool,
    need_b: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh [N, D], dW [V, D] and db [V]; those not needed have no rows."""
    from ..kernels.triton_general import Settled

    given, how = Operands(*tensors), Options(**options)
    made = _backward(given, how, Settled(h, u, w, lse, still), g, (need_h, need_W, need_b))
    rooms = _gradients(given, False, False, False)
    dh, dW, db = (room if x is None else x for x, room in zip(made, rooms, strict=True))
    return dh, dW, db


@backward_operator.register_fake
def _(
    *tensors: Any, need_h: bool, need_W: bool, need_b: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(Operands(*tensors[6:]), need_h, need_W, need_b)


def _gradients(
    given: Operands, need_h: bool, need_W: bool, need_b: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients: contiguous whatever the strides, without rows if not needed."""
    bias = given.hidden[:, 0] if given.head_bias is None else given.head_bias
    made = [
        x.new_empty((x.shape[0] if needed else 0, *x.shape[1:]))
        for x, needed in ((given.hidden, need_h), (given.head_weight, need_W), (bias, need_b))
    ]
    return made[0], made[1], made[2]


def _setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]
) -> None:
    _, _, _, _, dh, *state = output
    ctx.how, ctx.dtype = Options(**keyword_only_inputs), inputs[0].dtype
    ctx.save_for_backward(dh, *state, *(inputs if ctx.how.trains else ()))
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, g: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND)
    none = (None,) * (len(Operands._fields) - 3)
    if g is None or not (ctx.how.ahead or ctx.how.trains):
        return None, None, None, *none
    dh, *saved = ctx.saved_tensors
    if ctx.how.ahead:
        return (dh * g[:, None]).to(ctx.dtype), None, None, *none
    need_h, need_W, need_b, *_ = ctx.needs_input_grad
    need = dict(need_h=need_h, need_W=need_W, need_b=need_b)
    made = backward_operator(*saved[:5], g, *saved[5:], **ctx.how._asdict(), **need)
    return *(x if needed else None for x, needed in zip(made, need.values(), strict=True)), *none


operator.register_autograd(_differentiate, setup_context=_setup)
