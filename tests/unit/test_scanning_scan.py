"""Whole scans of a folder with a stub scorer: rows that add up, resumption at any point, carry-over, races."""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from patchscan.common.retries import OutageError, StoppedError, TransientError
from patchscan.detector.decoders import DecoderPool
from patchscan.detector.images import decoded_bytes
from patchscan.detector.prepared import prepare
from patchscan.scanning import report, rows, shards
from patchscan.scanning.flow import ByteBudget
from patchscan.scanning.listing import Filters
from patchscan.scanning.plan import Plan, PlanError, ScanSource, delete_all, is_complete
from patchscan.scanning.planning import ScanRequest, _check_results_outside_source, plan_estimate, plan_named, plan_scan
from patchscan.scanning.table import IncompleteScanError
from patchscan.scanning.worker import Shard, Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.folder import Folder
from patchscan.storage.store import Store
from tests.poisonous import ABORT, POISONED, bmp
from tests.scan_kit import Crash, CrashingStore, StubScorer, card, image, scan_names, table_of

Table = dict[str, dict[str, Any]]
SMALL_SHARDS = 4
QUICK = WorkSettings(threads=4, batch=2, deadline_s=0.2, outage_s=0.0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(12):
        path = folder / f"album {number % 2}" / f"ü+%{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number))
    (folder / "note.jpg").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    return folder


def scan(photos: Path, out: Store, scorer: StubScorer | None = None, stop: threading.Event | None = None) -> Plan:
    scorer = scorer or StubScorer()
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card, shard_objects=SMALL_SHARDS), out)
    worker = Worker(made, out, scorer, QUICK, stop)
    for index in range(made.shards):
        worker.work(index)
    report.reduce(out, made)
    return made


@pytest.fixture
def undisturbed(photos: Path, tmp_path: Path) -> Table:
    out = open_store(str(tmp_path / "undisturbed"))
    return table_of(out, scan(photos, out).scan)


def totals(out: Store, made: Plan) -> dict[str, Any]:
    return dict(json.loads(out.read(f"scans/{made.scan}/_SUCCESS") or b"{}"))


def test_every_object_has_one_row_and_the_counts_add_up(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    made = scan(photos, out)
    table = table_of(out, made.scan)
    on_disk = {path.relative_to(photos).as_posix() for path in photos.rglob("*") if path.is_file()}
    assert set(table) == on_disk
    assert table["empty.png"]["error_code"] == "empty"
    assert table["note.jpg"]["error_code"] == "not_an_image"
    counts = totals(out, made)
    assert (counts["scored"], counts["rejected"], counts["failed"]) == (12, 2, 0)
    assert counts["adds_up"]


@pytest.mark.slow
def test_a_second_scan_scores_only_what_changed(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = open_store(str(tmp_path / "out"))
    before = scan(photos, out)
    first = table_of(out, before.scan)
    changed, gone = photos / "album 1" / "ü+%1.png", photos / "note.jpg"
    changed.write_bytes(image(100))
    os.utime(changed, (2_000_000_000, 2_000_000_000))
    gone.unlink()
    (photos / "new.png").write_bytes(image(101))
    scorer = StubScorer()
    made = scan(photos, out, scorer)
    second = table_of(out, made.scan)
    counts = totals(out, made)
    assert scorer.scored == 2
    assert (counts["unchanged"], counts["deleted"], counts["scored"]) == (12, 1, 2)
    differing = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    assert differing == {"album 1/ü+%1.png", "note.jpg", "new.png"}
    names = out.names

    def without_the_newest(prefix: str) -> list[str]:
        """As of a store that does not list its newest keys yet."""
        return [name for name in names(prefix) if name != "history/000002.json"]

    for listed in (names, without_the_newest):
        monkeypatch.setattr(out, "names", listed)
        report.reduce(out, before)
        assert json.loads(out.read("report.json") or b"")["scan"] == made.scan, "the newest report is an old one"


@pytest.mark.parametrize("meanwhile", [False, True])
def test_rows_that_were_removed_from_the_last_scan_are_made_again(
    meanwhile: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are removed `meanwhile`, between a listing of their names and the reading of their contents."""
    out = open_store(str(tmp_path / "out"))
    folder, original = f"scans/{scan(photos, out).scan}/rows/", Folder.names

    def names(self: Folder, prefix: str) -> Iterator[str]:
        found = list(original(self, prefix))
        if prefix == folder:
            shutil.rmtree(tmp_path / "out" / folder, ignore_errors=True)
        return iter(found)

    if meanwhile:
        monkeypatch.setattr(Folder, "names", names)
    else:
        shutil.rmtree(tmp_path / "out" / folder)
    assert totals(out, scan(photos, out))["scored"] == 12
    assert json.loads((tmp_path / "out" / "report.json").read_bytes())["changes"] is None


@pytest.mark.slow
@pytest.mark.parametrize("removed", ["", "plan.json"])
@pytest.mark.parametrize("finished", [True, False])
def test_where_the_newest_scan_was_removed_the_next_begins_anew(
    removed: str, finished: bool, photos: Path, tmp_path: Path
) -> None:
    """As by a lifecycle rule, which comes to a scan's plan before it comes to its newest files, after a month without a
    scan."""
    out = open_store(str(tmp_path / "out"))
    newest = scan(photos, out)
    if not finished:
        (photos / "new.png").write_bytes(image(99))
        newest = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=card()), out)
    delete_all(out, f"scans/{newest.scan}/{removed}")
    with pytest.raises(PlanError, match="has lost its last scan: scan the whole source"):
        plan_named(ScanRequest(source=ScanSource(url=str(photos)), card=card()), out, ["note.jpg"])
    if not finished:
        with pytest.raises(PlanError, match="holds scans of"):
            plan_scan(ScanRequest(source=ScanSource(url=str(photos / "album 0")), card=card()), out)
    again = scan(photos, out)
    assert (again.listed, again.unchanged) == ((14, 0) if finished else (15, 14))


def test_the_temporary_folder_may_have_a_quote_in_its_name(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o'brien").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "o'brien"))
    out = open_store(str(tmp_path / "out"))
    scan(photos, out)
    again = scan(photos, out)
    assert totals(out, again)["unchanged"] == again.listed > 0


def test_another_model_scores_everything_again(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    scan(photos, out)
    scorer = StubScorer(card("2"))
    assert totals(out, scan(photos, out, scorer))["unchanged"] == 0
    assert scorer.scored == 12


@pytest.mark.slow
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(crashes=st.lists(st.tuples(st.integers(1, 45), st.booleans()), min_size=1, max_size=4))
def test_dying_at_any_call_and_starting_again_gives_the_same_rows(
    crashes: list[tuple[int, bool]],
    photos: Path,
    undisturbed: Table,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of twenty scans images are decoded here, which does not touch the store."""
    monkeypatch.setattr(DecoderPool, "prepare", lambda _, data, preset, *__, **___: prepare(data, preset))
    out = open_store(str(tmp_path_factory.mktemp("crash")))
    for at, after in crashes:
        try:
            scan(photos, CrashingStore(out, at, after))
        except Crash:
            continue
    scan(photos, out)
    for name in scan_names(out):
        assert is_complete(out, name)
        assert table_of(out, name) == undisturbed


def test_two_planners_at_once_work_on_one_plan(photos: Path, tmp_path: Path) -> None:
    plans: list[str] = []
    gate = threading.Barrier(4)

    def planner() -> None:
        gate.wait()
        out = open_store(str(tmp_path / "out"))
        plans.append(
            plan_scan(
                ScanRequest(source=ScanSource(url=str(photos)), card=card(), shard_objects=SMALL_SHARDS), out
            ).scan
        )

    crew = [threading.Thread(target=planner) for _ in range(4)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert len(plans) == 4
    assert len(set(plans)) == 1
    assert len(scan_names(open_store(str(tmp_path / "out")))) == 1


def test_stopping_keeps_what_is_done(photos: Path, tmp_path: Path) -> None:
    out, stop, scorer = open_store(str(tmp_path / "out")), threading.Event(), StubScorer()
    original = scorer.logits

    def stop_at_five(crops: Any) -> list[float]:
        if scorer.scored >= 5:
            stop.set()
        return original(crops)

    scorer.logits = stop_at_five  # type: ignore[method-assign]
    with pytest.raises(StoppedError):
        scan(photos, out, scorer, stop)
    again = StubScorer()
    made = scan(photos, out, again)
    assert scorer.scored + again.scored == 12, "an image was scored twice or not at all"
    assert len(scan_names(out)) == 1
    assert totals(out, made)["adds_up"]


@pytest.mark.slow
def test_an_object_that_changes_or_vanishes_after_the_listing_says_so(photos: Path, tmp_path: Path) -> None:
    out, scorer = open_store(str(tmp_path / "out")), StubScorer()
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card, shard_objects=SMALL_SHARDS), out)
    (photos / "album 0" / "ü+%0.png").unlink()
    (photos / "album 0" / "ü+%2.png").write_bytes(image(50, side=64))
    worker = Worker(made, out, scorer, QUICK)
    for index in range(made.shards):
        worker.work(index)
    report.reduce(out, made)
    table = table_of(out, made.scan)
    assert (table["album 0/ü+%0.png"]["status"], table["album 0/ü+%0.png"]["error_code"]) == ("failed", "vanished")
    assert (table["album 0/ü+%2.png"]["status"], table["album 0/ü+%2.png"]["error_code"]) == ("failed", "changed")
    # A rerun lists anew: the one is scored, the other gone.
    made = scan(photos, out)
    assert totals(out, made)["failed"] == 0
    assert totals(out, made)["deleted"] == 1


def test_a_server_that_is_down_ends_the_scan_and_writes_no_failed_rows(photos: Path, tmp_path: Path) -> None:
    out, scorer = open_store(str(tmp_path / "out")), StubScorer()

    def down(_: Any) -> list[float]:
        raise TransientError("503")

    scorer.logits = down  # type: ignore[method-assign, assignment]
    with pytest.raises(OutageError):
        scan(photos, out, scorer)
    made = scan(photos, out)
    assert totals(out, made)["failed"] == 0
    assert len(scan_names(out)) == 1


def test_an_error_of_our_own_costs_one_row(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = DecoderPool.prepare

    def buggy(pool: DecoderPool, data: bytes, *rest: Any) -> Any:
        if data == image(3):
            raise RuntimeError("a bug")
        return original(pool, data, *rest)

    monkeypatch.setattr(DecoderPool, "prepare", buggy)
    out = open_store(str(tmp_path / "out"))
    counts = totals(out, scan(photos, out))
    assert (counts["scored"], counts["failed"]) == (11, 1)


@pytest.mark.slow
def test_an_image_on_which_the_decoder_dies_is_rejected_alone(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in POISONED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("patchscan.scanning.worker.decoder_pool", cache(lambda: DecoderPool(2)))
    poison = photos / "album 0" / "poison.bmp"
    poison.write_bytes(bmp(ABORT))
    out = open_store(str(tmp_path / "out"))
    made = scan(photos, out)
    counts = totals(out, made)
    assert (counts["scored"], counts["rejected"], counts["failed"]) == (12, 3, 0)
    row = table_of(out, made.scan)[poison.relative_to(photos).as_posix()]
    assert (row["status"], row["error_code"]) == ("rejected", "decoder_died")
    assert row["error_message"] == "the decoder crashed (SIGABRT)"


def test_results_inside_the_source_are_refused(photos: Path) -> None:
    with pytest.raises(PlanError, match="lies inside"):
        plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=card()), open_store(str(photos / "out")))


def test_results_anywhere_are_inside_the_root_folder(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="lies inside"):
        _check_results_outside_source(ScanSource(url="/"), open_store(str(tmp_path)))


def test_a_plan_of_a_later_version_is_told_as_such(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    plan = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=card()), out)
    file = Path(plan.address(out))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_a_later_version": 1}))
    with pytest.raises(PlanError, match="another version of patchscan"):
        Plan.read(out, plan.scan)


def test_a_scan_of_nothing_leaves_the_results_folder_to_another_source(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "phtos").mkdir()
    out = open_store(str(tmp_path / "out"))
    scan(tmp_path / "phtos", out)
    assert scan(photos, out).listed == 14
    with pytest.raises(PlanError, match="holds scans of"):
        scan(tmp_path / "phtos", out)


def test_a_scan_that_takes_the_place_of_an_unfinished_one_says_so(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, request = open_store(str(tmp_path / "out")), ScanRequest(source=ScanSource(url=str(photos)), card=card())
    unfinished = plan_scan(request, out)
    plan_scan(request, out)
    assert capsys.readouterr().err == ""
    plan_scan(replace(request, filters=Filters(suffixes=(".png",))), out)
    assert f"warning: scan {unfinished.scan} stays unfinished" in capsys.readouterr().err


def test_a_results_folder_belongs_to_one_source(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    scan(photos, out)
    with pytest.raises(PlanError, match=f"holds scans of {photos}, not of {photos}/phtos; give each source"):
        plan_scan(ScanRequest(source=ScanSource(url=str(photos / "phtos")), card=card()), out)
    with pytest.raises(PlanError, match=rf"not of {photos} \(manifest keys.csv\)"):
        plan_scan(ScanRequest(source=ScanSource(url=str(photos), manifest="keys.csv"), card=card()), out)
    with pytest.raises(PlanError, match="holds scans of"):
        plan_estimate(ScanRequest(source=ScanSource(url=str(photos / "album 0")), card=card()), out, out, 20)


def test_what_others_leave_in_a_results_folder_is_not_read(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    rows_of = f"scans/{scan(photos, out).scan}/rows"
    for name in ("history/.DS_Store", "history/notes.txt", f"{rows_of}/.DS_Store", f"{rows_of}/part-00000.parquet.tmp"):
        out.write(name, b"\0\xff")
    again = scan(photos, out)
    assert (again.listed, again.unchanged) == (14, 14)


def test_a_scan_of_more_than_the_user_allows_scores_nothing(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    source = ScanSource(url=str(photos))
    with pytest.raises(PlanError, match=r"14 objects to score, more than MAX_OBJECTS, 13:"):
        plan_scan(ScanRequest(source=source, card=card(), max_objects=13), out)
    assert list(out.names("")) == []
    assert plan_scan(ScanRequest(source=source, card=card(), max_objects=14), out).listed == 14


def test_what_failed_does_not_use_up_every_run_of_few_objects(photos: Path, tmp_path: Path) -> None:
    out, scorer = open_store(str(tmp_path / "out")), StubScorer()
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card), out)
    first, second, *_ = (one.key for one in Worker(made, out, scorer).objects(0))
    for key in (first, second):
        (photos / key).unlink()
    runs = 0
    while not out.read(f"scans/{made.scan}/rows/part-{shards.name(0)}.parquet"):
        worker, runs = Worker(made, out, scorer), runs + 1
        worker.objects_left = 2
        with suppress(StoppedError):
            worker.work(0)
    assert runs == made.to_score / 2 + 1, "the two that failed are tried again once, at the end"


def test_objects_that_are_scored_already_do_not_count_against_the_limit(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    scan(photos, out)
    (photos / "new.png").write_bytes(image(99))
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=StubScorer().card, max_objects=1), out)
    assert made.listed - made.unchanged == 1


def test_a_worker_refuses_another_model_than_planned(photos: Path, tmp_path: Path) -> None:
    from patchscan.scanning.scorers import ScorerError

    out = open_store(str(tmp_path / "out"))
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=card()), out)
    with pytest.raises(ScorerError, match="another version"):
        Worker(made, out, StubScorer(card("2")))


def test_a_shard_that_was_not_worked_is_not_a_complete_scan(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=card(), shard_objects=SMALL_SHARDS), out)
    with pytest.raises(PlanError, match="shards are not done"):
        report.reduce(out, made)
    assert not is_complete(out, made.scan)


def test_a_table_that_lacks_rows_carried_over_is_not_a_complete_scan(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    scan(photos, out)
    (photos / "new.txt").write_text("text")
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=card()), out)
    Worker(made, out, StubScorer()).work(0)
    for name in list(out.names(f"scans/{made.scan}/rows/unchanged-")):
        out.delete(name)
    with pytest.raises(IncompleteScanError, match=f"{made.unchanged} of {made.unchanged} rows carried over"):
        report.reduce(out, made)
    assert not is_complete(out, made.scan)


@pytest.mark.slow
def test_pixels_decoded_at_once_stay_within_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.new("RGB", (1200, 1200), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    original, lock, now, most = ByteBudget.hold, threading.Lock(), [0], [0]

    @contextmanager
    def counted(budget: ByteBudget, size: int) -> Iterator[None]:
        with original(budget, size):
            with lock:
                now[0] += size > 1200 * 1200
                most[0] = max(most[0], now[0])
            yield
            with lock:
                now[0] -= size > 1200 * 1200

    monkeypatch.setattr(ByteBudget, "hold", counted)
    monkeypatch.setattr("patchscan.scanning.worker.decoder_pool", cache(lambda: DecoderPool(4)))
    out, scorer = open_store(str(tmp_path / "out")), StubScorer()
    made = plan_scan(ScanRequest(source=ScanSource(url=str(tmp_path / "photos")), card=scorer.card), out)
    one_image = max(decoded_bytes(file.read_bytes()) for file in (tmp_path / "photos").iterdir())
    Worker(made, out, scorer, replace(QUICK, threads=8, memory=one_image + 1)).work(0)
    assert most[0] == 2
    assert len(table_of(out, made.scan)) == 12


@pytest.mark.parametrize(("device", "most"), [("cpu", 1), ("cuda", 8)])
def test_requests_hold_one_image_for_cores_and_several_for_a_gpu(
    device: str, most: int, photos: Path, tmp_path: Path
) -> None:
    sizes = []

    class Slow(StubScorer):
        def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
            sizes.append(len(crops))
            time.sleep(0.1)  # so that the others wait and make a batch
            return super().logits(crops)

    scorer, out = Slow(), open_store(str(tmp_path / "out"))
    scorer.device = device
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card), out)
    Worker(made, out, scorer, WorkSettings(threads=8)).work(0)
    assert sum(sizes) == 12
    assert 1 < max(sizes) <= most if most > 1 else max(sizes) == 1


def test_what_an_earlier_try_cost_is_kept_whatever_a_later_one_uses() -> None:
    first = iter([{"model_s.cuda": 1.0}, {"model_s.cuda": 6.0}])
    identity = ScanSource(url="photos").identity
    kept = Shard(None, lambda: next(first), identity).parquet()
    second = iter([{"model_s.cpu": 1.0}, {"model_s.cpu": 3.0}])
    metadata = rows.from_parquet(Shard(kept, lambda: next(second), identity).parquet()).schema.metadata
    assert json.loads(metadata[rows.STATS_KEY]) == {"model_s.cuda": 5.0, "model_s.cpu": 2.0}
