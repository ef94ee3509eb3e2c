"""Floors and predictions of benches/roofline.py: by hand, by what must hold for every GPU and
shape, and as printed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[2] / "benches"
sys.path.insert(0, str(BENCHES))
roofline = importlib.import_module("roofline")
GPUS, SHAPES = roofline.GPUS, roofline.SHAPES


def run(capsys, *arguments):
    """(exit code, standard output, standard error)"""
    code = roofline.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_floors_by_hand():
    gpu = GPUS["RTX 3090"]._replace(bf16=50.0, fp32=10.0, bandwidth=1000.0)
    # 4 * 100 * 1000 * 500 flops at 50e12 per second: 4 us. 1000 * 500 * 2 bytes at 1e12 per second:
    # 1 us.
    assert roofline.floor((100, 1000, 500, "bfloat16"), gpu) == pytest.approx(
        {"matmul": 4e-6, "memory": 1e-6}
    )
    assert roofline.floor((100, 1000, 500, "float32"), gpu) == pytest.approx(
        {"matmul": 20e-6, "memory": 2e-6}
    )
    # A head that trains: four products; two heads are read and dW is written.
    assert roofline.floor((100, 1000, 500, "bfloat16"), gpu, True) == pytest.approx(
        {"matmul": 8e-6, "memory": 3e-6}
    )
    assert roofline.ridge(gpu) == pytest.approx(25) and roofline.ridge(
        gpu, reads=2
    ) == pytest.approx(50)


def test_one_chunk_by_hand():
    """[64, 2048] with D 256 on a GPU of 16 units: one row block of 64, 16 tiles, 16 splits; the
    product has 2 slices of 128 and 8 splits of 2 tiles. All units are busy, and half of the 36 MB
    of L2 hold W (1 MB) and e (262 kB)."""
    gpu = GPUS["RTX 4070"]._replace(units=16)
    work = roofline.frozen((64, 2048, 256, "bfloat16"), gpu)
    sums, product, combine, gather = work.costs
    W, e, h = 2048 * 256 * 2, 64 * 2048 * 2, 64 * 256 * 2
    assert sums == roofline.Cost(2 * 64 * 2048 * 256, W + h + e + 4 * 64 * 16, W + 16 * h + e, 1.0)
    assert product == roofline.Cost(
        2 * 64 * 2048 * 256, 2 * 8 * 64 * 256 * 4, 2 * 8 * 64 * 256 * 4 + W + 2 * e, 1.0
    )
    assert combine.dram == 10 * 64 * 256 * 4 and work.launches == 3
    # 64 rows of 17 are 17 / 32 of W
    assert gather.dram == 2 * 17 * W / 32 + 12 * 64 * 256 and gather.l2 > gather.dram
    # then W and e are read again
    small = roofline.frozen((64, 2048, 256, "bfloat16"), gpu._replace(l2=1.0)).costs[1]
    assert small.dram == product.dram + W + e and small.l2 == product.l2


def test_one_chunk_of_the_general_path_by_hand():
    """The same with 32 tiles of 64, in two waves; dW has 16 by 4 tiles of 128 x 64, in four."""
    work = roofline.trained((64, 2048, 256, "bfloat16"), GPUS["RTX 4070"]._replace(units=16))
    W, dx, h, product = 2048 * 256 * 2, 64 * 2048 * 2, 64 * 256 * 2, 2 * 64 * 2048 * 256
    partial = 2 * 8 * 64 * 256 * 4
    assert work.launches == 4 and work.costs == [
        roofline.Cost(2 * product, 2 * W + 2 * h, 2 * W + 2 * 32 * h, 1.0),
        roofline.Cost(2 * product, 2 * W + 2 * h + dx + 16 * 64 * 32, 2 * W + 2 * 32 * h + dx, 1.0),
        roofline.Cost(product, partial, partial + W + 2 * dx, 1.0),
        roofline.Cost(product, dx + h + W, 4 * dx + 16 * h + W, 1.0),
    ]


@pytest.mark.parametrize("training", [False, True])
def test_no_prediction_is_faster_than_its_floor(training):
    for gpu in GPUS.values():
        for shape in SHAPES:
            p = roofline.predict(shape, gpu, training)
            N, V, D, dtype = shape
            assert p["ms"] >= 1e3 * max(roofline.floor(shape, gpu, training).values()), (gpu, shape)
            assert p["flops"] >= (12 if training else 4) * N * V * D
            assert (
                p["dram"] >= (5 if training else 1) * V * D * (4 if dtype == "float32" else 2)
                and p["kernels"] > 100
            )
            work = (roofline.trained if training else roofline.frozen)(shape, gpu)
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
                roofline.predict((*s, "bfloat16"), GPUS[name], training) for s in (before, after)
            )
            assert all(less[key] < more[key] for key in ("flops", "dram", "l2")), (
                name,
                before,
                after,
            )


def test_a_changed_launch_row_changes_the_prediction(monkeypatch):
    shape, gpu = (256, 151936, 2048, "bfloat16"), GPUS["RTX 3090"]
    before, launch = roofline.predict(shape, gpu), roofline.triton_launch
    monkeypatch.setattr(roofline, "triton_launch", lambda *a: launch(*a)._replace(chunk=8 * 128))
    after = roofline.predict(shape, gpu)
    assert after["kernels"] > before["kernels"] and after["host_ms"] > before["host_ms"]
    # it gathers in slices
    assert roofline.around(1024, 2048, "bfloat16")[0] > roofline.around(16, 64, "bfloat16")[0]


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
    assert code == 0 and "predicted, ms" in printed and "predicted share" in printed
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
