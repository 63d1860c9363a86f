"""A scan with a list of trusted authorities: what is refused as a list, and whose rows are judged by which."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from patchscan.common.errors import UserError
from patchscan.scanning import commands, report
from patchscan.scanning.plan import Plan, ScanSource
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.provenance import provenance
from patchscan.scanning.trust import TrustError, describe_trust, read_trust, trust_digest
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.store import Store
from tests.c2pa_kit import CAPTURED, Identity, identity, sign
from tests.scan_kit import StubScorer, card, image, table_of


@pytest.fixture(scope="module")
def cameras() -> Identity:
    return identity("cameras", authority=True)


def test_a_list_is_read_with_its_comments(tmp_path: Path, cameras: Identity) -> None:
    text = f"# Kameras für Ämter\n{cameras.pem}\n# twice\n{cameras.pem}{identity('others', authority=True).pem}"
    (tmp_path / "list.pem").write_text(text)
    assert read_trust(str(tmp_path / "list.pem")) == text
    assert describe_trust(text)["authorities"] == 2


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("missing", "there is no file"),
        ("empty", "is not a list of certificates in PEM"),
        ("text", "is not a list of certificates in PEM"),
        ("cut", "is not a list of certificates in PEM"),
        ("binary", "is not a list of certificates in PEM"),
        ("signer", "1 of 2 certificates are no authority's"),
        ("key", "holds a private key"),
        ("large", "may have 4,194,304"),
    ],
)
def test_what_is_no_list_is_one_clear_line(kind: str, why: str, tmp_path: Path, cameras: Identity) -> None:
    contents = {
        "empty": b"",
        "text": b"hello",
        "cut": cameras.pem[:300].encode(),
        "binary": bytes(range(256)),
        "signer": (cameras.pem + identity("signer", cameras).pem).encode(),
        "key": cameras.pem.encode() + b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        "large": cameras.pem.encode() + b"#" * 2**22,
    }
    path = tmp_path / "list.pem"
    if kind in contents:
        path.write_bytes(contents[kind])
    with pytest.raises(TrustError, match=re.escape(why)) as caught:
        read_trust(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_list_ends_a_scan_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "list.pem").write_text("hello")
    with pytest.raises(TrustError, match=r"list\.pem is not a list of certificates"):
        commands.scan(str(tmp_path / "nowhere"), str(tmp_path / "out"), c2pa_trust=str(tmp_path / "list.pem"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def photos(tmp_path: Path, cameras: Identity) -> Path:
    """Three photographs: signed by a listed camera, signed by a stranger, unsigned."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image(1, side=64))).save(buffer, "JPEG")
    files = {
        "listed.jpg": sign(buffer.getvalue(), identity("Camera", cameras), "Camera", CAPTURED),
        "stranger.jpg": sign(buffer.getvalue(), identity("Camera"), "Camera", CAPTURED),
        "plain.jpg": buffer.getvalue(),
    }
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def plan(photos: Path, out: Store, trust: str | None) -> Plan:
    return plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=card(), c2pa_trust=trust), out)


def scan(photos: Path, out: Store, trust: str | None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Scan in a worker that knows the written plan alone; returns the report and the rows by key."""
    made = plan(photos, out, trust)
    for index in range(made.shards):
        Worker(Plan.read(out, made.scan), out, StubScorer(), WorkSettings(threads=2)).work(index)
    return report.reduce(out, made), table_of(out, made.scan)


def states(rows: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    return {key: (row["provenance"] or {}).get("c2pa") for key, row in rows.items()}


@pytest.mark.slow
def test_the_list_judges_manifests_and_no_verdict(photos: Path, tmp_path: Path, cameras: Identity) -> None:
    out = open_store(str(tmp_path / "out"))
    _, before = scan(photos, out, None)
    assert states(before) == {"listed.jpg": "Valid", "stranger.jpg": "Valid", "plain.jpg": None}
    found, now = scan(photos, out, cameras.pem)
    assert states(now) == {"listed.jpg": "Trusted", "stranger.jpg": "Valid", "plain.jpg": None}
    assert found["c2pa_trust"] == {"sha256": trust_digest(cameras.pem), "authorities": 1}
    assert {key: row["c2pa_trust"] for key, row in now.items()} == {
        "listed.jpg": trust_digest(cameras.pem),
        "stranger.jpg": trust_digest(cameras.pem),
        "plain.jpg": None,
    }
    for field in ("p_ai", "logit", "verdict", "tier"):
        assert {key: row[field] for key, row in now.items()} == {key: row[field] for key, row in before.items()}


@pytest.mark.slow
def test_only_files_with_a_manifest_are_judged_anew_by_another_list(
    photos: Path, tmp_path: Path, cameras: Identity
) -> None:
    out = open_store(str(tmp_path / "out"))
    scan(photos, out, cameras.pem)
    assert scan(photos, out, cameras.pem)[0]["totals"]["unchanged"] == 3
    found, now = scan(photos, out, identity("others", authority=True).pem)
    assert found["totals"]["unchanged"] == 1
    assert states(now) == {"listed.jpg": "Valid", "stranger.jpg": "Valid", "plain.jpg": None}


def test_an_unfinished_scan_goes_on_with_its_own_list_only(photos: Path, tmp_path: Path, cameras: Identity) -> None:
    out = open_store(str(tmp_path / "out"))
    first = plan(photos, out, cameras.pem)
    assert plan(photos, out, cameras.pem).scan == first.scan
    assert json.loads(out.read(f"scans/{first.scan}/plan.json") or b"")["c2pa_trust"] == cameras.pem
    assert plan(photos, out, None).scan != first.scan


def test_a_list_is_a_mistake_of_the_user() -> None:
    assert issubclass(TrustError, UserError)


def test_a_manifest_that_names_its_tool_at_length_takes_no_more_of_a_row() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    found = provenance(sign(buffer.getvalue(), identity("Camera"), "M" * 100_000), "JPEG")
    assert found
    assert found["c2pa_generator"] == "M" * 300
