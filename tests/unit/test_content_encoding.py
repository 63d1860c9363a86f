"""Objects that are stored packed are scored as a browser would show them, within the limits."""

import gzip
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from patchscan.dataset import content_encoding, labels
from patchscan.dataset.content_encoding import unpack, unpacked_size
from patchscan.dataset.labels import LabelError, labelled_images
from patchscan.detector.images import ErrorCode, ImageError, Limits
from patchscan.evaluation.evaluate import Options, evaluate
from patchscan.scanning.options import STARTER
from patchscan.scanning.plan import ScanSource
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.folder import Folder
from patchscan.storage.store import FailureCode, FetchedObject, ObjectError, ObjectInfo, StoreError
from tests.scan_kit import StubScorer, image, table_of

LIMIT = 10**6


def arrow(codec: str, data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return bytes(sink.getvalue().to_pybytes())


def raw_deflate(data: bytes) -> bytes:
    engine = zlib.compressobj(wbits=-15)
    return engine.compress(data) + engine.flush()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    " GZip ": gzip.compress,
    "gzip,aws-chunked": gzip.compress,
    "identity, gzip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": raw_deflate,
    "br": lambda data: arrow("brotli", data),
    "zstd": lambda data: arrow("zstd", data),
    "aws-chunked": bytes,
    "identity": bytes,
    "": bytes,
    "utf-8": bytes,
    "base64": bytes,
}
CONTENTS = {
    "image": image(1, 200),
    "random": np.random.default_rng(0).bytes(200_000),
    "one colour": bytes(300_000),
    "short": b"x",
    "none": b"",
}


@pytest.mark.parametrize("encoding", PACK)
@pytest.mark.parametrize("name", CONTENTS)
def test_what_was_packed_is_unpacked(encoding: str, name: str) -> None:
    data, packed = CONTENTS[name], PACK[encoding](CONTENTS[name])
    assert unpack(packed, encoding, LIMIT) == data
    assert unpacked_size(packed, encoding, LIMIT) == len(data)
    assert unpack(packed, encoding, 1000) == data[:1001]
    assert unpacked_size(packed, encoding, 1000) == min(len(data), 1001)


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize(
    ("encoding", "pack"), [("deflate", gzip.compress), ("gzip", zlib.compress), ("x-gzip", zlib.compress)]
)
def test_gzip_and_zlib_are_known_by_how_they_begin(encoding: str, pack: Callable[[bytes], bytes], name: str) -> None:
    assert unpack(pack(CONTENTS[name]), encoding, LIMIT) == CONTENTS[name]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
def test_an_image_that_is_not_packed_is_taken_as_it_is(encoding: str) -> None:
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        data = image(1, kind=kind)
        assert unpack(data, encoding, LIMIT) == data, kind


@pytest.mark.parametrize("encoding", ["gzip, gzip", "gzip,br", "deflate, gzip", "gzip, unknown"])
def test_several_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(ImageError, match="several encodings") as refused:
        unpack(gzip.compress(gzip.compress(b"x")), encoding, LIMIT)
    assert refused.value.code == ErrorCode.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
def test_damaged_data_is_one_error(encoding: str) -> None:
    packed = PACK[encoding](CONTENTS["image"])
    for data in (b"no packed data at all", packed[:100] + b"\xff" * 1000 + packed[100:], b"\0" * 50):
        with pytest.raises(ImageError) as refused:
            unpack(data, encoding, LIMIT)
        assert refused.value.code == ErrorCode.TRUNCATED


def test_the_parts_of_a_gzip_file_are_joined_and_what_follows_them_is_ignored() -> None:
    packed = gzip.compress(b"first ") + gzip.compress(b"second") + b"\0" * 100
    assert unpack(packed, "gzip", LIMIT) == b"first second"


def test_what_is_there_of_a_cut_gzip_is_given() -> None:
    packed = gzip.compress(CONTENTS["random"])
    part = unpack(packed[: len(packed) // 2], "gzip", LIMIT)
    assert len(part) > 90_000
    assert CONTENTS["random"].startswith(part)


def test_packed_objects_have_the_rows_of_what_they_hold_within_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, out, original = tmp_path / "photos", open_store(str(tmp_path / "out")), Folder.fetch
    photos.mkdir()
    contents = {f"{number}.png": image(number) for number in range(4)}
    contents |= {"large.bin": bytes(3 * 10**6), "text.txt": b"no image"}
    for name, data in contents.items():
        (photos / name).write_bytes(data)
        (photos / f"{name}.packed").write_bytes(gzip.compress(data))
    (photos / "twice.packed2").write_bytes(gzip.compress(gzip.compress(image(1))))

    def fetch(self: Folder, info: ObjectInfo, limit: int) -> FetchedObject:
        encoding = {"packed": "gzip", "packed2": "gzip, gzip"}.get(info.key.rpartition(".")[2])
        return replace(original(self, info, limit), encoding=encoding)

    monkeypatch.setattr(Folder, "fetch", fetch)
    held: list[int] = []

    def counted(data: bytes, encoding: str | None, limit: int) -> bytes:
        held.append(len(unpack(data, encoding, limit)))
        return unpack(data, encoding, limit)

    monkeypatch.setattr(content_encoding, "unpack", counted)
    scorer = StubScorer()
    plan = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card), out)
    Worker(plan, out, scorer, WorkSettings(threads=4, limits=Limits(max_bytes=2**20))).work(0)
    table = table_of(out, plan.scan)
    assert len(table) == 2 * len(contents) + 1
    for name in contents:
        for field in ("status", "error_code", "logit", "image"):
            assert table[f"{name}.packed"][field] == table[name][field]
    assert table["large.bin.packed"]["error_code"] == "too_large"
    assert table["twice.packed2"]["error_code"] == "unsupported_format"
    assert max(held) == 2**20 + 1


@pytest.mark.slow
def test_labelled_images_are_read_as_a_scan_reads_them_and_those_that_cannot_be_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compositions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, original, vanishing = tmp_path / "photos", Folder.fetch, {"late.png": 1}
    photos.mkdir()
    for number in range(4):
        (photos / f"{number}.png").write_bytes(image(number, 200))
        (photos / f"{number}.gz").write_bytes(gzip.compress(image(number, 200)))
    for name in ("denied.png", "archived.png", "late.png"):
        (photos / name).write_bytes(image(9, 200))
    (photos / "twice.gz2").write_bytes(gzip.compress(gzip.compress(image(1))))
    codes = {"denied.png": FailureCode.ACCESS_DENIED, "archived.png": FailureCode.ARCHIVED}

    def fetch(self: Folder, info: ObjectInfo, limit: int) -> FetchedObject:
        if info.key in codes:
            raise ObjectError(codes[info.key], "it cannot be read")
        if info.key in vanishing:
            vanishing[info.key] -= 1
            if vanishing[info.key] < 0:
                raise ObjectError(FailureCode.VANISHED, "the object was deleted after it was listed")
        encoding = {"gz": "gzip", "gz2": "gzip, gzip"}.get(info.key.rpartition(".")[2])
        return replace(original(self, info, limit), encoding=encoding)

    monkeypatch.setattr(Folder, "fetch", fetch)
    lines = "".join(f"{file.name},{'ai' if file.name < '2' else 'real'}\n" for file in photos.iterdir())
    (tmp_path / "labels.csv").write_text(f"key,label\n{lines}gone.png,ai\n../up.png,ai\n")
    options = Options(labels=str(tmp_path / "labels.csv"), tiers=("native",))
    report = evaluate([STARTER], {"raw": photos}, tmp_path / "out", options)
    unavailable = {key: str(code) for key, code in codes.items()} | {
        "gone.png": "vanished",
        "../up.png": "access_denied",
    }
    said = report["data"]["labels"]
    assert (said["labelled"], said["unavailable"], said["unavailable_keys"]) == (14, 4, unavailable)
    assert "labels: 4 of 14 images cannot be read: ../up.png (access_denied), archived.png" in capsys.readouterr().err
    (file,) = (tmp_path / "out" / "scores").iterdir()
    scores = pd.read_parquet(file).set_index("path")
    assert all(scores.logit[f"{number}.gz"] == scores.logit[f"{number}.png"] for number in range(4))
    rejected = scores.error_code[scores.status == "rejected"].to_dict()
    assert rejected == {"twice.gz2": "unsupported_format", "late.png": "vanished"}
    vanishing.clear()
    evaluate([STARTER], {"raw": photos}, tmp_path / "out", options)
    assert pd.read_parquet(file).set_index("path").status["late.png"] == "scored", "it was tried again"


def test_labels_of_which_nothing_can_be_read_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "labels.csv").write_text("key,label\n" + "".join(f"{number}.png,ai\n" for number in range(30)))

    def denied(self: Folder, info: ObjectInfo, limit: int) -> FetchedObject:
        if info.key == readable:
            return FetchedObject(b"x", 1, None, None, None)
        raise ObjectError(FailureCode.ACCESS_DENIED, "access denied")

    monkeypatch.setattr(Folder, "fetch", denied)
    readable = ""
    with pytest.raises(LabelError, match=r"none of the 30 labelled .* \(access_denied: 30\)"):
        labelled_images(str(tmp_path / "labels.csv"), tmp_path)
    readable = "0.png"
    assert len(labelled_images(str(tmp_path / "labels.csv"), tmp_path)[0]) == 1
    monkeypatch.setattr(labels, "READERS", 1)
    readable_once = iter(["0.png"])

    def ended(self: Folder, info: ObjectInfo, limit: int) -> FetchedObject:
        if next(readable_once, None) == info.key:
            return FetchedObject(b"x", 1, None, None, None)
        raise ObjectError(FailureCode.ACCESS_DENIED, "access denied")

    monkeypatch.setattr(Folder, "fetch", ended)
    with pytest.raises(StoreError, match="renew the credentials"):
        labelled_images(str(tmp_path / "labels.csv"), tmp_path)
