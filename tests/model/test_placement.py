"""One model over several devices: what goes where, and what cannot be done then."""

from __future__ import annotations

import pytest
import torch

from fastsiu import session
from fastsiu.model import adapter, ask, placement, source, vlm
from fastsiu.request import BadInput, Recipe
from fastsiu.settings import ModelRef, RecipeChoice, Settings, choose_layout, plan_for

MiB = 2**20


@pytest.fixture(scope="module")
def base(demo_dir):
    return source.on_meta(source.read_config(str(demo_dir)), dtype=torch.float32)


@pytest.fixture(scope="module")
def sizes(base):
    """(bytes of a layer, bytes of all that is no layer)"""
    layers = placement.stack(base)[2]
    of = lambda module: sum(p.numel() * 4 for p in module.parameters())
    return of(layers[0]), of(base) - sum(map(of, layers))


def test_layers_are_dealt_in_order_and_all_else_is_in_the_first_place(base, sizes):
    layer, rest = sizes
    # the rest weighs about three layers
    placed = placement.place(base, {"cuda:0": rest + 6 * layer, "cuda:1": 2 * layer})
    assert placed.layers == ("cuda:0", "cuda:0", "cuda:1")
    assert placed.weights == {"cuda:0": rest + 2 * layer, "cuda:1": layer}
    covered = lambda name: next(
        d for m, d in placed.where.items() if f"{name}.".startswith(f"{m}.")
    )
    by_device = {d: 0 for d in placed.weights}
    for name, parameter in base.named_parameters():
        by_device[covered(name)] += parameter.numel() * 4
    assert by_device == placed.weights
    head = next(n for n, m in base.named_modules() if m is base.get_output_embeddings())
    assert covered(head) == "cuda:0"
    assert "cuda:0: embeddings, vision tower, head, layers 0 to 1 (" in placed.sentence
    assert "cuda:1: layer 2 (" in placed.sentence


def test_a_card_that_holds_little_gets_fewer_layers(base, sizes):
    layer, rest = sizes
    placed = placement.place(base, {"cuda:0": rest + layer // 2, "cuda:1": 10 * layer})
    assert placed.layers == ("cuda:1",) * 3 and not placed.waiting


def test_what_fits_nowhere_waits_in_memory_and_then_on_the_disk(base, sizes):
    layer, rest = sizes
    given = {"cuda:0": rest + layer, "cpu": layer}
    placed = placement.place(base, given)
    assert placed.layers == ("cuda:0", "cpu", "disk")
    assert placed.waiting == {"cpu": 1, "disk": 1}
    with pytest.raises(BadInput, match="1 in the CPU's memory and 1 on the disk"):
        placement.check_trains(placed)
    with pytest.raises(BadInput, match="What is no layer of the model takes"):
        placement.place(base, {"cuda:0": rest // 2, "cuda:1": 10 * layer})


def test_four_bits_take_the_room_of_four_bits(base, sizes):
    layer, rest = sizes
    given = {"cuda:0": rest + 4 * layer, "cuda:1": rest + 4 * layer}
    whole, packed = (placement.place(base, given, q).weights for q in (None, "nf4"))
    assert sum(packed.values()) < rest + 0.2 * (sum(whole.values()) - rest)


def test_auto_is_the_one_device_and_says_so(monkeypatch):
    assert placement.settled("cuda:1") == ("cuda:1", "") and placement.settled(None) == (None, "")
    monkeypatch.setattr(placement, "accelerators", lambda: [])
    assert placement.settled("auto") == (
        "cpu",
        "--device auto: only one device is here, so the model goes to cpu.",
    )
    monkeypatch.setattr(placement, "accelerators", lambda: ["cuda:0", "cuda:1"])
    assert placement.settled("auto") == ("auto", "")


def test_the_layout_says_so_as_well(monkeypatch, demo_dir):
    monkeypatch.setattr(placement, "accelerators", lambda: [])
    notes: list[str] = []
    listener = session.Listener(note=notes.append)
    layout = choose_layout(ModelRef(demo_dir), Settings("auto"), Recipe(), None, listener)
    assert (layout.device, layout.room) == ("cpu", ()) and "goes to cpu" in notes[0]


def test_the_plan_says_what_goes_where(monkeypatch, demo_dir):
    monkeypatch.setattr(placement, "accelerators", lambda: ["cuda:0", "cuda:1"])
    made = plan_for(ModelRef(demo_dir), Settings("auto", memory=4.0), RecipeChoice())
    assert made.chosen and made.placed and set(made.placed.weights) == {"cuda:0", "cuda:1"}
    assert made.as_dict()["placed"]["layers"] == list(made.placed.layers)


def said_of(loaded, shown):
    prompt = loaded.encode_prompt("Who is this?", shown)
    return loaded.run(prompt, [shown.features], use_cache=False)[0]


def test_layers_on_the_disk_answer_and_refuse_to_train(demo_dir, sizes, loaded, shown, tmp_path):
    layer, rest = sizes
    one = vlm.load(str(demo_dir), device="auto", room={"cpu": rest + layer + 1000})
    assert one.placed.waiting == {"disk": 2} and not one.head_weight.is_meta
    torch.testing.assert_close(said_of(one, shown), said_of(loaded, shown))
    asked = [("Who is this?", shown), ("Who are you?", None)]
    found = [[r.text for r in ask.replies(m, asked, max_new_tokens=4)] for m in (one, loaded)]
    assert found[0] == found[1]
    with pytest.raises(BadInput, match="2 on the disk.*nothing trains through those"):
        adapter.attach(one, Recipe())
    with pytest.raises(BadInput, match="no adapter can be put onto those"):
        adapter.load(one, tmp_path)
