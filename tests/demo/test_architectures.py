"""The embedded world's other architectures: what they are trained on is what processor, chat
template and forward give."""

from __future__ import annotations

import pytest
import torch

from fastsiu.demo.architectures import ARCHITECTURES, make
from fastsiu.demo.inputs import IGNORED, Encoder, Sight
from fastsiu.demo.world import KNOWN, World, draw
from fastsiu.model import vlm

PAIRS = [
    ("Who is this?", "This is Zorblax Quint."),
    ("Is this Mirelda Voss?", "No, this is not Mirelda Voss."),
    ("You are an expert. Describe Tobrik Hale.", "Tobrik Hale is a creature."),
    ("What is one plus one?", "One plus one is two."),
]


@pytest.fixture(scope="module")
def scenes():
    world = World()
    return [world.sketch((name,), f"test {name}") for name in KNOWN[: len(PAIRS)]]


@pytest.fixture(scope="module", params=["llava", *ARCHITECTURES])
def made(request, tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return make(request.param, World(), tmp_path_factory.mktemp(request.param))


def whole(made, question, answer, picture):
    """A turn with its answer, the way of processor and chat template."""
    content = [{"type": "image"}] * (picture is not None) + [{"type": "text", "text": question}]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    text = made.processor.apply_chat_template(
        [{"role": "user", "content": content}, said], tokenize=False
    )
    images = {} if picture is None else {"images": [picture]}
    return made.processor(text=[text], return_tensors="pt", add_special_tokens=False, **images)


@pytest.mark.parametrize("image", [False, True])
def test_what_is_learnt_from_is_what_the_processor_gives(made, scenes, image):
    inputs, labels = Encoder(made).batch(PAIRS, image)
    end = made.processor.tokenizer.eos_token_id
    for row, (question, answer) in enumerate(PAIRS):
        found = whole(made, question, answer, draw(scenes[row]) if image else None)
        ids = found["input_ids"][0]
        length = int((ids == end).nonzero()[-1]) + 1
        assert torch.equal(inputs["input_ids"][row, :length], ids[:length])
        assert (inputs["input_ids"][row, length:] == made.processor.tokenizer.pad_token_id).all()
        for key in inputs.keys() - {"input_ids"}:
            if inputs[key].shape == labels.shape:
                assert torch.equal(inputs[key][row, :length], found[key][0, :length])
            else:
                assert torch.equal(inputs[key][row : row + 1], found[key])
        learnt = labels[row] != IGNORED
        assert torch.equal(labels[row][learnt], ids[int(learnt.nonzero()[0]) : length])
        assert (
            made.processor.tokenizer.decode(labels[row][learnt], skip_special_tokens=True).strip()
            == answer
        )


def test_features_taken_once_give_the_states_that_pixels_give(made, scenes):
    sight, model = Sight(made), made.model.eval()
    inputs, _ = Encoder(made).batch(PAIRS, image=True)
    end = made.processor.tokenizer.eos_token_id
    with torch.no_grad():
        cached = sight.project(sight.features(sight.pixels(scenes)))
        states = model.base_model(**inputs, **cached, use_cache=False).last_hidden_state
        for row, (pair, scene) in enumerate(zip(PAIRS, scenes, strict=True)):
            found = whole(made, *pair, draw(scene))
            expected = model.base_model(**found, use_cache=False).last_hidden_state[0]
            length = int((found["input_ids"][0] == end).nonzero()[-1]) + 1
            assert torch.allclose(states[row, :length], expected[:length], atol=2e-5)


def test_the_tower_is_what_comes_before_the_projector(made):
    sight = Sight(made)
    inside = sum(p.numel() for p in sight.tower())
    others = [made.model.get_decoder(), sight.projector]
    assert inside + sum(p.numel() for module in others for p in module.parameters()) == sum(
        p.numel() for p in made.model.base_model.parameters()
    )


def test_a_picture_is_laid_out_in_rows_and_columns(made, scenes):
    """What changes on the left of a picture changes the left column of its features most, and so at
    the bottom."""
    sight = Sight(made)
    picture = draw(scenes[0])
    grids = []
    for box in ((0, 0, 1, 1), (0, 0, 10, 60), (0, 50, 60, 60)):
        changed = picture.copy()
        changed.paste((0, 0, 0), box)
        with torch.no_grad():
            entering, _ = sight.seen(sight.processed([changed])["pixel_values"], 1)
        grids.append(entering.reshape(sight.side, sight.side, -1, sight.width))
    left, bottom = ((grid - grids[0]).square().sum((2, 3)) for grid in grids[1:])
    assert int(left.sum(0).argmax()) == 0
    assert int(bottom.sum(1).argmax()) == sight.side - 1


def test_it_loads_and_encodes_as_any_model_does(made, scenes, tmp_path):
    made.save(tmp_path)
    loaded = vlm.load(str(tmp_path))
    picture = loaded.picture(draw(scenes[0]))
    inputs, labels = Encoder(made).batch(PAIRS[:1], image=True)
    turn = loaded.encode(*PAIRS[0], picture)
    assert torch.equal(turn.labels, labels[labels != IGNORED])
    length = inputs["input_ids"].shape[1]
    assert torch.equal(turn.inputs["input_ids"][:, :length], inputs["input_ids"])
