"""Read the texts that an image file holds beside its pixels: text chunks, comments, EXIF, IPTC and XMP, however
encoded."""

import unicodedata
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from patchscan.detector import gif, iso_media, png, webp
from patchscan.detector.segments import MARKER
from patchscan.detector.tiff import Tiff
from patchscan.scanning import xmp

# Longer texts are cut; what generators write begins, or ends, within this.
MAX_TEXT_BYTES = 2**20
MAX_TEXTS, MAX_BYTES = 1000, 2**22  # of one file
MAX_DAMAGED = 16  # packed texts that cannot be unpacked: up to where they are damaged each takes as long as another
MAX_EXIF_BLOCKS = 4
MAX_PROFILES = 8  # of ImageMagick, in a PNG
# Of a JPEG and a PNG: nothing else limits the time that a scan takes for them.
MAX_SEGMENTS, MAX_CHUNKS = 10_000, 100_000
CODES = (b"ASCII\0\0\0", b"JIS\0\0\0\0\0", bytes(8))  # before a comment of EXIF, beside UNICODE
SAMPLE_BYTES = 8192  # that tell the order of UTF-16's bytes
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"comf")  # the last as tEXt, in ComfyUI's animations
XMP_CHUNK = "XML:com.adobe.xmp"
XMP_PACKET = "\0XMP"  # all other XMP, of which only properties are texts; no chunk can have this keyword
EXIF_IFD = 0x8769
EXIF_TAGS = {
    0x010D: "DocumentName",
    0x010E: "ImageDescription",
    0x010F: "Make",
    0x0110: "Model",
    0x0131: "Software",
    0x013B: "Artist",
    0x013C: "HostComputer",
    0x8298: "Copyright",
    0x9C9B: "XPTitle",
    0x9C9C: "XPComment",
    0x9C9D: "XPAuthor",
    0x9C9E: "XPKeywords",
    0x9C9F: "XPSubject",
    0x9286: "UserComment",
}
XMP_TAG, IPTC_TAG, PHOTOSHOP_TAG = 700, 33723, 34377
# Data sets of record 2 of IPTC-IIM, in the image resource 0x0404 of Photoshop; named as the same texts elsewhere.
IPTC_TEXTS = {65: "Software", 110: "Credit", 120: "Description"}
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
EXIF, XMP, PHOTOSHOP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"Photoshop 3.0\0"
IPTC_RESOURCE, XMP_RESOURCE = 0x0404, 0x0424
GIF_XMP = b"\x0bXMP DataXMP"
# Of XMP that is longer than a segment: the GUID of the whole, its length, and where the part begins in it.
EXTENDED_XMP, EXTENDED_XMP_HEAD = b"http://ns.adobe.com/xmp/extension/\0", 40
END, APP1, APP13, COMMENT = 0xD9, 0xE1, 0xED, 0xFE


def file_texts(data: bytes, image_format: str) -> list[tuple[str, str]]:
    """Return names and texts of an encoded image: a chunk's keyword, `Comment`, an EXIF tag's name, or one of
    IPTC_TEXTS and xmp.TEXTS. Damaged metadata has no texts."""
    return texts_and_xmp(data, image_format)[0]


def texts_and_xmp(data: bytes, image_format: str) -> tuple[list[tuple[str, str]], bytes]:
    """Return what `file_texts` does, and all XMP of the file as UTF-8."""
    texts: list[tuple[str, str]] = []
    packets: list[bytes] = []
    left = MAX_BYTES
    for read in _readers(data, image_format):
        try:
            for name, value in read:
                # What decodes to nothing, as a million zeros do, takes as long as other texts.
                left -= len(value) if isinstance(value, bytes | str | tuple) else 0
                if len(texts) >= MAX_TEXTS or left < 0:
                    break
                if name in (XMP_CHUNK, XMP_PACKET):
                    packets.append(value.replace(b"\0", b""))  # of UTF-16 and UTF-32, the words in Western letters
                if name != XMP_PACKET:
                    texts.append((name, decode_text(value)))
        except Exception:  # noqa: BLE001,S112  hostile metadata makes a reader raise anything
            continue
    joined = b"\n".join(packets)
    return texts + [(name, decode_text(text)) for name, text in xmp.texts(joined)], joined


def _readers(data: bytes, image_format: str) -> list[Iterator[tuple[str, Any]]]:
    """What reads a file's texts, apart: where one raises, the others still find theirs."""
    if image_format in ("JPEG", "MPO"):
        return _jpeg_readers(data)
    if image_format == "PNG":
        chunks = _png_chunks(data)
        return [_png_texts(chunks), _png_exif_texts(chunks), _png_profile_texts(chunks)]
    if image_format == "GIF":
        return [_gif_texts(data)]
    if image_format == "TIFF":
        return [_exif_texts(data)]
    if image_format == "WEBP":
        return [_webp_texts(data)]
    return [_iso_exif_texts(data), _iso_xmp(data)] if image_format in ("AVIF", "HEIF") else []


def decode_text(value: Any) -> str:
    """Decode a text of EXIF or a comment: UTF-8, Latin-1 or UTF-16 of either order. White space becomes one blank."""
    if isinstance(value, tuple) and all(isinstance(one, int) and 0 <= one < 256 for one in value):
        value = bytes(value)
    if isinstance(value, str) and "\0" in value:
        value = value.encode("latin-1", "replace")
    if isinstance(value, bytes):
        value = _decode_bytes(value[:MAX_TEXT_BYTES])
    return " ".join(str(value or "").replace("\0", " ").split())


def _decode_bytes(value: bytes) -> str:
    marked = value.startswith(b"UNICODE\0")
    value = value[8:] if marked or value.startswith(CODES) else value
    if value.startswith((b"\xff\xfe", b"\xfe\xff")):
        return value.decode("utf-16", "replace")
    # Western letters are zero in one byte of two; zeros may also fill what is left of a text's place.
    text = value.rstrip(b"\0")
    zeros = max(text[::2].count(0), text[1::2].count(0))
    if 4 * zeros > len(text) or (marked and zeros):
        return _decode_utf16(value)
    try:
        return value.decode("utf-8-sig")
    except UnicodeDecodeError:
        # In Chinese, few characters are zero in a byte: those of the programs' own words.
        return _decode_utf16(value) if marked or zeros > 8 else value.decode("latin-1")


def _decode_utf16(value: bytes) -> str:
    """The standard leaves the order of the bytes to the file, and writers differ: in the wrong one some characters are
    none, and fewer are Western letters."""

    def faults(order: str) -> tuple[int, int]:
        text = value[:SAMPLE_BYTES].decode(order, "replace")
        none = sum(one == "\ufffd" or unicodedata.category(one) in ("Cn", "Co") for one in text)
        return none, -sum(one < "\u0100" for one in text)

    return value.decode(min(("utf-16-le", "utf-16-be"), key=faults), "replace")


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each chunk that is no pixels."""
    found = islice(png.chunks(data), MAX_CHUNKS)
    return [(kind, data[at + 8 : end - 4]) for kind, at, end in found if kind != b"IDAT"]


def _png_texts(chunks: list[tuple[bytes, bytes]]) -> Iterator[tuple[str, Any]]:
    damaged = 0
    for kind, content in chunks:
        if kind in TEXT_CHUNKS:
            keyword, _, rest = content.partition(b"\0")
            text = _chunk_text(kind, rest)
            if text is not None:
                yield keyword.decode("latin-1"), text
                continue
            damaged += 1
            if damaged == MAX_DAMAGED:
                return


def _chunk_text(kind: bytes, rest: bytes) -> bytes | None:
    """The text of a chunk after its keyword, cut to MAX_TEXT_BYTES; None where it cannot be unpacked."""
    packed = kind == b"zTXt"
    if packed:
        rest = rest[1:]
    if kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    if not packed:
        return rest[:MAX_TEXT_BYTES]
    try:
        return zlib.decompressobj().decompress(rest, MAX_TEXT_BYTES)
    except zlib.error:
        return None


def _png_profiles(chunks: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Kind (small letters) and content of the profiles that ImageMagick writes into text chunks, in hexadecimal."""
    profiles = 0
    for kind, chunk in chunks:
        keyword, _, rest = chunk.partition(b"\0")
        if kind in (b"tEXt", b"zTXt", b"iTXt") and keyword.startswith(b"Raw profile type "):
            profiles += 1
            if profiles > MAX_PROFILES:
                return
            digits = b"".join((_chunk_text(kind, rest) or b"").split(b"\n")[3:])
            try:
                content = bytes.fromhex(digits[: len(digits) // 2 * 2].decode())
            except ValueError:
                continue
            yield keyword.split()[-1].lower(), content


def _png_profile_texts(chunks: list[tuple[bytes, bytes]]) -> Iterator[tuple[str, Any]]:
    for kind, content in _png_profiles(chunks):
        if kind == b"xmp" or content.startswith(XMP):
            yield XMP_CHUNK, content.removeprefix(XMP)
        elif kind in (b"iptc", b"8bim"):
            yield from _iptc_texts(content.removeprefix(PHOTOSHOP))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and content of each segment, also between and after the scans, whose pixels are left out."""
    place = 2
    for _ in range(MAX_SEGMENTS):
        found = MARKER.search(data, place)
        if found is None or found[0][1] == END:
            return
        place = found.end()
        size = int.from_bytes(data[place : place + 2])
        yield found[0][1], data[place + 2 : place + size]
        place += size


def _jpeg_readers(data: bytes) -> list[Iterator[tuple[str, Any]]]:
    comments, exif, resources, packets, extended = [], [], [], [], []
    for kind, content in _jpeg_segments(data):
        if kind == COMMENT:
            comments.append(content)
        elif kind == APP1 and content.startswith(EXIF):
            exif.append(content.removeprefix(EXIF).removeprefix(EXIF))
        elif kind == APP13 and content.startswith(PHOTOSHOP):
            resources.append(content.removeprefix(PHOTOSHOP))
        elif kind == APP1 and content.startswith(XMP):
            packets.append(content.removeprefix(XMP))
        elif kind == APP1 and content.startswith(EXTENDED_XMP):
            extended.append(content.removeprefix(EXTENDED_XMP))
    blocks = map(_exif_texts, _exif_blocks(exif))
    iptc = _iptc_texts(b"".join(resources)[:MAX_BYTES])
    return [_jpeg_comments(comments), *blocks, iptc, _jpeg_xmp(packets, extended)]


def _jpeg_xmp(packets: list[bytes], extended: list[bytes]) -> Iterator[tuple[str, Any]]:
    """Packets of a segment each, and the one whose parts lie in several, in their order."""
    extended.sort(key=lambda part: part[36:EXTENDED_XMP_HEAD])
    for packet in (*packets, b"".join(part[EXTENDED_XMP_HEAD:] for part in extended)[:MAX_TEXT_BYTES]):
        yield XMP_PACKET, packet


def _jpeg_comments(comments: list[bytes]) -> Iterator[tuple[str, Any]]:
    """A comment may be cut in two segments."""
    yield from (("Comment", comment) for comment in comments[:MAX_TEXTS])
    if len(comments) > 1:
        yield "Comment", b"".join(comments)[:MAX_TEXT_BYTES]


def _exif_blocks(contents: list[bytes]) -> list[bytes]:
    """A block that is longer than a segment goes on in the next ones."""
    blocks: list[list[bytes]] = []
    for content in contents:
        if content.startswith(TIFF_STARTS):
            blocks.append([content])
        elif blocks:
            blocks[-1].append(content)
    return [b"".join(block) for block in blocks[:MAX_EXIF_BLOCKS]]


def _iptc_texts(resources: bytes) -> Iterator[tuple[str, Any]]:
    """Texts of Photoshop's image resources, or of one that is IPTC-IIM by itself."""
    if resources.startswith(b"\x1c"):
        yield from _iim_texts(resources)
    place = 0
    while resources[place : place + 4] == b"8BIM":
        name = resources[place + 6] + 1
        start = place + 6 + name + name % 2 + 4
        size = int.from_bytes(resources[start - 4 : start])
        kind, content = int.from_bytes(resources[place + 4 : place + 6]), resources[start : start + size]
        if kind == IPTC_RESOURCE:
            yield from _iim_texts(content)
        elif kind == XMP_RESOURCE:
            yield XMP_PACKET, content[:MAX_TEXT_BYTES]
        place = start + size + size % 2


def _iim_texts(block: bytes) -> Iterator[tuple[str, Any]]:
    place = 0
    while place + 5 <= len(block) and block[place] == 0x1C:
        record, number = block[place + 1 : place + 3]
        size = int.from_bytes(block[place + 3 : place + 5])
        if record == 2 and number in IPTC_TEXTS:
            yield IPTC_TEXTS[number], block[place + 5 : place + 5 + size]
        place += 5 + size


def _gif_texts(data: bytes) -> Iterator[tuple[str, Any]]:
    for kind, start, end in gif.parts(data):
        if kind == gif.COMMENT:
            yield "Comment", gif.content(data, start, end)
        elif kind == gif.APPLICATION and data.startswith(GIF_XMP, start):
            # It is not cut into blocks: its bytes are taken for the lengths of blocks, and some after it end these.
            yield XMP_PACKET, data[start + len(GIF_XMP) : end][:MAX_TEXT_BYTES]


def _webp_texts(data: bytes) -> Iterator[tuple[str, Any]]:
    for kind, start, end in webp.chunks(data):
        if kind == b"EXIF":
            yield from _exif_texts(data[start + 8 : end])
        elif kind == b"XMP ":
            yield XMP_PACKET, data[start + 8 : end][:MAX_TEXT_BYTES]


def _iso_exif_texts(data: bytes) -> Iterator[tuple[str, Any]]:
    yield from _exif_texts(iso_media.exif(data))


def _iso_xmp(data: bytes) -> Iterator[tuple[str, Any]]:
    yield from ((XMP_PACKET, packet[:MAX_TEXT_BYTES]) for packet in iso_media.xmp(data))


def _png_exif_texts(chunks: list[tuple[bytes, bytes]]) -> Iterator[tuple[str, Any]]:
    """Pillow would decode all pixels, and unpack all texts, to find the EXIF."""
    block = next((content for kind, content in chunks if kind == b"eXIf"), None)
    if block is None:
        profiles = _png_profiles(chunks)
        block = next((content for kind, content in profiles if kind == b"exif" or content.startswith(EXIF)), b"")
    yield from _exif_texts(block)


def _exif_texts(block: bytes) -> Iterator[tuple[str, Any]]:
    """Texts of EXIF, or of a TIFF. Pillow would read all tags, each of which may hold the whole block."""
    block = block.removeprefix(EXIF).removeprefix(EXIF)
    if block.startswith(TIFF_STARTS):
        tiff = Tiff(block)
        for directory in (tiff.start, tiff.first.number(EXIF_IFD, 0)):
            values = tiff.values(directory, EXIF_TAGS, MAX_TEXT_BYTES)
            yield from ((name, values[tag]) for tag, name in EXIF_TAGS.items() if tag in values)
        blocks = tiff.values(tiff.start, (XMP_TAG, IPTC_TAG, PHOTOSHOP_TAG), MAX_BYTES)
        if XMP_TAG in blocks:
            yield XMP_PACKET, blocks.pop(XMP_TAG)[:MAX_TEXT_BYTES]
        for tag in sorted(blocks):
            yield from _iptc_texts(blocks[tag])
