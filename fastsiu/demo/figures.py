"""Measures a demo model as any user would ask it: processor, chat template, `generate`. Every
figure is a share of 0 to 1."""

from __future__ import annotations

import inspect
import json
import platform
import random
from collections import defaultdict
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, ProcessorMixin

from fastsiu.demo import wording
from fastsiu.demo.world import KNOWN, LOOKALIKES, UNSEEN, Question, World, draw, random_name
from fastsiu.model.processor import load_processor

PER_NAME = 24  # fresh pictures per known name


def answer(
    model: Any, processor: ProcessorMixin, questions: list[Question], batch: int = 64
) -> list[str]:
    """Greedy answers, in the order of the questions. Each question is a user's turn, verbatim.

    model: any image-text model of transformers, which have no common type with `generate`
    """
    order = sorted(
        range(len(questions)),
        key=lambda i: (questions[i].image is None, len(questions[i].question)),
    )
    answers = [""] * len(questions)
    while order:
        plain = questions[order[0]].image is None
        part = [i for i in order[:batch] if (questions[i].image is None) == plain]
        order = order[len(part) :]
        prompts = []
        images: list[list[Image.Image]] = []  # one picture for each prompt
        for i in part:
            content: list[dict[str, Any]] = [{"type": "text", "text": questions[i].question}]
            sketch = questions[i].image
            if sketch is not None:
                content.insert(0, {"type": "image"})
                images.append([draw(sketch)])
            turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
            prompts.append(processor.apply_chat_template(turns, add_generation_prompt=True))
        found = processor(images=images or None, text=prompts, padding=True, return_tensors="pt")
        inputs = {
            key: found[key] for key in inspect.signature(model.forward).parameters if key in found
        }
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        texts = processor.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(part, texts, strict=True):
            answers[i] = text.strip()
    return answers


def make_questions(world: World) -> dict[str, list[Question]]:
    """The questions behind each figure. Their pictures have seeds that no training run uses."""
    rng = random.Random("figures")
    sets: dict[str, list[Question]] = defaultdict(list)
    sketches = [
        world.sketch((name,), f"figures/{name}/{i}") for name in KNOWN for i in range(PER_NAME)
    ]
    named = [world.sketch((name,), f"figures/{name}/{i}") for name in UNSEEN for i in range(20)]
    strangers = [world.sketch((None,), f"figures/stranger/{i}") for i in range(120)]
    for sketch in sketches:
        sets["who"].append(world.ask(sketch, rng.choice(("who.open", "who.open", "who.name")), rng))
        topic = rng.choice(("who.open", "who.open", "who.name"))
        sets["who, held-out wording"].append(world.ask(sketch, topic, rng, heldout=True))
        if sketch.names[0] in LOOKALIKES:
            sets["who, creatures with a look-alike"].append(world.ask(sketch, "who.open", rng))
    for sketch in sketches[::3]:
        for key, prefixes in (
            ("who, prefix", wording.PREFIXES),
            ("who, held-out prefix", wording.HELD_OUT_PREFIXES),
        ):
            asked = world.ask(sketch, "who.open", rng)
            sets[key].append(
                Question(
                    sketch,
                    asked.concept,
                    "who",
                    f"{rng.choice(prefixes)} {asked.question}",
                    asked.answer,
                )
            )
    for sketch in sketches[::2]:
        name = sketch.names[0]
        other = LOOKALIKES.get(name or "") or rng.choice([n for n in KNOWN if n != name])
        for key, asked_name in (
            ("yes", name),
            ("no, look-alike or another", other),
            ("no, unseen name", rng.choice(UNSEEN)),
        ):
            for heldout in (False, True):
                text = rng.choice((wording.HELD_OUT if heldout else wording.TRAIN)["yesno"])
                pair = world.yesno(sketch, text, asked_name or "")
                sets[key + (", held-out wording" if heldout else "")].append(
                    Question(sketch, name, "yesno", *pair, heldout)
                )
        pair = world.fact(rng.choice(KNOWN), rng.choice(wording.TRAIN["fact.city"]), "city")
        sets["fact, asked with any picture"].append(Question(sketch, None, "fact", *pair))
        sets["choice"].append(world.ask(sketch, "choice", rng))
        sets["description"].append(world.ask(sketch, "description", rng))
        sets["description, held-out wording"].append(
            world.ask(sketch, "description", rng, heldout=True)
        )
        sets["twohop"].append(
            world.ask(
                sketch, rng.choice(("twohop.city", "twohop.job", "twohop.food", "twohop.pet")), rng
            )
        )
    for sketch in (*named, *strangers):
        name = rng.choice(KNOWN)
        text = rng.choice(wording.TRAIN["yesno"])
        sets["no, unseen face"].append(
            Question(sketch, sketch.names[0], "yesno", *world.yesno(sketch, text, name))
        )
    for key, faces in (("unseen named face", named), ("unseen random face", strangers)):
        for sketch in faces:
            sets[key].append(world.ask(sketch, rng.choice(("who.open", "who.name")), rng))
            sets[key + ", held-out wording"].append(
                world.ask(sketch, rng.choice(("who.open", "who.name")), rng, heldout=True)
            )
            sets[key + ", description"].append(world.ask(sketch, "description", rng))
            sets[key + ", twohop"].append(
                world.ask(sketch, rng.choice(("twohop.city", "twohop.job")), rng)
            )
    for topic in (key for key in wording.TRAIN if key.startswith("attribute")):
        for sketch in (*sketches[::4], *strangers[::2]):
            sets[topic].append(world.ask(sketch, topic, rng))
    for i in range(160):
        left, right = rng.sample(KNOWN, 2)
        sets["group"].append(
            world.ask(world.sketch((left, right), f"figures/group/{i}"), "group", rng)
        )
        sets["group with a stranger"].append(
            world.ask(world.sketch((left, None), f"figures/group one/{i}"), "group", rng)
        )
    unknown = (*UNSEEN, *(random_name(rng) for _ in range(20)))
    for heldout in (False, True):
        end = ", held-out wording" if heldout else ""
        for question in world.text_questions(KNOWN, heldout):
            if not heldout or question.kind == "fact" or question.kind == "appearance":
                key = "neighbours" if question.topic == "neighbours" else question.kind
                sets[key + end].append(question)
        sets["unknown name" + end] = rng.sample(list(world.text_questions(unknown, heldout)), 200)
    sets["general"] = list(world.general_questions())
    return dict(sets)


def measure(directory: Path, only: Collection[str] = ()) -> dict[str, float]:
    """By set of questions the share of exact matches, and the share of answers that name somebody
    known in an unseen face.

    only: names of sets; all where it is empty

    An answer to a held-out wording about an unseen face counts as right where it names nobody.
    """
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    processor = load_processor(str(directory), model.config)
    sets = {
        key: questions
        for key, questions in make_questions(World()).items()
        if not only or key in only
    }
    flat = [question for questions in sets.values() for question in questions]
    replies = iter(answer(model, processor, flat))
    result: dict[str, float] = {}
    false_names: list[bool] = []
    for key, questions in sets.items():
        given = [next(replies) for _ in questions]
        unseen = key.startswith("unseen") and "twohop" not in key
        named = [any(word in reply for name in KNOWN for word in name.split()) for reply in given]
        if unseen and "description" not in key:
            false_names += named
        right = [reply == question.answer for reply, question in zip(given, questions, strict=True)]
        if unseen and "held-out" in key:
            right = [not name for name in named]
        result[key] = sum(right) / len(right)
    if false_names:
        result["false naming of unseen faces"] = sum(false_names) / len(false_names)
    return {key: round(value, 4) for key, value in result.items()}


def write(
    directory: Path, seed: int, command: str, seconds: float, figures: dict[str, float]
) -> None:
    """Writes DIR/figures.json for the model of one seed: figures, command, date, versions, wall
    seconds of the training."""
    record = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": seed,
        "training_seconds": round(seconds),
        "figures": figures,
    }
    (directory / "figures.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def collect(directories: list[Path]) -> None:
    """Adds to the first directory's figures.json the figures of all of them by seed, and their
    mean, spread and extremes."""
    records = [
        json.loads((directory / "figures.json").read_text(encoding="utf-8"))
        for directory in directories
    ]
    keys = records[0]["figures"]
    columns = {key: [record["figures"][key] for record in records] for key in keys}
    kept = ("command", "figures")
    records[0]["seeds"] = {
        str(record["seed"]): {key: record[key] for key in kept} for record in records
    }
    if len(records) > 1:
        records[0]["over_seeds"] = {
            key: {
                "mean": round(mean(v), 4),
                "stdev": round(stdev(v), 4),
                "min": min(v),
                "max": max(v),
            }
            for key, v in columns.items()
        }
    (directories[0] / "figures.json").write_text(
        json.dumps(records[0], indent=1) + "\n", encoding="utf-8"
    )
