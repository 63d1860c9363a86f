"""Score encoded images with OpenVINO, on the CPU and without torch, in float32 or in bfloat16."""

import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patchscan.detector.answer import EngineUsed
from patchscan.detector.card import CardError
from patchscan.detector.graph_detector import GraphDetector

if TYPE_CHECKING:
    from openvino import InferRequest, Model, Node, Output

# A pass computes in the thread that asks for it. The precision is always stated: OpenVINO's own default is bfloat16
# where the CPU has it.
ONE_THREAD = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
CONVOLUTIONS = ("Convolution", "GroupConvolution")
# The modules of patchscan.detector.srm by their names in a network, which the graph's nodes repeat.
NOISE_FILTERS = ("/noise/", "/srm/")
CROPS, LOGIT = "crops", "logit"


@dataclass(frozen=True)
class Part:
    """A part of a graph: `takes` and `gives` name the arrays that it is run on and returns, in order."""

    model: "Model"
    precision: str
    takes: tuple[str, ...] = (CROPS,)
    gives: tuple[str, ...] = (LOGIT,)


class OpenVinoDetector(GraphDetector):
    """A trained model in OpenVINO, in float32. Each thread that scores at the same time holds its own weights."""

    engine: EngineUsed = "openvino"

    def _open(self, graph: bytes) -> None:
        self._core, self._compiling = _openvino().Core(), threading.Lock()
        try:
            model = self._core.read_model(graph)
            self._shape = model.input(0).partial_shape
            self._parts = self._cut(model)
            self._idle = [self._compile()]
        except RuntimeError as error:
            why = str(error).strip().splitlines()[-1]
            raise CardError(f"OpenVINO cannot run this model, choose --engine onnx: {why}") from error

    def _cut(self, model: "Model") -> list[Part]:
        """The parts to run one after the other."""
        return [Part(model, "f32")]

    def _compile(self) -> list["InferRequest"]:
        with self._compiling:  # it reads graphs that all threads share
            compiled = [
                self._core.compile_model(part.model, "CPU", {**ONE_THREAD, "INFERENCE_PRECISION_HINT": part.precision})
                for part in self._parts
            ]
        return [one.create_infer_request() for one in compiled]

    def _input_shape(self) -> list[int | None]:
        return [side.get_length() if side.is_static else None for side in self._shape]

    def _run(self, crops: np.ndarray) -> float:
        try:
            requests = self._idle.pop()
        except IndexError:  # all are in use by other threads
            requests = self._compile()
        values = {CROPS: crops}
        for part, request in zip(self._parts, requests, strict=True):
            given = request.infer([values[name] for name in part.takes], share_inputs=True).values()
            values |= zip(part.gives, given, strict=True)
        logit = float(values[LOGIT])
        self._idle.append(requests)
        return logit


class OpenVinoBf16Detector(OpenVinoDetector):
    """A trained model in OpenVINO, its convolutions in bfloat16, for a CPU that computes in it (`has_bf16`).

    What comes before and after them stays in float32: normalising, enlarging and the noise filters, which subtract
    nearly equal numbers, as does the variance of EfficientNet-Lite0's features. A graph without convolutions is wholly
    in float32, and `engine` says so.
    """

    engine: EngineUsed = "openvino-bf16"

    def _cut(self, model: "Model") -> list[Part]:
        parts = cut_at_convolutions(model)
        if all(part.precision == "f32" for part in parts):
            self.engine = OpenVinoDetector.engine
        return parts


def has_bf16() -> bool:
    """Whether this CPU computes in bfloat16: AMX or avx512_bf16. Needs openvino."""
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _openvino() -> Any:
    """Import openvino without openvino_telemetry, with which it reports every import to Google Analytics."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # so that importing it fails
    import openvino

    return openvino


def cut_at_convolutions(model: "Model") -> list[Part]:
    """Cut a graph before its first convolution, noise filters not counted, and after its last. Takes `model` apart.

    Returns up to three parts, the middle one for bfloat16. A node is of the middle part if there is a convolution at or
    above it and one at or below it. A transformer's layers have none, so they stay in float32.
    """
    openvino = _openvino()
    nodes, stages, parts = model.get_ordered_ops(), _stages(model), []
    for stage, precision in enumerate(("f32", "bf16", "f32")):
        mine = [node for node in nodes if stages.get(node.get_name()) == stage]
        taken: dict[str, Node] = {CROPS: model.get_parameters()[0]} if stage == 0 else {}
        for user in (one for node in mine for one in node.inputs()):
            source = user.get_source_output()
            if stages.get(source.get_node().get_name(), stage) < stage:
                wanted = openvino.opset15.parameter(source.get_partial_shape(), source.get_element_type())
                user.replace_source_output(taken.setdefault(_key(source), wanted).output(0))
        given = {_key(output): output for node in mine for output in node.outputs() if _goes_on(output, stages)}
        if stages[model.get_results()[0].get_name()] == stage:
            given = {LOGIT: model.outputs[0].get_node().input_value(0)}
        if mine:
            part = openvino.Model(list(given.values()), list(taken.values()), f"{model.get_friendly_name()}-{stage}")
            parts.append(Part(part, precision, tuple(taken), tuple(given)))
    return parts


def _stages(model: "Model") -> dict[str, int]:
    """The stage of each node that depends on the crops, by its name: 0 before the convolutions, 1 among them, 2 after
    them."""
    below: set[str] = {node.get_name() for node in model.get_parameters()}
    convolved: set[str] = set()
    nodes = list(model.get_ordered_ops())
    for node in nodes:
        sources = {value.get_node().get_name() for value in node.input_values()}
        if sources & below:
            below.add(node.get_name())
            filters = any(part in node.get_friendly_name() for part in NOISE_FILTERS)
            if sources & convolved or (node.get_type_name() in CONVOLUTIONS and not filters):
                convolved.add(node.get_name())
    to_convolve: set[str] = set()
    for node in reversed(nodes):
        users = {user.get_node().get_name() for output in node.outputs() for user in output.get_target_inputs()}
        is_one = node.get_type_name() in CONVOLUTIONS and node.get_name() in convolved
        if users & to_convolve or is_one:
            to_convolve.add(node.get_name())
    return {name: 0 if name not in convolved else 1 if name in to_convolve else 2 for name in below}


def _goes_on(output: "Output", stages: dict[str, int]) -> bool:
    """Whether a later stage uses this value."""
    stage = stages[output.get_node().get_name()]
    return any(stages.get(user.get_node().get_name(), stage) > stage for user in output.get_target_inputs())


def _key(output: "Output") -> str:
    return f"{output.get_node().get_name()}:{output.get_index()}"
