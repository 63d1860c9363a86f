"""Read a program that `torch.export.save` wrote (.pt2) without `torch.export.load`, which unpickles what the file tells
it to and builds Python code from the file's names.

Such a file holds the graph as JSON and the weights as raw bytes, and nothing else of it is read. Every node must call
one of PyTorch's operators that can be converted to ONNX; it becomes a line of TorchScript, under names of our own.
"""

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.onnx._internal.torchscript_exporter import registration

from patchscan.detector.graph_check import MAX_NODES, GraphError

SCHEMA = 8  # the major version of the graph's JSON that is read here
OPSET = 17
# Types of numbers, by the schema's codes. TorchScript's own codes are one less.
DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
MEMORY_FORMATS = {1: 0, 2: 2, 3: 3, 4: 1}  # the schema's codes, and TorchScript's
# Operators with sizes, which TorchScript writes as Python does.
ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}
ARITHMETIC |= {"eq": "==", "ne": "!=", "le": "<=", "lt": "<", "ge": ">=", "gt": ">"}
# Checks that torch.export adds, and operators that the converter takes under no name of their own.
ASSERTIONS = {"_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range_for_size"}
ALSO_TAKEN = {"copy", "fill"}
for version in range(9, OPSET + 1):  # they say which operators can be converted; the exporter imports them late
    import_module(f"torch.onnx._internal.torchscript_exporter.symbolic_opset{version}")


class Program(nn.Module):
    """A program from one tensor to its `outputs`, which are named. `shape` and `dtype` are those of its input; None
    stands for a side that may be of any length."""

    def __init__(
        self, source: str, weights: list[torch.Tensor], shape: list[int | None], dtype: torch.dtype, outputs: list[str]
    ):
        super().__init__()
        for number, tensor in enumerate(weights):
            self.register_buffer(f"weight{number}", tensor)
        self.count, self.shape, self.dtype, self.outputs = len(weights), shape, dtype, outputs
        self.function = torch.jit.CompilationUnit(source).program

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *(getattr(self, f"weight{number}") for number in range(self.count)))


def read_program(path: Path, data: bytes, sides: tuple[int, ...]) -> Program:
    """Read a .pt2 file, whose content is `data`. Raises GraphError where it keeps weights as pickles, needs operators
    that are not taken, or takes other pictures than of these `sides`."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            program = _Reader(path, archive).program()
    except GraphError:
        raise
    except Exception as error:  # a damaged file fails anywhere: in the zip, the JSON, torch, TorchScript's compiler
        raise GraphError(f"{path} cannot be read as a program of torch.export: {error}") from error
    stated = program.shape[1:]
    if len(stated) != len(sides) or any(one not in (None, side) for one, side in zip(stated, sides, strict=True)):
        raise GraphError(f"{path}: its input is {program.shape} (None: any), but size and layout say {[0, *sides]}")
    return program


class _Reader:
    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        self.members = {name.partition("/")[2]: name for name in archive.namelist()}
        self.names: dict[str, str] = {}  # theirs, and ours
        self.ranks: dict[str, int] = {}  # of tensors, by their names

    def program(self) -> Program:
        models = [name for name in self.members if re.fullmatch(r"models/[^/]+\.json", name)]
        if len(models) != 1:
            raise GraphError(
                f"{self.path} holds {len(models)} programs of torch.export; one is taken, saved by torch 2.8 or later"
            )
        name = models[0].removeprefix("models/").removesuffix(".json")
        content = self._json(models[0])
        if content["schema_version"]["major"] != SCHEMA:
            raise GraphError(f"{self.path} is of schema {content['schema_version']}, not {SCHEMA}")
        graph, signature = content["graph_module"]["graph"], content["graph_module"]["signature"]
        if len(graph["nodes"]) > MAX_NODES:
            raise GraphError(f"{self.path} has {len(graph['nodes']):,} nodes; at most {MAX_NODES:,} are taken")
        self.ranks = {key: len(meta["sizes"]) for key, meta in graph["tensor_values"].items()}
        pictures, weights = self._inputs(signature["input_specs"], name)
        lines = [line for node in graph["nodes"] for line in self._lines(node)]
        outputs = [self._output(spec) for spec in signature["output_specs"]]
        parameters = ", ".join(["x", *(f"w{number}" for number in range(len(weights)))])
        result = ", ".join(self.names[one] for one in outputs)
        source = "\n    ".join([f"def program({parameters}):", *lines, f"return {result}"]) + "\n"
        meta = graph["tensor_values"][pictures]
        shape = [one.get("as_int") for one in meta["sizes"]]
        return Program(source, weights, shape, DTYPES[meta["dtype"]], outputs)

    def _json(self, member: str) -> Any:
        return json.loads(self.archive.read(self.members[member]))

    def _inputs(self, specs: list[dict[str, Any]], name: str) -> tuple[str, list[torch.Tensor]]:
        """The name of the picture's tensor, and the weights; names all of them."""
        stored = self._payload("weights", name) | self._payload("constants", name)
        pictures: list[str] = []
        weights: list[torch.Tensor] = []
        for spec in specs:
            ((kind, one),) = spec.items()
            if kind == "user_input":
                pictures.append(one["arg"]["as_tensor"]["name"])
                self.names[pictures[-1]] = "x"
                continue
            key = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
            if kind not in key:
                raise GraphError(f"{self.path} takes a {kind}: only tensors are taken")
            self.names[one["arg"]["name"]] = f"w{len(weights)}"
            weights.append(self._tensor(one[key[kind]], *stored[one[key[kind]]]))
        if len(pictures) != 1:
            raise GraphError(f"{self.path} has {len(pictures)} inputs ({', '.join(pictures)}); one is taken")
        return pictures[0], weights

    def _payload(self, kind: str, name: str) -> dict[str, tuple[str, dict[str, Any]]]:
        """What the archive says of each weight or constant: the folder and the entry."""
        config = self._json(f"data/{kind}/{name}_{kind}_config.json")["config"]
        return {key: (f"data/{kind}", entry) for key, entry in config.items()}

    def _tensor(self, name: str, folder: str, entry: dict[str, Any]) -> torch.Tensor:
        if entry["use_pickle"]:
            raise GraphError(f"{self.path} keeps {name} as a pickle, which can run code: export it to ONNX")
        meta = entry["tensor_meta"]
        data = bytearray(self.archive.read(self.members[f"{folder}/{entry['path_name']}"]))
        dtype = DTYPES[meta["dtype"]]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        sizes, strides = ([one["as_int"] for one in meta[key]] for key in ("sizes", "strides"))
        return torch.as_strided(flat, sizes, strides, meta["storage_offset"]["as_int"]).clone()

    def _lines(self, node: dict[str, Any]) -> Iterator[str]:
        """A node as lines of TorchScript."""
        target, inputs = node["target"], node["inputs"]
        arguments = [self._value(one["arg"]) for one in inputs]
        if (operator := re.fullmatch(r"_operator\.(\w+)", target)) and operator[1] in ARITHMETIC:
            left, right = arguments
            call = f"{left} {ARITHMETIC[operator[1]]} {right}"
        elif (operator := re.fullmatch(r"torch\.ops\.aten\.(\w+)\.\w+", target)) and operator[1] in ASSERTIONS:
            return
        elif operator and operator[1] == "lift_fresh_copy":
            call = f"{arguments[0]}.clone()"
        elif operator and operator[1] == "sym_size":
            call = f"{arguments[0]}.size({arguments[1]})"
        elif operator and operator[1] == "unflatten":
            call = self._unflatten(inputs[0]["arg"]["as_tensor"]["name"], *arguments[1:])
        elif operator and _can_be_converted(operator[1]):
            named = [
                f"{_identifier(one['name'])}={value}" if one["kind"] == 2 else value
                for one, value in zip(inputs, arguments, strict=True)
            ]
            call = f"torch.ops.aten.{operator[1]}({', '.join(named)})"
        else:
            raise GraphError(f"{self.path} needs the operator {target}, which cannot be converted to ONNX")
        yield from self._assignments(call, node["outputs"])

    def _unflatten(self, tensor: str, dimension: str, sizes: str) -> str:
        """That operator as a reshape: the converter would lose the number of dimensions."""
        rank, our = self.ranks[tensor], self.names[tensor]
        shape = [f"{our}.size({number})" for number in range(rank)]
        shape[int(dimension) % rank] = sizes.strip("[]")
        return f"torch.ops.aten.reshape({our}, [{', '.join(shape)}])"

    def _assignments(self, call: str, outputs: list[dict[str, Any]]) -> Iterator[str]:
        if len(outputs) == 1 and "as_tensors" in outputs[0]:
            lists = f"l{len(self.names)}"
            yield f"{lists} = {call}"
            for number, one in enumerate(outputs[0]["as_tensors"]):
                yield f"{self._new(one['name'])} = {lists}[{number}]"
            return
        yield f"{', '.join(self._new(_name_of(one)) for one in outputs)} = {call}"

    def _new(self, name: str) -> str:
        self.names[name] = f"v{len(self.names)}"
        return self.names[name]

    def _output(self, spec: dict[str, Any]) -> str:
        ((kind, one),) = spec.items()
        if kind != "user_output":
            raise GraphError(f"{self.path} changes its own weights ({kind}): export the model after .eval()")
        return _name_of(one["arg"])

    def _value(self, argument: dict[str, Any]) -> str:
        """An argument as TorchScript writes it."""
        ((kind, value),) = argument.items()
        if kind.endswith("s") and isinstance(value, list):
            return f"[{', '.join(self._value(_single(kind, one)) for one in value)}]"
        match kind:
            case "as_none":
                return "None"
            case "as_tensor":
                return self.names[value["name"]]
            case "as_name":
                return self.names[value]
            case "as_optional_tensor" | "as_sym_int" | "as_sym_bool" | "as_sym_float":
                return self._value(value)
            case "as_int" | "as_bool" if isinstance(value, (int, bool)):
                return repr(value)
            case "as_float":
                number = float(value)
                return repr(number) if math.isfinite(number) else f'float("{number}")'
            case "as_string" if re.fullmatch(r"\w*", value):
                return f'"{value}"'
            case "as_scalar_type" if value in DTYPES and DTYPES[value] != torch.bfloat16:
                return str(value - 1)
            case "as_memory_format":
                return str(MEMORY_FORMATS[value])
            case "as_layout" if value == 7:  # strided
                return "0"
            case "as_device":
                return 'torch.device("cpu")'
        raise GraphError(f"{self.path} passes an argument {kind}, which cannot be converted to ONNX")


def _single(kind: str, value: Any) -> dict[str, Any]:
    """An element of a list of this kind as an argument."""
    if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools", "as_optional_tensors"):
        found: dict[str, Any] = value
        return found
    return {kind.removesuffix("s"): value}


def _name_of(argument: dict[str, Any]) -> str:
    ((kind, value),) = argument.items()
    name = value["name"] if kind == "as_tensor" else value["as_name"]
    assert isinstance(name, str)
    return name


def _identifier(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"an argument is named {name!r}")
    return name


def _can_be_converted(operator: str) -> bool:
    base = operator.removesuffix("_")  # of an operator that works in place
    return base in ALSO_TAKEN or registration.registry.is_registered_op(f"aten::{base}", OPSET)
