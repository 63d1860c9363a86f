"""Scans through a server of the Open Inference Protocol that is not ours: it serves a run folder's graph, no other."""

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.common.retries import OutageError, Retries, TransientError
from patchscan.detector.answer import JSON_LENGTH, Answer
from patchscan.detector.engines import load_detector
from patchscan.scanning.inference_scorer import InferenceScorer
from patchscan.scanning.scorers import RefusedRequestError, ScorerError, ServerSettings
from tests.import_kit import imported_run
from tests.scan_kit import scanned_here_and_there
from tests.serving_kit import png

QUICK = Retries(deadline_s=0.3, longest_wait_s=0.05)


class Server(ThreadingHTTPServer):
    """Serves a graph as `theirs`, as the protocol says, with raw tensors if `binary`; `fault`, if set, is the status
    and the text of every answer to an inference."""

    def __init__(self, graph: bytes, binary: bool = True):
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.extensions: Any = ["binary_tensor_data"] if binary else []
        self.version, self.outputs = "3", ["logit"]
        self.fault: tuple[int, str] | None = None
        self.described: dict[str, Any] = {}
        self.seen: list[dict[str, str]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def infer(self, body: bytes, length: str | None) -> dict[str, Any]:
        head = json.loads(body[: int(length)] if length else body)
        assert isinstance(
            head["id"], str
        )  # which models in KServe's own server answer with, and may not be missing there
        (tensor,) = head["inputs"]
        values = np.frombuffer(body[int(length) :], np.uint8) if length else np.array(tensor["data"], np.uint8)
        (logit,) = self.session.run(None, {"crops": values.reshape(tensor["shape"])})
        output = {"name": "logit", "datatype": "FP64", "shape": [1], "data": [float(logit)]}
        return {"model_name": "theirs", "model_version": self.version, "outputs": [output]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        outputs = [{"name": name} for name in self.server.outputs]
        about = {
            "/v2": {"name": "theirs", "extensions": self.server.extensions},
            "/v2/models/theirs": {"name": "theirs", "inputs": [{"name": "crops"}], "outputs": outputs}
            | self.server.described,
            "/v2/models/theirs/ready": {},
        }
        self._reply(*((200, json.dumps(about[self.path])) if self.path in about else (404, "{}")))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(dict(self.headers))
        self._reply(*(self.server.fault or (200, json.dumps(self.server.infer(body, self.headers[JSON_LENGTH])))))

    def _reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported_run(tmp_path_factory.mktemp("theirs") / "run")


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    with Server((run / "model.onnx").read_bytes()) as one:
        yield one
        one.shutdown()


def logit(data: str) -> str:
    """An answer whose logit is this JSON."""
    return f'{{"outputs": [{{"name": "logit", "datatype": "FP64", "shape": [1], "data": [{data}]}}]}}'


def connect(server: Server, run: Path, model: str = "theirs", token_file: Path | None = None) -> InferenceScorer:
    return InferenceScorer(ServerSettings(url=server.url, model=model, token_file=token_file), run, QUICK)


@pytest.mark.parametrize("extensions", [["binary_tensor_data"], [], None])
def test_it_scores_as_the_run_folder(extensions: list[str] | None, server: Server, run: Path, tmp_path: Path) -> None:
    server.extensions = extensions
    (tmp_path / "token").write_text("secret\n")
    scorer, here = connect(server, run, token_file=tmp_path / "token"), load_detector(run)
    crops = [here.prepare(png(seed)).crops.pixels for seed in range(3)]
    assert scorer.logits(crops) == here.logits(crops)
    (answer,) = here.score([png(1)])
    assert isinstance(answer, Answer)
    assert scorer.answer(png(1)) == replace(answer, engine=None)
    assert scorer.has_room()
    assert {headers["Authorization"] for headers in server.seen} == {"Bearer secret"}
    assert all((JSON_LENGTH in headers) is bool(extensions) for headers in server.seen)


def test_a_folder_is_scanned_through_it(server: Server, run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        (tmp_path / "photos" / f"{seed}.png").write_bytes(png(seed))
    (tmp_path / "photos" / "note.txt").write_text("no image")
    here, there = scanned_here_and_there(tmp_path / "photos", run, server.url, tmp_path)
    assert here == there


def test_another_model_is_refused_before_anything_is_scored(server: Server, tmp_path: Path) -> None:
    other = imported_run(tmp_path / "other" / "run", classes=3)
    with pytest.raises(ScorerError, match=r"is not the model of .*: its logit of a test picture is"):
        connect(server, other)


@pytest.mark.parametrize(
    ("setting", "value", "model", "error", "why"),
    [
        ("outputs", ["y"], "theirs", ScorerError, "has no logit among its outputs"),
        ("version", "3", "ours", ScorerError, "serves no model ours"),
        ("fault", (401, "{}"), "theirs", ScorerError, "refuses the token"),
        (
            "fault",
            (400, "bad shape"),
            "theirs",
            ScorerError,
            "refuses a test picture: the server answers 400 bad shape",
        ),
        (
            "fault",
            (400, "<html>\n<h1>bad\x1b[2J</h1>"),
            "theirs",
            ScorerError,
            r"answers 400 <html> <h1>bad\\x1b\[2J</h1>$",
        ),
        ("fault", (200, "{}"), "theirs", ScorerError, "answers no logit of one number"),
        ("fault", (200, logit("1" + "0" * 400)), "theirs", ScorerError, "answers no logit of one number"),
        ("fault", (200, logit("[1, 2]")), "theirs", ScorerError, "answers no logit of one number"),
        ("fault", (200, logit("null")), "theirs", ScorerError, "answers no logit of one number"),
        ("fault", (200, logit("NaN")), "theirs", ScorerError, "is nan, not"),
        ("fault", (200, "[" * 100_000), "theirs", ScorerError, "does not speak the Open Inference Protocol"),
        ("described", {"inputs": 5, "outputs": [5]}, "theirs", ScorerError, "has no crops among its inputs"),
        ("extensions", 5, "ours", ScorerError, "serves no model ours"),
        ("fault", (200, "<html>"), "theirs", ScorerError, "does not speak the Open Inference Protocol"),
        ("fault", (503, "{}"), "theirs", OutageError, "no server answers for theirs"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line(
    setting: str, value: Any, model: str, error: type[Exception], why: str, server: Server, run: Path
) -> None:
    setattr(server, setting, value)
    with pytest.raises(error, match=why):
        connect(server, run, model)


def test_what_happens_in_the_middle_of_a_scan(server: Server, run: Path) -> None:
    scorer = connect(server, run)
    crops = [load_detector(run).prepare(png(1)).crops.pixels]
    for status, error in ((503, TransientError), (429, TransientError), (400, RefusedRequestError)):
        server.fault = status, "{}"
        with pytest.raises(error):
            scorer.logits(crops)
    server.fault = 500, '{"error": "its weights may be damaged", "code": "not_finite"}'  # as our own gate says it
    assert math.isnan(scorer.logits(crops)[0])
    server.fault, server.version = None, "4"
    with pytest.raises(ScorerError, match="serves another version of theirs"):
        scorer.logits(crops)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--model", "theirs"], "also needs --run"),
        (["--run", "runs/theirs"], "also needs --model"),
        (["--model", "theirs", "--run", "runs/theirs", "--engine", "onnx"], "--engine is for --run"),
    ],
)
def test_options_that_are_missing_are_named(options: list[str], why: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["scan", str(tmp_path), "--server", "v2+http://127.0.0.1:9", *options])
    assert why in str(done.exception)
