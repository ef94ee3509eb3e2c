"""Tensors in one safetensors file with a digest of everything in it, read as a stranger's file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from os import PathLike

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# names of dtypes, as safetensors writes them
FLOATS = ("F16", "BF16", "F32", "F64")
WIDE, INTEGERS = ("F32", "F64"), ("I64",)


@dataclass(frozen=True)
class TensorFile:
    """What a file held.

    version   of the format, one of those that the caller can read
    metadata  without the digest
    tensors   on the CPU, in the file's own memory
    """

    version: str
    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def write_tensors(
    path: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    form: str,
    version: str,
    metadata: Mapping[str, str],
) -> None:
    """Writes tensors and metadata to one safetensors file, with a digest of both."""
    # clone: slices share storage
    contents = {k: x.detach().cpu().contiguous().clone() for k, x in tensors.items()}
    described = {**metadata, "format": form, "version": version}
    save_file(contents, path, metadata=described | {"digest": _digest(contents, described)})


def read_tensors(
    path: str | PathLike[str],
    form: str,
    versions: Collection[str],
    what: str,
    writer: str,
    needed: Mapping[str, Collection[str]],
    optional: Mapping[str, Collection[str]],
) -> TensorFile:
    """Reads what `write_tensors` wrote; files of older versions have no digest.

    form, versions    the format's name, and the versions that can be read; the largest is today's
    what, writer      for the sentences: "a teacher cache", "TeacherCache.save"
    needed, optional  names of tensors, each with the dtypes that it may have

    Raises FileNotFoundError where there is no file, and ValueError, one sentence, for anything
    else.
    """
    name, thing = os.fsdecode(path), what.split()[-1]
    if not os.path.exists(name):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    if not os.path.isfile(name):
        raise ValueError(f"{path} is no file: give one written by {writer}.")
    unreadable = ValueError(
        f"{path} is not a readable safetensors file, or damaged: build the {thing} again."
    )
    damaged = ValueError(f"{path} is damaged: build the {thing} again.")
    try:
        with safe_open(name, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            pieces = {k: file.get_slice(k) for k in file.keys()}
            dtypes = {k: x.get_dtype() for k, x in pieces.items()}
            shapes = [x.get_shape() for x in pieces.values()]
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable from error
    if metadata.get("format") != form:
        raise ValueError(f"{path} is not {what}: give a file written by {writer}.")
    version = metadata.get("version", "")
    if version not in versions:
        named = version if version.isdecimal() and len(version) < 9 else "that is unknown here"
        raise ValueError(
            f"{path} has {thing} version {named}, this is {max(versions)}: build the {thing} again."
        )
    known = {**needed, **optional}
    if not set(needed) <= set(dtypes) <= set(known):
        raise damaged
    if any(dtype not in known[k] for k, dtype in dtypes.items()):
        raise damaged
    # Trap: torch refuses the shape [0, 2^63].
    if any(len(shape) > 2 or max(shape, default=0) > 2**40 for shape in shapes):
        raise damaged
    try:
        with safe_open(name, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in dtypes}
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable from error
    digest = metadata.pop("digest", None)
    older = digest is None and version != max(versions)
    if not older and digest != _digest(tensors, metadata):
        raise damaged
    return TensorFile(version, metadata, tensors)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, and of the metadata."""
    kinds = {k: [str(x.dtype), list(x.shape)] for k, x in tensors.items()}
    digest = hashlib.sha256(json.dumps([kinds, dict(metadata)], sort_keys=True).encode())
    for _, x in sorted(tensors.items()):
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
