"""What the mutators of all structures share: a number becomes another, or parts change their order and count."""

import random
import struct
from dataclasses import dataclass

NUMBERS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
MOST_BYTES = 2**20  # of parts that are repeated


@dataclass(frozen=True)
class Number:
    """An unsigned number in a file: its place, and the code with which struct reads it."""

    at: int
    code: str

    def of(self, data: bytes) -> int:
        return int(struct.unpack_from(self.code, data, self.at)[0])

    def put(self, data: bytes, value: int) -> bytes:
        """The bytes with this value here, cut to what the number can hold."""
        size = struct.calcsize(self.code)
        packed = struct.pack(self.code, value & (256**size - 1))
        return data[: self.at] + packed + data[self.at + size :]


def other_number(data: bytes, numbers: list[Number], draw: random.Random) -> bytes:
    """One number becomes a limit, its neighbour, its own place, the file's end, or the value or place of another."""
    number, other = draw.choice(numbers), draw.choice(numbers)
    old = number.of(data)
    values = (old + 1, old - 1, 2 * old, number.at, len(data), len(data) - 1, other.of(data), other.at, 2**64 - 1)
    return number.put(data, draw.choice(NUMBERS if draw.random() < 0.5 else values))


def other_parts(parts: list[bytes], draw: random.Random) -> list[bytes]:
    """One part is left out, cut, emptied, moved, or repeated up to some thousand times."""
    found, place = list(parts), draw.randrange(len(parts))
    part = found.pop(place)
    kind = draw.randrange(5)
    if kind == 0:
        return found
    if kind == 1:
        found.insert(place, part[: draw.randrange(len(part) + 1)])
    elif kind == 2:
        found.insert(place, part[:4])
    elif kind == 3:
        found.insert(draw.randrange(len(found) + 1), part)
    else:
        times = min(draw.choice((2, 3, 50, 1000, 10_000)), 1 + MOST_BYTES // max(1, len(part)))
        found[place:place] = [part] * times
    return found
