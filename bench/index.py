"""`patchscan index` on many files: `python -m bench.index 100000 build/scale` (needs 1 GB of disk).

Makes that many 64 x 64 JPEGs, indexes them, and prints the time and the peak memory of the parent and of a worker.
"""

import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from bench.images import encoded
from patchscan.dataset.index import build_index
from patchscan.dataset.layout import CLASSES, SPLITS

SIDE = 64


@dataclass(frozen=True)
class Indexed:
    """Files, seconds of the first run and of a second over the same files, and peak memory in MB."""

    files: int
    seconds: float
    seconds_again: float
    parent_mb: float
    worker_mb: float


def measure(count: int, root: Path) -> Indexed:
    """Make `count` files below `root` and index them twice."""
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(partial(_make, root), range(count), chunksize=500):
            pass
    first = build_index(root)
    parent, worker = _peaks()
    return Indexed(first.read, first.seconds, build_index(root).seconds, parent, worker)


def _make(root: Path, number: int) -> None:
    split, label = SPLITS[number % 10 == 0], CLASSES[number // 10 % 2]
    folder = root / "gan" / split / label / f"{number // 2000}"
    folder.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    (folder / f"{number}.jpg").write_bytes(encoded(np.asarray(smooth), "JPEG"))


def _peaks() -> Iterator[float]:
    return (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    done = measure(int(sys.argv[1]), Path(sys.argv[2]))
    memory = f"peak memory {done.parent_mb:.0f} MB, a worker {done.worker_mb:.0f} MB"
    print(f"{done.files:,} files in {done.seconds:.0f} s; {memory}")
    print(f"again: {done.seconds_again:.1f} s")
