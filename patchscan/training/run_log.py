"""Log a run's progress to standard error, to a JSON Lines file and to TensorBoard."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.tensorboard import SummaryWriter

from patchscan.common.console import say

LOG_FILE = "log.jsonl"

Batch = TypeVar("Batch")


class RunLog:
    """The log of the run in `folder`; only the process of rank 0 writes it."""

    def __init__(self, folder: Path, rank: int):
        self._file = folder / LOG_FILE
        self._tensorboard: SummaryWriter | None = None
        if rank == 0:
            is_new = not (folder / "tensorboard").exists()
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
            # Of a run in a bucket, the process that goes on has the log of those before it, but not their curves.
            for values in self._logged() if is_new else []:
                self._draw(**values)

    def is_done(self) -> bool:
        """Whether the process that wrote log.jsonl last has ended with the event `done`."""
        text = self._text()
        return text.rfind('"event": "done"') > text.rfind('"event": "start"')

    def write(self, event: str, **values: Any) -> None:
        """Write one line to standard error and one to log.jsonl; for an event with an `epoch`, also write its floats to
        TensorBoard."""
        if self._tensorboard is None:
            return
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        line = " ".join([f"{event}:", *(f"{key}={value}" for key, value in shown.items())])
        say(line, error=True)
        logged = {"time": time.time(), "event": event, **values}
        with self._file.open("a") as file:
            file.write(json.dumps(logged) + "\n")
        self._draw(**logged)

    def _text(self) -> str:
        return self._file.read_text() if self._file.exists() else ""

    def _logged(self) -> Iterator[dict[str, Any]]:
        """The events of earlier processes, without a line that was cut off."""
        for line in self._text().splitlines():
            with suppress(ValueError):
                yield json.loads(line)

    def _draw(self, time: float, event: str, epoch: int | None = None, **values: Any) -> None:
        """Add an event with an epoch to the curves of TensorBoard."""
        if self._tensorboard is None or epoch is None:
            return
        for key, value in values.items():
            if isinstance(value, float):
                self._tensorboard.add_scalar(f"{event}/{key}", value, epoch, time)
        self._tensorboard.flush()


class LoaderTimer:
    """Measures how long an epoch's steps waited for their batches, and how long the steps took."""

    def __init__(self) -> None:
        self._waited_s = self._trained_s = 0.0

    def iterate(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, measuring the time to load each and the time until the next is asked for."""
        ready = time.monotonic()
        for batch in batches:
            start = time.monotonic()
            self._waited_s += start - ready
            yield batch
            ready = time.monotonic()
            self._trained_s += ready - start

    def throughput(self, images: int) -> dict[str, float]:
        """Return images per second, and the share of the time that was spent waiting for batches."""
        total = self._waited_s + self._trained_s
        return {"images_per_s": images / total, "waiting_share": self._waited_s / total}
