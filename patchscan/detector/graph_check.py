"""Check an ONNX file that a stranger made, when it is imported and when an archive that holds it is loaded.

An ONNX file is a program. It may not reach outside itself (other files, operators of other libraries) nor loop or draw
at random, and its size is bounded. ONNX Runtime then checks types and shapes. Needs onnx.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.numpy_helper import to_array

from patchscan.common.errors import UserError
from patchscan.detector.graph_detector import GRAPH_FILE
from patchscan.detector.onnx_detector import OnnxDetector

MAX_BYTES = 2**31 - 1  # more does not fit into one file of protocol buffers
MAX_NODES = 100_000
MIN_OPSET = 11
ONNX_DOMAINS = {"", "ai.onnx"}
REFUSED = {"Loop", "Scan", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"}
REFUSED |= {"Bernoulli", "SequenceMap"}
# ONNX Runtime's own operators that are taken: those of fused and quantised models of pictures. Others search for
# sentences, draw, or load further files.
_MICROSOFT = """
Attention BiasAdd BiasGelu BiasSoftmax BiasSplitGelu CDist ConvTransposeWithDynamicPads CropAndResize
DequantizeLinear DynamicQuantizeLSTM DynamicQuantizeMatMul EmbedLayerNormalization ExpandDims FastGelu FusedConv
FusedGemm FusedMatMul FusedMatMulActivation GatedRelativePositionBias GatherBlockQuantized GatherND Gelu
GemmFastGelu GridSample GroupNorm GroupQueryAttention Inverse LongformerAttention MatMulBnb4 MatMulFpQ4
MatMulInteger16 MatMulIntegerToFloat MatMulNBits MaxpoolWithMask MultiHeadAttention NhwcConv NhwcFusedConv
NhwcMaxPool PackedAttention PackedMultiHeadAttention Pad QAttention QEmbedLayerNormalization QGemm QLinearAdd
QLinearAveragePool QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul
QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere QuantizeLinear QuickGelu Range ReduceSumInteger
RelativePositionBias RemovePadding RestorePadding RotaryEmbedding SkipGroupNorm SkipLayerNormalization
SkipSimplifiedLayerNormalization SparseToDenseMatMul SwiGLU TransposeMatMul Trilu UnfoldTensor
"""
MICROSOFT = set(_MICROSOFT.split())


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
    functions = {_name(one): list(_all_nodes(_nodes_of(one))) for one in model.functions}
    nodes = [*_all_nodes(model.graph.node), *(node for inside in functions.values() for node in inside)]
    if len(nodes) > MAX_NODES or _unfolded(path, model.graph, functions) > MAX_NODES:
        raise GraphError(f"{path} has more than {MAX_NODES:,} nodes, its functions put where they are called")
    for tensor in _tensors(model.graph, nodes):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise GraphError(
                f"{path} keeps weights in another file: make one of both (onnx.save(onnx.load(THEIRS), ONE_FILE))"
            )
    never = _never_true(model.graph, nodes)
    for node in nodes:
        _check_operator(path, node, _name(node) in functions, never)


def _check_operator(path: Path, node: onnx.NodeProto, is_function: bool, never: set[str]) -> None:
    """Raise GraphError where the node is of an operator that is not taken. `is_function`: the model brings one of this
    name, whose nodes are checked too; which of the two counts is not relied on. `never`: values that are false."""
    if node.domain == "com.microsoft" and node.op_type not in MICROSOFT:
        raise GraphError(f"{path} needs ONNX Runtime's operator {node.op_type}, which is not one of those for pictures")
    if node.domain not in ONNX_DOMAINS | {"com.microsoft"} and not is_function:
        raise GraphError(f"{path} needs the operator {node.domain}.{node.op_type} of another library")
    if node.op_type in REFUSED:
        raise GraphError(f"{path} has a node {node.op_type}: graphs that loop or draw at random are not taken")
    trains = any(one.name == "training_mode" and one.i for one in node.attribute)
    # From opset 12 on, Dropout's mode is its third input.
    if trains or (node.op_type == "Dropout" and {*node.input[2:]} - {""} - never):
        raise GraphError(f"{path} has a {node.op_type} that still trains: export the model after .eval()")


def _never_true(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """The names of values that are the boolean false wherever they are made."""
    constants = [(one.name, one) for one in graph.initializer]
    constants += [(node.output[0], one.t) for node in nodes if node.op_type == "Constant" for one in node.attribute]
    false = [name for name, one in constants if one.data_type == TensorProto.BOOL and not to_array(one).any()]
    made = Counter([name for node in nodes for name in node.output] + [one.name for one in graph.initializer])
    return {name for name, times in Counter(false).items() if times == made[name]}


Name = tuple[str, str, str]


def _name(one: onnx.NodeProto | onnx.FunctionProto) -> Name:
    """What a function is called by."""
    domain = "" if one.domain == "ai.onnx" else one.domain
    return domain, one.op_type if isinstance(one, onnx.NodeProto) else one.name, one.overload


def _nodes_of(function: onnx.FunctionProto) -> list[onnx.NodeProto]:
    """The function's nodes, and one that stands for the attributes that it has by default."""
    return [*function.node, onnx.NodeProto(attribute=function.attribute_proto)]


def _unfolded(path: Path, graph: onnx.GraphProto, functions: dict[Name, list[onnx.NodeProto]]) -> int:
    """The number of nodes with the functions in place of what calls them, as ONNX Runtime has them: functions that call
    others twice make millions of a few. Counts to a little over MAX_NODES. Raises GraphError."""
    calls = {one: [_name(node) for node in nodes] for one, nodes in functions.items()}
    try:
        order = list(
            TopologicalSorter({one: calls.keys() & set(called) for one, called in calls.items()}).static_order()
        )
    except CycleError as error:
        raise GraphError(f"{path} has a function that calls itself") from error
    sizes: dict[Name, int] = {}
    for one in order:
        sizes[one] = min(MAX_NODES + 1, sum(sizes.get(called, 1) for called in calls[one]))
    return sum(sizes.get(_name(node), 1) for node in _all_nodes(graph.node))


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
