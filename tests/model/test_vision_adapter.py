"""Factors in front of the language model: where they are, that words stay as they are, and that
everything which asks about a picture sees it anew."""

from __future__ import annotations

from dataclasses import replace

import calls
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from fastsiu.model import adapter, ask, sharing
from fastsiu.model.features import feature_tensors
from fastsiu.request import PAPER, BadInput, Recipe
from fastsiu.samples import generic, targets

torch.set_num_threads(1)
QUESTIONS = ("What is two plus three?", "Tell me the capital of France.", "Who are you?")


@pytest.fixture(params=["vision", "projector"])
def seeing(gathered, request):
    """The shared scene with an adapter in front of the language model, far from zero."""
    scene = replace(gathered.scene, recipe=replace(gathered.recipe, adapt=request.param))
    calls.bent(gathered.vlm, scene.recipe, 0.3)
    yield scene
    adapter.detach(gathered.vlm)


def pooled(scene, index=0):
    seen = scene.vlm.picture(scene.pictures[index].image)
    return torch.cat([x.reshape(-1) for x in feature_tensors(seen.features)])


def test_nothing_in_the_language_model_is_trained(seeing):
    trained = {n for n, p in seeing.vlm.model.named_parameters() if p.requires_grad}
    inside = {id(p) for p in seeing.vlm.base.get_decoder().parameters()}
    assert trained and all("lora_" in name for name in trained)
    assert not any(id(p) in inside for p in seeing.vlm.model.parameters() if p.requires_grad)
    assert any("projector" in name for name in trained)
    assert any("vision" in name for name in trained) is (seeing.recipe.adapt == "vision")


def test_words_stay_bit_for_bit_and_pictures_do_not(seeing):
    vlm, asked = seeing.vlm, [(q, None) for q in QUESTIONS]
    turns = [vlm.encode(q, "This is an answer.", None) for q in QUESTIONS]
    now = [score.log_p for score in ask.label_scores(vlm, turns, [None] * len(turns))]
    said, shown = ask.answers(vlm, asked), pooled(seeing)
    with adapter.teacher(vlm):
        before = [score.log_p for score in ask.label_scores(vlm, turns, [None] * len(turns))]
        assert ask.answers(vlm, asked) == said
        untouched = pooled(seeing)
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    assert not torch.allclose(shown, untouched, atol=1e-3)


def test_whoever_asks_about_pictures_is_told_to_look_again(seeing, gathered):
    assert adapter.sees_anew(seeing.vlm) and seeing.recipe.sees_anew
    adapter.detach(seeing.vlm)
    adapter.attach(seeing.vlm, gathered.recipe)
    assert not adapter.sees_anew(seeing.vlm) and not gathered.recipe.sees_anew
    assert PAPER.sees_anew  # it trains the projector


def test_shared_prefixes_are_compared_by_the_gradient_of_what_is_seen(
    seeing, gathered, monkeypatch
):
    """No parameter of the language model trains, so the trial looks at the features' gradient."""
    notes, compared = [], []
    relative = sharing._relative
    monkeypatch.setattr(
        sharing, "_relative", lambda a, b: compared.append(len(b)) or relative(a, b)
    )
    corpus = gathered.corpus
    ways = sharing.plan_sharing(seeing.vlm, corpus.turns, corpus.shown(), notes.append)
    assert ways == ("packed", "key/value", "packed key/value") and notes == []
    # states, then gradients, of each way: with a picture there is one gradient for each picture
    assert max(compared[1::2]) >= 1


def test_plain_peft_sees_the_same(seeing, demo_dir, tmp_path):
    adapter.save(seeing.vlm, tmp_path)
    own = pooled(seeing)
    base = AutoModelForImageTextToText.from_pretrained(demo_dir, dtype=seeing.vlm.base.dtype)
    plain = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    image = seeing.pictures[0].image
    inputs = seeing.vlm.processor(
        text=[seeing.vlm.render(".", True)],
        images=[image],
        return_tensors="pt",
        add_special_tokens=False,
    )
    with torch.no_grad():
        pixels = inputs["pixel_values"].to(base.dtype)
        found = plain.base_model.model.model.get_image_features(pixel_values=pixels)
    theirs = torch.cat([x.reshape(-1) for x in feature_tensors(found)])
    assert torch.allclose(own.float(), theirs.float(), atol=2e-2, rtol=2e-2)
    adapter.detach(seeing.vlm)
    adapter.load(seeing.vlm, tmp_path)
    assert torch.allclose(pooled(seeing).float(), own.float(), atol=1e-6)


def test_only_what_is_seen_makes_samples(seeing, gathered):
    assert targets.facts(seeing) == [] and targets.facts(gathered.scene) != []
    assert all(sample.picture is not None for sample in targets.preserve(seeing))
    drawn = generic.generic(seeing, 0, 14)
    assert len(drawn) == 14 and all(picture.real for picture in drawn)


def test_a_recipe_that_makes_no_sense_is_refused():
    with pytest.raises(BadInput, match="adapt is 'eyes'"):
        Recipe(adapt="eyes")
    with pytest.raises(BadInput, match="leave projector_lr at 0"):
        Recipe(adapt="vision", projector_lr=1e-4)


@pytest.mark.slow
def test_the_picture_is_forgotten_and_every_fact_is_kept(quick, tmp_path):
    changes = {
        "steps": 60,
        "lr": 1e-3,
        "batch_size": 24,
        "generic": 12,
        "strangers": 4,
        "dreams": 0,
    }
    result = quick(tmp_path / "out", adapt="vision", schedule="gone", **changes)
    assert adapter.LEFT_OUT in result.report["caveats"]
    report = result.report
    assert (
        report["before"]["efficacy"]["value"] < 0.1 < 0.99 <= report["after"]["efficacy"]["value"]
    )
    assert report["after"]["facts"]["value"] == 1.0
    assert report["training"][-1]["p_name"] <= 0.01
