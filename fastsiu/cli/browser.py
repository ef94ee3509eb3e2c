"""The verb that serves a page in the browser: app."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, out, say
from .options import Device, Memory

OFFERED = 3  # creatures of the demo model whose pictures the page offers


@app.command(name="app")
def page(
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Where the page is; 0 takes any free port.")
    ] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; this machine alone when left out.")
    ] = "127.0.0.1",
    expose: Annotated[
        bool, typer.Option("--expose", help="With --host: other machines may use it.")
    ] = False,
    device: Device = None,
    memory: Memory = None,
) -> None:
    """All of it in a browser, on this machine: look, train, compare, take the adapter away."""
    from ..app import server

    server.check(host, port, expose)
    from ..app.desk import Example
    from ..demo.world import KNOWN, World, draw

    def examples(place: Path) -> list[Example]:
        world, made = World(), []
        for number, name in enumerate(KNOWN[:OFFERED]):
            files = [place / f"{number}-{which}.png" for which in ("picture", "other")]
            for file in files:
                draw(world.sketch((name,), f"app {file.name}")).save(file)
            made.append(Example(name, *files))
        return made

    def ready(address: str) -> None:
        out.print(f"Open {address} in a browser.", soft_wrap=True)
        say.print("Ctrl+C ends the app and removes what was given to it.", soft_wrap=True)

    server.serve(
        host=host,
        port=port,
        expose=expose,
        settings={"device": device, "memory": memory},
        examples=examples,
        ready=ready,
    )
