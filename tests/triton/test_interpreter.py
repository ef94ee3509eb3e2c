"""The Triton kernels against fp64, in Triton's interpreter or on a GPU:   TRITON_INTERPRET=1 pytest
tests/triton

A process of its own: triton reads the variable when it is imported.
"""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip(
    "triton", reason="the Triton kernels need the package triton: pip install 'fastsiu[triton]'"
)
INTERPRETED = triton.knobs.runtime.interpret
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU: run TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

import triton.language as tl  # noqa: E402

from fastsiu import TeacherCache, fused_dmk_ce  # noqa: E402
from fastsiu.kernels import (  # noqa: E402
    head_rows,
    tiled,
    triton_frozen,
    triton_launch,
    triton_sweep,
    triton_tiles,
    triton_vendor,
)
from fastsiu.kernels.inputs import Head  # noqa: E402
from fastsiu.kernels.tiled import Sums  # noqa: E402
from fastsiu.loss import fused  # noqa: E402

torch.set_num_threads(1)
# numpy, in branches that tl.where does not take
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

DEVICE = "cpu" if INTERPRETED else "cuda"
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F64, F32, BF16, F16] if INTERPRETED else [F32, BF16, F16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
IGNORED = -100


def rand(*shape, seed=0, scale=1.0, dtype=F64):
    return (
        (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64))
        .to(dtype)
        .to(DEVICE)
    )


def mask(V, share, seed=0):
    """[V] bool, True for about `share` of the columns and for column 1."""
    keep = (torch.rand(V, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)
    keep[1] = True
    return keep


# --------------------------------------------------------------------------------------------------
# the sweep itself


def problem(N, V, D, dtype, *, k=5, bias=True, scale=1.0, softcap=None, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    W = rand(V, D, seed=seed + 1, scale=spread * D**-0.5, dtype=dtype)
    head = Head(W, rand(V, seed=seed + 2, dtype=dtype) if bias else None, scale, softcap)
    held = torch.stack([torch.randperm(V, generator=g)[: min(k, V)] for _ in range(N)]).to(DEVICE)
    return (
        rand(N, D, seed=seed + 3, dtype=dtype),
        head,
        held,
        (torch.rand(held.shape, generator=g) > 0.2).to(DEVICE),
    )


def sums_of(
    sweep,
    h,
    head,
    held,
    valid,
    dtype,
    *,
    keep=None,
    tau=1.0,
    product=True,
    reference=0.0,
    apart=True,
    tile=128,
    **more,
):
    width = h.shape[1] if product else 0
    start = torch.as_tensor(reference, dtype=F64, device=DEVICE).expand(len(h))
    ones = Sums(start, 1.0, dtype, width, entropy=True)
    sums = [ones] if tau == 1 else [ones, Sums(start, tau, dtype, width)]
    other = (
        Sums(start, sums[-1].tau, dtype, width, entropy=True)
        if keep is not None and apart
        else None
    )
    sweep(h, head, held, valid, keep, sums, other, tile, **more)
    return sums if other is None else [*sums, other]


def numbers(one: Sums, lse: Tensor) -> dict[str, Tensor]:
    """What `shared` reads, with a reference that does not depend on how it was summed."""
    some = one.total > 0
    found = dict(log_total=one.log_total().masked_fill(~some, 0.0))
    if one.entropy is not None:
        found["entropy"] = one.entropy_share(lse).masked_fill(~some, 0.0)
    if one.product is not None:
        found["product"] = one.product.double() * one.share(lse)[:, None]
    return found


def compare(problem, dtype, **options):
    """Against tiled.sweep in fp64: within UNIT of it and twice the error that tiled.sweep has in
    `dtype`. In fp64 that error is 0, because the two are one computation. Both have rounded logits,
    though, and the kernel adds their products in another order. So in fp64 what a rounding of the
    logits may change is allowed as well.

    A logit that is off by d changes log_total by q d, entropy by q (lse - z - 1) d and a product by
    q d W. Over all columns that is at most |d| times 1, entropy + 1 and max |W|. With a softcap its
    slope, 1 - (z / softcap)^2, changes by at most 2 |d| / softcap.
    """
    h, head, held, valid = problem
    wide = Head(
        head.weight.double(),
        None if head.bias is None else head.bias.double(),
        head.scale,
        head.softcap,
    )
    narrow = F64 if dtype == F64 else F32
    off = 0.0
    if narrow == F64:
        off = 2 * logit_error(h.double(), wide) / min(1.0, options.get("tau", 1.0))
    steepest = float(wide.weight.abs().max()) * (1 + (2 / head.softcap if head.softcap else 0))
    want = sums_of(tiled.sweep, h.double(), wide, held, valid, F64, **options)
    rival = sums_of(tiled.sweep, h, head, held, valid, narrow, **options)
    got = sums_of(triton_sweep.sweep, h, head, held, valid, narrow, **options)
    lse = torch.logsumexp(torch.stack([x.log_total() for x in want if x.tau == 1]), 0)
    for truth, ours, theirs in zip(want, got, rival, strict=True):
        assert torch.equal(ours.total > 0, truth.total > 0)
        exact, x, y = (
            numbers(one, lse if one.tau == 1 else truth.log_total())
            for one in (truth, ours, theirs)
        )
        for name, value in exact.items():
            unit = UNIT[dtype] if name == "product" else UNIT[narrow]
            size = value.abs().max() + (name != "product")
            moved = off * (steepest if name == "product" else size)
            error, plain = ((some[name] - value).abs().max() for some in (x, y))
            assert error <= 2 * plain + unit * size + moved + 1e-30, (
                f"{name} at {ours.tau}: {error:.1e}, tiled {plain:.1e}, {size:.1e}"
            )
    return got, want


def logit_error(h, head) -> float:
    """How far a logit in fp64 can be from the exact one, in whatever order its products are added:
    (D + 2) u (|h| |W|^T + |bias|) with u = 2^-53, times |scale|. Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1. A softcap has a slope of at most 1."""
    size = h.abs() @ head.weight.abs().T + (0.0 if head.bias is None else head.bias.abs())
    return float((h.shape[1] + 2) * 2.0**-53 * abs(head.scale) * size.max())


# of the probabilities that are multiplied: fp16 for bf16 as well
UNIT = {
    F64: 1e-14,
    F32: 3e-7,
    BF16: 2**-11,
    F16: 2**-11,
}
SHAPES = [(1, 3, 8), (3, 151, 33), (37, 151, 8), (3, 1003, 96), (17, 64, 64), (16, 65, 1)]


@every_dtype
@pytest.mark.parametrize("N, V, D", SHAPES)
def test_shapes(N, V, D, dtype):
    compare(problem(N, V, D, dtype), dtype)


# fmt: skip
OPTIONS = dict(
    no_product=dict(product=False),
    no_bias=(dict(bias=False), {}),
    scale=(dict(scale=0.3), {}),
    softcap=(dict(softcap=2.0, scale=3.0), {}),
    temperature=dict(tau=2.5),
    cold=dict(tau=0.5),
    keep=dict(keep=0.4),
    keep_and_temperature=dict(keep=0.4, tau=2.0, apart=False),
    three_sums=dict(keep=0.4, tau=2.0),
    dropped_go_nowhere=dict(keep=0.4, apart=False),
    all_kept=dict(keep=1.1),
    one_kept=dict(keep=-1.0),
    everything=(dict(softcap=3.0, scale=2.0), dict(keep=0.7, tau=1.5)),
    seventeen_held=(dict(k=17), {}),
    a_tile_per_chunk=dict(tile=1),
    one_chunk=dict(tile=10**6),
    low_reference=dict(reference=-200.0),
    no_reference=dict(reference=-float("inf")),
    high_reference=dict(reference=20.0),
    rows_move_apart=(dict(spread=60.0), dict(tile=64)),
)


@every_dtype
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    given = OPTIONS[name]
    made, options = given if isinstance(given, tuple) else ({}, given)
    if "keep" in options:
        options = options | dict(keep=mask(300, options["keep"]))
    compare(problem(19, 300, 24, dtype, **made), dtype, **options)


@pytest.mark.parametrize("units", [1, 3, 40])
@pytest.mark.parametrize("tile", [64, 200, 10**6])
def test_any_number_of_splits(monkeypatch, units, tile):
    monkeypatch.setattr(triton_sweep, "units_of", lambda device: units)
    dtype = DTYPES[0]
    # rows whose reference moves in some splits and rows where it stays
    start = torch.linspace(-150, 10, 21)
    compare(
        problem(21, 700, 40, dtype, spread=8.0),
        dtype,
        reference=start,
        tile=tile,
        keep=mask(700, 0.6),
    )


@every_dtype
def test_views(dtype):
    """Offsets, odd strides and transposes give what their copies give, and nothing outside a view
    is read."""
    h, head, held, valid = problem(19, 151, 33, dtype)
    keep = mask(151, 0.6)
    want = sums_of(
        triton_sweep.sweep, h, head, held, valid, F64 if dtype == F64 else F32, keep=keep
    )
    inside = torch.full((25, 41), float("nan"), dtype=dtype, device=DEVICE)[3:22, 5:38]
    columns = torch.full((33, 160), float("nan"), dtype=dtype, device=DEVICE)[:, 7:158].T
    biases = torch.full((151, 3), float("nan"), dtype=dtype, device=DEVICE)[:, 1]
    kept = torch.zeros(302, dtype=torch.bool, device=DEVICE)[::2]
    holds = torch.zeros((5, 19), dtype=torch.int64, device=DEVICE).T
    for view, x in (
        (inside, h),
        (columns, head.weight),
        (biases, head.bias),
        (kept, keep),
        (holds, held),
    ):
        view.copy_(x)
    moved = Head(columns, biases, head.scale, head.softcap)
    got = sums_of(
        triton_sweep.sweep, inside, moved, holds, valid, F64 if dtype == F64 else F32, keep=kept
    )
    for a, b in zip(got, want, strict=True):
        assert all(
            torch.equal(getattr(a, name), getattr(b, name))
            for name in ("shift", "total", "entropy", "product")
        )


@pytest.mark.parametrize(
    "dtypes",
    [(F32, BF16), (BF16, F32), (F16, BF16), *([(BF16, F64), (F64, F32)] if INTERPRETED else [])],
)
def test_mixed_dtypes_are_multiplied_in_the_wider(dtypes):
    h, head, held, valid = problem(5, 151, 33, F64)
    h, head = (
        h.to(dtypes[0]),
        head._replace(weight=head.weight.to(dtypes[1]), bias=head.bias.to(BF16)),
    )
    wide = F64 if F64 in dtypes else F32
    compare((h, head, held, valid), wide)


@every_dtype
def test_two_sweeps_are_bitwise_equal(dtype):
    made = problem(19, 500, 40, dtype)
    first, again = (
        sums_of(triton_sweep.sweep, *made, F64 if dtype == F64 else F32, keep=mask(500, 0.5))
        for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        assert all(
            torch.equal(getattr(a, name), getattr(b, name))
            for name in ("shift", "total", "entropy", "product")
        )


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_tiles_by_descriptor_are_tiles_by_pointer(monkeypatch, dtype):
    made = problem(19, 300, 24, dtype)
    keep = mask(300, 0.5)
    pointers = sums_of(triton_sweep.sweep, *made, F32, keep=keep)
    monkeypatch.setattr(triton_launch, "TMA", ("interpreter",))
    assert triton_sweep.describable(made[0]) and triton_sweep.describable(made[1].weight)
    described = sums_of(triton_sweep.sweep, *made, F32, keep=keep)
    for a, b in zip(pointers, described, strict=True):  # sums of D numbers in another order
        torch.testing.assert_close(a.total, b.total, rtol=1e-5, atol=0)
        assert (a.product - b.product).norm() <= 2**-11 * a.product.norm()


@pytest.mark.parametrize("tma", [(), ("interpreter",)])
@pytest.mark.parametrize("tile", [64, 10**6])
def test_one_flat_loop_is_bitwise_two_loops(monkeypatch, tma, tile):
    """The last split may have no tiles, and D is no multiple of a step."""
    monkeypatch.setattr(triton_launch, "TMA", tma)
    monkeypatch.setattr(triton_sweep, "units_of", lambda device: 3)
    made, keep = problem(5, 300, 72, BF16), mask(300, 0.5)
    plan = triton_launch.triton_launch(5, 300, 72, BF16, "interpreter", 3, True)
    both = [
        sums_of(triton_sweep.sweep, *made, F32, keep=keep, tile=tile, plan=plan._replace(flat=flat))
        for flat in (False, True)
    ]
    for one, other in zip(*both, strict=True):
        assert torch.equal(one.total, other.total) and torch.equal(one.product, other.product)
        assert torch.equal(one.entropy, other.entropy)


@pytest.mark.parametrize("reference", [-100.0, -12.0, 0.0, 20.0])
def test_fp16_neither_overflows_nor_vanishes(reference):
    """exp(11) is the largest that fp16 holds, exp(-17) the smallest: the reference must not stand
    in the way."""
    got, _ = compare(problem(5, 300, 16, F16), F16, reference=reference)
    assert all(one.product.isfinite().all() for one in got)


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.05])
def test_skipped_tiles_stay_within_the_bound(eps):
    """|error of the product, as probabilities| <= eps * (columns skipped) * max |W_v|; sums keep
    every bit."""
    dtype = DTYPES[0]
    h, head, held, valid = problem(16, 1003, 24, dtype, spread=6.0, k=1)
    h = h[:1] + 0.1 * h
    order = (h.mean(0) @ head.weight.T).argsort(descending=True)
    head = head._replace(weight=head.weight[order], bias=None)  # so that whole tiles are unlikely
    reference = head_rows.row_logits(h, head, held, dtype)[0].amax(1)
    whole, part = (
        sums_of(triton_sweep.sweep, h, head, held, valid, dtype, reference=reference, eps=e)[0]
        for e in (0.0, eps)
    )
    assert torch.equal(whole.total, part.total) and torch.equal(whole.entropy, part.entropy)
    lse = torch.logaddexp(whole.log_total(), reference.double())
    missing = ((whole.product - part.product).double() * whole.share(lse)[:, None]).norm(dim=1)
    assert (missing <= eps * 1003 * head.weight.norm(dim=1).max()).all()
    assert (missing > 0).any()


@pytest.mark.skipif(not INTERPRETED, reason="calls a kernel on CPU tensors")
@pytest.mark.parametrize("dtype, near, eps", [(F32, 0.3, 2.4e-7), (F64, 0.03, 8e-15)])
def test_tanh(dtype, near, eps):
    @triton.jit
    def kernel(x_ptr, y_ptr, NEAR: tl.constexpr):
        at = tl.arange(0, 4096)
        tl.store(y_ptr + at, triton_tiles.tanh(tl.load(x_ptr + at), NEAR))

    x = torch.cat(
        [
            torch.linspace(-40, 40, 2046),
            torch.tensor([torch.inf, -torch.inf]),
            torch.logspace(-30, 1, 2048),
        ]
    ).to(dtype)
    y = torch.empty_like(x)
    kernel[(1,)](x, y, NEAR=near)
    torch.testing.assert_close(y.double(), torch.tanh(x.double()), rtol=eps, atol=0)


# --------------------------------------------------------------------------------------------------
# the loss, through it


@pytest.fixture
def through(monkeypatch):
    """The loss goes through `triton_frozen`, a few tiles per chunk; counts what it visits."""
    calls = []
    real = triton_frozen.visit

    def visit(*given, **options):
        calls.append(options)
        return real(*given, **options)

    monkeypatch.setattr(triton_frozen, "visit", visit)
    monkeypatch.setattr(triton_launch, "CHUNK", 4096)
    return calls


def case(N, V, D, dtype=F64, *, teacher=True, bias=False, scale=1.0, softcap=None, tau=1.0,
         keep=None, renormalize=False,
         moved=0.3, seed=0, **loss):  # fmt: skip
    """Keywords of one loss: tensors in `dtype`, and how to build the teacher."""
    g = torch.Generator().manual_seed(seed)
    ht = rand(N, D, seed=seed + 1)
    y = torch.randint(0, V, (N,), generator=g)
    y[torch.rand(N, generator=g) < 0.2] = IGNORED
    head = dict(logit_scale=scale, logit_softcap=softcap, temperature=tau)
    h, b = (
        ht + moved * rand(N, D, seed=seed + 2),
        rand(V, seed=seed + 4, dtype=dtype) if bias else None,
    )
    mine = dict(
        h=h.to(dtype),
        W=rand(V, D, seed=seed + 3, scale=2 * D**-0.5, dtype=dtype),
        b=b,
        y=y.to(DEVICE),
    )
    mine |= dict(ht=ht.to(dtype) if teacher else None)
    weights = dict(
        ce_weight=torch.rand(N, generator=g).to(DEVICE),
        kl_weight=torch.rand(N, generator=g).to(DEVICE),
    )
    return mine | dict(
        head=head, teacher=dict(vocab_keep=keep, renormalize=renormalize), loss=weights | loss
    )


def run(c, backend, dtype=None):
    """loss, parts and the gradient of h, in fp64"""
    move = lambda x: x if x is None or dtype is None else x.to(dtype)
    h, W, b, ht = (move(c[name]) for name in ("h", "W", "b", "ht"))
    teacher = (
        None
        if ht is None
        else TeacherCache.from_hidden(ht, W, head_bias=b, **c["head"], **c["teacher"])
    )
    h = h.detach().clone().requires_grad_()
    loss, parts = fused_dmk_ce(
        h,
        W,
        c["y"],
        teacher,
        head_bias=b,
        **c["head"],
        **c["loss"],
        backend=backend,
        return_parts=True,
    )
    loss.sum().backward()
    return {k: x.double() for k, x in dict(loss=loss.detach(), **parts._asdict(), h=h.grad).items()}


def plain(c):
    """What an honest user writes: logits in the inputs' dtype, all after them in fp32."""

    def logits(h):
        x = h @ c["W"].T
        x = c["head"]["logit_scale"] * (x if c["b"] is None else x + c["b"])
        cap = c["head"]["logit_softcap"]
        return (x if cap is None else cap * torch.tanh(x / cap)).float()

    h = c["h"].detach().clone().requires_grad_()
    eye = torch.eye(len(c["W"]), device=DEVICE)
    t = dict(temperature=c["head"]["temperature"])
    teacher = (
        None
        if c["ht"] is None
        else TeacherCache.from_hidden(logits(c["ht"]).detach(), eye, **t, **c["teacher"])
    )
    options = dict(**t, **c["loss"], backend="reference", return_parts=True)
    loss, parts = fused_dmk_ce(logits(h), eye, c["y"], teacher, **options)
    loss.sum().backward()
    return {k: x.double() for k, x in dict(loss=loss.detach(), **parts._asdict(), h=h.grad).items()}


def check(c, through, size=1.0, backend="triton"):
    """fp64 to 1e-10; else within twice the error of plain torch and the rounding of fp32 numbers of
    `size` and of the result."""
    dtype = c["h"].dtype
    got, want = run(c, backend), run(c, "reference", F64)
    assert len(through) == 1
    theirs = {} if dtype == F64 else plain(c)
    for name, x in got.items():
        error = (x - want[name]).norm()
        assert x.isfinite().all(), name
        if dtype == F64:
            assert error <= (1e-10 if name in ("loss", "h") else 1e-6) * size * (
                1 + want[name].norm()
            ), name  # parts are fp32
        else:
            rounding = torch.finfo(dtype).eps * want[name].norm() if name == "h" else 0
            floor = 2**-20 * size * x.numel() ** 0.5
            assert error <= 2 * (theirs[name] - want[name]).norm() + rounding + floor, (
                f"{name}: {error:.1e}"
            )


LOSSES = dict(
    cross_entropy=dict(teacher=False, bias=True),
    softcap=dict(teacher=False, bias=True, softcap=3.0, scale=2.0),
    kl=dict(bias=True),
    masked=dict(keep=0.6),
    renormalised=dict(keep=0.6, renormalize=True, bias=True),
    nearly_all_dropped=dict(keep=0.02, renormalize=True),
    temperature=dict(tau=2.0, scale=0.5, bias=True),
    all_of_it=dict(tau=0.5, keep=0.6, renormalize=True, bias=True, scale=0.7),
    rows=dict(reduction="none"),
    no_cross_entropy=dict(alpha=0.0),
    near=dict(moved=1e-3, alpha=0.0),
)


@every_dtype
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("N, V, D", [(3, 151, 33), (19, 300, 16)])
def test_the_loss(through, name, N, V, D, dtype):
    options = LOSSES[name]
    if "keep" in options:
        options = options | dict(keep=mask(V, options["keep"]))
    check(case(N, V, D, dtype, **options), through)


@pytest.mark.parametrize("N, V, D", [(1, 3, 8), (37, 151, 96), (3, 1003, 33)])
def test_the_loss_in_other_shapes(through, N, V, D):
    check(case(N, V, D, DTYPES[0], bias=True, keep=mask(V, 0.5), renormalize=True), through)


@pytest.mark.parametrize("name", ["softcap", "kl", "renormalised", "temperature", "near"])
def test_the_vendors_products_give_the_same(monkeypatch, name):
    """Chunks of 64 columns, e in fp16, and a reference that moves."""
    options = LOSSES[name]
    if "keep" in options:
        options = options | dict(keep=mask(300, options["keep"]))
    c, seen = case(19, 300, 16, BF16, **options), []
    real = triton_vendor.visit
    visit = lambda *given, **more: (seen.append(1), real(*given, **more, tile=64))[1]
    monkeypatch.setattr(triton_vendor, "visit", visit)
    monkeypatch.setattr(fused, "by_vendor", lambda *given: True)
    check(c, seen, backend="tiled")


@every_dtype
def test_towering_dropped_columns(through, dtype):
    """A dropped column a hundred nats above all kept ones: only the cross-entropy sees it."""
    c = case(9, 151, 16, dtype, bias=True, keep=mask(151, 0.6), renormalize=True)
    c["b"][(~c["teacher"]["vocab_keep"]).nonzero()[3]] = 100.0
    check(c, through, size=100.0)


@every_dtype
def test_a_bias_of_minus_infinity(through, dtype):
    c = case(9, 151, 16, dtype, bias=True, teacher=False)
    c["b"][c["y"].max() + 1 :] = -torch.inf
    got = run(c, "triton")
    finite = dict(c, b=c["b"].double().clamp(min=-1e6))
    want = run(finite, "reference", F64)
    assert all(
        (got[name] - want[name]).norm()
        <= max(1e-6, torch.finfo(dtype).eps) * (1 + want[name].norm())
        for name in got
    )


@every_dtype
@pytest.mark.parametrize("renormalize", [False, True])
def test_logits_of_ten_thousand(through, dtype, renormalize):
    c = case(5, 151, 16, dtype, keep=mask(151, 0.7), renormalize=renormalize)
    c = dict(c, h=(1e3 * c["h"]).to(dtype))
    check(c, through, size=1e4)


@every_dtype
def test_an_unmoved_row_is_exactly_zero(through, dtype):
    c = case(9, 300, 16, dtype, bias=True, alpha=0.0)
    still = torch.arange(9, device=DEVICE) % 3 != 0
    got = run(dict(c, h=torch.where(still[:, None], c["ht"], c["h"])), "triton")
    assert (
        (got["kl"][still] == 0).all()
        and (got["h"][still] == 0).all()
        and (got["h"][~still] != 0).any(-1).all()
    )
    assert through


@pytest.mark.skipif(not INTERPRETED, reason="fp64 is for the interpreter")
@pytest.mark.parametrize("name", ["softcap", "masked", "all_of_it"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(through, name, reduction):
    options = LOSSES[name]
    if "keep" in options:
        options = options | dict(keep=mask(70, options["keep"]))
    c = case(2, 70, 3, reduction=reduction, **options)
    teacher = None
    if c["ht"] is not None:
        teacher = TeacherCache.from_hidden(
            c["ht"], c["W"], head_bias=c["b"], **c["head"], **c["teacher"]
        )
    loss = lambda h: fused_dmk_ce(
        h, c["W"], c["y"], teacher, head_bias=c["b"], **c["head"], **c["loss"], backend="triton"
    )
    assert torch.autograd.gradcheck(loss, c["h"].requires_grad_())
    assert through


def test_without_a_gradient_there_is_no_product(through):
    c = case(5, 151, 16, DTYPES[0])
    teacher = TeacherCache.from_hidden(c["ht"], c["W"], **c["head"], **c["teacher"])
    value = fused_dmk_ce(c["h"], c["W"], c["y"], teacher, **c["loss"], backend="triton")
    assert not through[0]["product"]
    assert abs(value.item() - run(c, "reference")["loss"].item()) < 1e-6


# --------------------------------------------------------------------------------------------------
# launch


@pytest.mark.parametrize("target", [*triton_launch.TARGETS, "interpreter"])
def test_every_plan_is_one_that_the_kernels_take(target):
    for dtype in (BF16, F32):
        for N in (1, 17, 64, 129, 2048, 100_000):
            for V, D in ((3, 8), (32_000, 2048), (151_936, 1024), (262_144, 4096)):
                plan = triton_launch.triton_launch(N, V, D, dtype, target, heavy=D == 8)
                assert (
                    plan.product.BLOCK_N == plan.sums.BLOCK_N
                    and plan.sums.BLOCK_V % plan.product.BLOCK_V == 0
                )
                assert (
                    plan.chunk % plan.sums.BLOCK_V == 0
                    and 1 <= plan.product_splits <= plan.splits < 65_536
                )
                assert plan.splits <= plan.chunk // plan.sums.BLOCK_V and plan.why.startswith(
                    ("predicted", "measured")
                )


def forget():
    for cached in (triton_launch._capability, triton_launch._target):
        cached.cache_clear()


def test_what_cannot_run_is_refused_in_one_sentence(monkeypatch):
    assert triton_launch.why_not(torch.device(DEVICE), BF16, F32) is None
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "TRITON_INTERPRET=1" in triton_launch.why_not(torch.device("cpu"), BF16)
    assert "does not run on 'mps'" in triton_launch.why_not(torch.device("mps"), BF16)
    forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "fp64" in triton_launch.why_not(torch.device("cuda"), BF16, F64)
    assert (
        triton_launch.target_of(torch.device("cuda")) == "sm_86"
        and triton_launch.why_not(torch.device("cuda"), BF16) is None
    )
    forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in triton_launch.why_not(torch.device("cuda"), BF16)
    forget()
