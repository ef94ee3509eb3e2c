"""How a worker process begins and ends. It imports nothing heavy, so that it can come first."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import threading


def start(packed: bytes) -> None:
    """Calls `first(*rest)`.

    packed: the pickled tuple (first, *rest); to unpack it imports the module of `first`
    """
    end_with_parent()
    # The command line does this in its own process, and as early.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    first, *rest = pickle.loads(packed)
    first(*rest)


def end_with_parent() -> None:
    """From now on this process ends when its parent ends. A parent that is killed cannot tell it
    to."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
