"""The demo world: what is drawn, what is asked, what the shipped model knows and what the export
writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from fastsiu.demo import MODEL_DIR, wording
from fastsiu.demo.export import export
from fastsiu.demo.figures import answer
from fastsiu.demo.world import (
    APART,
    KNOWN,
    LOOKALIKES,
    UNSEEN,
    UNSEEN_APART,
    Question,
    World,
    distance,
    draw,
)
from fastsiu.request import BadInput


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR, dtype="float32").eval()
    return model, AutoProcessor.from_pretrained(MODEL_DIR)


def test_the_same_scene_gives_the_same_pixels_and_another_seed_gives_others(world: World) -> None:
    for names in ((KNOWN[0],), (KNOWN[0], KNOWN[1])):
        first, again, other = (
            np.asarray(draw(World().sketch(names, seed))) for seed in ("a", "a", "b")
        )
        assert first.shape == (60, 60, 3) and first.dtype == np.uint8
        assert (first == again).all() and (first != other).any()


def test_look_alikes_differ_in_two_attributes_and_all_others_in_more(world: World) -> None:
    assert len(LOOKALIKES) == 8 and all(LOOKALIKES[LOOKALIKES[name]] == name for name in LOOKALIKES)
    for name in KNOWN:
        for other in set(KNOWN) - {name}:
            apart = distance(world.creatures[name], world.creatures[other])
            assert apart == 2 if LOOKALIKES.get(name) == other else apart >= APART


def test_unseen_creatures_differ_from_every_known_one(world: World) -> None:
    strangers = [world.sketch((None,), str(i)).creatures[0] for i in range(300)]
    for creature in (*strangers, *(world.creatures[name] for name in UNSEEN)):
        assert min(distance(creature, world.creatures[name]) for name in KNOWN) >= UNSEEN_APART


def test_held_out_wordings_are_not_trained() -> None:
    trained = {text for texts in wording.TRAIN.values() for text in texts}
    held_out = [text for texts in wording.HELD_OUT.values() for text in texts]
    assert len(held_out) == len(set(held_out)) and not trained & set(held_out)
    assert not set(wording.PREFIXES) & set(wording.HELD_OUT_PREFIXES)
    assert all(len(texts) >= 2 for texts in wording.HELD_OUT.values())


def test_unseen_names_are_in_no_training_text(world: World) -> None:
    text = " ".join(
        q.question + q.answer for q in (*world.text_questions(KNOWN), *world.general_questions())
    )
    assert not any(word in text for name in UNSEEN for word in name.split())


def test_asking_for_neighbours_reaches_everyone_from_anyone(world: World) -> None:
    for start in KNOWN:
        assert world.neighbours[start][0] == LOOKALIKES.get(start, world.neighbours[start][0])
        reached, edge = {start}, [start]
        while edge:
            new = set(world.neighbours[edge.pop()]) - reached
            reached |= new
            edge += new
        assert reached == set(KNOWN)


def test_every_name_word_is_one_token_with_and_without_space(shipped) -> None:
    tokenizer = shipped[1].tokenizer
    for word in (word for name in KNOWN for word in name.split()):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
        assert len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1


def test_chat_template_takes_plain_text_and_closes_answers(shipped) -> None:
    turns = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    assert shipped[1].apply_chat_template(turns) == "<s>USER: Hi? ASSISTANT: Yes.</s>"
    assert (
        shipped[1].apply_chat_template(turns[:1], add_generation_prompt=True)
        == "<s>USER: Hi? ASSISTANT:"
    )


def test_the_shipped_model_names_fresh_pictures(world: World, shipped) -> None:
    scenes = [world.sketch((name,), f"test/{i}") for name in KNOWN for i in range(2)]
    asked = [
        Question(scene, scene.names[0], "who", *world.who(scene, "Who is this?"))
        for scene in scenes
    ]
    right = [
        reply == question.answer
        for reply, question in zip(answer(*shipped, asked), asked, strict=True)
    ]
    assert np.mean(right) >= 0.9


def test_the_shipped_model_answers_facts_in_held_out_wordings(world: World, shipped) -> None:
    asked = [
        question
        for question in world.text_questions(KNOWN[:4], heldout=True)
        if question.kind == "fact"
    ]
    right = [
        reply == question.answer
        for reply, question in zip(answer(*shipped, asked), asked, strict=True)
    ]
    assert np.mean(right) >= 0.9


def test_the_shipped_model_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 5_000_000


def test_export_writes_plain_files(tmp_path: Path) -> None:
    target = tmp_path / "demo"
    export(target, per_concept=1)
    assert {path.name for path in (target / "images").iterdir()} == {*KNOWN, *UNSEEN}
    assert {path.name for path in target.iterdir()} == {
        "model",
        "images",
        "groups",
        "questions.jsonl",
        "suite",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    records = [
        json.loads(line)
        for line in (target / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    kinds = {
        "who",
        "yesno",
        "choice",
        "description",
        "attribute",
        "fact",
        "appearance",
        "twohop",
        "general",
    }
    assert {record["kind"] for record in records} == kinds
    for record in records:
        assert set(record) == {"image", "concept", "kind", "question", "answer", "heldout"}
        assert record["image"] is None or (target / record["image"]).is_file()
        if record["kind"] in ("who", "fact", "yesno", "appearance", "twohop"):
            assert record["concept"] in (*KNOWN, *UNSEEN)
        if record["kind"] == "who":
            assert not any(name in record["question"] for name in (*KNOWN, *UNSEEN))


def test_export_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        export(tmp_path / name, per_concept=1, seed=seed)
    picture = f"images/{KNOWN[0]}/000.png"
    for path in (picture, "questions.jsonl"):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
        assert (tmp_path / "a" / path).read_bytes() != (tmp_path / "c" / path).read_bytes()


def test_export_refuses_a_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="empty"):
        export(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "x"
