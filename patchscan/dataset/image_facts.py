"""Describe one image file: format, size, JPEG settings, and hashes of its bytes and of its picture."""

import hashlib
import io
from typing import Any

import imagehash
import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from patchscan.detector.images import ImageError, decode

# ITU-T T.81, Annex K, table K.1: the luminance table that libjpeg scales with its quality setting.
_K1 = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
).ravel()

_SUBSAMPLING: dict[tuple[int, ...], str] = {
    (1, 1): "4:4:4",
    (2, 1): "4:2:2",
    (2, 2): "4:2:0",
    (1, 2): "4:4:0",
    (4, 1): "4:1:1",
}


def describe_image(data: bytes) -> dict[str, Any]:
    """Decode an encoded image once and describe it.

    Returns format, width, height, jpeg_quality and jpeg_subsampling (None where it is not a JPEG), sha256 of the bytes
    and phash (64 bits as 16 hex digits); for an image that cannot be scored, sha256, code
    (`patchscan.detector.images.ErrorCode`) and message instead.
    """
    digest = {"sha256": hashlib.sha256(data).hexdigest()}
    try:
        image = decode(data)
    except ImageError as error:
        return digest | {"code": str(error.code), "message": error.message}
    quality, subsampling = jpeg_settings(data) if image.format in ("JPEG", "MPO") else (None, None)
    return digest | {
        "format": image.format,
        "width": image.width,
        "height": image.height,
        "jpeg_quality": quality,
        "jpeg_subsampling": subsampling,
        "phash": str(imagehash.phash(Image.fromarray(image.rgb))),
    }


def jpeg_settings(data: bytes) -> tuple[int, str]:
    """Return quality (1 to 100) and chroma subsampling (`4:2:0`, ..., `grey`, `other`) of an encoded JPEG, from its
    header."""
    with JpegImageFile(io.BytesIO(data)) as image:
        quality = estimate_quality(np.asarray(next(iter(image.quantization.values()))))
        layers = image.layer
    if len(layers) == 1:
        return quality, "grey"
    (_, *luma, _), *chroma = layers
    if len(layers) != 3 or any((h, v) != (1, 1) for _, h, v, _ in chroma):
        return quality, "other"
    return quality, _SUBSAMPLING.get(tuple(luma), "other")


def estimate_quality(luminance: np.ndarray) -> int:
    """Return the libjpeg quality, 1 to 100, whose luminance table is nearest to this one (64 values in row order).

    libjpeg's jcparam.c scales table K.1 of ITU-T T.81 by 5000 / q percent below quality 50 and by 200 - 2q from there
    up. Exact for files that libjpeg wrote with its own tables; the nearest by sum of absolute differences for others.
    """
    return int(np.abs(_TABLES - luminance).sum(axis=1).argmin()) + 1


def _libjpeg_tables() -> np.ndarray:
    quality = np.arange(1, 101)[:, None]
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return ((_K1 * scale + 50) // 100).clip(1, 255)


_TABLES = _libjpeg_tables()  # 100 x 64
