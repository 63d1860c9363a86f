"""Reduce a PNG to the chunks that its pixels need, so that damaged or huge texts and profiles cannot reject it."""

import struct
import zlib
from collections.abc import Iterator

_PALETTE_COLOURS = b"\3"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Of Adam7, and of a PNG without: the first pixel, and the steps between pixels.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_ONE_PASS = ((0, 0, 1, 1),)
_PIECE = 2**16


def pixels_only(data: bytes) -> tuple[bytes, int]:
    """Return the PNG without its ancillary chunks, and the number of frames that its animation control announces.

    The chunks' first letter says whether the pixels need them (PNG specification, 5.4). What cannot be followed is kept
    before the pixels and dropped after them, where it is no chunk. Transparency is dropped, as `decode` drops it, and a
    palette that the pixels do not point into.
    """
    needs_palette = True
    kept, start, stop = [data[:8]], 8, 8  # of the chunks from `start` to `stop` all are needed
    frames, pixels_begun, first_is_animated = 0, False, False
    for kind, at, end in chunks(data):
        if not kind.isalpha():
            stop = at if pixels_begun else len(data)
            break
        stop = end
        if kind == b"IHDR":
            needs_palette = data[at + 17 : at + 18] == _PALETTE_COLOURS
        if kind[0] & 0x20 or (kind == b"PLTE" and not needs_palette):
            kept.append(data[start:at])
            start = end
            if not pixels_begun and kind == b"acTL" and end - at >= 20 and _is_intact(data, at, end):
                frames = int(struct.unpack_from(">I", data, at + 8)[0])
            elif not pixels_begun and kind == b"fcTL":
                first_is_animated = True
        pixels_begun = pixels_begun or kind == b"IDAT"
        if kind == b"IEND":
            break
    kept.append(data[start:stop])
    # An image before the animation is shown by programs that know no animations, and counts as a frame.
    return b"".join(kept), 1 if not 0 < frames <= 2**31 else frames + (not first_is_animated)


def without_checksum(data: bytes) -> bytes | None:
    """Return the PNG without the last four bytes of its packed pixels: their Adler-32, which decoders can do without
    and some writers get wrong. None where the CRCs say that a chunk of them is damaged, or there is none."""
    pixels = [(at, end) for kind, at, end in chunks(data) if kind == b"IDAT"]
    if not pixels or not all(_is_intact(data, at, end) for at, end in pixels):
        return None
    packed = b"IDAT" + b"".join(data[at + 8 : end - 4] for at, end in pixels)[:-4]
    chunk = struct.pack(">I", len(packed) - 4) + packed + struct.pack(">I", zlib.crc32(packed))
    return data[: pixels[0][0]] + chunk + data[pixels[-1][1] :]


def has_all_rows(data: bytes) -> bool:
    """Whether the packed pixels are as many as the header asks for. Pillow leaves those black that are missing."""
    left, unpacker = _unpacked_bytes(data), zlib.decompressobj()
    for packed in (data[at + 8 : end - 4] for kind, at, end in chunks(data) if kind == b"IDAT"):
        rest, unpacked = packed, b""
        while left > 0 and (rest or len(unpacked) == _PIECE):
            try:
                unpacked = unpacker.decompress(rest, _PIECE)
            except zlib.error:  # in the checksum: of other damage the decoder tells
                return False
            rest, left = unpacker.unconsumed_tail, left - len(unpacked)
    return left <= 0


def _unpacked_bytes(data: bytes) -> int:
    """The bytes of all rows, each with its filter, in the one pass or the seven of an interlaced PNG."""
    width, height, depth, colours, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * _SAMPLES[colours]
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in (_PASSES if interlaced else _ONE_PASS)]
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk by the stated lengths; its content lies from `start + 8` to `end - 4`."""
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        yield kind, at, end
        at = end


def _is_intact(data: bytes, start: int, end: int) -> bool:
    return zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
