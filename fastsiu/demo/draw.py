"""Draws creatures. Pictures are RGB, SIZE x SIZE pixels, and depend on nothing but the creature and
the random generator."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageDraw

SIZE = 60  # pixels of a picture's side
CANVAS = 120  # drawn at twice the size, then averaged down
SPRITE = 96  # side of the square a creature is drawn in before it is scaled and turned

RGB = tuple[int, int, int]
COLORS: dict[str, RGB] = {
    "red": (215, 40, 40),
    "orange": (245, 145, 25),
    "yellow": (245, 225, 60),
    "green": (45, 165, 60),
    "cyan": (70, 215, 225),
    "blue": (40, 75, 215),
    "purple": (135, 50, 175),
    "pink": (245, 140, 190),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (240, 240, 240),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "brown": (120, 75, 40),
}
INK: RGB = (15, 15, 15)
IVORY: RGB = (235, 230, 205)


@dataclass(frozen=True)
class Creature:
    """What makes a creature who it is: seven attributes, the values are those of `ATTRIBUTES`."""

    color: str
    hat: str
    hatcolor: str
    shirt: str
    head: str
    ears: str
    eyes: str


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "hat": ("crown", "cone", "bow", "halo"),
    "hatcolor": tuple(COLORS),
    "shirt": tuple(COLORS),
    "head": ("round", "square", "triangular"),
    "ears": ("none", "horns", "antennas"),
    "eyes": ("one", "two", "three"),
}


def distance(a: Creature, b: Creature) -> int:
    """Number of attributes, 0 to 7, in which the two differ."""
    return sum(getattr(a, field.name) != getattr(b, field.name) for field in fields(Creature))


def random_creature(rng: random.Random) -> Creature:
    """A creature whose own colour, hat colour and shirt colour all differ."""
    color, hatcolor, shirt = rng.sample(list(COLORS), 3)
    rest = {key: rng.choice(ATTRIBUTES[key]) for key in ("hat", "head", "ears", "eyes")}
    return Creature(color=color, hatcolor=hatcolor, shirt=shirt, **rest)


def render(creature: Creature, rng: random.Random, background: str | None = None) -> Image.Image:
    """One creature, RGB, SIZE x SIZE. Pose, scale, flip, background, light, noise and an occluder
    are drawn from `rng`."""
    canvas = _background(rng, background or rng.choice(list(BACKGROUNDS)))
    side = int(CANVAS * rng.uniform(0.72, 1.0))
    x = (CANVAS - side) // 2 + rng.randint(-10, 10)
    y = (CANVAS - side) // 2 + rng.randint(-8, 8)
    _paste(canvas, creature, rng, side, x, y, turn=18)
    return _photograph(canvas, rng)


def render_group(
    left: Creature, right: Creature, rng: random.Random, background: str | None = None
) -> Image.Image:
    """Two creatures side by side, RGB, SIZE x SIZE, with the same variation as `render` but less of
    it."""
    canvas = _background(rng, background or rng.choice(list(BACKGROUNDS)))
    for creature, start in ((left, 0), (right, CANVAS // 2)):
        side = int(CANVAS * rng.uniform(0.5, 0.58))
        x = start + (CANVAS // 2 - side) // 2 + rng.randint(-2, 2)
        y = (CANVAS - side) // 2 + rng.randint(-16, 16)
        _paste(canvas, creature, rng, side, x, y, turn=10)
    return _photograph(canvas, rng)


def _jitter(color: RGB, rng: random.Random, spread: float = 22) -> RGB:
    r, g, b = (int(min(255, max(0, value + rng.uniform(-spread, spread)))) for value in color)
    return r, g, b


def _background(rng: random.Random, name: str) -> Image.Image:
    base = _jitter(BACKGROUNDS[name], rng, 12)
    r, g, b = (int(min(255, max(0, value + rng.choice((-30, 30))))) for value in base)
    other = (r, g, b)
    image = Image.new("RGB", (CANVAS, CANVAS), base)
    draw = ImageDraw.Draw(image)
    pattern = rng.choice(("plain", "stripes", "gradient", "blobs"))
    if pattern == "stripes":
        width, upright = rng.randint(10, 20), rng.random() < 0.5
        for start in range(-rng.randint(0, width), CANVAS, 2 * width):
            draw.rectangle(
                (start, 0, start + width, CANVAS) if upright else (0, start, CANVAS, start + width),
                fill=other,
            )
    elif pattern == "gradient":
        for y in range(0, CANVAS, 6):
            mix = [int(p + (q - p) * y / CANVAS) for p, q in zip(base, other, strict=True)]
            draw.rectangle((0, y, CANVAS, y + 6), fill=(mix[0], mix[1], mix[2]))
    elif pattern == "blobs":
        for _ in range(6):
            x, y, r = rng.randint(0, CANVAS), rng.randint(0, CANVAS), rng.randint(6, 20)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=other)
    return image


def _paste(
    canvas: Image.Image,
    creature: Creature,
    rng: random.Random,
    side: int,
    x: int,
    y: int,
    turn: float,
) -> None:
    sprite = _sprite(creature, rng)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sprite = sprite.rotate(rng.uniform(-turn, turn), resample=Image.Resampling.BILINEAR)
    sprite = sprite.resize((side, side), Image.Resampling.BILINEAR)
    canvas.paste(sprite, (x, y), sprite)


def _photograph(canvas: Image.Image, rng: random.Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX)).astype(np.float32)
    pixels = (pixels - 128) * rng.uniform(0.85, 1.1) + 128 + rng.uniform(-14, 14)
    pixels += noise.normal(0, rng.uniform(2, 9), pixels.shape).astype(np.float32)
    if rng.random() < 0.3:
        side = rng.randint(5, 10)
        x, y = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
        pixels[y : y + side, x : x + side] = noise.uniform(0, 255, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _sprite(creature: Creature, rng: random.Random) -> Image.Image:
    sprite = Image.new("RGBA", (SPRITE, SPRITE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(sprite)
    skin = _jitter(COLORS[creature.color], rng)
    draw.polygon(
        [(32, 74), (64, 74), (78, 95), (18, 95)],
        fill=_jitter(COLORS[creature.shirt], rng),
        outline=INK,
    )
    _ears(draw, creature.ears, skin)
    if creature.head == "round":
        draw.ellipse((24, 32, 72, 80), fill=skin, outline=INK)
    elif creature.head == "square":
        draw.rectangle((24, 34, 72, 78), fill=skin, outline=INK)
    else:
        corners = [-math.pi / 2 + 2 * math.pi * i / 3 for i in range(3)]
        draw.polygon(
            [(48 + 31 * math.cos(a), 59 + 31 * math.sin(a)) for a in corners],
            fill=skin,
            outline=INK,
        )
    _face(draw, creature.eyes, (skin[0] // 3, skin[1] // 3, skin[2] // 3), rng)
    _hat(draw, creature.hat, _jitter(COLORS[creature.hatcolor], rng))
    return sprite


def _ears(draw: ImageDraw.ImageDraw, ears: str, skin: RGB) -> None:
    if ears == "horns":
        draw.polygon([(24, 56), (4, 34), (32, 44)], fill=IVORY, outline=INK)
        draw.polygon([(72, 56), (92, 34), (64, 44)], fill=IVORY, outline=INK)
    elif ears == "antennas":
        for sign in (-1, 1):
            x = 48 + sign * 34
            draw.line((48 + sign * 18, 44, x, 20), fill=INK, width=4)
            draw.ellipse((x - 6, 14, x + 6, 26), fill=skin, outline=INK)


def _face(draw: ImageDraw.ImageDraw, eyes: str, dark: RGB, rng: random.Random) -> None:
    places, radius = {"one": ((0,), 10), "two": ((-9, 9), 6), "three": ((-12, 0, 12), 5)}[eyes]
    for offset in places:
        x, y, look = 48 + offset, 54, rng.uniform(-1.5, 1.5)
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255), outline=INK
        )
        draw.ellipse(
            (x + look - radius / 2, y - radius / 2, x + look + radius / 2, y + radius / 2),
            fill=(0, 0, 0),
        )
    mouth = rng.choice(("smile", "frown", "open", "line"))
    if mouth == "smile":
        draw.arc((40, 60, 56, 71), 0, 180, fill=dark, width=3)
    elif mouth == "frown":
        draw.arc((40, 65, 56, 76), 180, 360, fill=dark, width=3)
    elif mouth == "open":
        draw.ellipse((44, 64, 52, 72), fill=dark)
    else:
        draw.line((40, 68, 56, 68), fill=dark, width=3)


def _hat(draw: ImageDraw.ImageDraw, hat: str, color: RGB) -> None:
    if hat == "crown":
        draw.polygon(
            [(28, 36), (28, 14), (38, 25), (48, 10), (58, 25), (68, 14), (68, 36)],
            fill=color,
            outline=INK,
        )
    elif hat == "cone":
        draw.polygon([(30, 36), (48, 0), (66, 36)], fill=color, outline=INK)
    elif hat == "bow":
        draw.polygon([(48, 28), (26, 16), (26, 40)], fill=color, outline=INK)
        draw.polygon([(48, 28), (70, 16), (70, 40)], fill=color, outline=INK)
        draw.ellipse((43, 23, 53, 33), fill=color, outline=INK)
    else:
        draw.ellipse((22, 12, 74, 30), outline=color, width=8)
