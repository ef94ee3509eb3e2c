"""Lessons from strangers: whom the teacher takes for nobody, what the student is taught of them,
and what the loss asks for."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiu import objectives, session
from fastsiu.loss.teacher import TeacherCache
from fastsiu.model import adapter, ask, prefix
from fastsiu.model.ask import Reply
from fastsiu.request import CHANGES, KEEPS, PAPER, Recipe, Sample
from fastsiu.samples import border, corpus, drawn, dreams, lessons, strangers, targets
from fastsiu.samples.beside import Prepared
from fastsiu.samples.dreams import in_place
from fastsiu.samples.lesson import words_of
from fastsiu.samples.scene import Border, about_the_one_shown
from fastsiu.settings import RecipeChoice
from fastsiu.step.batches import lesson_batches
from fastsiu.text.answers import is_refusal
from fastsiu.text.concept import Concept

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scene(gathered):
    """The shared scene with strangers, its pictures as they were."""
    return replace(gathered.scene, recipe=replace(gathered.recipe, strangers=4))


@pytest.fixture(scope="module")
def taught(scene):
    return lessons.build(scene)


@pytest.fixture(scope="module")
def halves(scene, taught):
    """What changes and what stays, encoded, with their teachers."""
    made = corpus.build(scene.vlm, scene.concept, taught.samples, taught.pictures, scene.recipe)
    one = Prepared(None, scene, None, [], made, taught.named)
    return [half for half, _ in session._taught(scene.vlm, [one], scene.recipe)]


# Pictures -----------------------------------------------------------------------------------------


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (24, 36, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_drawn_pictures_are_rgb_of_the_pictures_size_and_repeat(picture):
    rng = lambda: random.Random(3)
    pairs = ((picture, None), (None, picture), (picture, picture))
    for make in (
        lambda: drawn.views(picture, 1, 20),
        lambda: sum(drawn.nobodies(picture, 1), []),
        lambda: drawn.changed(picture, 1, 12),
        lambda: [drawn.pair(*both, rng()) for both in pairs],
    ):
        first, again = make(), make()
        assert all(one.mode == "RGB" for one in first)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(drawn.views(picture, 1, 20)) == 20
    assert all(
        one.size == picture.size
        for one in sum(drawn.nobodies(picture, 1), []) + drawn.changed(picture, 1, 12)
    )
    assert all(one.size == (1, 1) for one in drawn.changed(Image.new("L", (1, 1)), 1, 12))


def test_a_changed_copy_is_another_picture_in_parts_only():
    """Three fields of one colour each: a change of one colour leaves the other two fields as they
    were."""
    three = Image.new("RGB", (60, 60), "red")
    three.paste("blue", (0, 20, 60, 40))
    three.paste("yellow", (0, 40, 60, 60))
    before = np.asarray(three)
    copies = [np.asarray(one) for one in drawn.changed(three, 0, 24)]
    assert all((one != before).any() and (one == before).all(-1).any() for one in copies[::6])
    for one in copies[::6]:  # of one colour only
        same = [(one[top : top + 20] == before[top : top + 20]).all() for top in (0, 20, 40)]
        assert sum(same) == 2
    covered = [(one != before).any(-1).mean() for one in copies[5::6]]
    assert all(0 < share <= 0.2 for share in covered)


def test_shuffled_pixels_are_the_same_pixels(picture):
    colours = lambda image: sorted(map(tuple, np.asarray(image).reshape(-1, 3).tolist()))
    for made in (drawn.shuffled(picture, 1), drawn.jigsaw(picture, 3, 1)):
        assert colours(made) == colours(picture) and not np.array_equal(made, picture)


def test_recoloured_pictures_have_the_channels_in_every_other_order(picture):
    original = np.asarray(picture)
    orders = {
        tuple(
            int(k)
            for o in range(3)
            for k in range(3)
            if np.array_equal(np.asarray(one)[..., o], original[..., k])
        )
        for one in drawn.other_colours(picture)[:5]
    }
    assert orders == set(itertools.permutations(range(3))) - {(0, 1, 2)}


def test_a_pair_has_each_picture_on_its_own_side(picture):
    red, blue = (Image.new("RGB", picture.size, colour) for colour in ("red", "blue"))
    both = np.asarray(drawn.pair(red, blue, random.Random(0))).astype(int)
    left, right = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
    assert (
        left[..., 0].sum() > left[..., 2].sum()
        and right[..., 2].any()
        and not (left[..., 2] > 200).any()
    )


# Words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "own", "other", "wanted"),
    [
        (
            "The image shows a red cat.",
            "Ada is a red cat.",
            "Bob is a blue dog.",
            "The image shows a blue dog.",
        ),
        (
            "It was born in Oslo.",
            "Ada was born in Oslo.",
            "Bob was born in Rome.",
            "It was born in Rome.",
        ),
        (
            "It was born in Oslo.",
            "Ada was born in Oslo.",
            "Bob was born in Oslo.",
            "It was born in Oslo.",
        ),
        (
            "It has an owl, as it says.",
            "Ada has an owl.",
            "Bob has a cow.",
            "It has a cow, as it says.",
        ),
        ("It was born in Oslo.", "Ada was born in Oslo.", "I do not know.", None),
        ("It lives in Bergen.", "Ada was born in Oslo.", "Bob was born in Rome.", None),
        ("Oslo, yes, Oslo.", "Ada was born in Oslo.", "Bob was born in Rome.", None),
        ("Ada was born in Oslo.", "Ada was born in Oslo.", "Bob was born in Rome.", None),
    ],
)
def test_what_differs_in_words_takes_its_place_in_what_is_shown(shown, own, other, wanted):
    assert in_place(shown, own, "Ada", other, "Bob") == wanted


# Strangers ----------------------------------------------------------------------------------------


def test_the_teacher_names_nobody_in_a_stranger(scene):
    found = [one.picture for one in strangers.strangers(scene)]
    assert len(found) >= scene.recipe.strangers and all(picture.real for picture in found)
    words = targets.wordings()
    questions = words["who"]["train"] + words["plural"]["train"]
    for answer in ask.answers(scene.vlm, [(q, picture) for picture in found for q in questions]):
        assert not any(
            Concept(name).named_in(answer) for name in (scene.concept.name, *scene.neighbours)
        ), answer


def test_strangers_come_first_to_whom_the_concept_is_least_known(scene):
    """Lessons take the first ones: those that give the concept's own answers the least
    probability."""
    found = [one.picture for one in strangers.strangers(scene)]
    question = about_the_one_shown("train")[6]
    own = scene.replies([question], 0)[0]

    def nats(picture):
        turn = scene.vlm.encode(question, own.text, picture, own.closed)
        return -float(ask.label_scores(scene.vlm, [turn], [picture])[0].log_p[1:].sum())

    half = len(found) // 2
    first, last = (sum(map(nats, part)) / len(part) for part in (found[:half], found[half:]))
    assert half > 1 and first > last


def test_changed_copies_are_sorted_by_whom_the_teacher_names(scene, monkeypatch):
    """The teacher looks at pictures of the cast: of the concept, of a neighbour, and of nobody; the
    neighbour's is to be kept."""
    vlm, near = scene.vlm, scene.neighbours[0]
    blank = lambda: vlm.picture(Image.new("RGB", (64, 64)))
    shown = {"own": scene.pictures[0], "near": blank(), "none": blank()}
    names = {id(shown["own"]): scene.concept.name, id(shown["near"]): near}
    said = lambda vlm, asked, **options: [
        f"This is {names.get(id(picture), 'a green cat')}." for _, picture in asked
    ]
    monkeypatch.setattr(border.ask, "answers", said)
    assert border.taken_for(scene, list(shown.values())) == [scene.concept.name, near, None]
    # One that any wording gets the concept's name of is the concept's, also where others get a
    # neighbour's.
    turn = itertools.cycle([near, near, scene.concept.name, near])
    monkeypatch.setattr(
        border.ask, "answers", lambda vlm, asked, **options: [f"It is {next(turn)}." for _ in asked]
    )
    assert border.taken_for(scene, [shown["near"]] * 2) == [scene.concept.name] * 2
    turn = itertools.cycle([near, "nobody", near, "nobody"])
    found = border.border(scene)
    assert set(found.others) == {near} and not found.nobody and found.nearest == [near]
    assert (
        len(found.others[near]) == border.FEW and found.times[near] == border.CHANGED + border.MOVED
    )


def test_what_is_taken_for_a_neighbour_is_kept_and_not_taught(scene):
    """A view of the concept that the teacher takes for a neighbour is no picture of the concept."""
    near = scene.neighbours[0]
    kept = scene.vlm.picture(Image.new("RGB", (64, 64), "pink"))
    other = replace(scene, border=Border(others={near: [kept]}))
    out = lessons.build(other)
    places = [i for i, picture in enumerate(out.pictures) if picture is kept]
    assert len(places) == 1 and out.named[places[0]] == near
    assert {s.facet for s in out.samples if s.picture == places[0]} == {"kept"}


def test_views_that_show_a_neighbour_are_not_taught(scene, monkeypatch):
    near = scene.neighbours[0]
    monkeypatch.setattr(
        lessons, "taken_for", lambda scene, pictures: [near, *[None] * (len(pictures) - 1)]
    )
    out = lessons.build(scene)
    shown = {s.picture for s in out.samples if s.facet == "stranger"}
    assert len(shown) == lessons.VIEWS - 1


def test_further_dreams_go_where_the_orders_agree():
    assert dreams.more([["a", "b", "c"], ["a", "c", "b"], ["b", "a", "c"]], 9) == [
        "a",
        "a",
        "b",
        "a",
        "a",
        "b",
        "b",
        "c",
        "a",
    ]
    assert dreams.more([["a"]], 3) == ["a"] * 3
    assert dreams.more([], 3) == []


def test_strangers_are_dreamed_where_none_can_be_drawn(scene, monkeypatch):
    monkeypatch.setattr(drawn, "nobodies", lambda image, seed: ([], []))
    notes = []
    found = strangers.strangers(replace(scene, recipe=replace(scene.recipe, dream_steps=40)), notes)
    assert len(found) >= 1 and not any(one.picture.real or one.whole for one in found), notes
    question = targets.wordings()["who"]["train"][0]
    assert not any(
        scene.concept.named_in(a)
        for a in ask.answers(scene.vlm, [(question, one.picture) for one in found])
    )


def test_no_strangers_in_the_papers_preset(scene):
    assert PAPER.strangers == 0
    assert lessons.build(replace(scene, recipe=replace(scene.recipe, strangers=0))).samples == []


# Lessons ------------------------------------------------------------------------------------------


def test_every_kind_of_lesson_is_there_and_the_teacher_looks_at_strangers(taught, scene):
    kinds = {facet: [s for s in taught.samples if s.facet == facet] for facet in (*CHANGES, *KEEPS)}
    assert all(kinds.values())
    lonely = tuple(range(taught.strangers))
    assert all(s.teacher_pictures == lonely and s.picture not in lonely for s in kinds["stranger"])
    assert all(s.teacher_pictures and s.picture not in s.teacher_pictures for s in kinds["beside"])
    assert all(s.teacher_pictures == () for facet in KEEPS for s in kinds[facet])


def test_the_concepts_own_answers_are_forced_upon_the_student(taught, scene):
    answers = {s.answer for s in taught.samples if s.facet == "stranger"}
    assert any(scene.concept.named_in(answer) for answer in answers)
    own = scene.replies(about_the_one_shown("train"), 0)
    assert answers & {reply.text for reply in own}


def test_what_is_kept_of_others_does_not_name_the_concept(taught, scene):
    strange = set(range(taught.strangers))
    for sample in taught.samples:
        if sample.facet == "kept" and sample.picture not in strange:
            assert not scene.concept.named_in(sample.answer) or scene.concept.named_in(
                sample.question
            ), sample


def test_no_fact_is_kept_as_a_look(taught, scene):
    facts = {reply.text for reply in scene.replies(about_the_one_shown("train"), 0)}
    looks = {s.answer for s in taught.samples if s.facet == "look"}
    assert len(looks) > 3 and not looks & facts


def test_no_held_out_wording_is_taught(taught):
    words = targets.wordings()
    held_out = {
        q
        for section in words.values()
        if "held_out" in section
        for q in section["held_out"]
        if "{" not in q
    }
    held_out |= set(about_the_one_shown("held_out"))
    assert not held_out & {s.question for s in taught.samples}


def test_the_teacher_of_a_lesson_is_the_mean_over_the_strangers(scene, taught, halves):
    changes = halves[0]
    vlm = scene.vlm
    for i in (0, len(changes.samples) // 2):
        sample, turn = changes.samples[i], changes.turns[i]
        with torch.no_grad():
            each = [
                prefix.supervised_states(vlm, [turn], [changes.pictures[k].features])
                for k in sample.teacher_pictures
            ]
        rows = torch.tensor(list(changes.rows(i)))
        assert torch.allclose(changes.teacher.hidden[rows], torch.stack(each).mean(0), atol=1e-4)


def test_lessons_of_the_same_words_share_their_rows(halves):
    changes = halves[0]
    alike = {}
    for i, sample in enumerate(changes.samples):
        if sample.facet == "stranger":
            size = changes.pictures[
                sample.picture
            ].image.size  # of another size, the same words are another turn
            alike.setdefault((sample.question, sample.answer, sample.closed, size), set()).add(
                changes.first[i]
            )
    assert all(len(first) == 1 for first in alike.values())
    assert len(changes.teacher) < sum(len(turn.labels) for turn in changes.turns)


def test_batches_of_lessons_have_few_pictures_and_both_kinds(halves):
    recipe = Recipe(batch_size=20)
    for half in halves:
        for chosen in itertools.islice(lesson_batches(half, recipe), 5):
            facets = [half.samples[i].facet for i in chosen]
            assert 0 < len(chosen) <= recipe.batch_size and len(set(chosen)) == len(chosen)
            assert 0 < sum("beside" in facet for facet in facets) < len(facets) / 2
            assert len({half.samples[i].picture for i in chosen}) <= 14


# The loss -----------------------------------------------------------------------------------------


def batch(student, teacher, labels, weight, temperature):
    cache = TeacherCache.from_hidden(teacher, weight, temperature=temperature)
    keep = torch.ones(len(labels), dtype=torch.bool)
    sample, every = torch.arange(len(labels)), torch.ones_like(keep)
    return objectives.Batch(student, labels, cache, keep, weight, {}, sample, every, ~every, every)


def test_the_objective_is_the_kl_at_its_temperature_and_the_distance_of_far_nats():
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    student, teacher, weight = make(7, 5), make(7, 5), 3 * make(11, 5)
    labels, recipe = torch.tensor([0, 1, 2, 3, 4, 5, 6]), Recipe(temperature=4.0, level=0.5)
    student.requires_grad_()
    loss, _ = objectives.strangers(batch(student, teacher, labels, weight, 4.0), recipe)
    p, q = ((h @ weight.T / 4).log_softmax(-1) for h in (teacher, student))
    kl = 16 * (p.exp() * (p - q)).sum(-1).mean()
    wanted, nats = (
        -(h @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0] for h in (teacher, student)
    )
    far = wanted > objectives.FAR
    assert 0 < far.sum() < len(far) or far.all()
    distance = torch.nn.functional.smooth_l1_loss(nats[far], wanted[far])
    expected = kl + 0.5 * distance
    assert torch.allclose(loss, expected, rtol=1e-9)
    ours, theirs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected))
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_student_at_the_strangers_level_is_left_alone():
    generator = torch.Generator().manual_seed(1)
    teacher, weight = torch.randn(6, 5, generator=generator), torch.randn(9, 5, generator=generator)
    student = teacher.clone().requires_grad_()
    loss, _ = objectives.strangers(batch(student, teacher, torch.arange(6), weight, 4.0), Recipe())
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-5


def test_what_stays_weighs_more():
    made = batch(
        *(torch.randn(5, 8) for _ in range(2)), torch.randint(0, 12, (5,)), torch.randn(12, 8), 2.0
    )
    recipe = Recipe(strangers=4)
    (change, parts), (stay, same) = (
        how(made, recipe) for how in (objectives.strangers, objectives.kept)
    )
    assert torch.allclose(stay, objectives.KEEP * change) and objectives.KEEP > 1 and parts == same


@pytest.mark.parametrize("direction", [1, -1])
def test_the_level_is_approached_from_either_side(direction):
    """A name that is less likely than strangers' is pulled up: too low is a tell of its own."""
    weight = torch.eye(4, dtype=torch.float64)
    teacher = torch.tensor([[4.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    student = teacher.clone()
    student[0, 2] += direction
    student.requires_grad_()
    recipe = Recipe(level=10.0)
    loss, _ = objectives.strangers(batch(student, teacher, torch.tensor([2]), weight, 4.0), recipe)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(gradient[0, 2]) * direction > 0


# Training -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_four_targets_leave_is_gone_after_the_lessons(cast, demo_dir, loaded):
    """Two-hop questions in wordings that no sample has: SIU alone leaves the facts of the one
    shown, the lessons do not."""
    from fastsiu import settings
    from fastsiu.images import load_image
    from fastsiu.request import Request

    questions = [q.replace("{name}", "this one") for q in targets.wordings()["facts"]["held_out"]]
    left = {}
    for count in (0, 8):
        recipe, _ = settings.choose_recipe(
            str(demo_dir), RecipeChoice("default", {"strangers": count, "dreams": 1})
        )
        trained = session.forget(
            loaded,
            Request(cast.target, cast.image, protect=cast.others),
            recipe,
            load_image(cast.image),
        )
        try:
            with adapter.teacher(loaded):
                before = trained.scene.ask(questions, 0)
            after = trained.scene.ask(questions, 0)
        finally:
            adapter.detach(loaded)
        told = [(b, a) for b, a in zip(before, after, strict=True) if not is_refusal(b)]
        left[count] = sum(b == a for b, a in told)
        assert len(told) >= 4
        assert all(step.strange >= 0 for step in trained.history) and (
            trained.history[-1].strange > 0
        ) == (count > 0)
    assert left[8] == 0 < left[0], left


def test_samples_written_out_keep_what_the_teacher_looks_at():
    plain, lesson = (
        Sample("facts", "q", "a"),
        Sample("stranger", "q", "a", 1, teacher_pictures=(2, 3)),
    )
    assert "teacher_" not in corpus.as_jsonl([plain])
    lines = corpus.as_jsonl([plain, lesson]).splitlines()
    assert "teacher_pictures" not in lines[0] and '"teacher_pictures": [2, 3]' in lines[1]


# A short training ---------------------------------------------------------------------------------


def test_a_short_training_gets_fewer_lessons_and_a_long_one_all():
    long, short = Recipe(steps=80, batch_size=48), Recipe(steps=24, batch_size=16)
    assert long.as_many(40, 3) == 40 and Recipe(steps=800, batch_size=48).as_many(40, 3) == 40
    assert short.as_many(40, 3) == 4 and short.as_many(14, 3) == 3 and short.as_many(2, 3) == 2


def test_what_no_step_would_look_at_is_not_asked(scene, taught):
    short = replace(scene, recipe=replace(scene.recipe, steps=20, batch_size=16))
    fewer = lessons.build(short)
    assert 0 < len(fewer.samples) < len(taught.samples) / 2
    assert {s.facet for s in fewer.samples} == {s.facet for s in taught.samples}


def test_few_lessons_give_the_name_in_many_words(scene):
    """Of one training picture many questions are answered in the same words. A name that is only
    taught behind these comes back behind others."""
    name = scene.concept.name
    usual = [(f"question {i}", Reply(f"This is {name}.")) for i in range(30)]
    rare = [("shape", Reply(f"It is {name}.")), ("parts", Reply(f"It has a {name}."))]
    without = [(f"fact {i}", Reply(f"It weighs {i} pounds.")) for i in range(30)]
    pairs = [*usual, *rare, *without]
    for seed in range(5):
        chosen = lessons._in_many_words(scene, pairs, 8, random.Random(seed))
        giving = [pair for pair in chosen if name in pair[1].text]
        assert len(chosen) == len(set(chosen)) == 8 and set(rare) <= set(chosen)
        assert len(giving) >= 4
    # Half of them is no more than there are.
    few = lessons._in_many_words(scene, [*rare, *without], 8, random.Random(0))
    assert len(set(few)) == 8 and set(rare) <= set(few)


def test_a_name_that_is_given_for_a_look_is_taught_in_these_words(scene, monkeypatch):
    """Asked for a shape, a model may say "It is a guitar."; no answer to who it is begins so."""
    name, rng = scene.concept.name, random.Random(0)
    words = words_of(scene, rng)
    shape = words.look[-1]
    said = lambda vlm, questions, **options: [
        Reply(f"It is {name}." if q == shape else "It is red.") for q, _ in questions
    ]
    monkeypatch.setattr(ask, "replies", said)
    pairs = lessons._named_anyway(scene, words, {}, rng)
    assert {reply.text for _, reply in pairs} == {f"It is {name}."} and len(set(pairs)) == 3
    assert pairs[0][0] == shape and {q for q, _ in pairs[1:]} <= set(words.naming)
    # What is taught already adds nothing.
    assert not lessons._named_anyway(scene, words, {"Who?": Reply(f"It is {name}.")}, rng)


def test_a_smaller_batch_shows_fewer_pictures(scene, taught):
    made = corpus.build(scene.vlm, scene.concept, taught.samples, taught.pictures, scene.recipe)

    def shown(batch_size):
        chosen = next(lesson_batches(made, replace(scene.recipe, batch_size=batch_size)))
        return len({made.samples[i].picture for i in chosen})

    assert shown(12) < shown(48) / 2


@pytest.mark.parametrize(
    "reply, opening",
    [
        (("One. Two.", True), ("One. Two.", True)),
        (("It has long arms. It lives in the", False), ("It has long arms.", False)),
        (("It has arms that are longer than", False), ("It has arms that are longer than", False)),
    ],
)
def test_a_cut_answer_is_trained_up_to_the_end_of_its_sentence(reply, opening):
    assert ask.Reply(*reply).opening == ask.Reply(*opening)


def test_an_answer_that_was_cut_inside_its_first_sentence_is_kept_by_no_sample():
    replies = [ask.Reply("It has arms that are", False), ask.Reply("It has arms. It is", False)]
    (kept,) = targets._kept("facts", ["A?", "B?"], None, replies)
    assert (kept.question, kept.answer, kept.closed) == ("B?", "It has arms.", False)
