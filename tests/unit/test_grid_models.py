"""A model of views on a grid, efficientnet-lite0, goes the way of all: archived, verified, explained, joined."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchscan.detector.answer import Answer, Engine
from patchscan.detector.card import Decision
from patchscan.detector.detector import Detector
from patchscan.detector.engines import load_detector
from patchscan.detector.onnx_export import write_graph
from patchscan.detector.presets import PatchPreset
from patchscan.evaluation.explain import PatchView, as_dict, explain
from patchscan.evaluation.explain_picture import write_explanation
from patchscan.serving.archive import archive
from patchscan.serving.verify import verify
from patchscan.training.ensemble import build_ensemble
from tests.serving_kit import picture, png, tiny_run, untrained_run

ENGINES: tuple[Engine, ...] = ("torch", "onnx")
VIEWS = PatchPreset(rule="grid", size=64, count=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    decision = Decision(temperature=0.01)  # an untrained model's logits hardly differ
    return untrained_run(tmp_path_factory.mktemp("run") / "lite", "lite", "efficientnet-lite0", VIEWS, 1, decision)


@pytest.fixture(scope="module")
def detector(run: Path) -> Detector:
    return Detector.load(run)


def test_it_is_archived_and_verified(run: Path, tmp_path: Path) -> None:
    card = verify(archive(run, tmp_path)).card
    assert (card.architecture, card.preset) == ("efficientnet-lite0", VIEWS)


def test_a_score_does_not_depend_on_the_batch(detector: Detector) -> None:
    images = [png(seed, 200 + seed, 150) for seed in range(4)]
    alone = [detector.score([data])[0] for data in images]
    assert detector.score(images) == alone
    assert len({one.logit for one in alone if isinstance(one, Answer)}) == 4


def test_the_seed_changes_nothing() -> None:
    rgb = picture(1, 300, 200)
    assert np.array_equal(VIEWS.crops(rgb, seed=1).pixels, VIEWS.crops(rgb, seed=2).pixels)


def test_a_small_image_is_scored_but_uncertain(detector: Detector) -> None:
    answer = detector.score([png(1, 200, 40)])[0]
    assert isinstance(answer, Answer)
    assert (answer.verdict, answer.reason) == ("uncertain", "small_image")


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_an_explanation_shows_each_views_vote(run: Path, detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png(1, 300, 200))
    found = write_explanation(run, tmp_path / "photo.png", tmp_path / "why.png")
    (view,) = found.views
    assert isinstance(view, PatchView)
    assert view.votes.shape == (4,)
    logits = np.log(view.votes / (1 - view.votes)) * detector.card.decision.temperature
    assert logits.mean() == pytest.approx(found.answer.logit, abs=1e-5)
    assert len(set(found.alternative_p_ai.tolist())) > 1, "the image was not shifted"
    assert as_dict(found)["views"][0]["votes"] == view.votes.tolist()
    with Image.open(tmp_path / "why.png") as drawn:
        assert drawn.width > 300


@pytest.mark.slow
def test_it_joins_an_ensemble(run: Path, detector: Detector, tmp_path: Path) -> None:
    other = tiny_run(tmp_path / "other")
    build_ensemble([run, other], tmp_path / "both", "both")
    both, image = Detector.load(tmp_path / "both"), png(3, 300, 200)
    members = [(one, one.score([image])[0]) for one in (detector, Detector.load(other))]
    calibrated = [found.logit / one.card.decision.temperature for one, found in members if isinstance(found, Answer)]
    joint = both.score([image])[0]
    assert isinstance(joint, Answer)
    assert joint.logit == pytest.approx(np.mean(calibrated), rel=1e-4)
    assert len(explain(both, image, redraws=2).views) == 2
    crops = [both.prepare(image).crops.pixels]
    graph = load_detector(tmp_path / "both")
    assert graph.engine == "onnx"
    assert graph.logits(crops)[0] == pytest.approx(joint.logit, rel=1e-3)


def test_a_crop_of_any_size_is_scored_in_channels_last_or_not(detector: Detector) -> None:
    torch.manual_seed(0)
    for side in (32, 96):
        x = torch.randn(2, 3, side, side)
        with torch.inference_mode():
            last = detector.model(x.contiguous(memory_format=torch.channels_last))
            torch.testing.assert_close(detector.model(x), last, atol=1e-5, rtol=1e-4)


def test_rows_of_another_grid_are_not_mixed(detector: Detector) -> None:
    assert replace(detector.card, preset=replace(VIEWS, count=5)).digest != detector.card.digest


def test_a_model_whose_number_of_views_varies_scores_alike_with_both_engines(run: Path, tmp_path: Path) -> None:
    preset = replace(VIEWS, max_count=9)
    varied = untrained_run(tmp_path / "varied", "lite", "efficientnet-lite0", preset, 1, Decision(temperature=0.01))
    write_graph(varied)
    images = [png(1, 100, 90), png(2, 200, 150), png(3, 400, 400)]
    by_torch, by_onnx = (load_detector(varied, engine=engine) for engine in ENGINES)
    logits = [by_torch.logits([by_torch.prepare(data).crops.pixels])[0] for data in images]
    assert [by_onnx.logits([by_onnx.prepare(data).crops.pixels])[0] for data in images] == pytest.approx(
        logits, abs=1e-5
    )
    assert [len(by_onnx.prepare(data).crops.pixels) for data in images] == [4, 7, 9]
    assert Detector.load(run).logits([by_torch.prepare(images[0]).crops.pixels]) == logits[:1]
