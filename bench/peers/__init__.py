"""What else scores images in bulk, for comparison: each module is a program that prints images per second.

Nothing but the standard library is imported here, as one of them runs in an environment of its own.
"""

import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

KEY = "images_per_s"
PARTS = 3


class Meter:
    """Counts images for `seconds` after the first batch, which starts everything."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._counts: list[tuple[float, int]] = []
        self._busy_s = 0.0

    def is_over(self, images: int) -> bool:
        """Count a scored batch. Returns whether the time is over."""
        if not self._counts:
            self._busy_s, images = busy_s(), 0
        counted = self._counts[-1][1] if self._counts else 0
        self._counts.append((time.perf_counter(), counted + images))
        return self._counts[-1][0] - self._counts[0][0] > self.seconds

    def print_rates(self) -> None:
        """Print the images per second of each third of the time, and the share of all cores that was busy, as a line
        that `read_rates` finds between what libraries print."""
        if len(self._counts) < 2:
            raise SystemExit("there was only one batch of images: give a larger bucket, or more seconds")
        (began, _), (ended, _) = self._counts[0], self._counts[-1]
        edges = [next(one for one in self._counts if one[0] >= began + part / PARTS * (ended - began))
                 for part in range(PARTS + 1)]  # fmt: skip
        rates = [
            (after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(edges) if after[0] > before[0]
        ]
        share = (busy_s() - self._busy_s) / (ended - began) / (os.cpu_count() or 1)
        print(json.dumps({KEY: rates, "cores_busy": share}), flush=True)


def busy_s() -> float:
    """Seconds that the machine's cores have worked, as /proc/stat counts them."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def read_rates(printed: str) -> dict[str, Any]:
    """What a peer printed with `print_rates`."""
    (line,) = (line for line in printed.splitlines() if line.startswith(f'{{"{KEY}"'))
    return dict(json.loads(line))
