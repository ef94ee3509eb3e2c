"""The files of a stored adapter: are they plain LoRA, unchanged, and made for this model?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import cached_file

from .. import manifest
from ..guards import limited
from ..guards.strict_json import read_json
from ..request import BadInput

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WEIGHTS = (".safetensors", ".bin", ".pt")  # suffixes of a model's weights
# The fields of PEFT's LoraConfig that are known here: switching the adapter off undoes what each of
# them does. Other fields import modules by name, replace weights of the base or repeat its layers.
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
UNSEALED = (
    "Nothing says for which weights the adapter was made, so that was checked by its shapes only."
)


def check_directory(directory: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises BadInput where there is no adapter that may be loaded: plain LoRA as PEFT writes it, in
    safetensors, with a configuration that does no more than that.
    """
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
    """The ranks of the stored factors, from the header of the file. Raises BadInput where it is
    damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}): restore it or train again.") from error
    return {shape[0] for key, shape in shapes.items() if "lora_A" in key and shape}


def check_patterns(base: nn.Module, found: Mapping[str, Any], directory: Path) -> None:
    """Raises BadInput where a pattern of the configuration takes too long on the model's layers.

    found: from `check_directory`
    """
    names = [name for name, _ in base.named_modules()]
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


# Unchanged, and made for this model? --------------------------------------------------------------


def manifest_of(directory: Path) -> dict[str, Any]:
    """manifest.json; empty where there is none. Raises BadInput where it is damaged."""
    path = directory / manifest.MANIFEST
    if not path.is_file():
        return {}
    return dict(
        read_json(path, what=str(path), remedy="restore it or remove it", shape=manifest.SHAPE)
    )


def check_files(directory: Path, sealed: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the adapter's files, in hex, by name. Raises BadInput where one is missing, or is
    not as the manifest `sealed` says."""
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
    """Raises BadInput where the adapter's manifest was written for other weights; their shapes may
    fit all the same.

    weights: SHA-256 of the model's files, by name; without any weights among them nothing is
             compared
    """
    expected = made_for(sealed)
    here = {file: digest for file, digest in weights.items() if file.endswith(WEIGHTS)}
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
            "it was made for."
        )


def check_belongs(
    directory: Path, name: str, revision: str | None, weights: Mapping[str, str] | None = None
) -> list[str]:
    """The sentence for an adapter without a manifest, `UNSEALED`; empty for any other.

    name, revision: the model; a hub model is loaded already
    weights:        SHA-256 of the model's files, by name, where they are known. Otherwise the files
                    are read, a second a gigabyte, unless the manifest names this very commit of
                    the hub.

    Raises BadInput for an adapter that was changed or made for other weights.
    """
    sealed = manifest_of(directory)
    check_files(directory, sealed)
    if not made_for(sealed):
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


def made_for(sealed: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the files of the model that an adapter was made for, by name; a redacted manifest
    has numbers for names."""
    return dict((sealed.get("model") or {}).get("sha256") or {})
