"""What the attacks that look inside the model get back from the embedded model, unlearned from one
picture.

    python benches/deep.py                        one concept, all attacks; prints the table
    python benches/deep.py --concepts 4           four concepts, one after the other, of those that
                                                  no setting was tuned on
    python benches/deep.py --append               appends to benches/results/deep.jsonl as well
    python benches/deep.py --set relearn=6        with other fields of the recipe
    python benches/deep.py --table                the steps of relearning, of the newest row of each
                                                  concept, seed and recipe
    python benches/deep.py --which relearn mia    some of the attacks
    python benches/deep.py --one-picture          with what a user has: one picture, no picture of
                                                  strangers or of anyone else

Every picture that an attack is tested on is a fresh rendering. Strangers are creatures that no
training saw.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attacks
from forgetting import commit

RESULTS = Path(__file__).parent / "results" / "deep.jsonl"
OWN = 4  # fresh pictures of the concept


def one_run(
    concept: str, seed: int, which: tuple[str, ...], one_picture: bool, changes: dict[str, Any]
) -> list[dict[str, Any]]:
    """Forgets one concept and attacks what is left. changes: fields of the recipe"""
    import torch

    from fastsiu import images, session, settings
    from fastsiu.demo import MODEL_DIR
    from fastsiu.demo.world import KNOWN, UNSEEN, World, draw
    from fastsiu.evaluate import deep
    from fastsiu.model import adapter, vlm
    from fastsiu.request import Request
    from fastsiu.text.concept import Concept

    torch.set_num_threads(1)
    world, loaded = World(), vlm.load(str(MODEL_DIR))
    recipe, _ = settings.choose_recipe(
        str(MODEL_DIR), settings.RecipeChoice("default", {**changes, "seed": seed})
    )
    fresh = lambda name, k: draw(world.sketch((name,), f"bench fresh {seed} {name} {k}"))
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        draw(world.sketch((concept,), f"bench train {seed}")).save(image)
        picture = images.load_image(image)
        trained = session.forget(loaded, Request(concept, image), recipe, picture)
    others = [name for name in KNOWN if name != concept]
    target = deep.Target(Concept(concept), [picture], others=trained.scene.neighbours, seed=seed)
    if not one_picture:
        target = deep.Target(
            Concept(concept),
            [picture, *(fresh(concept, k) for k in range(OWN))],
            [fresh(name, 0) for name in UNSEEN],
            others,
            [(name, fresh(name, 0)) for name in others],
            [fresh(UNSEEN[0], k) for k in range(1, OWN)],
            seed,
        )
    rows = deep.run(loaded, target, which, lr=recipe.lr)
    adapter.detach(loaded)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each attack and setting, a column for each side."""
    said: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        value = row["value"]
        text = (
            row.get("reason", "-")
            if value is None
            else f"{value:.2f}"
            if isinstance(value, float)
            else str(value)
        )
        if row["low"] is not None:
            text += f" [{row['low']:.2f}-{row['high']:.2f}]"
        said.setdefault((row["attack"], row["setting"]), {})[row["side"]] = (
            f"{text} (n {row['n']})" if row["n"] else text
        )
    lines = ["| attack | setting | untouched | unlearned | control |", "|" + "---|" * 5]
    sides = ("untouched", "unlearned", "control")
    lines += [
        f"| {a} | {s} | " + " | ".join(found.get(k, "") for k in sides) + " |"
        for (a, s), found in said.items()
    ]
    return "\n".join(lines)


def steps_table(records: list[dict[str, Any]]) -> str:
    """Markdown: for each concept after how many steps of training the name is back in half of the
    answers."""
    newest = {}
    for one in records:
        changed = [f"{field} {value}" for field, value in one.get("changes", {}).items()]
        newest[", ".join([one["concept"], str(one["seed"]), *changed])] = one["rows"]
    controls = ("unseen face, same name", "unseen face, unseen name")
    who = {"the concept": ""} | {control: f": {control}" for control in controls}
    settings = [
        row["setting"] for rows in newest.values() for row in rows if row["attack"] == "relearn"
    ]
    counts = sorted(
        {setting.partition(",")[0] for setting in settings if re.match(r"\d+ pictures?,", setting)}
    )
    heads = [f"{kind}, {count}" for count in counts for kind in who]
    heads = ["concept, seed, recipe", *heads]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for run, rows in newest.items():
        cells = []
        for count in counts:
            for ending in who.values():
                fit = [
                    r
                    for r in rows
                    if r["attack"] == "relearn"
                    and r["setting"].startswith(f"{count}, ")
                    and r["setting"].endswith(f"steps to 50%{ending}")
                ]
                cells.append(
                    "-"
                    if not fit
                    else "not in 20"
                    if fit[0]["value"] is None
                    else str(fit[0]["value"])
                )
        lines.append(f"| {run} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    from fastsiu.demo.world import KNOWN
    from fastsiu.evaluate import deep

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--which", nargs="*", choices=list(deep.ATTACKS), default=list(deep.ATTACKS)
    )
    parser.add_argument(
        "--one-picture",
        action="store_true",
        help="one picture and no names but those the model proposes",
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipe"
    )
    parser.add_argument(
        "--append", action="store_true", help="append the rows to benches/results/deep.jsonl"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the steps of relearning in the results"
    )
    options = parser.parse_args()
    if options.table:
        print(
            steps_table(
                [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
            )
        )
        return
    changes = {k: json.loads(v) for k, v in (item.split("=", 1) for item in options.set)}
    free = [name for name in KNOWN if name not in attacks.TUNED]
    for concept in free[:: max(1, len(free) // options.concepts)][: options.concepts]:
        started = time.perf_counter()
        which = tuple(options.which)
        rows = one_run(concept, options.seed, which, options.one_picture, changes)
        print(
            f"\n{concept}, seed {options.seed}, {time.perf_counter() - started:.0f} "
            f"s\n\n{table(rows)}",
            flush=True,
        )
        if options.append:
            record = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": commit(),
                "concept": concept,
                "seed": options.seed,
                "one_picture": options.one_picture,
                "changes": changes,
                "rows": rows,
            }
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
