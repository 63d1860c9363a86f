"""People's labels of a scan: the sample, the review page in a browser, the estimates and their report."""

import base64
import csv
import io
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchscan.dataset import labels as by_key
from patchscan.reporting import survey
from patchscan.reporting.pages import Figures, render
from patchscan.scanning import audit_labels, audit_sample
from patchscan.scanning.audit_labels import Labels, read_labels
from patchscan.scanning.audit_report import build_report, estimates
from patchscan.scanning.audit_sample import AuditError, allocate, draw, systematic
from patchscan.scanning.evidence_commands import audit_report as report_command
from patchscan.scanning.evidence_commands import audit_sample as sample_command
from patchscan.scanning.plan import ScanSource
from patchscan.scanning.planning import ScanRequest
from patchscan.scanning.review_page import _image, review_page
from patchscan.scanning.steps import complete_scan, make_plan
from patchscan.scanning.thumbnails import PictureReader
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from tests.audit_coverage import Bucket, simulate
from tests.chromium import CHROMIUM, Page, chromium
from tests.scan_kit import StubScorer, image

# What a stranger may call a file, to run a script on the page or in a spreadsheet.
HOSTILE = "</script><img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a scan of 60 images, a quarter of them with hostile names, in `results`."""
    folder = tmp_path_factory.mktemp("audited")
    for number in range(60):
        file = folder / "photos" / (f"{HOSTILE}{number}.png" if number % 4 == 0 else f"album{number % 4}/{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image(number))
    (folder / "photos" / "notes.txt").write_text("not an image")
    source, results, scorer = ScanSource(url=str(folder / "photos")), open_store(str(folder / "results")), StubScorer()
    plan = make_plan(ScanRequest(source=source, card=scorer.card), results)
    Worker(plan, results, scorer, WorkSettings(threads=2)).work(0)
    complete_scan(results, plan)
    return folder


@pytest.fixture(scope="module")
def audited(scanned: Path) -> dict[str, Any]:
    """The sample that `audit-sample` drew of it; the page lies in `audit`."""
    sample_command(str(scanned / "results"), scanned / "audit", n=30)
    return dict(json.loads((scanned / "audit" / "sample.json").read_text()))


@pytest.mark.slow
def test_each_image_has_the_chance_that_is_written_down() -> None:
    bucket = Bucket(400, 0.2, np.random.default_rng(0))
    times = dict.fromkeys(bucket.rows.key, 0)
    chances = {}
    for seed in range(60):
        sample = draw(bucket, bucket.decision, 60, seed)
        assert len(sample["rows"]) == sum(one["sampled"] for one in sample["strata"]) == 60
        for row in sample["rows"]:
            times[row["key"]] += 1
            chances[row["key"]] = sample["strata"][row["stratum"]]["inclusion"]
    found, expected = (np.array([where.get(key, 0) for key in bucket.rows.key]) for where in (times, chances))
    # Binomial: 60 draws with each image's chance. An image that was never drawn has no chance written down.
    far = (found - 60 * expected) / np.sqrt(60 * expected * (1 - expected) + 1e-9)
    assert np.abs(far[found > 0]).max() < 5
    assert (found == 0).mean() < 0.02


def test_the_same_seed_draws_the_same_sample_and_folders_get_their_share() -> None:
    bucket = Bucket(3000, 0.1, np.random.default_rng(1))
    sample = draw(bucket, bucket.decision, 200, 5)
    assert sample == draw(bucket, bucket.decision, 200, 5) != draw(bucket, bucket.decision, 200, 6)
    weight = dict.fromkeys({row["key"].split("/")[0] for row in sample["rows"]}, 0.0)
    for row in sample["rows"]:
        weight[row["key"].split("/")[0]] += 1 / sample["strata"][row["stratum"]]["inclusion"]
    true = bucket.rows.key.str.split("/").str[0].value_counts()
    largest = true.index[0]
    assert weight[largest] == pytest.approx(true[largest], rel=0.15)


@pytest.mark.parametrize(
    ("populations", "size"), [([1000, 500, 100, 20, 3], 100), ([5, 5], 100), ([1_000_000, 1], 20), ([50] * 7, 20)]
)
def test_the_sample_is_dealt_out_within_the_strata(populations: list[int], size: int) -> None:
    dealt = allocate(populations, size)
    assert sum(dealt) == min(size, sum(populations))
    assert all(0 < given <= there for given, there in zip(dealt, populations, strict=True))
    for there, given in zip(populations, dealt, strict=True):
        for start in (0.0, 0.5, 0.999999):
            places = systematic(there, given, start)
            assert len(set(places)) == given
            assert 1 <= min(places) <= max(places) <= there


@pytest.mark.slow
def test_intervals_hold_the_truth_in_simulated_buckets() -> None:
    found = [one for one in simulate(16, 200) if one["figure"] in ("prevalence", "tpr", "fpr")]
    # Of 48 intervals, 95 % and more hold the truth; fewer than 40 of them would be a chance of 1 in 10,000.
    assert sum(one["held"] for one in found) / len(found) > 0.83
    assert np.mean([one["width"] for one in found]) < 0.4


def strata(*counts: tuple[int, bool, int, int]) -> list[survey.Stratum]:
    """Strata of (population, called, labelled AI, labelled real); the scores say nothing."""
    return [
        survey.Stratum(there, called, 0.0, 0.5, np.array([1.0] * ai + [0.0] * real), np.full(ai + real, 0.5))
        for there, called, ai, real in counts
    ]


def test_a_bucket_that_was_labelled_whole_is_known_exactly() -> None:
    known = strata((20, False, 2, 18), (10, True, 7, 3))
    counts = survey.possible_counts(known)
    rates = survey.rates(known, [False, True], counts)
    assert survey.prevalence(known, counts).bounds == pytest.approx((0.3, 0.3, 0.3))
    assert rates.tpr.bounds == pytest.approx((7 / 9,) * 3)
    assert rates.fpr.bounds == pytest.approx((3 / 21,) * 3)
    assert rates.precision.bounds == pytest.approx((0.7,) * 3)
    assert rates.missed.bounds == pytest.approx((0.1,) * 3)


def test_labels_are_weighted_by_their_stratum() -> None:
    found = strata((9000, False, 1, 99), (1000, True, 80, 20))
    rates = survey.rates(found, [False, True], survey.possible_counts(found))
    assert rates.tpr.value == pytest.approx(800 / 890)
    assert rates.fpr.value == pytest.approx(200 / 9110)
    assert survey.prevalence(found, survey.possible_counts(found)).value == pytest.approx(0.089)


def test_good_predictions_narrow_the_interval() -> None:
    rng = np.random.default_rng(0)
    is_ai = (rng.random(200) < 0.4).astype(float)
    good = np.clip(is_ai * 0.8 + 0.1 + rng.normal(0, 0.1, 200), 0, 1)
    width = {}
    for name, predicted in (("good", good), ("useless", rng.random(200))):
        one = [survey.Stratum(10_000, True, 0.0, float(predicted.mean()), is_ai, predicted)]
        _, low, high = survey.prevalence(one, survey.possible_counts(one)).bounds
        width[name] = high - low
    assert width["good"] < 0.35 * width["useless"]


def test_where_nothing_was_found_the_interval_still_has_a_width() -> None:
    none = strata((5000, False, 0, 100), (50, True, 0, 20))
    counts = survey.possible_counts(none)
    value, low, high = survey.prevalence(none, counts).bounds
    assert value == low == 0
    assert 0.01 < high < 0.08
    assert survey.rates(none, [False, True], counts).tpr.value is None


def test_kappa_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    first = rng.choice(audit_labels.LABELS, 80).tolist()
    second = [one if rng.random() < 0.7 else "ai" for one in first]
    found = survey.cohen_kappa(first, second)
    assert found.value == pytest.approx(cohen_kappa_score(first, second))
    _, low, high = found.bounds
    assert low < found.bounds[0] < high
    assert survey.cohen_kappa(["ai"], ["ai"]).value is None


@pytest.mark.parametrize(
    ("first", "second", "kappa"), [("ai real ai", "ai real ai", 1.0), ("ai ai ai ai", "ai real ai ai", 0.0)]
)
def test_kappa_without_an_error_to_compute_has_no_interval(first: str, second: str, kappa: float) -> None:
    """Three images on which two agree do not show that they always do: 1.00 (1.00 to 1.00) would say so."""
    found = survey.cohen_kappa(first.split(), second.split())
    assert found.value == pytest.approx(kappa)
    assert found.low is found.high is None


def label_all(sample: dict[str, Any], reviewer: str = "me", **changed: str) -> Labels:
    """Labels that agree with the verdict, but for those that are named by `image<number>`."""
    given = {row["number"]: "ai" if row["verdict"] == "ai" else "real" for row in sample["rows"]}
    given |= {int(name.removeprefix("image")): label for name, label in changed.items()}
    return Labels(sample["audit"], reviewer, given, frozenset())  # type: ignore[arg-type]


@pytest.mark.slow
def test_images_that_nobody_could_tell_widen_the_range_and_not_the_estimate(audited: dict[str, Any]) -> None:
    called = next(row["number"] for row in audited["rows"] if row["verdict"] == "ai")
    report = build_report(audited, [label_all(audited, **{f"image{called}": "cannot_tell"})], 0.05)
    assert report["rates"]["fpr"]["value"] == 0
    assert report["counts"]["cannot_tell"] == 1
    assert report["whatever"]["fpr"]["high"] > report["rates"]["fpr"]["high"]
    for name in ("prevalence", "labels_only"):
        assert report["whatever"][name]["low"] < report[name]["low"] + 1e-9
    assert any("Undecided images" in one for one in report["warnings"])
    assert build_report(audited, [label_all(audited)], 0.05)["whatever"] is None


def test_two_reviewers_who_disagree_leave_an_image_undecided(audited: dict[str, Any]) -> None:
    first = next(row["number"] for row in audited["rows"] if row["verdict"] == "real")
    report = build_report(audited, [label_all(audited), label_all(audited, "you", **{f"image{first}": "ai"})], 0.05)
    assert report["counts"]["disagreed"] == report["counts"]["cannot_tell"] == 1
    assert report["agreement"]["both"] == len(audited["rows"])
    assert report["agreement"]["same"] == len(audited["rows"]) - 1
    assert 0.5 < report["agreement"]["kappa"]["value"] < 1
    same = build_report(audited, [label_all(audited), label_all(audited, "you")], 0.0005)
    page = render("patchscan.scanning", "audit.html", same)
    assert re.search(r"Cohen's kappa is\s+<span[^>]*>1.00</span> \(no interval\)", page)
    assert "at or below 0.05\u00a0% of this bucket's real images" in same["findings"][-1]


def test_a_stratum_without_labels_is_joined_to_its_neighbour(audited: dict[str, Any]) -> None:
    given = {row["number"]: "real" for row in audited["rows"] if row["stratum"] != 1}
    found = estimates(audited, given)  # type: ignore[arg-type]
    assert found.prevalence.value == 0
    assert found.rates is not None
    called = {row["number"]: "ai" for row in audited["rows"] if row["verdict"] == "ai"}
    assert estimates(audited, called).rates is None, "no label below the threshold"  # type: ignore[arg-type]


def test_uncertain_images_of_any_score_make_no_threshold_above_the_scan_s_own() -> None:
    """A quarter of the bucket are graphics with high scores: "from p_ai 0.98" would call fewer than the row says."""
    places = ((False, -5.0), (False, -1.0), (False, 4.0), (True, 0.1), (True, 1.0))
    sample = {
        "strata": [
            {"population": 100, "called": called, "margin": [margin, margin + 3], "mean_p_ai": 0.5}
            for called, margin in places
        ],
        "rows": [{"number": number, "stratum": number % 5, "p_ai": 0.5} for number in range(50)],
    }
    labels = {number: "ai" if number % 3 else "real" for number in range(50)}
    found = estimates(sample, labels).thresholds  # type: ignore[arg-type]
    assert [(one.margin, one.called) for one in found] == [(-1.0, 400), (0.0, 200), (1.0, 100)]


def test_a_reviewer_without_a_name_is_unnamed(audited: dict[str, Any]) -> None:
    page = render("patchscan.scanning", "audit.html", build_report(audited, [label_all(audited, "")], 0.05))
    assert "unnamed labelled" in page


def test_the_report_keeps_the_labels_and_shows_what_it_says(
    scanned: Path, audited: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"number": row["number"], "label": "real", "score_seen": row["number"] == 1} for row in audited["rows"]]
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"audit": audited["audit"], "reviewer": "<i>me</i>", "labels": rows}))
    report_command(str(scanned / "results"), file)
    folder = scanned / "results" / "audits" / audited["audit"]
    report, page = json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()
    assert report["prevalence"]["value"] == 0
    assert report["rates"]["tpr"]["value"] is None
    assert report["rates"]["precision"]["value"] == 0
    assert {row["label"] for row in report["mistakes"]} == {"real"}
    assert str(Figures(report).text("findings.0")) in page
    assert "<i>me</i>" not in page
    assert "&lt;i&gt;me&lt;/i&gt;" in page
    assert "<img src=x" not in page
    told = capsys.readouterr().out
    assert "before 1 of the labels" in told
    assert "Images labelled AI: only 0" in told
    kept = by_key.read_labels(str(folder.parent / "labels.csv")).by_key
    assert kept == {row["key"]: (0, "all") for row in audited["rows"]}
    later = audit_labels.add_to_labels(
        (folder.parent / "labels.csv").read_bytes(), audited, {1: "ai", 2: "cannot_tell"}
    )
    (tmp_path / "later.csv").write_bytes(later)
    first, second = (row["key"] for row in audited["rows"][:2])
    expected = {key: label for key, label in kept.items() if key != second} | {first: (1, "all")}
    assert by_key.read_labels(str(tmp_path / "later.csv")) == by_key.Labels(expected, cannot_tell=1)
    assert read_labels(folder / "labels-1.json").score_seen == {1}


def test_two_audits_at_once_keep_the_labels_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = audit_labels.add_to_labels

    def slowly(*given: Any) -> bytes:
        time.sleep(0.2)
        return add(*given)

    def save(audit: str) -> None:
        sample = {"audit": audit, "rows": [{"number": 1, "key": f"{audit}.png"}]}
        labels = Labels(audit, "me", {1: "ai"}, frozenset())
        audit_labels.save_labels(open_store(str(tmp_path)), sample, [labels])

    monkeypatch.setattr(audit_labels, "add_to_labels", slowly)
    with ThreadPoolExecutor(2) as threads:
        assert [*threads.map(save, ["first", "second"])] == [None, None]
    assert {*by_key.read_labels(str(tmp_path / "audits/labels.csv")).by_key} == {"first.png", "second.png"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "{}", "no labels"),
        ("a.csv", "number,label\n1,ai\n", "no labels"),
        (
            "a.json",
            '{"audit": "x", "reviewer": "", "labels": [{"number": 1, "label": [], "score_seen": 0}]}',
            "the label",
        ),
        ("a.csv", "number,label,score_seen,audit,reviewer\n", "no label"),
        ("a.csv", "number,label,score_seen,audit,reviewer\n1,fake,0,x,me\n", "'fake'"),
        ("a.csv", "number,label,score_seen,audit,reviewer\n1,ai,0,x,me\n1,ai,0,x,me\n", "twice"),
        ("a.csv", "number,label,score_seen,audit,reviewer\n1,ai,0,x,me\n2,ai,0,y,me\n", "several audits"),
        ("a.csv", "number,label,score_seen,audit,reviewer\n1,ai,0,../../x,me\n", "not the name of an audit"),
        ("a.csv", "number,label,score_seen,audit,reviewer\n1,ai,0,..,me\n", "not the name of an audit"),
        ("a.csv", "number,label,score_seen,audit,reviewer\n1,ai,0,x,me\n", "holds no audit x"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, scanned: Path, name: str, content: str, says: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(AuditError, match=says):
        report_command(str(scanned / "results"), tmp_path / name)


def test_labels_of_images_that_were_not_drawn_are_refused(audited: dict[str, Any]) -> None:
    with pytest.raises(AuditError, match="image 1000"):
        build_report(audited, [label_all(audited, image1000="ai")], 0.05)


def test_the_page_tells_nothing_of_the_score_and_lets_only_its_script_run(
    scanned: Path, audited: dict[str, Any]
) -> None:
    page = unescape((scanned / "audit" / "review.html").read_text())
    assert "default-src 'none'" in page
    assert "script-src 'sha256-" in page
    assert page.count("<script") == 2
    assert "<noscript>" in page
    assert "http://" not in page
    assert "https://" not in page
    assert sum(HOSTILE in row["key"] for row in audited["rows"]) > 3
    assert HOSTILE not in (scanned / "audit" / "review.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_person_labels_the_images_in_a_browser(scanned: Path, audited: dict[str, Any], tmp_path: Path) -> None:
    file = scanned / "audit" / "review.html"
    with chromium(tmp_path / "profile", tmp_path) as page:
        page.open(file)
        count = len(audited["rows"])
        assert page.value("document.images.length") == 1
        assert page.value("document.images[0].naturalWidth") == 40
        assert page.value("document.getElementById('score').textContent") == ""
        for key in "racr":
            page.press(key)
        assert shown(page) == f"Image 5 of {count}, 4 labelled"
        page.press("u")
        assert shown(page) == f"Image 4 of {count}, 3 labelled"
        page.press("ArrowLeft")
        assert page.value("document.querySelector('[aria-pressed=true]').dataset.label") == "cannot_tell"
        page.press("ArrowRight")
        page.press("s")
        assert page.value("document.getElementById('score').textContent").startswith("P(AI) 0.")
        assert page.value("document.getElementById('name').textContent") == audited["rows"][3]["key"]
        page.size(390, 800)
        page.click("[data-label=ai]")
        assert shown(page) == f"Image 5 of {count}, 4 labelled"
        page.reload(file)
        assert shown(page) == f"Image 5 of {count}, 4 labelled", "progress is kept"
        assert page.value("document.documentElement.scrollWidth") <= 390, "nothing to scroll sideways"
        page.click("#reviewer")
        page.type('=cmd|"r" a')
        assert shown(page) == f"Image 5 of {count}, 4 labelled", "letters in the name are no labels"
        for name in ("json", "csv"):
            page.click(f"#{name}")
        labels_file = tmp_path / f"labels-{audited['audit']}"
        saved = {ending: wait_for(labels_file.with_name(labels_file.name + ending)) for ending in (".json", ".csv")}
        for _ in range(count):
            page.press("ArrowRight")
            page.press("s")
            assert page.value("document.title").startswith("Review of"), "a file's name has run"
        assert page.errors == []
    first, second = (read_labels(one) for one in saved.values())
    assert first.by_number == second.by_number
    by_page = [first.by_number[row["number"]] for row in audited["rows"][:4]]
    assert by_page == ["real", "ai", "cannot_tell", "ai"]
    assert first.score_seen == second.score_seen == {audited["rows"][3]["number"]}
    assert next(csv.DictReader(io.StringIO(saved[".csv"].read_text())))["reviewer"].startswith("'=cmd")


def shown(page: Page) -> str:
    return str(page.value("document.getElementById('place').textContent"))


def wait_for(file: Path) -> Path:
    """A file that the browser is saving; it has another name until it is whole."""
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    return file


def test_an_image_that_has_changed_can_only_be_left_undecided(scanned: Path, tmp_path: Path) -> None:
    copy = tmp_path / "photos"
    shutil.copytree(scanned / "photos", copy)
    sample = json.loads((scanned / "audit" / "sample.json").read_text())
    first = sample["rows"][0]
    (copy / first["key"]).write_bytes(image(1234))
    assert _image(first, PictureReader(open_store(str(copy))))["picture"] is None


def test_a_page_without_any_picture_is_not_made(
    scanned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = json.loads((scanned / "audit" / "sample.json").read_text())
    photos = shutil.copytree(scanned / "photos", tmp_path / "photos")
    (photos / sample["rows"][0]["key"]).unlink()
    review_page(sample, open_store(str(photos)))
    assert f"1 of {len(sample['rows'])} images drawn are not in" in capsys.readouterr().err
    shutil.rmtree(photos)
    with pytest.raises(AuditError, match="draw them where the scan ran"):
        review_page(sample, open_store(str(photos)))


def test_sample_names_stay_in_the_results() -> None:
    for name in ("", "..", "a/b", "../x", "a\\b"):
        with pytest.raises(AuditError):
            audit_sample.sample_name(name)


def test_a_phone_s_picture_is_shown_upright_and_scored_as_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (60, 40), "red")
    picture.paste("blue", (0, 0, 30, 40))  # blue at the left as stored, on top when turned
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    row = {"key": "a.jpg", "etag": None, "version_id": None, "number": 1, "p_ai": 0.5, "verdict": "real"}
    reader = PictureReader(open_store(str(tmp_path)))
    found = _image(row | {"patch": {"x": 0, "y": 0, "size": 32, "complexity": 0}}, reader)
    shown, patch = (
        Image.open(io.BytesIO(base64.b64decode(found[name].partition(",")[2]))) for name in ("picture", "patch")
    )
    assert shown.size == (40, 60)
    top = shown.getpixel((20, 10))
    assert isinstance(top, tuple)
    assert top[2] > 200 > top[0]
    assert patch.getpixel((50, 35)) != patch.getpixel((10, 35)), "the patch lies in the image as stored"


SAMPLE = {"rows": [{"number": 1, "key": "a.png"}, {"number": 2, "key": "c,d.png"}]}


def test_all_labels_may_have_been_edited(tmp_path: Path) -> None:
    earlier = "\ufeffkey,label,generator\r\na.png,real,\r\n\r\nb.png,ai,flux\r\n".encode()
    (tmp_path / "labels.csv").write_bytes(audit_labels.add_to_labels(earlier, SAMPLE, {1: "ai", 2: "real"}))
    found = by_key.read_labels(str(tmp_path / "labels.csv")).by_key
    assert found == {"a.png": (1, "all"), "b.png": (1, "flux"), "c,d.png": (0, "all")}


@pytest.mark.parametrize("earlier", [b"name,class\n", b"key|label\na|ai\n", "key,label\n\u00fc,ai".encode("latin-1")])
def test_all_labels_that_are_none_any_more_are_one_line(earlier: bytes) -> None:
    with pytest.raises(AuditError, match=r"audits/labels.csv .* mend or remove it"):
        audit_labels.add_to_labels(earlier, SAMPLE, {1: "ai"})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_labels_that_a_spreadsheet_saved_are_read(tmp_path: Path, encoding: str) -> None:
    review = tmp_path / "review.csv"
    review.write_text("number;label;score_seen;audit;reviewer\n1;ai;0;x;me\n2;real;1;x;me\n", encoding)
    found = audit_labels.read_labels(review)
    assert found.by_number == {1: "ai", 2: "real"}
    assert found.score_seen == {2}
    added = audit_labels.add_to_labels("Key;Label\r\na.png;AI \r\n".encode(encoding), SAMPLE, {2: "real"})
    (tmp_path / "labels.csv").write_text(added.decode(), encoding, newline="")
    assert by_key.read_labels(str(tmp_path / "labels.csv")).by_key == {"a.png": (1, "all"), "c,d.png": (0, "all")}


def test_labels_in_another_encoding_are_one_short_line(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"number,label\n\xff" + b"x" * 10_000)
    with pytest.raises(AuditError, match="is not UTF-8 at byte 13; save it as UTF-8") as failure:
        audit_labels.read_labels(tmp_path / "labels.csv")
    assert len(str(failure.value)) < 300
