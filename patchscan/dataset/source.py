"""Read a data set's files from a folder or an s3:// URL, for indexing and for training alike."""

import os
from pathlib import Path

from patchscan.common.errors import UserError
from patchscan.storage import open_store
from patchscan.storage.store import Store


class DataError(UserError):
    """The data lacks what the recipe asks for, or a file cannot be read or has changed since it was indexed."""


class DataSource:
    """The folder or s3:// URL to which an index's paths are relative. Each process opens connections of its own."""

    def __init__(self, url: str | Path):
        self.url = str(url)
        self._opened: tuple[int, Store] | None = None

    def read(self, path: str) -> bytes:
        """Return the encoded bytes of one image. Raises DataError where it is gone, StoreError where it cannot be read
        or the bucket cannot be used."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_store(self.url)
        data = self._opened[1].read(path)
        if data is None:
            raise DataError(f"{self.url}/{path} is gone since it was listed; run `patchscan index` again")
        return data
