"""Run a model with ONNX Runtime instead of PyTorch: the `engine` setting of an archive's handler."""

import tempfile
import warnings

import torch
from torch import nn

from patchscan.detector.models import Ensemble
from patchscan.detector.presets import EnsemblePreset, Preset


def to_onnx(model: nn.Module, preset: Preset) -> nn.Module:
    """Convert the model, or each member of an ensemble, to run in ONNX Runtime. p_ai changes by less than 1e-5."""
    if isinstance(model, Ensemble) and isinstance(preset, EnsemblePreset):
        pairs = zip(model.members, preset.members, strict=True)
        model.members = nn.ModuleList([_convert(member, part.count, part.size) for member, part in pairs])
        return model
    return _convert(model, preset.count, preset.size)


class OnnxModel(nn.Module):
    """Replacement for the model that was exported to `file`: same input and output, on the CPU, with one thread.
    Needs onnxruntime."""

    def __init__(self, file: str):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # worker processes already use all cores
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised crops (n, 3, size, size) to raw outputs (n, 1) or (n, 2); n is fixed at the export."""
        (outputs,) = self._session.run(None, {"crops": x.contiguous().numpy()})
        return torch.from_numpy(outputs)


def _convert(model: nn.Module, crops: int, size: int) -> OnnxModel:
    # Exported at load time, so that the archive holds the weights only once.
    with tempfile.TemporaryDirectory(prefix="patchscan-onnx-") as folder:
        file = f"{folder}/model.onnx"
        export(model.eval(), torch.zeros(crops, 3, size, size), file)
        return OnnxModel(file)


def export(model: nn.Module, example: torch.Tensor, file: str) -> None:
    """Write `model` as an ONNX file for inputs of exactly the shape of `example`, (n, 3, size, size). Needs onnx.

    The number of crops n is fixed because ONNX Runtime is a little faster when it knows it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is deprecated, but the new one needs a further package
        torch.onnx.export(
            model,
            (example,),
            file,
            input_names=["crops"],
            output_names=["outputs"],
            dynamo=False,
        )
