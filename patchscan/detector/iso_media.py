"""Tell pixels from metadata in a HEIC or AVIF: hide metadata from the decoder, so that damaged ones cannot reject an
image, and find its EXIF and XMP without one (ISO/IEC 14496-12 for the boxes, 23008-12 for the items).
"""

import io
import struct
from collections.abc import Iterator
from itertools import islice

_METADATA = (b"Exif", b"mime")
# The first brands that Pillow and pillow-heif take.
_KNOWN = {
    "AVIF": (b"avif", b"avis", b"mif1", b"msf1"),
    "HEIF": tuple(b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split()),
}
# How the pixels of an item are packed, by its type: as the brands HEIC and AVIF promise, and in other ways.
_PROMISED = frozenset((b"hvc1", b"av01"))
_OTHER_PACKINGS = {
    b"avc1": "AVC",
    b"vvc1": "VVC",
    b"evc1": "EVC",
    b"jpeg": "JPEG",
    b"j2k1": "JPEG 2000",
    b"unci": "uncompressed",
}
# A type that no decoder reads.
_HIDDEN = b"free"
# More items than any picture has; a file of millions would take seconds.
_MAX_ITEMS = 10_000
_MAX_PLACES = 16
# Of metadata: bytes read of a place, and items of XMP (a map of brightness beside the picture has its own).
_LONGEST, _MAX_XMP = 2**22, 16


def pixels_only(data: bytes, name: str) -> bytes:
    """Return a file of this format (HEIF or AVIF) with its items of metadata (EXIF, XMP) as items of an unknown type,
    which decoders pass over, and with a first brand that they know.

    All stays where it is, because the file says by offsets where its pixels lie.
    """
    data = with_known_brand(data, name)
    metadata = [at for at in _types(data) if data[at : at + 4] in _METADATA]
    if not metadata:
        return data
    changed = bytearray(data)
    for at in metadata:
        changed[at : at + 4] = _HIDDEN
    return bytes(changed)


def with_known_brand(data: bytes, name: str) -> bytes:
    """Return a file of this format (HEIF or AVIF) with a first brand that decoders know."""
    return data if data[8:12] in _KNOWN[name] else data[:8] + _KNOWN[name][0] + data[12:]


def exif(data: bytes) -> bytes:
    """Return the first EXIF of a file, without its header; empty where there is none. Raises struct.error and
    IndexError for a damaged file."""
    content = next(_contents(data, b"Exif"), b"")
    return content[4 + int.from_bytes(content[:4]) :]


def xmp(data: bytes) -> Iterator[bytes]:
    """Yield what a file holds as `mime` items: its XMP. Raises struct.error and IndexError for a damaged file."""
    return islice(_contents(data, b"mime"), _MAX_XMP)


def _contents(data: bytes, kind: bytes) -> Iterator[bytes]:
    """The contents of the items of a type."""
    for meta in islice(_boxes(data, 0, len(data), b"meta"), 1):
        for at, number in islice(_items(data, *meta), _MAX_ITEMS):
            if data[at : at + 4] == kind:
                yield _content(data, *meta, number)


def unsupported(data: bytes, name: str) -> str | None:
    """Name the packing of a file of this format whose brands promise another ("HEIF (VVC) images are"); None where the
    pixels are packed as promised."""
    types = {data[at : at + 4] for at in _types(data)}
    others = sorted(_OTHER_PACKINGS[one] for one in types if one in _OTHER_PACKINGS)
    return f"{name} ({', '.join(others)}) images are" if others and not types & _PROMISED else None


def _types(data: bytes) -> Iterator[int]:
    """Where the types of the items stand."""
    for meta in _boxes(data, 0, len(data), b"meta"):
        yield from (at for at, _ in _items(data, *meta))


def _items(data: bytes, meta: int, meta_end: int) -> Iterator[tuple[int, int]]:
    """Where the types of the items stand, in `infe` in `iinf`, and the items' numbers."""
    for items, items_end in _boxes(data, meta + 4, meta_end, b"iinf"):
        first = items + (6 if data[items] == 0 else 8)
        for item, _ in _boxes(data, first, items_end, b"infe"):
            number_end = item + (8 if data[item] == 3 else 6)
            yield number_end + 2, int.from_bytes(data[item + 4 : number_end])  # between them: how it is protected


def _content(data: bytes, meta: int, meta_end: int, number: int) -> bytes:
    """The bytes of the item of this number: in the file or in `idat`, as `iloc` says; empty where nothing says so."""
    for places, end in islice(_boxes(data, meta + 4, meta_end, b"iloc"), 1):
        for one, method, spans in islice(_locations(data[places:end]), _MAX_ITEMS):
            if one == number:
                idat = next(_boxes(data, meta + 4, meta_end, b"idat"), (0, 0))
                kept = data[slice(*idat)] if method else data
                return b"".join(kept[start : start + min(length, _LONGEST)] for start, length in spans)
    return b""


def _locations(iloc: bytes) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Of each item in an `iloc`: its number, what its places are counted in (0: the file, 1: `idat`), and its places,
    as start and length in bytes. It ends at an item in more than _MAX_PLACES, which no EXIF is."""
    version = iloc[0]
    offset_size, length_size, base_size, index_size = (half for byte in iloc[4:6] for half in (byte >> 4, byte & 15))
    reader = io.BytesIO(iloc[6:])

    def take(size: int) -> int:
        return int.from_bytes(reader.read(size))

    number_size = 4 if version == 2 else 2
    for _ in range(take(number_size)):
        number = take(number_size)
        method = take(2) & 15 if version else 0
        take(2)  # the number of another file, which these formats have none of
        base, places = take(base_size), take(2)
        if places > _MAX_PLACES:
            return
        spans = []
        for _ in range(places):
            take(index_size if version else 0)
            spans.append((base + take(offset_size), take(length_size)))
        yield number, method, spans


def _boxes(data: bytes, at: int, end: int, wanted: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of the content of the boxes of one kind."""
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1 and at + 16 <= end:
            size, head = struct.unpack_from(">Q", data, at + 8)[0], 16
        elif size == 0:
            size = end - at
        if size < head or at + size > end:
            return
        if kind == wanted and size > head:
            yield at + head, at + size
        at += size
