"""A model's files: read straight to its devices, with all weights there and finite."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from ..request import BadInput, NumericFailure
from . import placement, source
from .faults import first_line, of_the_device
from .processor import NO_CODE, refuse_own_code


def check_finite(module: nn.Module, name: str) -> None:
    """Raises NumericFailure, which names the tensor, for NaN or infinity in any weight of
    `name`."""
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            low, high = torch.aminmax(tensor.detach())  # NaN goes through both; no copy is made
            if not (math.isfinite(low) and math.isfinite(high)):
                raise NumericFailure(
                    f"{key} of {name} holds NaN or infinite numbers: give undamaged weights."
                )


class Read(NamedTuple):
    """revision: the commit. The rest as `VLM` has it."""

    base: Any
    processor: Any
    revision: str | None
    placed: placement.Placement | None
    offload: tempfile.TemporaryDirectory[str] | None


def read(
    name: str,
    revision: str | None,
    place: torch.device,
    dtype: str,
    quantize: str | None,
    attention: str | None,
    spread: Mapping[str, int] | None,
) -> Read:
    """The parts of a model. Raises BadInput where transformers cannot load them, and where the
    files lack weights."""
    config, processor, revision = source.describe(name, revision)
    wanted = source.DTYPES[source.dtype_name(config, dtype, place.type)]
    extra: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if quantize is not None:
        extra["quantization_config"] = source.quantisation(config, quantize, wanted)
    placed = offload = None
    where: dict[str, Any] = {"": place}
    if spread is not None:
        placed = placement.place(source.on_meta(config, dtype=wanted), spread, quantize)
        where = dict(placed.where)
        if "disk" in placed.weights:
            offload = tempfile.TemporaryDirectory(prefix="fastsiu-")
            extra["offload_folder"] = offload.name
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name,
            revision=revision,
            dtype=wanted,
            device_map=where,
            output_loading_info=True,
            use_safetensors=True,
            **NO_CODE,
            **extra,
        )
    except Exception as error:  # any: it is others' code on a stranger's files; the reason is told
        if of_the_device(error):
            raise
        refuse_own_code(name, error)
        raise BadInput(
            f"{name} cannot be loaded as an image-text model ({first_line(error)}): check the "
            "files."
        ) from error
    base, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers makes up random ones
        raise BadInput(
            f"{name} lacks {len(missing)} of its weights, {missing[0]} among them: check the files."
        )
    return Read(base, processor, revision, placed, offload)


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Inside, transformers and the hub draw their progress, or not."""
    before = transformers_logging.is_progress_bar_enabled()
    _draw_bars(shown)
    try:
        yield
    finally:
        _draw_bars(before)


def _draw_bars(shown: bool) -> None:
    if shown:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
