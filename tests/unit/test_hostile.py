"""What tests/fuzz found, or was seen while it was written, each as one small case."""

import io
import json
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from patchscan.common.errors import UserError
from patchscan.common.yaml_file import read_yaml
from patchscan.detector.card import Card
from patchscan.detector.images import ErrorCode, ImageError, Limits, decode
from patchscan.detector.models import build_model
from patchscan.detector.presets import PatchPreset, WholeImagePreset
from patchscan.scanning.audit_labels import read_labels
from patchscan.scanning.case import read_case
from patchscan.scanning.file_texts import MAX_BYTES, MAX_TEXT_BYTES, file_texts
from patchscan.scanning.manifest import ManifestError, objects
from patchscan.scanning.provenance import provenance
from patchscan.serving.forms import file_of_form
from patchscan.serving.inference_protocol import parse_infer
from patchscan.serving.requests import (
    MAX_TAR_GLOBAL_HEADERS,
    MAX_TAR_HEADERS,
    ManyImages,
    RequestError,
    from_base64,
    parse,
)
from patchscan.training.hugging_face import read_export
from patchscan.training.import_config import Head
from patchscan.training.pretrained import read_state_dict
from tests.image_tree import picture
from tests.scan_kit import card
from tests.serving_kit import png


def test_a_damaged_avif_is_the_images_fault() -> None:
    """Its decoder raises RuntimeError, as no other of Pillow's does."""
    file = io.BytesIO()
    Image.fromarray(picture(7, 160, 120)).save(file, "AVIF")
    data = file.getvalue()
    pixels = data.index(b"mdat") + 4
    with pytest.raises(ImageError) as caught:
        decode(data[:pixels] + bytes(len(data) - pixels))
    assert caught.value.code == ErrorCode.TRUNCATED


def test_a_ribbon_is_not_enlarged_whole() -> None:
    """8 x 100,000 pixels in a small file would become 256 x 3,200,000, 3 GB: the middle of it is scored."""
    ribbon = picture(1, 100_000, 8)
    middle = ribbon[:, 50_000 - 64 : 50_000 + 64]
    crops, alone = (WholeImagePreset().crops(pixels, 0) for pixels in (ribbon, middle))
    assert np.array_equal(crops.pixels, alone.pixels)
    assert (crops.corners == alone.corners + np.array([50_000 - 64, 0])).all()
    tall = WholeImagePreset().crops(ribbon.transpose(1, 0, 2), 0)
    assert tall.corners.tolist() == [[0, int(crops.corners[0, 0])]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"preset": "patch"},
        {"preset": {"kind": "patch", "size": 10**9}},
        {"preset": {"kind": "patch", "rule": "x"}},
        {"preset": {"kind": "patch", "candidates": 10**9}},
        {"preset": {"kind": "whole", "resize": 10**9}},
        {"preset": {"kind": "whole", "size": 0}},
        {"decision": {"temperature": 0.0}},
        {"decision": {"threshold": float("nan")}},
        {"decision": {"bias": None}},
        {"decision": {"bias": 10**400}},
        {"decision": []},
        {"decision": {"chosen_by": 5}},
        {"preset": {"kind": "patch", "count": 1.5}},
        {"preset": {"kind": "whole", "size": 224.5}},
        {"preset": {"kind": "patch", "rule": "grid", "size": 1024, "count": 1024}},
        {"preset": {"kind": "patch", "rule": "grid", "size": 256, "max_count": True}},
        {"preset": {"kind": "ensemble", "members": []}},
        {"preset": {"kind": "ensemble", "members": [{"kind": "patch"}] * 9}},
        {"name": 5},
        {"version": None},
        {"warnings": None},
        {"warnings": [1]},
        {"draws": []},
        {"draws": {"p_ai_95": "x"}},
        {"name": "../../elsewhere"},
        {"name": "two\nlines"},
        {"name": "x" * 201},
        {"name": ""},
        {"training": {"seen": "sd"}},
        {"training": {"seen": None}},
        {"training": {"unseen": [1]}},
        {"training": {"recipe": None}},
        {"training": {"protocol": ["raw"]}},
        {"evidence": {"native": {}}},
        {"evidence": {"native": {"lower": "a", "upper": 1, "ai": 1, "real": 1}}},
        {"evidence": {"native": 5}},
        {"robustness": {"rows": 1}},
        {"robustness": {"rows": [{"family": "JPEG"}]}},
    ],
    ids=json.dumps,
)
def test_a_card_that_asks_for_the_impossible_is_no_card(wrong: dict[str, Any]) -> None:
    values = asdict(card())
    assert Card.from_dict(values) == card()
    with pytest.raises(ValueError):  # noqa: PT011 -- of many wordings
        Card.from_dict(values | wrong)


def test_a_card_cannot_ask_for_any_number_of_models() -> None:
    with pytest.raises(ValueError, match="at most 8 members"):
        build_model("+".join(["resnet50"] * 10_000))


def test_a_patch_preset_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="count and candidates must be 1 to 1024"):
        PatchPreset(count=0)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_unpacks_all_at_once_is_refused(method: int) -> None:
    """400 MB of zeros are less than 1 KB of bzip2, and Python gives all of them or none."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("a.png", b"x")
    with pytest.raises(RequestError, match="stored or deflated"):
        parse({"body": file.getvalue()}, Limits())


def tar_with(kind: bytes, header: bytes) -> bytes:
    """A tar of one file after an extended header of this kind."""
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(header)
    plain = tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT)
    return info.tobuf(tarfile.USTAR_FORMAT) + header + bytes(-len(header) % 512) + plain + bytes(1024)


@pytest.mark.parametrize(
    ("kind", "limit"), [(tarfile.XGLTYPE, MAX_TAR_GLOBAL_HEADERS), (tarfile.XHDTYPE, MAX_TAR_HEADERS)]
)
def test_a_tar_with_headers_without_end_is_refused(kind: bytes, limit: int) -> None:
    """1.3 MB of a global header took 6 s with 200 files, since it is copied for each."""
    record = b"12 k123456=\n"
    assert parse({"body": tar_with(kind, record)}, Limits()) == ManyImages([("a.png", b"")])
    with pytest.raises(RequestError, match="headers of the tar are too long"):
        parse({"body": tar_with(kind, record * (1 + limit // len(record)))}, Limits())


@pytest.mark.parametrize("version", ["old", "1.0"])
def test_a_tar_with_sparse_files_is_refused(version: str) -> None:
    """The list of such a file's parts may be as long as the tar, and becomes twenty times as much in memory."""
    tar = tar_with(tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n" + b"22 GNU.sparse.minor=0\n")
    with pytest.raises(RequestError, match="sparse"):
        parse({"body": tar_with(tarfile.GNUTYPE_SPARSE, b"") if version == "old" else tar}, Limits())


@pytest.mark.parametrize(
    "shape", ["-1, -32, 32, 3", "-1, 32, -32, 3", "True, 1024, 1, 3", "1, 1024, True, 3", f"0, {10**30}, 1, 3"]
)
def test_crops_of_an_impossible_shape_fail_alone(shape: str) -> None:
    """Their product is right, and NumPy raises ValueError, TypeError or OverflowError: the whole batch failed."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%s)}\n" % shape.encode()
    pixels = bytes(0 if shape.startswith("0") else 3072)
    with pytest.raises(RequestError, match="crops must be one"):
        parse({"body": b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + pixels}, Limits())


@pytest.mark.parametrize("shape", [[9] * 100_000, [10**4000] * 8], ids=["many", "long"])
def test_the_shape_of_a_tensor_is_checked_before_it_is_multiplied(shape: list[int]) -> None:
    """A thousand numbers of 4,000 digits, a request of 4 MB, stopped every thread of the gate for 40 s."""
    tensor = {"name": "image", "datatype": "BYTES", "shape": shape, "data": ["AAAA"]}
    with pytest.raises(RequestError, match="shape must be a list"):
        parse_infer(json.dumps({"inputs": [tensor]}).encode(), None)


def test_a_length_of_thousands_of_digits_is_refused() -> None:
    """Python raises ValueError for it, which the gate answered with 500 and a traceback in its log."""
    with pytest.raises(RequestError, match="must be the length of the JSON"):
        parse_infer(b"{}", "9" * 5000)


def test_a_refusal_does_not_send_all_of_it_back() -> None:
    for tensor in ({"name": "x" * 10_000}, {"name": "image", "datatype": "BYTES", "data": ["AAAA"]}):
        asked = {"inputs": [{"shape": [1], **tensor}], "outputs": [{"name": "y" * 10_000}]}
        with pytest.raises(RequestError) as caught:
            parse_infer(json.dumps(asked).encode(), None)
        assert len(str(caught.value)) < 500


def test_base64_in_short_words_takes_no_more_memory_than_its_text() -> None:
    """45 MiB of them took 1 GB as Python's strings."""
    text = "ab " * 400_000
    tracemalloc.start()
    try:
        assert len(from_base64(text)) == 600_000
        assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("header", [b";a=b" * 50_000, b"\r\na:b" * 50_000, b"; filename*" + b"9" * 5000 + b"=x"])
def test_a_form_with_a_huge_header_is_refused(header: bytes) -> None:
    """45 MiB of parameters would take hours, since Python copies the rest for each."""
    part = b"Content-Disposition: form-data" + header
    with pytest.raises(RequestError, match="4,096 bytes"):
        file_of_form("multipart/form-data; boundary=b", b"--b\r\n" + part + b"\r\n\r\nx\r\n--b--\r\n")


def test_a_forms_own_header_is_as_long_at_most() -> None:
    with pytest.raises(RequestError, match="too long"):
        file_of_form(f"multipart/form-data; boundary*{'9' * 5000}=x", b"--b\r\n\r\nx\r\n--b--\r\n")


def with_texts(*chunks: bytes) -> bytes:
    """A PNG with these packed texts."""
    image = png(1)
    packed = [b"zTXt" + b"k\0\0" + chunk for chunk in chunks]
    texts = b"".join(struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in packed)
    return image[:33] + texts + image[33:]


def test_packed_texts_of_zeros_are_counted() -> None:
    """They are empty once decoded: a thousand of them, 1 MB in a file, took 10 s."""
    zeros = with_texts(*[zlib.compress(bytes(MAX_TEXT_BYTES))] * 50)
    assert file_texts(zeros, "PNG") == [("k", "")] * (MAX_BYTES // MAX_TEXT_BYTES)


def test_damaged_packed_texts_are_given_up() -> None:
    """900 of them, 0.9 MB in a file, took 6 s."""
    damaged = zlib.compress(bytes(10**6))[:-4] + b"\xff" * 4
    before = time.process_time()
    assert file_texts(with_texts(zlib.compress(b"x"), *[damaged] * 1000), "PNG") == [("k", "x")]
    assert time.process_time() - before < 2


def every_tag(size: int, *tags: int) -> bytes:
    """EXIF of 60,000 tags, each of which holds all of it."""
    entries = b"".join(struct.pack("<HHII", tags[at % len(tags)], 7, size, 0) for at in range(60_000))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + entries + bytes(4)).ljust(size, b"A")


def filled_files(size: int) -> Iterator[tuple[str, bytes]]:
    """Pictures filled up to about this size with what takes a reader of texts long."""

    def filled(text: bytes) -> bytes:
        return text * (size // len(text))

    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "JPEG")
    jpeg, gif = file.getvalue(), b"GIF89a\t\0\t\0\0\0\0"
    exif = b"\xff\xe1\0\x14Exif\0\0II*\0\x08\0\0\0" + bytes(4)
    datasets = b"\xff\xed" + struct.pack(">H", 65_016) + b"Photoshop 3.0\0" + b"\x1c\1\0\0\0" * 13_000
    for segments in (exif, datasets, b"\xff", b"\xff\xfe\0\5abc", b"\xff\xe1\0\2"):
        yield "JPEG", jpeg[:2] + filled(segments) + jpeg[2:]
    wide = "pmeta".encode("utf-16-le")
    for xmp in (b":CreatorTool ", b":CreatorTool>" + b" " * 50 + b"<rdf:a ", wide + b":CreatorTool ", wide):
        yield "WEBP", b"RIFF\0\0\0\0WEBPXMP " + struct.pack("<I", size) + filled(xmp)
    image = png(1)
    for kind, content in (
        (b"eXIf", every_tag(size, *range(60_000))),
        (b"eXIf", every_tag(size, 0x010E)),
        (b"tEXt", b"Raw profile type xmp\0" + b"\n" * size),
    ):
        yield "PNG", image[:33] + struct.pack(">I", len(content)) + kind + content + bytes(4) + image[33:]
    yield "PNG", image[:33] + filled(bytes(4) + b"abcd" + bytes(4)) + image[33:]
    yield "GIF", gif + filled(b"!\xf9\0")
    yield "GIF", gif + b"!\xfe" + filled(b"\1a")
    yield "GIF", gif + b"!\xfe" + filled(b"\xff" * 256)
    yield "TIFF", every_tag(size, *range(60_000))


def test_no_file_takes_long_to_say_what_it_claims() -> None:
    """Seconds to minutes each, at the largest size, and for EXIF gigabytes."""
    files = list(filled_files(2**22))
    before = time.process_time()
    for kind, data in files:
        assert provenance(data, kind) is None
    assert time.process_time() - before < 10


def test_a_reference_to_no_character_costs_no_row() -> None:
    """Python makes a number of its digits, and raises ValueError where there are too many."""
    file, tool = io.BytesIO(), f"Midjourney&#33;&#{'9' * 5000};"
    Image.new("RGB", (9, 9)).save(file, "JPEG", xmp=f'<x:xmpmeta xmp:CreatorTool="{tool}"/>'.encode())
    assert ("CreatorTool", "Midjourney!\ufffd") in file_texts(file.getvalue(), "JPEG")


class Described(BaseModel):
    number: int = 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "number: 2020-13-45",
        "number: " + "9" * 5000,
        "number: !!int ''",
        "number: !!bool x",
        "number: !!timestamp x",
        "number: !!python/object/apply:os.getcwd []",
    ],
    ids=lambda text: text[:20],
)
def test_yaml_of_a_stranger_is_one_line(text: str, tmp_path: Path) -> None:
    """PyYAML raises ValueError, KeyError, IndexError, AttributeError and RecursionError besides its own."""
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml"):
        read_yaml(tmp_path / "x.yaml", Described, UserError, ["number"])


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        '{"key": ["a"]}',
        '{"key": 5}',
        '{"key": "\\ud800"}',
        '{"key": "a", "size": Infinity}',
        '{"key": "a", "size": -5}',
        '{"key": "a", "size": 9223372036854775808}',
        '{"key": "a", "version_id": 5}',
        '{"key": "a", "etag": ["x"]}',
        '{"key": "a", "storage_class": ["x"]}',
        '{"key": "a", "last_modified": "9999-12-31T23:59:59-14:00"}',
    ],
    ids=lambda line: line[:50],
)
def test_a_manifest_with_values_of_another_kind_is_one_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "keys.jsonl").write_text(line)
    with pytest.raises(ManifestError, match=r"keys\.jsonl"):
        list(objects(str(tmp_path / "keys.jsonl"), None, None))


def test_json_without_end_to_its_depth_is_one_line(tmp_path: Path) -> None:
    for name in ("card.json", "config.json", "preprocessor_config.json", "labels.json", "head.json"):
        (tmp_path / name).write_text(DEEP)
    with pytest.raises(UserError, match="not a card"):
        Card.read(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_export(tmp_path)
    with pytest.raises(UserError, match="no weights"):
        Head(file=Path("head.json")).read(tmp_path)
    with pytest.raises(UserError, match="no labels"):
        read_labels(tmp_path / "labels.json")
    with pytest.raises(UserError, match="no case"):
        read_case(tmp_path / "labels.json")


@pytest.mark.parametrize("labels", [{"0": 5, "1": "fake"}, ["fake"]])
def test_labels_of_an_export_that_are_no_texts_are_one_line(labels: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    size = {"size": 224, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(size))
    with pytest.raises(UserError, match="describe the detector in YAML"):
        read_export(tmp_path)


@pytest.mark.parametrize("offsets", [(0, 4000), (-4000, 0)])
def test_tensors_may_not_share_their_bytes(offsets: tuple[int, int], tmp_path: Path) -> None:
    """A header of 1 MB made 40 GB of a file of 4 MB."""
    entry = {"dtype": "F32", "shape": [1000], "data_offsets": offsets}
    header = json.dumps({str(number): entry for number in range(9)}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4000))
    with pytest.raises(UserError, match="more bytes than the file"):
        read_state_dict(tmp_path / "x.safetensors")
