"""Stored adapters added up to one: their factors side by side.

    B1 A1 + B2 A2 = [B1 B2] [A1; A2]

The sum is exact but for the rounding of each adapter's scale, which is 2 by default and so rounds
nothing. PEFT's `add_weighted_adapter(combination_type="cat")` is exact for adapters that differ in
rank and alpha alone. It takes `exclude_modules` and `use_rslora` of the first one for all. So of a
language adapter and a vision adapter it leaves one out without a word, and it scales
rank-stabilised ones wrongly (tests/model/test_adapter_sum.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..request import BadInput, NumericFailure
from .adapter_files import ADAPTER, check_directory, check_patterns

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields of a configuration with which an adapter does more than add B A to a weight.
_MORE = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "fan_in_fan_out")
# Fields that say which layers an adapter is on.
_WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


class Factors(NamedTuple):
    """The change of one weight, b @ a. a: fp32 [r, in], scaled; b: fp32 [out, r]."""

    a: Tensor
    b: Tensor


def check(directory: Path) -> dict[str, Any]:
    """The configuration of an adapter that can be added to others. Raises BadInput where there is
    no adapter, or one that does more than add to weights."""
    found = check_directory(directory)
    if found.get("modules_to_save"):
        raise BadInput(
            f"The adapter in {directory} has trained the whole module "
            f"{found['modules_to_save'][0]!r}, which takes the place of the untouched one and "
            "cannot be added to another: forget these concepts together with --mode joint."
        )
    if more := next((key for key in _MORE if found.get(key)), None):
        raise BadInput(
            f"The adapter in {directory} does more than add to weights ({more} is set): give "
            "plain LoRA."
        )
    return found


def add_up(
    base: nn.Module, directories: Sequence[Path], place: Path, *, weight: float = 1.0
) -> int:
    """Writes to `place` the adapter that changes each weight by the sum of what those in
    `directories` change. Returns its rank: the largest sum of ranks on one layer. Layers with fewer
    get zeros, so that any reader of LoRA needs no pattern of ranks; the scale is 1.

    base:   the model, for the names of its layers
    weight: how often each adapter is added

    Raises BadInput where `check` does or an adapter is damaged, and NumericFailure for NaN or
    infinity in one.
    """
    configs = [check(directory) for directory in directories]
    for found, directory in zip(configs, directories, strict=True):
        check_patterns(base, found, directory)
    parts = [
        factors(found, directory, weight)
        for found, directory in zip(configs, directories, strict=True)
    ]
    names = sorted({name for part in parts for name in part})
    joined = {name: _side_by_side(name, parts, directories) for name in names}
    rank = max(len(both.a) for both in joined.values())
    stored = {}
    for name, both in joined.items():
        missing = rank - len(both.a)
        key = f"base_model.model.{name}.lora_{{}}.weight".format
        stored[key("A")] = nn.functional.pad(both.a, (0, 0, 0, missing)).contiguous()
        stored[key("B")] = nn.functional.pad(both.b, (0, missing)).contiguous()
    same = all(
        part.keys() == parts[0].keys() and all(found.get(k) == configs[0].get(k) for k in _WHERE)
        for part, found in zip(parts, configs, strict=True)
    )
    where = {k: configs[0].get(k) for k in _WHERE} if same else {"target_modules": names}
    config = LoraConfig(
        r=rank, lora_alpha=rank, bias="none", task_type=configs[0].get("task_type"), **where
    )
    config.save_pretrained(str(place))
    save_file(stored, place / ADAPTER, metadata={"format": "pt"})
    return rank


def factors(found: Mapping[str, Any], directory: Path, weight: float = 1.0) -> dict[str, Factors]:
    """By the layer's name, what a stored adapter adds to its weight, `weight` times.

    found: from `check`
    """
    stored = load_file(directory / ADAPTER)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        match = _FACTOR.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise BadInput(
                f"The adapter in {directory} is not plain LoRA on linear layers ({key}): give "
                "another."
            )
        sides.setdefault(match[1], {})[match[2]] = tensor
    out = {}
    for name, side in sides.items():
        if side.keys() != {"A", "B"} or side["A"].shape[0] != side["B"].shape[1]:
            raise BadInput(f"The adapter in {directory} is damaged ({name}): train again.")
        scale = weight * _scale(found, name, len(side["A"]))
        a = (side["A"].double() * scale).float()
        b = side["B"].float()
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise NumericFailure(
                f"{name} of the adapter in {directory} holds NaN or infinite numbers: train again."
            )
        out[name] = Factors(a, b)
    return out


def _scale(found: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies the product of a layer's factors with."""
    given = (found.get("alpha_pattern") or {}).items()
    own = (alpha for key, alpha in given if re.match(rf"(.*\.)?({key})$", name))
    alpha = next(own, found.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if found.get("use_rslora") else rank))


def _side_by_side(
    name: str, parts: Sequence[Mapping[str, Factors]], directories: Sequence[Path]
) -> Factors:
    there = [
        (part[name], place) for part, place in zip(parts, directories, strict=True) if name in part
    ]
    first = there[0][0]
    for both, place in there:
        if both.a.shape[1] != first.a.shape[1] or both.b.shape[0] != first.b.shape[0]:
            raise BadInput(
                f"The adapter in {place} fits another model than that in {there[0][1]} ({name} has "
                "another size): give adapters for one model."
            )
    return Factors(
        torch.cat([both.a for both, _ in there]), torch.cat([both.b for both, _ in there], dim=1)
    )
