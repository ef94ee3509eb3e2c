"""From a [B, T] batch of any trainer to the loss: hidden states without logits, supervised rows,
the teacher's rows, the head.

    with no_logits(model) as kept:
        model(input_ids=..., attention_mask=...)
    rows = supervised_rows(kept["hidden"], labels, sample_ids, index)
    weight, bias = head_of(model)
    loss = fused_dmk_ce(rows.hidden, weight, rows.labels, teacher[rows.teacher], head_bias=bias)

Neither transformers nor peft is imported; a model is whatever has `get_output_embeddings()`,
wrapped or not.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike

import torch
from torch import Tensor, nn

from .model_head import output_layer
from .tensor_file import INTEGERS, read_tensors, write_tensors

FORMAT = "fastsiu-row-index"
VERSION, READABLE = "2", ("1", "2")  # 1 had no digest


class _Kept(dict[str, Tensor]):
    def __missing__(self, key: str) -> Tensor:
        raise RuntimeError(
            f"There is no {key!r}, the head was not reached: inside no_logits call the model "
            "without labels."
        )


@contextlib.contextmanager
def no_logits(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, the head is an identity that stores its input: the model runs as always and forms no
    logits.

    Yields a dict whose "hidden" is the head's last input, [B, T, D] with its graph. Call the
    wrapped model (PEFT, DDP, FSDP) as usual and without labels: a call of the inner model would
    skip the synchronisation of gradients. The head is restored however the context ends. In nested
    contexts the inner one stores the input.

    model: anything with `get_output_embeddings()`, also behind `.module`

    Raises ValueError for a model without a head and for torch's DataParallel.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "DataParallel runs copies of the head, whose inputs are lost: use one GPU a process "
            "(torchrun)."
        )
    head = output_layer(model)
    kept = _Kept()

    def keep(hidden: Tensor) -> Tensor:
        # a tensor-parallel head gets a DTensor, the same on all ranks
        kept["hidden"] = hidden.full_tensor() if hasattr(hidden, "full_tensor") else hidden
        return hidden

    # accelerate puts its own forward on the instance: restore it, do not delete it
    hooked = head.__dict__.get("forward")
    head.forward = keep
    try:
        yield kept
    finally:
        if hooked is None:
            del head.forward
        else:
            head.forward = hooked


@dataclass(frozen=True, eq=False)
class SupervisedRows:
    """The N supervised positions of a batch, in the order of its samples and, within one, of its
    tokens.

    hidden   [N, D]  the states that predict the labels, with their graph
    labels   [N]     int64, none ignored
    at               two [N] int64: sample and token position of each label
    shape            (B, T) of the batch
    teacher  [N]     int64, rows of the teacher's cache: `cache[rows.teacher]`; None without an
                     index
    """

    hidden: Tensor
    labels: Tensor
    at: tuple[Tensor, Tensor]
    shape: tuple[int, int]
    teacher: Tensor | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def pick(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]: values that a batch has for each label, such as kl_weight and
        ce_weight. Raises ValueError for another batch's shape."""
        if x.shape[:2] != self.shape:
            raise ValueError(
                f"What is picked has shape {list(x.shape)}: it must have the labels' "
                f"{list(self.shape)}."
            )
        return x[self.at]

    def split(self) -> tuple[Tensor, ...]:
        """The labels of each of the B samples, on the CPU."""
        return self.labels.cpu().split(torch.bincount(self.at[0], minlength=self.shape[0]).tolist())


class RowIndex:
    """Which rows of a TeacherCache belong to which sample: built while the teacher runs, read by
    `supervised_rows`.

    The index finds a sample's rows by its id, whatever the order, size and padding of the batches.
    It stores the supervised tokens beside the id. A sample that changed since the teacher saw it
    (another truncation, template or id) is therefore an error and never gets another token's
    teacher. In data-parallel training every rank needs all samples: shuffling moves them between
    ranks.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Tensor]] = {}  # id -> first row, labels
        self._rows = 0

    def __len__(self) -> int:
        """The number of rows: that of the cache built from the same hidden states."""
        return self._rows

    def add(self, sample_ids: Tensor | Sequence[int], rows: SupervisedRows) -> None:
        """Gives the next `len(rows)` rows of the cache to these samples.

        sample_ids: [B] integers

        Raises ValueError for an id that the index already has.
        """
        ids = _integers(sample_ids, rows.shape[0])
        twice = [i for k, i in enumerate(ids) if i in self._seen or i in ids[:k]]
        if twice:
            raise ValueError(
                f"Sample {twice[0]} came to the teacher twice: run the teacher over each sample "
                "once."
            )
        for i, labels in zip(ids, rows.split(), strict=True):
            self._seen[i] = (self._rows, labels.clone())
            self._rows += len(labels)

    def find(self, sample_ids: Tensor | Sequence[int], rows: SupervisedRows) -> Tensor:
        """The cache's rows of a batch, [N] int64. Raises ValueError for a sample that the teacher
        did not see as it is now."""
        ids, places = _integers(sample_ids, rows.shape[0]), []
        for i, labels in zip(ids, rows.split(), strict=True):
            if i not in self._seen:
                raise ValueError(
                    f"The teacher never saw sample {i}: run it over every sample, on every rank, "
                    "with the same ids."
                )
            start, seen = self._seen[i]
            if len(labels) != len(seen):
                raise ValueError(
                    f"Sample {i} has {len(labels)} supervised tokens but had {len(seen)} when "
                    "the teacher saw it: "
                    "truncate and mask it the same way, or build the cache again."
                )
            if not torch.equal(labels, seen):
                raise ValueError(
                    f"Sample {i} is not the one that the teacher saw under this id, its "
                    "supervised tokens differ: "
                    "keep ids with their samples, or build the cache again."
                )
            places.append(torch.arange(start, start + len(seen)))
        return torch.cat(places).to(rows.labels.device) if places else rows.labels.new_zeros(0)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes one safetensors file, beside the cache's."""
        labels = [x for _, x in self._seen.values()]
        tensors = {
            "ids": torch.tensor(list(self._seen), dtype=torch.int64),
            "counts": torch.tensor([len(x) for x in labels], dtype=torch.int64),
            "labels": torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64),
        }
        write_tensors(path, tensors, FORMAT, VERSION, {})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RowIndex:
        """Reads a saved index. Raises ValueError for another file or version and for a damaged
        file, FileNotFoundError where there is none."""
        named = dict(ids=INTEGERS, counts=INTEGERS, labels=INTEGERS)
        file = read_tensors(path, FORMAT, READABLE, "a row index", "RowIndex.save", named, {})
        # clone: tensors of the file's own memory would keep the file mapped
        ids, counts, labels = (file.tensors[name].clone() for name in named)
        if not _sound(ids, counts, labels):
            raise ValueError(f"{path} is damaged: build the index again.")
        index = cls()
        for i, own in zip(ids.tolist(), labels.split(counts.tolist()), strict=True):
            index._seen[i] = (index._rows, own)
            index._rows += len(own)
        return index


def _sound(ids: Tensor, counts: Tensor, labels: Tensor) -> bool:
    """Can these be an index: one count for each id, and as many labels as the counts say?"""
    if not ids.ndim == counts.ndim == labels.ndim == 1 or len(ids) != len(counts):
        return False
    if ((counts < 0) | (counts > len(labels))).any() or counts.sum() != len(labels):
        return False
    return len(ids.unique()) == len(ids)


def supervised_rows(
    hidden: Tensor,
    labels: Tensor,
    sample_ids: Tensor | Sequence[int] | None = None,
    index: RowIndex | None = None,
    *,
    ignore_index: int = -100,
) -> SupervisedRows:
    """The positions of a causal language model's batch that have a label: labels[:, t] is what
    hidden[:, t - 1] predicts.

    hidden        [B, T, D] the states that feed the head, any float dtype
    labels        [B, T] int64, unshifted, as Hugging Face's collators make them; no state predicts
                  labels[:, 0]
    sample_ids    [B] integers, and `index`, the RowIndex built with the teacher: both, or neither
    ignore_index  label of positions without supervision (prompt, padding)

    Raises ValueError where the shapes do not fit or a sample is not as the teacher saw it.
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [B, T] beside hidden [B, T, D], but are {labels.dtype} "
            f"{list(labels.shape)} beside "
            f"{list(hidden.shape)}: use no logits_to_keep and no virtual tokens, and label every "
            "image token."
        )
    if labels.device != hidden.device:
        raise ValueError(
            f"labels are on {labels.device} but hidden on {hidden.device}: move one of them."
        )
    if (sample_ids is None) != (index is None):
        raise ValueError(
            "sample_ids and index belong together: give both to find the teacher's rows, or "
            "neither."
        )
    sample, token = (labels[:, 1:] != ignore_index).nonzero(as_tuple=True)
    B, T = labels.shape
    rows = SupervisedRows(
        hidden[sample, token], labels[sample, token + 1], (sample, token + 1), (B, T)
    )
    if index is None or sample_ids is None:
        return rows
    return replace(rows, teacher=index.find(sample_ids, rows))


def _integers(sample_ids: Tensor | Sequence[int], B: int) -> list[int]:
    try:
        listed = sample_ids.tolist() if hasattr(sample_ids, "tolist") else sample_ids
        ids = [operator.index(i) for i in listed]
    except TypeError as error:
        raise ValueError(
            "sample_ids must be integers, one per sample of the batch: number the data set's "
            "samples."
        ) from error
    if len(ids) != B:
        raise ValueError(f"There are {len(ids)} sample_ids for {B} samples: give one for each.")
    return ids
