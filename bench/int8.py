"""int8 by ONNX Runtime's static quantisation: how fast, and how far its answers move. Measured, and not offered:
docs/performance.md says what it would have to keep."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from bench.images import files_of, spread
from patchscan.detector.detector import Detector
from patchscan.detector.engines import OnnxModel, export
from patchscan.detector.presets import to_tensor
from patchscan.reporting.statistics import wilson

CALIBRATION_IMAGES, JUDGED_IMAGES = 64, 1_000
# What int8 must keep to be offered: the answer of all but so many images moves by less than this.
MOVE, SHARE = 0.01, 0.99
# The noise filters' small differences are all that the models look at; in int8 nothing is left of them.
KEPT_IN_FLOAT = ("/srm/", "/noise/")


class _Calibration(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime carries no types
    def __init__(self, crops: Iterable[np.ndarray]):
        self._crops = iter(crops)

    def get_next(self) -> dict[str, np.ndarray] | None:
        crops = next(self._crops, None)
        return None if crops is None else {"crops": to_tensor(crops).contiguous().numpy()}


def quantise(run: Path, data: Path, folder: Path) -> Path:
    """The run's model in int8, calibrated on images of `data`'s train split. Returns the ONNX file."""
    detector = Detector.load(run)
    preset = detector.card.preset
    plain, prepared, made = (folder / f"{run.name}-{step}.onnx" for step in ("float", "prepared", "int8"))
    export(detector.model, torch.zeros(preset.count, 3, preset.size, preset.size), str(plain))
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    nodes = onnx.load(str(prepared)).graph.node
    quantize_static(
        str(prepared),
        str(made),
        _Calibration(_crops(detector, spread(files_of(data, "train"), CALIBRATION_IMAGES))),
        quant_format=QuantFormat.QOperator,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,  # AVX2 without VNNI adds products in 16 bits, which 8-bit weights overflow
        op_types_to_quantize=["Conv", "Gemm", "Add"],
        nodes_to_exclude=[one.name for one in nodes if one.name.startswith(KEPT_IN_FLOAT)],
    )
    return made


def _crops(detector: Detector, files: Iterable[Path]) -> Iterable[np.ndarray]:
    for file in files:
        yield np.ascontiguousarray(detector.prepare(file.read_bytes()).crops.pixels)


@dataclass(frozen=True)
class Judgement:
    """Over the val images: `answers`, the share whose p_ai moved by less than MOVE, and `accuracies`, the share of the
    generators whose accuracy is not below the 95 % interval (Wilson) that it had."""

    answers: float
    accuracies: float


def judge(run: Path, file: Path, data: Path) -> Judgement:
    """Compare int8 with float32 on the val split of `data` (GenImage's layout)."""
    detector = Detector.load(run)
    files = [one for one in spread(files_of(data, "val"), JUDGED_IMAGES) if one.parent.name in ("ai", "nature")]
    crops = list(_crops(detector, files))
    before = _p_ai(detector, crops)
    detector.model = OnnxModel(str(file))
    after = _p_ai(detector, crops)
    truth = np.array([one.parent.name == "ai" for one in files])
    generators = np.array([one.parts[-4] for one in files])
    threshold = detector.card.decision.threshold
    held = []
    for name in np.unique(generators):
        right = [((p_ai >= threshold) == truth)[generators == name] for p_ai in (before, after)]
        first, second = (wilson(int(one.sum()), len(one)) for one in right)
        held.append((second.value or 0.0) >= (first.low or 0.0))
    return Judgement(float((np.abs(before - after) < MOVE).mean()), float(np.mean(held)))


def _p_ai(detector: Detector, crops: list[np.ndarray]) -> np.ndarray:
    return np.array([detector.card.decision.p_ai(logit) for logit in detector.logits(crops)])
