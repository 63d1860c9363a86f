"""Score encoded images with ONNX Runtime, on the CPU and without torch."""

import os
from typing import TYPE_CHECKING

import numpy as np

from patchscan.detector.answer import EngineUsed
from patchscan.detector.card import CardError
from patchscan.detector.graph_detector import GraphDetector

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def open_session(graph: bytes) -> "InferenceSession":
    """Have ONNX Runtime open an ONNX model, on one thread of the CPU. Raises CardError where it cannot."""
    # From version 1.29 on it tells Microsoft of every process and model that it runs, unless this is set before.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised, too
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own, which are not named in Python
        raise CardError(f"ONNX Runtime cannot run this model: {' '.join(str(error).split())}") from error


class OnnxDetector(GraphDetector):
    """A trained model in ONNX Runtime, with its card."""

    engine: EngineUsed = "onnx"

    def _open(self, graph: bytes) -> None:
        self._session = open_session(graph)

    def _input_shape(self) -> list[int | None]:
        # a number of crops that is not fixed has a name
        return [side if isinstance(side, int) else None for side in self._session.get_inputs()[0].shape]

    def _run(self, crops: np.ndarray) -> float:
        (logit,) = self._session.run(None, {"crops": crops})
        return float(logit)
