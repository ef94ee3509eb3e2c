"""The app with few steps: `python app_server.py STEPS`. It prints its address.

A connection to another machine, or the look-up of a name, ends the process at once.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from fastsiu.app import server
from fastsiu.app.desk import Example

HERE = (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0")
resolve, connect = socket.getaddrinfo, socket.socket.connect


def stay(host: Any) -> None:
    if (host.decode() if isinstance(host, bytes) else host) not in HERE:
        os.write(2, f"the app would talk to {host}\n".encode())
        os._exit(77)


def resolving(host: Any, *rest: Any, **options: Any) -> Any:
    stay(host)
    return resolve(host, *rest, **options)


def connecting(own: socket.socket, address: Any) -> None:
    if isinstance(address, tuple):
        stay(address[0])
    connect(own, address)


# In the worker process as well, which runs this file under another name.
socket.getaddrinfo = resolving
socket.socket.connect = connecting  # type: ignore[method-assign]  # that is the test


def examples(place: Path) -> list[Example]:
    from fastsiu.demo.world import KNOWN, World, draw

    files = [place / "picture.png", place / "other.png"]
    for file in files:
        draw(World().sketch((KNOWN[0],), f"test app {file.name}")).save(file)
    return [Example(KNOWN[0], *files)]


if __name__ == "__main__":
    # at this rate the name stays, so that no training ends before its last step
    few = {"dreams": 1, "dream_steps": 5, "strangers": 0, "neighbours": 1, "lr": 1e-5}
    server.serve(
        port=0,
        recipe={"steps": int(sys.argv[1]), "batch_size": 8, **few},
        examples=examples,
        ready=lambda address: print(f"Open {address} in a browser.", flush=True),
    )
