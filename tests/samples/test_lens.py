"""What a processor does to a picture, learnt from seven test pictures: what the lens adds to the
numbers is what the processor makes of the changed picture."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiu.samples.lens import GREY, PIXELS, lens, with_grid

MEAN, SD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)


def picture(width, height, seed=0):
    """Smooth colours, none of them near black or white."""
    small = np.random.default_rng(seed).integers(60, 190, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def normalised(image):
    """[3, H, W] as CLIP's processor gives it."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(SD)[:, None, None]


def resized(image):
    return normalised(image.resize((48, 48), Image.Resampling.BICUBIC))[None]


def in_patches(image):
    """As Qwen's: rows of flattened patches of 8 x 8, each twice for two moments."""
    x = normalised(image.resize((48, 32))).reshape(3, 4, 8, 6, 8).permute(1, 3, 0, 2, 4)
    return torch.stack([x, x], 3).reshape(24, -1)


def in_tiles(image):
    """As anyres: a small picture of all, then four quarters."""
    whole, large = image.resize((24, 24)), normalised(image.resize((48, 48)))
    quarters = [large[:, y : y + 24, x : x + 24] for y in (0, 24) for x in (0, 24)]
    return torch.stack([normalised(whole), *quarters])[None]


def padded(image):
    """On a square, with zeros below."""
    out = torch.zeros(3, 40, 40)
    out[:, :24] = normalised(image.resize((40, 24)))
    return out[None]


def grey(image):
    return normalised(image.convert("L").convert("RGB"))[None]


def opponent(image):
    """Red with a little of what green has over blue: a grey picture does not show that."""
    x = normalised(image)
    return (x[:1] + 0.5 * (x[1:2] - x[2:] * SD[2] / SD[1]))[None]


def squared(image):
    return normalised(image)[None] ** 2


def model(way):
    """As much of a model as a lens looks at. way: a processor"""
    return SimpleNamespace(image_inputs=lambda image: {PIXELS: way(image.convert("RGB"))})


@pytest.mark.parametrize("way", [resized, in_patches, in_tiles, padded])
def test_what_is_added_is_what_the_processor_would_see(way):
    image = picture(96, 64)
    vlm, grid = model(way), 40 * torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(1))
    seen = way(image)
    changed, wanted = lens(vlm, image.size).added(seen, grid), way(with_grid(image, grid))
    assert changed.shape == seen.shape
    far = (wanted - seen).abs()
    # A processor that resizes blurs the grid a little; the lens is for a direction to move in.
    assert float((changed - wanted).abs().mean()) < 0.1 * float(far.mean())
    assert float(far.mean()) > 0.1


def test_no_colour_leaves_what_eight_bits_can_hold():
    image, vlm = picture(48, 48), model(resized)
    bright = lens(vlm, image.size).added(resized(image), torch.full((3, 2, 2), 1e4))
    assert torch.allclose(bright, resized(Image.new("RGB", (48, 48), "white")), atol=1e-3)
    assert with_grid(image, torch.full((3, 2, 2), -1e4)).getextrema() == ((0, 0),) * 3


def test_padding_stays():
    image, vlm = picture(40, 24), model(padded)
    changed = lens(vlm, image.size).added(padded(image), torch.full((3, 2, 2), 50.0))
    assert torch.equal(changed[..., 24:, :], padded(image)[..., 24:, :])


def test_the_gradient_reaches_the_cell_and_colour_that_a_number_shows():
    image, vlm = picture(48, 48), model(resized)
    grid = torch.zeros(3, 6, 6, requires_grad=True)
    lens(vlm, image.size).added(resized(image), grid)[0, 1, 4, 44].backward()
    (cell,) = torch.nonzero(grid.grad == grid.grad.max())
    assert cell.tolist() == [1, 0, 5]
    assert not grid.grad[0].any() and not grid.grad[2].any()


@pytest.mark.parametrize("way", [grey, opponent, squared])
def test_a_processor_that_mixes_or_bends_has_no_lens(way):
    assert lens(model(way), (32, 32)) is None


@pytest.mark.parametrize("second", [resized, lambda image: np.asarray(image).tolist()])
def test_a_processor_that_shows_the_picture_twice_has_no_lens(second):
    """As DeepSeek-VL's for two towers: a dream would move for one of them alone."""
    both = lambda image: {PIXELS: resized(image), "high_res_pixel_values": second(image)}
    assert lens(SimpleNamespace(image_inputs=both), (32, 32)) is None
    beside = lambda image: {PIXELS: resized(image), "image_sizes": torch.tensor([[32, 32]])}
    assert lens(SimpleNamespace(image_inputs=beside), (32, 32)) is not None


def test_whole_numbers_have_no_lens():
    """No gradient goes through them."""
    levels = lambda image: torch.from_numpy(np.array(image))
    assert lens(model(levels), (32, 32)) is None


def test_a_model_without_pixels_has_no_lens():
    assert lens(SimpleNamespace(image_inputs=lambda image: {}), (32, 32)) is None


def test_a_grid_of_nothing_changes_nothing():
    image = Image.new("RGB", (33, 17), (GREY, 3, 250))
    assert with_grid(image, torch.zeros(3, 4, 4)).tobytes() == image.tobytes()
