"""The figures of a scan's report against what was put into the folder: errors, prefixes, months, scores, pictures."""

import base64
import json
import os
import time
from dataclasses import asdict
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from patchscan.common.retries import TransientError
from patchscan.dataset.labels import Labels, read_labels
from patchscan.scanning import report, rows, table, thumbnails
from patchscan.scanning.listing import Filters
from patchscan.scanning.plan import Plan, ScanSource
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.thumbnails import THUMBNAIL, PictureReader
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.store import ObjectInfo
from tests.scan_kit import StubScorer, card


def grey(value: int, seed: int = 0, side: int = 48) -> bytes:
    """An image that the stub scorer calls AI where `value` is over 128."""
    noise = np.random.default_rng(seed).integers(0, 8, (side, side, 3))
    buffer = BytesIO()
    Image.fromarray((noise + value).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    files = {f"cats/{number}.png": (grey(60, number), "2026-01-15") for number in range(5)}
    files |= {f"dogs/sub/{number}.png": (grey(180 + number, number), "2026-02-15") for number in range(3)}
    files |= {f"text {number}.txt": (b"no image", "2026-02-20") for number in range(4)}
    files["empty.png"] = (b"", "2026-02-20")
    for name, (data, day) in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        moment = datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
        os.utime(path, (moment, moment))
    return folder


@pytest.fixture(scope="module")
def found(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out, scorer = open_store(str(tmp_path_factory.mktemp("out"))), StubScorer()
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card), out)
    Worker(made, out, scorer, WorkSettings(threads=2)).work(0)
    report.reduce(out, made)
    return dict(json.loads(out.read("report.json") or b""))


def test_the_engine_is_told_of_rows_that_have_one(photos: Path, found: dict[str, Any], tmp_path: Path) -> None:
    assert found["model"]["engines"] == [{"engine": "torch", "scored": 8}]
    out, scorer = open_store(str(tmp_path)), StubScorer()
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card), out)
    Worker(made, out, scorer, WorkSettings(threads=2)).work(0)
    name = f"scans/{made.scan}/rows/part-00000.parquet"
    newer = rows.from_parquet(out.read(name) or b"")
    # As a version wrote it that had no such column.
    out.write(name, rows.table_to_parquet(newer.drop_columns(["engine"]), newer.schema.metadata))
    assert report.reduce(out, made)["model"]["engines"] == [{"engine": None, "scored": 8}]


def test_errors_come_with_counts_and_examples(found: dict[str, Any]) -> None:
    assert [(one["status"], one["code"], one["n"]) for one in found["errors"]] == [
        ("rejected", "not_an_image", 4),
        ("rejected", "empty", 1),
    ]
    assert [one["key"] for one in found["errors"][0]["examples"]] == ["text 0.txt", "text 1.txt", "text 2.txt"]
    assert all(one["message"] for one in found["errors"][0]["examples"])


def test_counts_by_folder_and_by_month(found: dict[str, Any]) -> None:
    by_prefix = {one["name"]: (one["objects"], one["ai"], one["real"], one["rejected"]) for one in found["by_prefix"]}
    assert by_prefix == {"cats/": (5, 0, 5, 0), "dogs/": (3, 3, 0, 0), "(no folder)": (5, 0, 0, 5)}
    by_month = [(one["name"], one["objects"], one["scored"], one["ai"]) for one in found["by_month"]]
    assert by_month == [("2026-01", 5, 5, 0), ("2026-02", 8, 3, 3)]


def test_the_histogram_holds_every_score_by_its_verdict(found: dict[str, Any]) -> None:
    bars = {verdict: sum(counts) for verdict, counts in found["histogram"].items()}
    assert bars == found["verdicts"] == {"ai": 3, "real": 5, "uncertain": 0}
    half = len(found["histogram"]["ai"]) // 2
    assert (sum(found["histogram"]["real"][:half]), sum(found["histogram"]["ai"][half:])) == (5, 3)


def test_each_tier_is_shown_with_the_numbers_that_decide_there(found: dict[str, Any]) -> None:
    for name in ("scored", "ai", "uncertain", "real"):
        assert sum(tier[name] for tier in found["by_tier"]) == (found["verdicts"] | found["totals"])[name]
    assert {(tier["threshold"], tier["covered"]) for tier in found["by_tier"]} == {(0.5, True)}


def test_the_most_suspicious_come_first_each_with_its_picture_and_patch(found: dict[str, Any], photos: Path) -> None:
    shown = found["most_suspicious"]
    assert [one["key"] for one in shown] == ["dogs/sub/2.png", "dogs/sub/1.png", "dogs/sub/0.png"]
    picture = PictureReader(open_store(str(photos))).thumbnail(shown[0])
    assert picture is not None
    drawn = Image.open(BytesIO(base64.b64decode(picture.partition(",")[2])))
    assert drawn.size == (2 * THUMBNAIL + 4, THUMBNAIL), "the image, and beside it its patch enlarged"
    (photos / "gone.png").write_bytes(grey(1))
    listed = next(info for info in open_store(str(photos)).objects() if info.key == "gone.png")
    (photos / "gone.png").unlink()
    changed = shown[0] | {"key": listed.key, "etag": listed.etag}
    assert PictureReader(open_store(str(photos))).thumbnail(changed) is None


def test_a_source_that_is_away_is_waited_for_once_not_for_each_picture(
    found: dict[str, Any], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def fetch(*_: object) -> NoReturn:
        asked.append(time.monotonic())
        raise TransientError("the store is away")

    store = open_store(str(photos))
    monkeypatch.setattr(store, "fetch", fetch)
    monkeypatch.setattr(thumbnails, "PATIENCE_S", 0.3)
    reader = PictureReader(store)
    assert reader.thumbnail(found["most_suspicious"][0]) is None
    assert asked[-1] - asked[0] > 0.2
    first = len(asked)
    assert [reader.thumbnail(row) for row in found["most_suspicious"]] == [None] * 3
    assert len(asked) == first + 3


# No formula for a picture, no mark for Markdown.
GENERATOR = r"_$\frac{$|<b>[x](//y)"


def test_labels_from_a_file_are_evaluated(found: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    named = [f"cats/{number}.png,real," for number in range(5)] + [
        f"dogs/sub/{number}.png,ai,{GENERATOR}" for number in range(3)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["key,label,generator", *named, "gone.png,ai,flux"]))
    out, scorer = open_store(str(tmp_path / "out")), StubScorer()
    made = plan_scan(
        ScanRequest(
            source=ScanSource(url=str(photos)), filters=Filters(suffixes=(".png",), min_size=1), card=scorer.card
        ),
        out,
    )
    Worker(made, out, scorer).work(0)
    evaluated = report.reduce(out, made, labels=str(tmp_path / "labels.csv"))["evaluation"]
    assert evaluated["labelled"] == 8
    page, data = (out.read(evaluated["report"].replace("html", kind)) or b"" for kind in ("html", "json"))
    assert b"<code>gone.png</code>: not_scanned" in page
    tables = out.read(evaluated["report"].replace("report.html", "RESULTS_TABLE.md")) or b""
    assert rb"| model | _$\\frac{$\|\<b\>\[x\](//y) |" in tables
    said = json.loads(data)["data"]["labels"]
    assert (said["labelled"], said["unavailable_keys"]) == (9, {"gone.png": "not_scanned"})


def test_a_label_file_tells_label_and_generator(tmp_path: Path) -> None:
    rows = [
        "key,label,generator",
        "a.png,ai,flux",
        "b.png,real,",
        "c.png,real,",
        "c.png,cannot_tell,",
        "d.png,cannot_tell,",
    ]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    assert read_labels(str(tmp_path / "labels.csv")) == Labels({"a.png": (1, "flux"), "b.png": (0, "all")}, 2)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_objects_without_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a folder of its own, with a long message: 150 MB of text, of which the queries may hold 60 MB."""
    monkeypatch.setattr(table, "MEMORY_LIMIT", "60MB")
    out, parts, count = open_store(str(tmp_path / "out")), 4, 50_000
    plan = _plan_of(parts, parts * count)
    columns = {name: pa.nulls(count, rows.SCHEMA.field(name).type) for name in rows.SCHEMA.names}
    columns |= {"status": pa.repeat("failed", count), "error_code": pa.repeat("access_denied", count)}
    stats = {rows.STATS_KEY: b'{"wall_s": 1, "cpu_s": 1, "bytes_read": 0}'}
    for part in range(parts):
        columns["key"] = pa.array(f"{part * count + number:06d}/a.png" for number in range(count))
        columns["error_message"] = pa.array(f"{key} {'x' * 700}" for key in columns["key"].to_pylist())
        failed = pa.table(columns, schema=rows.SCHEMA)
        out.write(f"scans/s/rows/part-{part:05d}.parquet", rows.table_to_parquet(failed, stats))
    figures = report._figures(table.ScanTable(out, plan, tmp_path))
    assert figures["totals"]["adds_up"]
    (error,) = figures["errors"]
    assert (error["n"], error["new"]) == (200_000, 200_000)
    assert [one["key"] for one in error["examples"]] == ["000000/a.png", "000001/a.png", "000002/a.png"]
    assert len(figures["by_prefix"]) == 31
    assert figures["by_prefix"][30] | {"objects": 0, "failed": 0} == {
        **dict.fromkeys(("objects", "scored", "ai", "real", "uncertain", "rejected", "failed"), 0),
        "name": "(199,970 others)",
    }
    assert figures["by_prefix"][30]["failed"] == 199_970


def _plan_of(shards: int, listed: int) -> Plan:
    stub = card()
    return Plan(
        scan="s",
        source=ScanSource(url="photos"),
        filters=Filters(),
        model=stub.name,
        version=stub.version,
        digest=stub.digest,
        shards=shards,
        listed=listed,
        listed_bytes=0,
        unchanged=0,
        deleted=0,
        filtered=0,
        duplicates=0,
        previous=None,
        listing={"seconds": 1.0, "requests": {}},
        conditional_writes=True,
        created_at="2026-01-01T00:00:00+00:00",
        card=asdict(stub),
    )


def test_an_object_without_a_size_passes_every_filter_of_sizes() -> None:
    assert Filters(min_size=10, max_size=20).keep(ObjectInfo(key="listed by name only.png"))
