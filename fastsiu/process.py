"""How a worker process begins and ends. It imports nothing heavy, so that it can come first."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import threading


def start(packed: bytes) -> None:
    """Calls `first(*rest)`. packed: the tuple (first, *rest), pickled; unpacking it imports the
    module of `first`."""
    end_with_parent()
    # as the command line does in its own process, and as early
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    first, *rest = pickle.loads(packed)
    first(*rest)


def end_with_parent() -> None:
    """From now on this process ends when its parent does: a parent that was killed could not say
    so."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
