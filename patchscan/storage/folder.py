"""Read and write files of a local folder through the same protocol as objects of a bucket."""

import errno
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from patchscan.common.retries import OutageError
from patchscan.storage.store import FailureCode, FetchedObject, ObjectError, ObjectInfo, StoreError

PARTIAL = ".partial-"


class Folder:
    """A folder as a `Store`. Keys are relative paths with `/`; a file's ETag is its modification time and size."""

    def __init__(self, url: str):
        self.url = url
        self.root = Path(url)
        self.requests: Counter[str] = Counter()
        self.bytes_read = 0

    def objects(self) -> Iterator[ObjectInfo]:
        """Every file, symbolic links to files included; links to folders are not followed."""
        if not self.root.is_dir():
            raise StoreError(f"{self.url} is not a folder")
        for folder, _, names in os.walk(self.root, onerror=_raise_store_error):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                try:
                    key.encode()
                except UnicodeEncodeError:
                    raise StoreError(f"{os.fsencode(key)!r}: the file's name is not UTF-8; rename it") from None
                if path.is_file():
                    yield self._info(key, path.stat())

    def fetch(self, info: ObjectInfo, limit: int) -> FetchedObject:
        """Read the file, and compare it with the listing by modification time and size."""
        if Path(info.key).is_absolute() or ".." in Path(info.key).parts:
            raise ObjectError(FailureCode.ACCESS_DENIED, "the path points outside the folder")
        try:
            with (self.root / info.key).open("rb") as file:
                data = file.read(limit + 1)
                now = self._info(info.key, os.fstat(file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectError(FailureCode.VANISHED, "the file was deleted after it was listed") from None
        except PermissionError:
            raise ObjectError(FailureCode.ACCESS_DENIED, "access denied") from None
        except OSError as error:
            raise ObjectError(FailureCode.STORE_ERROR, f"cannot be read: {error.strerror}") from None
        if info.etag and info.etag != now.etag:
            raise ObjectError(FailureCode.CHANGED, "the file was changed after it was listed")
        self.bytes_read += len(data)
        return FetchedObject(data, now.size or 0, str(now.etag), None, now.last_modified)

    def names(self, prefix: str) -> Iterator[str]:
        """Names of the results that begin with `prefix`."""
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            if name.startswith(prefix) and path.is_file() and not path.name.startswith(PARTIAL):
                yield name

    def read(self, name: str) -> bytes | None:
        """A result's bytes, or None where it does not exist."""
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write beside the target, then rename over it."""
        self._partial(name, data).replace(self.root / name)

    def write_new(self, name: str, data: bytes) -> bool:
        """Write beside the target, then link it to the target's name, which fails where that exists."""
        partial = self._partial(name, data)
        try:
            (self.root / name).hardlink_to(partial)
        except FileExistsError:
            return False
        finally:
            partial.unlink()
        return True

    def delete(self, name: str) -> None:
        """Remove a result."""
        (self.root / name).unlink(missing_ok=True)

    def _partial(self, name: str, data: bytes) -> Path:
        target = self.root / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=target.parent, prefix=PARTIAL)
            _write(handle, Path(partial), data)
        except OSError as error:
            error_class = OutageError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
            raise error_class(
                f"{target} cannot be written: {error.strerror}; fix that and run the same command again"
            ) from error
        return Path(partial)

    @staticmethod
    def _info(key: str, stat: os.stat_result) -> ObjectInfo:
        modified = datetime.fromtimestamp(stat.st_mtime_ns // 1_000 / 1_000_000, UTC)
        etag = f"{stat.st_mtime_ns:x}-{stat.st_size:x}"
        return ObjectInfo(key=key, size=stat.st_size, etag=etag, last_modified=modified)


def _write(handle: int, path: Path, data: bytes) -> None:
    """Write to an open file; remove it where that fails."""
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise


def _raise_store_error(error: OSError) -> None:
    raise StoreError(f"{error.filename} cannot be listed: {error.strerror}; a scan must see every file")
