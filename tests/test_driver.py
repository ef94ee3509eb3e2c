"""One request from beginning to end: repeatable, standard outside, complete or absent, and the
loaded model left as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import calls
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import fastsiu
from fastsiu import driver, images, session, settings
from fastsiu import output as outputs
from fastsiu.disk import staging
from fastsiu.model import adapter, adapter_files, ask, vlm
from fastsiu.model.vlm import VLM
from fastsiu.pictures import transforms
from fastsiu.request import PAPER, BadInput, NumericFailure, Recipe, Sample
from fastsiu.samples import targets
from fastsiu.settings import RecipeChoice
from fastsiu.verdict import KINDS, Answer, judge

torch.set_num_threads(1)

WEIGHTS = "adapter_model.safetensors"


def listing(path):
    return sorted(p.name for p in path.iterdir())


def test_the_output_is_complete(trained):
    assert {
        WEIGHTS,
        "adapter_config.json",
        "README.md",
        "report.json",
        "report.html",
        "manifest.json",
    } <= set(listing(trained.output))
    assert not [p for p in trained.output.parent.iterdir() if "partial" in p.name]


def test_the_report_has_its_schema(trained, cast):
    report = json.loads((trained.output / "report.json").read_text(encoding="utf-8"))
    assert report == json.loads(json.dumps(trained.report))
    assert report["concept"] == cast.target and report["verdict"] == (
        "forgotten" if trained.forgotten else "not forgotten"
    )
    assert bool(report["reasons"]) is not trained.forgotten and report["reasons"] == trained.reasons
    for side in ("before", "after"):
        assert set(report[side]) == set(KINDS)
        for kind, rate in report[side].items():
            if kind in ("generality", "specificity"):  # one picture cannot show them
                assert rate["value"] is None and rate["reason"] and set(rate) == {"value", "reason"}
            else:
                assert set(rate) == {"value", "n", "low", "high"} and rate["n"] > 0
                assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
    assert report["before"]["efficacy"]["value"] < 0.5 and report["before"]["facts"]["value"] == 1
    assert len(report["training"]) == 4 and [s["step"] for s in report["training"]] == [1, 2, 3, 4]
    assert report["masks"]["tokens_masked"] > 0 and report["masks"]["vocabulary_masked"] > 0
    assert adapter.DROPPABLE in report["caveats"] and adapter.LEFT_OUT not in report["caveats"]


def test_the_verdict_follows_from_the_reported_answers(trained, cast):
    from fastsiu.text.concept import Concept

    verdict = judge([Answer(**a) for a in trained.report["answers"]], Concept(cast.target))
    failed = [one for one in trained.report["families"] if one["failed"]]
    assert trained.forgotten is (verdict.forgotten and not failed)
    assert len(trained.reasons) == len(verdict.reasons) + len(failed)
    assert verdict.after["efficacy"] == trained.report["after"]["efficacy"]
    asked = {a["question"] for a in trained.report["answers"]}
    words = targets.wordings()
    names = (cast.target, *cast.others)
    assert not asked & {
        q.replace("{name}", n) for p in words.values() for q in p.get("train", ()) for n in names
    }


def test_the_manifest_says_where_every_hyper_parameter_came_from(trained):
    manifest = json.loads((trained.output / "manifest.json").read_text(encoding="utf-8"))
    recipe = manifest["recipe"]
    assert set(recipe) == set(Recipe().as_dict()) and recipe["steps"] == {
        "value": 4,
        "from": "command line",
    }
    assert (
        recipe["renormalize"]["from"] in ("default", "model directory")
        and manifest["seeds"]["recipe"] == 3
    )
    assert manifest["versions"]["torch"] and manifest["model"]["sha256"]["model.safetensors"]
    assert WEIGHTS in manifest["files"] and manifest["pictures"][0]["label"] == "image"


def test_recipe_origins(tmp_path):
    (tmp_path / "fastsiu.json").write_text('{"recipe": {"steps": 7, "lr": 0.5}}')
    recipe, origins = settings.choose_recipe(
        str(tmp_path), RecipeChoice("default", {"lr": 0.25, "rank": None})
    )
    assert (recipe.steps, recipe.lr, recipe.rank) == (7, 0.25, Recipe().rank)
    assert (origins["steps"], origins["lr"], origins["rank"]) == (
        "model directory",
        "command line",
        "default",
    )
    recipe, origins = settings.choose_recipe(str(tmp_path), RecipeChoice("paper", {"steps": 9}))
    assert (
        recipe == PAPER.with_overrides(steps=9)
        and origins["steps"] == "command line"
        and origins["lr"] == "preset paper"
    )
    with pytest.raises(BadInput, match="no hyper-parameter 'stepps'"):
        settings.choose_recipe(str(tmp_path), RecipeChoice("default", {"stepps": 1}))
    with pytest.raises(BadInput, match="preset 'x' is unknown"):
        settings.choose_recipe(str(tmp_path), RecipeChoice("x", {}))
    (tmp_path / "fastsiu.json").write_text('{"recipe": {"magic": 7}}')
    with pytest.raises(BadInput, match="unknown hyper-parameter 'magic'"):
        settings.choose_recipe(str(tmp_path), RecipeChoice("default", {}))


def follows(directory, width, preset="default", model_type="llava", **changes):
    """Of a model of this width: what is adapted, the anchor, directions and rate; and which of them
    follow from the width."""
    text = {"model_type": "llama", "hidden_size": width, "num_attention_heads": width // 64}
    config = {"model_type": model_type, "text_config": text, "vision_config": {}}
    (directory / "config.json").write_text(json.dumps(config))
    recipe, origins = settings.choose_recipe(str(directory), RecipeChoice(preset, changes))
    fields = ("adapt", "anchor", "directions", "lr")
    found = [field for field in fields if origins[field] == "model width"]
    return (*(getattr(recipe, field) for field in fields), " ".join(found))


def test_what_follows_from_the_width_of_a_model(tmp_path):
    """A wide model's projector is trained, and reads few directions; all else as before."""
    all_four = "adapt anchor directions lr"
    assert follows(tmp_path, 576) == ("projector", 10, 4, 5.1e-3, all_four)
    assert follows(tmp_path, 4096) == ("projector", 10, 4, 1.2e-3, all_four)
    assert follows(tmp_path, 256) == ("language", 0, 0, 1.5e-3, "lr")
    assert follows(tmp_path, 576, "paper") == ("language", 0, 0, PAPER.lr, "")
    # whatever is given stays, and the rest follows from it
    assert follows(tmp_path, 576, lr=1e-4) == ("projector", 10, 4, 1e-4, all_four[:-3])
    assert follows(tmp_path, 576, anchor=2.0, directions=0) == (
        *("projector", 2, 0, 5.1e-3),
        "adapt lr",
    )
    projector = follows(tmp_path, 576, adapt="projector")
    assert projector == ("projector", 10, 4, 5.1e-3, "anchor directions lr")
    assert follows(tmp_path, 576, adapt="language") == ("language", 0, 32, 2.5e-3, "directions lr")
    assert follows(tmp_path, 4096, adapt="language")[3] == 5.8e-4
    assert follows(tmp_path, 576, adapt="language", directions=0)[3] == 1.3e-3
    assert follows(tmp_path, 576, adapt="vision") == ("vision", 0, 0, 1.3e-3, "lr")
    # nothing tells directions apart; a projector as a whole is trained already
    assert follows(tmp_path, 576, strangers=0) == ("language", 0, 0, 1.3e-3, "lr")
    assert follows(tmp_path, 576, projector_lr=1e-4)[:2] == ("language", 0)


def test_a_model_without_a_known_projector_keeps_the_language_model(tmp_path):
    text = {"model_type": "gemma3_text", "hidden_size": 576, "num_hidden_layers": 2}
    gemma = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(gemma))
    recipe, _ = settings.choose_recipe(str(tmp_path), RecipeChoice())
    assert recipe.adapt == "language" and recipe.directions == 32  # that is a bare parameter


def test_a_models_own_recipe_is_for_the_part_that_it_says(tmp_path):
    (tmp_path / "fastsiu.json").write_text('{"recipe": {"lr": 0.001}}')
    assert follows(tmp_path, 576) == ("language", 0, 32, 0.001, "directions")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_leaves_the_model_untouched(
    trained, quick, tmp_path, monkeypatch
):
    seen = []
    load = driver.vlm.load

    def watched(*args, **kwargs):
        seen.append(load(*args, **kwargs))
        seen.append({k: v.clone() for k, v in seen[0].base.state_dict().items()})
        return seen[0]

    monkeypatch.setattr(driver.vlm, "load", watched)
    again = quick(tmp_path / "again")
    assert (again.output / WEIGHTS).read_bytes() == (trained.output / WEIGHTS).read_bytes()
    assert (
        again.report["answers"] == trained.report["answers"]
        and again.report["training"] == trained.report["training"]
    )
    loaded, before = seen
    assert loaded.model is loaded.base and not any(
        "lora" in name for name, _ in loaded.base.named_modules()
    )
    after = loaded.base.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.slow
def test_another_seed_gives_other_weights(trained, quick, tmp_path):
    other = load_file(quick(tmp_path / "other", seed=4).output / WEIGHTS)
    one = load_file(trained.output / WEIGHTS)
    assert set(one) == set(other) and any(not torch.equal(one[k], other[k]) for k in one)


def plain(demo_dir, adapter_dir):
    base = AutoModelForImageTextToText.from_pretrained(demo_dir, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, adapter_dir).eval()
    return VLM(str(demo_dir), None, model, base, AutoProcessor.from_pretrained(demo_dir))


def test_plain_peft_loads_the_adapter_and_answers_as_before_saving(trained, cast, demo_dir):
    loaded = plain(demo_dir, trained.output)
    variants = {
        label: loaded.picture(p)
        for label, p in transforms.variants(images.load_image(cast.image), 3, held_out=True)
    }
    rows = trained.report["answers"]
    questions = [(r["question"], variants[r["picture"]] if r["picture"] else None) for r in rows]
    assert ask.answers(loaded, questions) == [r["after"] for r in rows]
    with loaded.model.disable_adapter():
        assert ask.answers(loaded, questions) == [r["before"] for r in rows]
    # The adapter does something: the states it gives are not the base's.
    picture = next(iter(variants.values()))
    prompt = loaded.encode_prompt("Who is this?", picture)
    with torch.no_grad():
        on = loaded.hidden([prompt], [picture.features])
        with loaded.model.disable_adapter():
            off = loaded.hidden([prompt], [picture.features])
    assert not torch.allclose(on, off, atol=1e-2)


def test_the_adapter_touches_the_language_model_alone(trained):
    names = load_file(trained.output / WEIGHTS)
    assert all("language_model" in n and "lm_head" not in n and "vision" not in n for n in names)
    assert any("q_proj" in n for n in names) and any("down_proj" in n for n in names)
    config = json.loads((trained.output / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not config["modules_to_save"]


def test_interview_compares_base_and_adapter(trained, cast, demo_dir):
    (row,) = calls.interview(
        ["Who is this?"], model=demo_dir, adapter_dir=trained.output, image=cast.image, compare=True
    )
    assert set(row) == {"question", "before", "after"} and cast.target in row["before"]
    with pytest.raises(BadInput, match="holds no adapter"):
        calls.interview(["Who?"], model=demo_dir, adapter_dir=cast.image.parent)


def test_the_same_request_again_is_a_no_op_and_another_is_refused(trained, quick, monkeypatch):
    stamp = (trained.output / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr(driver.vlm, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    result = quick(trained.output)
    assert result.repeated and result.report == json.loads(
        (trained.output / "report.json").read_text(encoding="utf-8")
    )
    assert result.forgotten is trained.forgotten and "nothing was done" in result.notes[0]
    for change in (
        {"seed": 4},
        {"concept": "Mirelda Voss"},
        {"protect": ()},
        {"dtype": "bfloat16"},
    ):
        with pytest.raises(BadInput, match="holds the result of another request"):
            quick(trained.output, **change)
    assert (trained.output / "manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.skipif(staging.fcntl is None, reason="needs file locks")
def test_an_output_that_another_run_is_writing_is_refused_before_the_model_is_loaded(
    quick, tmp_path, monkeypatch
):
    monkeypatch.setattr(driver.vlm, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    with outputs.reserved(tmp_path / "out", "of another run"):
        with pytest.raises(BadInput, match="Another run is writing to"):
            quick(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_trained_further_in_place_is_another_request(quick, cast, demo_dir, tmp_path):
    model = shutil.copytree(demo_dir, tmp_path / "model")
    few = {"model": model, "steps": 1, "dreams": 0, "strangers": 0}
    first = quick(tmp_path / "out", **few)
    assert first.report["model"] == "model" and quick(tmp_path / "out", **few).repeated
    weights = load_file(model / "model.safetensors")
    key = next(k for k in weights if "q_proj" in k)
    weights[key] = weights[key] * 2
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="holds the result of another request"):
        quick(tmp_path / "out", **few)


HUB = """
import json, sys
import fastsiu
image, concept, other, output = sys.argv[1:]
few = dict(steps=1, dreams=0, strangers=0, device="cpu", protect=(other,))
result = fastsiu.unlearn(image, concept, model="someone/tiny", output=output, **few)
print(json.dumps([result.report["model"], "fastsiu.demo" in sys.modules]))
"""


def test_a_hub_model_is_recorded_with_the_commit_it_was_loaded_from(cast, demo_dir, tmp_path):
    """A cache as the hub leaves it; nobody named a revision, so only the commit says which model
    this was."""
    commit, cache = (
        "0123456789abcdef0123456789abcdef01234567",
        tmp_path / "home" / "hub" / "models--someone--tiny",
    )
    shutil.copytree(demo_dir, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        env.pop(name, None)
    command = [sys.executable, "-c", HUB, cast.image, cast.target, cast.others[0], tmp_path / "out"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # and what draws the demo was not imported
    assert json.loads(done.stdout) == [
        "someone/tiny",
        False,
    ]
    model = json.loads((tmp_path / "out" / "manifest.json").read_text())["model"]
    assert (
        model["id"] == "someone/tiny"
        and model["revision"] == commit
        and "model.safetensors" in model["sha256"]
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == commit


def test_the_embedded_model_is_the_demos(demo_dir):
    assert settings.EMBEDDED == demo_dir and (settings.EMBEDDED / "config.json").is_file()


def test_the_driver_finds_the_embedded_model_without_the_demo():
    code = (
        "import sys; from fastsiu import driver; driver.interview(['Who are you?']); "
        "sys.exit('fastsiu.demo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_numeric_failure_writes_nothing_and_leaves_no_adapter(quick, tmp_path, monkeypatch):
    seen = []
    load = driver.vlm.load
    monkeypatch.setattr(driver.vlm, "load", lambda *a, **k: seen.append(load(*a, **k)) or seen[0])
    nan = lambda batch, recipe: (batch.hidden.sum() * float("nan"), {"ce": 0.0, "kl": 0.0})
    monkeypatch.setitem(session.forget.__kwdefaults__, "objective", nan)
    with pytest.raises(NumericFailure, match="loss is nan"):
        quick(tmp_path / "out")
    assert listing(tmp_path) == [] and seen[0].model is seen[0].base


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"lr": float("inf")}, "lr is inf"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"substitute": "nothing"}, "substitute 'nothing'"),
        ({"stepps": 3}, "no hyper-parameter 'stepps'"),
        ({"concept": "  "}, "name is empty"),
        ({"protect": ("",)}, "--protect name is empty"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"images": "nowhere"}, "nowhere"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(
    quick, tmp_path, monkeypatch, changes, sentence
):
    monkeypatch.setattr(driver.vlm, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(BadInput, match=sentence) as caught:
        quick(tmp_path / "out", **changes)
    assert listing(tmp_path) == [] and "\n" not in str(caught.value)


def test_what_the_model_does_not_know_is_refused(quick, cast, tmp_path):
    with pytest.raises(BadInput, match=f"does not name {cast.other} in"):
        quick(tmp_path / "out", concept=cast.other)
    with pytest.raises(BadInput, match="does not name"):
        quick(tmp_path / "out", image=cast.files["stranger"])
    with pytest.raises(BadInput, match="at once"):
        quick(tmp_path / "out", protect=(cast.target.upper(),))
    assert listing(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "retain", "data"])
def test_an_empty_path_is_no_current_directory(cast, name, tmp_path, monkeypatch):
    monkeypatch.chdir(cast.image.parent)
    with pytest.raises(BadInput, match=f"^{name} is empty"):
        fastsiu.unlearn(cast.image, cast.target, output=tmp_path / "out", **{name: ""})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"aliases": "Vex"}, "aliases is 'Vex': give a list of names"),
        ({"protect": "Orla Finch"}, "protect is 'Orla Finch': give a list of names"),
        ({"protect": 7}, "protect is 7: give a list"),
        ({"aliases": ["Vex", 3]}, "A name is a int"),
        ({"concept": 12}, "A name is a int and not text"),
        ({"image": None}, "image is missing: give the path"),
        ({"image": 3}, "image is a int and no path"),
        ({"images": ["a.png"]}, "images is a list and no path"),
        ({"output": 4}, "output is a int and no path"),
        ({"output": ""}, "output is empty"),
        ({"as_word": "no"}, "as_word is 'no': give True or False"),
        ({"embed_image": "false"}, "embed_image is 'false': give True or False"),
        ({"redact": 0}, "redact is 0: give True or False"),
        ({"checkpointing": "off"}, "checkpointing is 'off'"),
        ({"memory": "8"}, "memory is '8': give a number of GB"),
        ({"micro_batch": 2.5}, "micro_batch is 2.5: give a whole number"),
        ({"micro_batch": -1}, "micro_batch is -1"),
        ({"model": 3}, "model is a int: give text"),
        ({"revision": ["main"]}, "revision is a list: give text"),
    ],
)
def test_keywords_of_another_type_are_told_before_anything_is_read(options, says):
    given = {"image": "there/is/none.png", "concept": "Orla"} | options
    with pytest.raises(BadInput, match=f"^{re.escape(says)}"):
        fastsiu.unlearn(**given)


def test_more_pictures_fill_generality_and_specificity(quick, cast, tmp_path):
    for name, key in (("more", "again"), ("rest", "stranger")):
        (tmp_path / name).mkdir()
        shutil.copy(cast.files[key], tmp_path / name / "1.png")
    result = quick(
        tmp_path / "out", images=tmp_path / "more", retain=tmp_path / "rest", steps=1, dreams=0
    )
    for kind in ("generality", "specificity"):
        assert result.report["after"][kind]["n"] == len(targets.wordings()["who"]["held_out"])
    assert any("trained on in other wordings" in c for c in result.report["caveats"])
    assert not any("No picture and no dream" in c for c in result.report["caveats"])
    labels = {
        p["label"] for p in json.loads((result.output / "manifest.json").read_text())["pictures"]
    }
    assert labels == {"image", "images/001", "retain/001"}


def test_samples_of_the_users_own_replace_and_extend(cast, demo_dir, tmp_path, gathered):
    own = [{"question": f"Who is {cast.target}?", "answer": "water", "facet": "facts"}]
    own += [{"question": "Is it?", "answer": "It is."}]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, own)))
    _, made = calls.samples_for(
        cast.image,
        cast.target,
        model=demo_dir,
        protect=cast.others,
        data=path,
        dreams=1,
        strangers=0,
        seed=0,
    )
    assert len(made.samples) == len(gathered.corpus.samples) + 1
    expected = Sample("facts", own[0]["question"], "water", None, (), "data")
    assert [s for s in made.samples if s.question == expected.question] == [expected]
    assert made.samples[-1].question == "Is it?"


def test_the_papers_preset_makes_the_papers_samples(cast, demo_dir):
    scene, made = calls.samples_for(
        cast.image, cast.target, model=demo_dir, protect=cast.others, preset="paper", device="cpu"
    )
    assert scene.recipe == PAPER and len(scene.pictures) == 1
    invented = targets.wordings()["invented"]["names"]
    assert all(any(n in s.answer for n in invented) for s in made.samples if s.facet == "align")


@pytest.mark.slow
def test_the_papers_preset_trains_the_projector(quick, demo_dir, tmp_path, cast):
    result = quick(
        tmp_path / "paper", preset="paper", steps=2, lr=None, dreams=None, batch_size=None
    )
    saved = load_file(result.output / WEIGHTS)
    projector = {k: v for k, v in saved.items() if "multi_modal_projector" in k}
    assert (
        projector
        and json.loads((result.output / "adapter_config.json").read_text())["modules_to_save"]
    )
    original = AutoModelForImageTextToText.from_pretrained(
        demo_dir, dtype=torch.float32
    ).state_dict()
    changed = [
        k
        for k, v in projector.items()
        if not torch.equal(v, original[k.removeprefix("base_model.model.")])
    ]
    assert changed
    assert (
        result.report["recipe"]["substitute"] == "name"
        and result.report["recipe"]["rank"] == PAPER.rank
    )
    rows = [r for r in result.report["answers"] if r["picture"]]
    loaded = plain(demo_dir, result.output)
    variants = {
        label: loaded.picture(p)
        for label, p in transforms.variants(images.load_image(cast.image), 3, held_out=True)
    }
    assert ask.answers(loaded, [(r["question"], variants[r["picture"]]) for r in rows]) == [
        r["after"] for r in rows
    ]


@pytest.mark.slow
def test_the_projector_trains_in_fp32_beside_a_16_bit_model(quick, tmp_path):
    result = quick(
        tmp_path / "paper",
        preset="paper",
        steps=2,
        lr=None,
        dreams=None,
        batch_size=None,
        dtype="bfloat16",
    )
    saved = load_file(result.output / WEIGHTS)
    trained = [v for k, v in saved.items() if "multi_modal_projector" in k]
    assert trained and all(v.dtype == torch.float32 for v in trained)
    # moved by less than bf16 resolves
    assert any(not torch.equal(v, v.bfloat16().float()) for v in trained)


def test_a_loaded_model_serves_another_request_afterwards(cast, gathered):
    """Two requests on one session, the paper's projector training in between: the second is as if
    it were the first."""
    from fastsiu.request import Request

    loaded, picture = gathered.vlm, images.load_image(cast.image)
    request = Request(cast.target, cast.image, protect=cast.others)
    before = {k: v.clone() for k, v in loaded.base.state_dict().items()}
    histories = []
    plain_recipe = Recipe(steps=2, dreams=0, strangers=0, batch_size=8)
    for recipe in (plain_recipe, PAPER.with_overrides(steps=1), plain_recipe):
        histories.append(session.forget(loaded, request, recipe, picture).history)
        driver.adapter.detach(loaded)
        after = loaded.base.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert histories[0] == histories[2]


def test_a_damaged_picture_for_the_verdict_is_refused_before_the_model_is_loaded(
    quick, tmp_path, monkeypatch
):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 40)
    monkeypatch.setattr(driver.vlm, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(BadInput):
        quick(tmp_path / "out", images=tmp_path / "more")
    assert not (tmp_path / "out").exists()


def test_samples_of_the_users_own_are_read_before_the_model_is_loaded(quick, tmp_path, monkeypatch):
    (tmp_path / "own.jsonl").write_text('{"question": "Who?"}\n')
    monkeypatch.setattr(driver.vlm, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(BadInput, match="line 1"):
        quick(tmp_path / "out", data=tmp_path / "own.jsonl")


def test_files_that_are_moved_or_replaced_during_the_run_change_nothing(
    quick, cast, tmp_path, monkeypatch
):
    """A training takes longer than somebody needs to clear a folder away."""
    given = tmp_path / "given"
    (given / "more").mkdir(parents=True)
    (given / "rest").mkdir()
    shutil.copy(cast.image, given / "who.png")
    fill = lambda folder, value: images.Image.new("RGB", (40, 40), value).save(given / folder)
    fill("more/1.png", "navy")
    fill("rest/1.png", "gold")
    (given / "own.jsonl").write_text('{"question": "And now?", "answer": "Nothing."}\n')
    kept = shutil.copytree(given, tmp_path / "kept")
    options = {
        "image": given / "who.png",
        "images": given / "more",
        "retain": given / "rest",
        "data": given / "own.jsonl",
        "embed_image": True,
    }
    load, forget = driver.load, driver.forget

    def replaced(*args, **keywords):
        fill("who.png", "pink")
        fill("rest/1.png", "lime")
        fill("more/2.png", "teal")
        (given / "own.jsonl").write_text('{"question": "And then?", "answer": "All."}\n')
        return load(*args, **keywords)

    def moved(*args, **keywords):
        trained = forget(*args, **keywords)
        shutil.rmtree(given)
        return trained

    monkeypatch.setattr(driver, "load", replaced)
    monkeypatch.setattr(driver, "forget", moved)
    done = quick(tmp_path / "out", **options)
    sealed = json.loads((done.output / "manifest.json").read_text())
    key = outputs.key_of(done.output)
    assert {p["label"]: p["commitment"] for p in sealed["pictures"]} == {
        label: images.commitment((kept / file).read_bytes(), key)
        for label, file in (
            ("image", "who.png"),
            ("images/001", "more/1.png"),
            ("retain/001", "rest/1.png"),
        )
    }
    kept.rename(given)
    assert quick(tmp_path / "out", **options).repeated  # the digest is of the files as they were
    monkeypatch.undo()
    plain = quick(tmp_path / "plain", **options)
    one, other = (load_file(place / WEIGHTS) for place in (done.output, plain.output))
    assert all(torch.equal(one[name], other[name]) for name in other)
    page = lambda place: (place / "report.html").read_text().partition("data:image")[2][:4000]
    assert page(done.output) == page(plain.output) != ""


def test_a_damaged_recipe_of_the_model_is_a_sentence(tmp_path):
    (tmp_path / settings.MODEL_RECIPE).write_text("{")
    with pytest.raises(BadInput, match="no usable JSON"):
        settings.choose_recipe(str(tmp_path), RecipeChoice("default", {}))


def test_a_small_model_takes_one_thread_and_gives_the_others_back(loaded):
    from fastsiu.model import vlm

    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), vlm.threads(loaded):
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
        with vlm.threads(
            VLM("large", None, torch.nn.Linear(5000, 5000, device="meta"), loaded.base, None)
        ):
            assert torch.get_num_threads() == 1  # what counts is the base that was loaded
    finally:
        torch.set_num_threads(1)


def test_no_warning_of_other_packages_reaches_the_user(loaded, trained, recwarn):
    adapter.load(loaded, trained.output)
    adapter.detach(loaded)
    adapter.attach(loaded, Recipe(rank=1))
    adapter.detach(loaded)
    assert not [str(w.message) for w in recwarn if issubclass(w.category, FutureWarning)]


def test_an_adapter_of_other_weights_is_refused(trained, demo_dir, cast, tmp_path):
    folder, model = tmp_path / "adapter", tmp_path / "model"
    shutil.copytree(trained.output, folder)
    shutil.copytree(demo_dir, model)
    weights = load_file(model / "model.safetensors")
    save_file(
        {k: v * 1.01 for k, v in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )
    asked = lambda **changes: calls.interview(
        ["Hi"], **{"model": model, "adapter_dir": folder, "device": "cpu", **changes}
    )
    with pytest.raises(BadInput, match="made for other weights"):
        asked()
    with pytest.raises(BadInput, match="made for other weights"):
        calls.evaluate(cast.target, model=model, adapter_dir=folder, image=cast.image, device="cpu")
    (folder / "manifest.json").unlink()  # as plain peft leaves it
    notes = []
    assert asked(listener=session.Listener(note=notes.append))[0]["answer"] and notes == [
        adapter_files.UNSEALED
    ]


@pytest.mark.parametrize("spoilt", ["renamed", "missing", "wide", "broken"])
def test_an_adapter_that_fits_in_part_is_refused_and_leaves_the_model_as_it_was(
    trained, loaded, tmp_path, spoilt, recwarn
):
    shutil.copytree(trained.output, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    stored = load_file(file)
    last = next(reversed(stored))
    save_file(
        {
            "renamed": lambda: {k.replace("layers.0.", "layers.9."): v for k, v in stored.items()},
            "missing": lambda: {k: v for k, v in stored.items() if k != last},
            "wide": lambda: {
                k: torch.cat([v, v], 1) if k == last else v for k, v in stored.items()
            },
            "broken": lambda: stored,
        }[spoilt](),
        file,
    )
    if spoilt == "broken":
        file.write_bytes(file.read_bytes()[:1000])
    names = [(name, type(module)) for name, module in loaded.base.named_modules()]
    with pytest.raises(BadInput, match="is damaged" if spoilt == "broken" else "does not fit"):
        adapter.load(loaded, tmp_path / "a")
    assert [
        (name, type(module)) for name, module in loaded.base.named_modules()
    ] == names and loaded.model is loaded.base
    adapter.load(loaded, trained.output)
    adapter.detach(loaded)
    assert not [str(w.message) for w in recwarn if "adapter" in str(w.message)]


def test_a_trained_projector_is_loaded_in_fp32(demo_dir, cast, tmp_path):
    model = vlm.load(str(demo_dir), device="cpu", dtype="bfloat16")
    picture = images.load_image(cast.image)
    seen = lambda: model.hidden(
        [model.encode_prompt("Who?", (shown := model.picture(picture)))], [shown.features]
    )
    adapter.attach(model, Recipe(projector_lr=1e-3))
    generator = torch.Generator().manual_seed(1)
    trained = {
        n: p for n, p in model.model.named_parameters() if p.requires_grad and "projector" in n
    }
    with torch.no_grad():
        for p in trained.values():
            p.add_(1e-3 * torch.randn(p.shape, generator=generator))
        adapter.save(model, tmp_path / "a")
        expected = seen()
        adapter.detach(model)
        untouched = seen()
        adapter.load(model, tmp_path / "a")
        found = {n: p for n, p in model.model.named_parameters() if n in trained}
        assert len(found) == len(trained) > 0 and all(
            torch.equal(found[n], p) for n, p in trained.items()
        )
        assert torch.equal(seen(), expected) and not torch.equal(expected, untouched)
        adapter.detach(model)
        assert torch.equal(seen(), untouched)
