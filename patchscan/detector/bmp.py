"""Read a BMP's header: whether all pixels are there, and a field that Pillow misunderstands."""

import struct

_HEADERS_AT, _COLOURS_AT = 14, 46
_FULL_HEADER = 40  # shorter ones have no number of colours


def with_whole_palette(data: bytes) -> bytes:
    """Return the BMP with a header that promises as many colours as its depth allows.

    Pillow takes pixels of 4 or 8 bits for pixels of one bit where the header says that two colours are used, black and
    white. The palette may then seem to go on into the pixels, but no pixel points there.
    """
    if len(data) < _COLOURS_AT + 4:
        return data
    pixels_at, header = struct.unpack_from("<II", data, 10)
    (colours,) = struct.unpack_from("<I", data, _COLOURS_AT)
    # Where the pixels are said to begin in the palette's place, Pillow needs the number to find them.
    if header < _FULL_HEADER or not colours or pixels_at <= _HEADERS_AT + header:
        return data
    return data[:_COLOURS_AT] + bytes(4) + data[_COLOURS_AT + 4 :]


def is_whole(data: bytes) -> bool:
    """Whether the file has the length that its header states, or all the bytes of its pixels."""
    if len(data) < 38:
        return False
    stated, start, header = (int(struct.unpack_from("<I", data, at)[0]) for at in (2, 10, _HEADERS_AT))
    if header < _FULL_HEADER:
        return len(data) >= stated > 26
    width, height, _, depth, _, packed = struct.unpack_from("<iiHHII", data, 18)
    return len(data) >= start + int(packed or (abs(width) * depth + 31) // 32 * 4 * abs(height))
