"""Pictures made of the one picture: more views of it, changed copies, candidates for pictures of
nobody, and pairs side by side.

None of them needs a second picture of anyone. All are RGB and have the picture's size.
"""

from __future__ import annotations

import colorsys
import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..pictures.transforms import edge_colour, variants

TURN = 14.0  # degrees
SMALL, LARGE, SHIFT = 0.75, 1.2, 1 / 12  # shares of the side
LIGHT = 0.25  # share of brightness, contrast and saturation
# Orders of the colour channels, but for the picture's own.
ORDERS = [order for order in itertools.permutations(range(3)) if order != (0, 1, 2)]
COLOURS = 8  # a picture is divided into so many main colours, to change one of them
HALF = (0.5, 0.62)  # bounds for the side of a picture in a pair, as a share of its own side


def views(image: Image.Image, seed: int, count: int) -> list[Image.Image]:
    """The transforms that training may look at (`pictures.transforms.variants`), then random
    ones: `count` in all."""
    return list(moved(image, seed, count))


def moved(image: Image.Image, seed: int, count: int) -> Iterator[Image.Image]:
    """The pictures of `views`, the random ones one at a time."""
    rng, first = random.Random(seed), [view for _, view in variants(image, seed)][:count]
    yield from first
    for _ in range(count - len(first)):
        yield _moved(image, rng)


def _moved(image: Image.Image, rng: random.Random) -> Image.Image:
    """Flipped, turned, scaled, shifted on its own edge's colour, in another light."""
    (width, height), edge = image.size, edge_colour(image)
    view = ImageOps.mirror(image) if rng.random() < 0.5 else image
    view = view.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC, fillcolor=edge)
    scale = rng.uniform(SMALL, LARGE)
    view = view.resize(
        (max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BILINEAR
    )
    ground = Image.new("RGB", image.size, edge)
    step = lambda side: rng.randint(-int(side * SHIFT), int(side * SHIFT))
    ground.paste(
        view, ((width - view.width) // 2 + step(width), (height - view.height) // 2 + step(height))
    )
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        ground = change(ground).enhance(rng.uniform(1 - LIGHT, 1 + LIGHT))
    return ground


def changed(image: Image.Image, seed: int, count: int) -> list[Image.Image]:
    """Copies in which something differs: one to three of the colours, a strip across in other
    colours, a covered part. Some of them may show just what tells the one in the picture from
    somebody who looks alike."""
    return list(changes(image, seed, count))


def changes(image: Image.Image, seed: int, count: int) -> Iterator[Image.Image]:
    """The copies of `changed`, one at a time."""
    rng, kinds = random.Random(seed), (1, 2, 3, "strip", "strip", "cover")
    image = image.convert("RGB")
    known = _fields(image)
    for i in range(count):
        kind = kinds[i % len(kinds)]
        if kind == "strip":
            yield _other_strip(image, rng)
        elif kind == "cover":
            yield _covered(image, rng)
        else:
            copy = _other_colour(image, known, rng)
            for _ in range(int(kind) - 1):
                copy = _other_colour(copy, _fields(copy), rng)
            yield copy


def _fields(image: Image.Image) -> np.ndarray:
    """Where the picture's `COLOURS` main colours are, in a small copy: [h, w] uint8, the number of
    a colour."""
    small = image.copy()
    small.thumbnail((256, 256))
    palette = small.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return np.asarray(small.quantize(palette=palette, dither=Image.Dither.NONE))


def _other_colour(image: Image.Image, fields: np.ndarray, rng: random.Random) -> Image.Image:
    """One of the picture's main colours in another hue, wherever it is."""
    out = image.copy()
    chosen = Image.fromarray(fields == rng.choice(np.unique(fields).tolist()))
    places = chosen.resize(image.size, Image.Resampling.NEAREST)
    counts = np.array(out.histogram(places)).reshape(3, 256)
    mean = counts @ np.arange(256) / counts[0].sum()
    hue, saturation, value = colorsys.rgb_to_hsv(*(mean / 255))
    hue, saturation = (hue + rng.uniform(0.1, 0.9)) % 1, max(saturation, rng.uniform(0.4, 1.0))
    new = colorsys.hsv_to_rgb(hue, saturation, min(1.0, max(0.2, value * rng.uniform(0.7, 1.4))))
    # [256, 3]: each level, by channel
    moved = np.arange(256)[:, None] + (255 * np.array(new) - mean)
    table = np.clip(np.rint(moved), 0, 255).astype(np.uint8)
    out.paste(out.point(table.T.ravel().tolist()), (0, 0), places)
    return out


def _other_strip(image: Image.Image, rng: random.Random) -> Image.Image:
    """A strip across the picture, a fifth to a half of its height, in other colours."""
    height = rng.uniform(0.2, 0.5)
    top = rng.uniform(0, 1 - height)
    box = (0, int(top * image.height), image.width, int((top + height) * image.height))
    out = image.convert("RGB")
    out.paste(rng.choice(other_colours(out.crop(box))), box)
    return out


def _covered(image: Image.Image, rng: random.Random) -> Image.Image:
    """A part of the picture under the colour of its edge."""
    width, height = rng.uniform(0.15, 0.5), rng.uniform(0.15, 0.4)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    box = (
        int(left * image.width),
        int(top * image.height),
        int((left + width) * image.width),
        int((top + height) * image.height),
    )
    out = image.convert("RGB")
    out.paste(edge_colour(out), box)
    return out


def recoloured(image: Image.Image, order: Sequence[int]) -> Image.Image:
    """The picture with its colour channels in another order."""
    channels = image.convert("RGB").split()
    return Image.merge("RGB", [channels[c] for c in order])


def shuffled(image: Image.Image, seed: int = 0) -> Image.Image:
    """The picture's pixels in a random order."""
    pixels = np.asarray(image.convert("RGBA")).view(np.uint32)  # [H, W, 1]: a number a pixel
    order = np.random.default_rng(abs(seed)).permutation(pixels.ravel())
    return Image.fromarray(order.view(np.uint8).reshape(*pixels.shape[:2], 4)).convert("RGB")


def jigsaw(image: Image.Image, grid: int, seed: int = 0) -> Image.Image:
    """The picture cut into grid x grid tiles that have changed places. The rows and columns that
    are left over stay where they are."""
    pixels = np.asarray(image.convert("RGB")).copy()
    tile = [max(1, side // grid) for side in pixels.shape[:2]]
    places = [
        (y * tile[0], x * tile[1])
        for y in range(pixels.shape[0] // tile[0])[:grid]
        for x in range(pixels.shape[1] // tile[1])[:grid]
    ]
    order = random.Random(seed).sample(places, len(places))
    out = pixels.copy()
    for (y, x), (v, u) in zip(places, order, strict=True):
        out[y : y + tile[0], x : x + tile[1]] = pixels[v : v + tile[0], u : u + tile[1]]
    return Image.fromarray(out)


def nobodies(image: Image.Image, seed: int) -> tuple[list[Image.Image], list[Image.Image]]:
    """Candidates for pictures of nobody (`nobody`): whole ones in other colours, and pictures that
    were cut into pieces."""
    views = (image, ImageOps.mirror(image), _moved(image, random.Random(seed)))
    whole = [recolouring for view in views for recolouring in other_colours(view)]
    pieces = [jigsaw(image, grid, seed + grid) for grid in (2, 3, 4)]
    pieces += [shuffled(image, seed + i) for i in range(4)]
    return whole, pieces


def other_colours(image: Image.Image) -> list[Image.Image]:
    """The picture with its channels in each other order, and its negative."""
    return [*(recoloured(image, order) for order in ORDERS), ImageOps.invert(image)]


def pair(left: Image.Image | None, right: Image.Image | None, rng: random.Random) -> Image.Image:
    """Two pictures of one size side by side, each at about half its size. None leaves its half
    empty; one of the two must be a picture."""
    some = left or right
    assert some is not None
    (width, height), ground = some.size, Image.new("RGB", some.size, edge_colour(some))
    for image, start in ((left, 0), (right, width // 2)):
        if image is None:
            continue
        half = ImageOps.mirror(image) if rng.random() < 0.5 else image
        half = half.rotate(
            rng.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=edge_colour(half)
        )
        scale = rng.uniform(*HALF)
        half = half.resize(
            (max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BILINEAR
        )
        cut = max(0, (half.width - width // 2) // 2)
        half = half.crop((cut, 0, cut + width // 2, half.height))
        ground.paste(
            half, (start, (height - half.height) // 2 + rng.randint(-(height // 12), height // 12))
        )
    return ground
