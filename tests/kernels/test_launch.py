"""The choice of backend and tile is a pure function, and the user sees it."""

import pytest
import torch

from fastsiu import fused_dmk_ce
from fastsiu.kernels import measured
from fastsiu.kernels.launch import TILE_BYTES, launch, narrow
from fastsiu.loss.backend import chosen


@pytest.mark.parametrize(
    "N, V, D",
    [(1, 3, 1), (64, 600, 96), (256, 151_936, 896), (4096, 262_144, 1152), (10**5, 32_000, 4096)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_tile_fits_its_budget_and_the_vocabulary(N, V, D, dtype, device):
    plan = launch(N, V, D, dtype, device)
    assert 0 < plan.tile <= max(V, 256) and 64 <= narrow(plan.tile) <= max(plan.tile, 64)
    rows = N if device == "cuda" and dtype == torch.bfloat16 else N + D
    assert plan.tile == 256 or plan.tile * rows * (8 if dtype == torch.float64 else 4) <= TILE_BYTES
    assert plan == launch(N, V, D, dtype, device) and ("measured" in plan.why) == (device == "cpu")


def test_auto_takes_the_reference_only_where_everything_is_small():
    assert launch(16, 600, 96, torch.float32, "cpu").backend == "reference"
    for N, V, D in [(16, 32_000, 96), (16, 2000, 1024), (1000, 600, 96)]:
        assert launch(N, V, D, torch.float32, "cpu").backend == "tiled"
    assert launch(16, 600, 96, torch.float32, "cuda").backend == "tiled"


def test_a_gpu_takes_triton_for_16_bit_until_it_is_measured(monkeypatch):
    for N in (1, 64, 4096):
        for dtype in (torch.bfloat16, torch.float16):
            plan = launch(N, 151_936, 2048, dtype, "cuda", "sm_86")
            assert plan.backend == "triton" and plan.why.startswith("predicted")
        assert launch(N, 151_936, 2048, torch.float32, "cuda", "sm_86").backend == "tiled"
        # no triton there
        assert launch(N, 151_936, 2048, torch.bfloat16, "cuda").backend == "tiled"
    monkeypatch.setitem(
        measured.BACKENDS, ("sm_86", "bfloat16", 256), ("tiled", "measured 2030-01-01 on a test")
    )
    plan = launch(256, 151_936, 2048, torch.bfloat16, "cuda", "sm_86")
    assert plan.backend == "tiled" and "measured 2030-01-01 on a test" in plan.why


def test_the_choice_is_visible_and_can_be_made_by_hand():
    h, W, y = torch.randn(16, 8), torch.randn(50, 8), torch.zeros(16, dtype=torch.int64)
    assert chosen(h, W).backend == "reference" and "measured" in chosen(h, W).why
    assert chosen(h, W, "tiled").backend == "tiled" and chosen(h, W, "tiled").why == "asked for"
    h.requires_grad_()
    names = {
        b: type(fused_dmk_ce(h, W, y, backend=b, reduction="none").grad_fn).__name__
        for b in ("auto", "reference", "tiled")
    }
    assert names["auto"] == names["reference"] and "fastsiu" in names["tiled"]
