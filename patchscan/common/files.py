"""Write files atomically, lock folders, turn names from outside into safe paths, and compute a file's SHA-256."""

import errno
import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The most bytes that Linux takes: in a part of a path, in a whole path.
LONGEST_PART, LONGEST_PATH = 255, 4095
# What writing to a full disk raises, or beyond a quota.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# A file that is being written. Its name does not depend on the target's: that may be as long as a name can be.
PARTIAL_NAME = re.compile(r"\.partial-[0-9a-f]{32}")
# One that nobody has written to for a day was left by a process that was killed, or by a power cut.
ABANDONED_S = 86_400
# Where this process has looked for such files: once in each folder, which may hold very many.
_looked_at: set[Path] = set()


@contextmanager
def atomic_write(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield the path of a new, empty file in the folder of `path` to write to. At the end it gets the name `path`, and
    is removed where the block raises or is interrupted: `path` is never half-written, also after a power cut, and of
    several writers at once one wins.

    The file has the rights that the umask (or the folder's default ACL) gives to new files. With `replace` False an
    existing `path` is kept, and FileExistsError raised. What killed processes have left in the folder is removed.
    """
    _remove_abandoned(path.parent)
    partial = path.with_name(f".partial-{uuid.uuid4().hex}")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rights = os.fstat(handle).st_mode & 0o777
        os.close(handle)
        yield partial
        # Some libraries write a file of their own over it, with rights of their own.
        partial.chmod(rights)
        _sync(partial)
        if replace:
            partial.replace(path)
        else:
            path.hardlink_to(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if not replace:
        partial.unlink()
    _sync(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder; waits for another process or thread that holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    if folder in _looked_at:
        return
    _looked_at.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if PARTIAL_NAME.fullmatch(entry.name):
                with suppress(OSError):  # another process is faster, or it is somebody else's
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_S:
                        Path(entry.path).unlink()


class UnsafeNameError(ValueError):
    """A name that is no file inside the folder; the message says why."""


def safe_path(root: Path, name: str) -> Path:
    """Return the path of the file `name` (parts separated by `/`, as in an object's key) inside the folder `root`.

    Different names give different paths. Raises UnsafeNameError for a name that would leave the folder, be the same
    file as another name, or cannot be a file's: with an empty part (`/a`, `a//b`, `a/`), a part `.` or `..`, a NUL, a
    part of more than 255 bytes or a path of more than 4,095.
    """
    try:
        sizes = [len(os.fsencode(part)) for part in name.split("/")]
        total = len(os.fsencode(root.absolute())) + 1 + len(os.fsencode(name))
    except UnicodeEncodeError:
        raise UnsafeNameError("it is not UTF-8") from None
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise UnsafeNameError("it has an empty part, or a part . or ..")
    if "\0" in name:
        raise UnsafeNameError("it has a NUL")
    if max(sizes) > LONGEST_PART or total > LONGEST_PATH:
        raise UnsafeNameError("it is too long")
    return root / name


def _sync(path: Path) -> None:
    """Make sure that a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the file's SHA-256 as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_in(sha256sum: bytes) -> str:
    """Return the digest, 64 hex digits, that a file in sha256sum's format begins with. Raises ValueError."""
    found = re.match(rb"\s*([0-9a-fA-F]{64})(?:\s|$)", sha256sum)
    if not found:
        raise ValueError("no sha256")
    return found[1].decode().lower()
