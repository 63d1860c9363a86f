"""Work on one shard: fetch, decode and score its objects, and write their rows as one Parquet part.

Each thread takes one object through all steps; flow.py limits the memory and the load on the server. Finished rows are
saved as progress every half minute and when the scan is stopped, so that little is done twice.
"""

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeVar

import numpy as np
from PIL import Image

from patchscan.common.console import printable
from patchscan.common.errors import UserError
from patchscan.common.retries import Retries, StoppedError, TransientError, Watchdog
from patchscan.dataset.content_encoding import unpacked
from patchscan.detector.answer import MAX_CROPS, Answer
from patchscan.detector.card import NotFiniteError
from patchscan.detector.decoders import decoder_pool
from patchscan.detector.images import ErrorCode, ImageError, Limits, encode
from patchscan.detector.prepared import build_answer
from patchscan.scanning import rows, shards
from patchscan.scanning.flow import Batcher, ByteBudget, Window, map_in_threads
from patchscan.scanning.observers import Observer
from patchscan.scanning.plan import Plan, PlanError
from patchscan.scanning.provenance import provenance
from patchscan.scanning.rows import STATS_KEY, Row
from patchscan.scanning.scorers import RefusedRequestError, Scorer, ScorerError, Select
from patchscan.scanning.trust import trust_digest
from patchscan.storage.fetching import Fetcher
from patchscan.storage.store import FailureCode, FetchedObject, NotAFileError, ObjectError, ObjectInfo, Store

Usage = dict[str, float]
Identity = tuple[str, str | None]
Result = TypeVar("Result")

# Images in one request of crops, by device (cpu: 1). A GPU scores a batch in one pass. On a CPU each image is a pass of
# its own, and small requests spread more evenly over the server's workers.
BATCH = {"cuda": 8}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkSettings:
    """Settings of a worker; none of them changes a row. Sizes are in bytes, times in seconds.

    `select` (where crops are cut) and `batch` (images in a request) None: by the scorer. `threads` objects are
    processed at once, with at most `in_flight` requests; objects take up to `memory`, the contents of those that are
    stored packed (Content-Encoding) as much again, decoded pixels up to twice that. `deadline_s`: retries of one
    object. `outage_s`: the scan stops when nothing has succeeded for so long, and several objects have failed since.
    `save_every_s`: finished rows are saved. `drain_s`: how long a stopped worker waits for running objects.
    """

    select: Select | None = None
    threads: int = 32
    in_flight: int = 32
    batch: int | None = None
    memory: int = 256 * 2**20
    deadline_s: float = 180.0
    outage_s: float = 180.0
    save_every_s: float = 30.0
    drain_s: float = 15.0
    limits: Limits = field(default_factory=Limits)


class Worker:
    """Works on shards of one plan, one after the other. `observers` are told of each row; `objects_left` is how many
    objects it may still process (None: all). Raises ScorerError where the scorer has another model than the plan."""

    def __init__(
        self,
        plan: Plan,
        out: Store,
        scorer: Scorer,
        settings: WorkSettings = WorkSettings(),
        stop: threading.Event | None = None,
    ):
        if scorer.card.digest != plan.digest:
            raise ScorerError(f"the plan was made for another version of {plan.model} than the scorer has; plan again")
        self.plan, self.out, self.scorer, self.settings = plan, out, scorer, settings
        self.stop = stop or threading.Event()
        self.observers: Sequence[Observer] = ()
        self.objects_left: int | None = None
        self.source = plan.source.open(settings.threads)
        self._model = {"model": plan.model, "version": plan.version, "digest": plan.digest}
        self._c2pa_trust = trust_digest(plan.c2pa_trust)
        self._retries = Retries(settings.deadline_s, stop=self.stop)
        self._fetcher = Fetcher(self.source, settings.deadline_s, settings.outage_s, self.stop)
        self._scorer_watch = Watchdog(settings.outage_s)
        self._probing = Retries(settings.deadline_s / 3, stop=self.stop)
        self._budget = ByteBudget(settings.memory)
        self._unpacked_bytes = ByteBudget(settings.memory)
        self._pixels = ByteBudget(2 * settings.memory)
        in_flight = min(settings.in_flight, scorer.parallel)
        self._select = settings.select or scorer.select
        if self._select == "worker":
            batch = settings.batch or BATCH.get(scorer.device, 1)
            batch = max(1, min(batch, MAX_CROPS // scorer.card.preset.count))
            in_flight = max(1, min(in_flight, settings.threads // batch))
            self._batcher = Batcher(self._logits, in_flight, batch)
        self._window = Window(start=in_flight // 2, largest=in_flight)

    def work(self, index: int) -> None:
        """Write the part of shard `index`, unless it exists.

        Raises StoppedError after `stop` was set or where no objects are left to it, the errors that end a scan
        (OutageError, ScorerError, StoreError), and what an observer raises; finished rows are saved as progress before.
        """
        folder = f"scans/{self.plan.scan}"
        part = f"{folder}/rows/part-{shards.name(index)}.parquet"
        progress = f"{folder}/progress/{shards.name(index)}.parquet"
        finished = self.out.read(part)
        if finished is not None:
            self._notify_resumed(rows.from_parquet(finished).num_rows)
            return
        objects = self.objects(index)
        identity = self.plan.source.identity
        shard = Shard(self.out.read(progress), self._usage, identity)
        self._fetcher.readable = shard.readable() or self._fetcher.readable
        self._notify_resumed(len(shard.done))
        todo = [info for info in objects if identity(info.key, info.version_id) not in shard.done]
        # What failed comes last: a run of few objects (`objects_left`) would try nothing else.
        todo.sort(key=lambda info: identity(info.key, info.version_id) in shard.failed)
        try:
            for row, fetched_bytes in map_in_threads(
                self._process, todo[: self.objects_left], self.settings.threads, self.stop, self.settings.drain_s
            ):
                shard.add(row)
                for observer in self.observers:
                    observer.row(row, fetched_bytes)
                if shard.seconds_since_saved() > self.settings.save_every_s:
                    self.out.write(progress, shard.parquet())
            self._count_off(len(todo))
        except Exception:
            self.out.write(progress, shard.parquet())
            raise
        # Where conditional writes are ignored, another worker's part would be replaced.
        if self.plan.conditional_writes or self.out.read(part) is None:
            self.out.write_new(part, shard.parquet())
        self.out.delete(progress)

    def _count_off(self, objects: int) -> None:
        """Take the objects of a shard from `objects_left`. Raises StoppedError where they were more."""
        if self.objects_left is not None:
            self.objects_left -= objects
            if self.objects_left < 0:
                raise StoppedError

    def _notify_resumed(self, count: int) -> None:
        for observer in self.observers:
            observer.resumed(count)

    def objects(self, index: int) -> list[ObjectInfo]:
        """The objects of a shard. Raises PlanError where the plan has no such shard."""
        data = self.out.read(f"scans/{self.plan.scan}/shards/{shards.name(index)}.parquet")
        if data is None and index < self.plan.shards:
            raise PlanError(f"{self.plan.address(self.out)} was removed: another scan has taken its place; plan again")
        if data is None:
            raise PlanError(f"there is no shard {index}: the plan has {self.plan.shards} shards, from 0")
        return [ObjectInfo(**row) for row in rows.from_parquet(data).to_pylist()]

    def _process(self, info: ObjectInfo) -> tuple[Row, int]:
        """Fetch and score one object: its row, and the number of bytes fetched for it. What is wrong with the object,
        and even a bug of patchscan, becomes its row instead of ending its shard."""
        try:
            row, fetched_bytes = self._fetch_and_score(info)
        except (StoppedError, UserError):
            raise
        except Exception as error:  # noqa: BLE001  it is logged with its traceback
            trace = "\n".join(map(printable, traceback.format_exc().split("\n")))
            log.error("a bug of patchscan at %s\n%s", printable(info.key), trace)
            message = f"{type(error).__name__}, see the log"
            row, fetched_bytes = rows.without_score(info, FailureCode.INTERNAL_ERROR, message, 1), 0
        return self._model | row, fetched_bytes

    def _fetch_and_score(self, info: ObjectInfo) -> tuple[Row, int]:
        limit = self.settings.limits.max_bytes
        if info.size is not None and info.size > limit:
            message = f"{info.size:,} bytes; the limit is {limit:,}"
            return rows.without_score(info, ErrorCode.TOO_LARGE, message, 0), 0
        with self._budget.hold(limit if info.size is None else info.size):
            try:
                fetched, tries = self._fetcher.fetch(info, limit)
            except NotAFileError as error:
                return rows.without_score(info, ErrorCode.NOT_AN_IMAGE, error.message, 1), 0
            except ObjectError as error:
                return rows.without_score(info, error.code, error.message, 1), 0
            except TransientError as error:
                return rows.without_score(info, FailureCode.UNAVAILABLE, str(error), error.attempts), 0
            return self._score(self._as_fetched(info, fetched), fetched, tries), len(fetched.data)

    def _score(self, info: ObjectInfo, fetched: FetchedObject, tries: int) -> Row:
        try:
            with unpacked(fetched, self.settings.limits.max_bytes, self._unpacked_bytes.hold) as data:
                result, more = self._retries.call(self._prepared_request(data))
                claims = provenance(data, result.image["format"], self.plan.c2pa_trust)
                return rows.scored(info, result, claims, tries + more - 1, self._c2pa_trust)
        except ImageError as error:
            return rows.without_score(info, error.code, error.message, tries)
        except NotFiniteError as error:
            return rows.without_score(info, FailureCode.NOT_FINITE, str(error), tries)
        except RefusedRequestError as error:
            return rows.without_score(info, FailureCode.SERVER_LIMIT, str(error), tries)
        except TransientError as error:
            failing = (info.key, info.version_id)
            self._scorer_watch.raise_in_outage(failing, error, self._score_blank, self._probing)
            return rows.without_score(info, FailureCode.UNAVAILABLE, str(error), tries + error.attempts - 1)

    def _prepared_request(self, data: bytes) -> Callable[[], Answer]:
        """Return a function that asks the scorer about an image; it may be called again after a TransientError. What
        needs no scorer, as decoding, is done here, once. Raises ImageError."""
        if self._select == "server":
            return lambda: self._ask(lambda: self.scorer.answer(data))
        card = self.scorer.card
        prepared = decoder_pool().prepare(data, card.preset, self.settings.limits, self._pixels.hold)
        # `engine` is read after the logit, with which it may change.
        return lambda: build_answer(prepared, self._batcher.logit(prepared.crops.pixels), card, self.scorer.engine)

    def _logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        return self._ask(lambda: self.scorer.logits(crops))

    def _ask(self, question: Callable[[], Result]) -> Result:
        with self._window.request():
            answer = question()
        self._scorer_watch.success()
        return answer

    def _score_blank(self) -> None:
        """Have the scorer answer for an image of one grey. Raises TransientError where it does not."""
        with suppress(ImageError, NotFiniteError, RefusedRequestError):  # these are answers too
            self._prepared_request(_blank_image())()

    def _as_fetched(self, info: ObjectInfo, fetched: FetchedObject) -> ObjectInfo:
        """The object as listed, completed with what the fetch returned."""
        # A manifest's object keeps the version that it was listed with, or none: it is a part of its identity.
        version = None if self.plan.source.manifest else fetched.version_id
        return replace(
            info,
            size=fetched.size if info.size is None else info.size,
            etag=fetched.etag or info.etag,
            version_id=info.version_id or version,
            last_modified=info.last_modified or fetched.last_modified,
        )

    def _usage(self) -> Usage:
        """What this worker has used so far: seconds, bytes and requests, by name."""
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
    """The finished rows of one shard, by their objects' identity, and what they cost, earlier runs of the shard
    included. `saved` is the progress file of an earlier run, or None; what `failed` then is tried again."""

    def __init__(
        self, saved: bytes | None, usage: Callable[[], Usage], identity: Callable[[str, str | None], Identity]
    ):
        self.done: dict[Identity, Row] = {}
        self.failed: dict[Identity, Row] = {}
        self._identity = identity
        self._spent: Usage = {}
        if saved is not None:
            table = rows.from_parquet(saved)
            for row in table.to_pylist():
                if row["status"] == "failed":
                    self.failed[identity(row["key"], row["version_id"])] = row
                else:
                    self.add(row)
            self._spent = json.loads(table.schema.metadata[STATS_KEY])
        self._usage, self._start = usage, usage()
        self._saved_at = time.monotonic()

    def add(self, row: Row) -> None:
        """Add a finished row."""
        self.done[self._identity(row["key"], row["version_id"])] = row

    def readable(self) -> ObjectInfo | None:
        """An object that an earlier run could read, or None."""
        scored = (row for row in self.done.values() if row["status"] == "scored")
        identities = (self._identity(row["key"], row["version_id"]) for row in scored)
        return next((ObjectInfo(key=key, version_id=version) for key, version in identities), None)

    def seconds_since_saved(self) -> float:
        """Seconds since `parquet` was last called."""
        return time.monotonic() - self._saved_at

    def parquet(self) -> bytes:
        """Return the rows and their cost as a Parquet file, to be saved; what failed earlier and was not tried again
        yet is among them."""
        self._saved_at = time.monotonic()
        now = self._usage()
        spent = {
            name: self._spent.get(name, 0.0) + now.get(name, 0.0) - self._start.get(name, 0.0)
            for name in self._spent.keys() | now.keys()
        }
        found = {**self.failed, **self.done}
        return rows.to_parquet(list(found.values()), metadata={STATS_KEY: json.dumps(spent).encode()})


@cache
def _blank_image() -> bytes:
    """A grey image as PNG."""
    return encode(Image.new("RGB", (256, 256), "grey"), "PNG")
