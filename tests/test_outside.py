"""Model and adapter directories that somebody else made: what they would do silently, or as a
crash, is a sentence."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import calls
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AriaConfig

from fastsiu import session, settings
from fastsiu.guards import limited
from fastsiu.images import load_image
from fastsiu.model import adapter, adapter_files, ask, fold, plan, source, vlm
from fastsiu.model.memory import Layout
from fastsiu.model.processor import NoVideos
from fastsiu.request import BadInput, NumericFailure, Recipe
from fastsiu.settings import RecipeChoice

torch.set_num_threads(1)
CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TEMPLATE, PROCESSOR = "tokenizer.json", "chat_template.jinja", "processor_config.json"
DEEP = "[" * 100_000


@pytest.fixture
def copied(demo_dir, tmp_path):
    shutil.copytree(demo_dir, tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **values) -> None:
    """Sets values in a JSON file; a__b is the key b of the object a."""
    record = json.loads(path.read_text())
    for place, value in values.items():
        *outer, last = place.split("__")
        inside = record
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = value
    path.write_text(json.dumps(record))


def spoil(path: Path, part: str, value: float) -> str:
    """Puts one number into the first tensor whose name holds `part`; that name."""
    weights = load_file(path)
    name = next(key for key in weights if part in key)
    weights[name].view(-1)[-1] = value
    save_file(weights, path, {"format": "pt"})
    return name


def replies(directory: Path, cast) -> list[str]:
    loaded = vlm.load(str(directory), device="cpu")
    picture = loaded.picture(load_image(cast.image))
    questions = [
        "Who is this?",
        "Where was the one shown born, and what does it like to eat in the morning?",
    ]
    return ask.answers(
        loaded, [*((q, picture) for q in questions), (f"Where was {cast.target} born?", None)]
    )


# What would be wrong without a word ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["truncation", "padding", "tokenizer_config"])
def test_no_stored_truncation_or_padding_touches_a_question(kind, copied, demo_dir, cast):
    if kind == "truncation":
        cut = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
        change(copied / TOKENIZER, truncation=cut)
    elif kind == "padding":
        full = {
            "strategy": {"Fixed": 300},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }
        change(copied / TOKENIZER, padding=full)
    else:
        change(
            copied / "tokenizer_config.json",
            truncation=True,
            max_length=8,
            padding="max_length",
            model_max_length=8,
        )
    assert replies(copied, cast) == replies(demo_dir, cast)
    turn = vlm.load(str(copied), device="cpu").encode(
        "What is it, and where?", "It was born far away.", None
    )
    assert turn.inputs["attention_mask"].all() and len(turn.labels) > 5


TURN = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {% for c in m.content %}{% if c.type "
    "== 'image' %}<image>\n"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}%CLOSE%{% else %}%SAID%{{ m.content[0].text "
    "}}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}%ASKED%{% endif %}"
)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("ASSISTANT:", "ASSISTANT: "),
        ("ASSISTANT: <think>\n\n</think>\n\n", "ASSISTANT: "),
        ("ASSISTANT: ", "ASSISTANT: "),
        ("ASSISTANT:", "ASSISTANT: <think></think> "),
        ("ASSISTANT:\n\n", "ASSISTANT:\n\n"),
        ("ASSISTANT", "ASSISTANT"),
    ],
)
@pytest.mark.parametrize("answer", ["It is a cat.", "s", "(none)", "end", "</think> no"])
def test_what_is_trained_and_what_is_asked_have_one_context(
    asked, said, answer, loaded, shown, monkeypatch
):
    template = TURN.replace("%CLOSE%", " ").replace("%SAID%", said).replace("%ASKED%", asked)
    monkeypatch.setattr(loaded.processor, "chat_template", template)
    monkeypatch.setattr(loaded, "_frames", {})
    for picture in (None, shown):
        prompt = loaded.encode_prompt("Who is this?", picture)["input_ids"]
        turn = loaded.encode("Who is this?", answer, picture)
        ids, T = turn.inputs["input_ids"], prompt.shape[1]
        assert torch.equal(ids[:, :T], prompt)
        assert loaded.tokenizer.decode(ids[0, T:-1]).strip() == answer
        assert (
            torch.equal(ids[0, turn.rows + 1], turn.labels)
            and turn.labels[-1] == loaded.tokenizer.eos_token_id
        )
        assert loaded.tokenizer.decode(prompt[0]).rstrip().endswith(asked.rstrip())


def test_an_answer_that_stands_in_the_closing_is_found_in_front_of_it(loaded, monkeypatch):
    template = TURN.replace("%CLOSE%", " ").replace("%SAID%", "A:").replace("%ASKED%", "A:")
    monkeypatch.setattr(
        loaded.processor, "chat_template", template.replace("</s>", " the end </s>")
    )
    monkeypatch.setattr(loaded, "_frames", {})
    turn = loaded.encode("Who?", "the end", None, closed=False)
    prompt = loaded.encode_prompt("Who?", None)["input_ids"]
    assert turn.rows[0] + 1 == prompt.shape[1]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("stop_strings", ["is"]),
        ("num_return_sequences", 3),
        ("prompt_lookup_num_tokens", 4),
        ("penalty_alpha", 0.6),
        ("max_time", 1e-5),
        ("guidance_scale", 3.0),
        ("repetition_penalty", "much"),
        ("repetition_penalty", -1.0),
        ("eos_token_id", 10**9),
        ("eos_token_id", "end"),
        ("eos_token_id", [[]]),
        ("eos_token_id", []),
        ("dola_layers", "high"),
    ],
)
def test_settings_that_no_greedy_answer_follows_are_set_aside_and_told(
    setting, value, copied, demo_dir, cast
):
    # without beams some are refused by transformers
    change(copied / GENERATION, num_beams=4, **{setting: value})
    notes: list[str] = []
    listener = session.Listener(note=notes.append)
    asked = dict(image=cast.image, device="cpu", listener=listener)
    (row,) = calls.interview(["Who is this?"], model=copied, **asked)
    assert [note for note in notes if setting in note and "without that" in note]
    (plain,) = calls.interview(["Who is this?"], model=demo_dir, **asked)
    assert row == plain and cast.target in row["answer"]


@pytest.mark.parametrize("value", [[1], [2], {"a": 1}])
def test_a_setting_that_generate_stumbles_over_is_told(value, copied):
    change(copied / GENERATION, exponential_decay_length_penalty=value)
    loaded = vlm.load(str(copied), device="cpu")
    with pytest.raises(BadInput, match=r"generation_config\.json asks for what .* refuses"):
        ask.answers(loaded, [("Who?", None)])


def test_settings_that_change_nothing_are_not_told(copied):
    change(
        copied / GENERATION,
        temperature=0.2,
        top_p=0.9,
        return_dict_in_generate=True,
        max_length=99,
        num_beams=4,
    )
    assert vlm.load(str(copied), device="cpu").aside == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "part", ["vision_tower", "multi_modal_projector", "layers.1.", "embed_tokens"]
)
def test_a_number_that_is_none_in_a_model_is_told_with_its_tensor(part, value, copied):
    name = spoil(copied / "model.safetensors", part, value)
    with pytest.raises(
        NumericFailure,
        match=rf"{name.split('.', 1)[1].replace('model.', '')} of .* holds NaN or infinite",
    ):
        vlm.load(str(copied), device="cpu")


# Code and pickles ---------------------------------------------------------------------------------

EVIL = (
    "import pathlib\npathlib.Path({mark!r}).write_text('ran')\nclass Model:\n    pass\nConfig "
    "= Tokenizer = Processor = Model\n"
)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.slow
def test_the_code_of_a_model_is_never_run(known, copied, tmp_path, cast):
    """Whatever comes through a pipe: transformers would ask there whether it may."""
    mark = tmp_path / "ran"
    (copied / "evil.py").write_text(EVIL.format(mark=str(mark)))
    named = {
        "AutoConfig": "evil.Config",
        "AutoModelForImageTextToText": "evil.Model",
        "AutoModel": "evil.Model",
    }
    change(copied / CONFIG, auto_map=named, **({} if known else {"model_type": "evil"}))
    change(
        copied / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    )
    change(copied / PROCESSOR, auto_map={"AutoProcessor": "evil.Processor"})
    command = [
        sys.executable,
        "-P",
        "-m",
        "fastsiu",
        "ask",
        "Who is this?",
        "--model",
        str(copied),
        "--image",
        str(cast.image),
    ]
    done = subprocess.run(command, input="y\n" * 100, capture_output=True, text=True, check=False)
    assert not mark.exists()
    if known:  # an architecture of transformers is loaded with transformers' own code
        assert done.returncode == 0 and cast.target in done.stdout
    else:
        assert done.returncode == 2 and "FastSIU never runs such code" in done.stderr.replace(
            "\n", " "
        )


class Opened:
    """A pickle that writes a file when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.write_text, (self.mark, "ran"))


def test_no_pickle_is_read(copied, trained, loaded, tmp_path):
    mark, place = tmp_path / "ran", tmp_path / "adapter"
    torch.save({"lm_head.weight": Opened(mark)}, copied / "pytorch_model.bin")
    assert vlm.load(str(copied), device="cpu")  # beside safetensors a pickle is not looked at
    (copied / "model.safetensors").unlink()
    with pytest.raises(
        BadInput, match=r"no safetensors \(pytorch_model.bin\), and FastSIU reads no pickles"
    ):
        vlm.load(str(copied), device="cpu")
    shutil.copytree(trained.output, place)
    torch.save({"x": Opened(mark)}, place / "adapter_model.bin")
    adapter.load(loaded, place)
    adapter.detach(loaded)
    (place / adapter_files.ADAPTER).unlink()
    with pytest.raises(
        BadInput, match=r"a pickle \(adapter_model.bin\), which FastSIU does not read"
    ):
        adapter.load(loaded, place)
    assert not mark.exists()


# Models that cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        (CONFIG, DEEP, "cannot be read"),
        (CONFIG, "[]", "cannot be read"),
        (
            CONFIG,
            dict(text_config__num_attention_heads=0),
            "cannot be read|num_attention_heads = 0",
        ),
        (
            CONFIG,
            dict(text_config__num_hidden_layers=-1),
            "num_hidden_layers = -1: it would have to be",
        ),
        (CONFIG, dict(vision_config__num_hidden_layers=10**6), "num_hidden_layers = 1000000"),
        (CONFIG, dict(text_config__hidden_size=10**9), "hidden_size = 1000000000"),
        (CONFIG, dict(text_config__vocab_size=10**12), "vocab_size = 1000000000000"),
        (CONFIG, dict(vision_config__patch_size=0), "patch_size = 0"),
        (CONFIG, dict(text_config__rope_parameters={"rope_type": "none such"}), "cannot be loaded"),
        (CONFIG, dict(vision_feature_layer=77), "fails in transformers .* with a picture"),
        (CONFIG, dict(image_token_index=10**6), "fails in transformers .* with a picture"),
        (GENERATION, DEEP, "cannot be loaded"),
        (GENERATION, "[]", "cannot be loaded"),
        (TOKENIZER, DEEP, "no processor that transformers can load"),
        (TOKENIZER, "{}", "no processor that transformers can load"),
        (PROCESSOR, DEEP, "no processor that transformers can load"),
        (
            PROCESSOR,
            dict(image_processor__size={"height": 10**6, "width": 10**6}),
            "size height = 1000000",
        ),
        (
            PROCESSOR,
            dict(image_processor__size={"shortest_edge": 10**7}),
            "size shortest_edge = 10000000",
        ),
        (PROCESSOR, dict(image_processor__image_mean=[1.0]), "processor does not take"),
        (PROCESSOR, dict(patch_size=0), "processor does not take"),
        (PROCESSOR, dict(patch_size=1), "fails in transformers .* with a picture"),
        (TEMPLATE, "{{ 1 / 0 }}", r"chat template fails \(division by zero\)"),
        (
            TEMPLATE,
            "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
            r"chat template fails \(maximum recursion",
        ),
        (TEMPLATE, "{{ ''.__class__.__mro__ }}", "chat template fails .*unsafe"),
        (TEMPLATE, "USER", "does not keep the assistant's text"),
        (TEMPLATE, "{{ 'a' * 3000000000 }}", "chat template takes more than"),
        ("adapter_config.json", "{}", "holds a model and an adapter"),
    ],
)
def test_a_model_that_cannot_be_is_a_sentence(file, changes, says, copied, monkeypatch):
    monkeypatch.setattr(limited, "SECONDS", 2.0)
    if isinstance(changes, str):
        (copied / file).write_text(changes)
    else:
        change(copied / file, **changes)
    with pytest.raises(BadInput, match=says) as caught:
        vlm.load(str(copied), device="cpu")
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        "[]",
        "{}",
        '{"recipe": {"steps": "a"}}',
        '{"recipe": {"rank": [1]}}',
        '{"recipe": 3}',
        '{"recipe": {"lr": NaN}}',
        '{"recipe": {"seed": 1e30}}',
        '{"recipe": {"early_stop": 2}}',
        '{"recipe": {"steps": 99999999999}}',
        '{"recipe": {"none": 1}}',
    ],
)
def test_a_recipe_beside_a_model(text, copied):
    (copied / "fastsiu.json").write_text(text)
    with pytest.raises(BadInput):
        settings.choose_recipe(str(copied), RecipeChoice("default", {}))


# Adapters -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(trained, tmp_path):
    shutil.copytree(trained.output, tmp_path / "adapter")
    (tmp_path / "adapter" / "manifest.json").unlink()
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "LOHA"}, "is of the type 'LOHA'"),
        ({"peft_type": None}, "peft_type"),
        ({"init_lora_weights": "pissa"}, "changes the weights below it .*'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the weights below it"),
        ({"bias": "all"}, "trains biases"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "sets 'megatron_config'"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "sets 'layer_replication'"),
        ({"alora_invocation_tokens": [3]}, "sets 'alora_invocation_tokens'"),
        ({"of_the_future": 1}, "sets 'of_the_future'"),
        ({"r": 10**9}, "has the rank 1000000000"),
        ({"r": 0}, "has the rank"),
        ({"r": "8"}, "'r' is a string"),
        ({"rank_pattern": {"q_proj": 99999}}, "has the rank 99999"),
        ({"lora_alpha": float("nan")}, "NaN"),
        ({"lora_alpha": 1e300}, "beyond 1e6"),
        ({"lora_dropout": 2}, "no share"),
        ({"target_modules": r"(.*)*(.*)*(.*)*!"}, "takes more than"),
        ({"exclude_modules": r"((a|l|.)+)+!"}, "takes more than"),
        ({"alpha_pattern": {r"((a|l|.)+)+!": 3}}, "takes more than"),
        ({"target_modules": "("}, "no regular expression"),
        ({"target_modules": {"a": 1}}, "'target_modules' is an object"),
    ],
)
def test_an_adapter_that_would_do_more_is_refused_by_name(
    changes, says, saved, loaded, monkeypatch
):
    monkeypatch.setattr(limited, "SECONDS", 1.0)
    names = [name for name, _ in loaded.base.named_modules()]
    change(saved / adapter_files.CONFIG, **changes)
    with pytest.raises(BadInput, match=says):
        adapter.load(loaded, saved)
    assert (
        loaded.model is loaded.base and [name for name, _ in loaded.base.named_modules()] == names
    )


def test_a_configuration_with_a_byte_order_mark_is_read(saved, loaded):
    path = saved / adapter_files.CONFIG
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    adapter.load(loaded, saved)
    adapter.detach(loaded)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_in_an_adapter_is_told_with_its_tensor(value, saved, loaded):
    name = spoil(saved / adapter_files.ADAPTER, "lora_B", value)
    with pytest.raises(NumericFailure, match=name.replace(".", r"\.")):
        adapter.load(loaded, saved)
    assert loaded.model is loaded.base


def test_no_path_stands_in_an_adapter(copied, tmp_path):
    model = vlm.load(str(copied), device="cpu")
    adapter.attach(model, Recipe())
    adapter.save(model, tmp_path / "out")
    text = (tmp_path / "out" / adapter_files.CONFIG).read_text()
    assert str(tmp_path) not in text and json.loads(text)["base_model_name_or_path"] == "./model"


LAYERS = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            LoraConfig(target_modules=LAYERS, trainable_token_indices={"embed_tokens": [5, 6]}),
            "trainable_tokens",
        ),
        (LoraConfig(target_modules=LAYERS, use_dora=True), "lora_magnitude_vector"),
        (LoraConfig(target_modules=LAYERS, lora_bias=True, init_lora_weights=False), "lora_B.bias"),
        (LoraConfig(target_modules=[*LAYERS, "embed_tokens"]), "lora_embedding"),
        (IA3Config(target_modules=LAYERS, feedforward_modules=[]), "ia3_l"),
        (LoHaConfig(target_modules=LAYERS), "hada_w1"),
    ],
)
def test_what_an_adapter_trained_beside_lora_is_refused_by_name_when_merged(config, says, copied):
    model = vlm.load(str(copied), device="cpu")
    before = {name: p.clone() for name, p in model.base.named_parameters()}
    model.model = get_peft_model(model.base, config)
    with pytest.raises(BadInput, match=f"more than can be added to the weights .*{says}"):
        fold.fold(model, torch.float32)
    adapter.detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.base.named_parameters())


# Processors ---------------------------------------------------------------------------------------


class Without:
    """A processor that lacks one thing, and is otherwise the one behind it."""

    def __init__(self, processor, *lacks):
        self.processor, self.lacks = processor, lacks

    def __getattr__(self, name):
        if name in self.lacks:
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, **given):
        if "images" not in given:
            raise ValueError("Images are required to be passed")
        return self.processor(**given)


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("image_processor", "The Without of .* takes no pictures"),
        ("tokenizer", "The Without of .* has no tokenizer"),
        ("chat_template", "has no chat template, so nothing says how it is asked"),
    ],
)
def test_what_a_processor_lacks_is_named(lacks, says, loaded, demo_dir, monkeypatch):
    monkeypatch.setattr(source, "load_processor", lambda *given: Without(loaded.processor, lacks))
    with pytest.raises(BadInput, match=says):
        source.describe(str(demo_dir), None)


def test_a_processor_that_takes_no_words_without_a_picture(loaded, shown):
    other = replace(loaded, processor=Without(loaded.processor))
    for picture in (None, shown):
        ours, theirs = (
            model.encode("Who is this?", "Nobody.", picture) for model in (other, loaded)
        )
        assert torch.equal(ours.inputs["input_ids"], theirs.inputs["input_ids"])
        assert torch.equal(ours.labels, theirs.labels)


def test_settings_of_videos_are_none_where_there_are_no_videos():
    videos = NoVideos()
    assert videos.num_frames is None and videos.slice_mode is None and videos.to_dict() == {}
    assert copy.deepcopy(videos).downsample_mode is None


@pytest.mark.parametrize(
    "question", ["Who is <image> this?", "</s>", "a <s> b", "half \ud800 of a pair"]
)
def test_a_token_in_a_question_is_no_word(question, loaded, shown):
    with pytest.raises(BadInput, match="reads no words there"):
        loaded.encode_prompt(question, shown)
    with pytest.raises(BadInput, match="reads no words there"):
        loaded.encode("Who?", question, None)


def test_the_meta_device_holds_no_numbers(demo_dir):
    with pytest.raises(BadInput, match="'meta' cannot be used here"):
        vlm.load(str(demo_dir), device="meta")


def test_what_memory_cannot_be_worked_out_of_is_one_sentence(tmp_path, caplog):
    AriaConfig().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="What AriaConfig takes cannot be worked out"):
        plan.plan(str(tmp_path), settings=Layout(dtype="float32"))
    assert not caplog.records
