"""The app with few steps: `python app_server.py STEPS`. It prints its address."""

from __future__ import annotations

import sys
from pathlib import Path

from fastsiu.app import server
from fastsiu.app.desk import Example


def examples(place: Path) -> list[Example]:
    from fastsiu.demo.world import KNOWN, World, draw

    files = [place / "picture.png", place / "other.png"]
    for file in files:
        draw(World().sketch((KNOWN[0],), f"test app {file.name}")).save(file)
    return [Example(KNOWN[0], *files)]


if __name__ == "__main__":
    few = {"dreams": 1, "dream_steps": 5, "strangers": 0, "neighbours": 1, "lr": 3e-3}
    server.serve(
        port=0,
        recipe={"steps": int(sys.argv[1]), "batch_size": 8, **few},
        examples=examples,
        ready=lambda address: print(f"Open {address} in a browser.", flush=True),
    )
