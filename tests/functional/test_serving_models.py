"""One archive a model: SimpleCNN, ResNet50, SSP, EfficientNet-Lite0, an ensemble of two and an imported one, in one
TorchServe."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from patchscan.detector.answer import Answer
from patchscan.detector.card import Card, Decision
from patchscan.detector.presets import PatchPreset, WholeImagePreset
from patchscan.serving.archive import load_archived
from patchscan.serving.verify import verify
from patchscan.training.ensemble import build_ensemble
from tests.command import patchscan
from tests.import_kit import imported_run
from tests.serving_kit import Served, png, untrained_run

MODELS = ("simplecnn", "resnet50", "ssp", "lite0", "ensemble", "theirs")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of each, untrained; the members of the ensemble bring a calibration each."""
    folder = tmp_path_factory.mktemp("runs")
    untrained_run(
        folder / "simplecnn", "simplecnn", "simplecnn", WholeImagePreset(), 1, Decision(temperature=0.1, bias=0.5)
    )
    untrained_run(folder / "resnet50", "resnet50", "resnet50", WholeImagePreset(), 2, Decision(temperature=8.0))
    untrained_run(folder / "ssp", "ssp", "ssp", PatchPreset(), 3, Decision(temperature=2.0, bias=-0.3))
    views = PatchPreset(rule="grid", size=128, count=9)
    untrained_run(folder / "lite0", "lite0", "efficientnet-lite0", views, 4, Decision(temperature=0.01))
    untrained_run(
        folder / "whole", "whole", "efficientnet-lite0", WholeImagePreset(), 5, Decision(temperature=0.1, bias=0.5)
    )
    build_ensemble([folder / "lite0", folder / "whole"], folder / "ensemble", "ensemble")
    imported_run(folder / "theirs")
    return folder


@pytest.fixture(scope="module")
def server(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`patchscan serve` over the archives that `patchscan archive` makes of them."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        done = patchscan("archive", runs / name, "--model-store", folder / "store")
        assert done.returncode == 0, done.stderr
    server = Served.over(folder, runs, "--workers", "1")
    yield server
    server.stop()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_scores_as_evaluation_does_in_any_batch_and_verifies(name: str, server: Served, runs: Path) -> None:
    images = [png(seed, 200 + 9 * seed, 230) for seed in range(3)]
    right = [asdict(one) for one in load_archived(runs / name).score(images) if isinstance(one, Answer)]
    assert len({one["logit"] for one in right}) == 3
    for size in (1, 3):
        replies = server.in_one_batch(name, images[-size:])
        assert [reply.json() for reply in replies] == right[-size:]
    assert verify(server.store / f"{name}.mar").card.architecture == Card.read(runs / name).architecture


def test_a_scan_with_an_imported_detector_gives_the_same_rows_on_the_server(
    server: Served, runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for seed in range(4):
        (tmp_path / "photos" / f"{seed}.png").write_bytes(png(seed))
    inference, run = server.said["inference"], ["--run", runs / "theirs"]
    at = ["--server", inference, "--model", "theirs", "--token-file", server.token_file]
    protocol = ["--server", f"v2+{inference}", *at[2:], *run]
    found = []
    for number, options in enumerate((run, at, [*at, "--select", "server"], protocol)):
        out = tmp_path / f"out{number}"
        assert patchscan("scan", tmp_path / "photos", "--out", out, *options).returncode == 0
        (folder,) = out.glob("scans/*/rows")
        rows = pq.read_table(folder).drop_columns(["scored_at"]).to_pylist()
        assert {row.pop("engine") for row in rows} == {None if options is protocol else "onnx"}
        found.append(rows)
    assert found == [found[0]] * 4


def test_without_the_model_api_nothing_can_be_registered(server: Served) -> None:
    with server.management() as management:
        assert management.post("/models", params={"url": "ssp.mar", "model_name": "again"}).status_code == 405
        assert management.delete("/models/ssp").status_code == 405
