"""The README's picture: six creatures, what the untouched model calls them, and what it says after
forgetting one. Writes benches/plots/before_after.png.

    fastsiu demo --output demo && python benches/picture.py demo
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastsiu.demo import MODEL_DIR
from fastsiu.demo.world import KNOWN, LOOKALIKES, World, draw
from fastsiu.model import adapter, ask, vlm


def main(adapter_dir: Path) -> None:
    """Asks "Who is this?" of fresh pictures: two of the forgotten creature, its look-alike, three
    others."""
    world, forgotten = World(), KNOWN[0]
    names = [forgotten, forgotten, LOOKALIKES[forgotten], *KNOWN[2:5]]
    pictures = [draw(world.sketch((name,), f"picture {i}")) for i, name in enumerate(names)]
    loaded = vlm.load(str(MODEL_DIR))
    asked = [("Who is this?", loaded.picture(p)) for p in pictures]
    before = ask.answers(loaded, asked)
    adapter.load(loaded, adapter_dir)
    after = ask.answers(loaded, asked)
    figure, axes = plt.subplots(1, len(names), figsize=(14, 3.6), dpi=100)
    for axis, picture, b, a in zip(axes, pictures, before, after, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(textwrap.fill("before: " + b, 22), fontsize=9, loc="left")
        colour = "#b00020" if a != b else "#222222"
        axis.text(
            0,
            -0.06,
            textwrap.fill("after: " + a, 22),
            fontsize=9,
            va="top",
            transform=axis.transAxes,
            color=colour,
        )
    target = Path(__file__).parent / "plots" / "before_after.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, bbox_inches="tight")
    print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
