"""The order of the files, and what makes pictures cheap."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from patchscan.reporting import plots

# The longest begin: else one process would wait for the other at the end. The other files keep their order.
LONGEST = (
    "test_scan_torchserve.py",
    "test_bench_tiny.py",
    "test_demo.py",
    "test_training.py",
    "test_docs_train.py",
    "test_training_job.py",
    "test_evaluation_report.py",
    "test_scanning_scan.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(Path(item.path).name, len(places)))


DRAW = plots.png


@pytest.fixture(autouse=True, scope="session")
def no_pictures() -> Iterator[None]:
    """Pictures of reports are composed, but not drawn, which takes a third of a second each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", lambda drawing: b"")
        yield


@pytest.fixture(scope="module")
def pictures() -> Iterator[None]:
    """They are drawn, as users get them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", DRAW)
        yield
