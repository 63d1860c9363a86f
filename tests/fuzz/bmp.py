"""BMP: every field of its header, headers of other lengths, heights below zero, masks and run lengths."""

import random
import struct

from tests.fuzz.changes import Number, other_number

FIELDS = [Number(at, "<I") for at in (2, 10, 14, 18, 22, 30, 34, 46, 50)] + [Number(26, "<H"), Number(28, "<H")]
HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)


def changed(data: bytes, draw: random.Random) -> bytes:
    """The BMP with one change."""
    kind = draw.randrange(4)
    if kind == 0:
        return Number(14, "<I").put(data, draw.choice(HEADERS))
    if kind == 1:
        return Number(22, "<I").put(data, -draw.choice((1, 8, Number(22, "<I").of(data), 2**31)))
    if kind == 2:
        packed, depth = draw.choice(((1, 8), (2, 4), (3, 16), (3, 32), (6, 32), (4, 0), (5, 0)))
        masks = struct.pack("<4I", *(draw.choice((0, 0xFF, 0xFF00, 0x7C00, 0xFFFFFFFF)) for _ in range(4)))
        return Number(28, "<H").put(Number(30, "<I").put(data, packed), depth)[:54] + masks + data[54:]
    return other_number(data, FIELDS, draw)
