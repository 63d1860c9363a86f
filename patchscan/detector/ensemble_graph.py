"""Join the ONNX graphs of run folders into one, for an ensemble in which a member is an imported detector; and take it
apart again."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper, version_converter

from patchscan.detector.card import Decision
from patchscan.detector.graph_check import GraphError, opset_of
from patchscan.detector.presets import EnsemblePreset, MemberPreset

OURS = "patchscan:ensemble:"  # after a member's prefix, begins the names of what a joined graph has besides the members


def join_graphs(
    names: Sequence[str], graphs: Sequence[bytes], decisions: Sequence[Decision], preset: EnsemblePreset
) -> bytes:
    """Return an ONNX model from an ensemble's crops, uint8 (count, size, size, 3) named `crops`, to a logit, a float64
    scalar: the mean of the members' logits, each calibrated by its decision's temperature and bias.

    `graphs`: the members' models, from their own crops to their own logit; `names`: for messages. Raises GraphError
    where one cannot be converted to the newest operators among them.
    """
    models = [onnx.load_model_from_string(graph) for graph in graphs]
    opset = max(map(opset_of, models))
    # ONNX Runtime has no Mean of float64.
    nodes, constants, total, first = [], [_constant("members", len(models), np.float64)], "", 0
    for number, (name, model, decision, member) in enumerate(
        zip(names, models, decisions, preset.members, strict=True)
    ):
        prefix = f"member{number}:"
        part = compose.add_prefix(_converted(name, model, opset), prefix).graph
        constants += [*_member_constants(prefix + OURS, first, member, decision), *part.initializer]
        nodes += _member_nodes(prefix, part)
        calibrated = f"{prefix}{OURS}calibrated"
        if total:
            nodes.append(helper.make_node("Add", [total, calibrated], [f"{prefix}{OURS}total"]))
        total = nodes[-1].output[0]
        first += member.count
    nodes.append(helper.make_node("Div", [total, "members"], ["logit"]))
    crops_info = helper.make_tensor_value_info("crops", TensorProto.UINT8, [first, preset.size, preset.size, 3])
    logit_info = helper.make_tensor_value_info("logit", TensorProto.DOUBLE, [])
    graph = helper.make_graph(nodes, "ensemble", [crops_info], [logit_info], constants)
    opsets = {one.domain: one.version for model in models for one in model.opset_import} | {"": opset}
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items() if domain != "ai.onnx"]
    joined = helper.make_model(graph, opset_imports=imports, ir_version=max(model.ir_version for model in models))
    data: bytes = joined.SerializeToString(deterministic=True)
    return data


def _member_constants(ours: str, first: int, member: MemberPreset, decision: Decision) -> list[TensorProto]:
    """Where its crops lie in the ensemble's, from number `first` on, and what calibrates it."""
    bounds = {"from": [first, 0, 0], "to": [first + member.count, member.size, member.size], "axes": [0, 1, 2]}
    calibration = {"temperature": decision.temperature, "bias": decision.bias}
    return [
        *(_constant(f"{ours}{key}", values, np.int64) for key, values in bounds.items()),
        *(_constant(f"{ours}{key}", value, np.float64) for key, value in calibration.items()),
    ]


def _member_nodes(prefix: str, part: onnx.GraphProto) -> list[onnx.NodeProto]:
    """From the ensemble's crops to the member's calibrated logit."""
    ours = prefix + OURS
    return [
        helper.make_node("Slice", ["crops", f"{ours}from", f"{ours}to", f"{ours}axes"], [f"{prefix}crops"]),
        *part.node,
        helper.make_node("Div", [f"{prefix}logit", f"{ours}temperature"], [f"{ours}scaled"]),
        helper.make_node("Add", [f"{ours}scaled", f"{ours}bias"], [f"{ours}calibrated"]),
    ]


def split_graph(joined: bytes, preset: EnsemblePreset) -> list[tuple[bytes, Decision]]:
    """Return the members of what `join_graphs` made with this preset: the ONNX model of each, from its own crops to its
    own logit, and the decision that calibrates it."""
    model = onnx.load_model_from_string(joined)
    return [_member(model, f"member{number}:", member) for number, member in enumerate(preset.members)]


def _member(model: onnx.ModelProto, prefix: str, preset: MemberPreset) -> tuple[bytes, Decision]:
    ours = prefix + OURS
    constants = {one.name: one for one in model.graph.initializer if one.name.startswith(prefix)}
    nodes = [
        helper.make_node("Identity", ["crops"], [f"{prefix}crops"]),
        *(
            node
            for node in model.graph.node
            if any(
                one.startswith(prefix) and one != f"{prefix}crops" and not one.startswith(ours) for one in node.output
            )
        ),
        helper.make_node("Identity", [f"{prefix}logit"], ["logit"]),
    ]
    crops_info = helper.make_tensor_value_info("crops", TensorProto.UINT8, [None, preset.size, preset.size, 3])
    logit_info = helper.make_tensor_value_info("logit", TensorProto.DOUBLE, [])
    graph = helper.make_graph(nodes, "member", [crops_info], [logit_info], list(constants.values()))
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    temperature, bias = (float(numpy_helper.to_array(constants[f"{ours}{name}"])) for name in ("temperature", "bias"))
    data: bytes = alone.SerializeToString(deterministic=True)
    return data, Decision(temperature=temperature, bias=bias)


def _converted(name: str, model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    if model.functions:
        raise GraphError(f"{name}'s graph has functions of its own: inline them (onnx.inliner) and import it again")
    if opset_of(model) == opset:
        return model
    try:
        return version_converter.convert_version(model, opset)
    except Exception as error:  # the converter raises its own
        raise GraphError(
            f"{name}'s graph of opset {opset_of(model)} cannot be converted to {opset}, which another member has: "
            f"export it again with opset {opset} ({error})"
        ) from error


def _constant(name: str, values: object, kind: type) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, kind), name)
