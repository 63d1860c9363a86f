"""Count a GIF's frames without decoding them."""

MAX_FRAMES = 10_000
_MAX_BLOCKS = 1_000_000


def count_frames(data: bytes) -> int:
    """Return the number of images in a GIF, counted up to MAX_FRAMES, and within a million data blocks."""
    at, frames, blocks = 13 + _colours(data, 10), 0, 0
    while at < len(data) and frames < MAX_FRAMES and blocks < _MAX_BLOCKS:
        if data[at] == 0x2C:  # an image: its place and size, its colours, the code size, its data
            frames += 1
            at += 11 + _colours(data, at + 9)
        elif data[at] == 0x21:
            at += 2
        elif data[at] == 0x3B:
            break
        else:  # decoders look for the next block byte by byte
            at, blocks = at + 1, blocks + 1
            continue
        while at < len(data) and data[at] and blocks < _MAX_BLOCKS:
            at, blocks = at + 1 + data[at], blocks + 1
        at += 1
    return max(1, frames)


def _colours(data: bytes, at: int) -> int:
    """Bytes of the colour table that the flags at this offset announce."""
    flags = data[at] if at < len(data) else 0
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0
