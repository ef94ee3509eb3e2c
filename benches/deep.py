"""What the attacks that look inside the model get back from the embedded model, unlearned from one picture.

    python benches/deep.py                        one concept, all attacks, the table on the screen
    python benches/deep.py --concepts 4           four concepts, one after the other
    python benches/deep.py --which relearn mia    some of the attacks
    python benches/deep.py --one-picture          what a user has: one picture, no stranger's, nobody else's

Every picture that an attack is tested on is a fresh rendering; strangers are creatures that no training saw.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

OWN = 4  # fresh pictures of the concept


def one_run(concept: str, seed: int, which: tuple[str, ...], one_picture: bool) -> list[dict[str, Any]]:
    """Forgets one concept and attacks what is left."""
    import torch

    from fastsiu import adapter, driver, images, session, vlm
    from fastsiu.concept import Concept
    from fastsiu.demo import MODEL_DIR
    from fastsiu.demo.world import KNOWN, UNSEEN, World, draw
    from fastsiu.evaluate import deep
    from fastsiu.request import Request

    torch.set_num_threads(1)
    world, loaded = World(), vlm.load(str(MODEL_DIR))
    recipe, _ = driver.choose_recipe(str(MODEL_DIR), "default", {"seed": seed})
    fresh = lambda name, k: draw(world.scene((name,), f"bench fresh {seed} {name} {k}"))
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        draw(world.scene((concept,), f"bench train {seed}")).save(image)
        picture = images.load_image(image)
        trained = session.forget(loaded, Request(concept, image), recipe, picture)
    others = [name for name in KNOWN if name != concept]
    target = deep.Target(Concept(concept), [picture], others=trained.scene.neighbours, seed=seed)
    if not one_picture:
        target = deep.Target(
            Concept(concept), [picture, *(fresh(concept, k) for k in range(OWN))], [fresh(name, 0) for name in UNSEEN], others,
            [(name, fresh(name, 0)) for name in others], [fresh(UNSEEN[0], k) for k in range(1, OWN)], seed,
        )  # fmt: skip
    rows = deep.run(loaded, target, which, lr=recipe.lr)
    adapter.detach(loaded)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each attack and setting, a column for each side."""
    said: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        value = row["value"]
        text = row.get("reason", "-") if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
        if row["low"] is not None:
            text += f" [{row['low']:.2f}-{row['high']:.2f}]"
        said.setdefault((row["attack"], row["setting"]), {})[row["side"]] = f"{text} (n {row['n']})" if row["n"] else text
    lines = ["| attack | setting | untouched | unlearned | control |", "|" + "---|" * 5]
    sides = ("untouched", "unlearned", "control")
    lines += [f"| {a} | {s} | " + " | ".join(found.get(k, "") for k in sides) + " |" for (a, s), found in said.items()]
    return "\n".join(lines)


def main() -> None:
    from fastsiu.demo.world import KNOWN
    from fastsiu.evaluate import deep

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--which", nargs="*", choices=list(deep.ATTACKS), default=list(deep.ATTACKS))
    parser.add_argument("--one-picture", action="store_true", help="one picture and no names but those the model proposes")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    options = parser.parse_args()
    every = {}
    for concept in KNOWN[:: max(1, len(KNOWN) // options.concepts)][: options.concepts]:
        started = time.perf_counter()
        every[concept] = one_run(concept, options.seed, tuple(options.which), options.one_picture)
        print(f"\n{concept}, seed {options.seed}, {time.perf_counter() - started:.0f} s\n\n{table(every[concept])}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
