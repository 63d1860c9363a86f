"""Objects that are stored packed are scored as a browser would show them, within the limits."""

import gzip
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from patchscan.detector.images import ErrorCode, ImageError, Limits
from patchscan.scanning import worker
from patchscan.scanning.content_encoding import unpack, unpacked_size
from patchscan.scanning.listing import Filters
from patchscan.scanning.plan import ScanSource, plan_scan
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.folder import Folder
from patchscan.storage.store import FetchedObject, ObjectInfo
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

    monkeypatch.setattr(worker, "unpack", counted)
    scorer = StubScorer()
    plan = plan_scan(ScanSource(url=str(photos)), Filters(), scorer.card, out)
    Worker(plan, out, scorer, WorkSettings(threads=4, limits=Limits(max_bytes=2**20))).work(0)
    table = table_of(out, plan.scan)
    assert len(table) == 2 * len(contents) + 1
    for name in contents:
        for field in ("status", "error_code", "logit", "image"):
            assert table[f"{name}.packed"][field] == table[name][field]
    assert table["large.bin.packed"]["error_code"] == "too_large"
    assert table["twice.packed2"]["error_code"] == "unsupported_format"
    assert max(held) == 2**20 + 1
