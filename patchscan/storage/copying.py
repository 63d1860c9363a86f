"""Copy one folder or bucket prefix to another: data to a training pod, archives to and from a model store."""

import tempfile
import unicodedata
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from patchscan.common.console import ProgressReport, tell
from patchscan.storage import open_store
from patchscan.storage.store import Store, StoreError, UnusableNameError, is_bucket

THREADS = 16
# The part of each object that is held in memory; what is longer waits on the local disk.
IN_MEMORY = 8 * 2**20


def copy_tree(source: str, destination: str, skip_existing: bool = False) -> int:
    """Copy every object under `source` to the same name under `destination` (each an s3:// URL or a folder).

    Each object is written atomically; with `skip_existing`, names that the destination has are skipped. Objects that
    the destination cannot hold (a folder: keys that name no file in it, keys that differ in case where it ignores case)
    are left out, and so are those that cannot be read for what they are (in a folder: pipes, links to folders, files
    without the right to read; in a bucket: cold storage); StoreError is raised after all others have been copied. An
    empty object with the key of the source itself or one that ends in `/`, with which some tools mark a folder, is not
    copied to a folder. A bucket's Content-Encoding and Content-Type are kept in a bucket; a folder gets the bytes as
    they are stored, and a warning says which are packed. Returns how many were copied. Raises StoreError where there is
    nothing to copy.
    """
    origin, target = open_store(source, threads=THREADS), open_store(destination, threads=THREADS)
    names = sorted(origin.names(""))
    if not names:
        raise StoreError(f"{source} holds nothing to copy; is the address right?")
    existing = set(target.names("")) if skip_existing else set()
    todo = [name for name in names if name not in existing]
    same_files = _same_files(names, target)
    left_out: list[tuple[str, str]] = []
    packed: list[tuple[str, str]] = []

    def copy(name: str) -> None:
        try:
            if name in same_files:
                raise UnusableNameError("the destination ignores case, and another name differs in nothing else")
            with tempfile.SpooledTemporaryFile(IN_MEMORY) as file:
                if (headers := origin.download(name, file)) is None:
                    raise UnusableNameError("it is gone since it was listed, or a link to nothing")
                marks_folder = name == "" or name.endswith("/")
                if file.tell() or not marks_folder or is_bucket(destination):
                    target.upload(name, file, headers)
                    if "ContentEncoding" in headers and not is_bucket(destination):
                        packed.append((name, headers["ContentEncoding"]))
        except UnusableNameError as error:
            left_out.append((name, str(error)))

    with ProgressReport(f"copy to {destination}", len(todo), "files") as progress, ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(copy, todo):
            progress.advance()
    if packed:
        name, encoding = min(packed)
        why = f"have a Content-Encoding, which a file cannot have, and were copied packed; first {name}: {encoding}"
        tell(f"warning: {len(packed):,} of {len(todo):,} objects {why}")
    if left_out:
        name, why = min(left_out)
        raise StoreError(
            f"{len(left_out):,} of {len(todo):,} objects could not be copied, the others were; first {name}: {why}"
        )
    return len(todo)


def _same_files(names: Sequence[str], target: Store) -> set[str]:
    """The names that are one file with another name in a destination that ignores case."""
    folded = Counter(map(_fold, names))
    if len(folded) == len(names) or not _ignores_case(target):
        return set()
    return {name for name in names if folded[_fold(name)] > 1}


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _ignores_case(target: Store) -> bool:
    probe = f"probe-{uuid.uuid4().hex}"
    target.write(probe, b"")
    try:
        return target.read(probe.upper()) is not None
    finally:
        target.delete(probe)
