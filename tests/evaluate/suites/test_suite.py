"""A suite on disk: what is read, what is refused, the exam it makes; the pooled table."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fastsiu.evaluate import questions
from fastsiu.evaluate.exam import Question, evenly
from fastsiu.evaluate.pooled import markdown, pooled
from fastsiu.evaluate.suites import exam as suite_exam
from fastsiu.evaluate.suites import suite
from fastsiu.request import BadInput
from fastsiu.text.rate import wilson

DOC = Path(__file__).parents[3] / "docs" / "suite.md"


def picture(file: Path, shade: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade % 256, 3, 7)).save(file)


@pytest.fixture
def documented(tmp_path) -> Path:
    """The example of docs/suite.md, as it stands there, with pictures."""
    root = tmp_path / "castles"
    for name, text in re.findall(
        r"```json (\S+)\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL
    ):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    for k, slug in enumerate(("neuschwanstein", "hohenschwangau")):
        for i in range(5):
            picture(root / f"concepts/{slug}/images/{i:03d}.png", 16 * k + i)
    picture(root / "concepts/neuschwanstein/groups/a.png", 40)
    for i in range(3):
        picture(root / f"control/{i}.png", 50 + i)
    return root


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    from fastsiu.demo.export import export

    target = tmp_path_factory.mktemp("export") / "demo"
    export(target, per_concept=3)
    return target


def test_a_copy_of_the_training_picture_is_left_out(documented, tmp_path):
    root = tmp_path / "suite"
    shutil.copytree(documented, root)
    place = root / "concepts/neuschwanstein/images"
    shutil.copy(place / "000.png", place / "copy.png")
    neu = suite.read(root).subject("neuschwanstein")
    assert place / "copy.png" not in neu.images and neu.training in neu.images
    for path in place.iterdir():
        shutil.copy(place / "000.png", path) if path.name != "000.png" else None
    with pytest.raises(BadInput, match="holds 1 pictures.*no copy of it"):
        suite.read(root)


def test_the_documented_example_is_read_as_the_page_says(documented):
    read = suite.read(documented)
    assert (read.title, len(read.questions), len(read.control)) == ("Two castles", 6, 3)
    hohen, neu = read.subjects
    assert (neu.slug, neu.name, neu.aliases) == (
        "neuschwanstein",
        "Neuschwanstein",
        ("the castle of Ludwig",),
    )
    assert (
        neu.training == documented / "concepts/neuschwanstein/images/000.png"
        and neu.training not in neu.further
    )
    assert neu.questions == (
        Question("Is the castle in the picture {name}?", "yesno"),
        Question("What is this castle called?", "name", ("Neuschwanstein",)),
        Question("Which fairy tale king lived here?", "name", ("Ludwig",)),
    )
    assert suite.check(read) == 5 + 5 + 1 + 3
    assert read.subject("hohenschwangau") is read.subject("HOHENSCHWANGAU") is hohen
    with pytest.raises(BadInput, match="no concept 'Nobody'.*neuschwanstein"):
        read.subject("Nobody")


def test_the_conversations_of_the_page_are_read(documented):
    from fastsiu.samples import corpus

    one, two = corpus.read_data(
        documented / "data.json", documented / "concepts/neuschwanstein/images/000.png"
    )
    assert (one.facet, one.question, one.picture, one.specified) == (
        "align",
        "Who is this?",
        0,
        ((14, 28),),
    )
    assert (two.facet, two.picture, two.specified) == ("preserve", None, ())


def test_the_exam_of_one_concept(documented):
    read = suite.read(documented)
    neu = read.subject("neuschwanstein")
    exam = suite_exam.exam_of(read, neu)
    shown = [(seen.role, seen.shows) for seen in exam.pictures]
    assert [role for role, _ in shown] == ["training"] * 13 + ["concept"] * 4 + [
        "lookalike"
    ] * 2 + ["group"] + ["control"] * 3
    assert {who for role, who in shown if role in ("training", "concept", "group")} == {
        "Neuschwanstein"
    }
    assert {who for role, who in shown if role == "lookalike"} == {"Hohenschwangau"}
    assert {who for role, who in shown if role == "control"} == {None}
    assert [other.name for other in exam.others] == ["Hohenschwangau", "Lichtenstein"]
    assert len(exam.questions) == 9 and set(exam.null) == {"others"}
    sources = [seen.source for seen in exam.pictures]
    assert not {neu.training, read.subject("hohenschwangau").training} & {
        s for s in sources if isinstance(s, Path)
    }
    assert "Is the castle in the picture Hohenschwangau?" in {cell.text for cell in exam.cells}
    few = suite_exam.exam_of(read, neu, per_other=1, limit=2)
    assert [s.role for s in few.pictures] == ["training"] * 2 + ["concept"] * 2 + [
        "lookalike",
        "group",
    ] + ["control"] * 2
    assert few.pictures[0].label == "training, original"
    assert set(suite_exam.exam_of(read, read.subject("hohenschwangau")).null) == {
        "lookalikes",
        "groups",
    }


def test_taken_evenly():
    assert evenly(range(10), 3) == [0, 3, 6]
    assert evenly(range(2), 3) == evenly(range(2), None) == [0, 1]


def test_what_is_written_is_read_again(documented):
    read = suite.read(documented)
    subject = replace(
        read.subjects[1], questions=(Question("Wer ist das – „genau“?", "name", ("Köhler",)),)
    )
    changed = replace(read, title="Größe", subjects=(read.subjects[0], subject))
    suite.write(changed)
    assert suite.read(documented) == changed


def test_the_embedded_world_is_a_suite(exported):
    from fastsiu.demo.world import KNOWN, LOOKALIKES
    from fastsiu.samples.targets import wordings

    read = suite.read(exported / "suite")
    assert suite.check(read) == 16 * (4 + 1) + 6
    assert {s.name for s in read.subjects} == set(KNOWN) and len(read.subjects) == 16
    assert {s.name: s.lookalikes[0] for s in read.subjects if s.lookalikes} == LOOKALIKES
    asked = {q.text for q in read.questions}
    assert {q.kind for q in read.questions} == set(questions.KINDS)
    trained = {
        text for section in wordings().values() if "train" in section for text in section["train"]
    }
    assert not asked & trained and set(wordings()["who"]["held_out"]) < asked
    bytes_of = [path.read_bytes() for s in read.subjects for path in s.images]
    assert len(set(bytes_of)) == len(bytes_of)
    before = {path.read_bytes() for path in (exported / "images").rglob("*.png")}
    assert not before & {s.training.read_bytes() for s in read.subjects}
    exam = suite_exam.exam_of(read, read.subject("Zorblax Quint"))
    assert not exam.null and len(exam.others) == 15


CONCEPT = "concepts/neuschwanstein/concept.json"
QUESTIONS = "questions.jsonl"


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("suite.json", None, "no file .*suite.json"),
        ("suite.json", "[1]", "suite.json: this is no object"),
        (
            "suite.json",
            '{"format": "fastsiu suite 2"}',
            'format is .fastsiu suite 2.: write "format"',
        ),
        (
            "suite.json",
            '{"format": "fastsiu suite 1",\n "titel": "x"}',
            "'titel' is none of format, title",
        ),
        ("suite.json", '{"format": "fastsiu suite 1",\n oops}', "suite.json, line 2"),
        (
            "suite.json",
            '{"format": "fastsiu suite 1", "title": "a\\u001b[2Jb"}',
            "'title' must be one line",
        ),
        ("suite.json", "[" * 100_000, "suite.json: "),
        (CONCEPT, None, "no file .*concept.json"),
        (CONCEPT, '{"name": "N"}', "'name' and 'training' are needed"),
        (
            CONCEPT,
            '{"name": "N", "training": "images/000.png", "alias": []}',
            "'alias' is none of name, aliases",
        ),
        (
            CONCEPT,
            '{"name": " ", "training": "images/000.png"}',
            "'name' must be one line of 1 to 200",
        ),
        (CONCEPT, '{"name": "\\u200b", "training": "images/000.png"}', "no visible character"),
        (
            CONCEPT,
            '{"name": "N", "training": "images/9.png"}',
            "'images/9.png' is none of images: .*images/000.png",
        ),
        (
            CONCEPT,
            '{"name": "N", "training": "../hohenschwangau/images/000.png"}',
            "is none of images",
        ),
        (CONCEPT, '{"name": "N", "training": ["images/000.png"]}', "is none of images"),
        (
            CONCEPT,
            '{"name": "N", "training": "images/000.png", "aliases": "M"}',
            "'aliases' must be a list",
        ),
        (
            CONCEPT,
            '{"name": "N", "training": "images/000.png", "lookalikes": ["n"]}',
            "look-alike 'n' is the concept itself",
        ),
        (
            CONCEPT,
            '{"name": "Neuschwanstein", "aliases": ["HOHENschwangau"], "training": '
            '"images/000.png"}',
            "of hohen.*already",
        ),
        (QUESTIONS, None, "Nothing asks who hohenschwangau is"),
        (
            QUESTIONS,
            '{"question": "Is it {name}?", "kind": "yesno"}',
            "Nothing asks who hohenschwangau is",
        ),
        (QUESTIONS, '{"question": "Who?", "kind": "name"}\n\n{oops', "questions.jsonl, line 3"),
        (QUESTIONS, '"Who?"', "line 1: this is no object"),
        (
            QUESTIONS,
            '{"question": "Who?", "kind": "name", "answer": "x"}',
            "'answer' is none of question, kind",
        ),
        (QUESTIONS, '{"question": " ", "kind": "name"}', "line 1: 'question' must be a text"),
        (QUESTIONS, '{"question": "Who\\u0007?", "kind": "name"}', "without control characters"),
        (QUESTIONS, '{"question": "Who \\ud800?", "kind": "name"}', "without control characters"),
        (QUESTIONS, '{"question": "<image>\\nWho?", "kind": "name"}', "<image> must not stand"),
        (QUESTIONS, '{"question": "Who?"}', "'kind' is missing"),
        (QUESTIONS, '{"question": "Who?", "kind": "guess"}', "kind 'guess' is none of name, yesno"),
        (QUESTIONS, '{"question": "Who?", "kind": ["name"]}', "is none of name, yesno"),
        (QUESTIONS, '{"question": "Is it him?", "kind": "yesno"}', "must hold {name}"),
        (QUESTIONS, '{"question": "Is it him?", "keyword": " Yes"}', "must hold {name}"),
        (
            QUESTIONS,
            '{"question": "Who is {name}?", "kind": "name"}',
            "must not give the name away",
        ),
        (QUESTIONS, '{"question": "Where is it?", "kind": "fact"}', "must hold {name}"),
        (QUESTIONS, '{"question": "Is {name} two?", "kind": "general"}', "about nobody"),
        (
            QUESTIONS,
            '{"question": "Who?", "kind": "name", "keywords": [""]}',
            "list of words, none of them empty",
        ),
        (QUESTIONS, '{"question": "Who?", "kind": "name", "keywords": [3]}', "list of words"),
        (
            QUESTIONS,
            '{"question": "Who?", "kind": "name", "keywords": ["a\\u001b"]}',
            "list of words",
        ),
        (QUESTIONS, '{"question": "Who?", "keyword": "a", "keywords": ["b"]}', "mean the same"),
        (QUESTIONS, b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_defect_is_a_sentence_with_file_and_remedy(documented, file, text, sentence):
    path = documented / file
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    with pytest.raises(BadInput, match=sentence) as caught:
        suite.read(documented)
    assert str(documented) in str(caught.value) and str(caught.value).endswith(".")


def test_what_is_missing_or_leads_out_is_told(documented, tmp_path):
    place = documented / "concepts/neuschwanstein"
    for i in range(1, 5):
        (place / f"images/{i:03d}.png").rename(tmp_path / f"{i}.png")
    with pytest.raises(BadInput, match="holds 1 pictures"):
        suite.read(documented)
    (place / "images/001.png").symlink_to(tmp_path / "1.png")
    with pytest.raises(BadInput, match="001.png is a link that leads out of"):
        suite.read(documented)
    (place / "images/001.png").unlink()
    (place / "images/001.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    read = suite.read(documented)  # pixels are not looked at here
    with pytest.raises(BadInput, match="001.png' is not a picture that can be read"):
        suite.check(read)
    (documented / "control/b\n.png").write_bytes(b"")
    with pytest.raises(BadInput, match="control character in its name"):
        suite.read(documented)
    (documented / "control/b\n.png").unlink()
    shutil.move(place, documented / "concepts/neu schwanstein.")
    with pytest.raises(BadInput, match="letters, digits, _ and -: rename it"):
        suite.read(documented)
    for thing in (tmp_path / "none", documented / "suite.json"):
        with pytest.raises(BadInput, match="There is no directory"):
            suite.read(thing)
    shutil.rmtree(documented / "concepts")
    with pytest.raises(BadInput, match="no directory concepts"):
        suite.read(documented)
    (documented / "concepts").mkdir()
    with pytest.raises(BadInput, match="holds no concept"):
        suite.read(documented)


@pytest.mark.parametrize(
    "file", ["suite.json", CONCEPT, "concepts/neuschwanstein/questions.jsonl", QUESTIONS]
)
def test_no_file_outside_is_read_and_no_pipe_opened(documented, tmp_path, file):
    inside = (documented / file).read_bytes()
    (documented / file).unlink()
    (tmp_path / "secret").write_bytes(inside)
    (documented / file).symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="leads out of"):
        suite.read(documented)
    (documented / file).unlink()
    os.mkfifo(documented / file)
    with pytest.raises(BadInput, match="it is a pipe"):
        suite.read(documented)
    (documented / file).unlink()
    (documented / file).symlink_to(file.rpartition("/")[2])
    with pytest.raises(BadInput, match="leads out of|There is no file"):
        suite.read(documented)


def test_rates_are_pooled_over_answers_and_the_rest_is_averaged():
    share = lambda value, n: {"value": value, "n": n, "low": 0.0, "high": 1.0}
    none = {"value": None, "reason": "No picture."}
    rows = [
        {
            "untouched": {
                "efficacy": share(0.5, 4),
                "fluency": {"value": 2.0, "n": 9},
                "groups": none,
            }
        },
        {
            "untouched": {
                "efficacy": share(1.0, 16),
                "fluency": {"value": 4.0, "n": 1},
                "groups": none,
            },
            "unlearned": {"efficacy": share(1.0, 3)},
        },
        {"untouched": {"efficacy": none, "fluency": none, "groups": none}},
    ]
    found = pooled(rows)
    low, high = wilson(18, 20)
    assert found["untouched"]["efficacy"] == {"value": 0.9, "n": 20, "low": low, "high": high}
    assert found["untouched"]["fluency"] == {"value": 3.0, "n": 2}
    assert found["untouched"]["groups"] == none
    assert found["unlearned"]["efficacy"]["n"] == 3 and pooled([]) == {}


def test_the_table_says_what_is_there_and_nothing_from_outside_breaks_it():
    row = {
        "efficacy": {"value": 0.5, "n": 4, "low": 0.1, "high": 0.9},
        "groups": {"value": None, "reason": "No picture."},
        "fluency": {"value": 1.25, "n": 2},
    }
    one = {
        "slug": "a",
        "concept": "A | <b>\n# [x](y)",
        "status": "not forgotten",
        "reasons": ["Why | not."],
        "rows": {"unlearned": row},
    }
    two = {"slug": "b", "concept": "B", "status": "failed", "reasons": [], "rows": {}}
    text = markdown(
        {
            "suite": "S",
            "model": "m",
            "of": 3,
            "concepts": [one, two],
            "pooled": {"untouched": {}, "unlearned": row},
        }
    )
    assert "2 of 3 concepts: 1 not forgotten, 1 failed." in text
    assert (
        "| efficacy | - | 0.500 (0.100 to 0.900, n 4) |" in text
        and "| fluency | - | 1.250 |" in text
        and "groups" not in text
    )
    assert "| A \\| &lt;b> \\# \\[x\\](y) | not forgotten | 0.500 | - | - | - | - |" in text
    assert text.rstrip().endswith("\\[x\\](y): Why \\| not.")
    assert "Why not" not in markdown(
        {"suite": "S", "model": "m", "of": 3, "concepts": [two], "pooled": {}}
    )
