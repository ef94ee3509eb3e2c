"""LoRA on the language model's linear layers: attached, switched off for the teacher, saved as a
standard PEFT adapter."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from safetensors import SafetensorError
from torch import nn

from ..request import BadInput, NumericFailure, Recipe
from . import placement
from .adapter_files import ADAPTER, CONFIG, LORA_FIELDS, check_directory, check_patterns
from .faults import first_line
from .licence import place_on_hub, terms_in, terms_in_cache
from .vlm import VLM

# What LoRA adapts, by exact class: some routers subclass Linear and return tuples. By name, so that
# bitsandbytes stays unloaded.
LINEARS = {
    "torch.nn.modules.linear.Linear",
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.Linear8bitLt",
}
DROPPABLE = "The adapter can be dropped; only merged weights forget."
LEFT_OUT = (
    "The adapter changes what is in front of the language model, where many servers leave "
    "adapters out: merge it before it is served."
)
PROJECTORS = ("multi_modal_projector", "connector", "merger", "mlp1", "embed_vision", "aligner")


def language_linears(base: Any) -> list[str]:
    """Full names of the language model's linear layers, the head and the vision tower left out.

    Bare leaf names would not do: CLIP and SigLIP towers share q_proj, k_proj and v_proj with the
    language model.
    """
    decoder = base.get_decoder()
    prefix = next((name for name, module in base.named_modules() if module is decoder), "")
    found = [f"{prefix}.{name}" for name, module in decoder.named_modules() if _is_linear(module)]
    head = base.get_output_embeddings()
    found = [name for name in found if base.get_submodule(name) is not head]
    if not prefix or not found:
        raise BadInput(
            f"{type(base).__name__} has no language model with linear layers that LoRA could adapt."
        )
    return found


def vision_linears(base: Any) -> list[str]:
    """Full names of the linear layers of vision tower and projector: those of the model that are
    neither the language model's nor the head, nor of a part for sound. Raises BadInput where there
    are none."""
    language, head = set(language_linears(base)), base.get_output_embeddings()
    found = [
        name
        for name, module in base.named_modules()
        if _is_linear(module)
        and name not in language
        and module is not head
        and "audio" not in name.casefold()
    ]
    if not found:
        raise BadInput(
            f"{type(base).__name__} has no linear layer in front of its language model: adapt the "
            "language model."
        )
    return found


def projector_linears(base: Any) -> list[str]:
    """Full names of the linear layers of the projector. Raises BadInput where it has none, or where
    no module has a known name of one."""
    known = lambda part: any(part == name or name in part.split("_") for name in PROJECTORS)
    found = [name for name in vision_linears(base) if any(map(known, name.split(".")))]
    if not found:
        raise BadInput(
            f"{type(base).__name__} has no projector of a known name with linear layers: adapt "
            "'vision' or the language model."
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    return f"{type(module).__module__}.{type(module).__qualname__}" in LINEARS


def projector(base: Any) -> str | None:
    """Name of the module between vision tower and language model, for the paper's set-up that
    trains it too."""
    names = [name for name, _ in base.named_modules() if name.rsplit(".", 1)[-1] in PROJECTORS]
    return names[0] if names else None


def attach(vlm: VLM, recipe: Recipe, lora: LoraConfig | None = None) -> None:
    """Wraps `vlm.model` with a fresh adapter. Its LoRA factors are fp32 whatever the base's dtype
    is. Raises BadInput where there is no language model or no projector to train.

    lora: the adapter; that of the recipe when left out
    """
    placement.check_trains(vlm.placed)
    config = _config_of(vlm, recipe) if lora is None else lora
    torch.manual_seed(recipe.seed)
    with _not_ours():
        vlm.model = get_peft_model(vlm.base, config)
    for parameter in vlm.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for _, wrapper in _copies(vlm):
        _between(wrapper)
    vlm.model.eval()


def _config_of(vlm: VLM, recipe: Recipe) -> LoraConfig:
    extra: dict[str, Any] = {}
    if recipe.adapt == "vision":
        extra["target_modules"] = vision_linears(vlm.base)
    elif recipe.adapt == "projector":
        extra["target_modules"] = projector_linears(vlm.base)
    else:
        names = language_linears(vlm.base)
        extra["target_modules"] = sorted({name.rsplit(".", 1)[-1] for name in names})
        extra["exclude_modules"] = rf"^(?!{re.escape(_common_prefix(names))}).*"
    if recipe.projector_lr > 0:
        found = projector(vlm.base)
        if found is None:
            raise BadInput(
                f"{type(vlm.base).__name__} has no projector of a known name to train: leave the "
                "projector alone."
            )
        extra["modules_to_save"] = [found.rsplit(".", 1)[-1]]
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]  # PEFT scales by a float as well
        lora_dropout=recipe.lora_dropout,
        bias="none",
        **extra,
    )


def _copies(vlm: VLM) -> list[tuple[str, ModulesToSaveWrapper]]:
    """The modules of which the adapter has a trained copy, the projector, by name in the base."""
    return [
        (name, module)
        for name, module in vlm.base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    ]


def _between(wrapper: ModulesToSaveWrapper) -> None:
    """Lets a trained copy in fp32 stand between 16 bit neighbours."""
    trained = wrapper.modules_to_save["default"]
    dtype = next(wrapper.original_module.parameters()).dtype
    trained.register_forward_pre_hook(lambda module, given: tuple(map(_wide, given)))
    trained.register_forward_hook(lambda module, given, out: out.to(dtype))


def _wide(given: Any) -> Any:
    """A tensor of floats in fp32; all else as it is, since some projectors take sizes as well."""
    return given.float() if isinstance(given, torch.Tensor) and given.is_floating_point() else given


@contextlib.contextmanager
def _not_ours() -> Iterator[None]:
    """Silences one warning: PEFT asks transformers by the old name whether layers are checkpointed,
    and no call of ours can change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )
        yield


def detach(vlm: VLM) -> None:
    """Takes the adapter off again: a loaded model serves many requests, and none may leave its
    adapter on."""
    if isinstance(vlm.model, PeftModel):
        # PEFT's unload leaves the trained copy of a whole module (the projector) in place of the
        # original.
        originals = {
            n: m.original_module
            for n, m in vlm.base.named_modules()
            if isinstance(m, ModulesToSaveWrapper)
        }
        vlm.model.unload()
        # PEFT has the embeddings' output require a gradient, by one more hook for every adapter
        if vlm.budget.checkpointing:
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
    """Whether the adapter that is on changes a picture's features as well: it has a projector of
    its own, or factors in front of the language model."""
    inside = set(vlm.base.get_decoder().modules())
    return any(
        isinstance(module, ModulesToSaveWrapper)
        or (isinstance(module, BaseTunerLayer) and module not in inside)
        for module in vlm.model.modules()
    )


def save(
    vlm: VLM,
    directory: Path,
    *,
    named: bool = True,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a standard PEFT adapter, readable by `peft.PeftModel.from_pretrained`.

    named: the configuration names the model: a hub model by its id and commit, also where it was
           loaded from the hub's cache by its path. A directory's place is nobody's business, and
           its last part alone could be the id of a stranger's model: it has "./" before it, which
           no id has.
    state: what trains, by its name in `vlm.model`, where the model holds a part of it only
    """
    config = vlm.model.peft_config["default"]
    name, revision = base_of(vlm)
    config.base_model_name_or_path = name if named else ""
    config.revision = revision if named else None
    vlm.model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)
    # PEFT's template says nothing true about this adapter
    (directory / "README.md").unlink(missing_ok=True)
    # safetensors writes for the owner alone; an adapter is published and served by others
    (directory / ADAPTER).chmod((directory / CONFIG).stat().st_mode)


def base_of(vlm: VLM) -> tuple[str, str | None]:
    """How others are told of the base: (id, commit) of a hub model, ("./NAME", None) of a
    directory."""
    if not Path(vlm.name).is_dir():
        return vlm.name, vlm.revision
    return place_on_hub(vlm.name) or (f"./{Path(vlm.name).absolute().name}", None)


def terms_of(vlm: VLM) -> dict[str, str]:
    """What the base's own card says of its licence, as far as it is on this machine."""
    if Path(vlm.name).is_dir():
        return terms_in(Path(vlm.name)).card
    return terms_in_cache(vlm.name, vlm.revision)


def load(vlm: VLM, directory: Path) -> None:
    """Puts a stored adapter on. A projector that it has trained is in fp32, as after `attach`.

    Raises BadInput where the directory holds no adapter, or one for another architecture (PEFT only
    warns of what finds no place). Also where layers of the model wait off their device. Raises
    NumericFailure for NaN or infinity in the adapter. The model is then as it was.
    """
    placement.check_adapts(vlm.placed)
    found = check_directory(directory)
    check_patterns(vlm.base, found, directory)
    # names of earlier releases, as PEFT maps them
    older = getattr(vlm.base, "_checkpoint_conversion_mapping", None)
    fits = (
        f"The adapter in {directory} does not fit {vlm.name}{{}}: load it with the model it "
        "was made for."
    )
    try:
        stored = load_peft_weights(str(directory), device="cpu", key_mapping=older)
        for key, tensor in stored.items():
            if not torch.isfinite(tensor).all():
                raise NumericFailure(
                    f"{key} of the adapter in {directory} holds NaN or infinite numbers: train "
                    "again."
                )
        config = LoraConfig(
            **{k: v for k, v in found.items() if k in LORA_FIELDS and v is not None}
        )
        with _not_ours(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # said below
            vlm.model = PeftModel.from_pretrained(vlm.base, directory, config=config).eval()
    except NumericFailure:  # itself a RuntimeError
        raise
    except (
        ValueError,
        RuntimeError,
        OSError,
        KeyError,
        TypeError,
        AttributeError,
        SafetensorError,
    ) as error:
        _strip(vlm)
        raise BadInput(fits.format(f" ({first_line(error)})")) from error
    if stray := sorted(
        stored.keys() ^ get_peft_model_state_dict(vlm.model, save_embedding_layers=False).keys()
    ):
        detach(vlm)
        raise BadInput(fits.format(f" ({stray[0]} has no counterpart)"))
    for name, wrapper in _copies(vlm):  # PEFT rounds it to the base's dtype
        for key, trained in wrapper.modules_to_save["default"].named_parameters():
            trained.data = stored[f"base_model.model.{name}.{key}"].float().to(trained.device)
        _between(wrapper)


def _strip(vlm: VLM) -> None:
    """Takes off what PEFT put on before it failed."""
    for name, module in list(vlm.base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            vlm.base.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            vlm.base.set_submodule(name, module.original_module)
    vars(vlm.base).pop("peft_config", None)
    if vlm.budget.checkpointing:
        vlm.base.disable_input_require_grads()
    vlm.model = vlm.base


def _common_prefix(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared) + "."
