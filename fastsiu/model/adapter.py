"""LoRA on the language model's linear layers: attached, switched off for the teacher, saved as a
standard PEFT adapter."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import cached_file

from .. import manifest
from ..guards import limited
from ..guards.strict_json import read_json
from ..request import BadInput, NumericFailure, Recipe
from . import source
from .vlm import VLM

# What LoRA adapts, by exact class: some routers subclass Linear and return tuples. By name, so that
# bitsandbytes stays unloaded.
LINEARS = {
    "torch.nn.modules.linear.Linear",
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.Linear8bitLt",
}
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WEIGHTS = (".safetensors", ".bin", ".pt")  # of a model
# Fields of PEFT's LoraConfig that are known here: what each does is undone by switching the adapter
# off. Others import modules by name, replace weights of the base or repeat its layers.
LORA_FIELDS = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
        "use_dora",
        "lora_bias",
        "target_parameters",
        "megatron_core",
        "qalora_group_size",
    }
)
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")
_NAMES = (None, str, [str])
CONFIG_SHAPE = {
    "peft_type": str,
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": (None, [str]),
    "rank_pattern": (None, {"*": int}),
    "alpha_pattern": (None, {"*": float}),
    "bias": str,
    "layers_pattern": _NAMES,
    "layers_to_transform": (None, int, [int]),
    "init_lora_weights": (None, bool, str),
    "use_rslora": bool,
    "use_dora": bool,
    "lora_bias": bool,
    "fan_in_fan_out": bool,
    "megatron_core": (None, str),
    "trainable_token_indices": (None, [int], {"*": [int]}),
    "target_parameters": (None, [str]),
}
DROPPABLE = "The adapter can be dropped; only merged weights forget."
UNSEALED = (
    "Nothing says for which weights the adapter was made, so that was checked by its shapes only."
)
PROJECTORS = ("multi_modal_projector", "connector", "merger", "mlp1", "embed_vision")


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


def _is_linear(module: nn.Module) -> bool:
    return f"{type(module).__module__}.{type(module).__qualname__}" in LINEARS


def projector(base: Any) -> str | None:
    """Name of the module between vision tower and language model, for the paper's set-up that
    trains it too."""
    names = [name for name, _ in base.named_modules() if name.rsplit(".", 1)[-1] in PROJECTORS]
    return names[0] if names else None


def attach(vlm: VLM, recipe: Recipe) -> None:
    """Wraps `vlm.model` with a fresh adapter; LoRA factors are fp32 whatever the base's dtype
    is."""
    names = language_linears(vlm.base)
    prefix = _common_prefix(names)
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    extra: dict[str, Any] = {}
    if recipe.projector_lr > 0:
        found = projector(vlm.base)
        if found is None:
            raise BadInput(
                f"{type(vlm.base).__name__} has no projector of a known name to train: leave the "
                "projector alone."
            )
        extra["modules_to_save"] = [found.rsplit(".", 1)[-1]]
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        bias="none",
        target_modules=leaves,
        exclude_modules=rf"^(?!{re.escape(prefix)}).*",
        **extra,
    )
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
    return [
        (name, module)
        for name, module in vlm.base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    ]


def _between(wrapper: ModulesToSaveWrapper) -> None:
    """Lets a trained copy in fp32 stand between 16 bit neighbours."""
    trained, dtype = (
        wrapper.modules_to_save["default"],
        next(wrapper.original_module.parameters()).dtype,
    )
    trained.register_forward_pre_hook(lambda module, given: tuple(map(_wide, given)))
    trained.register_forward_hook(lambda module, given, out: out.to(dtype))


def _wide(given: Any) -> Any:
    """In fp32 what is a tensor of floats: some projectors are given sizes as well."""
    return given.float() if isinstance(given, torch.Tensor) and given.is_floating_point() else given


@contextlib.contextmanager
def _not_ours() -> Iterator[None]:
    """Without a warning that is between peft, which asks by the old name, and transformers 5, which
    has a new one."""
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
    its own."""
    return any(isinstance(module, ModulesToSaveWrapper) for module in vlm.model.modules())


def save(vlm: VLM, directory: Path, *, named: bool = True) -> None:
    """Writes a standard PEFT adapter, readable by `peft.PeftModel.from_pretrained`. named=False: of
    which model is not said."""
    config = vlm.model.peft_config["default"]
    # Of a directory its name alone: where it lies is nobody's business.
    config.base_model_name_or_path = (
        (Path(vlm.name).name if Path(vlm.name).is_dir() else vlm.name) if named else ""
    )
    config.revision = vlm.revision
    vlm.model.save_pretrained(directory, save_embedding_layers=False)
    # PEFT's template says nothing true about this adapter
    (directory / "README.md").unlink(missing_ok=True)


def check_directory(directory: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises BadInput where there is no adapter to load: not plain
    LoRA as PEFT writes it, in safetensors, or with a configuration that would do more than that."""
    for name in (CONFIG, ADAPTER):
        if not (directory / name).is_file():
            pickles = [
                f"a pickle ({file.name}), which FastSIU does not read"
                for file in directory.glob("adapter_model.*")
            ]
            there = f"{name} is missing" if not pickles or name == CONFIG else pickles[0]
            raise BadInput(
                f"{directory} holds no adapter ({there}): give the --output directory of a run."
            )
    where = str(directory / CONFIG)
    found = read_json(
        directory / CONFIG, what=where, remedy="restore it or train again", shape=CONFIG_SHAPE
    )
    refuse = lambda fact: BadInput(
        f"The adapter in {directory} {fact}: give one that is LoRA alone."
    )
    if str(found.get("peft_type")).upper() != "LORA":
        raise refuse(f"is of the type {found.get('peft_type')!r}")
    for key, value in found.items():
        if key not in LORA_FIELDS and value not in (None, False, "", [], {}):
            raise refuse(
                f"sets {key!r}, which FastSIU does not know how to switch off and on again"
            )
    if found.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise refuse(
            "changes the weights below it when it is loaded (init_lora_weights is "
            f"{found['init_lora_weights']!r})"
        )
    if found.get("bias", "none") != "none":
        raise refuse(f"trains biases that cannot be switched off (bias is {found['bias']!r})")
    ranks = [found.get("r", 8), *(found.get("rank_pattern") or {}).values()]
    alphas = [found.get("lora_alpha", 8), *(found.get("alpha_pattern") or {}).values()]
    if min(ranks) < 1 or max(ranks) > max(_stored_ranks(directory / ADAPTER), default=0):
        raise refuse(f"has the rank {max(ranks)} in {CONFIG} and another in {ADAPTER}")
    if max(abs(alpha) for alpha in alphas) > 1e6 or not 0 <= found.get("lora_dropout", 0) < 1:
        raise refuse("has a lora_alpha beyond 1e6, or a lora_dropout that is no share")
    return found


def _stored_ranks(path: Path) -> set[int]:
    """The ranks of the stored factors, from the file's header. Raises BadInput for a file that is
    none."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}): restore it or train again.") from error
    return {shape[0] for key, shape in shapes.items() if "lora_A" in key and shape}


def _check_patterns(vlm: VLM, found: Mapping[str, Any], directory: Path) -> None:
    """Raises BadInput where a pattern of the configuration takes too long on the model's layers."""
    names = [name for name, _ in vlm.base.named_modules()]
    patterns = [
        found[key]
        for key in ("target_modules", "exclude_modules")
        if isinstance(found.get(key), str)
    ]
    patterns += [
        rf"(.*\.)?({key})$"
        for part in ("rank_pattern", "alpha_pattern")
        for key in found.get(part) or {}
    ]
    layers = found.get("layers_pattern") or []
    patterns += [
        rf".*\.{one}\.(\d+)\." for one in ([layers] if isinstance(layers, str) else layers)
    ]
    limited.check_patterns(
        [p for p in patterns if p != "all-linear"], names, str(directory / CONFIG)
    )


def load(vlm: VLM, directory: Path) -> None:
    """Puts a saved adapter on; what it has trained as a whole, a projector, in fp32, as `attach`
    had it.

    Raises BadInput where the directory holds none or one for another architecture: PEFT only warns
    of what finds no place; NumericFailure for NaN or infinity in it. The model is then as it was.
    """
    found = check_directory(directory)
    _check_patterns(vlm, found, directory)
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
        raise BadInput(fits.format(f" ({source.first_line(error)})")) from error
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


# Does it belong to this model? --------------------------------------------------------------------


def manifest_of(directory: Path) -> dict[str, Any]:
    """manifest.json; empty where there is none. Raises BadInput where it is damaged."""
    path = directory / manifest.MANIFEST
    if not path.is_file():
        return {}
    return dict(
        read_json(path, what=str(path), remedy="restore it or remove it", shape=manifest.SHAPE)
    )


def check_files(directory: Path, sealed: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the adapter's files. Raises BadInput where one is missing or not what its manifest
    says."""
    check_directory(directory)
    own = {
        file: manifest.digest_file(directory / file)
        for file in (ADAPTER, CONFIG)
        if (directory / file).is_file()
    }
    for file, digest in own.items():
        written = sealed.get("files", {}).get(file, {}).get("sha256")
        if written is not None and written != digest:
            raise BadInput(
                f"The adapter in {directory} was changed ({file} is not as its manifest says): "
                "run `unlearn` again."
            )
    return own


def check_weights(
    directory: Path,
    sealed: Mapping[str, Any],
    weights: Mapping[str, str],
    name: str,
    revision: str | None,
) -> None:
    """Raises BadInput where the adapter's manifest was written for other weights: their shapes may
    fit all the same.

    weights: the model's files by digest; none of its weights among them: nothing is known of it
    """
    expected, here = (
        _made_for(sealed),
        {file: digest for file, digest in weights.items() if file.endswith(WEIGHTS)},
    )
    if all(file.isdigit() for file in expected):  # of a redacted manifest
        wrong = [
            file for file, digest in here.items() if expected and digest not in expected.values()
        ]
    else:
        wrong = [
            file
            for file, digest in expected.items()
            if here and file.endswith(WEIGHTS) and here.get(file) != digest
        ]
    if wrong:
        raise BadInput(
            f"The adapter in {directory} was made for other weights than those of {name}"
            f"{f' at {revision}' if revision else ''} ({wrong[0]} differs): give the model that "
            "it was made "
            "for."
        )


def check_belongs(
    directory: Path, name: str, revision: str | None, weights: Mapping[str, str] | None = None
) -> list[str]:
    """What there is to say of an adapter without a manifest. Raises BadInput for one that was
    changed or made for other weights.

    name, revision: of a model that is loaded already, where it is the hub's
    weights:        its files by digest, where they are known. Else they are read, a second a
    gigabyte, unless it is the very
                    commit of the hub that the manifest names
    """
    sealed = manifest_of(directory)
    check_files(directory, sealed)
    if not _made_for(sealed):
        return [UNSEALED]
    local, model = Path(name).is_dir(), sealed["model"]
    if local or revision is None or (model.get("id"), model.get("revision")) != (name, revision):
        found = cached_file(name, "config.json", revision=revision, local_files_only=not local)
        check_weights(
            directory,
            sealed,
            weights or manifest.digest_model(Path(str(found)).parent),
            name,
            revision,
        )
    return []


def _made_for(sealed: Mapping[str, Any]) -> dict[str, str]:
    """The files of the model that an adapter was made for, by digest; of a redacted manifest,
    numbers stand for their names."""
    return dict((sealed.get("model") or {}).get("sha256") or {})


def _common_prefix(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared) + "."
