"""One shard: fetch, decode, score, and write its rows as one Parquet part, whole or not at all.

Each of many threads takes an object all the way; three throttles (flow.py) bound memory and the load on the server.
Rows done so far are kept as progress every half minute and when the scan is stopped, so that little is done twice.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from patchscan.common.errors import UserError
from patchscan.common.retries import Retries, StoppedError, TransientError, Watchdog
from patchscan.detector.answer import Answer
from patchscan.detector.card import NotFiniteError
from patchscan.detector.images import ErrorCode, ImageError, Limits, decoded_bytes
from patchscan.detector.prepared import build_answer, prepare
from patchscan.scanning import rows, shards
from patchscan.scanning.flow import Batcher, ByteBudget, Window, map_in_threads
from patchscan.scanning.observers import Observer
from patchscan.scanning.plan import Plan, PlanError
from patchscan.scanning.provenance import provenance
from patchscan.scanning.rows import STATS_KEY, Row
from patchscan.scanning.scorers import RefusedRequestError, Scorer, ScorerError, Select
from patchscan.storage.store import FailureCode, FetchedObject, ObjectError, ObjectInfo, Store

Meter = dict[str, float]

# Images in one request of crops. A GPU takes them in one pass; on cores each is its own pass, and small requests spread
# evenly over the server's workers.
BATCH = {"cuda": 8}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkSettings:
    """How a worker works; none of it changes a row. Sizes in bytes, times in seconds; `batch` counts images. Who cuts
    the crops (`select`) and how many images a request holds (`batch`) depends on the scorer where it is None.

    Encoded images held at once take up to `memory`, pixels being decoded up to twice that.
    """

    select: Select | None = None
    threads: int = 32
    in_flight: int = 32
    batch: int | None = None
    memory: int = 256 * 2**20
    deadline_s: float = 180.0
    outage_s: float = 180.0
    keep_every_s: float = 30.0
    drain_s: float = 15.0
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Done:
    """A finished object: its row and the bytes fetched for it."""

    row: Row
    fetched_bytes: int


class Worker:
    """Works shards of one plan, one after the other."""

    def __init__(
        self,
        plan: Plan,
        out: Store,
        scorer: Scorer,
        settings: WorkSettings = WorkSettings(),
        stop: threading.Event | None = None,
        observers: Sequence[Observer] = (),
    ):
        if scorer.card.digest != plan.digest:
            raise ScorerError(f"the plan was made for another version of {plan.model} than the scorer has; plan again")
        self.plan, self.out, self.scorer, self.settings, self.observers = plan, out, scorer, settings, observers
        self.stop = stop or threading.Event()
        self.source = plan.source.open(settings.threads)
        self._model = {"model": plan.model, "version": plan.version, "digest": plan.digest}
        self._retries = Retries(settings.deadline_s, stop=self.stop)
        self._watchdog = Watchdog(settings.outage_s)
        self._budget = ByteBudget(settings.memory)
        self._pixels = ByteBudget(2 * settings.memory)
        in_flight = min(settings.in_flight, scorer.parallel)
        self._select = settings.select or scorer.select
        if self._select == "worker":
            batch = settings.batch or BATCH.get(scorer.device, 1)
            in_flight = max(1, min(in_flight, settings.threads // batch))
            self._batcher = Batcher(self._logits, in_flight, batch)
        self._window = Window(start=in_flight // 2, largest=in_flight)

    def work(self, index: int) -> None:
        """Write the part of shard `index` unless it is there.

        Raises StoppedError after `stop` was set, and what ends a scan (OutageError, ScorerError, StoreError); what is
        done is kept as progress then.
        """
        folder = f"scans/{self.plan.scan}"
        part, progress = (
            f"{folder}/rows/part-{shards.name(index)}.parquet",
            f"{folder}/progress/{shards.name(index)}.parquet",
        )
        finished = self.out.read(part)
        if finished is not None:
            self._tell_kept(rows.from_parquet(finished).num_rows)
            return
        objects = self.objects(index)
        shard = Shard(self.out.read(progress), self._meter)
        self._tell_kept(len(shard.done))
        todo = [info for info in objects if info.key not in shard.done]
        try:
            for done in map_in_threads(self._one_row, todo, self.settings.threads, self.stop, self.settings.drain_s):
                shard.done[done.row["key"]] = done.row
                for observer in self.observers:
                    observer.row(done.row, done.fetched_bytes)
                if shard.kept_ago() > self.settings.keep_every_s:
                    self.out.write(progress, shard.parquet())
        except (StoppedError, UserError):
            self.out.write(progress, shard.parquet())
            raise
        self.out.write_new(part, shard.parquet())
        self.out.delete(progress)

    def _tell_kept(self, count: int) -> None:
        for observer in self.observers:
            observer.kept(count)

    def objects(self, index: int) -> list[ObjectInfo]:
        """The objects of a shard. Raises PlanError where the plan has no such shard."""
        data = self.out.read(f"scans/{self.plan.scan}/shards/{shards.name(index)}.parquet")
        if data is None:
            raise PlanError(f"there is no shard {index}: the plan has {self.plan.shards} shards, from 0")
        return [ObjectInfo(**row) for row in rows.from_parquet(data).to_pylist()]

    def _one(self, info: ObjectInfo) -> Done:
        """One object to its row, whatever happens to it."""
        limit = self.settings.limits.max_bytes
        if info.size is not None and info.size > limit:
            message = f"{info.size:,} bytes; the limit is {limit:,}"
            return Done(rows.rejected(info, ErrorCode.TOO_LARGE, message, 0) | self._model, 0)
        with self._budget.hold(limit if info.size is None else info.size):
            try:
                fetched, tries = self._retries.call(lambda: self.source.fetch(info, limit))
            except (ObjectError, TransientError) as error:
                return Done(self._failed(info, error), 0)
            return Done(self._scored(_as_fetched(info, fetched), fetched.data, tries), len(fetched.data))

    def _one_row(self, info: ObjectInfo) -> Done:
        """`_one`, where even an error of our own is the row of this object and not the end of its shard."""
        try:
            return self._one(info)
        except (StoppedError, UserError):
            raise
        except Exception as error:
            log.exception("an error of patchscan's own at %s", info.key)
            row = rows.failed(info, FailureCode.INTERNAL_ERROR, f"{type(error).__name__}, see the log", 1)
            return Done(row | self._model, 0)

    def _scored(self, info: ObjectInfo, data: bytes, tries: int) -> Row:
        try:
            result, more = self._retries.call(lambda: self._answer(data))
        except ImageError as error:
            row = rows.rejected(info, error.code, error.message, tries) | self._model
        except (NotFiniteError, RefusedRequestError, TransientError) as error:
            return self._failed(info, error)
        else:
            row = rows.scored(info, result, provenance(data, result.image["format"]), tries + more - 1)
        self._watchdog.success()
        return row

    def _answer(self, data: bytes) -> Answer:
        if self._select == "server":
            with self._window.request():
                return self.scorer.answer(data)
        card = self.scorer.card
        with self._pixels.hold(decoded_bytes(data, self.settings.limits)):
            prepared = prepare(data, card, self.settings.limits)
        return build_answer(prepared, self._batcher.logit(prepared.crops.pixels), card)

    def _logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        with self._window.request():
            return self.scorer.logits(crops)

    def _failed(
        self, info: ObjectInfo, error: ObjectError | NotFiniteError | RefusedRequestError | TransientError
    ) -> Row:
        if isinstance(error, ObjectError):
            return rows.failed(info, error.code, error.message, 1) | self._model
        if isinstance(error, NotFiniteError):
            return rows.failed(info, FailureCode.NOT_FINITE, str(error), 1) | self._model
        if isinstance(error, RefusedRequestError):
            return rows.failed(info, FailureCode.SERVER_LIMIT, str(error), 1) | self._model
        self._watchdog.check(error)
        return rows.failed(info, FailureCode.UNAVAILABLE, str(error), error.attempts) | self._model

    def _meter(self) -> Meter:
        """What this worker has used so far."""
        return (
            {
                "wall_s": time.monotonic(),
                "cpu_s": time.process_time(),
                "bytes_read": float(self.source.bytes_read),
            }
            | {f"requests.{name}": float(count) for name, count in self.source.requests.items()}
            | {f"model_s.{device}": seconds for device, seconds in dict(self.scorer.model_s).items()}
        )


class Shard:
    """The rows of one shard so far, by key, and what they cost, earlier tries at the shard included."""

    def __init__(self, kept: bytes | None, meter: Callable[[], Meter]):
        self.done: dict[str, Row] = {}
        self._spent: Meter = {}
        if kept is not None:
            table = rows.from_parquet(kept)
            self.done = {row["key"]: row for row in table.to_pylist()}
            self._spent = json.loads(table.schema.metadata[STATS_KEY])
        self._meter, self._start = meter, meter()
        self._written_at = time.monotonic()

    def kept_ago(self) -> float:
        """Seconds since the rows were last written down."""
        return time.monotonic() - self._written_at

    def parquet(self) -> bytes:
        """The rows and their cost, to write down."""
        self._written_at = time.monotonic()
        now = self._meter()
        spent = {
            name: self._spent.get(name, 0.0) + now.get(name, 0.0) - self._start.get(name, 0.0)
            for name in self._spent.keys() | now.keys()
        }
        return rows.to_parquet(list(self.done.values()), metadata={STATS_KEY: json.dumps(spent).encode()})


def _as_fetched(info: ObjectInfo, fetched: FetchedObject) -> ObjectInfo:
    """The listing's line completed by what the fetch told."""
    return replace(
        info,
        size=fetched.size if info.size is None else info.size,
        etag=fetched.etag,
        version_id=fetched.version_id or info.version_id,
        last_modified=info.last_modified or fetched.last_modified,
    )
