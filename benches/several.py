"""Several requests on the embedded model, one after another, all at once, or each by itself and
then added up: is everyone still forgotten at the end?

    python benches/several.py            all at once and one after another, ten concepts; prints the
                                         table, appends to benches/results/several.jsonl
    python benches/several.py --modes joint combine --requests 2 4
                                         others; --weight W adds each adapter W times, --skip N
                                         leaves out the first N concepts, --adapters DIR keeps the
                                         adapters, so that a second run need not train them again
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
from typing import Any, NamedTuple

import attacks
import forgetting

RESULTS = Path(__file__).parent / "results" / "several.jsonl"
MODES = ("joint", "sequence", "combine")
FRESH = 24  # renderings of each concept


class Sum(NamedTuple):
    """adapters: where those that are added up are kept; None: nowhere. weight: how often each is
    added"""

    adapters: Path | None = None
    weight: float = 1.0


def one_run(
    mode: str, requests: int, seed: int, skip: int, summed: Sum, **overrides: Any
) -> dict[str, Any]:
    """Forgets the first `requests` concepts of the world after those to skip; counts on fresh
    renderings of them and of all others."""
    from fastsiu.demo import MODEL_DIR
    from fastsiu.demo.world import KNOWN, LOOKALIKES, World, draw
    from fastsiu.model import adapter, vlm
    from fastsiu.session import Listener
    from fastsiu.settings import RecipeChoice
    from fastsiu.text.concept import Concept

    world, wanted = World(), KNOWN[skip : skip + requests]
    with tempfile.TemporaryDirectory() as name:
        folder, records = Path(name), []
        for number, concept in enumerate(wanted):
            draw(world.sketch((concept,), f"bench train {seed}")).save(folder / f"{number}.png")
            records.append(json.dumps({"image": f"{number}.png", "concept": concept}) + "\n")
        (folder / "requests.jsonl").write_text("".join(records), encoding="utf-8")
        listener = Listener(note=lambda text: print(f"  {text}", flush=True))
        recipe = RecipeChoice(changes={"seed": seed, **overrides})
        if mode == "combine":
            made = added_up(folder, summed, recipe, listener)
        else:
            made = trained_together(folder, mode, recipe, listener)
        loaded = vlm.load(str(MODEL_DIR))
        asked = questions(world, wanted, KNOWN, LOOKALIKES, seed)
        before = forgetting.put(loaded, [row[1:] for row in asked], draw)
        adapter.load(loaded, made.pop("adapter"))
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
        **({"skip": skip} if skip else {}),
        "seed": seed,
        "overrides": overrides,
        **made,
        "counts": counts,
        "leaks": leaks,
    }


def trained_together(folder: Path, mode: str, recipe: Any, listener: Any) -> dict[str, Any]:
    """The last adapter of a sequence, or the joint one, and what became of each request."""
    from fastsiu import several

    started = time.perf_counter()
    made = several.unlearn_several(
        folder / "requests.jsonl",
        mode=mode,
        recipe=recipe,
        output=folder / "out",
        listener=listener,
    )
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "forgotten": made.forgotten,
        "outcomes": [vars(o) for o in made.outcomes],
        "matrix": made.matrix,
        "adapter": folder / "out" / [o.output for o in made.outcomes if o.output][-1],
    }


def added_up(folder: Path, summed: Sum, recipe: Any, listener: Any) -> dict[str, Any]:
    """The sum of adapters that were trained apart, and what became of each request. The seconds are
    those of all trainings and of the sum, also where an adapter was there before."""
    from fastsiu import combine, independent
    from fastsiu.output import read_report

    file, adapters = folder / "requests.jsonl", summed.adapters or folder / "out"
    each = independent.unlearn_each(file, recipe=recipe, output=adapters, listener=listener)
    places = [adapters / o.output for o in each.outcomes if o.output]
    started = time.perf_counter()
    made = combine.combine(
        places, file, weight=summed.weight, output=folder / "sum", listener=listener
    )
    seconds = time.perf_counter() - started
    seconds += sum(sum(read_report(place)["seconds"].values()) for place in places)
    outcomes = [
        {"line": r.line, "concept": r.concept, "status": r.verdict, "alone": r.alone}
        | {"reasons": r.reasons}
        for r in made.rows
    ]
    return {
        "seconds": round(seconds, 1),
        "forgotten": made.forgotten,
        "outcomes": outcomes,
        "rank": made.rank,
        "weight": summed.weight,
        "adapter": made.output,
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
        "forgotten by the verdict",
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
                    r["mode"] + (f", {w:g} times each" if (w := r.get("weight", 1)) != 1 else ""),
                    str(r["requests"]),
                    str(sum(o["status"] == "forgotten" for o in r["outcomes"])),
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


def runs(options: argparse.Namespace) -> list[tuple[int, str, float]]:
    """(requests, mode, weight) of each run that was asked for; only a sum has weights."""
    return [
        (requests, mode, weight)
        for requests in options.requests
        for mode in options.modes
        for weight in (options.weight if mode == "combine" else [1.0])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["joint", "sequence"])
    parser.add_argument("--requests", type=int, nargs="+", default=[10])
    parser.add_argument("--weight", type=float, nargs="+", default=[1.0])
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.table:
        if not RESULTS.is_file():
            parser.error("there are no results yet: run without --table first")
        records = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
        newest = {
            (r["requests"], r["mode"], r.get("weight", 1.0), r.get("skip", 0)): r for r in records
        }
        wanted = [(*run, options.skip) for run in runs(options)]
        print(table([newest[key] for key in wanted if key in newest]))
        return
    import torch

    overrides = {}
    if options.quick:
        options.modes, options.requests, overrides = ["sequence"], [2], {"steps": 2, "dreams": 0}
    for requests, mode, weight in runs(options):
        summed = Sum(options.adapters, weight)
        made = one_run(mode, requests, options.seed, options.skip, summed, **overrides)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        stamp = {"date": date, "commit": forgetting.commit(), "torch": torch.__version__}
        if not options.quick:
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(stamp | made) + "\n")
        print(table([made]), flush=True)


if __name__ == "__main__":
    main()
