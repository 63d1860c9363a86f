"""Describe one image file: format, size, JPEG settings, and hashes of its bytes and of its picture."""

import io
from typing import Any

import imagehash
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from patchscan.detector.images import Limits, decode
from patchscan.detector.jpeg import jpeg_quality

_SUBSAMPLING: dict[tuple[int, ...], str] = {
    (1, 1): "4:4:4",
    (2, 1): "4:2:2",
    (2, 2): "4:2:0",
    (1, 2): "4:4:0",
    (4, 1): "4:1:1",
}


def describe_image(data: bytes, limits: Limits = Limits()) -> dict[str, Any]:
    """Decode an encoded image once and describe it.

    Returns format, width, height, jpeg_quality and jpeg_subsampling (None where it is not a JPEG), and phash (64 bits
    as 16 hex digits). Raises ImageError for an image that cannot be scored.
    """
    image = decode(data, limits)
    subsampling = None if image.jpeg_quality is None else jpeg_settings(data)[1]
    return {
        "format": image.format,
        "width": image.width,
        "height": image.height,
        "jpeg_quality": image.jpeg_quality,
        "jpeg_subsampling": subsampling,
        "phash": str(imagehash.phash(Image.fromarray(image.rgb))),
    }


def jpeg_settings(data: bytes) -> tuple[int | None, str]:
    """Return quality (1 to 100) and chroma subsampling (`4:2:0`, ..., `grey`, `other`) of an encoded JPEG, from its
    header."""
    with JpegImageFile(io.BytesIO(data)) as image:
        quality = jpeg_quality(image)
        layers = image.layer
    if len(layers) == 1:
        return quality, "grey"
    (_, *luma, _), *chroma = layers
    if len(layers) != 3 or any((h, v) != (1, 1) for _, h, v, _ in chroma):
        return quality, "other"
    return quality, _SUBSAMPLING.get(tuple(luma), "other")
