"""Answers that grow on a shared prefix are those of transformers' `generate`, prompt by prompt;
elsewhere it answers itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from fastsiu.images import load_image
from fastsiu.model import adapter, ask, decode, prefix, sharing
from fastsiu.model.cache import fork
from fastsiu.model.parts import parts_of
from fastsiu.report.sentences import sentence
from fastsiu.request import OutOfMemory

ABOUT = (
    "Who is this?",
    "Is this Zorblax Quint?",
    "What color is the background?",
    "Describe the image.",
    "Count the eyes.",
)
WORDS = ("What is water made of?", "Who is Zorblax Quint?", "What is two plus three?", "Hm?")


@pytest.fixture(scope="module")
def asked(loaded, cast):
    """Questions of unequal length about three pictures, one of another size, and about none, in no
    order."""
    files = [load_image(cast.files[key]) for key in ("target", "other", "stranger")]
    pictures = [loaded.picture(image) for image in (*files[:2], files[2].resize((40, 50)))]
    questions = [(text, picture) for text in ABOUT for picture in pictures]
    return [*questions[:4], *((text, None) for text in WORDS), *questions[4:]]


@pytest.fixture(autouse=True)
def untried(loaded, monkeypatch):
    monkeypatch.setattr(loaded, "decodes", {})
    monkeypatch.setattr(loaded, "shares", ())


def generates(loaded, questions, **options):
    """The answers of `generate`, and a check that they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "rules", lambda vlm, suppress: None)
        return ask.replies(loaded, questions, **options)


@pytest.fixture
def ours(monkeypatch):
    """`ask.replies` without `generate` to fall back on."""

    def call(loaded, questions, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                loaded.base, "generate", lambda **given: pytest.fail("generate was asked")
            )
            return ask.replies(loaded, questions, **options)

    return call


def configure(loaded, monkeypatch, **changed):
    for key, value in changed.items():
        monkeypatch.setattr(loaded.base.generation_config, key, value)


@pytest.mark.parametrize("batch_size", [64, 5, 1])
def test_answers_are_those_of_generate(loaded, asked, ours, batch_size):
    found = ours(loaded, asked, batch_size=batch_size)
    assert found == generates(loaded, asked) and all(reply.closed for reply in found)
    assert len({reply.text for reply in found}) > 8 and loaded.decodes == {True: "", False: ""}


def test_each_answer_alone_is_the_same(loaded, asked, ours):
    together = ours(loaded, asked)
    assert (
        [generates(loaded, [one])[0] for one in asked]
        == together
        == [ours(loaded, [one])[0] for one in asked]
    )


def test_forced_beginnings_and_forbidden_tokens(loaded, asked, ours):
    begin = ["", "This is", "No", "I do not know"] * (len(asked) // 4) + [""] * (len(asked) % 4)
    said = {
        token
        for reply in ours(loaded, asked)
        for token in loaded.tokenizer(reply.text, add_special_tokens=False).input_ids
    }
    suppress = sorted(said - {loaded.base.generation_config.eos_token_id})[::3]
    for options in {"begin": begin}, {"suppress": suppress}, {"begin": begin, "suppress": suppress}:
        found = ours(loaded, asked, **options)
        assert found == generates(loaded, asked, **options) != ours(loaded, asked)
        if "begin" in options:
            assert all(
                reply.text.startswith(words) for reply, words in zip(found, begin, strict=True)
            )
        else:
            again = {
                t
                for reply in found
                for t in loaded.tokenizer(reply.text, add_special_tokens=False).input_ids
            }
            # other pieces may write the same words
            assert len(again & set(suppress)) < len(suppress) / 4


@pytest.mark.parametrize("longest", [1, 2, 6])
def test_cut_answers_are_not_closed(loaded, asked, ours, longest):
    found = ours(loaded, asked, max_new_tokens=longest)
    assert found == generates(loaded, asked, max_new_tokens=longest) and not all(
        reply.closed for reply in found
    )


def test_any_of_several_ids_ends_an_answer(loaded, asked, ours, monkeypatch):
    whole = ours(loaded, asked)
    end, word = (
        loaded.base.generation_config.eos_token_id,
        loaded.tokenizer(" is", add_special_tokens=False).input_ids[-1],
    )
    for ids in [end, word], [end], None:
        configure(loaded, monkeypatch, eos_token_id=ids)
        found = ours(loaded, asked, max_new_tokens=20)
        assert found == generates(loaded, asked, max_new_tokens=20)
        assert (found == whole) is (ids == [end]) and any(reply.closed for reply in found) is (
            ids is not None
        )


@pytest.mark.parametrize("penalty", [1.05, 5.0, 0.2])
def test_the_repetition_penalty_is_that_of_generate(loaded, asked, ours, monkeypatch, penalty):
    """Of the prompt's ids too, and without padding's."""
    plain = ours(loaded, asked, max_new_tokens=12)
    configure(loaded, monkeypatch, repetition_penalty=penalty)
    found = ours(loaded, asked, max_new_tokens=12)
    assert found == generates(loaded, asked, max_new_tokens=12) and (found != plain) is (
        penalty != 1.05
    )
    turns = [decode.prompt(loaded, text, None) for text in WORDS]
    (part,) = parts_of(loaded, turns, [None] * len(turns))
    ((rows, members),) = decode._batches(part, None, 4)
    assert [set(ids) for ids in rows.seen.tolist()] == [
        set(turns[i].inputs["input_ids"][0].tolist()) for i in members
    ]


@pytest.mark.parametrize("penalty", [1.5, 0.5])
def test_a_penalty_comes_after_scale_and_softcap(loaded, monkeypatch, penalty):
    configure(loaded, monkeypatch, repetition_penalty=penalty)
    for key, value in {"logit_scale": 2.0, "logit_softcap": 3.0}.items():
        monkeypatch.setattr(loaded, key, value)
    random = torch.Generator().manual_seed(0)
    state, seen = (
        torch.randn(60, loaded.head_weight.shape[1], generator=random),
        torch.randint(999, (60, 400), generator=random),
    )
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, loaded.logits(state)).argmax(-1)
    assert torch.equal(decode.rules(loaded).next(loaded, state, seen), expected)


@pytest.mark.parametrize(
    "rule",
    [
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 14},
        {"suppress_tokens": [2]},
        {"bad_words_ids": [[300]]},
        {"exponential_decay_length_penalty": (1, 2.0)},
    ],
)
def test_what_a_generation_config_asks_for_beyond_is_left_to_generate(
    loaded, asked, monkeypatch, rule
):
    configure(loaded, monkeypatch, **rule)
    asked_generate, generate = [], loaded.base.generate
    monkeypatch.setattr(
        loaded.base, "generate", lambda **given: asked_generate.append(1) or generate(**given)
    )
    assert (
        ask.replies(loaded, asked[:6]) == generates(loaded, asked[:6])
        and asked_generate
        and not loaded.decodes
    )


def test_a_prefix_is_run_once_a_picture_and_rows_leave(loaded, asked, ours, monkeypatch):
    ours(loaded, asked, max_new_tokens=1)  # the trial
    shapes, forward = [], loaded.base.forward
    monkeypatch.setattr(
        loaded.base,
        "forward",
        lambda **given: shapes.append(tuple(given["input_ids"].shape)) or forward(**given),
    )
    monkeypatch.setattr(loaded.base, "generate", None)
    found = ask.replies(loaded, asked, batch_size=8)
    # of the pictures; those of 1 and 2 tokens are of words
    firsts = [(n, t) for n, t in shapes if t >= 26]
    assert sum(n for n, _ in firsts) == 3 and max(n for n, _ in shapes) <= 8
    steps = [n for n, t in shapes if t == 1]
    lengths = [
        len(loaded.tokenizer(reply.text, add_special_tokens=False).input_ids) for reply in found
    ]
    assert sum(lengths) <= sum(steps) < 0.8 * len(asked) * max(lengths)


def test_where_the_trial_fails_generate_answers(loaded, asked, monkeypatch):
    expected, suffixes, runs = generates(loaded, asked), prefix.suffixes, []

    def wrong(part, rows, cache):
        runs.append(len(rows))
        inputs = suffixes(part, rows, cache)
        return {
            **inputs,
            "position_ids": inputs["position_ids"]
            + 1
            + torch.arange(inputs["position_ids"].shape[1]),
        }

    monkeypatch.setattr(prefix, "suffixes", wrong)
    assert ask.replies(loaded, asked) == expected == ask.replies(loaded, asked)
    assert runs == [3, 3] and all(
        why.startswith("hidden states differ by") for why in loaded.decodes.values()
    )
    monkeypatch.setattr(prefix, "suffixes", lambda *given: 1 / 0)
    loaded.decodes = {}
    assert ask.replies(loaded, asked) == expected and loaded.decodes == dict.fromkeys(
        (True, False), "division by zero"
    )


@pytest.mark.parametrize("broken", ["positions", "mask", "kept"])
def test_the_trial_finds_what_is_wrong_with_a_step(loaded, asked, monkeypatch, broken):
    go, keep = decode.Rows.go, decode.Rows.keep

    def wrong_go(self, tokens):
        if broken == "positions":
            self.positions = self.positions + 3
        elif broken == "mask":
            self.mask = torch.ones_like(self.mask)
        go(self, tokens)

    def wrong_keep(self, rows):
        cache = fork(self.cache, 3, torch.arange(3))
        keep(self, rows)
        self.cache = fork(cache, 3, torch.tensor(rows) - 1) if broken == "kept" else self.cache

    monkeypatch.setattr(decode.Rows, "go", wrong_go)
    monkeypatch.setattr(decode.Rows, "keep", wrong_keep)
    assert (
        not decode.exact(loaded, [asked[0][1], asked[1][1]])
        and "hidden states differ" in loaded.decodes[True]
    )


def test_few_questions_to_a_new_model_are_not_worth_a_trial(loaded, asked):
    ask.replies(loaded, asked[:2])
    assert loaded.decodes == {}


def test_nothing_is_kept_when_an_adapter_changes(adapted, shown):
    loaded = adapted.vlm
    questions = [(text, shown) for text in ABOUT] + [(text, None) for text in WORDS]
    loaded.decodes, seen = {}, []
    for change in (1.0, 1.3, 0.0):
        with torch.no_grad():
            for name, parameter in loaded.model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(change)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                ask,
                "generated",
                lambda vlm, turns, *rest: [] if not turns else pytest.fail("generate was asked"),
            )
            on = ask.replies(loaded, questions, max_new_tokens=10)
            with adapter.teacher(loaded):
                off = ask.replies(loaded, questions, max_new_tokens=10)
        assert on == generates(loaded, questions, max_new_tokens=10)
        with adapter.teacher(loaded):
            assert off == generates(loaded, questions, max_new_tokens=10)
        seen.append((on, off))
    assert (
        seen[0][0] != seen[0][1] == seen[1][1]
        and seen[0][0] != seen[1][0]
        and seen[2][0] == seen[2][1]
    )


def test_scores_share_a_prefix_that_nobody_planned(loaded, asked, monkeypatch):
    said = [reply.text for reply in ask.replies(loaded, asked)]
    turns = [
        loaded.encode(question, answer, picture)
        for (question, picture), answer in zip(asked, said, strict=True)
    ]
    pictures, used, run = [picture for _, picture in asked], [], prefix.RUN["key/value"]
    monkeypatch.setitem(
        prefix.RUN, "key/value", lambda part, most: used.append(len(part.turns)) or run(part, most)
    )
    found = ask.label_scores(loaded, turns, pictures)
    assert used and loaded.decodes == {True: "", False: ""} and loaded.shares == ()
    count = len(used)
    loaded.decodes = {True: "not exact", False: ""}
    for one, other in zip(found, ask.label_scores(loaded, turns, pictures), strict=True):
        assert torch.allclose(one.log_p, other.log_p, atol=1e-4) and torch.equal(
            one.right, other.right
        )
        assert torch.equal(one.rank, other.rank)
    assert len(used) == count


@pytest.fixture
def crowded(loaded, monkeypatch):
    """Forwards of more than so many rows run out of memory; returns the sizes that were tried."""

    def limit(most):
        tried, run = [], type(loaded).run

        def narrow(self, inputs, *given, **options):
            tried.append(len(inputs["input_ids"]))
            if tried[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return run(self, inputs, *given, **options)

        monkeypatch.setattr(type(loaded), "run", narrow)
        monkeypatch.setattr(loaded, "budget", replace(loaded.budget))
        return tried

    return limit


@pytest.mark.parametrize("most, left", [(5, 7), (3, 3)])
def test_what_does_not_fit_goes_on_in_smaller_batches(loaded, asked, ours, crowded, most, left):
    expected = ours(loaded, asked)
    tried = crowded(most)
    assert ours(loaded, asked) == expected and loaded.budget.ask_batch == left
    refused = [n for n in tried if n > most]
    assert len(refused) <= 4 and max(tried[tried.index(refused[-1]) + 1 :]) <= most
    count = len(tried)
    assert ours(loaded, asked) == expected and max(tried[count:]) <= most  # remembered


def test_what_is_answered_is_not_asked_again(loaded, asked, ours, monkeypatch):
    expected, go, given = ours(loaded, asked), decode.greedy, []
    monkeypatch.setattr(loaded, "budget", replace(loaded.budget))

    def stops(vlm, turns, *rest):
        given.append(len(turns))
        for number, one in enumerate(go(vlm, turns, *rest)):
            if number == 6 and len(given) == 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            yield one

    monkeypatch.setattr(decode, "greedy", stops)
    assert ours(loaded, asked) == expected
    pictured = sum(picture is not None for _, picture in asked)
    assert given == [pictured, pictured - 6, len(asked) - pictured]


def test_generate_and_scores_go_on_as_well(loaded, asked, crowded, monkeypatch):
    expected = generates(loaded, asked)
    turns = [
        loaded.encode(question, reply.text, picture)
        for (question, picture), reply in zip(asked, expected, strict=True)
    ]
    pictures = [picture for _, picture in asked]
    scores = ask.label_scores(loaded, turns, pictures)
    crowded(3)
    for one, other in zip(scores, ask.label_scores(loaded, turns, pictures), strict=True):
        assert torch.allclose(one.log_p, other.log_p, atol=1e-4) and torch.equal(
            one.rank, other.rank
        )
    assert loaded.budget.ask_batch == 2
    loaded.budget, generate = replace(loaded.budget, ask_batch=64), loaded.base.generate

    def narrow(**given):
        if len(given["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(**given)

    monkeypatch.setattr(loaded.base, "generate", narrow)
    assert generates(loaded, asked) == expected and loaded.budget.ask_batch == 1


def test_where_one_question_does_not_fit_it_says_so(loaded, asked, ours, crowded):
    ours(loaded, asked)
    crowded(0)
    with pytest.raises(OutOfMemory, match="Not even one question at a time fits"):
        ask.replies(loaded, asked)
    with pytest.raises(ZeroDivisionError):  # nothing else is taken for it
        ask.fitting(loaded, lambda size: 1 / 0, 4)


def test_why_generate_answers_is_told(loaded, asked, monkeypatch):
    ask.replies(loaded, asked)
    assert decode.slow(loaded) == "" and decode.told("", "") == []
    loaded.decodes = {True: "", False: "hidden states differ by 4.0e-02"}
    assert decode.slow(loaded) == "hidden states differ by 4.0e-02"
    configure(loaded, monkeypatch, no_repeat_ngram_size=2, bad_words_ids=[[300]])
    assert decode.slow(loaded) == "its generation_config sets bad_words_ids, no_repeat_ngram_size"
    same, first, second = decode.told("a", "b"), decode.told("a", ""), decode.told("", "b")
    assert same == ["Answers were made by transformers' generate, one length at a time: b."]
    assert "the untouched model alone" in first[0] and first[0].endswith(": a.")
    assert "the unlearned model alone" in second[0] and second[0].endswith(": b.")
    for (text,) in same, first, second:
        assert sentence(text).endswith("(left out)")


def test_bf16_is_not_an_excuse_for_a_wrong_position(loaded):
    assert (
        sharing.tolerance(loaded, torch.bfloat16, gradients=False)
        == 2e-2
        < sharing.tolerance(loaded, torch.bfloat16)
    )


def test_nothing_asked_nothing_said(loaded):
    assert ask.replies(loaded, []) == [] and ask.label_scores(loaded, [], []) == []
