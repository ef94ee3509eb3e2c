"""What a type checker sees of the public names: right calls pass, wrong ones are caught."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CALLS = """
import torch
import fastsiu
from fastsiu import Recipe, Request, Settings, TeacherCache, fused_dmk_ce

h, W, y = torch.ones(2, 3), torch.ones(5, 3), torch.ones(2, dtype=torch.int64)
loss = fused_dmk_ce(h, W, y, TeacherCache.from_hidden(h, W), alpha=0.5)  # right
fused_dmk_ce("nonsense", 3, foo=1)  # wrong
TeacherCache.from_hidden(1, W)  # wrong
result = fastsiu.unlearn("img.jpg", "NAME", memory=12, lr=1e-3, redact=True)  # right
forgotten: bool = result.forgotten  # right
fastsiu.unlearn("img.jpg")  # wrong
fastsiu.unlearn("img.jpg", "NAME", stepps=3)  # wrong
fastsiu.unlearn("img.jpg", "NAME", dtype=3)  # wrong
Request("NAME", 3)  # wrong
Recipe(schedule="never")  # wrong
Settings(memory="12 GB")  # wrong
fastsiu.nothing  # wrong
fastsiu.head_of(3)  # wrong
fastsiu.why_not(1, h, W)  # wrong
"""


@pytest.mark.slow
def test_a_type_checker_catches_wrong_calls_and_no_right_one(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "calls.py").write_text(CALLS)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(tmp_path / "cache"), str(tmp_path / "calls.py")]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    caught = {int(n) for n in re.findall(r"calls\.py:(\d+): error", done.stdout)}
    wrong = {n for n, line in enumerate(CALLS.split("\n"), 1) if line.endswith("# wrong")}
    assert caught == wrong, done.stdout + done.stderr
