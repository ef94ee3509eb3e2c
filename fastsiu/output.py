"""The output directory as one transaction: complete or absent, whatever happens.

What is in it: the caller's files (the adapter), report.json, report.md, report.html, `private.key` and, written last,
manifest.json. The manifest tells a stranger nothing about the pictures: each is a commitment under the output's own
random key, and so is the digest of the request. Whoever holds the key file *and* the same picture can confirm it;
without the key file nobody can, so leave it out when the rest is published.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from PIL.Image import Image

from . import __version__
from .images import commitment, list_images, read_bytes
from .report.redact import redacted
from .report.render import render_html, render_markdown
from .request import BadInput, NumericFailure, Recipe, Request

try:
    import fcntl
except ImportError:  # Windows: stale staging directories are left to the user there
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
KEY = "private.key"
ORIGINS = ("default", "model directory", "preset paper", "command line")
PACKAGES = ("fastsiu", "torch", "transformers", "peft", "safetensors", "tokenizers", "pillow", "numpy")
_FORMAT = 1


def random_directory(base: str | Path = ".") -> Path:
    """A free path `base/fastsiu-<random hex>`; never the concept's name. Nothing is created."""
    while True:
        path = Path(base) / f"fastsiu-{secrets.token_hex(6)}"
        if not os.path.lexists(path):
            return path


def request_digest(request: Request, recipe: Recipe, model_id: str, revision: str | None, *,
                   weights: Mapping[str, str] | None = None, **settings: Any) -> str:  # fmt: skip
    """SHA-256, in hex, over everything that decides the result; equal for equal requests on every machine.

    Files count by their content, not by path or name, and the order of names does not count. `weights` are the model's
    files, from `digest_model`, where `model_id` is a directory: what is trained further in place is another model.
    `settings` are further JSON values that change the result, such as quantize="nf4". The digest is not for publication,
    because it confirms the picture to whoever has it: the manifest holds it under the output's key only.

    Raises BadInput when a file or directory of the request cannot be read.
    """
    content = {
        "format": _FORMAT,
        "concept": request.concept,
        "aliases": sorted(set(request.aliases)),
        "protect": sorted(set(request.protect)),
        "image": _sha256(read_bytes(request.image)),
        "images": _directory_digest(request.images),
        "retain": _directory_digest(request.retain),
        "data": None if request.data is None else _sha256(_read_data(request.data)),
        "recipe": recipe.as_dict(),
        "model": model_id,
        "revision": revision,
        "weights": None if weights is None else dict(weights),
        "settings": settings,
    }
    return _sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())


def check_destination(output: str | Path, digest: str) -> Literal["same", "free"]:
    """Returns "same": `output` is a complete result of this request, nothing to do. "free": it can be written.

    Raises BadInput for anything else that exists there, and for a parent that is missing or cannot be written.
    """
    output = _absolute(output)
    shown = repr(str(output))
    try:
        if os.path.lexists(output) and not (output.is_dir() and not output.is_symlink() and not any(output.iterdir())):
            return _existing(output, digest)
        parent = output.parent
        if not parent.is_dir():
            raise BadInput(f"The directory {str(parent)!r} for the output does not exist: create it, or choose another --output.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise BadInput(f"The directory {str(parent)!r} cannot be written: choose another --output.")
    except OSError as error:
        raise BadInput(f"The output {shown} cannot be used ({error.strerror}): choose another --output.") from error
    return "free"


class Transaction:
    """Writes an output directory in one step.

        transaction = Transaction(output)
        with transaction as staging:              # a hidden sibling of `output`
            ...                                   # write into staging
            transaction.commit(manifest(..., key=transaction.key))

    `commit` must be called inside the block; leaving without it, or by an exception, removes the staging directory and
    creates nothing. A killed process leaves at most its staging directory, which the next transaction for the same
    output removes.

    output: the destination, absent or an empty directory
    key:    32 random bytes of this output, stored in its private.key
    """

    def __init__(self, output: str | Path) -> None:
        self.output = _absolute(output)
        self.key = secrets.token_bytes(32)
        self.committed = False
        self._staging: Path | None = None
        self._lock: int | None = None

    def __enter__(self) -> Path:
        """Raises BadInput when the parent directory cannot be written."""
        try:
            self._remove_stale()
            while self._staging is None:
                self._staging = self._create()
            _write(self._staging / KEY, self.key.hex().encode() + b"\n", mode=0o600)
        except OSError as error:
            self._discard()
            where = str(self.output.parent)
            raise BadInput(f"The directory {where!r} cannot be written ({error.strerror}): choose another --output.") from error
        return self._staging

    def commit(self, manifest: Mapping[str, Any]) -> Path:
        """Complete the output: every file to disk, the manifest last, then one rename. Returns the output's path.

        The manifest is stored with the size and SHA-256 of every other file but the key.

        Raises BadInput when something has appeared at the destination meanwhile, NumericFailure for NaN or infinity in
        the manifest, OSError when the disk is full or fails, RuntimeError outside the block or the second time.
        """
        staging = self._staging
        if staging is None or self.committed:
            raise RuntimeError("commit() belongs inside the transaction's with block, once")
        listed = {p.relative_to(staging).as_posix(): p for p in sorted(staging.rglob("*")) if p.is_file()}
        files = {name: {"bytes": p.stat().st_size, "sha256": digest_file(p)} for name, p in listed.items() if name != KEY}
        text = _json({**manifest, "files": files}, MANIFEST)
        for path in listed.values():
            _sync(path)
        for directory in sorted((p for p in staging.rglob("*") if p.is_dir()), reverse=True):
            _sync(directory)
        _write(staging / MANIFEST, text)
        _sync(staging)
        try:
            if os.name == "nt" and self.output.is_dir():  # a POSIX rename replaces an empty directory, Windows refuses
                self.output.rmdir()
            os.rename(staging, self.output)
        except OSError as error:
            if os.path.lexists(self.output):
                shown = repr(str(self.output))
                raise BadInput(f"Something appeared at {shown} during the run: run again with another --output.") from error
            raise
        self.committed = True
        _sync(self.output.parent)
        return self.output

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._discard()

    def _create(self) -> Path | None:
        path = self.output.parent / f".{self.output.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
        path.mkdir()
        if fcntl is None:
            return path
        # The lock, not the process id alone, says that a staging directory is alive: in containers every run may have
        # the same id, and two containers do not see each other's.
        self._lock = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems lock no directories
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        os.close(self._lock)  # another run's clean-up came between mkdir and the lock
        self._lock = None
        return None

    def _remove_stale(self) -> None:
        if fcntl is None:
            return
        pattern = re.compile(re.escape(f".{self.output.name}.partial-") + r"(\d+)-[0-9a-f]+")
        for entry in self.output.parent.iterdir():
            match = pattern.fullmatch(entry.name)
            if match and entry.is_dir() and not entry.is_symlink() and not _may_be_alive(int(match[1])):
                _remove_unless_locked(entry)

    def _discard(self) -> None:
        if self._staging is not None and not self.committed:
            shutil.rmtree(self._staging, ignore_errors=True)
        self._staging = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def write_reports(staging: Path, report: Mapping[str, Any], *, redact: bool = False, picture: Image | None = None) -> None:
    """Write report.json, report.md and report.html.

    redact:  names, questions, answers and file names stay out of all three
    picture: the picture that was trained on, for report.html alone; without it no picture is in any of them

    Raises NumericFailure when the report contains NaN or infinity, BadInput where both are asked for.
    """
    check_shown(redact, picture is not None)
    report = redacted(report) if redact else report
    _write(staging / "report.json", _json(report, "report.json"))
    # Half a surrogate pair, as broken tokenizers produce, has no UTF-8 form.
    _write(staging / "report.md", render_markdown(report).encode("utf-8", "replace"))
    _write(staging / "report.html", render_html(report, picture).encode("utf-8", "replace"))


def check_shown(redact: bool, embed_image: bool) -> None:
    """Raises BadInput where a report is to name nobody and to show somebody."""
    if redact and embed_image:
        raise BadInput("--redact and --embed-image exclude each other, because a picture tells who it shows: leave one out.")


def manifest(
    *,
    recipe: Recipe,
    origins: Mapping[str, str] | None = None,
    model_id: str,
    revision: str | None,
    weights: Mapping[str, str],
    digest: str,
    key: bytes,
    pictures: Mapping[str, bytes],
    masks: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a reader needs to repeat and to check the run; without the concept's name, paths or the host's name.

    origins:  for each hyper-parameter that is not simply the default, where it came from: one of `ORIGINS`
    weights:  file name -> SHA-256 of the model's files, from `digest_model`
    digest:   from `request_digest`
    key:      the transaction's key
    pictures: label -> the bytes of every picture used; only commitments are kept
    masks:    the mask counts
    settings: the same further values as given to `request_digest`

    Raises ValueError for an unknown hyper-parameter or origin.
    """
    values, origins = recipe.as_dict(), dict(origins or {})
    for name, origin in origins.items():
        if name not in values or origin not in ORIGINS:
            raise ValueError(f"{name!r} from {origin!r}: not a hyper-parameter, or none of {', '.join(ORIGINS)}")
    return {
        "format": _FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": _keyed(digest, key),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "model": {"id": model_id, "revision": revision, "sha256": dict(weights)},
        "recipe": {name: {"value": value, "from": origins.get(name, "default")} for name, value in values.items()},
        "seeds": {"recipe": recipe.seed},
        "settings": dict(settings or {}),
        "pictures": [{"label": label, "commitment": commitment(data, key)} for label, data in pictures.items()],
        "masks": dict(masks),
    }


def digest_model(directory: str | Path) -> dict[str, str]:
    """SHA-256 of the weight, configuration and tokenizer files directly in a model's directory, read as a stream.

    Takes about a second per gigabyte and holds no lock on the interpreter, so it can run in a thread beside the load.

    Raises BadInput when one of them cannot be read.
    """
    wanted = {".safetensors", ".bin", ".pt", ".json", ".model", ".jinja", ".txt"}
    try:
        files = sorted(p for p in Path(directory).iterdir() if p.is_file() and p.suffix in wanted)
        return {p.name: digest_file(p) for p in files}
    except OSError as error:
        shown = repr(str(error.filename))
        raise BadInput(f"The model's {shown} cannot be read ({error.strerror}): check the directory.") from error


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing(output: Path, digest: str) -> Literal["same"]:
    shown = repr(str(output))
    if not output.is_dir():
        raise BadInput(f"The output {shown} exists and is not a directory: choose another --output.")
    try:
        stored = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        request, files = stored["request"], stored["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"The output {shown} exists and is not a result of FastSIU: choose another --output.") from None
    try:
        key = bytes.fromhex((output / KEY).read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        raise BadInput(
            f"The output {shown} exists and its {KEY} is gone, so its request is unknown: choose another --output."
        ) from None
    if not isinstance(request, str) or not hmac.compare_digest(request.encode(), _keyed(digest, key).encode()):
        raise BadInput(f"The output {shown} holds the result of another request: choose another --output.")
    for name, entry in files.items():
        path = output / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise BadInput(f"The output {shown} was changed ({name!r} is not as written): choose another --output.")
    return "same"


def _absolute(output: str | Path) -> Path:
    if "\0" in str(output) or not str(output):
        raise BadInput("The output's path is empty or contains a NUL character: choose another --output.")
    return Path(os.path.abspath(output))


def _keyed(digest: str, key: bytes) -> str:
    return hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _directory_digest(directory: Path | None) -> list[str] | None:
    return None if directory is None else sorted(_sha256(read_bytes(p)) for p in list_images(directory))


def _read_data(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"The samples {str(path)!r} cannot be read ({error.strerror}): check the path of --data.") from error


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return __version__ if name == "fastsiu" else None  # a source tree that is not installed


def _json(value: Mapping[str, Any], name: str) -> bytes:
    try:
        text = json.dumps(value, allow_nan=False, sort_keys=True, ensure_ascii=False, indent=2)
    except ValueError as error:
        raise NumericFailure(f"{name} would contain NaN or infinity: {error}") from error
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes the JSON escape \udXXX


def _write(path: Path, data: bytes, mode: int = 0o666) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    if sys.platform == "win32":  # neither directories nor read-only handles can be synced there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _may_be_alive(pid: int) -> bool:
    if pid == os.getpid():  # an earlier container's leftover, or a transaction of this process, which holds its lock
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _remove_unless_locked(path: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)
