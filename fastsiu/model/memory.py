"""What decides over memory, and what an estimate of it says; `simulation` makes the estimates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..request import SHARES
from .vlm import Budget

GB = 2**30


@dataclass(frozen=True)
class Layout:
    """What decides over memory.

    dtype:         a key of `source.DTYPES`, or "auto" where nobody has read the configuration yet
    quantize:      "nf4" or "int8" for the language model's weights; None: as `dtype`
    checkpointing: layers are computed again in the backward pass
    micro_batch:   samples in one forward of a step; None: all of `batch_size` at once, nothing is
                   computed twice
    ask_batch:     questions in one forward that trains nothing
    optimizer:     one of `source.OPTIMIZERS`
    attention:     one of `source.ATTENTION`; None: the model's own choice
    device:        as torch names it; over several devices the first
    room:          over several devices the bytes for weights on each; empty: one device
    """

    dtype: str = "bfloat16"
    quantize: str | None = None
    checkpointing: bool = False
    micro_batch: int | None = None
    ask_batch: int = 64
    optimizer: str = "adamw"
    attention: str | None = None
    device: str = "cuda"
    room: tuple[tuple[str, int], ...] = ()

    @property
    def sparing(self) -> bool:
        """Whether memory goes before time."""
        return self.checkpointing or self.micro_batch is not None

    def __str__(self) -> str:
        words = [self.quantize or self.dtype]
        if self.checkpointing:
            words.append("activation checkpointing")
        if self.micro_batch is not None:
            words.append(f"micro-batch {self.micro_batch}")
        if self.optimizer != "adamw":
            words.append(self.optimizer)
        if self.attention not in (None, "sdpa"):
            words.append(str(self.attention))
        return ", ".join(words)


def budget(settings: Layout, batch_size: int, limited: bool = False) -> Budget:
    """The settings as a run reads them. A dream is a picture with one question; a forward of dreams
    has as many as a step.

    limited: the run has a memory limit
    """
    bounded = settings.sparing or limited
    of_a_step = max(1, round(SHARES["preserve-picture"] * batch_size))
    return Budget(
        settings.micro_batch,
        settings.micro_batch or (of_a_step if bounded else None),
        settings.ask_batch,
        settings.checkpointing,
        settings.optimizer,
        bounded,
    )


DREAMS_SEEN = 8  # dreams in one forward of the vision tower, at most


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a run under `settings`.

    weights:     the frozen weights
    trained:     the adapter
    gradient:    the adapter's gradient
    optimizer:   the states of the optimiser
    activations: what a step needs beside all that: tensors for the backward pass, temporary ones,
                 and the loss's tiles
    kept:        the pictures' features and the teacher's statistics
    overhead:    of the driver and the allocator
    asking, loading, vision: what those phases need beside weights and overhead. The last one is the
                 vision tower, with a picture or with the graph of a few dreams
    """

    settings: Layout
    weights: int
    trained: int
    gradient: int
    optimizer: int
    activations: int
    kept: int
    overhead: int
    asking: int
    loading: int
    vision: int

    @property
    def training(self) -> int:
        return (
            self.weights
            + self.trained
            + self.gradient
            + self.optimizer
            + self.activations
            + self.kept
            + self.overhead
        )

    @property
    def peak(self) -> int:
        learned = self.trained + self.gradient + self.optimizer + self.kept
        return max(
            self.training,
            self.weights + self.overhead + max(learned + self.asking, self.loading, self.vision),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"training": self.training, "peak": self.peak}
