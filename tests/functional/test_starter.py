"""`patchscan scan ./photos` right after cloning: the starter scores a folder without a server and says what it is."""

import json
import socket
import threading
from pathlib import Path

from demo.sample import hostile_files, load_photo, write_jpeg
from patchscan.detector.answer import TIERS
from patchscan.detector.card import Card
from patchscan.detector.detector import Detector
from tests.command import environment, patchscan

ROOT = Path(__file__).parent.parent.parent
STARTER = ROOT / "model_store" / "starter"


def test_a_folder_is_scanned_with_no_model_named(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_jpeg(load_photo("coffee.png"), photos / "holiday" / "coffee.jpg")
    for hostile in hostile_files():
        (photos / hostile.name).write_bytes(hostile.data)
    done = patchscan("scan", "photos", cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "about the detector and its training: STARTER MODEL, not evidence" in done.stdout
    totals = json.loads((tmp_path / "scan-results" / "report.json").read_text())["totals"]
    rejected = sum(hostile.expected is not None for hostile in hostile_files())
    assert (totals["scored"], totals["rejected"]) == (1 + len(hostile_files()) - rejected, rejected)
    assert "STARTER MODEL" in (tmp_path / "scan-results" / "report.html").read_text()
    again = patchscan("report", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, done.stdout)


def test_nobody_is_told_of_a_scan(tmp_path: Path) -> None:
    """ONNX Runtime would tell Microsoft, and keep a number for this machine in the user's cache."""
    asked: list[bytes] = []
    write_jpeg(load_photo("coffee.png"), tmp_path / "photos" / "coffee.jpg")
    (tmp_path / "home").mkdir()
    silent = ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    env = {name: value for name, value in environment().items() if name not in silent}
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        threading.Thread(target=_note_requests, args=(proxy, asked), daemon=True).start()
        address = "http://{}:{}".format(*proxy.getsockname())
        env |= dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"), address)
        env |= {"HOME": str(tmp_path / "home")}
        done = patchscan("scan", "photos", cwd=tmp_path, fresh=True, env=env)
    assert done.returncode == 0, done.stderr
    assert asked == []
    assert [path for path in (tmp_path / "home").rglob("*") if "onnx" in path.name.lower()] == []


def _note_requests(proxy: socket.socket, asked: list[bytes]) -> None:
    """Note the first line of each request to a proxy, and answer none, until it is closed."""
    while True:
        try:
            connection, _ = proxy.accept()
        except OSError:
            return
        with connection:
            asked.append(connection.recv(1000).split(b"\r\n")[0])


def test_the_starters_card_says_what_it_was_trained_on_and_measured() -> None:
    card = Card.read(STARTER)
    assert Detector.load(STARTER).card.digest == card.digest
    assert len(card.training["seen"]) == 16
    assert card.training["unseen"] == []
    assert card.training["weights"]["licence"] == "Apache-2.0"
    assert set(card.decision.tiers) == set(TIERS) - {"native"}
    rows = {(row["data"], row["row"], row["tier"]): row for row in card.scoreboard}
    assert {tier for _, _, tier in rows} == set(TIERS)
    assert rows["genmix", "sd_v2_1", "native"]["auc"][0] > 0.9
    assert rows["alarms", "face", "native"]["false_alarms"][0] > 0


def test_the_docs_state_the_bounds_of_the_starters_card() -> None:
    evidence = (ROOT / "docs" / "evidence.md").read_text()
    for tier, one in Card.read(STARTER).evidence.items():
        images = f"{one['ai']} ({one['ai_sources']}) | {one['real']} ({one['real_sources']})"
        assert f"| {tier} | {one['lower']:.2f} to {one['upper']:.2f} | {images} |" in evidence
