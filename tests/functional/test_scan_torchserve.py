"""Scans through a real TorchServe and a real S3 server, as the command line runs them, with processes killed at will.

PATCHSCAN_DATA=genimage-mini takes 120 images of that data set instead of noise, PATCHSCAN_SCAN_IMAGES=2500 that many.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from patchscan.serving.archive import archive
from patchscan.serving.server import TorchServe
from patchscan.storage import open_store
from patchscan.storage.embedded_s3 import EmbeddedS3
from tests.command import start_patchscan
from tests.faulty_proxy import FaultyProxy
from tests.scan_kit import image, scan_names, table_of, untrained_run

DATA = Path(os.environ.get("PATCHSCAN_DATA", "genimage-mini"))
COUNT = int(os.environ.get("PATCHSCAN_SCAN_IMAGES", "120"))
KILLS = 6 if COUNT < 1000 else 10
HOSTILE = {
    "empty.jpg": b"",
    "short.jpg": b"hi",
    "text.jpg": b"not an image",
    "question.json": b'{"card": true}',
    "archive.zip": b"PK\x03\x04 not really",
    "crops.npy": b"\x93NUMPY not really",
    "tiny.png": image(1, side=4),
    "small.png": image(2, side=20),
    "animation.gif": image(3, kind="GIF"),
    "cut.png": image(4)[:500],
}


@dataclass
class Servers:
    s3: EmbeddedS3
    torchserve: TorchServe
    run: Path

    @property
    def arguments(self) -> list[str]:
        key_file = Path(str(self.torchserve.folder)) / "key_file.json"
        address = self.torchserve.addresses.inference_url
        return ["--server", address, "--model", "untrained", "--token-file", str(key_file)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, empty_s3: EmbeddedS3) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("serve")
    run = untrained_run(folder / "run")
    archive(run, folder / "store")
    torchserve = TorchServe(folder / "store", ["untrained"], workers=1, folder=folder / "scratch")
    with torchserve:
        client = empty_s3.client()
        for name in ("photos", "results"):
            client.create_bucket(Bucket=name)
        for key, data in (HOSTILE | _pictures()).items():
            client.put_object(Bucket="photos", Key=key, Body=data)
        os.environ |= empty_s3.environment
        yield Servers(empty_s3, torchserve, run)
        for name in empty_s3.environment:
            del os.environ[name]


def _pictures() -> dict[str, bytes]:
    """Real photographs and generators' images where the data set is at hand, else images of noise."""
    paths = sorted(DATA.rglob("*.JPEG"))
    chosen = random.Random(0).sample(paths, COUNT) if paths else []
    if chosen:
        return {path.relative_to(DATA).as_posix(): path.read_bytes() for path in chosen}
    return {f"noise/{number:03d}.png": image(number, side=64) for number in range(COUNT)}


def start(servers: Servers, out: str, *more: str, server: bool = True) -> subprocess.Popen[str]:
    scorer = servers.arguments if server else ()
    return start_patchscan(
        "scan", "s3://photos", "--out", out, *scorer, "--shard-objects", "40", *more, stderr=subprocess.STDOUT
    )


def scan(servers: Servers, out: str, *more: str, server: bool = True) -> dict[str, dict[str, Any]]:
    process = start(servers, out, *more, server=server)
    printed, _ = process.communicate(timeout=500)
    assert process.returncode == 0, printed
    store = open_store(out)
    return table_of(store, scan_names(store)[-1])


def model_s_per_image(results: str) -> float:
    """What the report says that the model took of a core."""
    report = open_store(f"s3://results/{results}").read("report.json")
    assert report
    return float(json.loads(report)["cost"]["model_s_per_1000"]["cpu"]) / 1000


@pytest.fixture(scope="module")
def undisturbed(servers: Servers) -> dict[str, dict[str, Any]]:
    return scan(servers, "s3://results/undisturbed")


def test_every_object_has_one_row_and_hostile_ones_their_code(undisturbed: dict[str, dict[str, Any]]) -> None:
    assert len(undisturbed) == COUNT + len(HOSTILE)
    codes = {key: undisturbed[key]["error_code"] for key in HOSTILE}
    assert codes == {
        "empty.jpg": "empty",
        "short.jpg": "not_an_image",
        "text.jpg": "not_an_image",
        "question.json": "not_an_image",
        "archive.zip": "not_an_image",
        "crops.npy": "not_an_image",
        "tiny.png": "too_small",
        "small.png": None,
        "animation.gif": None,
        "cut.png": "truncated",
    }
    scores = [row["p_ai"] for row in undisturbed.values() if row["status"] == "scored"]
    assert len(set(scores)) > len(scores) // 2, "the untrained model calls them all alike, but each has its own score"

    assert model_s_per_image("undisturbed") > 0


def test_the_rows_are_the_same_whoever_cuts_the_patch(servers: Servers, undisturbed: dict[str, dict[str, Any]]) -> None:
    assert scan(servers, "s3://results/by-server", "--select", "server") == undisturbed
    assert model_s_per_image("by-server") > 0


def test_the_rows_are_the_same_without_a_server(servers: Servers, undisturbed: dict[str, dict[str, Any]]) -> None:
    # A batch of one thread in TorchServe and here: the same bits.
    assert scan(servers, "s3://results/in-process", "--run", str(servers.run), server=False) == undisturbed
    assert model_s_per_image("in-process") > 0


def test_killing_torchserves_worker_loses_no_row(servers: Servers, undisturbed: dict[str, dict[str, Any]]) -> None:
    process = start(servers, "s3://results/worker-killed", "--select", "server")
    _wait_for_scoring(process, "s3://results/worker-killed")
    kill_workers(servers)
    printed, _ = process.communicate(timeout=500)
    assert process.returncode == 0, printed
    store = open_store("s3://results/worker-killed")
    assert table_of(store, scan_names(store)[-1]) == undisturbed


def test_sigterm_ends_with_75_and_the_same_command_goes_on(
    servers: Servers, undisturbed: dict[str, dict[str, Any]]
) -> None:
    process = start(servers, "s3://results/stopped", "--threads", "1")
    _wait_for_scoring(process, "s3://results/stopped")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert scan(servers, "s3://results/stopped") == undisturbed


def test_in_a_storm_the_rows_are_the_same(servers: Servers, undisturbed: dict[str, dict[str, Any]]) -> None:
    """S3 answers some requests with 503, resets or half a body, TorchServe's worker and the scan itself are killed."""
    moments = random.Random(7)
    out = "s3://results/storm"
    with FaultyProxy(servers.s3.endpoint_url, every=9) as proxy:
        for number in range(KILLS):
            process = start(servers, out, "--threads", "4", "--endpoint-url", proxy.url)
            try:
                process.communicate(timeout=moments.uniform(0.5, 5))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            if number % 3 == 1:
                kill_workers(servers)
        assert scan(servers, out, "--endpoint-url", proxy.url) == undisturbed
        assert proxy.faults > 10
    store = open_store(out)
    for name in scan_names(store):
        if store.read(f"scans/{name}/_SUCCESS"):
            assert table_of(store, name) == undisturbed


def kill_workers(servers: Servers) -> None:
    """kill -9 for TorchServe's Python workers; it starts new ones."""
    for child in psutil.Process(servers.torchserve.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one killed before that is not yet gone
            if "model_service_worker.py" in " ".join(child.cmdline()):
                child.kill()


def _wait_for_scoring(process: subprocess.Popen[str], out: str) -> None:
    """Until the scan has its plan and its first requests are under way."""
    store = open_store(out)
    deadline = time.monotonic() + 60
    while not list(store.names("history/")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
