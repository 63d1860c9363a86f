"""ONNX Runtime scores as eager PyTorch does, whatever the architecture."""

from pathlib import Path

import pytest
import torch

from detector.card import Card
from detector.detector import Detector
from detector.models import Ensemble, assemble
from detector.presets import EnsemblePreset, PatchPreset, Preset, WholePreset
from handlers.engines import with_onnx
from tests.serving_kit import png, tiny_run
from training.archive import ArchiveError, archive

ENSEMBLE = EnsemblePreset(members=(PatchPreset(count=4), WholePreset(size=224)))
CASES: list[tuple[str, Preset]] = [
    ("ssp-lite", PatchPreset(count=16)),
    ("ssp", PatchPreset()),
    ("ssp-lite+simplecnn", ENSEMBLE),
]


@pytest.mark.parametrize(("architecture", "preset"), CASES, ids=[case[0] for case in CASES])
def test_scores_agree_within_1e_5(architecture: str, preset: Preset) -> None:
    torch.manual_seed(0)
    model = assemble(architecture)
    if isinstance(model, Ensemble):
        model.sizes[:], model.counts[:] = torch.tensor([32, 224]), torch.tensor([4, 1])
    card = Card(name="m", version="1", architecture=architecture, preset=preset, weights_sha256="0" * 64)
    detector = Detector(card, model)
    images = [png(seed, 240, 230) for seed in range(4)]
    crops = [detector.prepare(data).crops.pixels for data in images]
    eager = detector.logits(crops)
    detector.model = with_onnx(detector.model, preset)
    onnx = detector.logits(crops)
    p_ai = card.decision.p_ai
    assert [p_ai(logit) for logit in onnx] == pytest.approx([p_ai(logit) for logit in eager], abs=1e-5, rel=0)
    assert onnx == pytest.approx(eager, abs=1e-4, rel=0)
    assert detector.logits(crops[::-1]) == onnx[::-1]


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    with pytest.raises(ArchiveError, match="torch, onnx, not 'tensorrt'"):
        archive(run, tmp_path, engine="tensorrt")
