"""Read a data set's files from a folder or an s3:// URL, as scans read them: for indexing, training and evaluation."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from patchscan.common.errors import EXIT_INTERRUPTED, UserError
from patchscan.common.retries import TransientError
from patchscan.dataset.content_encoding import unpacked
from patchscan.detector.images import ImageError, Limits
from patchscan.storage import open_store
from patchscan.storage.fetching import Fetcher
from patchscan.storage.store import FailureCode, FetchedObject, ObjectError, ObjectInfo, is_bucket, split_url

# Of a larger file so many bytes are read, and one more: no detector takes it.
MAX_BYTES = Limits().max_bytes


class DataError(UserError):
    """The data lacks what the recipe asks for, or a file cannot be read or has changed since it was indexed."""


class UnreadableError(DataError):
    """One file cannot be read; `code` says why."""

    def __init__(self, code: FailureCode, message: str):
        super().__init__(message)
        self.code = code
        self.exit_code = EXIT_INTERRUPTED if code == FailureCode.UNAVAILABLE else DataError.exit_code

    def __reduce__(self) -> tuple[type[Self], tuple[FailureCode, str]]:
        """Lets a training's loader process send it."""
        return type(self), (self.code, str(self))


@contextmanager
def telling_of_changes(path: str) -> Iterator[None]:
    """Within this context, which decodes the indexed image of this path, an ImageError becomes a DataError: it could be
    decoded when it was indexed."""
    try:
        yield
    except ImageError as error:
        raise DataError(f"{path} changed since it was indexed ({error}); run `patchscan index` again") from error


class DataSource:
    """The folder or s3:// URL to which an index's paths are relative. Each process opens connections of its own."""

    def __init__(self, url: str | Path):
        self.url = str(url)
        prefix = split_url(self.url)[1].rstrip("/") if is_bucket(self.url) else ""
        self._root = f"{prefix}/" if prefix else ""
        self._opened: tuple[int, Fetcher] | None = None

    def read(self, path: str) -> bytes:
        """Return the encoded bytes of one image, as a browser would show it where it is stored with a Content-Encoding;
        cut after MAX_BYTES + 1.

        Raises UnreadableError where it cannot be read, ImageError where its Content-Encoding cannot be undone,
        StoreError and OutageError where nothing can be read.
        """
        with unpacked(self._fetch(path), MAX_BYTES) as data:
            return data

    def digest(self, path: str) -> str:
        """Return the SHA-256 of what `read` returns; where the Content-Encoding cannot be undone, of what is stored.
        Raises as `read` does, but no ImageError."""
        fetched = self._fetch(path)
        try:
            with unpacked(fetched, MAX_BYTES) as data:
                return hashlib.sha256(data).hexdigest()
        except ImageError:
            return hashlib.sha256(fetched.data).hexdigest()

    def _fetch(self, path: str) -> FetchedObject:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), Fetcher(open_store(self.url), other_side=self.url)
        try:
            return self._opened[1].fetch(ObjectInfo(key=self._root + path), MAX_BYTES)[0]
        except ObjectError as error:
            if error.code == FailureCode.VANISHED:
                message = f"{self.url}/{path} is gone since it was listed; run `patchscan index` again"
            else:
                message = f"{self.url}/{path}: {error.message}; fix that and run the same command again"
            raise UnreadableError(error.code, message) from None
        except TransientError as error:
            message = f"{self.url}/{path}: the store does not give it ({error}); run the same command again"
            raise UnreadableError(FailureCode.UNAVAILABLE, message) from None
