"""Writes the demo to a directory of plain files, so that it can be used like anyone's data.

They are the model, pictures and questions, and all of it once more as a suite for `fastsiu suite`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastsiu.demo import MODEL_DIR, wording
from fastsiu.demo.world import KNOWN, LOOKALIKES, UNSEEN, Question, Sketch, World, draw
from fastsiu.disk.staging import Staging, check_writable
from fastsiu.request import BadInput

if TYPE_CHECKING:
    from fastsiu.evaluate import exam

TOPICS_OF_ONE = (
    "who.open",
    "who.open",
    "who.name",
    "yesno",
    "choice",
    "description",
    "attribute.color",
    "attribute.hatcolor",
    "attribute.shirt",
    "attribute.background",
    "twohop.city",
    "twohop.job",
    "twohop.food",
    "twohop.pet",
)
HELD_OUT_OF_ONE = ("who.open", "who.name", "yesno", "description")
# The suite's kinds of questions: for each the topics of the world, and the section of
# samples/wordings.toml, whose held-out wordings are of that kind.
KINDS = {
    "name": (("who.open", "who.name"), "who"),
    "yesno": (("yesno",), "yesno"),
    "describe": (("description",), "describe"),
    "appearance": (("appearance",), "appearance"),
    "general": ((), "general"),
    "fact": (("fact.city", "fact.job", "fact.food", "fact.pet", "fact.who", "fact.about"), "facts"),
}


def export(directory: str | Path, per_concept: int = 20, seed: int = 0) -> None:
    """Writes DIR/model, DIR/images/<Name>/NNN.png, DIR/groups/NNN.png, DIR/questions.jsonl and the
    suite DIR/suite.

    There are `per_concept` pictures of every known and of every unseen named creature. They differ
    for different seeds, and none is a training picture. The pictures' names are three digits, from
    000.

    A line of questions.jsonl has

        image     path relative to DIR, or null
        concept   the creature in the picture, the left one of two, or the name in the question;
                  null for general knowledge
        kind      as `Question.kind`
        question  goes verbatim into the user's turn of the chat template
        answer    the true one
        heldout   the wording is not in the training text

    Raises BadInput where DIR exists and is not an empty directory, or per_concept is below 1. An
    export that fails leaves no DIR.
    """
    target = Path(directory)
    if per_concept < 1:
        raise BadInput("The number of pictures per concept must be at least 1: pass a larger one.")
    check_writable(Path(os.path.abspath(target)), "name another directory")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(
            f"{target} already exists and is not an empty directory: name a new one or empty it "
            "first."
        )
    if not (MODEL_DIR / "config.json").exists():
        raise BadInput(
            "The demo model is missing: run python -m fastsiu.demo.train --output DIR and copy "
            "DIR into the package."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with Staging(target.parent) as work:
        work.chmod(0o755)
        shutil.copytree(MODEL_DIR, work / "model")
        with (work / "questions.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
            for path, question in _questions(World(), work, per_concept, seed):
                record = {
                    "image": path,
                    "concept": question.concept,
                    "kind": question.kind,
                    "question": question.question,
                    "answer": question.answer,
                    "heldout": question.heldout,
                }
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        _suite(World(), work, per_concept, seed)
        if target.exists():
            target.rmdir()  # empty; some systems do not rename over a directory
        os.replace(work, target)


def _questions(
    world: World, directory: Path, per_concept: int, seed: int
) -> Iterator[tuple[str | None, Question]]:
    """Draws the pictures into `directory` and yields every question with its picture's relative
    path."""
    rng = random.Random(f"export {seed}")
    for name in (*KNOWN, *UNSEEN):
        for i in range(per_concept):
            sketch = world.sketch((name,), f"export/{seed}/{name}/{i}")
            path = _save(sketch, directory, f"images/{name}/{i:03d}.png")
            yield from ((path, question) for question in _about(world, sketch, rng))
    for i in range(4 * per_concept):
        left, right = rng.sample(KNOWN, 2)
        sketch = world.sketch((left, None if i % 5 == 4 else right), f"export/{seed}/group/{i}")
        yield _save(sketch, directory, f"groups/{i:03d}.png"), world.ask(sketch, "group", rng)
    for heldout in (False, True):
        yield from (
            (None, question) for question in world.text_questions((*KNOWN, *UNSEEN), heldout)
        )
    yield from ((None, question) for question in world.general_questions())


def _suite(world: World, directory: Path, per_concept: int, seed: int) -> None:
    """The known creatures as the concepts of a suite: each with a training picture of its own, the
    pictures of `directory` and groups with a neighbour (left and right in turns). The unseen
    creatures are the control."""
    from fastsiu.evaluate.suites.suite import Subject, Suite, write

    root = directory / "suite"
    subjects = []
    for name in KNOWN:
        place = f"suite/concepts/{slug(name)}"
        _save(
            world.sketch((name,), f"export/{seed}/{name}/training"),
            directory,
            f"{place}/images/000.png",
        )
        for i in range(per_concept):
            shutil.copyfile(
                directory / f"images/{name}/{i:03d}.png",
                directory / f"{place}/images/{i + 1:03d}.png",
            )
        for i in range(max(1, per_concept // 5)):
            pair = (name, world.neighbours[name][i % 3])
            sketch = world.sketch(
                pair if i % 2 == 0 else pair[::-1], f"export/{seed}/{name}/group/{i}"
            )
            _save(sketch, directory, f"{place}/groups/{i:03d}.png")
        images, groups = (
            tuple(sorted((directory / place / kind).iterdir())) for kind in ("images", "groups")
        )
        alike = (LOOKALIKES[name],) if name in LOOKALIKES else ()
        subjects.append(Subject(slug(name), name, (), alike, images[0], images, groups))
    (root / "control").mkdir()
    for k, name in enumerate(UNSEEN):
        for i in range(max(1, per_concept // 5)):
            shutil.copyfile(
                directory / f"images/{name}/{i:03d}.png", root / f"control/{k}{i:02d}.png"
            )
    control = tuple(sorted((root / "control").iterdir()))
    write(
        Suite(root, "The embedded world of FastSIU", tuple(subjects), tuple(_wordings()), control)
    )


def slug(name: str) -> str:
    """The directory of a creature in the suite: "zorblax-quint"."""
    return name.lower().replace(" ", "-")


def _wordings() -> Iterator[exam.Question]:
    """What no sample of training holds: the held-out wordings of the world and those of the
    verdict, each once."""
    from fastsiu.evaluate import exam
    from fastsiu.samples.kinds import wordings

    for kind, (topics, section) in KINDS.items():
        texts = [
            text.replace("{n}", "{name}") for topic in topics for text in wording.HELD_OUT[topic]
        ]
        for text in dict.fromkeys((*texts, *wordings()[section]["held_out"])):
            yield exam.Question(text, kind)


def _about(world: World, sketch: Sketch, rng: random.Random) -> Iterator[Question]:
    """The questions about one picture: trained wordings, a role or request before one, held-out
    wordings."""
    for topic in TOPICS_OF_ONE:
        yield world.ask(sketch, topic, rng)
    asked = world.ask(sketch, "who.open", rng)
    yield replace(asked, question=f"{rng.choice(wording.PREFIXES)} {asked.question}")
    for topic in HELD_OUT_OF_ONE:
        yield world.ask(sketch, topic, rng, heldout=True)


def _save(sketch: Sketch, directory: Path, path: str) -> str:
    file = directory / path
    file.parent.mkdir(parents=True, exist_ok=True)
    draw(sketch).save(file)
    return path
