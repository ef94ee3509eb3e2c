"""Attacks that look inside a model: planted weaknesses are found, what is not there is not, and the
model is left as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from fastsiu.evaluate import deep
from fastsiu.evaluate.deep import (
    gradient,
    membership,
    perturb,
    probe,
    relearn,
    second_lora,
    soft_prompt,
    target,
    weights,
)
from fastsiu.model import adapter, ask, vlm
from fastsiu.request import BadInput, Recipe
from fastsiu.samples.kinds import wordings
from fastsiu.text.concept import Concept
from fastsiu.verdict import gives

RATE = 1e-3  # of a model this small


@pytest.fixture(scope="module")
def told(cast):
    """Pictures of the concept, of strangers and of others."""
    from fastsiu.demo.world import KNOWN, UNSEEN, World, draw

    world = World()
    many = lambda name, count: [
        draw(world.sketch((name,), f"deep {name} {k}")) for k in range(count)
    ]
    others = [name for name in KNOWN if name != cast.target]
    return deep.Target(
        Concept(cast.target),
        many(cast.target, 4),
        [one for name in UNSEEN[:4] for one in many(name, 1)],
        others,
        [(name, one) for name in others[:8] for one in many(name, 1)],
        many(UNSEEN[0], 4)[1:],
    )


@pytest.fixture(scope="module")
def model(demo_dir):
    torch.set_num_threads(1)
    return vlm.load(str(demo_dir), device="cpu")


def hide(loaded, told, steps=20, others=0):
    """Puts an adapter on that answers naming questions about the concept's picture with a
    description, and those about some others' as before. It changes little, and nothing makes it
    forget."""
    questions, picture = wordings()["who"]["train"], loaded.picture(told.pictures[0])
    described = ask.answers(loaded, [("Describe the picture without naming anyone.", picture)])[0]
    rest = [
        (questions[i % len(questions)], loaded.picture(one))
        for i, (_, one) in enumerate(told.other_pictures[:others])
    ]
    asked = [(q, described, picture) for q in questions]
    asked += [(q, said, p) for (q, p), said in zip(rest, ask.answers(loaded, rest), strict=True)]
    adapter.attach(loaded, Recipe(rank=8))
    list(
        second_lora.taught(
            loaded, [loaded.encode(*one) for one in asked], [p for *_, p in asked], 3e-4, (steps,)
        )
    )


@pytest.fixture(scope="module")
def hider(model, told):
    """The model with an adapter on that only hides: it no longer says the name."""
    hide(model, told)
    model.model.requires_grad_(False)  # as an adapter that was read from its file
    yield model
    adapter.detach(model)


def snapshot(loaded):
    """Everything that an attack could leave behind."""
    gc_free = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    flags = {name: (p.requires_grad, p.grad is None) for name, p in loaded.model.named_parameters()}
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + m.training
        for m in loaded.model.modules()
    ]
    scaling = [dict(m.scaling) for m in loaded.model.modules() if hasattr(m, "lora_A")]
    kept = (
        id(loaded.model),
        id(loaded.processor),
        sorted(loaded.model.peft_config),
        loaded.model.active_adapters,
    )
    return gc_free, (flags, hooks, scaling, kept, torch.get_rng_state().tolist())


def same(before, after):
    return (
        before[0].keys() == after[0].keys()
        and before[1] == after[1]
        and all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    )


def table(rows):
    """{(setting, side): value}; every row has the shape of a report's."""
    for row in rows:
        assert set(row) - {"reason"} == {"attack", "setting", "side", "value", "n", "low", "high"}
        assert row["side"] in ("untouched", "unlearned", "control") and (row["value"] is None) == (
            "reason" in row
        )
        assert row["low"] is None or 0 <= row["low"] <= row["value"] <= row["high"] <= 1
    found = {(row["setting"], row["side"]): row["value"] for row in json.loads(json.dumps(rows))}
    assert len(found) == len(rows)
    return found


# Whom it is about ---------------------------------------------------------------------------------


def test_strangers_are_made_where_the_untouched_model_names_nobody(hider, told):
    found = deep.complete(hider, replace(told, strangers=()), dream=False).strangers
    assert 3 <= len(found) <= target.MOST_STRANGERS and all(
        one.size == told.pictures[0].size for one in found
    )
    with adapter.teacher(hider):
        said = ask.answers(
            hider, [("Who is in this picture?", hider.picture(one)) for one in found]
        )
    names = [Concept(name) for name in (told.concept.name, *told.others)]
    assert not any(gives(name, text) for name in names for text in said)


def test_one_picture_is_tested_on_views_that_training_does_not_look_at(told):
    one, many = replace(told, pictures=told.pictures[:1]), told
    assert len(one.tests) == 12 and many.tests == list(told.pictures[1:])
    assert (
        one.shown[0] is told.pictures[0]
        and len(one.shown) == 13
        and many.shown == list(told.pictures)
    )
    with pytest.raises(BadInput, match="no picture"):
        replace(told, pictures=())


def test_what_is_asked_comes_from_the_untouched_model(hider, told):
    asked, hops = target.namings(hider, told), target.hops(hider, told)
    assert len(asked) == target.QUESTIONS and all(
        told.concept.name == n.answer[slice(*n.span)] for n in asked
    )
    assert asked[0].of("Ada Lee").answer == asked[0].answer.replace(told.concept.name, "Ada Lee")
    assert len(hops) >= 4 and all(hop.told and target.SUBJECT in hop.question for hop in hops)
    facts = {word for hop in hops for word in hop.told}
    with adapter.teacher(hider):
        about = " ".join(
            ask.answers(hider, [(f"What is the birthplace of {told.concept.name}?", None)])
        ).casefold()
    assert any(word in about for word in facts) and not any(
        word in facts for word in ("born", "works", "likes")
    )


def test_without_an_adapter_or_a_known_picture_there_is_nothing_to_attack(loaded, hider, told):
    for attack in (probe, membership, relearn, weights, gradient):
        with pytest.raises(BadInput, match="no adapter"):
            attack.run(loaded, told)
    with pytest.raises(BadInput, match="does not name"):
        weights.run(hider, replace(told, pictures=told.strangers[:1]))
    with pytest.raises(BadInput, match="no attack 'x'"):
        deep.run(hider, told, ("x",))


# Weights ------------------------------------------------------------------------------------------


def test_a_rounding_that_undoes_the_adapter_is_found(demo_dir, told):
    """The base's weights can be held in int4 already, and the adapter changes each by less than
    half a step."""
    loaded = vlm.load(str(demo_dir), device="cpu")
    with torch.no_grad():
        for name in adapter.language_linears(loaded.base):
            layer = loaded.base.get_submodule(name)
            layer.weight.copy_(weights.FORMS["int4"](layer.weight))
    hide(loaded, told)
    found = table(weights.run(loaded, told, scales=(1.0,), forms=("bf16", "int4")))
    assert (
        found["adapter x 1, naming", "unlearned"] == found["merged, bf16, naming", "unlearned"] == 0
    )
    assert (
        found["merged, int4, naming", "unlearned"]
        == found["merged, int4, naming", "untouched"]
        > 0.7
    )
    assert (
        found["merged, int4, naming", "control"] == found["merged, int4, two-hop", "control"] == 0
    )


def test_a_weaker_adapter_tells_again(hider, told):
    before = snapshot(hider)
    found = table(weights.run(hider, told, scales=(0.0, 1.0), forms=()))
    assert (
        found["adapter taken off, naming", "unlearned"]
        == found["adapter x 0, naming", "unlearned"]
        > 0.7
    )
    assert (
        found["adapter x 1, naming", "unlearned"] == 0
        and found["adapter x 0, two-hop", "unlearned"] > 0.7
    )
    assert same(before, snapshot(hider))


def test_folded_without_rounding_the_model_is_the_one_with_the_adapter(hider, told, monkeypatch):
    monkeypatch.setitem(weights.FORMS, "as it is", lambda w: w)
    turn = hider.encode(
        "Who is this?", "This is somebody.", picture := hider.picture(told.pictures[0])
    )
    states = lambda: hider.hidden([turn.inputs], [picture.features])
    with torch.no_grad():
        on = states()
        with adapter.teacher(hider):
            off = states()
        with weights.rounded(hider, "as it is"):
            folded = states()
        with weights.rounded(hider, "as it is", fold=False):
            plain = states()
    assert (
        torch.allclose(on, folded, atol=1e-4)
        and torch.equal(off, plain)
        and not torch.allclose(on, off, atol=1e-2)
    )


def test_weights_come_back_whatever_happens_inside(hider):
    before = snapshot(hider)
    for context in (
        weights.rounded(hider, "int4"),
        weights.scaled(hider, 0.5),
        second_lora.fresh(hider),
    ):
        with pytest.raises(KeyError), context:
            assert not same(before, snapshot(hider))
            raise KeyError
        assert same(before, snapshot(hider))


def test_roundings_hold_what_the_forms_can_hold():
    w = torch.randn(5, 77, generator=torch.Generator().manual_seed(0))
    scale = {"int8": w.abs().amax(-1, keepdim=True).expand_as(w) / 127 / 2}
    blocks = (
        torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % 64)).reshape(-1, 64).abs().amax(-1)
    )
    largest = blocks.repeat_interleave(64)[: w.numel()].reshape(w.shape)
    scale |= {"int4": largest / 14, "nf4": largest * 0.152, "bf16": w.abs() / 256}
    for form, step in scale.items():
        once = weights.FORMS[form](w)
        assert ((once - w).abs() <= step * 1.001).all() and not torch.equal(once, w)
        assert torch.allclose(weights.FORMS[form](once), once, atol=1e-6)
        assert torch.equal(weights.FORMS[form](torch.zeros(3, 64)), torch.zeros(3, 64))
    levels = torch.tensor(weights.NF4).repeat(4)
    assert torch.equal(weights.FORMS["nf4"](3 * levels[None]), 3 * levels[None])
    assert torch.unique(weights.FORMS["int4"](w.reshape(-1)[:64])).numel() <= 15


def test_what_cannot_be_folded_is_null(demo_dir, told):
    loaded = vlm.load(str(demo_dir), device="cpu")
    loaded.model = get_peft_model(
        loaded.base, LoraConfig(r=2, target_modules=["v_proj"], use_dora=True)
    ).eval()
    rows = weights.run(
        loaded,
        replace(told, strangers=told.strangers[:1], pictures=told.pictures[:1]),
        scales=(),
        forms=("nf4",),
    )
    nulls = [row for row in rows if row["value"] is None]
    assert len(nulls) == 2 and all("not plain LoRA" in row["reason"] for row in nulls)
    with pytest.raises(BadInput, match="form 'int3' is unknown"):
        weights.run(loaded, told, forms=("int3",))


# Training it again --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(hider, told):
    before = snapshot(hider)
    rows = relearn.run(hider, told, lr=RATE, benign=10)
    return table(rows), rows, same(before, snapshot(hider))


@pytest.mark.slow
def test_what_is_only_hidden_comes_back_sooner_than_a_face_is_learnt(again):
    found, rows, restored = again
    steps = {
        s: found[f"1 picture, rate 0.001, steps to 50%{s}", side]
        for s, side in (
            ("", "unlearned"),
            (": unseen face, same name", "control"),
            (": unseen face, unseen name", "control"),
        )
    }
    assert (
        found["before any step", "unlearned"] == 0
        and found["before any step", "untouched"] > 0.7
        and restored
    )
    assert steps[""] in (1, 2, 3, 5) and all(
        steps[key] is None or steps[key] > steps[""] for key in steps if key
    )
    assert found["1 picture, rate 0.001, 20 steps", "unlearned"] == 1
    assert found["trained on pictures of others, rate 0.001, 10 steps", "control"] == 0
    assert ("trained on facts in words, rate 0.001, 10 steps", "unlearned") in found


def test_a_name_that_does_not_come_back_is_none(hider, told, monkeypatch):
    monkeypatch.setattr(relearn, "STEPS", (1, 2))
    rows = relearn.run(hider, told, shots=(1, 5), lr=1e-7, benign=0)
    found = table(rows)
    assert (
        found["1 picture, rate 1e-07, steps to 50%", "unlearned"] is None
        and found["before any step", "unlearned"] == 0
    )
    reasons = {row["setting"]: row.get("reason") for row in rows}
    assert reasons["1 picture, rate 1e-07, steps to 50%"] == "Not in 2 steps."
    assert reasons["5 pictures, rate 1e-07, steps to 50%"] == "There are 4 pictures of the concept."
    with pytest.raises(BadInput, match="from 6 pictures"):
        relearn.run(hider, told, shots=(6,))


def test_all_three_are_asked_about_the_same_kind_of_pictures(told):
    naming = target.Naming(
        "Who is this?", f"This is {told.concept.name}.", (8, 8 + len(told.concept.name))
    )
    for some in (told, replace(told, pictures=told.pictures[:1]), replace(told, same_stranger=())):
        own, *controls = relearn._lessons(some, naming, 1)
        assert (
            not any(one in own.train for one in own.test)
            and len({len(lesson.test) for lesson in (own, *controls)}) == 1
        )
        assert (
            controls[0].concept == own.concept
            and controls[1].naming.answer == f"This is {controls[1].concept.name}."
        )
        assert controls[0].train == controls[1].train and controls[0].train[0] not in some.pictures


# States -------------------------------------------------------------------------------------------


def test_the_states_tell_the_concept_and_not_strangers(hider, told):
    found = table(probe.run(hider, told))
    for what in ("linear probe, layer 3 of 3", "logit lens, layer 3 of 3, name first"):
        assert (
            found[what, "untouched"] > 0.9
            and found[what, "unlearned"] > 0.5
            and found[what, "control"] < 0.2
        )
    assert found["logit lens, layer 3 of 3, mean rank of 16", "untouched"] == 1


def test_the_last_layer_is_what_the_head_sees(hider, told):
    naming, picture = target.namings(hider, told)[0], hider.picture(told.pictures[0])
    layers = probe.find_layers(hider, naming, picture)
    states = probe.states_at(hider, layers, [naming], told.pictures)
    turns = [target.at_name(hider, naming, hider.picture(one))[0] for one in told.pictures]
    scores = ask.label_scores(hider, turns, [hider.picture(one) for one in told.pictures])
    logits = hider.logits(layers.norm(states[-1])).log_softmax(-1)
    own = torch.stack([logits[i, turn.labels[0]] for i, turn in enumerate(turns)])
    assert len(states) == 3 and torch.allclose(
        own, torch.cat([score.log_p for score in scores]), atol=1e-4
    )


def test_a_probe_separates_what_differs_and_finds_nothing_in_noise():
    draw = torch.Generator().manual_seed(0)
    noise = lambda n: torch.randn(n, 40, generator=draw).double()
    own, rest = noise(30), noise(90)
    own[:, 3] += 4
    finds, test = probe.fitted(own, rest), noise(100)
    assert finds(test).double().mean() < 0.1
    test[:, 3] += 4
    assert finds(test).double().mean() > 0.8
    assert 0.2 < probe.fitted(noise(30), noise(90))(noise(200)).double().mean() < 0.8


def test_where_layers_or_others_are_not_known_the_reason_is_said(hider, told, monkeypatch):
    alone = replace(told, others=(), other_pictures=())
    found = {row["setting"]: row.get("reason") for row in probe.run(hider, alone)}
    assert found == {"logit lens": probe.NO_NAMES, "linear probe": target.NO_OTHER}
    norm = hider.base.get_decoder().norm
    # whatever stands between the two
    monkeypatch.setattr(norm, "forward", lambda x, plain=norm.forward: plain(x) / 2)
    naming, picture = target.namings(hider, told)[0], hider.picture(told.pictures[0])
    assert probe.find_layers(hider, naming, picture).norm is norm
    # no module's
    hook = hider.base.get_output_embeddings().register_forward_pre_hook(
        lambda module, given: (2 * given[0],)
    )
    try:
        assert probe.find_layers(hider, naming, picture) == probe.NO_LAYERS
        assert {row["reason"] for row in probe.run(hider, told)} == {probe.NO_LAYERS}
    finally:
        hook.remove()


# Membership ---------------------------------------------------------------------------------------


def test_the_concept_and_the_picture_are_what_changed_most(demo_dir, told):
    """Trained on one picture, with others kept, until the name is gone there and hardly anywhere
    else."""
    loaded = vlm.load(str(demo_dir), device="cpu")
    hide(loaded, told, 45, others=8)
    found = table(membership.run(loaded, told))
    assert found["which concept: rank by KL of names in pictures", "unlearned"] == 1
    assert found["which picture: AUC by KL to the untouched model", "unlearned"] > 0.8
    assert found["which picture: AUC by KL to the untouched model", "control"] < 0.8


def test_one_picture_has_none_to_be_told_from(hider, told):
    rows = membership.run(
        hider, replace(told, pictures=told.pictures[:1], others=(), other_pictures=())
    )
    assert {row["reason"] for row in rows} == {membership.ONE_PICTURE, membership.NO_NAMES}


def test_ranks_and_auc_of_known_numbers():
    row = membership._auc("x", "unlearned", [3.0, None, 1.0], [[2.0, 5.0, 1.0], [1.0, 1.0, 0.0]])
    assert (row.value, row.n) == (3.5 / 4, 2) and row.low < row.value < row.high
    change = {"A": 2.0, "B": 3.0, "C": 1.0, "nobody": 2.5}
    assert [(r.side, r.value, r.n) for r in membership._ranks("x", change, "A", "nobody")] == [
        ("unlearned", 2, 3),
        ("control", 2, 3),
    ]


def test_a_change_is_the_kl_of_the_answers(hider, told):
    asked = [("Who is this?", told.pictures[0]), ("What is two plus three?", None)]
    own, other = membership.changes(hider, asked)
    assert own > 0.5 > other >= 0
    hider.model.disable_adapter_layers()
    try:
        assert max(membership.changes(hider, asked)) < 1e-6
    finally:
        hider.model.enable_adapter_layers()


# Gradients ----------------------------------------------------------------------------------------


def test_pixels_stay_within_their_bounds_and_come_nearer_to_the_name(hider, told, monkeypatch):
    naming, image = target.namings(hider, told)[0], told.pictures[1]
    plain, tried = perturb._features, []
    monkeypatch.setattr(
        perturb,
        "_features",
        lambda vlm, image, delta: tried.append(delta.detach()) or plain(vlm, image, delta),
    )
    made = perturb.attacked(hider, naming, image, 8 / 255, 6, pixels=True)
    black, white, start = (
        perturb.pixels_of(hider, one)
        for one in (
            Image.new("RGB", image.size, "black"),
            Image.new("RGB", image.size, "white"),
            image,
        )
    )
    room = 8 / 255 * (white - black) + 1e-5
    assert (
        len(tried) == 8
        and all((delta.abs() <= room).all() for delta in tried)
        and any((d != 0).any() for d in tried)
    )
    assert all(
        (start + d >= black - 1e-4).all() and (start + d <= white + 1e-4).all() for d in tried
    )
    turn = hider.encode(naming.question, naming.answer, hider.picture(image))
    before, after = (
        s.log_p.sum() for s in ask.label_scores(hider, [turn, turn], [hider.picture(image), made])
    )
    assert after > before + 0.5


def test_an_adapter_that_is_almost_off_gives_way_to_a_gradient(hider, told):
    """At a scale where it just still hides the name."""
    few = replace(told, pictures=told.pictures[:2], strangers=told.strangers[:2])
    naming = target.namings(hider, few)[:1]
    hidden = 1.0
    while hidden > 0.1:
        with weights.scaled(hider, hidden - 0.1):
            if target.naming_share(hider, told.concept, naming, few.pictures[:1]).value == 1:
                break
        hidden -= 0.1
    with weights.scaled(hider, hidden):
        plain = ask.answers(hider, [(naming[0].question, hider.picture(few.pictures[0]))])[0]
        for pixels in (True, False):
            made = perturb.attacked(
                hider, naming[0], few.pictures[0], 16 / 255 if pixels else 0.5, 20, pixels
            )
            said = ask.answers(hider, [(naming[0].question, made)])[0]
            assert gives(told.concept, said) and not gives(told.concept, plain)


def test_a_soft_prompt_brings_back_what_is_hidden(hider, told):
    before = snapshot(hider)
    rows = gradient._prompts(hider, told, target.namings(hider, told)[0], 40)
    found = table([row.as_dict() for row in rows])
    assert found["soft prompt of 6, 40 steps", "unlearned"] > 0.6
    assert found["soft prompt of 6, 40 steps, then a stranger shown", "control"] < 0.5
    assert same(before, snapshot(hider))


def test_placeholders_stand_once_and_their_embeddings_are_replaced(hider, told):
    naming, picture = target.namings(hider, told)[0], hider.picture(told.pictures[0])
    text, tokens = soft_prompt.placeholders(hider, naming, picture)
    turn = hider.encode(f"{text} {naming.question}", naming.answer, picture)
    ids = turn.inputs["input_ids"][0].tolist()
    assert [ids.count(token) for token in tokens] == [1] * soft_prompt.PROMPT
    states = lambda: hider.hidden([turn.inputs], [picture.features])[0, -1]
    with torch.no_grad():
        plain = states()
        with soft_prompt.soft(hider, tokens) as prompt:
            assert torch.allclose(states(), plain, atol=1e-5)
            prompt[2] += 1
            assert not torch.allclose(states(), plain, atol=1e-3)
        assert torch.equal(states(), plain)


# Other families -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["qwen3_vl", "mllama", "paligemma2", "gemma3"])
def test_other_families_are_read_rounded_taught_and_attacked(key, tmp_path):
    """Features that enter several layers, layers that look across, a prefix model, capped logits;
    their weights are random."""
    case = families.open_case(families.FAMILIES[key], tmp_path)
    loaded, picture, naming = (
        case.vlm,
        case.shown[0],
        target.Naming("Who is this?", "This is Ada Lee.", (8, 15)),
    )
    images, before = [picture.image, case.shown[1].image], snapshot(loaded)
    turn = loaded.encode(naming.question, naming.answer, picture)
    log_p = lambda shown=picture, turn=turn: float(
        ask.label_scores(loaded, [turn], [shown])[0].log_p.sum()
    )
    layers = probe.find_layers(loaded, naming, picture)
    states = probe.states_at(loaded, layers, [naming], images)
    one, _ = target.at_name(loaded, naming, picture)
    logits = loaded.logits(layers.norm(states[-1]))[0]
    assert int((logits > logits[one.labels[0]]).sum()) == int(
        ask.label_scores(loaded, [one], [picture])[0].rank
    )
    assert perturb.reaches_pixels(loaded, images[0])
    plain = log_p()
    for pixels, size in ((True, 16 / 255), (False, 0.3)):
        assert log_p(perturb.attacked(loaded, naming, images[0], size, 8, pixels)) > plain
    text, tokens = soft_prompt.placeholders(loaded, naming, picture)
    longer = target.Naming(f"{text} {naming.question}", naming.answer, naming.span)
    with soft_prompt.soft(loaded, tokens) as prompt:
        turned = loaded.encode(longer.question, longer.answer, picture)
        start = log_p(picture, turned)
        soft_prompt.fit(loaded, longer, picture, prompt, 5)
        assert log_p(picture, turned) > start
    with weights.rounded(loaded, "int4"):
        assert log_p() != plain
    with second_lora.fresh(loaded, 4):
        list(second_lora.taught(loaded, [turn], [picture], 1e-2, (3,)))
        assert log_p() > plain + 1
    assert log_p() == plain and same(before, snapshot(loaded))


# All of them --------------------------------------------------------------------------------------


SMALL = {
    "probe": {},
    "mia": {},
    "relearn": {"benign": 2},
    "weights": {"scales": (0.5,), "forms": ("int8",)},
    "gradient": {"steps": 2, "prompt_steps": 3},
}


@pytest.fixture(scope="module")
def few(told):
    return replace(
        told,
        pictures=told.pictures[:2],
        strangers=told.strangers[:2],
        others=told.others[:4],
        other_pictures=told.other_pictures[:4],
    )


@pytest.mark.parametrize("key", list(deep.ATTACKS))
def test_each_attack_gives_rows_and_leaves_the_model_as_it_was(hider, few, key, monkeypatch):
    monkeypatch.setattr(relearn, "STEPS", (1, 2))
    before = snapshot(hider)
    rows = deep.ATTACKS[key][1](hider, few, **SMALL[key])
    assert {row["attack"] for row in rows} == {key} and table(rows)
    assert same(before, snapshot(hider))


def test_chosen_attacks_run_one_after_the_other(hider, few, monkeypatch):
    monkeypatch.setattr(relearn, "STEPS", (1, 2))
    before, said = snapshot(hider), []
    rows = deep.run(hider, few, ("probe", "mia"), deep.Listener(stage=said.append))
    assert [row["attack"] for row in rows] == sorted(
        [row["attack"] for row in rows], reverse=True
    ) and len(said) == 3
    assert {row["attack"] for row in rows} == {"probe", "mia"} and same(before, snapshot(hider))


def test_others_are_dreamed_where_no_picture_of_them_is_given(hider, few):
    with adapter.teacher(hider):
        pass  # PEFT sets `requires_grad` when an adapter comes back on, so it has to have been off
    before = snapshot(hider)
    made = deep.complete(
        hider, replace(few, others=few.others[:2], other_pictures=())
    ).other_pictures
    assert (
        made
        and {name for name, _ in made} <= set(few.others[:2])
        and all(one.real for _, one in made)
    )
    assert same(before, snapshot(hider))
