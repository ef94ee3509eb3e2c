"""What the tiled backend promises beyond the values: memory, flops, one node for the compiler, no
gradient work unasked."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rounding
import torch
from torch import library
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastsiu
import fastsiu.kernels.launch
from fastsiu import TeacherCache, fused_dmk_ce, why_not

torch.set_num_threads(1)

BACKENDS = ["tiled"]  # those that never hold [N, V]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
ROOT = Path(__file__).parents[2]
MIB = 2**20


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(N, V, D, dtype=torch.float32, **options):
    h, W, ht = (
        rand(N, D, dtype=dtype),
        rand(V, D, seed=1, dtype=dtype),
        rand(N, D, seed=2, dtype=dtype),
    )
    y = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
    return h, W, y, TeacherCache.from_hidden(ht, W, **options)


def agree(h, W, y, teacher, *backends):
    """Two that are each within a bound of the truth are within twice the bound of each other."""
    case = rounding.case(h, W, y, teacher.hidden, keep=teacher.vocab_keep)
    values = torch.stack([fused_dmk_ce(h, W, y, teacher, backend=b) for b in backends])
    assert values.max() - values.min() <= 2 * rounding.bounds(case, 1.0)["loss"]


def recorded(f):
    """(largest allocation, peak of live bytes above the start, flops of matrix products) of a call:
    all that C++ does, too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as run:
        f()
    events = sorted(run.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    live = peak = largest = 0
    for e in events:
        if e.name() == "[memory]":
            live, largest = live + e.nbytes(), max(largest, e.nbytes())
            peak = max(peak, live)
    flops = 0
    for e in run.events():
        if e.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
            a, b = (
                [s for s in e.input_shapes if len(s) >= 2][-2:]
                if "addmm" in e.name
                else e.input_shapes[:2]
            )
            flops += 2 * torch.Size(a).numel() * b[-1]
    return largest, peak, flops


KINDS = {
    "shared": dict(),
    "masked": dict(vocab_keep=True),
    "renormalised": dict(vocab_keep=True, renormalize=True),
    "temperature": dict(temperature=2.0),
    "softcap": dict(logit_softcap=5.0),
    "trains": dict(),
    "no teacher": dict(),
}


def step(kind, N, V, D, dtype=torch.float32):
    """A function that runs the loss forward and backward, and one that builds its teacher."""
    options = dict(KINDS[kind])
    if "vocab_keep" in options:
        options["vocab_keep"] = torch.arange(V) % 50 != 0
    h, W, y, teacher = problem(N, V, D, dtype, **options)
    h.requires_grad_()
    if kind == "trains":
        W = (W + 0.1).requires_grad_()

    def run(backend="tiled", **more):
        x = None if kind == "no teacher" else teacher
        return fused_dmk_ce(h, W, y, x, backend=backend, **more)

    return run, lambda: TeacherCache.from_hidden(teacher.hidden, teacher.head_weight, **options)


# --------------------------------------------------------------------------------------------------
# memory and work


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_memory_is_a_few_tiles_and_the_hidden_states(backend, kind, dtype, monkeypatch):
    """Live bytes at most 4 tiles (64 MiB of the real 16), a few [N, D] and dW; the teacher's making
    too. Logits were 10 MiB."""
    (N, V, D), budget = (64, 40_000, 32), MIB // 2
    assert fastsiu.kernels.launch.TILE_BYTES == 16 * MIB
    monkeypatch.setattr(fastsiu.kernels.launch, "TILE_BYTES", budget)
    run, build = step(kind, N, V, D, dtype)
    trained = 2 * V * D * dtype.itemsize if kind == "trains" else 0
    for f in (
        lambda: run(backend).backward(),
        build,
        lambda: run(backend, reduction="none", return_parts=True)[0].sum().backward(),
    ):
        largest, peak, _ = recorded(f)
        assert largest <= max(2 * budget, trained), f"largest {largest / MIB:.1f} MiB"
        assert peak <= 4 * budget + 16 * N * D * 8 + trained, f"peak {peak / MIB:.1f} MiB"


CHILD = """
import sys, torch
sys.path.insert(0, {root!r})
from fastsiu import TeacherCache, fused_dmk_ce
torch.set_num_threads(1)
def kib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
def step(N, V, D):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(V, D, generator=g, dtype=torch.bfloat16)
    h = torch.randn(N, D, generator=g, dtype=torch.bfloat16)
    y = torch.randint(0, V, (N,), generator=g)
    x = (h + 0.5).requires_grad_()
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS")
    teacher = TeacherCache.from_hidden(h, W)
    fused_dmk_ce(x, W, y, teacher, backend={backend!r}).backward()
    return kib("VmHWM") - before
step(256, 2000, 64)
print("extra", step(256, 151936, 64))
"""


@every_backend
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_of_a_process(backend):
    """(256, 151936, 64): logits of one side would be 148 MiB."""
    child = CHILD.format(root=str(ROOT), backend=backend)
    done = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(re.search(r"extra (\d+)", done.stdout)[1]) <= 64 * 1024, done.stdout


@every_backend
@pytest.mark.parametrize(
    "kind, passes",
    [("shared", 4), ("masked", 4), ("renormalised", 4), ("no teacher", 4), ("temperature", 6)],
)
def test_a_frozen_head_costs_what_cross_entropy_costs(backend, kind, passes):
    """4 N V D flops forward and backward, whatever the teacher; without gradients only the
    logits."""
    N, V, D = 32, 20_000, 64
    run, _ = step(kind, N, V, D)
    unit = N * V * D
    assert recorded(lambda: run(backend).backward())[2] <= (passes + 0.2) * unit
    with torch.no_grad():
        assert recorded(lambda: run(backend))[2] <= 2.2 * unit


@every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_work_unasked(backend, kind):
    run, _ = step(kind, 32, 20_000, 64)
    asked = recorded(lambda: run(backend).backward())[2]
    with torch.no_grad():
        unasked = recorded(lambda: run(backend))[2]
    assert unasked < asked * 0.7


@every_backend
def test_thousands_of_rows(backend):
    """More rows than a tile has columns."""
    h, W, y, teacher = problem(3000, 700, 4, vocab_keep=torch.arange(700) % 50 != 0)
    agree(h, W, y, teacher, backend, "reference")


# --------------------------------------------------------------------------------------------------
# the compiler

# for torch's own, which writes C++
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


def compiled(kind, compiler, dynamic=None):
    run, _ = step(kind, 24, 3000, 16)
    h, W, y, teacher = problem(
        24, 3000, 16, **({} if kind not in ("softcap", "temperature") else KINDS[kind])
    )
    keep = torch.ones(24)
    keep[3] = 0
    W = W.requires_grad_() if kind == "trains" else W
    teacher = None if kind == "no teacher" else teacher

    def loss(h, W, y, k):
        return 2 * fused_dmk_ce(h * 1.5, W, y, teacher, kl_weight=k, backend="tiled") + 1

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend=compiler, dynamic=dynamic)):
        x = h.clone().requires_grad_()
        W.grad = None
        value = f(x, W, y, keep)
        value.backward()
        results.append([value.detach(), x.grad] + ([W.grad.clone()] if W.requires_grad else []))
    for ours, eager in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["shared", "temperature", "softcap", "trains", "no teacher"])
def test_one_graph_without_a_break(kind, fresh_compiler):
    compiled(kind, "aot_eager")


@pytest.mark.slow
@needs_compiler
def test_the_default_compiler(fresh_compiler):
    compiled("shared", "inductor")


def test_another_batch_size_is_not_another_answer(fresh_compiler):
    h, W, y, teacher = problem(20, 1000, 8)
    f = torch.compile(
        lambda h, y, t: fused_dmk_ce(h, W, y, t, backend="tiled"),
        fullgraph=True,
        backend="aot_eager",
    )
    for n in (20, 7, 13):
        x, z = h[:n].clone().requires_grad_(), h[:n].clone().requires_grad_()
        f(x, y[:n], teacher[:n]).backward()
        fused_dmk_ce(z, W, y[:n], teacher[:n], backend="tiled").backward()
        torch.testing.assert_close(x.grad, z.grad)


class Calls(TorchDispatchMode):
    """Every call of one of our operators, with its arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastsiu":
            self.seen.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    """Schema, fake tensors, autograd registration, dynamic shapes: torch's own checks on each
    operator we register."""
    run, _ = step(kind, 5, 300, 6)
    with Calls() as calls:
        run().backward()
    assert {c[0]._opname for c in calls.seen} >= {"dmk_ce_v4"}
    for op, args, kwargs in calls.seen:
        args = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
        if op._opname == "dmk_ce_v4":
            args[0].requires_grad_()
            args[1].requires_grad_(kind == "trains")
        library.opcheck(op, tuple(args), kwargs)


# --------------------------------------------------------------------------------------------------
# choice of backend


def test_tiled_never_refuses_a_float_dtype():
    h, W, _, teacher = problem(4, 50, 6)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert why_not("tiled", h.to(dtype), W.to(dtype)) is None
    assert why_not("tiled", h, W, teacher, logit_softcap=None, temperature=1.0) is None


def test_auto_is_one_of_the_backends_and_agrees():
    for N, V in ((2, 50), (300, 3000)):
        h, W, y, teacher = problem(N, V, 6)
        agree(h, W, y, teacher, "auto", "tiled", "reference")


def test_the_public_names_are_the_same():
    assert {"fused_dmk_ce", "TeacherCache", "DMKCELoss", "why_not"} <= set(fastsiu.__all__)


# --------------------------------------------------------------------------------------------------
# rivals

# N, D, V: odd and even, D above and below V
PEERS = [
    (16, 32, 128),
    (9, 41, 41),
    (4, 423, 1000),
    (3, 4096, 10),
]


@pytest.mark.rivals
@every_backend
@pytest.mark.parametrize("N, D, V", PEERS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torchs_own_linear_cross_entropy(backend, N, D, V, reduction):
    linear_cross_entropy = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if linear_cross_entropy is None:
        pytest.skip("this torch has no linear_cross_entropy")
    h, W, y, _ = problem(N, V, D)
    y[::3] = -100
    ours, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
    loss = fused_dmk_ce(ours, W, y, alpha=1.0, reduction=reduction, backend=backend)
    other = linear_cross_entropy(theirs, W, y, reduction=reduction)
    loss.sum().backward()
    other.sum().backward()
    bounds = rounding.bounds(rounding.case(h, W, y, alpha=1.0, reduction=reduction), 1.0)
    for name, a, b in (("loss", loss, other), ("h", ours.grad, theirs.grad)):
        assert ((a - b).abs() <= 2 * (bounds[name] + rounding.U * b.abs())).all(), name


@pytest.mark.rivals
@every_backend
@pytest.mark.parametrize("N, D, V", [(32, 64, 500), (9, 47, 123)])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("hard, soft", [(0.5, 0.5), (0.0, 1.0)])
def test_ligers_distillation_loss(backend, N, D, V, tau, hard, soft):
    """Its forward KL (beta = 0) has no factor temperature^2, and its weights are alpha and beta."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    h, W, y, _ = problem(N, V, D)
    Wt, ht = rand(V, 2 * D, seed=5) / D**0.5, rand(N, 2 * D, seed=6)
    h, W = h.requires_grad_(), (W / D**0.5).detach()
    teacher = TeacherCache.from_hidden(ht, Wt, temperature=tau)
    theirs = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=hard, weight_soft_loss=soft, beta=0.0, temperature=tau, compiled=False
    )
    x = h.detach().clone().requires_grad_()
    other = theirs(x, W.clone().requires_grad_(), ht, Wt, y)
    loss = fused_dmk_ce(h, W, y, teacher, alpha=hard, beta=soft / tau**2, backend=backend)
    loss.backward()
    other.backward()
    torch.testing.assert_close(loss, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h.grad, x.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_auto_compiles_on_small_shapes_with_a_bias(bias):
    h, W, y = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8), torch.arange(6)
    b = torch.randn(50) if bias else None
    teacher = TeacherCache.from_hidden(torch.randn(6, 8), W, head_bias=b)
    f = lambda h: fused_dmk_ce(h, W, y, teacher, head_bias=b)
    torch._dynamo.reset()
    loss = torch.compile(f, fullgraph=True, backend="aot_eager")(h)
    torch.testing.assert_close(loss, f(h))
    torch.testing.assert_close(*(torch.autograd.grad(x, h)[0] for x in (loss, f(h))))


@needs_compiler
def test_a_transposed_head_that_trains():
    h, y = torch.randn(6, 8, requires_grad=True), torch.arange(6)
    W = torch.randn(8, 50, requires_grad=True)
    teacher = TeacherCache.from_hidden(torch.randn(6, 8), W.detach().T.clone())
    f = lambda h, W: fused_dmk_ce(h, W.T, y, teacher, backend="tiled")
    torch._dynamo.reset()
    expected = torch.autograd.grad(f(h, W), [h, W])
    torch.testing.assert_close(
        torch.autograd.grad(torch.compile(f, fullgraph=True)(h, W), [h, W]), expected
    )
