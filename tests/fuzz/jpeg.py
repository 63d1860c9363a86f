"""JPEG: lengths, order and count of segments and scans, the frame's fields, and metadata in wrong parts."""

import random
import re
import struct

from tests.fuzz import tiff
from tests.fuzz.changes import Number, other_number, other_parts

SCAN = 0xDA
FRAMES = (0xC0, 0xC1, 0xC2)
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
LETTERS = struct.pack(">II", 0, 2**32 - 1)


def changed(data: bytes, draw: random.Random) -> bytes:
    """The JPEG with one change."""
    segments = segments_of(data)
    kind = draw.randrange(4)
    if kind == 0:
        segments = other_parts(segments, draw)
    elif kind == 1:
        place = draw.randrange(1, len(segments))
        new = added(draw)
        segments[place:place] = [new] * draw.choice((1, 2, 300))
    elif kind == 2:  # scans by the hundred, in whatever order
        scans = [segment for segment in segments if segment[1] == SCAN]
        segments[-1:-1] = draw.choices(scans, k=draw.choice((10, 95, 300)))
    else:
        place = draw.randrange(len(segments))
        numbers = [Number(2, ">H")] if len(segments[place]) > 4 else []
        if segments[place][1] in FRAMES:
            fields = len(segments[place]) - 9
            numbers += [Number(5, ">H"), Number(7, ">H"), *(Number(9 + number, "B") for number in range(fields))]
        elif numbers:
            numbers += [Number(at, "B") for at in range(4, min(12, len(segments[place])))]
        segments[place] = other_number(segments[place], numbers, draw) if numbers else b""
    return b"".join(segments)


def segments_of(data: bytes) -> list[bytes]:
    """The segments of a whole JPEG, each scan with its data."""
    found, at = [data[:2]], 2
    while at + 4 <= len(data):
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] == SCAN:
            following = MARKER.search(data, end)
            end = following.start() if following else len(data)
        found.append(data[at:end])
        at = end
        if data[at : at + 2] == b"\xff\xd9":
            break
    return [*found, data[at:]]


def segment(marker: int, content: bytes) -> bytes:
    """A segment with its length."""
    return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content


def added(draw: random.Random) -> bytes:
    """A segment that most files do not have."""
    one, other = (draw.choice((0, 1, 2, 255)) for _ in range(2))
    jumbf = b"JP" + struct.pack(">HII", one, other, draw.choice((0, 1, 8, 2**32 - 1))) + b"jumbc2pa"
    return draw.choice(
        (
            lambda: segment(0xDD, struct.pack(">H", draw.choice((0, 1, 65_535)))),
            lambda: segment(0xC4, draw.choice((b"", bytes(17), b"\0" + b"\xff" * 16))),
            lambda: segment(0xDB, draw.choice((b"", b"\0" + bytes(64), b"\x1f" + bytes(128)))),
            lambda: segment(0xE1, b"Exif\0\0" + tiff.changed(tiff.exif(), draw)[:60_000]),
            lambda: segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"xmp:CreatorTool" + b" " * 9000),
            lambda: segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 32 + LETTERS),
            lambda: segment(0xE2, b"ICC_PROFILE\0" + bytes((one, other)) + bytes(200)),
            lambda: segment(0xE2, b"MPF\0" + tiff.changed(tiff.exif(), draw)[:60_000]),
            lambda: segment(0xEB, jumbf),
            lambda: segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0" + LETTERS),
            lambda: segment(0xFE, draw.choice((b"", b"\0" * 60_000, b"Steps: 1" * 5000))),
        )
    )()
