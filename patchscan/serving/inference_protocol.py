"""The Open Inference Protocol (version 2, REST) and KServe's version 1: what their clients send, and get as an answer.

https://github.com/kserve/open-inference-protocol says what is. A model takes images (`image`, BYTES) or crops that the
client has cut (`crops`, UINT8), and answers with tensors. Of the extensions, binary tensor data is spoken.
"""

import io
import json
import math
import re
import struct
import tarfile
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from patchscan.detector.answer import JSON_LENGTH
from patchscan.serving.requests import MAX_MEMBERS, RequestError, from_base64, read_json

IMAGE, CROPS = "image", "crops"
INPUTS = [
    {"name": IMAGE, "datatype": "BYTES", "shape": [-1]},
    {"name": CROPS, "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
]
DATATYPES = {"p_ai": "FP64", "verdict": "BYTES", "answer": "BYTES", "logit": "FP64"}
OUTPUTS = [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in DATATYPES.items()]
# Numbers and lists of crops in JSON, those of an image of 500 x 500 pixels. Reading so many stops all other threads for
# half a second; larger tensors come as raw bytes.
MAX_NUMBERS = 1_000_000
# Of a tensor: its product of more numbers, or of longer ones, can take hours, in which no other thread runs.
MAX_DIMENSIONS, MAX_DIMENSION = 8, 2**32
NUMBER = re.compile(r"\d{1,15}", re.ASCII)
# Of a client's own words in a refusal, so many characters.
MAX_QUOTED = 200


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """A request for inference: encoded images, or crops as the bytes of an .npy array.

    `outputs`: the names of the tensors to answer with, and whether each is to be raw bytes after the JSON.
    """

    images: list[bytes] = field(default_factory=list)
    crops: bytes | None = None
    outputs: dict[str, bool]
    id: str | None = None


def parse_infer(body: bytes, json_length: str | None) -> InferRequest:
    """Parse the body of `/v2/models/NAME/infer`; `json_length` is the header JSON_LENGTH. Raises RequestError."""
    if json_length is not None and not (NUMBER.fullmatch(json_length) and int(json_length) <= len(body)):
        raise RequestError(f"{JSON_LENGTH} must be the length of the JSON, {len(body):,} at most")
    length = len(body) if json_length is None else int(json_length)
    asked, rest = _object(body[:length], MAX_NUMBERS), body[length:]
    inputs = asked.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError(f"inputs must be a list of one tensor, {IMAGE} or {CROPS}")
    (tensor,) = inputs
    shape, raw = _shape(tensor), _raw(tensor, rest)
    kind = (tensor.get("name"), tensor.get("datatype"))
    if kind not in ((IMAGE, "BYTES"), (CROPS, "UINT8")):
        given = str(kind)[:MAX_QUOTED]
        raise RequestError(f"the input must be {IMAGE} of datatype BYTES or {CROPS} of datatype UINT8, not {given}")
    request_id = asked.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError("id must be a string")
    if tensor["name"] == IMAGE:
        images = _elements(raw, shape) if raw is not None else list(map(from_base64, _strings(tensor, shape)))
        return InferRequest(images=images, outputs=_outputs(asked, ("p_ai", "verdict", "answer")), id=request_id)
    return InferRequest(crops=_npy(tensor, raw, shape), outputs=_outputs(asked, ("logit",)), id=request_id)


def infer_reply(
    request: InferRequest, model: str, version: str, answers: list[dict[str, Any]]
) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of the answer to a request. `answers`: one for each image, or `{"logit": ...}`
    for each image of the crops."""
    tensors, raw = [], b""
    for name, binary in request.outputs.items():
        values = [json.dumps(answer) if name == "answer" else answer[name] for answer in answers]
        tensor: dict[str, Any] = {"name": name, "datatype": DATATYPES[name], "shape": [len(values)]}
        if binary:
            data = _packed(values) if DATATYPES[name] == "BYTES" else struct.pack(f"<{len(values)}d", *values)
            tensor["parameters"] = {"binary_data_size": len(data)}
            raw += data
        else:
            tensor["data"] = values
        tensors.append(tensor)
    reply: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": tensors}
    text = json.dumps(reply | ({"id": request.id} if request.id is not None else {})).encode()
    if not any(request.outputs.values()):
        return text, {"Content-Type": "application/json"}
    return text + raw, {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(text))}


def tar_of(images: list[bytes]) -> bytes:
    """Return an uncompressed tar of images, which a model answers one by one."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, data in enumerate(images):
            info = tarfile.TarInfo(str(number))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def parse_predict(body: bytes) -> list[bytes]:
    """Parse the body of version 1's `/v1/models/NAME:predict`, `{"instances": [...]}`: each is an image as base64, as
    `{"b64": base64}`, or as `{"image_bytes": {"b64": base64}}`. Returns the images. Raises RequestError."""
    instances = _object(body).get("instances")
    if not isinstance(instances, list) or not 1 <= len(instances) <= MAX_MEMBERS:
        raise RequestError(f"instances must be a list of 1 to {MAX_MEMBERS} images")
    return [from_base64(_text_of(instance)) for instance in instances]


def _text_of(instance: Any) -> str:
    for key in ("image_bytes", "b64"):
        instance = instance.get(key, instance) if isinstance(instance, dict) else instance
    if not isinstance(instance, str):
        raise RequestError('an instance is base64, {"b64": base64} or {"image_bytes": {"b64": base64}}')
    return instance


def _object(data: bytes, numbers: int = 0) -> dict[str, Any]:
    content = read_json(data, numbers)
    if not isinstance(content, dict):
        raise RequestError("the body is no JSON object")
    return content


def _shape(tensor: dict[str, Any]) -> list[int]:
    shape = tensor.get("shape")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise RequestError(f"shape must be a list of at most {MAX_DIMENSIONS} numbers")
    if not all(type(side) is int and 0 < side < MAX_DIMENSION for side in shape):
        raise RequestError("shape must be a list of positive whole numbers")
    return shape


def _raw(tensor: dict[str, Any], rest: bytes) -> bytes | None:
    """The tensor's bytes after the JSON; None where its `data` is in the JSON."""
    parameters = tensor.get("parameters", {})
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None and rest:
        raise RequestError("bytes follow the JSON, but the tensor has no binary_data_size")
    if size is not None and (size != len(rest) or "data" in tensor):
        raise RequestError(f"binary_data_size must be the number of bytes after the JSON, {len(rest):,}, without data")
    return None if size is None else rest


def _count(shape: list[int]) -> int:
    count = math.prod(shape)
    if not shape or count > MAX_MEMBERS:
        raise RequestError(f"{IMAGE} must hold 1 to {MAX_MEMBERS} images")
    return count


def _elements(data: bytes, shape: list[int]) -> list[bytes]:
    """The elements of a raw BYTES tensor, each after its length in 4 bytes, little-endian."""
    elements, at = [], 0
    for _ in range(_count(shape)):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data) or at + 4 > len(data):
            raise RequestError("the BYTES tensor is shorter than its shape and lengths say")
        elements.append(data[at + 4 : end])
        at = end
    if at != len(data):
        raise RequestError("the BYTES tensor is longer than its shape and lengths say")
    return elements


def _packed(values: list[str]) -> bytes:
    encoded = [value.encode() for value in values]
    return b"".join(struct.pack("<I", len(value)) + value for value in encoded)


def _strings(tensor: dict[str, Any], shape: list[int]) -> list[str]:
    """The strings of a BYTES tensor in JSON, nested as its shape or flat."""
    data: Any = tensor.get("data")
    for _ in shape[1:]:
        if isinstance(data, list) and all(isinstance(part, list) for part in data):
            data = [one for part in data for one in part]
    if not isinstance(data, list) or len(data) != _count(shape) or not all(isinstance(one, str) for one in data):
        raise RequestError(f"data of {IMAGE} must be as many base64 strings as its shape says")
    return data


def _npy(tensor: dict[str, Any], raw: bytes | None, shape: list[int]) -> bytes:
    """Crops as the .npy array that a model takes; it checks their number and size."""
    pixels = _bytes_of(tensor.get("data")) if raw is None else raw
    if len(shape) != 4 or math.prod(shape) != len(pixels):
        raise RequestError(f"{CROPS} must be (images x count, size, size, 3), as many bytes as its shape says")
    file = io.BytesIO()
    np.save(file, np.frombuffer(pixels, np.uint8).reshape(shape))
    return file.getvalue()


def _bytes_of(data: Any) -> bytes:
    """The bytes that nested lists hold as numbers. Not by np.array: one long text among them would take its length for
    each of the numbers."""
    refused = RequestError(f"data of {CROPS} must be whole numbers from 0 to 255, in lists of one length")
    found = data if isinstance(data, list) else []
    while found and isinstance(found[0], list):
        if not all(isinstance(one, list) and len(one) == len(found[0]) for one in found):
            raise refused
        found = list(chain.from_iterable(found))
    if not found or not all(type(one) is int for one in found):
        raise refused
    try:
        return bytes(found)
    except ValueError:
        raise refused from None


def _outputs(asked: dict[str, Any], available: tuple[str, ...]) -> dict[str, bool]:
    """The outputs to answer with: those asked for, or all; with whether each is to be raw."""
    everything = _flag(asked, "binary_data_output")
    outputs = asked.get("outputs") or [{"name": name} for name in available]
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise RequestError("outputs must be a list of tensors")
    if any(
        isinstance(output.get("parameters"), dict) and "classification" in output["parameters"] for output in outputs
    ):
        raise RequestError("outputs are answered as they are: classification is not spoken")
    wanted = {str(output.get("name")): _flag(output, "binary_data", everything) for output in outputs}
    if unknown := sorted(wanted.keys() - set(available)):
        named = ", ".join(unknown)[:MAX_QUOTED]
        raise RequestError(f"there is no output {named} of this input: it has {', '.join(available)}")
    return wanted


def _flag(tensor: dict[str, Any], name: str, otherwise: bool = False) -> bool:
    parameters = tensor.get("parameters")
    value = parameters.get(name, otherwise) if isinstance(parameters, dict) else otherwise
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false")
    return value
