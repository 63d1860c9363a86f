"""Any body becomes a request or a RequestError: a client can never make the handler raise."""

import base64
import contextlib
import io
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from patchscan.detector.answer import MAX_CROPS
from patchscan.detector.images import ErrorCode, ImageError, Limits, decode
from patchscan.serving.forms import file_of_form
from patchscan.serving.requests import (
    MAX_ENTRIES,
    MAX_MEMBERS,
    CardQuestion,
    CutCrops,
    ManyImages,
    OneImage,
    RequestError,
    from_base64,
    parse,
)
from tests.serving_kit import png, tar_of, zip_of

LIMIT = Limits(max_bytes=1000)


def npy_of(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


CROPS = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner), max_leaves=5
)


@given(data=st.binary(max_size=400))
def test_bytes_of_any_kind(data: bytes) -> None:
    try:
        request = parse({"body": bytearray(data)}, LIMIT)
    except RequestError:
        return
    assert isinstance(request, (OneImage, ManyImages, CutCrops))


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(body=JSON | st.fixed_dictionaries({"data": JSON | st.text()}))
def test_json_of_any_kind(body: Any) -> None:
    with contextlib.suppress(RequestError):
        parse({"body": body}, LIMIT)


@settings(max_examples=200)
@given(
    which=st.sampled_from([zip_of({"a.png": b"x" * 50, "b.png": b"y" * 50}), tar_of({"a": b"x" * 50}), npy_of(CROPS)]),
    place=st.floats(0, 1),
    value=st.integers(0, 255),
    keep=st.floats(0.1, 1),
)
def test_damaged_containers(which: bytes, place: float, value: int, keep: float) -> None:
    damaged = bytearray(which[: max(1, int(len(which) * keep))])
    damaged[int(place * (len(damaged) - 1))] = value
    with contextlib.suppress(RequestError):
        parse({"body": damaged}, LIMIT)


WORDS = [
    "filename",
    "boundary",
    "name",
    "*",
    "*0",
    "=",
    "''",
    "idna",
    "undefined",
    "%ff",
    '"',
    "; ",
    "\u00e9",
    "\udcff",
    "=?",
]
PARAMETERS = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


@settings(max_examples=200)
@given(
    kind=st.sampled_from(["multipart/form-data; boundary=xx; ", "multipart/form-data; boundary*=undefined''"]),
    of_form=PARAMETERS,
    of_part=st.sampled_from(["filename*=undefined''", "filename=", "\r\nContent-Encoding: ", ""]),
    rest=PARAMETERS,
)
def test_forms_of_any_headers(kind: str, of_form: str, of_part: str, rest: str) -> None:
    head = f"--xx\r\nContent-Disposition: form-data; {of_part}{rest}".encode("utf-8", "surrogateescape")
    with contextlib.suppress(RequestError):
        assert file_of_form(kind + of_form, head + b"\r\n\r\nimage\r\n--xx--") == b"image"


def test_what_each_body_means() -> None:
    text = base64.b64encode(b"image").decode()
    assert parse({"body": b"image"}, LIMIT) == OneImage(b"image")
    assert parse({"data": b"image"}, LIMIT) == OneImage(b"image")
    assert parse({"photo": b"image", "headers": {}}, LIMIT) == OneImage(b"image")
    assert parse({"body": {"data": text}}, LIMIT) == OneImage(b"image")
    assert parse({"body": {"data": f"data:image/png;base64,{text}"}}, LIMIT) == OneImage(b"image")
    for broken in (base64.encodebytes(bytes(200)).decode(), text[:4] + "\r\n" + text[4:] + "\n", f" {text}\t"):
        assert isinstance(parse({"body": {"data": broken}}, LIMIT), OneImage)
    assert parse({"body": {"card": True}}, LIMIT) == CardQuestion()
    assert parse({}, LIMIT) == OneImage(b"")
    members = {"x/1.png": b"one", "2.png": b"two"}
    assert parse({"body": zip_of(members)}, LIMIT) == ManyImages(list(members.items()))
    assert parse({"body": tar_of(members)}, LIMIT) == ManyImages(list(members.items()))
    crops = parse({"body": npy_of(CROPS)}, LIMIT)
    assert isinstance(crops, CutCrops)
    assert np.array_equal(crops.crops, CROPS)


@pytest.mark.parametrize(
    "head", ["data:image/png;base64", "DATA:image/png;BASE64", "data:;charset=x;base64", "data:image/png; base64"]
)
def test_a_data_url_is_its_base64(head: str) -> None:
    assert from_base64(f"{head},{base64.b64encode(b'image').decode()}") == b"image"


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("cut", ["", "="])
def test_base64_of_any_client_is_read(encode: Callable[[bytes], bytes], cut: str) -> None:
    """Java and Go have encoders for URLs, and such as leave out the padding."""
    for data in (bytes(range(256)), bytes(range(255)), b"\xff\xfe"):
        assert from_base64(encode(data).decode().rstrip(cut)) == data


@pytest.mark.parametrize(
    "text", ["data:image/svg+xml,%3Csvg/%3E", "data:image/png;base64", "data:,", "aW1hZ", "aW1h=Z2U", "?"]
)
def test_a_text_that_is_no_base64_is_refused_and_no_image(text: str) -> None:
    with pytest.raises(RequestError, match="base64"):
        from_base64(text)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "TGA", "ICO", "PPM"])
def test_an_image_with_the_mark_of_a_tar_is_an_image(kind: str) -> None:
    file = io.BytesIO()
    Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)).save(file, kind)
    image = bytearray(file.getvalue().ljust(600, b"\0"))
    image[257:262] = b"ustar"
    assert parse({"body": bytes(image)}, Limits()) == OneImage(bytes(image))


@pytest.mark.parametrize(
    "name", [
        "BMW.jpg", "BM", "P1010123.JPG", "GIF.gif", "II.png", "RIFF.webp", "xx-ftyp.heic", "<b>", "P1 kitchen.jpg",
        "P5 beach.png", "qoif.png", "icns/1.png", "GIF89a.gif", "GIF87a/1.gif", "8BPS", "%PDF-1.pdf", "<svg>", "II*",
    ],
)  # fmt: skip
def test_a_tar_whose_first_name_begins_like_an_image_is_a_tar(name: str) -> None:
    tar = tar_of({name: b"one"})
    assert parse({"body": tar}, LIMIT) == ManyImages([(name, b"one")])
    with pytest.raises(ImageError) as caught:  # as the scan that finds one in a bucket says
        decode(tar)
    assert caught.value.code == ErrorCode.NOT_AN_IMAGE


def test_a_name_that_is_not_utf_8_is_one_that_json_holds() -> None:
    asked = parse({"body": tar_of({"a\udcff.png": b"one", "\u00fc.png": b"two"})}, LIMIT)
    assert asked == ManyImages([("a\\xff.png", b"one"), ("\u00fc.png", b"two")])


def test_a_member_is_read_no_further_than_its_limit() -> None:
    for body in (zip_of({"a": bytes(10**6)}), tar_of({"a": bytes(10**6)})):
        request = parse({"body": body}, LIMIT)
        assert isinstance(request, ManyImages)
        assert len(request.members[0][1]) == LIMIT.max_bytes + 1


def test_too_many_members_are_refused() -> None:
    with pytest.raises(RequestError, match=f"{MAX_MEMBERS} files"):
        parse({"body": zip_of({str(number): b"" for number in range(MAX_MEMBERS + 1)})}, LIMIT)


def test_a_form_that_nobody_unpacked_is_its_file() -> None:
    image, other = png(1), tar_of({"a": b"one"})
    for row in ({"note": b"a text", "photo": image}, {"photo": image, "note": "a text", "headers": {}}):
        assert parse(row, Limits()) == OneImage(image)
    assert parse({"note": b"a text", "body": bytearray(other)}, Limits()) == ManyImages([("a", b"one")])
    with pytest.raises(RequestError, match="2 files"):
        parse({"one": image, "two": other}, Limits())


def directory_of(entries: int) -> bytes:
    """A zip that is all directory: its entries name files that are not there."""
    name = b"a.png"
    entry = (
        b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0) + name
    )
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, entries & 0xFFFF, entries & 0xFFFF, entries * len(entry), 30, 0)
    return b"PK\3\4" + bytes(26) + entry * entries + end


def test_a_zip_with_a_huge_directory_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    huge, small = directory_of(600_000), directory_of(3)
    with zipfile.ZipFile(io.BytesIO(small)) as archive:
        assert len(archive.infolist()) == 3, "it is no zip at all"
    monkeypatch.delattr(zipfile, "ZipFile")
    with pytest.raises(RequestError, match=f"{MAX_MEMBERS} files"):
        parse({"body": huge}, Limits())


def test_a_tar_of_folders_without_end_is_refused() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(MAX_ENTRIES + 1):
            folder = tarfile.TarInfo(f"{number}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
    with pytest.raises(RequestError, match=f"{MAX_MEMBERS} files"):
        parse({"body": file.getvalue()}, Limits())


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_digits_in_a_header_of_a_tar_do_not_take_long(kind: bytes) -> None:
    """Some versions of Python took 20 s for half a megabyte of them."""
    header, file = tarfile.TarInfo("header"), io.BytesIO()
    header.type, header.size = kind, 60_000
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(header, io.BytesIO(b"1" * header.size))
    started = time.process_time()
    with pytest.raises(RequestError, match="the headers of the tar are damaged"):
        parse({"body": file.getvalue() + tar_of({"a": b"one"})}, Limits())
    assert time.process_time() - started < 0.1


def test_names_of_digits_are_read() -> None:
    name = "1" * 250
    assert parse({"body": tar_of({name: b"one"})}, Limits()) == ManyImages([(name, b"one")])


def test_more_crops_than_a_worker_has_time_for_are_refused() -> None:
    assert isinstance(parse({"body": npy_of(np.zeros((MAX_CROPS, 8, 8, 3), np.uint8))}, Limits()), CutCrops)
    with pytest.raises(RequestError, match="15,000 crops"):
        parse({"body": npy_of(np.zeros((15_000, 8, 8, 3), np.uint8))}, Limits())


def test_small_files_of_many_pixels_are_refused_before_they_are_decoded() -> None:
    huge, file = Image.new("L", (8000, 8000)), io.BytesIO()
    huge.save(file, "PNG", compress_level=1)
    members = {str(number): file.getvalue() for number in range(3)}
    assert isinstance(parse({"body": zip_of(dict(list(members.items())[:2]))}, Limits()), ManyImages)
    with pytest.raises(RequestError, match="decoded"):
        parse({"body": zip_of(members)}, Limits())
    over = Limits(max_pixels=1_000_000)  # each is refused by itself, and costs its neighbours nothing
    assert isinstance(parse({"body": zip_of(members)}, over), ManyImages)


@pytest.mark.parametrize("array", [CROPS.astype(np.float32), CROPS[0], CROPS[..., :2], np.asfortranarray(CROPS)])
def test_arrays_that_are_no_crops_are_refused(array: np.ndarray) -> None:
    with pytest.raises(RequestError, match="C-ordered uint8"):
        parse({"body": npy_of(array)}, LIMIT)
