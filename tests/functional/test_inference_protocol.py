"""The gate speaks the Open Inference Protocol: what is asked and answered, and every refusal, as the protocol says."""

import asyncio
import base64
import contextlib
import io
import json
import math
import struct
import tarfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchscan.detector.answer import JSON_LENGTH
from patchscan.serving import gate as gate_module
from patchscan.serving.gate import Gate
from patchscan.serving.inference_protocol import InferRequest, infer_reply, parse_infer, parse_predict
from patchscan.serving.requests import RequestError
from tests.gate_kit import GOOD, Upstream, with_gate

ANSWER = {"p_ai": 0.75, "verdict": "ai", "logit": 1.5, "version": "1.0"}
CRASH = {"code": 500, "type": "InternalServerException", "message": "Prediction failed"}


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def images(*data: bytes, **more: Any) -> bytes:
    """A request with images in its JSON."""
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": list(map(text, data))}
    return json.dumps({"inputs": [tensor], **more}).encode()


def crops(data: list[Any]) -> bytes:
    """A request with a crop of one pixel in its JSON."""
    tensor = {"name": "crops", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": data}
    return json.dumps({"inputs": [tensor]}).encode()


def raw(tensor: dict[str, Any], data: bytes) -> tuple[bytes, str]:
    """A request with a tensor as raw bytes after its JSON, and the JSON's length."""
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(data)}}]}).encode()
    return head + data, str(len(head))


def elements(*data: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(one)) + one for one in data)


def test_images_come_as_base64_or_as_raw_bytes() -> None:
    asked = parse_infer(images(b"one", b"two", id="7"), None)
    assert (asked.images, asked.id) == ([b"one", b"two"], "7")
    assert asked.outputs == {"p_ai": False, "verdict": False, "answer": False}
    for shape in ([2], [2, 1], [1, 2]):
        tensor = {"name": "image", "datatype": "BYTES", "shape": shape}
        assert parse_infer(*raw(tensor, elements(b"one", b""))).images == [b"one", b""]
    nested = {"name": "image", "datatype": "BYTES", "shape": [2, 1], "data": [[text(b"one")], [text(b"two")]]}
    assert parse_infer(json.dumps({"inputs": [nested]}).encode(), None).images == [b"one", b"two"]


def test_crops_come_as_numbers_or_as_raw_bytes() -> None:
    crops = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    tensor = {"name": "crops", "datatype": "UINT8", "shape": list(crops.shape)}
    in_json = json.dumps({"inputs": [tensor | {"data": crops.tolist()}]}).encode()
    for asked in (parse_infer(*raw(tensor, crops.tobytes())), parse_infer(in_json, None)):
        assert asked.crops is not None
        assert np.array_equal(np.load(io.BytesIO(asked.crops)), crops)
        assert asked.outputs == {"logit": False}


TENSOR = {"name": "image", "datatype": "BYTES", "shape": [1]}


@pytest.mark.parametrize(
    ("body", "length", "why"),
    [
        (b"", None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b"[]", None, "no JSON object"),
        (b"{}", None, "inputs must be a list of one tensor"),
        (b'{"inputs": [1]}', None, "inputs must be a list of one tensor"),
        (b"{}", "3", "must be the length of the JSON"),
        (b"{}", "-1", "must be the length of the JSON"),
        (b"{}", "9" * 5_000, "must be the length of the JSON"),
        (crops([1.5] * 3), None, "whole numbers from 0 to 255"),
        (crops(["1"] * 3), None, "whole numbers from 0 to 255"),
        (crops([True] * 3), None, "whole numbers from 0 to 255"),
        (crops([-1, 0, 0]), None, "whole numbers from 0 to 255"),
        (crops([[0], [0, 0]]), None, "whole numbers from 0 to 255"),
        (crops([]), None, "whole numbers from 0 to 255"),
        (crops(["x" * 20_000, *[1] * 100_000]), None, "whole numbers from 0 to 255"),  # NumPy would take 8 GB
        (images(b"x", parameters={"binary_data_output": "false"}), None, "binary_data_output must be true or false"),
        (json.dumps({"inputs": [TENSOR | {"name": "x", "data": [""]}]}).encode(), None, "the input must be image"),
        (json.dumps({"inputs": [TENSOR | {"shape": [-1], "data": [""]}]}).encode(), None, "shape must be"),
        (json.dumps({"inputs": [TENSOR | {"shape": [True], "data": [""]}]}).encode(), None, "shape must be"),
        (json.dumps({"inputs": [TENSOR | {"shape": [2], "data": [""]}]}).encode(), None, "as many base64 strings"),
        (json.dumps({"inputs": [TENSOR | {"shape": [257], "data": [""] * 257}]}).encode(), None, "1 to 256 images"),
        (json.dumps({"inputs": [TENSOR | {"data": [1]}]}).encode(), None, "as many base64 strings"),
        (json.dumps({"inputs": [TENSOR]}).encode(), None, "as many base64 strings"),
        (json.dumps({"inputs": [TENSOR | {"data": ["?"]}]}).encode(), None, "not valid base64"),
        (images(b"x", outputs=[{"name": "y"}]), None, "there is no output y"),
        (images(b"x", outputs=[1]), None, "outputs must be"),
        (images(b"x", outputs=[{"name": "p_ai", "parameters": {"classification": 2}}]), None, "classification is not"),
        (images(b"x", id=1), None, "id must be a string"),
        (images(b"x") + b"more", str(len(images(b"x"))), "has no binary_data_size"),
        (*raw(TENSOR, b"\xff\xff\xff\xff"), "is shorter"),
        (*raw(TENSOR, b"\0\0"), "is shorter"),
        (*raw(TENSOR, elements(b"x", b"y")), "is longer"),
        (*raw(TENSOR | {"data": ["eA=="]}, elements(b"x")), "without data"),
        (*raw({"name": "crops", "datatype": "UINT8", "shape": [1, 9, 9, 3]}, bytes(9)), "as many bytes as its shape"),
        (b'{"inputs": [' + b"[]," * 600_000 + b"[]]}", None, "too many values"),
        (b'{"inputs": [' + b"{}," * 30_000 + b"{}]}", None, "too many values"),
        (b'{"inputs": [' + b'"a",' * 30_000 + b"1]}", None, "too many values"),
        (('{"id": "' + "a" * 2**20 + '\u00e9"}').encode(), None, "must be ASCII"),
        (
            json.dumps({"inputs": [{"name": "crops", "datatype": "UINT8", "shape": [1], "data": [256]}]}).encode(),
            None,
            "whole numbers from 0 to 255",
        ),
    ],
)
def test_a_request_that_cannot_be_read_is_said_to_be(body: bytes, length: str | None, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        parse_infer(body, length)


def test_the_largest_requests_are_read() -> None:
    one = {"image_bytes": {"b64": text(b"one")}}
    assert len(parse_predict(json.dumps({"instances": [one] * 256}).encode())) == 256
    data = json.dumps([[[200] * 3] * 500] * 500)
    tensor = f'{{"name": "crops", "datatype": "UINT8", "shape": [1, 500, 500, 3], "data": [{data}]}}'
    asked = parse_infer(f'{{"inputs": [{tensor}]}}'.encode(), None)
    assert asked.crops is not None
    assert len(asked.crops) > 500 * 500 * 3


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 300) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["image", "crops"]) | VALUES,
        "datatype": st.sampled_from(["BYTES", "UINT8"]) | VALUES,
        "shape": st.lists(st.integers(-1, 4), max_size=5) | VALUES,
        "data": VALUES,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 20) | VALUES}) | VALUES,
    },
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(inputs=st.lists(TENSORS, max_size=2) | VALUES, outputs=VALUES, rest=st.binary(max_size=20))
def test_json_of_any_kind_is_read_or_refused(inputs: Any, outputs: Any, rest: bytes) -> None:
    head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    with contextlib.suppress(RequestError):
        parse_infer(head + rest, str(len(head)))
    with contextlib.suppress(RequestError):
        parse_predict(json.dumps({"instances": inputs}).encode())


def test_outputs_are_answered_as_asked() -> None:
    asked = InferRequest(images=[b"", b""], outputs={"p_ai": True, "verdict": True, "logit": False}, id="7")
    body, headers = infer_reply(asked, "m", "1.0", [ANSWER, ANSWER | {"p_ai": 0.25, "verdict": "real"}])
    length = int(headers[JSON_LENGTH])
    head = json.loads(body[:length])
    assert (head["id"], head["model_name"], head["model_version"]) == ("7", "m", "1.0")
    sizes = [output.get("parameters", {}).get("binary_data_size") for output in head["outputs"]]
    assert sizes == [16, 14, None]
    assert np.frombuffer(body[length : length + 16]).tolist() == [0.75, 0.25]
    assert body[length + 16 :] == elements(b"ai", b"real")
    assert head["outputs"][2] == {"name": "logit", "datatype": "FP64", "shape": [2], "data": [1.5, 1.5]}


def test_version_1_takes_what_its_clients_send() -> None:
    one = text(b"one")
    body = json.dumps({"instances": [one, {"b64": one}, {"image_bytes": {"b64": one}}]}).encode()
    assert parse_predict(body) == [b"one"] * 3
    bad_ones: list[dict[str, Any]] = [{}, {"instances": []}, {"instances": [1]}, {"instances": [{"x": one}]}]
    for bad in [*bad_ones, {"instances": [one] * 257}]:
        with pytest.raises(RequestError):
            parse_predict(json.dumps(bad).encode())


def test_json_is_read_for_one_request_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other thread runs while Python reads it: of several at once, others would get none of their time."""
    reading: list[int] = []

    def slowly(body: bytes) -> list[bytes]:
        reading.append(1)
        at_once = len(reading)
        time.sleep(0.05)
        reading.pop()
        return [str(at_once).encode()]

    monkeypatch.setattr(gate_module, "parse_predict", slowly)

    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.reply = (200, {"p_ai": 0.5})
        await asyncio.gather(*(ask(f"{url}/v1/models/m:predict", data=b"{}") for _ in range(4)))
        assert upstream.bodies == [b"1"] * 4

    with_gate(tmp_path, test)


async def ask(url: str, method: str = "POST", **options: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as http, http.request(method, url, **{"headers": GOOD} | options) as reply:
        assert reply.content_type == "application/json", await reply.text()
        return reply.status, await reply.json()


def test_one_image_goes_as_it_is_and_many_as_a_tar(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.reply = 200, ANSWER
        status, reply = await ask(f"{url}/v2/models/m/versions/1.0/infer", data=images(b"one"))
        assert (status, reply["model_version"]) == (200, "1.0")
        assert [one["data"] for one in reply["outputs"]] == [[0.75], ["ai"], [json.dumps(ANSWER)]]
        upstream.reply = 200, {"answers": [ANSWER | {"name": "0"}, ANSWER | {"name": "1"}]}
        assert (await ask(f"{url}/v2/models/m/infer", data=images(b"one", b"two")))[0] == 200
        assert [path for path, _, _ in upstream.seen] == ["/predictions/m/1.0", "/predictions/m"]
        assert upstream.bodies[0] == b"one"
        with tarfile.open(fileobj=io.BytesIO(upstream.bodies[1])) as tar:
            assert [tar.extractfile(one).read() for one in tar] == [b"one", b"two"]  # type: ignore[union-attr]
        body = json.dumps({"instances": [text(b"one"), text(b"two")]})
        assert await ask(f"{url}/v1/models/m:predict", data=body) == (200, {"predictions": [ANSWER, ANSWER]})

    with_gate(tmp_path, test)


@pytest.mark.parametrize("logit", [None, math.nan, math.inf])
def test_crops_whose_logit_is_no_number_are_refused(logit: float | None, tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.reply = 200, {"logits": [0.5, logit], "version": "1.0"}
        status, reply = await ask(f"{url}/v2/models/m/infer", data=crops([[[[1, 2, 3]]]]))
        assert (status, reply["code"]) == (500, "not_finite")

    with_gate(tmp_path, test)


TWO = {"answers": [ANSWER | {"name": "0"}, {"name": "1", "error": {"code": "truncated", "message": "cut"}}]}


TORCHSERVES = [
    ((404, {"code": 404, "type": "ModelNotFoundException"}), (404, {"code": "not_found"})),
    ((400, {"code": 400, "type": "InvalidKeyException"}), (503, {"code": "unavailable"})),
    ((503, CRASH), (503, {"error": "the server is busy; try again", "code": "busy"})),
    ((500, CRASH), (500, {"error": "the model failed; try again", "code": "unavailable"})),
    ((507, {"code": 507, "type": "InternalServerException"}), (507, {"code": "unavailable"})),
]


@pytest.mark.parametrize(
    ("upstream_says", "count", "expected"),
    [
        ((422, {"error": {"code": "truncated", "message": "cut"}}), 1, (422, {"error": "cut", "code": "truncated"})),
        ((200, TWO), 2, (422, {"error": "image 1: cut", "code": "truncated"})),
        ((200, {"answers": []}), 1, (422, {"error": "the bytes are not an image of any known format"})),
        *((says, 1, expected) for says, expected in TORCHSERVES),
        ((413, ""), 2, (413, {"error": "the images are too large together; send fewer at once", "code": "too_large"})),
    ],
)
def test_what_the_model_cannot_answer_is_the_protocols_error(
    tmp_path: Path, upstream_says: tuple[int, Any], count: int, expected: tuple[int, dict[str, str]]
) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.reply = upstream_says
        status, reply = await ask(f"{url}/v2/models/m/infer", data=images(*[b"x"] * count))
        assert status == expected[0]
        assert reply.keys() == {"error", "code"}
        assert reply | expected[1] == reply

    with_gate(tmp_path, test)


@pytest.mark.parametrize(
    ("upstream_says", "expected"),
    [
        *TORCHSERVES,
        ((422, {"error": {"code": "truncated", "message": "cut"}}), (422, {"error": "cut", "code": "truncated"})),
        ((500, "Worker died."), (500, {"code": "unavailable"})),
    ],
)
def test_torchserves_own_errors_are_the_gates(
    tmp_path: Path, upstream_says: tuple[int, Any], expected: tuple[int, dict[str, str]]
) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.reply = upstream_says
        status, reply = await ask(f"{url}/predictions/m", data=b"x")
        assert (status, reply.keys()) == (expected[0], {"error"})
        problem = {"error": reply["error"]["message"], "code": reply["error"]["code"]}
        assert problem | expected[1] == problem

    with_gate(tmp_path, test)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/models/x", 404, "not_found"),
        ("GET", "/v2/models/m/versions/3.0", 404, "not_found"),
        ("GET", "/v2/models/m/versions/2.0/ready", 503, None),
        ("GET", "/v2/models/m/infer", 405, "method_not_allowed"),
        ("POST", "/v2", 405, "method_not_allowed"),
        ("GET", "/v2/nothing", 404, "not_found"),
        ("POST", "/v2/models/../infer", 404, "not_found"),
        ("POST", "/v2/models/%2e%2e/infer", 404, "not_found"),
        ("POST", "/v2/models/m/versions/..%2f..%2fmodels/infer", 404, "not_found"),
        ("POST", "/v2/models/m/infer", 400, "bad_request"),
        ("POST", "/v1/models/m:predict", 400, "bad_request"),
        ("POST", "/v1/models/m:explain", 404, "not_found"),
    ],
)
def test_every_refusal_is_json(tmp_path: Path, method: str, path: str, status: int, code: str | None) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        found, reply = await ask(url + path, method)
        assert (found, reply.get("code")) == (status, code)
        assert code is None or isinstance(reply["error"], str)
        assert not upstream.seen

    with_gate(tmp_path, test)


def test_a_wrong_path_elsewhere_is_the_gates_own_error(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        status, reply = await ask(f"{url}/elsewhere", "GET")
        assert (status, reply["error"]["code"]) == (404, "not_found")
        status, reply = await ask(f"{url}/readyz")
        assert (status, reply["error"]) == (405, {"code": "method_not_allowed", "message": "this path takes GET, HEAD"})

    with_gate(tmp_path, test)


def test_a_wrong_path_of_the_metrics_port_too(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        port = gate._runners[1].addresses[0][1]
        for method, path, expected in (("GET", "/elsewhere", 404), ("POST", "/metrics", 405)):
            status, reply = await ask(f"http://127.0.0.1:{port}{path}", method)
            assert (status, reply["error"].keys()) == (expected, {"code", "message"})

    with_gate(tmp_path, test)


def test_health_needs_no_token_and_models_do(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        for path in ("/v2", "/v2/health/live", "/v2/health/ready"):
            assert (await ask(url + path, "GET", headers={}))[0] == 200
        upstream.running, upstream.waiting = False, ["m"]
        assert await ask(f"{url}/v2/health/live", "GET") == (503, {"status": "Dead", "live": False})
        for method, path in (("GET", ""), ("GET", "/ready"), ("POST", "/infer")):
            status, reply = await ask(f"{url}/v2/models/m{path}", method, headers={})
            assert (status, reply["code"]) == (401, "unauthorized")
        status, about = await ask(f"{url}/v2/models/m", "GET")
        assert (status, about["versions"]) == (200, ["1.0", "2.0"])
        assert await ask(f"{url}/v1/models/m", "GET") == (200, {"name": "m", "ready": True})
        status, reply = await ask(f"{url}/v2/models/m/infer", headers={"Expect": "100-continue"}, data=b"x" * 9)
        assert (status, reply["code"]) == (401, "unauthorized")

    with_gate(tmp_path, test)
