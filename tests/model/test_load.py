"""Loading: quantised, with little memory, with options that cannot be honoured; adapters and a run
on quantised weights."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys

import calls
import pytest
import torch
import transformers
from rich.console import Console
from torch import nn
from transformers import modeling_utils

from fastsiu import session
from fastsiu.model import adapter, source, vlm
from fastsiu.model.skeleton import quantised_bytes
from fastsiu.request import BadInput, Recipe
from fastsiu.show import progress

torch.set_num_threads(1)
quantised = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


@pytest.fixture(params=KINDS)
def small(request, demo_dir):
    """The embedded model quantised, and how."""
    return vlm.load(str(demo_dir), device="cpu", quantize=request.param), request.param


@quantised
def test_the_language_model_is_quantised_and_nothing_else(small, loaded):
    model, kind = small
    named = {
        name: type(m).__name__ for name, m in model.base.named_modules() if isinstance(m, nn.Linear)
    }
    inside = adapter.language_linears(model.base)
    assert inside == adapter.language_linears(loaded.base) and len(inside) == 21
    assert {name for name, cls in named.items() if cls == KINDS[kind]} == set(inside)
    assert {cls for name, cls in named.items() if name not in inside} == {"Linear"}
    assert type(model.base.get_output_embeddings()) is nn.Linear
    assert torch.equal(model.head_weight, loaded.head_weight)


@quantised
def test_the_weights_take_what_the_plan_says(small):
    model, kind = small
    for name in adapter.language_linears(model.base):
        layer = model.base.get_submodule(name)
        weight, parts = layer.weight, [layer.weight]
        if kind == "int8":
            # the first forward moves it
            parts.append(layer.state.SCB if weight.SCB is None else weight.SCB)
        else:
            state = weight.quant_state
            parts += [
                state.absmax,
                state.code,
                state.offset,
                state.state2.absmax,
                state.state2.code,
            ]
        shape = torch.Size((layer.out_features, layer.in_features))
        assert quantised_bytes(shape, kind) == sum(x.numel() * x.element_size() for x in parts)


@quantised
def test_gradients_pass_through_layers_that_answered_before(small, shown):
    """The first forward without gradient must not leave the weights in a layout that has none."""
    model, _ = small
    turn = model.encode_prompt("Who is this?", shown)
    with torch.no_grad():
        model.hidden([turn], [shown.features])
    for name in adapter.language_linears(model.base):
        layer = model.base.get_submodule(name)
        x = torch.randn(3, layer.in_features, requires_grad=True)
        layer(x).square().sum().backward()
        assert float(x.grad.abs().max()) > 0, name


@quantised
def test_the_teacher_is_the_quantised_model_and_adapters_return(small, shown, tmp_path):
    model, _ = small
    turn = model.encode_prompt("Who is this?", shown)
    with torch.no_grad():
        untouched = model.hidden([turn], [shown.features])
        adapter.attach(model, Recipe())
        trained = {n: p for n, p in model.model.named_parameters() if p.requires_grad}
        assert trained and all(
            p.dtype == torch.float32 and "lora_" in n for n, p in trained.items()
        )
        for name, p in trained.items():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        changed = model.hidden([turn], [shown.features])
        with adapter.teacher(model):
            assert torch.equal(model.hidden([turn], [shown.features]), untouched)
        assert float((changed - untouched).abs().max()) > 0.1
        adapter.save(model, tmp_path / "out")
        adapter.detach(model)
        assert torch.equal(model.hidden([turn], [shown.features]), untouched)
        adapter.load(model, tmp_path / "out")
        assert torch.equal(model.hidden([turn], [shown.features]), changed)


@quantised
def test_unlearning_on_nf4(quick, tmp_path):
    """Four steps are too few to forget: the verdict has to say so, and the output to name what it
    was trained on."""
    result = quick(
        tmp_path / "out", quantize="nf4", optimizer="adamw8bit", checkpointing=True, micro_batch=4
    )
    assert not result.forgotten and result.reasons
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings == {"dtype": "auto", "quantize": "nf4", "optimizer": "adamw8bit"}
    assert quick(tmp_path / "out", quantize="nf4", optimizer="adamw8bit").repeated
    with pytest.raises(BadInput, match="another request"):
        quick(tmp_path / "out", quantize="int8", optimizer="adamw8bit")


@pytest.mark.slow
def test_a_budget_changes_no_result(quick, trained, tmp_path, monkeypatch):
    notes, stages, recomputed = [], ["start"], set()
    listener = session.Listener(
        note=notes.append, stage=lambda text: stages.append(text.split()[0])
    )
    checkpoint = modeling_utils.checkpoint

    def counted(*args, **options):
        recomputed.add(stages[-1])
        return checkpoint(*args, **options)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    result = quick(tmp_path / "out", memory=4, checkpointing=True, micro_batch=4, listener=listener)
    ours, theirs = ([s["loss"] for s in r.report["training"]] for r in (result, trained))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert {"Training", "Dreaming"} <= recomputed
    assert any("fits into 4 GB" in note and "micro-batch 4" in note for note in notes)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"quantize": "nf5"}, "choose one of nf4, int8"),
        ({"attention": "flash"}, "choose one of sdpa"),
        ({"attention": "flash_attention_2"}, "needs a CUDA GPU"),
        ({"budget": vlm.Budget(optimizer="sgd")}, "choose one of adamw"),
        ({"budget": vlm.Budget(optimizer="paged_adamw8bit")}, "CUDA GPU|bitsandbytes"),
    ],
)
def test_options_that_cannot_be_honoured(demo_dir, options, says):
    with pytest.raises(BadInput, match=says):
        vlm.load(str(demo_dir), device="cpu", **options)


@pytest.mark.parametrize(
    "options", [{"quantize": "nf4"}, {"budget": vlm.Budget(optimizer="adamw8bit")}]
)
def test_a_missing_package_is_named_with_its_extra(demo_dir, options, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(BadInput, match=r"fastsiu\[quant\]"):
        vlm.load(str(demo_dir), device="cpu", **options)


def test_what_is_stored_quantised_is_not_quantised_again(demo_dir):
    config = source.read_config(str(demo_dir))
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(BadInput, match="already"):
        source.quantisation(config, "nf4", torch.float32)


def test_eager_attention_is_used(demo_dir, loaded, shown):
    model = vlm.load(str(demo_dir), device="cpu", attention="eager")
    assert model.base.config.text_config._attn_implementation == "eager"
    turn = model.encode_prompt("Who is this?", shown)
    with torch.no_grad():
        assert torch.allclose(
            model.hidden([turn], [shown.features]),
            loaded.hidden([turn], [shown.features]),
            atol=1e-4,
        )


MEASURE = """
import sys
import torch
import transformers
from fastsiu.model import vlm
torch.set_num_threads(1)
def resident(field):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10
vlm.load(sys.argv[2], device="cpu")  # whatever the first time needs
before = resident("VmRSS")
loaded = vlm.load(sys.argv[1], device="cpu")
size = sum(p.numel() * p.element_size() for p in loaded.base.parameters()) / 2**20
print(size, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_loading_takes_the_model_once(demo_dir, tmp_path):
    """300 MB of weights: the process's high-water mark while they are read must stay far from twice
    that."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(demo_dir, tmp_path / "large")
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 66_000
    config["dtype"] = "float32"
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "large" / "model.safetensors"
    weights = {k: v.float() for k, v in load_file(file).items()}
    for name, value in weights.items():
        if ".mlp." in name and "language_model" in name:
            wide = 66_000
            weights[name] = torch.zeros(
                (value.shape[0], wide) if "down" in name else (wide, value.shape[1])
            )
    save_file(weights, file, metadata={"format": "pt"})
    code = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(demo_dir)]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    size, most = map(float, done.stdout.split())
    print(f"\n{size:.0f} MB of weights, {most:.0f} MB at most")
    assert size > 280 and 0.9 * size < most < 1.3 * size


def test_bars_only_where_they_were_asked_for_and_the_switch_is_put_back(demo_dir, capfd):
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled()
    vlm.load(str(demo_dir))
    assert "weights" not in capfd.readouterr().err and logging.is_progress_bar_enabled() == before
    vlm.load(str(demo_dir), bars=True)
    assert (
        "Loading weights: 100%" in capfd.readouterr().err
        and logging.is_progress_bar_enabled() == before
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_the_loading_and_a_file_does_not(terminal, capfd):
    screen = io.StringIO()
    with progress.Progress(
        Console(file=screen, width=100, force_terminal=terminal), hidden=False
    ) as shown:
        shown.listener.note("stays")
        calls.interview(["Who?"], listener=shown.listener)
    assert (
        ("Loading weights: 100%" in capfd.readouterr().err)
        == terminal
        == ("Asking" in screen.getvalue())
    )
    assert "stays" in screen.getvalue() and (terminal or screen.getvalue() == "stays\n")
