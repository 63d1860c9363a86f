"""Scans of named objects alone: what they score and keep, and what happens beside a scan of the whole source."""

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from patchscan.scanning import labels, report, steps
from patchscan.scanning.history import LONGEST_PLANNING, PLANNING_FILE, last_complete
from patchscan.scanning.listing import Filters
from patchscan.scanning.plan import Plan, PlanError, ScanSource, is_complete
from patchscan.scanning.planning import ScanRequest, ScanUnderWayError, plan_named, plan_scan
from patchscan.scanning.table import ScanTable
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.store import Store
from tests.scan_kit import Crash, CrashingStore, StubScorer, card, image, scan_names, table_of

SMALL_SHARDS = 2
QUICK = WorkSettings(threads=2, batch=1, deadline_s=0.2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(6):
        write(folder / f"{number}.png", number)
    write(folder / "album/6.png", 6)
    (folder / "note.jpg").write_text("no image")
    return folder


def write(path: Path, seed: int) -> None:
    """Write or replace an image; its time tells one version from the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image(seed))
    os.utime(path, (1_000_000_000 + seed, 1_000_000_000 + seed))


def work(plan: Plan, out: Store, scorer: StubScorer) -> dict[str, Any]:
    worker = Worker(plan, out, scorer, QUICK)
    for index in range(plan.shards):
        worker.work(index)
    return report.reduce(out, plan)


def full_plan(photos: Path, out: Store, scorer: StubScorer, filters: Filters = Filters()) -> Plan:
    return plan_scan(
        ScanRequest(source=ScanSource(url=str(photos)), filters=filters, card=scorer.card, shard_objects=SMALL_SHARDS),
        out,
    )


def full(photos: Path, out: Store, scorer: StubScorer | None = None, filters: Filters = Filters()) -> dict[str, Any]:
    scorer = scorer or StubScorer()
    return work(full_plan(photos, out, scorer, filters), out, scorer)


def named_plan(photos: Path, out: Store, keys: Iterable[str], scorer: StubScorer) -> tuple[Plan | None, bool]:
    return plan_named(
        ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card, shard_objects=SMALL_SHARDS), out, keys
    )


def named(photos: Path, out: Store, keys: Iterable[str], scorer: StubScorer | None = None) -> list[dict[str, Any]]:
    """Scan named objects, after unfinished scans of others, as `patchscan scan --events-from` does."""
    scorer, is_ours, reports = scorer or StubScorer(), False, []
    while not is_ours:
        plan, is_ours = named_plan(photos, out, keys, scorer)
        if plan and plan.shards:
            reports.append(work(plan, out, scorer))
    return reports


def newest_table(out: Store) -> dict[str, dict[str, Any]]:
    newest = last_complete(out)
    assert newest
    return table_of(out, newest.scan)


@pytest.mark.slow
def test_named_objects_alone_are_scored_and_all_other_rows_are_kept(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    full(photos, out)
    before = newest_table(out)
    write(photos / "0.png", 100)
    write(photos / "new.png", 101)
    (photos / "2.png").unlink()
    scorer = StubScorer()
    (told,) = named(photos, out, ["0.png", "new.png", "1.png", "2.png", "never.png", "album", "new.png"], scorer)
    after = newest_table(out)
    assert scorer.scored == 2
    assert {key for key in after.keys() | before.keys() if before.get(key) != after.get(key)} == {"0.png", "new.png"}
    assert told["named"] == {"objects": 3, "unchanged": 1, "missing": 3, "kept": 6, "other_model": 0}
    assert (told["totals"]["listed"], told["totals"]["deleted"], told["totals"]["adds_up"]) == (9, 0, True)
    page = (out.read("report.html") or b"").decode()
    assert "did not list the source" in page
    summary = report.summary_text(told).splitlines()[0]
    assert "was not listed; 3 objects were named = 2 scored" in summary
    assert "3 names are of no object; 6 rows of others were kept" in summary

    scorer = StubScorer()
    told = full(photos, out, scorer)  # the night's scan
    assert (scorer.scored, told["totals"]["deleted"], told["named"]) == (0, 1, None)
    assert newest_table(out) == {key: row for key, row in after.items() if key != "2.png"}


@pytest.mark.slow
def test_rows_of_another_model_are_not_judged_as_this_ones(photos: Path, tmp_path: Path) -> None:
    out, renewed = open_store(str(tmp_path / "out")), StubScorer(card("2"))
    full(photos, out)
    named(photos, out, ["0.png", "1.png"], renewed)
    (told,) = named(photos, out, ["2.png"], renewed)
    assert told["named"]["other_model"] == 5
    (verdicts,) = told["changes"]["verdicts"]
    assert (verdicts["before"], verdicts["new"]) == (2, 0)  # 2.png has been scored before, by the other model

    (tmp_path / "labels.csv").write_text("key,label\n0.png,ai\n2.png,real\n3.png,ai\n4.png,real\n")
    plan = last_complete(out)
    assert plan
    scores, said = labels.scores_table(ScanTable(out, plan, tmp_path), str(tmp_path / "labels.csv"))
    assert list(scores.path) == ["0.png", "2.png"]
    assert said["unavailable_keys"] == {"3.png": "other_model", "4.png": "other_model"}


def test_rows_that_were_removed_are_not_dropped_from_the_table_in_silence(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", open_store(str(tmp_path / "out"))
    photos.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (photos / name).touch()
    full(photos, out)
    newest = last_complete(out)
    assert newest
    out.delete(f"scans/{newest.scan}/rows/part-00001.parquet")  # as a lifecycle rule does
    with pytest.raises(PlanError, match="has lost rows of its last scan"):
        named(photos, out, ["new.png"])
    full(photos, out)
    assert set(newest_table(out)) == {"a.png", "b.png", "c.png"}


def test_names_of_what_is_scored_already_make_no_scan(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    assert len(named(photos, out, ["0.png", "note.jpg"])) == 1  # nothing was scanned before
    scans = scan_names(out)
    assert set(newest_table(out)) == {"0.png", "note.jpg"}
    assert named(photos, out, ["0.png", "note.jpg", "never.png"]) == []
    assert named(photos, out, []) == []
    assert scan_names(out) == scans
    assert {name.split("/")[1] for name in out.names("scans/")} == set(scans)


@pytest.mark.slow
def test_an_unfinished_scan_of_the_whole_source_is_left_its_place(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    scorer = StubScorer()
    plan = full_plan(photos, out, scorer)
    Worker(plan, out, scorer, QUICK).work(0)
    with pytest.raises(ScanUnderWayError) as raised:
        named(photos, out, ["0.png"])
    assert raised.value.exit_code == 75
    assert full_plan(photos, out, scorer).scan == plan.scan
    work(plan, out, scorer)
    assert scorer.scored == 7
    write(photos / "0.png", 100)
    assert len(named(photos, out, ["0.png"])) == 1


def test_a_plan_that_ctrl_c_ends_is_no_longer_waited_for(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = open_store(str(tmp_path / "out"))

    def interrupted(_: object) -> None:
        out.write(PLANNING_FILE, b"{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "run_interruptibly", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.make_plan(ScanRequest(source=ScanSource(url=str(photos)), card=card()), out)
    assert out.read(PLANNING_FILE) is None


@pytest.mark.slow
def test_a_scan_of_the_whole_source_does_not_wait_for_one_of_named_objects(photos: Path, tmp_path: Path) -> None:
    out, scorer = open_store(str(tmp_path / "out")), StubScorer()
    full(photos, out)
    write(photos / "new.png", 101)
    beside, _ = named_plan(photos, out, ["new.png"], scorer)
    assert beside
    night = full_plan(photos, out, scorer)
    assert (night.named, night.scan != beside.scan) == (None, True)
    work(beside, out, scorer)
    assert last_complete(out) == beside
    work(night, out, scorer)
    assert last_complete(out) == night
    assert set(newest_table(out)) == {path.relative_to(photos).as_posix() for path in photos.rglob("*.*")}


@pytest.mark.slow
def test_named_objects_do_not_make_a_long_listing_begin_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tries = open_store(str(tmp_path / "out")), []
    listed = type(open_store(str(photos))).objects

    def objects(self: Any) -> Any:
        for info in listed(self):
            if info.key == "0.png":
                with pytest.raises(ScanUnderWayError):
                    named(photos, out, ["1.png"])
                tries.append(info.key)
            yield info

    monkeypatch.setattr(type(open_store(str(photos))), "objects", objects)
    full(photos, out)
    assert tries == ["0.png"]
    assert out.read(PLANNING_FILE) is None

    killed = {"entry": "history/000002.json", "since": (datetime.now(UTC) - LONGEST_PLANNING).isoformat()}
    out.write(PLANNING_FILE, json.dumps(killed).encode())
    write(photos / "1.png", 100)
    assert len(named(photos, out, ["1.png"])) == 1


@pytest.mark.slow
def test_an_unfinished_scan_of_named_objects_is_finished_by_the_next(photos: Path, tmp_path: Path) -> None:
    out, scorer = open_store(str(tmp_path / "out")), StubScorer()
    plan, _ = named_plan(photos, out, ["0.png", "1.png", "2.png"], scorer)
    assert plan
    Worker(plan, out, scorer, QUICK).work(0)
    assert len(named(photos, out, ["3.png"], scorer)) == 2
    assert scorer.scored == 4
    assert set(newest_table(out)) == {"0.png", "1.png", "2.png", "3.png"}


@pytest.mark.slow
def test_another_model_takes_over_the_names_of_an_unfinished_scan(photos: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    full(photos, out)
    write(photos / "0.png", 100)
    named_plan(photos, out, ["0.png"], StubScorer())
    write(photos / "1.png", 101)
    (told,) = named(photos, out, ["1.png"], StubScorer(card("2")))
    assert (told["named"]["objects"], told["named"]["other_model"]) == (2, 6)
    assert "6 of all rows by another model" in report.summary_text(told)
    digests = {key: row["digest"] for key, row in newest_table(out).items()}
    assert {key for key, digest in digests.items() if digest == card("2").digest} == {"0.png", "1.png"}

    scorer = StubScorer(card("2"))
    full(photos, out, scorer)
    assert scorer.scored == 5


def test_filters_hold_for_named_objects_too(photos: Path, tmp_path: Path) -> None:
    out, scorer = open_store(str(tmp_path / "out")), StubScorer()
    source, filters = ScanSource(url=str(photos)), Filters(suffixes=(".png",))
    plan, _ = plan_named(
        ScanRequest(source=source, filters=filters, card=scorer.card, shard_objects=SMALL_SHARDS),
        out,
        ["0.png", "note.jpg"],
    )
    assert plan
    told = work(plan, out, scorer)
    assert (told["totals"]["filtered"], told["named"]["objects"], set(newest_table(out))) == (1, 2, {"0.png"})


@pytest.mark.slow
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(crashes=st.lists(st.tuples(st.booleans(), st.integers(1, 50), st.booleans()), min_size=1, max_size=3))
@example(crashes=[(True, 38, False), (False, 4, False)])
def test_dying_at_any_call_loses_no_object_that_was_named(
    crashes: list[tuple[bool, int, bool]], photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Scans of named objects and of the whole source die in any order; what a scan has not told to be done is named
    again. Whatever has been told stands in every later table."""
    out = open_store(str(tmp_path_factory.mktemp("crash")))
    full(photos, out)
    done: set[str] = set()
    for number, (whole, at, after) in enumerate(crashes):
        keys = {f"{number}.png", f"new {number}.png"}
        for key in keys:
            write(photos / key, 200 + number)
        try:
            crashing = CrashingStore(out, at, after)
            if whole:
                full(photos, crashing)  # it may go on with a listing from before
            else:
                named(photos, crashing, keys)
                done |= keys
        except Crash:
            continue
        except ScanUnderWayError:
            full(photos, out)
        table = newest_table(out)
        assert {key: table[key]["etag"] for key in done} == {
            info.key: info.etag for info in open_store(str(photos)).objects() if info.key in done
        }
        assert all(len(table_of(out, scan)) >= 8 for scan in scan_names(out) if is_complete(out, scan))
    full(photos, out)  # it may finish a scan that listed before the last change
    full(photos, out)
    undisturbed = open_store(str(tmp_path_factory.mktemp("undisturbed")))
    full(photos, undisturbed)
    assert newest_table(out) == newest_table(undisturbed)
