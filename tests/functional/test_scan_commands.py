"""The scan commands as an operator and a pipeline meet them: exit codes, alerts, events, metrics, webhook, the steps
apart. A stub scorer answers over HTTP; everything else is real."""

import hashlib
import hmac
import io
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from patchscan.cli import app
from patchscan.common.errors import UserError
from patchscan.scanning.steps import stop_at
from patchscan.storage.embedded_s3 import EmbeddedS3
from tests.scan_kit import stub_server

SECRET = "a-key-that-must-stay-secret"


def picture(seed: int, grey: int) -> bytes:
    """A grey image with noise; the stub scorer calls those over 128 AI."""
    pixels = np.random.default_rng(seed).integers(grey - 10, grey + 10, (32, 32, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def scorer() -> Iterator[list[str]]:
    """The options that name a scorer."""
    with stub_server() as options:
        yield options


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:03d}.png").write_bytes(picture(number, 60 + number % 20))
    return folder


def patchscan(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_pipeline_hears_of_ai_images_and_of_drift(photos: Path, tmp_path: Path, scorer: list[str]) -> None:
    out, stream = tmp_path / "out", tmp_path / "events.jsonl"
    scan = ["scan", photos, "--out", out, *scorer, "--fail-on", "ai", "--fail-on", "drift", "--events", stream]
    first = patchscan(*scan)
    assert first.exit_code == 0, first.output
    for number in range(60):
        (photos / f"new {number:03d}.png").write_bytes(picture(number, 180 + number % 20))
    second = patchscan(*scan)
    assert second.exit_code == 3, second.output
    report = json.loads((out / "report.json").read_text())
    assert [alert["kind"] for alert in report["alerts"]] == ["ai", "drift"]
    assert all(alert["message"] in second.output for alert in report["alerts"])
    flagged = [event for event in events(stream) if event["event"] == "flagged"]
    assert sorted(event["key"] for event in flagged) == sorted(f"new {number:03d}.png" for number in range(60))
    assert all(event["p_ai"] > 0.5 and event["scan"] == report["scan"] for event in flagged)
    third = patchscan(*scan)
    assert third.exit_code == 0, "nothing is new, so there is nothing to raise"


def test_a_scan_stops_after_its_seconds() -> None:
    worker: Any = SimpleNamespace(stop=threading.Event())
    with stop_at(worker, time.monotonic() - 1, 0):
        assert worker.stop.wait(10)
    unlimited: Any = SimpleNamespace(stop=threading.Event())
    with stop_at(unlimited, None, 0):
        assert not unlimited.stop.wait(0.2)


def test_a_folder_has_no_requests_to_limit(photos: Path, tmp_path: Path, scorer: list[str]) -> None:
    refused = patchscan("scan", photos, "--out", tmp_path / "out", *scorer, "--max-requests", "5")
    assert "give --max-objects or --max-seconds" in str(refused.exception)
    assert not (tmp_path / "out").exists()


def test_the_steps_apart_tell_progress_in_json_and_end_with_1_where_an_object_failed(
    photos: Path, tmp_path: Path, scorer: list[str]
) -> None:
    planned = patchscan("scan-plan", photos, "--out", tmp_path / "out", *scorer, "--shard-objects", "40")
    made = json.loads(planned.stdout)
    assert (made["shards"], made["listed"]) == (2, 60)
    (photos / "003.png").unlink()
    for index in ("0", "1"):
        worked = patchscan("scan-worker", "--plan", made["plan"], "--index", index, *scorer)
        assert worked.exit_code == 0, worked.output
        told = [json.loads(line) for line in worked.stderr.splitlines()]
        assert told[-1]["event"] == "progress"
        assert told[-1]["done"] == told[-1]["of"] == (40 if index == "0" else 20)
        assert {"bytes", "per_s", "left_s", "failed", "rejected"} < set(told[-1])
        failed = [event for event in told if event["event"] == "failed"]
        assert [(event["key"], event["code"]) for event in failed] == (
            [("003.png", "vanished")] if index == "0" else []
        )
    reduced = patchscan("scan-reduce", "--plan", made["plan"])
    assert reduced.exit_code == 1, reduced.output
    assert "failed vanished: 1, e.g. 003.png" in reduced.output


def test_metrics_count_what_a_scan_did(photos: Path, tmp_path: Path, scorer: list[str]) -> None:
    (photos / "note.txt").write_text("no image")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scanned = patchscan("scan", photos, "--out", tmp_path / "out", *scorer, "--metrics-port", str(port))
    assert scanned.exit_code == 0, scanned.output
    served = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert 'patchscan_scan_objects_total{code="",status="scored"} 60.0' in served
    assert 'patchscan_scan_objects_total{code="not_an_image",status="rejected"} 1.0' in served
    assert 'patchscan_scan_verdicts_total{verdict="real"} 60.0' in served
    assert "patchscan_scan_p_ai_count 60.0" in served
    assert "note.txt" not in served


def test_the_webhook_carries_the_outcome_signed(photos: Path, tmp_path: Path, scorer: list[str]) -> None:
    received: list[tuple[Any, bytes]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    (tmp_path / "secret").write_text(SECRET)
    hook = ["--webhook", f"http://127.0.0.1:{server.server_address[1]}", "--webhook-secret-file", tmp_path / "secret"]
    scanned = patchscan("scan", photos, "--out", tmp_path / "out", *scorer, *hook)
    server.shutdown()
    server.server_close()
    assert scanned.exit_code == 0, scanned.output
    [(headers, body)] = received
    signed = headers["X-Patchscan-Timestamp"].encode() + b"." + body
    wanted = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert headers["X-Patchscan-Signature"] == f"sha256={wanted}"
    told = json.loads(body)
    assert (told["event"], told["totals"]["scored"], told["alerts"]) == ("scan.finished", 60, [])
    assert SECRET.encode() not in body
    assert SECRET not in scanned.output
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in written)


def test_no_credential_is_printed_logged_or_streamed(
    tmp_path: Path,
    scorer: list[str],
    empty_s3: EmbeddedS3,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in empty_s3.environment.items():
        monkeypatch.setenv(name, value)
    for bucket in ("photos", "results"):
        empty_s3.client().create_bucket(Bucket=bucket)
    empty_s3.client().put_object(Bucket="photos", Key="a.png", Body=picture(1, 200))
    empty_s3.client().put_object(Bucket="photos", Key="b.txt", Body=b"no image")
    scan = ["scan", "s3://photos", *scorer, "--events", tmp_path / "events.jsonl"]
    right = patchscan(*scan, "--out", "s3://results/right")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    wrong = patchscan(*scan, "--out", tmp_path / "wrong")
    assert right.exit_code == 0, right.output
    assert isinstance(wrong.exception, UserError)
    assert "refuses the credentials" in str(wrong.exception)
    told = [right.output, wrong.output, str(wrong.exception), caplog.text, (tmp_path / "events.jsonl").read_text()]
    for secret in (
        empty_s3.environment["AWS_ACCESS_KEY_ID"],
        empty_s3.environment["AWS_SECRET_ACCESS_KEY"],
        "wrong-secret",
    ):
        assert not any(secret in text for text in told)
