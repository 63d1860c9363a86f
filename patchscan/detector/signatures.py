"""Name the format of an encoded image by its first bytes, whether or not it can be decoded.

The order of the tables is fixed, so that the same bytes always get the same name. A tar begins with the name of its
first file, which may be "GIF89a.gif": it has no name here.
"""

import re
import struct
from collections.abc import Callable

from patchscan.detector import file_headers

# Offset and signatures. What a camera's raw file is called is in patchscan.detector.tiff, except those below.
_SIGNATURES: tuple[tuple[int, bytes | tuple[bytes, ...], str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, (b"GIF87a", b"GIF89a"), "GIF"),
    (0, (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"), "JPEG XL"),
    (0, (b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x0cjP\x1a\x1a\r\n\x87\n", b"\xff\x4f\xff\x51"), "JPEG 2000"),
    (0, (b"II\xbc\x01", b"II\xbc\0"), "JPEG XR"),
    (0, b"FUJIFILMCCD-RAW", "Fujifilm RAF"),
    (0, b"II\x1a\0\0\0HEAPCCDR", "Canon CRW"),
    (0, (b"IIRO", b"IIRS", b"MMOR"), "Olympus ORF"),
    (0, b"IIU\0", "Panasonic RW2"),
    (0, b"\0MRM", "Minolta MRW"),
    (0, b"FOVb", "Sigma X3F"),
    (0, b"ARRI\x12\x34\x56\x78", "ARRI ARI"),
    (0, (b"MM\0*", b"II*\0", b"MM\0+", b"II+\0", b"MM*\0", b"II\0*"), "TIFF"),
    (0, b"8BPS\0", "PSD"),
    (0, b"gimp xcf ", "XCF"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, (b"#?RADIANCE", b"#?RGBE"), "Radiance HDR"),
    (0, (b"SDPX", b"XPDS"), "DPX"),
    (128, b"DICM", "DICOM"),
    (0, b"AT&TFORM", "DjVu"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"qoif", "QOI"),
    (0, b"DDS |\0\0\0", "DDS"),
    (0, b"\xabKTX ", "KTX"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"icns", "ICNS"),
    (0, (b"%!PS", b"\xc5\xd0\xd3\xc6"), "EPS"),
    (0, b"%PDF-", "PDF"),
    (0, b"\xd7\xcd\xc6\x9a\0\0", "WMF"),
    (40, b" EMF\0\0\1\0", "EMF"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x01\xda", "SGI"),
    (0, b"\x59\xa6\x6a\x95", "Sun raster"),
    (0, (b"/* XPM */", b"! XPM2"), "XPM"),
    (0, (b"\0\0\0\x0cJXS \r\n\x87\n", b"\xff\x10\xff\x50"), "JPEG XS"),
    (0, b"\x97JB2\r\n\x1a\n", "JBIG2"),
    (0, (b"\x80\x2a\x5f\xd7", b"\xd7\x5f\x2a\x80"), "Cineon"),
    (0, b"\x13\xab\xa1\x5c", "ASTC"),
    (0, b"Paint Shop Pro Image File\n\x1a", "PSP"),
    (2048, b"PCD_IPI", "Photo CD"),
    (522, b"\0\x11\2\xff\x0c\0", "PICT"),
    (0, b"\x8aMNG\r\n\x1a\n", "MNG"),
    (0, b"\x8bJNG\r\n\x1a\n", "JNG"),
    (0, b"\x89LFP\r\n\x1a\n", "Lytro LFP"),
    (0, b"\xb1\x68\xde\x3a", "DCX"),
    (0, b"\x80\xe8\0\0", "PIXAR"),
    (0, b"farbfeld", "farbfeld"),
    (0, b"FTEX", "FTEX"),
    (0, b"VTF\0", "VTF"),
    (0, b"PVR\3", "PVR"),
    (0, (b"\x08\xf2\xa6\xb6", b"\xb6\xa6\xf2\x08"), "VIPS"),
    (0, b"id=ImageMagick", "MIFF"),
    (0, (b"NITF02", b"NSIF01"), "NITF"),
    (0, b"CSFCHUNK", "Clip Studio"),
    (0, b"CPT9FILE", "Corel Photo-Paint"),
    (0, b"\xffWPC\x10\0\0\0\1\x16", "WPG"),
    (0, b"\1\0\x09\0\0\3", "WMF"),
    (0, b"ZISRAWFILE\0", "Zeiss CZI"),
)
# The same for signatures with gaps, choices or a text.
_PATTERNS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"RIFF....WEBP", "WEBP"),
        (rb"RIFF....ACON", "ANI"),
        (rb"FORM....(?:ILBM|PBM |ACBM|RGB8|RGBN|DEEP)", "ILBM"),
        (rb"BLP[12][\x00\x01]\x00\x00\x00", "BLP"),
        (rb"FLIF[134ACDQSTacd]", "FLIF"),
        (rb"\x00\x00\x02\x00[^\x00]\x00...\x00", "CUR"),
        (rb"Image type: .{499}\x1a", "IM"),
        (rb"P(?:[1-6FfHh](?:\s+[\d#]|#)|7\s)", "PNM"),
        (rb"/\*\s*XPM\s*\*/", "XPM"),
        (rb"RIFF....CDR", "CorelDRAW"),
        (rb"BA.{12}(?:BM|IC|CI|PT|CP)", "OS/2 bitmap array"),
        (rb".{4}[\x11\x12]\xaf.{6}\x08\x00[\x00\x03]\x00", "FLIC"),
        (rb"\x00{2}..\x00{3}\x02.{12}GIMP", "GIMP brush"),
        (rb"\s*+(?>/\*.*?\*/\s*+)*+#define\s+\w*width\s+\d{1,6}\s+#define\s+\w*height\s+\d{1,6}.*?_bits\[", "XBM"),
    )
)
_SEARCHED = 4096
_HEADERS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (file_headers.is_bmp, "BMP"),
    (file_headers.is_svg, "SVG"),
    (file_headers.is_pcx, "PCX"),
    (file_headers.is_dib, "DIB"),
    (file_headers.is_msp, "MSP"),
    (file_headers.is_spider, "SPIDER"),
    (file_headers.is_tga, "TGA"),
    (file_headers.is_palm, "Palm bitmap"),
    (file_headers.is_wbmp, "WBMP"),
)
# Brands of ISO base media that say how the pictures are packed, and those that only say that there are some.
_BRANDS = {
    **dict.fromkeys(b"heic heix heim heis hevc hevx hevm hevs".split(), "HEIF"),
    **dict.fromkeys(b"avif avis".split(), "AVIF"),
    b"crx ": "Canon CR3",
    **dict.fromkeys(b"jpeg jpgs".split(), "HEIF (JPEG)"),
    **dict.fromkeys(b"j2ki j2is".split(), "HEIF (JPEG 2000)"),
    **dict.fromkeys(b"avci avcs".split(), "HEIF (AVC)"),
    **dict.fromkeys(b"vvic vvis".split(), "HEIF (VVC)"),
    b"unif": "HEIF (uncompressed)",
    b"mif3": "HEIF (low overhead)",
}
_PICTURE_BRANDS = frozenset(b"mif1 mif2 msf1 miaf".split())


def format_of(data: bytes) -> str | None:
    """Return the name of the format whose signature the bytes carry (`JPEG`, `HEIF`, `JPEG XL`, ...), None if none."""
    if file_headers.is_tar(data):
        return None
    for offset, signatures, name in _SIGNATURES:
        if data.startswith(signatures, offset):
            return name
    if data[4:8] == b"ftyp":
        return _iso_media(data)
    for pattern, name in _PATTERNS:
        if pattern.match(data, 0, _SEARCHED):
            return name
    return next((name for is_one, name in _HEADERS if is_one(data)), None)


def _iso_media(data: bytes) -> str | None:
    """HEIF and AVIF by their brands; None for films, which have the same container.

    The first brand names the file, unless it is unknown or says little: then the compatible ones do.
    """
    size = min(max(struct.unpack_from(">I", data)[0], 16), 1024)
    brands = [data[8:12]] + [data[at : at + 4] for at in range(16, min(size, len(data)), 4)]
    named = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
    if brands[0] in _BRANDS:
        return named[0]
    if "AVIF" in named:
        return "AVIF"
    if "HEIF" in named or brands[0] in _PICTURE_BRANDS:
        return "HEIF"
    return named[0] if named else None
