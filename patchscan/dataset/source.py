"""Where a data set's files are read from: a folder or an s3:// URL, the same for indexing and for training."""

import os
from pathlib import Path

from patchscan.common.errors import UserError
from patchscan.storage import open_store
from patchscan.storage.store import Store


class DataError(UserError):
    """The data does not hold what the recipe asks for, or a file changed since it was indexed."""


class DataSource:
    """A folder or s3:// URL that an index's paths are relative to; each process opens its own connections."""

    def __init__(self, url: str | Path):
        self.url = str(url)
        self._opened: tuple[int, Store] | None = None

    def read(self, path: str) -> bytes:
        """The encoded bytes of one image. Raises DataError where it is gone or cannot be read, StoreError where the
        bucket cannot."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_store(self.url)
        try:
            data = self._opened[1].read(path)
        except OSError as error:
            raise DataError(
                f"cannot read {self.url}/{path}: {error.strerror}; mend that and run the same command again"
            ) from error
        if data is None:
            raise DataError(f"{self.url}/{path} is gone since it was listed; run `patchscan index` again")
        return data
