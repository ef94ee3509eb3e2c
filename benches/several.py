"""Several requests on the embedded model, one after another, all at once, or each by itself and
then added up or switched: is everyone still forgotten at the end?

    python benches/several.py            all at once and one after another, ten concepts; prints the
                                         table, appends to benches/results/several.jsonl
    python benches/several.py --modes joint combine --requests 2 4
                                         others; --weight W adds each adapter W times, --skip N
                                         leaves out the first N concepts, --adapters DIR keeps the
                                         adapters, so that a second run need not train them again
    python benches/several.py --modes switched switched-refusals
                                         a router and an adapter for each request, SIU's or one that
                                         was trained on refusals (`fastsiu/compare/switched.py`)
    python benches/several.py --quick    two concepts, one after another and switched, two steps
                                         each; appends nothing
    python benches/several.py --table    print the table of the newest results

There is one picture for each request. The questions at the end are about fresh renderings that
training never saw; the untouched model gets the same ones. The last columns are the families of
`attacks.py`, in per cent of answers that tell.

Rows of switched adapters are no forgetting: who has the untouched model has what it knows. Their
verdicts are those of each of SIU's adapters by itself. What the router did stands behind the mode:
how many of the forgotten's renderings reached their own adapter, and how many others none. Their
`matrix` is as that of a sequence, after each adapter that the router learns of.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import attacks
import forgetting

RESULTS = Path(__file__).parent / "results" / "several.jsonl"
SWITCHED = ("switched", "switched-refusals")
MODES = ("joint", "sequence", "combine", *SWITCHED)
FRESH = 24  # renderings of each concept


class Sum(NamedTuple):
    """adapters: where SIU's are kept that are added up or switched; None: nowhere. weight: how
    often each is added"""

    adapters: Path | None = None
    weight: float = 1.0


def one_run(
    mode: str, requests: int, seed: int, skip: int, summed: Sum, **overrides: Any
) -> dict[str, Any]:
    """Forgets the first `requests` concepts of the world after those to skip; counts on fresh
    renderings of them and of all others."""
    from fastsiu.compare import switched
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
        elif mode == "switched":
            made = each_alone(folder, summed, recipe, listener)
        elif mode == "switched-refusals":
            made = refusing(folder, recipe, listener)
        else:
            made = trained_together(folder, mode, recipe, listener)
        loaded, answers = vlm.load(str(MODEL_DIR)), None
        asked = questions(world, wanted, KNOWN, LOOKALIKES, seed)
        before = forgetting.put(loaded, [row[1:] for row in asked], draw)
        if mode in SWITCHED:
            experts = made.pop("experts")
            answers = functools.partial(switched.answers, experts=experts)
            made["matrix"] = matrix(loaded, folder / "requests.jsonl", experts, seed)
            made["routed"] = routed(loaded, experts, asked)
        else:
            adapter.load(loaded, made.pop("adapter"))
        after = forgetting.put(loaded, [row[1:] for row in asked], draw, answers)
        leaks = attacked(loaded, world, wanted, seed, answers)
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


def each_alone(folder: Path, summed: Sum, recipe: Any, listener: Any) -> dict[str, Any]:
    """SIU's adapters, each trained by itself, and each one's own verdict. The seconds are those of
    all trainings, also where an adapter was there before."""
    from fastsiu import independent
    from fastsiu.compare.switched import Expert
    from fastsiu.output import read_report
    from fastsiu.text.concept import Concept

    file, adapters = folder / "requests.jsonl", summed.adapters or folder / "out"
    each = independent.unlearn_each(file, recipe=recipe, output=adapters, listener=listener)
    done = [outcome for outcome in each.outcomes if outcome.output]
    return {
        "seconds": round(
            sum(sum(read_report(adapters / o.output)["seconds"].values()) for o in done), 1
        ),
        "forgotten": each.forgotten,
        "outcomes": [vars(outcome) for outcome in each.outcomes],
        "experts": [Expert(Concept(o.concept), adapters / o.output) for o in done],
    }


def refusing(folder: Path, recipe: Any, listener: Any) -> dict[str, Any]:
    """Adapters that were trained on refusals as LUMoE's are, each by itself: `po` at its best
    setting of benches/compare.py. Nobody gives a verdict on them."""
    from fastsiu.compare import methods
    from fastsiu.compare.switched import Expert
    from fastsiu.demo import MODEL_DIR
    from fastsiu.disk.request_file import read_requests
    from fastsiu.images import load_image
    from fastsiu.model import adapter, vlm
    from fastsiu.settings import choose_recipe
    from fastsiu.text.concept import concept_of

    chosen, _ = choose_recipe(str(MODEL_DIR), recipe)
    chosen = chosen.with_overrides(warmup=0.0, strangers=0, relearn=0, anchor=0)  # as compare's
    lr, best = attacks.settings()["po"]
    steps = min(best, chosen.steps)
    loaded, experts, outcomes = vlm.load(str(MODEL_DIR)), [], []
    started = time.perf_counter()
    for line, request in read_requests(folder / "requests.jsonl"):
        listener.note(f"Refusals, request {line}: {request.concept}")
        place = folder / "out" / f"{line:03d}"
        material = methods.prepare(loaded, request, chosen, load_image(request.image))
        made = methods.build(loaded, "po", material)

        def keep(step: int, place: Path = place) -> bool:
            if step == steps:
                adapter.save(loaded, place)
            return step == steps

        methods.fit(loaded, "po", made, material, lr, steps, keep)
        experts.append(Expert(concept_of(request), place))
        outcomes.append({"line": line, "concept": request.concept, "status": "no verdict"})
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "forgotten": None,
        "outcomes": outcomes,
        "setting": {"lr": lr, "steps": steps},
        "experts": experts,
    }


def matrix(loaded: Any, file: Path, experts: list[Any], seed: int) -> list[dict[str, Any]]:
    """As `several.Several.matrix`: who is still named after each adapter that the router learns
    of."""
    from fastsiu import several
    from fastsiu.compare import switched
    from fastsiu.disk.request_file import read_requests
    from fastsiu.samples.kinds import DEFAULT

    asked = {
        str(line): (request.concept, several.held_out(loaded, request.image, seed, DEFAULT))
        for line, request in read_requests(file)
    }
    lines = {concept: line for line, (concept, _) in asked.items()}
    rows = []
    for count in range(1, len(experts) + 1):
        known = experts[:count]
        row: dict[str, Any] = {"after": [int(lines[one.concept.name]) for one in known]}
        row["named"] = {}
        for one in known:
            line = lines[one.concept.name]
            said = switched.answers(loaded, asked[line][1], experts=known)
            row["named"][line] = sum(map(one.concept.named_in, said)) / len(said)
        rows.append(row)
    return rows


def routed(loaded: Any, experts: list[Any], asked: list[tuple]) -> dict[str, list[int]]:
    """(right, of how many) pictures: "own", of the forgotten that reached their own adapter;
    "others", that reached none."""
    from fastsiu.compare import switched
    from fastsiu.demo.world import draw

    rows = [row for row in asked if row[2] is not None]
    concepts = [one.concept for one in experts]
    chosen = switched.route(loaded, concepts, [loaded.picture(draw(row[2])) for row in rows])
    out = {"own": [0, 0], "others": [0, 0]}
    for row, place in zip(rows, chosen, strict=True):
        cell = out["others" if row[0] is None else "own"]
        cell[0] += row[0] == (None if place is None else concepts[place].name)
        cell[1] += 1
    return out


def attacked(
    loaded: Any, world: Any, wanted: tuple[str, ...], seed: int, answers: Any = None
) -> dict[str, list[int]]:
    """(answers that tell, answers) by family of `attacks.py`, summed over the concepts that were to
    be forgotten. answers: who gives them, as in `attacks.put`"""
    from fastsiu.text.concept import Concept

    out: dict[str, list[int]] = {
        family: [0, 0] for families in attacks.LEAKS.values() for family in families
    }
    for name in wanted:
        items, _, _ = attacks.asked_of(world, name, seed)
        for item, answer in zip(items, attacks.put(loaded, items, answers), strict=True):
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
                    label(r),
                    str(r["requests"]),
                    verdicts(r),
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


def label(record: dict[str, Any]) -> str:
    """The mode, how often each adapter of a sum was added, and what a router did."""
    text = record["mode"]
    if (weight := record.get("weight", 1)) != 1:
        text += f", {weight:g} times each"
    if "routed" in record:
        own, others = (
            f"{100 * right / n:.1f} %" if n else "-" for right, n in record["routed"].values()
        )
        text += f", own adapter for {own}, none for {others} of others"
    return text


def verdicts(record: dict[str, Any]) -> str:
    """How many are forgotten by a verdict; "-" where none was given."""
    given = [o["status"] for o in record["outcomes"] if o["status"] != "no verdict"]
    return str(given.count("forgotten")) if given else "-"


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
        options.modes, options.requests = ["sequence", *SWITCHED], [2]
        overrides = {"steps": 2, "dreams": 0}
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
