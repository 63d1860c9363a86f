"""The promises of tests/protocol.py hold in thousands of schedules, and each one is found broken where it is."""

from dataclasses import replace
from typing import Any

import pytest

from patchscan.common.retries import Watchdog
from patchscan.scanning import history, listing, planning, report, rows, summary
from patchscan.scanning.plan import Plan
from patchscan.scanning.worker import Worker
from patchscan.storage.bucket import Bucket
from patchscan.storage.store import FailureCode, FetchedObject, ObjectInfo, Store
from tests import protocol, remembered
from tests.simulation import SimulatedBucket

SCHEDULES = 10_000
# Half as many again as the breakages below need to be found.
ENOUGH = 150


def test_no_schedule_breaks_a_promise() -> None:
    assert {name: str(found.broken) for name, found in protocol.run_schedules(SCHEDULES).items()} == {}


def parts_replaced(self: Bucket, name: str, data: bytes) -> bool:
    if "/rows/" not in name:
        return new_written(self, name, data)
    self.write(name, data)
    return True


def parts_written_twice(self: Bucket, name: str, data: bytes) -> bool:
    if "/rows/" in name:
        self.write(name, rows.to_parquet([]))
    return parts_replaced(self, name, data)


def progress_taken_for_the_part(self: Bucket, name: str, data: bytes) -> None:
    written(self, name, data)
    if "/progress/" in name:
        self.write_new(name.replace("/progress/", "/rows/part-"), data)


def reply_taken_for_anothers(self: Bucket, name: str, data: bytes) -> bool:
    """As it once was: a second try finds the object, and nobody asks whose it is."""

    def put() -> bool:
        self._client.put_object(Bucket=self.bucket, Key=name, Body=data, IfNoneMatch="*")
        return True

    return self._call(put, {FailureCode.CHANGED: False})


def success_first(out: Store, plan: Plan) -> None:
    out.write(f"scans/{plan.scan}/_SUCCESS", b"{}")


def counted_by_the_plan(table: Any) -> dict[str, Any]:
    return totals(table) | {"scored": table.plan.to_score, "rejected": 0, "failed": 0}


def claimed_without_looking(out: Store, entry: str, new: Plan) -> bool:
    claim(out, entry, new)
    return True


def fetched_unconditionally(self: Bucket, info: ObjectInfo, limit: int) -> FetchedObject:
    return replace(fetch(self, replace(info, etag=None), limit), etag=info.etag)


def shard_skipped_that_was_begun(self: Worker, index: int) -> None:
    if self.out.read(f"scans/{self.plan.scan}/progress/{index:05d}.parquet") is None:
        work(self, index)


new_written, written, fetch, work = Bucket.write_new, Bucket.write, Bucket.fetch, Worker.work
totals, claim = summary.totals, history.claim

# Each with the first schedule that finds it: where the draws have changed since, one of the following has to.
BREAKAGES: dict[str, tuple[Any, str, Any, set[str], int]] = {
    "a part is replaced": (SimulatedBucket, "write_new", parts_replaced, {"unchanging"}, 0),
    "a part is written in two steps": (SimulatedBucket, "write_new", parts_written_twice, {"one-row", "unchanging"}, 0),
    "progress is taken for a part": (SimulatedBucket, "write", progress_taken_for_the_part, {"one-row"}, 3),
    "a lost reply is taken for a loss": (
        SimulatedBucket,
        "write_new",
        reply_taken_for_anothers,
        {"unchanging", "one-plan"},
        36,
    ),
    "_SUCCESS comes first": (report, "check_claimed", success_first, {"last"}, 0),
    "rows are not counted": (summary, "totals", counted_by_the_plan, {"adds-up"}, 0),
    "a planner that lost keeps its plan": (planning, "claim", claimed_without_looking, {"one-plan"}, 7),
    "ETags are not compared": (listing, "SAME_CONTENT", "true", {"true-score"}, 9),
    "another object than listed is scored": (SimulatedBucket, "fetch", fetched_unconditionally, {"true-score"}, 9),
    "the last scan is forgotten": (planning, "last_complete", lambda out: None, {"carried"}, 2),
    "an unfinished scan is continued": (history, "is_complete", lambda out, scan: True, {"honest", "one-plan"}, 1),
    "an old report is the newest": (report, "is_newest", lambda out, plan: True, {"honest"}, 96),
    "a shard that was begun is skipped": (Worker, "work", shard_skipped_that_was_begun, {"resumed", "honest"}, 22),
    "an outage makes rows": (Watchdog, "suspects", lambda self, failing: False, {"outage"}, 50),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_product_that_breaks_a_promise_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, attribute, broken, promises, seed = BREAKAGES[name]
    monkeypatch.setattr(remembered, "answers", {})
    monkeypatch.setattr(where, attribute, broken)
    findings = protocol.run_schedules(ENOUGH - seed, seed, most=1)
    assert findings.keys() <= promises
    assert findings
