"""LoRA on the language model's linear layers: attached, switched off for the teacher, saved as a standard PEFT adapter."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn

from .request import BadInput, Recipe
from .vlm import VLM

# What LoRA adapts, by exact class: some routers subclass Linear and return tuples. By name, so that bitsandbytes stays unloaded.
LINEARS = {"torch.nn.modules.linear.Linear", "bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt"}
PROJECTORS = ("multi_modal_projector", "connector", "merger", "mlp1", "embed_vision")


def language_linears(base: Any) -> list[str]:
    """Full names of the language model's linear layers, the head and the vision tower left out.

    Bare leaf names would not do: CLIP and SigLIP towers share q_proj, k_proj and v_proj with the language model.
    """
    decoder = base.get_decoder()
    prefix = next((name for name, module in base.named_modules() if module is decoder), "")
    found = [f"{prefix}.{name}" for name, module in decoder.named_modules() if _is_linear(module)]
    head = base.get_output_embeddings()
    found = [name for name in found if base.get_submodule(name) is not head]
    if not prefix or not found:
        raise BadInput(f"{type(base).__name__} has no language model with linear layers that LoRA could adapt.")
    return found


def _is_linear(module: nn.Module) -> bool:
    return f"{type(module).__module__}.{type(module).__qualname__}" in LINEARS


def projector(base: Any) -> str | None:
    """Name of the module between vision tower and language model, for the paper's set-up that trains it too."""
    names = [name for name, _ in base.named_modules() if name.rsplit(".", 1)[-1] in PROJECTORS]
    return names[0] if names else None


def attach(vlm: VLM, recipe: Recipe) -> None:
    """Wraps `vlm.model` with a fresh adapter; LoRA factors are fp32 whatever the base's dtype is."""
    names = language_linears(vlm.base)
    prefix = _common_prefix(names)
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    extra: dict[str, Any] = {}
    if recipe.projector_lr > 0:
        found = projector(vlm.base)
        if found is None:
            raise BadInput(f"{type(vlm.base).__name__} has no projector of a known name to train: leave the projector alone.")
        extra["modules_to_save"] = [found.rsplit(".", 1)[-1]]
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout, bias="none",
        target_modules=leaves, exclude_modules=rf"^(?!{re.escape(prefix)}).*", **extra,
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    with _not_ours():
        vlm.model = get_peft_model(vlm.base, config)
    for parameter in vlm.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for wrapper in vlm.model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):  # a projector in fp32 between 16 bit neighbours
            trained, dtype = wrapper.modules_to_save["default"], next(wrapper.original_module.parameters()).dtype
            trained.register_forward_pre_hook(lambda module, given: tuple(x.float() for x in given))
            trained.register_forward_hook(lambda module, given, out, dtype=dtype: out.to(dtype))
    vlm.model.eval()


@contextlib.contextmanager
def _not_ours() -> Iterator[None]:
    """Without a warning that is between peft, which asks by the old name, and transformers 5, which has a new one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def detach(vlm: VLM) -> None:
    """Takes the adapter off again: a loaded model serves many requests, and none may leave its adapter on."""
    if isinstance(vlm.model, PeftModel):
        # PEFT's unload leaves the trained copy of a whole module (the projector) in place of the original.
        originals = {n: m.original_module for n, m in vlm.base.named_modules() if isinstance(m, ModulesToSaveWrapper)}
        vlm.model.unload()
        if vlm.budget.checkpointing:  # PEFT has the embeddings' output require a gradient, by one more hook for every adapter
            vlm.base.disable_input_require_grads()
        for name, module in originals.items():
            vlm.base.set_submodule(name, module)
        vlm.model = vlm.base


@contextlib.contextmanager
def teacher(vlm: VLM) -> Iterator[None]:
    """Inside, the model is the untouched one: same weights, adapter off."""
    if not isinstance(vlm.model, PeftModel):
        yield
        return
    with vlm.model.disable_adapter():
        yield


def sees_anew(vlm: VLM) -> bool:
    """Whether the adapter that is on changes a picture's features as well: it has a projector of its own."""
    return any(isinstance(module, ModulesToSaveWrapper) for module in vlm.model.modules())


def save(vlm: VLM, directory: Path) -> None:
    """Writes a standard PEFT adapter, readable by `peft.PeftModel.from_pretrained`."""
    config = vlm.model.peft_config["default"]
    config.base_model_name_or_path = vlm.name
    config.revision = vlm.revision
    vlm.model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's template says nothing true about this adapter


def load(vlm: VLM, directory: Path) -> None:
    """Puts a saved adapter on. Raises BadInput where the directory holds none or one for another architecture."""
    if not (directory / "adapter_config.json").is_file():
        raise BadInput(f"{directory} holds no adapter (adapter_config.json is missing): give the --output directory of a run.")
    try:
        with _not_ours():
            vlm.model = PeftModel.from_pretrained(vlm.base, directory).eval()
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise BadInput(f"The adapter in {directory} does not fit {vlm.name}: load it with the model it was made for.") from error


def _common_prefix(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared) + "."
