"""Seconds from `patchscan scan FOLDER` to its first row, and the CPU seconds until then: `python -m bench.first_row`.

The folder is the first argument, or eight photographs. Each round starts the command anew and ends it at the first row.
What Python has compiled and the disk has read stays cached.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import NoReturn

ROUNDS = 7
CHILD = "from bench.first_row import scan; scan()"
# The slowest libraries that a scan imports. typer's adapters import pydantic; pandas is imported by pyarrow.
LIBRARIES = ("numpy", "pyarrow.parquet", "duckdb", "typer._adapters", "onnxruntime", "pandas")
IMPORTS = "from bench.first_row import time_imports; time_imports()"


def scan() -> None:
    """Be the command until its first row; then print the time of day and the CPU seconds of it and of its decoders."""
    from patchscan.cli import main as run
    from patchscan.detector.decoders import decoder_pool
    from patchscan.scanning.observers import BarObserver

    def end(*_: object) -> NoReturn:
        print(json.dumps([time.time(), time.process_time(), decoder_pool().cpu_s()]), flush=True)
        os._exit(0)

    BarObserver.row = end  # type: ignore[assignment, method-assign]
    run()


def measure(folder: Path) -> None:
    """Print median, least and greatest of the rounds."""
    taken: dict[str, list[float]] = {"seconds": [], "CPU seconds": [], "CPU seconds of decoders": []}
    for _ in range(ROUNDS + 1):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-c", CHILD, "scan", str(folder), "--out", out]
            began = time.time()
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        ended, own, decoders = json.loads(told)
        for name, value in zip(taken, (ended - began, own, decoders), strict=True):
            taken[name].append(value)
    for name, values in taken.items():
        least, *_, most = sorted(values[1:])  # the first round warms up
        print(f"{name}: {median(values[1:]):.2f} ({least:.2f} to {most:.2f})")


def time_imports() -> None:
    """Import each library after those before it, and print the CPU seconds that each took."""
    for name in LIBRARIES:
        began = time.process_time()
        import_module(name)
        print(time.process_time() - began)


def measure_imports() -> None:
    """Print the median of the CPU seconds that importing each library takes."""
    command = [sys.executable, "-c", IMPORTS]
    rounds = [subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split() for _ in range(ROUNDS)]
    for name, taken in zip(LIBRARIES, zip(*rounds, strict=True), strict=True):
        print(f"CPU seconds of importing {name}: {median(map(float, taken)):.2f}")


def main() -> None:
    """Measure with the folder that the command line names, or with eight photographs of 500 x 375."""
    measure_imports()
    if sys.argv[1:]:
        measure(Path(sys.argv[1]))
        return
    from bench.images import scored_images

    with tempfile.TemporaryDirectory() as photos:
        for number, data in enumerate(scored_images(None, 8)[0]):
            (Path(photos) / f"{number}.jpg").write_bytes(data)
        measure(Path(photos))


if __name__ == "__main__":
    main()
