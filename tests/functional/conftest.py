"""Servers that functional tests share; each starts once for the whole run."""

import os
import signal
from collections.abc import Iterator

import pytest

from patchscan.common.proxies import bypass_for_loopback
from patchscan.storage.embedded_s3 import EmbeddedS3
from tests.command import ForkServer, path_of_forked
from tests.serving_kit import Served

# A run in a script's background ignores Ctrl-C, and so would the commands whose Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
bypass_for_loopback()
# TorchServe's Java is compiled in a hurry: it runs for a minute, and the better compiler takes a third of its start.
os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")


@pytest.fixture(autouse=True, scope="session")
def commands_that_ran(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where pytest-xdist runs several processes, a command is started as its users start it in one of them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        ForkServer.shared = tmp_path_factory.getbasetemp().parent / "commands"
        ForkServer.shared.mkdir(exist_ok=True)


@pytest.fixture(scope="session")
def forked_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH for scripts and programs that start `patchscan` or `python -m` themselves."""
    return path_of_forked(tmp_path_factory.mktemp("forked"))


@pytest.fixture(scope="module")
def forked_commands(forked_path: str) -> Iterator[None]:
    """The environment in which `patchscan` and `torchrun` start such commands, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", forked_path)
        patch.setenv("PYTHON_EXEC", forked_path.split(":")[0] + "/python")  # what torchrun starts
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[EmbeddedS3]:
    with EmbeddedS3() as server:
        yield server


@pytest.fixture(scope="module")
def empty_s3(s3_server: EmbeddedS3) -> EmbeddedS3:
    """An S3 server without buckets."""
    client = s3_server.client()
    for bucket in (one["Name"] for one in client.list_buckets()["Buckets"]):
        for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket):
            for one in page.get("Versions", []) + page.get("DeleteMarkers", []):
                client.delete_object(Bucket=bucket, Key=one["Key"], VersionId=one["VersionId"])
        client.delete_bucket(Bucket=bucket)
    return s3_server


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`patchscan serve` with the model `tiny` and the model API on."""
    served = Served.start(tmp_path_factory.mktemp("served"))
    yield served
    served.stop()
