"""Every family of tests/helpers/families.py, saved as the hub saves models and loaded as a user
loads them: the shared prefix against separate forwards with pixels, the vision tower and the head
counted, adapters as plain peft reads them."""

from __future__ import annotations

import importlib.util
import json
import re

import families
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText

from fastsiu.model import adapter, ask, decode, features, parts, prefix, rounding, vlm
from fastsiu.model.logits import probe_head
from fastsiu.model.memory import Layout
from fastsiu.model.simulation import Simulation
from fastsiu.model.turns import Picture
from fastsiu.model.workload import Workload
from fastsiu.request import BadInput, Recipe, Sample
from fastsiu.samples import corpus
from fastsiu.samples.spaces import InPixels, space_of, vision_space
from fastsiu.step import directions
from fastsiu.step.anchor import Anchor
from fastsiu.text.concept import Concept

torch.set_num_threads(1)
LOOKS_AHEAD = ("paligemma", "paligemma2")  # their prefix looks at the question
# whose memory cannot be worked out: on stand-ins for its tokens the forward asks for values
UNKNOWN = ("gemma4",)


SOUND = [name for name, family in families.FAMILIES.items() if not family.fault]
BROKEN = [name for name, family in families.FAMILIES.items() if family.broken]


@pytest.fixture(scope="module", params=SOUND)
def case(request, tmp_path_factory):
    family = families.FAMILIES[request.param]
    if family.needs and importlib.util.find_spec(family.needs) is None:
        pytest.skip(f"needs {family.needs}")
    return families.open_case(family, tmp_path_factory.mktemp(family.name))


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Sharing is used wherever it was found exact, at these sizes too."""
    monkeypatch.setattr(parts, "WORTH", float("inf"))
    monkeypatch.setattr(parts, "FORWARD", 0)


def test_rounding_moves_the_answers_and_no_weight(case):
    """Whatever a family keeps its parameters in: experts, convolutions, states."""
    before = {k: (p.data_ptr(), p.detach().clone()) for k, p in case.vlm.base.named_parameters()}
    plain = ask.label_scores(case.vlm, case.turns, case.shown)
    with rounding.rounded(case.vlm):
        other = ask.label_scores(case.vlm, case.turns, case.shown)
    for key, parameter in case.vlm.base.named_parameters():
        place, copy = before[key]
        assert parameter.data_ptr() == place and torch.equal(parameter, copy), key
    apart = max(float((a.log_p - b.log_p).abs().max()) for a, b in zip(plain, other, strict=True))
    assert 1e-5 < apart < 1.0


def test_turns_hold_their_answers(case):
    tokenizer = case.vlm.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for (_, answer, which), turn in zip(families.SAID, case.turns, strict=True):
        assert torch.equal(turn.inputs["input_ids"][0, turn.rows + 1], turn.labels)
        said = [
            label
            for label, (start, end) in zip(turn.labels.tolist(), turn.offsets, strict=True)
            if end > start
        ]
        assert tokenizer.decode(said).strip() == answer
        assert int(turn.labels[-1]) in special
        assert not turn.offsets[-1][1] > turn.offsets[-1][0]
        image = getattr(case.vlm.base.config, "image_token_id", None)
        assert bool((turn.inputs["input_ids"] == image).any()) is (which is not None)


@pytest.mark.parametrize(
    "answer", ["A cat.", "a", "(no)", '"x"', "ing", "\u4f60\u597d", "end", "assistant"]
)
def test_the_ids_of_a_prompt_begin_the_ids_of_its_turn(case, answer):
    """Also where a tokenizer would join the prompt's last letters with the answer's first."""
    for picture in (None, case.shown[0]):
        prompt = case.vlm.encode_prompt("Who is this?", picture)["input_ids"]
        turn = case.vlm.encode("Who is this?", answer, picture)
        begun = case.vlm.encode_prompt("Who is this?", picture, answer)["input_ids"]
        ids, T = turn.inputs["input_ids"], prompt.shape[1]
        assert torch.equal(ids[:, :T], prompt) and torch.equal(ids[:, : begun.shape[1]], begun)
        assert turn.rows[0] + 1 >= T and turn.offsets[0][0] == 0
        told = case.vlm.tokenizer.decode(ids[0, T:], skip_special_tokens=True)
        assert told.strip() == answer
        covered = {at for start, end in turn.offsets for at in range(start, end)}
        assert covered >= {i for i, letter in enumerate(answer) if not letter.isspace()}


def test_a_dream_starts_from_what_the_language_model_reads(case):
    """Whatever the model does between its projector and its language model: newline rows, tiles,
    windows."""
    free, behind = vision_space(case.vlm, case.shown[0])
    free = free.clone().requires_grad_()
    pairs = zip(
        features.feature_tensors(behind(free)),
        features.feature_tensors(case.shown[0].features),
        strict=True,
    )
    assert all(a.shape == b.shape and torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    states = prefix.supervised_states(case.vlm, case.turns[:1], [behind(free)])
    assert float(torch.autograd.grad(states.square().sum(), free)[0].norm()) > 0


def test_a_dream_in_pixels_starts_at_the_picture(case):
    """Through any family's processor: tiles, patches, several sizes."""
    start = case.shown[0]
    space = space_of(case.vlm, Recipe(dream_in="pixels"), [start, start], 0)
    assert isinstance(space, InPixels) and space.at_once
    seen = space.shown([0, 1])
    for one in seen:
        pairs = zip(*map(features.feature_tensors, (one, start.features)), strict=True)
        assert all(a.shape == b.shape and torch.allclose(a, b, atol=1e-3) for a, b in pairs)
    states = prefix.supervised_states(case.vlm, case.turns[:1], seen[:1])
    assert float(torch.autograd.grad(states.square().sum(), space.grids[0])[0].norm()) > 0


def test_tokens_that_no_person_writes_end_a_turn_and_stand_in_no_text(case):
    """Also those that the tokenizer has no name for, such as Gemma's <end_of_turn>."""
    model = case.vlm
    special = [t.content for t in model.tokenizer.added_tokens_decoder.values() if t.special]
    for token in special:
        with pytest.raises(BadInput, match="reads no words there"):
            model.check_text(f"Who {token} is this?")
    turn = model.encode("Who is this?", "Nobody.", None)
    ends = [
        token for token, (start, end) in zip(turn.labels, turn.offsets, strict=True) if start == end
    ]
    assert len(ends) == 1 and model.tokenizer.decode(ends) in special
    if not model.suffixed:
        _, whole = (model._templated("Who is this?", False, said) for said in (None, "Nobody."))
        if any(token in whole.split("Nobody.")[1] for token in special):
            assert model.render("Who is this?", False, "Nobody.").endswith(
                whole.split("Nobody.")[1]
            )


def test_kept_prompts_are_what_the_processor_makes_of_every_turn(case):
    """Of pictures of two sizes, asked the same, in turns."""
    model, question = case.vlm, "Who is this?"
    if model.suffixed:  # such a processor gets every turn
        return
    sides = (60, 200, 60, 200)
    for picture in (Picture(Image.new("RGB", (side, side + 20), "red"), None) for side in sides):
        asked = model.tokenise(model.render(question, True), picture.image)
        begun = asked["input_ids"].shape[1]
        kept = model.encode_prompt(question, picture)
        assert kept.keys() == asked.keys()
        assert all(torch.equal(kept[key], asked[key]) for key in asked)
        for answer in ("This is Ada.", "a cat"):
            turn = model.encode(question, answer, picture).inputs
            whole = model.tokenise(model.render(question, True, answer), picture.image)
            assert torch.equal(turn["input_ids"][:, :begun], asked["input_ids"])
            # LLaVA's prompts end in a blank that the tokenizer would join with the answer.
            if torch.equal(whole["input_ids"][:, :begun], asked["input_ids"]):
                assert turn.keys() == whole.keys()
                assert all(torch.equal(turn[key], whole[key]) for key in whole)
            else:
                assert "llava" in case.family.name or "granite" in case.family.name


def test_a_step_is_estimated_or_the_reason_is_said(case):
    settings = Layout("bfloat16", device="cpu", checkpointing=True)
    simulation = Simulation(case.vlm.base.config, Recipe(batch_size=4), Workload(12, 16))
    if case.family.name in UNKNOWN:
        with pytest.raises(BadInput, match="cannot be worked out"):
            simulation.estimate(settings)
    else:
        assert simulation.estimate(settings).peak > simulation.estimate(settings).weights > 0


def test_the_heads_transform_is_measured(case):
    loaded = case.vlm
    assert (loaded.logit_scale, loaded.logit_softcap) == (
        pytest.approx(case.family.transform[0]),
        case.family.transform[1],
    )
    with torch.no_grad():
        own = loaded.model(**case.turns[0].inputs, **loaded.entering(case.features[:1])).logits[0]
        made = loaded.logits(loaded.hidden([case.turns[0].inputs], case.features[:1])[0])
    assert torch.allclose(made, own.float(), atol=1e-4 * float(own.abs().max()))


def test_ways_of_sharing(case):
    exact, said = families.plan(case)
    assert exact == case.family.shares, said
    assert len(said) == (len(families.WAYS) - len(exact) if exact else 1), said


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_states_and_gradients_are_those_of_separate_forwards(case, micro_batch):
    expected = families.gradients(case, families.separate(case))
    for way in ("plain", *case.family.shares):
        found = families.apart(families.shared(case, way, micro_batch), expected)
        assert max(found) < case.family.fp32, (way, found)


def test_in_fp64(case):
    double = case.double()
    expected = families.gradients(double, families.separate(double))
    for way in ("plain", *case.family.shares):
        found = families.apart(families.shared(double, way), expected)
        assert max(found) < case.family.fp64, (way, found)


def test_the_tower_runs_once_a_picture_and_the_head_never(case):
    assert case.tower and min(case.tower.values()) == 2  # of two pictures
    for way in ("plain", *case.family.shares):
        with (
            families.calls(case.vlm.base) as ran,
            families.Products(case.vlm.head_weight) as products,
        ):
            families.shared(case, way, 2)
        assert not set(ran) & set(case.tower) and ran and not products.seen
    with families.Products(case.vlm.head_weight) as products:
        case.vlm.base(**case.turns[-1].inputs)
    assert products.seen == 1  # so that a head could be seen


def test_the_adapter_is_on_the_language_models_linears_only(case):
    base = case.vlm.base
    adapted = {name for name, module in base.named_modules() if hasattr(module, "lora_A")}
    names = {
        name: module
        for name, module in base.named_modules()
        if "lora_" not in name and "base_layer" not in name
    }
    language = {*base.get_decoder().modules()} - {base.get_output_embeddings()}
    assert adapted == {
        name
        for name, module in names.items()
        if type(getattr(module, "base_layer", module)) is nn.Linear and module in language
    }
    assert adapted and not adapted & set(case.tower)
    trained = [name for name, p in case.vlm.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_what_is_in_front_reads_few_directions_and_holds_what_is_kept(case, tmp_path):
    """With an adapter of its own, on a model of its own: the shared one stays as it is."""
    own = families.open_case(case.family, tmp_path / "own")
    two = list({id(p.image): p for p in own.shown if p is not None}.values())
    assert len(two) == 2
    for adapt in ("vision", "projector"):
        recipe = Recipe(adapt=adapt, directions=4, anchor=2.0)
        samples = [
            Sample(facet, "Who is this?", "Nobody.", picture)
            for picture, facet in enumerate(("stranger", "kept"))
        ]
        lessons = corpus.build(own.vlm, Concept("Zorblax"), samples, two, recipe)
        adapter.detach(own.vlm)
        try:
            adapter.attach(own.vlm, recipe)
        except BadInput as error:  # of another name, or without linear layers
            assert adapt == "projector" and "no projector of a known name" in str(error)
            continue
        held = directions.find(own.vlm, [lessons], recipe)
        assert held.of
        held.hold()
        anchor = Anchor.of(own.vlm, recipe, [lessons])
        assert anchor.pictures and float(anchor.backward(1)) < 1e-4
        with torch.no_grad():
            for name, p in own.vlm.model.named_parameters():
                if p.requires_grad and "lora_B" in name:
                    p.normal_(std=0.1)
        assert float(anchor.backward(1)) > 0
        assert any(p.grad is not None and bool(p.grad.any()) for p in own.vlm.model.parameters())


def test_its_adapter_reads_a_few_directions_only(case):
    """Whatever the layers are: experts, states, keys and values of a picture."""
    recipe = Recipe(directions=4)
    samples = [
        Sample(facet, question, "Nobody.", picture)
        for facet in ("stranger", "kept")
        for question in ("Who is this?", "What do you see?")
        for picture in (0, 1)
    ]
    lessons = corpus.build(case.vlm, Concept("Zorblax"), samples, case.shown[:2], recipe)
    factors = {x: directions._factor(x).weight for x in directions._adapted(case.vlm, False)}
    before = {layer: weight.detach().clone() for layer, weight in factors.items()}
    found = directions.find(case.vlm, [lessons], recipe)
    wide = {layer for layer, weight in factors.items() if weight.shape[1] > 4}
    assert found.of.keys() == wide != set()
    assert sum(kept.basis.shape[1] == 4 for kept in found.of.values()) > len(wide) / 2
    found.hold()
    for layer, (basis, _, _) in found.of.items():
        inside = factors[layer] @ basis @ basis.T
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(inside, factors[layer], atol=1e-4, rtol=0)
    with torch.no_grad():
        for layer, weight in factors.items():
            weight.copy_(before[layer])


def test_plain_peft_loads_saves_and_merges(case, tmp_path):
    loaded, directory = case.vlm, tmp_path / "adapter"
    adapter.save(loaded, directory)
    inputs = {**case.turns[0].inputs, **loaded.entering(case.features[:1])}
    with torch.no_grad():
        expected = loaded.model(**inputs).logits
        fresh = AutoModelForImageTextToText.from_pretrained(case.directory).eval()
        untouched = fresh(**inputs).logits
        plain = PeftModel.from_pretrained(fresh, directory).eval()
        assert torch.equal(plain(**inputs).logits, expected)
        with adapter.teacher(loaded):
            assert torch.equal(loaded.model(**inputs).logits, untouched)
        merged = plain.merge_and_unload()(**inputs).logits
    assert float((untouched - expected).abs().max()) > 1e-3
    assert float((merged - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_answers_are_those_of_the_models_own_generate(case):
    """With the cached features; the model's own way takes pixels."""
    loaded, (shown, other) = case.vlm, case.shown[1:3]
    questions = [("What is this?", shown), ("What is this?", other), ("Who is five?", None)]
    said = ask.answers(loaded, questions, max_new_tokens=6)
    for (question, picture), found in zip(questions[:2], said, strict=False):
        inputs = loaded.processor(
            text=[loaded.render(question, True)],
            images=[picture.image],
            return_tensors="pt",
            add_special_tokens=False,
        )
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        tokens = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert (
            found
            == loaded.tokenizer.decode(
                tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            ).strip()
        )


def test_answers_on_a_shared_prefix_are_those_of_generate(case, monkeypatch):
    """Unequal questions, some answers shorter; where the trial finds a difference, it is generate
    that answers."""
    loaded, (one, other) = case.vlm, case.shown[1:3]
    texts = ("What is this?", "Who is in the picture? Describe it, please.", "Is it five?")
    questions = [(text, picture) for text in texts for picture in (one, None, other)]
    monkeypatch.setattr(decode, "rules", lambda vlm, suppress: None)
    plain = ask.replies(loaded, questions, max_new_tokens=8)
    monkeypatch.undo()
    monkeypatch.setattr(loaded, "decodes", {})
    assert ask.replies(loaded, questions, max_new_tokens=8) == plain
    assert [bool(why) for why in loaded.decodes.values()] == [
        case.family.name in LOOKS_AHEAD
    ] * 2, loaded.decodes
    monkeypatch.setattr(
        ask,
        "generated",
        lambda vlm, turns, *rest: [] if not turns else pytest.fail("generate was asked"),
    )
    if not any(loaded.decodes.values()):
        assert ask.replies(loaded, questions[:4], max_new_tokens=8) == plain[:4]


@pytest.mark.parametrize("over", [0, 1])
def test_questions_are_padded_up_to_where_a_window_would_slide(over, tmp_path, monkeypatch):
    """A window counts slots: prompt, padding and answer must fit, or only prompts of equal length
    are in one batch."""
    texts, longest = (
        ("What is this?", "Who is in the picture? Describe it, please.", "Is it five?"),
        8,
    )
    kind = families.FAMILIES["gemma3"]
    length = max(
        families.open_case(kind, tmp_path / "any")
        .vlm.encode_prompt(text, None)["input_ids"]
        .shape[1]
        for text in texts
    )
    monkeypatch.setitem(families.SLIDING, "sliding_window", length + longest - over)
    loaded = families.open_case(kind, tmp_path / "wide").vlm
    questions, batches, grow = [(text, None) for text in texts], [], decode.Rows.__init__
    monkeypatch.setattr(decode, "rules", lambda vlm, suppress: None)
    plain = ask.replies(loaded, questions, max_new_tokens=longest)
    monkeypatch.undo()
    assert decode.exact(loaded, [None])
    monkeypatch.setattr(
        decode.Rows,
        "__init__",
        lambda self, part, members, *rest: (
            batches.append(len(members)),
            grow(self, part, members, *rest),
        )[0],
    )
    assert ask.replies(loaded, questions, max_new_tokens=longest) == plain
    assert batches == ([1, 1, 1] if over else [3])


# What cannot be handled says so -------------------------------------------------------------------


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def test_a_model_that_takes_no_features_says_what_it_lacks():
    with pytest.raises(
        BadInput,
        match="BlipForConditionalGeneration takes no precomputed image "
        "features.*mm_encoder_outputs",
    ):
        features.features_entry(on_meta(transformers.BlipConfig()))
    lacking = on_meta(families.llava().config)
    lacking.model = lacking.model.language_model
    with pytest.raises(BadInput, match="LlamaModel would need a method get_image_features"):
        features.features_entry(lacking)
    with pytest.raises(
        BadInput, match="gives hidden_states: it would need to give one of pooler_output"
    ):
        features.read_key({"hidden_states": (torch.ones(1),)})


def test_a_head_with_an_adapter_is_refused(tmp_path):
    base = AutoModelForImageTextToText.from_config(families.llava().config).eval()
    get_peft_model(base, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(BadInput, match="neither quantised nor adapted"):
        probe_head(base, {"input_ids": torch.arange(9)[None]})


def refused(family):
    """The whole sentence about a family that the installed transformers breaks."""
    version, config = transformers.__version__, type(family.build().config).__name__
    name = config.replace("Config", "ForConditionalGeneration")
    before = ".".join(version.split(".")[:2])
    said = (
        f"{name} fails in transformers {version} on a question without a picture ({family.fault}): "
        "restore the model's files, try an earlier release, pip install "
        f"'transformers<{before}', or give another model."
    )
    return pytest.raises(BadInput, match=f"^{re.escape(said)}$")


@pytest.mark.parametrize("name", BROKEN)
def test_a_family_that_transformers_breaks_costs_a_sentence(name, tmp_path):
    """In the releases named there; in every other the family loads, and is one of those above."""
    family = families.FAMILIES[name]
    directory = str(families.save(family, tmp_path))
    if family.fault:
        with refused(family):
            vlm.load(directory, device="cpu")
    else:
        assert vlm.load(directory, device="cpu").logit_scale == family.transform[0]


def saved_with(family, directory, file, **changed):
    families.save(families.FAMILIES[family], directory)
    described = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps({**described, **changed}))
    return str(directory)


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed"
)
@pytest.mark.parametrize(
    "family, file, changed",
    [
        ("llama4", "preprocessor_config.json", {"image_processor_type": "Llama4ImageProcessor"}),
        ("mistral3", "processor_config.json", {"processor_class": "PixtralProcessor"}),
    ],
)
def test_a_processor_that_needs_torchvision_says_so(family, file, changed, tmp_path):
    with pytest.raises(
        BadInput, match="needs torchvision, which is not installed: pip install torchvision.$"
    ):
        vlm.load(saved_with(family, tmp_path, file, **changed), device="cpu")


def test_a_processor_that_needs_another_package_says_so(tmp_path, monkeypatch):
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(BadInput, match="needs a package that is not installed .*num2words"):
        vlm.load(str(families.save(families.FAMILIES["smolvlm"], tmp_path)), device="cpu")


def test_a_prefix_model_continues_a_begun_answer(tmp_path):
    """PaliGemma's answers go in beside the question; what is begun is part of the suffix, and is
    not ended."""
    case = families.open_case(families.FAMILIES["paligemma"], tmp_path)
    for picture in case.shown[0], None:
        begun = case.vlm.encode_prompt("What is this?", picture, "This is a")
        whole = case.vlm.encode("What is this?", "This is a", picture)
        assert torch.equal(begun["input_ids"], whole.inputs["input_ids"][:, :-1])
        assert begun["token_type_ids"][0].sum() == len(whole.labels) - 1 > 0
        prompt = case.vlm.encode_prompt("What is this?", picture)
        length = prompt["input_ids"].shape[1]
        assert (
            torch.equal(begun["input_ids"][:, :length], prompt["input_ids"])
            and not prompt["token_type_ids"].any()
        )


def test_int8_rounds_but_shares(tmp_path):
    """Its activations are rounded as well, to far less than fp32's."""
    pytest.importorskip("bitsandbytes")
    family = families.FAMILIES["llama4"]
    if family.fault:
        with refused(family):
            families.open_case(family, tmp_path, quantize="int8")
        return
    loaded = families.open_case(family, tmp_path, quantize="int8")
    assert families.plan(loaded) == (families.WAYS, [])
    # inside the decoder, and left alone
    assert type(loaded.vlm.base.get_output_embeddings()) is nn.Linear
