"""Measure int8 models made by ONNX Runtime's static quantisation: their speed, and how far their answers change.

int8 is not offered to users; docs/performance.md says why.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from bench.images import files_of, spread
from patchscan.detector.base import BaseDetector
from patchscan.detector.detector import Detector
from patchscan.detector.onnx_detector import OnnxDetector
from patchscan.detector.onnx_export import export_graph
from patchscan.evaluation.precision import Kept, compare

CALIBRATION_IMAGES, JUDGED_IMAGES = 64, 1_000
# The models depend on the small differences that the noise filters compute, which int8 would round away.
KEPT_IN_FLOAT = ("/model/srm/", "/model/noise/")


class _Calibration(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime carries no types
    def __init__(self, crops: Iterable[np.ndarray]):
        self._crops = iter(crops)

    def get_next(self) -> dict[str, np.ndarray] | None:
        crops = next(self._crops, None)
        return None if crops is None else {"crops": crops}


def quantise(run: Path, data: Path, folder: Path) -> Path:
    """Quantise the run's model to int8, calibrated on images of `data`'s train split. Returns the ONNX file."""
    detector = Detector.load(run)
    plain, prepared, made = (folder / f"{run.name}-{step}.onnx" for step in ("float", "prepared", "int8"))
    plain.write_bytes(export_graph(detector.model, detector.card.preset))
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
        nodes_to_exclude=[node.name for node in nodes if node.name.startswith(KEPT_IN_FLOAT)],
    )
    return made


def _crops(detector: Detector, files: Iterable[Path]) -> Iterable[np.ndarray]:
    for file in files:
        yield np.ascontiguousarray(detector.prepare(file.read_bytes()).crops.pixels)


def judge(run: Path, file: Path, data: Path) -> Kept:
    """Compare int8 with float32 on the val split of `data` (GenImage's layout)."""
    detector = Detector.load(run)
    files = [file for file in spread(files_of(data, "val"), JUDGED_IMAGES) if file.parent.name in ("ai", "nature")]
    crops = list(_crops(detector, files))
    before = _p_ai(detector, crops)
    after = _p_ai(OnnxDetector(detector.card, file.read_bytes()), crops)
    truth = np.array([file.parent.name == "ai" for file in files])
    generators = np.array([file.parts[-4] for file in files])
    return compare(before, after, truth, generators, detector.card.decision.threshold)


def _p_ai(detector: BaseDetector, crops: list[np.ndarray]) -> np.ndarray:
    return np.array([detector.card.decision.p_ai(logit) for logit in detector.logits(crops)])
