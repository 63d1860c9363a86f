"""Recognise formats that have no signature, or too short a one, by the fields of their headers or by their text.

So many fields must make sense that other bytes are not taken for an image by chance.
"""

import re
import struct
import zlib
from functools import reduce
from operator import xor

_BMP_HEADERS = frozenset((12, 16, 40, 52, 56, 64, 108, 124))
_BMP_DEPTHS = frozenset((1, 4, 8, 16, 24, 32))
_TGA_DEPTHS = frozenset((8, 15, 16, 24, 32))
_PALM_DEPTHS = frozenset((1, 2, 4, 8, 16))
_SPIDER_KINDS = frozenset((1, 3, -11, -12, -21, -22))
_WBMP = re.compile(rb"\0\0([\x80-\xff]{0,2}[\0-\x7f])([\x80-\xff]{0,2}[\0-\x7f])", re.DOTALL)

# What may stand before a drawing's first element is passed over once, however much there is.
_SVG = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*+(?>(?:<!--.*?-->|<\?.*?\?>)\s*+)*+<(?:!doctype\s+)?(?:[\w.-]+:)?svg[\s/>\[]",
    re.DOTALL | re.IGNORECASE,
)
_SVG_SEARCHED = 2**20
_UTF_16 = ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"), (b"<\0", "utf-16-le"), (b"\0<", "utf-16-be"))


def is_tar(data: bytes) -> bool:
    """The mark of a tar with the sum of its header's bytes, in which the sum itself counts as spaces: an image may have
    the mark alone in its metadata."""
    if data[257:262] != b"ustar":
        return False
    field = data[148:156]
    stated = re.match(rb" *([0-7]+)[ \0]", field)
    return stated is not None and int(stated[1], 8) == sum(data[:512]) - sum(field) + 8 * ord(" ")


def is_svg(data: bytes) -> bool:
    """SVG in UTF-8 or UTF-16, packed with gzip (svgz) or not. The drawing must begin in the first MiB."""
    if data[:3] == b"\x1f\x8b\x08":
        try:
            data = zlib.decompressobj(31).decompress(data[:_SVG_SEARCHED], _SVG_SEARCHED)
        except zlib.error:
            return False
    for start, encoding in _UTF_16:
        if data.startswith(start):
            data = data[:_SVG_SEARCHED].decode(encoding, "ignore").encode()
    return _SVG.match(data, 0, _SVG_SEARCHED) is not None


def is_bmp(data: bytes) -> bool:
    """The header's length is one of a few."""
    return data[:2] == b"BM" and (len(data) < 18 or struct.unpack_from("<I", data, 14)[0] in _BMP_HEADERS)


def is_dib(data: bytes) -> bool:
    """A BMP without the first of its headers, as it lies on Windows' clipboard."""
    if len(data) < 40 or struct.unpack_from("<I", data)[0] not in _BMP_HEADERS:
        return False
    width, height, planes, depth = struct.unpack_from("<HHHH" if data[0] == 12 else "<iiHH", data, 4)
    return width > 0 and height != 0 and planes == 1 and depth in _BMP_DEPTHS


def is_pcx(data: bytes) -> bool:
    if len(data) < 128 or data[0] != 10 or data[1] not in (0, 2, 3, 4, 5) or data[2] > 1 or data[3] not in (1, 2, 4, 8):
        return False
    left, top, right, bottom = struct.unpack_from("<HHHH", data, 4)
    return bool(left <= right and top <= bottom)


def is_msp(data: bytes) -> bool:
    """Microsoft Paint: the words of its header, of which one is made for it, cancel out."""
    if len(data) < 32 or data[:4] not in (b"DanM", b"LinS"):
        return False
    words: tuple[int, ...] = struct.unpack_from("<16H", data)
    return reduce(xor, words) == 0


def is_spider(data: bytes) -> bool:
    """SPIDER, of electron microscopy: its header is of real numbers, in either byte order."""
    if len(data) < 92:
        return False
    for order in "><":
        numbers = struct.unpack_from(order + "23f", data)
        rows, kind, columns, records, size, record = (numbers[at] for at in (1, 4, 11, 12, 21, 22))
        if kind in _SPIDER_KINDS and min(rows, columns, records, record) >= 1 and size == records * record:
            return True
    return False


def is_palm(data: bytes) -> bool:
    """A bitmap of Palm OS that is not compressed: as many bytes a row as its width asks for, and all rows."""
    if len(data) < 16:
        return False
    width, height, row, flags, depth, version, _, _, _, reserved = struct.unpack_from(">HHHHBBHBBH", data)
    if depth not in _PALM_DEPTHS or version > 3 or reserved or flags & 0x80FF or not (width and height):
        return False
    return bool(row == (width * depth + 15) // 16 * 2 and len(data) >= 16 + row * height)


def is_wbmp(data: bytes) -> bool:
    """A bitmap of WAP, whose length is that which its width and height ask for. Smaller ones are not told from other
    bytes."""
    header = _WBMP.match(data)
    if header is None:
        return False
    width, height = (reduce(lambda value, byte: value << 7 | byte & 0x7F, part, 0) for part in header.groups())
    return min(width, height) >= 8 and len(data) == header.end() + (width + 7) // 8 * height


def is_tga(data: bytes) -> bool:
    """A footer in files of version 2; the oldest have no signature, so all fields of their header must make sense."""
    if data[-18:] == b"TRUEVISION-XFILE.\0":
        return True
    if len(data) < 18:
        return False
    id_length, has_map, kind = data[:3]
    first, entries, entry_bits, _, _, width, height, depth, descriptor = struct.unpack_from("<HHBHHHHBB", data, 3)
    mapped = kind in (1, 9)
    if kind not in (1, 2, 3, 9, 10, 11) or has_map != mapped or depth not in _TGA_DEPTHS or descriptor & 0xC0:
        return False
    if (mapped and (depth != 8 or not 0 < entries <= 256 or entry_bits not in _TGA_DEPTHS)) or (
        not mapped and (first or entries or entry_bits)
    ):
        return False
    pixels = 18 + id_length + entries * ((entry_bits + 7) // 8)
    packed = width * height * ((depth + 7) // 8) if kind < 9 else 1
    return bool(width and height) and len(data) >= pixels + packed
