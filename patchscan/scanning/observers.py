"""Who hears of every finished row: a bar, JSON lines, Prometheus metrics. None of them changes a row."""

import json
import time
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from patchscan.common.console import ProgressReport
from patchscan.common.errors import UserError
from patchscan.scanning.rows import Row

PROGRESS_INTERVAL_S = 10.0


class Observer(Protocol):
    """Is told of each row when it is done, in the order of completion, from one thread."""

    def row(self, row: Row, fetched_bytes: int) -> None:
        """One object is done; `fetched_bytes` were read for it."""

    def kept(self, count: int) -> None:
        """So many objects were done before, by an earlier try at the same scan."""


class Bar:
    """A progress report's bar or plain lines."""

    def __init__(self, progress: ProgressReport):
        self.progress = progress
        self.bytes = self.without_score = 0

    def row(self, row: Row, fetched_bytes: int) -> None:
        """One object more."""
        self.bytes += fetched_bytes
        self.without_score += row["status"] != "scored"
        self.progress.advance(1, f"{self.bytes / 1e6:,.0f} MB, {self.without_score:,} without a score")

    def kept(self, count: int) -> None:
        """They count as progress."""
        self.progress.advance(count)


class EventStream:
    """One JSON object a line: `flagged` for each image whose verdict is `ai`, `failed` for each failed object, and
    `progress` every ten seconds."""

    def __init__(self, stream: TextIO, scan: str, total: int):
        self.stream, self.scan, self.total = stream, scan, total
        self.counts = {"scored": 0, "rejected": 0, "failed": 0}
        self.bytes = 0
        self._began = self._last = time.monotonic()

    def row(self, row: Row, fetched_bytes: int) -> None:
        """One object more."""
        self.counts[row["status"]] += 1
        self.bytes += fetched_bytes
        if row.get("verdict") == "ai":
            self.emit("flagged", key=row["key"], etag=row["etag"], p_ai=row["p_ai"])
        elif row["status"] == "failed":
            self.emit("failed", key=row["key"], code=row["error_code"], message=row["error_message"])
        if time.monotonic() - self._last >= PROGRESS_INTERVAL_S:
            self.progress()

    def kept(self, count: int) -> None:
        """They are not left to do."""
        self.total -= count

    def progress(self) -> None:
        """How far it is."""
        self._last = time.monotonic()
        done, elapsed = sum(self.counts.values()), self._last - self._began
        rate = done / elapsed if elapsed else 0.0
        left = round((self.total - done) / rate) if rate else None
        rounded = round(rate, 2)
        self.emit("progress", done=done, of=self.total, **self.counts, bytes=self.bytes, per_s=rounded, left_s=left)

    def emit(self, event: str, **values: Any) -> None:
        """Write one event."""
        line = {"event": event, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), "scan": self.scan, **values}
        print(json.dumps(line), file=self.stream, flush=True)


class Metrics:
    """Prometheus metrics on `port` of all addresses (a scraper comes from outside the pod): no keys, no names."""

    def __init__(self, port: int):
        self._objects = Counter("patchscan_scan_objects", "Objects finished", ["status", "code"])
        self._verdicts = Counter("patchscan_scan_verdicts", "Images scored", ["verdict"])
        self._bytes = Counter("patchscan_scan_read_bytes", "Bytes of objects read")
        self._scores = Histogram("patchscan_scan_p_ai", "P(AI)", buckets=[tenth / 10 for tenth in range(1, 11)])
        self._last = Gauge("patchscan_scan_last_row_timestamp_seconds", "When an object was last finished")
        try:
            start_http_server(port)
        except OSError as error:
            raise UserError(f"--metrics-port {port} is not to be had ({error.strerror}): choose another") from error

    def row(self, row: Row, fetched_bytes: int) -> None:
        """One object more."""
        self._objects.labels(row["status"], row.get("error_code") or "").inc()
        self._bytes.inc(fetched_bytes)
        self._last.set_to_current_time()
        if row["status"] == "scored":
            self._verdicts.labels(row["verdict"]).inc()
            self._scores.observe(row["p_ai"])

    def kept(self, count: int) -> None:
        """Were counted when they were done."""
