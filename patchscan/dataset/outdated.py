"""Remove from a training Job's copy of its data what the data no longer hold, or hold in another form; `patchscan copy
--skip-existing` then copies what is missing.

    python -m patchscan.dataset.outdated s3://data/genimage /data/set
"""

import sys
from contextlib import suppress
from pathlib import Path

from patchscan.common.console import say, user_errors_told
from patchscan.dataset.layout import LayoutError, find_files


def remove_outdated(data: str, copy: Path) -> int:
    """Remove the files of the folder `copy` that `data` lacks, or has in another size or written later than the copy.
    Returns how many. Raises what `find_files` raises for `data`."""
    there = {file.path: file for file in find_files(data, copy.name).files}
    removed = 0
    with suppress(LayoutError):  # a copy that was interrupted before its first file
        for file in find_files(copy).files:
            now = there.get(file.path)
            if now is None or now.bytes != file.bytes or now.modified_ns > file.modified_ns:
                (copy / file.path).unlink()
                removed += 1
    return removed


if __name__ == "__main__":
    with user_errors_told():
        if count := remove_outdated(sys.argv[1], Path(sys.argv[2])):
            say(f"{count:,} files of {sys.argv[2]} were removed or replaced in {sys.argv[1]} since they were copied")
