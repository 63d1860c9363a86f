"""Reduce a WebP to the chunks that its pixels need, so that damaged metadata cannot reject it (RFC 9649)."""

import struct
from collections.abc import Iterator

_PICTURE = (b"VP8 ", b"VP8L")
_NEEDED = frozenset((*_PICTURE, b"VP8X", b"ALPH", b"ANIM", b"ANMF"))


def pixels_only(data: bytes) -> bytes:
    """Return the WebP without metadata, stray bytes and what follows a still picture, and with its true length.

    The flags that announce metadata stay: decoders do not miss what they announce. A chunk that is cut short stays so.
    """
    kept: list[bytes | memoryview] = [b"WEBP"]
    view, at, start = memoryview(data), 12, 12  # of the chunks from `start` to `at` all are needed
    for kind, begin, at in chunks(data):
        if kind not in _NEEDED:
            kept.append(view[start:begin])
            start = at
        if kind in _PICTURE:
            break
    kept.append(view[start:at])
    if start < at == len(data) + 1 and data[begin + 4] % 2:
        kept.append(b"\0")  # the last byte, which makes a chunk's length even, is often left out
    return b"".join((b"RIFF", struct.pack("<I", sum(map(len, kept))), *kept))


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk by the stated lengths, with the byte that makes it even; its content begins 8
    bytes after its start."""
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        end = at + 8 + length + length % 2
        yield kind, at, end
        at = end
