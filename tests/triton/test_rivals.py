"""The bench's adapters of Liger's kernels compute our loss: in Triton's interpreter or on a GPU,
where liger-kernel is installed."""

import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need the package triton")
INTERPRETED = triton.knobs.runtime.interpret
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU: run TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)
pytest.importorskip("liger_kernel", reason="the adapters need liger-kernel: fastsiu[bench]")

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))
import loss  # noqa: E402
import rivals  # noqa: E402

# numpy, in branches that tl.where does not take
pytestmark = [
    pytest.mark.rivals,
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
NAMES = (
    "Liger JSD + FLCE",
    "Liger KLDiv + FLCE",
    "Liger KLDiv (mixed target)",
    "KL cache trick (Liger's CE)",
)


@pytest.mark.parametrize("name", NAMES)
def test_ligers_kernels_compute_the_same_loss(name):
    contender = next(c for c in rivals.contenders() if c.name == name)
    for alpha, beta in ((0.9, 0.75), (0.0, 1.0)):
        p = loss.problem((8, 300, 32, "float32"), 0.1, device=DEVICE)
        step = contender.build(p, alpha, beta)
        found = loss.compare(*loss.run(step, p.hidden), *loss.truth_of(p, alpha, beta))
        assert found["value_error"] <= 1e-4 and found["grad_error"] <= 1e-4, (name, found)
