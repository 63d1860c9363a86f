"""Check that results can be put where they are to go, before hours of work for them: a training Job does.

Nothing is written to a bucket, so that a right to write that is missing is not found.
"""

import os
from pathlib import Path

from patchscan.storage import open_store
from patchscan.storage.store import AccessDeniedError, StoreError, is_bucket


def check_reach(url: str) -> None:
    """Ask a bucket for an object, or make a folder. Raises StoreError where there is no such bucket or folder and none
    can be made, or the store refuses the credentials; OutageError where it does not answer."""
    store = open_store(url)
    if is_bucket(url):
        try:
            store.read("reach")
        except AccessDeniedError:
            return  # one may have the right to write and no other
    else:
        try:
            Path(url).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{url}: {error.strerror}; give an s3:// URL or a folder that can be made") from None
        if not os.access(url, os.W_OK):
            raise StoreError(f"{url}: this folder cannot be written to")
