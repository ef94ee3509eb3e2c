"""How well the embedded model forgets: 8 concepts x 3 seeds, one training picture each, beside
every ablation.

    python benches/forgetting.py            run all rows, print the table, append to
                                            benches/results/forgetting.jsonl
    python benches/forgetting.py --quick    two concepts, one seed, one row; appends nothing
    python benches/forgetting.py --table    print the table of the newest results

Every question is about a fresh rendering that training never saw. Others' naming is paired: the
same questions about the same pictures, before and after. Truth comes from the world that drew the
pictures.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "forgetting.jsonl"
# The ablations are of the paper's four targets, so they run without lessons from strangers. Their
# dreams are in features, as they were when the first of these rows was measured.
FOUR_TARGETS = {
    "strangers": 0,
    "schedule": "constant",
    "steps": 80,
    "dream_in": "features",
    "dreams": 3,
}
# The recipe with the factors in the vision tower and the projector; its numbers were chosen on one
# concept, Sylphira Wend.
VISION = {
    "adapt": "vision",
    "schedule": "gone",
    "steps": 80,
    "batch_size": 24,
}
ROWS: dict[str, dict[str, Any]] = {
    "with strangers": {},
    "in front of the language model": VISION,
    "SIU": {},
    "CE only (beta 0)": {"beta": 0.0},
    "no token mask": {"token_mask": False},
    "text-only retention": {"dreams": 0},
    "no vocabulary mask": {"vocab_mask": False},
    "invented name": {"substitute": "name"},
    "real retain pictures": {"dreams": 0, "retain": True},
}
WITH_LESSONS = ("with strangers", "in front of the language model")
ROWS = {
    row: changes if row in WITH_LESSONS else FOUR_TARGETS | changes for row, changes in ROWS.items()
}
# Fresh pictures of a run: of the concept, of each other one, and more of its look-alike.
OWN, OTHERS, LOOKALIKE = 24, 2, 8


def one_run(job: tuple[str, str, int, dict[str, Any]]) -> dict[str, Any]:
    """Forgets one concept and counts. Runs in a process of its own."""
    row, concept, seed, overrides = job
    import torch

    from fastsiu import images, session, settings
    from fastsiu.demo import MODEL_DIR
    from fastsiu.demo.world import KNOWN, LOOKALIKES, World, draw
    from fastsiu.model import adapter, vlm
    from fastsiu.request import Request

    torch.set_num_threads(1)
    world, loaded = World(), vlm.load(str(MODEL_DIR))
    overrides = dict(overrides)
    with tempfile.TemporaryDirectory() as folder:
        image, retain = Path(folder) / "image.png", None
        draw(world.sketch((concept,), f"bench train {seed}")).save(image)
        if overrides.pop("retain", False):
            retain = Path(folder) / "retain"
            retain.mkdir()
            for i, name in enumerate(n for n in KNOWN if n != concept):
                draw(world.sketch((name,), f"bench retain {seed}")).save(retain / f"{i:02d}.png")
        recipe, _ = settings.choose_recipe(
            str(MODEL_DIR), settings.RecipeChoice("default", {**overrides, "seed": seed})
        )
        started = time.perf_counter()
        trained = session.forget(
            loaded, Request(concept, image, retain=retain), recipe, images.load_image(image)
        )
        seconds = time.perf_counter() - started
    asked = questions(world, concept, seed, LOOKALIKES.get(concept))
    with adapter.teacher(loaded):
        before = put(loaded, asked, draw)
    after = put(loaded, asked, draw)
    adapter.detach(loaded)
    counts = count(trained.scene.concept, asked, before, after)
    return {
        "row": row,
        "concept": concept,
        "seed": seed,
        "seconds": round(seconds, 1),
        "steps": trained.history[-1].step,
        "dreams": sum(d["accepted"] for d in trained.dreamed),
        "neighbours": len(trained.scene.neighbours),
        "counts": counts,
    }


def questions(
    world: Any, concept: str, seed: int, lookalike: str | None
) -> list[tuple[str, Any, str, str]]:
    """(kind, scene or None, question, true answer) of everything one run is asked."""
    from fastsiu.demo.wording import HELD_OUT, TRAIN
    from fastsiu.demo.world import KNOWN

    who = [
        text
        for topic in ("who.open", "who.name")
        for words in (TRAIN, HELD_OUT)
        for text in words[topic]
    ]
    asked = []

    def show(kind: str, name: str, number: int) -> None:
        scene = world.sketch((name,), f"bench fresh {seed} {name} {number}")
        asked.append((kind, scene, *world.who(scene, who[(number + seed) % len(who)])))

    for number in range(OWN):
        show("own", concept, number)
    for name in KNOWN:
        if name != concept:
            for number in range(OTHERS):
                show("lookalike" if name == lookalike else "other", name, number)
    for number in range(OTHERS, OTHERS + LOOKALIKE if lookalike else OTHERS):
        show("lookalike", lookalike, number)
    for question in world.text_questions(KNOWN, heldout=True):
        if question.kind == "fact":
            kind = "facts own" if question.concept == concept else "facts others"
            asked.append((kind, None, question.question, question.answer))
    return asked


def put(
    loaded: Any, asked: list[tuple[str, Any, str, str]], draw: Any, answers: Any = None
) -> list[str]:
    """The answers. answers: who gives them, called as `ask.answers` is; that when None"""
    from fastsiu.model import ask

    return (answers or ask.answers)(
        loaded,
        [(q, None if scene is None else loaded.picture(draw(scene))) for _, scene, q, _ in asked],
    )


def count(
    concept: Any, asked: list[Any], before: list[str], after: list[str]
) -> dict[str, dict[str, int]]:
    """For each kind: n, right before, right after, naming the concept before and after, degenerate
    answers after."""
    from fastsiu.text.answers import is_degenerate

    keys = ("n", "before", "after", "named_before", "named", "degenerate")
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(keys, 0))
    for (kind, _, _, truth), b, a in zip(asked, before, after, strict=True):
        for key in (kind, "naming others") if kind in ("other", "lookalike") else (kind,):
            cell = counts[key]
            cell["n"] += 1
            cell["before"] += b == truth
            cell["after"] += a == truth
            cell["named_before"] += concept.named_in(b)
            cell["named"] += concept.named_in(a)
            cell["degenerate"] += is_degenerate(a) is not None
    return dict(counts)


def pooled(runs: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for run in runs:
        for kind, cell in run["counts"].items():
            for key, value in cell.items():
                total[kind][key] += value
    return {kind: dict(cell) for kind, cell in total.items()}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown; drops are in points, before minus after on the same questions."""
    from fastsiu.text.rate import wilson

    head = [
        "row",
        "name still given",
        "95 %",
        "others' naming falls by",
        "look-alikes",
        "facts of the concept",
        "facts of others",
        "broken answers",
        "steps",
        "s a run",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for record in records:
        cells = record["pooled"]

        def drop(kind: str, cells: dict[str, dict[str, int]] = cells) -> str:
            if kind not in cells:
                return "-"
            cell = cells[kind]
            return f"{100 * (cell['before'] - cell['after']) / cell['n']:.1f} (n {cell['n']})"

        own = cells["own"]
        low, high = wilson(own["named"], own["n"])
        broken = sum(
            cells[k]["degenerate"] for k in ("own", "naming others", "facts own", "facts others")
        )
        lines.append(
            "| "
            + " | ".join(
                [
                    record["row"],
                    f"{100 * own['named'] / own['n']:.1f} % (n {own['n']})",
                    f"{100 * low:.1f}-{100 * high:.1f}",
                    drop("naming others"),
                    drop("lookalike"),
                    drop("facts own"),
                    drop("facts others"),
                    str(broken),
                    f"{record['steps']:.0f}",
                    f"{record['seconds']:.0f}",
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def newest() -> list[dict[str, Any]]:
    """The newest record of every row, in the order of ROWS."""
    found = {r["row"]: r for r in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())}
    return [found[row] for row in ROWS if row in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="two concepts, one seed, one row; appends nothing"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the table of the newest results"
    )
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="append nothing")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help="override fields of the recipe (for tuning)",
    )
    options = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    if options.table:
        if not RESULTS.is_file():
            parser.error("there are no results yet: run without --table first")
        print(table(newest()))
        return
    if options.quick:
        options.rows, options.concepts, options.seeds, options.dry = list(ROWS)[:1], 2, 1, True
    extra = {k: json.loads(v) for k, v in (item.split("=", 1) for item in options.set)}

    import torch
    import transformers

    from fastsiu.demo.world import KNOWN

    concepts = KNOWN[:: max(1, len(KNOWN) // options.concepts)][: options.concepts]
    records = []
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for row in options.rows:
            jobs = [
                (row, c, s, {**ROWS[row], **extra}) for c in concepts for s in range(options.seeds)
            ]
            runs = list(pool.map(one_run, jobs))
            record = {
                "row": row,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": commit(),
                "device": platform.machine(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "concepts": len(concepts),
                "seeds": options.seeds,
                "overrides": {**ROWS[row], **extra},
                "steps": sum(r["steps"] for r in runs) / len(runs),
                "seconds": sum(r["seconds"] for r in runs) / len(runs),
                "pooled": pooled(runs),
                "runs": [
                    {
                        k: r[k]
                        for k in ("concept", "seed", "steps", "seconds", "dreams", "neighbours")
                    }
                    for r in runs
                ],
            }
            for run in runs:
                told = {
                    k: (v["before"], v["after"], v["named"], v["n"])
                    for k, v in run["counts"].items()
                }
                print(
                    {k: run[k] for k in ("concept", "seed", "steps", "seconds", "dreams")} | told,
                    flush=True,
                )
            if not options.dry:
                with RESULTS.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(record) + "\n")
            records.append(record)
            print(table([record]), flush=True)
    print(table(records))


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
