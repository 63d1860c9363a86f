"""Decode encoded images to RGB pixels, or raise an ImageError with one of a fixed set of codes.

The limits are checked on the header, before any pixel is decoded. EXIF orientation is not applied: the pixels are
scored as stored, because a rotation moves the compression grid that detectors look at. Alpha is dropped, CMYK is
converted, 16-bit samples keep their high byte, and of an animation the first frame is used.
"""

import io
import struct
import warnings
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, cached_property

import numpy as np
from PIL import Image

from patchscan.detector.jpeg import jpeg_quality

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

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF")


class ErrorCode(StrEnum):
    """Why an image cannot be scored. Answers, rows, reports and docs use the same codes."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    TOO_SMALL = "too_small"


class ImageError(ValueError):
    """The image itself cannot be scored, so a retry is useless: `code` for programs, `message` one line for people."""

    def __init__(self, code: ErrorCode, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits checked before decoding: bytes of the encoded file, pixels, and pixels of the shorter side."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    min_side: int = 8


@dataclass(frozen=True)
class RGBImage:
    """A decoded image: `pillow` has mode RGB; `frames` is the number of frames of an animation (1 for a still);
    `jpeg_quality` is what the tables of a JPEG say (1 to 100), None for other formats."""

    pillow: Image.Image
    format: str
    frames: int
    jpeg_quality: int | None

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
    `not_an_image`, `unsupported_format` (an image, but not one of FORMATS), `truncated` (damaged or cut short).
    """
    if not data:
        raise ImageError(ErrorCode.EMPTY, "the file holds no bytes")
    if len(data) > limits.max_bytes:
        raise ImageError(ErrorCode.TOO_LARGE, f"{len(data):,} bytes; the limit is {limits.max_bytes:,}")
    with _open(data) as image:
        _check_size(image, limits)
        try:
            frames, quality = getattr(image, "n_frames", 1), jpeg_quality(image)
            rgb = _to_rgb(image)
        except MemoryError as error:
            raise ImageError(ErrorCode.TOO_LARGE, "the pixels do not fit in memory") from error
        except Exception as error:  # decoders raise anything on damaged files, with memory addresses in the texts
            raise ImageError(ErrorCode.TRUNCATED, f"the {image.format} data is damaged or cut short") from error
        return RGBImage(rgb, image.format or "", frames, quality)


def decoded_bytes(data: bytes, limits: Limits = Limits()) -> int:
    """Return the memory in bytes that `decode` needs, read from the header alone; 0 for an image that it refuses.

    Pillow takes four bytes per pixel, and as many again where the mode must be converted.
    """
    try:
        with _open(data) as image:
            _check_size(image, limits)
            return image.width * image.height * 4 * (1 if image.mode == "RGB" else 2)
    except ImageError:
        return 0


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in _known_formats()])
    except Image.DecompressionBombError as error:
        raise ImageError(ErrorCode.TOO_LARGE, "the header promises more pixels than the limit") from error
    except Exception as error:  # a plugin's header parser may raise anything on hostile bytes
        claimed = _claimed_format(data)
        if claimed is None:
            raise ImageError(ErrorCode.NOT_AN_IMAGE, "the bytes are not an image of any known format") from error
        if claimed in FORMATS:
            raise ImageError(ErrorCode.TRUNCATED, f"the {claimed} header is damaged or cut short") from error
        raise ImageError(ErrorCode.UNSUPPORTED_FORMAT, f"{claimed} images are not supported") from error


@cache
def _known_formats() -> set[str]:
    Image.init()
    return set(Image.OPEN)


def _claimed_format(data: bytes) -> str | None:
    """The format whose signature the bytes begin with, by Pillow's own checks; None if there is none."""
    brand = data[4:12]
    if brand[:4] == b"ftyp" and brand[4:] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIF" if "HEIF" in _known_formats() else "HEIC"
    for name in _known_formats():
        accept = Image.OPEN[name][1]
        try:
            if accept is not None and accept(data[:16]) is True:
                return name
        except (IndexError, ValueError, struct.error):
            continue
    return None


def _check_size(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        message = f"{width} x {height} pixels; the limit is {limits.max_pixels:,} pixels"
        raise ImageError(ErrorCode.TOO_LARGE, message)
    if min(width, height) < limits.min_side:
        message = f"{width} x {height} pixels; the shorter side must be at least {limits.min_side}"
        raise ImageError(ErrorCode.TOO_SMALL, message)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit grey to white at 255; the high byte is the picture.
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")
