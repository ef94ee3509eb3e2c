"""The manifest: how an output came about, and whether its files are still as written.

The manifest tells a stranger nothing about the pictures: each is a commitment under the output's
own random key, and so is the digest of the request. Whoever holds the key file *and* the same
picture can confirm it; without the key file nobody can, so leave it out when the rest is published.
No name is in it: masks are counts, and pictures of a directory are numbered.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.metadata
import json
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from . import __version__
from .guards import small_file
from .guards.first_read import once
from .guards.strict_json import read_json
from .images import commitment, list_images, read_bytes
from .request import BadInput, Recipe, Request

MANIFEST, REPORT, KEY = "manifest.json", "report.json", "private.key"
ORIGINS = ("default", "model width", "model directory", "preset paper", "command line")
PACKAGES = (
    "fastsiu",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "tokenizers",
    "pillow",
    "numpy",
)
SEAL = "sha256"  # of the manifest itself, without this entry
# Suffixes of files that a loader may read. Such a file in an output that the manifest does not list
# is no part of the result.
LOADABLE = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".ckpt",
    ".json",
    ".jinja",
    ".model",
    ".py",
    ".gguf",
)
LOADABLE_TEXTS = ("merges.txt", "vocab.txt")
TEMPLATES = "additional_chat_templates"  # the directory whose files a tokenizer reads by itself
# suffixes of the files that make a model
OF_MODEL = (
    ".safetensors",
    ".bin",
    ".pt",
    ".json",
    ".model",
    ".jinja",
    ".txt",
)
SHAPE = {
    "request": str,
    "files": {"*": {"bytes": int, "sha256": str}},
    SEAL: str,
    KEY: str,
    "revision": (str, None),
    "model": {"id": (str, None), "revision": (str, None), "sha256": {"*": str}},
    "seeds": {"recipe": int},
    "settings": dict,
    "adapter": {"sha256": {"*": str}},
    "merge": dict,
    "combined": [dict],
    "recipe": {"*": dict},
    "pictures": [{"label": str, "commitment": str}],
    "masks": dict,
    "kind": (str, [str]),
}
_FORMAT = 1
_NUMBERED = re.compile(r"((?:\d+/)?(?:images|retain))/.+", re.DOTALL)


def request_digest(
    request: Request,
    recipe: Recipe,
    model_id: str,
    revision: str | None,
    *,
    weights: Mapping[str, str] | None = None,
    **settings: Any,
) -> str:
    """SHA-256, in hex, over everything that decides the result; equal for equal requests on every
    machine.

    Files count by their content, not by path or name, and the order of names does not count. The
    digest is not for publication, because it confirms the picture to whoever has it: the manifest
    holds it under the output's key only.

    weights:  the model's files, from `digest_model`, where `model_id` is a directory: a model that
              was trained further in place is another model
    settings: further JSON values that change the result, such as quantize="nf4"

    Raises BadInput when a file or directory of the request cannot be read.
    """
    content = {
        "format": _FORMAT,
        "concept": request.concept,
        "aliases": sorted(set(request.aliases)),
        **({} if request.as_word is None else {"as_word": request.as_word}),
        **({} if request.kind is None else {"kind": request.kind}),
        "protect": sorted(set(request.protect)),
        "image": sha256(read_bytes(request.image)),
        "images": _directory_digest(request.images),
        "retain": _directory_digest(request.retain),
        "data": None if request.data is None else sha256(_read_data(request.data)),
        "recipe": recipe.as_dict(),
        "model": model_id,
        "revision": revision,
        "weights": None if weights is None else dict(weights),
        "settings": settings,
    }
    return sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())


def manifest(
    *,
    recipe: Recipe,
    origins: Mapping[str, str] | None = None,
    model_id: str,
    revision: str | None,
    weights: Mapping[str, str],
    digest: str,
    key: bytes,
    pictures: Mapping[str, Path | bytes],
    masks: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    kinds: Sequence[str] = (),
) -> dict[str, Any]:
    """The facts that a reader needs to repeat and to check the run, without the concept's name,
    paths or the host's name.

    origins:  where each hyper-parameter that is not the default came from: one of `ORIGINS`
    weights:  file name -> SHA-256 of the model's files, from `digest_model`
    digest:   from `request_digest`
    key:      the transaction's key
    pictures: label -> file or its bytes, of every picture used; one is in memory at a time. The
              manifest holds commitments only, and in labels "images/NAME" and "retain/NAME" a
              number instead of the file's name.
    masks:    the mask counts; a list of tokens, which may spell the name, becomes its length
    settings: the same further values as given to `request_digest`
    kinds:    what each concept is, in the order of the reports; one becomes the field `kind`

    Raises ValueError for an unknown hyper-parameter or origin.
    """
    values, origins = recipe.as_dict(), dict(origins or {})
    for name, origin in origins.items():
        if name not in values or origin not in ORIGINS:
            raise ValueError(
                f"{name!r} from {origin!r}: not a hyper-parameter, or none of {', '.join(ORIGINS)}"
            )
    return {
        "format": _FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": keyed(digest, key),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
        },
        "model": {"id": model_id, "revision": revision, "sha256": dict(weights)},
        "recipe": {
            name: {"value": value, "from": origins.get(name, "default")}
            for name, value in values.items()
        },
        "seeds": {"recipe": recipe.seed},
        **({"kind": kinds[0] if len(kinds) == 1 else list(kinds)} if kinds else {}),
        "settings": dict(settings or {}),
        "pictures": [
            {"label": label, "commitment": commitment(_content(picture), key)}
            for label, picture in _numbered(pictures).items()
        ],
        "masks": {
            kind: len(value) if isinstance(value, list) else value for kind, value in masks.items()
        },
    }


def digest_model(directory: str | Path) -> dict[str, str]:
    """SHA-256 of the weight, configuration and tokenizer files directly in a model's directory,
    read as a stream.

    It takes about a second per gigabyte and does not hold the interpreter's lock, so it can run in
    a thread beside the load.

    Raises BadInput when one of them cannot be read.
    """
    try:
        files = sorted(p for p in Path(directory).iterdir() if p.is_file() and p.suffix in OF_MODEL)
        return {p.name: digest_file(p) for p in files}
    except OSError as error:
        shown = repr(str(error.filename))
        raise BadInput(
            f"The model's {shown} cannot be read ({error.strerror}): check the directory."
        ) from error


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(content: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of a manifest without its seal; of a table of several results likewise."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    return sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode())


def is_as_sealed(content: Mapping[str, Any]) -> bool:
    """False where a manifest or a table was changed after it was written. Those of earlier versions
    have no seal."""
    return SEAL not in content or content[SEAL] == seal(content)


def read(directory: Path) -> dict[str, Any]:
    """The manifest of an output. Raises BadInput where it is missing, and where this program cannot
    have written it."""
    path = directory / MANIFEST
    remedy = "give the --output directory of a run, or restore the file"
    content = read_json(path, what=str(path), remedy=remedy, shape=SHAPE)
    if not isinstance(content.get("request"), str) or not isinstance(content.get("files"), dict):
        raise BadInput(f"{path} is no manifest of FastSIU: {remedy}.")
    if stray := [name for name in content["files"] if not _inside(name)]:
        raise BadInput(f"{path} names a file outside its directory ({stray[0]!r}): {remedy}.")
    return dict(content)


def read_report(directory: Path) -> dict[str, Any]:
    """report.json of an output. Raises BadInput where it cannot be used."""
    path = directory / REPORT
    shape = {
        "verdict": (str, None),
        "reasons": [str],
        "caveats": [str],
        "rows": dict,
        "kind": str,
        "answers": [dict],
    }
    remedy = "restore it, or choose another --output"
    report = dict(read_json(path, what=str(path), remedy=remedy, shape=shape))
    if not {"verdict", "reasons"} <= set(report):
        raise BadInput(f"{path} is no report of FastSIU: {remedy}.")
    return report


def key_of(directory: Path) -> bytes:
    """The key of an output. Raises OSError or ValueError where there is none."""
    written = small_file.read_bytes(directory / KEY, 4096)
    return bytes.fromhex(written.decode("ascii").strip())


def changed(directory: Path, sealed: Mapping[str, Any]) -> dict[str, str]:
    """The files that are not as the manifest says: name -> "is missing", "is not as written" or
    "was added". It takes about a second per gigabyte.

    A file that the manifest does not list counts as added where a loader may read it (`loadable`),
    in any directory but those with a manifest of their own. The key may be missing: a published
    output has none.

    sealed: from `read`
    """
    wrong = {}
    if not is_as_sealed(sealed):
        wrong[MANIFEST] = "is not as written"
    if KEY in sealed and _is_file(directory / KEY) and digest_file(directory / KEY) != sealed[KEY]:
        wrong[KEY] = "is not as written"
    for name, entry in sealed["files"].items():
        path = directory / name
        if not _is_file(path):
            wrong[name] = "is missing"
        elif path.stat().st_size != entry.get("bytes") or digest_file(path) != entry.get("sha256"):
            wrong[name] = "is not as written"
    for path in _files_in(directory):
        name = path.relative_to(directory).as_posix()
        if name not in sealed["files"] and name not in (MANIFEST, KEY) and loadable(path.name):
            wrong[name] = "was added"
    return wrong


def _files_in(directory: Path) -> Iterator[Path]:
    """The files of an output, those in its directories too. A result of its own in one of them is
    left out; so are directories behind links."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if _is_file(path):
            yield path
        elif path.is_dir() and not path.is_symlink():
            if path.name == TEMPLATES or not _is_file(path / MANIFEST):
                yield from _files_in(path)


def loadable(name: str) -> bool:
    """Whether a loader may read a file of this name."""
    return name.lower().endswith(LOADABLE) or name in LOADABLE_TEXTS


def _is_file(path: Path) -> bool:
    """False also for a name that no file can have."""
    try:
        return path.is_file()
    except OSError:
        return False


def keyed(digest: str, key: bytes) -> str:
    """HMAC-SHA256 of a digest, in hex."""
    return hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _directory_digest(directory: Path | None) -> list[str] | None:
    if directory is None:
        return None
    return sorted(sha256(read_bytes(path)) for path in list_images(directory))


def _read_data(path: Path) -> bytes:
    try:
        return once("data", path, lambda: small_file.read_bytes(path))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"The samples {str(path)!r} cannot be read ({small_file.reason(error)}): check the "
            "path of --data."
        ) from error


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return __version__ if name == "fastsiu" else None  # a source tree that is not installed


def _content(picture: Path | bytes) -> bytes:
    return read_bytes(picture) if isinstance(picture, Path) else picture


def _numbered(pictures: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """The same pictures under labels without file names, which may name whom they show."""
    seen: Counter[str] = Counter()
    by_label = {}
    for label, data in pictures.items():
        if match := _NUMBERED.fullmatch(label):
            seen[match[1]] += 1
            label = f"{match[1]}/{seen[match[1]]:03d}"
        by_label[label] = data
    return by_label


def _inside(name: str) -> bool:
    """Whether a file's name in a manifest stays in its directory."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and "\0" not in name
        and "\\" not in name
    )
