"""Files of TeacherCache and RowIndex: what is loaded is what was saved, or a ValueError of one
sentence is raised."""

from __future__ import annotations

import json
import struct
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastsiu import RowIndex, TeacherCache, fused_dmk_ce, supervised_rows
from fastsiu.loss import teacher_file as files

torch.set_num_threads(1)

ALLOWED = (ValueError,)
V, D, N = 37, 5, 3
FOLDER = tempfile.TemporaryDirectory(prefix="fastsiu-fuzz-")
PATH = Path(FOLDER.name) / "file"

_normal = lambda *shape, seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
HEAD = _normal(V, D, seed=1)


@cache
def caches() -> list[TeacherCache]:
    keep, hidden = torch.arange(V) % 4 > 0, _normal(N, D, seed=0)
    full = dict(vocab_keep=keep, head_bias=_normal(V, seed=2), logit_softcap=9.5, temperature=2.0)
    made = [
        TeacherCache.from_hidden(hidden, HEAD, **options)
        for options in ({}, full, dict(vocab_keep=keep, renormalize=True))
    ]
    return [*made, made[0][:0]]


@cache
def index() -> RowIndex:
    labels, made = torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, 5]]), RowIndex()
    made.add([7, -3], supervised_rows(torch.zeros(2, 4, D), labels))
    return made


@cache
def seeds(name: str) -> list[bytes]:
    """Also as the version before, which has no digest: there the checks of the content are
    reached."""
    found = []
    for one in caches() if name == "teacher" else [index()]:
        one.save(PATH)
        found.append(PATH.read_bytes())
        metadata, tensors = files_of(found[-1])
        older = {"teacher": "2", "index": "1"}[name]
        metadata = {k: x for k, x in metadata.items() if k in ("format", "head", "options")} | {
            "version": older
        }
        save_file(tensors, PATH, metadata=metadata)
        found.append(PATH.read_bytes())
    return found


def files_of(data: bytes) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors.torch import load

    return parts(data)[0]["__metadata__"], load(data)


def parts(data: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def mutate(name: str, data: bytes, rng) -> bytes:
    """A header that is JSON and has its length before it, with one or two things changed in it; or
    other numbers."""
    try:
        header, body = parts(data)
    except (ValueError, struct.error):  # a seed of the user's own that is no such file
        return data
    body = bytearray(body)
    for _ in range(rng.choice((1, 1, 2))):
        what = rng.choice(
            ("metadata", "metadata", "option", "tensor", "tensor", "name", "body", "body")
        )
        words, tensors = (
            header.setdefault("__metadata__", {}),
            [k for k in header if k != "__metadata__"],
        )
        if what == "metadata" and words:
            words[rng.choice(list(words))] = rng.choice(
                ("", "0", "[]", "[[", "{}", "[" * 9999, "9" * 5000, "NaN", "2", "\u2028")
            )
        elif what == "option" and "options" in words:
            try:
                options = json.loads(words["options"])
                options[rng.choice(list(options))] = rng.choice(
                    (None, True, 0, -1, 1e-320, 1e308, 10**400, "1", [], {}, float("nan"))
                )
                words["options"] = json.dumps(options)
            except (ValueError, TypeError, IndexError, RecursionError):
                words["options"] = "[]"
        elif what == "tensor" and tensors:
            entry = header[rng.choice(tensors)]
            change = rng.choice(("dtype", "shape", "data_offsets"))
            if change == "dtype":
                entry["dtype"] = rng.choice(
                    (
                        "F64",
                        "F32",
                        "F16",
                        "BF16",
                        "I64",
                        "U64",
                        "I32",
                        "U8",
                        "BOOL",
                        "F8_E4M3",
                        "C64",
                        "F4",
                    )
                )
            elif entry[change]:
                at = rng.randrange(len(entry[change]))
                entry[change][at] = rng.choice(
                    (0, 1, 2, entry[change][at] + 1, entry[change][at] * 2, 2**32, 2**63, -1)
                )
        elif what == "name" and len(tensors) > 1:
            a, b = rng.sample(tensors, 2)
            header[a], header[b] = header[b], header[a]
            if rng.random() < 0.5:
                header[rng.choice(("head_weight", "more", "m", ""))] = header.pop(a)
        elif body:
            at = rng.randrange(len(body)) // 4 * 4
            body[at : at + 4] = rng.choice(
                (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, bytes(4), rng.randbytes(4))
            )
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def said(error: ValueError) -> None:
    text = str(error)
    assert text.startswith(str(PATH)) and text.endswith(".") and text.isprintable(), text
    assert len(text) < len(str(PATH)) + 200, text


def read_cache(data: bytes) -> None:
    PATH.write_bytes(data)
    try:
        loaded = TeacherCache.load(PATH, head_weight=HEAD)
    except ValueError as error:
        said(error)
        raise
    bits = lambda x: (
        None if x is None else (x.dtype, x.shape, x.flatten().view(torch.uint8).tolist())
    )
    same = lambda a, b: bits(a) == bits(b)
    names = (*files.STATISTICS, "vocab_keep", "head_bias")
    whole = any(all(same(getattr(loaded, k), getattr(x, k)) for k in names) for x in caches())
    assert whole or parts(data)[0]["__metadata__"]["version"] == "2"
    for backend in ("reference", "tiled"):
        y = torch.zeros(len(loaded), dtype=torch.int64)
        fused_dmk_ce(loaded.hidden.clone(), HEAD, y, loaded, backend=backend)


def read_index(data: bytes) -> None:
    PATH.write_bytes(data)
    try:
        loaded = RowIndex.load(PATH)
    except ValueError as error:
        said(error)
        raise
    found = {i: (start, labels.tolist()) for i, (start, labels) in loaded._seen.items()}
    whole = found == {i: (start, labels.tolist()) for i, (start, labels) in index()._seen.items()}
    assert whole or parts(data)[0]["__metadata__"]["version"] == "1"
    assert len(loaded) == sum(len(labels) for _, labels in found.values())


TARGETS = {"teacher": read_cache, "index": read_index}
