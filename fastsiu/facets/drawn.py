"""Pictures made of the one picture: more views of it, pictures that show nobody the model knows, and pairs side by side.

None of them needs a second picture of anyone. All are RGB and of the picture's size.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..images import edge_colour, variants

TURN, SMALL, LARGE, SHIFT, LIGHT = 14.0, 0.75, 1.2, 1 / 12, 0.25  # degrees; shares of the side, and of the brightness
HALF = (0.5, 0.62)  # side of a picture in a pair, as a share of its own


def views(image: Image.Image, seed: int, count: int) -> list[Image.Image]:
    """The transforms that training may look at (`images.variants`), then random ones: `count` in all."""
    rng = random.Random(seed)
    out = [view for _, view in variants(image, seed)][:count]
    while len(out) < count:
        out.append(_moved(image, rng))
    return out


def _moved(image: Image.Image, rng: random.Random) -> Image.Image:
    """Flipped, turned, scaled, shifted on its own edge's colour, in another light."""
    (width, height), edge = image.size, edge_colour(image)
    view = ImageOps.mirror(image) if rng.random() < 0.5 else image
    view = view.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC, fillcolor=edge)
    scale = rng.uniform(SMALL, LARGE)
    view = view.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BILINEAR)
    ground = Image.new("RGB", image.size, edge)
    step = lambda side: rng.randint(-int(side * SHIFT), int(side * SHIFT))
    ground.paste(view, ((width - view.width) // 2 + step(width), (height - view.height) // 2 + step(height)))
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        ground = change(ground).enhance(rng.uniform(1 - LIGHT, 1 + LIGHT))
    return ground


def recoloured(image: Image.Image) -> list[Image.Image]:
    """The colour channels in the five other orders, and the negative."""
    bands = image.split()
    orders = [order for order in itertools.permutations(range(3)) if order != (0, 1, 2)]
    return [*(Image.merge("RGB", [bands[i] for i in order]) for order in orders), ImageOps.invert(image)]


def jigsaw(image: Image.Image, seed: int, tiles: int) -> Image.Image:
    """The picture cut into tiles x tiles pieces, in another order."""
    rng, (width, height) = random.Random(seed), image.size
    columns = [round(width * i / tiles) for i in range(tiles + 1)]
    rows = [round(height * i / tiles) for i in range(tiles + 1)]
    boxes = [(columns[x], rows[y], columns[x + 1], rows[y + 1]) for y in range(tiles) for x in range(tiles)]
    out = image.copy()
    for target, source in zip(boxes, rng.sample(boxes, len(boxes)), strict=True):
        size = (target[2] - target[0], target[3] - target[1])
        out.paste(image.crop(source).resize(size, Image.Resampling.BILINEAR), target[:2])
    return out


def scrambled(image: Image.Image, seed: int) -> Image.Image:
    """The picture's pixels in a random order: its colours and nothing else."""
    pixels = np.asarray(image)
    order = np.random.default_rng(abs(seed)).permutation(pixels.shape[0] * pixels.shape[1])
    return Image.fromarray(pixels.reshape(-1, 3)[order].reshape(pixels.shape))


def nobodies(image: Image.Image, seed: int) -> list[Image.Image]:
    """Candidates for pictures of somebody whom no model knows, those most like a portrait first."""
    flipped, turned = ImageOps.mirror(image), _moved(image, random.Random(seed))
    out = [*recoloured(image), *recoloured(flipped), *recoloured(turned)]
    out += [jigsaw(image, seed + i, tiles) for i, tiles in enumerate((2, 3, 4))]
    return out + [scrambled(image, seed + i) for i in range(4)]


def pair(left: Image.Image | None, right: Image.Image | None, rng: random.Random) -> Image.Image:
    """Two pictures of one size side by side, each at about half its size; None leaves its half empty."""
    some = left or right
    assert some is not None
    (width, height), ground = some.size, Image.new("RGB", some.size, edge_colour(some))
    for image, start in ((left, 0), (right, width // 2)):
        if image is None:
            continue
        half = ImageOps.mirror(image) if rng.random() < 0.5 else image
        half = half.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=edge_colour(half))
        scale = rng.uniform(*HALF)
        half = half.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BILINEAR)
        cut = max(0, (half.width - width // 2) // 2)
        half = half.crop((cut, 0, cut + width // 2, half.height))
        ground.paste(half, (start, (height - half.height) // 2 + rng.randint(-(height // 12), height // 12)))
    return ground
