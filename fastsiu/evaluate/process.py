"""How a process of `fastsiu eval --suite --processes N` begins and ends. It imports nothing heavy, so that it can come first."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import threading


def start(packed: bytes) -> None:
    """packed: the arguments of `many.hold`, pickled, which imports torch and what belongs to it when they are unpacked."""
    end_with_parent()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as the command line does in its own process, and as early
    from . import many

    many.hold(*pickle.loads(packed))


def end_with_parent() -> None:
    """From now on this process ends when its parent does: a parent that was killed could not say so."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
