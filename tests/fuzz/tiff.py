"""TIFF, BigTIFF and EXIF: directories that loop, nest or point outside, and entries that disagree."""

import random
import struct
from dataclasses import dataclass, field

from PIL import Image

from tests.fuzz.changes import Number, other_number

SUBDIRECTORIES = (0x014A, 0x8769, 0x8825, 0xA005)  # SubIFDs, EXIF, GPS, interoperability


@dataclass
class Layout:
    """Where the numbers of a TIFF are."""

    pointers: list[Number] = field(default_factory=list)
    directories: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)


def exif() -> bytes:
    """A small EXIF block, as it lies in all formats."""
    made = Image.Exif()
    made[0x010E], made[0x0131] = "a house", "camera 1"
    made.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a comment that is longer than four bytes"
    return made.tobytes().removeprefix(b"Exif\0\0")


def changed(data: bytes, draw: random.Random) -> bytes:
    """The TIFF with one change."""
    layout, order, big = layout_of(data), "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    kind = draw.randrange(5)
    if kind == 0:  # a loop, or a directory within itself
        return draw.choice(layout.pointers).put(data, draw.choice((*layout.directories, *layout.entries)))
    if kind == 1:  # an entry becomes a subdirectory
        entry, code = draw.choice(layout.entries), "HHQQ" if big else "HHII"
        named = (draw.choice(SUBDIRECTORIES), draw.choice((4, 13, 1)), draw.choice((1, 3, 2**20)))
        at = draw.choice(layout.directories)
        return put(data, entry, struct.pack(order + code, *named, at))
    if kind == 2:  # two entries swap all but their tags: counts of strips and of their sizes disagree
        size = 20 if big else 12
        one, other = draw.choice(layout.entries), draw.choice(layout.entries)
        return put(put(data, one + 2, data[other + 2 : other + size]), other + 2, data[one + 2 : one + size])
    if kind == 3:  # a chain that is long, or has a loop at its end
        return chained(data, layout, order, big, draw)
    return other_number(data, layout.numbers + layout.pointers, draw)


def put(data: bytes, at: int, other: bytes) -> bytes:
    """The bytes with others in their place."""
    return data[:at] + other + data[at + len(other) :]


def chained(data: bytes, layout: Layout, order: str, big: bool, draw: random.Random) -> bytes:
    """The TIFF with thousands of directories, of one entry or none, after its first."""
    data += bytes(len(data) % 2)
    count, offset = ("Q", "Q") if big else ("H", "I")
    entry = data[layout.entries[0] :][: 20 if big else 12] if draw.random() < 0.5 else b""
    head = struct.pack(order + count, 1 if entry else 0) + entry
    size, times, found = len(head) + struct.calcsize(offset), draw.choice((2, 100, 20_000)), []
    for number in range(1, times + 1):
        following = len(data) + size * number if number < times else draw.choice((0, len(data), layout.directories[0]))
        found.append(head + struct.pack(order + offset, following))
    return layout.pointers[draw.choice((0, -1))].put(data, len(data)) + b"".join(found)


def layout_of(data: bytes) -> Layout:
    """Walk a whole TIFF: the chain of its directories, and those within them."""
    order, big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    count, offset, head, size = ("Q", "Q", "HHQ", 20) if big else ("H", "I", "HHI", 12)
    found = Layout(pointers=[Number(8 if big else 4, order + offset)])
    left = [found.pointers[0].of(data)]
    while left:
        at = left.pop()
        if not at or at in found.directories:
            continue
        found.directories.append(at)
        entries = Number(at, order + count)
        found.numbers.append(entries)
        at += struct.calcsize(count)
        for _ in range(entries.of(data)):
            found.entries.append(at)
            value = at + struct.calcsize("=" + head)
            found.numbers += [Number(at, order + "H"), Number(at + 2, order + "H"), Number(at + 4, order + offset)]
            found.numbers.append(Number(value, order + offset))
            if found.numbers[-4].of(data) in SUBDIRECTORIES:
                found.pointers.append(found.numbers[-1])
                left.append(found.numbers[-1].of(data))
            at += size
        found.pointers.append(Number(at, order + offset))
        left.append(found.pointers[-1].of(data))
    return found
