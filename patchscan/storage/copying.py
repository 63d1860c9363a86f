"""Copy one folder or bucket prefix to another: data to a training pod, archives to and from a model store."""

from concurrent.futures import ThreadPoolExecutor

from patchscan.common.console import ProgressReport
from patchscan.storage import open_store
from patchscan.storage.store import StoreError

THREADS = 16


def copy_tree(source: str, destination: str, skip_existing: bool = False) -> int:
    """Copy every object under `source` to the same name under `destination` (each an s3:// URL or a folder).

    Each object is written atomically; with `skip_existing`, names that the destination has are skipped. Returns how
    many were copied. Raises StoreError where there is nothing to copy.
    """
    origin, target = open_store(source, threads=THREADS), open_store(destination, threads=THREADS)
    names = sorted(origin.names(""))
    if not names:
        raise StoreError(f"{source} holds nothing to copy; is the address right?")
    existing = set(target.names("")) if skip_existing else set()

    def copy(name: str) -> None:
        data = origin.read(name)
        if data is not None:
            target.write(name, data)

    todo = [name for name in names if name not in existing]
    with ProgressReport(f"copy to {destination}", len(todo), "files") as progress, ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(copy, todo):
            progress.advance()
    return len(todo)
