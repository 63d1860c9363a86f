"""Ctrl-C, once and twice."""

import io
import os
import re
import shutil
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchscan.detector.card import Card
from tests.command import Done, start_patchscan
from tests.operator_kit import assert_one_line, clean, files, patchscan, scorer
from tests.scan_kit import StubServer, image
from tests.serving_kit import Served


class HangingScorer(StubServer):
    """Says its card, and scores nothing until it is told to."""

    go_on = threading.Event()
    asked = threading.Event()

    def do_POST(self) -> None:
        if self.headers["Content-Type"] != "application/json":
            self.asked.set()
            self.go_on.wait()
        super().do_POST()


def test_ctrl_c_twice_in_a_scan(photos: Path, tmp_path: Path) -> None:
    """The first lets what is under way end, the second does not wait for it."""
    out = tmp_path / "out"
    with ThreadingHTTPServer(("127.0.0.1", 0), HangingScorer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        scan = ["scan", photos, "--out", out, "--server", address, "--model", "stub"]
        process = start_patchscan(*scan, env=clean())
        assert HangingScorer.asked.wait(60)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=10)[1]
        assert process.returncode == 75, told
        assert told.splitlines() == ["patchscan: ended at once; run the same command again"]
        assert not [name for name in files(out) if "partial" in name or "rows/part" in name]
        HangingScorer.go_on.set()
        assert patchscan(*scan).returncode == 0
        server.shutdown()
    assert len(list((out / "history").iterdir())) == 1, "the same scan went on"


class HangingStore(BaseHTTPRequestHandler):
    """An S3 store with one image, bright enough for the stub scorer to call it AI. It gives the image once, to the
    scan; the report, which asks again for its thumbnail, waits until it is told to go on."""

    go_on = threading.Event()
    asked = threading.Event()
    given = False

    def do_GET(self) -> None:
        noise, picture = np.random.default_rng(0).integers(200, 250, (200, 200, 3)), io.BytesIO()
        Image.fromarray(noise.astype(np.uint8)).save(picture, "PNG")
        if "list-type" in self.path:
            size = len(picture.getvalue())
            entry = f'<Contents><Key>1.png</Key><Size>{size}</Size><ETag>"e"</ETag></Contents>'
            more = "" if "start-after" in self.path else entry
            self.reply(f"<ListBucketResult><IsTruncated>false</IsTruncated>{more}</ListBucketResult>".encode())
            return
        if HangingStore.given:
            self.asked.set()
            self.go_on.wait()
        HangingStore.given = True
        self.reply(picture.getvalue())

    def reply(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_the_report_is_written(number: signal.Signals, tmp_path: Path) -> None:
    HangingStore.given = False
    HangingStore.asked.clear()
    HangingStore.go_on.clear()
    out = tmp_path / "out"
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), HangingStore) as store,
        ThreadingHTTPServer(("127.0.0.1", 0), StubServer) as server,
    ):
        for one in (store, server):
            threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True).start()
        address = {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{store.server_address[1]}",
            **{f"AWS_{name}": "x" for name in ("DEFAULT_REGION", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY")},
        }
        scorer_url = f"http://127.0.0.1:{server.server_address[1]}"
        scan = ["scan", "s3://photos", "--out", out, "--server", scorer_url, "--model", "stub"]
        process = start_patchscan(*scan, env=clean() | address)
        assert HangingStore.asked.wait(60)
        process.send_signal(number)
        told = process.communicate(timeout=10)[1]
        assert process.returncode == 75, told
        assert told.splitlines()[-1] == "patchscan: interrupted; run the same command again"
        assert not [name for name in files(out) if name.endswith("_SUCCESS")]
        HangingStore.go_on.set()
        assert patchscan(*scan, **address).returncode == 0
        for one in (store, server):
            one.shutdown()
    assert len(list((out / "history").iterdir())) == 1, "the same scan was finished"
    assert len([name for name in files(out) if name.endswith("_SUCCESS")]) == 1


def test_ctrl_c_while_a_bucket_is_listed(served: Served, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{silent.getsockname()[1]}", "AWS_DEFAULT_REGION": "x"}
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        scan = ["scan", "s3://photos", "--out", tmp_path / "out", *scorer(served)]
        process = start_patchscan(*scan, env=clean() | address | keys)
        silent.settimeout(60)
        connection, _ = silent.accept()
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=30)
        connection.close()
    assert_one_line(Done(process.args, process.returncode, printed, told), 75, "run the same command again")
    # The second Ctrl-C ends the process before it removes the mark that a listing is under way; the next scan does.
    assert files(tmp_path / "out") <= {"planning.json"}


def test_an_index_that_is_stopped_keeps_what_it_has_read(tmp_path: Path) -> None:
    """By Ctrl-C, gone on with and stopped by SIGTERM, and gone on with again. It saves what it has read every few
    seconds, here every quarter of one."""
    folder, count = tmp_path / "data" / "one" / "train" / "ai", 4000
    folder.mkdir(parents=True)
    images = [image(seed) for seed in range(9)]
    for at in range(count):
        (folder / f"{at}.png").write_bytes(images[at % 9])
    index, saved = ["index", tmp_path / "data", "--workers", "2"], set[Path]()
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start_patchscan(*index, env=clean(), constants={"patchscan.dataset.index.PART_SECONDS": 0.25})
        deadline = time.monotonic() + 120
        while not set((tmp_path / "data").glob("*/*.parquet")) - saved and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        told = process.communicate(timeout=60)[1]
        assert process.returncode == 75, told
        assert told.splitlines()[-1] == "patchscan: interrupted; run the same command again"
        assert not (tmp_path / "data" / "index.parquet").exists()
        saved = set((tmp_path / "data").glob("*/*.parquet"))
    again = patchscan(*index)
    assert again.returncode == 0, again.stderr
    read = re.search(r"\(([\d,]+) files read", again.stdout)
    assert read
    assert int(read[1].replace(",", "")) < count


def test_ctrl_c_twice_in_a_training(data: Path, tmp_path: Path) -> None:
    """As a terminal sends it, to the loader's processes too. That the same command goes on: test_training.py."""
    run = tmp_path / "run"
    train = ["train", data / "tiny.yaml", "--data", data, "--run", run, "--device", "cpu"]
    process = start_patchscan(*train, "--workers", "1", stdout=None, env=clean(), start_new_session=True)
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("validation: epoch=1"):
            break
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    lines += process.stderr.read().splitlines()
    assert process.wait(60) == 75, lines
    assert not [line for line in lines if "Traceback" in line], "".join(lines)
    # What was being written at that moment has no name of a finished file.
    assert "card.json" not in files(run)
    if (run / "checkpoint.pt").exists():
        assert torch.load(run / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("command", ["evaluate", "archive"])
def test_ctrl_c_twice_in_other_commands(command: str, run: Path, data: Path, tmp_path: Path) -> None:
    """Whatever it was doing at that moment."""
    own = tmp_path / "run"
    shutil.copytree(run, own)
    out = tmp_path / "out"
    arguments = {
        "evaluate": ["evaluate", "--run", own, "--data", data, "--out", out],
        "archive": ["archive", own, "--model-store", out],
    }[command]
    process = start_patchscan(*arguments, env=clean(), start_new_session=True)
    deadline = time.monotonic() + 120
    while not out.exists() and time.monotonic() < deadline:  # made when the work begins
        time.sleep(0.01)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 75, told
    assert re.fullmatch(r"patchscan: (interrupted|ended at once); run the same command again", told.splitlines()[-1])
    assert "Traceback" not in told
    assert not [name for name in files(out) if "partial" in name or name.endswith(".mar")]
    assert Card.read(own).name == "tiny"
