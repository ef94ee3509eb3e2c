"""Pictures that nobody has to own: what they are made of, that they repeat, and that they keep
their places among the samples."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiu.model.features import feature_tensors
from fastsiu.samples import generic, targets

torch.set_num_threads(1)


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (24, 36, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_drawings_have_the_size_repeat_and_differ():
    a, b = (generic.shapes((36, 24), random.Random(5)) for _ in range(2))
    assert a.size == (36, 24) and a.mode == "RGB" and a.tobytes() == b.tobytes()
    many = {generic.shapes((36, 24), random.Random(i)).tobytes() for i in range(20)}
    assert len(many) == 20


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (36, 24), (7, 5)])
def test_a_picture_of_any_size_is_taken_apart(size):
    pixels = np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    for seed in range(12):
        assert generic.apart(Image.fromarray(pixels), random.Random(seed)).size == size


def test_taking_apart_moves_tiles_and_channels_and_loses_none(picture):
    """Where no shape is drawn over it and the tiles divide the picture, the levels are the same."""
    whole = picture.crop((0, 0, 32, 24))
    levels, same = sorted(np.asarray(whole).ravel().tolist()), 0
    for seed in range(30):
        out = generic.apart(whole, random.Random(seed))
        same += sorted(np.asarray(out).ravel().tolist()) == levels
        assert out.tobytes() != whole.tobytes()
    assert same >= 8


def test_words_stand_in_the_place_of_image_tokens(gathered):
    scene = gathered.scene
    table = scene.vlm.base.get_input_embeddings().weight
    shown = generic.words(scene, random.Random(2), 2)
    assert len(shown) == 2 and not any(one.real for one in shown)
    for one in shown:
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in feature_tensors(one.features)])
        first = torch.cat(
            [x.reshape(-1, x.shape[-1]) for x in feature_tensors(scene.pictures[0].features)]
        )
        assert rows.shape == first.shape
        exact = "donot_use_mm_for_euclid_dist"
        nearest = torch.cdist(rows.float(), table.float(), compute_mode=exact).min(1)
        assert float(nearest.values.max()) < 1e-5
        ids = nearest.indices.tolist()
        assert scene.masked.isdisjoint(ids)
        assert all(scene.vlm.tokenizer.convert_ids_to_tokens(i)[1:].isalpha() for i in ids)


def test_all_three_sorts_are_there_and_another_seed_gives_others(gathered):
    scene = gathered.scene
    one, two = generic.generic(scene, 0, 14), generic.generic(scene, 1, 14)
    assert len(one) == len(two) == 14 and sum(not picture.real for picture in one) == 3
    assert one[0].image.tobytes() != two[0].image.tobytes()
    assert generic.generic(scene, 0, 0) == []


def test_they_are_asked_about_like_retained_pictures(gathered):
    """They come behind the dreams, belong to nobody, and what the teacher says of them is kept."""
    scene = gathered.scene
    more = generic.generic(scene, 0, 7)
    beside = replace(
        scene,
        pictures=[*scene.pictures, *more],
        named=[*scene.named, *[None] * len(more)],
    )
    kept = [s for s in targets.preserve(beside) if s.picture and s.picture >= len(scene.pictures)]
    assert {s.origin for s in kept} == {"retain"} and len({s.picture for s in kept}) == len(more)
