"""The story that `fastsiu demo` tells, through the public API: draw a creature, forget it, look at
what is left."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from .. import driver
from ..disk.staging import check_new
from ..output import random_directory
from ..request import BadInput, Request
from ..settings import ModelRef, RecipeChoice, ReportOptions
from ..show.progress import Progress
from ..show.results import answers_table, summary
from . import MODEL_DIR
from .world import KNOWN, LOOKALIKES, World, draw


def tell(
    out: Console, say: Console, seed: int = 0, output: Path | None = None, run: str = ""
) -> bool:
    """Forgets the first known creature from one fresh rendering; True when the verdict says so.

    run: the file that repeats it, as `ReportOptions.run`
    """
    world = World()
    target = KNOWN[0]
    other = LOOKALIKES.get(target, KNOWN[1])
    destination = output or random_directory()
    check_new(destination, "name another --output")
    pictures = destination.with_name(destination.name + "-pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, file in ((target, "forgotten.png"), (other, "kept.png")):
        files[name] = pictures / file
        drawn = io.BytesIO()
        draw(world.sketch((name,), f"story {seed} {name}")).save(drawn, "PNG")
        # a story that was cut off has left the same
        if files[name].exists() and files[name].read_bytes() != drawn.getvalue():
            raise BadInput(f"{files[name]} exists: remove it or name another --output.")
        files[name].write_bytes(drawn.getvalue())
    out.print(
        f"The embedded model knows {len(KNOWN)} drawn creatures. It is asked to forget {target}, "
        "from one picture.",
        soft_wrap=True,
    )
    with Progress(say, hidden=False) as progress:
        result = driver.unlearn(
            Request(target, files[target]),
            model=ModelRef(MODEL_DIR),
            recipe=RecipeChoice(changes={"seed": seed}),
            output=destination,
            report=ReportOptions(run=run),
            listener=progress.listener,
        )
    summary(out, result)
    out.print(f"\nThe same questions about {other}, who was not forgotten:", soft_wrap=True)
    questions = ["Who is this?", f"Is this {target}?", f"Where was {other} born?"]
    answers_table(
        out,
        driver.interview(
            questions,
            model=ModelRef(MODEL_DIR),
            adapter_dir=destination,
            image=files[other],
            compare=True,
        ),
    )
    out.print(f"\nLook at {destination / 'report.html'}, or ask yourself:", soft_wrap=True)
    out.print(
        f'  fastsiu ask --adapter {destination} --image {files[target]} --compare "Who is this?"',
        soft_wrap=True,
    )
    return result.forgotten
