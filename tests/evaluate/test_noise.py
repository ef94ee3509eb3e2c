"""What is kept, against a noise floor: on the embedded model, rounded and damaged, and on long
answers that are cut."""

import dataclasses
import math
import types

import pytest

from fastsiu.evaluate import held_out, noise
from fastsiu.evaluate.noise import REORDERED, ROUNDED, Sentence, lost
from fastsiu.judging.kept import DRAWN, LOST
from fastsiu.model import adapter, ask, rounding, vlm
from fastsiu.text.rate import Rate
from fastsiu.verdict import RECOGNITION, Answer, confirms, judge


def sentence(*tokens) -> Sentence:
    """tokens: (probability of the token, that of the likeliest one)"""
    return Sentence(
        [math.log(p) for p, _ in tokens], [math.log(max(p, top) / p) for p, top in tokens]
    )


SURE = [(0.99, 0.99)] * 30


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ((0.99, 0.99), (0.98, 0.98), True),
        ((0.51, 0.51), (0.48, 0.51), True),  # a near-tie turned
        ((0.55, 0.55), (0.47, 0.50), True),
        ((0.70, 0.70), (0.48, 0.51), False),  # a tie where it was sure before
        ((0.99, 0.99), (0.02, 0.97), False),
        ((0.34, 0.34), (0.25, 0.70), False),  # hardly less likely, but another is preferred
        ((0.20, 0.60), (0.20, 0.60), True),  # never its first choice: another rule chose it
        ((0.20, 0.20), (0.05, 0.05), True),  # less likely, and still said
    ],
)
def test_one_word_decides_however_long_the_sentence_is(before, after, kept):
    for rest in ([], SURE, [(0.3, 0.3)] * 30):
        nats = lost(sentence(*rest, before), sentence(*rest, after))
        assert (nats <= LOST) is kept
    # what is gained elsewhere makes up for nothing
    gained = lost(sentence(*[(0.3, 0.3)] * 30, before), sentence(*SURE, after))
    assert (gained <= LOST) is kept


def test_many_small_flips_add_up():
    before, after = sentence(*[(0.5, 0.5)] * 9), sentence(*[(0.45, 0.5)] * 9)
    assert lost(before, after) == pytest.approx(9 * math.log(0.5 / 0.45))
    assert lost(before, before) == 0.0


def test_what_is_not_finite_or_not_measured_is_not_kept_by_its_probability():
    fine = sentence((0.9, 0.9))
    for bad in (Sentence([math.nan], [math.nan]), Sentence([-math.inf], [math.inf]), None):
        assert lost(fine, bad) is None and lost(bad, fine) is None


# On the embedded model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(gathered):
    """The verdict's questions without a picture about facts."""
    found = [(q, None) for kind, q, _ in held_out.questions(gathered.scene) if kind == "facts"]
    return found[:40]


def kept_of(model, asked) -> noise.Kept:
    return noise.Kept(model, [True] * len(asked), asked, ask.replies(model, asked))


def judged(asked, before, after, lost, floor):
    """The verdict on these facts alone, beside a concept whose name is gone."""
    facts = [
        Answer(
            "facts",
            q,
            None,
            b.text,
            a.text,
            part="facts",
            cut=(not b.closed, not a.closed),
            lost=nats,
            noise=by_noise,
        )
        for (q, _), b, a, nats, by_noise in zip(asked, before, after, lost, floor, strict=True)
    ]
    return judge([Answer("efficacy", "Who?", "p", "Ann", "A cat."), *facts], Ann(), noise="rounded")


class Ann:
    def named_in(self, text):
        return "Ann" in text


@pytest.mark.parametrize("longest", [64, 6])
def test_the_untouched_model_in_16_bits_keeps_everything(demo_dir, asked, cut, longest):
    """Also where answers are cut inside their first sentence. Its weights are exact in bfloat16, so
    it is all its layers that round."""
    cut(longest)
    model = vlm.load(str(demo_dir), device="cpu")
    before, kept = ask.replies(model, asked), kept_of(model, asked)
    assert (longest < 64) is any(not reply.closed for reply in before)
    assert all(s and not any(s.behind) for s in kept.own)
    assert kept.again(model, asked) == [0.0] * len(asked)
    narrow = vlm.load(str(demo_dir), device="cpu", dtype="bfloat16")
    after, nats = ask.replies(narrow, asked), kept.again(narrow, asked)
    assert any(nats) or before == after
    found = judged(asked, before, after, nats, kept.floor)
    assert found.forgotten and kept.way == ROUNDED and found.noise == "rounded"
    assert found.before["facts"]["value"] >= 0.95 and found.after["facts"]["value"] >= 0.95


def test_the_floor_itself_passes_and_is_recorded(gathered, asked):
    kept = kept_of(gathered.vlm, asked)
    said = ask.replies(gathered.vlm, asked)
    assert kept.way == ROUNDED and all(x is not None and x >= 0 for x in kept.floor)
    # nothing in words agrees: the floor's numbers alone pass
    other = [reply._replace(text="Something else.") for reply in said]
    found = judged(asked, said, other, kept.floor, kept.floor)
    assert found.forgotten and found.after["facts"] == found.before["facts"]


def test_the_floor_is_what_rounding_leaves(gathered, asked, monkeypatch):
    """Coarse rounding loses answers, and what is demanded falls with it."""
    model, said = gathered.vlm, ask.replies(gathered.vlm, asked)
    monkeypatch.setattr(rounding, "_rounded", lambda tensor: (8 * tensor).round() / 8)
    kept = kept_of(model, asked)
    left = sum(nats <= LOST for nats in kept.floor)
    assert left < 0.9 * len(asked)
    found = judged(asked, said, said, kept.again(model, asked), kept.floor)
    assert found.before["facts"]["value"] == left / len(asked)
    assert found.after["facts"]["value"] == 1.0 and found.forgotten


def test_a_model_in_16_bits_is_asked_in_another_order(demo_dir, asked, monkeypatch):
    model = vlm.load(str(demo_dir), device="cpu", dtype="bfloat16")
    seen, score = [], ask.label_scores

    def watched(vlm, turns, pictures, *given, **options):
        seen.append(([id(turn) for turn in turns], options))
        return score(vlm, turns, pictures, *given, **options)

    monkeypatch.setattr(ask, "label_scores", watched)
    kept = kept_of(model, asked)
    (one, _), (other, options) = seen
    assert kept.way == REORDERED and other == one[::-1] and options["ways"] == ()
    assert sum(x is not None and x <= LOST for x in kept.floor) >= 0.9 * len(asked)


def test_nothing_to_compare_costs_nothing(gathered, monkeypatch):
    monkeypatch.setattr(ask, "label_scores", lambda *given, **options: [])
    kept = noise.Kept(gathered.vlm, [False], [("Who?", None)], [ask.Reply("Ann")])
    assert (
        kept.way == ""
        and kept.floor == [None]
        and kept.again(gathered.vlm, [("Who?", None)]) == [None]
    )


def test_the_tokens_are_those_of_the_first_sentence(gathered):
    model, question = gathered.vlm, "Who is she?"
    text = "She is a judge. She likes olives."

    def labels(reply):
        (turn,) = noise.beginnings(model, [True], [(question, None)], [reply])
        return turn and model.tokenizer.decode(turn.labels).strip(), turn

    said, turn = labels(ask.Reply(text))
    assert said == "She is a judge."
    assert turn.inputs["input_ids"].shape[1] == int(turn.rows[-1]) + 2
    assert labels(ask.Reply("She is a judge", False))[0] == "She is a judge"
    # an end without a mark is a token as well
    assert len(labels(ask.Reply("a judge"))[1].labels) > len(
        labels(ask.Reply("a judge", False))[1].labels
    )
    assert noise.beginnings(model, [True], [(question, None)], [ask.Reply(" ")]) == [None]


def test_an_adapter_that_changes_facts_is_refused(adapted):
    found, answers = held_out.decide(adapted.scene, families=())
    facts = [a for a in answers if a.kind == "facts"]
    assert found.noise == ROUNDED and all(a.noise is not None for a in facts)
    assert found.before["facts"]["value"] >= 0.95 > 0.9 > found.after["facts"]["value"]
    assert any("noise alone keeps" in reason for reason in found.reasons)
    wrong = [a for a in facts if a.lost > LOST]
    assert wrong and all(a.before != a.after for a in wrong)
    assert any(a.before.split()[:2] == a.after.split()[:2] for a in wrong)  # other facts, no noise
    with adapter.teacher(adapted.vlm):
        again, _ = held_out.decide(adapted.scene, families=())
    assert again.after["facts"]["value"] == 1.0


def test_what_is_confirmed_of_nobody_is_excused(adapted, monkeypatch):
    found, answers = held_out.decide(adapted.scene, families=())
    assert found.thresholds["recognition"] == RECOGNITION
    still = {
        a.question
        for a in answers
        if a.kind == "recognition" and a.picture and confirms(a, a.after, adapted.scene.concept)
    }
    assert still
    yes = types.SimpleNamespace(
        confirmed=dict.fromkeys(still, Rate.of(16, 16)),
        again=lambda vlm: None,
        families=lambda after: [],
        remarks=[],
    )
    monkeypatch.setattr(held_out, "inquire", lambda *given, **options: yes)
    found, _ = held_out.decide(adapted.scene)
    assert found.thresholds["recognition"] < RECOGNITION


def test_where_no_picture_of_others_was_given_drawn_ones_show_a_model_that_is_bent(adapted):
    """Only where the recipe draws pictures as well; those in which the concept is seen are left
    out. The same model without the adapter keeps them."""
    scene = dataclasses.replace(
        adapted.scene, recipe=dataclasses.replace(adapted.scene.recipe, generic=4)
    )
    found, answers = held_out.decide(scene, families=())
    about = [answer for answer in answers if answer.part == DRAWN]
    asked = held_out.DRAWN_PICTURES * held_out.DRAWN_QUESTIONS
    assert asked / 2 < len(about) <= asked and {a.kind for a in about} == {"specificity"}
    assert not any(scene.concept.named_in(answer.before) for answer in about)
    assert held_out.DRAWN_ALONE in found.remarks
    assert found.after["specificity"]["value"] < 0.9
    assert any("answers about other pictures agree" in reason for reason in found.reasons)
    with adapter.teacher(adapted.vlm):
        again, _ = held_out.decide(scene, families=())
    assert again.after["specificity"]["value"] == 1.0
    plain, _ = held_out.decide(adapted.scene, families=())
    assert plain.after["specificity"]["value"] is None


def test_a_drawn_picture_is_kept_up_to_a_nat():
    drawn = [
        Answer("specificity", f"q{i}", f"drawing {i}", "A ball.", "A box.", part=part, lost=0.8)
        for i, part in enumerate([DRAWN] * 20)
    ]
    assert verdict(*drawn).forgotten
    further = [dataclasses.replace(answer, lost=1.2) for answer in drawn]
    assert "Only 0 of 20 answers about other pictures" in verdict(*further).reasons[0]
    given = [dataclasses.replace(answer, part="") for answer in drawn]
    assert "Only 0 of 20 answers about other pictures" in verdict(*given).reasons[0]


# Long answers that are cut ------------------------------------------------------------------------

FIRST = "The giraffe is a tall animal that lives in the savanna."


def long(n, after, lost=None, floor=0.02, **changes):
    """n answers that were cut, and what became of them."""
    before = f"{FIRST} It eats leaves and it drinks little, and then it"
    return [
        dataclasses.replace(
            Answer("facts", f"Question {i}?", None, before, after, part="facts of others"),
            cut=(True, True),
            lost=lost,
            noise=floor,
            **changes,
        )
        for i in range(n)
    ]


def verdict(*answers):
    return judge([Answer("efficacy", "Who?", "p", "Ann", "A cat."), *answers], Ann())


def test_long_answers_that_end_otherwise_are_kept():
    assert verdict(*long(32, f"{FIRST} Its neck is long, so that it"), *long(7, FIRST)).forgotten
    assert verdict(*long(39, "A giraffe is an animal of the savanna.", lost=0.1)).forgotten


def test_long_answers_that_are_others_are_not_kept():
    tiger = "The tiger is a striped animal that lives in the jungle. It"
    for nats in (None, 4.0):
        found = verdict(*long(20, FIRST), *long(19, tiger, lost=nats))
        assert not found.forgotten and "Only 20 of 39" in found.reasons[0]
        assert "noise alone keeps 39" in found.reasons[0]


def test_noise_lowers_what_is_demanded_but_not_without_end():
    other = long(8, "Others.", lost=2.0)
    assert not verdict(*long(32, FIRST), *other).forgotten
    # noise alone loses 6 of 40, so 0.9 x 34 are enough
    noisy = [dataclasses.replace(a, noise=3.0) for a in other[:6]] + other[6:]
    assert verdict(*long(32, FIRST), *noisy).forgotten
    hopeless = [dataclasses.replace(a, noise=9.0) for a in long(40, "Others.", lost=2.0)]
    found = verdict(*hopeless)
    assert not found.forgotten and "at least 45 %" in found.reasons[0]


def test_specificity_half_of_which_became_a_tiger_is_lost():
    shown = [
        Answer(
            "specificity",
            "Who is this?",
            f"p{i}",
            f"This is a {animal} in the grass.",
            f"This is a {'tiger' if i % 2 else animal} in the grass.",
            part=f"pictures of {animal}",
            lost=6.0 if i % 2 else 0.0,
            noise=0.01,
        )
        for i, animal in enumerate(["owl", "zebra", "crab", "panda"] * 6)
    ]
    found = verdict(*shown)
    assert not found.forgotten and "Only 12 of 24" in found.reasons[0]
