"""The four delivery tiers: the same picture as stored, as the web delivers it, as a chain of services leaves it, and
enlarged. Every choice (filter, format, factor) depends on the file alone, so a delivery is the same every time."""

import io

import numpy as np
from PIL import Image

from patchscan.detector.answer import Tier
from patchscan.detector.images import encode
from patchscan.evaluation.disturbances import Change, changed, jpeg, off_grid

FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR)
# Deliveries by WebP, the rest by JPEG with chroma subsampling 4:2:0.
WEBP_SHARE = 0.3
WEB_SIDE, WEB_QUALITY = 1024, 75
# An image that is smaller than `hard` allows is reduced by HARD_FACTOR, because the tier always reduces.
HARD_SIDE, HARD_QUALITY, HARD_FACTOR = 768, 50, 0.75
ENLARGED_FACTORS, ENLARGED_QUALITY = (1.5, 2.0), 90
# Of a large image the middle is enlarged, to this longest side: more shows nothing new and takes minutes.
ENLARGED_SIDE = 2048


def deliver(data: bytes, tier: Tier) -> bytes:
    """The encoded image `data` as `tier` delivers it; what is no image is passed on as it is.

    - `native`: the bytes as stored.
    - `web`: reduced to a longest side of 1024 (smaller images keep their size), JPEG or WebP of quality 75.
    - `hard`: reduced to a longest side of 768 or to 0.75 of it, whichever is smaller; JPEG of quality 50, cut by three
      pixels at the left and at the top, then JPEG or WebP of quality 50.
    - `enlarged`: 1.5 to 2 times as large, JPEG of quality 90; of a large image its middle, to a longest side of 2048.
    """
    return data if tier == "native" else changed(data, DELIVERIES[tier])


def resized(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Both sides times `factor`, by one of three filters."""
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image if size == image.size else image.resize(size, FILTERS[rng.integers(len(FILTERS))])


def compress(image: Image.Image, quality: int, rng: np.random.Generator) -> bytes:
    """JPEG, or WebP for WEBP_SHARE of images, of this quality."""
    return jpeg(image, quality) if rng.random() >= WEBP_SHARE else encode(image, "WEBP", quality=quality)


def _web(image: Image.Image, rng: np.random.Generator) -> bytes:
    return compress(resized(image, min(1.0, WEB_SIDE / max(image.size)), rng), WEB_QUALITY, rng)


def _hard(image: Image.Image, rng: np.random.Generator) -> bytes:
    small = resized(image, min(HARD_FACTOR, HARD_SIDE / max(image.size)), rng)
    once = Image.open(io.BytesIO(jpeg(small, HARD_QUALITY)))
    # As after a screenshot: on the first compression's grid the second one would change next to nothing.
    return compress(off_grid(once), HARD_QUALITY, rng)


def _enlarged(image: Image.Image, rng: np.random.Generator) -> bytes:
    factor = rng.uniform(*ENLARGED_FACTORS)
    width, height = (min(side, int(ENLARGED_SIDE / factor)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return jpeg(resized(image.crop((left, top, left + width, top + height)), factor, rng), ENLARGED_QUALITY)


DELIVERIES: dict[Tier, Change] = {"web": _web, "hard": _hard, "enlarged": _enlarged}
