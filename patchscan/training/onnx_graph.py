"""Put what patchscan needs around the graph of somebody else's ONNX file: crops in, a logit out."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from patchscan.detector.graph_check import GraphError, opset_of
from patchscan.training.import_config import Input, LinearHead, Output, UnfitGraphError

REDUCE_AXES_AS_INPUT = 18  # from this opset on
OUR_NAMES, OUR_PREFIX = {"crops", "logit", "features", "answers"}, "patchscan:"
PIXEL_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8}
ANSWER_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
# What ends a graph whose answers are probabilities, and what may come after it.
PROBABILITIES = {"Softmax", "Sigmoid", "HardSigmoid", "QLinearSoftmax", "QLinearSigmoid"}
SHAPING = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Gather", "Slice", "Split"}
SHAPING |= {"Concat", "Clip", "QuantizeLinear", "DequantizeLinear"}


class _Builder:
    """Collects nodes and constants to be put at a place of the graph, whose number is in their names."""

    def __init__(self, opset: int, place: int):
        self.opset, self.place = opset, place
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, values: Any, kind: type) -> str:
        name = f"{OUR_PREFIX}{self.place}:constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, kind), name))
        return name

    def node(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"{OUR_PREFIX}{self.place}:value{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def reduce(self, operator: str, value: str, *, keep: bool, output: str | None = None, axes: list[int]) -> str:
        if self.opset >= REDUCE_AXES_AS_INPUT:
            return self.node(operator, value, self.constant(axes, np.int64), output=output, keepdims=int(keep))
        return self.node(operator, value, output=output, keepdims=int(keep), axes=axes)


def wrap(path: Path, model: onnx.ModelProto, given: Input, wanted: Output, head: LinearHead | None) -> bytes:
    """Return the model as one from crops, uint8 (count, size, size, 3) named `crops`, to a logit, a float64 scalar, AI
    positive: the mean over the crops. Raises GraphError where the graph has no such input or output."""
    source, result = _only_input(path, model.graph, given), _output(path, model.graph, wanted.name)
    if not head and wanted.kind != "probabilities" and _ends_in_probabilities(model.graph, result.name):
        why = f"{path}: its output {result.name} is of probabilities already: say kind: probabilities"
        raise UnfitGraphError(why, "output", "kind")
    shape = answer_shape(path, model, wanted)
    after = _builder_after(model)
    _add_logit(after, path, result.name, shape, wanted, head)
    return _assemble(model, given, source, after, helper.make_tensor_value_info("logit", TensorProto.DOUBLE, []))


def wrap_answers(path: Path, model: onnx.ModelProto, given: Input, name: str | None) -> bytes:
    """Return the model as one from crops, as `wrap` does, to `answers`: its output `name`, as it is. Raises
    GraphError."""
    source, result = _only_input(path, model.graph, given), _output(path, model.graph, name)
    after = _builder_after(model)
    after.node("Cast", result.name, output="answers", to=TensorProto.DOUBLE)
    return _assemble(model, given, source, after, helper.make_tensor_value_info("answers", TensorProto.DOUBLE, None))


def wrap_features(path: Path, model: onnx.ModelProto, given: Input, name: str | None) -> bytes:
    """Return the model as one from crops, as `wrap` does, to `features`, float64 (n,): the mean over the crops of its
    output `name`, a vector. Raises GraphError."""
    source, result = _only_input(path, model.graph, given), _output(path, model.graph, name)
    if len(result.type.tensor_type.shape.dim) != 2:
        raise GraphError(f"{path}: its output {result.name} is not a vector for each picture: a head needs one")
    after = _builder_after(model)
    value = after.node("Cast", result.name, to=TensorProto.DOUBLE)
    after.reduce("ReduceMean", value, keep=False, output="features", axes=[0])
    output = helper.make_tensor_value_info("features", TensorProto.DOUBLE, [None])
    return _assemble(model, given, source, after, output)


def _builder_after(model: onnx.ModelProto) -> _Builder:
    """A builder of what follows the graph, from which our names are gone."""
    _free_our_names(model.graph)
    return _Builder(opset_of(model), len(model.graph.node))


def _free_our_names(graph: onnx.GraphProto) -> None:
    """Rename the tensors of a graph, and of the graphs in it, that are named as what is put around them."""
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = _not_ours(value.name)
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = map(_not_ours, names)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _free_our_names(inner)


def _not_ours(name: str) -> str:
    return f"theirs:{name}" if name in OUR_NAMES or name.startswith(OUR_PREFIX) else name


def _assemble(
    model: onnx.ModelProto, given: Input, source: onnx.ValueInfoProto, after: _Builder, output: onnx.ValueInfoProto
) -> bytes:
    """Put the preparation before the graph, whose input is `source`, and `after` behind it."""
    graph = model.graph
    before = _Builder(after.opset, 0)
    _add_preparation(before, source, given)
    # ONNX Runtime optimises a graph otherwise where it knows this number, and a quantised model's scores then differ.
    count = source.type.tensor_type.shape.dim[0].dim_value or "count"
    nodes = [*before.nodes, *graph.node, *after.nodes]
    constants = [*before.constants, *after.constants]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    graph.input.append(helper.make_tensor_value_info("crops", TensorProto.UINT8, [count, given.size, given.size, 3]))
    graph.output.append(output)
    wrapped: bytes = model.SerializeToString(deterministic=True)
    return wrapped


def _only_input(path: Path, graph: onnx.GraphProto, given: Input) -> onnx.ValueInfoProto:
    initial = {one.name for one in graph.initializer}
    inputs: list[onnx.ValueInfoProto] = [one for one in graph.input if one.name not in initial]
    if len(inputs) != 1:
        raise GraphError(f"{path} has {len(inputs)} inputs ({', '.join(one.name for one in inputs)}); one is taken")
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type not in PIXEL_TYPES:
        kind = TensorProto.DataType.Name(tensor.elem_type)
        why = "FLOAT, FLOAT16, DOUBLE and UINT8 are taken: export it with one of these"
        raise GraphError(f"{path}: its input {inputs[0].name} is of type {kind}; {why}")
    untouched = (given.scale, given.mean, given.std) == (1, (0, 0, 0), (1, 1, 1))
    if tensor.elem_type == TensorProto.UINT8 and not untouched:
        why = "takes whole numbers, which are pixels as they are: say scale: 1, mean: [0, 0, 0], std: [1, 1, 1]"
        raise UnfitGraphError(f"{path} {why}", "input")
    shape = [one.dim_value for one in tensor.shape.dim]
    if len(shape) != 4 or any(dim not in (0, side) for dim, side in zip(shape[1:], given.sides, strict=True)):
        why = f"{path}: its input is {shape} (0: any), but size and layout say {[0, *given.sides]}"
        raise UnfitGraphError(why, "input", "size")
    if shape[0] > 1 or (shape[0] == 1 and (given.count > 1 or given.max_count)):
        raise GraphError(f"{path} takes {shape[0]} pictures at a time: export it with a dynamic first dimension")
    return inputs[0]


def _add_preparation(builder: _Builder, source: onnx.ValueInfoProto, given: Input) -> None:
    kind = source.type.tensor_type.elem_type
    value = builder.node("Cast", "crops", to=TensorProto.FLOAT)
    if given.channels == "bgr":
        value = builder.node("Gather", value, builder.constant([2, 1, 0], np.int64), axis=3)
    # Others divide by 255, or multiply in float64: both are nearer to a division in float32 than to a product in it,
    # and in a quantised graph the last bit decides.
    value = builder.node("Div", value, builder.constant(_nearest_whole(1 / given.scale), np.float32))
    value = builder.node("Sub", value, builder.constant(given.mean, np.float32))
    value = builder.node("Div", value, builder.constant(given.std, np.float32))
    if given.layout == "nchw":
        value = builder.node("Transpose", value, perm=[0, 3, 1, 2])
    builder.node("Cast", value, output=source.name, to=kind)


def _nearest_whole(number: float) -> float:
    return round(number) if abs(number - round(number)) < 1e-6 * number else number


def _output(path: Path, graph: onnx.GraphProto, name: str | None) -> onnx.ValueInfoProto:
    found: list[onnx.ValueInfoProto] = [one for one in graph.output if name in (None, one.name)]
    if len(found) != 1:
        names = ", ".join(one.name for one in graph.output)
        raise UnfitGraphError(f"{path} has the outputs {names}: name one of them (output: name)", "output", "name")
    if found[0].type.tensor_type.elem_type not in ANSWER_TYPES:
        raise GraphError(f"{path}: its output {found[0].name} is not of real numbers: are these labels, not scores?")
    return found[0]


def _ends_in_probabilities(graph: onnx.GraphProto, name: str) -> bool:
    """Whether the output of this name comes out of a softmax or a logistic function."""
    constants = {one.name for one in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    for node in reversed(graph.node):
        if name not in node.output:
            continue
        if node.op_type == "Sub" and node.input[0] in constants:  # 1 less the probability of the other class
            name = node.input[1]
        elif node.op_type in SHAPING and node.input:
            name = node.input[0]
        else:
            return node.op_type in PROBABILITIES
    return False


def answer_shape(path: Path, model: onnx.ModelProto, wanted: Output) -> list[int]:
    """Return the shape that the output is declared to have, 0 for any length. Raises GraphError where it is neither a
    number nor a row for each picture."""
    result = _output(path, model.graph, wanted.name)
    shape: list[int] = [one.dim_value for one in result.type.tensor_type.shape.dim]
    if len(shape) not in (1, 2):
        why = f"its output {result.name} is {shape} (0: any), not a number or a row for each picture"
        raise GraphError(f"{path}: {why}")
    if len(shape) == 2 and wanted.classes:
        if shape[1] not in (0, wanted.classes):
            why = f"{path} has {shape[1]} classes, but {wanted.classes} are described"
            raise UnfitGraphError(why, "output", "classes")
        shape[1] = wanted.classes
    return shape


def _add_logit(
    builder: _Builder, path: Path, value: str, shape: list[int], wanted: Output, head: LinearHead | None
) -> None:
    """Add what makes a logit of `value`, the graph's output, whose shape is `answer_shape`."""
    classes = shape[1] if len(shape) == 2 else 1
    named = wanted.model_fields_set
    if not head and classes == 1 and "ai" in named:
        why = f"{path} gives one number for a picture: say `positive: ai` or `positive: real`, not `ai`"
        raise UnfitGraphError(why, "output", "ai")
    if not head and classes > 1 and "positive" in named:
        why = f"{path} has {classes} classes: say `ai`, the number of the one that means AI, not `positive`"
        raise UnfitGraphError(why, "output", "positive")
    value = builder.node("Cast", value, to=TensorProto.DOUBLE)
    if head:
        value = _apply_head(builder, path, value, classes, head)
    elif classes == 1:
        value = builder.node("Reshape", value, builder.constant([-1], np.int64))
        value = _log_odds(builder, value) if wanted.kind == "probabilities" else value
        value = builder.node("Neg", value) if wanted.positive == "real" else value
    else:
        value = _class_logit(builder, path, value, classes, wanted)
    builder.reduce("ReduceMean", value, keep=False, output="logit", axes=[0])


def _apply_head(builder: _Builder, path: Path, value: str, length: int, head: LinearHead) -> str:
    if length not in (0, len(head.weights)):
        why = f"{path}: its output has {length} elements, and the head {len(head.weights)} weights"
        raise UnfitGraphError(why, "output", "head")
    if head.normalise:
        norm = builder.reduce("ReduceL2", value, keep=True, axes=[1])
        value = builder.node("Div", value, builder.node("Max", norm, builder.constant(1e-12, np.float64)))
    value = builder.node("MatMul", value, builder.constant(head.weights, np.float64))
    return builder.node("Add", value, builder.constant(head.bias, np.float64))


def _class_logit(builder: _Builder, path: Path, value: str, classes: int, wanted: Output) -> str:
    """The log odds of the class AI against all others, (count,)."""
    if classes == 0:
        why = (
            f"{path}: how many classes its output has is not stated: say it (classes), or export it with a fixed number"
        )
        raise UnfitGraphError(why, "output")
    if wanted.ai >= classes:
        why = f"{path} has {classes} classes, numbered from 0: there is no class {wanted.ai}"
        raise UnfitGraphError(why, "output", "ai")
    ai = builder.node("Gather", value, builder.constant(wanted.ai, np.int64), axis=1)
    if wanted.kind == "probabilities":
        return _log_odds(builder, ai)
    if wanted.kind == "sigmoid":
        return ai
    others = [number for number in range(classes) if number != wanted.ai]
    rest = builder.node("Gather", value, builder.constant(others, np.int64), axis=1)
    return builder.node("Sub", ai, builder.reduce("ReduceLogSumExp", rest, keep=False, axes=[1]))


def _log_odds(builder: _Builder, probability: str) -> str:
    least = 1e-9  # a model that is certain would have an infinite logit
    bounds = builder.constant(least, np.float64), builder.constant(1 - least, np.float64)
    # No Clip: ONNX Runtime's of opset 11 takes no float64.
    inside = builder.node("Min", builder.node("Max", probability, bounds[0]), bounds[1])
    opposite = builder.node("Sub", builder.constant(1, np.float64), inside)
    return builder.node("Log", builder.node("Div", inside, opposite))
