"""What a run says of itself while it goes on: a line for people, one for programs, curves for TensorBoard."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.tensorboard import SummaryWriter

LOG_FILE = "log.jsonl"

Batch = TypeVar("Batch")


class RunLog:
    """The log of the run in `folder`, written by the first process alone."""

    def __init__(self, folder: Path, rank: int):
        self._file = folder / LOG_FILE
        self._board = None if rank else SummaryWriter(str(folder / "tensorboard"))

    def write(self, event: str, **values: Any) -> None:
        """One line on standard error, the same as JSON in log.jsonl; of an event with an `epoch`, the numbers (floats)
        to TensorBoard."""
        if self._board is None:
            return
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        print(f"{event}:", *(f"{key}={value}" for key, value in shown.items()), file=sys.stderr, flush=True)
        with self._file.open("a") as file:
            file.write(json.dumps({"time": time.time(), "event": event, **values}) + "\n")
        if "epoch" in values:
            for key, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{event}/{key}", value, values["epoch"])
            self._board.flush()


class LoaderClock:
    """How long an epoch's steps waited for their batches, and how long they took."""

    def __init__(self) -> None:
        self._waited_s = self._trained_s = 0.0

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, timed."""
        ready = time.monotonic()
        for batch in batches:
            start = time.monotonic()
            self._waited_s += start - ready
            yield batch
            ready = time.monotonic()
            self._trained_s += ready - start

    def throughput(self, images: int) -> dict[str, float]:
        """Images a second, and the share of the time that was spent waiting."""
        total = self._waited_s + self._trained_s
        return {"images_per_s": images / total, "waiting_share": self._waited_s / total}
