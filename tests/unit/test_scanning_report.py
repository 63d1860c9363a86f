"""The figures of a scan report: prevalence, drift, provenance, labels, alerts; and that the page shows the JSON."""

import hashlib
import hmac
import json
import re
import threading
from html import unescape
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import duckdb
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.stats import ks_2samp
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.common.errors import UserError
from patchscan.common.retries import Retries
from patchscan.dataset.labels import LabelError, read_labels
from patchscan.detector.card import Card, Decision
from patchscan.reporting.pages import Figures, show
from patchscan.scanning import alerts, commands, drift, labels, report, steps
from patchscan.scanning.listing import Filters
from patchscan.scanning.options import AlertKind
from patchscan.scanning.plan import ScanSource, is_complete
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.prevalence import ONLY_SEEN, Rates, estimate, rogan_gladen
from patchscan.scanning.provenance import provenance
from patchscan.scanning.summary import flagged
from patchscan.scanning.table import ScanTable
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.folder import Folder
from patchscan.storage.store import StoreError
from tests.chromium import CHROMIUM, chromium
from tests.scan_kit import StubScorer, card, image


def test_prevalence_undoes_the_detectors_errors() -> None:
    # 1,000 AI and 9,000 real images, TPR 0.9, FPR 0.05: 900 + 450 are flagged.
    found = rogan_gladen(1350, 10_000, Rates(found=900, ai=1000, flagged=50, real=1000))
    assert found is not None
    assert found[0] == pytest.approx(0.1)
    assert found[1] < 0.1 < found[2]


def test_the_prevalence_interval_covers_the_truth_as_often_as_it_says() -> None:
    random, truth, hit, alarm = np.random.default_rng(0), 0.2, 0.85, 0.08
    inside = 0
    for _ in range(1000):
        flagged = random.binomial(2000, truth * hit + (1 - truth) * alarm)
        rates = Rates(random.binomial(150, hit), 150, random.binomial(150, alarm), 150)
        found = rogan_gladen(int(flagged), 2000, rates)
        inside += found is not None and found[1] <= truth <= found[2]
    assert 0.93 <= inside / 1000 <= 0.98


@pytest.mark.parametrize("rates", [Rates(5, 10, 5, 10), Rates(2, 10, 5, 10), Rates(0, 0, 1, 10)])
def test_a_detector_no_better_than_chance_gives_no_prevalence(rates: Rates) -> None:
    assert rogan_gladen(50, 100, rates) is None


COUNTS = st.lists(st.one_of(st.integers(0, 4), st.integers(0, 1100)), min_size=2, max_size=2).map(sorted)


@given(COUNTS, COUNTS, COUNTS)
@example([1, 2], [1, 4], [0, 1])
@example([50, 100], [1, 1000], [0, 1])
@example([0, 100], [1, 1000], [0, 1])
@example([1, 1], [1, 1], [0, 1])
@example([1000, 1000], [501, 1000], [500, 1000])
def test_a_prevalence_has_an_ordered_interval_that_holds_it(scan: list[int], ai: list[int], real: list[int]) -> None:
    estimated = rogan_gladen(scan[0], scan[1], Rates(ai[0], ai[1], real[0], real[1]))
    if estimated is not None:
        value, low, high = estimated
        assert 0 <= low <= value <= high <= 1


@pytest.mark.parametrize("rates", [Rates(1, 4, 0, 1), Rates(1, 1000, 0, 1)])
def test_where_the_rates_tell_nothing_any_share_is_possible(rates: Rates) -> None:
    found = rogan_gladen(0, 100, rates)
    assert found is not None
    assert found[1:] == (0.0, 1.0)


def _confusion(kind: str, true_ai: int, false_ai: int) -> dict[str, Any]:
    counts = {"true_ai": true_ai, "missed_ai": 100 - true_ai, "false_ai": false_ai, "true_real": 100 - false_ai}
    return {"kind": kind, "confusion": counts}


def test_the_worst_unseen_generator_widens_the_range() -> None:
    metrics = {
        "raw": {"a": _confusion("seen", 95, 5), "b": _confusion("unseen", 90, 5), "c": _confusion("unseen", 40, 5)}
    }
    found = estimate(300, 1000, card(metrics=metrics))
    assert [one["rates"] for one in found["cases"]] == ["seen generators", "worst unseen generator"]
    assert found["cases"][1]["tpr"] == 0.4
    assert found["high"] == found["cases"][1]["share"]["high"] > found["cases"][0]["share"]["high"]
    assert ONLY_SEEN not in found["assumptions"]


def test_a_card_that_knows_no_unseen_generator_is_said_to_find_fewer_of_them() -> None:
    found = estimate(300, 1000, card(metrics={"raw": {"a": _confusion("seen", 95, 5)}}))
    assert found["assumptions"][0] == ONLY_SEEN


def test_a_card_without_error_rates_gives_no_range() -> None:
    assert estimate(300, 1000, card())["high"] is None


def test_the_corrected_share_counts_graphics_as_evaluation_does() -> None:
    """The rates were measured with graphics not called AI, so a bucket of screenshots is not a bucket of AI images.
    In a tier that the model does not cover all are out of domain; there the score counts, as in the rates."""
    database = duckdb.connect()
    database.execute(
        "CREATE TABLE rows AS SELECT * FROM (VALUES ('native', 0.9, NULL), ('native', 0.9, 'out_of_domain'),"
        " ('web', 0.9, 'abstain_band'), ('hard', 0.9, 'out_of_domain'), ('web', 0.2, NULL)) AS r(tier, p_ai, reason),"
        " (VALUES (false)) AS o(other_model)"
    )
    table = SimpleNamespace(query_one=lambda query, *values: database.sql(query, params=values).df().iloc[0])
    found = flagged(cast(ScanTable, table), Decision(threshold=0.8, abstain_high=0.8, tiers={"hard": None}))
    assert tuple(found) == (3, 5)


def test_drift_is_told_from_none_and_agrees_with_scipy() -> None:
    random = np.random.default_rng(0)
    before, same, shifted = random.normal(0, 1, 5000), random.normal(0, 1, 800), random.normal(1, 1, 800)
    edges = drift.bin_edges(before)
    counts = {
        name: drift.count_in_bins(iter([values]), edges)
        for name, values in (("b", before), ("s", same), ("x", shifted))
    }
    assert not drift.compare(counts["b"], counts["s"])["alert"]
    found = drift.compare(counts["b"], counts["x"])
    assert found["alert"]
    assert found["ks"] == pytest.approx(ks_2samp(before, shifted).statistic, abs=0.01)


def test_too_few_images_are_not_compared() -> None:
    edges = np.array([0.0])
    few = drift.count_in_bins(iter([np.zeros(49)]), edges)
    assert drift.compare(few, few) == {
        "before": 49,
        "now": 49,
        "psi": None,
        "ks": None,
        "p_value": None,
        "alert": False,
    }


def _png(**texts: str) -> bytes:
    info, buffer = PngInfo(), BytesIO()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.open(BytesIO(image(1))).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _jpeg(software: str = "", xmp: bytes = b"") -> bytes:
    exif, buffer = Image.Exif(), BytesIO()
    if software:
        exif[305] = software
    Image.open(BytesIO(image(1))).save(buffer, "JPEG", exif=exif, xmp=xmp)
    return buffer.getvalue()


def test_an_ordinary_file_claims_nothing() -> None:
    assert provenance(image(1), "PNG") is None
    assert provenance(_jpeg(software="Adobe Photoshop 25"), "JPEG") is None


def test_generators_texts_and_source_types_are_found() -> None:
    text = provenance(_png(parameters="a cat\nSteps: 20, Sampler: Euler"), "PNG")
    assert text is not None
    assert text["generator"] == "Stable Diffusion web UI: a cat Steps: 20, Sampler: Euler"
    exif = provenance(_jpeg(software="Midjourney v6"), "JPEG")
    assert exif is not None
    assert exif["generator"] == "Software: Midjourney v6"
    xmp = b'<x Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    iptc = provenance(_jpeg(xmp=xmp), "JPEG")
    assert iptc is not None
    assert iptc["digital_source_type"] == "trainedAlgorithmicMedia"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_claims_nothing_and_raises_nothing() -> None:
    data = _jpeg(software="Midjourney v6")
    for cut in range(0, len(data), 37):
        provenance(data[:cut] + b"\xff" * 5 + data[cut + 5 :], "JPEG")


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("imagenet_ai_0419_biggan/val/ai/1.png", (1, "imagenet_ai_0419_biggan")),
        ("sd_v1/train/nature/1.jpg", (0, "sd_v1")),
        ("x/Fake/1.jpg", (1, "all")),
        ("real/1.jpg", (0, "all")),
        ("surreal/1.jpg", None),
        ("ai.jpg", None),
    ],
)
def test_folders_tell_labels(key: str, label: tuple[int, str] | None) -> None:
    assert labels.from_key(key) == label


def test_a_label_file_with_an_unknown_label_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("key,label\na.png,ai\nb.png,maybe\n")
    with pytest.raises(LabelError, match="line 3"):
        read_labels(str(tmp_path / "labels.csv"))


UNUSABLE_LABELS = {
    "missing": (None, "there is no file"),
    "latin-1": ("key,label\nf\xfc.png,ai\n".encode("latin-1"), "not UTF-8"),
    "utf-16 without its mark": ("key,label\na.png,ai\n".encode("utf-16-le"), "line 2: needs columns"),
    "half of utf-16": ("key,label\na.png,ai\n".encode("utf-16")[:-1], "not UTF-8"),
    "empty": (b"", "no labels"),
    "header": (b"key,label\n", "no labels"),
    "other columns": (b"name,class\na.png,ai\n", "line 2"),
    "a name of reports": (b"key,label,generator\na.png,ai,overall\n", "line 2: reports have a row overall"),
    "a field without end": (b'key,label\n"' + b"x" * 200_000, "not a CSV"),
}


@pytest.mark.parametrize("name", UNUSABLE_LABELS)
def test_labels_that_cannot_be_used_are_found_out_before_the_scan(name: str, tmp_path: Path) -> None:
    data, why = UNUSABLE_LABELS[name]
    path, out = tmp_path / "labels.csv", tmp_path / "out"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(LabelError, match=why):
        commands.scan(str(tmp_path), str(out), labels=str(path))
    assert not out.exists()


@pytest.mark.parametrize("source", ["folders", "labels.csv"])
def test_labels_of_no_listed_object_are_found_out_before_the_scan(source: str, tmp_path: Path) -> None:
    photos, out, labels_file = tmp_path / "photos", open_store(str(tmp_path / "out")), tmp_path / "labels.csv"
    named = source if source == "folders" else str(labels_file)
    request = ScanRequest(source=ScanSource(url=str(photos)), card=card())
    (photos / "sub").mkdir(parents=True)
    (photos / "sub" / "a.png").write_bytes(image(1))
    labels_file.write_text("key,label\na.png,ai\n")
    with pytest.raises(LabelError, match="no object has a label from"):
        steps.check_labelled(named, out, plan_scan(request, out))
    (photos / "sub").rename(photos / "real")
    labels_file.write_text("key,label\nreal/a.png,real\n")
    out = open_store(str(tmp_path / "another"))
    steps.check_labelled(named, out, plan_scan(request, out))


def test_labels_that_are_a_folder_or_in_the_root_folder_are_clear_errors(tmp_path: Path) -> None:
    for url in (str(tmp_path), "/no-such-labels.csv"):
        with pytest.raises(UserError, match=r"not a file|there is no file /no-such"):
            labels.check(url)
    labels.check("folders")


def test_a_generators_folder_that_is_called_as_a_row_of_reports_is_a_clear_error() -> None:
    """Its own row would be lost: the row of all images would take its place."""
    with pytest.raises(LabelError, match="reports have a row overall of their own: give that generator's folder"):
        labels.from_key("photos/overall/val/ai/a.png")


@pytest.mark.slow
@pytest.mark.parametrize(("suffixes", "why"), [((), "misspelt"), ((".jpg",), "filters leave out all 1 objects")])
def test_a_scan_of_nothing_is_an_alert(suffixes: tuple[str, ...], why: str, tmp_path: Path) -> None:
    photos, out, scorer = tmp_path / "photos", open_store(str(tmp_path / "out")), StubScorer()
    photos.mkdir()
    if suffixes:
        (photos / "a.png").write_bytes(image(1))
    made = plan_scan(
        ScanRequest(source=ScanSource(url=str(photos)), filters=Filters(suffixes=suffixes), card=scorer.card), out
    )
    found = report.reduce(out, made)
    assert [alert["kind"] for alert in found["alerts"]] == ["empty"]
    assert why in report.summary_text(found)
    assert ("1 left out by prefix or filters" in report.summary_text(found)) == bool(suffixes)
    steps.check_labelled("folders", out, made)
    assert steps.complete_scan(out, made, labels="folders") == 0
    assert steps.complete_scan(out, made, fail_on=[AlertKind.EMPTY]) == 3


def test_a_report_is_written_again_where_the_source_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out, scorer = tmp_path / "photos", open_store(str(tmp_path / "out")), StubScorer()
    photos.mkdir()
    light = np.random.default_rng(0).integers(200, 250, (48, 48, 3)).astype(np.uint8)
    Image.fromarray(light).save(photos / "a.png")
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card), out)
    Worker(made, out, scorer, WorkSettings(threads=1)).work(0)

    def refused(*_: object) -> None:
        raise StoreError("s3://photos: there are no credentials")

    monkeypatch.setattr(Folder, "fetch", refused)
    assert len(report.reduce(out, made)["most_suspicious"]) == 1
    assert "no longer readable as it was scored" in (out.read("report.html") or b"").decode()
    assert "the report has no pictures: s3://photos: there are no credentials" in capsys.readouterr().err


def test_a_report_that_is_written_again_keeps_its_date_and_says_which_pictures_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out, scorer = tmp_path / "photos", open_store(str(tmp_path / "out")), StubScorer()
    (photos / "ai").mkdir(parents=True)
    light = np.random.default_rng(0).integers(200, 250, (48, 48, 3)).astype(np.uint8)
    (photos / "real").mkdir()
    for name, pixels in (("ai/a.png", light), ("ai/b.png", light), ("real/c.png", light - 190)):
        Image.fromarray(pixels).save(photos / name)
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card), out)
    Worker(made, out, scorer, WorkSettings(threads=1)).work(0)
    report.reduce(out, made)
    assert capsys.readouterr().err == ""
    where = f"scans/{made.scan}/report.json"
    out.write(where, json.dumps(json.loads(out.read(where) or b"") | {"finished_at": "2026-01-01T00:00:00"}).encode())
    (photos / "ai" / "b.png").unlink()
    steps.complete_scan(out, made, "folders")
    assert json.loads(out.read("report.json") or b"")["finished_at"] == "2026-01-01T00:00:00"
    told = capsys.readouterr()
    assert "1 of the report's 2 pictures are missing" in told.err
    assert re.search(r"stub finds 100.0 % \(.*\) of the AI images and calls", told.out), "their generator is not known"
    assert f"evaluation: {out.url}/scans/{made.scan}/evaluation/report.html" in told.out


def test_a_scan_is_complete_also_where_no_object_with_a_label_was_scored(tmp_path: Path) -> None:
    photos, out, scorer = tmp_path / "photos", open_store(str(tmp_path / "out")), StubScorer()
    (photos / "ai").mkdir(parents=True)
    (photos / "ai" / "a.png").write_text("no image")
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card), out)
    Worker(made, out, scorer, WorkSettings(threads=1)).work(0)
    found = report.reduce(out, made, "folders")
    why = "none of the 1 objects that have a label from folders has a score of this model"
    assert is_complete(out, made.scan)
    assert found["evaluation"] == {"labels": "folders", "labelled": 0, "report": None, "findings": [why]}
    assert why in report.summary_text(found)
    assert why in (out.read("report.html") or b"").decode()


class Receiver(HTTPServer):
    """Keeps what is posted; answers with the given statuses in turn."""

    def __init__(self, statuses: list[int]):
        self.received: list[tuple[dict[str, str], bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.received.append((dict(self.headers), body))
                self.send_response(statuses[min(len(receiver.received), len(statuses)) - 1])
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        receiver = self
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


def test_a_webhook_is_signed_and_retried(tmp_path: Path) -> None:
    receiver = Receiver([503, 200])
    (tmp_path / "secret").write_text("s3cret\n")
    alerts.post(receiver.url, {"event": "scan.finished"}, tmp_path / "secret", Retries(10, 0.01))
    assert len(receiver.received) == 2
    headers, body = receiver.received[-1]
    signed = headers[alerts.TIMESTAMP].encode() + b"." + body
    assert headers[alerts.SIGNATURE] == "sha256=" + hmac.new(b"s3cret", signed, hashlib.sha256).hexdigest()
    assert json.loads(body) == {"event": "scan.finished"}
    receiver.shutdown()


def test_a_proxy_of_an_unknown_kind_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1")
    with pytest.raises(alerts.WebhookError, match="the proxy that the environment names"):
        alerts.post("http://hook.example", {}, None)


def test_a_webhook_that_refuses_is_a_clear_error() -> None:
    receiver = Receiver([404])
    with pytest.raises(alerts.WebhookError, match="status 404"):
        alerts.post(receiver.url, {}, None)
    receiver.shutdown()


@pytest.mark.parametrize("url", ["http://[::1", "http://a\tb/", "hooks.example.org/T0/B0", "ftp://x/", "http:///x", ""])
def test_a_webhook_without_an_address_is_found_out_before_the_scan(url: str, tmp_path: Path) -> None:
    with pytest.raises(alerts.WebhookError, match="--webhook is not an address"):
        commands.scan(str(tmp_path), str(tmp_path / "out"), webhook=url)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """A scan of a labelled folder with a card that states error rates: report.json, the page, the results folder."""
    folder, out_folder = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("out")
    for number in range(24):
        path = folder / "gan" / "val" / ("ai" if number % 2 else "nature") / f"<b>{number}&.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number))
    (folder / "marked.png").write_bytes(_png(parameters="a <script>alert(1)</script> cat"))
    (folder / "broken.jpg").write_text("no")
    metrics = {"raw": {"a": _confusion("seen", 95, 5), "c": _confusion("unseen", 40, 5)}}
    stub: Card = card(metrics=metrics, warnings=["made for tests"])
    out, scorer = open_store(str(out_folder)), StubScorer(stub)
    made = plan_scan(ScanRequest(source=ScanSource(url=str(folder)), card=stub), out)
    Worker(made, out, scorer, WorkSettings(threads=2)).work(0)
    found = report.reduce(out, made, labels="folders")
    return found, (out_folder / "report.html").read_text(), out_folder


def test_every_figure_on_the_page_is_the_one_in_report_json(finished: tuple[dict[str, Any], str, Path]) -> None:
    _, page, out = finished
    figures = Figures(json.loads((out / "report.json").read_text()))
    shown = re.findall(r'<span data-json="([^"]*)" data-style="([^"]*)">(.*?)</span>', page, re.DOTALL)
    assert len(shown) > 80
    for path, style, text in shown:
        assert unescape(text) == show(figures.at(path), style), path


def test_keys_and_claims_cannot_inject_markup(finished: tuple[dict[str, Any], str, Path]) -> None:
    _, page, _ = finished
    assert "<script>alert" not in page
    assert "<b>1&" not in page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_runs_only_the_reports_own_script(finished: tuple[dict[str, Any], str, Path], tmp_path: Path) -> None:
    """Were a name ever not escaped, its script would not run; nor does a mark in one turn the text beside it, nor a
    long word make the page wider than a phone."""
    file = tmp_path / "report.html"
    strange = f"<p>{'w' * 300}</p><script>document.title = 'taken'</script></main>"
    file.write_text(finished[1].replace("</main>", strange))
    with chromium(tmp_path / "profile", tmp_path) as page:
        page.open(file)
        assert page.value("document.querySelectorAll('table.sortable th button').length") > 3
        assert page.value("document.title") != "taken"
        assert page.value("getComputedStyle(document.querySelector('[data-json]')).unicodeBidi") == "isolate"
        page.errors.clear()  # what was refused
        page.size(390, 800)
        assert page.value("document.documentElement.scrollWidth") <= 390, "nothing to scroll sideways"


def test_a_labelled_scan_carries_the_evaluation(finished: tuple[dict[str, Any], str, Path]) -> None:
    found, _, out = finished
    assert found["evaluation"]["labelled"] == 24
    assert (out / found["evaluation"]["report"]).exists()


def test_alerts_name_new_ai_images(finished: tuple[dict[str, Any], str, Path]) -> None:
    found, _, _ = finished
    assert [one["kind"] for one in found["alerts"]] == (["ai"] if found["verdicts"]["ai"] else [])
    assert found["totals"]["new_ai"] == found["verdicts"]["ai"] > 0
    counts = found["totals"]
    told = f"called AI-generated: {counts['new_ai']} of the images scored in this scan ({counts['scored']})"
    assert found["alerts"][0]["message"] == told, "they are not new where another model scored them before"


def test_a_secret_that_is_not_there_is_told_before_the_scan(tmp_path: Path) -> None:
    options = ["--webhook", "http://127.0.0.1:9", "--webhook-secret-file", str(tmp_path / "secret")]
    (tmp_path / "photos").mkdir()
    done = CliRunner().invoke(app, ["scan", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), *options])
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()
