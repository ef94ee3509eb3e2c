"""benches/real.py without a GPU: its model, its limits, and all of it on a tiny model."""

import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_rows import real_row

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def real(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    import real

    return real


def test_a_variant_that_fails_loses_no_other(real, tmp_path, monkeypatch):
    """Each job in a process that does what a GPU's would, down to its end."""
    script = tmp_path / "jobs.py"
    script.write_text(
        "import json, sys, time\n"
        "job = json.loads(sys.argv[2])\n"
        "if job['variant'] == 'nf4 in 12 GB': raise RuntimeError('an illegal address')\n"
        "if job['variant'] == 'nf4 in 8 GB': time.sleep(60)\n"
        "made = dict.fromkeys(('date', 'commit', 'device', 'gpu', 'torch', 'transformers', "
        "'model'), 'known')\n"
        "print('said by a library')\n"
        "print(json.dumps(dict(kind='real', variant=job['variant'], missing=None, **made)))\n"
    )
    monkeypatch.setattr(real, "__file__", str(script))
    monkeypatch.setattr(real, "LEAST", 0.5)
    monkeypatch.setattr(real.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    rows, chosen = [], real.chosen(False, ["nf4 in 12 GB", "bf16, sdpa", "nf4 in 8 GB", real.STEP])
    assert real.every(chosen, False, False, time.monotonic() + 8, rows.extend) == 1
    assert [r["variant"] for r in rows] == [None, *(v.name for v in chosen)] and {
        r["device"] for r in rows
    } == {"known"}
    made, crashed, fine, slow, late = (r["missing"] for r in rows)
    assert made is fine is None and crashed == "RuntimeError: an illegal address"
    assert slow.startswith("Not done after") and late == "No time was left for it."


def test_targets_are_judged_where_they_were_put_to_the_test(real):
    row = real_row("a", peak=dict(used=11.5), total=60.0)
    assert real.met(row) == dict(met_gb=False, met_seconds=True)
    with pytest.raises(real.BadInput, match="choose from bf16, sdpa, nf4"):
        real.chosen(False, ["nf4"])
    for other in (
        row | dict(missing="It failed."),
        row | dict(quick=True),
        row | dict(target_gb=None, target_seconds=None),
    ):
        assert real.met(other) == dict(met_gb=None, met_seconds=None)


def test_the_real_size_is_llava_s(real):
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    config, processor = real.described(real.REAL)
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for p in base.parameters()) == 7_063_427_072  # as published
    seen = processor(text=["<image> a"], images=[Image.new("RGB", (640, 480))], return_tensors="pt")
    assert int((seen["input_ids"] == config.image_token_index).sum()) == 576 and seen[
        "pixel_values"
    ].shape[-2:] == (336, 336)
    text = real.answer(processor.tokenizer, 40, real.CONCEPT)
    assert len(processor.tokenizer(text, add_special_tokens=False).input_ids) == 39


def test_the_limit_is_for_the_whole_process(real, monkeypatch):
    """Of 80 GB, 0.5 are gone before anything is allocated, and 0.75 in the end; torch holds 7 of
    which 6.5 were in use."""
    GB, shares = 2**30, []
    now = SimpleNamespace(free=79.5, reserved=0.0)
    fake = dict(
        mem_get_info=lambda: (now.free * GB, 80 * GB),
        memory_reserved=lambda: now.reserved * GB,
        max_memory_reserved=lambda: 7 * GB,
        max_memory_allocated=lambda: 6.5 * GB,
        reset_peak_memory_stats=lambda: None,
        set_per_process_memory_fraction=shares.append,
    )
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(real, "place", lambda: "cuda")
    gauge = real.Gauge(7.5)
    real.Gauge(None)
    real.Gauge(100)
    assert shares == [7 / 80, 1.0] and real.room(real.CARD) == 79 and real.room(8) == 8
    now.free, now.reserved = 72.25, 7.0
    assert gauge.read() == dict(
        allocated=6.5, reserved=7.0, outside_at_start=0.5, outside=0.75, used=7.75
    )
    now.reserved = 0.0
    with pytest.raises(real.BadInput, match="7.8 GB of this GPU are in use by others"):
        real.Gauge(7.5)


@pytest.mark.slow
def test_the_real_size_is_rehearsed_on_a_tiny_model(real):
    """The driver's path from load to saved adapter, with an adapter that transformers and peft can
    read, and its estimate."""
    rows = []
    assert (
        real.every(
            real.chosen(True, ["bf16, sdpa", "bf16, flash-attn"]),
            True,
            False,
            math.inf,
            rows.extend,
        )
        == 0
    )
    made, ran, absent = rows
    assert made["parameters"] > 1e5 and made["shards"] == 1
    assert {*real.STAGES, "plan"} == set(ran["seconds"]) and ran["total"] >= 0.99 * sum(
        ran["seconds"][s] for s in real.STAGES
    )
    assert (
        ran["steps"] == len(ran["losses"]) == 2
        and ran["pictures"] == 2 + 4
        and ran["missing"] is None
        and ran["met_gb"] is None
    )
    assert (
        ran["planned"]["settings"]["checkpointing"]
        and ran["shares"]
        # the generic pictures' answers are a random model's: gibberish gives no sample
        and 0 <= ran["samples"] - (8 + 6 + 20 + 10 + 2 * 6 + 2 + 11) <= 4 * 12
    )
    assert "CUDA GPU" in absent["missing"] or "flash-attn" in absent["missing"]
    assert "| bf16, sdpa | float32, activation checkpointing | 2 of 8" in real.tables(rows)
