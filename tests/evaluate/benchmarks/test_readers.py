"""Every set is read whole, has its own metrics, and is refused with one sentence where it is
damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra [benchmarks] is not installed")

import benchmark_sets as made

from fastsiu.evaluate.benchmarks import (
    as_suite,
    clear,
    files,
    fiubench,
    mllmu,
    mlubench,
    mmubench,
    ppubench,
    scores,
)
from fastsiu.evaluate.benchmarks.form import Answer, Answered
from fastsiu.evaluate.suites import suite
from fastsiu.request import BadInput

READERS = {
    "mmubench": mmubench,
    "mlubench": mlubench,
    "fiubench": fiubench,
    "clear": clear,
    "mllmu": mllmu,
    "ppubench": ppubench,
}
COUNTS = {
    "mmubench": {"entities": 2, "pictures": 6, "items": 16, "Efficacy": 8, "Generality": 8},
    "mlubench": {
        "entities": 8,
        "pictures": 16,
        "items": 24,
        **{f"{t} {p}": 6 for t in "ABCD" for p in ("forget", "retain")},
    },
    "fiubench": {
        "entities": 10,
        "pictures": 10,
        "items": 20,
        "forget1": 2,
        "forget5": 4,
        "forget10": 2,
        "retain": 12,
    },
    "clear": {
        "entities": 7,
        "pictures": 11,
        "items": 18,
        "forget10_perturbed": 6,
        "retain_perturbed": 8,
        "real_faces": 2,
        "real_world": 2,
    },
    "mllmu": {
        "entities": 7,
        "pictures": 11,
        "items": 54,
        **{
            name: count
            for part, count in (("Forget", 12), ("Test", 12), ("Retain", 18), ("Celebrity", 12))
            for name, count in (
                (part, count),
                (f"{part} Image-Textual", count // 2),
                (f"{part} Pure Text", count // 2),
            )
        },
    },
    "ppubench": {
        "entities": 4,
        "items": 72,
        "pictures": 36,
        **{
            name: count
            for setting, counts in (
                ("complete", (18, 54)),
                ("selective", (24, 48)),
                ("persona", (24, 48)),
            )
            for part, count in zip(("forget", "retain"), counts, strict=True)
            for name, count in (
                (f"{setting} {part}", count),
                (f"{setting} {part} vqa", count // 2),
                (f"{setting} {part} qa", count // 2),
            )
        },
    },
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return {name: make(root / name) for name, make in made.SETS.items()}


@pytest.mark.parametrize("name", READERS)
def test_a_set_is_read_whole(sets, name):
    found = READERS[name].read(sets[name])
    assert found.counts() == COUNTS[name]
    assert len({item.id for item in found.items}) == len(found.items)
    for item in found.items[::5]:
        if item.photo is not None:
            assert item.photo.load().size == (8, 8)
    # The picture is the row's own, also in the second group of rows.
    shown = [entity.photos[0].load().getpixel((0, 0)) for entity in found.entities]
    if name not in ("mmubench", "mllmu"):
        assert len(set(shown)) == len(shown)


def right(item) -> Answer:
    text = item.answer if item.task != "EM" else f"It is {item.answer}."
    said = " ".join(item.keywords) or text
    costs = dict(nats=(0.1,) * 4, same=0.1, wrong=(3.0,) * len(item.wrong))
    return Answer(said if item.keywords else text, (said,) * len(item.rephrased), **costs)


def nothing(item) -> Answer:
    costs = dict(nats=(3.0,) * 4, same=3.0, wrong=(3.0,) * len(item.wrong))
    return Answer("zzz", ("zzz",) * len(item.rephrased), **costs)


def rows_of(name, items, answers, retrained=None):
    asked = Answered(items, answers, scores.tokens, retrained)
    return {(row.part, row.metric): row.value for row in READERS[name].table(asked)}


# For each set the rows of a model that knows everything, and of one that knows nothing.
KNOWN = {
    "mmubench": {("Efficacy", "Efficacy"): (0, 1), ("Generality", "EM"): (0, 1)},
    "mlubench": {("A forget", "ROUGE-L"): (1, 0), ("D retain", "ROUGE-L"): (1, 0)},
    "fiubench": {
        ("forget5", "Exact Match"): (1, 0),
        ("forget5", "APE"): (1, 0),
        ("forget5", "Truth Ratio"): (0.0550232, 1),
        ("retain", "Truth Ratio"): (0.9449768, 0),
        ("forget5", "KS-Test"): (0.0285714, 1),
        ("retain", "Probability"): (0.9048374, 0.0497871),
    },
    "clear": {
        ("Forget", "ROUGE"): (1, 0),
        ("Real Faces", "Prob."): (0.9008644, 1 / 3),
        ("Forget", "KS test p-value"): (0.1, 1),
        ("Retain", "Prob."): (0.9048374, 0.0497871),
        ("", "Model Utility"): (0.943, 0),
    },
    "mllmu": {
        ("Forget Image-Textual", "Classification Accuracy"): (1, 0),
        ("Test Image-Textual", "Cloze Accuracy"): (1, 0),
        ("Celebrity Pure Text", "ROUGE-L"): (1, 0),
    },
    "ppubench": {
        ("persona forget vqa", "Class."): (1, 0),
        ("persona retain qa", "Cloze"): (1, 0),
        ("selective forget vqa", "Gen. ROUGE-L"): (1, 0),
    },
}


@pytest.mark.parametrize("name", READERS)
def test_the_metrics_tell_knowing_from_not_knowing(sets, name):
    items = READERS[name].read(sets[name]).items
    lost = {item.id: nothing(item) for item in items}
    tables = [
        rows_of(name, items, {item.id: answer(item) for item in items}, lost)
        for answer in (right, nothing)
    ]
    assert tables[0].keys() == tables[1].keys()
    for row, expected in KNOWN[name].items():
        assert [t[row]["value"] for t in tables] == pytest.approx(expected, rel=2e-2, abs=1e-6), row
    for table in tables:  # every value has its number or its reason
        assert all(v["value"] is not None or v["reason"] for v in table.values())


def test_without_a_retrained_model_forget_quality_says_why(sets):
    items = fiubench.read(sets["fiubench"]).items
    found = rows_of("fiubench", items, {item.id: right(item) for item in items})
    assert found["forget5", "KS-Test"] == {"value": None, "reason": scores.NO_RETRAINED}


def test_choices_and_gaps_are_put_with_what_is_wanted(sets):
    items = mllmu.read(sets["mllmu"]).items
    choice = next(item for item in items if item.task == mllmu.CHOICE)
    assert "\nB: Painter\n" in mllmu.prompt(choice) and "one letter" in mllmu.prompt(choice)
    gap = next(item for item in items if item.task == mllmu.CLOZE)
    assert "__" not in mllmu.prompt(gap) and "[Blank]" in mllmu.prompt(gap)


# Damage -------------------------------------------------------------------------------------------


def edited(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def retabled(folder, change):
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(folder / "train-00000-of-00001.parquet").to_pylist()
    change(rows)
    made.table(folder, rows)


def first_entity(root):
    return root / "Entities" / "variants_Thing_0_updated.json"


DAMAGE = {
    "mmubench without questions": (
        "mmubench",
        lambda r: (r / "Concept_red_0" / "questions.json").unlink(),
        "questions.json",
    ),
    "mmubench with one picture": (
        "mmubench",
        lambda r: [p.unlink() for p in sorted((r / "Concept_red_0").glob("*.png"))[1:]],
        "holds 1 pictures",
    ),
    "mmubench with a number for a keyword": (
        "mmubench",
        lambda r: edited(r / "Concept_red_0" / "questions.json", lambda d: d[2].update(keyword=3)),
        "entry 3.*'keyword' is a whole number",
    ),
    "mmubench with a concept twice": (
        "mmubench",
        lambda r: shutil.copytree(r / "Concept_red_0", r / "concept_red_0"),
        "twice",
    ),
    "mlubench without a task": (
        "mlubench",
        lambda r: (r / "Tasks" / "TaskC" / "taskC_retain.json").unlink(),
        "taskC_retain.json",
    ),
    "mlubench without a picture": (
        "mlubench",
        lambda r: (r / "downloaded_images" / "Class0" / "Thing_0" / "image_0.jpg").unlink(),
        "there is no picture",
    ),
    "mlubench without an answer": (
        "mlubench",
        lambda r: edited(first_entity(r), lambda d: d[1]["conversations"].pop()),
        "entry 2.*one question and its answer",
    ),
    "mlubench with an id twice": (
        "mlubench",
        lambda r: edited(first_entity(r), lambda d: d[1].update(id="0")),
        "'0' twice",
    ),
    "mlubench with a question twice": (
        "mlubench",
        lambda r: edited(
            r / "Tasks" / "TaskB" / "taskB_forget.json", lambda d: d.append({**d[0], "id": "x"})
        ),
        "entry 7: .* comes twice",
    ),
    "mlubench with a request for nobody": (
        "mlubench",
        lambda r: edited(first_entity(r), lambda d: d.pop()),
        "which no file of Entities has",
    ),
    "mlubench with a picture elsewhere": (
        "mlubench",
        lambda r: edited(first_entity(r), lambda d: d[0].update(image="../../x.jpg")),
        "lies outside",
    ),
    "fiubench without a split": ("fiubench", lambda r: (r / "split.json").unlink(), "split.json"),
    "fiubench with somebody twice": (
        "fiubench",
        lambda r: edited(r / "full.json", lambda d: d[1].update(unique_id="p0")),
        "'p0' twice",
    ),
    "fiubench without a key": (
        "fiubench",
        lambda r: edited(r / "full.json", lambda d: d[4]["qa_list"][1].pop("keywords")),
        "entry 5, question 2: 'keywords' is missing",
    ),
    "fiubench with a stranger in the split": (
        "fiubench",
        lambda r: edited(r / "split.json", lambda d: d["forget5"].append("nobody")),
        "whom full.json does not have",
    ),
    "fiubench without a face": (
        "fiubench",
        lambda r: (r / "images" / "3.png").unlink(),
        "entry 4: there is no picture",
    ),
    "clear without a part": ("clear", lambda r: shutil.rmtree(r / "real_faces"), "real_faces"),
    "clear without a column": (
        "clear",
        lambda r: retabled(r / "retain_perturbed", lambda d: [x.pop("perturbed_names") for x in d]),
        "no column 'perturbed_names'",
    ),
    "clear with a null": (
        "clear",
        lambda r: retabled(r / "forget10_perturbed", lambda d: d[2].update(caption=None)),
        "row 3: 'caption' is null",
    ),
    "clear cut short": (
        "clear",
        lambda r: os.truncate(r / "real_world" / "train-00000-of-00001.parquet", 200),
        "no readable Parquet",
    ),
    "mllmu with somebody twice": (
        "mllmu",
        lambda r: retabled(r / "forget_5", lambda d: d[1].update(ID="000")),
        "'000' twice",
    ),
    "mllmu with a wrong letter": (
        "mllmu",
        lambda r: retabled(
            r / "retain_95",
            lambda d: d[1]["Classification_Task"]["Pure_Text_Questions"][0].update(
                Correct_Answer="E"
            ),
        ),
        "row 2: a choice of Pure_Text_Questions",
    ),
    "mllmu without pictures of somebody": (
        "mllmu",
        lambda r: retabled(r / "Test_Set", lambda d: d[0].update(images=[])),
        "row 1: there is no picture",
    ),
    "ppubench with a sample twice": (
        "ppubench",
        lambda r: retabled(r / "ppu_eval_cloze", lambda d: d.append(d[0])),
        "twice",
    ),
    "ppubench with two names": (
        "ppubench",
        lambda r: retabled(r / "ppu_eval_cloze", lambda d: d[0].update(subject="Other")),
        "has two names",
    ),
    "ppubench with a strange modality": (
        "ppubench",
        lambda r: retabled(r / "ppu_eval_generation", lambda d: d[3].update(modality="audio")),
        "row 4: the modality 'audio'",
    ),
    "ppubench with a fact to forget and to keep": (
        "ppubench",
        lambda r: edited(
            r / "split" / "persona_split.json", lambda d: d["keep_ids"].append(d["delete_ids"][0])
        ),
        "to forget and to keep",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_set_is_refused_with_a_sentence(tmp_path, case):
    name, damage, sentence = DAMAGE[case]
    root = made.SETS[name](tmp_path / "set")
    READERS[name].read(root)
    damage(root)
    with pytest.raises(BadInput, match=sentence) as refused:
        READERS[name].read(root)
    assert "\n" not in str(refused.value) and ":" in str(refused.value)


def test_a_picture_that_is_none_is_refused_when_it_is_decoded(tmp_path):
    root = made.clear(tmp_path)
    retabled(root / "real_faces", lambda d: d[1].update(image={"bytes": b"no", "path": "x"}))
    found = clear.read(root)
    shown = [i.photo for i in found.items if "real_faces" in i.sets]
    shown[0].load()
    with pytest.raises(BadInput, match="row 2, image"):
        shown[1].load()


# Full size ----------------------------------------------------------------------------------------


def test_a_full_size_listing_has_the_published_counts(tmp_path):
    """FIUBench: 400 of the people in the file, 20 questions each; MMUBench: 20 concepts with 50
    pictures and 100 questions."""
    counts = fiubench.read(made.fiubench(tmp_path / "fiu", people=405, questions=20)).counts()
    assert (counts["entities"], counts["items"]) == (400, fiubench.PUBLISHED["items"])
    found = mmubench.read(made.mmubench(tmp_path / "mmu", 20, 50, 100)).counts()
    wanted = mmubench.PUBLISHED
    assert (found["entities"], found["pictures"]) == (wanted["entities"], wanted["pictures"])
    assert found["Generality"] == 20 * wanted["questions of a concept"]


def test_a_full_size_table_has_the_published_counts(tmp_path):
    published = clear.PUBLISHED
    root = made.clear(
        tmp_path,
        published["forget10_perturbed"],
        published["retain_perturbed"],
        published["real_faces"],
        published["real_world"],
    )
    found = clear.read(root).counts()
    assert found["real_faces"] == 151 and found["real_world"] == 367
    assert found["forget10_perturbed"] == 2 * 378  # each row is a caption and a name
    assert found["retain_perturbed"] == 2 * 395


def test_full_size_profiles_have_the_published_counts(tmp_path):
    """MLLMU-Bench: 500 invented people, 25 of them to forget, and 153 celebrities."""
    published = mllmu.PUBLISHED
    celebrities = published["Retain_Set"]
    made.mllmu(tmp_path, published["forget_5"], published["retain_95"], celebrities)
    found = mllmu.read(tmp_path)
    people = {part: len({item.entity for item in found.of(part)}) for part in mllmu.SETS}
    assert people == {"Forget": 25, "Test": 25, "Retain": 475, "Celebrity": 153}
    assert found.counts()["entities"] == published["Test_Set"] + celebrities == 653


@pytest.mark.slow
def test_full_size_conversations_have_the_published_counts(tmp_path):
    """MLUBench: 127 entities of 9 classes, 15,414 questions and 5,105 pictures."""
    wanted = dict(mlubench.PUBLISHED)
    classes = wanted.pop("classes")
    found = mlubench.read(made.mlubench(tmp_path, **wanted))
    assert wanted == {"entities": 127, "items": 15414, "pictures": 5105}
    assert {key: found.counts()[key] for key in wanted} == wanted
    folders = {Path(photo.label).parent for one in found.entities for photo in one.photos}
    assert len({folder.parent for folder in folders}) == classes


def test_full_size_facts_have_the_published_counts(tmp_path):
    """PPU-Bench: 500 people; of their facts, 3,126 to forget and 9,041 to keep."""
    published = ppubench.PUBLISHED
    made.ppubench_in_full(
        tmp_path,
        published["entities"],
        published["persona forget"],
        published["persona retain"],
        published["selective"],
        {5: 25},
    )
    found = ppubench.read(tmp_path)
    facts = lambda part: len({item.id.partition("/")[0] for item in found.of(part)})
    assert found.counts()["entities"] == 500
    assert facts("persona forget") == 3126 and facts("persona retain") == 9041
    assert facts("selective forget") == published["selective"]


# As a suite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mmubench", "mlubench", "fiubench", "clear", "ppubench"])
def test_a_set_becomes_a_suite(sets, tmp_path, name):
    found = READERS[name].read(sets[name])
    written = as_suite.write(found, tmp_path / "suite")
    assert written == suite.read(tmp_path / "suite")
    assert {s.name for s in written.subjects} == {e.name for e in found.entities}
    assert sum(len(s.images) for s in written.subjects) == sum(
        len(e.photos) for e in found.entities
    )
    assert suite.check(written) > 0
    assert written.single == (name in ("fiubench", "clear", "ppubench"))
    with pytest.raises(BadInput, match="exists"):
        as_suite.write(found, tmp_path / "suite")


def test_a_concept_keeps_its_own_questions_with_their_keywords(sets, tmp_path):
    written = as_suite.write(mmubench.read(sets["mmubench"]), tmp_path / "suite")
    kinds = [q.kind for q in written.subjects[0].questions]
    assert kinds.count("yesno") == 3 and kinds.count("name") == 1
    assert all("{name}" in q.text for q in written.subjects[0].questions if q.kind == "yesno")


def test_a_set_without_names_asks_for_them(sets, tmp_path):
    found = mllmu.read(sets["mllmu"])
    with pytest.raises(BadInput, match="--names"):
        as_suite.write(found, tmp_path / "suite")
    assert not (tmp_path / "suite").exists() and not list(tmp_path.iterdir())
    names = made.put(
        tmp_path / "names.json", {e.id: f"Name {k}" for k, e in enumerate(found.entities)}
    )
    written = as_suite.write(found, tmp_path / "suite", as_suite.names_of(names))
    assert [s.name for s in written.subjects] == [f"Name {k}" for k in range(7)]
    named = mmubench.read(sets["mmubench"])
    with pytest.raises(BadInput, match="MMUBench has no entity 'Nobody'"):
        as_suite.write(named, tmp_path / "other", {"Nobody": "Ann"})
    assert not (tmp_path / "other").exists()


def test_a_set_in_the_cache_of_the_hub_is_read_and_links_elsewhere_are_not(tmp_path):
    """There every file is a link into the folder "blobs" beside "snapshots"."""
    blobs = tmp_path / "datasets--a--b" / "blobs"
    set_ = tmp_path / "datasets--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    (set_ / "images").mkdir(parents=True)
    (blobs / "abc").write_bytes(b"a picture")
    (tmp_path / "secret.png").write_bytes(b"another")
    (set_ / "images" / "0.png").symlink_to("../../../blobs/abc")
    (set_ / "images" / "1.png").symlink_to(tmp_path / "secret.png")
    assert files.photo(set_, "images/0.png", "here").read() == b"a picture"
    for written in ("images/1.png", "../../blobs/abc", str(blobs / "abc")):
        with pytest.raises(BadInput, match="lies outside"):
            files.photo(set_, written, "here")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").write_bytes(b"another")
    for plain, link in (("plain", blobs / "abc"), ("snapshots/1", tmp_path / "blobs" / "secret")):
        (tmp_path / plain).mkdir(parents=True)
        (tmp_path / plain / "0.png").symlink_to(link)
        with pytest.raises(BadInput, match="lies outside"):
            files.photo(tmp_path / plain, "0.png", "here")
