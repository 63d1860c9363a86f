"""What the client makes of a server's replies, over real HTTP: retry, reject, refuse or stop."""

import io
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchscan.common.retries import OutageError, Retries, TransientError
from patchscan.detector.card import NotFiniteError
from patchscan.detector.images import ErrorCode, ImageError
from patchscan.detector.presets import PatchPreset, Preset, WholeImagePreset
from patchscan.scanning.scorers import RefusedRequestError, ScorerError, ServerSettings, TorchServeScorer
from tests.scan_kit import StubScorer, card, image

QUICK = Retries(deadline_s=0.3, longest_wait_s=0.05)


class Server(HTTPServer):
    """Answers the card to JSON, and `reply` (status, body) to anything else; keeps the last request."""

    def __init__(self) -> None:
        self.reply: tuple[int, Any] = (200, {})
        self.headers: dict[str, str] = {}
        self.body = b""
        self.card_status = 200
        self.card = card()
        self.says: dict[str, Any] = {"takes": ["image", "crops"]}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.headers = dict(self.headers)
                server.body = self.rfile.read(int(self.headers["Content-Length"]))
                question = self.headers["Content-Type"] == "application/json"
                told = (server.card_status, {"card": asdict(server.card), **server.says})
                status, body = told if question else server.reply
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.shutdown()
    one.server_close()


def connect(server: Server, token_file: Path | None = None) -> TorchServeScorer:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return TorchServeScorer(ServerSettings(url=url, model="stub", token_file=token_file), QUICK)


@pytest.mark.parametrize("status", [500, 503, 507, 429])
def test_a_busy_server_is_tried_again(server: Server, status: int) -> None:
    server.reply = (status, {"code": status, "type": "InternalServerException"})
    with pytest.raises(TransientError):
        connect(server).answer(b"image")


@pytest.mark.parametrize(("status", "room"), [(200, True), (503, False), (507, False), (401, False), (404, False)])
def test_an_overloaded_server_has_no_room(server: Server, status: int, room: bool) -> None:
    scorer = connect(server)
    server.card_status = status
    assert scorer.has_room() is room
    server.card_status = 200
    assert scorer.has_room()


def test_an_answer_that_is_no_number_is_not_asked_for_again(server: Server) -> None:
    server.reply = (500, {"error": {"code": "not_finite", "message": "the model's output for this image is nan"}})
    with pytest.raises(NotFiniteError, match="is nan"):
        connect(server).answer(b"image")


def test_a_bad_image_is_rejected_with_its_code(server: Server) -> None:
    server.reply = (422, {"error": {"code": "truncated", "message": "cut short"}})
    with pytest.raises(ImageError) as rejected:
        connect(server).answer(b"image")
    assert rejected.value.code == ErrorCode.TRUNCATED


@pytest.mark.parametrize("reply", [(200, {"answers": []}), (400, {"error": {"code": "bad_request", "message": "zip"}})])
def test_an_object_that_the_server_takes_for_an_archive_is_no_image(server: Server, reply: tuple[int, Any]) -> None:
    server.reply = reply
    with pytest.raises(ImageError) as rejected:
        connect(server).answer(b"PK")
    assert rejected.value.code == ErrorCode.NOT_AN_IMAGE


def test_a_body_over_the_servers_limit_is_refused(server: Server) -> None:
    server.reply = (413, b"")
    with pytest.raises(RefusedRequestError, match="max_request_size"):
        connect(server).answer(b"image")


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [(400, "InvalidKeyException", "token"), (401, "", "token"), (404, "ModelNotFoundException", "no model stub")],
)
def test_a_wrong_token_or_model_ends_the_scan(server: Server, status: int, kind: str, says: str) -> None:
    server.reply = (status, {"code": status, "type": kind})
    with pytest.raises(ScorerError, match=says):
        connect(server).answer(b"image")


@pytest.mark.parametrize("body", [["no"], "no", {"error": {"code": ["no"]}}])
def test_a_refusal_in_another_form_is_of_this_image_alone(server: Server, body: Any) -> None:
    """Not every proxy before a server answers as TorchServe does."""
    server.reply = (400, body)
    with pytest.raises(RefusedRequestError, match="answers 400"):
        connect(server).answer(b"image")


@pytest.mark.parametrize("body", [b"<html>Sign in</html>", ["no"], b"[" * 100_000])
def test_a_page_in_place_of_an_answer_ends_the_scan(server: Server, body: Any) -> None:
    """As of a proxy whose own session has ended; else each image would be a row that says it failed."""
    scorer = connect(server)
    server.reply = (200, body)
    with pytest.raises(ScorerError, match="what is not TorchServe's"):
        scorer.answer(b"image")


def test_a_model_replaced_in_the_middle_ends_the_scan(server: Server) -> None:
    server.reply = (200, {"logits": [0.5], "digest": "another"})
    with pytest.raises(ScorerError, match="another version"):
        connect(server).logits([np.zeros((1, 32, 32, 3), np.uint8)])


@pytest.mark.parametrize(
    ("preset", "says", "select"),
    [
        (PatchPreset(), {"takes": ["image", "crops"]}, "worker"),
        (PatchPreset(), {"takes": ["image"]}, "server"),
        (PatchPreset(), {}, "server"),
        (WholeImagePreset(), {"takes": ["image", "crops"]}, "server"),
        (PatchPreset(rule="random", count=32), {"takes": ["image", "crops"]}, "worker"),
        (PatchPreset(rule="grid", count=9, size=128), {"takes": ["image", "crops"]}, "server"),
    ],
)
def test_patches_are_cut_here_where_the_server_takes_them(
    server: Server, preset: Preset, says: dict[str, list[str]], select: str
) -> None:
    server.card, server.says = replace(card(), preset=preset), says
    assert connect(server).select == select


def test_a_card_of_another_version_is_told_from_a_model_that_has_none(server: Server) -> None:
    server.says = {"card": asdict(card()) | {"written_later": 1}}
    with pytest.raises(ScorerError, match=r"cannot read \(.*written_later.*\): scan with the version that made"):
        connect(server)
    server.says = {"card": None}
    with pytest.raises(ScorerError, match="it has no card"):
        connect(server)


def test_crops_travel_as_one_array(server: Server) -> None:
    crops = [np.full((1, 32, 32, 3), value, np.uint8) for value in (1, 2)]
    server.reply = (200, {"logits": [0.25, None], "digest": card().digest})
    assert connect(server).logits(crops) == [0.25, pytest.approx(math.nan, nan_ok=True)]
    assert server.headers["Content-Type"] == "application/x-npy"
    np.testing.assert_array_equal(np.load(io.BytesIO(server.body)), np.concatenate(crops))


def test_the_engine_is_unknown_where_a_server_has_workers_of_several(server: Server) -> None:
    server.says = {"card": asdict(card()), "takes": ["crops"], "engine": "openvino-bf16"}
    scorer, engines = connect(server), []
    for engine in ("openvino-bf16", "openvino", "openvino-bf16"):
        server.reply = (200, {"logits": [0.5], "digest": card().digest, "engine": engine})
        scorer.logits([np.zeros((1, 32, 32, 3), np.uint8)])
        engines.append(scorer.engine)
    assert engines == ["openvino-bf16", None, None]


def test_the_engine_of_an_earlier_servers_answer_is_the_cards(server: Server) -> None:
    server.says = {"card": asdict(card()), "engine": "onnx"}
    scorer = connect(server)
    answer = asdict(StubScorer().answer(image(1)))
    server.reply = (200, {name: value for name, value in answer.items() if name != "engine"})
    assert scorer.answer(b"image").engine == "onnx"


def test_a_renewed_token_is_used_at_once(server: Server, tmp_path: Path) -> None:
    token = tmp_path / "key_file.json"
    token.write_text(json.dumps({"inference": {"key": "first"}, "management": {"key": "never"}}))
    client = connect(server, token)
    assert server.headers["Authorization"] == "Bearer first"
    token.write_text("second\nfirst\n")  # the old one beside the new, as the gate allows
    server.reply = (422, {"error": {"code": "empty", "message": ""}})
    with pytest.raises(ImageError):
        client.answer(b"")
    assert server.headers["Authorization"] == "Bearer second"


def test_no_server_is_a_clear_error_that_says_run_again() -> None:
    with pytest.raises(OutageError, match="no TorchServe answers") as out:
        TorchServeScorer(ServerSettings(url="http://127.0.0.1:9", model="stub"), QUICK)
    assert out.value.exit_code == 75
    with pytest.raises(ScorerError, match="is not an address"):
        TorchServeScorer(ServerSettings(url="127.0.0.1:9", model="stub"), QUICK)
