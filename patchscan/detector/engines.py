"""The same model run by ONNX Runtime instead of eager PyTorch: the setting `engine` of an archive's handler."""

import tempfile
import warnings

import torch
from torch import nn

from patchscan.detector.models import Ensemble
from patchscan.detector.presets import EnsemblePreset, Preset


def with_onnx(model: nn.Module, preset: Preset) -> nn.Module:
    """The model run by ONNX Runtime; of an ensemble, each member. Measured here, p_ai moves by less than 1e-5."""
    if isinstance(model, Ensemble) and isinstance(preset, EnsemblePreset):
        parts = zip(model.members, preset.members, strict=True)
        model.members = nn.ModuleList([_exported(member, part.count, part.size) for member, part in parts])
        return model
    return _exported(model, preset.count, preset.size)


class OnnxModel(nn.Module):
    """Stands in for the model that was exported to `file`: takes and gives what it does, on the CPU, with one thread.
    Needs onnxruntime."""

    def __init__(self, file: str):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # workers, not threads, share the cores
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised crops (n, 3, size, size), the n that was exported, to raw outputs (n, 1) or (n, 2)."""
        (outputs,) = self._session.run(None, {"crops": x.contiguous().numpy()})
        return torch.from_numpy(outputs)


def _exported(model: nn.Module, crops: int, size: int) -> OnnxModel:
    """Export when loaded: the archive's weights stay the only ones."""
    with tempfile.TemporaryDirectory(prefix="patchscan-onnx-") as folder:
        file = f"{folder}/model.onnx"
        export(model.eval(), torch.zeros(crops, 3, size, size), file)
        return OnnxModel(file)


def export(model: nn.Module, example: torch.Tensor, file: str) -> None:
    """Write `model` as ONNX for the crops of one image, as many as `example` (n, 3, size, size) has: ONNX Runtime is a
    little faster where it knows their number. Needs onnx."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package says that it is the older one
        torch.onnx.export(
            model,
            (example,),
            file,
            input_names=["crops"],
            output_names=["outputs"],
            dynamo=False,
        )
