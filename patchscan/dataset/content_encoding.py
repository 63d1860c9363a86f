"""Unpack objects that are stored with a Content-Encoding (gzip, deflate, br, zstd), as a browser does to show them."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from patchscan.detector.decoders import Hold, hold_nothing
from patchscan.detector.images import ErrorCode, ImageError
from patchscan.detector.signatures import format_of
from patchscan.storage.store import FetchedObject, encodings

CHUNK = 64 * 2**10
ZLIB_NAMES = ("gzip", "x-gzip", "deflate")
# zlib's numbers for gzip's format or its own, by how the data begins, and for deflate without either.
GZIP_OR_ZLIB, RAW_DEFLATE = 47, -15
ARROW_CODECS = {"br": "brotli", "zstd": "zstd"}


@contextmanager
def unpacked(fetched: FetchedObject, limit: int, hold: Hold = hold_nothing) -> Iterator[bytes]:
    """Yield the bytes of a fetched object, unpacked where it is stored packed: at most `limit` + 1. An object that is
    larger as it is stored is not unpacked. `hold` is entered with the number of unpacked bytes meanwhile. Raises
    ImageError as `unpack` does."""
    if not fetched.encoding or len(fetched.data) > limit:
        yield fetched.data
        return
    with hold(unpacked_size(fetched.data, fetched.encoding, limit)):
        yield unpack(fetched.data, fetched.encoding, limit)


def unpacked_size(data: bytes, encoding: str | None, limit: int) -> int:
    """Return the number of bytes that `unpack` returns, without holding them."""
    return sum(map(len, _chunks(data, encoding, limit)))


def unpack(data: bytes, encoding: str | None, limit: int) -> bytes:
    """Return an object's bytes as a browser shows them, given as they are stored with the header Content-Encoding; cut
    after `limit` + 1 bytes. Of data that is cut short what is there is returned.

    As in a browser, a name that is no encoding means nothing. Such headers are often wrong: bytes that are not packed,
    but are an image, are returned as they are, and gzip and zlib are told apart by how the data begins. Raises
    ImageError: `unsupported_format` for several encodings one over the other, `truncated` for damaged data.
    """
    return b"".join(_chunks(data, encoding, limit))


def _chunks(data: bytes, encoding: str | None, limit: int) -> Iterator[bytes]:
    left = limit + 1
    for chunk in _all_chunks(data, _name(encoding)):
        yield chunk[:left]
        left -= len(chunk)
        if left <= 0:
            return


def _name(encoding: str | None) -> str:
    """The name of the one encoding that the header states; empty where there is none to undo."""
    names = encodings(encoding)
    if len(names) > 1:
        raise ImageError(
            ErrorCode.UNSUPPORTED_FORMAT, f"stored with several encodings ({', '.join(names)}); one can be undone"
        )
    return names[0] if names and (names[0] in ZLIB_NAMES or names[0] in ARROW_CODECS) else ""


def _all_chunks(data: bytes, name: str) -> Iterator[bytes]:
    if not name or not data:
        yield data
        return
    packed = _arrow_chunks(data, ARROW_CODECS[name]) if name in ARROW_CODECS else _zlib_chunks(data, name)
    begun = False
    try:
        for chunk in packed:
            yield chunk
            begun = begun or bool(chunk)
    except (zlib.error, OSError, pa.ArrowException):
        if begun or format_of(data) is None:
            raise ImageError(ErrorCode.TRUNCATED, f"the data of its Content-Encoding {name} is damaged") from None
        yield data


def _zlib_chunks(data: bytes, name: str) -> Iterator[bytes]:
    # Raw data is what some servers always meant by deflate; browsers take both.
    raw = name == "deflate" and not data.startswith(b"\x1f\x8b") and not _has_zlib_header(data)
    bits = RAW_DEFLATE if raw else GZIP_OR_ZLIB
    engine, complete = zlib.decompressobj(bits), False
    for start in range(0, len(data), CHUNK):
        packed = data[start : start + CHUNK]
        while packed:
            try:
                yield engine.decompress(packed, CHUNK)
            except zlib.error:
                if complete:
                    return  # something follows that is not another member of a gzip file
                raise
            packed = engine.unconsumed_tail
            if engine.eof:
                packed, engine, complete = engine.unused_data, zlib.decompressobj(bits), True
    yield engine.flush()


def _has_zlib_header(data: bytes) -> bool:
    return len(data) > 1 and data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0


def _arrow_chunks(data: bytes, codec: str) -> Iterator[bytes]:
    with pa.input_stream(pa.py_buffer(data), compression=codec) as stream:
        while chunk := stream.read(CHUNK):
            yield chunk
