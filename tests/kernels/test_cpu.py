"""The C++ sweep at every level that this processor executes, how it is built, and what a machine
without a compiler does. The hard cases of every backend are in tests/loss/test_fused_hard.py."""

import itertools
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from fastsiu import TeacherCache, fused_dmk_ce, why_not
from fastsiu.kernels import cpu_build, cpu_sweep, inputs, launch, tiled
from fastsiu.kernels.launch import CPU, CPU_HEAD
from fastsiu.loss.backend import chosen

ROOT = Path(__file__).parents[2]
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
WHY = cpu_sweep.why_no_library()
needs_library = pytest.mark.skipif(WHY is not None, reason=WHY or "")
LEVELS = pytest.mark.parametrize("level", cpu_build.executes())


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rand(*shape, seed=0, scale=1.0, dtype=F32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def problem(N, V, D, dtype, *, moved=0.3, keep=None, peak=0.0, **options):
    """h, W, labels and the teacher's hidden states with its cache; peak: logit of each label."""
    W, y = rand(V, D, seed=1, scale=D**-0.5, dtype=dtype), torch.arange(N) * 7 % V
    ht = (rand(N, D, seed=2) + peak * W[y].float()).to(dtype)
    h = (ht.float() + moved * rand(N, D, seed=3)).to(dtype)
    return h, W, y, ht, TeacherCache.from_hidden(ht, W, vocab_keep=keep, **options)


def truth(h, W, y, ht, keep=None, alpha=0.9, **options):
    """Loss and gradient of the reference in fp64."""
    x = h.double().requires_grad_()
    teacher = TeacherCache.from_hidden(ht.double(), W.double(), vocab_keep=keep, **options)
    loss = fused_dmk_ce(x, W.double(), y, teacher, alpha=alpha, backend="reference")
    loss.backward()
    return loss.detach(), x.grad


def of(level, monkeypatch):
    """From here on the processor has this level and none above it."""
    below = cpu_build.executes()
    monkeypatch.setattr(cpu_build, "executes", lambda: below[below.index(level) :])


def ours(h, W, y, teacher, **options):
    x = h.clone().requires_grad_()
    loss = fused_dmk_ce(x, W, y, teacher, backend="cpu", **options)
    loss.backward()
    return loss.detach(), x.grad


# --------------------------------------------------------------------------------------------------
# values


@needs_library
@LEVELS
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "N, V, D",
    [(1, 3, 1), (3, 50, 7), (17, 97, 64), (40, 1000, 96), (65, 700, 130), (300, 640, 192)],
)
def test_odd_sizes(level, dtype, threads, N, V, D, monkeypatch):
    of(level, monkeypatch)
    torch.set_num_threads(threads)
    h, W, y, ht, teacher = problem(N, V, D, dtype)
    (loss, gradient), (value, exact) = ours(h, W, y, teacher), truth(h, W, y, ht)
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-7)
    # the gradient's dtype is h's, so a bf16 one has rounded to 2^-9
    off = (gradient.double() - exact).norm() / exact.norm()
    assert off <= (5e-6 if dtype == F32 else 3e-3)


@needs_library
@LEVELS
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("renormalize, tau", [(False, 1.0), (True, 1.0), (True, 2.0), (False, 0.5)])
@pytest.mark.parametrize("kept", [0.95, 0.5, 0.05])
def test_masks_and_temperatures(level, dtype, renormalize, tau, kept, monkeypatch):
    of(level, monkeypatch)
    keep = torch.rand(500, generator=torch.Generator().manual_seed(5)) < kept
    options = dict(keep=keep, renormalize=renormalize, temperature=tau, logit_scale=0.8)
    h, W, y, ht, teacher = problem(20, 500, 70, dtype, **options)
    (loss, gradient), (value, exact) = ours(h, W, y, teacher), truth(h, W, y, ht, **options)
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-6)
    off = (gradient.double() - exact).norm() / exact.norm()
    assert off <= (5e-6 if dtype == F32 else 3e-3)


@needs_library
@LEVELS
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
def test_cross_entropy_alone(level, softcap, monkeypatch):
    of(level, monkeypatch)
    h, W, y, _, _ = problem(20, 500, 70, F32)
    bias, options = rand(500, seed=9), dict(logit_softcap=softcap, logit_scale=3.0)
    x = h.double().requires_grad_()
    exact = fused_dmk_ce(
        x, W.double(), y, head_bias=bias.double(), backend="reference", return_parts=True, **options
    )
    exact[0].backward()
    g = h.clone().requires_grad_()
    loss = fused_dmk_ce(g, W, y, head_bias=bias, backend="cpu", return_parts=True, **options)
    loss[0].backward()
    torch.testing.assert_close(g.grad.double(), x.grad, rtol=1e-5, atol=1e-7)
    for one, other in zip(loss[1], exact[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@needs_library
@LEVELS
@pytest.mark.parametrize("peak", [0.0, 12.0])
@pytest.mark.parametrize("level_of_kl", [10.0, 1.0, 1e-2, 1e-4])
def test_the_kl_gradient_in_bf16(level, peak, level_of_kl, monkeypatch):
    """Before it is rounded to bf16 the error is 1e-3 at most, from KL 10 to 1e-4."""
    of(level, monkeypatch)
    N, V, D = 24, 3000, 64
    moved = (2 * level_of_kl) ** 0.5
    h, W, y, ht, teacher = problem(N, V, D, BF16, moved=moved, peak=peak)
    ones, zeros = torch.full((N,), 1 / N), torch.zeros(N)
    given = inputs.Teacher(
        ht, teacher.m_rest, teacher.C, teacher.lse, teacher.top, teacher.p_top,
        inputs.Head(W, None, 1.0, None), None, False, 1.0,
    )  # fmt: skip
    sweep = partial(cpu_sweep.sweep, level=level)
    _, _, _, dh = tiled.shared(h, given.head, y, given, zeros, ones, True, False, 256, sweep)
    _, exact = truth(h, W, y, ht, alpha=0.0)
    exact = exact / 0.75
    assert (dh.double() - exact).norm() / exact.norm() <= 1e-3


@needs_library
@LEVELS
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_logits_far_above_the_reference_move_it(level, dtype, monkeypatch):
    """The largest logits are neither held out nor in the first tile."""
    of(level, monkeypatch)
    h, W, y, ht, teacher = problem(20, 800, 64, dtype)
    W[700:] *= 60
    teacher = TeacherCache.from_hidden(ht, W)
    y = torch.zeros_like(y)
    (loss, gradient), (value, exact) = ours(h, W, y, None), truth_of_ce(h, W, y)
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-6)
    assert (gradient.double() - exact).norm() / exact.norm() <= (1e-5 if dtype == F32 else 3e-3)
    (loss, _), (value, _) = ours(h, W, y, teacher), truth(h, W, y, ht)
    torch.testing.assert_close(loss.double(), value, rtol=1e-4, atol=1e-5)


def truth_of_ce(h, W, y):
    x = h.double().requires_grad_()
    loss = fused_dmk_ce(x, W.double(), y, backend="reference")
    loss.backward()
    return loss.detach(), x.grad


@needs_library
@LEVELS
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nan_is_not_lost(level, dtype, monkeypatch):
    """Of a column that no row holds out, so that only the C++ sees it."""
    of(level, monkeypatch)
    h, W, y, _, _ = problem(20, 300, 64, dtype)
    W[201, 5] = torch.nan
    assert 201 not in y and fused_dmk_ce(h, W, y, backend="cpu", reduction="none").isnan().all()
    h[3], W[201, 5] = torch.nan, 0
    loss = fused_dmk_ce(h, W, y, backend="cpu", reduction="none")
    assert loss[3].isnan() and loss.isfinite().sum() == 19


# --------------------------------------------------------------------------------------------------
# threads, memory, views


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "N, V, D", [(1, 3, 1), (64, 49152, 576), (256, 151936, 896), (4096, 32000, 4096)]
)
def test_shares(threads, N, V, D):
    groups, splits = cpu_sweep.shares(N, V, D, threads)
    assert 1 <= groups * splits <= threads and groups <= -(-N // 64)
    assert splits * N * D * 4 <= max(2**24, 2 * N * D * 4)
    assert threads == 1 or N < 64 or groups * splits > threads // 2


@needs_library
@LEVELS
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_equal_threads_give_equal_bits(level, threads, monkeypatch):
    of(level, monkeypatch)
    torch.set_num_threads(threads)
    h, W, y, _, teacher = problem(200, 2000, 96, BF16)
    (a, g), (b, k) = ours(h, W, y, teacher), ours(h, W, y, teacher)
    assert torch.equal(a, b) and torch.equal(g, k)


@needs_library
def test_memory_is_16_mib_and_what_grows_with_the_rows():
    """What torch allocates for the C++, which allocates nothing itself."""
    from torch.profiler import ProfilerActivity, profile

    N, V, D = 256, 40_000, 896
    h, W, y = rand(N, D, dtype=BF16), rand(V, D, scale=0.03, dtype=BF16), torch.arange(N)
    teacher = TeacherCache.from_hidden(h, W)
    x = h.clone().requires_grad_()
    f = lambda: fused_dmk_ce(x, W, y, teacher, backend="cpu")
    f()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        f()
    live = peak = 0
    for event in sorted(run.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak <= 2**24 + 8 * N * D * 4


@needs_library
@LEVELS
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_views(level, dtype, monkeypatch):
    of(level, monkeypatch)
    h, W, y, _, _ = problem(9, 333, 40, dtype)
    want = fused_dmk_ce(h, W, y, backend="cpu")
    wide = torch.full((333, 57), torch.nan, dtype=dtype)
    wide[:, 11:51] = W
    for head in (wide[:, 11:51], W.T.contiguous().T):
        assert torch.equal(fused_dmk_ce(h.T.contiguous().T, head, y, backend="cpu"), want)
    every_other = torch.full((666, 40), torch.nan, dtype=dtype)
    every_other[::2] = W
    assert torch.equal(fused_dmk_ce(h, every_other[::2], y, backend="cpu"), want)


@needs_library
def test_one_graph_under_torch_compile():
    h, W, y, _, teacher = problem(9, 333, 40, BF16)
    f = lambda x: fused_dmk_ce(x, W, y, teacher, backend="cpu")
    made = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        x = h.clone().requires_grad_()
        loss = g(x)
        loss.backward()
        made += [loss.detach(), x.grad]
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3])


# --------------------------------------------------------------------------------------------------
# the choice


@needs_library
def test_what_is_left_to_tiled_is_said():
    h, W, y, ht, teacher = problem(4, 30, 8, F32)
    assert why_not("cpu", h, W, teacher) is None
    capped = TeacherCache.from_hidden(ht, W, logit_softcap=5.0)
    bias = torch.zeros(30, requires_grad=True)
    for words, given in (
        ("fp32 or bf16", (h.double(), W)),
        ("hidden in bfloat16, head_weight in float32", (h.to(BF16), W)),
        ("its head in float32", (h.to(BF16), W.to(BF16), teacher)),
        ("head that trains", (h, W.clone().requires_grad_(), teacher)),
        ("one head", (h, W.clone(), teacher)),
        ("softcap", (h, W, capped)),
        ("does not run on meta", (h.to("meta"), W.to("meta"))),
    ):
        assert words in why_not("cpu", *given)
        assert why_not("cpu", *given).count("choose '") == 1
    assert "head that trains" in why_not("cpu", h, W, head_bias=bias)
    assert why_not("cpu", h, W, logit_softcap=5.0) is None  # without a teacher
    with pytest.raises(ValueError, match="one head"):
        fused_dmk_ce(h, W.clone(), y, teacher, backend="cpu")


@needs_library
def test_auto_takes_it_where_it_was_measured(monkeypatch):
    head = lambda V, dtype: torch.empty(V, 64, dtype=dtype)  # what it holds decides nothing
    plan = lambda dtype, V=CPU_HEAD // 64: chosen(rand(256, 64, dtype=dtype), head(V, dtype))
    # the choice, not this machine: some systems keep AMX from a process
    monkeypatch.setattr(cpu_sweep, "why_no_library", lambda: None)
    for maker, level in itertools.product(("Intel", "AMD", "another"), cpu_build.LEVELS):
        monkeypatch.setattr(cpu_build, "maker", lambda maker=maker: maker)
        monkeypatch.setattr(cpu_sweep, "best", lambda level=level: level)
        for dtype in (F32, BF16):
            assert (plan(dtype).backend == "cpu") == ((f"{maker} {level}", dtype) in CPU)
            assert plan(dtype, CPU_HEAD // 64 - 1).backend == "tiled"
    monkeypatch.setattr(cpu_sweep, "processor", lambda: "Intel amx")
    assert plan(F64).backend == "tiled" and "with AMX" in plan(BF16).why
    trains = head(CPU_HEAD // 64, BF16).requires_grad_()
    plan = chosen(rand(256, 64, dtype=BF16), trains)
    assert plan.backend == "tiled" and "trains" in plan.why


def test_the_maker_is_read_from_what_linux_says(monkeypatch):
    for vendor, maker in (
        ("GenuineIntel", "Intel"),
        ("AuthenticAMD", "AMD"),
        ("Nobody", "another"),
    ):
        monkeypatch.setattr(cpu_build, "_cpuinfo", lambda vendor=vendor: {"vendor_id": vendor})
        assert cpu_build.maker() == maker
    monkeypatch.setattr(cpu_build, "_cpuinfo", dict)  # another system
    assert cpu_build.maker() == "another"
    monkeypatch.setattr(cpu_sweep, "best", lambda: "avx2")
    assert cpu_sweep.processor() == "another avx2"
    monkeypatch.setattr(cpu_sweep, "best", lambda: None)
    assert cpu_sweep.processor() is None


def test_a_machine_without_a_compiler_goes_on_with_tiled(monkeypatch, caplog, tmp_path):
    """One line in the log, the same numbers as before, and a sentence for who insists."""
    monkeypatch.setattr(cpu_build.shutil, "which", lambda name: None)
    # beside this source lies no library that setup.py has built
    monkeypatch.setattr(cpu_build, "SOURCE", tmp_path / "sweep.cpp")
    monkeypatch.setattr(cpu_sweep, "processor", lambda: "Intel amx")
    monkeypatch.setattr(launch, "CPU_HEAD", 0)
    caches = (cpu_build.load, cpu_build.why_not, cpu_sweep.log_once)
    for one in caches:
        one.cache_clear()
    h, W, y, _, teacher = problem(256, 600, 64, BF16)
    with caplog.at_level(logging.WARNING):
        losses = [fused_dmk_ce(h, W, y, teacher) for _ in range(3)]
    for one in caches:
        one.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "The CPU kernel needs a C++ compiler: install g++ or clang++. "
        "The loss runs on plain torch ('tiled')."
    ]
    assert torch.equal(losses[0], fused_dmk_ce(h, W, y, teacher, backend="tiled"))
    with pytest.raises(ValueError, match="install g\\+\\+ or clang\\+\\+"):
        fused_dmk_ce(h, W, y, teacher, backend="cpu")
    for one in caches:
        one.cache_clear()


# --------------------------------------------------------------------------------------------------
# the build


@needs_library
def test_ninja_builds_every_level(tmp_path):
    """Those, too, that this processor does not execute."""
    made = cpu_build.build(tmp_path / "a folder", cpu_build.compiles())
    assert len(made) >= len(cpu_build.executes())
    assert sorted(p.name for p in (tmp_path / "a folder").iterdir()) == sorted(p.name for p in made)


@needs_library
def test_the_first_use_builds_once_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        first, second = cpu_build._cached("portable"), cpu_build._cached("portable")
    assert first == second and first.parent.parent == tmp_path / "fastsiu"
    assert [r.getMessage().startswith("Compiling the CPU kernel") for r in caplog.records] == [True]
    assert [*(tmp_path / "fastsiu").iterdir()] == [first.parent]


@needs_library
def test_a_compiler_that_fails_is_a_sentence(tmp_path, monkeypatch):
    broken = tmp_path / "sweep.cpp"
    broken.write_text("int f( {")
    monkeypatch.setattr(cpu_build, "SOURCE", broken)
    with pytest.raises(cpu_build.CannotBuild, match="fails on the CPU kernel: .*error"):
        cpu_build.build(tmp_path / "out", ("portable",))


def test_the_build_needs_neither_torch_nor_fastsiu():
    """setup.py loads the file alone, in an environment that may hold nothing else."""
    code = (
        "import runpy, sys; found = runpy.run_path('kernels/cpu_build.py')\n"
        "assert found['executes']() is not None and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
@needs_library
@LEVELS
def test_sanitizers_find_nothing(level, tmp_path):
    """The whole C++ under the sanitizers of addresses and undefined behaviour, beside guard pages,
    against loops in fp64."""
    program = tmp_path / "check"
    flags = f"-std=c++17 -O1 -ffp-contract=fast -pthread {cpu_build.LEVELS[level][1]}".split()
    sanitize = "-fsanitize=address,undefined -fno-sanitize-recover=undefined".split()
    source = str(ROOT / "tests" / "kernels" / "cpp" / "check.cpp")
    command = [cpu_build._compiler(), *flags, *sanitize, source, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "asan" in built.stderr and built.returncode:
        pytest.skip("The compiler has no sanitizers here.")
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "72 problems" in done.stdout
