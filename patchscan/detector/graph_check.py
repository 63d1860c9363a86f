"""Check an ONNX file that a stranger made, when it is imported and when an archive that holds it is loaded.

An ONNX file is a program. It may not reach outside itself (other files, operators of other libraries) nor loop or draw
at random, and its size is bounded. ONNX Runtime then checks types and shapes. Needs onnx.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from patchscan.common.errors import UserError
from patchscan.detector.graph_detector import GRAPH_FILE
from patchscan.detector.onnx_detector import OnnxDetector

MAX_BYTES = 2**31 - 1  # more does not fit into one file of protocol buffers
MAX_NODES = 100_000
MIN_OPSET = 11
# ONNX's own operators, and those that ONNX Runtime brings along for quantised and fused models.
DOMAINS = {"", "ai.onnx", "com.microsoft"}
REFUSED = {"Loop", "Scan", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"}
REFUSED |= {"Bernoulli", "SequenceMap"}


def load_checked(folder: Path) -> OnnxDetector:
    """Check the graph of a run folder, and load it in ONNX Runtime. Raises GraphError, and what `OnnxDetector.load`
    raises."""
    return OnnxDetector.load(folder, data=check_graph(folder))


def check_graph(folder: Path) -> bytes:
    """Check the graph of a run folder as `patchscan import` does a stranger's. Returns its bytes. Raises GraphError."""
    data = read_graph(folder / GRAPH_FILE)
    parse_graph(folder / GRAPH_FILE, data)
    return data


class GraphError(UserError):
    """The ONNX file cannot be imported; the message says why."""


def read_graph(path: Path) -> bytes:
    """Read a file of at most 2 GB. Raises GraphError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise GraphError(f"{path} has more than 2 GB")
        return path.read_bytes()
    except OSError as error:
        raise GraphError(f"{path} cannot be read: {error.strerror}") from error


def parse_graph(path: Path, data: bytes) -> onnx.ModelProto:
    """Return the ONNX model that `data` holds, checked; `path` is named in errors. Raises GraphError."""
    try:
        model: onnx.ModelProto = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf raises its own
        raise GraphError(f"{path} is not an ONNX file: {error}") from error
    if not model.graph.node or not model.graph.output:
        raise GraphError(f"{path} is not an ONNX file: it holds no graph")
    _check(path, model)
    return model


def _check(path: Path, model: onnx.ModelProto) -> None:
    opset = opset_of(model)
    if opset < MIN_OPSET:
        raise GraphError(f"{path} is of opset {opset}: convert it to {MIN_OPSET} or later (onnx.version_converter)")
    nodes = list(_all_nodes([*model.graph.node, *(node for one in model.functions for node in one.node)]))
    if len(nodes) > MAX_NODES:
        raise GraphError(f"{path} has {len(nodes):,} nodes; at most {MAX_NODES:,} are taken")
    for node in nodes:
        if node.domain not in DOMAINS and node.domain not in {one.domain for one in model.functions}:
            raise GraphError(f"{path} needs the operator {node.domain}.{node.op_type} of another library")
        if node.op_type in REFUSED:
            raise GraphError(f"{path} has a node {node.op_type}: graphs that loop or draw at random are not taken")
        if any(one.name == "training_mode" and one.i for one in node.attribute):
            raise GraphError(f"{path} has a {node.op_type} that still trains: export the model after .eval()")
    for tensor in _tensors(model.graph, nodes):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise GraphError(f"{path} keeps weights in another file: save it as one (onnx.save, save_as_external_data)")


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators that the model is written for; 0 if it names none."""
    return max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These nodes and those of the graphs in their attributes."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _all_nodes(graph.node)


def _tensors(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> Iterator[TensorProto]:
    """The tensors of the graph, of its nodes' attributes, and of the graphs in these; `nodes` are those of all."""
    attributes = [attribute for node in nodes for attribute in node.attribute]
    graphs = [graph, *(inner for one in attributes for inner in (one.g, *one.graphs))]
    sparse = [tensor for one in attributes for tensor in (one.sparse_tensor, *one.sparse_tensors)]
    sparse += [tensor for one in graphs for tensor in one.sparse_initializer]
    yield from (tensor for one in attributes for tensor in (one.t, *one.tensors))
    yield from (tensor for one in graphs for tensor in one.initializer)
    yield from (tensor for one in sparse for tensor in (one.values, one.indices))
