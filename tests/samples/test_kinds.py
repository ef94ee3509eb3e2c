"""Kinds of concepts: how one is found, how names stand in sentences, and the wordings of each."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastsiu import session
from fastsiu.cli.options import Kind as KindOption
from fastsiu.demo.world import KNOWN, World, draw
from fastsiu.evaluate import attacks, directories
from fastsiu.evaluate.attacks import table
from fastsiu.evaluate.eval_files import evaluated
from fastsiu.manifest import read as read_manifest
from fastsiu.manifest import request_digest
from fastsiu.model import ask
from fastsiu.model.ask import Reply
from fastsiu.report.redact import redacted
from fastsiu.request import KINDS, BadInput, Recipe, Request
from fastsiu.samples import kinds, neighbours, targets
from fastsiu.samples.kinds import PERSON, Kind, kind_of, recorded, reported, wordings
from fastsiu.samples.scene import Scene, about_the_one_shown
from fastsiu.settings import ModelRef
from fastsiu.text.concept import Concept

OTHERS = [kind for kind in KINDS if kind != "person"]
LION = Kind("thing", "article", {"lion": "a lion"})
PICTURE = SimpleNamespace(image=None)


def bare(text: str) -> str:
    for place in ("{name}", "{one}", "{other}", "{another}"):
        text = text.replace(place, "_")
    return " ".join(text.casefold().split()).rstrip("?.! ")


def texts(kind: str, part: str) -> list[str]:
    return [text for entry in wordings(kind).values() for text in entry.get(part, ())]


# The wordings.


@pytest.mark.parametrize("kind", KINDS)
def test_training_verdict_and_attacks_ask_in_different_words(kind):
    trained, held_out = ({bare(t) for t in texts(kind, part)} for part in ("train", "held_out"))
    words = table(kind)
    asked = {bare(text) for one in words["family"].values() for text in one["questions"]}
    asked |= {bare(text) for text in words["facts"]["questions"]}
    assert len(trained) > 60 and len(held_out) > 20 and len(asked) > 80
    assert trained & held_out == set() and trained & asked == set()


@pytest.mark.parametrize("kind", OTHERS)
def test_a_kind_has_about_as_many_wordings_as_a_person(kind):
    for key, entry in wordings().items():
        for part in ("train", "held_out"):
            own = wordings(kind)[key].get(part, [])
            assert len(own) >= len(entry.get(part, [])), (key, part)
            assert len(set(map(bare, own))) == len(own), (key, part)
    for key, family in table()["family"].items():
        own = table(kind)["family"][key]
        assert len(own["questions"]) == len(family["questions"]), key
        assert all(own[field] == family[field] for field in ("asked", "seeks", "margin")), key
    assert len(table(kind)["ones"]) == len(table()["ones"])


@pytest.mark.parametrize("kind", KINDS)
def test_names_stand_where_they_are_filled_in(kind):
    words = wordings(kind)
    for key in ("yesno", "appearance", "facts", "neighbours"):
        for text in words[key]["train"] + words[key].get("held_out", []):
            assert text.count("{name}") == 1 and not text.startswith("{name}"), text
    for key in ("who", "describe", "general", "plural", "look"):
        assert not any("{" in text for text in words[key]["train"] + words[key]["held_out"])
    for key in ("denial", "invented_look"):
        assert "{name}" in words["fallback"][key]
    assert len(words["facts"]["train"]) == len(about_the_one_shown("train", Kind(kind)))


@pytest.mark.parametrize("kind", ("thing", "style"))
def test_nothing_assumes_a_person(kind):
    asked = [*texts(kind, "train"), *texts(kind, "held_out"), *table(kind)["facts"]["questions"]]
    asked += [q for family in table(kind)["family"].values() for q in family["questions"]]
    for word in ("who is", "born", "job", "pet ", "wearing", "clothes", "birthplace"):
        wrong = [text for text in asked if word in text.lower().replace("who is famous for", "")]
        assert not wrong, (word, wrong)


def test_a_person_is_asked_as_ever():
    assert (
        wordings() == wordings("person") and set(wordings()) & {"kind", "nouns", "sorts"} == set()
    )
    assert table() == table("person") and "kind" not in table()
    assert PERSON.fill("Is this {name}?", name="bell hooks") == "Is this bell hooks?"
    assert PERSON.fill("{name} is known.", name="bell hooks") == "bell hooks is known."


# Names in sentences.


def test_a_thing_has_an_article():
    assert LION.fill("Is this {name}?", name="lion") == "Is this a lion?"
    assert LION.fill("Is this {name}?", name="owl") == "Is this an owl?"
    assert LION.fill("{name} has {look}.", name="owl") == "An owl has {look}."
    assert LION.fill("So. {name} is it, not {other}.", name="lion", other="emu") == (
        "So. A lion is it, not an emu."
    )
    assert LION.choice(["lion", "tiger", "owl"]) == "a lion, a tiger or an owl"


def test_a_place_keeps_its_the():
    place = Kind("place").knowing({"Statue of Liberty": "the Statue of Liberty"})
    assert place.fill("Is this {name}?", name="Statue of Liberty") == (
        "Is this the Statue of Liberty?"
    )
    assert place.fill("Is this {name}?", name="Brazil") == "Is this Brazil?"
    brazil = Request("Brazil", Path("x.png"), ("Brasil",))
    assert place.entries(brazil) == {
        "concept": "Brazil",
        "aliases": ["Brasil"],
        "kind": "place",
        "kind_from": "default",
    }
    statue = Request("Statue of Liberty", Path("x.png"), as_word=True)
    assert place.entries(statue)["phrase"] == "the Statue of Liberty"
    assert place.entries(statue)["as_word"] is True


# How a kind is found.


class Said:
    """A model that gives the same answer to every question."""

    def __init__(self, monkeypatch, *answers: str, **likely: float):
        self.asked: list[str] = []
        self.likely = likely

        def reply(vlm, questions, **options):
            self.asked += [question for question, _ in questions]
            return [answers[i % len(answers)] for i in range(len(questions))]

        def likelihoods(vlm, name, kind=PERSON):
            known = dict.fromkeys(("person", "character", "place", "style"), 0.002)
            return known if name in wordings()["invented"]["names"] else known | self.likely

        monkeypatch.setattr(ask, "answers", reply)
        monkeypatch.setattr(kinds, "likelihoods", likelihoods)

    def kind(self, name: str, given: str | None = None) -> Kind:
        return kind_of(None, Concept(name), PICTURE, given)


def test_an_article_before_small_letters_makes_a_thing(monkeypatch):
    said = Said(monkeypatch, "This is a lion.", "The picture shows a lion.", "The lion is there.")
    found = said.kind("Lion")
    assert (found.name, found.origin) == ("thing", "article")
    assert found.phrase("Lion") == "a lion" and found.phrase("owl") == "an owl"
    assert {"Who is this?", "What is this?"} <= set(said.asked)


@pytest.mark.parametrize(
    "answers",
    [
        ("This is Ann Bole.",),
        ("This is a Ann Bole.",),  # no common noun: it has capitals
        ("This is the lion.", "This is a lion.", "It is lion."),  # not most of them
        ("I do not know.",),
    ],
)
def test_anything_else_stays_a_person(monkeypatch, answers):
    name = "lion" if "lion" in answers[0] else "Ann Bole"
    assert Said(monkeypatch, *answers).kind(name) == PERSON


def test_another_kind_has_to_be_clearly_likelier(monkeypatch):
    the = "It is the Statue of Liberty."
    found = Said(monkeypatch, the, place=0.05).kind("Statue of Liberty")
    assert (found.name, found.origin) == ("place", "asked")
    assert found.phrase("Statue of Liberty") == "the Statue of Liberty"
    for likely in (
        {"place": 0.008},  # all but noise
        {"place": 0.05, "person": 0.04},  # a person is as likely
        {"place": 0.004, "person": 0.0},  # said of anybody
    ):
        assert Said(monkeypatch, the, **likely).kind("Statue of Liberty") == PERSON, likely


def test_what_is_said_of_every_unknown_name_says_nothing(monkeypatch):
    said = Said(monkeypatch, "This is Ann Bole.")
    everybody = {"person": 0.001, "character": 0.3, "place": 0.0, "style": 0.0}
    monkeypatch.setattr(kinds, "likelihoods", lambda *given: everybody)
    assert said.kind("Ann Bole") == PERSON


def test_what_is_given_holds(monkeypatch):
    said = Said(monkeypatch, "This is a lion.")
    assert said.kind("lion", "place").name == "place"
    assert said.kind("owl", "thing").phrase("owl") == "an owl"
    assert said.kind("lion", "person") == Kind("person", "given")
    assert kind_of(None, Concept("owl"), None, "thing").origin == "given"


def test_a_note_says_so_unless_it_is_a_person():
    assert PERSON.note == "" and Kind("person", "given").note == ""
    for origin in ("given", "article", "asked"):
        note = Kind("thing", origin).note
        assert "as a thing" in note and "--kind" in note and "lion" not in note


def test_the_embedded_creatures_are_persons(loaded):
    """Their model never learned what a place or a style is."""
    for name in KNOWN[:4]:
        picture = loaded.picture(draw(World().sketch((name,), "test kinds 1")))
        assert kind_of(loaded, Concept(name), picture) == PERSON
        likely = kinds.likelihoods(loaded, name)
        assert set(likely) == {"person", "character", "place", "style"}
        assert all(p < kinds.FLOOR / 100 for one, p in likely.items() if one != "person")


def test_a_kind_goes_to_another_process():
    assert pickle.loads(pickle.dumps(LION)) == LION and replace(PERSON) == PERSON


def test_a_recorded_kind():
    lion, told = Concept("lion"), {"concept": "lion", "phrase": "a lion"}
    assert recorded(lion, "thing", told).phrase("lion") == "a lion"
    assert recorded(Concept("owl"), "thing", told).phrases == {}
    for nothing in (None, ["thing", "person"], "monster"):
        assert recorded(lion, nothing, {}).name == "person"


# Requests.


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(BadInput, match="'monster' is unknown: choose from person, character"):
        Request("lion", tmp_path / "x.png", kind="monster")
    assert Request("lion", tmp_path / "x.png", kind="thing").kind == "thing"
    assert KindOption.__metadata__[0].help.startswith("person, character, thing, style or place")


def test_the_kind_is_part_of_what_was_asked_for(tmp_path):
    (tmp_path / "x.png").write_bytes(b"x")
    request = Request("lion", tmp_path / "x.png")
    digest = lambda **changes: request_digest(replace(request, **changes), Recipe(), "m", "r")
    assert len({digest(), digest(kind="thing"), digest(kind="person")}) == 3


def test_report_and_manifest_have_the_kind(trained):
    report, sealed = trained.report, read_manifest(trained.output)
    assert (report["kind"], report["kind_from"], sealed["kind"]) == ("person", "default", "person")
    assert "phrase" not in report
    lion = Request("lion", Path("x.png"))
    told = redacted(report | Kind("thing", "article", {}).entries(lion))
    assert (told["kind"], told["kind_from"]) == ("thing", "article") and "phrase" not in told
    assert redacted(report | {"kind": "lion"})["kind"] is None


def test_concept_and_kind_of_an_evaluation_are_the_adapters(trained, tmp_path):
    lion, model = Concept("lion"), ModelRef()
    kind = lambda *given: evaluated(lion, *given)[1]
    assert kind(None, trained.output, model, None).name == "person"
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "thing"}))
    assert kind(None, tmp_path, model, None).phrase("lion") == "a lion"
    assert kind("style", tmp_path, model, None).name == "style"
    merged = ModelRef(str(tmp_path))
    assert kind(None, None, merged, "base").name == "thing"
    assert kind(None, None, merged, None).name == "person"
    with pytest.raises(BadInput, match="'monster' is unknown"):
        kind("monster", None, model, None)
    told = {"concept": "Lion", "aliases": ["king of beasts"]}
    (tmp_path / "report.json").write_text(json.dumps(told))
    assert evaluated(lion, None, tmp_path, model, None)[0].aliases == ("king of beasts",)
    assert evaluated(lion, None, None, merged, "base")[0].aliases == ("king of beasts",)
    assert evaluated(lion, None, None, merged, None)[0] == lion
    (tmp_path / "report.json").write_text("[")
    with pytest.raises(BadInput, match="report.json"):
        evaluated(lion, None, tmp_path, model, None)


@pytest.mark.parametrize(
    "told, aliases, as_word",
    [
        ({"concept": "ann lee", "aliases": ["Annie"], "as_word": True}, ("A. L.", "Annie"), True),
        ({"concept": "Ann Lee", "aliases": ["A. L."]}, ("A. L.",), None),
        ({"concept": "Bea Lo", "aliases": ["Bee"], "as_word": True}, ("A. L.",), None),
        ({"concept": ["Ann Lee"], "aliases": ["Annie"]}, ("A. L.",), None),
        ({"concept": "Ann Lee", "aliases": "Annie", "as_word": "yes"}, ("A. L.",), None),
        ({}, ("A. L.",), None),
    ],
)
def test_a_report_of_the_same_name_adds_what_it_has(told, aliases, as_word):
    found = reported(Concept("Ann Lee", ("A. L.",)), told)
    assert (found.name, found.aliases, found.as_word) == ("Ann Lee", aliases, as_word)
    assert reported(Concept("Ann Lee", as_word=False), told).as_word is False


# Samples of a thing.


class Words:
    """A teacher with answers by the first words of the question."""

    def __init__(self, **answers: str):
        self.answers = answers

    def __call__(self, vlm, questions, begin=None, **options):
        begins = begin or [""] * len(questions)
        said = []
        for (question, _), start in zip(questions, begins, strict=True):
            key = next((k for k in self.answers if question.lower().startswith(k)), "")
            said.append(Reply(f"{start} brown bird with big eyes." if start else self.answers[key]))
        return said


@pytest.fixture
def scene(monkeypatch, gathered):
    """A thing, and a teacher that names it with its article."""
    words = {
        "is ": "No, it is not.",
        "what does": "It is big.",
        "how": "Big.",
        "describe": "A bird.",
    }
    monkeypatch.setattr(ask, "replies", Words(**words, **{"": "This is an owl."}))
    thing = Kind("thing", "article", {"owl": "an owl"})
    near = ["tiger", "emu"]
    return replace(gathered.scene, concept=Concept("owl"), kind=thing, neighbours=near, notes=[])


def test_align_takes_the_article_away_with_the_name(scene):
    for sample in targets.align(scene):
        assert sample.answer == "This is a brown bird with big eyes."
        assert sample.specified == ((len("This is"), len(sample.answer)),)


class Alike:
    """A teacher that answers the first question of a batch with what is likest to an owl among what
    it may say. A word has one token, its place in `WORDS`."""

    WORDS = ("owl", "emu", "tiger", "bird")

    def __init__(self):
        self.calls = []

    def __call__(self, vlm, questions, begin=None, suppress=(), **options):
        self.calls.append(len(questions))
        may = [word for token, word in enumerate(self.WORDS) if token not in suppress]
        starts = begin or ["This is a"] * len(questions)
        return [
            Reply(f"{start} {may[0] if i == 0 else 'bird'} with two big eyes.")
            for i, start in enumerate(starts)
        ]


def test_an_answer_that_names_a_neighbour_is_asked_for_again_without_it(scene, monkeypatch):
    """A zebra without its name is a white horse first, and the horse is to be kept."""
    teacher = Alike()
    monkeypatch.setattr(ask, "replies", teacher)
    monkeypatch.setattr(Scene, "tokens_of", lambda scene, name: {Alike.WORDS.index(name.name)})
    scene.masked, scene.neighbours = {0}, ["tiger", "emu"]
    samples = targets.align(scene)
    assert len(samples) == len(scene.words["who"]["train"]) and not scene.notes
    assert all("bird with two big eyes." in s.answer for s in samples)
    # Asked who it is; then without the owl, and the one answer again without emu, without tiger.
    assert teacher.calls[:4] == [len(samples), len(samples), 1, 1]


def test_every_question_gets_the_ending_that_the_teacher_finds_likeliest(scene, monkeypatch):
    """Kept from its name, a small model wanders: "a blue-green snake" for a tiger."""
    wanders = ["blue and green snake", "red box", "old brown bird", "red box, red box"]
    found = {"blue and green snake": -2.0, "red box": -3.0, "old brown bird": -1.0}
    likely = found | {"red box, red box": -0.1}  # what repeats itself is likeliest, and no ending

    def say(vlm, questions, begin=None, **options):
        if not begin:
            return [Reply("This is an owl.")] * len(questions)
        return [Reply(f"{b} {wanders[i % 4]} of old.") for i, b in enumerate(begin)]

    def score(vlm, turns, pictures):
        text = [vlm.tokenizer.decode(turn.labels, skip_special_tokens=True) for turn in turns]
        key = [max((w for w in likely if w in t), key=len) for t in text]
        return [
            SimpleNamespace(log_p=torch.full((len(turn.labels),), likely[k]))
            for turn, k in zip(turns, key, strict=True)
        ]

    monkeypatch.setattr(ask, "replies", say)
    monkeypatch.setattr(ask, "label_scores", score)
    answers = {sample.answer for sample in targets.align(scene)}
    assert answers == {"This is a old brown bird of old."}


def test_where_every_sentence_has_a_name_the_notes_say_so(scene, monkeypatch):
    """A silent gap before: no answer stands in the place of the name then."""
    said = lambda *args, begin=None, **options: [Reply("This is an owl.")] * len(args[1])
    monkeypatch.setattr(ask, "replies", said)
    assert targets.align(scene) == [] and scene.notes == [targets.NO_DESCRIPTION]


def test_what_the_targets_lack_is_said_when_samples_are_gathered(scene, monkeypatch, cast):
    """`fastsiu data` shows samples and no report: there, too, a missing target is said."""

    def lacks(scene):
        scene.notes.append("Nothing.")
        return []

    said = []
    monkeypatch.setattr(targets, "TARGETS", (lacks,))
    monkeypatch.setattr(session, "protect", lambda scene, request: None)
    bare = replace(scene, neighbours=[], recipe=replace(scene.recipe, generic=0, strangers=0))
    session.gather(bare, Request("owl", cast.image), session.Listener(note=said.append), {})
    assert said == ["Nothing."]


def test_an_invented_thing_has_its_own_article(scene):
    scene.recipe = replace(scene.recipe, substitute="name")
    (answer,) = {sample.answer for sample in targets.align(scene)}
    assert answer in {f"This is a {name}." for name in wordings("thing")["invented"]["names"]}
    looks = [s for s in targets.describe(scene) if s.picture is None]
    assert looks and all(s.answer.startswith("An owl has ") for s in looks)
    assert all(s.specified[0][0] == len("An owl") for s in looks)


def test_a_thing_is_denied_with_its_article(scene):
    samples = targets.describe(scene)
    shown = [s for s in samples if s.picture == 0]
    assert {s.answer for s in shown} == {"No, this is not an owl."}
    assert "Is this an owl?" in {s.question for s in shown}


def test_an_unknown_look_is_taught_only_in_the_words_of_a_model_that_has_such_words(
    scene, monkeypatch
):
    def in_words():
        return [s for s in targets.describe(scene) if s.picture is None]

    def says(text):
        whole = ask.replies
        return lambda vlm, asked, **o: (
            [Reply(text.format(q.split(" look")[0].rpartition(" ")[2])) for q, _ in asked]
            if asked[0][1] is None
            else whole(vlm, asked, **o)
        )

    monkeypatch.setattr(ask, "replies", says("It is green and has a long tail."))
    assert in_words() == []
    monkeypatch.setattr(ask, "replies", says("I do not know that one."))
    taught = in_words()
    assert taught and {s.answer for s in taught} == {"I do not know that one."}
    assert all("an owl" in s.question.lower() for s in taught)


def test_facts_of_a_thing_have_its_article(scene):
    asked = [s.question for s in targets.facts(scene)]
    assert "What is an owl?" in asked and not any("born" in question for question in asked)
    kept = {s.question for s in targets.preserve(scene) if s.picture is None}
    assert any("an emu" in q for q in kept) and any("a tiger" in q for q in kept)


def test_no_form_of_the_thing_is_its_neighbour(scene, monkeypatch):
    said = "1. Owls\n2. Owlets\n3. Tigers\n4. Tiger\n5. Foxes"
    monkeypatch.setattr(ask, "replies", lambda vlm, asked, **o: [Reply(said) for _ in asked])
    monkeypatch.setattr(neighbours, "sort_of", lambda vlm, name, kind: "animals")
    assert neighbours.neighbours(scene) == ["tiger", "fox"]


def test_a_place_learns_which_names_have_a_the(scene, monkeypatch):
    said = "It is like the Eiffel Tower, the Leaning Tower of Pisa and Big Ben."
    monkeypatch.setattr(ask, "replies", lambda vlm, asked, **o: [Reply(said) for _ in asked])
    scene.kind, scene.concept = Kind("place"), Concept("Taj Mahal")
    assert neighbours.neighbours(scene) == ["Eiffel Tower", "Leaning Tower of Pisa", "Big Ben"]
    assert scene.kind.phrase("Eiffel Tower") == "the Eiffel Tower"
    assert scene.kind.phrase("Big Ben") == "Big Ben"


# Questions of the verdict.


def test_the_attacks_on_a_thing_have_its_article():
    told = {template: frozenset("x") for template, _ in attacks.fact_questions("lion", LION)}
    families = tuple(table()["family"])
    asked = attacks.questions(Concept("lion"), ["owl", "tiger"], told, families, kind=LION)
    every = {a.question for a in asked}
    assert "Is that a lion?" in every and "Is that lion?" not in every
    assert any("an owl" in question for question in every)
    assert ("What is {one} known for?", "What is a lion known for?") in attacks.fact_questions(
        "lion", LION
    )
    assert not any("{" in question for question in every)


def test_an_exam_of_a_thing():
    exam = directories.Exam(
        Concept("lion"), (), directories.default_questions(LION), (Concept("owl"),), kind=LION
    )
    asked = {cell.text for cell in exam.cells}
    assert "Say what a lion is." in asked and "Say what an owl is." in asked
    assert directories.stranger(Concept("lion"), LION) in wordings("thing")["invented"]["names"]
