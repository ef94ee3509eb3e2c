"""Comparing methods: what is chosen, who is on the front, what is counted, what each trains on."""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import calls
import pytest
import torch

from fastsiu.compare import choice, front, methods, sculpting, trials
from fastsiu.compare import run as compare
from fastsiu.compare.trials import Point
from fastsiu.evaluate.exam import Question
from fastsiu.evaluate.suites.suite import Subject, Suite
from fastsiu.model import prefix
from fastsiu.request import MISMATCH, BadInput
from fastsiu.samples import corpus
from fastsiu.step import batches
from fastsiu.text.rate import Rate

torch.set_num_threads(1)


def point(named, kept, step=1, lr=1.0, facts=100, k=1.0):
    return Point(
        lr,
        step,
        {
            "named": (named, 100),
            "others": (kept, 50),
            "lookalikes": (kept, 50),
            "facts": (facts, 100),
            "broken": (0, 300),
        },
        k,
    )


# What is decided ----------------------------------------------------------------------------------


def test_the_search_takes_the_least_named_setting_that_keeps_the_floor():
    keeps, better, ruined = point(40, 50), point(7, 48, lr=2), point(0, 30, lr=3)
    assert choice.choose([keeps, better, ruined], 0.95) == (better, True)
    assert choice.choose([keeps, better, ruined], 0.97) == (keeps, True)
    assert choice.choose([keeps, better, ruined], 0.5) == (ruined, True)


def test_facts_count_for_the_floor_too():
    assert (
        choice.choose([point(0, 50, facts=94), point(9, 50, lr=2, facts=95)], 0.95)[0].named == 0.09
    )


def test_where_none_keeps_the_floor_the_nearest_is_taken_and_flagged():
    nearest = point(80, 45)
    assert choice.choose([point(0, 10, lr=2), nearest, point(90, 45, lr=3)], 0.95) == (
        nearest,
        False,
    )


def test_equals_are_told_apart_by_what_they_keep_then_the_middle_one_is_taken():
    more = [point(0, 49, step=9, lr=3.0), point(0, 48, step=1)]
    assert choice.choose(more, 0.9)[0] is more[0]
    equal = [
        point(0, 49, step=9, lr=0.1),
        point(0, 49, step=5, lr=3.0),
        point(0, 49, step=3, lr=2.0),
    ]
    assert choice.choose(equal, 0.9)[0] is equal[1]


def test_an_earlier_search_is_chosen_from_as_from_a_new_one():
    points = [point(40, 50), point(7, 48, step=2), point(0, 30, step=3)]
    told = [{"lr": p.lr, "step": p.step, "named": p.named, "kept": p.kept} for p in points]
    again = compare._searched({"rows": [{"method": "siu", "searched": told}]}, "siu")
    assert [(p.lr, p.step, p.named, p.kept) for p in again] == [
        (p.lr, p.step, p.named, p.kept) for p in points
    ]
    assert choice.choose(again, 0.95)[0].step == choice.choose(points, 0.95)[0].step == 2


def test_a_setting_is_judged_over_all_concepts():
    one, other = (
        [point(0, 50, 1), point(10, 50, 2), point(0, 50, 3)],
        [point(20, 40, 1), point(0, 50, 2)],
    )
    both = choice.over_concepts([one, other])
    assert [(p.step, p.named) for p in both] == [(1, 0.1), (2, 0.05)] and both[0].counts[
        "others"
    ] == (90, 100)
    at = [[point(10 * k, 50, k=k) for k in ks] for ks in ((1.0, 2.0), (2.0, 4.0))]
    assert [(p.k, p.named) for p in choice.over_concepts(at)] == [(2.0, 0.2)]


def test_a_run_ends_when_it_is_ruined_or_done():
    good, ahead, bad = point(0, 50), point(1, 50), [point(0, 5, step) for step in (2, 3, 4, 5, 6)]
    assert (
        trials.over(bad, 0.95)
        and not trials.over(bad[1:], 0.95)
        and not trials.over([*bad[:4], ahead], 0.95)
    )
    # too early to tell: what bends may mend
    assert not trials.over([point(0, 5, step) for step in (1, 2, 3, 4)], 0.95)
    assert not trials.over([point(0, 5, step) for step in (20, 27, 36, 48, 59)], 0.95)
    assert (
        trials.over([good] * 5, 0.95)
        and not trials.over([good] * 4, 0.95)
        and not trials.over([ahead, *[good] * 4], 0.95)
    )
    assert not trials.over([point(0, 47)] * 5, 0.95)


def row(method, named, kept, n=200):
    return {
        "method": method,
        "named": Rate.of(named, n).as_dict(),
        "kept": Rate.of(kept, n).as_dict(),
    }


def test_the_front_is_what_nobody_beats():
    rows = [
        row("a", 0, 190),
        row("b", 20, 196),
        row("c", 20, 190),
        row("d", 150, 200),
        row("a again", 0, 190),
        row("e", 1, 190),
    ]
    assert choice.unbeaten(rows) == [True, True, False, True, True, False]
    assert choice.unbeaten(rows[:1]) == [True]


def test_being_beaten_clearly_takes_more_than_the_intervals():
    best, near, far, other = (
        row("best", 0, 196),
        row("near", 2, 195),
        row("far", 40, 195),
        row("other", 40, 200),
    )
    rows = [best, near, far, other]
    assert choice.beaten_clearly(near, rows) == [] and choice.beaten_clearly(best, rows) == []
    assert (
        choice.beaten_clearly(far, rows) == ["best", "near"]
        and choice.beaten_clearly(other, rows) == []
    )


# What is asked and counted ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite():
    """Four concepts of 21 pictures that nobody has drawn; the second is the first's look-alike."""

    def subject(slug, name, alike=()):
        images = tuple(Path(f"/s/concepts/{slug}/images/{i:03d}.png") for i in range(21))
        return Subject(slug, name, (), alike, images[3], images)

    questions = tuple(Question(f"Who is this, {i}?", "name") for i in range(5))
    questions += (
        Question("Is this {name}?", "yesno"),
        *(Question(f"Where was {{name}} born, {i}?", "fact") for i in range(5)),
    )
    rest = [
        subject(slug, name)
        for slug, name in (("bea", "Bea Lo"), ("cy", "Cy Orr"), ("dan", "Dan Ulm"))
    ]
    return Suite(Path("/s"), "made up", (subject("ann", "Ann Lee", ("Bea Lo",)), *rest), questions)


def test_search_and_test_share_no_picture_and_neither_sees_training(suite):
    ann = suite.subjects[0]
    search, test = (trials.exam(suite, ann, part) for part in ("search", "test"))
    seen = [{s.source for s in e.pictures} for e in (search, test)]
    assert not seen[0] & seen[1] and all(
        s.training not in one for s in suite.subjects for one in seen
    )
    for exam, size in ((search, trials.SEARCH), (test, trials.TEST)):
        roles = [s.role for s in exam.pictures]
        assert (roles.count("concept"), roles.count("lookalike"), roles.count("other")) == (
            size.own,
            size.alike,
            2 * size.other,
        )
        assert {c.question.kind for c in exam.cells} == {"name", "fact"}
        assert {s.shows for s in exam.pictures if s.role == "lookalike"} == {"Bea Lo"}
    assert sum(c.question.kind == "fact" for c in test.cells) == 5 * 4  # about everyone


def test_a_lookalike_in_another_spelling_is_one(suite):
    ann = replace(suite.subjects[0], lookalikes=("bea LO",))
    other = replace(suite, subjects=(ann, *suite.subjects[1:]))
    seen = trials.exam(other, ann, "test").pictures
    assert {s.shows for s in seen if s.role == "lookalike"} == {"Bea Lo"}
    assert [s.slug for s in compare._some(other)] == ["ann", "bea"]


def test_answers_are_counted_by_hand(suite):
    asked = trials.exam(suite, suite.subjects[0], "search")
    before, after, expected = [], [], {key: [0, 0] for key in trials.COUNTS}
    turn = 0
    for cell in asked.cells:
        turn += 1
        part = {"concept": "named", "lookalike": "lookalikes", "other": "others"}
        role = "facts" if cell.seen is None else part[cell.seen.role]
        name = cell.seen.shows if cell.seen else cell.about
        was = f"This is {name}."
        now = {0: was, 1: "This is Ann Lee.", 2: "I do not know.", 3: ""}[turn % 4]
        if role in ("others", "lookalikes") and turn % 5 == 0:
            was = "No idea."  # the untouched model did not know either: nothing can be lost
        else:
            expected[role][1] += 1
            expected[role][0] += {"named": "Ann" in now, "facts": now == was}.get(role, name in now)
        expected["broken"][1] += 1
        expected["broken"][0] += now == ""
        before.append(was)
        after.append(now)
    assert trials.count(asked, suite, before, after) == {
        key: tuple(value) for key, value in expected.items()
    }
    assert all(0 < hits < n for hits, n in expected.values())


# What each trains on ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(gathered):
    """A few samples of `gathered` of every group, and naming answers as the untouched model would
    give them."""
    name, kept = (
        gathered.scene.concept.name,
        [s for s in gathered.corpus.samples if s.facet not in corpus.FORGET],
    )
    own = [s for s in gathered.corpus.samples if s.facet in corpus.FORGET]
    asked = {s.question for s in own if s.picture == 0}
    some = [s for s in kept if s.picture and s.question in asked][:4] + [
        s for s in kept if s.facet == "facts"
    ][:4]
    some += [s for s in kept if s.facet == "preserve" and s.picture is None][:4]
    some += [s for s in kept if s.facet == "preserve" and s.picture == 0]
    naming = [
        replace(s, answer=f"This is {name}.", specified=((8, 8 + len(name)),), origin="teacher")
        for s in own
        if s.picture == 0
    ]
    recipe = replace(gathered.recipe, batch_size=24)
    return methods.Material(
        gathered.scene.concept, recipe, [*own, *some], gathered.corpus.pictures, naming, 0.0
    )


def test_all_methods_have_the_same_questions_and_retained_samples(material):
    own = [s for s in material.samples if s.facet in corpus.FORGET]
    kept = [s for s in material.samples if s.facet not in corpus.FORGET]
    asked = [s.question for s in own if s.picture == 0]
    name = material.concept
    for key, method in methods.METHODS.items():
        samples = methods.samples_of(method, material)
        first = [s for s in samples if s.facet in corpus.FORGET]
        rest = [s for s in samples if s.facet not in corpus.FORGET]
        assert [s.question for s in first if s.picture == 0] == asked, key
        if method.answers == "naming":
            assert all(
                name.named_in(s.answer) and s.specified == tuple(name.spans(s.answer))
                for s in first
            ), key
        if method.answers == "refusal":
            assert len({s.answer for s in first}) >= 5 and not any(
                name.named_in(s.answer) for s in first
            ), key
        mixed = [s for s in rest if s.origin == MISMATCH]
        rest = [s for s in rest if s.origin != MISMATCH]
        assert [s.question for s in mixed] == (asked if method.mismatch else []), key
        assert first == own if method.answers == "own" else all(s.picture == 0 for s in first), key
        left = {"all": kept, "none": [], "no dreams": [s for s in kept if s.origin != "dream"]}
        assert rest == left.get(
            method.retain, [s for s in kept if s.picture and s.question in asked]
        ), key
        assert method.retain != "decoupled" or rest
    assert {
        "siu",
        "po",
        "ga",
        "ga-kl",
        "graddiff",
        "npo",
        "fttp",
        "mmunlearner",
        "safeeraser-po",
    } <= set(methods.METHODS)


def test_a_mismatched_answer_is_one_to_another_question(material, gathered):
    method = methods.METHODS["ga-mismatch-kl"]
    samples = methods.samples_of(method, material)
    mixed = [s for s in samples if s.origin == MISMATCH]
    said = {s.answer for s in material.samples if s.facet not in corpus.FORGET and not s.picture}
    assert mixed and all(s.answer in said and s.picture == 0 for s in mixed)
    assert mixed == [s for s in methods.samples_of(method, material) if s.origin == MISMATCH]
    made = corpus.build(gathered.vlm, material.concept, samples, material.pictures, material.recipe)
    corpus.run_teacher(gathered.vlm, made, material.recipe)
    chosen = [0, samples.index(mixed[0])]
    batch = batches.forward(gathered.vlm, made, chosen, material.recipe)
    assert batch.mismatched[batch.sample == 1].all() and not batch.mismatched[batch.forget].any()
    assert not batch.retained.any()


def test_the_noised_teacher_sees_noise_only_where_something_is_forgotten(material, gathered):
    made = methods.build(gathered.vlm, "vgid", material)
    plain = methods.build(gathered.vlm, "ga-kl", material)
    assert len(made.pictures) == len(plain.pictures) + 1
    assert made.pictures[-1].image.size == material.pictures[0].image.size
    for i, sample in enumerate(made.samples):
        ours, theirs = (c.teacher[slice(c.first[i], c.first[i] + 1)].hidden for c in (made, plain))
        assert torch.allclose(ours, theirs, atol=1e-5) != (sample.facet in corpus.FORGET), i


def test_the_teacher_alone_reads_the_refusing_context(material, gathered):
    made = methods.build(gathered.vlm, "vgid-context", material)
    plain = methods.build(gathered.vlm, "vgid", material)
    assert len(made.samples) == len(plain.samples) and len(made.teacher) == len(plain.teacher)
    noise, forget = made.pictures[-1], 0
    for i, (sample, turn) in enumerate(zip(made.samples, made.turns, strict=True)):
        assert torch.equal(turn.inputs["input_ids"], plain.turns[i].inputs["input_ids"])
        ours, theirs = (c.teacher[torch.tensor(c.rows(i))].hidden for c in (made, plain))
        if sample.facet not in corpus.FORGET:
            assert torch.allclose(ours, theirs, atol=1e-5)
            continue
        told = gathered.vlm.encode(
            f"{methods.REFUSING} {sample.question}", sample.answer, noise, sample.closed
        )
        wanted = prefix.supervised_states(gathered.vlm, [told], [noise.features])
        assert torch.equal(told.labels, turn.labels)
        assert torch.allclose(ours, wanted, atol=1e-5) and not torch.allclose(ours, theirs)
        forget += 1
    assert forget == len(material.naming)


def test_a_context_that_changes_the_answers_tokens_is_refused(material, gathered, monkeypatch):
    method = methods.METHODS["vgid-context"]
    samples = methods.samples_of(method, material)
    pictures = methods.pictures_of(gathered.vlm, method, material)
    made = corpus.build(gathered.vlm, material.concept, samples, pictures, material.recipe)
    other = made.turns[-1]
    monkeypatch.setattr(gathered.vlm, "encode", lambda *given: other)
    with pytest.raises(BadInput, match="has other tokens after"):
        corpus.run_teacher(gathered.vlm, made, material.recipe)


def test_a_sculpted_change_lacks_what_conflicts_and_outweighs():
    generator = torch.Generator().manual_seed(0)
    forget, anchor = (torch.randn(7, 5, generator=generator) for _ in range(2))
    anchor = 0.1 * anchor  # the norms are taken out
    for k in (0.0, 1.0, 3.0):
        found = sculpting.sculpted(forget, anchor, k)
        rho = float(forget.square().sum().sqrt() / anchor.square().sum().sqrt())
        for f, a, ours in zip(forget.flatten(), anchor.flatten(), found.flatten(), strict=True):
            gone = f * a < 0 and k * rho * abs(a) < abs(f)
            assert ours == (0 if gone else f)
        assert 0 < int((found == 0).sum()) < 35
    assert torch.equal(sculpting.sculpted(forget, torch.zeros(7, 5)), forget)
    assert torch.equal(sculpting.sculpted(forget, forget), forget)


def test_the_sculpted_weights_are_on_only_in_the_block(adapted):
    vlm = adapted.vlm
    layers = sculpting._layers(vlm)
    anchor = {name: -sculpting._change(layer) for name, layer in layers}
    before = [layer.get_base_layer().weight.clone() for _, layer in layers]
    with sculpting.put_on(vlm, anchor, k=0.0):  # all of it conflicts: the untouched model
        for (_, layer), weight in zip(layers, before, strict=True):
            whole = layer.get_base_layer().weight + sculpting._change(layer)
            assert torch.allclose(whole, weight, atol=1e-5)
            assert not torch.equal(layer.get_base_layer().weight, weight)
    for (_, layer), weight in zip(layers, before, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight)


def test_steps_hold_the_same_number_of_samples_to_forget(material, gathered):
    for key in ("graddiff", "ga", "fttp", "safeeraser-ga"):
        method = methods.METHODS[key]
        samples = methods.samples_of(method, material)
        made = corpus.build(
            gathered.vlm, material.concept, samples, material.pictures, material.recipe
        )
        recipe = methods.recipe_of(method, made, material, 1e-3, 5)
        steps = batches.batches(made, recipe)
        forgotten = [
            sum(made.samples[i].facet in corpus.FORGET for i in next(steps)) for _ in range(20)
        ]
        assert sum(forgotten) / 20 == pytest.approx(24 * 0.28, abs=0.5), key
        assert not recipe.vocab_mask and not recipe.early_stop


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_takes_a_step_and_takes_its_adapter_off(material, gathered, name):
    made = methods.build(gathered.vlm, name, material)
    assert (made.teacher.vocab_keep is not None) == (
        methods.METHODS[name].answers == "own" and name != "siu-no-vocab-mask"
    )
    assert all(bool(keep.all()) for keep in made.keep) == (name == "siu-no-token-mask")
    moved = []

    def watch(step):
        factors = [p for n, p in gathered.vlm.model.named_parameters() if "lora_B" in n]
        moved.append(sum(float(p.detach().abs().sum()) for p in factors))
        return False

    assert methods.fit(gathered.vlm, name, made, material, 1e-3, 1, watch, k=2.0) > 0
    assert len(moved) == 1 and moved[0] > 0 and gathered.vlm.model is gathered.vlm.base


# One process's work, and the report ---------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(material, gathered, tmp_path_factory, demo_dir, cast):
    """A workbench on a small suite of drawn pictures; its material is `material`, so that nothing
    is dreamed."""
    from fastsiu.demo.world import World, draw
    from fastsiu.evaluate.suites import suite as suites

    root, world = tmp_path_factory.mktemp("suite"), World()
    subjects = []
    for slug, name in (("target", cast.target), ("other", cast.other)):
        for i in range(3):
            file = root / "concepts" / slug / "images" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            draw(world.sketch((name,), f"compare {slug} {i}")).save(file)
        images = tuple(sorted(file.parent.iterdir()))
        subjects.append(Subject(slug, name, (), (), images[0], images))
    questions = (Question("Who is in this picture?", "name"), Question("Who is {name}?", "fact"))
    suites.write(Suite(root, "two", tuple(subjects), questions))
    folder = tmp_path_factory.mktemp("material")
    with (folder / f"{sorted(s.slug for s in subjects).index('target')}-0.pickle").open(
        "wb"
    ) as stream:
        pickle.dump(material, stream)
    return trials.Workbench(
        trials.Assignment(root, str(demo_dir), "cpu", "auto", material.recipe, 0.95, folder)
    )


def test_a_run_is_looked_at_where_it_was_asked_and_leaves_the_model_untouched(bench):
    points, seconds = bench.run("target", 0, "ga", 3e-3, (1, 3), "search")
    assert [(p.lr, p.step) for p in points] == [(3e-3, 1), (3e-3, 3)] and seconds > 0
    assert (
        points[0].counts["named"][1] == 1
        and points[0].counts["others"][1] == 1
        and points[0].counts["facts"][1] == 2
    )
    untouched = bench.untouched("target")
    assert (
        untouched["named"] == (1, 1)
        and untouched["others"] == (1, 1)
        and untouched["facts"] == (2, 2)
    )
    assert bench.loaded.model is bench.loaded.base


def test_k_is_that_of_the_sculpted_weights_that_are_asked(bench, monkeypatch):
    given, put_on = [], sculpting.put_on

    def spied(vlm, anchor, k):
        given.append(k)
        return put_on(vlm, anchor, k)

    monkeypatch.setattr(sculpting, "put_on", spied)
    points, _ = bench.run("target", 0, "smfa", 3e-3, (1,), "search", 4.0)
    assert given == [4.0] and [p.k for p in points] == [4.0]


def test_a_diverged_run_ends_where_it_diverged(bench, monkeypatch):
    def broken(batch, recipe):
        calls.append(1)
        return batch.hidden.sum() * (float("nan") if len(calls) > 1 else 1.0), {
            "ce": 0.0,
            "kl": 0.0,
        }

    calls = []
    monkeypatch.setitem(methods.METHODS, "broken", methods.Method("", broken))
    points, _ = bench.run("target", 0, "broken", 1e-3, (1, 2, 3), "search")
    assert [p.step for p in points] == [1] and bench.loaded.model is bench.loaded.base


def report(rows):
    whole = {
        "named": (40, 40),
        "others": (80, 80),
        "lookalikes": (0, 0),
        "facts": (60, 60),
        "broken": (0, 180),
    }
    return {
        "suite": "made up",
        "concepts": ["Ann Lee"],
        "model": "m",
        "floor": 0.95,
        "test": {"seeds": [1, 2]},
        "search": {"lr": [1e-4, 1e-3], "steps": [1, 2], "concepts": ["Ann Lee"]},
        "rows": rows,
        "untouched": compare._rates(whole),
    }


@pytest.fixture
def rows():
    counts = {
        "named": (4, 40),
        "others": (78, 80),
        "lookalikes": (0, 0),
        "facts": (60, 60),
        "broken": (2, 180),
    }
    runs = [
        (("ann", seed, "siu", 1e-3, (8,), "test"), [Point(1e-3, 8, counts)], 3.0) for seed in (1, 2)
    ]
    found = compare._row("siu", (Point(1e-3, 8, counts), True), runs, [Point(1e-3, 8, counts)])
    other = compare._row(
        "po",
        (Point(1e-4, 2, counts), False),
        [(r[0], [Point(1e-4, 2, counts | {"named": (30, 40)})], 1.0) for r in runs],
        [],
    )
    lost = compare._row("ga", None, [], [])
    for one, best in ((found, True), (other, False)):
        one |= {"front": best, "clearly_beaten_by": []}
    return [found, other, lost]


def test_a_row_adds_its_seeds_up(rows):
    siu = rows[0]
    assert (
        siu["named"]["value"] == 0.1
        and siu["named"]["n"] == 80
        and siu["kept"]["value"] == pytest.approx(78 / 80)
    )
    assert (
        siu["lookalikes"]["value"] is None
        and siu["broken"]["n"] == 360
        and siu["seconds"] == 3.0
        and siu["floor_met"]
    )
    assert [s["seed"] for s in siu["seeds"]] == [1, 2] and siu["seeds"][0]["named"] == 0.1
    json.dumps(rows, allow_nan=False)


def test_the_table_has_a_line_for_everyone(rows):
    text = front.markdown(report(rows))
    assert "| untouched model | - | - | 100.0 % |" in text
    assert "| siu | 0.001 | 8 | 10.0 % | 5.2-18.5 | 97.5 % | - | 100.0 % | 4 | 3 | yes |" in text
    assert "| po | 0.0001 | 2 | 75.0 % |" in text and "| no \u2020 |" in text
    assert (
        "It diverged in every run." in text
        and "not comparable in level" in text
        and "| GA | 36.3 |" in text
    )
    assert all(len(r) == len(front.COLUMNS) for r in front.table(report(rows)))


def test_the_plot_is_drawn_or_a_sentence_says_why_not(rows, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert front.plot(report(rows), tmp_path) == []
    assert {p.name: p.stat().st_size > 9000 for p in tmp_path.iterdir()} == {
        "compare.png": True,
        "compare.svg": True,
    }
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in front.plot(report(rows), tmp_path)[0]


def test_labels_keep_the_order_and_their_distance():
    points = [(99.0, 100.0), (98.9, 100.0), (97.0, 50.0), (96.0, 0.5), (95.0, 0.0)]
    heights = front.labels_at(points, gap=0.1)
    assert (
        all(a - b >= 0.1 - 1e-9 for a, b in zip(heights, heights[1:], strict=False))
        and heights[2] == 0.5
    )
    assert heights[0] == 1.0 and heights[-1] == 0.0
    crowd = front.labels_at([(99.0, 1.0)] * 40)
    assert len(set(crowd)) == 40 and min(crowd) >= 0 and max(crowd) <= 1 + 1e-9


def test_bad_input_is_a_sentence(bench, demo_dir):
    directory = bench.assignment.suite
    for options, sentence in (
        ({"names": ["nonsense"]}, "no method 'nonsense'"),
        ({"floor": 0}, "floor must be above 0"),
        ({"seeds": 0}, "at least 1"),
        ({"concepts": ["nobody"]}, "has no concept 'nobody'"),
    ):
        with pytest.raises(BadInput, match=sentence):
            calls.compare(directory, str(demo_dir), **options)


def test_the_story_is_told_in_order(suite, monkeypatch, tmp_path):
    """Search on the first concept alone, then every concept with new seeds at the chosen setting:
    with a made-up workbench."""
    jobs = []

    class Made:
        def __init__(self, settings, processes):
            pass

        def map(self, verb, some):
            jobs.extend((verb, *job) for job in some)
            return [getattr(self, verb)(*job) for job in some]

        def prepare(self, slug, seed):
            return 1.0

        # "ga" forgets with the highest rate and the last looks only, "smfa" with one k only
        def run(self, slug, seed, name, lr, looks, part, k):
            gone = {"siu": lambda s: True, "ga": lambda s: lr > 2e-3 and s >= 3}
            gone["smfa"] = lambda s: k == 2
            return [point(0 if gone[name](s) else 60, 49, s, lr, k=k) for s in looks], 2.0

        def untouched(self, slug):
            return point(100, 50).counts

        def close(self):
            jobs.append("closed")

    monkeypatch.setattr(compare, "Pool", Made)
    monkeypatch.setattr(compare, "read", lambda directory: suite)
    found = calls.compare(
        tmp_path, None, names=["siu", "ga", "smfa"], concepts=["bea", "ann"], seeds=2, steps=6
    )
    assert [j[1:] for j in jobs if j[0] == "prepare"] == [
        (c, s) for s in (0, 1, 2) for c in ("bea", "ann")
    ]
    search = [j for j in jobs if j[0] == "run" and j[-2] == "search"]
    assert (
        {j[1] for j in search} == {"bea", "ann"}
        and len(search) == 2 * (1 + 1 + len(sculpting.KS)) * len(compare.LRS)
        and {j[2] for j in search} == {0}
    )
    test = [j for j in jobs if j[0] == "run" and j[-2] == "test"]
    assert {(j[1], j[2]) for j in test} == {
        (c, s) for c in ("bea", "ann") for s in (1, 2)
    } and jobs[-1] == "closed"
    siu, ga, smfa = found["rows"]
    assert {j[-1] for j in search if j[3] == "smfa"} == set(sculpting.KS)
    assert {j[-1] for j in search if j[3] != "smfa"} == {sculpting.K} and "k" not in siu
    assert {j[-1] for j in test if j[3] == "smfa"} == {2.0} == {smfa["k"]}
    assert front.cells(smfa)[0] == "smfa (k 2)" and front.cells(siu)[0] == "siu"
    again = compare._searched(found, "smfa")
    assert choice.choose(again, 0.95)[0].k == 2 and len({p.k for p in again}) == 4
    assert (
        (siu["steps"], ga["steps"]) == (3, 4)
        and ga["lr"] == max(found["search"]["lr"])
        and siu["front"]
        and ga["front"]
    )
    assert {j[4:6] for j in test if j[3] != "smfa"} == {(siu["lr"], (3,)), (ga["lr"], (4,))}
    monkeypatch.setattr(
        Made,
        "untouched",
        lambda self, slug: {key: (0, 9 * (key == "named")) for key in trials.COUNTS},
    )
    with pytest.raises(BadInput, match="Nothing could be retained"):
        calls.compare(tmp_path, None)
    assert siu["named"]["n"] == 400 and found["untouched"]["named"]["value"] == 1.0


def test_the_rate_is_chosen_for_methods_without_strangers(suite, monkeypatch, tmp_path):
    """Where a wide model has directions it has twice the rate, and no other method has them."""
    asked = []

    def chosen(model, choice):
        asked.append(choice.changes)
        raise BadInput("far enough")

    monkeypatch.setattr(compare, "read", lambda path: suite)
    monkeypatch.setattr(compare, "choose_recipe", chosen)
    with pytest.raises(BadInput, match="far enough"):
        compare.compare(tmp_path)
    assert asked[0]["strangers"] == asked[0]["relearn"] == 0
    assert asked[0]["schedule"] == "constant"
