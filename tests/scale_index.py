"""Measures `patchscan index` on many files: `python -m tests.scale_index 100000 build/scale` (needs 1 GB of disk).

Makes that many 64 x 64 JPEGs, indexes them, and prints the time and the peak memory of the parent and of a worker.
"""

import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.image_tree import picture, write
from training.index import build_index
from training.layout import CLASSES, SPLITS


def make(root: Path, number: int) -> None:
    split, label = SPLITS[number % 10 == 0], CLASSES[number // 10 % 2]
    write(root / "gan" / split / label / f"{number // 2000}" / f"{number}.jpg", picture(number), quality=90)


def main(count: int, root: Path) -> None:
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(partial(make, root), range(count), chunksize=500):
            pass
    index = build_index(root)
    parent, worker = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(f"{index.read:,} files in {index.seconds:.0f} s; peak memory {parent:.0f} MB, a worker {worker:.0f} MB")
    print(f"again: {build_index(root).seconds:.1f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
