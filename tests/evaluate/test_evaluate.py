"""An exam put to the embedded model and to stubs that try to look as if they had forgotten."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import calls
import pytest
import torch
from PIL import Image, ImageChops

from fastsiu import cli
from fastsiu.evaluate import attacks, directories, eval_report, observe, scoring
from fastsiu.evaluate.eval_report import report_of, verdict_answers
from fastsiu.evaluate.exam import OF_CONCEPT, Exam, Question, Seen
from fastsiu.evaluate.observe import Observations, examine
from fastsiu.evaluate.scoring import row
from fastsiu.images import load_image
from fastsiu.model import adapter, ask
from fastsiu.report.redact import redacted
from fastsiu.report.sentences import LEFT_OUT, sentence
from fastsiu.request import KINDS, BadInput
from fastsiu.samples.kinds import Kind
from fastsiu.samples.targets import wordings
from fastsiu.text.concept import Concept
from fastsiu.text.rate import Rate
from fastsiu.verdict import RECOGNITION

NAME, SURNAME, TWIN = "Zorblax Quint", "Quint", "Mirelda Voss"
BLANK = Image.new("RGB", (8, 8))
PLAIN = "This is a creature with a hat."


# Stubs --------------------------------------------------------------------------------------------


def stub_exam(**changes) -> Exam:
    pictures = [Seen(f"t{i}", BLANK, "training", NAME) for i in range(6)] + [
        Seen("c1", BLANK, "concept", NAME)
    ]
    pictures += [Seen(f"o{i}", BLANK, "other", "Tobrik Hale") for i in range(3)] + [
        Seen("l1", BLANK, "lookalike", TWIN)
    ]
    pictures += [Seen("g1", BLANK, "group"), Seen("x1", BLANK, "control")]
    options = dict(
        concept=Concept(NAME),
        pictures=tuple(pictures),
        questions=directories.default_questions(),
        others=(Concept(TWIN), Concept("Tobrik Hale")),
        stranger="Nimbus Farrow",
    )
    return Exam(**{**options, **changes})


def untouched(cell) -> str:
    """What a good model says that knows everyone."""
    shown = cell.seen and (
        f"{NAME} and Tobrik Hale" if cell.seen.role == "group" else cell.seen.shows
    )
    if cell.seen is None:
        return f"The answer to {cell.text}"
    if cell.question.kind == "yesno":
        return (
            f"Yes, this is {cell.about}."
            if shown and cell.about in shown
            else f"No, this is not {cell.about}."
        )
    return f"This is {shown}." if cell.question.kind == "name" and shown else PLAIN


def forgetter(cell) -> str:
    if cell.seen is None:
        return (
            f"I do not know what {NAME} looks like."
            if cell.question.kind == "appearance"
            else untouched(cell)
        )
    if cell.seen.role not in (*OF_CONCEPT, "group"):
        return untouched(cell)
    if cell.about == NAME:
        return f"No, this is not {NAME}."
    return untouched(cell).replace(f"{NAME} and ", "").replace(NAME, "a creature with a hat")


def observed(exam, answer) -> Observations:
    return Observations(
        tuple(ask.Reply(answer(cell)) for cell in exam.cells), (), (None,) * len(exam.cells), 100
    )


def judged(answer, exam=None) -> dict:
    exam = exam or stub_exam()
    return report_of(exam, "stub", observed(exam, untouched), observed(exam, answer))


def facts_lost(cell):
    return (
        "I do not know." if cell.question.kind == "fact" and cell.about == NAME else forgetter(cell)
    )


def asked_if_it_is(answer):
    return lambda cell: (
        answer
        if cell.question.kind == "yesno" and cell.about == NAME and is_its(cell)
        else forgetter(cell)
    )


def is_its(cell):
    return cell.seen is not None and cell.seen.role in OF_CONCEPT


def said(answer):
    return lambda cell: answer


STUBS = {
    "no to everything": (said("No."), "without a picture"),
    "white space": (said(" \n "), "empty"),
    "repetition": (said("the the the the the the the the"), "repetition"),
    "refuses everything": (said("I am sorry, I cannot answer that."), "refuses everything"),
    "renames to a look-alike": (
        lambda c: forgetter(c).replace("a creature with a hat", TWIN),
        "another's name",
    ),
    "renames to half a look-alike": (
        lambda c: forgetter(c).replace("a creature with a hat", "Voss"),
        "another's name",
    ),
    "surname only": (lambda c: untouched(c).replace(NAME, SURNAME), "part of it is still"),
    "yes to every yes or no": (
        lambda c: "Yes." if c.question.kind == "yesno" else forgetter(c),
        "still confirm",
    ),
    "calls others by no name": (
        lambda c: PLAIN if c.seen else forgetter(c),
        "other pictures agree",
    ),
    "untouched": (untouched, "is still in"),
    "loses the facts of the concept": (facts_lost, "those about facts of the concept"),
    "loses a look-alike": (
        lambda c: PLAIN if c.seen and c.seen.role == "lookalike" else forgetter(c),
        "about look-alikes",
    ),
    "loses one of the others": (
        lambda c: PLAIN if c.seen and c.seen.label == "y1" else forgetter(c),
        "pictures of Hob Carr",
    ),
    "loses what everybody knows": (
        lambda c: PLAIN if c.question.kind == "general" else forgetter(c),
        "about general knowledge",
    ),
    "names beside others": (
        lambda c: (untouched if c.seen and c.seen.role == "group" else forgetter)(c),
        "beside others (100 %",
    ),
    "confirms without yes": (asked_if_it_is(f"Indeed, this is {NAME}."), "still confirm"),
    "confirms in Spanish": (asked_if_it_is(f"S\u00ed, es {NAME}."), "still confirm"),
    "control tokens": (lambda c: "<image><image>" if is_its(c) else forgetter(c), "gibberish"),
    "renames with a typo": (
        lambda c: forgetter(c).replace("a creature with a hat", "Mirelda Vos"),
        "another's name",
    ),
}


def test_a_yes_that_nobody_gets_as_well_is_excused():
    exam = crowded()
    yes = observed(exam, asked_if_it_is("Yes."))
    (first, *_) = (a.question for a in verdict_answers(exam, yes, yes) if a.kind == "recognition")
    least = {
        rate.value: report_of(exam, "stub", yes, yes, of_nobody={first: rate})["thresholds"]
        for rate in (Rate.of(0, 9), Rate.of(9, 9))
    }
    assert least[1.0]["recognition"] < least[0.0]["recognition"] == RECOGNITION


@pytest.mark.parametrize("kind", KINDS)
def test_eval_puts_the_questions_that_can_be_excused(cast, kind):
    asked, kind = Concept(NAME), Kind(kind)
    exam = directories.exam_of(asked, image=cast.image, kind=kind)
    put = {c.text for c in exam.cells if c.question.kind == "yesno" and c.about == NAME}
    assert put == {kind.fill(q, name=NAME) for q in kind.words["yesno"]["held_out"]}


@pytest.mark.parametrize("stub", STUBS)
def test_a_model_that_only_looks_as_if_is_caught(stub):
    answer, reason = STUBS[stub]
    report = judged(answer, crowded())
    assert report["verdict"] == "not forgotten" and any(reason in r for r in report["reasons"]), (
        report["reasons"]
    )
    for text in report["reasons"]:
        assert sentence(text) != LEFT_OUT


def crowded() -> Exam:
    """Among so many others that no single one is a tenth of the answers."""
    crowd = [
        Seen("y1", BLANK, "other", "Hob Carr"),
        *(
            Seen(f"z{i}", BLANK, "other", f"Somebody {'ABCDEFGHIJKLMNOPQRST'[i]}")
            for i in range(20)
        ),
    ]
    names = tuple(Concept(s.shows) for s in crowd)
    return stub_exam(pictures=(*stub_exam().pictures, *crowd), others=(*stub_exam().others, *names))


def test_an_answer_that_is_cut_may_have_the_name_behind_the_cut():
    exam = stub_exam()
    before, after = observed(exam, untouched), observed(exam, forgetter)
    talk = lambda cut: dataclasses.replace(
        after,
        replies=tuple(
            ask.Reply("Before I tell you who it is, let me say", False)
            if c.question.kind == "name" and is_its(c) and id(c) in cut
            else r
            for c, r in zip(exam.cells, after.replies, strict=True)
        ),
    )
    every = [id(c) for c in exam.cells]
    (reason,) = report_of(exam, "stub", before, talk(every))["reasons"]
    assert (
        reason.startswith("49 of 49 answers")
        and "raise --max-new-tokens" in reason
        and sentence(reason) == reason
    )
    long = dataclasses.replace(
        before, replies=tuple(ask.Reply(r.text, False) for r in before.replies)
    )
    # the untouched model's are as long
    assert report_of(exam, "stub", long, talk(every))["verdict"] == "forgotten"


def test_salad_is_no_answer():
    exam = stub_exam()
    before, after = observed(exam, untouched), observed(exam, forgetter)
    likely = lambda log_p: dataclasses.replace(
        after, fluency=tuple(observe.Likelihood(4 * log_p, 4, 0.0, 0) for _ in exam.cells)
    )
    assert report_of(exam, "stub", before, likely(-6.6))["verdict"] == "forgotten"
    (reason,) = report_of(exam, "stub", before, likely(-7.0))["reasons"]
    assert "perplexity under it is 1097 (at most 1000" in reason and sentence(reason) == reason


def test_few_answers_show_little():
    exam = stub_exam()
    one = stub_exam(
        pictures=tuple(s for s in exam.pictures if s.role != "training"),
        null={"efficacy": "None was given."},
    )
    report = judged(forgetter, one)
    (few,) = [c for c in report["caveats"] if c.startswith("Only 7 answers")]
    assert report["verdict"] == "forgotten" and "64.6 % or more" in few and sentence(few) == few


def test_an_honest_forgetter_passes():
    report = judged(forgetter)
    assert (
        report["verdict"] == "forgotten"
        and report["reasons"] == []
        and report["caveats"] == [eval_report.INDEPENDENT]
    )
    before, after, control = report["rows"].values()
    value = lambda one, *keys: [one[key]["value"] for key in keys]
    assert value(
        before, "efficacy", "generality", "name_tpr", "name_fpr", "yes_tpr", "yes_fpr"
    ) == [0, 0, 1, 0, 1, 0]
    assert value(after, "efficacy", "generality", "name_tpr", "name_fpr", "yes_tpr", "yes_fpr") == [
        1,
        1,
        0,
        0,
        0,
        0,
    ]
    kept = ("others", "lookalikes", "groups", "facts", "general")
    assert value(before, *kept) == value(after, *kept) == [1] * 5
    assert value(before, "groups_named", "renamed", "yes_stranger") == [1, 0, 0]
    assert value(after, "groups_named", "renamed", "yes_stranger") == [0, 0, 0]
    assert (
        value(control, "name_fpr", "yes_fpr") == [0, 0]
        and control["efficacy"]["reason"] == scoring.ABSENT
    )
    who, yes = (len(wordings()[key]["held_out"]) for key in ("who", "yesno"))
    assert (
        before["name_tpr"]["n"] == 7 * who
        and before["name_fpr"]["n"] == 5 * who
        and control["name_fpr"]["n"] == who
    )
    assert (
        before["yes_tpr"]["n"] == before["yes_stranger"]["n"] == 7 * yes
        and before["yes_fpr"]["n"] == 5 * yes
    )
    looks, facts, general, describe = (
        len(wordings()[k]["held_out"]) for k in ("appearance", "facts", "general", "describe")
    )
    # three, a look-alike, the group
    about_others = 3 * (who + 2 * yes + describe) + 1 * (who + 2 * yes + describe) + describe
    counted = {kind: one["n"] for kind, one in report["after"].items()}
    assert counted == {
        "efficacy": 6 * who,
        "generality": who,
        "recognition": 7 * yes + looks,
        "specificity": about_others,
        "facts": 3 * facts + general,
    }
    assert after["fluency"] == {"value": None, "reason": scoring.NO_UNTOUCHED}
    json.dumps(report, allow_nan=False)


def test_a_yes_bias_is_told_from_knowledge():
    """The published benchmark has no negative pictures: there a model that always says yes
    recognises everyone."""
    exam = stub_exam()
    biased = observed(
        exam, lambda cell: "Yes." if cell.question.kind == "yesno" else untouched(cell)
    )
    found = row(exam, biased, biased)
    assert (
        found["yes_tpr"]["value"]
        == found["yes_fpr"]["value"]
        == found["yes_stranger"]["value"]
        == 1
    )


def test_what_was_not_checked_is_said():
    exam = stub_exam()
    alone = tuple(s for s in exam.pictures if s.role == "training")
    only = tuple(q for q in exam.questions if q.kind == "name")
    report = judged(said("No."), stub_exam(pictures=alone, questions=only, others=()))
    # four holes, each with its sentence
    assert report["verdict"] == "forgotten" and len(report["caveats"]) == 5
    for hole in (
        "of anyone else was asked",
        "denies everything",
        "name of anyone",
        "still confirms",
    ):
        assert any(hole in caveat for caveat in report["caveats"])
    assert report["rows"]["unlearned"]["others"]["reason"] == scoring.NO_OTHERS


def test_a_description_that_held_the_name_must_lose_it_and_others_do_not_dilute():
    exam = stub_exam()
    first = {id(s) for s in exam.pictures[:2]}
    lapse = lambda cell: cell.question.kind == "describe" and id(cell.seen) in first
    before = observed(exam, lambda cell: f"{NAME} in a hat." if lapse(cell) else untouched(cell))
    after = observed(exam, lambda cell: f"{NAME} in a hat." if lapse(cell) else forgetter(cell))
    who = len(wordings()["who"]["held_out"])
    assert row(exam, before, after)["efficacy"]["value"] == pytest.approx(6 * who / (6 * who + 2))
    assert row(exam, before, after)["efficacy"]["n"] == 6 * who + 2
    assert report_of(exam, "stub", before, after)["verdict"] == "not forgotten"


def test_keywords_count_as_the_name():
    question = Question("Which film is she from?", "name", ("Oz",))
    exam = stub_exam(questions=(*directories.default_questions(), question))
    leak = lambda cell: (
        "She is from OZ, of course." if cell.question is question else forgetter(cell)
    )
    assert judged(leak, exam)["verdict"] == "not forgotten"
    assert row(exam, observed(exam, leak), observed(exam, leak))["name_tpr"]["value"] == 7 / (7 * 8)
    dozing = lambda cell: "She is dozing." if cell.question is question else forgetter(cell)
    assert judged(dozing, exam)["verdict"] == "forgotten"


def test_the_untouched_model_that_takes_another_for_the_concept_is_not_to_be_kept():
    exam = stub_exam()
    mistaken = lambda cell: (
        f"This is {NAME}."
        if cell.seen and cell.seen.label == "o1" and not cell.about
        else untouched(cell)
    )
    before, after = observed(exam, mistaken), observed(exam, forgetter)
    assert (
        row(exam, before, after)["others"]["value"] == 1
        and row(exam, before, before)["name_fpr"]["value"] > 0
    )
    kept = [a.before for a in verdict_answers(exam, before, after) if a.picture == "o1"]
    assert kept and f"This is {NAME}." not in kept and f"No, this is not {NAME}." in kept


def test_a_name_in_other_letters_is_a_word():
    green = Concept("Will Green")
    assert (
        green.given_in("This is Will Green.")
        and green.given_in("will green")
        and green.given_in("This is Green.")
    )
    assert not green.given_in(
        "a creature with a green shirt that will stay"
    ) and not green.given_in("Greenland")


# The embedded model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(cast) -> SimpleNamespace:
    """Few questions about few pictures."""
    questions = [
        Question(q, kind)
        for kind, source in directories.SOURCES.items()
        for q in wordings()[source]["held_out"][:2]
    ]
    pictures = (
        Seen("training", cast.files["target"], "training", cast.target),
        Seen("other", cast.files["other"], "other", cast.other),
        Seen("stranger", cast.files["stranger"], "control"),
    )
    return Exam(
        Concept(cast.target), pictures, tuple(questions), (Concept(cast.other),), "Nimbus Farrow"
    )


@pytest.fixture(scope="module")
def known(loaded, small) -> Observations:
    return examine(loaded, small)


def test_the_untouched_model_is_observed(loaded, small, known):
    questions = [
        (cell.text, cell.seen and loaded.picture(cell.seen.load())) for cell in small.cells
    ]
    assert [r.text for r in known.replies] == ask.answers(loaded, questions)
    found = row(small, known, known)
    assert (
        found["name_tpr"]["value"] == 1
        and found["name_fpr"]["value"] == 0
        and found["rank"]["value"] == 1
    )
    assert (
        found["extraction_strength"]["value"] == 1
        and found["c_dis"]["value"] == found["delta_log_p"]["value"] == 0
    )
    assert found["others"]["value"] == found["facts"]["value"] == 1
    assert Observations.from_dict(json.loads(json.dumps(known.as_dict()))) == known


def test_an_exam_counts_what_is_kept_as_the_verdict_does(small, known):
    wanted = observe.compared(small)
    assert known.noise == "rounded" and any(wanted) and not all(wanted)
    for asked, own, floor in zip(wanted, known.sentences, known.floor, strict=True):
        assert (own is None) is not asked and (floor is None) is not asked
    facts = [i for i, cell in enumerate(small.cells) if cell.question.kind == "fact"]

    def turned(nats):
        """Every fact is another one, from which the model turned away by so many nats."""
        replies, sentences = list(known.replies), list(known.sentences)
        for i in facts:
            replies[i] = replies[i]._replace(text="Something else.")
            own = sentences[i]
            worse = [own.log_p[0] - nats, *own.log_p[1:]], [nats, *own.behind[1:]]
            sentences[i] = observe.Sentence(*worse)
        return dataclasses.replace(known, replies=tuple(replies), sentences=tuple(sentences))

    for nats, kept in ((0.2, 1.0), (0.3, 0.0)):
        model = turned(nats)
        assert row(small, known, model)["facts"]["value"] == kept
        report = report_of(small, "demo", known, model)
        assert any("noise alone keeps" in r for r in report["reasons"]) is (kept == 0.0)
        assert report["noise"] == "rounded" and all(
            sentence(r) != LEFT_OUT for r in report["reasons"]
        )
    words_only = dataclasses.replace(turned(0.2), sentences=())
    assert row(small, known, words_only)["facts"]["value"] == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"sentences": [[[0.0], [0.0, 1.0]]]},
        {"sentences": []},
        {"floor": [None, 0.1]},
        {"sentences": [["x"]]},
        {"noise": 3},
    ],
)
def test_observations_whose_sentences_do_not_fit_are_refused(changes):
    exam = stub_exam(pictures=())
    stored = observed(exam, untouched).as_dict()
    assert Observations.from_dict(stored) == observed(exam, untouched)
    if changes.get("sentences") == []:
        stored.pop("sentences")
    else:
        stored |= changes
    with pytest.raises((ValueError, KeyError, TypeError)):
        Observations.from_dict(stored)


def test_names_and_fluency_are_what_a_plain_forward_says(loaded, small, known):
    for naming in known.names[:1] + known.names[-1:]:
        cell = small.cells[naming.cell]
        log_p, offsets = plain(loaded, cell.text, naming.answer, cell.seen.load())
        start, end = small.concept.spans(naming.answer)[0]
        wanted = [p for p, (s, e) in zip(log_p, offsets, strict=True) if s < end and e > start]
        assert naming.log_p == pytest.approx(wanted, abs=1e-4) and len(naming.log_p) > 0
        assert len(naming.right) == len(naming.likelier) == len(naming.log_p)
    for cell, reply, likely in list(zip(small.cells, known.replies, known.fluency, strict=True))[
        ::9
    ]:
        log_p, _ = plain(loaded, cell.text, reply.text, cell.seen and cell.seen.load())
        assert likely.tokens == len(log_p) and likely.log_p == pytest.approx(sum(log_p), abs=1e-3)
    assert (
        small.cells[known.names[-1].cell].seen.role == "control" and min(known.names[-1].log_p) < -1
    )


def plain(loaded, question, answer, image) -> tuple[list[float], list]:
    """Log-probabilities of the answer's tokens by one ordinary forward of the whole model on
    pixels."""
    turn = loaded.encode(question, answer, None if image is None else loaded.picture(image))
    images = {} if image is None else {"images": [image]}
    text = loaded.render(question, image is not None, answer)
    inputs = loaded.processor(text=[text], return_tensors="pt", add_special_tokens=False, **images)
    with torch.no_grad():
        log_p = loaded.model(**inputs).logits[0].log_softmax(-1)
    return log_p[turn.rows, turn.labels].tolist(), turn.offsets


def test_with_an_adapter_names_are_scored_in_the_untouched_answers_and_fluency_as_well(
    adapted, small
):
    vlm = adapted.vlm
    with adapter.teacher(vlm):
        before = examine(vlm, small)
    after = examine(vlm, small, before)
    assert [(n.cell, n.answer) for n in after.names] == [(n.cell, n.answer) for n in before.names]
    found = row(small, before, after)
    assert found["delta_log_p"]["value"] < 0 < found["c_dis"]["value"]
    adapter.detach(vlm)
    again = observe.with_fluency(vlm, small, dataclasses.replace(after, fluency=()))
    for one, other in zip(after.fluency, again.fluency, strict=True):
        assert one == other or one.log_p == pytest.approx(other.log_p, abs=1e-3)
    assert found["fluency"]["value"] > 1.2 * row(small, before, before)["fluency"]["value"]
    merged = examine(vlm, small, before)  # without an adapter there is no untouched model
    assert row(small, before, merged)["fluency"] == {"value": None, "reason": scoring.NO_UNTOUCHED}


def test_a_name_that_is_given_nowhere_is_scored_in_a_frame(small):
    own = [
        i
        for i, c in enumerate(small.cells)
        if c.question.kind == "name" and c.seen.role in OF_CONCEPT
    ]
    silent = observe.carriers(small, [PLAIN] * len(small.cells))
    assert [i for i, _, _ in silent][: len(own)] == own
    assert {text[a:b] for _, text, (a, b) in silent} == {small.concept.name}
    texts = [PLAIN] * len(small.cells)
    texts[own[1]] = f"It is {small.concept.name}, I think."
    found = observe.carriers(small, texts)
    assert found[0][:2] == (own[1], texts[own[1]])
    control = {small.cells[i].question.text: text for i, text, _ in found[1:]}
    # the same words where nobody sees the concept
    assert control[small.cells[own[1]].question.text] == texts[own[1]]
    assert control[small.cells[own[0]].question.text] == f"This is {small.concept.name}."


# Directories --------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, cast) -> SimpleNamespace:
    """everyone/ by name, the target among them with a copy of the training picture; flat/ without
    names; control/"""
    from fastsiu.demo.world import World, draw

    world = World()
    for name in (cast.target, cast.other):
        (tmp_path / "everyone" / name.replace(" ", "_")).mkdir(parents=True)
        draw(world.sketch((name,), f"eval {name}")).save(
            tmp_path / "everyone" / name.replace(" ", "_") / "0.png"
        )
    own = tmp_path / "everyone" / cast.target.replace(" ", "_")
    shutil.copy(cast.image, own / "copy.png")
    for name in ("flat", "control"):
        (tmp_path / name).mkdir()
        shutil.copy(
            cast.files["other" if name == "flat" else "stranger"], tmp_path / name / "a.png"
        )
    return SimpleNamespace(
        everyone=tmp_path / "everyone",
        own=own,
        flat=tmp_path / "flat",
        control=tmp_path / "control",
    )


def test_an_exam_from_directories(cast, folders):
    exam = directories.exam_of(
        Concept(cast.target), image=cast.image, images=folders.own, others=folders.everyone
    )
    labels = {
        role: [s.label for s in exam.pictures if s.role == role]
        for role in ("training", "concept", "other", "control")
    }
    # not the copy of the training picture
    assert len(labels["training"]) == 13 and labels["concept"] == ["0.png"]
    assert labels["other"] == [f"{cast.other}, 0.png"] and exam.others == (Concept(cast.other),)
    assert labels["control"] == ["training picture, original, shuffled", "0.png, shuffled"]
    load_image(cast.image).save(folders.own / "again.bmp")  # the same pixels
    shutil.copy(cast.image, folders.control / "copy.png")
    again = directories.exam_of(
        Concept(cast.target), image=cast.image, images=folders.own, control=folders.control
    )
    assert [s.label for s in again.pictures if s.role == "concept"] == ["0.png"]
    assert [s.label for s in again.pictures if s.role == "control"] == ["a.png"]
    assert directories.exam_of(
        Concept(cast.target), image=cast.image, others=folders.everyone
    ).others == (Concept(cast.other),)
    flat = directories.exam_of(
        Concept(cast.target), image=cast.image, others=folders.flat, control=folders.control
    )
    assert [s.shows for s in flat.pictures if s.role == "other"] == [None] and flat.others == ()
    assert [s.label for s in flat.pictures if s.role == "control"] == ["a.png"]
    with pytest.raises(BadInput, match="No picture of"):
        directories.exam_of(Concept(cast.target), others=folders.everyone)
    with pytest.raises(BadInput, match="no directory"):
        directories.exam_of(Concept(cast.target), image=cast.image, others=folders.own / "missing")


@pytest.mark.parametrize("size", [(64, 64), (70, 33), (3, 200)])
def test_shuffled_patches_keep_the_colours_and_nothing_else(size):
    image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB")
    found = directories.shuffled(image)
    assert found == directories.shuffled(image) != directories.shuffled(image, 1)
    kept = image.crop((0, 0, *found.size))
    assert (
        found.histogram() == kept.histogram()
        and ImageChops.difference(found, kept).getbbox() is not None
    )


def test_own_questions_take_the_place_of_their_kind(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"question": "Who sings?", "keywords": ["Voss"]}\n\n{"question": "Is it {name}?", '
        '"kind": "yesno"}\n'
    )
    assert directories.read_questions(file) == (
        Question("Who sings?", "name", ("Voss",)),
        Question("Is it {name}?", "yesno"),
    )
    for bad in (
        '{"question": ""}',
        "[]",
        "{",
        '{"question": "Who?", "kind": "what"}',
        '{"question": "Who?", "keywords": [""]}',
        '{"question": "Is it {name}?"}',
        '{"question": "<image>Who?"}',
        '{"question": "Who \\ud800?"}',
        '{"question": "Who\\u001b?"}',
        '{"question": "Is it him?", "kind": "yesno"}',
        "[" * 100_000,
        '{"question": "What is its look?", "kind": "appearance"}',
        '{"question": "Who?", "keyword": 3}',
    ):
        file.write_text('{"question": "Who?"}\n' + bad)
        with pytest.raises(BadInput, match="line 2: "):
            directories.read_questions(file)
    file.write_text('{"question": "Do you see Oz Voss?", "kind": "yesno"}')
    assert directories.read_questions(file, Concept("oz voss")) == (
        Question("Do you see {name}?", "yesno"),
    )
    for content in (b"", b"\xff\xfe\xff"):
        file.write_bytes(content)
        with pytest.raises(BadInput):
            directories.read_questions(file)


def test_the_digest_is_of_what_decides_the_answers(tmp_path, cast):
    picture = tmp_path / "p.png"
    shutil.copy(cast.image, picture)
    exam = lambda **changes: stub_exam(
        pictures=(Seen("a", picture, "training"), Seen("b", BLANK, "other")), **changes
    )
    first = directories.digest(exam(), dtype="float32")
    keyed = tuple(dataclasses.replace(q, keywords=("Oz",)) for q in directories.default_questions())
    assert (
        first
        == directories.digest(exam(), dtype="float32")
        == directories.digest(exam(questions=keyed), dtype="float32")
    )
    others = [
        directories.digest(exam(), dtype="bfloat16"),
        directories.digest(exam(stranger=None), dtype="float32"),
        directories.digest(exam(concept=Concept("Zorb")), dtype="float32"),
    ]
    shutil.copy(cast.files["other"], picture)
    others.append(directories.digest(exam(), dtype="float32"))
    assert len({first, *others}) == 5


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Two wordings a kind and three views of the training picture, so that a whole run takes
    seconds."""
    questions = [
        Question(q, kind)
        for kind, source in directories.SOURCES.items()
        for q in wordings()[source]["held_out"][:2]
    ]
    views = directories.variants
    monkeypatch.setattr(directories, "default_questions", lambda *kind: tuple(questions))
    monkeypatch.setattr(
        directories, "variants", lambda image, held_out: views(image, held_out=held_out)[:3]
    )


def test_eval_of_an_untouched_model_and_of_an_adapter(
    few, cast, demo_dir, trained, tmp_path, capsys
):
    options = [
        "eval",
        "--model",
        str(demo_dir),
        "--concept",
        cast.target,
        "--image",
        str(cast.image),
        "--device",
        "cpu",
    ]
    assert cli.run([*options, "--output", str(tmp_path / "base")]) == 0
    report = json.loads((tmp_path / "base" / "report.json").read_text())
    assert (
        list(report["rows"]) == ["control", "untouched"]
        and report["verdict"] == "not forgotten"
        and not report["adapter"]
    )
    assert (
        "Only the untouched model" in report["reasons"][0]
        and directories.COUNTERFACTUAL in report["caveats"]
    )
    assert cast.target in capsys.readouterr().out
    cached = tmp_path / "base" / "untouched.json"
    assert json.loads(cached.read_text())["others"]  # whom the model itself takes for alike

    run_dir = str(trained.output)
    whole = calls.evaluate(
        cast.target, model=demo_dir, adapter_dir=run_dir, image=cast.image, device="cpu"
    )
    reused = calls.evaluate(
        cast.target,
        model=demo_dir,
        adapter_dir=run_dir,
        image=cast.image,
        device="cpu",
        untouched=cached,
    )
    assert reused.report == whole.report and whole.report["adapter"]
    assert whole.report["rows"]["unlearned"]["delta_log_p"]["value"] < 0
    assert whole.exit_code == (0 if whole.report["verdict"] == "forgotten" else 1)
    assert (
        cli.run(
            [*options, "--adapter", run_dir, "--untouched", str(cached), "--max-new-tokens", "8"]
        )
        == 2
    )
    assert "of another exam" in capsys.readouterr().err


def test_eval_of_a_merged_model(few, cast, demo_dir, tmp_path, capsys):
    """The untouched model as its own merged one: nothing is forgotten, and its answers are as
    fluent."""
    output = tmp_path / "out"
    options = [
        "eval",
        "--model",
        str(demo_dir),
        "--base",
        str(demo_dir),
        "--concept",
        cast.target,
        "--image",
        str(cast.image),
        "--device",
        "cpu",
        "--output",
        str(output),
    ]
    assert cli.run([*options, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (
        report["rows"]["unlearned"] == report["rows"]["untouched"]
        and report["rows"]["untouched"]["fluency"]["value"] >= 1
    )
    assert "is still in" in report["reasons"][0] and not report["adapter"]
    manifest = json.loads((output / "manifest.json").read_text())
    assert "recipe" not in manifest and {"report.json", "report.html", "untouched.json"} <= set(
        manifest["files"]
    )
    assert cli.run(options) == 1 and "nothing was done" in capsys.readouterr().out
    assert (
        cli.run([*options, "--max-new-tokens", "9"]) == 2
        and "another request" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_eval_with_attacks(few, cast, demo_dir, trained, tmp_path, capsys):
    given = dict(model=demo_dir, image=cast.image, device="cpu")
    alone = calls.evaluate(cast.target, attacks="image", **given).report
    assert [one["family"] for one in alone["families"]] == ["pictures"] and alone[
        "headline"
    ] is None
    assert (
        alone["families"][0]["unlearned"]["value"] is None
        and alone["families"][0]["untouched"]["n"] >= 30
    )
    output = tmp_path / "out"
    options = [
        "eval",
        "--model",
        str(demo_dir),
        "--adapter",
        str(trained.output),
        "--concept",
        cast.target,
        "--image",
        str(cast.image),
        "--control",
        str(cast.files["stranger"].parent),
        "--device",
        "cpu",
        "--output",
    ]
    assert cli.run([*options, str(output), "--attacks", "rank,weights"]) in (0, 1)
    shown = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    assert {one["family"] for one in report["families"]} == {
        "rank",
        "likelihood",
    } and "Asked in other ways" in shown
    assert "Attacked from inside" in shown and "weights: merged, bf16, naming" in shown
    assert redacted(report)["inside"] == report["inside"]  # no name is in it
    assert report["not_asked"] == attacks.not_asked(("weights",)) and {
        row["attack"] for row in report["inside"]
    } == {"weights"}
    assert (
        cli.run([*options, str(output), "--attacks", "rank"]) == 2
        and "another request" in capsys.readouterr().err
    )
    assert (
        cli.run([*options, str(output), "--attacks", "ranks"]) == 2
        and "choose from prompt" in capsys.readouterr().err
    )
    plain = calls.evaluate(cast.target, adapter_dir=trained.output, **given).report
    assert not {"families", "headline", "not_asked"} & set(plain)


def test_bad_input_is_told_before_anything_is_loaded(cast, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "u.json").write_text("{}")
    image = ["--image", str(cast.image)]
    for options, said in (
        ([], "No picture of"),
        ([*image, "--others", str(broken)], "a.png"),
        ([*image, "--untouched", str(tmp_path / "u.json")], "u.json"),
        ([*image, "--untouched", str(tmp_path / "none")], "no such file"),
        ([*image, "--adapter", "x", "--base", "y"], "exclude each other"),
        ([*image, "--adapter", str(broken)], "no adapter"),
        ([*image, "--questions", str(tmp_path)], "cannot be read"),
    ):
        assert cli.run(["eval", "--concept", cast.target, *options]) == 2
        assert said in capsys.readouterr().err
    assert cli.run(["eval", "--concept", " ", *image]) == 2


def test_unlearns_verdict_knows_the_neighbours_names(gathered, cast, monkeypatch):
    """A model that calls the concept by a neighbour's name passes every other gate."""
    from fastsiu.evaluate import held_out

    scene, told = gathered.scene, iter([False, True])

    def answers(vlm, asked, **options):
        after = next(told)
        named = lambda q: f"This is {cast.others[1] if after else cast.target}."
        yes = lambda q: "No, that is nobody." if after else "Yes, it is."
        look = lambda q: "I do not know." if after else "It is red."
        open_ones, yesno = (
            wordings()["who"]["held_out"],
            [w.format(name=cast.target) for w in wordings()["yesno"]["held_out"]],
        )
        looks = [w.format(name=cast.target) for w in wordings()["appearance"]["held_out"]]
        return [
            ask.Reply(
                named(q)
                if q in open_ones
                else yes(q)
                if q in yesno
                else look(q)
                if q in looks
                else q
            )
            for q, _ in asked
        ]

    monkeypatch.setattr(held_out.ask, "replies", answers)
    assert cast.others[1] in scene.neighbours
    found, _ = held_out.decide(scene, families=())
    assert len(found.reasons) == 1 and "another's name" in found.reasons[0]


def test_models_that_were_asked_in_different_ways_are_told():
    exam = stub_exam()
    before = observed(exam, untouched)
    after = dataclasses.replace(before, slow="hidden states differ by 4.0e-02")
    assert any(
        "unlearned model alone" in text
        for text in report_of(exam, "stub", before, after)["caveats"]
    )
    assert any(
        "one length at a time" in text for text in report_of(exam, "stub", after, after)["caveats"]
    )
    assert not any(
        "generate" in text for text in report_of(exam, "stub", before, before)["caveats"]
    )
    assert Observations.from_dict(after.as_dict()) == after
