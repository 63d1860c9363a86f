"""Describe one image file: format, size, JPEG settings, and a hash of its picture.

A module of its own, because it is imported by each process that decodes for an index.
"""

from typing import Any

import imagehash

from patchscan.detector.images import Limits, decode


def describe_image(data: bytes, limits: Limits = Limits()) -> dict[str, Any]:
    """Decode an encoded image once and describe it.

    Returns format, width, height, jpeg_quality and jpeg_subsampling (None where it is not a JPEG), and phash (64 bits
    as 16 hex digits). Raises ImageError for an image that cannot be scored.
    """
    image = decode(data, limits)
    return {
        "format": image.format,
        "width": image.width,
        "height": image.height,
        "jpeg_quality": image.jpeg_quality,
        "jpeg_subsampling": image.jpeg_subsampling,
        "phash": str(imagehash.phash(image.pillow)),
    }
