"""PNG: order, number and length of chunks, the fields of those that state sizes and counts, and texts that grow."""

import random
import struct
import zlib

from tests.fuzz import tiff
from tests.fuzz.changes import Number, other_number, other_parts

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NUMBERS = {b"IHDR": ">IIBBBBB", b"acTL": ">II", b"fcTL": ">IIIIIHHBB"}
BOMB, CUT_BOMB = zlib.compress(bytes(2**20), 9), zlib.compress(bytes(10**6), 9)[:-4]


def changed(data: bytes, draw: random.Random) -> bytes:
    """The PNG with one change, and checksums that fit."""
    chunks = chunks_of(data)
    kind = draw.randrange(4)
    if kind == 0:
        return SIGNATURE + b"".join(other_parts([packed(chunk) for chunk in chunks], draw))
    if kind == 1:
        place = draw.choice([place for place, chunk in enumerate(chunks) if chunk[:4] in NUMBERS])
        chunks[place] = other_number(chunks[place], numbers_of(chunks[place]), draw)
    elif kind == 2:
        new = added(draw)
        times = draw.choice((1, 2, 3000)) if len(new) < 2000 else 1
        chunks[place:place] = [new] * times if (place := draw.randrange(len(chunks) + 1)) else []
    found = SIGNATURE + b"".join(map(packed, chunks))
    if kind < 3:
        return found
    lengths, at = [], len(SIGNATURE)
    for chunk in chunks:
        lengths.append(Number(at, ">I"))
        at += 8 + len(chunk)
    return other_number(found, lengths, draw)


def chunks_of(data: bytes) -> list[bytes]:
    """Kind and content of each chunk of a whole PNG."""
    found, at = [], len(SIGNATURE)
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        found.append(data[at + 4 : end])
        at = end + 4
    return found


def packed(chunk: bytes) -> bytes:
    """A chunk with its length before it and its checksum after it."""
    return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))


def numbers_of(chunk: bytes) -> list[Number]:
    """The fields of a chunk that states sizes or counts."""
    found, at = [], 4
    for code in NUMBERS[chunk[:4]][1:]:
        found.append(Number(at, ">" + code))
        at += struct.calcsize(code)
    return found


def added(draw: random.Random) -> bytes:
    """A chunk that most files do not have."""
    return draw.choice(
        (
            lambda: b"zTXtparameters\0\0" + draw.choice((BOMB, CUT_BOMB)),
            lambda: b"iTXtXML:com.adobe.xmp\0\1\0\0\0" + draw.choice((BOMB, CUT_BOMB)),
            lambda: b"iTXtComment" + b"\0" * draw.randrange(8),
            lambda: b"iCCPprofile\0\0" + draw.choice((BOMB, CUT_BOMB)),
            lambda: b"tEXtRaw profile type exif\0\nexif\n 9\n" + draw.choice((b"zz", b"00" * 100)),
            lambda: b"eXIf" + tiff.changed(tiff.exif(), draw),
            lambda: b"PLTE" + bytes(draw.choice((0, 1, 3, 768, 771))),
            lambda: b"tRNS" + bytes(draw.choice((0, 1, 2, 6, 256, 300))),
            lambda: b"acTL" + struct.pack(">II", draw.choice((0, 2, 2**31, 2**32 - 1)), 0),
        )
    )()
