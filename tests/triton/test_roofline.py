"""What benches/roofline_model.py says of the kernels is what they are: how many a call launches,
and which loops load ahead."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need the package triton")
if not triton.knobs.runtime.interpret:
    pytest.skip(
        "in the interpreter: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True
    )

from torch.profiler import ProfilerActivity, profile  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from fastsiu import TeacherCache, fused_dmk_ce  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benches"))
import roofline_model as model  # noqa: E402
from gpus import GPUS  # noqa: E402

# what launches nothing
VIEWS = set(
    "_local_scalar_dense _reshape_alias _unsafe_view alias as_strided contiguous detach detach_ "
    "empty empty_like empty_strided expand item lift_fresh new_empty permute reshape resize_ "
    "scalar_tensor select slice squeeze t to transpose unsqueeze view".split()
)


def launched(monkeypatch, training: bool) -> tuple[int, int]:
    """(torch's kernels, Triton's) of one call forward and backward at 64 rows: leaves of what torch
    calls, and launches, of which none runs."""
    launches = []
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda *given, **options: launches.append(1)
    )
    h, W = torch.zeros(64, 64, dtype=torch.bfloat16), torch.ones(3000, 64, dtype=torch.bfloat16)
    # labels on a CPU are read to check them, a parameter's are not: as on a GPU
    y = torch.nn.Parameter(torch.zeros(64, dtype=torch.int64), requires_grad=False)
    teacher = TeacherCache.from_hidden(h, W)
    # on a GPU 63 of 64 calls read nothing of the head
    monkeypatch.setattr(TeacherCache, "head_changed", lambda self, **options: False)
    head = W.clone().requires_grad_() if training else W

    def once():
        x, head.grad = h.detach().requires_grad_(), None
        fused_dmk_ce(x, head, y, teacher, backend="triton").backward()

    once()
    launches.clear()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        once()
    torch_s = lambda event: event.name.startswith("aten::")
    leaves = [
        e.name.removeprefix("aten::")
        for e in seen.events()
        if torch_s(e) and not any(map(torch_s, e.cpu_children))
    ]
    counted = collections.Counter(name for name in leaves if name not in VIEWS)
    return counted.total(), len(launches)


@pytest.mark.parametrize("training", [False, True])
def test_the_prediction_counts_what_a_call_launches(monkeypatch, training):
    kernels, launches = launched(monkeypatch, training)
    work = (model.trained if training else model.frozen)((64, 3000, 64, "bfloat16"), GPUS["H100"])
    assert (work.operations, work.launches) == (kernels, launches)


CODE = """
import json, re, sys
sys.path.insert(0, {benches!r})
import compile_kernels as ck, triton
found = {{}}
for kernel, variant, blocks, dtype, layout, source in ck.jobs({target!r}):
    named = dict(normalise="pair", coefficient="pair")
    named |= {{kernel: kernel for kernel in ("sums", "product", "outer")}}
    wanted = kernel in named and (dtype, layout) == ("bf16", ck.ALIGNED)
    if wanted and (blocks.BLOCK_N == 64 or kernel == "outer"):
        options = dict(num_warps=blocks.num_warps, num_stages=blocks.num_stages)
        made = triton.compile(source, target=ck.gpu({target!r}), options=options).asm["ttgir"]
        waits = [int(n) for n in re.findall(r"async_wait [^{{]*\\{{num = (\\d+)", made)]
        found.setdefault(named[kernel], []).append(any(waits))
print(json.dumps(found))
"""


@pytest.mark.parametrize("target", ["sm_86", "sm_90"])
def test_a_loop_that_loads_ahead_is_told_from_one_that_does_not(target):
    """In a process of its own, since this one interprets."""
    code = CODE.format(benches=str(ROOT / "benches"), target=target)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loops = json.loads(done.stdout.splitlines()[-1])
    assert loops.keys() == model.PIPELINED.keys()
    for kernel, ahead in loops.items():
        assert set(ahead) == {model.PIPELINED[kernel]}, (kernel, ahead)
