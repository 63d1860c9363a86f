"""Tar: sizes in octal and base 256, kinds of headers, long names and pax records in chains, sparse files."""

import random
import tarfile

from tests.fuzz.changes import other_parts

KINDS = b"0\x001234567gxLKSXDVMNZ"
SIZES = [b"", b"00000000000", b"77777777777", b"-0000000001", b"zzzzzzzzzzz"]
# Of base 256: one, minus one, the largest, and 2 ** 39 - 1.
SIZES += [
    b"\x80" + bytes(10) + b"\x01",
    b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
    b"\x80" + bytes(6) + b"\x7f" + b"\xff" * 4,
]
SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x", "GNU.sparse.realsize": "1"}
BLOCK = 512


def changed(data: bytes, draw: random.Random) -> bytes:
    """The tar with one change, and checksums that fit."""
    members = members_of(data)
    kind = draw.randrange(5)
    if kind == 0:
        return b"".join(other_parts(members, draw)) + bytes(2 * BLOCK)
    place = draw.randrange(len(members))
    if kind == 1:
        members[place] = with_field(members[place], 124, draw.choice(SIZES).ljust(12, b"\0"))
    elif kind == 2:
        members[place] = with_field(members[place], 156, bytes((draw.choice(KINDS),)))
    elif kind == 3:
        at, size = draw.choice(((0, 100), (100, 8), (136, 12), (257, 8), (345, 155), (386, 97), (482, 13)))
        members[place] = with_field(members[place], at, draw.choice((b"\xff", b"\0", b"9", b"\x80")) * size)
    else:
        members[place:place] = [extended(draw)] * draw.choice((1, 3, 300))
    return b"".join(members) + bytes(2 * BLOCK)


def members_of(data: bytes) -> list[bytes]:
    """The members of a whole tar without its end, each a header and its blocks."""
    found, at = [], 0
    while at < len(data) and data[at]:
        size = int(data[at + 124 : at + 135], 8)
        end = at + BLOCK + -(-size // BLOCK) * BLOCK
        found.append(data[at:end])
        at = end
    return found


def with_field(member: bytes, at: int, value: bytes) -> bytes:
    """The member with another value in its header."""
    header = bytearray(member[:BLOCK])
    header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + member[BLOCK:]


def extended(draw: random.Random) -> bytes:
    """A header that says more of the next member: records, or a long name."""
    kind = draw.choice(b"gxXLK")
    content = draw.choice(
        (
            lambda: records({f"k{number}": "" for number in range(draw.choice((1, 100, 9000)))}),
            lambda: records({"size": draw.choice(("0", "-1", "1e9", "9" * 30)), "path": "x" * 3000}),
            lambda: records(SPARSE | {"GNU.sparse.map": draw.choice(("0,1", "0", "9" * 99, "0," * 9999))}),
            lambda: draw.choice((b"", b"0 a=b\n", b"99999 a=b\n", b"-1 a=b\n", b"5" * 9000, b"a" * 9000)),
        )
    )()
    info = tarfile.TarInfo("x")
    info.type, info.size = bytes((kind,)), len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


def records(values: dict[str, str]) -> bytes:
    """Pax records, each after its own length."""
    found = []
    for name, value in values.items():
        rest = f" {name}={value}\n"
        length = len(rest) + len(str(len(rest) + len(str(len(rest)))))
        found.append(f"{length}{rest}".encode())
    return b"".join(found)
