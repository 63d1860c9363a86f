"""Read the texts that an image file holds beside its pixels: text chunks, comments, EXIF and XMP, however encoded."""

import io
import re
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image

# Longer texts are cut; what generators write begins, or ends, within this.
MAX_TEXT_BYTES = 2**20
MAX_TEXTS, MAX_BYTES = 1000, 2**22  # of one file
MAX_DAMAGED = 16  # packed texts that cannot be unpacked: up to where they are damaged each takes as long as another
PNG_SIGNATURE, XMP_CHUNK = b"\x89PNG\r\n\x1a\n", "XML:com.adobe.xmp"
EXIF_IFD = 0x8769
EXIF_TAGS = {
    0x010E: "ImageDescription",
    0x010F: "Make",
    0x0110: "Model",
    0x0131: "Software",
    0x013B: "Artist",
    0x9C9B: "XPTitle",
    0x9C9C: "XPComment",
    0x9286: "UserComment",
}
# XMP is mostly UTF-8; of a packet in UTF-16 every second byte is zero.
UTF16_XMP = re.compile(rb"x\0(?:m\0p\0m\0e\0t\0a|a\0p\0m\0e\0t\0a)|r\0d\0f\0:\0R\0D\0F")


def file_texts(data: bytes, image_format: str) -> list[tuple[str, str]]:
    """Return names and texts of an encoded image: a chunk's keyword, `Comment`, or an EXIF tag's name. Damaged metadata
    has no texts."""
    found = {"PNG": _png_texts, "JPEG": _jpeg_comments, "MPO": _jpeg_comments, "GIF": _gif_comments}.get(image_format)
    texts: list[tuple[str, str]] = []
    left = MAX_BYTES
    for read in (found, _png_exif_texts if image_format == "PNG" else _exif_texts):
        try:
            for name, value in read(data) if read else ():
                # What decodes to nothing, as a million zeros do, takes as long as other texts.
                left -= len(value) if isinstance(value, bytes | str | tuple) else 0
                if len(texts) >= MAX_TEXTS or left < 0:
                    break
                texts.append((name, decode_text(value)))
        except Exception:  # noqa: BLE001,S112  hostile metadata makes a reader raise anything
            continue
    return texts


def xmp_packets(data: bytes, texts: list[tuple[str, str]]) -> list[bytes]:
    """Return bytes that hold all XMP of a file as UTF-8: the file itself, and packets that are packed or in UTF-16."""
    packets = [data, *(text.encode() for name, text in texts if name == XMP_CHUNK)]
    if UTF16_XMP.search(data):
        packets.append(data.replace(b"\0", b""))
    return packets


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
    value = value[8:] if marked or value.startswith((b"ASCII\0\0\0", bytes(8))) else value
    if value.startswith((b"\xff\xfe", b"\xfe\xff")):
        return value.decode("utf-16", "replace")
    # Western letters are zero in one byte of two. The standard leaves the order to the file, and writers differ.
    first, second = value[::2].count(0), value[1::2].count(0)
    if marked or 4 * max(first, second) > len(value):
        return value.decode("utf-16-be" if first > second else "utf-16-le", "replace")
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each chunk that is no pixels."""
    place = len(PNG_SIGNATURE)
    while place + 8 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        if kind != b"IDAT":
            yield kind, data[place + 8 : place + 8 + size]
        place += 12 + size


def _png_texts(data: bytes) -> Iterator[tuple[str, Any]]:
    damaged = 0
    for kind, content in _png_chunks(data):
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, rest = content.partition(b"\0")
            text = _chunk_text(kind, rest)
            if text is not None:
                yield keyword.decode("latin-1"), text
                continue
            damaged += 1
            if damaged == MAX_DAMAGED:
                return


def _chunk_text(kind: bytes, rest: bytes) -> bytes | None:
    """The text of a chunk after its keyword; None where it cannot be unpacked."""
    packed = kind == b"zTXt"
    if packed:
        rest = rest[1:]
    if kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    if not packed:
        return rest
    try:
        return zlib.decompressobj().decompress(rest, MAX_TEXT_BYTES)
    except zlib.error:
        return None


def _jpeg_comments(data: bytes) -> Iterator[tuple[str, Any]]:
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        kind = data[place + 1]
        if kind == 0xFF:  # a filling byte
            place += 1
            continue
        if kind == 0xDA:  # the pixels begin
            return
        size = int.from_bytes(data[place + 2 : place + 4])
        if kind == 0xFE:
            yield "Comment", data[place + 4 : place + 2 + size]
        place += 2 + size


def _gif_comments(data: bytes) -> Iterator[tuple[str, Any]]:
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while place + 2 < len(data) and data[place] in (0x21, 0x2C):
        comment = data[place : place + 2] == b"\x21\xfe"
        if data[place] == 0x2C:
            packed = data[place + 9]
            place += 10 + (3 << (packed & 7) + 1 if packed & 0x80 else 0) + 1
        else:
            place += 2
        blocks = []
        while place < len(data) and data[place]:
            if comment:
                blocks.append(data[place + 1 : place + 1 + data[place]])
            place += 1 + data[place]
        place += 1
        if comment:
            yield "Comment", b"".join(blocks)


def _exif_texts(data: bytes) -> Iterator[tuple[str, Any]]:
    with Image.open(io.BytesIO(data)) as image:
        yield from _texts_of_exif(image.getexif())


def _png_exif_texts(data: bytes) -> Iterator[tuple[str, Any]]:
    """Pillow would decode all pixels, and unpack all texts, to find the EXIF."""
    block = b""
    for kind, content in _png_chunks(data):
        keyword, _, rest = content.partition(b"\0")
        if kind == b"eXIf":
            block = content
            break
        if kind in (b"tEXt", b"zTXt") and keyword == b"Raw profile type exif" and not block:  # of ImageMagick
            lines = (_chunk_text(kind, rest) or b"").split(b"\n")
            block = bytes.fromhex(b"".join(lines[3:]).decode())
    exif = Image.Exif()
    exif.load(block)
    yield from _texts_of_exif(exif)


def _texts_of_exif(exif: Image.Exif) -> Iterator[tuple[str, Any]]:
    for tags in (exif, exif.get_ifd(EXIF_IFD)):
        yield from ((name, tags[tag]) for tag, name in EXIF_TAGS.items() if tag in tags)
