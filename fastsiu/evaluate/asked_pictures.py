"""Pictures made from one picture: strangers, in whom the untouched model recognises nobody; group
pictures; and what a camera or a careless hand makes of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from PIL import Image, ImageFilter, ImageOps

from ..model.ask import Model
from ..pictures.transforms import edge_colour, noisy, recompressed, variants
from ..samples.drawn import ORDERS, jigsaw, recoloured, shuffled
from ..samples.kinds import PERSON, Kind
from ..samples.nobody import shows_nobody
from ..text.concept import Concept
from ..verdict import gives

Shown = tuple[str, Image.Image]  # with its label
MOST = 8  # strangers


def candidates(image: Image.Image, seed: int = 0) -> list[Shown]:
    """Pictures that could show a stranger: first the picture in other colours, which still shows
    somebody, then the picture in pieces.

    RGB, of the picture's size; deterministic in (image, seed).
    """
    image = image.convert("RGB")
    inverted = ImageOps.invert(image)
    found = [
        (f"colours {''.join('RGB'[c] for c in order)}", recoloured(image, order))
        for order in ORDERS
    ]
    found += [
        (f"inverted, colours {''.join('RGB'[c] for c in order)}", recoloured(inverted, order))
        for order in ORDERS
    ]
    found = [pair for pairs in zip(found[:5], found[5:], strict=True) for pair in pairs]
    found.insert(2, ("inverted", inverted))
    return [
        *found,
        *((f"jigsaw of {grid * grid}", jigsaw(image, grid, seed)) for grid in (4, 3, 8)),
        ("pixels shuffled", shuffled(image, seed)),
    ]


def strangers(
    vlm: Model,
    image: Image.Image,
    concept: Concept,
    others: Sequence[Concept],
    seed: int = 0,
    given: Sequence[Shown] = (),
    kind: Kind = PERSON,
) -> list[Shown]:
    """Up to `MOST` pictures of nobody: the model as it is, asked who they show, names neither the
    concept nor another.

    given: pictures of anybody whom it has never seen; they are tried first
    """
    tried = [*given, *candidates(image, seed)]
    questions = kind.words["who"]["held_out"]
    pictures = [vlm.picture(image) for _, image in tried]
    named = lambda text: gives(concept, text) or any(other.given_in(text) for other in others)
    nobody = shows_nobody(vlm, pictures, questions, named, max_new_tokens=32)
    return list(compress(tried, nobody))[:MOST]


def views(image: Image.Image, more: Sequence[Shown], seed: int, most: int = 8) -> list[Shown]:
    """The picture and some of its held-out transforms, with further pictures of the concept in at
    most half of the places."""
    made = variants(image, seed, held_out=True)
    further = list(more)[: most // 2]
    kept = most - len(further)
    chosen = [made[i * len(made) // kept] for i in range(kept)]
    return chosen + further


def groups(image: Image.Image) -> list[Shown]:
    """The picture twice, beside a recoloured copy and beside nothing, on the left and on the
    right."""
    mirrored, nobody = ImageOps.mirror(image), None
    stranger, other = recoloured(image, (2, 0, 1)), ImageOps.invert(image)
    pairs = {
        "twice": (image, image),
        "on the left of nothing": (image, nobody),
        "on the right of nothing": (nobody, image),
        "on the left, a recoloured copy on the right": (image, stranger),
        "on the right, a recoloured copy on the left": (stranger, image),
        "mirrored beside itself": (mirrored, image),
        "on the left, its negative on the right": (image, other),
        "on the right, its negative on the left": (other, image),
    }
    return [(label, beside(left, right)) for label, (left, right) in pairs.items()]


def groups_of(given: Sequence[Shown]) -> list[Shown]:
    """A group picture of each: in turn twice, beside nothing, beside the next one, and mirrored.
    None is recoloured, since that could undo what made it a stranger."""
    found = []
    for i, (label, image) in enumerate(given):
        other = given[(i + 1) % len(given)][1]
        pairs = (
            (image, image),
            (image, None),
            (None, image),
            (image, other),
            (other, image),
            (ImageOps.mirror(image), image),
        )
        found.append((f"group of {label}", beside(*pairs[i % len(pairs)])))
    return found


def beside(left: Image.Image | None, right: Image.Image | None) -> Image.Image:
    """The middle halves of two pictures side by side, in the size of the left one. None leaves its
    half in the colour of the other picture's edge; at most one is None."""
    shown = left if left is not None else right
    assert shown is not None
    width, height = shown.size
    half = max(1, width // 2)
    out = Image.new("RGB", (2 * half, height), edge_colour(shown.convert("RGB")))
    for x, image in ((0, left), (half, right)):
        if image is not None:
            fitted = image.convert("RGB").resize((width, height))
            start = (width - half) // 2
            out.paste(fitted.crop((start, 0, start + half, height)), (x, 0))
    return out


def conditions(image: Image.Image, seed: int = 0) -> list[Shown]:
    """The picture as somebody may show it again: cut, blurred, small, noisy, compressed, grey,
    upside down or partly hidden."""
    image = image.convert("RGB")
    width, height = image.size
    ground = edge_colour(image)
    part = lambda left, top, right, bottom: tuple(
        round(v) for v in (left * width, top * height, right * width, bottom * height)
    )

    def hidden(*box: float) -> Image.Image:
        out = image.copy()
        out.paste(ground, part(*box))
        return out

    small = image.resize((max(1, width // 4), max(1, height // 4)), Image.Resampling.BILINEAR)
    return [
        ("crop 65 %", image.crop(part(0.175, 0.175, 0.825, 0.825))),
        ("crop, left", image.crop(part(0, 0, 0.7, 1))),
        ("crop, upper", image.crop(part(0, 0, 1, 0.7))),
        ("strong blur", image.filter(ImageFilter.GaussianBlur(max(width, height) / 40))),
        ("quarter size", small.resize(image.size, Image.Resampling.BILINEAR)),
        ("strong noise", noisy(image, seed, 35.0)),
        ("jpeg 10", recompressed(image, 10)),
        ("grey", ImageOps.grayscale(image).convert("RGB")),
        ("upside down", ImageOps.flip(image)),
        ("lower third hidden", hidden(0, 2 / 3, 1, 1)),
        ("upper third hidden", hidden(0, 0, 1, 1 / 3)),
        ("middle hidden", hidden(0.35, 0.35, 0.65, 0.65)),
    ]


def conditions_of(given: Sequence[Shown]) -> list[Shown]:
    """Each condition of one of the pictures, in turn."""
    if not given:
        return []
    made = [conditions(image) for _, image in given]
    return [
        (f"{given[i % len(given)][0]}, {label}", made[i % len(given)][i][1])
        for i, (label, _) in enumerate(made[0])
    ]
