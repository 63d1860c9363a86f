"""ONNX Runtime, several threads and half precision score as eager PyTorch with one thread does."""

import pytest
import torch

from patchscan.common.shipped import shipped
from patchscan.detector.card import Card
from patchscan.detector.detector import Detector
from patchscan.detector.images import ImageError
from patchscan.detector.models import Ensemble, build_model
from patchscan.detector.onnx_detector import OnnxDetector
from patchscan.detector.onnx_export import export_graph
from patchscan.detector.presets import EnsemblePreset, PatchPreset, Preset, WholeImagePreset
from patchscan.serving.golden import GPU_LOGIT_TOLERANCE
from tests.serving_kit import png

STARTER = shipped("model_store") / "ssp-lite"
ENSEMBLE = EnsemblePreset(members=(PatchPreset(count=4), WholeImagePreset(size=224)))
CASES: list[tuple[str, Preset]] = [
    ("ssp-lite", PatchPreset(count=16)),
    ("ssp", PatchPreset()),
    ("efficientnet-lite0", PatchPreset(rule="grid", size=64, count=4)),
    ("ssp-lite+simplecnn", ENSEMBLE),
]


@pytest.mark.parametrize(("architecture", "preset"), CASES, ids=[case[0] for case in CASES])
def test_scores_agree_within_1e_5(architecture: str, preset: Preset) -> None:
    torch.manual_seed(0)
    model = build_model(architecture)
    if isinstance(model, Ensemble):
        model.sizes[:], model.counts[:] = torch.tensor([32, 224]), torch.tensor([4, 1])
    card = Card(name="m", version="1", architecture=architecture, preset=preset, weights_sha256="0" * 64)
    detector = Detector(card, model)
    images = [png(seed, 240, 230) for seed in range(2)]
    crops = [detector.prepare(data).crops.pixels for data in images]
    eager = detector.logits(crops)
    converted = OnnxDetector(card, export_graph(model, preset))
    onnx = converted.logits(crops)
    p_ai = card.decision.p_ai
    assert [p_ai(logit) for logit in onnx] == pytest.approx([p_ai(logit) for logit in eager], abs=1e-5, rel=0)
    assert onnx == pytest.approx(eager, abs=1e-4, rel=0)
    assert converted.logits(crops[::-1]) == onnx[::-1]
    assert [converted.logits([one])[0] for one in crops] == onnx


def test_a_score_keeps_its_bits_with_any_number_of_threads() -> None:
    images = [png(seed, 240, 230) for seed in range(2)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(untrained("ssp", PatchPreset()).score(images))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


HALF_P_AI = 0.01  # what fp16 may move p_ai by, as docs/serve.md says


@pytest.mark.parametrize("architecture", ["ssp", "ssp-lite", "efficientnet-lite0"])
def test_half_precision_stays_within_its_tolerance(architecture: str) -> None:
    """On this CPU, which rounds to fp16 as a GPU does (slowly): the noise filters stay in fp32."""
    detector = detector_of(architecture)
    crops = [detector.prepare(png(1, 240, 230)).crops.pixels]
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        half = [detector._crop_logits(one).mean().item() for one in crops]
    full = detector.logits(crops)
    assert half != full
    assert_close(detector, half, full)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: torch.cuda.is_available() is false")
@pytest.mark.parametrize("architecture", ["simplecnn", "resnet50", "ssp", "ssp-lite", "efficientnet-lite0"])
def test_a_gpu_stays_within_its_tolerance(architecture: str) -> None:
    cpu, gpu = detector_of(architecture), detector_of(architecture, "cuda")
    crops = [cpu.prepare(png(seed, 240, 230)).crops.pixels for seed in range(8)]
    assert_close(cpu, gpu.logits(crops), cpu.logits(crops))
    assert [type(one) for one in gpu.score([b"not an image", b""])] == [ImageError, ImageError]


def detector_of(architecture: str, device: str = "cpu") -> Detector:
    """The trained starter for ssp-lite, untrained weights for the others."""
    if architecture == "ssp-lite":
        return Detector.load(STARTER, device)
    presets = {"ssp": PatchPreset(), "efficientnet-lite0": PatchPreset(rule="grid", size=64, count=4)}
    return untrained(architecture, presets.get(architecture, WholeImagePreset()), device)


def untrained(architecture: str, preset: Preset, device: str = "cpu") -> Detector:
    torch.manual_seed(0)
    card = Card(name="m", version="1", architecture=architecture, preset=preset, weights_sha256="0" * 64)
    return Detector(card, build_model(architecture), device)


def assert_close(detector: Detector, half: list[float], full: list[float]) -> None:
    p_ai = detector.card.decision.p_ai
    assert [p_ai(logit) for logit in half] == pytest.approx([p_ai(logit) for logit in full], abs=HALF_P_AI, rel=0)
    assert half == pytest.approx(full, abs=GPU_LOGIT_TOLERANCE, rel=0)
