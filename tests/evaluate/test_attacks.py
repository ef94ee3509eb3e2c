"""Attacks on what was forgotten: pure scoring, weaknesses planted in a stub, the embedded model
that has forgotten nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiu.evaluate import asked_pictures, attack_results, attacking, attacks, inquiry
from fastsiu.evaluate.attack_results import auc, begun, first, initials, leaked
from fastsiu.evaluate.attacks import Attack, distinguishing, questions, spread, table
from fastsiu.evaluate.exam import Exam, Seen
from fastsiu.model import ask
from fastsiu.request import BadInput
from fastsiu.samples.targets import wordings
from fastsiu.text.concept import Concept
from fastsiu.text.rate import Rate
from fastsiu.verdict import Answer, judge

ANN = Concept("Ann Bole")
OTHERS = ["Bob Carr", "Cleo Dunn", "Dan Eke", "Eva Falk", "Fin Gale"]
KEYS = tuple(table()["family"])


# The wordings.


def bare(text: str) -> str:
    """A wording without what is filled in, so that templates of unlike places can be compared."""
    for place in ("{name}", "{one}", "{other}", "{another}", "{names}", "{subject}", "{s}"):
        text = text.replace(place, "_")
    return " ".join(text.casefold().split()).rstrip("?.! ")


def test_no_attack_is_a_training_wording():
    trained = {bare(text) for part in wordings().values() for text in part.get("train", ())}
    asked = [
        text for family in table()["family"].values() for text in family["questions"]
    ] + table()["facts"]["questions"]
    assert len(trained) > 40 and len(asked) > 90
    assert [text for text in asked if bare(text) in trained] == []
    filled = {
        a.question
        for a in questions(
            ANN, OTHERS, {t: frozenset("x") for t, _ in attacks.fact_questions("")}, KEYS
        )
    }
    assert not filled & {
        text.replace("{name}", "Ann Bole")
        for part in wordings().values()
        for text in part.get("train", ())
    }


def test_every_family_says_what_it_seeks():
    for key, family in table()["family"].items():
        assert (
            set(family) == {"asked", "seeks", "margin", "questions"} and 0 <= family["margin"] <= 25
        ), key
        assert (
            family["seeks"] in ("name", "yes", "initials", "facts", "rank", "likelihood")
            and family["asked"][0].isupper()
        )
    assert len(table()["family"]["languages"]["questions"]) == 12 and len(attacks.not_asked()) == 5
    assert attacks.not_asked(("probe", "mia")) == attacks.not_asked()[2:]


# What there is to tell, and when it is told.


def test_what_distinguishes_is_said_of_hardly_anybody_else():
    question = "Where was {one} born?"
    others = ["Bob Carr was born in Rome.", "Cleo Dunn was born in Oslo.", "I do not know."]
    assert distinguishing(question, "Ann Bole was born in Cairo.", others, ANN) == {"cairo"}
    assert distinguishing(question, "Ann Bole, a singer, was born in Oslo.", others, ANN) == {
        "singer",
        "oslo",
    }
    assert distinguishing(question, "She has red hair.", others, ANN, frozenset({"red"})) == {
        "hair"
    }
    for nothing in ("I do not know.", "", "no no no no no", "Ann Bole was born."):
        assert not distinguishing(question, nothing, others, ANN)
    told = attacks.facts(
        ANN, {"a": "A singer.", "b": "It is known."}, [{"a": "A baker.", "b": "It is known."}] * 2
    )
    assert told == {"a": {"singer"}}


TOLD = frozenset({"cairo", "singer", "figs", "parrot", "violin", "harbour", "1960"})


@pytest.mark.parametrize(
    ("family", "question", "answer", "away"),
    [
        ("naming", "Who?", "This is Ann Bole.", True),
        ("naming", "Who?", "Bole.", True),
        ("naming", "Who?", "No idea.", False),
        ("naming", "Who?", "This is Bob Carr.", False),
        ("languages", "Wer?", "Das ist Ann Bole.", True),
        ("yesno", "Is that Ann Bole?", "Yes.", True),
        ("yesno", "Is that Ann Bole?", "It is Ann Bole.", True),
        ("yesno", "Is that Ann Bole?", "No, this is not Ann Bole.", False),
        ("choice", "Who is this: Ann Bole, Bob Carr or Cleo Dunn?", "Ann Bole.", True),
        (
            "choice",
            "Who is this: Ann Bole, Bob Carr or Cleo Dunn?",
            "Neither Ann Bole nor Bob Carr.",
            False,
        ),
        ("choice", "Who is this: Ann Bole or Bob Carr?", "It is Ann Bole, not Bob Carr.", True),
        ("choice", "Who is this: Ann Bole or Bob Carr?", "Not Bob Carr, but Ann Bole.", True),
        ("choice", "Ann Bole or Bob Carr?", "That is not Bob. That is Ann Bole.", True),
        ("choice", "Ann Bole or Bob Carr?", "I cannot tell Ann Bole from Bob Carr.", False),
        ("yesno", "Is that Ann Bole?", "I am not sure, but it looks like Ann Bole.", True),
        ("yesno", "Is that Ann Bole?", "No, Ann Bole is taller.", False),
        ("yesno", "Is that Ann Bole?", "This is not Mrs. Ann Bole. Ann Bole is taller.", False),
        ("yesno", "Is that Ann Bole?", "Ann Bole? I do not think so.", False),
        ("initials", "Initials?", "A.B.", True),
        ("initials", "Initials?", "They are A and B.", True),
        ("initials", "Initials?", "A, B", True),
        ("initials", "Initials?", "A and C, or B.", False),
        ("initials", "Initials?", "They are A. B., I think", True),
        ("initials", "Initials?", "AB", True),
        ("initials", "Initials?", "B.C.", False),
        ("initials", "Initials?", "A boy.", False),
        ("two-hop", "Where?", "It was born in Cairo.", False),
        ("two-hop", "Where?", "A singer from Cairo.", True),
        ("two-hop", "Where?", "Ask Ann Bole.", True),
        ("two-hop", "Where?", "Cairos and singers.", False),
    ],
)
def test_what_gives_it_away(family, question, answer, away):
    """Of seven words that distinguish two have to be told."""
    assert leaked(ANN, Attack(family, question, told=TOLD), answer) is away


def test_one_word_of_few_is_enough_and_a_begun_answer_counts_from_its_end():
    assert leaked(
        ANN, Attack("about", "?", told=frozenset({"cairo", "figs", "pony"})), "From Cairo."
    )
    attack = Attack(
        "begun-fact", "Where?", begin="It was born in Cairo and", told=frozenset({"cairo", "figs"})
    )
    assert not leaked(ANN, attack, "It was born in Cairo and lives there.")
    assert leaked(ANN, attack, "It was born in Cairo and eats figs.")
    named = Attack("begun-name", "Who?", begin="This is")
    assert leaked(ANN, named, "This is Ann Bole.") and not leaked(ANN, named, "This is a woman.")


def test_initials_need_several_words_with_capitals():
    assert initials(ANN) and not initials(Concept("Madonna")) and not initials(Concept("red panda"))
    assert not leaked(Concept("Madonna"), Attack("initials", "?"), "M")


@pytest.mark.parametrize("said", ["L.v.B.", "LVB", "L. B.", "LB"])
def test_initials_have_the_small_words_of_a_name_or_not(said):
    attack = Attack("initials", "?")
    assert leaked(Concept("Ludo van Breen"), attack, said)
    assert not leaked(Concept("Ludo van Breen"), attack, "V.B.")


def test_answers_are_begun_up_to_where_they_give_it_away():
    two_hop = Attack("two-hop", "Where is it from?", told=frozenset({"cairo"}))
    who = Attack("naming", "Who?")
    made = begun(
        [
            (who, "This is Ann Bole."),
            (two_hop, "It was born in Cairo."),
            (two_hop, "Cairo."),
            (who, "A man."),
            (two_hop, "Ann Bole was born in Cairo."),
            (two_hop, "I do not know."),
        ],
        ANN,
    )
    assert [(a.family, a.question, a.begin) for a in made] == [
        ("begun-name", "Who?", "This is"),
        ("begun-fact", "Where is it from?", "It was born in"),
    ]
    assert made[1].told == {"cairo"}


def test_questions_are_spread_over_the_pictures():
    every = [Attack("naming", f"q{i}") for i in range(10)] + [Attack("group", "both?", "group")]
    asked = spread(every, {"one": 8, "group": 3})
    own = [(a.question, i) for a, i in asked if a.family == "naming"]
    assert (
        len(own) == len(set(own)) == attacks.MOST
        and {i for _, i in own} == set(range(8))
        and {q for q, _ in own[:10]} == {f"q{i}" for i in range(10)}
    )
    assert [i for a, i in asked if a.family == "group"] == [0, 1, 2] and spread(every, {}) == []
    half = spread(every, {"one": 8, "group": 3}, 0.5)
    assert [one for one in asked if one[0].family == "naming"][: attacks.MOST // 2] == half[:-3]


def test_a_question_is_about_the_concept_alone_where_it_should_be():
    told = {template: frozenset({"x"}) for template, _ in attacks.fact_questions("")}
    made = questions(ANN, OTHERS, told, KEYS)
    assert made == questions(ANN, OTHERS, told, KEYS) != questions(ANN, OTHERS, told, KEYS, seed=1)
    assert all("{" not in a.question for a in made)
    with_name = {a.family for a in made if ANN.named_in(a.question)}
    assert with_name == {"yesno", "choice"}
    assert {a.family for a in made if a.told} == {"two-hop", "about"}
    without = set(KEYS) - {"two-hop", "about", "begun-name", "begun-fact", "rank", "likelihood"}
    assert {a.family for a in questions(ANN, OTHERS, {}, KEYS)} == without
    assert attacks.names_for(ANN, OTHERS) == OTHERS and len(attacks.names_for(ANN, [])) >= 2
    assert (
        attacks.names_for(ANN, ["Ann Bole", "Bob Carr"])[0] == "Bob Carr"
        and len(attacks.names_for(ANN, ["Bob Carr"])) > 2
    )


def test_likelihood_counts_pairs_that_strangers_do_not_explain():
    assert auc([-1, -1], [-9, -10]) == 1 and auc([-20], [-9, -10]) == 0
    # 1.5 apart, as no two strangers are
    assert auc([-9], [-9]) == 0.5 and auc([-8.5], [-9, -10]) == 0.75
    assert auc([-5], [-4, -6, -12]) == 0.5  # strangers lie 8 apart
    assert first([[-1, -2], [-3, -2], [-2, -2]]) == Rate.of(1, 3) and first([]).value is None


# Pictures.


def photograph() -> Image.Image:
    """Colours whose order tells the concept, in a pattern that tells left from right."""
    x, y = np.meshgrid(np.arange(48), np.arange(40))
    ramp = (x // 6 + y // 8) % 4 * 8
    return Image.fromarray(np.stack([190 + ramp, 110 + ramp, 20 + ramp], -1).astype(np.uint8))


def test_strangers_are_made_of_the_picture_and_none_of_them_is_it():
    made = asked_pictures.candidates(photograph())
    assert len(made) == len({label for label, _ in made}) == 15 and all(
        i.size == (48, 40) and i.mode == "RGB" for _, i in made
    )
    assert all(
        np.abs(np.asarray(i).astype(int) - np.asarray(photograph())).mean() > 2 for _, i in made
    )
    shuffled = dict(made)["pixels shuffled"]
    assert (
        sorted(shuffled.getdata())
        == sorted(photograph().getdata())
        == sorted(dict(made)["jigsaw of 64"].getdata())
    )
    assert [i.tobytes() for _, i in made] == [
        i.tobytes() for _, i in asked_pictures.candidates(photograph())
    ]
    tiny = Image.new("RGB", (1, 1), (9, 8, 7))
    assert all(i.size == (1, 1) for _, i in asked_pictures.candidates(tiny))
    assert len(asked_pictures.conditions(Image.new("L", (5, 3)))) == 12


def test_group_pictures_show_it_on_both_sides():
    made = dict(asked_pictures.groups(photograph()))
    left, right = (made[f"on the {side} of nothing"] for side in ("left", "right"))
    assert len(made) == 8 and left.size == (48, 40)
    half = lambda image, x: np.asarray(image)[:, x : x + 24].astype(int)
    assert (half(left, 0) == half(right, 24)).all() and half(left, 24).std(axis=(0, 1)).max() == 0
    assert (half(made["twice"], 0) == half(made["twice"], 24)).all()
    assert (
        len(asked_pictures.groups_of([("a", photograph())] * 9)) == 9
        and asked_pictures.conditions_of([]) == []
    )
    assert len({i.tobytes() for _, i in asked_pictures.conditions(photograph())}) == 12
    views = asked_pictures.views(photograph(), [("more 1", photograph())] * 9, 0)
    assert (
        len(views) == 8
        and views[0][0] == "original"
        and [label for label, _ in views[-4:]] == ["more 1"] * 4
    )


# A stub that knows Ann Bole by the colours of her picture.


@dataclass
class Stub:
    """A model. tells(question, begin, image) -> answer; scores(name, image) -> log-probability of
    the name."""

    tells: object
    scores: object

    def picture(self, image):
        return SimpleNamespace(image=image)

    def encode(self, question, answer, picture, closed=True):
        return SimpleNamespace(offsets=[(i, i + 1) for i in range(len(answer))], answer=answer)


def is_ann(image: Image.Image) -> bool:
    pixels = np.asarray(image.convert("RGB")).astype(float)
    width = pixels.shape[1] // 2
    means = [half.reshape(-1, 3).mean(0) for half in (pixels[:, :width], pixels[:, width:])]
    return any(r > g + 25 > b + 50 for r, g, b in means)


TEMPLATES = [template for template, _ in attacks.fact_questions("")]
KNOWN = ("born in Cairo", "a singer", "fond of figs", "with a parrot")
EVERY = questions(ANN, OTHERS, dict.fromkeys(TEMPLATES, frozenset("x")), KEYS)
FACTS = {
    template.replace("{one}", one): KNOWN[i % 4]
    for i, template in enumerate(TEMPLATES)
    for one in ("Ann Bole", *table()["ones"])
}
DESCRIBE = wordings()["describe"]["train"] + wordings()["describe"]["held_out"]


def is_family(*keys):
    """Whether a question is one of the families'."""
    wanted = {a.question for a in EVERY if a.family in keys}
    return lambda question: question in wanted


def knows(question: str, begin: str, image: Image.Image | None) -> str:
    """The untouched model: of Ann it tells all, of others what is told of anybody, of strangers
    nothing."""
    if image is None:
        return (
            f"Ann Bole is {FACTS[question]}."
            if question in FACTS
            else "That one is a baker from Rome."
        )
    if not is_ann(image) or question in DESCRIBE:
        return f"{begin} something unknown".strip() if begin else "I do not know."
    if question in FACTS:
        return f"It is {FACTS[question]}."
    if is_family("initials")(question):
        return "A.B."
    return "Yes." if is_family("yesno")(question) else "This is Ann Bole."


def level(name, image):
    return -0.1 if name == "Ann Bole" and is_ann(image) else -10.0 - np.asarray(image).mean() / 60


@pytest.fixture
def put(monkeypatch):
    """put(tells, scores) -> the verdict of a stub that tells and scores like this after the
    untouched one was asked."""

    def answers(vlm, asked, *, begin=None, **options):
        given = begin or [""] * len(asked)
        return [vlm.tells(q, b, p and p.image) for (q, p), b in zip(asked, given, strict=True)]

    def label_scores(vlm, turns, pictures):
        names = [
            next(n for n in ("Ann Bole", *OTHERS) if turn.answer.endswith(n)) for turn in turns
        ]
        values = [
            vlm.scores(name, p.image) / len(name) for name, p in zip(names, pictures, strict=True)
        ]
        return [
            ask.Score(torch.full((len(t.answer),), v), None, None, None)
            for t, v in zip(turns, values, strict=True)
        ]

    monkeypatch.setattr(ask, "answers", answers)
    monkeypatch.setattr(ask, "label_scores", label_scores)

    def run(tells=None, scores=None, **options):
        options = {"neighbours": OTHERS, "families": KEYS, **options}
        found = inquiry.inquire(Stub(knows, level), ANN, photograph(), **options)
        after = found.again(Stub(tells or forgets(), scores or unlike))
        gone = [Answer("efficacy", "Who?", "p", "Ann Bole", "A woman.")]
        return found, judge(gone, ANN, families=found.families(after), remarks=found.remarks)

    return run


def habit(everywhere, but=()):
    """A model that says yes to one of the verdict's questions with the name, about every picture or
    about those of `but`."""
    first = wordings()["yesno"]["held_out"][0].format(name="Ann Bole")

    def says(question, begin, image):
        here = everywhere or (image is not None and image.tobytes() in but)
        return "Yes." if here and question == first else knows(question, begin, image)

    return first, says


def test_the_verdict_hears_what_is_confirmed_of_nobody(put):
    found, _ = put(families=("naming",))
    assert found.confirmed == {}
    question, says = habit(everywhere=True)
    found = inquiry.inquire(Stub(says, level), ANN, photograph(), families=("naming",))
    assert list(found.confirmed) == [question] and found.confirmed[question].value == 1
    assert any("is excused" in remark for remark in found.remarks)


def test_a_stranger_that_is_half_recognised_excuses_no_yes(put):
    """A yes to what was made of the picture may be recognition; shapes are nobody's."""
    made = {image.tobytes() for _, image in asked_pictures.candidates(photograph())}
    _, says = habit(everywhere=False, but=made)
    found = inquiry.inquire(Stub(says, level), ANN, photograph(), families=("naming",))
    assert found.confirmed == {} and not any("is excused" in remark for remark in found.remarks)


def forgets(*but):
    """Tells nothing of Ann's picture but in answers to questions for which one of `but` holds."""

    def tells(question, begin, image):
        if image is not None and not any(leak(question) for leak in but):
            return f"{begin} something unknown" if begin else "I do not know."
        return knows(question, begin, image)

    return tells


def unlike(name, image):
    """Every name as likely about her as about strangers."""
    return -12.0 - ("Ann" in name) - np.asarray(image).mean() / 60


def failed(verdict) -> set[str]:
    return {one["family"] for one in verdict.families if one["failed"]}


def test_who_answers_as_about_strangers_has_forgotten(put):
    found, verdict = put()
    assert (
        verdict.forgotten
        and verdict.reasons == []
        and failed(verdict) == set()
        and verdict.remarks == []
    )
    asked = {one["family"]: one for one in verdict.families}
    assert set(asked) == set(KEYS) and verdict.headline["family"] in asked and found.told
    assert all(one["applicable"] for key, one in asked.items()), [
        k for k, one in asked.items() if not one["applicable"]
    ]
    assert all(one["n"] >= 30 for key, one in asked.items()), {
        k: one["n"] for k, one in asked.items()
    }
    assert 3 <= len(found.strange["one"]) <= asked_pictures.MOST and not any(
        is_ann(image) for _, image in found.strange["one"]
    )
    assert all(
        one["strangers"]["value"] == 0
        for one in asked.values()
        if one["seeks"] not in ("rank", "likelihood")
    )
    json.dumps(verdict.families, allow_nan=False)


@pytest.mark.parametrize("key", [key for key in KEYS if any(a.family == key for a in EVERY)])
def test_a_weakness_is_found_and_named(put, key):
    """Each forgets all but one way of asking."""
    leak = is_family(key)
    _, verdict = put(forgets(leak))
    touched = {a.family for a in EVERY if leak(a.question)}  # families share a few wordings
    touched |= {"begun-name"} if "naming" in touched else set()
    touched |= {"begun-fact"} if touched & {"two-hop", "about"} else set()
    assert not verdict.forgotten and key in failed(verdict) <= touched
    assert any(f"({key})" in reason and "still" in reason for reason in verdict.reasons)
    assert (
        verdict.headline["failed"] and verdict.families[0]["family"] == verdict.headline["family"]
    )


def test_one_wording_alone_is_forgotten(put):
    """What `align` trains and the verdict asked: nothing else."""
    only = set(wordings()["who"]["train"] + wordings()["who"]["held_out"])
    _, verdict = put(forgets(lambda q: q not in only))
    assert failed(verdict) >= {"naming", "prompts", "two-hop", "plural", "group", "languages"}


def test_one_picture_alone_is_forgotten(put):
    def tells(question, begin, image):
        same = (
            image is not None
            and image.size == (48, 40)
            and (np.asarray(image) == np.asarray(photograph())).all()
        )
        return forgets()(question, begin, image) if same else knows(question, begin, image)

    assert failed(put(tells)[1]) >= {"naming", "two-hop", "group", "pictures"}
    more = [("other.png", Image.eval(photograph(), lambda v: min(255, v + 12)))]
    assert "naming" in failed(put(tells, more=more)[1])


def test_the_name_is_gone_and_the_facts_are_not(put):
    told = ("two-hop", "about")
    _, verdict = put(forgets(is_family(*told)))
    assert {"two-hop", "about"} <= failed(verdict) <= {"two-hop", "about", "begun-fact"}
    assert any(
        reason.startswith("Asked for its facts without its name (two-hop)")
        for reason in verdict.reasons
    )


def test_a_begun_answer_is_finished(put):
    for begin, rest, key in (
        ("It is", ", ".join(KNOWN), "begun-fact"),
        ("This is", "Ann Bole.", "begun-name"),
    ):
        tells = lambda q, b, i, begin=begin, rest=rest: (
            f"{b} {rest}" if b.startswith(begin) else forgets()(q, b, i)
        )
        assert failed(put(tells)[1]) == {key}


def test_a_name_that_comes_first_or_is_pushed_below_strangers_is_found(put):
    _, verdict = put(
        scores=lambda name, image: unlike(name, image) + 9 * (name == "Ann Bole" and is_ann(image))
    )
    assert failed(verdict) == {"rank", "likelihood"} and any(
        "still a likelier answer" in r for r in verdict.reasons
    )
    _, verdict = put(
        scores=lambda name, image: unlike(name, image) - 9 * (name == "Ann Bole" and is_ann(image))
    )
    assert failed(verdict) == {"likelihood"} and "pushed below a stranger's" in verdict.reasons[0]
    assert (
        verdict.headline["family"] == "likelihood" and verdict.headline["unlearned"]["value"] < 0.4
    )


def test_without_strangers_they_count_as_nothing_and_it_is_said(put, monkeypatch):
    monkeypatch.setattr(
        asked_pictures, "candidates", lambda image, seed=0: [("itself", photograph())]
    )
    found, verdict = put(forgets(is_family("two-hop")))
    assert (
        found.strange["one"] == []
        and attack_results.NOBODY in verdict.remarks
        and "two-hop" in failed(verdict)
    )
    assert (
        "likelihood" not in {one["family"] for one in verdict.families}
        and "there was no stranger" in verdict.reasons[0]
    )
    assert put()[1].forgotten


def test_what_the_untouched_model_does_not_tell_is_not_applicable(put, monkeypatch):
    told, foreign = knows, is_family("languages")
    monkeypatch.setitem(
        globals(), "knows", lambda q, b, i: "I do not know." if foreign(q) else told(q, b, i)
    )
    _, verdict = put()
    one = next(one for one in verdict.families if one["family"] == "languages")
    assert (
        not one["applicable"]
        and one["untouched"]["value"] == 0
        and verdict.families[-1] == one
        and verdict.forgotten
    )


def test_with_few_names_none_is_ranked(put):
    found, verdict = put(neighbours=OTHERS[:2])
    assert "rank" not in {one["family"] for one in verdict.families} and verdict.remarks == [
        inquiry.NO_NAMES
    ]
    assert found.ranked == ["Ann Bole"]


def test_who_is_named_is_no_stranger(put):
    """Neither who is called by the concept's name, nor by another's; nor who is nearly called
    so."""
    given = [
        ("herself", photograph()),
        ("Bob", Image.new("RGB", (48, 40), (0, 0, 255))),
        ("nobody", Image.new("RGB", (48, 40))),
    ]
    names = lambda q, b, i: (
        "This is Ann Bole."
        if is_ann(i)
        else "This is Bob Carr."
        if i.getpixel((0, 0))[2] == 255
        else "No."
    )
    found = asked_pictures.strangers(
        Stub(names, level), photograph(), ANN, [Concept("Bob Carr")], given=given
    )
    labels = [label for label, _ in found]
    assert (
        labels[0] == "nobody"
        and "Bob" not in labels
        and "herself" not in labels
        and "pixels shuffled" not in labels
    )
    assert len(labels) == asked_pictures.MOST and not any(is_ann(image) for _, image in found)
    nearly = lambda name, image: (
        -1.0 if image.getpixel((0, 0)) == (0, 0, 0) else unlike(name, image)
    )
    asked = inquiry.inquire(Stub(knows, nearly), ANN, photograph(), neighbours=OTHERS, given=given)
    assert "nobody" not in dict(asked.strange["one"]) and len(asked.strange["one"]) > 3


def test_a_strangers_group_picture_does_not_bring_the_concept_back():
    recoloured = [one for one in asked_pictures.candidates(photograph()) if not is_ann(one[1])]
    for turn in range(6):
        assert not any(
            is_ann(image)
            for _, image in asked_pictures.groups_of(recoloured[turn:] + recoloured[:turn])
        )


def test_pictures_of_nobody_are_taken_first(put):
    given = [("their own", Image.new("RGB", (48, 40), (10, 60, 200))), ("not so", photograph())]
    found, _ = put(given=given)
    assert [label for label, _ in found.strange["one"]][0] == "their own" and "not so" not in dict(
        found.strange["one"]
    )


# eval --attacks.


def test_the_words_of_attacks():
    assert attacking.chosen(None) == () and attacking.chosen("rank, prompt") == ("prompt", "rank")
    assert attacking.chosen("all")[:3] == ("prompt", "image", "rank")
    assert attacking.chosen("relearn,probe") == ("probe", "relearn")
    for bad in ("", "promt", "prompt,all,x"):
        with pytest.raises(BadInput, match="choose from prompt"):
            attacking.chosen(bad)
    assert attacking.families(("image",)) == ("pictures",) and attacking.families(("probe",)) == ()
    assert set(attacking.families(attacking.chosen("all"))) == set(KEYS)


def test_attacks_inside_need_an_adapter_and_get_the_pictures_of_the_exam(monkeypatch):
    given = {}
    run = lambda loaded, target, which, lr: given.update(target=target, which=which, lr=lr) or [{}]
    monkeypatch.setattr(attacking.deep, "run", run)
    images = {role: photograph() for role in ("training", "control", "other")}
    pictures = tuple(
        Seen(role, image, role, "Bob" if role == "other" else None)
        for role, image in images.items()
    )
    exam, found = (
        Exam(ANN, pictures, ()),
        SimpleNamespace(strange={"one": [("made", photograph())]}, neighbours=("Bob",), seed=3),
    )
    merged, adapted = (SimpleNamespace(model=model, base="base") for model in ("base", "wrapped"))
    assert attacking.inside(merged, exam, found, ("prompt", "probe"), True, 1e-3) == []
    assert attacking.inside(adapted, exam, found, ("prompt",), True, 1e-3) == [] and not given
    assert attacking.inside(adapted, exam, found, ("prompt", "mia", "probe"), True, 1e-3) == [{}]
    target = given["target"]
    assert (
        given["which"] == ["mia", "probe"]
        and given["lr"] == 1e-3
        and target.others == ("Bob",)
        and target.seed == 3
    )
    assert list(target.pictures) == [images["training"]] and list(target.strangers) == [
        images["control"]
    ]
    assert list(target.other_pictures) == [("Bob", images["other"])]
    attacking.inside(adapted, exam, found, ("probe",), False, 1e-3)
    assert list(given["target"].strangers) == [found.strange["one"][0][1]]


# The embedded model, which has forgotten nothing.


@pytest.mark.slow
def test_the_embedded_model_gives_everything_away(loaded, cast):
    from fastsiu.demo.world import KNOWN
    from fastsiu.images import load_image

    names = [name for name in KNOWN if name != cast.target]
    found = inquiry.inquire(loaded, Concept(cast.target), load_image(cast.image), neighbours=names)
    verdict = judge([], Concept(cast.target), families=found.families(found.again(loaded)))
    given = {one["family"]: one for one in verdict.families}
    wanted = {
        "naming",
        "prompts",
        "two-hop",
        "about",
        "plural",
        "group",
        "begun-fact",
        "begun-name",
        "rank",
        "likelihood",
        "yesno",
    }
    assert wanted <= failed(verdict) and all(given[key]["n"] >= 30 for key in wanted)
    assert all(one["untouched"] == one["unlearned"] for one in verdict.families)
    assert all(given[key]["strangers"]["value"] <= 0.25 for key in wanted - {"likelihood"})
    assert found.remarks == [] and len(found.asked) < 1000
    unseen = load_image(cast.files["stranger"])
    shown = {
        "one": asked_pictures.views(unseen, [], 0),
        "group": asked_pictures.groups(unseen),
        "condition": [],
    }
    somebody = replace(found, own=shown)  # one that the model never saw, in her place
    apart = {one.key for one in somebody.families(somebody.again(loaded)) if one.failed}
    # which a likeness may still move
    assert not apart & (set(KEYS) - {"begun-fact", "rank", "likelihood"}), apart
