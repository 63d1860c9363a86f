"""Name the format of an encoded image by its first bytes, whether or not it can be decoded.

The order of the tables is fixed, so that the same bytes always get the same name. A tar begins with the name of its
first file, which may be "GIF89a.gif": it has no name here.
"""

import re
import struct

# Offset and signature. What a camera's raw file is called is in patchscan.detector.tiff, except those below.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"II\xbc\x01", "JPEG XR"),
    (0, b"FUJIFILMCCD-RAW", "Fujifilm RAF"),
    (0, b"II\x1a\0\0\0HEAPCCDR", "Canon CRW"),
    (0, b"IIRO", "Olympus ORF"),
    (0, b"IIRS", "Olympus ORF"),
    (0, b"MMOR", "Olympus ORF"),
    (0, b"IIU\0", "Panasonic RW2"),
    (0, b"\0MRM", "Minolta MRW"),
    (0, b"FOVb", "Sigma X3F"),
    (0, b"ARRI\x12\x34\x56\x78", "ARRI ARI"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM*\0", "TIFF"),
    (0, b"II\0*", "TIFF"),
    (0, b"8BPS\0", "PSD"),
    (0, b"gimp xcf ", "XCF"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE\n", "Radiance HDR"),
    (0, b"#?RGBE\n", "Radiance HDR"),
    (0, b"SDPX", "DPX"),
    (0, b"XPDS", "DPX"),
    (128, b"DICM", "DICOM"),
    (0, b"AT&TFORM", "DjVu"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"qoif", "QOI"),
    (0, b"DDS |\0\0\0", "DDS"),
    (0, b"\xabKTX ", "KTX"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"icns", "ICNS"),
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"%PDF-", "PDF"),
    (0, b"\xd7\xcd\xc6\x9a\0\0", "WMF"),
    (40, b" EMF\0\0\1\0", "EMF"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x01\xda", "SGI"),
    (0, b"\x59\xa6\x6a\x95", "Sun raster"),
    (0, b"/* XPM */", "XPM"),
    (0, b"\x8aMNG\r\n\x1a\n", "MNG"),
    (0, b"\x8bJNG\r\n\x1a\n", "JNG"),
)
_HEIF_BRANDS = frozenset(b"heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1 miaf".split())
_AVIF_BRANDS = frozenset(b"avif avis".split())
_BMP_HEADERS = frozenset((12, 16, 40, 52, 56, 64, 108, 124))
_TGA_DEPTHS = frozenset((8, 15, 16, 24, 32))


def format_of(data: bytes) -> str | None:
    """Return the name of the format whose signature the bytes carry (`JPEG`, `HEIF`, `JPEG XL`, ...), None if none."""
    if _is_tar(data):
        return None
    for offset, signature, name in _SIGNATURES:
        if data.startswith(signature, offset):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return _iso_media(data)
    # The reserved bytes are zero in BMP files, and the header's length is one of a few.
    if data[:2] == b"BM" and (len(data) < 18 or struct.unpack_from("<I", data, 14)[0] in _BMP_HEADERS):
        return "BMP"
    if data[:1] == b"P" and data[1:2] in b"1234567Ff" and data[2:3] in b" \t\r\n#":
        return "PNM"
    if _is_svg(data):
        return "SVG"
    return "TGA" if _is_tga(data) else None


def _is_tar(data: bytes) -> bool:
    """The mark of a tar with the sum of its header's bytes, in which the sum itself counts as spaces: an image may have
    the mark alone in its metadata."""
    if data[257:262] != b"ustar":
        return False
    field = data[148:156]
    stated = re.match(rb" *([0-7]+)[ \0]", field)
    return stated is not None and int(stated[1], 8) == sum(data[:512]) - sum(field) + 8 * ord(" ")


def _iso_media(data: bytes) -> str | None:
    """HEIF and AVIF by their brands; None for films, which have the same container."""
    size = min(max(struct.unpack_from(">I", data)[0], 16), 1024)
    brands = [data[8:12]] + [data[at : at + 4] for at in range(16, min(size, len(data)), 4)]
    if brands[0] == b"crx ":
        return "Canon CR3"
    if brands[0] in _AVIF_BRANDS or (brands[0] in (b"mif1", b"msf1", b"miaf") and _AVIF_BRANDS & set(brands)):
        return "AVIF"
    return "HEIF" if brands[0] in _HEIF_BRANDS else None


def _is_svg(data: bytes) -> bool:
    start = data[:4096]
    encoding = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}.get(start[:2], "utf-8-sig")
    text = start.decode(encoding, "ignore").lstrip().lower()
    if text.startswith("<svg"):
        return True
    return text.startswith(("<?xml", "<!doctype svg", "<!--")) and ("<svg" in text or ":svg " in text)


def _is_tga(data: bytes) -> bool:
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
