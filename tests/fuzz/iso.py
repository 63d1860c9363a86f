"""AVIF and HEIC: sizes of boxes (0: to the end, 1: of 64 bits), boxes within boxes, and the numbers in them."""

import random
import struct

from tests.fuzz.changes import Number, other_number, other_parts

# Bytes between a box's head and the boxes in it.
CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"iinf": 6, b"iref": 4, b"dinf": 0, b"moov": 0, b"trak": 0}
LONGEST = 2000  # of a box whose every number is tried


def changed(data: bytes, draw: random.Random) -> bytes:
    """The file with one change."""
    boxes = boxes_of(data, 0, len(data))
    kind = draw.randrange(5)
    if kind == 0:
        return b"".join(other_parts([data[at:end] for at, end, depth in boxes if not depth], draw))
    if kind == 1:
        return other_number(data, [Number(at, ">I") for at, _, _ in boxes], draw)
    if kind == 2:  # the size in 64 bits
        at, end, _ = draw.choice(boxes)
        size = draw.choice((end - at, 0, 1, 15, 2**63, 2**64 - 1))
        return data[:at] + struct.pack(">I4sQ", 1, data[at + 4 : at + 8], size) + data[at + 8 :]
    if kind == 3:  # a box within itself
        at, end, _ = draw.choice(boxes)
        inner, name = data[at:end], data[at + 4 : at + 8]
        for _ in range(draw.choice((1, 2, 500))):
            content = bytes(CONTAINERS.get(name, 0)) + inner
            inner = struct.pack(">I", 8 + len(content)) + name + content
        return data[:at] + inner + data[end:]
    at, end, _ = draw.choice([box for box in boxes if 8 < box[1] - box[0] < LONGEST])
    code = draw.choice(("B", ">H", ">I"))
    last = end - struct.calcsize(code)
    return other_number(data, [Number(place, code) for place in range(at + 8, max(at + 8, last) + 1)], draw)


def boxes_of(data: bytes, at: int, end: int, depth: int = 0) -> list[tuple[int, int, int]]:
    """Start, end and depth of each box of a whole file."""
    found = []
    while at + 8 <= end:
        size = Number(at, ">I").of(data) or end - at
        found.append((at, at + size, depth))
        skipped = CONTAINERS.get(data[at + 4 : at + 8])
        if skipped is not None:
            found += boxes_of(data, at + 8 + skipped, at + size, depth + 1)
        at += max(8, size)
    return found
