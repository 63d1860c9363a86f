"""Walk a GIF's parts without decoding its pixels."""

from collections.abc import Iterator

MAX_FRAMES = 10_000
_MAX_BLOCKS = 1_000_000
_IMAGE, _EXTENSION, _END = 0x2C, 0x21, 0x3B
COMMENT, APPLICATION = 0x21FE, 0x21FF


def count_frames(data: bytes) -> int:
    """Return the number of images in a GIF, counted up to MAX_FRAMES, and within a million data blocks."""
    frames = 0
    for kind, _, _ in parts(data):
        frames += kind == _IMAGE
        if frames == MAX_FRAMES:
            break
    return max(1, frames)


def parts(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Each image or extension by its mark (with an extension's label as the second byte), and where its data blocks
    start and end; as far as a million blocks go."""
    at, left = 13 + _colours(data, 10), _MAX_BLOCKS
    while at < len(data) and left > 0:
        kind = data[at]
        if kind == _IMAGE:  # its place and size, its colours, the code size, its data
            at += 11 + _colours(data, at + 9)
        elif kind == _EXTENSION:
            kind = int.from_bytes(data[at : at + 2], "big")
            at += 2
        elif kind == _END:
            return
        else:  # decoders look for the next part byte by byte
            at, left = at + 1, left - 1
            continue
        start = at
        while at < len(data) and data[at] and left > 0:
            at, left = at + 1 + data[at], left - 1
        yield kind, start, at
        at += 1


def content(data: bytes, start: int, end: int) -> bytes:
    """The content of the data blocks from start to end."""
    blocks = []
    while start < end:
        blocks.append(data[start + 1 : start + 1 + data[start]])
        start += 1 + data[start]
    return b"".join(blocks)


def _colours(data: bytes, at: int) -> int:
    """Bytes of the colour table that the flags at this offset announce."""
    flags = data[at] if at < len(data) else 0
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0
