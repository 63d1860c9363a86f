"""Objects that fail for minutes are rows, and outages end the scan, with the times that a scan really has."""

import errno
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchscan.common.retries import OutageError, Retries, StoppedError, TransientError
from patchscan.detector.card import NotFiniteError
from patchscan.detector.decoders import DecoderPool
from patchscan.scanning import rows
from patchscan.scanning.observers import Observer
from patchscan.scanning.plan import Plan, ScanSource, read_parts
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.scorers import RefusedRequestError, Select
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.folder import Folder
from patchscan.storage.store import FailureCode, FetchedObject, ObjectError, ObjectInfo, Store, StoreError
from tests.scan_kit import StubScorer, image, table_of

WHITE = 255


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait between two tries puts the clock forward."""
    clock, skipped = time.monotonic, [0.0]

    def skip(_: Retries, seconds: float) -> None:
        skipped.append(seconds)

    monkeypatch.setattr(time, "monotonic", lambda: clock() + sum(skipped))
    monkeypatch.setattr(Retries, "_sleep", skip)


class StrictScorer(StubScorer):
    """Does not answer for images that `fails` names, given their crops."""

    def __init__(self, fails: Callable[[np.ndarray], bool]):
        super().__init__()
        self.fails, self.asked = fails, 0

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        self.asked += 1
        if any(self.fails(one) for one in crops):
            raise TransientError("503")
        return super().logits(crops)


class StrictServer(StrictScorer):
    """The same, where the server decodes."""

    select: Select = "server"


def is_white(crops: np.ndarray) -> bool:
    return bool(crops.min() == WHITE)


def white() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (40, 40), (WHITE,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def photos(folder: Path, good: int, bad: int) -> Path:
    """Images that are scored, and white ones, which come last."""
    folder.mkdir()
    for number in range(good):
        (folder / f"{number:03d}.png").write_bytes(image(number))
    for number in range(bad):
        (folder / f"white {number}.png").write_bytes(white())
    return folder


def scan(folder: Path, out: Store, scorer: StubScorer, settings: WorkSettings = WorkSettings()) -> Plan:
    plan = plan_scan(ScanRequest(source=ScanSource(url=str(folder)), card=scorer.card, shard_objects=8), out)
    one = Worker(plan, out, scorer, settings)
    for index in range(plan.shards):
        one.work(index)
    assert len(table_of(out, plan.scan)) == plan.listed
    return plan


def failed(out: Store, plan: Plan) -> set[tuple[str, str]]:
    return {(key, row["error_code"]) for key, row in table_of(out, plan.scan).items() if row["status"] == "failed"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "good", "bad", "threads"),
    [
        (StrictScorer, 0, 2, 32),
        (StrictScorer, 7, 1, 1),
        (StrictScorer, 7, 1, 32),
        (StrictScorer, 20, 6, 32),
        (StrictServer, 8, 1, 32),
        (StrictServer, 4, 4, 1),
    ],
)
def test_objects_that_the_scorer_never_answers_are_failed_rows(
    kind: type[StrictScorer], good: int, bad: int, threads: int, tmp_path: Path
) -> None:
    out = open_store(str(tmp_path / "out"))
    plan = scan(photos(tmp_path / "photos", good, bad), out, kind(is_white), WorkSettings(threads=threads))
    assert failed(out, plan) == {(f"white {number}.png", "unavailable") for number in range(bad)}


@pytest.mark.parametrize(("good", "bad"), [(0, 1), (7, 1), (8, 1), (4, 4)])
def test_objects_that_the_store_never_gives_are_failed_rows(
    good: int, bad: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Folder.fetch

    def fetch(self: Folder, info: ObjectInfo, limit: int) -> FetchedObject:
        if info.key.startswith("white"):
            raise TransientError("503 SlowDown")
        return original(self, info, limit)

    monkeypatch.setattr(Folder, "fetch", fetch)
    out = open_store(str(tmp_path / "out"))
    plan = scan(photos(tmp_path / "photos", good, bad), out, StubScorer())
    assert failed(out, plan) == {(f"white {number}.png", "unavailable") for number in range(bad)}


@pytest.mark.parametrize(("before", "threads"), [(0, 32), (5, 1), (5, 32)])
def test_a_scorer_that_is_down_ends_the_scan_and_the_next_run_has_no_failed_rows(
    before: int, threads: int, tmp_path: Path
) -> None:
    folder, out = photos(tmp_path / "photos", 12, 0), open_store(str(tmp_path / "out"))
    for number in range(10):  # what needs no scorer does not show that it works
        (folder / f"{number:03d}.txt").write_text("no image")
    scorer = StrictScorer(lambda _: scorer.asked > before)
    with pytest.raises(OutageError, match="nothing has worked for 180 s, last: 503"):
        scan(folder, out, scorer, WorkSettings(threads=threads))
    assert failed(out, scan(folder, out, StubScorer())) == set()


@pytest.mark.parametrize("before", [0, 5])
def test_a_store_that_is_down_ends_the_scan_and_the_next_run_has_no_failed_rows(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, calls, original = (
        photos(tmp_path / "photos", 20, 0),
        open_store(str(tmp_path / "out")),
        [],
        Folder.fetch,
    )

    def fetch(self: Folder, info: ObjectInfo, limit: int) -> FetchedObject:
        calls.append(info)
        if len(calls) > before:
            raise TransientError("503 SlowDown")
        return original(self, info, limit)

    with monkeypatch.context() as down:
        down.setattr(Folder, "fetch", fetch)
        with pytest.raises(OutageError, match="503 SlowDown"):
            scan(folder, out, StubScorer(), WorkSettings(threads=1))
    assert failed(out, scan(folder, out, StubScorer())) == set()


def test_a_run_that_finds_only_objects_that_fail_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run was stopped when all others were done: that they were shows that the store works."""
    out, original = open_store(str(tmp_path / "out")), Folder.fetch

    def fetch(self: Folder, info: ObjectInfo, limit: int) -> FetchedObject:
        if info.key.startswith("white"):
            if stops:
                stops[0].stop.set()
            raise TransientError("503 SlowDown")
        return original(self, info, limit)

    monkeypatch.setattr(Folder, "fetch", fetch)
    folder = photos(tmp_path / "photos", 4, 4)
    plan = plan_scan(ScanRequest(source=ScanSource(url=str(folder)), card=StubScorer().card), out)
    stops = [Worker(plan, out, StubScorer(), WorkSettings(threads=1, deadline_s=0.0, outage_s=10_000.0))]
    with pytest.raises(StoppedError):
        stops[0].work(0)
    stops.clear()
    assert len(failed(out, scan(folder, out, StubScorer()))) == 4


@pytest.mark.parametrize("ended", [True, False])
def test_rights_that_end_are_told_from_objects_that_are_private(
    ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Access is denied to the last objects, or to all from some moment on."""
    folder, out, calls, original = (
        photos(tmp_path / "photos", 70, 0),
        open_store(str(tmp_path / "out")),
        [],
        Folder.fetch,
    )

    def fetch(self: Folder, info: ObjectInfo, limit: int) -> FetchedObject:
        calls.append(info)
        if (ended and len(calls) > 5) or info.key > "005":
            raise ObjectError(FailureCode.ACCESS_DENIED, "access denied")
        return original(self, info, limit)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "fetch", fetch)
        plan = plan_scan(ScanRequest(source=ScanSource(url=str(folder)), card=StubScorer().card), out)
        if ended:
            with pytest.raises(StoreError, match="renew the credentials"):
                Worker(plan, out, StubScorer(), WorkSettings(threads=1)).work(0)
            assert len(calls) < 40
        else:
            Worker(plan, out, StubScorer(), WorkSettings(threads=1)).work(0)
            assert len(failed(out, plan)) == 65
    if ended:
        assert failed(out, scan(folder, out, StubScorer())) == set()


@pytest.mark.parametrize("tries", [1, 5])
def test_an_image_is_decoded_once_however_often_the_scorer_is_asked(
    tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, decoded = DecoderPool.prepare, []

    def counted(self: DecoderPool, data: bytes, *rest: Any) -> Any:
        decoded.append(data)
        return original(self, data, *rest)

    monkeypatch.setattr(DecoderPool, "prepare", counted)
    scorer = StrictScorer(lambda _: scorer.asked < tries)
    out = open_store(str(tmp_path / "out"))
    (tmp_path / "photos").mkdir()
    alone = image(777)  # a thread of an earlier test's scan that was given up may still decode other images
    (tmp_path / "photos" / "alone.png").write_bytes(alone)
    plan = plan_scan(ScanRequest(source=ScanSource(url=str(tmp_path / "photos")), card=scorer.card), out)
    Worker(plan, out, scorer).work(0)
    (data,) = (out.read(name) for name in out.names(f"scans/{plan.scan}/rows/part"))
    assert data is not None
    (row,) = rows.from_parquet(data).to_pylist()
    assert (row["status"], row["attempts"], scorer.asked, decoded.count(alone)) == ("scored", tries, tries, 1)


@pytest.mark.parametrize("fault", [NotFiniteError("NaN"), RefusedRequestError("the server answers 400"), None])
def test_the_row_of_an_image_that_the_scorer_fails_counts_the_tries_to_read_it(
    fault: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Folder.fetch
    calls: list[object] = []

    def fetch(self: Folder, info: ObjectInfo, limit: int) -> FetchedObject:
        calls.append(info)
        if len(calls) < 3:
            raise TransientError("503 SlowDown")
        return original(self, info, limit)

    def answer(scorer: StubScorer, crops: Sequence[np.ndarray]) -> list[float]:
        calls.append(crops)
        raise fault or TransientError("503")

    monkeypatch.setattr(Folder, "fetch", fetch)
    monkeypatch.setattr(StubScorer, "logits", answer)
    out = open_store(str(tmp_path / "out"))
    plan = scan(photos(tmp_path / "photos", 1, 0), out, StubScorer())
    (row,) = [row for data in read_parts(out, plan.scan) for row in rows.from_parquet(data).to_pylist()]
    assert (row["status"], row["attempts"]) == ("failed", len(calls) - 1)


class FullDisk(Observer):
    """Writes the stream of `--events` to a disk that becomes full."""

    def row(self, row: rows.Row, fetched_bytes: int) -> None:
        if row["key"] == "003.png":
            raise OSError(errno.ENOSPC, "No space left on device")


def test_finished_rows_are_saved_whatever_ends_a_shard(tmp_path: Path) -> None:
    out, scorer = open_store(str(tmp_path / "out")), StubScorer()
    source = ScanSource(url=str(photos(tmp_path / "photos", 6, 0)))
    plan = plan_scan(ScanRequest(source=source, card=scorer.card), out)
    worker = Worker(plan, out, scorer, WorkSettings(threads=1))
    worker.observers = [FullDisk()]
    with pytest.raises(OSError, match="No space"):
        worker.work(0)
    saved = out.read(f"scans/{plan.scan}/progress/00000.parquet")
    assert saved
    assert rows.from_parquet(saved).column("key").to_pylist() == [f"{number:03d}.png" for number in range(4)]
