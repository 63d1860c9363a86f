"""What a scan promises, checked in thousands of schedules of real planners, workers and reducers over a simulated S3.

    python -m tests.protocol --schedules 1000000          with progress; exit code 1 where a promise was broken
    python -m tests.protocol --replay 4711                one schedule again, made simpler, with all that happens in it

The promises, by the names under which a broken one is reported:

    one-row      a finished scan's table has one row for each object that its planner listed, and no other
    adds-up      listed = scored + rejected + failed + unchanged, and each number is that of the table's rows
    last         _SUCCESS is written when everything else of the scan is there, and no row comes after it
    unchanging   a part, once written, is never written otherwise and never removed
    carried      what is unchanged since the last finished scan keeps its row, and is not fetched
    true-score   a score belongs to the bytes that the row's ETag names: what has changed is scored again
    resumed      killed or stopped anywhere and run again, a scan ends, with the rows of one that ran undisturbed
    one-plan     planners that run at once work on one plan; an entry of the history never changes, and its plan exists
    honest       what is not finished is not told as finished, and no command ends in a bug or blames the user
    outage       while the source or the scorer is down, a worker ends instead of writing rows that say so

In each schedule up to four commands (scan, scan-plan, scan-worker, scan-reduce, report) run at once or one after the
other. At any call to the store a process may be killed, hand over to another one, get an error or lose a reply; objects
are replaced, removed and added, and source and scorer go down and come back. Some stores ignore conditional writes,
have listings without ETags, or do not list the newest keys. At the end all is calm, and one command puts it right.

Real are plan_scan, Worker and reduce with what they call, and the store's Bucket; simulated are S3, the time and the
scorer. A worker takes one object after the other, answers of DuckDB and Parquet are remembered (tests/remembered.py),
and the report's pictures and statistics are left out.
"""

import argparse
import gc
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from itertools import pairwise
from threading import Event
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from zlib import crc32

from botocore.exceptions import ClientError
from pydantic_core import from_json, to_json

from patchscan.common import retries
from patchscan.common.console import ProgressReport
from patchscan.common.retries import OutageError, Retries, StoppedError, TransientError
from patchscan.detector.answer import Answer
from patchscan.detector.card import Card
from patchscan.detector.images import ErrorCode, ImageError
from patchscan.scanning import history, listing, plan, planning, report, rows, summary, table, worker
from patchscan.scanning.history import ClaimLostError, last_complete
from patchscan.scanning.plan import Plan, ScanSource
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.scorers import Select
from patchscan.scanning.table import IncompleteScanError
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage.store import ObjectInfo
from tests.remembered import (
    EMPTY_TABLE,
    Database,
    LazyDatabase,
    MemoryFile,
    RememberedFooter,
    RememberedJoin,
    RememberedRows,
    RememberedTable,
    Rows,
    forget,
    remember,
    rows_of,
    table_to_parquet,
)
from tests.scan_kit import StubScorer, card
from tests.simulation import (
    Choices,
    Killed,
    Process,
    SimulatedBucket,
    SimulatedS3,
    Simulation,
    Stored,
    Weather,
    failure,
)

PHOTOS, RESULTS = "s3://photos", "s3://results"
SETTINGS = WorkSettings(select="server", threads=1, deadline_s=2.0, outage_s=1.5, save_every_s=0.4)
# Objects of one shard that fail in an outage before the worker must suspect one (Watchdog).
SUSPICIOUS = 3
CONDITION_CODES = {"changed", "vanished", "unavailable"}
CARDS = {version: card(version) for version in "12"}
A_TIME = datetime(2026, 1, 1, tzinfo=UTC)


class BrokenError(Exception):
    """A promise was broken."""

    def __init__(self, promise: str, why: str):
        super().__init__(f"{promise}: {why}")
        self.promise = promise


class Scorer(StubScorer):
    """Scores bytes by their checksum; what does not begin with `photo` is no image."""

    select: Select = "server"

    def __init__(self, schedule: "Schedule", version: str):
        super().__init__(CARDS[version], parallel=1)
        self.schedule = schedule

    def answer(self, data: bytes) -> Answer:
        self.schedule.simulation.step()
        if self.schedule.down == "scorer":
            raise TransientError("the scorer answers 503")
        if data.startswith(b"text"):
            raise ImageError(ErrorCode.NOT_AN_IMAGE, "it is text")
        p_ai = score(data)
        return Answer(
            p_ai=p_ai,
            logit=p_ai,
            verdict="ai" if p_ai > 0.5 else "real",
            reason=None,
            tier="native",
            jpeg_quality=None,
            watermark="none",
            patch={"x": 0, "y": 0, "size": 32, "complexity": 1},
            image={"width": 32, "height": 32, "format": "PNG", "frames": 1},
            model=self.card.name,
            version=self.card.version,
            digest=self.card.digest,
            engine="torch",
        )


def score(data: bytes) -> float:
    """The score of these bytes."""
    return crc32(data) / 2**32


@dataclass
class Listing:
    """What a planner listed, and the number of the call at which it began."""

    objects: dict[str, ObjectInfo]
    at: int


class Schedule:
    """One schedule: the stores, the commands, and what must be true about them."""

    def __init__(self, seed: int, recorded: Sequence[int] | None = None):
        self.choices = choices = Choices(seed, recorded)
        self.weather = Weather(
            kill=(0.0, 0.0, 0.01, 0.04)[choices.pick(4)],
            error=(0.0, 0.0, 0.02, 0.1)[choices.pick(4)],
            switch=(0.3, 0.05, 0.7)[choices.pick(3)],
            call_s=(0.05, 0.6)[choices.pick(2)],
        )
        self.errors = self.weather.error > 0
        self.simulation = Simulation(choices, self.weather)
        self.events = (0.0, 0.0, 0.02, 0.05)[choices.pick(4)]
        self.simulation.between = self._events if self.events else None
        self.results = SimulatedS3(
            self.simulation, honours=not choices.chance(0.15), stale_s=3.0 if choices.chance(0.1) else 0.0
        )
        self.results.written, self.results.deleted = self._written, self._deleted
        self.out = SimulatedBucket(RESULTS, self.results)
        self.photos = SimulatedS3(self.simulation, page=2, listed_etags=not choices.chance(0.1))
        self.photos.refusal = self._refusal
        self.shards = (2, 4)[choices.pick(2)]
        self.down = "scorer" if choices.chance(0.1) else None
        self.down_since, self.was_down = 0, self.down is not None
        # What was true of each key, from which call on: the ETag, or None where there is no such object.
        self.past: dict[str, list[tuple[int, str | None]]] = defaultdict(list)
        self.contents: dict[str, bytes] = {}
        self.plans: list[Plan] = []
        self.listings: dict[str, Listing] = {}
        self.carried: dict[str, set[str]] = {}
        self.history: dict[str, str] = {}  # The scan that each entry names.
        self.finished: dict[str, int] = {}  # and at which call
        self.sources: dict[Process, SimulatedBucket] = {}
        # The call at which a process began to work on shards, and to write the report.
        self.began: dict[Process, int] = {}
        self.reducing: dict[Process, int] = {}
        self.fetched: Counter[str] = Counter()
        self.broken: BrokenError | None = None
        self._names = iter(range(10_000))
        for key in ("photo a", "photo b", "text c", "photo d", "photo e")[: 3 + choices.pick(3)]:
            self._put_photo(key, 1)
        if choices.chance(0.15):
            self._put_photo("photo f", 1, "GLACIER")
        if choices.chance(0.1):
            self._put_photo("private g", 1)

    # The world

    def _put_photo(self, key: str, version: int, storage_class: str = "STANDARD") -> None:
        data = f"{key} {version}".encode()
        stored = Stored(data, f"{crc32(data):08x}", storage_class)
        self.photos.objects[key] = stored
        self.contents[stored.etag] = data
        self.past[key].append((self.simulation.calls, stored.etag))

    def _events(self, process: Process) -> None:
        if not self.choices.chance(self.events):
            return
        what = self.choices.pick(6)
        if what == 0 and process.stop is not None:
            self.simulation.tell("SIGTERM", process)
            process.stop.set()
        elif what in (1, 2):
            self.down = None if self.down else ("source", "scorer")[what - 1]
            self.down_since, self.was_down = self.simulation.calls, True
            self.simulation.tell(f"{self.down} goes down" if self.down else "all are up again")
        else:
            keys = sorted(self.past)
            key = keys[self.choices.pick(len(keys))]
            if what == 3 and key in self.photos.objects:
                del self.photos.objects[key]
                self.past[key].append((self.simulation.calls, None))
                self.simulation.tell(f"{key} is removed")
            else:
                version = 1 + self.choices.pick(2)
                self._put_photo(key, version)
                self.simulation.tell(f"{key} is now version {version}")

    def _refusal(self, key: str) -> ClientError | None:
        process = self.simulation.current
        assert process is not None
        scan = getattr(process, "scan", None)
        if scan and key in self.carried[scan]:
            self._breach("carried", f"{key} is fetched, though scan {scan} has carried it over")
        self.fetched[key] += 1
        if self.down == "source":
            return failure(503, "SlowDown", "GetObject")
        if key.startswith("private"):
            return failure(403, "AccessDenied", "GetObject")
        return None

    def open_store(self, url: str, **_: Any) -> SimulatedBucket:
        """The store of an address, for the current process."""
        if url == RESULTS:
            return self.out
        assert self.simulation.current is not None
        self.sources[self.simulation.current] = bucket = SimulatedBucket(url, self.photos)
        return bucket

    # The commands, as in patchscan/scanning/commands.py

    def plan(self, process: Process, version: str = "1") -> Plan:
        """`scan-plan`."""
        made = plan_scan(
            ScanRequest(source=ScanSource(url=PHOTOS), card=CARDS[version], shard_objects=self.shards), self.out
        )
        self._check(self._history().count(made.scan) == 1 or not self.results.honours, "one-plan", "not in the history")
        self.plans.append(made)
        return made

    def work(self, process: Process, plan: Plan, indexes: Sequence[int]) -> None:
        """`scan-worker`."""
        process.scan = plan.scan  # type: ignore[attr-defined]
        self.began[process] = self.simulation.calls
        one = Worker(plan, self.out, Scorer(self, plan.version), SETTINGS, process.stop)
        for index in indexes:
            one.work(index)
            part = f"scans/{plan.scan}/rows/part-{index:05d}.parquet"
            self._check(part in self.results.objects, "honest", "{} is told as done", part)
        if process.stop.is_set():
            raise StoppedError

    def reduce(self, process: Process, plan: Plan) -> Plan:
        """`scan-reduce`."""
        self.reducing[process] = self.simulation.calls
        report.reduce(self.out, plan)
        success = f"scans/{plan.scan}/_SUCCESS"
        self._check(success in self.results.objects, "honest", "{} is told as finished", plan.scan)
        return plan

    def scan(self, process: Process, version: str = "1") -> Plan:
        """`scan`."""
        made = self.plan(process, version)
        self.work(process, made, range(made.shards))
        return self.reduce(process, made)

    def report(self, process: Process) -> Plan | None:
        """`report`."""
        newest = last_complete(self.out)
        return self.reduce(process, newest) if newest else None

    # One schedule

    def run(self) -> None:
        """Run the schedule. Raises BrokenError."""
        random.seed(self.choices.seed)
        for number in range(1 + self.choices.pick(4)):
            self._start(number)
            if self.choices.chance(0.5):
                self._run_all()
                self._remove_old_scans()
        self._run_all()
        self._calm_down()

    def _start(self, number: int) -> None:
        kind = ("scan", "scan", "plan", "work", "reduce", "report")[self.choices.pick(6)]
        known = self.plans[self.choices.pick(len(self.plans))] if self.plans else None
        if kind in ("work", "reduce") and known is None:
            kind = "plan"
        name = f"{number} {kind}"
        if kind in ("scan", "plan"):
            version = "2" if self.choices.chance(0.1) else "1"
            command = self.scan if kind == "scan" else self.plan
            self.simulation.start(name, lambda process: command(process, version))
        elif kind == "report":
            self.simulation.start(name, self.report)
        elif kind == "work":
            assert known is not None
            index = self.choices.pick(max(1, known.shards))
            indexes = range(index, known.shards)
            self.simulation.start(name, lambda process: self.work(process, known, indexes))
        else:
            assert known is not None
            self.simulation.start(name, lambda process: self.reduce(process, known))

    def _run_all(self) -> None:
        processes = list(self.simulation.processes)
        self.simulation.run()
        if self.broken:
            raise self.broken
        for process in processes:
            self._check_outcome(process)

    def _check_outcome(self, process: Process) -> None:
        """What a command may end with: only the reasons that it really has."""
        outcome = process.outcome
        if not isinstance(outcome, BaseException):
            return
        self.simulation.tell(f"ends with {type(outcome).__name__}: {outcome}", process)
        expected = {
            Killed: process.killed,
            StoppedError: process.stop.is_set(),
            OutageError: self.errors or self.was_down,
            ClaimLostError: not self.results.honours or self.results.stale_s > 0,
            IncompleteScanError: process.name.endswith("reduce") or self.results.stale_s > 0,
        }
        if not expected.get(type(outcome)):
            raise BrokenError("honest", f"{process.name} ends with {type(outcome).__name__}: {outcome}") from outcome

    def _remove_old_scans(self) -> None:
        """A lifecycle rule removes what is older than the newest finished scan. It takes days, in which the store comes
        to list that scan, where it does not list the newest keys."""
        if self.events and self.finished and not self.results.stale_s and self.choices.chance(0.2):
            history = self._history()
            newest = max(history.index(scan) for scan in self.finished if scan in history)
            for scan in history[:newest]:
                self.simulation.tell(f"the folder of {scan} is removed")
                self.plans = [plan for plan in self.plans if plan.scan != scan]
                for name in [name for name in self.results.objects if name.startswith(f"scans/{scan}/")]:
                    del self.results.objects[name]

    def _calm_down(self) -> None:
        """Everything works again, and nothing changes any more: the same command finishes, and finds what is there."""
        self.simulation.tell("all is calm")
        self.weather.kill = self.weather.error = self.results.stale_s = 0.0
        self.simulation.between = None
        self.down, since = None, self.simulation.calls
        for _ in range(3):
            made = self._run_alone()
            if self.listings[made.scan].at >= since:
                break
        self._check(self.listings[made.scan].at >= since, "resumed", "three more runs do not scan what is there")
        found = {row["key"]: essence(row) for row in self.rows(made.scan)}
        expected = {key: self._expected(key, stored) for key, stored in self.photos.objects.items()}
        self._check(found == expected, "resumed", "the table is {}, and not {}", found, expected)
        if self.choices.chance(0.25):
            self._check_unchanged(made)
        elif self.plans[0].scan != made.scan and self.choices.chance(0.25):
            self.simulation.start("late reduce", lambda process: self.reduce(process, self.plans[0]))
            self._run_all()

    def _run_alone(self) -> Plan:
        process = self.simulation.start("calm scan", self.scan)
        self._run_all()
        if not isinstance(process.outcome, Plan):
            raise BrokenError("resumed", f"run again, the scan ends with {process.outcome!r}")
        return process.outcome

    def _check_unchanged(self, before: Plan) -> None:
        self.fetched.clear()
        made = self._run_alone()
        self._check(made.previous == before.scan, "carried", "it continues {}, not {}", made.previous, before.scan)
        again = set(self.photos.objects) if not self.photos.listed_etags else set()
        again |= {key for key in self.photos.objects if key.startswith("private")}
        if not self.photos.listed_etags:
            return
        self._check(set(self.fetched) == again, "carried", "fetched again: {}, not {}", set(self.fetched), again)

    def _expected(self, key: str, stored: Stored) -> tuple[Any, ...]:
        """The essence of the row of an object that lies there undisturbed."""
        if key.startswith("text"):
            return "rejected", ErrorCode.NOT_AN_IMAGE, None, stored.etag
        if stored.storage_class == "GLACIER" or key.startswith("private"):
            code = "archived" if stored.storage_class == "GLACIER" else "access_denied"
            return "failed", code, None, stored.etag if self.photos.listed_etags else None
        return "scored", None, score(stored.data), stored.etag

    # The promises

    def _check(self, kept: bool, promise: str, why: str, *shown: Any) -> None:
        """End the schedule where a promise is not kept; `why.format(*shown)` says so."""
        if not kept:
            self._breach(promise, why.format(*shown))

    def _breach(self, promise: str, why: str) -> None:
        """Note the first broken promise, and end the schedule."""
        self.broken = self.broken or BrokenError(promise, why)
        self.simulation.tell(f"BROKEN {self.broken}")
        if self.simulation.current is None:
            raise self.broken
        self.simulation.over = True
        raise Killed

    def _history(self) -> list[str]:
        """The scans in the history, oldest first."""
        return [self.history[name] for name in sorted(self.history)]

    def files(self, scan: str, folder: str) -> dict[str, bytes]:
        """The files of a folder of a scan."""
        start = f"scans/{scan}/{folder}"
        return {name: stored.data for name, stored in self.results.objects.items() if name.startswith(start)}

    def rows(self, scan: str, part: str = "") -> list[dict[str, Any]]:
        """The rows of a scan's table, or of some parts of it."""
        return [row for data in self.files(scan, f"rows/{part}").values() for row in rows_of(data)]

    def _written(self, name: str, before: bytes | None, now: bytes) -> None:
        folder, _, file = name.rpartition("/")
        if folder == "history":
            self.history[name] = from_json(now)["scan"]
            self._check_claim(name, before, self.history[name])
        if name == "report.json":
            self._check_newest(from_json(now)["scan"])
        if not folder.startswith("scans/"):
            return
        scan = folder.split("/")[1]
        if folder.endswith("/rows"):
            # Two parts of one shard differ at least in the times of their rows, which stand still here.
            again = before is not None and (file.startswith("part-") or before != now)
            self._check(not again or not self.results.honours, "unchanging", "{} is written a second time", name)
            self._check(before is not None or scan not in self.finished, "last", "{} is written after _SUCCESS", name)
            if file.startswith("part-"):
                self._check_part(scan, file, now)
        elif file == "plan.json" and before is None:
            self._check_plan(scan, from_json(now))
        elif file == "_SUCCESS":
            self._check_finished(scan, from_json(now))
            self.finished[scan] = self.simulation.calls

    def _deleted(self, name: str) -> None:
        self.history.pop(name, None)
        folder, _, _ = name.rpartition("/")
        scan = folder.split("/")[1] if folder.startswith("scans/") else None
        needed = folder.endswith(("/rows", "/shards")) or name.endswith("plan.json")
        if scan in self._history() and needed:
            self._breach("unchanging", f"{name} is removed, though the history names its scan")

    def _check_claim(self, name: str, before: bytes | None, scan: str) -> None:
        if not self.results.honours:
            return
        self._check(before is None, "one-plan", "{} is overwritten", name)
        self._check(bool(self.files(scan, "plan.json")), "one-plan", "{} names {}, which has no plan", name, scan)
        *_, earlier, _ = [None, *self._history()]
        if earlier and earlier not in self.finished:
            digests = [
                from_json(self.files(one, "plan.json")[f"scans/{one}/plan.json"])["digest"] for one in (earlier, scan)
            ]
            self._check(digests[0] != digests[1], "one-plan", "{} is planned, though {} is not finished", scan, earlier)

    def _check_newest(self, scan: str) -> None:
        """The report at the top does not go back to an older scan."""
        process, history = self.simulation.current, self._history()
        assert process is not None
        if scan in history:
            newer = set(history[history.index(scan) + 1 :])
            newer = {one for one in newer if self.finished.get(one, 1 << 30) < self.reducing[process]}
            self._check(
                not newer, "honest", "the newest report is replaced by that of {}, and {} is newer", scan, newer
            )

    def _check_plan(self, scan: str, plan: dict[str, Any]) -> None:
        """A new plan's shards and carried rows are the listing, and carried is what has not changed."""
        process = self.simulation.current
        assert process is not None
        source = self.sources[process]
        self.listings[scan] = Listing({info.key: info for info in source.listed}, source.listed_from)
        listed = self.listings[scan].objects
        before = {row["key"]: row for row in self.rows(plan["previous"])} if plan["previous"] else {}
        done = not plan["previous"] or plan["previous"] in self.finished
        self._check(done, "honest", "{} builds on {}, which is not finished", scan, plan["previous"])
        carried = {row["key"]: row for row in self.rows(scan, "unchanged-")}
        self.carried[scan] = set(carried)
        unchanged = {key for key, info in listed.items() if is_unchanged(info, before.get(key), plan["digest"])}
        self._check(
            carried.keys() <= unchanged, "true-score", "carried over: {}, unchanged: {}", set(carried), unchanged
        )
        complete = carried.keys() == unchanged or self.results.stale_s > 0
        self._check(complete, "carried", "carried over: {}, unchanged: {}", set(carried), unchanged)
        self._check(carried == {key: before[key] for key in carried}, "carried", "a carried row is another one")
        sharded = [row["key"] for data in self.files(scan, "shards/").values() for row in rows_of(data)]
        whole = sorted([*sharded, *carried]) == sorted(listed)
        self._check(whole, "one-row", "the plan has {} and {}, the listing {}", sharded, set(carried), set(listed))

    def _check_part(self, scan: str, file: str, data: bytes) -> None:
        found = [row["key"] for row in rows_of(data)]
        shard = self.files(scan, f"shards/{file.removeprefix('part-')}")
        wanted = [row["key"] for one in shard.values() for row in rows_of(one)]
        self._check(found == wanted or not shard, "one-row", "{} has rows of {}, its shard {}", file, found, wanted)
        process = self.simulation.current
        assert process is not None
        gone = sum(row["error_code"] == "unavailable" for row in rows_of(data))
        throughout = self.down is not None and self.down_since < self.began.get(process, 0) and not self.errors
        self._check(not throughout or gone < SUSPICIOUS, "outage", "{} has {} rows that are `unavailable`", file, gone)

    def _check_finished(self, scan: str, totals: dict[str, Any]) -> None:
        plan = from_json(self.results.objects[f"scans/{scan}/plan.json"].data)
        parts = [f"scans/{scan}/rows/part-{index:05d}.parquet" for index in range(plan["shards"])]
        reports = [f"{folder}report.{kind}" for folder in ("", f"scans/{scan}/") for kind in ("html", "json")]
        missing = {*parts, *reports} - self.results.objects.keys()
        self._check(not missing, "last", "_SUCCESS of {} comes before {}", scan, missing)
        table, listed = self.rows(scan), self.listings[scan].objects
        keys = sorted(row["key"] for row in table)
        self._check(keys == sorted(listed), "one-row", "{} has rows of {}, and listed {}", scan, keys, sorted(listed))
        counted = Counter(row["status"] for row in table if row["key"] not in self.carried[scan])
        counted["unchanged"] = len(self.carried[scan])
        told = {name: totals[name] for name in ("scored", "rejected", "failed", "unchanged")}
        right = all(counted[name] == told[name] for name in told) and totals["listed"] == sum(told.values())
        # Where conditional writes are ignored, a second worker may replace a part after it was counted.
        self._check(right or not self.results.honours, "adds-up", "_SUCCESS has {}, the rows are {}", totals, counted)
        for row in table:
            if row["key"] not in self.carried[scan]:
                self._check_row(scan, row)

    def _check_row(self, scan: str, row: dict[str, Any]) -> None:
        """A row says what was true about its object at some time since it was listed."""
        key, code, listing = row["key"], row["error_code"], self.listings[scan]
        listed = listing.objects[key].etag
        times = [*self.past[key], (self.simulation.calls + 1, "now")]
        since = {etag for (_, etag), (end, _) in pairwise(times) if end > listing.at}
        if code in CONDITION_CODES:
            reasons = {
                "changed": bool(since - {listed, None}),
                "vanished": None in since,
                "unavailable": self.errors or self.was_down,
            }
            self._check(reasons[code], "resumed", "{} is `{}`, and it was {} since it was listed", key, code, since)
            return
        etag = row["etag"]
        right = etag in since and etag in (listed, row["etag"] if listed is None else listed)
        if code in ("archived", "access_denied"):
            self._check(etag == listed, "resumed", "{} is `{}` with the ETag {}", key, code, etag)
            return
        self._check(
            right, "true-score", "{} has a row for {}; it was listed as {}, and was {}", key, etag, listed, since
        )
        expected = self._expected(key, Stored(self.contents[etag], etag))
        self._check(
            essence(row) == expected, "true-score", "the row of {} is {}, and not {}", key, essence(row), expected
        )


def essence(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row says: status, code, score, ETag."""
    return row["status"], row["error_code"], row["p_ai"], row["etag"]


def is_unchanged(info: ObjectInfo, before: dict[str, Any] | None, digest: str) -> bool:
    """Whether an object is to be carried over (docs/scan.md)."""
    if before is None or info.etag is None or before["digest"] != digest or before["etag"] != info.etag:
        return False
    archived = before["error_code"] == "archived" and before["storage_class"] == info.storage_class
    return before["status"] in ("scored", "rejected") or archived


def as_dict(one: Any) -> dict[str, Any]:
    """dataclasses.asdict; a card's is remembered."""
    if isinstance(one, Card):
        return dict(remember(one.version, lambda: asdict(one)))
    return {name: vars(value) if is_dataclass(value) else value for name, value in vars(one).items()}


# The simulated world around the real code

current: list[Schedule] = []


class SimulatedTime:
    """The time module, in a simulation."""

    @staticmethod
    def monotonic() -> float:
        return current[-1].simulation.now

    @staticmethod
    def process_time() -> float:
        return 0.0

    @staticmethod
    def sleep(seconds: float) -> None:
        current[-1].simulation.sleep(seconds)


class QuickJson:
    """The module json, in Rust."""

    loads = staticmethod(from_json)

    @staticmethod
    def dumps(value: Any, **_: Any) -> str:
        return to_json(value).decode()


class OneTime(datetime):
    """The datetime class of a world in which it is always the same time: rows are equal that differ in nothing else."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return A_TIME


def one_after_the_other(
    function: Callable[[Any], Any], items: Sequence[Any], threads: int, stop: Event, drain_s: float
) -> Iterator[Any]:
    """flow.map_in_threads without threads."""
    for item in items:
        if stop.is_set():
            raise StoppedError
        yield function(item)


def wait(self: Retries, seconds: float) -> None:
    """Retries._sleep in simulated time."""
    current[-1].simulation.sleep(seconds)
    if self.stop.is_set():
        raise StoppedError


def next_name() -> SimpleNamespace:
    """uuid.uuid4, counting."""
    return SimpleNamespace(hex=f"{next(current[-1]._names):06d}")


class NoFolder:
    """The module tempfile, which makes no folder."""

    @staticmethod
    def TemporaryDirectory(**_: Any) -> Any:
        return nullcontext("unused")


@contextmanager
def rare_collections() -> Iterator[None]:
    """Look for cycles of garbage less often, and not in what is there already: that takes a twentieth of the time."""
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(20_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


@contextmanager
def simulated() -> Iterator[None]:
    """Run the real code in the simulated world within the block."""
    left_out = "histogram by_tier by_prefix by_month provenance cost most_suspicious errors"
    left_out += " engines deciders named whole by_reason"
    with ExitStack() as stack:
        stack.enter_context(Database.open())
        for module in (planning, history, worker, retries):
            stack.enter_context(patch.object(module, "time", SimulatedTime))
        for module in (planning, history, rows, report):
            stack.enter_context(patch.object(module, "datetime", OneTime))
        replaced: list[tuple[Any, str, Any]] = [
            *((module, "uuid", SimpleNamespace(uuid4=next_name)) for module in (planning, history)),
            (plan, "open_store", lambda url, **_: current[-1].open_store(url)),
            (planning, "ListingJoin", RememberedJoin),
            (planning, "table_to_parquet", table_to_parquet),
            (planning, "from_parquet", RememberedRows),
            (planning, "pa", SimpleNamespace(Table=Rows)),
            *((module, "asdict", as_dict) for module in (plan, planning)),
            (Card, "digest", property(lambda self: self.weights_sha256)),
            (rows, "pa", SimpleNamespace(Table=Rows)),
            (rows, "table_to_parquet", table_to_parquet),
            (rows, "from_parquet", RememberedRows),
            (report, "ScanTable", RememberedTable),
            (report, "Card", SimpleNamespace(from_dict=lambda values: CARDS[values["version"]])),
            (listing, "duckdb", SimpleNamespace(connect=Database)),
            (table, "duckdb", SimpleNamespace(connect=LazyDatabase)),
            (table, "SCHEMA", SimpleNamespace(empty_table=lambda: EMPTY_TABLE)),
            *((module, "json", QuickJson) for module in (plan, history, worker, table, report)),
            (
                table,
                "pq",
                SimpleNamespace(read_metadata=lambda file: RememberedFooter(file.data)),
            ),
            (planning, "tempfile", NoFolder),
            (report, "tempfile", NoFolder),
            (report, "Path", lambda name: MemoryFile()),
            (planning, "tell", lambda *_, **__: None),
            (worker, "map_in_threads", one_after_the_other),
            (worker, "provenance", lambda data, kind, trust: None),
            (Worker, "_usage", lambda self: {}),
            (Retries, "_sleep", wait),
            (report, "plots", SimpleNamespace(png=lambda figure: b"", data_uri=lambda data: "")),
            (report, "_histogram", lambda found: None),
            (report, "pages", SimpleNamespace(render=lambda *_, **__: "page")),
            (report, "prevalence", SimpleNamespace(estimate=lambda *_: {})),
            (report, "claims", SimpleNamespace(what_files_say=lambda *_: {})),
            (summary, "flagged", lambda *_: ()),
            (summary, "kinds", lambda *_: Counter()),
            (report, "what_changed", lambda *_: {"scores": None, "examples": []}),
            *((summary, name, lambda *_: {}) for name in left_out.split()),
        ]
        for where, name, stand_in in replaced:
            stack.enter_context(patch.object(where, name, stand_in))
        yield


def run_schedule(seed: int, recorded: Sequence[int] | None = None) -> tuple[Schedule, BrokenError | None]:
    """Run one schedule within `simulated`. Returns it, and the promise that it broke."""
    schedule = Schedule(seed, recorded)
    current[:] = [schedule]
    try:
        schedule.run()
    except BrokenError as broken:
        return schedule, broken
    return schedule, None


def simplified(schedule: Schedule, broken: BrokenError, tries: int = 1_500) -> Schedule:
    """A schedule that breaks the same promise, in which less happens."""
    best, drawn = schedule, schedule.choices.drawn
    size = max(1, len(drawn) // 2)
    while size and tries > 0:
        at = 0
        while at < len(best.choices.drawn) and tries > 0:
            drawn = best.choices.drawn
            simpler = [*drawn[:at], *([0] * len(drawn[at : at + size])), *drawn[at + size :]]
            if simpler != drawn:
                tries -= 1
                other, found = run_schedule(best.choices.seed, simpler)
                if (
                    found
                    and found.promise == broken.promise
                    and len(other.simulation.told) <= len(best.simulation.told)
                ):
                    best = other
            at += size
        size //= 2
    return best


@dataclass
class Finding:
    """The first schedule that broke a promise, and how many did."""

    seed: int
    broken: BrokenError
    times: int = 1


def run_schedules(
    count: int, seed: int = 0, each: Callable[[int], None] = lambda done: None, most: int | None = None
) -> dict[str, Finding]:
    """Run `count` schedules from `seed` on; after `most` findings no more. Returns the broken promises."""
    findings: dict[str, Finding] = {}
    with simulated(), rare_collections():
        for number in range(seed, seed + count):
            forget()
            _, broken = run_schedule(number)
            if broken and broken.promise in findings:
                findings[broken.promise].times += 1
            elif broken:
                findings[broken.promise] = Finding(number, broken)
                if len(findings) == most:
                    break
            each(number - seed + 1)
    return findings


def tell(finding: Finding) -> None:
    """Print a finding and what happens in a schedule that is as simple as possible."""
    with simulated():
        schedule, broken = run_schedule(finding.seed)
        if broken is None:
            print(f"seed {finding.seed}: no promise is broken")
            print(schedule.simulation.trace())
            return
        simple = simplified(schedule, broken)
    print(f"\nseed {finding.seed}, and {finding.times - 1:,} more: {broken}")
    print(simple.simulation.trace())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="The first schedule's; each one has the next number.")
    parser.add_argument("--replay", type=int, metavar="SEED", help="Only this schedule.")
    asked = parser.parse_args()
    count, seed = (asked.schedules, asked.seed) if asked.replay is None else (1, asked.replay)
    with ProgressReport("scan protocol", count, "schedules") as progress:
        findings = run_schedules(count, seed, lambda done: progress.advance())
    for finding in findings.values():
        tell(finding)
    if asked.replay is not None and not findings:
        tell(Finding(seed, BrokenError("", "")))
    print(f"{count:,} schedules from seed {seed} on: {len(findings)} of the ten promises broken")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
