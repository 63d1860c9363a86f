"""What a prediction request may hold: one image (raw, multipart field, or base64 in JSON), a tar or zip of images,
pre-cut crops as one .npy array, or the question for the card. Anything else is a RequestError, never a lost batch."""

import base64
import io
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchscan.detector.images import Limits, decoded_bytes

MAX_MEMBERS = 256
MAX_MEMBERS_BYTES = 256 * 2**20
# Some seconds of decoding: less than TorchServe waits before it kills the worker, even for a batch of such requests.
MAX_DECODED_BYTES = 2**30


class RequestError(ValueError):
    """The request itself is malformed: HTTP 400 with code `bad_request`."""


@dataclass(frozen=True)
class OneImage:
    """One encoded image: one answer."""

    data: bytes


@dataclass(frozen=True)
class ManyImages:
    """The files of a tar or zip, in its order: {"answers": [...]}, each with the member's `name`."""

    members: list[tuple[str, bytes]]


@dataclass(frozen=True)
class CutCrops:
    """Crops that the client chose: uint8 (images * count, size, size, 3), answered with {"logits": [...]}."""

    crops: np.ndarray


@dataclass(frozen=True)
class CardQuestion:
    """{"card": true}: answered with the model's card, so that a client can decode, cut and decide by itself."""


Request = OneImage | ManyImages | CutCrops | CardQuestion


def parse(row: dict[str, Any], limits: Limits) -> Request:
    """One row of TorchServe's batch to what it asks for.

    The body is told by its first bytes, not by a header a client may have wrong. Members of a tar or zip are read up
    to `limits.max_bytes` + 1 each (more is `too_large` when decoded). Raises RequestError.
    """
    body = row.get("body", row.get("data"))
    if body is None:  # multipart under another field name: the form's first field
        body = next((value for key, value in row.items() if key != "headers"), b"")
    if isinstance(body, dict):
        if body.get("card") is True:
            return CardQuestion()
        body = body.get("data")
    if isinstance(body, str):
        body = _from_base64(body)
    if not isinstance(body, (bytes, bytearray)):
        raise RequestError('JSON must be {"data": "<base64 of the image>"} or {"card": true}')
    data = bytes(body)
    if data.startswith(b"\x93NUMPY"):
        return CutCrops(_read_npy(data))
    if data.startswith(b"PK\x03\x04"):
        return ManyImages(list(_bounded(_zip_members(data, limits.max_bytes), limits)))
    if data[257:262] == b"ustar":
        return ManyImages(list(_bounded(_tar_members(data, limits.max_bytes), limits)))
    return OneImage(data)


def _from_base64(text: str) -> bytes:
    text = text.partition("base64,")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(f"the image is not valid base64: {error}") from error


def _read_npy(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # NumPy's header reader tokenizes the text, and lets whatever that raises through
        raise RequestError("the .npy header is damaged") from error
    pixels = data[file.tell() :]
    # The header is only a claim: the array is made from the bytes that came, never from the size it promises.
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or np.prod(shape, dtype=object) != len(pixels):
        raise RequestError("crops must be one C-ordered uint8 array (images * count, size, size, 3)")
    return np.frombuffer(pixels, dtype=np.uint8).reshape(shape)


def _zip_members(data: bytes, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as member:
                        yield info.filename, member.read(max_bytes + 1)
    except Exception as error:  # each compression has errors of its own, which share no base
        raise RequestError("the zip is damaged, encrypted or of an unknown compression") from error


def _tar_members(data: bytes, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for info in archive:
                member = archive.extractfile(info) if info.isfile() else None
                if member is not None:
                    yield info.name, member.read(max_bytes + 1)
    except Exception as error:  # hostile headers get past TarError
        raise RequestError("the tar is damaged") from error


def _bounded(members: Iterator[tuple[str, bytes]], limits: Limits) -> Iterator[tuple[str, bytes]]:
    total = decoded = 0
    for count, (name, data) in enumerate(members, start=1):
        total += len(data)
        if count > MAX_MEMBERS or total > MAX_MEMBERS_BYTES:
            raise RequestError(f"a tar or zip may hold {MAX_MEMBERS} files and {MAX_MEMBERS_BYTES:,} bytes unpacked")
        decoded += decoded_bytes(data, limits)
        if decoded > MAX_DECODED_BYTES:
            raise RequestError(f"the images of a tar or zip may take {MAX_DECODED_BYTES:,} bytes decoded, 4 a pixel")
        yield name, data
