"""Choose what runs a model, PyTorch, ONNX Runtime or OpenVINO, and load a run folder with it."""

from importlib.util import find_spec
from pathlib import Path

from patchscan.common.errors import UserError
from patchscan.detector.answer import Engine
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import IMPORTED, Card
from patchscan.detector.graph_detector import GRAPH_FILE
from patchscan.detector.onnx_detector import OnnxDetector


class EngineError(UserError):
    """The engine cannot run the model where it was asked to."""


def choose_engine(run: Path, device: str = "cpu", engine: Engine | None = None) -> Engine:
    """Return the engine for a run folder: the one asked for; otherwise `onnx` on a CPU where onnxruntime is installed
    and the folder has a graph, else `torch`. Raises EngineError where an engine of CPUs is asked to use a GPU, or
    OpenVINO is not installed."""
    if engine in ("onnx", "openvino") and device != "cpu":
        raise EngineError(f"--engine {engine} runs on the CPU only: leave out --device {device}, or use --engine torch")
    if engine == "openvino" and not find_spec("openvino"):
        raise EngineError("--engine openvino needs OpenVINO: pip install 'patchscan[openvino]'")
    if engine:
        return engine
    return "onnx" if device == "cpu" and find_spec("onnxruntime") and (run / GRAPH_FILE).exists() else "torch"


def load_detector(
    run: Path, device: str = "cpu", engine: Engine | None = None, threads: int | None = None, bf16: bool = False
) -> BaseDetector:
    """Load a run folder with the engine of `choose_engine`. torch is imported for the engine of that name only.
    `threads`: images scored at once by the other engines (default: one for each CPU). `bf16`: let OpenVINO compute in
    bfloat16 where the card allows it and the CPU has it.

    Raises EngineError, CardError, WeightsError and DeviceError.
    """
    engine = choose_engine(run, device, engine)
    if engine == "onnx":
        return OnnxDetector.load(run, threads=threads)
    if engine == "openvino":
        from patchscan.detector.openvino_detector import OpenVinoBf16Detector, OpenVinoDetector, has_bf16

        half = bf16 and Card.read(run).allows_bf16 and has_bf16()
        return (OpenVinoBf16Detector if half else OpenVinoDetector).load(run, threads=threads)
    Card.read(run)  # a wrong folder is told as such also where torch is not installed
    from patchscan.detector.detector import Detector

    return Detector.load(run, device)


def load_any(run: Path, device: str = "cpu") -> BaseDetector:
    """Load a run folder in PyTorch, or that of an imported detector in ONNX Runtime, which alone runs it. Raises as
    `load_detector` does."""
    return load_detector(run, device, "onnx" if Card.read(run).architecture == IMPORTED else "torch")
