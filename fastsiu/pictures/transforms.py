"""Transforms of a clean picture: those that training looks at, and others for the verdict."""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from .pixels import strips

_CORNERS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]


def variants(
    image: Image.Image, seed: int = 0, held_out: bool = False
) -> list[tuple[str, Image.Image]]:
    """Named transforms of a picture, the untouched one ("original") first.

    held_out: False gives those that training may look at, True those kept for the verdict; only
    "original" is in both.

    Deterministic in (image, seed); the seed chooses the corners of the crops and the noise. Every
    result is RGB and, but for crops, of the picture's size.
    """
    image = image.convert("RGB")
    width, height = image.size
    edge = edge_colour(image)
    rng = random.Random(seed)
    corner, other = rng.choice(_CORNERS), rng.choice(_CORNERS)
    small = (max(1, width // 2), max(1, height // 2))
    made = [("original", image.copy())]
    if held_out:
        made += [
            ("crop 85 %", _crop(image, 0.85, (0.5, 0.5))),
            ("crop 85 % corner", _crop(image, 0.85, other)),
            (
                "flip, rotate +5",
                ImageOps.mirror(image).rotate(5, Image.Resampling.BICUBIC, fillcolor=edge),
            ),
            ("slightly brighter", ImageEnhance.Brightness(image).enhance(1.15)),
            ("slightly darker", ImageEnhance.Brightness(image).enhance(0.85)),
            ("less contrast", ImageEnhance.Contrast(image).enhance(0.75)),
            ("paler", ImageEnhance.Color(image).enhance(0.8)),
            ("rotate +12", image.rotate(12, Image.Resampling.BICUBIC, fillcolor=edge)),
            ("rotate -5", image.rotate(-5, Image.Resampling.BICUBIC, fillcolor=edge)),
            ("sharper", image.filter(ImageFilter.SHARPEN)),
            ("other noise", noisy(image, seed + 1, 8.0)),
            ("jpeg 60", recompressed(image, 60)),
        ]
        return made
    return made + [
        ("crop 90 %", _crop(image, 0.9, (0.5, 0.5))),
        ("crop 80 %", _crop(image, 0.8, (0.5, 0.5))),
        ("crop 80 % corner", _crop(image, 0.8, corner)),
        ("flip", ImageOps.mirror(image)),
        ("brighter", ImageEnhance.Brightness(image).enhance(1.3)),
        ("darker", ImageEnhance.Brightness(image).enhance(0.7)),
        ("more contrast", ImageEnhance.Contrast(image).enhance(1.4)),
        ("rotate +8", image.rotate(8, Image.Resampling.BICUBIC, fillcolor=edge)),
        ("rotate -8", image.rotate(-8, Image.Resampling.BICUBIC, fillcolor=edge)),
        ("blur", image.filter(ImageFilter.GaussianBlur(max(width, height) / 150))),
        ("noise", noisy(image, seed)),
        ("jpeg 40", recompressed(image, 40)),
        (
            "half size",
            image.resize(small, Image.Resampling.BILINEAR).resize(
                image.size, Image.Resampling.BILINEAR
            ),
        ),
    ]


def _crop(image: Image.Image, share: float, anchor: tuple[float, float]) -> Image.Image:
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (
        round((side - kept) * a)
        for side, kept, a in zip(image.size, (width, height), anchor, strict=True)
    )
    return image.crop((left, top, left + width, top + height))


def edge_colour(image: Image.Image) -> tuple[int, ...]:
    """The mean colour of an RGB picture's outermost pixels."""
    width, height = image.size
    edges = (
        (0, 0, width, 1),
        (0, height - 1, width, height),
        (0, 0, 1, height),
        (width - 1, 0, width, height),
    )
    border = np.concatenate([np.asarray(image.crop(box)).reshape(-1, 3) for box in edges])
    return tuple(int(v) for v in np.rint(border.mean(axis=0)))


def noisy(image: Image.Image, seed: int, sigma: float = 12.0) -> Image.Image:
    """An RGB picture with Gaussian noise of that many levels on every sample."""
    pixels, rng = np.array(image), np.random.default_rng(abs(seed))
    for _, top, _, bottom in strips(image.size):
        strip = pixels[top:bottom]
        strip[:] = np.clip(np.rint(strip + rng.normal(0.0, sigma, strip.shape)), 0, 255)
    return Image.fromarray(pixels)


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
