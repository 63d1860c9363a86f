"""Show every finished row on a progress bar, as JSON lines, or in Prometheus metrics. Observers change no row."""

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from patchscan.common.console import ProgressReport, write_line
from patchscan.common.errors import UserError
from patchscan.scanning.rows import Row

PROGRESS_INTERVAL_S = 10.0


class Observer:
    """Called for each finished row, in the order of completion, from one thread. A class that inherits from it has only
    the methods that it needs."""

    def row(self, row: Row, fetched_bytes: int) -> None:
        """Note a finished object, for which `fetched_bytes` were read."""

    def resumed(self, count: int) -> None:
        """Note `count` objects that an earlier run of the same scan has finished."""


class BarObserver(Observer):
    """Advance a progress bar, or the plain lines that replace it in a log."""

    def __init__(self, progress: ProgressReport):
        self.progress = progress
        self.bytes = self.without_score = 0

    def row(self, row: Row, fetched_bytes: int) -> None:
        self.bytes += fetched_bytes
        self.without_score += row["status"] != "scored"
        self.progress.advance(1, f"{self.bytes / 1e6:,.0f} MB, {self.without_score:,} without a score")

    def resumed(self, count: int) -> None:
        """Count them as progress, but not as this run's speed."""
        self.progress.resume(count)


class EventObserver(Observer):
    """Write one JSON object a line: `flagged` for each image whose verdict is `ai`, `failed` for each failed object,
    and `progress` every ten seconds."""

    def __init__(self, stream: TextIO, scan: str, total: int):
        self.stream, self.scan, self.total = stream, scan, total
        self.counts = {"scored": 0, "rejected": 0, "failed": 0}
        self.bytes = 0
        self._started = self._last = time.monotonic()

    def row(self, row: Row, fetched_bytes: int) -> None:
        self.counts[row["status"]] += 1
        self.bytes += fetched_bytes
        if row.get("verdict") == "ai":
            self.emit("flagged", key=row["key"], version_id=row["version_id"], etag=row["etag"], p_ai=row["p_ai"])
        elif row["status"] == "failed":
            self.emit("failed", key=row["key"], code=row["error_code"], message=row["error_message"])
        if time.monotonic() - self._last >= PROGRESS_INTERVAL_S:
            self.progress()

    def resumed(self, count: int) -> None:
        """Take them off the total."""
        self.total -= count

    def progress(self) -> None:
        """Write a `progress` event."""
        self._last = time.monotonic()
        done, elapsed = sum(self.counts.values()), self._last - self._started
        rate = done / elapsed if elapsed else 0.0
        left = round((self.total - done) / rate) if rate else None
        rounded = round(rate, 2)
        self.emit("progress", done=done, of=self.total, **self.counts, bytes=self.bytes, per_s=rounded, left_s=left)

    def emit(self, event: str, **values: Any) -> None:
        """Write one event."""
        line = {"event": event, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), "scan": self.scan, **values}
        write_line(json.dumps(line), self.stream)


class RequestLimit(Observer):
    """Stop the work once the source was asked `most` times in this run, by what the store counts in `requests`."""

    def __init__(self, most: int, requests: Mapping[str, int], stop: Callable[[], None]):
        self.most, self.requests, self.stop = most, requests, stop

    def row(self, row: Row, fetched_bytes: int) -> None:
        if sum(self.requests.values()) >= self.most:
            self.stop()


class MetricsObserver(Observer):
    """Serve Prometheus metrics on `port`. Listens on all addresses, since the scraper is outside the pod, and shows no
    keys.

    Raises UserError where it cannot listen.
    """

    def __init__(self, port: int):
        from prometheus_client import Counter, Gauge, Histogram, start_http_server

        self._objects = Counter("patchscan_scan_objects", "Objects finished", ["status", "code"])
        self._verdicts = Counter("patchscan_scan_verdicts", "Images scored", ["verdict"])
        self._bytes = Counter("patchscan_scan_read_bytes", "Bytes of objects read")
        self._scores = Histogram("patchscan_scan_p_ai", "P(AI)", buckets=[tenth / 10 for tenth in range(1, 11)])
        self._last = Gauge("patchscan_scan_last_row_timestamp_seconds", "When an object was last finished")
        try:
            start_http_server(port)
        except OSError as error:
            raise UserError(f"cannot listen on --metrics-port {port} ({error.strerror}): choose another") from error

    def row(self, row: Row, fetched_bytes: int) -> None:
        self._objects.labels(row["status"], row.get("error_code") or "").inc()
        self._bytes.inc(fetched_bytes)
        self._last.set_to_current_time()
        if row["status"] == "scored":
            self._verdicts.labels(row["verdict"]).inc()
            self._scores.observe(row["p_ai"])
