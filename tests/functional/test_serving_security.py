"""Attacks on `patchscan serve`: each is refused with a clear answer, and the server goes on serving."""

import pickle
import select
import socket
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from demo.sample import bomb
from patchscan.common.errors import UserError
from patchscan.serving.server import MAX_REQUEST_BYTES
from tests.serving_kit import Served, encoded, picture, png, raw_connection, zip_of


@pytest.fixture(autouse=True)
def still_serving(served: Served) -> Iterator[None]:
    """After every attack an ordinary image is answered."""
    yield
    with served.client() as client:
        assert client.put("/predictions/tiny", content=png(1)).status_code == 200


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """An address of the attacker; whoever connects to it has been made to."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        one.settimeout(1)
        yield one


@pytest.mark.parametrize("scheme", ["http", "https", "ftp"])
def test_registration_fetches_from_nowhere_but_the_store(served: Served, listener: socket.socket, scheme: str) -> None:
    address = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/evil.mar"
    with served.management() as management:
        reply = management.post("/models", params={"url": address})
    assert 400 <= reply.status_code < 500
    with pytest.raises(TimeoutError):
        listener.accept()


def test_registration_leaves_the_store_by_no_path(served: Served, tmp_path: Path) -> None:
    outside = served.folder / "outside.mar"
    outside.write_bytes((served.store / "tiny.mar").read_bytes())
    urls = [
        "../outside.mar",
        str(outside),
        f"file://{outside}",
        f"file://{served.store}/../outside.mar",
        "%2e%2e/outside.mar",
    ]
    with served.management() as management:
        for url in urls:
            reply = management.post("/models", params={"url": url, "model_name": "outside"})
            assert 400 <= reply.status_code < 500, (url, reply.text)
        for name in ("../../escaped", "a/b", "..%2fescaped"):
            management.post("/models", params={"url": "tiny.mar", "model_name": name, "initial_workers": 0})
    with served.registry() as registry:  # TorchServe removes none of those again
        assert {model.name for model in registry.status()} == {"tiny"}
    with served.client() as client:
        assert client.get("/ping").status_code == 200
    assert not list(served.folder.rglob("*escaped*"))


def test_a_pickle_archive_is_refused_before_the_server_is_asked(served: Served, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "run",)

    evil = tmp_path / "evil.mar"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", '{"model": {"modelName": "evil", "serializedFile": "model.pt"}}')
        archive.writestr("model.pt", pickle.dumps(Evil()))
    with (
        served.registry() as registry,
        pytest.raises(UserError, match=r"files that `patchscan archive` does not write: model\.pt"),
    ):
        registry.register(evil, 1)
    assert not (tmp_path / "run").exists()
    assert not (served.store / "evil-1.0.mar").exists()


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic Zmlyc3QtdG9rZW4=", "Bearer first-token x"])
def test_without_the_token_there_is_no_answer(served: Served, header: str | None) -> None:
    headers = {"Authorization": header} if header else {}
    reply = httpx.put(served.said["inference"] + "/predictions/tiny", content=png(1), headers=headers)
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "unauthorized"
    assert httpx.get(served.said["management"] + "/models", headers=headers).status_code >= 400


def test_a_new_token_counts_at_once(served: Served) -> None:
    def status(token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        url = served.said["inference"] + "/predictions/tiny"
        return httpx.put(url, content=png(1), headers=headers).status_code

    try:
        served.token_file.write_text("second-token\nfirst-token\n")
        assert (status("first-token"), status("second-token")) == (200, 200)
        served.token_file.write_text("second-token\n")
        assert (status("first-token"), status("second-token")) == (401, 200)
        served.token_file.unlink()
        assert status("second-token") == 503
    finally:
        served.token_file.write_text("first-token\n")


def test_a_hundred_megapixels_in_a_small_file_are_not_decoded(served: Served) -> None:
    data = bomb(10_000)
    assert len(data) < 50_000
    with served.client() as client:
        reply = client.put("/predictions/tiny", content=data)
    assert reply.status_code == 422
    assert reply.json()["error"]["code"] == "too_large"


def test_a_zip_bomb_is_refused_or_cut(served: Served) -> None:
    one = zip_of({"zeros.png": bytes(200 * 2**20)})
    assert len(one) < 300_000
    with served.client() as client:
        (answer,) = client.put("/predictions/tiny", content=one).json()["answers"]
        assert answer["error"]["code"] == "too_large"
        many = zip_of({f"{number}.png": bytes(33 * 2**20) for number in range(12)})
        reply = client.put("/predictions/tiny", content=many)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
        countless = zip_of({f"{number}.png": b"" for number in range(300)})
        assert client.put("/predictions/tiny", content=countless).status_code == 400


def test_a_polyglot_is_what_its_first_bytes_say(served: Served) -> None:
    jpeg = encoded(Image.fromarray(picture(3)), "JPEG")
    with served.client() as client:
        plain = client.put("/predictions/tiny", content=jpeg).json()
        both = client.put("/predictions/tiny", content=jpeg + zip_of({"a.png": png(1)})).json()
        assert both["image"] == plain["image"]
        html = client.put("/predictions/tiny", content=b"<html><script>alert(1)</script>" + jpeg)
        assert html.status_code == 422
        assert b"script" not in html.content


def test_damaged_requests_are_refused_alone(served: Served) -> None:
    damaged = {
        b"PK\x03\x04 no zip": "application/zip",
        b'{"data": "%%%"}': "application/json",
        b'{"data": 7}': "application/json",
        b"\x93NUMPY\x01\x00": "application/x-npy",
        b"\x93NUMPY\x01\x00\x76\x00{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999, 32, 32, 3)}\n": "x/y",
    }
    with served.client() as client:
        for body, kind in damaged.items():
            reply = client.post("/predictions/tiny", content=body, headers={"Content-Type": kind})
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request"), body


def test_a_gigabyte_is_refused_before_it_is_sent(served: Served) -> None:
    token = served.token_file.read_text().strip()
    with raw_connection(served) as connection:
        head = f"PUT /predictions/tiny HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        connection.sendall(f"{head}Content-Length: {2**30}\r\n\r\n".encode() + bytes(1000))
        assert connection.recv(4096).split()[1] == b"413"


def test_a_gigabyte_in_chunks_is_cut_off(served: Served) -> None:
    """The answer comes as soon as the limit is passed, not when all of it has been taken in."""
    token = served.token_file.read_text().strip()
    chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
    with raw_connection(served) as connection:
        head = f"PUT /predictions/tiny HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent = 0
        while sent < 2**30 and not select.select([connection], [], [], 0)[0]:
            connection.sendall(chunk)
            sent += 2**20
        assert connection.recv(4096).split()[1] == b"413"
    assert sent < 2 * MAX_REQUEST_BYTES


def test_slow_bodies_keep_nobody_waiting(served: Served) -> None:
    token = served.token_file.read_text().strip()
    head = (
        f"PUT /predictions/tiny HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 100000\r\n\r\n"
    )
    slow = [raw_connection(served) for _ in range(50)]
    try:
        for connection in slow:
            connection.sendall(head.encode() + b"x")
        with served.client() as client:
            assert client.put("/predictions/tiny", content=png(1)).status_code == 200
    finally:
        for connection in slow:
            connection.close()


def test_requests_at_once_are_all_answered(served: Served) -> None:
    """More than TorchServe's queue holds: each is answered or told to come again."""
    statuses: list[int] = []
    with served.client() as client:

        def send(number: int) -> None:
            statuses.append(client.put("/predictions/tiny", content=png(number, 64, 64)).status_code)

        threads = [threading.Thread(target=send, args=(number,)) for number in range(150)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(statuses) == 150
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= 90
