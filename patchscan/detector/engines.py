"""Choose what runs a model, PyTorch or ONNX Runtime, and load a run folder with it."""

from importlib.util import find_spec
from pathlib import Path

from patchscan.common.errors import UserError
from patchscan.detector.answer import Engine
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import IMPORTED, Card
from patchscan.detector.images import Limits
from patchscan.detector.onnx_detector import GRAPH_FILE, OnnxDetector


class EngineError(UserError):
    """The engine cannot run the model where it was asked to."""


def choose_engine(run: Path, device: str = "cpu", engine: Engine | None = None) -> Engine:
    """Return the engine for a run folder: the one asked for; otherwise `onnx` on a CPU where onnxruntime is installed
    and the folder has a graph, else `torch`. Raises EngineError where ONNX Runtime is asked to use a GPU."""
    if engine == "onnx" and device != "cpu":
        raise EngineError(f"--engine onnx runs on the CPU only: leave out --device {device}, or use --engine torch")
    if engine:
        return engine
    return "onnx" if device == "cpu" and find_spec("onnxruntime") and (run / GRAPH_FILE).exists() else "torch"


def load_detector(
    run: Path, device: str = "cpu", engine: Engine | None = None, limits: Limits = Limits()
) -> BaseDetector:
    """Load a run folder with the engine of `choose_engine`. torch is imported for the engine of that name only.

    Raises EngineError, CardError and WeightsError.
    """
    if choose_engine(run, device, engine) == "onnx":
        return OnnxDetector.load(run, limits)
    from patchscan.detector.detector import Detector

    return Detector.load(run, device, limits)


def load_any(run: Path, device: str = "cpu") -> BaseDetector:
    """Load a run folder in PyTorch, or that of an imported detector in ONNX Runtime, which alone runs it. Raises as
    `load_detector` does."""
    return load_detector(run, device, "onnx" if Card.read(run).architecture == IMPORTED else "torch")
