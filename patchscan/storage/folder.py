"""Read and write files of a local folder through the same protocol as objects of a bucket."""

import errno
import io
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, BinaryIO, TypeVar

from patchscan.common.files import DISK_FULL, PARTIAL_NAME, UnsafeNameError, atomic_write, safe_path
from patchscan.common.retries import OutageError
from patchscan.storage.store import (
    TEMPORARY_FULL,
    FailureCode,
    FetchedObject,
    NotAFileError,
    ObjectError,
    ObjectInfo,
    StoreError,
    UnusableNameError,
)

Result = TypeVar("Result")

# A name that is too long for this file system, or a file and a folder at once (`a` and `a/b`).
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)
# What a link to nothing, or to itself, raises.
LINKS_TO_NOTHING = (errno.ENOENT, errno.ELOOP)
NO_FILE = "no file"
LINK_TO_A_FOLDER = "it is a link to a folder, which is not followed: scan or copy that folder itself"
# What opening raises, where there is a name and no file.
NOT_A_FILE = {
    errno.EINVAL: "it is a folder, a pipe or a device and not a file",
    errno.ELOOP: "it is a link to itself",
    errno.ENXIO: "it is a socket and not a file",
}
ESCAPED_BYTE = re.compile(r"\\x([89a-f][0-9a-f])")


class Folder:
    """A folder as a `Store`, which says what the methods do. Keys are relative paths with `/`; a file's ETag is its
    modification time and size.

    A file whose name is not UTF-8 has a key in which the bytes that are none are written as `\\xe9`.
    """

    def __init__(self, url: str):
        self.url = url
        self.root = Path(url)
        self._is_new = not os.path.lexists(self.root)
        self.requests: Counter[str] = Counter()
        self.bytes_read = 0

    def objects(self) -> Iterator[ObjectInfo]:
        """Everything in the folder that is not a folder.

        What cannot be read is listed too, so that it gets a row: a folder that cannot be listed with a `/` at its end;
        links to folders, which are not followed, links to nothing, pipes, sockets and devices with the ETag NO_FILE,
        which tells as well when that changes.
        """
        if not os.path.isdir(self.root):  # noqa: PTH112  Path.is_dir raises PermissionError
            raise StoreError(f"{self.url} is not a folder")
        closed: list[OSError] = []
        for path in _files(self.root, closed.append):
            info = _listed(key_of(path.relative_to(self.root)), path)
            if info:
                yield info
        for failure in closed:
            path = Path(failure.filename)
            if path == self.root:
                raise StoreError(f"{self.url} cannot be listed: {failure.strerror}")
            if failure.errno == errno.ENOENT:
                continue  # it was removed meanwhile
            yield ObjectInfo(key=f"{key_of(path.relative_to(self.root))}/")

    def look_up(self, key: str) -> ObjectInfo | None:
        """The file as it is now; None also for a name that `objects` would not list."""
        try:
            path = self._existing(key)
        except UnsafeNameError:
            return None
        # Links to folders are not followed.
        linked = any(os.path.islink(self.root / folder) for folder in Path(key).parents)  # noqa: PTH114
        return _listed(key, path) if os.path.lexists(path) and not linked else None

    def fetch(self, info: ObjectInfo, limit: int) -> FetchedObject:
        """Read the file, and compare it with the listing by modification time and size."""
        if info.key.endswith("/"):
            raise ObjectError(FailureCode.ACCESS_DENIED, "the folder cannot be listed; nothing in it was scanned")
        try:
            with _open_regular(self._existing(info.key)) as file:
                # Python makes room for all that it is asked for, which takes longer than reading a small file.
                size = os.fstat(file.fileno()).st_size
                data = file.read(min(size, limit) + 1)
                if size < len(data) <= limit:  # it grows
                    data += file.read(limit + 1 - len(data))
                now = _info(info.key, os.fstat(file.fileno()))
        except UnsafeNameError as error:
            raise ObjectError(FailureCode.ACCESS_DENIED, f"the key names no file in the folder: {error}") from None
        except (FileNotFoundError, NotADirectoryError):
            if self._existing(info.key).is_symlink():
                raise NotAFileError("it is a link to a file that does not exist") from None
            raise ObjectError(FailureCode.VANISHED, "the file was deleted after it was listed") from None
        except PermissionError:
            raise ObjectError(FailureCode.ACCESS_DENIED, "access denied") from None
        except OSError as error:
            if why := _why_not_a_file(error, self._existing(info.key)):
                raise NotAFileError(why) from None
            raise ObjectError(FailureCode.STORE_ERROR, f"cannot be read: {error.strerror}") from None
        if info.etag and info.etag != now.etag:
            raise ObjectError(FailureCode.CHANGED, "the file was changed after it was listed")
        self.bytes_read += len(data)
        return FetchedObject(data, now.size or 0, str(now.etag), None, now.last_modified)

    def _existing(self, key: str) -> Path:
        """The path of a key that `objects` made. Raises UnsafeNameError."""
        path = safe_path(self.root, key)
        if "\\x" in key and not os.path.lexists(path):
            raw = ESCAPED_BYTE.sub(lambda found: chr(0xDC00 + int(found[1], 16)), key)
            return safe_path(self.root, raw)
        return path

    def names(self, prefix: str) -> Iterator[str]:
        # Only its folder is walked: beside it may lie the files of thousands of scans.
        for path in _files(self.root / prefix.rpartition("/")[0], _raise_unless_missing):
            name = key_of(path.relative_to(self.root))
            if name.startswith(prefix) and not PARTIAL_NAME.fullmatch(path.name):
                yield name

    def read(self, name: str) -> bytes | None:
        return self._read(name, lambda opened: opened.read())

    def download(self, name: str, file: IO[bytes]) -> dict[str, str] | None:
        def copy(opened: BinaryIO) -> dict[str, str]:
            shutil.copyfileobj(opened, file)
            return {}

        return self._read(name, copy)

    def _read(self, name: str, use: Callable[[BinaryIO], Result]) -> Result | None:
        """Return what `use` makes of the open file, or None where there is none."""
        try:
            with _open_regular(self._existing(name)) as file:
                return use(file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnsafeNameError as error:
            raise UnusableNameError(f"{name} cannot be the name of a file in {self.url}: {error}") from None
        except OSError as error:
            if error.errno in DISK_FULL:  # where it is copied to
                raise OutageError(TEMPORARY_FULL) from error
            why = _why_not_a_file(error, self._existing(name))
            # Another file may well be readable.
            error_class = UnusableNameError if why or isinstance(error, PermissionError) else StoreError
            raise error_class(
                f"cannot read {self.root / name}: {why or error.strerror}; fix that and run the same command again"
            ) from error

    def write(self, name: str, data: bytes) -> None:
        """Write beside the target, then rename over it."""
        self._write(name, io.BytesIO(data), replace=True)

    def upload(self, name: str, file: IO[bytes], headers: Mapping[str, str]) -> None:
        self._write(name, file, replace=True)

    def write_new(self, name: str, data: bytes) -> bool:
        """Write beside the target, then link it to the target's name, which fails where that exists."""
        return self._write(name, io.BytesIO(data), replace=False)

    def delete(self, name: str) -> None:
        """Remove a file, and the folder itself where that is empty then and was made by this object: what a scan that
        is refused has announced leaves nothing behind."""
        try:
            self._path(name).unlink()
            if self._is_new:
                with suppress(OSError):  # it holds more
                    self.root.rmdir()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise StoreError(f"{self.root / name} cannot be removed: {error.strerror}; remove it yourself") from error

    def _path(self, name: str) -> Path:
        try:
            return safe_path(self.root, name)
        except UnsafeNameError as error:
            raise UnusableNameError(f"{name} cannot be the name of a file in {self.url}: {error}") from None

    def _write(self, name: str, source: IO[bytes], *, replace: bool) -> bool:
        """Write a file and return True; where it exists and may not be replaced, False."""
        target = self._path(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target, replace=replace) as partial, partial.open("wb") as file:
                source.seek(0)
                shutil.copyfileobj(source, file)
        except OSError as error:
            if isinstance(error, FileExistsError) and not replace and target.is_file():
                return False
            if error.errno in NAME_ERRORS:
                raise UnusableNameError(f"{target} cannot be written: {error.strerror}") from error
            error_class = OutageError if error.errno in DISK_FULL else StoreError
            raise error_class(
                f"{target} cannot be written: {error.strerror}; fix that and run the same command again"
            ) from error
        return True


def _files(root: Path, onerror: Callable[[OSError], object]) -> Iterator[Path]:
    """Yield the paths of all that is in the folder and is no folder; a link to a folder is none."""
    for folder, folders, names in os.walk(root, onerror=onerror):
        for name in names:
            yield Path(folder, name)
        for name in folders:
            if os.path.islink(f"{folder}/{name}"):  # noqa: PTH114  a Path for each folder takes longer
                yield Path(folder, name)


def _why_not_a_file(error: OSError, path: Path) -> str | None:
    """Why what is at this path, which could not be opened, is not a file; None where it may be one."""
    if error.errno == errno.EINVAL and path.is_dir() and path.is_symlink():
        return LINK_TO_A_FOLDER
    return NOT_A_FILE.get(error.errno or 0)


def _listed(key: str, path: Path) -> ObjectInfo | None:
    """What a listing says about this path; None for a folder."""
    try:
        status = path.stat()
    except OSError as error:
        return ObjectInfo(key=key, etag=NO_FILE if error.errno in LINKS_TO_NOTHING else None)
    if stat.S_ISREG(status.st_mode):
        return _info(key, status)
    is_folder = stat.S_ISDIR(status.st_mode) and not path.is_symlink()
    return None if is_folder else ObjectInfo(key=key, etag=NO_FILE)


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    modified = None
    with suppress(ValueError, OverflowError):  # of a year that no calendar has: file systems take any number
        modified = datetime.fromtimestamp(status.st_mtime_ns // 1_000 / 1_000_000, UTC)
    etag = f"{status.st_mtime_ns:x}-{status.st_size:x}"
    return ObjectInfo(key=key, size=status.st_size, etag=etag, last_modified=modified)


def _open_regular(path: Path) -> BinaryIO:
    """Open a file to read; OSError for anything else, also for a pipe, for which `open` would wait."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(errno.EINVAL, NOT_A_FILE[errno.EINVAL])


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise StoreError(f"{error.filename} cannot be listed: {error.strerror}") from error


def key_of(path: Path) -> str:
    """The key of a relative path: bytes of it that are not UTF-8 are written as `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
