"""Hide what is not pixels in a HEIC or AVIF from its decoder, so that damaged metadata cannot reject it (ISO/IEC
14496-12 for the boxes, 23008-12 for the items).
"""

import struct
from collections.abc import Iterator

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


def pixels_only(data: bytes, name: str) -> bytes:
    """Return a file of this format (HEIF or AVIF) with its items of metadata (EXIF, XMP) as items of an unknown type,
    which decoders pass over, and with a first brand that they know.

    All stays where it is, because the file says by offsets where its pixels lie.
    """
    data = with_known_brand(data, name)
    metadata = [at for at in _item_types(data) if data[at : at + 4] in _METADATA]
    if not metadata:
        return data
    changed = bytearray(data)
    for at in metadata:
        changed[at : at + 4] = _HIDDEN
    return bytes(changed)


def with_known_brand(data: bytes, name: str) -> bytes:
    """Return a file of this format (HEIF or AVIF) with a first brand that decoders know."""
    return data if data[8:12] in _KNOWN[name] else data[:8] + _KNOWN[name][0] + data[12:]


def unsupported(data: bytes, name: str) -> str | None:
    """Name the packing of a file of this format whose brands promise another ("HEIF (VVC) images are"); None where the
    pixels are packed as promised."""
    types = {data[at : at + 4] for at in _item_types(data)}
    others = sorted(_OTHER_PACKINGS[one] for one in types if one in _OTHER_PACKINGS)
    return f"{name} ({', '.join(others)}) images are" if others and not types & _PROMISED else None


def _item_types(data: bytes) -> Iterator[int]:
    """Where the types of the items stand: in `infe` in `iinf` in `meta`."""
    for meta, meta_end in _boxes(data, 0, len(data), b"meta"):
        for items, items_end in _boxes(data, meta + 4, meta_end, b"iinf"):
            first = items + (6 if data[items] == 0 else 8)
            for item, _ in _boxes(data, first, items_end, b"infe"):
                yield item + (10 if data[item] == 3 else 8)


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
