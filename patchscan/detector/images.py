"""Decode encoded images to RGB pixels, or raise an ImageError with one of a fixed set of codes.

The limits are checked on the header, before any pixel is decoded. EXIF orientation is not applied: the pixels are
scored as stored, because a rotation moves the compression grid that detectors look at. Alpha is dropped, CMYK is
converted, 16-bit samples keep their high byte, and of an animation the first frame is used.
"""

import io
import warnings
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchscan.detector import bmp, gif, iso_media, png, segments, webp
from patchscan.detector.jpeg import jpeg_quality, jpeg_subsampling
from patchscan.detector.signatures import format_of
from patchscan.detector.tiff import Tiff

try:
    import pillow_heif
except ImportError:  # a stock TorchServe has no HEIC decoder: HEIC files are then `unsupported_format`
    pass
else:
    pillow_heif.register_heif_opener()

# `decode` checks its own limits, so Pillow's warning about large images is redundant.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# Pillow warns about damaged metadata. Only the pixels matter here, and a scan would print one warning per file.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Bytes a pixel, for decoders that take more than the pixels.
_DECODER_BYTES = {"WEBP": 16, "AVIF": 11, "HEIF": 11}
# Zero coefficients as RGB: grey, of CMYK without and with Adobe's transform.
_FILLS = frozenset((128, 64, 65))
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF")


class ErrorCode(StrEnum):
    """Why an image cannot be scored. Answers, rows, reports and docs use the same codes."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    TOO_SMALL = "too_small"
    DECODER_DIED = "decoder_died"


class ImageError(ValueError):
    """The image itself cannot be scored, so a retry is useless: `code` for programs, `message` one line for people."""

    def __init__(self, code: ErrorCode, message: str):
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type["ImageError"], tuple[ErrorCode, str]]:
        return ImageError, (self.code, self.message)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits checked before decoding: bytes of the encoded file, pixels, and pixels of the shorter side."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    min_side: int = 8


@dataclass(frozen=True)
class RGBImage:
    """A decoded image: `pillow` has mode RGB; `frames` is the number of frames of an animation (1 for a still);
    `jpeg_quality` is what the tables of a JPEG say (1 to 100), `jpeg_subsampling` its frame; None for other formats."""

    pillow: Image.Image
    format: str
    frames: int
    jpeg_quality: int | None
    jpeg_subsampling: str | None

    @cached_property
    def rgb(self) -> np.ndarray:
        """A copy of all pixels, uint8 (height, width, 3)."""
        return np.asarray(self.pillow)

    @property
    def width(self) -> int:
        return self.pillow.width

    @property
    def height(self) -> int:
        return self.pillow.height


def decode(data: bytes, limits: Limits = Limits()) -> RGBImage:
    """Decode one encoded image to RGB.

    Raises ImageError: `empty`, `too_large` (bytes or pixels), `too_small` (shorter side under `limits.min_side`),
    `not_an_image`, `unsupported_format` (an image, but not one of FORMATS, or a variant whose pixels would not be
    right), `truncated` (damaged or cut short).
    """
    if not data:
        raise ImageError(ErrorCode.EMPTY, "the file holds no bytes")
    _check_bytes(len(data), limits)
    source = _Source.of(data)
    with source.open() as image:
        _check_size(image.size, limits)
        try:
            rgb = _pixels(source, image)
            frames, quality, subsampling = source.count_frames(image), jpeg_quality(image), jpeg_subsampling(image)
        except ImageError:
            raise
        except MemoryError as error:
            raise ImageError(ErrorCode.TOO_LARGE, "the pixels do not fit in memory") from error
        except Exception as error:  # decoders raise anything on damaged files, with memory addresses in the texts
            source.raise_if_unsupported(error, opened=True)
            raise ImageError(ErrorCode.TRUNCATED, f"the {image.format} data is damaged or cut short") from error
        return RGBImage(rgb, image.format or "", frames, quality, subsampling)


def read_image(path: Path, limits: Limits = Limits()) -> bytes:
    """Read an encoded image from a file, but none that `decode` would refuse for its bytes: a film, given by
    mistake, may have more than the machine has memory. Raises OSError, and ImageError `too_large`."""
    _check_bytes(path.stat().st_size, limits)
    return path.read_bytes()


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    """Return an image as a file of this format; `options` are Pillow's for writing it."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decoded_bytes(data: bytes, limits: Limits = Limits()) -> int:
    """Return the memory in bytes that `decode` needs, read from the header alone; 0 for an image that it refuses.

    Measured as the growth of the process: pixels take four bytes each, and as many again where the mode is converted.
    The decoders of WebP and AVIF hold the picture several times, that of a JPEG with several scans all coefficients,
    two bytes each, and that of a packed TIFF a strip or tile.
    """
    try:
        source = _Source.of(data)
        # Pillow's WebP decoder takes the memory for its pixels as soon as it has read the header.
        if source.format == "WEBP" and (size := webp_size(source.data)):
            _check_size(size, limits)
            return size[0] * size[1] * _DECODER_BYTES["WEBP"] + len(data)
        with source.open() as image:
            _check_size(image.size, limits)
            pixel = 4 if image.mode == "RGB" else 8
            if image.mode.startswith("I"):
                pixel = 13
            pixel = max(pixel, _DECODER_BYTES.get(image.format or "", 0))
            if source.format == "JPEG" and segments.has_several_scans(source.data):
                pixel += 2 * len(image.getbands())
            packed = source.tiff.unpacking_bytes() if source.tiff else 0
            # The encoded image is copied without its metadata, and by some decoders.
            return image.width * image.height * pixel + packed + len(data)
    except ImageError:
        return 0


def may_lack_memory(data: bytes) -> bool:
    """Whether an image that `decode` calls damaged may be whole: libtiff, and libjpeg where a JPEG has several scans,
    tell of memory that they were refused as of damaged data."""
    source = _Source.of(data)
    if source.tiff:
        return source.tiff.is_whole()
    return source.format == "JPEG" and segments.has_several_scans(source.data) and not source.lacks_end


@dataclass(frozen=True)
class _Source:
    """An encoded image of a format that is read: the bytes that its pixels need, and the frames where Pillow's own
    count has no bound or needs what was left out."""

    format: str
    data: bytes
    frames: int | None = None
    tiff: Tiff | None = None

    @classmethod
    def of(cls, data: bytes) -> "_Source":
        """Prepare an image for Pillow. Raises ImageError `not_an_image` and `unsupported_format`."""
        name = format_of(data)
        if name is None:
            raise ImageError(ErrorCode.NOT_AN_IMAGE, "the bytes are not an image of any known format")
        if name == "HEIF" and name not in _known_formats():
            raise _unsupported("HEIC images are")
        if name not in FORMATS:
            raise _unsupported(f"{name} images are")
        if name == "PNG" and data[12:16] == b"CgBI":
            raise _unsupported("PNG images in Apple's own form (CgBI) are")
        if name == "PNG":
            return cls(name, *png.pixels_only(data))
        if name == "GIF":
            return cls(name, data, gif.count_frames(data))
        if name == "TIFF":
            return cls._of_tiff(data)
        if name == "JPEG":
            reduced = segments.pixels_only(data)
            if reduced is None:
                raise _unsupported(f"JPEG images of more than {segments.MAX_SEGMENTS:,} segments are")
            if segments.has_too_many_scans(reduced):
                raise _unsupported(f"JPEG images of more than {segments.MAX_SCANS} scans are")
            return cls(name, reduced)
        if name == "WEBP":
            return cls(name, webp.pixels_only(data))
        if name in ("AVIF", "HEIF"):
            return cls(name, iso_media.pixels_only(data, name))
        return cls(name, bmp.with_whole_palette(data))

    @classmethod
    def _of_tiff(cls, data: bytes) -> "_Source":
        tiff = Tiff(data)
        raw = tiff.raw_format()
        if raw is not None:
            raise _unsupported(f"{raw} images (a camera's raw files) are")
        reason = tiff.unsupported()
        if reason is not None:
            raise _unsupported(reason)
        return cls("TIFF", tiff.pixels_only(), tiff.count(), tiff)

    @property
    def lacks_end(self) -> bool:
        return self.format == "JPEG" and segments.lacks_end(self.data)

    def open(self) -> Image.Image:
        """Read the header. Raises ImageError."""
        try:
            return Image.open(io.BytesIO(self.data), formats=[name for name in FORMATS if name in _known_formats()])
        except Image.DecompressionBombError as error:
            raise ImageError(ErrorCode.TOO_LARGE, "the header promises more pixels than the limit") from error
        except Exception as error:  # a plugin's header parser may raise anything on hostile bytes
            self.raise_if_unsupported(error, opened=False)
            raise ImageError(ErrorCode.TRUNCATED, f"the {self.format} header is damaged or cut short") from error

    def raise_if_unsupported(self, error: Exception, *, opened: bool) -> None:
        """Raise ImageError `unsupported_format` where the decoder lacks a variant, not the file its bytes."""
        variant = segments.unsupported(self.data) if self.format == "JPEG" else None
        if self.format in ("AVIF", "HEIF"):
            variant = iso_media.unsupported(self.data, self.format)
        if self.format == "BMP" and bmp.is_whole(self.data):
            variant = "BMP images of this depth or compression are"
        if self.tiff is not None and self.tiff.is_whole():
            variant = self.tiff.lacking(opened)
        if variant is not None:
            raise _unsupported(variant) from error

    def count_frames(self, image: Image.Image) -> int:
        return int(getattr(image, "n_frames", 1)) if self.frames is None else self.frames


def _unsupported(what: str) -> ImageError:
    return ImageError(ErrorCode.UNSUPPORTED_FORMAT, f"{what} not supported")


@cache
def _known_formats() -> frozenset[str]:
    Image.init()
    return frozenset(Image.OPEN)


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height as the header of a WebP states them; None where it has another form."""
    kind, start = data[12:16], data[20:30]
    if kind == b"VP8X" and len(start) == 10:
        return 1 + int.from_bytes(start[4:7], "little"), 1 + int.from_bytes(start[7:10], "little")
    if kind == b"VP8L" and start[:1] == b"\x2f" and len(start) >= 5:
        bits = int.from_bytes(start[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and start[3:6] == b"\x9d\x01\x2a" and len(start) == 10:
        return int.from_bytes(start[6:8], "little") & 0x3FFF, int.from_bytes(start[8:10], "little") & 0x3FFF
    return None


def _check_bytes(count: int, limits: Limits) -> None:
    if count > limits.max_bytes:
        raise ImageError(ErrorCode.TOO_LARGE, f"{count:,} bytes; the limit is {limits.max_bytes:,}")


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        message = f"{width} x {height} pixels; the limit is {limits.max_pixels:,} pixels"
        raise ImageError(ErrorCode.TOO_LARGE, message)
    if min(width, height) < limits.min_side:
        message = f"{width} x {height} pixels; the shorter side must be at least {limits.min_side}"
        raise ImageError(ErrorCode.TOO_SMALL, message)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow would clip 16-bit grey to white at 255; the high byte is the picture.
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F", "LAB"):
        raise _unsupported(f"{image.format} images of mode {image.mode} are")
    image.load()
    if image.mode == "La":  # Pillow converts grey with premultiplied alpha in two steps only
        return image.convert("LA").convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixels(source: _Source, image: Image.Image) -> Image.Image:
    """Decode an opened image. Raises ImageError `truncated` also where a decoder would make up what is missing."""
    if source.format == "PNG":
        return _pixels_of_png(source, image)
    if source.lacks_end:
        return _completed_jpeg(segments.without_filling(source.data))
    if source.format == "JPEG" and segments.has_several_scans(source.data):
        if not segments.has_all_scans(source.data):
            raise ImageError(ErrorCode.TRUNCATED, "the JPEG lacks some of its scans")
        return _to_rgb(image)
    rgb = _to_rgb(image)
    if source.format == "JPEG" and _is_made_up(rgb):
        image.close()  # so that its pixels are not held twice
        del rgb
        return _completed_jpeg(source.data[: segments.end_of_picture(source.data)])
    return rgb


def _pixels_of_png(source: _Source, image: Image.Image) -> Image.Image:
    """Decode a PNG, without its checksum where that is all that is wrong."""
    try:
        return _whole_png(source.data, image)
    except OSError:
        repaired = png.without_checksum(source.data)
        if repaired is None:
            raise
    image.close()  # so that its pixels are not held twice
    with _Source("PNG", repaired).open() as again:
        return _whole_png(repaired, again)


def _whole_png(data: bytes, image: Image.Image) -> Image.Image:
    """Decode a PNG. Raises ImageError where it lacks rows or its palette, of which Pillow makes black pixels."""
    image.load()
    if image.mode == "P" and not (image.palette and image.palette.palette):
        raise ImageError(ErrorCode.TRUNCATED, "the PNG has no palette")
    # The last row comes last, of an interlaced PNG that or the one above it.
    last = (image.crop((0, y, image.width, y + 1)) for y in (image.height - 2, image.height - 1))
    if not all(any(row.tobytes()) for row in last) and not png.has_all_rows(data):
        raise ImageError(ErrorCode.TRUNCATED, "the PNG data is damaged or cut short")
    return _to_rgb(image)


def _is_made_up(rgb: Image.Image) -> bool:
    """Whether the last pixels of a JPEG are of the one colour with which libjpeg fills what is missing."""
    values = set(rgb.crop((rgb.width - 4, rgb.height - 4, rgb.width, rgb.height)).tobytes())
    return len(values) == 1 and values <= _FILLS


def _completed_jpeg(data: bytes) -> Image.Image:
    """Decode a JPEG without its end marker. Raises ImageError `truncated` where pixels are missing too."""

    def decode_with(data: bytes) -> Image.Image:
        with _Source("JPEG", data).open() as image:
            return _to_rgb(image)

    image = segments.completed(data, decode_with)
    if image is None:
        raise ImageError(ErrorCode.TRUNCATED, "the JPEG data is damaged or cut short")
    return image
