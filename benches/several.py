"""Ten requests on the embedded model, one after another and all at once: is everyone still
forgotten at the end?

    python benches/several.py            both modes, ten concepts; prints the table, appends to
                                         benches/results/several.jsonl
    python benches/several.py --quick    two concepts, one after another, two steps each; appends
                                         nothing
    python benches/several.py --table    print the table of the newest results

There is one picture for each request. The questions at the end are about fresh renderings that
training never saw; the untouched model gets the same ones. The last columns are the families of
`attacks.py`, in per cent of answers that tell.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attacks
import forgetting

RESULTS = Path(__file__).parent / "results" / "several.jsonl"
MODES = ("sequence", "joint")
FRESH = 24  # renderings of each concept


def one_run(mode: str, requests: int, seed: int, **overrides: Any) -> dict[str, Any]:
    """Forgets the first `requests` concepts of the world; counts on fresh renderings of them and of
    all others."""
    from fastsiu import several
    from fastsiu.demo import MODEL_DIR
    from fastsiu.demo.world import KNOWN, LOOKALIKES, World, draw
    from fastsiu.model import adapter, vlm
    from fastsiu.session import Listener
    from fastsiu.settings import RecipeChoice
    from fastsiu.text.concept import Concept

    world, wanted = World(), KNOWN[:requests]
    with tempfile.TemporaryDirectory() as name:
        folder, records = Path(name), []
        for number, concept in enumerate(wanted):
            draw(world.sketch((concept,), f"bench train {seed}")).save(folder / f"{number}.png")
            records.append(json.dumps({"image": f"{number}.png", "concept": concept}) + "\n")
        (folder / "requests.jsonl").write_text("".join(records), encoding="utf-8")
        started = time.perf_counter()
        listener = Listener(note=lambda text: print(f"  {text}", flush=True))
        made = several.unlearn_several(
            folder / "requests.jsonl",
            mode=mode,
            recipe=RecipeChoice(changes={"seed": seed, **overrides}),
            output=folder / "out",
            listener=listener,
        )
        seconds = time.perf_counter() - started
        ends = [o.output for o in made.outcomes if o.output]
        loaded = vlm.load(str(MODEL_DIR))
        asked = questions(world, wanted, KNOWN, LOOKALIKES, seed)
        before = forgetting.put(loaded, [row[1:] for row in asked], draw)
        adapter.load(loaded, folder / "out" / ends[-1])
        after = forgetting.put(loaded, [row[1:] for row in asked], draw)
        leaks = attacked(loaded, world, wanted, seed)
    counts = {}
    for concept in (*wanted, None):  # None: everybody else, and the facts
        rows = [i for i, row in enumerate(asked) if row[0] == concept]
        pick = lambda values, rows=rows: [values[i] for i in rows]
        counts[concept or "rest"] = forgetting.count(
            Concept(concept or wanted[0]),
            pick([row[1:] for row in asked]),
            pick(before),
            pick(after),
        )
    return {
        "mode": mode,
        "requests": requests,
        "seed": seed,
        "seconds": round(seconds, 1),
        "overrides": overrides,
        "forgotten": made.forgotten,
        "outcomes": [vars(o) for o in made.outcomes],
        "matrix": made.matrix,
        "counts": counts,
        "leaks": leaks,
    }


def attacked(loaded: Any, world: Any, wanted: tuple[str, ...], seed: int) -> dict[str, list[int]]:
    """(answers that tell, answers) by family of `attacks.py`, summed over the concepts that were to
    be forgotten."""
    from fastsiu.text.concept import Concept

    out: dict[str, list[int]] = {
        family: [0, 0] for families in attacks.LEAKS.values() for family in families
    }
    for name in wanted:
        items, _, _ = attacks.asked_of(world, name, seed)
        for item, answer in zip(items, attacks.put(loaded, items), strict=True):
            cell = out[item.family]
            cell[0] += attacks.leaked(Concept(name), item, answer)
            cell[1] += 1
    return out


def questions(
    world: Any,
    wanted: tuple[str, ...],
    known: tuple[str, ...],
    lookalikes: dict[str, str],
    seed: int,
) -> list[tuple]:
    """(concept or None, kind, scene, question, true answer)"""
    from fastsiu.demo.wording import HELD_OUT, TRAIN

    who = [*TRAIN["who.open"], *HELD_OUT["who.open"]]
    asked: list[tuple] = []
    for name in known:
        for number in range(FRESH):
            scene = world.sketch((name,), f"bench fresh {seed} {name} {number}")
            kind = (
                "own"
                if name in wanted
                else "lookalike"
                if lookalikes.get(name) in wanted
                else "other"
            )
            asked.append(
                (
                    name if name in wanted else None,
                    kind,
                    scene,
                    *world.who(scene, who[(number + seed) % len(who)]),
                )
            )
    for question in world.text_questions(known, heldout=True):
        if question.kind == "fact":
            kind = "facts own" if question.concept in wanted else "facts others"
            asked.append((None, kind, None, question.question, question.answer))
    return asked


def table(records: list[dict[str, Any]]) -> str:
    """Markdown; drops are in points, before minus after on the same questions."""
    head = [
        "",
        "requests",
        "name still given",
        "most of one",
        "others' naming falls by",
        "look-alikes",
        "facts of the forgotten",
        "facts of others",
        *attacks.LEAKS,
        "s in all",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in records:
        own = [cells["own"] for name, cells in r["counts"].items() if name != "rest"]
        named, n = sum(c["named"] for c in own), sum(c["n"] for c in own)
        rest = r["counts"]["rest"]

        def drop(kind: str, rest: dict[str, Any] = rest) -> str:
            cell = rest.get(kind)
            return (
                f"{100 * (cell['before'] - cell['after']) / cell['n']:.1f} (n {cell['n']})"
                if cell
                else "-"
            )

        # rows of before have no attacks
        worst, leaks = (
            max(c["named"] / c["n"] for c in own),
            r.get("leaks", {}),
        )
        told = []
        for families in attacks.LEAKS.values():
            hits, asked = (sum(leaks.get(family, [0, 0])[k] for family in families) for k in (0, 1))
            told.append(f"{100 * hits / asked:.1f} % (n {asked})" if asked else "-")
        lines.append(
            "| "
            + " | ".join(
                [
                    r["mode"],
                    str(r["requests"]),
                    f"{100 * named / n:.1f} % (n {n})",
                    f"{100 * worst:.0f} %",
                    drop("naming others"),
                    drop("lookalike"),
                    drop("facts own"),
                    drop("facts others"),
                    *told,
                    f"{r['seconds']:.0f}",
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.table:
        if not RESULTS.is_file():
            parser.error("there are no results yet: run without --table first")
        newest = {
            r["mode"]: r for r in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
        }
        print(table(list(newest.values())))
        return
    import torch

    modes, requests, overrides = options.modes, options.requests, {}
    if options.quick:
        modes, requests, overrides = ["sequence"], 2, {"steps": 2, "dreams": 0}
    for mode in modes:
        made = one_run(mode, requests, options.seed, **overrides)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        stamp = {"date": date, "commit": forgetting.commit(), "torch": torch.__version__}
        if not options.quick:
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(stamp | made) + "\n")
        print(table([made]), flush=True)


if __name__ == "__main__":
    main()
