"""Unfinished results: hidden directories and files beside the result, which a killed run does not
leave for long.

Every verb that writes does so under a name of random digits, and puts the result in place with one
rename. The name tells which program it belongs to (".fastsiu.partial-"), never what it is about. A
lock says that its run is alive. The lock of a killed process is free, and the next run in the same
place removes everything there that has no lock.

A lock counts on the machine that it was taken on: on many network file systems no other machine
sees it. So the name also tells on which machine it was made (`here`, a digest that names nobody).
What another machine has made, or this one before it was last started, goes when nothing in it was
written for a day (`LONG_AGO`), and no sooner.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType

from ..guards.small_file import open_ordinary
from ..request import BadInput

try:
    import fcntl
except ImportError:  # Windows: the user removes there what a killed run leaves
    fcntl = None  # type: ignore[assignment]  # every use first compares it with None

PREFIX, CLAIM = ".fastsiu.partial-", ".fastsiu.claim-"
JOIN = ".fastsiu.join"  # in an output that several processes share (`workers.claims`)
LONG_AGO = 86_400.0  # seconds
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
OTHER, OTHER_FILE = "choose another --output", "name another file"
# Whoever may write to a directory may put a link where this program makes its files there.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
# files of a directory that holds several results
MARKS = ("suite.json", "matrix.json", "requests.json")
_QUOTA = getattr(errno, "EDQUOT", errno.ENOSPC)  # a quota is full
_PARTIAL = re.compile(re.escape(PREFIX) + r"([0-9a-f]{8})-\d+-[0-9a-f]{8}")
_CLAIMED = re.compile(re.escape(CLAIM) + r"[0-9a-f]{16}")
# of earlier versions, which do not tell whose they are
_FORMER = re.compile(r"(\.fastsiu\.partial-|\.fastsiu-[0-9a-f]{12}\.partial-)\d+-[0-9a-f]{8}")


class Staging:
    """A hidden directory in `place`, for its owner alone (0700). It is removed at the end of the
    block.

        with Staging(place) as path:
            ...                           # write into path; rename it away to keep it

    Raises OSError where `place` cannot be written.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.path: Path | None = None
        self._lock: int | None = None

    def __enter__(self) -> Path:
        sweep(self.place)
        while self.path is None:
            self.path = self._create()
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _create(self) -> Path | None:
        path = self.place / _random_name()
        os.mkdir(path, 0o700)
        if fcntl is None:
            return path
        try:
            self._lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        _lock(self._lock, wait=True)
        if path.exists():
            return path
        os.close(self._lock)  # another run's clean-up came between mkdir and the lock
        self._lock = None
        return None


def sweep(place: Path) -> list[Path]:
    """Removes what killed runs left in `place`, and in directories there that hold several results.
    Returns the paths."""
    removed = []
    for entry in leftovers(place):
        if sweep_one(entry):
            removed.append(entry)
    return removed


def leftovers(place: Path) -> list[Path]:
    """The unfinished results in `place`, those of runs that are alive among them."""
    left = []
    for entry in _entries(place):
        if entry.is_symlink():
            continue
        if (
            _PARTIAL.fullmatch(entry.name)
            or _CLAIMED.fullmatch(entry.name)
            or _FORMER.fullmatch(entry.name)
        ):
            left.append(entry)
        elif entry.is_dir():
            own = [inner for inner in _entries(entry) if is_ours(inner.name)]
            several = entry.name == JOIN or any((entry / mark).is_file() for mark in MARKS)
            nothing_else = len(own) == len(_entries(entry))  # killed before it wrote a mark
            if own and (several or nothing_else):
                left += [inner for inner in own if not inner.is_symlink()]
            if several and not (entry / JOIN).is_symlink():
                left += [i for i in _entries(entry / JOIN) if is_ours(i.name) and i.is_file()]
    return left


def is_ours(name: str) -> bool:
    """Whether a name in a directory belongs to an unfinished run of this program."""
    return any(pattern.fullmatch(name) for pattern in (_PARTIAL, _CLAIMED, _FORMER))


def check_writable(path: Path, remedy: str) -> None:
    """Raises BadInput, which ends in `remedy`, where neither a file nor a directory can be made at
    `path`. The trial makes a directory beside it."""
    shown = repr(str(path))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)
    except OSError as error:
        raise BadInput(f"The path {shown} cannot be used ({error.strerror}): {remedy}.") from error
    place = next(parent for parent in path.parents if os.path.lexists(parent))
    try:
        with Staging(place):
            pass
    except OSError as error:
        raise BadInput(
            f"The directory {str(place)!r} cannot be written ({error.strerror}): {remedy}."
        ) from error


def check_new(path: Path, remedy: str) -> None:
    """As `check_writable`; raises BadInput also where something exists at `path`."""
    if "\0" in str(path):
        raise BadInput(f"The path {str(path)!r} contains a NUL character: {remedy}.")
    if os.path.lexists(path):
        raise BadInput(f"{path} exists: remove it or {remedy}.")
    check_writable(Path(os.path.abspath(path)), remedy)


def check_space(path: Path, size: int) -> None:
    """Raises BadInput where the disk has not `size` bytes left for what will lie at `path`."""
    place = next((p for p in (path, *path.parents) if p.is_dir()), None)
    free = size if place is None else shutil.disk_usage(place).free
    if free < size:
        raise BadInput(
            f"The disk of {str(place)!r} has {free / 2**20:.0f} MiB left, and the result takes "
            f"about {size / 2**20:.0f} MiB: free some, or choose another --output."
        )


@contextlib.contextmanager
def claim(place: Path, key: str, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone works on `key` in the directory `place`, as long as the block
    lasts. A process that dies gives the claim back at once.

    wait: wait until this process has the claim; otherwise False where another process has it

    Raises BadInput where the claim's file cannot be used: it is another user's, or no file of ours.
    """
    if fcntl is None:
        yield True
        return
    path = place / (CLAIM + hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:16])
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o600)
        except OSError as error:
            raise BadInput(
                f"The file {str(path)!r}, which keeps other runs out, cannot be used "
                f"({error.strerror}): wait for the end of another user's run, or {OTHER}."
            ) from error
        try:
            mine = _lock(handle, wait=wait)
            same = mine and path.exists() and os.path.samestat(os.fstat(handle), path.stat())
        except FileNotFoundError:
            same = False
        except BaseException:
            os.close(handle)
            raise
        if mine and not same:  # the process that had the claim removed the file meanwhile
            os.close(handle)
            continue
        break
    try:
        if mine:
            os.pwrite(handle, here().encode(), 0)
        yield mine
    finally:
        if mine:
            path.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def alone(place: Path, key: str, path: Path, remedy: str) -> Iterator[None]:
    """`claim`, where it is an error that another process has it: whoever comes second to write to
    `path` learns it before the work, not at its end. Raises BadInput, which ends in `remedy`."""
    with claim(place, key) as mine:
        if not mine:
            raise BadInput(
                f"Another run is writing to {str(path)!r}: wait for its end, or {remedy}."
            )
        yield


def replace_file(path: Path, data: bytes) -> None:
    """Gives the file at `path` new content, for its owner alone (0600). A reader sees the old
    content or the new. Raises OSError."""
    with _aside(path.parent, data) as aside:
        os.replace(aside, path)
    sync(path.parent)


def new_file(path: Path, data: bytes) -> None:
    """Makes a file, for its owner alone (0600), complete or not at all. Raises FileExistsError
    where something is there, and OSError."""
    with _aside(path.parent, data) as aside:
        try:
            os.link(aside, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            if os.path.lexists(path):  # a file system without links
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
            os.replace(aside, path)
    sync(path.parent)


def disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk or a quota is full."""
    return _code(error) in (errno.ENOSPC, _QUOTA) or "No space left on device" in str(error)


def disk_failure(error: BaseException) -> str | None:
    """What an error says that a disk does not do, though it is not full: it takes no file so large,
    is read-only now, or fails. None for any other error."""
    code = _code(error)
    failed = code in (errno.EFBIG, errno.EROFS, errno.EIO)
    return os.strerror(code) if failed and code else None


def _code(error: BaseException) -> int | None:
    """The system's number of an error; libraries in Rust have it in their words."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else getattr(error, "errno", None)


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Writes a file that is on the disk when this returns; never through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_LINK
    with open(os.open(path, flags, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Brings a file or a directory to the disk."""
    if sys.platform == "win32":  # neither directories nor read-only handles can be synced there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _aside(place: Path, data: bytes) -> Iterator[Path]:
    """A hidden file with this content, removed at the end of the block where it was not renamed."""
    path, handle = _locked_file(place)
    with open(handle, "wb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)


def _locked_file(place: Path) -> tuple[Path, int]:
    """A new hidden file and its locked handle."""
    while True:
        path = place / _random_name()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _lock(handle, wait=True)
        if path.exists():
            return path, handle
        os.close(handle)  # another run's clean-up came between the file and its lock


def _random_name() -> str:
    return f"{PREFIX}{here()}-{os.getpid()}-{secrets.token_hex(4)}"


@cache
def here() -> str:
    """Eight hex digits for this machine since it was last started; containers on it share them, as
    they share its locks."""
    try:
        machine = BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        machine = f"{uuid.getnode():x}"
    return hashlib.sha256(f"fastsiu {machine}".encode()).hexdigest()[:8]


def is_from_here(path: Path) -> bool:
    """Whether this machine has made a leftover since it was last started."""
    try:
        return _maker(path) == here()
    except (OSError, ValueError):  # removed meanwhile, not readable, or no file of ours
        return False


def _maker(path: Path) -> str:
    """`here` of the machine that made a leftover; "" where nothing tells it."""
    if match := _PARTIAL.fullmatch(path.name):
        return match[1]
    if _CLAIMED.fullmatch(path.name):
        with open_ordinary(path) as file:
            return file.read(8).decode("ascii", "replace")
    return ""


def _entries(place: Path) -> list[Path]:
    try:
        return sorted(place.iterdir())
    except OSError:  # absent, no directory, or not readable: nothing can be found there
        return []


def _lock(handle: int, *, wait: bool) -> bool:
    """Whether this process has the lock. True also on a file system without locks, such as some
    network file systems."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_dead(path: Path) -> bool:
    """Whether the run of a leftover has ended; False where nothing says so."""
    with _opened_if_dead(path) as dead:
        return dead is not None


def sweep_one(path: Path) -> bool:
    """Removes a leftover whose run has ended. Returns whether it is gone."""
    with _opened_if_dead(path) as handle:
        if handle is None:
            return False
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                # Another run may have given up this file and made a new one of the same name.
                if os.path.samestat(os.fstat(handle), os.lstat(path)):
                    path.unlink()
    return not os.path.lexists(path)


@contextlib.contextmanager
def _opened_if_dead(path: Path) -> Iterator[int | None]:
    """A handle with the lock of a leftover whose run has ended; None for anything else."""
    if fcntl is None:
        yield None
        return
    try:
        # none of ours is a pipe, which would be waited for
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        mode = os.fstat(handle).st_mode
        ours = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        yield handle if ours and _is_dead(handle, path) else None
    finally:
        os.close(handle)


def _is_dead(handle: int, path: Path) -> bool:
    """Whether the run of a leftover has ended: its lock is free, on the machine that took it.
    Everywhere else, and on a file system without locks, age alone tells. Process ids say nothing:
    they come again, and neither containers nor machines see each other's."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return _is_old(path)
    return is_from_here(path) or _is_old(path)


def _is_old(path: Path) -> bool:
    """Whether nothing in a leftover was written for `LONG_AGO`, by the clock of its file system:
    clocks of machines differ."""
    try:
        newest = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
        with _aside(path.parent, b"") as now:
            return now.stat().st_mtime - newest > LONG_AGO
    except OSError:  # removed meanwhile, or a place that cannot be written
        return False
