"""Files as strangers store them: scored as every viewer shows them, or refused by name; never wrong pixels."""

import gzip
import io
import os
import random
import re
import struct
import subprocess
import sys
import time
import weakref
import zlib
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
from PIL import Image

from patchscan.detector import gif, segments, tiff
from patchscan.detector.images import ErrorCode, ImageError, decode, decoded_bytes
from patchscan.detector.signatures import format_of
from tests.image_tree import picture
from tests.jpegs import segment, three_scans

PHOTO = picture(3, 96, 80)
GREY = PHOTO[..., 1]
DEEP = np.random.RandomState(0).randint(0, 65536, PHOTO.shape).astype(np.uint16)


def encoded(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, kind, **options)
    return file.getvalue()


def tiff_of(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def rejection(data: bytes) -> tuple[ErrorCode, str]:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return caught.value.code, caught.value.message


def directory(entries: list[tuple[int, int, int, int]], order: str, following: int = 0) -> bytes:
    packed = b"".join(struct.pack(order + "HHII", *entry) for entry in entries)
    return struct.pack(order + "H", len(entries)) + packed + struct.pack(order + "I", following)


def raw_file(make: bytes, order: str = "<", tag: int = 330, photometric: int = 32803) -> bytes:
    """A camera's raw file: an RGB thumbnail of 16 x 16 first, and the sensor's picture in a directory that `tag` names.

    A short number in big-endian order lies in the upper half of its field.
    """
    short = 1 if order == "<" else 1 << 16
    at_make, at_raw, at_pixels = 300, 400, 500
    entries = [(254, 4, 1, 1), (256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8 * short), (259, 3, 1, short)]
    entries += [
        (262, 3, 1, 2 * short),
        (271, 2, len(make) + 1, at_make),
        (273, 4, 1, at_pixels),
        (277, 3, 1, 3 * short),
    ]
    entries += [(278, 4, 1, 16), (279, 4, 1, 768), (tag, 4, 1, at_raw)]
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    data = (header + directory(entries, order)).ljust(at_make, b"\0") + make
    sensor = [(256, 4, 1, 64), (257, 4, 1, 64), (262, 3, 1, photometric * short)]
    return (data.ljust(at_raw, b"\0") + directory(sensor, order)).ljust(at_pixels, b"\0") + bytes(768)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (b"NIKON CORPORATION", "Nikon NEF"),
        (b"SONY", "Sony ARW"),
        (b"PENTAX", "Pentax PEF"),
        (b"RICOH IMAGING COMPANY, LTD.", "Pentax PEF"),
        (b"SAMSUNG", "Samsung SRW"),
        (b"Hasselblad", "Hasselblad 3FR"),
        (b"EASTMAN KODAK COMPANY", "Kodak DCR"),
        (b"A maker of tomorrow", "camera raw"),
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [32803, 34892])
def test_a_raw_file_is_refused_by_its_makers_name(make: bytes, name: str, order: str, photometric: int) -> None:
    code, message = rejection(raw_file(make, order, photometric=photometric))
    assert code == ErrorCode.UNSUPPORTED_FORMAT
    assert name in message


def test_the_dng_tag_and_signatures_of_other_raw_files() -> None:
    plain = encoded("TIFF")
    assert "DNG" in rejection(raw_file(b"Google", tag=50706))[1]
    assert "Canon CR2" in rejection(b"II*\0\x10\0\0\0CR\x02\0" + raw_file(b"Canon")[12:])[1]
    for start, name in [
        (b"IIRO", "ORF"), (b"IIRS", "ORF"), (b"MMOR", "ORF"), (b"IIU\0", "RW2"), (b"FUJIFILMCCD-RAW ", "RAF"),
        (b"II\x1a\0\0\0HEAPCCDR", "CRW"), (b"\0MRM", "MRW"), (b"FOVb", "X3F"), (b"\0\0\0\x18ftypcrx \0\0\0\1", "CR3"),
    ]:  # fmt: skip
        code, message = rejection(start + plain[len(start) :])
        assert (code, name in message) == (ErrorCode.UNSUPPORTED_FORMAT, True), message


def test_a_thumbnail_is_not_scored_in_place_of_its_picture() -> None:
    code, message = rejection(raw_file(b"Scanner", photometric=2))
    assert (code, "thumbnail" in message) == (ErrorCode.UNSUPPORTED_FORMAT, True)
    for old in (1, 2, 3):  # the picture, the same in fewer pixels, a page
        data = tiff_of(PHOTO, photometric="rgb", extratags=[(255, 3, 1, old, True)])
        if old == 2:
            assert rejection(data) == (code, message)
        else:
            assert np.array_equal(decode(data).rgb, PHOTO)
    assert np.array_equal(decode(tiff_of(PHOTO, photometric="rgb", metadata={"Make": "NIKON"})).rgb, PHOTO)


def test_a_first_picture_smaller_than_its_subdirectory_is_a_thumbnail() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(PHOTO[:16, :16], photometric="rgb", subifds=1)
        writer.write(PHOTO, photometric="rgb")
    code, message = rejection(file.getvalue())
    assert (code, "thumbnail" in message) == (ErrorCode.UNSUPPORTED_FORMAT, True)
    pyramid = io.BytesIO()
    with tifffile.TiffWriter(pyramid) as writer:
        writer.write(PHOTO, photometric="rgb", subifds=1)
        writer.write(PHOTO[::2, ::2], photometric="rgb", subfiletype=1)
    assert np.array_equal(decode(pyramid.getvalue()).rgb, PHOTO)


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_a_tiffs_palette_may_hold_numbers_of_8_bits(byteorder: Literal["<", ">"]) -> None:
    """As old writers make them, and as libtiff reads them; Pillow alone would make all black."""
    colours = np.random.RandomState(1).randint(0, 256, (3, 256)).astype(np.uint16)
    for scale in (1, 257):
        data = tiff_of(GREY, photometric="palette", colormap=colours * scale, byteorder=byteorder)
        assert np.array_equal(decode(data).rgb, np.dstack(list(colours[:, GREY])))


def test_inks_and_differences_that_the_decoder_does_not_know_are_refused() -> None:
    inks = tiff_of(np.dstack([PHOTO, GREY]), photometric="separated", extratags=[(332, "H", 1, 2, True)])
    assert rejection(inks) == (ErrorCode.UNSUPPORTED_FORMAT, "TIFF images of other inks than CMYK are not supported")
    packed = tiff_of(PHOTO, photometric="rgb", compression="zlib", predictor=True)
    assert np.array_equal(decode(packed).rgb, PHOTO)
    compression = struct.pack("<HHI", 259, 3, 1)
    at = packed.index(compression) + len(compression)
    for other in (1, 32773):  # none, PackBits
        assert "differences" in rejection(packed[:at] + struct.pack("<H", other) + packed[at + 2 :])[1]


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("tile", [None, (32, 32)])
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (PHOTO, {"photometric": "rgb"}),
        (PHOTO.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
        (DEEP, {"photometric": "rgb"}),
        (DEEP.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
        (GREY, {"photometric": "minisblack"}),
        (GREY, {"photometric": "miniswhite"}),
        (DEEP[..., 0], {"photometric": "minisblack"}),
        (DEEP[..., 0], {"photometric": "miniswhite"}),
        (GREY.astype(np.int8), {"photometric": "minisblack"}),
        (DEEP[..., 0].astype(np.int16), {"photometric": "minisblack"}),
        (GREY.astype(np.uint32), {"photometric": "minisblack"}),
        (GREY.astype(np.int32), {"photometric": "minisblack"}),
        (GREY / np.float16(255), {"photometric": "minisblack"}),
        (GREY.astype(np.float32), {"photometric": "minisblack"}),
        (GREY.astype(np.float64), {"photometric": "minisblack"}),
        (PHOTO / np.float32(255), {"photometric": "rgb"}),
        (PHOTO.astype(np.uint32), {"photometric": "rgb"}),
        (np.dstack([PHOTO, GREY]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        (np.dstack([DEEP, DEEP[..., 0]]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        (np.dstack([GREY, np.full_like(GREY, 255)]), {"photometric": "minisblack", "extrasamples": ["assocalpha"]}),
    ],
)
def test_tiff_pixels_are_those_of_another_decoder_or_refused(
    pixels: np.ndarray, options: dict[str, Any], byteorder: Any, compression: Any, tile: Any, bigtiff: bool
) -> None:
    data = tiff_of(pixels, byteorder=byteorder, compression=compression, tile=tile, bigtiff=bigtiff, **options)
    page = tifffile.TiffFile(io.BytesIO(data)).pages[0]
    expected = page.asarray()
    if options.get("planarconfig") == "separate":
        expected = expected.transpose(1, 2, 0)
    if expected.dtype == np.uint16:
        expected = (expected >> 8).astype(np.uint8)
    if options["photometric"] == "miniswhite":
        expected = 255 - expected
    if options["photometric"] != "rgb":
        grey = expected if expected.ndim == 2 else expected[..., 0]
        expected = np.dstack([grey] * 3)
    try:
        decoded = decode(data).rgb
    except ImageError as error:
        assert error.code == ErrorCode.UNSUPPORTED_FORMAT  # noqa: PT017 -- either outcome is right
        # What is read without doubt must not be refused.
        assert pixels.dtype != np.uint8 or options.get("planarconfig") or (bigtiff and byteorder == ">")
        return
    assert np.array_equal(decoded, expected[..., :3])


def test_tiff_of_many_bit_depths_is_refused_by_name() -> None:
    data = bytearray(tiff_of(GREY, photometric="minisblack"))
    at = data.index(struct.pack("<HHI", 258, 3, 1)) + 8
    for depth in (3, 5, 10, 12, 14, 24):
        struct.pack_into("<H", data, at, depth)
        code, message = rejection(bytes(data))
        assert (code, f"{depth} bits" in message) == (ErrorCode.UNSUPPORTED_FORMAT, True), message


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


TEXTS = {
    "wrong CRC": chunk(b"tEXt", b"Comment\0text", crc=1),
    "3 MB of compressed text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))),
    "3 MB of international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
    "a profile of 3 MB": chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
    "a profile that does not unpack": chunk(b"iCCP", b"profile\0\0not zlib"),
    "80 MB of texts": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000))) * 80,
    "damaged EXIF": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "short fields": chunk(b"pHYs", b"\0") + chunk(b"gAMA", b"") + chunk(b"cHRM", b"\0") + chunk(b"sRGB", b""),
    "short animation control": chunk(b"acTL", b"\0") + chunk(b"fcTL", b"\0"),
    "unknown": chunk(b"abCd", bytes(100), crc=7),
    "a palette that nothing points into": chunk(b"PLTE", bytes(30), crc=7),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_not_pixels_cannot_reject_a_png(name: str) -> None:
    whole = encoded("PNG")
    end = whole.index(b"IEND") - 4
    for data in (whole[:33] + TEXTS[name] + whole[33:], whole[:end] + TEXTS[name] + whole[end:]):
        assert np.array_equal(decode(data).rgb, PHOTO)


def test_a_png_needs_its_pixels_not_its_end() -> None:
    whole = encoded("PNG")
    end = whole.index(b"IEND") - 4
    for tail in (b"", b"\0\0\0\0IE", b"garbage of no chunk", chunk(b"tEXt", b"Comment\0text")[:-7]):
        assert np.array_equal(decode(whole[:end] + tail).rgb, PHOTO)
    assert rejection(whole[: end - 40])[0] == ErrorCode.TRUNCATED
    packed = zlib.compress(bytes(PHOTO.shape[0] * (PHOTO.shape[1] * 3 + 1)))
    black = np.zeros_like(PHOTO)
    for parts in ([packed[:-4] + b"sum!"], [packed[:20], packed[20:-2] + b"su"], [packed[:-3], b"u", b"m!"]):
        chunks = [chunk(b"IDAT", part) for part in parts]
        assert np.array_equal(decode(whole[:33] + b"".join(chunks) + whole[end:]).rgb, black)
    damaged = chunk(b"IDAT", packed[:-4] + b"sum!", crc=1)
    assert rejection(whole[:33] + damaged + whole[end:])[0] == ErrorCode.TRUNCATED
    # A wrong checksum of what the pixels need stays an error.
    assert rejection(whole[:29] + b"\0\0\0\0" + whole[33:])[0] == ErrorCode.TRUNCATED


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("black", [False, True])
def test_a_png_with_fewer_rows_than_it_says_is_truncated(mode: str, black: bool) -> None:
    """Pillow leaves the other rows black."""
    photo, file = Image.fromarray(PHOTO * (not black)), io.BytesIO()
    (Image.fromarray(DEEP[..., 0] * (not black)) if mode == "I;16" else photo.convert(mode)).save(file, "PNG")
    whole = file.getvalue()
    at, end = whole.index(b"IDAT") - 4, whole.index(b"IEND") - 4
    rows = zlib.decompress(whole[at + 8 : end - 4])
    size = len(rows) // PHOTO.shape[0]
    for lost in (1, size, len(rows) // 2):
        fewer = chunk(b"IDAT", zlib.compress(rows[:-lost]))
        assert rejection(whole[:at] + fewer + whole[end:])[0] == ErrorCode.TRUNCATED, lost
    more = chunk(b"IDAT", zlib.compress(rows + bytes(size)))
    assert np.array_equal(decode(whole[:at] + more + whole[end:]).rgb, decode(whole).rgb)


def test_an_interlaced_png_with_fewer_rows_than_it_says_is_truncated() -> None:
    # Nine grey pixels a side, in Adam7's seven passes: the rows of each have a filter and so many pixels.
    passes = [(2, 2), (2, 1), (1, 3), (3, 2), (2, 5), (5, 4), (4, 9)]
    for value in (0, 200):
        rows = b"".join((b"\0" + bytes([value]) * columns) * count for count, columns in passes)
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 1))
        data = [b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(part)) for part in (rows, rows[:-10])]
        assert (decode(data[0]).rgb == value).all()
        assert rejection(data[1])[0] == ErrorCode.TRUNCATED


def test_a_png_without_the_palette_that_it_needs_is_truncated() -> None:
    file = io.BytesIO()
    Image.fromarray(PHOTO).convert("P").save(file, "PNG")
    whole = file.getvalue()
    at, pixels, end = whole.index(b"PLTE") - 4, whole.index(b"IDAT") - 4, whole.index(b"IEND") - 4
    for late in (b"", whole[at:pixels]):
        assert rejection(whole[:at] + whole[pixels:end] + late + whole[end:])[0] == ErrorCode.TRUNCATED


@pytest.mark.parametrize(
    "metadata",
    [
        segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        segment(0xE1, b"Exif\0\0"),
        segment(0xE2, b"ICC_PROFILE\0\x05\x01damaged"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE0, b"JFIF\0"),
        segment(0xE0, b"JFIF\0\1\1\0\0\1"),
        segment(0xEE, b"Adobe"),
        segment(0xFE, b"hello") + b"\0",
        segment(0xE1, b"Exif")[:-4] + b"\0\0ExifExif",
        segment(0xFE, b"hello") + b"\0\xff\0\xff\xff",
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\1"),
        segment(0xFE, b"c" * 60_000) * 300,
        segment(0xFE, b"") * 200_000,
    ],
    ids=[
        "EXIF",
        "empty EXIF",
        "profile",
        "empty profile",
        "empty JFIF",
        "short JFIF",
        "empty Adobe",
        "stray byte",
        "short EXIF",
        "strays",
        "Photoshop",
        "18 MB of comments",
        "200,000 comments",
    ],
)
def test_what_is_not_pixels_cannot_reject_a_jpeg(metadata: bytes) -> None:
    whole = encoded("JPEG", quality=90)
    started = time.process_time()
    for at in (2, whole.index(b"\xff\xdb"), whole.index(b"\xff\xda")):
        assert np.array_equal(decode(whole[:at] + metadata + whole[at:]).rgb, decode(whole).rgb)
    assert time.process_time() - started < 2


def riff(*chunks: bytes, odd: int = 0) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + sum(map(len, chunks)) + odd) + b"WEBP" + b"".join(chunks)


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("alpha", [True, False])
def test_what_is_not_pixels_cannot_reject_a_webp(lossless: bool, alpha: bool) -> None:
    file = io.BytesIO()
    photo = Image.fromarray(np.dstack([PHOTO, GREY]) if alpha else PHOTO)
    photo.save(file, "WEBP", lossless=lossless, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    whole = file.getvalue()
    chunks, end = whole[12 : whole.index(b"EXIF")], whole.index(b"EXIF")
    expected = np.asarray(Image.open(file).convert("RGB"))
    unknown = b"abcd" + struct.pack("<I", 2) + b"xx"
    for data in [
        riff(chunks, b"EXIF" + struct.pack("<I", 10**6) + b"junk"),
        riff(chunks, b"abc"),
        riff(unknown, chunks, unknown),
        riff(chunks, odd=-8),
        riff(chunks, odd=10**6),
        riff(chunks) + b"stray",
        *(whole[:cut] for cut in range(end, len(whole))),
    ]:
        assert np.array_equal(decode(data).rgb, expected)
    for cut in (end - 4, end - 40, 60):
        assert rejection(whole[:cut])[0] == ErrorCode.TRUNCATED


def test_a_webps_last_filling_byte_is_no_pixel() -> None:
    for seed in range(20):
        file = io.BytesIO()
        Image.fromarray(picture(seed, 96, 80)).save(file, "WEBP", lossless=True)
        whole = file.getvalue()
        if struct.unpack_from("<I", whole, 16)[0] % 2:
            break
    assert np.array_equal(decode(whole[:-1]).rgb, decode(whole).rgb)
    assert rejection(whole[:-2])[0] == ErrorCode.TRUNCATED


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
@pytest.mark.parametrize("xmp", [b"", b"<x/>"])
def test_what_is_not_pixels_cannot_reject_an_avif_or_heic(kind: str, xmp: bytes) -> None:
    whole = encoded(kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", **({"xmp": xmp} if xmp else {}))
    expected = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))
    at = whole.rindex(b"MM\0*")
    for junk in (b"\xff" * 4, b"\xff" * 8):
        assert np.array_equal(decode(whole[:at] + junk + whole[at + len(junk) :]).rgb, expected)
    if kind == "HEIF":  # its metadata comes last
        assert np.array_equal(decode(whole[:-1]).rgb, expected)
        assert np.array_equal(decode(whole[: at - 10]).rgb, expected)
        whole = whole[: at - 10]
    assert rejection(whole[:-1])[0] == ErrorCode.TRUNCATED


def test_the_colours_of_a_jpeg_still_follow_its_adobe_segment() -> None:
    cmyk = io.BytesIO()
    Image.fromarray(PHOTO).convert("CMYK").save(cmyk, "JPEG", quality=95)
    expected = np.asarray(Image.open(cmyk).convert("RGB"))
    assert np.array_equal(decode(cmyk.getvalue()).rgb, expected)
    stays = io.BytesIO()
    Image.fromarray(PHOTO).save(stays, "JPEG", quality=95, keep_rgb=True)
    assert np.array_equal(decode(stays.getvalue()).rgb, np.asarray(Image.open(stays)))


def test_variants_that_no_decoder_here_reads_are_named() -> None:
    whole = bytearray(encoded("JPEG"))
    frame = whole.index(b"\xff\xc0")
    for marker, precision, name in [
        (0xC1, 12, "12-bit JPEG"),
        (0xC3, 8, "lossless JPEG"),
        (0xC5, 8, "hierarchical JPEG"),
    ]:
        whole[frame + 1], whole[frame + 4] = marker, precision
        code, message = rejection(bytes(whole))
        assert (code, name in message) == (ErrorCode.UNSUPPORTED_FORMAT, True), message
    for place, value, name in [
        (5, b"\0\0", "height follows"),
        (11, b"\x32\0\x21", "sampling factors"),
        (11, b"\x13\1\x12", "sampling factors"),
    ]:
        whole = bytearray(encoded("JPEG", quality=90)[:-2] + segment(0xDC, struct.pack(">H", 80)) + b"\xff\xd9")
        if len(value) == 3:
            whole[frame + place], whole[frame + place + 3] = value[::2]
        else:
            whole[frame + place : frame + place + 2] = value
        code, message = rejection(bytes(whole))
        assert (code, name in message) == (ErrorCode.UNSUPPORTED_FORMAT, True), message
    own = chunk(b"CgBI", b"\x50\0\x20\2")
    assert "CgBI" in rejection(encoded("PNG")[:8] + own + encoded("PNG")[8:])[1]
    assert "JPEG-LS" in rejection(b"\xff\xd8\xff\xf7\0\x0b" + bytes(30) + b"\xff\xd9")[1]
    bitmap = bytearray(encoded("BMP"))
    for depth in (2, 48, 64):
        struct.pack_into("<H", bitmap, 28, depth)
        assert rejection(bytes(bitmap))[0] == ErrorCode.UNSUPPORTED_FORMAT
    assert rejection(bytes(bitmap[:-9]))[0] == ErrorCode.TRUNCATED
    struct.pack_into("<HII", bitmap, 28, 24, 5, 100)  # a PNG within a BMP
    assert rejection(bytes(bitmap))[0] == ErrorCode.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("depth", [1, 4, 8])
@pytest.mark.parametrize("colours", [0, 2])
@pytest.mark.parametrize("palette", [b"\0\0\0\0\xff\xff\xff\0", b"\xff\xff\xff\0\0\0\0\0", b"\0\0\0\0\1\2\3\0"])
def test_a_bmp_of_two_colours_may_have_pixels_of_more_bits(depth: int, colours: int, palette: bytes) -> None:
    """Pillow takes pixels of 4 and 8 bits for pixels of one bit where the palette is black and white."""
    index = (GREY[:, :64] > 127).astype(np.uint8)
    lines = {1: np.packbits(index, axis=1), 4: index[:, ::2] << 4 | index[:, 1::2], 8: index}[depth][::-1].tobytes()
    palette = palette.ljust(4 * (colours or 2**depth), b"\0")
    start = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, 64, len(index), 1, depth, 0, 0, 0, 0, colours, 0)
    data = b"BM" + struct.pack("<IHHI", start + len(lines), 0, 0, start) + header + palette + lines
    expected = np.frombuffer(palette, np.uint8).reshape(-1, 4)[:, 2::-1][index]
    assert np.array_equal(decode(data).rgb, expected)


def test_other_formats_are_named() -> None:
    targa, footed = encoded("TGA"), encoded("TGA") + bytes(8) + b"TRUEVISION-XFILE.\0"
    for data, name in [
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9"/>', "SVG"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- drawn -->\n<svg width='9'/>", "SVG"),
        ("\ufeff<svg/>".encode("utf-16-le"), "SVG"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL"),
        (targa, "TGA"),
        (encoded("TGA", compression="tga_rle"), "TGA"),
        (footed, "TGA"),
        (encoded("JPEG2000"), "JPEG 2000"),
        (encoded("PPM"), "PNM"),
        (encoded("ICO"), "ICO"),
        (b"v/1\x01" + bytes(50), "OpenEXR"),
        (b"\0" * 128 + b"DICM" + bytes(50), "DICOM"),
        (b"%PDF-1.7" + bytes(50), "PDF"),
    ]:
        code, message = rejection(data)
        assert (code, name in message) == (ErrorCode.UNSUPPORTED_FORMAT, True), (name, message)
    for text in (
        b"<?xml version='1.0'?><rss/>",
        b"<?xml?><html><svg/></html>",
        b"<html><svg/></html>",
        bytes(400),
        b"PK\x03\x04" + bytes(50),
        b"PH levels of the soil\n",
    ):
        assert rejection(text)[0] == ErrorCode.NOT_AN_IMAGE


def written(kind: str, mode: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PHOTO).convert(mode).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PCX", mode) for mode in ("1", "L", "P", "RGB")),
        *(("DIB", mode) for mode in ("1", "L", "P", "RGB")),
        *(("IM", mode) for mode in ("1", "L", "RGB", "CMYK")),
        *(("XBM", "1"), ("MSP", "1"), ("BLP", "P"), ("SPIDER", "F"), ("PALM", "1"), ("PALM", "P")),
    ],
)
def test_old_formats_are_named(kind: str, mode: str) -> None:
    code, message = rejection(written(kind, mode))
    assert (code, kind.lower() in message.lower()) == (ErrorCode.UNSUPPORTED_FORMAT, True), message


XML = "<?xml version='1.0'?>"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (gzip.compress(b"<svg xmlns='http://www.w3.org/2000/svg'/>", mtime=0), "SVG"),
        (gzip.compress(XML.encode() + b"<svg/>")[:-8], "SVG"),
        ((XML + "<!--" + "x" * 5000 + "-->" + "<!-- y -->" * 500 + "<svg/>").encode(), "SVG"),
        ((XML + "<svg/>").encode("utf-16-le"), "SVG"),
        ((XML + "<svg/>").encode("utf-16-be"), "SVG"),
        (b"<?xml version='1.0'?><!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN'><svg/>", "SVG"),
        (b"<svg:svg xmlns:svg='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"/* made */ /* by */\n#define a_width 16\n#define a_height 7\nstatic char a_bits[] = {0x13};", "XBM"),
        (b"\0\0\2\0\1\0\x20\x20\0\0\1\0\1\0\x30\1\0\0\x16\0\0\0" + bytes(304), "CUR"),
        (b"RIFF\0\1\0\0ACONanih" + bytes(60), "ANI"),
        (b"FORM\0\0\1\0ILBMBMHD" + bytes(60), "ILBM"),
        (b"FLIF31\x20" + bytes(60), "FLIF"),
        (b"\0\0\0\x0cJXS \r\n\x87\n" + bytes(60), "JPEG XS"),
        (b"\xff\x10\xff\x50" + bytes(60), "JPEG XS"),
        (b"\x97JB2\r\n\x1a\n" + bytes(60), "JBIG2"),
        (b"\x80\x2a\x5f\xd7" + bytes(60), "Cineon"),
        (b"\x13\xab\xa1\x5c" + bytes(60), "ASTC"),
        (b"\0\0\0\x0cjP\x1a\x1a\r\n\x87\n" + bytes(60), "JPEG 2000"),
        (b"II\xbc\0" + bytes(60), "JPEG XR"),
        (b"! XPM2\n16 16 2 1\n", "XPM"),
        (b"/*XPM*/\nstatic char *a[] = {", "XPM"),
        (b"PH\n4 4\n-1.0\n" + bytes(60), "PNM"),
        (b"\xb1\x68\xde\x3a\x0c\0\0\0" + bytes(60), "DCX"),
        (b"\0\0\0\x28\0\0\0\2" + bytes(12) + b"GIMP" + bytes(60), "GIMP brush"),
        (struct.pack("<IHHHHHH", 1000, 0xAF12, 2, 512, 256, 8, 3) + bytes(110), "FLIC"),
        (b"BA" + struct.pack("<IIHH", 40, 0, 0, 0) + b"BM" + bytes(60), "OS/2 bitmap array"),
        (b"\1\0\x09\0\0\3" + bytes(60), "WMF"),
        (b"farbfeld\0\0\0\1\0\0\0\1" + bytes(8), "farbfeld"),
        (b"VTF\0\7\0\0\0" + bytes(60), "VTF"),
        (b"id=ImageMagick  version=1.0\n", "MIFF"),
        (bytes(522) + b"\0\x11\2\xff\x0c\0" + bytes(60), "PICT"),
        (b"\0\0\x10\x08" + bytes(16), "WBMP"),
        (b"\0\0\x81\x00\x08" + bytes(128), "WBMP"),
        (b"\0\0\0\x18ftypjpeg\0\0\0\0mif1jpeg" + bytes(60), "HEIF (JPEG)"),
        (b"\0\0\0\x18ftypj2ki\0\0\0\0mif1j2ki" + bytes(60), "HEIF (JPEG 2000)"),
        (b"\0\0\0\x18ftypavci\0\0\0\0mif1avci" + bytes(60), "HEIF (AVC)"),
        (b"\0\0\0\x18ftypvvic\0\0\0\0mif1vvic" + bytes(60), "HEIF (VVC)"),
        (b"\0\0\0\x18ftypabcd\0\0\0\0mif1vvic" + bytes(60), "HEIF (VVC)"),
        (b"\0\0\0\x14ftypunif\0\0\0\0mif1" + bytes(60), "HEIF (uncompressed)"),
    ],
)
def test_formats_without_a_decoder_are_named(data: bytes, name: str) -> None:
    assert rejection(data) == (ErrorCode.UNSUPPORTED_FORMAT, f"{name} images are not supported")


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_a_first_brand_that_nobody_knows_leaves_it_to_the_others(kind: str) -> None:
    whole = encoded(kind)
    for brand in (b"abcd", b"miaf", b"MiHE"):
        image = decode(whole[:8] + brand + whole[12:])
        assert (image.format, np.array_equal(image.rgb, decode(whole).rgb)) == (kind, True)
    assert rejection(b"\0\0\0\x18ftypisom\0\0\0\0mp42avc1" + whole[24:])[0] == ErrorCode.NOT_AN_IMAGE


@pytest.mark.parametrize(("kind", "item"), [("HEIF", b"hvc1"), ("AVIF", b"av01")])
def test_a_packing_that_the_brands_do_not_tell_is_named(kind: str, item: bytes) -> None:
    whole = encoded(kind)
    at = whole.index(item, whole.index(b"infe"))
    for packing, name in ((b"vvc1", "VVC"), (b"avc1", "AVC"), (b"jpeg", "JPEG"), (b"j2k1", "JPEG 2000")):
        other = whole[:at] + packing + whole[at + 4 :]
        assert rejection(other) == (ErrorCode.UNSUPPORTED_FORMAT, f"{kind} ({name}) images are not supported")
    assert rejection(whole[:-40])[0] == ErrorCode.TRUNCATED


def test_bytes_that_are_no_image_are_not_named_by_chance() -> None:
    draw = random.Random(0)
    for values in (range(2, 255), b"\0", b"\0\x80", b"\0 <#/*\n"):
        for _ in range(1000):
            assert format_of(b"\0" + bytes(draw.choices(values, k=draw.randrange(300)))) is None
    words = [("<!--", "-->"), ("/*", "*/"), ("<?", "?>"), (" ", " "), ("<", "svg"), ("#define ", "a_width 1 ")]
    started = time.process_time()
    for opening, closing in words:  # patterns that look again and again would take hours
        for text in (opening + closing, opening, opening + "x"):
            assert format_of((text * 10**6).encode()) is None
    assert time.process_time() - started < 10
    for packed in (gzip.compress(b"text"), b"\x1f\x8b\x08junk", gzip.compress(bytes(10**8))):
        assert rejection(packed)[0] == ErrorCode.NOT_AN_IMAGE


def test_codes_and_texts_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "import random\nfrom patchscan.detector.images import ImageError, decode\n"
        "starts = [bytes.fromhex(h) for h in ('4d4d002a00000002', '49492a00', '424d', '000001b3', '0a050101', '50360a',"
        " '280000000c', '0000020001', '47524942', 'ffd8ff', '5249464600000000574542', '000000186674797061766966')]\n"
        "draw = random.Random(1)\n"
        "for start in starts * 20:\n"
        "    try: print(decode(start + draw.randbytes(draw.randrange(300))))\n"
        "    except ImageError as error: print(error.code, error.message)\n"
    )
    printed = set()
    for seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        printed.add(run.stdout)
    assert len(printed) == 1


JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {"quality": 90},
    "4:2:0": {"quality": 75, "subsampling": 2},
    "progressive": {"quality": 90, "progressive": True},
    "restart markers": {"quality": 90, "restart_marker_rows": 1},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_needs_its_pixels_not_its_end_marker(kind: str) -> None:
    whole = encoded("JPEG", **JPEGS[kind])
    expected = decode(whole).rgb
    for data in (whole[:-2], whole[:-1], whole[:-2] + bytes(20), whole[:-2] + b"\xff\xff"):
        assert np.array_equal(decode(data).rgb, expected)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_cut_within_its_pixels_is_truncated(kind: str) -> None:
    whole = encoded("JPEG", **JPEGS[kind])
    first_scan = whole.index(b"\xff\xda")
    draw = random.Random(0)
    cuts = [
        len(whole) - 4,
        len(whole) - 6,
        len(whole) - 30,
        *(draw.randrange(first_scan, len(whole) - 30) for _ in range(8)),
    ]
    for cut in cuts:
        assert rejection(whole[:cut])[0] == ErrorCode.TRUNCATED, cut


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_what_is_put_in_place_of_lost_pixels_makes_no_jpeg_whole(kind: str, mode: str) -> None:
    """A recovered file ends with an end marker, or has its old length. Decoders make up the pixels."""
    file = io.BytesIO()
    Image.fromarray(PHOTO).convert(mode).save(file, "JPEG", **JPEGS[kind])
    whole = file.getvalue()
    scan = whole.index(b"\xff\xda") + 14
    cuts = [scan + int(part * (len(whole) - scan)) for part in (0.1, 0.3, 0.5)]
    cuts += [found.start() + after for found in re.finditer(rb"\xff[\xd0-\xd7]", whole) for after in (0, 2)]
    for cut in (whole[:cut] for cut in cuts):
        for filled in (cut + segments.END, cut + bytes(len(whole) - len(cut)), cut + segments.END + b"\xff\xda film"):
            assert rejection(filled)[0] == ErrorCode.TRUNCATED, len(cut)


def test_a_jpeg_that_ends_in_grey_or_before_something_else_is_whole() -> None:
    grey = PHOTO.copy()
    grey[40:] = 128
    for pixels in (PHOTO, grey):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        whole = file.getvalue()
        for more in (b"", b"\xff\xda\0\x0c", b"\0\0\0\x18ftypmp42\xff\xda\0\4\xff\xd8", bytes(999)):
            assert np.array_equal(decode(whole + more).rgb, np.asarray(Image.open(file)))


def test_of_a_jpeg_that_is_decoded_again_one_picture_is_in_memory() -> None:
    """Two of 64 megapixels are more than the child process may take."""
    pictures: list[weakref.ref[Image.Image]] = []

    def decode_with(data: bytes) -> Image.Image:
        assert all(picture() is None for picture in pictures)
        picture = Image.open(io.BytesIO(data))
        pictures.append(weakref.ref(picture))
        return picture

    whole = encoded("JPEG", quality=90)
    found = segments.completed(whole[:-2], decode_with)
    assert found is not None
    assert np.array_equal(np.asarray(found), decode(whole).rgb)
    assert decoded_bytes(whole[:-2]) == decoded_bytes(whole) - 2
    assert len(pictures) == 3


def test_a_jpeg_whose_pixels_end_in_zeros_is_whole() -> None:
    """With tables made for the picture, one colour is packed as zeros; its last byte is padded where it has room."""
    for blocks in range(8):
        pixels = np.full((64, 64), 128, np.uint8)
        pixels[:8, : 8 * blocks] = PHOTO[:8, : 8 * blocks, 0]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", optimize=True)
        assert np.array_equal(decode(file.getvalue()).rgb[..., 0], np.asarray(Image.open(file))), blocks


def test_an_end_marker_within_the_last_scan_of_a_progressive_jpeg_is_not_noticed() -> None:
    """As docs/serve.md says: what is lost is the last bit of some coefficients."""
    whole = encoded("JPEG", quality=90, progressive=True)
    cut = whole[: (whole.rindex(b"\xff\xda") + len(whole)) // 2] + segments.END
    lost = decode(whole).rgb.astype(int) - decode(cut).rgb
    assert 0 < np.abs(lost).mean() < 2


def test_a_progressive_jpeg_cut_between_two_scans_is_truncated() -> None:
    whole = encoded("JPEG", quality=90, progressive=True)
    scans = [at for at in range(len(whole)) if whole[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for at in scans[1:]:
        table = whole.rindex(b"\xff\xc4", 0, at)
        cut = table if table > scans[scans.index(at) - 1] else at
        assert rejection(whole[:cut])[0] == ErrorCode.TRUNCATED


def chained_tiff(count: int) -> bytes:
    """A picture whose directory is followed by `count` small ones."""
    data = bytearray(tiff_of(PHOTO, photometric="rgb", metadata=None))
    first = struct.unpack_from("<I", data, 4)[0]
    (entries,) = struct.unpack_from("<H", data, first)
    link = first + 2 + 12 * entries
    struct.pack_into("<I", data, link, len(data))
    begin, size = len(data), struct.calcsize("<HHHIII")
    next_ones = np.arange(1, count + 1, dtype="<u4") * size + begin
    next_ones[-1] = 0
    chain = np.frombuffer(struct.pack("<HHHIII", 1, 256, 4, 1, 8, 0) * count, np.uint8).reshape(count, size).copy()
    chain[:, -4:] = next_ones.view(np.uint8).reshape(count, 4)
    return bytes(data) + chain.tobytes()


def test_no_chain_takes_long() -> None:
    """32,000 directories took 33 seconds; the longest file that is read has 1.8 million."""
    animated = encoded("GIF", save_all=True, append_images=[Image.new("RGB", PHOTO.shape[1::-1])])
    frame = b"\x2c" + bytes(4) + b"\1\0\1\0\0\2\1\0\0"
    scans = encoded("JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    loop = bytearray(chained_tiff(3))
    struct.pack_into("<I", loop, len(loop) - 4, struct.unpack_from("<I", loop, 4)[0])
    started = time.process_time()
    assert decode(chained_tiff(3)).frames == 4
    assert decode(bytes(loop)).frames == 4
    assert decode(chained_tiff(32_000)).frames == tiff.MAX_DIRECTORIES
    assert decode(chained_tiff(1_500_000)).frames == tiff.MAX_DIRECTORIES
    entries = struct.pack("<HHII", 256, 3, 2**23, 8) * 65_535
    longest = b"II*\0" + struct.pack("<I", 2**24) + bytes(2**24 - 8) + struct.pack("<H", 65_535) + entries
    assert rejection(longest)[0] == ErrorCode.TRUNCATED
    assert decode(animated).frames == 2
    assert decode(animated[:-1] + frame * 1_000_000).frames == gif.MAX_FRAMES
    assert decode(animated[:-1] + b"\x21\xfe" + b"\1x" * 10_000_000).frames == 2
    many = scans[:-2] + scans[last:-2] * (segments.MAX_SCANS + 1) + segments.END
    assert rejection(many)[0] == ErrorCode.UNSUPPORTED_FORMAT
    assert rejection(three_scans(PHOTO, repeats=segments.MAX_SCANS))[0] == ErrorCode.UNSUPPORTED_FORMAT
    assert rejection(scans[:2] + segment(0xC4, b"") * 4_000_000 + scans[2:])[0] == ErrorCode.UNSUPPORTED_FORMAT
    assert time.process_time() - started < 20


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("layout", [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"bigtiff": True}], ids=str)
def test_what_a_tiff_says_of_its_pixels_moves_none(layout: dict[str, Any], order: Literal["<", ">"]) -> None:
    """Pillow would turn them by a tag or by XMP, and refuse a file for damaged Exif."""
    if layout.get("bigtiff") and order == ">":
        pytest.skip("Pillow reads no big-endian BigTIFF")
    xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
    for tags in (
        [(274, "H", 1, 6)],
        [(274, "H", 1, 3), (305, "s", 5, "abcd")],
        [(700, "B", len(xmp), xmp)],
        [(274, "H", 1, 9), (315, "s", 200_000, "x" * 200_000)],
    ):
        data = tiff_of(PHOTO, photometric="rgb", byteorder=order, extratags=[(*tag, True) for tag in tags], **layout)
        assert np.array_equal(decode(data).rgb, PHOTO), tags
    # The directory's ImageDescription made an Exif directory, which lies outside the file.
    data = tiff_of(PHOTO, photometric="rgb", byteorder=order, description="x" * 99, **layout)
    damaged = data.replace(struct.pack(f"{order}HH", 270, 2), struct.pack(f"{order}HH", 34665, 4), 1)
    assert damaged != data
    assert np.array_equal(decode(damaged).rgb, PHOTO)


def test_an_animated_png_keeps_its_count() -> None:
    others = [Image.fromarray(255 - PHOTO), Image.fromarray(PHOTO[::-1])]
    plain = decode(encoded("PNG", save_all=True, append_images=others))
    extra = decode(encoded("PNG", save_all=True, append_images=others, default_image=True))
    assert (plain.frames, extra.frames) == (3, 3)
    assert np.array_equal(plain.rgb, PHOTO)
    assert np.array_equal(extra.rgb, PHOTO)
