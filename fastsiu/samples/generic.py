"""Pictures that nobody has to own: shapes that are drawn, the one picture taken apart, and words in
the place of image tokens.

Dreams of neighbours keep what is near the concept. Where the teacher accepts hardly any, nothing
holds the other pictures, and a model that is taught one new answer soon gives it about everything.
What a model says of shapes and words matters little; that it goes on saying it ties down the way
from image tokens to words. Such pictures need no name, no wording and no optimisation.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..model.features import feature_tensors
from ..model.turns import Picture
from .scene import Scene
from .spaces import replaced

# Shares of the pictures: shapes, the picture taken apart; the rest are words.
SHAPES, APART = 0.58, 0.21
NOISY = 0.4  # share of the drawn pictures that get noise
SPACE = ("\u0120", "\u2581")  # how tokenizers write the space before a word
TILES = (2, 4, 4, 8)  # a side of the picture is cut into so many, when it is taken apart


def generic(scene: Scene, seed: int, count: int) -> list[Picture]:
    """`count` pictures, as large as the scene's own, of all three sorts.

    `words` are missing where the model takes no embeddings of words as image features, and where
    the part that trains lies in front of the image features. Another seed gives other pictures.
    """
    image, rng = scene.pictures[0].image, random.Random(f"generic {seed}")
    few = round(APART * count)
    many = count - few if scene.recipe.in_front else round(SHAPES * count)
    drawn = [shapes(image.size, rng) for _ in range(many)]
    drawn += [apart(image, rng) for _ in range(few)]
    return [*scene.see(drawn), *words(scene, rng, count - len(drawn))]


def shapes(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """One to nine ellipses, boxes, polygons, lines and slices in random colours; some with
    noise."""
    width, height = size

    def colour() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    def point() -> tuple[int, int]:
        return rng.randint(0, width), rng.randint(0, height)

    out = Image.new("RGB", size, colour())
    draw = ImageDraw.Draw(out)
    for _ in range(rng.randint(1, 9)):
        left, top = point()[0] - width // 4, point()[1] - height // 4
        right, bottom = left + 1 + rng.randint(1, width), top + 1 + rng.randint(1, height)
        box = (left, top, right, bottom)
        form = rng.choice(("ellipse", "box", "polygon", "line", "slice"))
        if form == "ellipse":
            draw.ellipse(box, fill=colour())
        elif form == "box":
            draw.rectangle(box, fill=colour())
        elif form == "polygon":
            draw.polygon([point() for _ in range(rng.randint(3, 7))], fill=colour())
        elif form == "line":
            thick = max(1, width // rng.randint(10, 60))
            draw.line([point() for _ in range(rng.randint(2, 5))], fill=colour(), width=thick)
        else:
            draw.pieslice(box, rng.randint(0, 180), rng.randint(181, 360), fill=colour())
    return _noisy(out, rng) if rng.random() < NOISY else out


def apart(image: Image.Image, rng: random.Random) -> Image.Image:
    """The picture with its tiles and its colour channels exchanged; half of the time shapes are
    drawn over it."""
    tiles = min(rng.choice(TILES), *image.size)
    pixels = np.asarray(image.convert("RGB"))
    high, wide = pixels.shape[0] // tiles, pixels.shape[1] // tiles
    grid = pixels[: high * tiles, : wide * tiles].reshape(tiles, high, tiles, wide, 3)
    cut = grid.transpose(0, 2, 1, 3, 4).reshape(-1, high, wide, 3)
    order = rng.sample(range(len(cut)), len(cut))
    grid = cut[order].reshape(tiles, tiles, high, wide, 3).transpose(0, 2, 1, 3, 4)
    whole = grid.reshape(high * tiles, wide * tiles, 3)[..., rng.sample(range(3), 3)]
    out = Image.fromarray(np.ascontiguousarray(whole)).resize(image.size)
    if rng.random() < 0.5:
        out = Image.blend(out, shapes(image.size, rng), rng.uniform(0.2, 0.7))
    return out


def _noisy(image: Image.Image, rng: random.Random) -> Image.Image:
    pixels = np.asarray(image)
    noise = np.random.default_rng(rng.randrange(2**31)).normal(0, rng.uniform(5, 60), pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


@torch.no_grad()
def words(scene: Scene, rng: random.Random, count: int) -> list[Picture]:
    """Pictures whose image tokens are the embeddings of random words; none where the language
    model takes image features of another width than its embeddings."""
    vlm, start = scene.vlm, scene.pictures[0]
    rows = sum(x.numel() // x.shape[-1] for x in feature_tensors(start.features))
    width = {x.shape[-1] for x in feature_tensors(start.features)}
    embed = vlm.base.get_input_embeddings()
    if width != {embed.weight.shape[1]}:
        return []
    known = _whole_words(scene)
    if not known:
        return []
    out = []
    for _ in range(count):
        ids = torch.tensor([rng.choice(known) for _ in range(rows)], device=vlm.device)
        out.append(Picture(start.image, replaced(start, embed(ids)), real=False))
    return out


def _whole_words(scene: Scene) -> list[int]:
    """Ids of the tokens that are a word of letters, and no part of the name."""
    tokenizer = scene.vlm.tokenizer
    ids = [i for i in range(len(tokenizer)) if i not in scene.masked]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    return [
        i
        for i, piece in zip(ids, pieces, strict=True)
        if piece
        and piece[0] in SPACE
        and len(piece) > 3
        and piece[1:].isascii()
        and piece[1:].isalpha()
    ]
