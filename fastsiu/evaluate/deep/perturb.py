"""A picture changed a little by gradients until the model says the name: its pixels or, where no
gradient reaches them, its features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...model import prefix
from ...model.features import feature_tensors, map_features
from ...model.turns import Picture
from ...model.vlm import VLM
from ...objectives import answer_loss
from .target import Naming


class Unreached(Exception):
    """No gradient gets to what the attack would change."""


@dataclass(frozen=True)
class _Space:
    """What an attack changes: numbers of one shape, and the features that a change makes.

    start: the numbers of the picture as it is
    room:  how far each may go, as the size of the attack says
    low:   the lowest change that leaves each number in its own range, 0 or less
    high:  the highest such change, 0 or more
    make:  from a change to the picture's features, with their graph
    """

    start: Tensor
    room: Tensor
    low: Tensor
    high: Tensor
    make: Callable[[Tensor], Any]


def attacked(
    loaded: VLM, naming: Naming, image: Image.Image, size: float, steps: int, pixels: bool
) -> Picture:
    """The picture after sign-gradient steps towards the naming answer, with the features of the
    step at which that answer was the likeliest.

    size:   how far each number may go: a share of the whole range of its pixel or, where features
            are attacked, a number of standard deviations of its channel
    pixels: attack pixels, else features

    Raises Unreached where no gradient gets there.
    """
    plain = loaded.picture(image)
    space = _pixel_space(loaded, image, size) if pixels else _feature_space(plain, size)
    low, high = torch.maximum(space.low, -space.room), torch.minimum(space.high, space.room)
    turn = loaded.encode(naming.question, naming.answer, plain)
    delta = torch.zeros_like(space.start, requires_grad=True)
    least, best = float("inf"), torch.zeros_like(space.start)
    for step in range(steps + 1):
        states = prefix.supervised_states(loaded, [turn], [space.make(delta)])
        loss = answer_loss(loaded, states, turn.labels)
        if (now := float(loss.detach())) < least:
            least, best = now, delta.detach().clone()
        if step == steps:
            break
        (slope,) = torch.autograd.grad(loss, delta, allow_unused=True)
        if slope is None:
            raise Unreached
        moved = delta.detach() - 2.5 / steps * space.room * slope.to(delta.device).sign()
        delta = torch.minimum(torch.maximum(moved, low), high).requires_grad_()
    with torch.no_grad():
        return Picture(image, map_features(space.make(best), torch.Tensor.detach))


# Pixels -------------------------------------------------------------------------------------------


class _Moved:
    """The model's own processor, whose pixels are moved by `delta`.

    delta:  of the shape of the processor's pixel_values; None moves nothing
    pixels: the processor's last pixel_values before they were moved; None where they are no floats
    """

    def __init__(self, processor: Any, delta: Tensor | None = None) -> None:
        self.processor, self.delta = processor, delta
        self.pixels: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, *given: Any, **options: Any) -> Any:
        inputs = self.processor(*given, **options)
        pixels = inputs.get("pixel_values")
        self.pixels = pixels if isinstance(pixels, Tensor) and pixels.is_floating_point() else None
        if self.delta is not None and self.pixels is not None:
            inputs["pixel_values"] = pixels + self.delta.to(pixels.dtype).to(pixels.device)
        return inputs


def reaches_pixels(loaded: VLM, image: Image.Image) -> bool:
    """Do the image features have a gradient with respect to the processor's pixels?"""
    pixels = pixels_of(loaded, image)
    if pixels is None:
        return False
    delta = torch.zeros_like(pixels, requires_grad=True)
    return any(x.requires_grad for x in feature_tensors(_features(loaded, image, delta)))


def pixels_of(loaded: VLM, image: Image.Image) -> Tensor | None:
    """The processor's pixel_values of a picture; None where they are no floats."""
    moved = _Moved(loaded.processor)
    with torch.no_grad():
        _through(loaded, moved).image_features(image)
    return moved.pixels


def _pixel_space(loaded: VLM, image: Image.Image, size: float) -> _Space:
    """The range of each number lies between what the processor makes of black and of white. Padding
    is the same in both, so it does not move."""
    start, black, white = (
        pixels_of(loaded, one)
        for one in (
            image,
            Image.new("RGB", image.size, "black"),
            Image.new("RGB", image.size, "white"),
        )
    )
    if start is None or black is None or white is None:
        raise Unreached
    low, high = torch.minimum(black, white), torch.maximum(black, white)
    return _Space(
        start,
        size * (high - low),
        (low - start).clamp_max(0),
        (high - start).clamp_min(0),
        lambda delta: _features(loaded, image, delta),
    )


def _features(loaded: VLM, image: Image.Image, delta: Tensor) -> Any:
    """The image features with the processor's pixels moved, with their graph."""
    with torch.enable_grad():
        return _through(loaded, _Moved(loaded.processor, delta)).image_features(image)


def _through(loaded: VLM, processor: Any) -> VLM:
    """The same model behind another processor; the caller's stays as it is."""
    other = replace(loaded, processor=processor)
    other.suffixed = loaded.suffixed  # was read from the signature of the model's own processor
    return other


# Features -----------------------------------------------------------------------------------------


def _feature_space(plain: Picture, size: float) -> _Space:
    """All features as [n, D], fp32. Only the size of a change is bounded."""
    start = torch.cat([x.reshape(-1, x.shape[-1]) for x in feature_tensors(plain.features)]).float()
    return _Space(
        start,
        size * start.std(0).clamp_min(1e-6).expand_as(start),
        torch.full_like(start, -torch.inf),
        torch.full_like(start, torch.inf),
        lambda delta: _added(plain.features, delta),
    )


def _added(features: Any, delta: Tensor) -> Any:
    """Features with a [n, D] change added to their tensors, in their order."""
    rest = delta

    def change(x: Tensor) -> Tensor:
        nonlocal rest
        rows = x.numel() // x.shape[-1]
        piece, rest = rest[:rows], rest[rows:]
        return x + piece.reshape(x.shape).to(x.dtype)

    return map_features(features, change)
