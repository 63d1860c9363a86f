"""Somebody else's detector for the tests: a small random ONNX graph with its page of YAML."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from patchscan.training.import_onnx import import_onnx

SIDE = 16
CONFIG = """\
name: theirs
input:
  size: 16
  resize: 20
  filter: bicubic
  mean: [0.5, 0.4, 0.3]
  std: [0.2, 0.3, 0.4]
output: {output}
"""


def graph(classes: int, opset: int = 17, last: str | None = None, **changes: Any) -> onnx.ModelProto:
    """A small classifier: the picture's mean colours, and a matrix; `last` is a final operator."""
    weights = np.random.default_rng(classes).normal(0, 3, (3, classes)).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["scores" if last else "y"]),
    ]
    if last:
        nodes.append(helper.make_node(last, ["scores"], ["y"], domain=changes.get("domain", "")))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3, SIDE, SIDE])]
    inputs += [helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1])] if changes.get("second_input") else []
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, classes])]
    body = helper.make_graph(nodes, "theirs", inputs, outputs, [numpy_helper.from_array(weights, "w")])
    opsets = [helper.make_opsetid(*one) for one in (("", opset), ("elsewhere", 1), ("com.microsoft", 1))]
    return helper.make_model(body, opset_imports=opsets, ir_version=8)


def write(folder: Path, model: onnx.ModelProto, output: str = "{}") -> tuple[Path, Path]:
    """The graph and its description as files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "theirs.yaml").write_text(CONFIG.format(output=output))
    (folder / "theirs.onnx").write_bytes(model.SerializeToString())
    return folder / "theirs.onnx", folder / "theirs.yaml"


def imported_run(run: Path, classes: int = 2, name: str = "theirs") -> Path:
    """A run folder made by `patchscan import`; another number of classes is another model."""
    file, config = write(run.parent / f"{run.name}-files", graph(classes))
    config.write_text(config.read_text().replace("name: theirs", f"name: {name}"))
    import_onnx(file, run, config)
    return run
