"""WebP: sizes, order and padding of RIFF chunks, the flags of VP8X, and frames within frames."""

import random
import struct

from tests.fuzz import tiff
from tests.fuzz.changes import Number, other_number, other_parts


def changed(data: bytes, draw: random.Random) -> bytes:
    """The WebP with one change, and a length that fits unless that is what was changed."""
    chunks = chunks_of(data)
    kind = draw.randrange(5)
    if kind == 0:
        chunks = other_parts(chunks, draw)
    elif kind == 1:
        exif = tiff.changed(tiff.exif(), draw)
        new = draw.choice((chunk(b"EXIF", exif), chunk(b"XMP ", b"<x" * 9999), chunk(b"ICCP", bytes(9))))
        chunks.insert(draw.randrange(len(chunks) + 1), new)
    elif kind == 2:  # a frame within a frame within a frame
        place = draw.randrange(len(chunks))
        for _ in range(draw.choice((1, 2, 200))):
            chunks[place] = chunk(b"ANMF", bytes(16) + chunks[place])
    elif kind == 3:  # fields at the start of a chunk: of VP8X its flags and sides, of ANMF its place, of VP8 its sides
        place = draw.randrange(len(chunks))
        numbers = [Number(8 + at, "B") for at in range(min(24, len(chunks[place]) - 8))]
        chunks[place] = other_number(chunks[place], numbers, draw) if numbers else b""
    content = b"WEBP" + b"".join(chunks)
    found = b"RIFF" + struct.pack("<I", len(content)) + content
    if kind < 4:
        return found
    sizes, at = [Number(4, "<I")], 12
    for one in chunks:
        sizes.append(Number(at + 4, "<I"))
        at += len(one)
    return other_number(found, sizes, draw)


def chunks_of(data: bytes) -> list[bytes]:
    """The chunks of a whole WebP with their heads and padding."""
    found, at = [], 12
    while at + 8 <= len(data):
        size = Number(at + 4, "<I").of(data)
        found.append(data[at : at + 8 + size + size % 2])
        at += 8 + size + size % 2
    return found


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk with its size and padding."""
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
