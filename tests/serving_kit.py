"""What the serving tests share: a tiny model without training, `patchscan serve` as a process, and its clients."""

import io
import json
import os
import signal
import socket
import subprocess
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from patchscan.common.files import sha256_of
from patchscan.detector.card import WEIGHTS_FILE, Card, Decision
from patchscan.detector.models import build_model
from patchscan.detector.presets import PatchPreset, Preset
from patchscan.serving.archive import archive, write_zip
from patchscan.serving.registry import Registry
from tests.command import PATCHSCAN, environment

START_TIMEOUT_S = 330
METRICS_LAG_S = 0.5  # TorchServe reads its workers' figures beside the answers


def tiny_run(folder: Path, seed: int = 0, name: str = "tiny") -> Path:
    """A run folder of an untrained ssp-lite; another seed is another model."""
    return untrained_run(folder, name, "ssp-lite", PatchPreset(count=4), seed)


def untrained_run(
    folder: Path, name: str, architecture: str, preset: Preset, seed: int = 0, decision: Decision = Decision()
) -> Path:
    """A run folder of any architecture, its weights drawn from the seed."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    save_file(build_model(architecture).state_dict(), folder / WEIGHTS_FILE)
    Card(
        name=name,
        version="1.0",
        architecture=architecture,
        preset=preset,
        weights_sha256=sha256_of(folder / WEIGHTS_FILE),
        decision=decision,
    ).write(folder)
    return folder


def picture(seed: int, width: int = 160, height: int = 120) -> np.ndarray:
    """Noise about a gradient, uint8 (height, width, 3)."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 180, width)[None, :, None]
    return (ramp + random.integers(0, 70, (height, width, 3))).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file of this format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(seed: int, width: int = 160, height: int = 120) -> bytes:
    """A small PNG."""
    return encoded(Image.fromarray(picture(seed, width, height)), "PNG")


def tar_of(members: dict[str, bytes]) -> bytes:
    """An uncompressed tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zip_of(members: dict[str, bytes]) -> bytes:
    """A deflated zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def rewritten(mar: Path, out: Path, change: dict[str, bytes]) -> Path:
    """A copy of an archive with some files replaced or added."""
    with zipfile.ZipFile(mar) as old, out.open("wb") as file:
        write_zip(file, {name: old.read(name) for name in old.namelist()} | change)
    return out


def can_unshare() -> bool:
    """Whether this user may have mounts of its own, to make the root read-only for one process."""
    done = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return done.returncode == 0


@dataclass
class Served:
    """A running `patchscan serve` with a model `tiny` 1.0 and the model API on; its root is read-only where
    `read_only`, except for `scratch`."""

    folder: Path
    run: Path
    read_only: bool = field(default_factory=can_unshare)
    said: dict[str, str] = field(init=False)
    _process: subprocess.Popen[bytes] = field(init=False)

    @classmethod
    def start(cls, folder: Path, workers: int = 1) -> "Served":
        """Archive a tiny model and serve it; returns when the server says that it is ready."""
        run = tiny_run(folder / "run")
        archive(run, folder / "store")
        return cls.over(folder, run, "--model-api", "--workers", str(workers))

    @classmethod
    def over(cls, folder: Path, run: Path, *options: str) -> "Served":
        """Serve what `folder`/store holds; returns when the server says that it is ready."""
        served = cls(folder, run)
        (folder / "scratch").mkdir()
        (folder / "tokens").write_text("first-token\n")
        # As in a slim image: no other program is on the PATH.
        command: list[str | Path] = ["env", f"PATH={Path(PATCHSCAN).parent}", PATCHSCAN, "serve"]
        command += ["--model-store", served.store, "--scratch", served.scratch]
        command += ["--token-file", served.token_file, *options]
        command += ["--inference", "127.0.0.1:0", "--management", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        if served.read_only:
            mounts = 'mount --bind "$0" "$0" && mount -o remount,ro,bind / && exec "$@"'
            command = ["unshare", "-m", "sh", "-c", mounts, served.scratch, *command]
        served._process = subprocess.Popen(
            list(map(str, command)),
            stdout=(folder / "out").open("wb"),
            stderr=(folder / "err").open("wb"),
            env=environment(),
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (said := (folder / "out").read_text()).endswith("\n"):
            assert served._process.poll() is None, (folder / "err").read_text()
            assert time.monotonic() < deadline, "patchscan serve does not become ready"
            time.sleep(0.2)
        served.said = json.loads(said)
        return served

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def token_file(self) -> Path:
        return self.folder / "tokens"

    @property
    def keys(self) -> Path:
        return self.scratch / "key_file.json"

    @property
    def pid(self) -> int:
        return self._process.pid

    def client(self) -> httpx.Client:
        """A client of the inference API with a good token."""
        token = self.token_file.read_text().split()[0]
        headers = {"Authorization": f"Bearer {token}"}
        # With a bound on idle connections, httpcore can close one that another thread has just been given.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.Client(base_url=self.said["inference"], headers=headers, timeout=120, limits=limits)

    def management(self) -> httpx.Client:
        """A client of the management API with its key."""
        key = json.loads(self.keys.read_text())["management"]["key"]
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.said["management"], headers=headers, timeout=120)

    def options(self) -> list[str]:
        """What `patchscan register`, `promote` and `rollback` are told to reach this server."""
        at = ["--management", self.said["management"], "--inference", self.said["inference"], "--keys", str(self.keys)]
        return [*at, "--token-file", str(self.token_file), "--model-store", str(self.store)]

    def registry(self) -> Registry:
        """The same, in this process."""
        said = self.said
        return Registry.connect(said["management"], said["inference"], self.keys, self.token_file, self.store)

    def metrics(self) -> dict[str, float]:
        """Every sample of the metrics address, by name and labels without the host's name."""
        found = {}
        for line in httpx.get(self.said["metrics"]).text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                labels = [one for one in name.rstrip("}").partition("{")[2].split(",") if one and "ostname" not in one]
                found[f"{name.partition('{')[0]}{{{','.join(labels)}}}"] = float(value)
        return found

    def in_one_batch(self, model: str, bodies: list[bytes]) -> list[httpx.Response]:
        """The replies to requests that the model's one worker takes as one batch, while it has nothing else to do."""
        with self.management() as management:
            worker = management.get(f"/models/{model}").json()[0]["workers"][0]["pid"]
        before = self.metrics()
        with self.client() as client, ThreadPoolExecutor(1 + len(bodies)) as pool:

            def send(body: bytes) -> httpx.Response:
                return client.put(f"/predictions/{model}", content=body)

            # While the worker stands still with one request, what comes waits, and then makes one batch.
            os.kill(worker, signal.SIGSTOP)
            try:
                first = pool.submit(send, b"no image")
                self._wait_in_flight(1)
                replies = pool.map(send, bodies)
                self._wait_in_flight(1 + len(bodies))
            finally:
                os.kill(worker, signal.SIGCONT)
            assert first.result().status_code == 422
            found = list(replies)
        time.sleep(METRICS_LAG_S)
        after = self.metrics()
        for name, count in (("patchscan_batches_total", 2), ("patchscan_batch_requests_total", 1 + len(bodies))):
            sample = f'{name}{{ModelName="{model}"}}'
            assert after[sample] - before.get(sample, 0) == count
        return found

    def _wait_in_flight(self, count: int) -> None:
        """Until so many requests are at the gate, and a moment longer for them to reach TorchServe's queue."""
        deadline = time.monotonic() + 60
        while self.metrics()["patchscan_requests_in_flight{}"] < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(120)


def raw_connection(served: Served) -> socket.socket:
    """A TCP connection to the inference address."""
    host, port = served.said["inference"].removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)
