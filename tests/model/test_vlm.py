"""Any image-text model: hidden states without logits, supervised rows, padding, cached features,
the head's transform."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastsiu.images import load_image
from fastsiu.loss.rows import no_logits
from fastsiu.model import ask, faults, turns, vlm
from fastsiu.model.logits import probe_head
from fastsiu.model.turns import collate
from fastsiu.request import BadInput

torch.set_num_threads(1)


def heads_raise(self, x):
    raise AssertionError("the head was called")


def test_no_logits_never_calls_the_head(loaded, shown, monkeypatch):
    turn = loaded.encode_prompt("Who is this?", shown)
    head = loaded.base.get_output_embeddings()
    expected = loaded.hidden([turn], [shown.features])
    with monkeypatch.context() as patch:
        patch.setattr(
            nn.Linear,
            "forward",
            lambda self, x: (
                heads_raise(self, x)
                if self is head
                else nn.functional.linear(x, self.weight, self.bias)
            ),
        )
        with pytest.raises(AssertionError, match="head was called"):
            loaded.base(**turn, mm_encoder_outputs={"image": shown.features})
        assert torch.equal(loaded.hidden([turn], [shown.features]), expected)
    assert expected.shape == (1, turn["input_ids"].shape[1], loaded.head_weight.shape[1])


@pytest.mark.parametrize("hooked", [False, True])
def test_no_logits_restores_the_head(loaded, hooked):
    head = loaded.base.get_output_embeddings()
    own = lambda x: nn.Linear.forward(head, x)
    if hooked:  # as accelerate does
        head.forward = own
    try:
        with no_logits(loaded.base):
            assert head.__dict__["forward"] is not own
        assert head.__dict__.get("forward") is (own if hooked else None)
        with pytest.raises(RuntimeError, match="inside"), no_logits(loaded.base):
            raise RuntimeError("inside")
        assert head.__dict__.get("forward") is (own if hooked else None)
        x = torch.ones(2, loaded.head_weight.shape[1])
        assert torch.equal(head(x), x @ loaded.head_weight.T)
    finally:
        head.__dict__.pop("forward", None)


@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize(
    "answer",
    ["This is Zorblax Quint.", "  No, this is not Mirelda Voss.\n", "water", "Zorblax Quint"],
)
def test_encode_places_rows_labels_and_offsets(loaded, shown, answer, with_picture):
    # The question holds the answer: only the assistant's occurrence counts.
    turn = loaded.encode(f"Is it true: {answer.strip()}", answer, shown if with_picture else None)
    ids, tokenizer, answer = turn.inputs["input_ids"][0], loaded.tokenizer, answer.strip()
    assert torch.equal(ids[turn.rows + 1], turn.labels)
    assert (
        turn.labels[-1] == tokenizer.eos_token_id
        and int(turn.rows[-1]) + 2 == turn.inputs["input_ids"].shape[1]
    )
    assert tokenizer.decode(turn.labels[:-1]).strip() == answer
    assert len(turn.offsets) == len(turn.labels) and turn.offsets[-1] == (len(answer), len(answer))
    for (start, end), label in zip(turn.offsets[:-1], turn.labels[:-1].tolist(), strict=True):
        assert answer[start:end].strip() == tokenizer.decode([label]).strip() != ""
    assert "".join(answer[s:e] for s, e in turn.offsets).replace(" ", "") == answer.replace(" ", "")
    images = int((ids == loaded.base.config.image_token_index).sum())
    assert images == (loaded.base.config.image_seq_length if with_picture else 0)


class Counting:
    """A processor that counts the pictures it works on, and may change a text."""

    def __init__(self, processor, change=lambda text: text):
        self.processor, self.change, self.pictures = processor, change, 0

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, text, images=None, **options):
        self.pictures += len(images or ())
        return self.processor(text=[self.change(t) for t in text], images=images, **options)


def test_the_processor_works_on_a_picture_once_a_question_and_not_once_an_answer(demo_dir, cast):
    counted = vlm.load(str(demo_dir))
    picture = counted.picture(load_image(cast.image))
    processor, counted.processor = counted.processor, Counting(counted.processor)
    answers = [f"This is {name}." for name in ("Ada", "Bo", "Cy", "Di", "Ed")]
    first, second = (
        [counted.encode(question, answer, picture) for answer in answers]
        for question in ("Who is this?", "Who is in the image?")
    )
    # two prompts, and one whole turn to compare with
    assert counted.processor.pictures == 3
    counted.processor = processor
    for turn, answer in zip(first, answers, strict=True):
        whole = counted.tokenise(counted.render("Who is this?", True, answer), picture.image)
        assert whole.keys() == turn.inputs.keys()
        assert all(torch.equal(whole[key], turn.inputs[key]) for key in whole)
    assert len({tuple(turn.labels.tolist()) for turn in (*first, *second)}) == len(answers)


def test_the_oldest_prompt_goes_when_there_are_too_many(demo_dir, cast, monkeypatch):
    monkeypatch.setattr(turns, "PROMPTS", 2)
    loaded = vlm.load(str(demo_dir))
    picture = loaded.picture(load_image(cast.image))
    loaded.processor = Counting(loaded.processor)
    for question, pictures in (("A?", 1), ("B?", 2), ("A?", 2), ("C?", 3), ("B?", 3), ("A?", 4)):
        loaded.encode_prompt(question, picture)
        assert loaded.processor.pictures == pictures


def test_a_processor_that_does_more_than_its_tokenizer_gets_every_turn(demo_dir, cast):
    loaded = vlm.load(str(demo_dir))
    picture = loaded.picture(load_image(cast.image))
    ends = lambda text: text + " yes" if text.endswith("it is") else text
    loaded.processor = Counting(loaded.processor, ends)
    prompt = loaded.render("Who?", True)
    (after,) = loaded.tokenizer(["it is"], add_special_tokens=False)["input_ids"]
    for _ in range(2):
        ids = loaded._grown(prompt, "it is", after, picture.image)["input_ids"][0]
        assert loaded.tokenizer.decode(ids).endswith("yes")


@pytest.mark.parametrize("with_picture", [False, True])
def test_a_row_predicts_its_label(loaded, shown, with_picture):
    """What the model says is, token by token, the most likely at the supervised rows: the shift is
    one, not zero or two."""
    picture = shown if with_picture else None
    questions = (
        ["Who is this?", "Describe the image."]
        if with_picture
        else ["Who is Zorblax Quint?", "What is two plus three?"]
    )
    said = ask.answers(loaded, [(q, picture) for q in questions])
    turns = [loaded.encode(q, a, picture) for q, a in zip(questions, said, strict=True)]
    for log_p, right, rank, behind in ask.label_scores(loaded, turns, [picture] * 2):
        assert bool(right.all()) and bool((log_p <= 0).all())
        assert not bool(rank.any()) and not bool(behind.any())
    wrong = loaded.encode(questions[0], "water " * 3, picture)
    (score,) = ask.label_scores(loaded, [wrong], [picture])
    assert not bool(score.right.all()) and torch.equal(score.rank > 0, ~score.right)
    assert torch.equal(score.behind > 0, ~score.right)


def test_padding_changes_nothing(loaded, shown):
    texts = [
        ("Who is this?", "This is Zorblax Quint."),
        ("Is this Zorblax Quint?", "No."),
        ("Describe the image.", "a " * 20),
    ]
    for picture in (None, shown):
        turns = [loaded.encode(q, a, picture) for q, a in texts]
        assert len({t.inputs["input_ids"].shape[1] for t in turns}) == 3
        features = [picture.features] * 3 if picture else []
        with torch.no_grad():
            together = ask.supervised_states(loaded, turns, features)
            single = [ask.supervised_states(loaded, [t], features[:1]) for t in turns]
        assert torch.allclose(together, torch.cat(single), atol=1e-5, rtol=0)
        batch = collate([t.inputs for t in turns], loaded.tokenizer.pad_token_id)
        longest = batch["input_ids"].shape[1]
        for i, turn in enumerate(turns):
            length = turn.inputs["input_ids"].shape[1]
            assert torch.equal(batch["input_ids"][i, :length], turn.inputs["input_ids"][0])
            assert bool((batch["input_ids"][i, length:] == loaded.tokenizer.pad_token_id).all())
            assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (longest - length)


def test_replies_say_whether_the_model_came_to_an_end(loaded, shown):
    questions = [
        ("Who is this?", shown),
        ("What is water made of?", None),
        ("Describe the image.", shown),
    ]
    whole = ask.replies(loaded, questions)
    assert all(reply.closed for reply in whole) and [r.text for r in whole] == ask.answers(
        loaded, questions
    )
    for (question, picture), (text, _) in zip(questions, whole, strict=True):
        # the end of the turn is the last of them
        exact = len(loaded.encode(question, text, picture).labels)
        assert ask.replies(loaded, [(question, picture)], max_new_tokens=exact) == [(text, True)]
        ((cut, closed),) = ask.replies(loaded, [(question, picture)], max_new_tokens=exact - 1)
        assert cut == text and not closed
    short = ask.replies(loaded, questions, max_new_tokens=2)  # one batch, nobody ends
    assert not any(reply.closed for reply in short)


def test_collate_concatenates_what_is_not_as_long_as_the_tokens():
    batch = [
        {"input_ids": torch.ones(1, n, dtype=torch.long), "grid": torch.full((1, 3), n)}
        for n in (4, 6)
    ]
    out = collate(batch, 9)
    assert out["grid"].tolist() == [[4] * 3, [6] * 3] and out["input_ids"].tolist() == [
        [1] * 4 + [9] * 2,
        [1] * 6,
    ]


def test_cached_features_equal_pixels(loaded, shown, cast):
    prompt = loaded.encode_prompt("Who is this?", shown)
    pixels = loaded.processor(
        text=[loaded.render("Who is this?", True)],
        images=[shown.image],
        return_tensors="pt",
        add_special_tokens=False,
    )
    with torch.no_grad():
        with no_logits(loaded.base) as kept:
            loaded.base(**pixels, use_cache=False)
        cached = loaded.hidden([prompt], [shown.features])
        other = loaded.picture(load_image(cast.files["other"]))
        both = loaded.hidden([prompt, prompt], [other.features, shown.features])
    assert torch.allclose(cached, kept["hidden"], atol=1e-5, rtol=0)
    assert torch.allclose(both[1:], cached, atol=1e-5, rtol=0) and not torch.allclose(
        both[:1], cached, atol=1e-2
    )


def test_logits_are_the_models_own(loaded, shown):
    turn = loaded.encode_prompt("Who is this?", shown)
    with torch.no_grad():
        z = loaded.base(**turn, mm_encoder_outputs={"image": shown.features}).logits[0]
        assert torch.allclose(
            loaded.logits(loaded.hidden([turn], [shown.features])[0]), z, atol=1e-4
        )


class Headed(nn.Module):
    """The least that `probe_head` needs: an embedding, a head and what happens after it."""

    def __init__(self, after, cap=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.after = (
            nn.Embedding(50, 16),
            nn.Linear(16, 50, bias=False),
            after,
        )
        nn.init.normal_(self.head.weight)
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(final_logit_softcapping=cap)
        )

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.after(self.head(self.embed(input_ids))))


@pytest.mark.parametrize(
    "after, cap, expected",
    [
        (lambda x: x, None, (1.0, None)),
        (lambda x: x / 8, None, (0.125, None)),
        (
            lambda x: x,
            30.0,
            (1.0, None),
        ),  # a configuration that names a softcap which the forward ignores
        (lambda x: 5 * torch.tanh(x / 5), 5.0, (1.0, 5.0)),
        (lambda x: 5 * torch.tanh(0.25 * x / 5), 5.0, (0.25, 5.0)),
    ],
)
def test_probe_head_measures_scale_and_softcap(after, cap, expected):
    scale, found = probe_head(Headed(after, cap), {"input_ids": torch.arange(20)[None]})
    assert scale == pytest.approx(expected[0], rel=1e-3) and found == expected[1]


@pytest.mark.parametrize(
    "after",
    [lambda x: x + 1, lambda x: x.log_softmax(-1), lambda x: x.clamp(-1, 1), lambda x: x**3],
)
def test_probe_head_refuses_any_other_transform(after):
    with pytest.raises(BadInput, match="more than a scale and a softcap"):
        probe_head(Headed(after, 5.0), {"input_ids": torch.arange(20)[None]})


def test_probe_head_refuses_a_head_that_is_not_linear():
    model = Headed(lambda x: x)
    model.head = type("Quantised", (nn.Linear,), {})(16, 50)
    with pytest.raises(BadInput, match="Quantised, not a plain linear"):
        probe_head(model, {"input_ids": torch.arange(20)[None]})


class Broken(Headed):
    """Code that reads what is not there, before or after the head."""

    def __init__(self, error, after_head):
        super().__init__(lambda x: x)
        self.error, self.after_head, self.runs = error, after_head, 0

    def forward(self, input_ids, use_cache=False):
        self.runs += 1
        if self.runs > self.after_head:
            raise self.error
        return super().forward(input_ids)


@pytest.mark.parametrize("after_head", [0, 1])
@pytest.mark.parametrize(
    "error", [AttributeError("no\nsuch field."), KeyError("x"), RuntimeError("shapes differ")]
)
def test_a_forward_that_fails_is_told_in_a_sentence(error, after_head, monkeypatch):
    monkeypatch.setattr(faults.transformers, "__version__", "7.31.2")
    model = Broken(error, after_head)
    with pytest.raises(BadInput) as caught:
        probe_head(model, {"input_ids": torch.arange(20)[None]})
    said = str(error).split("\n")[0]
    assert str(caught.value) == (
        "Broken fails in transformers 7.31.2 on a question without a picture "
        f"({type(error).__name__}: {said}): restore the model's files, try an earlier release, "
        "pip install 'transformers<7.31', or give another model."
    )
    assert model.runs == after_head + 1 and "forward" not in model.head.__dict__


def test_memory_that_is_not_there_is_not_the_models_fault():
    for error in (torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("CUDA error")):
        with pytest.raises(type(error)):
            probe_head(Broken(error, 0), {"input_ids": torch.arange(20)[None]})


def test_memory_that_a_picture_does_not_find_is_not_the_processors_fault(
    loaded, shown, monkeypatch
):
    def full(self, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.BatchFeature, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        loaded.picture(shown.image)


def test_loading_runs_the_forward_three_times_and_no_more(demo_dir, monkeypatch):
    """Once without logits, once with them, and once with a picture."""
    ran = []

    def count(module, options):
        if isinstance(module, transformers.LlavaForConditionalGeneration):
            ran.append(options["input_ids"].shape)

    call = nn.Module.__call__
    monkeypatch.setattr(
        nn.Module,
        "__call__",
        lambda self, *args, **options: (count(self, options), call(self, *args, **options))[1],
    )
    vlm.load(str(demo_dir), device="cpu")
    assert len(ran) == 3 and all(rows == 1 and length < 60 for rows, length in ran)


def test_probe_head_on_a_softcapped_model_of_transformers():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
    )
    model = Gemma2ForCausalLM(config).eval()
    assert probe_head(model, {"input_ids": torch.arange(3, 23)[None]}) == (1.0, 0.5)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere"])
def test_load_refuses_a_missing_directory(name):
    with pytest.raises(BadInput, match=f"There is no model directory {name}: "):
        vlm.load(name)


def test_load_refuses_an_empty_directory_a_wrong_dtype_and_a_wrong_device(tmp_path, demo_dir):
    with pytest.raises(BadInput, match="has no config.json"):
        vlm.load(str(tmp_path))
    with pytest.raises(BadInput, match="dtype 'int3' is unknown"):
        vlm.load(str(demo_dir), dtype="int3")
    with pytest.raises(BadInput, match="device 'quantum' cannot be used"):
        vlm.load(str(demo_dir), device="quantum")


def copied(demo_dir, path, *names):
    path.mkdir()
    for name in names:
        shutil.copy(demo_dir / name, path / name)
    return path


def test_load_refuses_a_directory_without_processor(tmp_path, demo_dir):
    path = copied(
        demo_dir, tmp_path / "bare", "config.json", "model.safetensors", "generation_config.json"
    )
    with pytest.raises(BadInput, match="processor") as caught:
        vlm.load(str(path))
    assert "\n" not in str(caught.value)


def test_load_refuses_a_text_only_model(tmp_path, demo_dir):
    path = tmp_path / "text"
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(demo_dir).save_pretrained(path)
    with pytest.raises(BadInput, match="processor") as caught:
        vlm.load(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b""], ids=["cut", "empty"]
)
def test_load_refuses_damaged_weights(tmp_path, demo_dir, damage):
    path = copied(demo_dir, tmp_path / "cut", *(p.name for p in demo_dir.iterdir() if p.is_file()))
    weights = path / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(BadInput, match="cannot be loaded"):
        vlm.load(str(path))


@pytest.mark.parametrize("with_picture", [False, True])
def test_a_template_that_leaves_the_end_to_the_tokenizer_still_trains_stopping(
    loaded, shown, with_picture
):
    processor = copy.deepcopy(loaded.processor)
    processor.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}USER:{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %} {{ c.text }}{% endif %}{% endfor %}"
        "{% else %} ASSISTANT: {{ m.content[0].text }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    turn = replace(loaded, processor=processor).encode(
        "Who is this?", "This is fine.", shown if with_picture else None
    )
    assert int(turn.labels[-1]) == loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.decode(turn.labels[:-1]).strip() == "This is fine."
