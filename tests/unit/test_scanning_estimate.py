"""What a scan will take, reckoned by hand from what a sample of its objects took."""

from dataclasses import replace
from pathlib import Path

import pytest

from patchscan.scanning.estimate import Meter, estimate, estimate_text
from patchscan.scanning.plan import Plan, ScanSource
from patchscan.scanning.planning import ScanRequest, plan_estimate, plan_scan
from patchscan.storage import open_store
from tests.scan_kit import card, image


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Of 40 objects, 20 of them in the shard."""
    (tmp_path / "photos").mkdir()
    for number in range(40):
        (tmp_path / "photos" / f"{number}.png").write_bytes(image(number))
    out, scratch = open_store(str(tmp_path / "out")), open_store(str(tmp_path / "scratch"))
    return plan_estimate(ScanRequest(source=ScanSource(url=str(tmp_path / "photos")), card=card()), out, scratch, 20)


def measured(seconds: list[float]) -> Meter:
    """A meter of 20 objects in 10 groups that took these seconds, half as many core-seconds, 3 requests, 90 bytes."""
    meter = Meter(20, {"GetObject": 1})
    meter.done, meter.scored = 20, 15
    meter.notes = [{"seconds": 5.0, "core_hours": 1.0, "requests": 7.0, "bytes": 100.0}]
    for one in seconds:
        last = meter.notes[-1]
        more = {"seconds": one, "core_hours": one / 2 / 3600, "requests": 3.0, "bytes": 90.0}
        meter.notes.append({name: last[name] + more[name] for name in more})
    return meter


def test_it_is_what_the_groups_took_times_all_objects(plan: Plan, tmp_path: Path) -> None:
    plan.listing.update(seconds=10.0, requests={"ListObjectsV2": 2})
    # The first group is slow, as it waits for processes to start, and does not count.
    found = estimate(plan, measured([60.0, *[2.0, 4.0] * 4, 3.0]))
    assert found["seconds"].value == pytest.approx(40 * 3.0 / 2 + 10)
    assert found["core_hours"].value == pytest.approx(40 * 1.5 / 2 / 3600)
    assert found["requests"].bounds == pytest.approx((62, 62, 62))
    assert found["images"].value == 30
    assert found["bytes"].value == sum(file.stat().st_size for file in (tmp_path / "photos").iterdir())
    for one in (found["seconds"], found["core_hours"], found["images"]):
        value, low, high = one.bounds
        assert low < value < high


def test_bytes_are_those_of_the_sample_where_the_list_does_not_say_them(plan: Plan) -> None:
    found = estimate(replace(plan, bytes_to_score=None), measured([1.0] * 10))
    assert found["bytes"].bounds == pytest.approx((40 * 90 / 2,) * 3)


def test_what_a_server_computes_counts(plan: Plan) -> None:
    used = [0.0]
    meter = Meter(20, {}, lambda: used[0])
    for number in range(20):
        used[0] = 3600.0 * number
        meter.row({"status": "scored", "attempts": 1}, 10)
    assert estimate(plan, meter)["core_hours"].value == pytest.approx(40, rel=0.01)


def test_the_plan_of_an_estimate_counts_as_the_scans_does_and_leaves_no_trace(plan: Plan, tmp_path: Path) -> None:
    assert not (tmp_path / "out").exists()
    made = plan_scan(ScanRequest(source=plan.source, card=card()), open_store(str(tmp_path / "out")))
    for name in ("listed", "unchanged", "bytes_to_score", "duplicates", "filtered"):
        assert getattr(plan, name) == getattr(made, name), name


def test_where_nothing_was_tried_nothing_is_told(plan: Plan) -> None:
    lines = estimate_text(plan, Meter(0, {})).splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == ["bytes", "requests"]
