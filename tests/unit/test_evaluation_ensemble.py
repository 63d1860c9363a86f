"""An ensemble is the mean of its members' calibrated logits, whatever their sizes and numbers of crops."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from patchscan.common.files import sha256_of
from patchscan.detector.answer import Answer
from patchscan.detector.base import BaseDetector, ScoreError
from patchscan.detector.card import WEIGHTS_FILE, Card, CardError, Decision
from patchscan.detector.detector import Detector
from patchscan.detector.engines import load_detector
from patchscan.detector.models import build_network
from patchscan.detector.onnx_export import write_graph
from patchscan.detector.presets import PatchPreset, Preset, WholeImagePreset, preset_from_dict, preset_to_dict
from patchscan.evaluation.explain import explain
from patchscan.evaluation.explain_picture import write_explanation
from patchscan.serving.archive import archive
from patchscan.serving.verify import verify
from patchscan.training.ensemble import EnsembleError, build_ensemble
from tests.import_kit import imported_run


def run_folder(folder: Path, architecture: str, preset: Preset, decision: Decision, seen: list[str]) -> Path:
    torch.manual_seed(len(folder.name))
    folder.mkdir()
    save_file(build_network(architecture).state_dict(), folder / WEIGHTS_FILE)
    Card(
        name=folder.name,
        version="1.0",
        architecture=architecture,
        preset=preset,
        weights_sha256=sha256_of(folder / WEIGHTS_FILE),
        decision=decision,
        training={"seen": seen, "unseen": ["gan", "adm"]},
        warnings=["shared warning", f"{folder.name}'s own"],
    ).write(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("runs")
    return [
        run_folder(base / "lite", "ssp-lite", PatchPreset(count=3), Decision(temperature=0.25, bias=0.5), ["sd"]),
        run_folder(base / "lite-2", "ssp-lite", PatchPreset(rule="random"), Decision(), ["sd"]),
        run_folder(
            base / "cnn", "efficientnet-lite0", WholeImagePreset(), Decision(temperature=3.0, bias=-1.0), ["gan"]
        ),
    ]


@pytest.fixture(scope="module")
def joined(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ensemble of the three runs."""
    folder = tmp_path_factory.mktemp("joined") / "all"
    build_ensemble(runs, folder, "all")
    return folder


def photographs() -> list[bytes]:
    rng = np.random.default_rng(0)
    images = []
    for height, width in ((90, 70), (64, 128), (20, 40)):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    return images


def assert_means(together: Sequence[Answer | ScoreError], alone: Sequence[BaseDetector]) -> None:
    """Each answer's logit is the mean of the members' calibrated logits."""
    for number, answer in enumerate(together):
        assert isinstance(answer, Answer)
        logits = []
        for member in alone:
            one = member.score(photographs())[number]
            assert isinstance(one, Answer)
            logits.append(one.logit / member.card.decision.temperature + member.card.decision.bias)
        assert answer.logit == pytest.approx(np.mean(logits), abs=1e-5)


@pytest.mark.slow
def test_ensemble_scores_the_mean_of_calibrated_logits(runs: list[Path], joined: Path) -> None:
    together = Detector.load(joined).score(photographs())
    alone = [Detector.load(run) for run in runs]
    assert_means(together, alone)
    assert isinstance(together[0], Answer)
    assert together[0].patch["size"] == 32
    assert isinstance(together[2], Answer)
    assert together[2].reason == "small_image"


@pytest.mark.slow
def test_a_batch_of_ensemble_crops_is_scored_image_by_image(joined: Path) -> None:
    """One pass over several images' crops, as a GPU does it, gives the logits of one pass each."""
    detector = Detector.load(joined)
    crops = [detector.prepare(data).crops.pixels for data in photographs()]
    together = detector._crop_logits(np.concatenate(crops)).view(3, -1).mean(dim=1)
    assert together.tolist() == pytest.approx(detector.logits(crops), abs=1e-4)


@pytest.mark.slow
def test_members_of_one_preset_share_as_many_crops_as_an_image_has(tmp_path: Path) -> None:
    preset = PatchPreset(rule="grid", size=32, count=4, max_count=9)
    decisions = (Decision(temperature=0.25, bias=0.5), Decision(temperature=3.0, bias=-1.0))
    architectures = ("ssp-lite", "efficientnet-lite0")
    members = [
        run_folder(tmp_path / architecture, architecture, preset, decision, ["sd"])
        for architecture, decision in zip(architectures, decisions, strict=True)
    ]
    made = build_ensemble(members, tmp_path / "both", "both")
    assert made.preset == preset
    alone = [Detector.load(run) for run in members]
    for detector in (Detector.load(tmp_path / "both"), load_detector(tmp_path / "both", engine="onnx")):
        crops = [detector.prepare(data).crops.pixels for data in photographs()]
        assert [len(one) for one in crops] == [6, 8, 4]
        assert_means(detector.score(photographs()), alone)
    views = explain(Detector.load(tmp_path / "both"), photographs()[0], redraws=1).views
    assert [view.architecture for view in views] == list(architectures)
    with pytest.raises(EnsembleError, match="cannot contain another"):
        build_ensemble([tmp_path / "both", members[0]], tmp_path / "nested", "nested")


def test_an_ensembles_weights_have_the_rights_of_other_files(joined: Path) -> None:
    assert {file.stat().st_mode for file in joined.iterdir()} == {(joined / "card.json").stat().st_mode}


def test_an_ensembles_card(joined: Path) -> None:
    card = Card.read(joined)
    assert card.architecture == "ssp-lite+ssp-lite+efficientnet-lite0"
    assert card.training["seen"] == ["gan", "sd"]
    assert card.training["unseen"] == ["adm"]
    assert card.warnings == ["shared warning", "lite's own", "lite-2's own", "cnn's own"]
    assert preset_from_dict(preset_to_dict(card.preset)) == card.preset
    assert replace(card, decision=Decision(threshold=0.7)).digest != card.digest


def test_what_cannot_be_joined(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(EnsembleError, match="two runs"):
        build_ensemble(runs[:1], tmp_path / "one", "one")
    with pytest.raises(EnsembleError, match="a model's name is one line of at most 200 bytes without a slash"):
        build_ensemble(runs[:2], tmp_path / "two", "one/two")
    before = Card.read(runs[1])
    with pytest.raises(EnsembleError, match="a member's own folder, which would be lost"):
        build_ensemble(runs[:2], runs[1].parent / "." / runs[1].name, "two")
    assert Card.read(runs[1]) == before
    build_ensemble(runs[:2], tmp_path / "two", "two")
    with pytest.raises(EnsembleError, match="cannot contain another"):
        build_ensemble([tmp_path / "two", runs[2]], tmp_path / "nested", "nested")


def test_ours_and_theirs_make_an_ensemble(runs: list[Path], tmp_path: Path) -> None:
    """Of graphs with other operators' versions and sizes of crops; it is archived like an imported detector."""
    theirs, other = imported_run(tmp_path / "theirs"), imported_run(tmp_path / "other", 3, "other")
    write_graph(runs[0])
    replace(Card.read(other), decision=Decision(temperature=2.0, bias=0.25)).write(other)
    members = [runs[0], theirs, other]
    made = build_ensemble(members, tmp_path / "all", "all")
    assert (made.architecture, made.preset.count, made.preset.size) == ("imported", 5, 32)
    assert made.training["seen"] == ["sd"]
    together = load_detector(tmp_path / "all").score(photographs()[:2])
    alone = [load_detector(run, engine="onnx") for run in members]
    assert_means(together, alone)
    assert verify(archive(tmp_path / "all", tmp_path)).card.digest == made.digest
    (tmp_path / "photo.png").write_bytes(photographs()[0])
    explained = write_explanation(tmp_path / "all", tmp_path / "photo.png", tmp_path / "why.png")
    assert [view.architecture for view in explained.views] == ["lite", "theirs", "other"]
    scored = [one.score(photographs()[:1])[0] for one in alone]
    expected = [one.p_ai for one in scored if isinstance(one, Answer)]
    assert [view.p_ai for view in explained.views] == pytest.approx(expected)
    with pytest.raises(CardError, match=r"model\.onnx is missing"):
        build_ensemble([runs[1], theirs], tmp_path / "two", "two")
    with pytest.raises(EnsembleError, match="cannot contain another"):
        build_ensemble([tmp_path / "all", theirs], tmp_path / "nested", "nested")
