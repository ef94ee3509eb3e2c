"""`pytest benches/`: small shapes, correctness, no bounds on seconds. `pytest benches/ --full`:
real ones, results appended."""

import loss
import pytest
import torch
from rivals import FLOOR, contenders

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTENDERS = contenders()
every_contender = pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
label = lambda shape: "x".join(map(str, shape))


@pytest.fixture(scope="module", autouse=True)
def one_thread(request):
    """Small shapes gain nothing from a second thread, and lose much where the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if request.config.getoption("--full") else 1)
    yield
    torch.set_num_threads(threads)


def usable(contender, problem, full):
    if reason := contender.why_missing(problem):
        pytest.skip(reason)
    if contender.compiles and not full:
        pytest.skip("Compiling takes longer than the quick mode may: --full.")
    return contender


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize(
            "shape",
            loss.FULL if metafunc.config.getoption("--full") else loss.QUICK,
            ids=label,
            scope="module",
        )


@pytest.fixture(scope="module")
def problem(shape):
    return loss.problem(shape, device=DEVICE, exact=False)


@every_contender
def test_time(contender, shape, problem, benchmark, request):
    """One contender after the other; `python benches/loss.py` interleaves them and is what the
    README's figures come from."""
    full = request.config.getoption("--full")
    step = usable(contender, problem, full).build(problem, loss.ALPHA, loss.BETA)
    benchmark.group = label(shape)
    benchmark.extra_info |= {
        "terms": contender.terms,
        "threads": torch.get_num_threads(),
        "device": loss.device_name(DEVICE),
    }

    def once():
        value, gradient = loss.run(step, problem.hidden)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return value, gradient

    value, gradient = benchmark.pedantic(once, rounds=5 if full else 3, warmup_rounds=2)
    assert gradient.shape == problem.hidden.shape and gradient.isfinite().all()
    assert contender.terms == "GEMM" or value.isfinite()


@pytest.fixture(scope="module")
def errors(shape, request):
    """For each contender its errors without a mask, then with one."""
    found = [c for c in CONTENDERS if request.config.getoption("--full") or not c.compiles]
    plain, masked = (
        loss.accuracy(found, shape, loss.LEVELS, mask=mask, device=DEVICE) for mask in (False, True)
    )
    return {name: plain[name] + masked[name] for name in plain}


@every_contender
def test_accuracy(contender, problem, errors, request):
    """Everyone computes the same function, as well as its class can: with fp32 logits at every KL,
    with bf16 ones only far from the teacher. Ours is held to its promise."""
    if contender.terms == "GEMM":
        pytest.skip("A floor computes no loss.")
    usable(contender, problem, request.config.getoption("--full"))
    found, exact = errors[contender.name], not problem.bf16
    assert {a["term"] for a in found} == (
        {"CE"} if contender.terms == "CE" else {"KL", "CE", "CE+KL"}
    )
    for a in found:
        assert "error" not in a, a["error"]
        if contender.ours:
            assert a["grad_error"] <= (1e-4 if exact else 0.015), a
            assert a["mask"] or a["value_error"] <= 1e-3, a
        elif exact or contender.fp32_logits:
            assert a["grad_error"] <= (0.02 if exact else 0.05), a
        elif a["level"] == loss.LEVELS[0]:  # at smaller KL nothing is left that could be asserted
            assert a["grad_error"] <= 0.3 and a["cosine"] >= 0.95, a


def test_memory_of_tiles():
    """The tiled backend does not hold the logits."""
    shape = (256, 32000, 64, "bfloat16")
    found = {c.name: c for c in CONTENDERS}
    tiled, eager = (loss.memory(found[name], shape, DEVICE) for name in ("fastsiu tiled", "eager"))
    if "mib_missing" in tiled:
        pytest.skip(tiled["mib_missing"])
    assert tiled["mib"] < eager["mib"] / 2
    assert eager["mib"] >= 256 * 32000 * 4 / 2**20


def test_rows(request, capsys):
    """Every contender leaves a row at every shape, with figures or with the reason why it has
    none."""
    full = request.config.getoption("--full")
    found = (
        CONTENDERS
        if full
        else [
            c for c in CONTENDERS if c.name in (FLOOR, "fastsiu tiled", "fastsiu triton", "eager")
        ]
    )
    for rows in loss.everything(
        loss.PARTS if full else ["shapes"], None, found, DEVICE, full, with_memory=full
    ):
        assert rows and {r["contender"] for r in rows} <= {c.name for c in found}
        for r in rows:
            assert {
                "date",
                "commit",
                "device",
                "threads",
                "torch",
                "triton",
                "version",
                "N",
                "V",
                "D",
                "dtype",
            } <= set(r)
            if r["kind"] == "shape":
                assert r["missing"] or (
                    r["ms"]["min"] <= r["ms"]["median"] <= r["ms"]["max"] and r["x_floor"] > 0
                )
                assert FLOOR in loss.table(rows)
        if full:
            loss.append(rows)
        with capsys.disabled():
            print(
                "\n" + (loss.table(rows) if rows[0]["kind"] == "shape" else loss.study_table(rows))
            )


def test_level_of_a_problem():
    """Problems sit at the KL that they are labelled with, and differ in nothing but what they
    say."""
    for dtype in ("bfloat16", "float32"):
        for peaked in (False, True):
            for level in (10.0, 1e-3, 1e-6):
                p = loss.problem((32, 8003, 128, dtype), level, peaked=peaked)
                value, _ = loss.truth_of(p, 0.0, 1.0)
                assert value.item() == pytest.approx(level, rel=0.2), (dtype, peaked, level)
