"""The general path in Triton, as users reach it, against fp64:   TRITON_INTERPRET=1 pytest
tests/triton"""

import pytest
import torch

triton = pytest.importorskip(
    "triton", reason="the Triton kernels need the package triton: pip install 'fastsiu[triton]'"
)
INTERPRETED = triton.knobs.runtime.interpret
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU: run TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from fastsiu import TeacherCache, fused_dmk_ce  # noqa: E402
from fastsiu.kernels import general, inputs, triton_general, triton_launch  # noqa: E402
from fastsiu.kernels.triton_rows import Weights  # noqa: E402

torch.set_num_threads(1)
# numpy, in branches that tl.where does not take
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

DEVICE = "cpu" if INTERPRETED else "cuda"
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F64, F32, BF16, F16] if INTERPRETED else [F32, BF16, F16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def rand(*shape, seed=0, scale=1.0, dtype=F64):
    return (
        (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64))
        .to(dtype)
        .to(DEVICE)
    )


def case(N, V, D, dtype, *, bias=False, scale=1.0, softcap=None, tau=1.0, keep=None,
         renormalize=False, own=None, trains=True,
         teacher=True, moved=0.3, seed=0, **loss):  # fmt: skip
    """own: the width of the teacher's own head, None = it has the student's."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, V, (N,), generator=g)
    y[torch.rand(N, generator=g) < 0.2] = -100
    mask = None
    if keep is not None:
        mask = (torch.rand(V, generator=g) < keep).to(DEVICE)
        mask[1] = True
    W, b = (
        rand(V, D, seed=seed + 3, scale=2 * D**-0.5, dtype=dtype),
        rand(V, seed=seed + 4, dtype=dtype) if bias else None,
    )
    base = rand(N, D, seed=seed + 1)
    c = dict(
        h=(base + moved * rand(N, D, seed=seed + 2)).to(dtype), W=W, b=b, ht=None, Wt=None, bt=None
    )
    if teacher and own is None:
        c |= dict(ht=base.to(dtype), Wt=W, bt=b)
    elif teacher:
        c |= dict(
            ht=rand(N, own, seed=seed + 5, dtype=dtype),
            Wt=rand(V, own, seed=seed + 6, scale=2 * own**-0.5, dtype=dtype),
        )
        c |= dict(bt=rand(V, seed=seed + 7, dtype=dtype) if bias else None)
    weights = dict(
        ce_weight=torch.rand(N, generator=g).to(DEVICE),
        kl_weight=torch.rand(N, generator=g).to(DEVICE),
    )
    return c | dict(
        y=y.to(DEVICE),
        trains=trains,
        head=dict(logit_scale=scale, logit_softcap=softcap, temperature=tau),
        # fmt: skip
        teacher=dict(vocab_keep=mask, renormalize=renormalize),
        loss=weights | loss,
    )


def cached(c, move=lambda x: x):
    if c["ht"] is None:
        return None
    ht, Wt, bt = (None if c[name] is None else move(c[name]) for name in ("ht", "Wt", "bt"))
    return TeacherCache.from_hidden(ht, Wt, head_bias=bt, **c["head"], **c["teacher"])


def backward(loss, parts, leaves):
    found = torch.autograd.grad(loss.sum(), leaves.values())
    found = dict(loss=loss.detach(), **parts._asdict()) | dict(zip(leaves, found, strict=True))
    return {name: x.double() for name, x in found.items()}


def leaves_of(c, move):
    names = ["h"] + (["W"] + (["b"] if c["b"] is not None else []) if c["trains"] else [])
    return {name: move(c[name]).detach().clone().requires_grad_() for name in names}


def run(c, backend, dtype=None):
    """loss, parts and gradients, in fp64"""
    move = lambda x: x if dtype is None else x.to(dtype)
    leaves = leaves_of(c, move)
    if not c["trains"] and c["Wt"] is c["W"]:
        c = dict(c, W=move(c["W"]), b=None if c["b"] is None else move(c["b"]))
        c |= dict(Wt=c["W"], bt=c["b"])
    W, b = (leaves.get(name, None if c[name] is None else move(c[name])) for name in ("W", "b"))
    options = dict(head_bias=b, **c["head"], **c["loss"], backend=backend, return_parts=True)
    return backward(*fused_dmk_ce(leaves["h"], W, c["y"], cached(c, move), **options), leaves)


def plain(c):
    """What an honest user writes: logits in the inputs' dtype, all after them in fp32."""

    def logits(h, W, b):
        x = h @ W.T
        x = c["head"]["logit_scale"] * (x if b is None else x + b)
        cap = c["head"]["logit_softcap"]
        return (x if cap is None else cap * torch.tanh(x / cap)).float()

    leaves = leaves_of(c, lambda x: x)
    eye, t = torch.eye(len(c["W"]), device=DEVICE), dict(temperature=c["head"]["temperature"])
    teacher = None
    if c["ht"] is not None:
        teacher = TeacherCache.from_hidden(
            logits(c["ht"], c["Wt"], c["bt"]), eye, **t, **c["teacher"]
        )
    z = logits(leaves["h"], leaves.get("W", c["W"]), leaves.get("b", c["b"]))
    return backward(
        *fused_dmk_ce(
            z, eye, c["y"], teacher, **t, **c["loss"], backend="reference", return_parts=True
        ),
        leaves,
    )


def check(c, size=1.0):
    """Within twice the error of plain torch in the same dtype; `size` is that of the logits."""
    dtype = c["h"].dtype
    got, want = run(c, "triton"), run(c, "reference", F64)
    theirs = {} if dtype == F64 else plain(c)
    for name, x in got.items():
        error = (x - want[name]).norm()
        assert x.isfinite().all(), name
        if dtype == F64:
            parts = name in ("ce", "kl", "entropy")  # fp32
            assert error <= (1e-6 if parts else 1e-10) * size * (1 + want[name].norm()), (
                f"{name}: {error:.1e}"
            )
        else:
            gradient = name in ("h", "W", "b")
            rounding = torch.finfo(dtype).eps * want[name].norm() if gradient else 0
            floor = 2**-20 * size * (want[name].norm() if gradient else x.numel() ** 0.5)
            assert error <= 2 * (theirs[name] - want[name]).norm() + rounding + floor, (
                f"{name}: {error:.1e}"
            )


CASES = dict(
    cross_entropy=dict(teacher=False, bias=True),
    cross_entropy_softcap=dict(teacher=False, softcap=3.0, scale=2.0, bias=True),
    training=dict(bias=True),
    masked=dict(keep=0.6),
    renormalised=dict(keep=0.6, renormalize=True, bias=True),
    nearly_all_dropped=dict(keep=0.02, renormalize=True),
    nothing_dropped=dict(keep=1.1),
    temperature=dict(tau=2.0, scale=0.5, bias=True),
    cold_and_renormalised=dict(tau=0.5, keep=0.6, renormalize=True, bias=True, scale=0.7),
    softcap=dict(softcap=3.0, scale=2.0, bias=True),
    softcap_frozen=dict(softcap=3.0, scale=2.0, bias=True, keep=0.5, trains=False),
    own_head=dict(own=24, bias=True),
    own_head_frozen=dict(own=24, trains=False, keep=0.6, renormalize=True),
    everything=dict(own=24, tau=1.5, softcap=3.0, scale=0.7, keep=0.6, renormalize=True, bias=True),
    rows=dict(reduction="none"),
    no_cross_entropy=dict(alpha=0.0, keep=0.5),
)


@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_the_loss(name, dtype):
    check(case(19, 300, 16, dtype, **CASES[name]))


@every_dtype
@pytest.mark.parametrize(
    "N, V, D, own", [(1, 3, 8, None), (3, 151, 33, 7), (37, 65, 96, None), (33, 1003, 1, 5)]
)
def test_shapes(N, V, D, own, dtype):
    check(case(N, V, D, dtype, bias=True, keep=0.5, own=own))


def test_it_is_the_triton_kernels_that_run(monkeypatch):
    """And one load of the head serves student and teacher, unless they have two."""
    made = []
    kernel = triton_general.coefficient_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *given, **options: (
                made.append(options["SAME_HEAD"]),
                kernel[grid](*given, **options),
            )

    monkeypatch.setattr(triton_general, "coefficient_kernel", Spy())
    monkeypatch.setattr(general, "differentiate", None)
    for options, same in ((dict(softcap=3.0, trains=False), True), (dict(own=4), False)):
        made.clear()
        run(case(3, 70, 8, F32, **options), "triton")
        assert made == [same]


@pytest.mark.parametrize("units", [1, 3, 40])
@pytest.mark.parametrize("bytes_of_a_chunk", [1, 2**16])
def test_any_number_of_splits_and_chunks(monkeypatch, units, bytes_of_a_chunk):
    monkeypatch.setattr(triton_general, "units_of", lambda device: units)
    monkeypatch.setattr(triton_launch, "CHUNK", bytes_of_a_chunk)
    check(case(21, 700, 40, DTYPES[0], keep=0.6, bias=True, own=24))


@every_dtype
def test_views(dtype):
    """Offsets, odd strides and transposes give what their copies give, and nothing outside a view
    is read."""
    c = case(19, 151, 33, dtype, bias=True, keep=0.6, own=7)
    want = run(c, "triton")
    views = dict(
        h=torch.full((25, 41), float("nan"), dtype=dtype, device=DEVICE)[3:22, 5:38],
        W=torch.full((33, 160), float("nan"), dtype=dtype, device=DEVICE)[:, 7:158].T,
        b=torch.full((151, 3), float("nan"), dtype=dtype, device=DEVICE)[:, 1],
        ht=torch.full((8, 19), float("nan"), dtype=dtype, device=DEVICE)[1:].T,
        Wt=torch.full((302, 7), float("nan"), dtype=dtype, device=DEVICE)[::2],
    )
    for name, view in views.items():
        view.copy_(c[name])
    leaves = {name: views[name].requires_grad_() for name in ("h", "W", "b")}
    options = dict(
        head_bias=leaves["b"], **c["head"], **c["loss"], backend="triton", return_parts=True
    )
    got = backward(
        *fused_dmk_ce(leaves["h"], leaves["W"], c["y"], cached(c | views), **options), leaves
    )
    assert all(torch.equal(got[name], want[name]) for name in want)


@every_dtype
def test_two_runs_are_bitwise_equal(dtype):
    c = case(19, 500, 40, dtype, bias=True, keep=0.5)
    first, again = run(c, "triton"), run(c, "triton")
    assert all(torch.equal(first[name], again[name]) for name in first)


@every_dtype
def test_nothing_that_was_left_in_memory_is_read(monkeypatch, dtype):
    """Every new allocation holds NaN."""
    c = case(19, 151, 33, dtype, bias=True, keep=0.6)
    want = run(c, "triton")
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
        real = getattr(owner, name)

        def poisoned(*given, real=real, **options):
            made = real(*given, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(owner, name, poisoned)
    got = run(c, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)


@every_dtype
def test_tiny_weights_survive_fp16(dtype):
    """One row among millions of a global batch: gradients of 1e-9 do not vanish on the way, and
    huge ones do not overflow."""
    c = case(9, 151, 16, dtype, keep=0.6)
    want = run(c, "reference", F64)
    for denominator in (1e6, 1e-3):
        d = dict(c, loss=c["loss"] | dict(ce_denominator=denominator, kl_denominator=denominator))
        # the gradients themselves are below what fp16 leaves hold: look before
        if dtype == F16 and denominator == 1e6:
            u, w = (
                0.9 * c["loss"]["ce_weight"] * (c["y"] >= 0) / denominator,
                0.75 * c["loss"]["kl_weight"] / denominator,
            )
            t = cached(c)
            head = inputs.Head(c["W"], None, 1.0, None)
            teacher = inputs.Teacher(
                t.hidden, t.m_rest, t.C, t.lse, t.top, t.p_top, head, t.vocab_keep, False, 1.0
            )
            one = Weights(1.0, 1.0, u, w, None, None, False, False, -100)
            *_, dh, _ = triton_general.forward(
                c["h"], head, c["y"], teacher, one, True, True, False, False
            )
            exact = run(d, "reference", F64)["h"]
        else:
            dh, exact = run(d, "triton")["h"], run(d, "reference", F64)["h"]
        assert dh.isfinite().all() and (dh.double() - exact).norm() <= 0.01 * exact.norm()
        assert not torch.equal(exact, want["h"])


@every_dtype
@pytest.mark.parametrize("renormalize", [False, True])
def test_logits_of_ten_thousand(dtype, renormalize):
    c = case(5, 151, 16, dtype, keep=0.7, renormalize=renormalize)
    check(dict(c, h=(1e3 * c["h"]).to(dtype)), size=1e4)


@every_dtype
def test_a_bias_of_minus_infinity(dtype):
    c = case(9, 151, 16, dtype, bias=True, teacher=False)
    c["b"][c["y"].max() + 1 :] = -torch.inf
    got = run(c, "triton")
    want = run(dict(c, b=c["b"].double().clamp(min=-1e6)), "reference", F64)
    assert all(
        (got[name] - want[name]).norm()
        <= max(1e-6, 2 * torch.finfo(dtype).eps) * (1 + want[name].norm())
        for name in got
    )


@every_dtype
def test_an_unmoved_row_is_exactly_zero(dtype):
    c = case(9, 300, 16, dtype, bias=True, alpha=0.0, softcap=4.0, trains=False)
    still = torch.arange(9, device=DEVICE) % 3 != 0
    got = run(dict(c, h=torch.where(still[:, None], c["ht"], c["h"])), "triton")
    assert (
        (got["kl"][still] == 0).all()
        and (got["h"][still] == 0).all()
        and (got["h"][~still] != 0).any(-1).all()
    )


@pytest.mark.skipif(not INTERPRETED, reason="fp64 is for the interpreter")
@pytest.mark.parametrize(
    "name", ["softcap_frozen", "renormalised", "everything", "cross_entropy_softcap"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(name, reduction):
    c = case(2, 70, 3, F64, reduction=reduction, **CASES[name])
    teacher, b = cached(c), c["b"]
    options = dict(**c["head"], **c["loss"], backend="triton")
    if c["trains"]:
        f = lambda h, W, b: fused_dmk_ce(h, W, c["y"], teacher, head_bias=b, **options)
        leaves = tuple(x.detach().clone().requires_grad_() for x in (c["h"], c["W"], b))
        # one random direction: the slow mode takes minutes
        assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    else:
        f = lambda h: fused_dmk_ce(h, c["W"], c["y"], teacher, head_bias=b, **options)
        assert torch.autograd.gradcheck(f, c["h"].clone().requires_grad_())


@pytest.mark.parametrize("need", ["h", "W", "b"])
def test_only_what_is_needed_is_made(need):
    """A frozen body under a training head, and the other way round."""
    c = case(5, 70, 8, DTYPES[0], bias=True)
    whole = run(c, "triton")[need]
    x = {name: c[name].detach().clone().requires_grad_(name == need) for name in ("h", "W", "b")}
    fused_dmk_ce(
        x["h"],
        x["W"],
        c["y"],
        cached(c),
        head_bias=x["b"],
        **c["head"],
        **c["loss"],
        backend="triton",
    ).backward()
    found = x[need].grad.double()
    assert (found - whole).norm() <= (0 if need != "h" else 1e-6) + 1e-6 * whole.norm()
    assert all(x[name].grad is None for name in x if name != need)


@pytest.mark.parametrize("target", [*triton_launch.TARGETS, "interpreter"])
def test_every_plan_is_one_that_the_kernels_take(target):
    for dtype in (BF16, F32):
        for N in (1, 17, 64, 129, 2048, 100_000):
            for V, D in ((3, 8), (32_000, 2048), (262_144, 4096)):
                plan = triton_launch.general_launch(N, V, D, dtype, target)
                assert (
                    plan.product.BLOCK_N == plan.pair.BLOCK_N
                    and plan.pair.BLOCK_V % plan.product.BLOCK_V == 0
                )
                assert (
                    plan.chunk % plan.pair.BLOCK_V == 0
                    and 1 <= plan.product_splits <= plan.chunk // plan.pair.BLOCK_V
                )
                assert 1 <= plan.splits < 65_536 and plan.why.startswith(("predicted", "measured"))


@every_dtype
def test_a_strided_cache_gives_what_its_copy_gives(dtype):
    """teacher[::2] holds views of everything."""
    c = case(18, 151, 16, dtype, keep=0.4, own=12, bias=True)
    whole = cached(c)
    half = dict(h=c["h"][::2].detach(), y=c["y"][::2])
    weights = {k: v[::2] for k, v in c["loss"].items()}
    made = []
    for rows in (slice(None, None, 2), torch.arange(0, 18, 2, device=DEVICE)):
        x = half["h"].clone().requires_grad_()
        loss = fused_dmk_ce(
            x,
            c["W"],
            half["y"],
            whole[rows],
            head_bias=c["b"],
            **c["head"],
            **weights,
            backend="triton",
        )
        made.append((loss.detach(), *torch.autograd.grad(loss, [x])))
    for strided, copied in zip(*made, strict=True):
        assert torch.equal(strided, copied)


@pytest.mark.parametrize("own", [None, 7])
@pytest.mark.parametrize("dtype", [DTYPES[0], F16])
def test_no_rows_give_zero_and_no_gradient(own, dtype):
    c = case(3, 151, 16, dtype, own=own, bias=True)
    h, W = c["h"][:0].clone().requires_grad_(), c["W"].clone().requires_grad_()
    for head in (c["W"], W):
        loss = fused_dmk_ce(
            h, head, c["y"][:0], cached(c)[:0], head_bias=c["b"], **c["head"], backend="triton"
        )
        loss.backward()
        assert loss.item() == 0 and h.grad.shape == (0, 16)
    assert (W.grad == 0).all()
