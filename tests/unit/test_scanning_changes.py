"""What a scan's report says has changed since an earlier scan, and the statistics behind it."""

import io
import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.stats import chi2_contingency
from statsmodels.stats.proportion import confint_proportions_2indep
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.reporting.pages import Figures, show
from patchscan.reporting.statistics import difference_of_rates, wilson
from patchscan.scanning import drift, report
from patchscan.scanning.plan import Plan, ScanSource
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.store import Store
from tests.scan_kit import StubScorer, card


def picture(number: int, level: int, kind: str, **options: Any) -> bytes:
    """A light picture, of a level from 180 up, is one that the stub scorer calls AI."""
    noise = np.random.default_rng(number).integers(0, 30, (48, 48, 3))
    buffer = io.BytesIO()
    Image.fromarray((noise + level).astype(np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


def scan(folder: Path, out: Store, scorer: StubScorer | None = None) -> Plan:
    scorer = scorer or StubScorer()
    made = plan_scan(ScanRequest(source=ScanSource(url=str(folder)), card=scorer.card), out)
    for index in range(made.shards):
        Worker(made, out, scorer, WorkSettings(threads=2)).work(index)
    report.reduce(out, made)
    return made


def written(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Plan]]:
    """Three scans of a folder: of 60 dark JPEGs; of 60 light PNGs with a generator's text beside them, one JPEG changed
    and one gone; and of nothing new."""
    folder, out = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("out")
    for number in range(60):
        (folder / f"old {number:02d}.jpg").write_bytes(picture(number, 60 + number % 20, "JPEG", quality=98))
    plans = [scan(folder, open_store(str(out)))]
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a")
    for number in range(60):
        (folder / f"new <{number:02d}>.png").write_bytes(picture(number, 180 + number % 20, "PNG", pnginfo=info))
    (folder / "old 00.jpg").write_bytes(picture(99, 60, "JPEG", quality=98))
    (folder / "old 01.jpg").unlink()
    plans += [scan(folder, open_store(str(out))) for _ in range(2)]
    return folder, out, plans


def section(out: Path, plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"scans/{plan.scan}/report.json").read_text())["changes"]
    return found


def properties(changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["property"]: one for kind in ("storage", "provenance", "verdicts") for one in changes[kind]}


@pytest.mark.slow
def test_what_changed_is_told_by_kind_with_examples(scans: tuple[Path, Path, list[Plan]]) -> None:
    _, out, plans = scans
    assert json.loads((out / f"scans/{plans[0].scan}/report.json").read_text())["changes"] is None
    changes = section(out, plans[1])
    assert changes["objects"] == {"before": 60, "now": 119, "gone": 1, "new": 60, "changed": 1, "same": 58}
    found = properties(changes)
    shifted = {name for name, one in found.items() if one["reading"] == "shifted"}
    assert shifted >= {"format", "JPEG quality", "generator's text", "verdict"}
    assert shifted.isdisjoint({"longest side", "C2PA manifest", "C2PA signer", "digital source type"})
    assert all(one["p_corrected"] >= one["p_value"] for one in found.values())
    grown = found["format"]["values"][0]
    assert (grown["name"], grown["before"], grown["new"]) in (("PNG", 0, 60), ("JPEG", 60, 1))
    png = next(row for row in found["format"]["values"] if row["name"] == "PNG")
    assert png["change"]["low"] < png["change"]["value"] == 60 / 61 < png["change"]["high"]
    assert len(png["examples"]) == 3
    assert all(one["is_new"] and one["key"].endswith(".png") for one in png["examples"])
    assert changes["scores"]["alert"]
    alerts = json.loads((out / f"scans/{plans[1].scan}/report.json").read_text())["alerts"]
    (alert,) = (one for one in alerts if one["kind"] == "drift")
    assert "so have " in alert["message"]
    assert "format" in alert["message"]


@pytest.mark.slow
def test_the_page_shows_the_changes_with_pictures(scans: tuple[Path, Path, list[Plan]]) -> None:
    _, out, plans = scans
    where = out / "scans" / plans[1].scan
    page, figures = (where / "report.html").read_text(), Figures(json.loads((where / "report.json").read_text()))
    shown = re.findall(r'<span data-json="(changes[^"]*)" data-style="([^"]*)">(.*?)</span>', page, re.DOTALL)
    assert len(shown) > 60
    for path, style, text in shown:
        assert unescape(text) == show(figures.at(path), style), path
    part = page[page.index("<h2>What changed</h2>") : page.index("<h2>Objects without a score</h2>")]
    pictures = json.loads((where / "report.json").read_text())["changes"]["examples"]
    assert part.count("data:image/jpeg") == len(pictures) >= 3
    assert {"format: PNG", "verdict: ai"} <= set(pictures[0]["of"])
    assert "new <" not in part


@pytest.mark.slow
def test_a_report_compares_with_any_earlier_scan(scans: tuple[Path, Path, list[Plan]]) -> None:
    _, out, plans = scans
    last = section(out, plans[2])
    assert (last["compared_with"]["scan"], last["objects"]["same"]) == (plans[1].scan, 119)
    assert last["scores"]["psi"] is None, "nothing is new, so there is nothing to compare"
    result = CliRunner().invoke(app, ["report", str(out), "--compare-with", plans[0].scan])
    assert result.exit_code == 0, result.output
    changes = written(out)["changes"]
    assert (changes["compared_with"]["scan"], changes["objects"]["new"]) == (plans[0].scan, 60)
    assert written(out)["scan"] == plans[2].scan
    assert changes["storage"] == section(out, plans[1])["storage"]


@pytest.mark.slow
def test_a_report_compares_with_another_results_folder(scans: tuple[Path, Path, list[Plan]], tmp_path: Path) -> None:
    """Of another model too: then scores are not compared, all the rest is."""
    folder, out, _ = scans
    scan(folder, open_store(str(tmp_path / "other")), StubScorer(card("2")))
    result = CliRunner().invoke(app, ["report", str(tmp_path / "other"), "--compare-with", str(out)])
    assert result.exit_code == 0, result.output
    changes = written(tmp_path / "other")["changes"]
    assert changes["compared_with"]["results"] == str(out)
    assert changes["objects"] == {"before": 119, "now": 119, "gone": 0, "new": 0, "changed": 0, "same": 119}
    assert (changes["scores"], changes["verdicts"]) == (None, [])
    assert "Another model scored the images then" in (tmp_path / "other" / "report.html").read_text()


@pytest.mark.slow
def test_what_an_older_table_does_not_tell_has_not_changed(
    scans: tuple[Path, Path, list[Plan]], tmp_path: Path
) -> None:
    """Tables of version 0.1 lack columns; and an image that failed then and is scored now is new, not changed."""
    _, out, plans = scans
    shutil.copytree(out, tmp_path / "older")
    for part in (tmp_path / "older" / "scans" / plans[0].scan / "rows").glob("*.parquet"):
        table = pq.read_table(part).drop_columns(["jpeg_quality", "tier"])
        failed = pa.array(["failed", *table["status"].to_pylist()[1:]][: len(table)], pa.string())
        pq.write_table(table.set_column(table.schema.get_field_index("status"), "status", failed), part)
    result = CliRunner().invoke(app, ["report", str(tmp_path / "older"), "--compare-with", plans[0].scan])
    assert result.exit_code == 0, result.output
    changes = written(tmp_path / "older")["changes"]
    found = properties(changes)
    assert [found[name]["reading"] for name in ("JPEG quality", "looks like")] == [None, None]
    assert found["format"]["reading"] == "shifted"
    assert changes["objects"]["new"] + changes["objects"]["changed"] + changes["objects"]["same"] == 119
    assert changes["objects"]["changed"] <= 1


@pytest.mark.slow
def test_a_scan_of_a_sample_does_not_tell_what_is_gone(scans: tuple[Path, Path, list[Plan]], tmp_path: Path) -> None:
    folder, out, _ = scans
    scorer = StubScorer()
    made = plan_scan(
        ScanRequest(source=ScanSource(url=str(folder)), card=scorer.card, sample=10), open_store(str(tmp_path))
    )
    for index in range(made.shards):
        Worker(made, open_store(str(tmp_path)), scorer, WorkSettings(threads=2)).work(index)
    report.reduce(open_store(str(tmp_path)), made)
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--compare-with", str(out)])
    assert result.exit_code == 0, result.output
    assert written(tmp_path)["changes"]["objects"]["gone"] is None
    assert "what is gone is not known" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("wanted", "why"), [("20260101T000000Z-0a0a0a", "plan.json is missing"), ("nowhere", "neither the name of a scan")]
)
def test_a_scan_that_is_not_there_cannot_be_compared_with(
    scans: tuple[Path, Path, list[Plan]], wanted: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", str(scans[1]), "--compare-with", wanted])
    assert result.exit_code != 0
    assert why in str(result.exception)


def test_a_scan_is_not_compared_with_itself(scans: tuple[Path, Path, list[Plan]]) -> None:
    result = CliRunner().invoke(app, ["report", str(scans[1]), "--compare-with", scans[2][2].scan])
    assert "name an earlier one" in str(result.exception)


def test_shares_are_tested_as_scipy_tests_them() -> None:
    before, now = np.array([400, 300, 200, 100]), np.array([60, 30, 20, 40])
    index, p_value = drift.shift(before, now)
    assert p_value == pytest.approx(chi2_contingency([before, now])[1])
    assert index is not None
    assert 0.1 < index < 0.5
    rare = drift.shift(np.append(before, [3, 1]), np.append(now, [0, 1]))[1]
    assert rare == pytest.approx(chi2_contingency([[*before, 4], [*now, 1]])[1])
    assert drift.shift(np.array([49]), np.array([500])) == (None, None)
    assert drift.shift(np.array([50]), np.array([500]))[1] == 1


def test_readings_need_size_and_certainty() -> None:
    assert drift.reading(0.3, 0.0001) == "shifted"
    assert drift.reading(0.3, 0.01) == drift.reading(0.2, 0.0001) == "moved"
    assert drift.reading(0.3, 0.2) == drift.reading(0.05, 0.0) == "stable"


def test_equal_scans_are_seldom_said_to_differ() -> None:
    rng, shares = np.random.default_rng(0), [0.5, 0.2, 0.2, 0.05, 0.03, 0.02]
    p_values = [drift.shift(rng.multinomial(1000, shares), rng.multinomial(200, shares))[1] for _ in range(500)]
    assert 0.02 < np.mean([p is not None and p < 0.05 for p in p_values]) < 0.08


def test_a_difference_of_rates_agrees_with_statsmodels() -> None:
    found = difference_of_rates(wilson(40, 60), wilson(300, 900))
    low, high = confint_proportions_2indep(40, 60, 300, 900, method="newcomb", compare="diff")
    assert found.bounds == pytest.approx((40 / 60 - 1 / 3, low, high))
    assert difference_of_rates(wilson(0, 0), wilson(1, 2)).value is None
