"""An adapter added to the weights themselves, each matrix in fp32 and rounded once, and saved as
plain transformers reads it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import GenerationConfig

from ..request import BadInput, NumericFailure
from . import adapter, adapter_files, vlm
from .reading import progress_bars

# Files beside a model's weights that are copied as they are: processor, tokenizer, chat template,
# generation_config, and the hyper-parameters that this model needs when it is to forget
# something else.
BESIDE = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer*",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "additional_chat_templates/*",
    "generation_config.json",
    "fastsiu.json",
)
SHARD = 5.0  # GB of 10**9 bytes, the largest file of weights: what the hub and copying tools like


@dataclass
class Change:
    """What the merge did to the weights.

    largest:  the largest |change| that the adapter asks of a weight, before rounding
    matrix:   the matrix with that weight
    relative: `largest`, divided by the largest |weight| of that matrix
    matrices: tensors that differ after the merge
    of:       tensors that the adapter changes
    asked:    weights that the adapter changes
    rounded:  those of them that rounding to the stored dtype leaves as they were
    """

    largest: float = 0.0
    matrix: str = ""
    relative: float = 0.0
    matrices: int = 0
    of: int = 0
    asked: int = 0
    rounded: int = 0

    def add(self, name: str, weight: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
        """The new weight. weight: any floating dtype; delta: fp32, same shape. Raises
        NumericFailure where `dtype` overflows."""
        new = (weight.float() + delta).to(dtype)
        if not torch.isfinite(new).all():
            raise NumericFailure(
                f"{name} is not finite after the merge: merge into --dtype float32 or bfloat16."
            )
        largest, change = float(delta.abs().max()), delta != 0
        if largest > self.largest:
            self.largest, self.matrix = largest, name
            self.relative = largest / max(float(weight.abs().max()), 1e-30)
        same = new == weight.to(dtype)
        self.of += 1
        self.matrices += not bool(same.all())
        self.asked += int(change.sum())
        self.rounded += int((change & same).sum())
        return new

    def as_dict(self) -> dict[str, Any]:
        share = self.rounded / self.asked if self.asked else None
        return {
            "largest": self.largest,
            "matrix": self.matrix,
            "relative": self.relative,
            "matrices": self.matrices,
            "of": self.of,
            "weights": self.asked,
            "unchanged": share,
        }


@torch.no_grad()
def fold(loaded: vlm.VLM, dtype: torch.dtype) -> Change:
    """Adds the adapter that is on to the base's weights, each matrix in fp32 and rounded once. Then
    takes the adapter off.

    PEFT's merge in one step does the same for an fp32 adapter; its safe one rounds the change
    first, and so rounds twice.

    Raises BadInput for an adapter that is more than LoRA on plain linear layers and trained copies
    of whole modules; no weight has been changed then.
    """
    _check_all_is_folded(loaded)
    change = Change()
    count = Counter(p.data_ptr() for _, p in loaded.base.named_parameters(remove_duplicate=False))
    for name, module in list(loaded.base.named_modules()):
        if isinstance(module, LoraLayer):
            layer = module.get_base_layer()
            if (
                type(layer) is not nn.Linear
                or module.lora_variant
                or any(module.lora_bias.values())
            ):
                raise BadInput(
                    f"The adapter is not plain LoRA on linear layers ({name}): merge it with the "
                    "tool that made it."
                )
            if count[layer.weight.data_ptr()] > 1:
                raise BadInput(
                    f"The weight of {name} is shared with another layer, which the adapter "
                    "leaves alone: it cannot be merged."
                )
            # PEFT declares it on each kind of layer, and not on their common class.
            delta = module.get_delta_weight("default").float()  # type: ignore[attr-defined]
            layer.weight.data = change.add(f"{name}.weight", layer.weight.data, delta, dtype)
        elif isinstance(module, ModulesToSaveWrapper):
            trained = dict(module.modules_to_save["default"].named_parameters())
            for key, old in module.original_module.named_parameters():
                if count[old.data_ptr()] > 1:
                    raise BadInput(
                        f"{name}.{key} is tied to another weight, and the adapter has trained it "
                        "alone: it cannot be merged."
                    )
                delta = trained[key].data - old.data.float()
                old.data = change.add(f"{name}.{key}", old.data, delta, dtype)
    adapter.detach(loaded)
    if not change.matrices:
        raise BadInput(
            "Rounded, the adapter changes no weight of the model: train longer, or merge into a "
            "finer --dtype."
        )
    return change


def _check_all_is_folded(loaded: vlm.VLM) -> None:
    """Raises BadInput, which names it, for anything that the adapter has trained and `fold` leaves
    out."""
    folded = set()
    for name, module in loaded.base.named_modules():
        if isinstance(module, LoraLayer):
            folded |= {
                f"base_model.model.{name}.{factor}.weight" for factor in ("lora_A", "lora_B")
            }
        elif isinstance(module, ModulesToSaveWrapper):
            parts = module.modules_to_save["default"].state_dict()
            folded |= {f"base_model.model.{name}.{key}" for key in parts}
    trained = get_peft_model_state_dict(loaded.model, save_embedding_layers=False)
    if left := sorted(trained.keys() - folded):
        raise BadInput(
            f"The adapter has trained more than can be added to the weights ({left[0]}): merge "
            "it with the tool that made it."
        )


def save(
    loaded: vlm.VLM,
    directory: Path,
    beside: Path,
    dtype: torch.dtype,
    *,
    legal: Sequence[Path] = (),
    shard: float = SHARD,
) -> None:
    """Weights in safetensors shards with their configuration, and what stands beside the base's
    own, byte for byte.

    legal: the publisher's licence, notice and use policy
    shard: the largest file of weights, GB of 10**9 bytes
    """
    base = loaded.base.to(dtype)
    for config in (base.config, *(getattr(base.config, key) for key in base.config.sub_configs)):
        if config is not None and config.dtype is not None:
            config.dtype = dtype
    # Written strictly, it would refuse what published models hold; theirs is copied.
    base.generation_config = GenerationConfig()
    with progress_bars(False):
        base.save_pretrained(directory, max_shard_size=round(shard * 10**9))
    (directory / "generation_config.json").unlink(missing_ok=True)
    # safetensors writes for the owner alone; a model is served by others
    for file in directory.glob("*.safetensors"):
        file.chmod((directory / "config.json").stat().st_mode)
    for pattern in BESIDE:
        for path in sorted(
            p for p in beside.glob(pattern) if p.is_file() and p.suffix not in adapter_files.WEIGHTS
        ):
            target = directory / path.relative_to(beside)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    for path in legal:
        shutil.copyfile(path, directory / path.name)
