"""`patchscan probe`: a linear head on somebody else's backbone, in one graph that is imported like any other."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.common.errors import UserError
from patchscan.dataset.index import load_index
from patchscan.dataset.source import DataError
from patchscan.detector.card import Card
from patchscan.detector.engines import load_detector
from patchscan.training.import_config import Input
from patchscan.training.import_onnx import import_onnx
from patchscan.training.onnx_graph import wrap_features
from patchscan.training.probe import fit_head, train_probe
from tests.import_kit import graph, write

GENERATORS = ("red", "green", "kept")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generators whose pictures have a tint, in both splits, and one that has val images only."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for number, generator in enumerate(GENERATORS):
        for split in ("train", "val")[generator == "kept" :]:
            for kind, tint in (("ai", 25), ("nature", 0)):
                place = folder / generator / split / kind
                place.mkdir(parents=True)
                for image in range(12):
                    pixels = random.integers(60, 160, (40, 40, 3)) + random.integers(0, 30)
                    pixels[..., number % 2] += tint
                    Image.fromarray(pixels.astype(np.uint8)).save(place / f"{image}.png")
    return folder


def score(run: Path, folder: Path) -> list[float]:
    detector = load_detector(run)
    files = sorted(folder.glob("*.png"))
    return detector.logits([detector.prepare(file.read_bytes()).crops.pixels for file in files])


@pytest.mark.slow
def test_a_head_is_trained_and_scores_like_an_imported_detector(data: Path, tmp_path: Path) -> None:
    model = graph(5)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "features"  # as the graph around it names its own
    file, config = write(tmp_path, model)
    options = ["--backbone", str(file), "--config", str(config), "--data", str(data), "--run", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["probe", *options])
    assert done.exit_code == 0, done.output
    assert "on the val images of green, red; next: patchscan evaluate" in done.output
    card = Card.read(tmp_path / "run")
    assert (card.architecture, card.training["seen"], card.training["unseen"]) == (
        "imported",
        ["green", "red"],
        ["kept"],
    )
    assert card.training["train_images"] == card.training["val_images"] == 48
    assert any("A linear head on the features of" in warning for warning in card.warnings)
    for generator in ("red", "green"):
        real, ai = (score(tmp_path / "run", data / generator / "val" / kind) for kind in ("nature", "ai"))
        assert roc_auc_score([0] * 12 + [1] * 12, real + ai) > 0.95


def test_the_head_is_a_logistic_regression_on_what_the_graph_gives() -> None:
    random = np.random.default_rng(1)
    features = random.normal(5, [1, 10, 0.1, 1], (400, 4))
    logit = (features - 5) @ [2, 0.1, 5, 0] + 1
    label = (random.random(400) < 1 / (1 + np.exp(-logit))).astype(int)
    (weights, bias, _), strength = fit_head(features[::2], label[::2], features[1::2], label[1::2])
    assert np.corrcoef(features @ weights + bias, logit)[0, 1] > 0.95
    assert strength > 1e-5


@pytest.mark.parametrize("name", ["crops", "logit", "features"])
def test_a_graph_may_name_its_tensors_as_ours(name: str, tmp_path: Path) -> None:
    model = graph(2)
    before = model.graph.node[0].input[0] if name == "crops" else model.graph.node[-1].output[0]
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name if one == before else one for one in names]
    for value in (*model.graph.input, *model.graph.output):
        value.name = name if value.name == before else value.name
    for folder, one in (("plain", graph(2)), ("renamed", model)):
        file, config = write(tmp_path / folder, one)
        import_onnx(file, tmp_path / folder / "run", config)
    crops = [np.arange(16 * 16 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)]
    runs = (tmp_path / "plain" / "run", tmp_path / "renamed" / "run")
    assert len({load_detector(run).logits(crops)[0] for run in runs}) == 1


def test_features_are_the_mean_over_the_crops(tmp_path: Path) -> None:
    data = wrap_features(tmp_path / "x", graph(3), Input(size=16, views="grid", count=2), None)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    crops = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    one, other, both = (session.run(None, {"crops": part})[0] for part in (crops[:1], crops[1:], crops))
    assert both == pytest.approx((one + other) / 2)


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        ("output: {head: {file: h.json}}", {}, "has a head: a probe trains its own"),
        ("output: {name: z}", {}, "has the outputs y"),
        ("output: {}", {"seen": ["kept"]}, "kept/train needs images in both"),
    ],
)
def test_what_cannot_be_a_probe_is_one_line(
    change: str, options: dict[str, Any], why: str, data: Path, tmp_path: Path
) -> None:
    file, config = write(tmp_path, graph(5))
    config.write_text(config.read_text().replace("output: {}", change))
    with pytest.raises(UserError, match=why):
        train_probe(file, config, str(data), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_an_image_that_was_damaged_since_it_was_indexed_is_one_line(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "red", tmp_path / "data" / "red")
    load_index(tmp_path / "data")
    (tmp_path / "data/red/train/ai/3.png").write_bytes(b"")
    file, config = write(tmp_path, graph(5))
    with pytest.raises(DataError, match=r"red/train/ai/3.png changed since it was indexed .* index` again"):
        train_probe(file, config, str(tmp_path / "data"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_without_a_generator_to_train_on_are_one_line(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "kept", tmp_path / "data" / "kept")
    file, config = write(tmp_path, graph(5))
    with pytest.raises(UserError, match=r"no generator of .* has train and val images of both classes"):
        train_probe(file, config, str(tmp_path / "data"), tmp_path / "run")
