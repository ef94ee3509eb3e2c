"""The fused loss against loops over tokens and vocabulary, written from the equations (arXiv
2405.12523, Eq. 2-5)."""

import math

import pytest
import rounding
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from fastsiu import DMKCELoss, TeacherCache, fused_dmk_ce, why_not
from fastsiu.kernels import launch

torch.set_num_threads(1)


def rand(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (
        scale
        * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).to(dtype)


def case(N=4, V=7, D=3, seed=0, dtype=torch.float64, **options):
    """hidden, head, labels and a teacher that is not the student; `options` go to the teacher."""
    h, W, ht = (
        rand(*s, seed=seed + i, dtype=dtype) for i, s in enumerate([(N, D), (V, D), (N, D)])
    )
    y = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed + 3))
    return h, W, y, TeacherCache.from_hidden(ht, W, **options)


# ---------------------------------------------------------------------------------------------- the
# brute force


def brute_logits(h, W, b, scale, softcap):
    z = [
        [
            scale * (sum(x * w for x, w in zip(hn, Wv, strict=True)) + bv)
            for Wv, bv in zip(W, b, strict=True)
        ]
        for hn in h
    ]
    return [[softcap * math.tanh(x / softcap) if softcap else x for x in row] for row in z]


def brute_softmax(z, keep):
    """Probabilities normalised over `keep`, and 0 elsewhere."""
    top = max(x for x, on in zip(z, keep, strict=True) if on)
    e = [math.exp(x - top) if on else 0.0 for x, on in zip(z, keep, strict=True)]
    return [x / sum(e) for x in e]


def brute(h, W, y, ht, Wt, *, keep, renormalize, b, bt, scale, softcap, tau, ignore_index=-100):
    """CE, KL and entropy of each row as lists of Python floats."""
    z, t = brute_logits(h, W, b, scale, softcap), brute_logits(ht, Wt, bt, scale, softcap)
    every = [True] * len(W)
    ces, kls, entropies = [], [], []
    for zn, tn, yn in zip(z, t, y, strict=True):
        q1 = brute_softmax(zn, every)
        ces.append(0.0 if yn == ignore_index else -math.log(q1[yn]))
        entropies.append(-sum(q * math.log(q) for q in q1))
        over = keep if renormalize else every
        q, p = (
            brute_softmax([x / tau for x in zn], over),
            brute_softmax([x / tau for x in tn], over),
        )
        kls.append(tau**2 * sum(p[v] * math.log(p[v] / q[v]) for v in range(len(W)) if keep[v]))
    return ces, kls, entropies


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(3, 9), st.integers(1, 5)),
    seed=st.integers(0, 10**6),
    masked=st.booleans(),
    renormalize=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3, 2.0]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    tau=st.sampled_from([1.0, 0.5, 2.0]),
    weights=st.sampled_from([None, "bool", "float"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    other_head=st.booleans(),
)
def test_every_option_equals_the_equations(
    shape, seed, masked, renormalize, bias, scale, softcap, tau, weights, reduction, other_head
):
    N, V, D = shape
    g = torch.Generator().manual_seed(seed)
    h, W, ht = (rand(*s, seed=seed + i) for i, s in enumerate([(N, D), (V, D), (N, D)]))
    Wt = rand(V, D, seed=seed + 9) if other_head else W
    b = rand(V, seed=seed + 4) if bias else None
    y = torch.randint(0, V, (N,), generator=g)
    y[torch.rand(N, generator=g) < 0.3] = -100
    keep = torch.rand(V, generator=g) < 0.6 if masked else torch.ones(V, dtype=torch.bool)
    keep[int(torch.randint(0, V, (), generator=g))] = True
    a, k = (
        torch.rand(N, generator=g, dtype=torch.float64),
        torch.rand(N, generator=g, dtype=torch.float64),
    )
    a, k = {None: (None, None), "bool": (a > 0.5, k > 0.5), "float": (a, k)}[weights]

    options = dict(logit_scale=scale, logit_softcap=softcap, temperature=tau)
    teacher = TeacherCache.from_hidden(
        ht, Wt, vocab_keep=keep if masked else None, renormalize=renormalize, head_bias=b, **options
    )
    loss, parts = fused_dmk_ce(
        h,
        W,
        y,
        teacher,
        ce_weight=a,
        kl_weight=k,
        head_bias=b,
        reduction=reduction,
        return_parts=True,
        **options,
    )

    zeros = [0.0] * V if b is None else b.tolist()
    ce, kl, entropy = brute(
        h.tolist(),
        W.tolist(),
        y.tolist(),
        ht.tolist(),
        Wt.tolist(),
        keep=keep.tolist(),
        renormalize=renormalize,
        b=zeros,
        bt=zeros,
        scale=scale,
        softcap=softcap,
        tau=tau,
    )
    a = [1.0] * N if a is None else a.double().tolist()
    k = [1.0] * N if k is None else k.double().tolist()
    a = [0.0 if label == -100 else w for w, label in zip(a, y.tolist(), strict=True)]
    rows = [0.9 * a[n] * ce[n] + 0.75 * k[n] * kl[n] for n in range(N)]
    if reduction == "mean":
        fraction = lambda w, x: (
            sum(wn * xn for wn, xn in zip(w, x, strict=True)) / sum(w) if sum(w) else 0.0
        )
        expected = 0.9 * fraction(a, ce) + 0.75 * fraction(k, kl)
    else:
        expected = sum(rows) if reduction == "sum" else rows
    torch.testing.assert_close(
        loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10
    )
    for ours, theirs in zip(parts, (ce, kl, entropy), strict=True):
        assert ours.dtype == torch.float32 and not ours.requires_grad
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# the gradients


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, dict(logit_softcap=2.0), dict(temperature=2.0, logit_scale=0.5)]
)
@pytest.mark.parametrize("renormalize", [False, True])
def test_gradcheck_reaches_hidden_head_and_bias(reduction, options, renormalize):
    h, W, b = (x.requires_grad_() for x in (rand(3, 4), rand(6, 4, seed=1), rand(6, seed=2)))
    y, k = torch.tensor([5, -100, 2]), torch.tensor([0.5, 1.0, 0.0])
    keep = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    # a head that trains leaves the teacher its own copy
    frozen = (
        rand(6, 4, seed=5),
        rand(6, seed=6),
    )
    teacher = TeacherCache.from_hidden(
        rand(3, 4, seed=3),
        frozen[0],
        head_bias=frozen[1],
        vocab_keep=keep,
        renormalize=renormalize,
        **options,
    )
    f = lambda h, W, b: fused_dmk_ce(
        h, W, y, teacher, head_bias=b, kl_weight=k, reduction=reduction
    )
    assert torch.autograd.gradcheck(f, (h, W, b))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_gradient_is_the_one_in_the_readme(renormalize, tau):
    """dKL/dh = tau * s * (C (Q W) - m), from the cache's statistics alone."""
    h, W, y, teacher = case(
        V=9,
        vocab_keep=torch.arange(9) % 4 != 0,
        renormalize=renormalize,
        logit_scale=0.7,
        temperature=tau,
    )
    h.requires_grad_()
    fused_dmk_ce(h, W, y, teacher, alpha=0.0, beta=1.0, reduction="sum").backward()
    z = 0.7 / tau * h.detach() @ W.T
    Q = (z.masked_fill(~teacher.vocab_keep, -math.inf) if renormalize else z).softmax(-1)
    torch.testing.assert_close(h.grad, tau * 0.7 * (teacher.C[:, None] * (Q @ W) - teacher.m))


def test_a_masked_entry_adds_no_teacher_pull():
    """With V masked but one token, dKL/dz is C Q everywhere and only the kept token is pulled up by
    P."""
    V = 5
    h, W = rand(2, V).requires_grad_(), torch.eye(V, dtype=torch.float64)  # identity head: h is z
    keep = torch.arange(V) == 3
    teacher = TeacherCache.from_hidden(rand(2, V, seed=1), W, vocab_keep=keep)
    fused_dmk_ce(
        h, W, torch.zeros(2, dtype=torch.int64), teacher, alpha=0.0, beta=1.0, reduction="sum"
    ).backward()
    P, Q = teacher.hidden.softmax(-1), h.detach().softmax(-1)
    expected = P[:, 3:4] * Q
    expected[:, 3] -= P[:, 3]
    torch.testing.assert_close(h.grad, expected)


def test_renormalised_masked_entries_get_exactly_no_gradient():
    h, W = rand(2, 5).requires_grad_(), torch.eye(5, dtype=torch.float64)
    keep = torch.tensor([True, False, True, True, False])
    teacher = TeacherCache.from_hidden(rand(2, 5, seed=1), W, vocab_keep=keep, renormalize=True)
    fused_dmk_ce(h, W, torch.zeros(2, dtype=torch.int64), teacher, alpha=0.0).backward()
    assert (h.grad[:, ~keep] == 0).all() and (h.grad[:, keep] != 0).all()


def test_a_masked_position_gets_exactly_no_gradient():
    h, W, y, teacher = case()
    h.requires_grad_()
    fused_dmk_ce(
        h, W, y, teacher, alpha=0.0, kl_weight=torch.tensor([1.0, 0.0, 1.0, 0.0])
    ).backward()
    assert (h.grad[[1, 3]] == 0).all() and (h.grad[[0, 2]] != 0).any(-1).all()


def test_no_gradient_to_teacher_or_weights():
    h, W, y, _ = case()
    ht, Wt, a, k = (
        x.requires_grad_()
        for x in (rand(4, 3, seed=7), rand(7, 3, seed=8), torch.ones(4), torch.ones(4))
    )
    teacher = TeacherCache.from_hidden(ht, Wt)
    fused_dmk_ce(h.requires_grad_(), W, y, teacher, ce_weight=a, kl_weight=k).backward()
    assert h.grad is not None and all(x.grad is None for x in (ht, Wt, a, k, W))


# ------------------------------------------------------------------------------------------- values
# one can name


def test_the_partial_sum_can_be_negative_and_the_renormalised_one_cannot():
    W = torch.eye(3, dtype=torch.float64)
    P, Q = torch.tensor([[0.8, 0.1, 0.1]]).double(), torch.tensor([[0.1, 0.45, 0.45]]).double()
    keep, y = torch.tensor([False, True, True]), torch.tensor([0])
    kl = lambda **o: fused_dmk_ce(
        Q.log(), W, y, TeacherCache.from_hidden(P.log(), W, **o), alpha=0.0, beta=1.0
    ).item()
    assert kl(vocab_keep=keep) == pytest.approx(2 * 0.1 * math.log(0.1 / 0.45))  # about -0.3
    assert kl(vocab_keep=keep, renormalize=True) == pytest.approx(0.0, abs=1e-12)
    assert kl() == pytest.approx(0.8 * math.log(8) + 0.2 * math.log(0.1 / 0.45))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("renormalize", [False, True])
def test_unmoved_rows_have_exactly_no_kl_and_no_gradient(dtype, renormalize):
    keep = torch.arange(50) > 3 if renormalize else None
    h, W, y, _ = case(N=6, V=50, D=16, dtype=dtype)
    teacher = TeacherCache.from_hidden(h, W, vocab_keep=keep, renormalize=renormalize)
    moved = h.clone()
    moved[2] += 0.5
    moved.requires_grad_()
    loss, parts = fused_dmk_ce(moved, W, y, teacher, alpha=0.0, return_parts=True)
    loss.backward()
    still = torch.arange(6) != 2
    assert (parts.kl[still] == 0).all() and parts.kl[2] > 0
    assert (moved.grad[still] == 0).all() and (moved.grad[2] != 0).any()


def test_the_row_test_is_explicit(monkeypatch):
    """Even where rounding differs between the two logits."""
    from fastsiu.kernels import reference

    h, W, y, teacher = case(dtype=torch.float32)
    teacher = TeacherCache.from_hidden(h, W)
    real, calls = reference.logits, []
    monkeypatch.setattr(
        reference,
        "logits",
        lambda *a: real(*a) * (1 + 1e-6 * len(calls)) + 0 * len(calls.append(0) or calls),
    )
    h.requires_grad_()
    loss = fused_dmk_ce(h, W, y, teacher, alpha=0.0)
    loss.backward()
    assert len(calls) == 2 and loss == 0 and (h.grad == 0).all()


def test_unmoved_rows_under_a_mask_keep_their_gradient():
    h, W, y, _ = case()
    teacher = TeacherCache.from_hidden(h, W, vocab_keep=torch.arange(7) > 2)
    h.requires_grad_()
    loss = fused_dmk_ce(h, W, y, teacher, alpha=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and (h.grad.abs() > 1e-6).any(-1).all()


def test_without_a_teacher_it_is_cross_entropy():
    h, W, y, _ = case(dtype=torch.float32)
    y[1] = -100
    loss, parts = fused_dmk_ce(h, W, y, alpha=1.0, return_parts=True)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(h @ W.T, y))
    assert parts.ce[1] == 0 and (parts.kl == 0).all()


def test_labels_are_shifted_by_the_caller():
    """hidden[:-1] with labels[1:] is what a causal language model's own loss computes."""
    h, W, ids, _ = case(N=6)
    shifted = torch.nn.functional.cross_entropy((h @ W.T)[:-1], ids[1:])
    torch.testing.assert_close(fused_dmk_ce(h[:-1], W, ids[1:], alpha=1.0), shifted)


def test_ignored_rows_count_in_the_kl_unless_their_weight_is_zero():
    h, W, y, teacher = case()
    ignored = torch.where(torch.arange(4) == 1, -7, y)
    f = lambda labels, **o: fused_dmk_ce(h, W, labels, teacher, alpha=0.0, ignore_index=-7, **o)
    assert f(ignored) == f(y)
    some = torch.tensor([1, 0, 1, 1]).bool()
    torch.testing.assert_close(
        f(ignored, kl_weight=some), fused_dmk_ce(h[some], W, y[some], teacher[some], alpha=0.0)
    )


def test_temperature_leaves_the_cross_entropy_alone():
    h, W, y, teacher = case(temperature=4.0)
    torch.testing.assert_close(fused_dmk_ce(h, W, y, teacher, beta=0.0), fused_dmk_ce(h, W, y))


# ------------------------------------------------------------------------------------------------
# denominators


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_denominators_give_zero_with_a_graph(reduction, dtype):
    h, W, y, teacher = case(dtype=dtype)
    h.requires_grad_(), W.requires_grad_()
    loss = fused_dmk_ce(h, W, y.fill_(-100), teacher, kl_weight=torch.zeros(4), reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all() and (h.grad == 0).all() and (W.grad == 0).all()
    loss = fused_dmk_ce(h, W, y.fill_(1), teacher, ce_denominator=0, kl_denominator=torch.tensor(0))
    loss.backward()
    assert loss == 0 and (h.grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction):
    h, W, y, teacher = case(N=0)
    h.requires_grad_()
    loss, parts = fused_dmk_ce(h, W, y, teacher, reduction=reduction, return_parts=True)
    loss.sum().backward()
    assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum() == 0
    assert h.grad.shape == (0, 3) and parts.kl.shape == (0,)


def test_denominators_make_micro_batches_equal_to_one_batch():
    h, W, y, teacher = case(N=9)
    y[[1, 4]] = -100
    a, k = rand(9, seed=5).abs(), (rand(9, seed=6) > 0).float()
    whole = h.clone().requires_grad_()
    fused_dmk_ce(whole, W, y, teacher, ce_weight=a, kl_weight=k).backward()
    totals = dict(ce_denominator=a[y != -100].sum(), kl_denominator=float(k.sum()))
    pieces = h.clone().requires_grad_()
    for rows in (slice(0, 2), slice(2, 7), slice(7, 9)):
        fused_dmk_ce(
            pieces[rows], W, y[rows], teacher[rows], ce_weight=a[rows], kl_weight=k[rows], **totals
        ).backward()
    torch.testing.assert_close(pieces.grad, whole.grad)


# --------------------------------------------------------------------------------------------------
# numerics


def errors(N, V, D, dtype, moved, **options):
    """Relative errors of (loss, gradient) against fp64: ours, plain torch's with logits in `dtype`,
    and the largest that fp32 and the rounding of the output allow."""
    ht, W = rand(N, D, dtype=dtype), rand(V, D, seed=1, dtype=dtype, scale=D**-0.5)
    h = (ht.double() + moved * rand(N, D, seed=2)).to(dtype)
    y = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))

    def plain(dtype):
        x = h.detach().to(dtype).requires_grad_()
        z, t = (x @ W.to(dtype).T), (ht.to(dtype) @ W.to(dtype).T)
        z, t = (z, t) if dtype == torch.float64 else (z.float(), t.float())
        kl = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
        loss = 0.9 * torch.nn.functional.cross_entropy(z, y) + 0.75 * kl
        loss.backward()
        return loss.double(), x.grad.double()

    truth = plain(torch.float64)
    x = h.detach().requires_grad_()
    loss = fused_dmk_ce(x, W, y, TeacherCache.from_hidden(ht, W), **options)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == dtype
    relative = lambda got: [
        ((g - t).norm() / t.norm()).item() for g, t in zip(got, truth, strict=True)
    ]
    bounds = rounding.bounds(rounding.case(h, W, y, ht), 1.0)
    output = rounding.U, torch.finfo(dtype).eps / 2
    found = zip((bounds["loss"], bounds["h"]), truth, output, strict=True)
    allowed = [(bound.norm() / t.norm()).item() + o for bound, t, o in found]
    return relative((loss.double(), x.grad.double())), relative(plain(dtype)), allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("moved", [0.01, 0.3])
def test_no_worse_than_plain_torch(dtype, moved):
    """The loss is one number, which plain torch may hit by luck: arithmetic sets its bound."""
    ours, plain, allowed = errors(16, 1000, 64, dtype, moved)
    for name, o, p in zip(("loss", "gradient"), ours, allowed, strict=True):
        assert o <= p, f"{name}: ours {o:.1e}, allowed {p:.1e}"
    said = f"gradient: ours {ours[1]:.1e}, plain torch {plain[1]:.1e}"
    assert ours[1] <= 2 * plain[1] + rounding.U, said


def test_bf16_logits_are_delivered_in_fp32():
    """Near the teacher, bf16 logits leave no digit of the KL gradient; ours is within the rounding
    of the output."""
    ht, W = (
        rand(8, 64, dtype=torch.bfloat16),
        rand(500, 64, seed=1, dtype=torch.bfloat16, scale=0.3),
    )
    h = (ht.double() * (1 + 2e-2 * rand(8, 64, seed=2))).bfloat16()
    grad = {}
    for dtype in (torch.bfloat16, torch.float64):
        x = h.detach().to(dtype, copy=True).requires_grad_()
        # an autocast region around the loss changes nothing
        with torch.autocast("cpu", dtype=torch.bfloat16):
            teacher = TeacherCache.from_hidden(ht.to(dtype), W.to(dtype))
            loss = fused_dmk_ce(
                x, teacher.head_weight, torch.zeros(8, dtype=torch.int64), teacher, alpha=0.0
            )
        loss.backward()
        grad[dtype] = x.grad.double()
    truth = grad[torch.float64]
    assert (grad[torch.bfloat16] - truth).norm() / truth.norm() < 4e-3


def test_matmul_precision_does_not_round_fp32():
    """The gradient is compared with plain torch's outside, which is fp32."""
    _, plain, allowed = errors(16, 1000, 64, torch.float32, 0.3)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        (loss, gradient), _, _ = errors(16, 1000, 64, torch.float32, 0.3)
    finally:
        torch.set_float32_matmul_precision(before)
    assert loss <= allowed[0] and gradient <= 2 * plain[1] + rounding.U


def test_autocast_does_not_round_fp32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, W, y, teacher = case(N=8, V=100, D=32, dtype=torch.float32)
        loss = fused_dmk_ce(h, W, y, teacher)
    outside = TeacherCache.from_hidden(teacher.hidden, W)
    torch.testing.assert_close(teacher.m, outside.m)
    torch.testing.assert_close(loss, fused_dmk_ce(h, W, y, outside))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(vocab_keep=torch.arange(50) > 5),
        dict(vocab_keep=torch.arange(50) > 5, renormalize=True),
    ],
)
def test_huge_logits_stay_finite(options):
    h, W = (
        rand(3, 8, dtype=torch.float32, scale=1e3).requires_grad_(),
        rand(50, 8, seed=1, dtype=torch.float32, scale=10),
    )
    teacher = TeacherCache.from_hidden(
        rand(3, 8, seed=2, dtype=torch.float32, scale=1e3), W, **options
    )
    loss = fused_dmk_ce(h, W, torch.tensor([0, 1, 2]), teacher)
    loss.backward()
    assert (
        loss.isfinite()
        and h.grad.isfinite().all()
        and all(x.isfinite().all() for x in (teacher.m, teacher.C, teacher.lse))
    )


def test_mixed_dtypes_and_views():
    h, W, y, _ = case(N=8, D=6, dtype=torch.float32)
    h16, wide = h[::2, :3].bfloat16(), torch.full((7, 12), 42.0)
    wide[:, 3:6] = W[:, :3]
    teacher = TeacherCache.from_hidden(h[1::2, :3].half(), wide[:, 3:6])
    loss = fused_dmk_ce(h16.requires_grad_(), wide[:, 3:6], y[::2], teacher)
    loss.backward()
    expected = fused_dmk_ce(
        h16.detach().float(),
        W[:, :3],
        y[::2],
        TeacherCache.from_hidden(teacher.hidden.float(), W[:, :3]),
    )
    torch.testing.assert_close(loss, expected)
    assert h16.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- the
# teacher cache


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(3, 700), st.integers(1, 6)),
    seed=st.integers(0, 10**6),
    masked=st.sampled_from(["none", "half", "last"]),
    renormalize=st.booleans(),
    bias=st.booleans(),
    tau=st.sampled_from([1.0, 2.0]),
)
def test_statistics_and_the_centred_form(small_tiles, shape, seed, masked, renormalize, bias, tau):
    """m, C and lse by definition, and KL = tau^2 (C (lse_s - lse_t) - s / tau <h_s - h_t, m>)
    equals the direct sum."""
    N, V, D = shape
    h, ht, W, b = (
        rand(N, D, seed=seed),
        rand(N, D, seed=seed + 1),
        rand(V, D, seed=seed + 2),
        rand(V, seed=seed + 3),
    )
    keep = {
        "none": torch.ones(V),
        "half": torch.arange(V) % 2 == 0,
        "last": torch.arange(V) == V - 1,
    }[masked].bool()
    options = dict(head_bias=b if bias else None, logit_scale=0.8, temperature=tau)
    teacher = TeacherCache.from_hidden(
        ht, W, vocab_keep=None if masked == "none" else keep, renormalize=renormalize, **options
    )

    x, over = (
        lambda h: 0.8 / tau * (h @ W.T + (b if bias else 0)),
        (keep if renormalize else torch.ones_like(keep)),
    )
    lse = lambda h: x(h).masked_fill(~over, -math.inf).logsumexp(-1)
    P = (x(ht).masked_fill(~over, -math.inf) - lse(ht)[:, None]).exp() * keep
    torch.testing.assert_close(teacher.m, P @ W)
    torch.testing.assert_close(teacher.C, P.sum(-1))
    torch.testing.assert_close(teacher.lse, lse(ht))
    if renormalize or masked == "none":
        assert (teacher.C == 1).all()

    kl = tau**2 * (teacher.C * (lse(h) - teacher.lse) - 0.8 / tau * ((h - ht) * teacher.m).sum(-1))
    _, parts = fused_dmk_ce(h, W, torch.zeros(N, dtype=torch.int64), teacher, return_parts=True)
    torch.testing.assert_close(kl.float(), parts.kl, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def small_tiles():
    """Tiles of 256 columns, so that several tiles meet in a small vocabulary."""
    before, launch.TILE_BYTES = launch.TILE_BYTES, 1
    yield
    launch.TILE_BYTES = before


def test_the_cache_never_holds_all_logits(small_tiles):
    N, V, D = 64, 20_000, 8
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend([out.numel()] if isinstance(out, torch.Tensor) else [])
            return out

    h, W = rand(N, D), rand(V, D, seed=1)
    with Watch():
        TeacherCache.from_hidden(h, W)
    assert len(sizes) > 78 and max(sizes) <= V * D < N * V / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("full", [False, True])
def test_save_and_load(tmp_path, dtype, full):
    bias = rand(7, seed=5, dtype=dtype)
    options = (
        dict(
            head_bias=bias,
            vocab_keep=torch.arange(7) > 1,
            logit_scale=0.5,
            temperature=2.0,
            logit_softcap=9.0,
        )
        if full
        else {}
    )
    h, W, y, teacher = case(dtype=dtype, renormalize=full, **options)
    teacher.save(tmp_path / "teacher.safetensors")
    again = TeacherCache.load(tmp_path / "teacher.safetensors", head_weight=W)
    assert len(again) == 4 and again.head_weight is W
    assert torch.equal(fused_dmk_ce(h, W, y, again), fused_dmk_ce(h, W, y, teacher))
    assert all(
        torch.equal(getattr(again, k), getattr(teacher, k)) for k in ("hidden", "m", "C", "lse")
    )
    part = teacher[1:3]
    part.save(tmp_path / "part.safetensors")
    assert torch.equal(
        TeacherCache.load(tmp_path / "part.safetensors", head_weight=W).m, teacher.m[1:3]
    )


def test_load_refuses_what_it_cannot_use(tmp_path):
    h, W, y, teacher = case()
    path = tmp_path / "teacher.safetensors"
    teacher.save(path)
    for other in (rand(7, 3, seed=99), rand(7, 4), rand(8, 3)):
        with pytest.raises(ValueError, match="another head"):
            TeacherCache.load(path, head_weight=other)
    save_file({"x": h}, path)
    with pytest.raises(ValueError, match="not a teacher cache"):
        TeacherCache.load(path, head_weight=W)
    save_file({"x": h}, path, metadata={"format": "fastsiu-teacher-cache", "version": "0"})
    with pytest.raises(ValueError, match="version 0"):
        TeacherCache.load(path, head_weight=W)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable"):
        TeacherCache.load(path, head_weight=W)


def test_rows_of_a_cache():
    h, W, y, teacher = case(N=5)
    for rows in (
        slice(1, 4),
        [0, 4],
        torch.tensor([3, 3]),
        torch.tensor([True, False, True, False, True]),
        [],
        slice(0, 0),
    ):
        part = teacher[rows]
        index = torch.tensor(rows, dtype=torch.int64) if rows == [] else rows
        assert all(
            torch.equal(getattr(part, k), getattr(teacher, k)[index])
            for k in ("hidden", "m", "C", "lse")
        )
        assert len(part) == len(part.m) and part.head_weight is W
    assert torch.equal(teacher[-1].m, teacher.m[4:]) and torch.equal(teacher[2].m, teacher.m[2:3])
    assert sum(len(row) for row in teacher) == 5  # iteration ends
    with pytest.raises(IndexError, match="5 rows"):
        teacher[5]
    assert torch.equal(teacher.to("cpu").m, teacher.m) and teacher.to("cpu").head_weight is W


# ---------------------------------------------------------------------------------------------
# options and errors


def test_the_teacher_gives_the_options_that_the_loss_does_not():
    options = dict(logit_scale=0.5, logit_softcap=2.0, temperature=3.0, head_bias=rand(7, seed=4))
    h, W, y, teacher = case(**options)
    assert torch.equal(fused_dmk_ce(h, W, y, teacher), fused_dmk_ce(h, W, y, teacher, **options))
    assert torch.equal(DMKCELoss()(h, W, y, teacher), fused_dmk_ce(h, W, y, teacher, **options))


@pytest.mark.parametrize(
    "theirs, ours, words",
    [
        (
            dict(logit_scale=2.0),
            dict(logit_scale=1.0),
            "logit_scale is 1.0 but the teacher's is 2.0",
        ),
        (dict(), dict(logit_scale=2.0), "logit_scale is 2.0 but the teacher's is 1.0"),
        (dict(), dict(logit_softcap=30.0), "logit_softcap is 30.0 but the teacher's is None"),
        (
            dict(temperature=2.0),
            dict(temperature=1.0),
            "temperature is 1.0 but the teacher's is 2.0",
        ),
        (dict(), dict(head_bias=torch.ones(7)), "head_bias is given but the teacher has none"),
        (dict(head_bias=torch.ones(7)), dict(head_bias=torch.zeros(7)), "head_bias differs"),
    ],
)
def test_options_that_differ_from_the_teachers_raise(theirs, ours, words):
    h, W, y, teacher = case(**theirs)
    with pytest.raises(ValueError, match=words):
        fused_dmk_ce(h, W, y, teacher, **ours)


def test_the_module_is_the_function():
    h, W, y, teacher = case()
    k = torch.tensor([1.0, 0.0, 1.0, 1.0])
    loss = DMKCELoss(alpha=0.3, beta=2.0, reduction="sum")
    assert torch.equal(
        loss(h, W, y, teacher, kl_weight=k),
        fused_dmk_ce(h, W, y, teacher, alpha=0.3, beta=2.0, reduction="sum", kl_weight=k),
    )
    assert "alpha=0.3" in repr(loss) and not list(loss.parameters())


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden=torch.ones(4, 2)), "D=2 but head_weight has D=3"),
        (dict(hidden=torch.ones(4, 3, 1)), "hidden must be a two-dimensional"),
        (
            dict(hidden=torch.ones(4, 3, dtype=torch.int64)),
            "hidden must be a two-dimensional float",
        ),
        (dict(labels=torch.zeros(4, dtype=torch.int32)), "labels must be int64"),
        (dict(labels=torch.zeros(3, dtype=torch.int64)), r"labels must be int64 \[4\]"),
        (dict(labels=torch.tensor([0, 7, 0, 0])), "labels hold 7"),
        (dict(labels=torch.tensor([0, -1, 0, 0])), "labels hold -1"),
        (dict(ce_weight=torch.ones(3)), "ce_weight must be"),
        (dict(kl_weight=torch.ones(4, 1)), "kl_weight must be"),
        (dict(head_bias=torch.ones(3), teacher=None), "head_bias must be a float"),
        (dict(logit_softcap=0.0, teacher=None), "logit_softcap is 0.0"),
        (dict(logit_scale=float("nan"), teacher=None), "logit_scale is nan"),
        (dict(temperature=0.0, teacher=None), "temperature is 0.0"),
        (dict(alpha=-1.0), "alpha is -1.0"),
        (dict(beta=float("inf")), "beta is inf"),
        (dict(ce_denominator=-1.0), "ce_denominator is -1.0"),
        (dict(kl_denominator=torch.ones(2)), "kl_denominator must be one number"),
        (dict(reduction="avg"), "'avg'"),
        (dict(backend="cuda"), "'cuda' is unknown"),
        (dict(backend="cpu"), "'cpu' takes fp32 or bf16"),
        (dict(teacher=case(N=5)[3]), "The teacher has 5 rows but hidden has 4"),
        (dict(teacher=case(V=8)[3]), "V=8 but head_weight has V=7"),
        (dict(hidden=torch.ones(4, 3, device="meta")), "hidden is on meta but head_weight on cpu"),
        (dict(kl_weight=torch.ones(4, device="meta")), "kl_weight is on meta but hidden on cpu"),
    ],
)
def test_errors_are_sentences(change, words):
    h, W, y, teacher = case()
    arguments = dict(hidden=h, head_weight=W, labels=y, teacher=teacher) | change
    with pytest.raises(ValueError, match=words) as error:
        fused_dmk_ce(**arguments)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_forward_mode_is_refused_and_no_derivative_of_zero(backend):
    h, W, y, teacher = case()

    def of_hidden(x):
        return fused_dmk_ce(x, W, y, teacher, backend=backend)

    def of_head(x):
        return fused_dmk_ce(h, x, y, backend=backend)

    for loss, x in ((of_hidden, h), (of_head, W)):
        with pytest.raises(ValueError, match="no derivative in forward mode"):
            torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(vocab_keep=torch.zeros(7, dtype=torch.bool)), "keeps no token"),
        (dict(vocab_keep=torch.ones(7)), "vocab_keep must be bool"),
        (dict(vocab_keep=torch.ones(6, dtype=torch.bool)), r"vocab_keep must be bool \[7\]"),
        (dict(temperature=-1.0), "temperature is -1.0"),
    ],
)
def test_errors_of_the_cache(options, words):
    with pytest.raises(ValueError, match=words):
        case(**options)


def test_why_not():
    h, W, _, teacher = case()
    assert why_not("reference", h, W, teacher) is None and why_not("auto", h, W) is None
    assert why_not("tiled", h, W, teacher) is None and "float8" in why_not(
        "tiled", h.to(torch.float8_e5m2), W
    )
    assert "'triton' needs" in why_not("triton", h, W)  # the package, a GPU or the interpreter
    assert "float64" in why_not("cpu", h, W, teacher)
    assert "other" in why_not("other", h, W, teacher, temperature=1.0)


# ------------------------------------------------------------------------------------------- what a
# reviewer found


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_head_that_moved_under_its_cache_is_noticed(backend, tmp_path):
    h, W, y, teacher = case(head_bias=rand(7, seed=5))
    f = lambda t: fused_dmk_ce(h, W, y, t, backend=backend)
    moved = teacher.to("cpu", head_weight=W)
    f(teacher), f(moved), f(teacher[1:3][[0, 1, 0, 1]])
    teacher.save(tmp_path / "t.safetensors")
    W.add_(1)
    for stale in (teacher, moved, teacher[:]):
        with pytest.raises(ValueError, match="has changed since"):
            f(stale)
    trained = rand(7, 3, seed=1).requires_grad_()
    teacher = TeacherCache.from_hidden(h, trained)
    fused_dmk_ce(h, trained, y, teacher, backend=backend).backward()
    torch.optim.SGD([trained], 0.1).step()
    with pytest.raises(ValueError, match="frozen copy"):
        fused_dmk_ce(h, trained, y, teacher, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("trains", [False, True])
def test_a_row_without_weight_may_hold_anything(backend, trains):
    h, W, y, teacher = case()
    clean, dirty = h.clone().requires_grad_(), h.clone()
    dirty[1], dirty[3] = math.nan, math.inf
    dirty.requires_grad_(), W.requires_grad_(trains)
    y[[1, 3]] = -100
    k = torch.tensor([1.0, 0.0, 1.0, 0.0])
    teacher = TeacherCache.from_hidden(teacher.hidden, W.detach().clone() if trains else W)
    f = lambda x: fused_dmk_ce(x, W, y, teacher, kl_weight=k, backend=backend)
    f(clean).backward()
    expected, W.grad = W.grad, None
    f(dirty).backward()
    torch.testing.assert_close(f(dirty), f(clean))
    torch.testing.assert_close(dirty.grad, clean.grad)
    assert (dirty.grad[[1, 3]] == 0).all() and (
        expected is None or torch.allclose(W.grad, expected)
    )
    bias = torch.zeros(7, dtype=torch.float64)
    bias[2] = -math.inf
    a = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert fused_dmk_ce(
        h, W, torch.tensor([2, 1, 1, 1]), ce_weight=a, head_bias=bias, backend=backend
    ).isfinite()


def test_an_equal_bias_of_a_loaded_cache_takes_the_fast_path(tmp_path):
    bias = rand(7, seed=5)
    h, W, y, teacher = case(head_bias=bias)
    TeacherCache.from_hidden(h, W, head_bias=bias).save(tmp_path / "t.safetensors")
    again = TeacherCache.load(tmp_path / "t.safetensors", head_weight=W)
    for teacher in (again, again.to("cpu")):  # unmoved rows are exactly 0 there only
        loss = fused_dmk_ce(
            h.requires_grad_(), W, y, teacher, head_bias=bias, alpha=0.0, backend="tiled"
        )
        assert loss == 0 and (torch.autograd.grad(loss, h)[0] == 0).all()


def test_a_teacher_made_in_inference_mode_trains():
    h, W, y, _ = case()
    keep = torch.arange(7) > 1
    with torch.inference_mode():
        teacher = TeacherCache.from_hidden(
            h * 2, W, vocab_keep=keep.clone(), head_bias=rand(7, seed=3) * 1
        )
    trained = W.clone().requires_grad_()
    for backend in ("reference", "tiled"):
        for head in (W, trained):
            fused_dmk_ce(h.requires_grad_(), head, y, teacher, backend=backend).backward()


def test_a_cache_keeps_its_own_numbers():
    h, W, y, teacher = case()
    buffer = h.clone()
    teacher = TeacherCache.from_hidden(buffer, W, vocab_keep=torch.ones(7, dtype=torch.bool))
    buffer.zero_()
    assert torch.equal(teacher.hidden, h) and teacher.vocab_keep is None
    assert (
        torch.equal(teacher[torch.tensor(1)].m, teacher[1].m)
        and len(teacher[torch.tensor([True, False, False, True])]) == 2
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(teacher.m, teacher.m)
        small = TeacherCache.from_hidden(h.float(), W.float()).m
    torch.testing.assert_close(small, TeacherCache.from_hidden(h.float(), W.float()).m)
    with pytest.raises(IndexError, match="2 indices"):
        teacher[0, 1]
    with pytest.raises((TypeError, RuntimeError)):
        teacher.to(torch.float16)


def test_a_padded_head_is_another_head(tmp_path):
    h, W, y, teacher = case()
    teacher.save(tmp_path / "t.safetensors")
    for other in (torch.cat([W, W[:2]]), W[:4]):
        with pytest.raises(ValueError, match="another head"):
            TeacherCache.load(tmp_path / "t.safetensors", head_weight=other)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(labels=[0, 1, 2, 3]), "labels must be a tensor, but is a list"),
        (dict(hidden=[[0.0]]), "hidden must be a tensor"),
        (dict(kl_weight=[1, 1, 1, 1]), "kl_weight must be a tensor"),
        (dict(teacher=torch.ones(4, 3)), "teacher must be a TeacherCache, but is a Tensor"),
        (dict(alpha=None), "alpha is None"),
        (dict(beta="1"), "beta is 1"),
        (dict(logit_softcap="30", teacher=None), "logit_softcap is 30"),
        (dict(alpha=torch.ones((), requires_grad=True)), "alpha requires grad"),
        (dict(kl_denominator=torch.tensor(-1.0)), "kl_denominator is -1.0"),
        (dict(ce_denominator=torch.tensor(math.nan)), "ce_denominator is nan"),
        (dict(ignore_index="-100"), "ignore_index is -100: it must be a whole number"),
        (dict(ignore_index=-100.0), "ignore_index is -100.0"),
        (dict(ignore_index=-(2**64)), "ignore_index is -18446744073709551616"),
        (dict(temperature=None, teacher=None), "temperature is None"),
        (dict(logit_scale=torch.ones(3)), "logit_scale is tensor"),
        (dict(logit_scale=torch.nn.Parameter(torch.tensor(1.0))), "logit_scale requires grad"),
        (
            dict(temperature=torch.ones((), requires_grad=True), teacher=None),
            "temperature requires",
        ),
    ],
)
def test_wrong_types_are_sentences_too(change, words):
    h, W, y, teacher = case()
    with pytest.raises(ValueError, match=words) as error:
        fused_dmk_ce(**(dict(hidden=h, head_weight=W, labels=y, teacher=teacher) | change))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
