"""Scans of a real S3 server with a stub scorer: unusual keys, faults, manifests, races, filters, credentials."""

import csv
import gzip
import io
import json
import os
import re
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_plus

import boto3
import httpx
import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.common.errors import UserError
from patchscan.dataset.labels import read_labels
from patchscan.detector.images import Limits
from patchscan.scanning import report, rows
from patchscan.scanning.history import ClaimLostError, honours_conditional_writes, last_complete
from patchscan.scanning.listing import Filters
from patchscan.scanning.manifest import ManifestError, objects
from patchscan.scanning.options import STARTER
from patchscan.scanning.plan import Plan, PlanError, ScanSource, read_parts
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.steps import complete_scan
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.copying import copy_tree
from patchscan.storage.embedded_s3 import EmbeddedS3
from patchscan.storage.store import ObjectInfo, StoreError
from tests.bucket_kit import UNUSUAL_KEYS
from tests.c2pa_kit import CAPTURED, identity, sign
from tests.faulty_proxy import FaultyProxy
from tests.scan_kit import StubScorer, image, scan_names, stub_server, table_of

if TYPE_CHECKING:
    from mypy_boto3_s3.literals import StorageClassType


@pytest.fixture(scope="module")
def s3(empty_s3: EmbeddedS3) -> EmbeddedS3:
    return empty_s3


@pytest.fixture
def bucket(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A bucket of nine images with unusual keys, eleven plain ones and two objects that are no images."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower())[-40:].strip("-")
    client = s3.client()
    client.create_bucket(Bucket=name)
    client.create_bucket(Bucket=f"{name}-out")
    for number, key in enumerate(UNUSUAL_KEYS + [f"many/{number:02d}.png" for number in range(11)]):
        client.put_object(Bucket=name, Key=key, Body=image(number))
    client.put_object(Bucket=name, Key="many/readme.txt", Body=b"text")
    client.put_object(Bucket=name, Key="folder/", Body=b"")
    return name


def scan(source: ScanSource, out_url: str, filters: Filters = Filters(), limits: Limits = Limits()) -> Plan:
    scorer, out = StubScorer(), open_store(out_url, endpoint_url=source.endpoint_url)
    made = plan_scan(ScanRequest(source=source, filters=filters, card=scorer.card, shard_objects=5), out)
    worker = Worker(made, out, scorer, WorkSettings(threads=4, batch=2, limits=limits))
    for index in range(made.shards):
        worker.work(index)
    report.reduce(out, made)
    return made


@pytest.mark.parametrize("page", [1000, 1, 3])
def test_every_key_however_unusual_has_one_row(bucket: str, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchscan.storage.key_ranges.PAGE", page)  # small pages: many threads, many cuts
    made = scan(ScanSource(url=f"s3://{bucket}"), f"s3://{bucket}-out/x")
    table = table_of(open_store(f"s3://{bucket}-out/x"), made.scan)
    assert {key for key, row in table.items() if row["status"] == "scored"} == {
        *UNUSUAL_KEYS,
        *(f"many/{number:02d}.png" for number in range(11)),
    }
    assert (table["folder/"]["error_code"], table["many/readme.txt"]["error_code"]) == ("empty", "not_an_image")


def test_an_audit_reads_the_images_of_a_bucket_and_keeps_its_labels_in_one(bucket: str, tmp_path: Path) -> None:
    scan(ScanSource(url=f"s3://{bucket}"), f"s3://{bucket}-out/x")
    open_store(f"s3://{bucket}").delete("plain.png")
    run = CliRunner().invoke
    drawn = run(app, ["audit-sample", f"s3://{bucket}-out/x", "--n", "20", "--out", str(tmp_path)])
    assert drawn.exit_code == 0, drawn.output
    page, sample = (tmp_path / "review.html").read_text(), json.loads((tmp_path / "sample.json").read_text())
    assert page.count("data:image/jpeg") == 2 * 19, "an image and its patch, but of the one that is gone"
    labels = [{"number": row["number"], "label": "real", "score_seen": False} for row in sample["rows"]]
    (tmp_path / "labels.json").write_text(json.dumps({"audit": sample["audit"], "reviewer": "", "labels": labels}))
    told = run(app, ["audit-report", f"s3://{bucket}-out/x", str(tmp_path / "labels.json")])
    assert told.exit_code == 0, told.output
    kept = read_labels(f"s3://{bucket}-out/x/audits/labels.csv")
    assert kept.by_key == {row["key"]: (0, "all") for row in sample["rows"]}
    judge = ["evaluate", "--run", str(STARTER), "--tier", "native", "--out", str(tmp_path / "judged")]
    judge += ["--data", f"s3://{bucket}", "--labels", f"s3://{bucket}-out/x/audits/labels.csv"]
    assert (found := run(app, judge)).exit_code == 0, found.output
    data = json.loads((tmp_path / "judged" / "report.json").read_text())["data"]
    assert (data["images"], data["labels"]["labelled"]) == (19, 20)
    assert data["labels"]["unavailable_keys"] == {"plain.png": "vanished"}


def test_the_list_of_trusted_authorities_may_be_in_a_bucket(bucket: str, s3: EmbeddedS3) -> None:
    cameras, buffer = identity("cameras", authority=True), io.BytesIO()
    Image.open(io.BytesIO(image(1, side=64))).save(buffer, "JPEG")
    signed = sign(buffer.getvalue(), identity("Camera", cameras), "Camera", CAPTURED)
    s3.client().put_object(Bucket=bucket, Key="signed/1.jpg", Body=signed)
    s3.client().put_object(Bucket=f"{bucket}-out", Key="lists/cameras.pem", Body=cameras.pem.encode())
    arguments = ["scan", f"s3://{bucket}/signed/", "--out", f"s3://{bucket}-out/x", "--run", str(STARTER)]
    done = CliRunner().invoke(app, [*arguments, "--c2pa-trust", f"s3://{bucket}-out/lists/cameras.pem"])
    assert done.exit_code == 0, done.output
    out = open_store(f"s3://{bucket}-out/x")
    plan = last_complete(out)
    assert plan
    assert plan.c2pa_trust == cameras.pem
    assert table_of(out, plan.scan)["signed/1.jpg"]["provenance"]["c2pa"] == "Trusted"
    missing = CliRunner().invoke(app, [*arguments, "--c2pa-trust", f"s3://{bucket}-out/lists/none.pem"])
    assert "there is no file s3://" in str(missing.exception)


def test_503s_resets_and_cut_bodies_change_no_row(bucket: str, s3: EmbeddedS3) -> None:
    calm = scan(ScanSource(url=f"s3://{bucket}"), f"s3://{bucket}-out/calm")
    expected = table_of(open_store(f"s3://{bucket}-out/calm"), calm.scan)
    with FaultyProxy(s3.endpoint_url) as proxy:
        source = ScanSource(url=f"s3://{bucket}", endpoint_url=proxy.url)
        stormy = scan(source, f"s3://{bucket}-out/stormy")
        assert proxy.faults > 10
    assert table_of(open_store(f"s3://{bucket}-out/stormy"), stormy.scan) == expected


def test_four_scans_at_once_are_one_scan(bucket: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: scan(ScanSource(url=f"s3://{bucket}"), f"s3://{bucket}-out/x"), range(4)))
    out = open_store(f"s3://{bucket}-out/x")
    for name in scan_names(out):
        assert len(table_of(out, name)) == len(UNUSUAL_KEYS) + 13


def test_conditional_writes_are_noticed(bucket: str) -> None:
    out = open_store(f"s3://{bucket}-out")
    assert honours_conditional_writes(out)
    assert out.write_new("one", b"first")
    assert not out.write_new("one", b"second")
    assert out.read("one") == b"first"


@pytest.fixture
def unconditional(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server that takes If-None-Match and overwrites all the same, as several look-alikes do; its
    bucket `photos` holds six images."""
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anyone")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)  # checks no signature: a proxy may change the headers
    server.start()
    host, port = server.get_host_and_port()
    httpx.post(f"http://{host}:{port}/moto-api/reset")  # in this process its objects outlive the server
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    for name in ("photos", "out"):
        client.create_bucket(Bucket=name)
    for number in range(6):
        client.put_object(Bucket="photos", Key=f"{number}.png", Body=image(number))
    with FaultyProxy(f"http://{host}:{port}", every=0, drops=["if-none-match"]) as proxy:
        yield proxy.url
    server.stop()


def test_planners_at_once_agree_where_the_store_ignores_conditions(unconditional: str) -> None:
    source, out = (
        ScanSource(url="s3://photos", endpoint_url=unconditional),
        open_store("s3://out", endpoint_url=unconditional),
    )
    assert not honours_conditional_writes(out)
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: plan_scan(ScanRequest(source=source, card=StubScorer().card), out), range(4)))
    assert len({made.scan for made in plans}) == len(scan_names(out)) == 1
    assert {name.split("/")[1] for name in out.names("scans/")} == {plans[0].scan}, "the others' plans are left behind"


def test_a_plan_that_may_still_lose_its_place_is_not_continued(
    unconditional: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchscan.scanning.history.SETTLE_S", 0.0)
    source, out = (
        ScanSource(url="s3://photos", endpoint_url=unconditional),
        open_store("s3://out", endpoint_url=unconditional),
    )
    entry = "history/000001.json"
    lost = plan_scan(ScanRequest(source=source, card=StubScorer().card), out)
    out.delete(entry)
    won = plan_scan(ScanRequest(source=source, card=StubScorer().card), out)
    out.write(entry, json.dumps({"scan": lost.scan}).encode())
    waited = SimpleNamespace(sleep=lambda seconds: out.write(entry, json.dumps({"scan": won.scan}).encode()))
    monkeypatch.setattr("patchscan.scanning.history.time", waited)
    assert plan_scan(ScanRequest(source=source, card=StubScorer().card), out).scan == won.scan
    for name in list(out.names(f"scans/{lost.scan}/")):
        out.delete(name)
    with pytest.raises(PlanError, match="was removed: another scan has taken its place; plan again"):
        Worker(lost, out, StubScorer()).work(0)


def test_a_scan_that_lost_its_place_ends_before_its_report(unconditional: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchscan.scanning.history.SETTLE_S", 0.0)
    source, out = (
        ScanSource(url="s3://photos", endpoint_url=unconditional),
        open_store("s3://out", endpoint_url=unconditional),
    )
    lost = plan_scan(ScanRequest(source=source, card=StubScorer().card), out)
    Worker(lost, out, StubScorer()).work(0)
    out.delete("history/000001.json")  # the other planner looked before this one wrote, and wrote after it looked
    won = plan_scan(ScanRequest(source=source, card=StubScorer().card), out)
    with pytest.raises(ClaimLostError, match="another scan took this one's place") as ended:
        report.reduce(out, lost)
    assert ended.value.exit_code == 75
    assert out.read("report.json") is None
    made = scan(source, "s3://out")
    assert made.scan == won.scan
    assert len(table_of(out, made.scan)) == 6


def test_an_unchanged_bucket_costs_a_listing_and_no_get(bucket: str) -> None:
    scan(ScanSource(url=f"s3://{bucket}"), f"s3://{bucket}-out/x")
    made = scan(ScanSource(url=f"s3://{bucket}"), f"s3://{bucket}-out/x")
    found = json.loads(open_store(f"s3://{bucket}-out/x").read("report.json") or b"")
    assert (found["totals"]["unchanged"], made.shards) == (made.listed, 0)
    assert set(found["cost"]["requests"]) == {"ListObjectsV2"}


def test_a_sample_is_widened_to_the_whole_without_reading_an_object_twice(bucket: str) -> None:
    out = open_store(f"s3://{bucket}-out/x")
    found, reports = [], []
    with stub_server() as scorer:
        command = ["scan", f"s3://{bucket}", "--out", out.url, *scorer]
        for sample in ("6", "13", "0"):
            done = CliRunner().invoke(app, [*command, "--sample", sample])
            assert done.exit_code == 0, done.output
            reports.append(json.loads(out.read("report.json") or b""))
            found.append(set(table_of(out, reports[-1]["scan"])))
        smaller = CliRunner().invoke(app, [*command, "--sample", "5"])
    assert [len(keys) for keys in found] == [6, 13, 22]
    assert found[0] < found[1] < found[2]
    assert [one["cost"]["requests"]["GetObject"] for one in reports] == [6, 7, 9]
    assert [one["totals"]["duplicates"] for one in reports] == [0, 0, 0]
    first, second, whole = (one["whole"] for one in reports)
    assert (first["sampled"], first["objects"], second["sampled"], whole) == (6, 22, 13, None)
    assert sum(kind["sampled"] for kind in first["kinds"]) == 6
    assert all(kind["estimate"]["low"] <= kind["estimate"]["high"] <= 22 for kind in first["kinds"])
    assert (smaller.exit_code, type(smaller.exception)) == (1, PlanError)
    assert "holds a scan of the whole source" in str(smaller.exception)


def test_an_estimate_leaves_no_trace(bucket: str) -> None:
    out = open_store(f"s3://{bucket}-out/x")
    with stub_server() as scorer:
        command = ["scan", f"s3://{bucket}", "--out", out.url, *scorer]
        before = CliRunner().invoke(app, [*command, "--estimate"])
        assert list(out.names("")) == []
        assert CliRunner().invoke(app, command).exit_code == 0
        after = CliRunner().invoke(app, [*command, "--estimate"])
    assert (before.exit_code, after.exit_code) == (0, 0), before.output
    first, *told, _ = before.stdout.splitlines()
    assert "22 objects to score, 0 unchanged; 22 were tried" in first
    found = {name: text.split(" ")[0] for name, text in (line.split(": ") for line in told)}
    assert set(found) == {"images", "bytes", "requests", "core-hours", "duration"}
    assert (found["images"], found["requests"]) == ("20", "23")
    assert float(found["core-hours"]) > 0
    assert "0 objects to score, 22 unchanged; 0 were tried" in after.stdout


def test_an_unfinished_sample_is_finished_before_it_is_widened(bucket: str) -> None:
    source, out, scorer = ScanSource(url=f"s3://{bucket}"), open_store(f"s3://{bucket}-out/x"), StubScorer()
    made = plan_scan(ScanRequest(source=source, card=scorer.card, sample=6), out)
    assert plan_scan(ScanRequest(source=source, card=scorer.card, sample=6), out) == made
    with pytest.raises(PlanError, match="unfinished scan with --sample 6"):
        plan_scan(ScanRequest(source=source, card=scorer.card), out)


@pytest.mark.parametrize("limit", ["--max-objects", "--max-requests"])
def test_a_scan_in_several_runs_reads_each_object_once(bucket: str, limit: str) -> None:
    with stub_server() as scorer:
        command = ["scan", f"s3://{bucket}", "--out", f"s3://{bucket}-out/x", *scorer, "--threads", "1"]
        runs = [CliRunner().invoke(app, [*command, limit, "8"]) for _ in range(3)]
    assert [one.exit_code for one in runs] == [75, 75, 0], runs[-1].output
    assert f"{limit} is reached" in runs[0].stderr
    assert "run the same command again to continue" in runs[0].stderr
    found = json.loads(open_store(f"s3://{bucket}-out/x").read("report.json") or b"")
    assert found["cost"]["requests"]["GetObject"] == found["totals"]["listed"] == 22


def test_filters_choose_by_suffix_and_size(bucket: str) -> None:
    made = scan(ScanSource(url=f"s3://{bucket}/many/"), f"s3://{bucket}-out/x", Filters(suffixes=(".PNG",)))
    assert (made.listed, made.filtered) == (11, 1)


def test_an_object_replaced_after_the_listing_is_a_row_that_says_so(bucket: str, s3: EmbeddedS3) -> None:
    scorer, out = StubScorer(), open_store(f"s3://{bucket}-out/x")
    made = plan_scan(ScanRequest(source=ScanSource(url=f"s3://{bucket}"), card=scorer.card), out)
    s3.client().put_object(Bucket=bucket, Key="plain.png", Body=image(99))
    s3.client().delete_object(Bucket=bucket, Key="../up.png")
    Worker(made, out, scorer).work(0)
    table = table_of(out, made.scan)
    assert table["plain.png"]["error_code"] == "changed"
    assert table["../up.png"]["error_code"] == "vanished"


def test_rows_name_the_version_of_a_versioned_bucket(bucket: str, s3: EmbeddedS3) -> None:
    client = s3.client()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    version = client.put_object(Bucket=bucket, Key="plain.png", Body=image(50))["VersionId"]
    made = scan(ScanSource(url=f"s3://{bucket}"), f"s3://{bucket}-out/x")
    assert table_of(open_store(f"s3://{bucket}-out/x"), made.scan)["plain.png"]["version_id"] == version


def test_a_manifest_of_versions_has_a_row_for_each(bucket: str, s3: EmbeddedS3) -> None:
    client = s3.client()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    listed = {("many/00.png", "")}
    for number in range(9):  # over several shards
        key = f"versions/{number % 3}.png"
        listed.add((key, client.put_object(Bucket=bucket, Key=key, Body=image(50 + number))["VersionId"]))
    lines = ["key,version_id", *(",".join(one) for one in listed), ""]
    client.put_object(Bucket=f"{bucket}-out", Key="keys.csv", Body="\n".join(lines).encode())
    source = ScanSource(url=f"s3://{bucket}", manifest=f"s3://{bucket}-out/keys.csv")
    made, out = scan(source, f"s3://{bucket}-out/x"), open_store(f"s3://{bucket}-out/x")
    table = [row for data in read_parts(out, made.scan) for row in rows.from_parquet(data).to_pylist()]
    assert sorted((row["key"], row["version_id"] or "") for row in table) == sorted(listed)
    assert {row["status"] for row in table} == {"scored"}
    assert len({row["etag"] for row in table}) == 10
    again = scan(source, f"s3://{bucket}-out/x")
    # The list has no ETags, but a version never changes.
    assert (again.listed, again.unchanged, again.deleted, again.duplicates) == (10, 9, 0, 0)


def test_a_scan_goes_on_at_the_address_that_is_given(bucket: str, s3: EmbeddedS3) -> None:
    with FaultyProxy(s3.endpoint_url, every=0) as before, FaultyProxy(s3.endpoint_url, every=0) as now:
        source = ScanSource(url=f"s3://{bucket}/many/", endpoint_url=before.url)
        out = open_store(f"s3://{bucket}-out/x")
        plan_scan(ScanRequest(source=source, card=StubScorer().card), out)
        asked = len(before.seen)
        made = scan(replace(source, endpoint_url=now.url), f"s3://{bucket}-out/x")
        assert len(before.seen) == asked
        assert len(now.seen) > 12
        assert len(scan_names(out)) == 1
        # Other processes of the scan read where the source is.
        assert Plan.read(out, made.scan).source.endpoint_url == now.url


def test_what_narrower_filters_leave_out_is_not_deleted(bucket: str) -> None:
    source, out = ScanSource(url=f"s3://{bucket}/many/"), f"s3://{bucket}-out/x"
    scan(source, out)
    made = scan(source, out, Filters(suffixes=(".png",)))
    assert (made.listed, made.unchanged, made.filtered, made.deleted) == (11, 11, 1, 0)


def test_objects_in_cold_storage_are_told_of_once(bucket: str, s3: EmbeddedS3) -> None:
    client = s3.client()
    classes: list[StorageClassType] = ["GLACIER", "DEEP_ARCHIVE", "GLACIER_IR"]
    for number, name in enumerate(classes):
        client.put_object(Bucket=bucket, Key=f"cold/{name}.png", Body=image(70 + number), StorageClass=name)
    out = open_store(f"s3://{bucket}-out/x")

    def night(retry_archived: bool = False) -> tuple[int, dict[str, Any]]:
        """A scan; its exit code and report."""
        scorer, source = StubScorer(), ScanSource(url=f"s3://{bucket}/cold/")
        made = plan_scan(ScanRequest(source=source, card=scorer.card, retry_archived=retry_archived), out)
        for index in range(made.shards):
            Worker(made, out, scorer).work(index)
        code = complete_scan(out, made)
        return code, json.loads(out.read("report.json") or b"")

    code, told = night()
    assert (code, told["totals"]["scored"], told["totals"]["failed"]) == (1, 1, 2)
    assert [alert["kind"] for alert in told["alerts"]] == ["archived"]
    assert "failed archived: 2, e.g. cold/DEEP_ARCHIVE.png" in report.summary_text(told)
    for _ in range(2):
        code, told = night()
        assert (code, told["totals"]["unchanged"], told["totals"]["failed"]) == (0, 3, 0)
        assert told["alerts"] == []
        assert "archived" not in report.summary_text(told)
        assert (told["errors"][0]["n"], told["errors"][0]["new"]) == (2, 0)
        assert set(told["cost"]["requests"]) == {"ListObjectsV2"}
    # Restored for good, by a copy, the listing shows it; for some days, this server's does not.
    for name in ("GLACIER", "DEEP_ARCHIVE"):
        client.restore_object(Bucket=bucket, Key=f"cold/{name}.png", RestoreRequest={"Days": 3})
    copied = "cold/GLACIER.png"
    client.copy_object(Bucket=bucket, Key=copied, CopySource=f"{bucket}/{copied}", StorageClass="STANDARD")
    code, told = night()
    assert (code, told["totals"]["scored"], told["totals"]["unchanged"]) == (0, 1, 2)
    code, told = night(retry_archived=True)
    assert (code, told["totals"]["scored"], told["totals"]["unchanged"], told["errors"]) == (0, 1, 2, [])


def put_inventory(
    s3: EmbeddedS3, bucket: str, kind: str, listed: list[dict[str, Any]], time: str = "2026-01-05T01-00Z"
) -> str:
    """Write an S3 Inventory of these objects in two data files, as S3 writes them; the address of its manifest.json.

    `listed` has the fields of an inventory in Parquet: key, version_id, is_latest, is_delete_marker, size, e_tag and
    so on; CSV has no header, and its keys are percent-encoded.
    """
    keys = []
    for number, part in enumerate((listed[:1], listed[1:])):
        table, body = pa.Table.from_pylist(part), io.BytesIO()
        if kind == "Parquet":
            pq.write_table(table, body)
        elif kind == "ORC":
            orc.write_table(table, body)
        else:
            lines = io.StringIO(newline="")
            csv.writer(lines).writerows({**row, "key": quote_plus(row["key"])}.values() for row in part)
            body.write(gzip.compress(lines.getvalue().encode()))
        keys.append(f"inv/data/{time}-{number}.{'csv.gz' if kind == 'CSV' else kind.lower()}")
        s3.client().put_object(Bucket=f"{bucket}-out", Key=keys[-1], Body=body.getvalue())
    names = {"e_tag": "ETag", "last_modified_date": "LastModifiedDate"}
    schema = ", ".join(names.get(name) or name.title().replace("_", "") for name in listed[0])
    manifest = {
        "sourceBucket": bucket,
        "destinationBucket": f"arn:aws:s3:::{bucket}-out",
        "fileFormat": kind,
        "fileSchema": schema if kind == "CSV" else "message s3.inventory { }",
        "files": [{"key": key} for key in keys],
    }
    key = f"inv/{time}/manifest.json"
    s3.client().put_object(Bucket=f"{bucket}-out", Key=key, Body=json.dumps(manifest).encode())
    return f"s3://{bucket}-out/{key}"


@pytest.mark.parametrize("kind", ["CSV", "Parquet", "ORC"])
def test_an_inventory_says_what_is_scanned_and_at_which_version(bucket: str, s3: EmbeddedS3, kind: str) -> None:
    client = s3.client()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    keys = ["plain.png", "ünïcødé/日本/🙂.png", "with space+plus%25percent%.png"]
    for number, key in enumerate(keys):
        client.put_object(Bucket=bucket, Key=key, Body=image(50 + number))
    client.delete_object(Bucket=bucket, Key="many/03.png")
    versions = client.list_object_versions(Bucket=bucket)
    listed = [
        {
            "bucket": bucket,
            "key": one["Key"],
            "version_id": one["VersionId"],
            "is_latest": one["IsLatest"],
            "is_delete_marker": "Size" not in one,
            "size": one.get("Size"),
            "last_modified_date": one["LastModified"],
            "e_tag": str(one.get("ETag", "")).strip('"') or None,
        }
        for one in [*versions["Versions"], *versions["DeleteMarkers"]]
        if one["Key"] in [*keys, "many/03.png"]
    ]
    assert len(listed) == 2 * (len(keys) + 1)
    source = ScanSource(url=f"s3://{bucket}", manifest=put_inventory(s3, bucket, kind, listed))
    made = scan(source, f"s3://{bucket}-out/x")
    table = table_of(open_store(f"s3://{bucket}-out/x"), made.scan)
    current = {one["key"]: one for one in listed if one["is_latest"] and not one["is_delete_marker"]}
    assert set(table) == set(current) == set(keys)
    for key, row in table.items():
        expected = current[key]
        assert (row["status"], row["version_id"], row["etag"], row["size"], row["last_modified"]) == (
            "scored",
            expected["version_id"],
            expected["e_tag"],
            expected["size"],
            expected["last_modified_date"],
        )
    again = scan(source, f"s3://{bucket}-out/x")
    assert again.unchanged == len(keys)


def test_the_next_inventory_is_scanned_into_the_same_results(bucket: str, s3: EmbeddedS3) -> None:
    listed = [
        {"bucket": bucket, "key": one["Key"], "is_latest": None, "size": one["Size"], "e_tag": one["ETag"].strip('"')}
        for one in s3.client().list_objects_v2(Bucket=bucket, Prefix="many/")["Contents"]
    ]
    first, second = (
        ScanSource(
            url=f"s3://{bucket}", manifest=put_inventory(s3, bucket, "CSV", listed[:end], f"2026-01-0{end}T01-00Z")
        )
        for end in (2, 3)
    )
    out = open_store(f"s3://{bucket}-out/x")
    unfinished = plan_scan(ScanRequest(source=first, card=StubScorer().card), out)
    assert plan_scan(ScanRequest(source=second, card=StubScorer().card), out) == unfinished
    assert scan(second, f"s3://{bucket}-out/x").listed == 2
    again = scan(second, f"s3://{bucket}-out/x")
    assert (again.listed, again.unchanged) == (3, 2)


def test_an_inventory_of_another_bucket_is_refused(bucket: str, s3: EmbeddedS3) -> None:
    manifest = put_inventory(s3, bucket, "CSV", [{"bucket": bucket, "key": "plain.png"}])
    with pytest.raises(ManifestError, match="the inventory is of bucket"):
        scan(ScanSource(url="s3://others", manifest=manifest), f"s3://{bucket}-out/x")


def test_only_the_sources_requests_agree_to_pay(bucket: str, s3: EmbeddedS3) -> None:
    for pays in (True, False):
        with FaultyProxy(s3.endpoint_url, every=0) as proxy:
            source = ScanSource(url=f"s3://{bucket}/many/", endpoint_url=proxy.url, requester_pays=pays)
            scan(source, f"s3://{bucket}-out/{pays}")
            asked = [seen for seen in proxy.seen if seen[1].startswith((f"/{bucket}/", f"/{bucket}?"))]
            payers = {headers.get("x-amz-request-payer") for _, _, headers in asked}
            others = [headers for _, path, headers in proxy.seen if path.startswith(f"/{bucket}-out")]
        assert payers == {"requester" if pays else None}
        assert len(asked) > 12
        assert others
        assert not any("x-amz-request-payer" in headers for headers in others)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_manifest_says_what_is_scanned(bucket: str, s3: EmbeddedS3, kind: str) -> None:
    client = s3.client()
    keys = ["plain.png", "ünïcødé/日本/🙂.png", "with space+plus%25percent%.png"]
    listed = {one["Key"]: one for one in client.list_objects_v2(Bucket=bucket)["Contents"]}
    if kind == "jsonl":
        name, data = "keys.jsonl", "".join(json.dumps({"key": key}) + "\n" for key in keys).encode()
    elif kind == "parquet":
        body = io.BytesIO()
        pq.write_table(pa.table({"key": keys, "size": [listed[key]["Size"] for key in keys]}), body)
        name, data = "keys.parquet", body.getvalue()
    else:
        lines = ["key", *(f'"{key}"' for key in [*keys, keys[0]])]
        name, data = "keys.csv", "\n".join([*lines, ""]).encode()
    client.put_object(Bucket=f"{bucket}-out", Key=name, Body=data if isinstance(data, bytes) else data.encode())
    source = ScanSource(url=f"s3://{bucket}", manifest=f"s3://{bucket}-out/{name}")
    made = scan(source, f"s3://{bucket}-out/x")
    table = table_of(open_store(f"s3://{bucket}-out/x"), made.scan)
    assert set(table) == set(keys)
    assert {row["etag"] for row in table.values()} == {listed[key]["ETag"].strip('"') for key in keys}
    assert {row["status"] for row in table.values()} == {"scored"}


def test_what_a_manifest_lists_outside_the_prefix_is_counted(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "keys.csv").write_text("key\nplain.png\nelsewhere/a.png\nelsewhere/b.png\n")
    source = ScanSource(url=f"s3://{bucket}/plain", manifest=str(tmp_path / "keys.csv"))
    made = scan(source, f"s3://{bucket}-out/x")
    assert (made.listed, made.filtered, made.deleted) == (1, 2, 0)


def test_bad_credentials_and_missing_buckets_are_one_clear_line(
    bucket: str, s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="there is no bucket"):
        list(open_store("s3://never-made").objects())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StoreError, match="refuses the credentials") as refused:
        list(open_store(f"s3://{bucket}").objects())
    assert "wrong-secret" not in str(refused.value)
    assert s3.environment["AWS_ACCESS_KEY_ID"] not in str(refused.value)


def test_no_credential_stands_in_anything_a_scan_writes(bucket: str, s3: EmbeddedS3) -> None:
    scan(ScanSource(url=f"s3://{bucket}"), f"s3://{bucket}-out/x")
    out = open_store(f"s3://{bucket}-out/x")
    secrets = [s3.environment[name].encode() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    for name in out.names(""):
        data = out.read(name) or b""
        assert not any(secret in data for secret in secrets), name


def test_results_in_the_scanned_bucket_are_refused(bucket: str) -> None:
    with pytest.raises(PlanError, match="lies inside"):
        plan_scan(
            ScanRequest(source=ScanSource(url=f"s3://{bucket}"), card=StubScorer().card),
            open_store(f"s3://{bucket}/results"),
        )


def test_an_object_larger_than_the_limit_is_not_read(bucket: str, s3: EmbeddedS3) -> None:
    s3.client().put_object(Bucket=bucket, Key="big/huge.jpg", Body=bytes(1001))
    made = scan(ScanSource(url=f"s3://{bucket}/big/"), f"s3://{bucket}-out/x", limits=Limits(max_bytes=1000))
    row = table_of(open_store(f"s3://{bucket}-out/x"), made.scan)["big/huge.jpg"]
    assert (row["status"], row["error_code"]) == ("rejected", "too_large")
    found = json.loads(open_store(f"s3://{bucket}-out/x").read("report.json") or b"")
    assert found["cost"]["bytes_read"] == 0


def test_a_tree_is_copied_to_a_bucket_and_back(bucket: str, tmp_path: Path) -> None:
    contents = {"a/large": os.urandom(9 * 2**20), "a/small": b"x", "empty": b"", "ü": b"y"}
    for name, data in contents.items():
        path = tmp_path / "from" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for source, target in ((tmp_path / "from", f"s3://{bucket}-out/t"), (f"s3://{bucket}-out/t", tmp_path / "to")):
        assert copy_tree(str(source), str(target)) == len(contents)
    assert {name: (tmp_path / "to" / name).read_bytes() for name in contents} == contents


def test_a_copy_to_a_bucket_keeps_encoding_and_type_and_one_to_a_folder_tells_it(
    s3: EmbeddedS3, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, packed = f"s3://{bucket}-out/packed", f"s3://{bucket}-out/copied", gzip.compress(image(1))
    s3.client().put_object(Bucket=f"{bucket}-out", Key="packed/a.png", Body=packed, ContentEncoding="gzip")
    # An encoding that says nothing.
    s3.client().put_object(
        Bucket=f"{bucket}-out",
        Key="packed/b.png",
        Body=image(2),
        ContentEncoding="identity",
        ContentType="image/png",
    )
    assert copy_tree(source, target) == 2
    assert s3.client().head_object(Bucket=f"{bucket}-out", Key="copied/b.png")["ContentType"] == "image/png"
    assert "Content-Encoding" not in capsys.readouterr().err
    fetched = [open_store(target).fetch(ObjectInfo(key=f"copied/{name}.png"), 10**6) for name in "ab"]
    assert [(one.data, one.encoding) for one in fetched] == [(packed, "gzip"), (image(2), None)]
    assert copy_tree(source, str(tmp_path)) == 2
    assert (tmp_path / "a.png").read_bytes() == packed
    assert "1 of 2 objects have a Content-Encoding" in capsys.readouterr().err


def test_fetch_reads_no_more_than_asked(bucket: str) -> None:
    store = open_store(f"s3://{bucket}")
    assert len(store.fetch(ObjectInfo(key="plain.png"), limit=10).data) == 11


def test_a_packed_manifest_is_unpacked_as_it_is_read(tmp_path: Path) -> None:
    listed = tmp_path / "keys.csv.gz"
    with gzip.open(listed, "wt") as file:
        file.write("key\n")
        file.writelines(f"{number:01000d}\n" for number in range(20_000))
    tracemalloc.start()
    try:
        count = sum(1 for _ in objects(str(listed), None, None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 2 * 2**20, "20 MB of keys, of which one is needed at a time"


class EventQueue:
    """A queue into which S3 puts the events of a bucket."""

    def __init__(self, s3: EmbeddedS3, bucket: str):
        # boto3.client would keep the keys of an earlier server.
        self._sqs: Any = boto3.Session().client("sqs", endpoint_url=s3.endpoint_url)
        self.url: str = self._sqs.create_queue(QueueName=bucket)["QueueUrl"]
        found = self._sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=["QueueArn"])
        notify: Any = {
            "QueueArn": found["Attributes"]["QueueArn"],
            "Events": ["s3:ObjectCreated:*", "s3:ObjectRemoved:*"],
        }
        s3.client().put_bucket_notification_configuration(
            Bucket=bucket, NotificationConfiguration={"QueueConfigurations": [notify]}
        )

    def send(self, body: str) -> None:
        self._sqs.send_message(QueueUrl=self.url, MessageBody=body)

    def wait_for(self, count: int) -> None:
        """Wait until so many messages are there: a store need not send its events before it replies."""
        deadline = time.monotonic() + 30
        while self.messages() < count:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def messages(self) -> int:
        """How many there are, hidden ones included."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self._sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=names)["Attributes"]
        return sum(int(found[name]) for name in names)


@pytest.fixture
def queue(bucket: str, s3: EmbeddedS3) -> EventQueue:
    return EventQueue(s3, bucket)


def scan_events(bucket: str, queue: str, server: list[str], text: bytes = b"", *options: str) -> tuple[int, str]:
    """`patchscan scan --events-from`, with `text` as its standard input: exit code and output."""
    arguments = ["scan", f"s3://{bucket}", "--out", f"s3://{bucket}-out/x", *server, "--events-from", queue, *options]
    done = CliRunner().invoke(app, arguments, input=text)
    if isinstance(done.exception, UserError):
        raise done.exception
    return done.exit_code, done.output


def test_what_events_name_is_scored_into_the_table_and_leaves_the_queue(
    bucket: str, s3: EmbeddedS3, queue: EventQueue
) -> None:
    out, source = open_store(f"s3://{bucket}-out/x"), ScanSource(url=f"s3://{bucket}")
    with stub_server() as server:
        scan(source, out.url)
        for number, key in enumerate([*UNUSUAL_KEYS, "new+ +.png", "gone.png"]):
            s3.client().put_object(Bucket=bucket, Key=key, Body=image(100 + number))
        s3.client().delete_object(Bucket=bucket, Key="gone.png")
        s3.client().delete_object(Bucket=bucket, Key="many/03.png")
        queue.send("{no event")
        queue.wait_for(len(UNUSUAL_KEYS) + 5)
        code, output = scan_events(bucket, queue.url, server)
        assert (code, queue.messages()) == (1, 1), output  # the message that cannot be read stays
        assert "which stays in the queue: it begins as JSON and is none" in output
        assert f"{len(UNUSUAL_KEYS) + 1} objects were named = {len(UNUSUAL_KEYS) + 1} scored" in output
        assert "2 names are of no object; 13 rows of others were kept" in output
        newest = last_complete(out)
        assert newest
        assert newest.named == {"objects": len(UNUSUAL_KEYS) + 1, "unchanged": 0, "missing": 2}

    night = scan(source, out.url)
    assert (night.shards, night.unchanged, night.deleted) == (0, night.listed, 1)
    afresh = scan(source, f"s3://{bucket}-out/afresh")
    assert table_of(out, night.scan) == table_of(open_store(f"s3://{bucket}-out/afresh"), afresh.scan)


def test_a_run_that_dies_before_it_deletes_its_messages_loses_and_doubles_nothing(
    bucket: str, queue: EventQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"many/{number:02d}.png" for number in range(11)]
    for name in names:
        queue.send(name)
    with stub_server() as server:
        with monkeypatch.context() as patched:
            patched.setattr("patchscan.storage.queue.HIDDEN_S", 1)
            patched.setattr("patchscan.storage.queue.Queue.delete", lambda self, messages: 1 / 0)
            code, output = scan_events(bucket, queue.url, server, b"", "--max-messages", "10")
        assert code == 1
        # One more is what S3 sends when notifications are set up. One that becomes visible between
        # the server's two counts is in neither: ask again.
        queue.wait_for(len(names) + 1)
        assert re.search("(9|10) objects were named = (9|10) scored", output)
        time.sleep(1.1)
        code, output = scan_events(bucket, queue.url, server)
    assert (code, queue.messages()) == (0, 0), output
    assert re.search(r"11 objects were named = [12] scored, .* (9|10) unchanged", output)
    newest = last_complete(open_store(f"s3://{bucket}-out/x"))
    assert newest
    assert set(table_of(open_store(f"s3://{bucket}-out/x"), newest.scan)) == set(names)


def test_keys_and_events_are_read_from_standard_input(bucket: str, tmp_path: Path) -> None:
    record = {"s3": {"bucket": {"name": bucket}, "object": {"key": quote_plus(UNUSUAL_KEYS[1])}}}
    lines = ["plain.png", "{broken", json.dumps({"Records": [record]}), "never.png"]
    with stub_server() as server:
        code, output = scan_events(bucket, "-", server, "\n".join(lines).encode())
        assert (code, "patchscan: line 2: " in output) == (1, True), output
        assert "2 objects were named = 2 scored" in output
        code, output = scan_events(bucket, "-", server, b"plain.png\n")
        assert (code, "1 objects were named, 1 of them unchanged" in output) == (0, True)
        for wrong in (["--events-from", "queue"], ["--events-from", "-", "--manifest", "a.csv"]):
            with pytest.raises(UserError, match="--events-from"):
                scan_events(bucket, "-", server, b"", *wrong)


def test_a_queue_or_bucket_that_does_not_exist_is_one_clear_line(bucket: str, s3: EmbeddedS3) -> None:
    with stub_server() as server:
        with pytest.raises(StoreError, match="the queue refuses ReceiveMessage"):
            scan_events(bucket, f"{s3.endpoint_url}/123456789012/none", server)
        with pytest.raises(StoreError, match="there is no bucket"):
            scan_events("never-made", "-", server, b"a.png\n", "--out", f"s3://{bucket}-out/y")
