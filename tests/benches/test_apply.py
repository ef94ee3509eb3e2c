"""benches/apply.py: what a GPU has measured reaches the launch and the documents, once; what the
interpreter has measured does not."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_rows import SHAPES, STEP, WIDE, real_row, synthetic, with_real

from fastsiu.kernels import triton_launch
from fastsiu.kernels.triton_launch import TARGETS, Blocks, measured_backend

ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16
LOSS, REAL = "docs/performance.md", "docs/memory.md"


@pytest.fixture
def editor(monkeypatch):
    """benches/apply.py; what it changes in benches/loss.py is put back."""
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    import apply
    import loss

    for name in ("RESULTS", "PLOTS"):
        monkeypatch.setattr(loss, name, getattr(loss, name))
    return apply


@pytest.fixture
def tree(editor, tmp_path):
    """What benches/apply.py changes, without the rows of any GPU."""
    made = editor.copy(tmp_path / "tree")
    path = made / "kernels/measured.py"
    path.write_text(re.sub(r" = \{.*?\}(?=\n\n|\n*\Z)", " = {}", path.read_text(), flags=re.S))
    return made


def applied(tree, monkeypatch):
    """triton_launch with the tree's measured.py"""
    found = runpy.run_path(str(tree / "kernels" / "measured.py"))
    monkeypatch.setattr(
        triton_launch, "measured", SimpleNamespace(PLANS=found["PLANS"], BACKENDS=found["BACKENDS"])
    )
    return lambda N, target="sm_90", dtype=BF16, **more: triton_launch.triton_launch(
        N, 151_936, 2048, dtype, target, **more
    )


def test_measured_rows_reach_the_launch_with_their_provenance(editor, tree, tmp_path, monkeypatch):
    before = applied(tree, monkeypatch)(64)
    assert editor.apply(synthetic(tmp_path / "results"), tree, False) == 0
    launch = applied(tree, monkeypatch)
    plan = launch(64)
    assert (
        plan.sums == WIDE
        and plan.product == STEP
        and before.sums != WIDE
        and isinstance(plan.sums, Blocks)
    )
    assert plan == triton_launch.plan_of(
        WIDE, STEP, 1, 2**23, 64, 151_936, 2048, BF16, 132, plan.why
    )
    assert plan.chunk == 2**23 // (2 * 64) != before.chunk
    assert plan.why == (
        "measured 2026-01-02 on Synthetic GPU, commit 0123abc, [64, 1000] D 32 / 64: "
        "1.000 / 2.000 ms, the predicted row 1.500 / 2.500"
    )
    assert [launch(N).sums.BLOCK_N for N in (1, 63, 65, 256, 10_000)] == [64, 64, 256, 256, 256]
    assert launch(64) == plan
    for other in (
        launch(64, "sm_80"),
        launch(64, dtype=torch.float16),
        launch(64, dtype=torch.float32),
        launch(64, heavy=True),
    ):
        assert other.why.startswith("predicted for ")
    backend, why = measured_backend("sm_90", BF16, 50)
    assert (
        backend == "triton"
        and "0.50 of tiled's time" in why
        and why.startswith("measured 2026-01-02 on Synthetic GPU")
    )
    assert measured_backend("sm_90", BF16, 4096)[0] == "tiled"
    assert (
        measured_backend("sm_90", torch.float32, 64) is None
        and measured_backend("sm_89", BF16, 64) is None
    )


def test_it_is_applied_once_and_beside_what_was_there(editor, tree, tmp_path, capsys):
    original = (ROOT / LOSS).read_text()
    for _ in range(2):
        assert editor.apply(synthetic(tmp_path / "results"), tree, False) == 0
    page, end = (tree / LOSS).read_text(), "<!-- end of table -->"
    begin = "<!-- table: python benches/loss.py --table -->"
    cpu = lambda text: text.split(begin)[1].split(end)[0]
    assert cpu(page) == cpu(original)
    assert page.count("--of 'Synthetic GPU' -->") == 1 and page.count("### On Synthetic GPU") == 1
    assert "fastsiu triton" in page.split("--of 'Synthetic GPU' -->")[1].split(end)[0]
    start = page.index("\n### On Synthetic GPU")
    assert page[:start] + page[page.index(end, start) + len(end) + 1 :] == original
    assert len((tree / "benches/results/loss.jsonl").read_text().splitlines()) == 8 + len(
        (ROOT / "benches/results/loss.jsonl").read_text().splitlines()
    )
    other = synthetic(tmp_path / "other", device="Another One")
    other.write_text(other.read_text().replace("sm_90", "sm_89"))
    assert editor.apply(other, tree, False) == 0
    found = runpy.run_path(str(tree / "kernels/measured.py"))
    assert (
        {target for target, *_ in found["PLANS"]}
        == {target for target, *_ in found["BACKENDS"]}
        == {"sm_89", "sm_90"}
    )
    source = (tree / "kernels/measured.py").read_text()
    assert max(map(len, source.splitlines())) <= 100 and source.startswith(
        (ROOT / "kernels/measured.py").read_text()[:200]
    )


@pytest.mark.parametrize(
    "options", [dict(device="interpreter", quick=True), dict(tuned="interpreter")]
)
def test_figures_of_the_interpreter_are_refused(editor, tree, tmp_path, capsys, options):
    before = (tree / "kernels/measured.py").read_bytes()
    assert editor.apply(synthetic(tmp_path / "results", **options), tree, False) == 0
    assert (tree / "kernels/measured.py").read_bytes() == before
    assert "refused" in capsys.readouterr().out


def test_plots_of_a_gpu_stand_beside_the_others(editor, tree, tmp_path):
    pytest.importorskip("matplotlib")
    assert editor.apply(synthetic(tmp_path / "results"), tree, True) == 0
    drawn = sorted(p.name for p in (tree / "benches/plots").iterdir())
    assert drawn == ["loss_scaling-synthetic-gpu.png", "loss_tradeoff-synthetic-gpu.png"]
    page = (tree / LOSS).read_text()
    assert all(f"(../benches/plots/{name})" in page for name in drawn)


def test_an_incomplete_device_gets_no_table(editor, tree, tmp_path, capsys):
    assert editor.apply(synthetic(tmp_path / "results", shapes=SHAPES[:1]), tree, False) == 1
    assert (tree / LOSS).read_bytes() == (ROOT / LOSS).read_bytes()
    assert "N=64, V=151936, D=2048, bfloat16" in capsys.readouterr().err


def test_a_campaign_that_was_cut_short_is_applied_as_far_as_it_came(editor, tree, tmp_path, capsys):
    """Killed in the middle of a row, at the first shape."""
    results = synthetic(tmp_path / "results")
    lines = results.read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if '"kind": "shape"' in line)
    results.write_text("".join([*lines[:end], lines[end][:100]]))
    assert editor.apply(results, tree, False) == 1
    found = runpy.run_path(str(tree / "kernels/measured.py"))
    assert {N for *_, N in found["PLANS"]} == {64, 256} and not found["BACKENDS"]
    assert (tree / LOSS).read_bytes() == (ROOT / LOSS).read_bytes()
    assert "left as they are" in capsys.readouterr().err


def test_rows_from_a_copy_without_history_get_their_commit(editor, tree, tmp_path, capsys):
    results = synthetic(tmp_path / "results")
    results.write_text(results.read_text().replace("0123abc", "unknown"))
    assert editor.apply(results, tree, False) == 2 and "--commit" in capsys.readouterr().err
    assert editor.apply(results, tree, False, "4567def") == 0
    source = (tree / "kernels/measured.py").read_text()
    assert "commit 4567def" in source and "unknown" not in source


def test_a_folder_of_results_goes_into_a_copy(editor, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    synthetic(tmp_path / "results/gpu.jsonl")
    given = ["apply.py", tmp_path / "results", "--into", tmp_path / "copy", "--no-plots"]
    monkeypatch.setattr(sys, "argv", [*map(str, given)])
    assert editor.main() == 0
    assert "--of 'Synthetic GPU' -->" in (tmp_path / "copy" / LOSS).read_text()


def test_the_launch_file_in_the_tree_holds_only_what_a_gpu_measured():
    found = runpy.run_path(str(ROOT / "kernels/measured.py"))
    for key, entry in [*found["PLANS"].items(), *found["BACKENDS"].items()]:
        assert (
            key[0] in TARGETS
            and entry[-1].startswith("measured 20")
            and "interpreter" not in entry[-1]
        )


def test_runs_at_the_real_size_get_their_table_once(editor, tree, tmp_path):
    slow = real_row(
        "bf16", total=75.25, met_seconds=False, target_gb=None, budget=dict(micro_batch=4)
    )
    absent = dict(
        kind="real",
        variant="flash",
        device="Synthetic GPU",
        missing="It is not installed.",
        seconds={},
    )
    path = with_real(tmp_path / "results", real_row("nf4"), slow, absent)
    for _ in range(2):
        assert editor.apply(path, tree, False) == 0
    page, original = (tree / REAL).read_text(), (ROOT / REAL).read_text()
    begin = "<!-- table: python benches/real.py --table --of 'Synthetic GPU' -->"
    table = page.split(begin)[1].split("<!-- end of table -->")[0]
    assert page.count(begin) == 1 and page.count("### On Synthetic GPU") == 1
    assert (
        page.index("## Measured at the real size")
        < page.index(begin)
        < page.index("## How good the estimate is")
    )
    one, two = (line for line in table.splitlines() if line.startswith(("| nf4", "| bf16")))
    assert (
        "| 8.0 | 50.0 s | 5.0 | 10.0 | 10.0 | 1.0 | 20.0 | 3.0 | 1.0 | 60 s: met | 10.50 | 10.25 "
        "| 11 GB: met |" in one
    )
    assert (
        "| 75.2 s |" in two
        and "| 60 s: not met |" in two
        and two.endswith("| - |")
        and "at last micro-batch 4" in two
    )
    assert "flash (It is not installed)" in table and "13.2 GB written in 30 s" in table
    assert len((tree / "benches/results/real.jsonl").read_text().splitlines()) == 4
    start, end = (
        page.index("\n### On Synthetic GPU"),
        page.index("<!-- end of table -->", page.index(begin)),
    )
    assert page[:start] + page[end + len("<!-- end of table -->\n") :] == original
    assert (tree / "benches/results/loss.jsonl").read_bytes() == (
        ROOT / "benches/results/loss.jsonl"
    ).read_bytes()


def test_a_newer_run_takes_the_place_of_the_older_one_of_its_variant(editor, tree, tmp_path):
    assert (
        editor.apply(with_real(tmp_path / "one", real_row("nf4"), real_row("bf16")), tree, False)
        == 0
    )
    assert editor.apply(with_real(tmp_path / "two", real_row("nf4", total=40.5)), tree, False) == 0
    page = (tree / REAL).read_text()
    assert page.count("| nf4 | nf4 |") == 1 and "| 40.5 s |" in page and "| bf16 |" in page


def test_nothing_that_ran_makes_no_table(editor, tree, tmp_path):
    failed = dict(
        kind="real",
        variant="bf16",
        device="Synthetic GPU",
        missing="It failed.",
        seconds={},
        failed=True,
    )
    assert editor.apply(with_real(tmp_path / "results", failed), tree, False) == 0
    assert (tree / REAL).read_bytes() == (ROOT / REAL).read_bytes()


def test_bad_input_is_one_sentence(editor, tmp_path, capsys, monkeypatch):
    text, empty = tmp_path / "text", tmp_path / "empty"
    text.write_text("not JSON\n")
    empty.write_text("")
    rehearsal = synthetic(tmp_path / "rehearsal", quick=True)
    for file in (tmp_path / "none", text, empty, rehearsal):
        monkeypatch.setattr(sys, "argv", ["apply.py", str(file)])
        assert editor.main() == 2, file
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("apply.py: "), said
