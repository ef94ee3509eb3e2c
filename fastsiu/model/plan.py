"""Does it fit? The settings from the least to the most sparing, and the first that fits;
`simulation` knows how much memory each takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from PIL import Image

from ..request import BadInput, Recipe
from . import source
from .memory import GB, Estimate, Layout
from .placement import OUTSIDE, Placement, place
from .simulation import Simulation
from .turns import Picture
from .vlm import VLM
from .workload import Workload

# Height and width of a picture, assumed where the model takes any size and nobody gave a picture.
DYNAMIC = (768, 1024)
TEMPLATE = 24  # tokens of a chat template and the beginning of a question
# Assumed where a model cuts pictures into tiles and does not say how many: 4 x 4 and the whole.
TILES = 17


@dataclass(frozen=True)
class Plan:
    """The estimates, from the least to the most sparing settings.

    memory:  bytes; None without a limit
    assumed: what the configuration does not say, in sentences
    chosen:  the first estimate that fits into `memory`; None where none does
    placed:  for several devices, what goes where under the chosen settings or, where none fits, the
             most sparing ones; `memory` is then that of all together
    """

    model: str
    memory: int | None
    work: Workload
    assumed: list[str]
    estimates: list[Estimate]
    chosen: Estimate | None = None
    placed: Placement | None = None

    @property
    def sentence(self) -> str:
        if self.memory is None:
            one = self.estimates[0]
            return f"{self.model} with {one.settings} needs {one.peak / GB:.1f} GB."
        size = f"{self.memory / GB:g} GB"
        if self.chosen is None:
            least = min(self.estimates, key=lambda e: e.peak)
            other = "--quantize nf4" if least.settings.quantize is None else "a smaller model"
            return (
                f"{self.model} does not fit into {size}: with {least.settings} it still needs "
                f"{least.peak / GB:.1f} GB; use a larger card, {other} or a smaller --rank."
            )
        return (
            f"{self.model} fits into {size} with {self.chosen.settings}: "
            f"{self.chosen.peak / GB:.1f} GB expected."
        )

    def as_dict(self) -> dict[str, Any]:
        estimates = [
            e.as_dict() | {"fits": self.memory is None or e.peak <= self.memory}
            for e in self.estimates
        ]
        return {
            "model": self.model,
            "memory": self.memory,
            "fits": self.memory is None or self.chosen is not None,
            "chosen": self.chosen and self.chosen.as_dict(),
            "sentence": self.sentence,
            "assumed": self.assumed,
            "workload": asdict(self.work),
            "estimates": estimates,
        } | ({} if self.placed is None else {"placed": self.placed.as_dict()})


def plan(
    model: str,
    memory: float | None = None,
    settings: Layout | None = None,
    *,
    recipe: Recipe | None = None,
    config: Any = None,
    revision: str | None = None,
    work: Workload | None = None,
    image_tokens: int | None = None,
    fixed: frozenset[str] = frozenset(),
) -> Plan:
    """Estimates `settings`, then ever more sparing ones, until one fits.

    memory: GB of 2**30 bytes
    config: the model's; read where it is left out
    work:   what a run consists of; worked out from the configuration where it is left out
    fixed:  names of settings that were asked for and stay

    Raises BadInput for a model whose configuration cannot be read or built, and for options that
    make no sense.
    """
    settings = settings or Layout()
    if memory is not None and not 0 < memory < math.inf:
        raise BadInput(
            f"--memory is {memory}: give the card's size in GB, for instance 24, 16, 12 or 8."
        )
    if image_tokens is not None and image_tokens < 1:
        raise BadInput(
            f"--image-tokens is {image_tokens}: give the number of tokens that one picture "
            "takes, at least 1."
        )
    source.check_options(settings.dtype, settings.quantize, settings.attention, settings.optimizer)
    config = source.read_config(model, revision) if config is None else config
    settings = replace(settings, dtype=source.dtype_name(config, settings.dtype, settings.device))
    assumed: list[str] = []
    if work is None:
        work, assumed = workload(config, image_tokens)
    cards = [device for device, _ in settings.room if device not in OUTSIDE]
    placed: Placement | None = None
    limit, model = (
        None if memory is None else round(memory * GB) * max(1, len(cards)),
        source.shown_name(model),
    )
    simulation = Simulation(config, recipe or Recipe(), work)
    estimates: list[Estimate] = []
    for _, alike in groupby(
        ladder(settings, fixed, simulation.recipe.batch_size), lambda step: step.quantize
    ):
        *steps, last = alike
        if limit is not None and steps and (least := simulation.within(last, limit)).peak > limit:
            estimates.append(least)  # nothing before it fits either
            continue
        for step in (*steps, last):
            estimates.append(simulation.within(step, limit))
            placed = _placed(config, estimates[-1], cards)
            fits = placed is None or not placed.waiting
            if fits and (limit is None or estimates[-1].peak <= limit):
                return Plan(model, limit, work, assumed, estimates, estimates[-1], placed)
    return Plan(model, limit, work, assumed, estimates, None, placed)


def _placed(config: Any, estimate: Estimate, cards: list[str]) -> Placement | None:
    """What goes where; None for one device. Beside its weights each card keeps room for its part of
    what a run needs."""
    settings = estimate.settings
    if not cards:
        return None
    beside = (estimate.peak - estimate.weights) // len(cards)
    room = {d: max(0, size - beside) if d in cards else size for d, size in settings.room}
    base = source.on_meta(config, dtype=source.DTYPES[settings.dtype])
    return place(base, room, settings.quantize)


def ladder(settings: Layout, fixed: frozenset[str], batch_size: int) -> Iterator[Layout]:
    """Ever more sparing settings. Checkpointing and micro-batches change no result, so NF4, which
    does, comes after them."""
    for quantize in (
        [settings.quantize] if settings.quantize or "quantize" in fixed else [None, "nf4"]
    ):
        one = replace(settings, quantize=quantize)
        yield one
        if "checkpointing" not in fixed and not one.checkpointing:
            one = replace(one, checkpointing=True)
            yield one
        while "micro_batch" not in fixed and (one.micro_batch or batch_size) > 1:
            one = replace(one, micro_batch=(one.micro_batch or batch_size) // 2)
            yield one


def workload(config: Any, image_tokens: int | None = None) -> tuple[Workload, list[str]]:
    """The tokens of a step from a configuration, and the assumptions, in sentences."""
    tokens, patches, assumed = picture_tokens(config)
    if image_tokens is not None:
        patches = max(1, round(patches * image_tokens / max(tokens, 1)))
        tokens, assumed = image_tokens, []
    return Workload(tokens + TEMPLATE, patches), assumed


def workload_of(config: Any, processor: Any, image: Image.Image) -> Workload:
    """The tokens of a step about this picture, counted by the model's own processor."""
    base = source.on_meta(config)
    # on the meta device tokens have a number and no value
    model = VLM("", None, base, base, processor)
    prefix = model.encode_prompt(".", Picture(image, None))["input_ids"].shape[1]
    return workload(config, max(1, prefix - TEMPLATE))[0]


def picture_tokens(config: Any) -> tuple[int, int, list[str]]:
    """(tokens in the language model, patches in the vision tower, assumptions) for one picture,
    from the configuration."""
    vision = getattr(config, "vision_config", None)
    patch = _size(getattr(vision, "patch_size", None)) or 14
    side = _size(getattr(vision, "image_size", None))
    merge = (
        getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None) or 1
    )
    said = getattr(config, "mm_tokens_per_image", None) or getattr(config, "image_seq_length", None)
    if side is None:
        patches = (DYNAMIC[0] // patch) * (DYNAMIC[1] // patch)
        why = [
            f"A picture of {DYNAMIC[1]} x {DYNAMIC[0]} pixels is assumed: --image-tokens or "
            "--image says better."
        ]
        return said or patches // merge**2, patches, why
    patches = (side // patch) ** 2
    if said:
        return said, patches, []
    if getattr(config, "scale_factor", None):
        why = [
            f"A picture cut into {TILES} tiles is assumed: --image-tokens or --image says better."
        ]
        return TILES * (patches // merge**2), TILES * patches, why
    return patches // merge**2, patches, []


def _size(value: Any) -> int | None:
    return max(value) if isinstance(value, list | tuple) else value
