"""What the scan's tests share: a scorer that needs no model, small images, and rows without their circumstances."""

import hashlib
import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.detector.answer import Answer, EngineUsed
from patchscan.detector.card import Card, Decision
from patchscan.detector.prepared import build_answer, prepare
from patchscan.detector.presets import PatchPreset
from patchscan.scanning import rows
from patchscan.scanning.plan import read_parts
from patchscan.scanning.scorers import Select
from patchscan.storage import open_store
from patchscan.storage.store import Store

# The columns that may differ between two scans of the same objects with the same model.
CIRCUMSTANCES = ("scored_at", "attempts")


def card(version: str = "1", **values: Any) -> Card:
    """A card of no real model; another version has another digest."""
    return Card(
        name="stub", version=version, architecture="ssp", preset=PatchPreset(), weights_sha256=version * 64, **values
    )


def scanned_here_and_there(photos: Path, run: Path, url: str, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of two scans of a folder: with a run folder, and through a server that serves its graph as `theirs`.
    Rows are without their engine, which is not known of a server."""
    tables = []
    for name, options in (("here", []), ("there", ["--server", f"v2+{url}", "--model", "theirs"])):
        arguments = ["scan", str(photos), "--run", str(run), "--out", str(out / name), *options]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        scan = json.loads((out / name / "report.json").read_text())["scan"]
        tables.append(table_of(open_store(str(out / name)), scan))
    here, there = tables
    assert {row.pop("engine") for row in here.values()} <= {"onnx", None}  # None: a file that has no score
    assert {row.pop("engine") for row in there.values()} == {None}
    return here, there


class StubScorer:
    """Scores a crop by the mean of its pixels; counts the images it scored."""

    select: Select = "worker"
    device = "cpu"
    engine: EngineUsed | None = "torch"

    def __init__(self, card: Card | None = None, parallel: int = 8):
        self.card = card or globals()["card"]()
        self.parallel = parallel
        self.scored = 0
        self.model_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def answer(self, data: bytes) -> Answer:
        prepared = prepare(data, self.card.preset)
        return build_answer(prepared, self.logits([prepared.crops.pixels])[0], self.card, self.engine)

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        with self._lock:
            self.scored += len(crops)
        return [float(one.mean()) / 16 - 8 for one in crops]

    def has_room(self) -> bool:
        return True


class StubServer(BaseHTTPRequestHandler):
    """The StubScorer over HTTP, as the TorchServe handler answers requests of crops; for a ThreadingHTTPServer."""

    protocol_version = "HTTP/1.1"
    scorer = StubScorer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        reply: dict[str, Any]
        if self.headers["Content-Type"] == "application/json":
            reply = {"card": asdict(self.scorer.card), "takes": ["crops"], "engine": self.scorer.engine}
        else:
            crops = np.load(io.BytesIO(body))
            reply = {"logits": self.scorer.logits(list(crops[:, None])), "digest": self.scorer.card.digest}
            reply["engine"] = self.scorer.engine
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def stub_server() -> Iterator[list[str]]:
    """Serve a StubServer; the options of `patchscan scan` that name it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), StubServer) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield ["--server", f"http://127.0.0.1:{server.server_address[1]}", "--model", "stub"]
        server.shutdown()


def image(seed: int, side: int = 40, kind: str = "PNG") -> bytes:
    """A small image of noise about a grey that the seed chooses."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 40, (side, side, 3)) + random.integers(0, 200)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def scan_names(out: Store) -> list[str]:
    """The scans of a results folder, oldest first."""
    return [json.loads(out.read(name) or b"")["scan"] for name in sorted(out.names("history/"))]


def table_of(out: Store, scan: str) -> dict[str, dict[str, Any]]:
    """A scan's rows by key, without the fields that may differ between two scans; fails on a key that comes twice."""
    found: dict[str, dict[str, Any]] = {}
    for data in read_parts(out, scan):
        for row in rows.from_parquet(data).to_pylist():
            assert row["key"] not in found, f"{row['key']} has two rows"
            found[row["key"]] = {name: value for name, value in row.items() if name not in CIRCUMSTANCES}
    return found


class Crash(BaseException):
    """The process dies here."""


class CrashingStore:
    """A store that dies at one of its calls, before the call has its effect or after it."""

    def __init__(self, store: Store, at: int, after: bool):
        self._store, self._left, self._after = store, at, after

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._store, name)
        if name not in ("read", "write", "write_new", "delete", "names"):
            return inner

        def call(*values: Any) -> Any:
            self._left -= 1
            if self._left == 0 and not self._after:
                raise Crash
            result = inner(*values)
            if self._left == 0:
                raise Crash
            return result

        return call


def untrained_run(folder: Path) -> Path:
    """A run folder of an untrained ssp-lite whose scores spread on both sides of the threshold."""
    import torch
    from safetensors.torch import save_file

    from patchscan.detector.models import build_network

    torch.manual_seed(0)
    weights = folder / "model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in build_network("ssp-lite").state_dict().items()}, weights)
    Card(
        name="untrained",
        version="1.0",
        architecture="ssp-lite",
        preset=PatchPreset(),
        weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        decision=Decision(temperature=0.1),
    ).write(folder)
    return folder
