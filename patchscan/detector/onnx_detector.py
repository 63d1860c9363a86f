"""Score encoded images with ONNX Runtime, on the CPU and without torch."""

import numpy as np

from patchscan.detector.answer import EngineUsed
from patchscan.detector.graph_detector import GraphDetector


class OnnxDetector(GraphDetector):
    """A trained model in ONNX Runtime, with its card."""

    engine: EngineUsed = "onnx"

    def _open(self, graph: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def _input_shape(self) -> list[int | None]:
        # a number of crops that is not fixed has a name
        return [side if isinstance(side, int) else None for side in self._session.get_inputs()[0].shape]

    def _run(self, crops: np.ndarray) -> float:
        (logit,) = self._session.run(None, {"crops": crops})
        return float(logit)
