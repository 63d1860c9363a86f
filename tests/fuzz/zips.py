"""Zip: counts and offsets of the directory, entries for one member's bytes, methods, names, and members that grow."""

import io
import random
import warnings
import zipfile

from tests.fuzz.changes import Number, other_number, other_parts

LOCAL, ENTRY, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
NAMES = ("", "../x", "/x", "x/", "a\\b", "é" * 300, "a\0b.png", "x" * 60_000)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
# Code and place of the numbers after each signature.
LOCAL_FIELDS = (("<H", 4), ("<H", 6), ("<H", 8), ("<I", 14), ("<I", 18), ("<I", 22), ("<H", 26), ("<H", 28))
ENTRY_FIELDS = (("<H", 6), ("<H", 8), ("<H", 10), ("<I", 16), ("<I", 20), ("<I", 24), ("<H", 28), ("<H", 30))
END_FIELDS = (("<H", 4), ("<H", 6), ("<H", 8), ("<H", 10), ("<I", 12), ("<I", 16), ("<H", 20))


def changed(data: bytes, draw: random.Random) -> bytes:
    """The zip with one change."""
    entries, start, end = entries_of(data)
    kind = draw.randrange(4)
    if kind == 0:
        fields = [Number(end + at, code) for code, at in END_FIELDS]
        for at in (start, *(start + sum(map(len, entries[:count])) for count in range(1, len(entries)))):
            fields += [Number(at + place, code) for code, place in (*ENTRY_FIELDS, ("<I", 42))]
            local = Number(at + 42, "<I").of(data)
            fields += [Number(local + place, code) for code, place in LOCAL_FIELDS]
        return other_number(data, fields, draw)
    if kind == 1:  # entries moved or repeated: many names for one member's bytes
        directory = b"".join(other_parts(entries, draw))
        count = directory.count(ENTRY)
        tail = Number(12, "<I").put(data[end:], len(directory))
        tail = Number(8, "<H").put(Number(10, "<H").put(tail, count), count)
        return data[:start] + directory + tail
    if kind == 2:  # the size and place of 64 bits, in the entry's extra field
        entry = bytearray(entries[0])
        name = Number(28, "<H").of(bytes(entry))
        extra = b"\1\0\x18\0" + b"".join(draw.choice((0, 1, 2**40, 2**64 - 1)).to_bytes(8, "little") for _ in range(3))
        entry[20:28], entry[42:46], entry[30:32] = b"\xff" * 8, b"\xff" * 4, len(extra).to_bytes(2, "little")
        entry[46 + name : 46 + name] = extra
        directory = bytes(entry) + b"".join(entries[1:])
        return data[:start] + directory + Number(12, "<I").put(data[end:], len(directory))
    return made(draw)


def made(draw: random.Random) -> bytes:
    """A zip of strange names, of each method, whose members grow."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", draw.choice(METHODS)) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for number in range(draw.choice((1, 3, 300))):
            content = bytes(draw.choice((0, 9, 2**16)) if number else draw.choice((9, 2**16, 40 * 2**20)))
            archive.writestr(zipfile.ZipInfo(draw.choice(NAMES) or f"{number}"), content, archive.compression)
    return file.getvalue()


def entries_of(data: bytes) -> tuple[list[bytes], int, int]:
    """The directory's entries, and where it starts and ends, in a whole zip without a comment."""
    end = data.rindex(END)
    start = at = Number(end + 16, "<I").of(data)
    found = []
    while at < end:
        size = 46 + sum(Number(at + place, "<H").of(data) for place in (28, 30, 32))
        found.append(data[at : at + size])
        at += size
    return found, start, end
