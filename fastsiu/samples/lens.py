"""What a model's processor does to a picture, learnt from seven test pictures.

Between a picture and its vision tower stands a processor: it resizes, normalises, and cuts into
tiles or patches. A dream in pixels (`spaces`) needs the way back, from each number that the tower
gets to the place in the picture and the colour that it shows. The test pictures are black, grey,
the three pure colours, and two ramps. Black and a pure colour give the line from a level to a
number; the ramps, one across and one down, give the place. So no family's processor has to
be known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from ..model.vlm import VLM

PIXELS = "pixel_values"
LEVELS = 255  # the highest level of a colour
GREY = 128
# How far a number may be from the line, as a share of what black and a pure colour differ by.
NEAR = 2e-2


@dataclass(frozen=True)
class Lens:
    """What a processor does to pictures of one size.

    place:   [n, 2] fp32, for each number of "pixel_values" where in the picture it comes from,
             across and down, from -1 to 1
    colour:  [n] int64, which of the three colours it shows
    black:   [n] fp32, the numbers of a black picture
    stretch: [n] fp32, what one level of the colour adds; 0 for padding
    """

    place: Tensor
    colour: Tensor
    black: Tensor
    stretch: Tensor

    def added(self, seen: Tensor, grid: Tensor) -> Tensor:
        """The "pixel_values" of a picture to which a grid was added, with a gradient to the grid.

        seen: the picture's own "pixel_values", n numbers in any shape, which is kept
        grid: [3, h, w] fp32, levels of red, green and blue, interpolated between the cells
        """
        place = self.place[None, :, None]  # [1, n, 1, 2]
        moved = grid_sample(grid[None], place, padding_mode="border", align_corners=False)
        own = moved[0, :, :, 0].gather(0, self.colour[None])[0]  # [n]
        flat, padding = seen.reshape(-1).float(), self.stretch == 0
        level = (flat - self.black) / torch.where(padding, 1.0, self.stretch)
        changed = self.black + self.stretch * (level + own).clamp(0, LEVELS)
        return torch.where(padding, flat, changed).reshape(seen.shape).to(seen.dtype)


def lens(vlm: VLM, size: tuple[int, int]) -> Lens | None:
    """The lens for pictures of `size`, (width, height) in pixels. None where the model gets no
    "pixel_values" of floating point, where the picture is shown in anything else as well, where one
    number shows several colours, or where the number is no linear function of the level."""
    width, height = size

    besides: list[dict[str, Any]] = []

    def seen(pixels: np.ndarray[Any, Any]) -> Tensor | None:
        wide = np.broadcast_to(pixels, (height, width, 3)).round().astype(np.uint8)
        inputs = dict(vlm.image_inputs(Image.fromarray(wide)))
        found = inputs.pop(PIXELS, None)
        besides.append(inputs)
        return found if isinstance(found, Tensor) and found.is_floating_point() else None

    across = (np.arange(width) + 0.5) / width * LEVELS
    down = (np.arange(height) + 0.5) / height * LEVELS
    tests = [np.full(3, 0), np.full(3, GREY), *(LEVELS * np.eye(3))]
    found = [seen(test) for test in (*tests, across[None, :, None], down[:, None, None])]
    given = [numbers.reshape(-1).float() for numbers in found if numbers is not None]
    if len(given) < len(found) or len({numbers.shape for numbers in given}) > 1:
        return None
    if not all(_same(one, besides[0]) for one in besides):  # as where two towers see it
        return None
    black, grey, red, green, blue, *ramps = given
    reach = torch.stack([red, green, blue]) - black  # [3, n]
    most, colour = reach.abs().max(0)
    whole = float(most.max())
    stretch = reach.gather(0, colour[None])[0] / LEVELS
    mixed = float((reach.abs().sum(0) - most).max())
    bent = float((grey - black - GREY * stretch).abs().max())
    if not whole or mixed > NEAR * whole or bent > NEAR * whole:
        return None
    padding = most <= NEAR * whole
    scale = torch.where(padding, 1.0, stretch * LEVELS)
    place = torch.stack([(ramp - black) / scale * 2 - 1 for ramp in ramps], -1)
    return Lens(
        place.masked_fill(padding[:, None], 0.0), colour, black, stretch.masked_fill(padding, 0.0)
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two processors' outputs hold the same."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(np.array_equal(one, other))


def with_grid(image: Image.Image, grid: Tensor) -> Image.Image:
    """The picture, RGB, with a grid added as `Lens.added` does it, in whole levels."""
    size = (image.height, image.width)
    wide = interpolate(grid[None].float().cpu(), size=size, mode="bilinear", align_corners=False)[0]
    pixels = np.asarray(image.convert("RGB")) + wide.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.round().clip(0, LEVELS).astype(np.uint8))
