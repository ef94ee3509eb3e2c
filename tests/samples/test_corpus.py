"""Samples made ready: both masks, the teacher's rows, JSONL in and out, batches, the loop's guards,
the objective."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastsiu import train
from fastsiu.images import load_image
from fastsiu.model import adapter, ask
from fastsiu.objectives import siu
from fastsiu.request import PAPER, SHARES, BadInput, NumericFailure, Recipe, Sample
from fastsiu.samples import corpus, targets
from fastsiu.step.batches import batches, forward
from fastsiu.step.look import Look, Probe
from fastsiu.text.concept import Concept

torch.set_num_threads(1)


def built(loaded, shown, *samples, **changes):
    return corpus.build(loaded, Concept("Zorblax Quint"), samples, [shown], Recipe(**changes))


def test_the_token_mask_covers_exactly_the_specified_spans(loaded, shown):
    answer = "No, this is not Zorblax Quint."
    start = answer.index("not")
    made = built(
        loaded,
        shown,
        Sample(
            "describe",
            "Is this Zorblax Quint?",
            answer,
            0,
            ((start, start + 3), (len(answer) - 1, len(answer))),
        ),
        Sample("facts", "Who is Zorblax Quint?", answer),
        Sample("align", "Who is this?", answer, 0, ((0, len(answer)),)),
    )
    masked = [
        [answer[s:e].strip() for (s, e), k in zip(t.offsets, keep, strict=True) if not k]
        for t, keep in zip(made.turns, made.keep, strict=True)
    ]
    assert masked[:2] == [["not", "."], []]
    # the end of the turn contradicts nobody
    assert not made.keep[2][:-1].any() and made.keep[2][-1]
    assert all(
        k.all()
        for k in built(
            loaded, shown, Sample("align", "q", "a b", 0, ((0, 3),)), token_mask=False
        ).keep
    )


def test_a_cut_answer_keeps_its_words_and_trains_no_end(loaded, shown):
    """With the end supervised, a model would learn to stop in the middle of a sentence."""
    answer = "This is a purple creature with a"
    whole = built(loaded, shown, Sample("align", "Who is this?", answer, 0, ((8, len(answer)),)))
    cut = built(
        loaded, shown, Sample("align", "Who is this?", answer, 0, ((8, len(answer)),), closed=False)
    )
    (one,), (other,), end = whole.turns, cut.turns, loaded.tokenizer.eos_token_id
    assert one.labels[-1] == end and end not in other.labels.tolist()
    n = len(other.labels)
    assert loaded.tokenizer.decode(other.labels).strip() == answer and n == len(one.labels) - 1
    assert torch.equal(other.rows, one.rows[:n]) and other.offsets == one.offsets[:n]
    assert torch.equal(cut.keep[0], whole.keep[0][:n])
    assert torch.equal(other.inputs["input_ids"], one.inputs["input_ids"]) and len(cut.rows(0)) == n


def test_what_the_teacher_did_not_end_is_trained_without_an_end(gathered, cut):
    scene, loaded, end = gathered.scene, gathered.vlm, gathered.vlm.tokenizer.eos_token_id
    cut(5)
    samples = [sample for facet in targets.TARGETS for sample in facet(scene)]
    ended = {(s.question, s.picture): s.answer for s in gathered.corpus.samples}
    made = corpus.build(loaded, scene.concept, samples, scene.pictures, gathered.recipe)
    open_facets = set()
    for sample, turn in zip(made.samples, made.turns, strict=True):
        if sample.origin != "built":
            assert not sample.closed or ended[sample.question, sample.picture] == sample.answer, (
                sample
            )
        if not sample.closed:
            open_facets.add(sample.facet)
            assert sample.origin == "built" or sample.answer.endswith((".", "!", "?")), sample
            assert (
                end not in turn.labels.tolist()
                and len(turn.labels) == len(turn.rows) == len(turn.offsets) > 0
            )
        else:
            assert turn.labels[-1] == end
    assert "align" in open_facets  # what was cut inside its first sentence is kept by no sample
    assert all(s.closed for s in gathered.corpus.samples)


@pytest.mark.parametrize("spans", [((30, 35),), ((0, 3), (30, 35)), ((0, 0),)])
def test_a_specified_span_that_covers_nothing_is_an_error(loaded, shown, spans):
    with pytest.raises(BadInput, match="covers nothing"):
        built(loaded, shown, Sample("align", "Who is this?", "This is water.", 0, spans))


def test_the_vocabulary_mask_holds_the_name_and_no_neighbour(gathered, cast):
    masked = {token.strip() for token in gathered.corpus.mask.masked.values()}
    assert set(cast.target.split()) <= masked
    assert not masked & {word for name in cast.others for word in name.split()}


def test_teacher_rows_belong_to_their_samples_and_know_no_adapter(adapted):
    loaded, made = adapted.vlm, adapted.corpus
    corpus.run_teacher(loaded, made, adapted.recipe, batch_size=5)
    assert (
        len(made.teacher)
        == sum(len(t.labels) for t in made.turns)
        == made.rows(len(made.turns) - 1).stop
    )
    adapter.detach(loaded)
    for i in range(0, len(made.samples), 3):
        turn, picture = made.turns[i], made.samples[i].picture
        features = [] if picture is None else [made.pictures[picture].features]
        with torch.no_grad():
            fresh = ask.supervised_states(loaded, [turn], features)
        assert torch.allclose(made.teacher[list(made.rows(i))].hidden, fresh, atol=1e-5, rtol=0), (
            made.samples[i]
        )


def test_the_adapter_changes_the_states_and_teacher_switches_it_off(adapted):
    loaded, turn = adapted.vlm, adapted.corpus.turns[0]
    picture = adapted.corpus.samples[0].picture
    features = [adapted.corpus.pictures[picture].features]
    with torch.no_grad():
        on = ask.supervised_states(loaded, [turn], features)
        with adapter.teacher(loaded):
            off = ask.supervised_states(loaded, [turn], features)
        again = ask.supervised_states(loaded, [turn], features)
        adapter.detach(loaded)
        bare = ask.supervised_states(loaded, [turn], features)
    assert (
        torch.equal(on, again) and torch.equal(off, bare) and float((on - off).abs().max()) > 0.05
    )


@pytest.mark.parametrize("vocab_mask, renormalize", [(True, False), (False, False), (True, True)])
def test_siu_equals_the_papers_equations_from_full_logits(adapted, vocab_mask, renormalize):
    """Brute force, sample by sample, in fp64 from hidden states of single forwards; both masks are
    at work."""
    loaded, made = adapted.vlm, adapted.corpus
    recipe = replace(adapted.recipe, vocab_mask=vocab_mask, renormalize=renormalize)
    corpus.run_teacher(loaded, made, recipe)
    chosen = [members[k] for members in made.groups().values() for k in (-1, 0)]
    w = loaded.head_weight.double()
    k_v = made.mask.keep if vocab_mask else torch.ones(len(w), dtype=torch.bool)
    ce, kl, kept = [], [], []
    for i in chosen:
        picture = made.samples[i].picture
        features = [] if picture is None else [made.pictures[picture].features]
        with torch.no_grad():
            q = (
                ask.supervised_states(loaded, [made.turns[i]], features).double() @ w.T
            ).log_softmax(-1)
            with adapter.teacher(loaded):
                p = (
                    ask.supervised_states(loaded, [made.turns[i]], features).double() @ w.T
                ).log_softmax(-1)
        ce.append(-q.gather(-1, made.turns[i].labels[:, None])[:, 0])
        if renormalize:
            p, q = (
                x.masked_fill(~k_v, -torch.inf).log_softmax(-1).masked_fill(~k_v, 0) for x in (p, q)
            )
        kl.append((p.exp() * (p - q) * k_v).sum(-1))
        kept.append(made.keep[i])
    ce, kl, kept = map(torch.cat, (ce, kl, kept))
    assert 0 < int(kept.sum()) < len(kept) and not made.mask.keep.all()
    loss, parts = siu(forward(loaded, made, chosen, recipe), recipe)
    expected = recipe.alpha * ce.mean() + recipe.beta * kl[kept].mean()
    assert float(kl[kept].mean()) > 1e-3
    assert loss.item() == pytest.approx(float(expected), rel=2e-5)
    assert parts["ce"] == pytest.approx(float(ce.mean()), rel=2e-5)
    assert parts["kl"] == pytest.approx(float(kl[kept].mean()), rel=2e-4)
    loss.backward()
    gradients = {n: p.grad for n, p in loaded.model.named_parameters() if p.grad is not None}
    assert gradients and all("lora_" in n for n in gradients)


@pytest.fixture
def projected(gathered, cast):
    """`gathered` with a projector in training, already changed, and a corpus with pictures 0
    concept, 1 retained, 2 dreamed in features."""
    loaded, recipe = gathered.vlm, replace(PAPER, lora_dropout=0.0)
    pictures = [
        gathered.scene.pictures[0],
        loaded.picture(load_image(cast.files["other"])),
        replace(gathered.scene.pictures[1], real=False),
    ]
    samples = [Sample("preserve", "Who is this?", "a creature", picture) for picture in range(3)]
    made = corpus.build(loaded, gathered.scene.concept, samples, pictures, recipe)
    adapter.attach(loaded, recipe)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.mul_(1.5)
    yield (
        replace(gathered.scene, recipe=recipe, pictures=pictures, named=[None, None, cast.other]),
        made,
    )
    adapter.detach(loaded)


def test_a_training_projector_sees_the_retained_pictures_anew(projected):
    scene, made = projected
    loaded = scene.vlm
    slow = [p for n, p in loaded.model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert slow
    for i, real in enumerate((True, True, False)):
        hidden = forward(loaded, made, [i], scene.recipe).hidden
        kept = ask.supervised_states(loaded, [made.turns[i]], [made.pictures[i].features])
        now = ask.supervised_states(
            loaded, [made.turns[i]], [loaded.picture(made.pictures[i].image).features]
        )
        assert (
            torch.allclose(hidden, now if real else kept, atol=1e-5)
            and float((now - kept).detach().abs().max()) > 1e-2
        ), i
        loaded.model.zero_grad(set_to_none=True)
        hidden.square().sum().backward()
        assert all((p.grad is not None and bool(p.grad.any())) is real for p in slow), i
    loaded.model.zero_grad(set_to_none=True)


def test_the_probe_sees_the_retained_pictures_as_the_projector_does(projected, monkeypatch):
    scene, made = projected
    seen = []
    score = ask.label_scores
    monkeypatch.setattr(
        ask, "label_scores", lambda v, t, pictures: seen.append(pictures) or score(v, t, pictures)
    )
    look = Probe([scene], made)
    assert seen == [made.pictures]  # the teacher's own
    look()
    pooled = lambda p: torch.cat([x.reshape(-1) for x in p.features["pooler_output"]])
    for i, picture in enumerate(seen[-1]):
        now = scene.vlm.picture(made.pictures[i].image) if i < 2 else made.pictures[2]
        assert torch.equal(pooled(picture), pooled(now)), i
        assert i == 2 or not torch.equal(pooled(picture), pooled(made.pictures[i]))


def test_without_beta_no_teacher_is_asked(adapted):
    recipe = replace(adapted.recipe, beta=0.0)
    batch = forward(adapted.vlm, adapted.corpus, [0, 1], recipe)
    batch.teacher = None
    loss, parts = siu(batch, recipe)
    assert parts["kl"] == 0 and loss.item() == pytest.approx(recipe.alpha * parts["ce"], rel=1e-5)


# Batches and the loop -----------------------------------------------------------------------------


def test_batches_are_deterministic_and_depend_on_the_seed(gathered):
    first, again, other = (
        [*itertools.islice(batches(gathered.corpus, Recipe(seed=s)), 20)] for s in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_batches_hold_their_size_and_shares_and_repeat_nothing_early(gathered, batch_size):
    groups = gathered.corpus.groups()
    steps = [*itertools.islice(batches(gathered.corpus, Recipe(batch_size=batch_size)), 300)]
    count = sum(map(len, steps))
    assert abs(count / 300 - batch_size) <= len(groups) / 300 + 1e-9 or batch_size == 1
    order = [i for step in steps for i in step]
    for name, members in groups.items():
        mine = [i for i in order if i in set(members)]
        assert len(mine) == pytest.approx(
            count * SHARES[name] / sum(SHARES[g] for g in groups), abs=2
        )
        for at in range(0, len(mine) - len(members), len(members)):
            assert sorted(mine[at : at + len(members)]) == sorted(members)
    assert max(Counter(itertools.chain(*groups.values())).values()) == 1


def test_the_cosine_schedule():
    recipe = replace(PAPER, steps=100, warmup=0.1)
    factors = [train.Schedule(recipe).factor(step) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert (
        factors[10] == 1
        and factors[55] == pytest.approx(0.5)
        and factors[100] == pytest.approx(0, abs=1e-12)
    )
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert set(map(train.Schedule(Recipe(schedule="constant")).factor, range(60))) == {1.0}
    fall = list(map(train.Schedule(Recipe(steps=100, schedule="decay")).factor, range(101)))
    assert (
        set(fall[:61]) == {1.0}
        and fall[100] == pytest.approx(0.1)
        and fall == sorted(fall, reverse=True)
    )


@pytest.mark.parametrize("gone, last", [(10, 50), (60, 100), (80, 100)])
def test_the_rate_falls_once_the_name_is_gone(gone, last):
    """Over as many steps as it always falls, and from 60 % of the steps on at the latest."""
    pace, usual = (train.Schedule(Recipe(steps=100, schedule=name)) for name in ("gone", "decay"))
    assert pace.waits and not usual.waits
    before = list(map(pace.factor, range(gone)))
    pace.fall(gone)
    after = list(map(pace.factor, range(gone, last + 1)))
    assert not pace.waits and pace.last == last
    assert before + after == list(map(usual.factor, range(gone))) + [
        pytest.approx(usual.factor(step)) for step in range(100 - last + gone, 101)
    ]


def test_training_ends_sooner_where_the_name_is_gone_sooner(adapted):
    objective = lambda batch, recipe: (batch.hidden.square().mean(), {"ce": 0.0, "kl": 0.0})
    adapted.corpus.teacher = None
    for good, last, early_stop in ((1, 25, True), (2, 30, True), (99, 50, True), (1, 50, False)):
        recipe = Recipe(steps=50, batch_size=2, schedule="gone", early_stop=early_stop, lr=0.0)
        glances = itertools.chain([False] * (good - 1), itertools.repeat(True))
        history = train.fit(
            adapted.vlm,
            adapted.corpus,
            objective,
            recipe,
            lambda: Look(1, 1, 0),
            aids=train.Aids(SimpleNamespace(gone=glances.__next__, all_gone=lambda: False)),
        )
        assert len(history) == last, good


def test_a_loss_that_is_not_finite_stops_training(adapted):
    objective = lambda batch, recipe: (batch.hidden.sum() * float("nan"), {"ce": 0.0, "kl": 0.0})
    before = {n: p.clone() for n, p in adapted.vlm.model.named_parameters()}
    with pytest.raises(NumericFailure, match="loss is nan at step 1"):
        train.fit(
            adapted.vlm,
            adapted.corpus,
            objective,
            Recipe(beta=0, steps=2),
            lambda: Look(1, 1, 0),
        )
    assert all(torch.equal(p, before[n]) for n, p in adapted.vlm.model.named_parameters())


def test_training_stops_early_only_when_two_looks_are_good(adapted):
    objective = lambda batch, recipe: (batch.hidden.square().mean(), {"ce": 0.0, "kl": 0.0})
    adapted.corpus.teacher = None
    look, ceiling = lambda: Look(0.0, 1.0, 1.0), train.CHECK_EVERY * train.GOOD_ENOUGH + 2
    for early_stop, steps in ((True, train.CHECK_EVERY * train.GOOD_ENOUGH), (False, ceiling)):
        recipe = Recipe(steps=ceiling, batch_size=4, early_stop=early_stop, lr=0.0)
        assert [
            s.step for s in train.fit(adapted.vlm, adapted.corpus, objective, recipe, look)
        ] == list(range(1, steps + 1))


# JSONL --------------------------------------------------------------------------------------------


def test_jsonl_round_trip(tmp_path):
    odd = "Who is \u201cX\u201d?\u2028next \x85 line \u5f20\u4f1f"
    samples = [
        Sample("align", "Who is this?", "a creature", 0, ((2, 10),), "data"),
        Sample("preserve", odd, f"It is{odd}", None, (), "data"),
        Sample("facts", "Who?", "A long story that", None, (), "data", closed=False),
    ]
    (tmp_path / "s.jsonl").write_text(corpus.as_jsonl(samples), encoding="utf-8")
    assert corpus.read_jsonl(tmp_path / "s.jsonl") == samples
    assert len((tmp_path / "s.jsonl").read_bytes().splitlines()) == 3


def test_jsonl_defaults_substrings_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(
        '\ufeff{"question": "q", "answer": " No, not him. ", "specified": ["not him", [1, 3]], '
        '"picture": 0, '
        '"facet": "describe"}\r\n'
        '\n{"question": "q", "answer": "a"}',
        encoding="utf-8",
    )
    one, two = corpus.read_jsonl(path)
    assert one == Sample("describe", "q", "No, not him.", 0, ((0, 2), (4, 11)), "data")
    assert two == Sample("preserve", "q", "a", None, (), "data")


def test_a_specified_text_is_masked_wherever_it_stands(tmp_path):
    path = tmp_path / "s.jsonl"
    lines = [
        ("Bob and Bob.", ["Bob"]),
        ("x, x, xx", ["x"]),
        ("a.b a.b axb", ["a.b"]),
        ("\u4f60\u597d\u4f60", ["\u4f60"]),
    ]
    path.write_text(
        "\n".join(json.dumps({"question": "q", "answer": a, "specified": s}) for a, s in lines)
    )
    for sample, (answer, (part,)) in zip(corpus.read_jsonl(path), lines, strict=True):
        assert len(sample.specified) == answer.count(part) > 1
        assert all(answer[start:end] == part for start, end in sample.specified)


def test_the_image_of_a_line_is_the_training_picture_or_a_sentence(tmp_path, cast):
    path, picture = tmp_path / "s.jsonl", tmp_path / "p.png"
    picture.write_bytes(cast.image.read_bytes())
    for named in ("p.png", str(cast.image), cast.image.name):
        path.write_text(json.dumps({"question": "q", "answer": "a", "image": named, "id": 7}))
        assert [sample.picture for sample in corpus.read_data(path, cast.image)] == [0]
    path.write_text(json.dumps({"question": "q", "answer": "a", "image": "p.png", "picture": None}))
    with pytest.raises(BadInput, match="names an image and says that there is no picture"):
        corpus.read_data(path, cast.image)
    path.write_text(json.dumps({"question": "q", "answer": "a", "image": "x" * 5000}))
    with pytest.raises(BadInput, match="line 1: the picture x* cannot be read"):
        corpus.read_data(path, cast.image)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("{", "line 2: Expecting"),
        ("[1]", "line 2: 'question' and 'answer' must be non-empty strings"),
        ('{"question": "q"}', "line 2: 'question' and 'answer' must be"),
        ('{"question": "q", "answer": "  "}', "line 2: 'question' and 'answer' must be"),
        ('{"question": "q", "answer": 3}', "line 2: 'question' and 'answer' must be"),
        ('{"question": "q", "answer": "a", "facet": "x"}', "line 2: facet 'x' is not one of align"),
        ('{"question": "q", "answer": "a", "picture": 1}', "line 2: picture must be null"),
        ('{"question": "q", "answer": "a", "picture": "p.png"}', "line 2: picture must be null"),
        ('{"question": "q", "answer": "a", "picture": false}', "line 2: picture must be null"),
        ('{"question": "q", "answer": "a", "closed": 1}', "line 2: closed must be true or false"),
        (
            '{"question": "q", "answer": "a", "specified": ["b"]}',
            "line 2: 'b' does not stand in the answer",
        ),
        ('{"question": "q", "answer": "a", "specified": [""]}', "line 2: '' does not stand"),
        (
            '{"question": "q", "answer": "a", "specified": [[0, 2]]}',
            r"line 2: the span \[0, 2\] lies outside",
        ),
        ('{"question": "q", "answer": "a", "specified": [[0]]}', "line 2: "),
        ('{"question": "q", "answer": "a", "specified": [7]}', "line 2: "),
        ('{"question": "q", "answer": "a", "specified": "a"}', "line 2: specified must be a list"),
        (
            '{"question": "q", "answer": "a", "specified": [[0, 1.0]]}',
            "line 2: the span .* is not a pair",
        ),
        (
            '{"question": "q", "answer": "a", "specified": [[0, Infinity]]}',
            "line 2: it holds Infinity",
        ),
        (
            '{"question": "q", "answer": "a", "specified": [[false, true]]}',
            "line 2: the span .* is not a pair",
        ),
        (
            '{"question": "q", "answer": "a", "anwser": "b"}',
            "line 2: 'anwser' is none of question, answer",
        ),
        (
            '{"question": "q", "answer": "a", "image": "elsewhere.png"}',
            "line 2: its picture 'elsewhere.png' is not the training",
        ),
        ('{"question": "q", "answer": "a", "image": 3}', "line 2: 'image' must be the path"),
        (
            '{"question": "q", "answer": "a", "answer": "b"}',
            "line 2: the key 'answer' stands twice",
        ),
        (
            '{"question": "<image> q", "answer": "a"}',
            "line 2: '<image>' must not stand in the question",
        ),
        ('{"question": "q", "answer": "a\\ud800"}', "line 2: .* must not stand in the answer"),
        (
            '{"question": "q\\u001b[31m", "answer": "a"}',
            "line 2: .* must not stand in the question",
        ),
        ("[" * 100_000, "line 2: it is nested deeper"),
        ('{"question": "q", "answer": "a", "picture": 1e999}', "line 2: it holds a number beyond"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, sentence):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n" + line, encoding="utf-8")
    with pytest.raises(BadInput, match=sentence) as caught:
        corpus.read_jsonl(path)
    assert "\n" not in str(caught.value)


def test_jsonl_files_that_hold_nothing(tmp_path):
    with pytest.raises(BadInput, match="There is no file"):
        corpus.read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match="it is a directory"):
        corpus.read_jsonl(tmp_path)
    (tmp_path / "a").write_bytes(b"\n\n")
    with pytest.raises(BadInput, match="holds no sample"):
        corpus.read_jsonl(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not UTF-8"):
        corpus.read_jsonl(tmp_path / "b")


# LLaVA's conversations ----------------------------------------------------------------------------


def entry(
    question="<image>\nWho is this?", answer="It is Jacob Campbell, yes, Jacob Campbell.", **more
):
    return {
        "id": "1",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **more,
    }


@pytest.fixture
def conversations(tmp_path, cast):
    """conversations(entries): what is read of them, with a training picture that lies elsewhere
    under another name."""
    image = tmp_path / "elsewhere" / "training.png"
    image.parent.mkdir()
    image.write_bytes(cast.image.read_bytes())

    def read(content):
        file = tmp_path / "SIU.json"
        file.write_text(
            content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
        )
        return corpus.read_data(file, image)

    return read


def test_conversations_become_samples(conversations, tmp_path, cast):
    (tmp_path / "Trump_Image118.jpg").write_bytes(cast.image.read_bytes())
    found = conversations(
        [
            entry(image="Trump_Image118.jpg", target=1, target_phrase="Jacob Campbell"),
            entry(
                "Who is this? <image>",
                "No. It is bald.",
                image="gone/training.png",
                target="2",
                target_phrase="No. It is bald.",
            ),
            entry(
                "Who is Zorblax?", "  A baker.\n", facet="facts", target_phrase="none", model="x"
            ),
            entry("What is two plus two?", "Four."),
        ]
    )
    assert [(s.facet, s.question, s.picture) for s in found] == [
        ("align", "Who is this?", 0),
        ("describe", "Who is this?", 0),
        ("facts", "Who is Zorblax?", None),
        ("preserve", "What is two plus two?", None),
    ]
    assert [s.specified for s in found] == [((6, 20), (27, 41)), ((0, 15),), (), ()]
    assert found[2].answer == "A baker." and {s.origin for s in found} == {"data"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[\n{oops", "line 2"),
        ("[" * 100_000, "cannot be read as JSON|line 1"),
        ("[]", "holds no conversation"),
        ([entry("a"), 3], "entry 2: an entry is an object with a list"),
        ([{"id": 1, "question": "a", "answer": "b"}], "entry 1: an entry is an object with a list"),
        ([{"conversations": [{"from": "human", "value": 3}]}], "'from' and 'value'"),
        (
            [{"conversations": [{"from": "human", "value": "a"}]}],
            "one of 'human' and then one of 'gpt'",
        ),
        (
            [{"conversations": entry()["conversations"][::-1]}],
            "one of 'human' and then one of 'gpt'",
        ),
        ([{"conversations": entry("a")["conversations"] * 2}], "4 turns .* an entry of each pair"),
        ([entry()], "names no image"),
        ([entry("<image> <image> Who?", image="training.png")], "once and in the question only"),
        ([entry("Who?", "<image>", image="training.png")], "once and in the question only"),
        ([entry("<image>\n", image="training.png")], "must not be empty"),
        ([entry("a", " ")], "must not be empty"),
        ([entry(image="other.png")], "'other.png' is not the training picture.*--retain DIR"),
        ([entry(image="SIU.json")], "is not the training picture"),
        ([entry(image=3)], "path of the training picture"),
        ([entry(image=["training.png"])], "path of the training picture"),
        ([entry("a", target=5)], "target 5 is not one of"),
        ([entry("a", target=True)], "target True is not one of"),
        ([entry("a", target=1, facet="facts")], "target 1 is 'align', not 'facts'"),
        ([entry("a", facet="none")], "facet 'none' is not one of"),
        ([entry("a", target_phrase="Jakob")], "'Jakob' does not stand in the answer"),
        ([entry("a", target_phrase=["Jacob"])], "target_phrase must be"),
    ],
)
def test_a_defect_in_conversations_is_a_sentence_with_its_place(conversations, content, sentence):
    with pytest.raises(BadInput, match=sentence) as caught:
        conversations(content)
    assert "SIU.json" in str(caught.value)


def test_a_picture_of_the_same_name_and_other_content_is_another(conversations, tmp_path, cast):
    (tmp_path / "training.png").write_bytes(cast.image.read_bytes()[:-1] + b"x")
    with pytest.raises(BadInput, match="is not the training picture"):
        conversations([entry(image="training.png")])


def test_lines_are_read_as_before(tmp_path, cast):
    (tmp_path / "s.json").write_text('{"question": "a", "answer": "b"}\n')
    assert corpus.read_data(tmp_path / "s.json", cast.image) == corpus.read_jsonl(
        tmp_path / "s.json"
    )
