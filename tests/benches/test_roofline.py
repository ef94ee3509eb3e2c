"""Floors and predictions of benches/roofline.py: by hand, by what must hold for every GPU and
shape, and as printed."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[2] / "benches"
sys.path.insert(0, str(BENCHES))
roofline = importlib.import_module("roofline")
model = importlib.import_module("roofline_model")
GPUS, SHAPES = roofline.GPUS, roofline.SHAPES


def run(capsys, *arguments):
    """(exit code, standard output, standard error)"""
    code = roofline.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_floors_by_hand():
    gpu = GPUS["RTX 3090"]._replace(bf16=50.0, fp32=10.0, bandwidth=1000.0)
    # 4 * 100 * 1000 * 500 flops at 50e12 per second: 4 us. 1000 * 500 * 2 bytes at 1e12 per second:
    # 1 us.
    assert model.floor((100, 1000, 500, "bfloat16"), gpu) == pytest.approx(
        {"matmul": 4e-6, "memory": 1e-6}
    )
    assert model.floor((100, 1000, 500, "float32"), gpu) == pytest.approx(
        {"matmul": 20e-6, "memory": 2e-6}
    )
    # A head that trains: four products; two heads are read and dW is written.
    assert model.floor((100, 1000, 500, "bfloat16"), gpu, True) == pytest.approx(
        {"matmul": 8e-6, "memory": 3e-6}
    )
    assert model.ridge(gpu) == pytest.approx(25) and model.ridge(gpu, reads=2) == pytest.approx(50)


def test_one_chunk_by_hand():
    """[64, 2048] with D 256 on a GPU of 16 units: one row block of 64, 16 tiles, 16 splits; the
    product has 2 slices of 128 and 8 splits of 2 tiles. All units are busy, and half of the 36 MB
    of L2 hold W (1 MB) and e (262 kB)."""
    gpu = GPUS["RTX 4070"]._replace(units=16)
    work = model.frozen((64, 2048, 256, "bfloat16"), gpu)
    prepare, sums, product, finish = work.costs
    W, e, h = 2048 * 256 * 2, 64 * 2048 * 2, 64 * 256 * 2
    assert sums[:5] == ("sums", 2 * 64 * 2048 * 256, W + h + e + 4 * 64 * 16, W + 16 * h + e, 1.0)
    assert product[:4] == (
        "product",
        2 * 64 * 2048 * 256,
        8 * 64 * 256 * 4,
        8 * 64 * 256 * 4 + W + 2 * e,
    )
    assert product.busy == 1.0
    # tiles of 64 x 128 and of 128 x 64 in steps of 64
    assert sums.pipe[:4] == (2 * 64 * 128 * 64, (64 + 128) * 64 * 2, 64, 3)
    assert product.pipe[:4] == (*sums.pipe[:2], 128, 4)
    # 64 rows of 17 are 17 / 32 of W; h, h_t and m in fp32
    assert prepare.dram == prepare.l2 == 17 * W / 32 + 8 * 64 * 256
    # the same, 8 partial products, m and dh, and dh scaled; 12 bytes for each split and row
    assert finish.dram == 17 * W / 32 + 64 * 256 * (8 * 4 + 4 + 4 + 4 + 2)
    assert finish.l2 == finish.dram + 12 * 16 * 64
    # Two programs at once on 16 units are two waves. D is one piece; row numbers come before it,
    # and a row's factors before those.
    assert (prepare.waits, finish.waits) == (2 * 3, 2 * (2 + 8))
    assert prepare.seconds(gpu, 1.0)["waiting for loads"] == pytest.approx(6 * 700 / 2.475e9)
    assert work.launches == 5 and work.operations == 3
    # then W and e are read again
    small = model.frozen((64, 2048, 256, "bfloat16"), gpu._replace(l2=1.0)).costs[2]
    assert small.dram == product.dram + W + e and small.l2 == product.l2


def test_one_chunk_of_the_general_path_by_hand():
    """The same with 32 tiles of 64, in two waves; dW has 16 by 4 tiles of 128 x 64, in four."""
    work = model.trained((64, 2048, 256, "bfloat16"), GPUS["RTX 4070"]._replace(units=16))
    W, dx, h, product = 2048 * 256 * 2, 64 * 2048 * 2, 64 * 256 * 2, 2 * 64 * 2048 * 256
    partial = 8 * 64 * 256 * 4
    assert work.launches == 9 and [cost[:5] for cost in work.costs] == [
        ("prepare", 0, 3 * h, 3 * h, 1.0),
        ("normalise", 2 * product, 2 * W + 2 * h, 2 * W + 2 * 32 * h, 1.0),
        (
            "coefficient",
            2 * product,
            2 * W + 2 * h + dx,
            2 * W + 2 * 32 * h + dx,
            1.0,
        ),
        ("product", product, partial, partial + W + 2 * dx, 1.0),
        ("outer", product, dx + h + W, 4 * dx + 16 * h + W, 1.0),
        ("gather", 0, partial + h, partial + h, 1.0),
    ]


def test_a_further_chunk_reads_the_partial_products_again(monkeypatch):
    gpu, launch = GPUS["RTX 4070"]._replace(units=16), model.triton_launch
    monkeypatch.setattr(model, "triton_launch", lambda *a: launch(*a)._replace(chunk=1024))
    work = model.frozen((64, 2048, 256, "bfloat16"), gpu)
    _, _, first, _, second, _ = work.costs
    assert second.dram == 2 * first.dram and work.launches == 3 + 2 * 2


def test_what_a_loop_reaches_by_hand():
    """128 x 128 x 64 in bf16 on an H100: 2,097,152 flops, of which a multiprocessor does 4096 a
    clock; 32 KiB loaded at 32 bytes a clock take 1024 clocks, multiplying at 0.8 * 0.85 takes
    753."""
    gpu = GPUS["H100"]._replace(bf16=4096 * 132 * 1.83e9 / 1e12)
    peak = model.peak(gpu, "bfloat16")
    loop = model.Pipe(2 * 128 * 128 * 64, 256 * 64 * 2, 128, 4, True)
    reached, by = loop.reached(gpu, peak)
    assert by == "L2" and reached == pytest.approx(512 / 1024)
    # nothing at once
    reached, by = loop._replace(ahead=False).reached(gpu, peak)
    assert by == "waiting for loads"
    assert reached == pytest.approx(512 / (512 / 0.68 + 1024 + 700))
    # twice the rows: half the loads for each flop
    reached, by = model.Pipe(2 * 256 * 128 * 64, 384 * 64 * 2, 256, 4, True).reached(gpu, peak)
    assert by == "L2" and reached == pytest.approx(1024 / 1536)
    # below 64 rows there is no wgmma, and a buffer less: 62 clocks at 0.63, 700 / 3 of latency
    reached, by = model.Pipe(2 * 16 * 64 * 64, 80 * 64 * 2, 16, 4, True).reached(gpu, peak)
    assert by == "L2" and reached == pytest.approx(32 / 320)
    reached, by = model.Pipe(2 * 16 * 64 * 64, 80 * 64, 16, 4, True).reached(gpu, peak)
    assert by == "waiting for loads" and reached == pytest.approx(32 / (700 / 3))


def test_two_products_by_hand():
    """What an H100 reaches: 3.0 TB/s and 791 TFLOP/s. At 64 rows W moves twice; at 1024 it
    multiplies."""
    gpu = GPUS["H100"]
    W = 151_936 * 2048 * 2
    few = model.two_products((64, 151_936, 2048, "bfloat16"), gpu)
    assert few == pytest.approx(2 * (W + 2 * 64 * (151_936 + 2048)) / 3.015e12, rel=0.02)
    assert few == pytest.approx(0.43e-3, rel=0.02)
    many = model.two_products((1024, 151_936, 2048, "bfloat16"), gpu)
    assert many == pytest.approx(4 * 1024 * 151_936 * 2048 / 791.5e12, rel=0.01)


@pytest.mark.parametrize("training", [False, True])
def test_no_prediction_is_faster_than_its_floor(training):
    for gpu in GPUS.values():
        for shape in SHAPES:
            p = model.predict(shape, gpu, training)
            N, V, D, dtype = shape
            assert p["ms"] >= 1e3 * max(model.floor(shape, gpu, training).values()), (gpu, shape)
            assert p["flops"] >= (12 if training else 4) * N * V * D
            assert (
                p["dram"] >= (5 if training else 1) * V * D * (4 if dtype == "float32" else 2)
                and p["device_ms"] <= p["ms"] >= p["host_ms"]
            )
            work = (model.trained if training else model.frozen)(shape, gpu)
            assert all(0 < cost.busy <= 1 for cost in work.costs), (gpu, shape)


@pytest.mark.parametrize("training", [False, True])
def test_more_of_anything_is_more_bytes_and_flops(training):
    for name in ("RTX 3060", "H200"):
        for before, after in [
            ((64, 32000, 1024), (128, 32000, 1024)),
            ((256, 32000, 1024), (1024, 32000, 1024)),
            ((64, 32000, 1024), (64, 64000, 1024)),
            ((64, 32000, 1024), (64, 32000, 2048)),
        ]:
            less, more = (
                model.predict((*s, "bfloat16"), GPUS[name], training) for s in (before, after)
            )
            assert all(less[key] < more[key] for key in ("flops", "dram", "l2")), (
                name,
                before,
                after,
            )


def test_a_changed_launch_row_changes_the_prediction(monkeypatch):
    shape, gpu = (256, 151936, 2048, "bfloat16"), GPUS["RTX 3090"]
    before, launch = model.predict(shape, gpu), model.triton_launch
    monkeypatch.setattr(model, "triton_launch", lambda *a: launch(*a)._replace(chunk=8 * 128))
    after = model.predict(shape, gpu)
    assert after["kernels"] > before["kernels"] and after["host_ms"] > before["host_ms"]


def test_what_is_slow_is_named_with_its_reason(monkeypatch, capsys):
    shapes = ("64,151936,2048", "16,151936,2048", "1024,151936,2048")
    given = ["--gpu", "H100", "H200", "--shape", *shapes]
    # as if Python took milliseconds, and the product's loop waited for each load
    monkeypatch.setattr(model, "FROZEN", model.FROZEN._replace(host=2e-3))
    monkeypatch.setitem(model.PIPELINED, "product", False)
    _, printed, _ = run(capsys, *given)
    assert "Predicted below 80 % of two products" in printed and "2 of 2 shapes" in printed
    assert "- H100, bfloat16, N 64: " in printed and "Python takes" in printed
    assert "- H200" not in printed
    monkeypatch.setattr(model, "FROZEN", model.FROZEN._replace(host=0.0))
    _, printed, _ = run(capsys, *given)
    assert "Loads that are waited for in product" in printed and "Python" not in printed
    monkeypatch.undo()
    _, printed, _ = run(capsys, *given)
    assert "1 of 2 shapes" in printed and "- H100, bfloat16, N 1024: " in printed
    assert "The L2's bandwidth, for tiles that small, in sums and product" in printed
    monkeypatch.setattr(model, "L2_RATE", 64)
    monkeypatch.setattr(model, "OURS", {"sm_90": 1.0})
    _, printed, _ = run(capsys, *given)
    assert "from N = 64: nothing." in printed
    _, printed, _ = run(capsys, *given, "--general")
    assert "of two products, on" not in printed


def test_measured_rows_are_picked_up(tmp_path, capsys):
    row = dict(
        kind="shape",
        device=GPUS["H200"].device,
        contender="fastsiu triton",
        missing=None,
        N=256,
        V=32000,
        D=2048,
        dtype="bfloat16",
        ms={"median": 9.0},
    )
    others = [
        row | dict(ms={"median": 2.0}),
        row | dict(device="NVIDIA H200 NVL"),
        row | dict(contender="fastsiu tiled"),
        row | dict(N=64),
        row | dict(dtype="float32"),
        row | dict(kind="study"),
    ]
    results, out = tmp_path / "loss.jsonl", tmp_path / "out.json"
    results.write_text("\n".join(json.dumps(r) for r in [row, *others]) + "\n")
    code, printed, _ = run(
        capsys,
        "--gpu",
        "h200",
        "3090",
        "--shape",
        "256,32000,2048",
        "--results",
        results,
        "--json",
        out,
    )
    first, second = (line for line in printed.splitlines() if "256, 32000, 2048" in line)
    floor = 4 * 256 * 32000 * 2048 / (GPUS["H200"].bf16 * 1e12)
    assert code == 0 and "predicted, ms" in printed and "of two products" in printed
    assert first.endswith(f"| 2 | {roofline.percent(floor / 2e-3)} |") and second.endswith(
        "| not measured | - |"
    )
    first, second = json.loads(out.read_text())["rows"]
    assert first["measured_ms"] == 2.0 and first["measured_share"] == pytest.approx(floor / 2e-3)
    assert second["measured_ms"] is None and second["predicted_share"] < 1
    _, printed, _ = run(
        capsys, "--gpu", "h200", "--shape", "256,32000,2048", "--results", results, "--general"
    )
    assert "not measured" in printed  # the bench's head is frozen


def test_the_readme_says_what_is_predicted():
    text = " ".join((BENCHES.parent / "README.md").read_text().split())
    for name, N, said in [
        ("RTX 4090", 64, r"(\d+ %)[^%]* on an RTX 4090"),
        ("H100", 64, r"(\d+ %)[^%]* on an H100"),
        ("H100", 256, r"on an H100 \((\d+ %) at 256"),
    ]:
        shape, gpu = (N, 151_936, 2048, "bfloat16"), GPUS[name]
        share = 1e3 * model.two_products(shape, gpu) / model.predict(shape, gpu)["ms"]
        found = re.search(said, text)
        assert found and found[1] == f"{100 * share:.0f} %", (name, N, share)


@pytest.mark.parametrize(
    "bad",
    [["--gpu", "RTX 9999"], ["--shape", "1,2"], ["--shape", "1,2,0"], ["--shape", "1,2,3,int8"]],
)
def test_bad_input_is_one_sentence(bad, capsys):
    code, printed, error = run(capsys, *bad)
    assert (
        code == 2
        and not printed
        and bad[1] in error
        and error.count("\n") == 1
        and error.endswith(".\n")
        and ":" in error
    )


def test_it_needs_neither_triton_nor_a_gpu():
    code = (
        f"import sys; sys.modules['triton'] = None; sys.path.insert(0, {str(BENCHES)!r}); "
        "import roofline; "
    )
    code += "sys.exit(roofline.main(['--gpu', 'H100', '--shape', '64,32000,1024']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHES.parent
    )
    assert done.returncode == 0 and "H100" in done.stdout, done.stderr
