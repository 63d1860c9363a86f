"""Reduce a WebP to the chunks that its pixels need, so that damaged metadata cannot reject it (RFC 9649)."""

import struct

_PICTURE = (b"VP8 ", b"VP8L")
_NEEDED = frozenset((*_PICTURE, b"VP8X", b"ALPH", b"ANIM", b"ANMF"))


def pixels_only(data: bytes) -> bytes:
    """Return the WebP without metadata, stray bytes and what follows a still picture, and with its true length.

    The flags that announce metadata stay: decoders do not miss what they announce. A chunk that is cut short stays so.
    """
    kept: list[bytes | memoryview] = [b"WEBP"]
    view, at = memoryview(data), 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        end = at + 8 + length
        if kind in _NEEDED:
            kept.append(view[at:end])
            if length % 2 and end <= len(data):
                kept.append(b"\0")
        if kind in _PICTURE:
            break
        at = end + length % 2
    return b"".join((b"RIFF", struct.pack("<I", sum(map(len, kept))), *kept))
