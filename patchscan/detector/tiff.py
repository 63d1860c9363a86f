"""Read a TIFF's directories, without its pixels: whose camera's raw file it is, which layout it has, and how many
pictures. Every walk is bounded, because directories may be chained in their thousands.

Tags are explained in TIFF 6.0 (Adobe, 1992), the raw formats' in the DNG specification.
"""

import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

MAX_DIRECTORIES = 10_000
_MAX_SUBDIRECTORIES = 16
_MAX_VALUES = 64

_SUBFILE_TYPE, _OLD_SUBFILE_TYPE, _WIDTH, _BITS, _COMPRESSION = 254, 255, 256, 258, 259
_PHOTOMETRIC, _FILL_ORDER, _PREDICTOR, _COLOUR_MAP, _INK_SET = 262, 266, 317, 320, 332
_MAKE, _STRIP_OFFSETS, _SAMPLES, _STRIP_BYTES, _PLANAR = 271, 273, 277, 279, 284
_HEIGHT, _STRIP_ROWS, _TILE_WIDTH, _TILE_HEIGHT = 257, 278, 322, 323
_TILE_OFFSETS, _TILE_BYTES, _SUBDIRECTORIES, _SAMPLE_FORMAT, _YCBCR_SUBSAMPLING = 324, 325, 330, 339, 530
_DNG_VERSION = 50706
# What says where the pixels are, how they are packed, and what they mean. All else is metadata: Pillow would turn the
# pixels by the orientation that a tag or XMP states, and refuses files for damaged Exif.
_PIXEL_TAGS = {
    *(*range(254, 260), 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326), 332, 338, 339, 347),
    *(*range(512, 522), *range(529, 533)),
}

_COLOUR_FILTER_ARRAY, _LINEAR_RAW = 32803, 34892
# Compressions of Sony, Nikon, Pentax, Samsung, Kodak (two) and Panasonic (two) that only their raw files have.
_RAW_COMPRESSIONS = frozenset((32767, 34713, 65535, 32770, 65000, 32867, 34316, 34826))
# None, three of fax, LZW, both of JPEG, both of Deflate, PackBits: what every build of libtiff unpacks.
_COMMON_COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 32946, 32773))
# LZW, both of Deflate, LZMA and Zstandard: with others libtiff ignores that samples are differences.
_PREDICTED_COMPRESSIONS = frozenset((5, 8, 32946, 34925, 50000))
_SEPARATED = 5
_LONGEST_PALETTE = 2 * 3 * 256  # in bytes
_RAW_NAMES: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (b"nikon", "Nikon NEF"),
    (b"sony", "Sony ARW"),
    ((b"pentax", b"ricoh"), "Pentax PEF"),
    (b"samsung", "Samsung SRW"),
    (b"hasselblad", "Hasselblad 3FR"),
    (b"phase one", "Phase One IIQ"),
    (b"leaf", "Leaf MOS"),
    (b"mamiya", "Mamiya MEF"),
    (b"seiko epson", "Epson ERF"),
    ((b"eastman kodak", b"kodak"), "Kodak DCR"),
    (b"canon", "Canon CR2"),
    (b"olympus", "Olympus ORF"),
    (b"panasonic", "Panasonic RW2"),
    (b"leica", "Leica RWL"),
    (b"fujifilm", "Fujifilm RAF"),
    ((b"minolta", b"konica"), "Minolta MRW"),
)
# 129: UTF-8, of Exif 3.0.
_UNITS = {129: "c", 1: "B", 2: "c", 3: "H", 4: "I", 6: "b", 7: "c", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}


@dataclass(frozen=True)
class Directory:
    """One directory by tag: at most 64 numbers or bytes of text each; `next` is the next one's offset."""

    numbers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    texts: dict[int, bytes] = field(default_factory=dict)
    next: int = 0

    def number(self, tag: int, default: int) -> int:
        """The first number of a tag."""
        return self.numbers[tag][0] if tag in self.numbers else default


class Tiff:
    """A TIFF or BigTIFF of either byte order. A damaged directory is read as far as it goes, and nothing raises."""

    def __init__(self, data: bytes):
        self.data = data
        self.order = "<" if data[:2] == b"II" else ">"
        self.big = 43 in data[2:4]
        # BigTIFF: offsets and counts of 8 bytes, and a count of 8 bytes before the entries.
        self._count, self._entry, self._offset = ("Q", "HHQ", "Q") if self.big else ("H", "HHI", "I")
        self._count_size, self._head_size, self._offset_size = (8, 12, 8) if self.big else (2, 8, 4)
        self._entry_size = self._head_size + self._offset_size
        self.start = self._number(self._offset, 8 if self.big else 4)
        self.first = self.directory(self.start)

    def raw_format(self) -> str | None:
        """The maker's name for a camera's raw file, whose first picture may be a thumbnail; None for other files."""
        if self.data[8:10] == b"CR" and self.start >= 16:
            return "Canon CR2"
        if self.data[8:12] in (b"IIII", b"MMMM"):
            return "Phase One IIQ"
        if _DNG_VERSION in self.first.numbers:
            return "DNG"
        make = self.first.texts.get(_MAKE, b"").strip(b"\0 ").lower()
        name = next((name for start, name in _RAW_NAMES if make.startswith(start)), None)
        if any(_is_raw(directory) for directory in self._pictures()):
            return name or "camera raw"
        return name if _is_reduced(self.first) else None

    def unsupported(self) -> str | None:
        """Why the first picture cannot be scored though nothing is damaged; None where its pixels are right.

        What is allowed was compared with a second decoder: Pillow reads some layouts wrongly, and takes 32-bit, signed
        and real numbers, which have no fixed white, as if they were 8 bits.
        """
        first = self.first
        if _is_reduced(first) or any(_pixels(one) > _pixels(first) for one in self._subdirectories()):
            return "TIFF images that begin with a thumbnail are"
        bits, photometric = set(first.numbers.get(_BITS, (1,))), first.number(_PHOTOMETRIC, 0)
        packed, planar = first.number(_COMPRESSION, 1) != 1, first.number(_PLANAR, 1) == 2
        depth = max(bits)
        if len(bits) > 1 or depth not in (1, 2, 4, 8, 16):
            return f"TIFF images of {depth} bits a sample are"
        if set(first.numbers.get(_SAMPLE_FORMAT, (1,))) - {1, 4}:
            return "TIFF images of signed or real numbers are"
        if photometric not in (0, 1, 2, 3, 5, 6):
            return f"TIFF images of photometric interpretation {photometric} are"
        if depth == 16 and (
            photometric not in (1, 2, 5) or first.number(_FILL_ORDER, 1) != 1 or (planar and not packed)
        ):
            return "TIFF images of 16 bits a sample in this layout are"
        if first.number(_PREDICTOR, 1) != 1 and first.number(_COMPRESSION, 1) not in _PREDICTED_COMPRESSIONS:
            return "TIFF images of differences (a predictor) that are not packed so are"
        if photometric == _SEPARATED and first.number(_INK_SET, 1) != 1:
            return "TIFF images of other inks than CMYK are"
        if photometric == 6 and not packed and first.numbers.get(_YCBCR_SUBSAMPLING, (2, 2)) != (1, 1):
            return "uncompressed TIFF images with fewer colour samples than pixels are"
        return None

    def pixels_only(self) -> bytes:
        """The file with nothing in its first directory but what the pixels need, and without a next one."""
        entries = [self.data[at : at + self._entry_size] for at in self._entries(self.start)]
        kept = [entry for entry in entries if int(struct.unpack_from(self.order + "H", entry)[0]) in _PIXEL_TAGS]
        if not kept:
            return self.data
        directory = struct.pack(self.order + self._count, len(kept)) + b"".join(kept) + bytes(self._offset_size)
        whole = self.data[: self.start] + directory + self.data[self.start + len(directory) :]
        return self._with_deep_palette(whole)

    def _with_deep_palette(self, whole: bytes) -> bytes:
        """The file with 16-bit numbers in its palette: some writers put in those of 8 bits, which would be black."""
        located = map(self._located, self._entries(self.start))
        palettes = ((unit, 2 * count, start) for tag, unit, count, start in located if tag == _COLOUR_MAP)
        unit, size, start = next(palettes, (None, 0, 0))
        if unit != "H" or size > _LONGEST_PALETTE:
            return whole
        palette, deep = self.data[start : start + size], bytearray(size)
        high, low = (slice(1, None, 2), slice(0, None, 2))[:: 1 if self.order == "<" else -1]
        if len(palette) < size or any(palette[high]):
            return whole
        deep[high] = palette[low]
        return whole[:start] + deep + whole[start + size :]

    def unpacking_bytes(self) -> int:
        """The bytes of one unpacked strip or tile, which libtiff holds beside the pixels; 0 where nothing is packed."""
        first = self.first
        if first.number(_COMPRESSION, 1) == 1:
            return 0
        width, height = first.number(_WIDTH, 0), first.number(_HEIGHT, 0)
        if _TILE_WIDTH in first.numbers:
            width, height = first.number(_TILE_WIDTH, 0), first.number(_TILE_HEIGHT, 0)
        samples = 1 if first.number(_PLANAR, 1) == 2 else first.number(_SAMPLES, 1)
        return width * min(height, first.number(_STRIP_ROWS, height)) * samples * first.number(_BITS, 1) // 8

    def is_whole(self) -> bool:
        """Whether the first directory and all the pixels that it points at lie in the file."""
        first = self.first
        for offsets, sizes in ((_STRIP_OFFSETS, _STRIP_BYTES), (_TILE_OFFSETS, _TILE_BYTES)):
            starts, lengths = first.numbers.get(offsets, ()), first.numbers.get(sizes, ())
            if starts and len(starts) == len(lengths):
                ends = [at + length for at, length in zip(starts, lengths, strict=True)]
                return _WIDTH in first.numbers and min(starts) > 0 and max(ends) <= len(self.data)
        return False

    def lacking(self, opened: bool) -> str | None:
        """Say what the decoder lacks for a whole file that it has refused: before it `opened` it, its layout, and then
        its compression; None where the pixels must be damaged."""
        first = self.first
        compression, photometric = first.number(_COMPRESSION, 1), first.number(_PHOTOMETRIC, 0)
        if self.big and self.order == ">":
            return "big-endian BigTIFF images are"
        if compression not in _COMMON_COMPRESSIONS:
            return f"TIFF images of compression {compression} are"
        if opened and compression != 1:
            return None
        samples, depth = first.number(_SAMPLES, 1), first.number(_BITS, 1)
        return f"TIFF images of {samples} samples of {depth} bits, photometric interpretation {photometric}, are"

    def count(self) -> int:
        """How many directories are chained from the first, counted up to MAX_DIRECTORIES."""
        seen: set[int] = set()
        at = self.start
        while at and at not in seen and len(seen) < MAX_DIRECTORIES and at + self._count_size <= len(self.data):
            seen.add(at)
            at = self._next(at)
        return max(1, len(seen))

    def directory(self, at: int) -> Directory:
        """The directory at this offset; an empty one for 0, which says that there is none."""
        if not at:
            return Directory()
        numbers, texts = dict[int, tuple[int, ...]](), dict[int, bytes]()
        for entry in self._entries(at):
            tag, unit, count, start = self._located(entry)
            count = min(count, _MAX_VALUES)
            if unit is None or not count or start + count * struct.calcsize("=" + unit) > len(self.data):
                continue
            if unit == "c":
                texts[tag] = self.data[start : start + count]
            else:
                numbers[tag] = struct.unpack_from(f"{self.order}{count}{unit}", self.data, start)
        return Directory(numbers, texts, self._next(at))

    def values(self, at: int, tags: Container[int], longest: int) -> dict[int, bytes]:
        """The values of these tags in a directory as they are stored, each cut to `longest` bytes."""
        found: dict[int, bytes] = {}
        for entry in self._entries(at) if at else ():
            tag, unit, count, start = self._located(entry)
            if tag in tags and tag not in found and unit is not None:
                found[tag] = self.data[start : start + min(count * struct.calcsize("=" + unit), longest)]
        return found

    def _entries(self, at: int) -> range:
        """Where the entries of the directory begin that lie in the file."""
        begin = at + self._count_size
        count = min(self._number(self._count, at), 65_535, max(0, len(self.data) - begin) // self._entry_size)
        return range(begin, begin + count * self._entry_size, self._entry_size)

    def _located(self, at: int) -> tuple[int, str | None, int, int]:
        """Tag, unit (None: an unknown one) and number of values of an entry, and where the values begin."""
        tag, kind, count = struct.unpack_from(self.order + self._entry, self.data, at)
        unit, value = _UNITS.get(kind), at + self._head_size
        if unit is not None and count * struct.calcsize("=" + unit) > self._offset_size:
            value = self._number(self._offset, value)
        return tag, unit, count, value

    def _pictures(self) -> Iterator[Directory]:
        """The first directories of the chain, and those that the first lists as its subdirectories."""
        directory, seen = self.first, {self.start}
        yield directory
        yield from self._subdirectories()
        for _ in range(_MAX_SUBDIRECTORIES):
            if not directory.next or directory.next in seen:
                return
            seen.add(directory.next)
            directory = self.directory(directory.next)
            yield directory

    def _subdirectories(self) -> Iterator[Directory]:
        for at in self.first.numbers.get(_SUBDIRECTORIES, ())[:_MAX_SUBDIRECTORIES]:
            yield self.directory(at)

    def _next(self, at: int) -> int:
        entries = self._number(self._count, at)
        return self._number(self._offset, at + self._count_size + entries * self._entry_size)

    def _number(self, unit: str, at: int) -> int:
        """The number at this offset; 0 where the file has ended."""
        if not 0 <= at <= len(self.data) - struct.calcsize("=" + unit):
            return 0
        return int(struct.unpack_from(self.order + unit, self.data, at)[0])


def _is_raw(directory: Directory) -> bool:
    photometric = directory.number(_PHOTOMETRIC, 0)
    compression = directory.number(_COMPRESSION, 1)
    return photometric in (_COLOUR_FILTER_ARRAY, _LINEAR_RAW) or compression in _RAW_COMPRESSIONS


def _pixels(directory: Directory) -> int:
    return directory.number(_WIDTH, 0) * directory.number(_HEIGHT, 0)


def _is_reduced(directory: Directory) -> bool:
    """Whether the picture is another one in fewer pixels. Old writers, and some scanners, have another tag for it."""
    return bool(directory.number(_SUBFILE_TYPE, 0) & 1) or directory.number(_OLD_SUBFILE_TYPE, 1) == 2
