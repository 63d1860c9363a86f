"""Export a PyTorch model to ONNX, for ONNX Runtime."""

import io
import warnings
from pathlib import Path

import torch
from torch import nn

from patchscan.common.files import atomic_write
from patchscan.detector.detector import Detector
from patchscan.detector.graph_detector import GRAPH_FILE, seal
from patchscan.detector.models import ai_logit
from patchscan.detector.presets import Preset, has_fixed_count, to_tensor


def write_graph(run: Path) -> Path:
    """Write `model.onnx` into a run folder, sealed to its weights. The same weights give the same bytes. Returns the
    file. Raises CardError and WeightsError. Needs onnx."""
    detector = Detector.load(run)
    with atomic_write(run / GRAPH_FILE) as file:
        file.write_bytes(seal(export_graph(detector.model, detector.card.preset), detector.card.weights_sha256))
    return run / GRAPH_FILE


def export_graph(model: nn.Module, preset: Preset) -> bytes:
    """Return an ONNX model from one image's crops, uint8 (count, size, size, 3) named `crops`, to its logit, a float64
    scalar. Needs onnx.

    The number of crops is fixed where every image has as many: ONNX Runtime is a little faster when it knows it, and
    the members of an ensemble take theirs from it.
    """
    crops = torch.zeros(preset.count, preset.size, preset.size, 3, dtype=torch.uint8)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is deprecated, but the new one needs a further package
        torch.onnx.export(
            _CropsToLogit(model).eval(),
            (crops,),
            file,  # type: ignore[arg-type]  # the annotation names paths only
            input_names=["crops"],
            output_names=["logit"],
            dynamic_axes=None if has_fixed_count(preset) else {"crops": {0: "count"}},
            dynamo=False,
        )
    return file.getvalue()


class _CropsToLogit(nn.Module):
    """The model with what is done before and after it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return ai_logit(self.model(to_tensor(crops))).double().mean()
