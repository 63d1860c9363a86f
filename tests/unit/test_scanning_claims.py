"""The report's section on what the files say, against what was put into them."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from patchscan.scanning import report
from patchscan.scanning.plan import ScanSource
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.store import Store
from tests.c2pa_kit import CAPTURED, Identity, identity, sign
from tests.scan_kit import StubScorer, card

LIGHT, DARK = 200, 60  # the stub scorer calls light images AI
GOLDEN = Path(__file__).parents[1] / "golden" / "data"
PARAMETERS = "a cat\nSteps: 20, Sampler: Euler a"


def picture(level: int, kind: str = "JPEG", **options: Any) -> bytes:
    noise = np.random.default_rng(level).integers(0, 30, (48, 48, 3))
    options |= {"quality": 98} if kind == "JPEG" else {}  # else the compressed noise would look like a graphic
    buffer = io.BytesIO()
    Image.fromarray((noise + level).astype(np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


def xmp(term: str) -> bytes:
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a Iptc4xmpExt:DigitalSourceType="'
        f'http://cv.iptc.org/newscodes/digitalsourcetype/{term}"/></x:xmpmeta>'
    ).encode()


def text(value: str) -> PngInfo:
    info = PngInfo()
    info.add_text("parameters", value)
    return info


@pytest.fixture(scope="module")
def cameras() -> Identity:
    return identity("cameras", authority=True)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Any], str]]:
    """Scan a folder; returns report.json and the page."""

    def run(folder: Path, out: Store, trust: str | None) -> tuple[dict[str, Any], str]:
        made = plan_scan(ScanRequest(source=ScanSource(url=str(folder)), card=card(), c2pa_trust=trust), out)
        for index in range(made.shards):
            Worker(made, out, StubScorer(), WorkSettings(threads=2)).work(index)
        report.reduce(out, made)
        return json.loads(out.read("report.json") or b""), (out.read("report.html") or b"").decode()

    return run


@pytest.fixture(scope="module")
def scans(
    tmp_path_factory: pytest.TempPathFactory, cameras: Identity, scan: Callable[..., tuple[dict[str, Any], str]]
) -> list[tuple[dict[str, Any], str]]:
    """Two scans: of unsigned files with another list, then of signed ones too."""
    folder, out = tmp_path_factory.mktemp("photos"), open_store(str(tmp_path_factory.mktemp("out")))
    camera, maker = identity("Camera", cameras), identity("Picture Maker")
    unsigned = {
        "old/plain.jpg": picture(DARK),
        "old/said camera.jpg": picture(DARK, xmp=xmp("digitalCapture")),
        "old/dark parameters.png": picture(DARK, "PNG", pnginfo=text(PARAMETERS)),
        "old/light parameters.png": picture(LIGHT, "PNG", pnginfo=text(PARAMETERS)),
        "top.jpg": picture(LIGHT, xmp=xmp("compositeCapture")),
    }
    altered = bytearray(sign(picture(DARK), camera))
    altered[-30] ^= 1
    signed = {
        "new/dark photo.jpg": sign(picture(DARK), camera, "Camera 1", CAPTURED),
        "new/light <photo>.jpg": sign(picture(LIGHT), camera, "Camera 1", CAPTURED),
        "new/dark made.jpg": sign(picture(DARK), maker),
        "new/light made.jpg": sign(picture(LIGHT), maker),
        "new/altered.jpg": bytes(altered),
        "new/broken.jpg": b"no picture",
        "marked/flux.png": (GOLDEN / "watermark-flux.png").read_bytes(),
    }
    found = []
    for files, trust in ((unsigned, None), (signed, cameras.pem)):
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        found.append(scan(folder, out, trust))
    return found


def counts(found: dict[str, Any], when: str) -> dict[str, int | None]:
    return {row["claim"]: row[when] for row in found["what_files_say"]["counts"]}


@pytest.mark.slow
def test_claims_are_counted_and_compared_with_the_previous_scan(scans: list[tuple[dict[str, Any], str]]) -> None:
    first, second = (found for found, _ in scans)
    alone = {"images": 5, "trusted": 0, "valid": 0, "invalid": 0, "source_type": 2, "generator_text": 2, "nothing": 1}
    alone |= {"watermark": 0, "says_generator": 2, "says_camera": 1}
    assert counts(first, "now") == alone
    assert set(counts(first, "before").values()) == {None}
    assert counts(second, "before") == alone
    assert counts(second, "now") == {
        "images": 11,
        "trusted": 2,
        "valid": 2,
        "invalid": 1,
        "source_type": 6,
        "generator_text": 2,
        "watermark": 1,
        "nothing": 1,
        "says_generator": 5,
        "says_camera": 3,
    }
    assert (first["what_files_say"]["same_list"], second["what_files_say"]["same_list"]) == (None, False)
    assert (second["what_files_say"]["other_list"], second["what_files_say"]["not_searched"]) == (0, 0)


def test_contradictions_both_ways_have_counts_and_examples(scans: list[tuple[dict[str, Any], str]]) -> None:
    rows = scans[1][0]["what_files_say"]["against_verdicts"]
    told = [[row[name] for name in ("says", "signer", "files", "ai", "real", "contradicted")] for row in rows]
    assert told == [
        ["camera", "trusted", 2, 1, 1, 1],
        ["camera", "nobody", 1, 0, 1, 0],
        ["generator", "unknown", 2, 1, 1, 1],
        ["generator", "nobody", 3, 1, 2, 2],
    ]
    examples = [[one["key"] for one in row["examples"]] for row in rows]
    said_to_be_made = ["old/dark parameters.png", "marked/flux.png"]
    assert examples == [["new/light <photo>.jpg"], [], ["new/dark made.jpg"], said_to_be_made]
    assert rows[3]["examples"][1]["watermark"] == "FLUX"
    assert rows[0]["examples"][0] | {"p_ai": 0, "version_id": None} == {
        "key": "new/light <photo>.jpg",
        "version_id": None,
        "p_ai": 0,
        "signer": "Camera, tests",
        "tool": "Camera 1",
        "source_type": "digitalCapture",
        "generator": None,
        "watermark": None,
    }


def test_coverage_is_told_by_folder(scans: list[tuple[dict[str, Any], str]]) -> None:
    rows = {row["name"]: row for row in scans[1][0]["what_files_say"]["by_folder"]}
    assert set(rows) == {"new/", "old/", "marked/", "(no folder)"}
    assert (rows["marked/"]["watermark"], rows["marked/"]["nothing"]) == (1, 0)
    assert [rows["new/"][name] for name in ("images", "trusted", "valid", "invalid", "nothing")] == [5, 2, 2, 1, 0]
    assert [rows["old/"][name] for name in ("images", "trusted", "generator_text", "nothing")] == [4, 0, 2, 1]


def test_the_page_shows_the_section(scans: list[tuple[dict[str, Any], str]]) -> None:
    shown = re.sub(r"<[^>]+>", "", scans[1][1])
    for words in ("Against the verdicts", "new/light &lt;photo&gt;.jpg", "Camera 1", "judged signers by another list"):
        assert words in shown
    assert "earlier scan</th>" not in scans[0][1]


def test_examples_are_those_whose_scores_contradict_most(
    tmp_path: Path, cameras: Identity, scan: Callable[..., tuple[dict[str, Any], str]]
) -> None:
    folder, camera = tmp_path / "photos", identity("Camera", cameras)
    folder.mkdir()
    for level in (140, 180, 220, 200, 160):
        (folder / f"{level}.jpg").write_bytes(sign(picture(level), camera, "Camera 1", CAPTURED))
    found, _ = scan(folder, open_store(str(tmp_path / "out")), cameras.pem)
    (row,) = found["what_files_say"]["against_verdicts"]
    assert row["contradicted"] == 5
    assert [one["key"] for one in row["examples"]] == ["220.jpg", "200.jpg", "180.jpg"]
