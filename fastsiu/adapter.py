"""LoRA on the language model's linear layers: attached, switched off for the teacher, saved as a standard PEFT adapter."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers.utils import cached_file

from . import output as outputs
from .request import BadInput, Recipe
from .vlm import VLM

# What LoRA adapts, by exact class: some routers subclass Linear and return tuples. By name, so that bitsandbytes stays unloaded.
LINEARS = {"torch.nn.modules.linear.Linear", "bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt"}
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STORED = (ADAPTER, "adapter_model.bin")  # what PEFT reads
WEIGHTS = (".safetensors", ".bin", ".pt")  # of a model
UNSEALED = "Nothing says for which weights the adapter was made, so that was checked by its shapes only."
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
    for _, wrapper in _copies(vlm):
        _between(wrapper)
    vlm.model.eval()


def _copies(vlm: VLM) -> list[tuple[str, ModulesToSaveWrapper]]:
    """By name in the base, the modules of which the adapter has a trained copy: the projector."""
    return [(name, module) for name, module in vlm.base.named_modules() if isinstance(module, ModulesToSaveWrapper)]


def _between(wrapper: ModulesToSaveWrapper) -> None:
    """Lets a trained copy in fp32 stand between 16 bit neighbours."""
    trained, dtype = wrapper.modules_to_save["default"], next(wrapper.original_module.parameters()).dtype
    trained.register_forward_pre_hook(lambda module, given: tuple(map(_wide, given)))
    trained.register_forward_hook(lambda module, given, out: out.to(dtype))


def _wide(given: Any) -> Any:
    """In fp32 what is a tensor of floats: some projectors are given sizes as well."""
    return given.float() if isinstance(given, torch.Tensor) and given.is_floating_point() else given


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


def save(vlm: VLM, directory: Path, *, named: bool = True) -> None:
    """Writes a standard PEFT adapter, readable by `peft.PeftModel.from_pretrained`. named=False: of which model is not said."""
    config = vlm.model.peft_config["default"]
    config.base_model_name_or_path = vlm.name if named else ""
    config.revision = vlm.revision
    vlm.model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's template says nothing true about this adapter


def check_directory(directory: Path) -> None:
    """Raises BadInput where there is no adapter to load."""
    for name, files in ((CONFIG, (CONFIG,)), (ADAPTER, STORED)):
        if not any((directory / file).is_file() for file in files):
            raise BadInput(f"{directory} holds no adapter ({name} is missing): give the --output directory of a run.")


def load(vlm: VLM, directory: Path) -> None:
    """Puts a saved adapter on; what it has trained as a whole, a projector, in fp32, as `attach` had it.

    Raises BadInput where the directory holds none or one for another architecture: PEFT only warns of what finds no place. The
    model is then as it was.
    """
    check_directory(directory)
    fits = f"The adapter in {directory} does not fit {vlm.name}{{}}: load it with the model it was made for."
    try:
        with _not_ours(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # said below
            vlm.model = PeftModel.from_pretrained(vlm.base, directory).eval()
            older = getattr(vlm.base, "_checkpoint_conversion_mapping", None)  # names of earlier releases, as PEFT maps them
            stored = load_peft_weights(str(directory), device="cpu", key_mapping=older)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, SafetensorError) as error:
        _strip(vlm)
        raise BadInput(fits.format("")) from error
    if stray := sorted(stored.keys() ^ get_peft_model_state_dict(vlm.model, save_embedding_layers=False).keys()):
        detach(vlm)
        raise BadInput(fits.format(f" ({stray[0]} has no counterpart)"))
    for name, wrapper in _copies(vlm):  # PEFT rounds it to the base's dtype
        for key, trained in wrapper.modules_to_save["default"].named_parameters():
            trained.data = stored[f"base_model.model.{name}.{key}"].float().to(trained.device)
        _between(wrapper)


def _strip(vlm: VLM) -> None:
    """Takes off what PEFT has put on before it failed."""
    for name, module in list(vlm.base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            vlm.base.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            vlm.base.set_submodule(name, module.original_module)
    vars(vlm.base).pop("peft_config", None)
    if vlm.budget.checkpointing:
        vlm.base.disable_input_require_grads()
    vlm.model = vlm.base


# Does it belong to this model? --------------------------------------------------------------------------------------------


def manifest_of(directory: Path) -> dict[str, Any]:
    """manifest.json; empty where there is none. Raises BadInput where it is damaged."""
    path = directory / outputs.MANIFEST
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path} is not a JSON object: restore it or remove it.") from error


def check_files(directory: Path, sealed: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the adapter's files. Raises BadInput where one is missing or not what its manifest says."""
    check_directory(directory)
    own = {file: outputs.digest_file(directory / file) for file in (*STORED, CONFIG) if (directory / file).is_file()}
    for file, digest in own.items():
        written = sealed.get("files", {}).get(file, {}).get("sha256")
        if written is not None and written != digest:
            raise BadInput(f"The adapter in {directory} was changed ({file} is not as its manifest says): run `unlearn` again.")
    return own


def check_weights(directory: Path, sealed: Mapping[str, Any], weights: Mapping[str, str], name: str,
                  revision: str | None) -> None:  # fmt: skip
    """Raises BadInput where the adapter's manifest was written for other weights: their shapes may fit all the same.

    weights: the model's files by digest; none of its weights among them: nothing is known of it
    """
    expected, here = _made_for(sealed), {file: digest for file, digest in weights.items() if file.endswith(WEIGHTS)}
    if all(file.isdigit() for file in expected):  # of a redacted manifest
        wrong = [file for file, digest in here.items() if expected and digest not in expected.values()]
    else:
        wrong = [file for file, digest in expected.items() if here and file.endswith(WEIGHTS) and here.get(file) != digest]
    if wrong:
        raise BadInput(f"The adapter in {directory} was made for other weights than those of {name}"
                       f"{f' at {revision}' if revision else ''} ({wrong[0]} differs): give the model that it was made "
                       "for.")  # fmt: skip


def check_belongs(directory: Path, name: str, revision: str | None, weights: Mapping[str, str] | None = None) -> list[str]:
    """What there is to say of an adapter without a manifest. Raises BadInput for one that was changed or made for other weights.

    name, revision: of a model that is loaded already, where it is the hub's
    weights:        its files by digest, where they are known. Else they are read, a second a gigabyte, unless it is the very
                    commit of the hub that the manifest names
    """
    sealed = manifest_of(directory)
    check_files(directory, sealed)
    if not _made_for(sealed):
        return [UNSEALED]
    local, model = Path(name).is_dir(), sealed["model"]
    if local or revision is None or (model.get("id"), model.get("revision")) != (name, revision):
        found = cached_file(name, "config.json", revision=revision, local_files_only=not local)
        check_weights(directory, sealed, weights or outputs.digest_model(Path(str(found)).parent), name, revision)
    return []


def _made_for(sealed: Mapping[str, Any]) -> dict[str, str]:
    """The files of the model that an adapter was made for, by digest; of a redacted manifest, numbers stand for their names."""
    return dict((sealed.get("model") or {}).get("sha256") or {})


def _common_prefix(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared) + "."
