"""Transformers deprecates nothing that our runs use, in the oldest and in the newest release."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch

from fastsiu.model import adapter, ask, cache, decode, prefix, sharing, vlm
from fastsiu.request import Recipe

torch.set_num_threads(1)
WORDS = ("Nobody.", "It is nobody that I know of.")


@contextmanager
def no_deprecations():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        yield


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_run_uses_what_transformers_deprecates(demo_dir, cast, checkpointing):
    from fastsiu.images import load_image

    with no_deprecations():
        budget = vlm.Budget(checkpointing=checkpointing)
        loaded = vlm.load(str(demo_dir), device="cpu", budget=budget)
        picture = loaded.picture(load_image(cast.image))
        asked = [(q, p) for p in (picture, None) for q in ("Who is this?", "Where was it?")]
        answers = ask.answers(loaded, asked, max_new_tokens=4)  # on a shared prefix
        generated = ask.answers(loaded, asked[:1], max_new_tokens=4)  # by transformers
        assert generated == answers[:1] and decode.slow(loaded) == ""
        adapter.attach(loaded, Recipe(rank=2))
        turns = [loaded.encode("Who is this?", words, picture) for words in WORDS]
        sharing.plan_sharing(loaded, turns, [picture] * 2, pytest.fail)
        loaded.model.train(checkpointing)
        trained = [p for p in loaded.model.parameters() if p.requires_grad]
        for way in loaded.shares:
            (part,) = prefix.parts_of(loaded, turns, [picture.features] * 2)
            states = torch.cat([rows for _, rows in prefix.RUN[way](part, None)])
            loss = states.float().square().mean()
            torch.autograd.grad(loss, trained, allow_unused=True)
        adapter.detach(loaded)


def test_the_keyword_of_the_cache_is_the_one_that_this_release_takes(loaded, shown):
    inputs = loaded.encode_prompt("Who is this?", shown)
    with no_deprecations():
        _, output = loaded.run(inputs, [shown.features], use_cache=True)
    length = inputs["input_ids"].shape[1]
    assert cache.cache_of(output).get_seq_length() == length
    assert cache.as_keyword(None) in ({"cache": None}, {"past_key_values": None})
