"""GIF: lengths of data blocks, code sizes, places of frames, colour tables, and frames by the thousand."""

import random

from tests.fuzz.changes import Number, other_number, other_parts


def changed(data: bytes, draw: random.Random) -> bytes:
    """The GIF with one change."""
    blocks, numbers = blocks_of(data)
    if draw.random() < 0.4:
        return b"".join(other_parts(blocks, draw))
    if draw.random() < 0.2:
        long = b"\x21\xfe" + (b"\xff" + b"\0" * 255) * draw.choice((1, 100, 4000)) + draw.choice((b"\0", b""))
        blocks.insert(draw.randrange(1, len(blocks) + 1), long)
        return b"".join(blocks)
    return other_number(data, numbers, draw)


def blocks_of(data: bytes) -> tuple[list[bytes], list[Number]]:
    """The head, frames and extensions of a whole GIF, and the numbers in them."""
    at = 13 + colours(data[10])
    blocks, numbers = [data[:at]], [Number(6, "<H"), Number(8, "<H"), Number(10, "B"), Number(11, "B")]
    while data[at] != 0x3B:
        start = at
        if data[at] == 0x2C:
            numbers += [Number(at + 1 + 2 * field, "<H") for field in range(4)] + [Number(at + 9, "B")]
            at += 10 + colours(data[at + 9])
            numbers.append(Number(at, "B"))  # the code size
            at += 1
        else:
            at += 2
        while data[at]:
            numbers.append(Number(at, "B"))
            at += 1 + data[at]
        numbers.append(Number(at, "B"))
        at += 1
        blocks.append(data[start:at])
    return [*blocks, data[at:]], numbers


def colours(flags: int) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0
