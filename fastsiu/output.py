"""The output directory as one transaction: complete or absent, whatever happens.

It holds the caller's files (the adapter), README.md (the model card), report.json, report.md,
report.html, `private.key` and, written last, manifest.json, which says how it came about
(`manifest`).
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from PIL.Image import Image

from .disk import staging
from .guards.terminal import json_safe, visible
from .images import list_images
from .manifest import (
    KEY,
    MANIFEST,
    ORIGINS,
    PACKAGES,
    REPORT,
    SEAL,
    changed,
    digest_file,
    digest_model,
    key_of,
    keyed,
    manifest,
    read,
    read_report,
    request_digest,
    seal,
)
from .report import card
from .report.redact import redacted
from .report.render import render_html, render_markdown
from .request import BadInput, NumericFailure, Request

__all__ = [
    "KEY",
    "MANIFEST",
    "ORIGINS",
    "OTHER",
    "PACKAGES",
    "REPORT",
    "ROOM",
    "Transaction",
    "check_destination",
    "check_shown",
    "digest_file",
    "digest_model",
    "holds",
    "key_of",
    "manifest",
    "random_directory",
    "read_report",
    "request_digest",
    "reserved",
    "write_card",
    "write_reports",
]
OTHER = staging.OTHER
ROOM = 32 * 2**20  # bytes: an output takes at least so many, adapter and reports
RUN = "run.toml"  # repeats the run: `fastsiu --config`
PRIVATE = ("report.*", "untouched.json", RUN)  # files with names and answers, for their owner alone


def random_directory(base: str | Path = ".") -> Path:
    """A free path `base/fastsiu-<random hex>`; never the concept's name. Nothing is created."""
    while True:
        path = Path(base) / f"fastsiu-{secrets.token_hex(6)}"
        if not os.path.lexists(path):
            return path


def check_destination(
    output: str | Path, digest: str, *, size: int = ROOM
) -> Literal["same", "free"]:
    """Returns "same" where `output` is a complete result of this request, byte for byte, and "free"
    where it can be written. Removes what killed runs left in its directory.

    digest: from `request_digest`
    size:   bytes that the output will take, about

    Raises BadInput where anything else exists at `output`, where a byte of the result was changed,
    where nothing can be made there, and for a disk that is full.
    """
    output = _absolute(output)
    shown = repr(str(output))
    staging.sweep(output.parent)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(output)
            if not is_empty(output):
                return _existing(output, digest)
        parent = output.parent
        if not parent.is_dir():
            raise BadInput(
                f"The directory {str(parent)!r} for the output does not exist: create it, or "
                f"{OTHER}."
            )
    except OSError as error:
        raise BadInput(f"The output {shown} cannot be used ({error.strerror}): {OTHER}.") from error
    staging.check_writable(output, OTHER)
    staging.check_space(parent, size)
    return "free"


@contextlib.contextmanager
def reserved(
    output: str | Path, digest: str, *, size: int = ROOM
) -> Iterator[Literal["same", "free"]]:
    """As `check_destination`, and for the length of the block no other run has `output`.

    Raises BadInput also where another run has it: whoever comes second learns it before the work,
    not at its end.
    """
    found = check_destination(output, digest, size=size)
    if found == "same":
        yield found
        return
    output = _absolute(output)
    with staging.alone(output.parent, output.name, output, OTHER):
        # that run may have ended between the two looks
        yield check_destination(output, digest, size=size)


def is_empty(directory: Path) -> bool:
    """A directory, no link, with nothing in it but what a killed run left there."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    return all(staging.is_ours(entry.name) for entry in directory.iterdir())


class Transaction:
    """Writes an output directory in one step.

        transaction = Transaction(output)
        with transaction as staging:              # a hidden directory beside `output`
            ...                                   # write into staging
            transaction.commit(manifest(..., key=transaction.key))

    `commit` must be called inside the block. A block that ends without it, or by an exception,
    removes the staging directory and creates nothing; a full disk becomes BadInput. A killed
    process leaves at most its staging directory, which the next run in the same place removes.

    output: the destination, absent or an empty directory; it is for its owner alone (0700)
    key:    32 random bytes of this output, stored in its private.key
    """

    def __init__(self, output: str | Path) -> None:
        self.output = _absolute(output)
        self.key = secrets.token_bytes(32)
        self.committed = False
        self._hidden = staging.Staging(self.output.parent)
        self._staging: Path | None = None

    def __enter__(self) -> Path:
        """Raises BadInput when the parent directory cannot be written."""
        try:
            self._staging = self._hidden.__enter__()
            staging.write(self._staging / KEY, self.key.hex().encode() + b"\n")
        except OSError as error:
            self.__exit__(None, None, None)
            where = str(self.output.parent)
            raise BadInput(
                f"The directory {where!r} cannot be written ({error.strerror}): {OTHER}."
            ) from error
        return self._staging

    def commit(self, manifest: Mapping[str, Any]) -> Path:
        """Complete the output: every file to disk, the manifest last, then one rename. Returns the
        output's path.

        The manifest is stored with the size and SHA-256 of every other file but the key, and of
        itself.

        Raises BadInput when something has appeared at the destination meanwhile, and NumericFailure
        for NaN or infinity in the manifest. Raises OSError when the disk is full or fails, and
        RuntimeError outside the block or the second time.
        """
        place = self._staging
        if place is None or self.committed:
            raise RuntimeError("commit() belongs inside the transaction's with block, once")
        listed = {
            p.relative_to(place).as_posix(): p for p in sorted(place.rglob("*")) if p.is_file()
        }
        files = {
            name: {"bytes": p.stat().st_size, "sha256": digest_file(p)}
            for name, p in listed.items()
            if name != KEY
        }
        content = {**manifest, "files": files}
        if KEY in listed:  # its digest tells nothing of 32 random bytes
            content[KEY] = digest_file(listed[KEY])
        _json(content, MANIFEST)  # before anything is sealed that cannot be written
        text = _json({**content, SEAL: seal(content)}, MANIFEST)
        for path in listed.values():
            if any(path.match(pattern) for pattern in PRIVATE):
                path.chmod(0o600)
            staging.sync(path)
        for directory in sorted((p for p in place.rglob("*") if p.is_dir()), reverse=True):
            staging.sync(directory)
        staging.write(place / MANIFEST, text, mode=0o666)
        staging.sync(place)
        try:
            if self.output.is_dir() and not self.output.is_symlink():
                staging.sweep(self.output)
                if os.name == "nt":  # a POSIX rename replaces an empty directory, Windows refuses
                    self.output.rmdir()
            os.rename(place, self.output)
        except OSError as error:
            if os.path.lexists(self.output):
                shown = repr(str(self.output))
                raise BadInput(
                    f"Something appeared at {shown} during the run: run again with another "
                    "--output."
                ) from error
            raise
        self.committed = True
        staging.sync(self.output.parent)
        return self.output

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._staging = None
        self._hidden.__exit__(kind, error, trace)
        if not isinstance(error, Exception):
            return
        where = str(self.output.parent)
        if staging.disk_full(error):
            raise BadInput(
                f"The disk of {where!r} is full, and nothing was written: free some, or {OTHER}."
            ) from error
        if failure := staging.disk_failure(error):
            raise BadInput(
                f"The disk of {where!r} cannot be used ({failure}), and nothing was written: "
                f"{OTHER}."
            ) from error


def write_reports(
    folder: Path, report: Mapping[str, Any], *, redact: bool = False, picture: Image | None = None
) -> None:
    """Write report.json, report.md and report.html, for their owner alone.

    redact:  names, questions, answers and file names stay out of all three
    picture: the training picture, for report.html alone; without it no report shows a picture

    Raises NumericFailure where the report contains NaN or infinity, BadInput for `redact` together
    with a picture.
    """
    check_shown(redact, picture is not None)
    report = redacted(report) if redact else report
    staging.write(folder / REPORT, _json(report, REPORT))
    # Half a surrogate pair, as broken tokenizers produce, has no UTF-8 form. Markdown is read in
    # terminals as well, so a character that a terminal would obey is written as its escape.
    staging.write(folder / "report.md", visible(render_markdown(report)).encode("utf-8", "replace"))
    staging.write(
        folder / "report.html", visible(render_html(report, picture)).encode("utf-8", "replace")
    )


def write_card(
    folder: Path,
    reports: Sequence[Mapping[str, Any]],
    base: card.Base,
    *,
    merged: bool = False,
    redact: bool = False,
) -> None:
    """Write README.md, the model card. It is for everybody where it names nobody, else for its
    owner alone, as the reports are.

    reports: of each concept, as they are before anything is left out
    """
    shown = [redacted(report) if redact else report for report in reports]
    text = visible(card.render_card(shown, base, merged=merged)).encode("utf-8", "replace")
    staging.write(folder / card.NAME, text, mode=0o666 if redact else 0o600)


def pictures_of(request: Request, redact: bool) -> dict[str, Path]:
    """By its label in the manifest, the file of each picture of a request.

    redact: a label has a number instead of the file's name
    """
    found = {"image": request.image}
    for kind, directory in (("images", request.images), ("retain", request.retain)):
        files = enumerate(list_images(directory) if directory else [], 1)
        found |= {f"{kind}/{f'{n:03d}' if redact else p.name}": p for n, p in files}
    return found


def write_run(folder: Path, run: str, *, named: bool = True) -> None:
    """Writes run.toml, for its owner alone; nothing where its text is empty.

    named: whether it may name the model
    """
    if run:
        staging.write(folder / RUN, (run if named else without_model(run)).encode("utf-8"))


def without_model(run: str) -> str:
    """The text of run.toml without the model, whose name may tell the concept's."""
    lines = run.splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("model = ")]
    if len(kept) == len(lines):
        return run
    return "# Left out, since its name may tell the concept's: model.\n" + "".join(kept)


def check_shown(redact: bool, embed_image: bool) -> None:
    """Raises BadInput where a report shall name nobody and show somebody."""
    if redact and embed_image:
        raise BadInput(
            "--redact and --embed-image exclude each other, because a picture tells who it "
            "shows: leave one out."
        )


def holds(output: Path, digest: str) -> bool:
    """Whether `output` is a result of this request; its files are not read again, as
    `check_destination` does. Raises BadInput where it is anything else."""
    try:
        os.lstat(output)
    except FileNotFoundError:
        return False
    _sealed(output, digest)
    return True


def _existing(output: Path, digest: str) -> Literal["same"]:
    shown = repr(str(output))
    for name, what in changed(output, _sealed(output, digest)).items():
        raise BadInput(f"The output {shown} was changed ({name!r} {what}): {OTHER}.")
    return "same"


def _sealed(output: Path, digest: str) -> dict[str, Any]:
    """The manifest of what exists at `output`. Raises BadInput unless it is of this request."""
    shown = repr(str(output))
    if not output.is_dir():
        raise BadInput(f"The output {shown} exists and is not a directory: {OTHER}.")
    try:
        sealed = read(output)
    except BadInput:
        raise BadInput(
            f"The output {shown} exists and is not a result of FastSIU: {OTHER}."
        ) from None
    try:
        key = key_of(output)
    except (OSError, ValueError):
        raise BadInput(
            f"The output {shown} exists and its {KEY} is gone, so its request is unknown: {OTHER}."
        ) from None
    if not hmac.compare_digest(
        sealed["request"].encode("utf-8", "replace"), keyed(digest, key).encode()
    ):
        raise BadInput(f"The output {shown} holds the result of another request: {OTHER}.")
    return sealed


def _absolute(output: str | Path) -> Path:
    if "\0" in str(output) or not str(output):
        raise BadInput(
            "The output's path is empty or contains a NUL character: choose another --output."
        )
    return Path(os.path.abspath(output))


def _json(value: Mapping[str, Any], name: str) -> bytes:
    try:
        text = json.dumps(value, allow_nan=False, sort_keys=True, ensure_ascii=False, indent=2)
    except ValueError as error:
        raise NumericFailure(f"{name} would contain NaN or infinity: {error}") from error
    return json_safe(text).encode("utf-8") + b"\n"
