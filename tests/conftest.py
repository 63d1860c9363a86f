"""The order of the files, reports without pictures, and no test that depends on how fast the machine is."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import no_pictures

# Some tests load ONNX Runtime and OpenVINO before the product does, which turns off their telemetry so.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# The longest begin: else one process would wait for the other at the end. The other files keep their order.
LONGEST = (
    "test_docs_train.py",
    "test_training.py",
    "test_demo.py",
    "test_scan_torchserve.py",
    "test_bench_tiny.py",
    "test_serving_models.py",
    "test_evaluate.py",
    "test_scan_s3.py",
    "test_training_job.py",
    "test_openvino.py",
    "test_import_torch.py",
    "test_evaluation_report.py",
    "test_scanning_named.py",
)


def pytest_make_parametrize_id(val: object) -> str | None:
    """The processes of pytest-xdist have to give one test one name, and packed bytes hold the time at which they were
    packed."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(Path(item.path).name, len(places)))


@pytest.fixture(autouse=True, scope="session")
def without_pictures() -> Iterator[None]:
    """Pictures of reports are neither composed nor drawn, which takes half a second each."""
    with no_pictures.replaced(no_pictures.stand_ins()):
        yield


@pytest.fixture(scope="module")
def compositions() -> Iterator[None]:
    """They are composed, but not drawn."""
    with no_pictures.replaced(no_pictures.COMPOSE):
        yield


@pytest.fixture(scope="module")
def pictures(compositions: None) -> Iterator[None]:
    """They are composed and drawn, as users get them."""
    with no_pictures.replaced(no_pictures.DRAW):
        yield
