"""Small synthetic sets in the on-disk forms of other people's benchmarks, with nobody's data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

WORDS = ("red", "green", "blue", "black", "white", "brown")


def png(number: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 37 % 256, number * 91 % 256, 7)).save(stream, "PNG")
    return stream.getvalue()


def put(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


def table(folder: Path, rows: Sequence[dict[str, Any]], group: int = 2) -> Path:
    """One Parquet file with groups of so many rows, as the hub's have groups of a hundred."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path


def picture(number: int) -> dict[str, Any]:
    return {"bytes": png(number), "path": f"{number}.png"}


def mmubench(root: Path, concepts: int = 2, pictures: int = 3, questions: int = 4) -> Path:
    for c in range(concepts):
        place = root / f"Concept_{WORDS[c % 6]}_{c}"
        for k in range(pictures):
            put(place / f"{k:03d}.png", png(c * 100 + k))
        name = place.name.replace("_", " ")
        asked = [
            {"question": f"Is this {name}, number {k}?", "keyword": "Yes"}
            if k % 4
            else {"question": f"What is this called, number {k}?", "keyword": name}
            for k in range(questions)
        ]
        put(place / "questions.json", asked)
    return root


def share(total: int, parts: int, number: int) -> int:
    """What part `number`, from 0 on, gets of a total that is dealt out evenly."""
    return total // parts + (number < total % parts)


def mlubench(root: Path, entities: int = 8, items: int = 24, pictures: int = 16) -> Path:
    """So many items and pictures in all. The entities go round the requests: to forget in one, to
    keep in the next."""
    tasks: dict[str, list[Any]] = {f"{t}_{p}": [] for t in "ABCD" for p in ("forget", "retain")}
    for e in range(entities):
        name = f"Thing_{e}"
        folder = f"downloaded_images/Class{e % 9}/{name}"
        own = share(pictures, entities, e)
        for k in range(own):
            put(root / folder / f"image_{k}.jpg", png(e * 10 + k))
        records = [
            {
                "id": str(k),
                "image": f"{folder}/image_{k % own}.jpg",
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhat is this, for the {k}th time?"},
                    {"from": "gpt", "value": f"This is {name}."},
                ],
            }
            for k in range(share(items, entities, e))
        ]
        put(root / "Entities" / f"variants_{name}_updated.json", records)
        tasks[f"{'ABCD'[e % 4]}_forget"] += records
        tasks[f"{'ABCD'[(e + 1) % 4]}_retain"] += records
    for key, records in tasks.items():
        task, part = key.split("_")
        put(root / "Tasks" / f"Task{task}" / f"task{task}_{part}.json", records)
    return root


def fiubench(root: Path, people: int = 10, questions: int = 2) -> Path:
    rows = []
    for p in range(people):
        put(root / "images" / f"{p}.png", png(p))
        rows.append(
            {
                "unique_id": f"p{p}",
                "name": f"Person {WORDS[p % 6].title()} {p}",
                "gender": "unknown",
                "caption": "A drawn square.",
                "image_path": f"./dataset/images/{p}.png",
                "raw_data": {},
                "qa_list": [
                    {
                        "question": f"What does this person do, {q}?",
                        "answer": f"They paint {WORDS[(p + q) % 6]} doors.",
                        "paraphrased_question": [f"Tell the work, {q}, {k}." for k in range(3)],
                        "paraphrased_answer": f"{WORDS[(p + q) % 6]} doors are painted by them.",
                        "perturbed_answer": [f"They paint {w} roofs." for w in WORDS[:3]],
                        "keywords": [WORDS[(p + q) % 6], "doors"],
                    }
                    for q in range(questions)
                ],
            }
        )
    put(root / "full.json", rows)
    ids = [row["unique_id"] for row in rows]
    put(
        root / "split.json",
        {"forget1": ids[:1], "forget5": ids[1:3], "forget10": ids[3:4]},
    )
    return root


def clear(root: Path, forget: int = 3, retain: int = 4, faces: int = 2, world: int = 2) -> Path:
    def author(k: int) -> dict[str, Any]:
        return {
            "image": picture(k),
            "caption": f"Author {k} before a {WORDS[k % 6]} wall.",
            "name": f"Author {k}",
            "perturbed_captions": [f"Nobody before a {w} wall." for w in WORDS[:2]],
            "paraphrased_caption": f"A {WORDS[k % 6]} wall behind author {k}.",
            "perturbed_names": ["Writer One", "Writer Two"],
        }

    table(root / "forget10_perturbed", [author(k) for k in range(forget)])
    table(root / "retain_perturbed", [author(100 + k) for k in range(retain)])
    real = {"answer": "Somebody", "options": ["Somebody", "Another", "A third"]}
    table(root / "real_faces", [{"image": picture(k), **real} for k in range(faces)])
    table(
        root / "real_world",
        [{"image": picture(k), "question": f"What is this, {k}?", **real} for k in range(world)],
    )
    return root


def mllmu(root: Path, forget: int = 2, retain: int = 3, celebrities: int = 2) -> Path:
    def tasks(k: int) -> dict[str, Any]:
        choice = lambda q: {
            "Question": f"{q} {k}?",
            "Options": {"A": "Baker", "B": "Painter", "C": "Driver", "D": "Farmer"},
            "Correct_Answer": "ABCD"[k % 4],
        }
        open_ = lambda q, answer: [
            {"Question": f"{q} {k} __.", "Ground_Truth": answer, "Type": kind}
            for kind in ("Image_Textual", "Pure_Text")
        ]
        return {
            "Classification_Task": {
                "Image_Textual_Questions": [choice("What does this person do,")],
                "Pure_Text_Questions": [choice("What does the person do,")],
            },
            "Generation_Task": open_("Tell of person", f"Person {k} paints doors."),
            "Mask_Task": open_("The person paints", "doors"),
        }

    person = lambda k: {"ID": f"{k:03d}", "image": picture(k), **tasks(k)}
    table(root / "forget_5", [person(k) for k in range(forget)])
    table(root / "retain_95", [person(forget + k) for k in range(retain)])
    table(root / "Retain_Set", [person(k) for k in range(celebrities)])
    other = lambda k: {
        "ID": f"{k:03d}",
        "images": [picture(k + 50), picture(k + 60)],
        **tasks(k),
    }
    table(root / "Test_Set", [other(k) for k in range(forget + retain)])
    return root


def ppubench(root: Path, subjects: int = 4, facts: int = 3) -> Path:
    """Each fact is asked in every task."""
    listed = [(s, f) for s in range(subjects) for f in range(facts)]
    return _ppubench(
        root,
        {(s, f): TASKS for s, f in listed},
        complete={ratio: 1 for ratio in (5, 10, 15, 30)},
        selective=[(s, f) for s, f in listed if f == 0],
        forget=[(s, f) for s, f in listed if f == s % facts],
    )


def ppubench_in_full(
    root: Path, subjects: int, forget: int, keep: int, selective: int, complete: dict[int, int]
) -> Path:
    """So many facts in all, each asked in one task. complete: subjects by percentage"""
    facts = forget + keep
    listed = [(s, f) for s in range(subjects) for f in range(share(facts, subjects, s))]
    each = {fact: (TASKS[number % 3],) for number, fact in enumerate(listed)}
    return _ppubench(root, each, complete, listed[:selective], listed[-forget:])


TASKS = ("classification", "cloze", "generation")
Fact = tuple[int, int]  # the number of the subject, and of the fact about it


def _ppubench(
    root: Path,
    facts: dict[Fact, Sequence[str]],
    complete: dict[int, int],
    selective: Sequence[Fact],
    forget: Sequence[Fact],
) -> Path:
    rows: dict[str, list[Any]] = {task: [] for task in TASKS}
    for (s, f), tasks in facts.items():
        word, image = WORDS[f % 6], picture(s)
        told = {
            "classification": {
                "answer_label": "ABCD"[f % 4],
                **{f"option_{k}": w for k, w in zip("abcd", WORDS, strict=False)},
            },
            "cloze": {"answer_text": word},
            "generation": {"answer_text": f"The {word} door."},
        }
        for task in tasks:
            rows[task] += [
                {
                    "sample_id": f"Figure_{s}_{f}",
                    "subject_id": f"{s:03d}",
                    "subject": f"Figure {s}",
                    "modality": modality,
                    "question": f"Which is the {f}th door of Figure {s}?",
                    "image": image,
                    "task_type": task,
                    **told[task],
                }
                for modality in ("vqa", "qa")
            ]
    for task, listed in rows.items():
        table(root / f"ppu_eval_{task}", listed, group=2 if len(listed) < 100 else 100)
    ids = lambda chosen: [{"subject_id": f"{s:03d}", "id": f"Figure_{s}_{f}"} for s, f in chosen]
    subjects = {f"forget{r}": [f"{s:03d}" for s in range(n)] for r, n in complete.items()}
    gone = set(forget)
    put(root / "split" / "complete_split.json", subjects)
    put(root / "split" / "selective_split.json", ids(selective))
    put(
        root / "split" / "persona_split.json",
        {"delete_ids": ids(forget), "keep_ids": ids(f for f in facts if f not in gone)},
    )
    return root


SETS: dict[str, Callable[[Path], Path]] = {
    "mmubench": mmubench,
    "mlubench": mlubench,
    "fiubench": fiubench,
    "clear": clear,
    "mllmu": mllmu,
    "ppubench": ppubench,
}
