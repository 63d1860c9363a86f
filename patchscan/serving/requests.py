"""Parse prediction requests: one image (raw, multipart field, or base64 in JSON), a tar or zip of images, crops as one
.npy array, or a request for the card. Anything else is a RequestError, so that the rest of the batch is answered."""

import base64
import io
import json
import re
import string
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchscan.detector.answer import MAX_CROPS
from patchscan.detector.images import Limits, decoded_bytes
from patchscan.detector.signatures import format_of

MAX_MEMBERS = 256
# Files, folders and links in a tar or zip: the directory of one may be larger than all that it lists.
MAX_ENTRIES = 4 * MAX_MEMBERS
MAX_MEMBERS_BYTES = 256 * 2**20
# Bytes of a tar's long names and other extended headers, and of those that hold for all that follows: Python copies
# the latter for each member.
MAX_TAR_HEADERS, MAX_TAR_GLOBAL_HEADERS = 2**20, 64 * 2**10
# Decoding this takes some seconds, so that even a batch of such requests ends before TorchServe kills the worker.
MAX_DECODED_BYTES = 2**30
# The quotes, colons, braces, brackets and commas of JSON, of which the largest request of texts (256 images) has 3,000.
MAX_JSON_MARKS = 20_000
MAX_JSON_UNICODE = 2**20
# Python before 3.11.10 and 3.12.6 searches extended headers in time quadratic in a run of digits (CVE-2024-6232). No
# name of a file is longer than this.
MAX_DIGITS = 255
NO_SPARSE = "a tar may not contain sparse files: make it without --sparse"
_EXTENDED_TAR_HEADERS = frozenset(
    (tarfile.XGLTYPE, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
TOO_MANY = f"a tar or zip may contain {MAX_MEMBERS} files and {MAX_MEMBERS_BYTES:,} bytes unpacked"


class RequestError(ValueError):
    """The request is malformed: answered with HTTP 400 and code `bad_request`."""


@dataclass(frozen=True)
class OneImage:
    """One encoded image, answered with one answer."""

    data: bytes


@dataclass(frozen=True)
class ManyImages:
    """The files of a tar or zip, answered with {"answers": [...]} in the same order, each with the file's `name`."""

    members: list[tuple[str, bytes]]


@dataclass(frozen=True)
class CutCrops:
    """Crops cut by the client, uint8 (images * count, size, size, 3), answered with {"logits": [...]}."""

    crops: np.ndarray


@dataclass(frozen=True)
class CardQuestion:
    """{"card": true}, answered with the model's card, so that a client can decode, crop and decide by itself."""


Request = OneImage | ManyImages | CutCrops | CardQuestion


def parse(row: dict[str, Any], limits: Limits, reckon: Callable[[bytes, Limits], int] = decoded_bytes) -> Request:
    """Parse one row of TorchServe's batch. Raises RequestError.

    The kind of body is recognised by its first bytes, because clients often send a wrong Content-Type. At most
    `limits.max_bytes` + 1 bytes of each file in a tar or zip are read; a longer file is `too_large` when decoded.
    `reckon` says how much memory decoding an image takes.
    """
    body = _body(row)
    if isinstance(body, dict):
        if body.get("card") is True:
            return CardQuestion()
        body = body.get("data")
    if isinstance(body, str):
        body = from_base64(body)
    if not isinstance(body, (bytes, bytearray)):
        raise RequestError('JSON must be {"data": "<base64 of the image>"} or {"card": true}')
    data = bytes(body)
    kind = _kind(data)
    if kind == "npy":
        return CutCrops(_read_npy(data))
    if kind == "zip":
        return ManyImages(list(_bounded(_zip_members(data, limits.max_bytes), limits, reckon)))
    if kind == "tar":
        return ManyImages(list(_bounded(_tar_members(data, limits.max_bytes), limits, reckon)))
    return OneImage(data)


def _body(row: dict[str, Any]) -> Any:
    """The body of a request, or of a form the one file: the gate unpacks forms, a TorchServe of its own does not, and
    does not tell files from texts."""
    fields = [value for name, value in row.items() if name != "headers"]
    if len(fields) > 1:
        files = [value for value in fields if isinstance(value, bytes | bytearray) and _kind(bytes(value))]
        if len(files) > 1:
            raise RequestError(f"the form holds {len(files)} files: send many images as a tar or zip")
        fields = files or fields
    return fields[0] if fields else b""


def _kind(data: bytes) -> str | None:
    """`npy`, `zip`, `tar` or an image's format; None for anything else."""
    if data.startswith(b"\x93NUMPY"):
        return "npy"
    if data.startswith(b"PK\x03\x04"):
        return "zip"
    # An image may carry these bytes in its metadata, and must get the row that a scan's own decoder would give it. A
    # tar whose header is right has no format.
    return format_of(data) or ("tar" if data[257:262] == b"ustar" else None)


def from_base64(text: str) -> bytes:
    """Decode an image in JSON: base64 or base64url (RFC 4648), with line breaks and padding or not, or a data: URL.
    Raises RequestError."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().replace(" ", "").endswith(";base64"):
            raise RequestError("the data: URL holds no base64")
    try:
        # Not text.split(): 45 MiB of short words would be a gigabyte of strings.
        plain = text.encode("ascii").translate(_URL_SAFE, string.whitespace.encode())
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except ValueError as error:
        raise RequestError(f"the image is not valid base64: {error}") from error


def read_json(data: bytes, numbers: int = 0) -> Any:
    """Read JSON of few values and long texts, and with `numbers` up to so many numbers and lists besides.

    What it holds is counted before Python makes objects of it: 45 MiB of empty lists take more than 1 GB, and no other
    thread runs meanwhile. Raises RequestError, also for text that is no JSON.
    """
    named = sum(map(data.count, (b"{", b":", b'"')))
    listed = data.count(b"[") + data.count(b",")
    if named > MAX_JSON_MARKS or listed > MAX_JSON_MARKS + numbers:
        raise RequestError("the JSON holds too many values; images and crops may be sent as bytes")
    if len(data) > MAX_JSON_UNICODE and not data.isascii():  # one such character makes four bytes of each other
        raise RequestError(f"JSON of more than {MAX_JSON_UNICODE:,} bytes must be ASCII, as base64 is")
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):
        raise RequestError("the body is not valid JSON in UTF-8") from None


def _read_npy(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # NumPy's header reader tokenizes the text and can raise any of the tokenizer's errors
        raise RequestError("the .npy header is damaged") from error
    pixels = data[file.tell() :]
    # The header may lie: the array is made from the bytes that were received, not allocated by the header's shape.
    fits = len(shape) == 4 and shape[3] == 3 and all(type(side) is int and side > 0 for side in shape)
    if dtype != np.uint8 or fortran or not fits or np.prod(shape, dtype=object) != len(pixels):
        raise RequestError("crops must be one C-ordered uint8 array (images * count, size, size, 3)")
    if shape[0] > MAX_CROPS:
        raise RequestError(f"{shape[0]:,} crops; a request may have {MAX_CROPS:,}")
    return np.frombuffer(pixels, dtype=np.uint8).reshape(shape)


def _zip_members(data: bytes, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    # zipfile reads the whole directory before it says how much there is. Each entry begins with these bytes.
    if data.count(b"PK\x01\x02") > MAX_ENTRIES:
        raise RequestError(TOO_MANY)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                # Of other methods zipfile unpacks all at once, whatever it is asked for: gigabytes from 1 KB of bzip2.
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise RequestError("the files of a zip must be stored or deflated, not packed in another way")
                if not info.is_dir():
                    with archive.open(info) as member:
                        yield info.filename, member.read(max_bytes + 1)
    except RequestError:
        raise
    except Exception as error:  # hostile directories raise more than BadZipFile
        raise RequestError("the zip is damaged or encrypted") from error


def _tar_members(data: bytes, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    # Such a file begins with a list of its parts, which tarfile reads to its end, however long.
    if b"GNU.sparse.major=" in data:
        raise RequestError(NO_SPARSE)
    try:
        file = _TarBytes(data)
        # Of a name that is not UTF-8, Python's own way makes half characters, which parsers of JSON refuse.
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as archive:
            for count, info in enumerate(archive, start=1):
                if count > MAX_ENTRIES:
                    raise RequestError(TOO_MANY)
                member = archive.extractfile(info) if info.isfile() else None
                if member is not None:
                    with file.contents():
                        content = member.read(max_bytes + 1)
                    yield info.name, content
    except RequestError:
        raise
    except Exception as error:  # hostile headers raise more than TarError
        raise RequestError("the tar is damaged") from error


class _TarBytes(io.BytesIO):
    """The bytes of a tar, which looks at each header that is read before tarfile does.

    Reading raises RequestError for a sparse file, for extended headers that are too long together, and for one with too
    many digits in a row. tarfile's own methods to read a header cannot be overridden: from Python 3.13.5 on it does not
    call them.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._headers, self._extended_is_next = True, False
        self._extended = self._shared = 0

    @contextmanager
    def contents(self) -> Iterator[None]:
        """Within this context, a file's contents are read and no headers."""
        self._headers = False
        yield
        self._headers = True

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self._extended_is_next:
            self._extended_is_next = False
            if any(len(run.group()) > MAX_DIGITS for run in re.finditer(rb"\d+", data)):
                raise RequestError("the headers of the tar are damaged")
        elif self._headers and len(data) == tarfile.BLOCKSIZE:
            self._look_at_header(data)
        return data

    def _look_at_header(self, header: bytes) -> None:
        """Type and size are where POSIX's ustar has them."""
        kind = header[156:157]
        if kind == tarfile.GNUTYPE_SPARSE:
            raise RequestError(NO_SPARSE)
        if kind not in _EXTENDED_TAR_HEADERS:
            return
        self._extended_is_next = True
        size = max(0, tarfile.nti(header[124:136]))  # type: ignore[attr-defined]  # not in typeshed
        self._extended += size
        self._shared += size if kind == tarfile.XGLTYPE else 0
        if self._extended > MAX_TAR_HEADERS or self._shared > MAX_TAR_GLOBAL_HEADERS:
            raise RequestError("the headers of the tar are too long")


def _bounded(
    members: Iterator[tuple[str, bytes]], limits: Limits, reckon: Callable[[bytes, Limits], int]
) -> Iterator[tuple[str, bytes]]:
    total = decoded = 0
    for count, (name, data) in enumerate(members, start=1):
        total += len(data)
        if count > MAX_MEMBERS or total > MAX_MEMBERS_BYTES:
            raise RequestError(TOO_MANY)
        decoded += reckon(data, limits)
        if decoded > MAX_DECODED_BYTES:
            raise RequestError(f"the images of a tar or zip may take {MAX_DECODED_BYTES:,} bytes decoded")
        yield name, data
