"""A scan through a server that is not ours and that nothing here imports: MLServer, in an environment of its own."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.import_kit import SIDE, imported_run
from tests.scan_kit import scanned_here_and_there
from tests.serving_kit import png

PYTHON = os.environ.get("PATCHSCAN_MLSERVER_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="PATCHSCAN_MLSERVER_PYTHON names no Python with mlserver and onnxruntime"
)
RUNTIME = """\
import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Graph(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        file = self.settings.parameters.uri
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload):
        crops = NumpyCodec.decode_input(payload.inputs[0])
        (logit,) = self.session.run(None, {"crops": crops})
        output = NumpyCodec.encode_output("logit", np.array([logit]))
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=[output])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported_run(tmp_path_factory.mktemp("theirs") / "run")


@pytest.fixture(scope="module")
def mlserver(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLServer with the run folder's graph as `theirs`."""
    folder = tmp_path_factory.mktemp("mlserver")
    ports = dict(zip(("http_port", "grpc_port", "metrics_port"), free_ports(3), strict=True))
    settings = ports | {"host": "127.0.0.1", "parallel_workers": 0}
    model = {
        "name": "theirs",
        "implementation": "graph.Graph",
        "parameters": {"uri": str(run / "model.onnx"), "version": "3"},
        "inputs": [{"name": "crops", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]}],
        "outputs": [{"name": "logit", "datatype": "FP64", "shape": [1]}],
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    (folder / "graph.py").write_text(RUNTIME)
    with (folder / "log").open("w") as log:
        command = [PYTHON, "-c", "from mlserver.cli import main; main()", "start", "."]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{ports['http_port']}"
    try:
        wait_until_ready(url, process, folder / "log")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/v2/models/theirs/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_a_scan_through_mlserver_has_the_rows_of_the_run_folder(mlserver: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for seed in range(20):
        (tmp_path / "photos" / f"{seed}.png").write_bytes(png(seed))
    (tmp_path / "photos" / "note.txt").write_text("no image")
    here, there = scanned_here_and_there(tmp_path / "photos", run, mlserver, tmp_path)
    assert len(here) == 21
    assert here == there
