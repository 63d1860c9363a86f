"""Small data sets in GenImage's layout, for the tests of index, audit, protocol and training."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Mode, format and options of an image, one for each way in which decoders work.
ENCODINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "JPEG": ("RGB", "JPEG", {}),
    "grey JPEG": ("L", "JPEG", {}),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "progressive CMYK": ("CMYK", "JPEG", {"progressive": True, "subsampling": 0}),
    "PNG": ("RGB", "PNG", {}),
    "PNG with alpha": ("RGBA", "PNG", {}),
    "PNG of 16 bits": ("I;16", "PNG", {}),
    "palette": ("P", "PNG", {}),
    "GIF": ("P", "GIF", {}),
    "WebP": ("RGB", "WEBP", {"method": 0}),
    "lossless WebP": ("RGB", "WEBP", {"lossless": True, "method": 0, "quality": 0}),
    "WebP with alpha": ("RGBA", "WEBP", {"method": 0}),
    "TIFF": ("RGB", "TIFF", {"compression": "tiff_deflate"}),
    "TIFF of 16 bits": ("I;16", "TIFF", {}),
    "BMP": ("RGB", "BMP", {}),
    "AVIF": ("RGB", "AVIF", {"speed": 10}),
}


def picture(seed: int, width: int = 64, height: int = 64) -> np.ndarray:
    """A smooth random picture, uint8 (height, width, 3): nothing in it tells AI from real."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return (smooth + random.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)


def write(file: Path, pixels: np.ndarray, **save: Any) -> Path:
    """Save pixels as the image that the file's ending names, and make its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **save)
    return file


def jpeg_versus_png(root: Path, count: int = 40, generator: str = "imagenet_ai_0419_biggan") -> Path:
    """GenImage's bias in small: fakes are PNGs of one size, photographs JPEGs of many sizes and qualities; `count` of
    each in train and val."""
    random = np.random.default_rng(0)
    for split, first in (("train", 0), ("val", 10_000)):
        for number in range(first, first + count):
            folder = root / generator / split
            write(folder / "ai" / f"{number}.png", picture(2 * number, 96, 96))
            width, height = (int(side) for side in random.integers(64, 160, 2))
            photograph = picture(2 * number + 1, width, height)
            write(folder / "nature" / f"{number}.JPEG", photograph, quality=int(random.integers(75, 97)))
    return root
