"""The gate in front of a small upstream: time limits, memory limits and an end that loses nothing, in milliseconds."""

import asyncio
import gzip
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest

from patchscan.common import cgroups
from patchscan.common.errors import UserError
from patchscan.common.processes import available_cpus
from patchscan.common.tokens import read_key, read_tokens
from patchscan.serving import gate as gate_module
from patchscan.serving import refusals as refusals_module
from patchscan.serving.archive import MANIFEST
from patchscan.serving.commands import serve
from patchscan.serving.gate import Gate, Listen, Tokens
from patchscan.serving.serve import default_models
from patchscan.serving.server import TorchServe, _escaped
from tests.gate_kit import GOOD, LOOPBACK, Upstream, with_gate

ROOT = Path(__file__).parents[2]


async def post(url: str, **options: Any) -> tuple[int, Any]:
    options = {"headers": GOOD, "data": b"image"} | options
    async with aiohttp.ClientSession() as http, http.post(f"{url}/predictions/m", **options) as reply:
        return reply.status, await reply.json()


def test_a_prediction_passes_with_torchserves_own_key(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        assert await post(url) == (200, {"bytes": 5})
        assert upstream.seen == [("/predictions/m", "application/octet-stream", "Bearer its-inference-key")]
        assert (await post(url, headers={"Authorization": "Bearer bad"}))[0] == 401
        assert len(upstream.seen) == 1

    with_gate(tmp_path, test)


@pytest.mark.parametrize(
    "path",
    [
        "/models",
        "/invocations",
        "/predictions/../models",
        "/predictions/../invocations",
        "/predictions/m/..",
        "/predictions/m/../../invocations",
        "/predictions/./invocations",
        "/predictions/%2e%2e/models",
        "/predictions/m%2f..",
        "/predictions/",
        "/v3",
    ],
)
def test_nothing_but_predictions_reaches_torchserve(tmp_path: Path, path: str) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        # As it stands there: an HTTP client would tidy the path.
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer good\r\nContent-Length: 0\r\n\r\n"
        writer.write(head.encode())
        status = (await reader.readline()).split()[1]
        writer.close()
        assert (status, upstream.seen) == (b"404", [])

    with_gate(tmp_path, test)


async def post_raw(url: str, head: bytes, body: bytes = b"") -> tuple[int, dict[str, Any]]:
    """The answer to a request with these header lines, byte by byte as they are."""
    sent = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head + b"\r\n\r\n" + body
    return await send_raw(url, sent)


async def send_raw(url: str, *parts: bytes) -> tuple[int, dict[str, Any]]:
    """The answer to a request, sent in these parts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.02)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    (length,) = re.findall(rb"Content-Length: (\d+)", head)
    answer = json.loads(await asyncio.wait_for(reader.readexactly(int(length)), 10))
    writer.close()
    return int(head.split()[1]), answer


GET, POST = b"GET /livez HTTP/1.1\r\nHost: x\r\n", b"POST /predictions/m HTTP/1.1\r\nHost: x\r\n"
INFER = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Authorization: Bearer good\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        ([b"\x16\x03\x01\x02\0\x01\0\r\n\r\n"], 400, "bad_request"),  # TLS
        ([b"hello\r\n\r\n"], 400, "bad_request"),
        ([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], 400, "bad_request"),
        ([b"GET /livez HTTP/1.1\r\n\r\n"], 400, "bad_request"),
        ([GET + b"no colon\r\n\r\n"], 400, "bad_request"),
        ([GET + b"Content-Length: x\r\n\r\n"], 400, "bad_request"),
        ([GET + b"".join(b"X%d: x\r\n" % number for number in range(200)) + b"\r\n"], 400, "bad_request"),
        ([GET + b"X: " + b"x" * 9000 + b"\r\n\r\n"], 431, "too_large"),
        ([b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"], 431, "too_large"),
        ([POST + CHUNKED + b"ZZ\r\n"], 400, "bad_request"),
        ([POST + CHUNKED, b"ZZ\r\n"], 408, "slow"),
        ([GET.replace(b"GET", b"DELETE") + b"\r\n"], 405, "method_not_allowed"),
        ([GET + b"Expect: x\r\n\r\n"], 417, "expectation"),
        ([GET.replace(b"livez", b"nowhere") + b"Expect: x\r\n\r\n"], 417, "expectation"),
        ([GET.replace(b"GET", b"PATCH") + b"Expect: x\r\n\r\n"], 417, "expectation"),
        ([POST + b"Expect: x\r\nContent-Length: 3\r\n\r\n"], 417, "expectation"),
        (
            [INFER + b"Expect: x\r\nContent-Length: 3\r\n\r\n"],
            417,
            "expectation",
        ),
    ],
)
def test_what_the_http_library_refuses_is_refused_in_json(
    sent: list[bytes], status: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "BODY_TIMEOUT_S", 0.2)

    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        found, answer = await send_raw(url, *sent)
        told = answer if b" /v2/" in sent[0] else answer["error"]
        assert (found, told["code"], upstream.seen) == (status, code, [])
        assert (await post(url))[0] == 200

    with_gate(tmp_path, test)


@pytest.mark.parametrize("path", ["/predictions/m", "/v2/models/m/infer"])
def test_a_bug_of_the_gate_is_told_in_json(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        monkeypatch.setattr(upstream, "token", lambda kind: 1 // 0)
        status, answer = await send_raw(url, f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        assert (status, (answer if path.startswith("/v2") else answer["error"])["code"]) == (500, "internal_error")

    with_gate(tmp_path, test)


@pytest.mark.parametrize(
    "head", [b"", b"Authorization: Bearer bad\r\n", b"Authorization: Bearer good\r\nExpect: x\r\n"]
)
def test_a_refusal_ends_its_connection(head: bytes, tmp_path: Path) -> None:
    """It says so, and a client that sends more on it must not be answered."""

    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(POST + head + b"Content-Length: 3\r\n\r\nabc" + GET + b"\r\n")
        answers = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert answers.count(b"HTTP/1.1 ") == answers.lower().count(b"connection: close\r\n") == 1

    with_gate(tmp_path, test)


@pytest.mark.parametrize(("body", "delay_s", "answers"), [(b"abc", 0.0, 1), (b"abc", 0.3, 1), (b"ab", 0.0, 0)])
def test_a_client_that_sends_no_more_is_answered(body: bytes, delay_s: float, answers: int, tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.delay_s = delay_s
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(POST + b"Authorization: Bearer good\r\nContent-Length: 3\r\n\r\n" + body)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        assert (answer.count(b"HTTP/1.1 200 OK"), len(upstream.seen)) == (answers, answers)

    with_gate(tmp_path, test)


@pytest.mark.parametrize("body", [b"Content-Length: 3\r\n\r\nab", b"Transfer-Encoding: chunked\r\n\r\n3\r\nab"])
def test_a_client_that_hangs_up_within_its_body_is_no_fault_of_the_gate(
    body: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(POST + b"Authorization: Bearer good\r\n" + body)
        while not gate._pending_bytes:  # noqa: ASYNC110  the gate has no event for it
            await asyncio.sleep(0.01)
        writer.close()
        while gate._pending_bytes:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        counted = {sample.labels["code"] for sample in next(iter(gate._requests.collect())).samples}
        assert (counted, caplog.records) == ({"400"}, [])

    with_gate(tmp_path, test)


@pytest.mark.parametrize("sent", [b"", GET, GET + b"\r\n"])
def test_a_connection_without_a_request_ends_with_its_client(sent: bytes, tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(sent)
        if sent.endswith(b"\r\n\r\n"):
            await reader.readuntil(b"}")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()

    with_gate(tmp_path, test)


def test_a_client_of_http_1_0_is_sent_no_100_continue(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        head = b"POST /predictions/m HTTP/1.0\r\nAuthorization: Bearer good\r\nExpect: 100-continue\r\n"
        assert await send_raw(url, head + b"Content-Length: 1\r\n\r\nx") == (200, {"bytes": 1})

    with_gate(tmp_path, test)


@pytest.mark.parametrize("token", [b"\xff", b"good\xe9", "g\u00f6\u00f6d".encode(), b"\xed\xa0\x80"])
def test_a_token_of_any_bytes_is_a_wrong_token(tmp_path: Path, token: bytes) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        status, answer = await post_raw(url, b"Content-Length: 0\r\nAuthorization: Bearer " + token)
        assert (status, answer["error"]["code"], upstream.seen) == (401, "unauthorized", [])

    with_gate(tmp_path, test)


@pytest.mark.parametrize("others", [[b"bad"], [b"good"]])
def test_two_tokens_are_none(tmp_path: Path, others: list[bytes]) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        lines = [b"Authorization: Bearer " + token for token in (b"good", *others)]
        status, answer = await post_raw(url, b"\r\n".join([b"Content-Length: 0", *lines]))
        assert (status, answer["error"]["code"], upstream.seen) == (401, "unauthorized", [])

    with_gate(tmp_path, test)


@pytest.mark.parametrize("text", [None, "", "{", "\0\xff"])
def test_while_the_token_file_cannot_be_read_no_token_is_wrong(tmp_path: Path, text: str | None) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        file = tmp_path / "tokens"
        assert (await post(url))[0] == 200
        file.unlink()
        if text is not None:
            file.write_text(text, "latin-1")
        for headers in (GOOD, {}, GOOD):
            status, answer = await post(url, headers=headers)
            assert (status, answer["error"]["code"]) == (503, "unavailable")
        file.write_text("new\n")
        assert (await post(url))[0] == 401
        assert (await post(url, headers={"Authorization": "Bearer new"}))[0] == 200
        assert len(upstream.seen) == 2

    with_gate(tmp_path, test)


def test_before_torchserve_has_its_keys_the_server_is_starting(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.starting = True
        for headers in (GOOD, {"Authorization": "Bearer bad"}, {}):
            status, answer = await post(url, headers=headers)
            assert (status, answer["error"]["code"]) == (503, "unavailable")
        upstream.starting = False
        assert (await post(url))[0] == 200
        assert len(upstream.seen) == 1

    with_gate(tmp_path, test)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip", "gzip, gzip", ""])
def test_a_packed_body_is_refused_unread(tmp_path: Path, encoding: str) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        packed = gzip.compress(bytes(10**6))
        head = f"Authorization: Bearer good\r\nContent-Length: {len(packed)}\r\nContent-Encoding: {encoding}"
        status, answer = await post_raw(url, head.encode(), packed)
        assert (status, answer["error"]["code"], upstream.seen) == (415, "packed", [])

    with_gate(tmp_path, test)


def test_a_body_whose_transfer_is_packed_is_refused(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        packed = gzip.compress(bytes(10**6))
        head = b"Authorization: Bearer good\r\nTransfer-Encoding: gzip, chunked"
        status, answer = await post_raw(url, head, b"%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed))
        assert (status, answer["error"]["code"], upstream.seen) == (415, "packed", [])

    with_gate(tmp_path, test)


def test_a_body_of_no_encoding_says_so_in_vain(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        assert await post(url, headers=GOOD | {"Content-Encoding": "identity"}) == (200, {"bytes": 5})

    with_gate(tmp_path, test)


@pytest.mark.parametrize("path", ["/readyz", "/v2/models/m/ready", "/v2/models/m", "/v1/models/m"])
def test_probes_at_once_share_one_round_of_questions(tmp_path: Path, path: str) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.answers.clear()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

            async def probe() -> int:
                async with http.get(url + path, headers=GOOD) as reply:
                    return reply.status

            async def under_way(count: int) -> None:
                while gate._in_flight._value.get() < count:  # noqa: ASYNC110  a gauge wakes nobody
                    await asyncio.sleep(0.01)

            hasty = asyncio.create_task(probe())
            await under_way(1)
            hasty.cancel()  # the round that it began goes on for the others
            others = [asyncio.create_task(probe()) for _ in range(60)]
            await under_way(61)  # aiohttp ends no handler when its client hangs up
            upstream.answers.set()
            assert set(await asyncio.gather(*others)) == {200}
            assert upstream.rounds == 1
            asked = "/v2/models/m/versions/2.0/ready", "/v2/models/m/ready", "/v1/models/other"
            replies = [await http.get(url + other, headers=GOOD) for other in asked]
            assert [reply.status for reply in replies] == [503, 200, 404], "each is asked about anew"

    with_gate(tmp_path, test)


def test_scrapes_at_once_share_one_of_torchserves(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.delay_s = 0.5
        metrics = f"http://127.0.0.1:{gate._runners[1].addresses[0][1]}/metrics"
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

            async def scrape() -> str:
                async with http.get(metrics) as reply:
                    return await reply.text()

            answers = await asyncio.gather(*(scrape() for _ in range(60)))
        assert all("patchscan_requests" in answer and '"bytes": 0' in answer for answer in answers)
        assert [path for path, _, _ in upstream.seen] == ["/metrics"]

    with_gate(tmp_path, test)


@pytest.mark.parametrize("fault", ["an error", "silence"])
def test_a_scrape_tells_the_gates_own_numbers_whatever_torchserve_does(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "SCRAPE_TIMEOUT_S", 0.3)

    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.reply = (500, {"code": 500})
        if fault == "silence":
            upstream.answers.clear()
        metrics = f"http://127.0.0.1:{gate._runners[1].addresses[0][1]}/metrics"
        async with aiohttp.ClientSession() as http, http.get(metrics) as reply:
            told = await reply.text()
        upstream.answers.set()
        assert told.startswith("# HELP patchscan_requests_total")
        assert f"patchscan_ready {0.0 if fault == 'silence' else 1.0}" in told

    with_gate(tmp_path, test)


@pytest.mark.parametrize("path", ["/v2/models/m", "/v2/models/m/ready", "/v1/models/m"])
def test_of_a_torchserve_that_does_not_answer_no_model_is_said_to_be_missing(path: str, tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.gone = True
        async with aiohttp.ClientSession() as http, http.get(url + path, headers=GOOD) as reply:
            assert (reply.status, (await reply.json())["code"]) == (503, "unavailable")

    with_gate(tmp_path, test)


def form(*fields: tuple[str, bytes]) -> dict[str, Any]:
    """The headers and body of a form; a field's first part is the rest of its Content-Disposition."""
    parts = [
        b'--xx\r\nContent-Disposition: form-data; name="a"%s\r\n\r\n%s\r\n' % (how.encode(), data)
        for how, data in fields
    ]
    return {"headers": GOOD | {"Content-Type": "multipart/form-data; boundary=xx"}, "data": b"".join(parts) + b"--xx--"}


FILE = '; filename="photo.png"\r\nContent-Type: image/png'
# What browsers send for an input for a file that was left empty.
NO_FILE = '; filename=""\r\nContent-Type: application/octet-stream'
IMAGE = b"image\r\n--x\r\n\r\n"


@pytest.mark.parametrize(
    "fields",
    [
        [(FILE, IMAGE)],
        [("", b"a title"), (FILE, IMAGE)],
        [(FILE, IMAGE), ("", b"a title"), ("", b"another")],
        [('; filename=""', IMAGE)],
        [(NO_FILE, b""), (FILE, IMAGE)],
        [(FILE, IMAGE), ("", b"a title"), (NO_FILE, b""), (NO_FILE, b"")],
        [(NO_FILE, b""), ("", IMAGE)],
        [("; filename*=UTF-8''f%C3%BCr.png", IMAGE), ("", b"a title")],
        *([(f"; filename*={charset}''x%ff", IMAGE), ("", b"a title")] for charset in ("undefined", "idna", "a\0b")),
        [(f"{FILE}\r\nContent-Transfer-Encoding: Binary\r\nContent-Encoding: Identity", IMAGE)],
        [("", IMAGE)],
    ],
)
def test_a_form_is_the_file_that_it_holds(tmp_path: Path, fields: list[tuple[str, bytes]]) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        assert (await post(url, **form(*fields)))[0] == 200
        assert upstream.bodies == [IMAGE]
        assert upstream.seen[0][1] == "application/octet-stream"

    with_gate(tmp_path, test)


def test_a_form_of_any_content_type_is_its_file(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        asked = form((FILE, IMAGE))
        kind = "Content-Type: multipart/form-data; boundary=xx; a=é".encode() + b"\xff"
        head = b"Authorization: Bearer good\r\nContent-Length: %d\r\n%s" % (len(asked["data"]), kind)
        assert (await post_raw(url, head, asked["data"]))[0] == 200
        assert upstream.bodies == [IMAGE]

    with_gate(tmp_path, test)


def test_what_clients_call_a_form_is_read(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        data = aiohttp.FormData()
        data.add_field("note", "ä")
        data.add_field("photo", IMAGE, filename="photo.png")
        assert (await post(url, data=data))[0] == 200
        assert upstream.bodies == [IMAGE]

    with_gate(tmp_path, test)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ([(FILE, b"one"), (FILE, b"two")], "2 files"),
        ([("", b"one"), ("", b"two")], "2 fields and no file"),
        ([(FILE, b"one"), (FILE, b"")], "2 files"),
        ([], "0 fields and no file"),
        ([(NO_FILE, b"")], "0 fields and no file"),
        ([(f"{FILE}\r\nContent-Encoding: gzip", gzip.compress(bytes(10**6)))], "is encoded"),
        ([(f"{FILE}\r\nContent-Transfer-Encoding: base64", b"aW1hZ2U=")], "is encoded"),
        ([(f"{FILE}\r\nContent-Encoding: \u00ff", b"image")], "is encoded"),
        ([("", b"")] * 101, "more than 100 fields"),
    ],
)
def test_a_form_that_does_not_say_which_image_is_refused(
    tmp_path: Path, fields: list[tuple[str, bytes]], why: str
) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        status, answer = await post(url, **form(*fields))
        assert (status, answer["error"]["code"], upstream.seen) == (400, "bad_request", [])
        assert why in answer["error"]["message"]

    with_gate(tmp_path, test)


@pytest.mark.parametrize(
    "cut", [b"", b"--xx", b"--xx\r\nno header", b"--xxy\r\n\r\nimage\r\n--xx--", b"no form at all"]
)
@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data; boundary=xx",
        "multipart/form-data",
        "Multipart/Form-Data; x",
        "multipart/form-data; boundary*=undefined''xx",
        "multipart/form-data; boundary*=unicode_escape''%5Cud800",
    ],
)
def test_a_damaged_form_is_refused(tmp_path: Path, cut: bytes, kind: str) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        status, answer = await post(url, headers=GOOD | {"Content-Type": kind}, data=cut)
        assert (status, answer["error"]["code"], upstream.seen) == (400, "bad_request", [])

    with_gate(tmp_path, test)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"data": "x"',
        b"\xff\xfe{\0}\0",
        b'{"data": "\xe9"}',
        b"[" * 100_000,
        b"[" + b"[]," * 10_000 + b"1]",
        b"image",
    ],
)
def test_damaged_json_is_refused_before_torchserve_loses_a_batch_over_it(tmp_path: Path, body: bytes) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
            status, answer = await post(url, headers=GOOD | {"Content-Type": kind}, data=body)
            assert (status, answer["error"]["code"], upstream.seen) == (400, "bad_request", [])

    with_gate(tmp_path, test)


@pytest.mark.parametrize(
    ("kind", "passed_on"),
    [
        ("application/json; charset=utf-8", "application/json"),
        ("text/plain", "application/octet-stream"),
        ("image/png", "application/octet-stream"),
        ("application/x-www-form-urlencoded", "application/octet-stream"),
    ],
)
def test_torchserve_gets_json_or_bytes(tmp_path: Path, kind: str, passed_on: str) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        assert (await post(url, headers=GOOD | {"Content-Type": kind}, data=b'{"card": true}'))[0] == 200
        assert (upstream.seen[0][1], upstream.bodies) == (passed_on, [b'{"card": true}'])

    with_gate(tmp_path, test)


def test_a_body_that_trickles_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "BODY_TIMEOUT_S", 0.2)

    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        async def trickle() -> Any:
            while True:
                yield b"x"
                await asyncio.sleep(0.05)

        status, answer = await post(url, data=trickle())
        assert (status, answer["error"]["code"]) == (408, "slow")
        assert not upstream.seen

    with_gate(tmp_path, test)


@pytest.mark.parametrize("address", [0, 1])  # of predictions, and of metrics
def test_a_header_that_never_ends_is_cut_off(address: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "IDLE_TIMEOUT_S", 0.5)

    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", gate._runners[address].addresses[0][1])
        writer.write(b"POST /predictions/m HTTP/1.1\r\nX: ")
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()

    with_gate(tmp_path, test)


def test_more_bytes_than_memory_allows_are_told_to_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "MAX_PENDING_BYTES", 2500)

    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.delay_s = 0.3
        replies = await asyncio.gather(*(post(url, data=bytes(1000)) for _ in range(4)))
        assert sorted(status for status, _ in replies) == [200, 200, 503, 503]
        assert (await post(url, data=bytes(1000)))[0] == 200  # what was held is free again

    with_gate(tmp_path, test)


def test_a_refused_body_is_never_sent_where_the_client_asks_first(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        assert await post(url, expect100=True) == (200, {"bytes": 5})
        status, _ = await post(url, expect100=True, headers={"Authorization": "Bearer bad"})
        assert status == 401

    with_gate(tmp_path, test)


def test_what_is_in_flight_is_answered_before_the_end(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.delay_s = 0.5
        asking = asyncio.create_task(post(url))
        while not gate._pending_bytes:  # noqa: ASYNC110  the gate has no event for it
            await asyncio.sleep(0.01)
        await gate.stop()
        assert await asking == (200, {"bytes": 5})
        with pytest.raises(aiohttp.ClientConnectorError):
            await post(url)

    with_gate(tmp_path, test)


def test_a_body_that_is_under_way_arrives_before_the_end(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        async def body() -> Any:
            yield b"half"
            while not gate.draining:  # noqa: ASYNC110  the gate has no event for it
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            yield b"half"

        asking = asyncio.create_task(post(url, data=body()))
        while not gate._pending_bytes:  # noqa: ASYNC110  the gate has no event for it
            await asyncio.sleep(0.01)
        await gate.stop()
        assert await asking == (200, {"bytes": 8})

    with_gate(tmp_path, test)


def test_health_tells_ready_from_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "READY_CACHE_S", 0.0)

    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        async def status(path: str) -> int:
            async with aiohttp.ClientSession() as http, http.get(url + path) as reply:
                return reply.status

        assert [await status(path) for path in ("/readyz", "/ping", "/livez")] == [200, 200, 200]
        upstream.waiting = ["m"]
        assert [await status(path) for path in ("/readyz", "/ping", "/livez")] == [503, 503, 200]
        upstream.waiting, upstream.running = [], False
        assert await status("/livez") == 503
        gate.draining = True
        assert await status("/readyz") == 503

    with_gate(tmp_path, test)


def test_a_torchserve_that_is_gone_is_503(tmp_path: Path) -> None:
    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            upstream.addresses.inference_url = f"http://127.0.0.1:{one.getsockname()[1]}"
            status, answer = await post(url)
        assert (status, answer["error"]["code"]) == (503, "unavailable")

    with_gate(tmp_path, test)


def test_a_request_that_torchserve_forgot_is_answered_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "ANSWER_TIMEOUT_S", 0.2)

    async def test(upstream: Upstream, gate: Gate, url: str) -> None:
        upstream.delay_s = 2.0
        status, answer = await post(url)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        assert gate._pending_bytes == 0

    with_gate(tmp_path, test)


def test_token_files(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    for text in ("old\nnew\n", "\n old\t\r\n\r\nnew"):
        path.write_text(text)
        assert read_tokens(path) == [b"old", b"new"]
    for text in ("# the old token\nold", "correct horse battery staple", "new\told"):
        path.write_text(text)
        with pytest.raises(UserError, match="one token a line"):
            read_tokens(path)
    path.write_text(json.dumps({"inference": {"key": "k"}, "management": {"key": "m"}}))
    assert read_tokens(path) == [b"k"]
    for key in ("old", "12345678", "nullify"):
        path.write_text(key, "utf-8-sig")
        assert read_tokens(path) == [key.encode()]
    path.write_text(json.dumps({"inference": {"key": "k"}}), "utf-8-sig")
    assert (read_tokens(path), read_key(path, "inference")) == ([b"k"], "k")
    path.write_text(" ", "utf-8-sig")
    with pytest.raises(UserError, match="is empty"):
        read_tokens(path)
    for bad in (
        "",
        "null",
        "true",
        " false\n",
        "{}",
        "{",
        "[]",
        '["k"]',
        '"k"',
        '{"inference": "k"}',
        '{"inference": ["k"]}',
        '{"inference": {}}',
    ):
        path.write_text(bad)
        with pytest.raises(UserError, match="the token file"):
            read_tokens(path)
    for key in ("7", "null", '""', '["k"]', "[" * 100_000):
        path.write_text(f'{{"inference": {{"key": {key}}}}}')
        with pytest.raises(UserError, match="the token file"):
            read_tokens(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="the token file"):
        read_tokens(path)
    for unreadable in (path, tmp_path / "missing"):
        with pytest.raises(UserError, match="the token file"):
            Tokens(unreadable).allow("Bearer x")


def test_a_token_file_that_keeps_its_time_is_read_again(tmp_path: Path) -> None:
    """As one that `cp -p` or a backup has put there."""
    path = tmp_path / "tokens"
    path.write_text("old\n")
    tokens, times = Tokens(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert tokens.allow("Bearer old")
    path.write_text("newer\n")
    os.utime(path, ns=times)
    assert (tokens.allow("Bearer old"), tokens.allow("Bearer newer")) == (False, True)


@pytest.mark.parametrize("text", ["8080", ":8080", "host:", "host:x", "host:70000"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="HOST:PORT"):
        Listen.parse(text)


def test_an_address_of_ipv6_is_printed_as_one_can_open_it() -> None:
    assert Listen.parse("[::1]:0").url(8080) == "http://[::1]:8080"
    assert Listen.parse("localhost:0").url(8080) == "http://localhost:8080"


def test_an_address_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gate = Gate(cast(TorchServe, Upstream()), Tokens(tmp_path / "none"))
        at = Listen(host="127.0.0.1", port=taken.getsockname()[1])

        async def run() -> None:
            try:
                await gate.start(at, LOOPBACK)
            finally:
                await gate.stop()

        with pytest.raises(UserError, match="cannot listen on"):
            asyncio.run(run())


def test_a_store_with_a_stranger_in_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.mar").write_text("text")
    with pytest.raises(UserError, match=r"x\.mar is not a model archive"):
        default_models(tmp_path)


def test_an_archive_under_another_name_than_its_models_is_told_before_the_start(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ssp-1.0.mar", "w") as archive:
        archive.writestr(MANIFEST, json.dumps({"model": {"modelName": "ssp", "modelVersion": "1.0"}}))
    command = [sys.executable, "-m", "patchscan", "serve", "ssp-1.0", "--model-store", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.endswith("ssp-1.0.mar holds the model ssp: copy it to ssp.mar to serve it\n")


def test_a_folder_of_any_name_is_told_to_java_as_it_reads_it() -> None:
    assert _escaped("a=/B\u00fcro\\x/\U0001f600 #1\n") == "a=/B\\u00fcro\\\\x/\\ud83d\\ude00 #1\n"


@contextmanager
def a_java_that(does: str, tmp_path: Path) -> Iterator[TorchServe]:
    """A server of the model `m` that has been started with a shell script in Java's place."""
    java = tmp_path / "java"
    java.write_text(f"""#!/bin/sh\ntest "$1" = -version && echo 'openjdk version "21"' && exit\n{does}\n""")
    java.chmod(0o755)
    server = TorchServe(tmp_path, [], folder=tmp_path / "scratch", java=java)
    server.models = ["m"]  # it has no archive, but there is nobody who would load it
    server.start()
    try:
        yield server
    finally:
        server.stop()


def test_javas_own_error_is_told_and_no_lack_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    does = """
echo "Invalid configuration: in the locale $LC_ALL"
echo 'nvidia-smi not available or failed: Cannot run program "nvidia-smi"'
exit 1"""
    ended = r"TorchServe ended with 1: Invalid configuration: in the locale C\.UTF-8"
    with a_java_that(does, tmp_path) as server, pytest.raises(UserError, match=ended):
        server.wait_ready()


def test_an_archive_that_torchserve_cannot_unpack_is_told_at_once_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log, as of an archive with a wrong byte; it goes on, and lists no model."""
    does = """
echo '2026-11-27T22:20:49,018 [WARN ] ModelServer Failed to load model: m.mar'
echo 'java.util.zip.ZipException: invalid entry CRC (expected 0xc1c22fea but got 0x144b176c)'
printf '\tat java.util.zip.ZipInputStream.read(Unknown Source)\n'
exec sleep 60"""
    with a_java_that(does, tmp_path) as server:
        monkeypatch.setattr(server, "_management", lambda path: {"models": []} if "?" in path else [])
        assert server.not_ready() == ["m"]
        with pytest.raises(UserError, match=r"m cannot be loaded: ZipException: invalid entry CRC .* \(log:"):
            server.wait_ready(timeout_s=30)
        monkeypatch.setattr(server, "_ready_workers", lambda name: server.workers)
        server.log_file.write_text("")
        server.wait_ready()
        assert server.not_ready() == [], "a model that was loaded may be removed again"


def test_cpus_are_the_cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/user.slice/a:b\n")
    (tmp_path / "user.slice").mkdir()
    for folder in (tmp_path, tmp_path / "user.slice"):
        for text, cpus in (("250000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", 16)):
            (folder / "cpu.max").write_text(text)
            assert available_cpus() == cpus
    (tmp_path / "cpu").mkdir()  # version 1, as a container shows it: the path is the host's
    (tmp_path / "own").write_text("4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    for text, cpus in (("250000\n", 2), ("50000\n", 1), ("-1\n", 16)):
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(text)
        assert available_cpus() == cpus


def test_everything_listens_on_loopback_unless_told_otherwise() -> None:
    addresses = {
        name: inspect.signature(serve).parameters[name].default for name in ("inference", "management", "metrics")
    }
    assert all(address.startswith("127.0.0.1:") for address in addresses.values())
    assert len(set(addresses.values())) == 3


def test_every_refusal_of_the_gate_is_in_the_table_of_the_docs() -> None:
    source = inspect.getsource(gate_module) + inspect.getsource(refusals_module)
    refusals = set(re.findall(r'refusal\(\s*(\d+), "(\w+)"', source))
    rows = re.findall(r"^\| ([\d, ]+) \| (.+?) \|", (ROOT / "docs" / "serve.md").read_text(), re.MULTILINE)
    documented = {
        (status, code) for row in rows for status in row[0].split(", ") for code in re.findall(r"`(\w+)`", row[1])
    }
    assert len(refusals) > 10
    assert refusals - documented == set()
