"""Real forgetting on four architectures: each is built, trained from nothing in the embedded world,
and made to forget.

    python benches/architectures.py                  train all, forget, print a table, append to
                                                     benches/results/architectures.jsonl
    python benches/architectures.py --only gemma3    some of them
    python benches/architectures.py --quick          one, with a few steps, to see that everything
                                                     runs; appends nothing
    python benches/architectures.py --table          print the table of the newest results

Two run at a time, with one thread each. Forgetting goes through `fastsiu.unlearn`, from one
picture. The questions afterwards are about fresh renderings that training never saw, the same ones
with the adapter off and on; the adapter is read back from its directory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import forgetting

RESULTS = Path(__file__).parent / "results" / "architectures.jsonl"
CONCEPTS = ("Tobrik Hale", "Mirelda Voss")  # one without a look-alike, one with
RECOGNITION = (
    "who",
    "who, held-out wording",
    "no, unseen face",
    "unseen random face, held-out wording",
    "fact, held-out wording",
)
MOST_NAMED, MOST_LOST = 0.05, 0.05  # of the name on fresh pictures; of others' names, and of facts


def one_architecture(name: str, folder: str, seed: int) -> dict[str, Any]:
    """Trains, measures, forgets and counts. Runs in a process of its own."""
    import torch

    torch.set_num_threads(1)
    from fastsiu.demo import figures, train

    directory, started = Path(folder) / name, (time.perf_counter(), time.process_time())
    with contextlib.redirect_stdout(sys.stderr):
        train.build(seed, *train.STEPS[name], train.RATE, directory, name)
    trained = since(started)
    recognition = figures.measure(directory, RECOGNITION)
    print(name, "trained in", trained, recognition, flush=True)
    started = (time.perf_counter(), time.process_time())
    runs = [forget(directory, concept, seed) for concept in CONCEPTS]
    return {
        "row": name,
        "steps": train.STEPS[name],
        "lr": train.RATE,
        "trained": trained,
        "forgotten": since(started),
        "recognition": recognition,
        "runs": runs,
        "pooled": forgetting.pooled(runs),
    }


def quick(name: str, folder: str) -> None:
    """Everything once, with next to no training: a name that is hammered in instead of learnt, and
    a few steps to forget it."""
    import torch

    torch.set_num_threads(1)
    from fastsiu.demo import train

    directory = Path(folder) / name
    train.build(0, 2, 2, train.RATE, directory, name, share=0.01)
    hammer_in(directory, CONCEPTS[0])
    told = forget(
        directory, CONCEPTS[0], 0, steps=2, dreams=1, dream_steps=2, protect=(CONCEPTS[1],)
    )
    if told["counts"]["own"]["n"] != forgetting.OWN:
        raise RuntimeError(f"Not everything was asked: {told['counts']}.")


def hammer_in(directory: Path, concept: str) -> None:
    """Trains the whole model until it gives the name to a picture, whatever else it knew."""
    import torch

    from fastsiu.demo.wording import TRAIN
    from fastsiu.demo.world import World, draw
    from fastsiu.model import vlm

    loaded = vlm.load(str(directory))
    picture = loaded.picture(draw(World().sketch((concept,), "bench train 0")))
    turns = [
        loaded.encode(question, f"This is {concept}.", picture) for question in TRAIN["who.open"]
    ]
    rows = torch.cat([i * 1000 + turn.rows for i, turn in enumerate(turns)])
    labels = torch.cat([turn.labels for turn in turns])
    loaded.base.requires_grad_(True)
    optimizer = torch.optim.AdamW(loaded.base.parameters(), lr=3e-3)
    for _ in range(40):
        hidden = loaded.hidden([turn.inputs for turn in turns], [picture.features] * len(turns))
        loss = torch.nn.functional.cross_entropy(
            hidden[rows // 1000, rows % 1000] @ loaded.head_weight.T, labels
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loaded.base.save_pretrained(directory)


def since(started: tuple[float, float]) -> dict[str, int]:
    return {
        "seconds": round(time.perf_counter() - started[0]),
        "cpu_seconds": round(time.process_time() - started[1]),
    }


def forget(directory: Path, concept: str, seed: int, **options: Any) -> dict[str, Any]:
    """One request, and what is said of fresh pictures with its adapter off and on."""
    import fastsiu
    from fastsiu.demo.world import LOOKALIKES, World, draw
    from fastsiu.model import adapter, vlm
    from fastsiu.text.concept import Concept

    world, output = World(), directory.parent / f"{directory.name} without {concept}"
    image = directory.parent / f"{directory.name} {concept}.png"
    draw(world.sketch((concept,), f"bench train {seed}")).save(image)
    started = time.perf_counter()
    result = fastsiu.unlearn(image, concept, model=directory, output=output, seed=seed, **options)
    seconds = time.perf_counter() - started
    loaded = vlm.load(str(directory))
    asked = forgetting.questions(world, concept, seed, LOOKALIKES.get(concept))
    before = forgetting.put(loaded, asked, draw)
    adapter.load(loaded, output)
    after = forgetting.put(loaded, asked, draw)
    report = result.report
    told = {
        "concept": concept,
        "seed": seed,
        "verdict": report["verdict"],
        "reasons": result.reasons,
        "notes": result.notes,
        "steps": report["training"][-1]["step"],
        "seconds": round(seconds, 1),
        "dreams": sum(d["accepted"] for d in report["dreams"]),
        "neighbours": len(report["dreams"]),
        "counts": forgetting.count(Concept(concept), asked, before, after),
    }
    print(
        directory.name, {k: v for k, v in told.items() if k != "counts"}, told["counts"], flush=True
    )
    return told


def failures(record: dict[str, Any]) -> list[str]:
    """What the main job promises and this architecture does not keep."""
    cells, out = record["pooled"], []
    for run in record["runs"]:
        if run["verdict"] != "forgotten":
            out.append(f"{run['concept']}: {run['verdict']} ({'; '.join(run['reasons'])})")
    if cells["own"]["named"] > MOST_NAMED * cells["own"]["n"]:
        out.append(f"the name is still given to {share(cells['own'], 'named')} of fresh pictures")
    for kind in ("naming others", "facts own", "facts others"):
        if lost(cells[kind]) > 100 * MOST_LOST:
            out.append(f"{kind}: {lost(cells[kind]):.1f} points lost")
    return out


def share(cell: dict[str, int], key: str) -> str:
    return f"{100 * cell[key] / cell['n']:.1f} % (n {cell['n']})"


def lost(cell: dict[str, int]) -> float:
    """Points, on the same questions."""
    return 100 * (cell["before"] - cell["after"]) / cell["n"]


def table(records: list[dict[str, Any]]) -> str:
    """Markdown; losses are in points, before minus after on the same questions."""
    from fastsiu.demo.figures import PER_NAME
    from fastsiu.demo.world import KNOWN
    from fastsiu.text.rate import wilson

    asked = PER_NAME * len(KNOWN)
    head = [
        "architecture",
        "all creatures named right",
        "concept named before",
        "verdict",
        "name still given",
        "95 %",
        "others named right before",
        "others lose",
        "facts lose",
        "steps",
        "training, CPU s",
        "a request, CPU s",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for record in records:
        cells, runs = record["pooled"], record["runs"]
        facts = forgetting.pooled(
            [{"counts": {"facts": cells[kind]}} for kind in ("facts own", "facts others")]
        )["facts"]
        low, high = wilson(cells["own"]["named"], cells["own"]["n"])
        forgotten = sum(run["verdict"] == "forgotten" for run in runs)
        lines.append(
            "| "
            + " | ".join(
                [
                    record["row"],
                    f"{100 * record['recognition']['who']:.1f} % (n {asked})",
                    share(cells["own"], "named_before"),
                    f"{forgotten} of {len(runs)} forgotten",
                    share(cells["own"], "named"),
                    f"{100 * low:.1f}-{100 * high:.1f}",
                    share(cells["naming others"], "before"),
                    f"{lost(cells['naming others']):.1f}",
                    f"{lost(facts):.1f} (n {facts['n']})",
                    ", ".join(str(run["steps"]) for run in runs),
                    str(record["trained"]["cpu_seconds"]),
                    f"{record['forgotten']['cpu_seconds'] / len(runs):.0f}",
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def newest() -> list[dict[str, Any]]:
    """The newest record of every architecture, in the order of ARCHITECTURES."""
    from fastsiu.demo.architectures import ARCHITECTURES

    found = {r["row"]: r for r in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())}
    return [found[name] for name in ARCHITECTURES if name in found]


def main() -> int:
    from fastsiu.demo.architectures import ARCHITECTURES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one architecture with a few steps; appends nothing"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the table of the newest results"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES)
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="write models and adapters to DIR and leave them there",
    )
    parser.add_argument("--dry", action="store_true", help="append nothing")
    options = parser.parse_args()
    if options.table:
        if not RESULTS.is_file():
            parser.error("there are no results yet: run without --table first")
        print(table(newest()))
        return 0
    if options.quick:
        with tempfile.TemporaryDirectory() as temporary:
            quick(options.only[0], temporary)
        return 0
    if options.keep and any((options.keep / name).exists() for name in options.only):
        parser.error(
            f"{options.keep} already holds some of these models: name another directory or empty "
            "it first"
        )
    import torch
    import transformers

    records = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(options.keep or temporary)
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            for job in [
                pool.submit(one_architecture, name, folder, options.seed) for name in options.only
            ]:
                record = job.result() | {
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "commit": forgetting.commit(),
                    "seed": options.seed,
                    "device": platform.machine(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "threads": 1,
                    "processes": options.processes,
                }
                records.append(record)
                print(
                    record["row"],
                    "; ".join(failures(record)) or "keeps what the main job promises",
                    flush=True,
                )
                if not options.dry:
                    with RESULTS.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(record) + "\n")
    print(table(records))
    return 1 if any(failures(record) for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
