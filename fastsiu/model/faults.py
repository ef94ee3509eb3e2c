"""Whose fault an error is: the files of a model, the release of transformers, or memory that is not
there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from ..request import BadInput

FAULTS = (
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    NameError,
    AssertionError,
    ImportError,
    ArithmeticError,
    RuntimeError,
)


def first_line(error: BaseException) -> str:
    """What an error says in its first line, without the full stop; its type where it says
    nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was missing: a GPU's allocator has an exception of its own, a CPU's raises a
    plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    )


def of_the_device(error: BaseException) -> bool:
    """Whether the device failed, and not what it was given to compute."""
    return out_of_memory(error) or isinstance(error, torch.AcceleratorError)


@contextlib.contextmanager
def told_as_the_models_fault(model: Any, pictured: str) -> Iterator[None]:
    """Raises an error of a model's own forward as BadInput: one release of transformers can break
    one model, and so can one wrong number in a model's files. Errors of the device pass.

    pictured: "with a" or "without a": whether the question had a picture
    """
    try:
        yield
    except BadInput:
        raise
    except FAULTS as error:
        if of_the_device(error):
            raise
        version = transformers.__version__
        minor = ".".join(version.split(".")[:2])
        raise BadInput(
            f"{type(model).__name__} fails in transformers {version} on a question {pictured} "
            f"picture ({type(error).__name__}: {first_line(error)}): restore the model's files, "
            f"try an earlier release, pip install 'transformers<{minor}', or give another model."
        ) from error
