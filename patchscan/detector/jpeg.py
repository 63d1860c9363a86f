"""Read the settings of an opened JPEG: quality from its quantisation tables, colour subsampling from its frame."""

import numpy as np
from PIL import Image

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


def libjpeg_tables(quality: np.ndarray) -> np.ndarray:
    """Return libjpeg's luminance tables for these quality settings (n,), 1 to 100: int (n, 64), in row order.

    libjpeg's jcparam.c scales table K.1 of ITU-T T.81 by 5000 / q percent below quality 50 and by 200 - 2q from there
    up.
    """
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)[:, None]
    return ((_K1 * scale + 50) // 100).clip(1, 255)


_TABLES = libjpeg_tables(np.arange(1, 101))


def jpeg_quality(image: Image.Image) -> int | None:
    """Return the libjpeg quality, 1 to 100, whose luminance table is nearest to this opened file's; None for a file
    that is no JPEG.

    Exact for files that libjpeg wrote with its own tables; the nearest by sum of absolute differences for others.
    """
    tables = getattr(image, "quantization", None)
    if not tables:
        return None
    luminance = np.asarray(next(iter(tables.values())))
    return int(np.abs(_TABLES - luminance).sum(axis=1).argmin()) + 1


def jpeg_subsampling(image: Image.Image) -> str | None:
    """Return the colour subsampling of this opened file (`4:2:0`, ..., `grey`, `other`); None for a file that is no
    JPEG."""
    layers = getattr(image, "layer", None)
    if not layers:
        return None
    if len(layers) == 1:
        return "grey"
    (_, *luma, _), *chroma = layers
    if len(layers) != 3 or any((h, v) != (1, 1) for _, h, v, _ in chroma):
        return "other"
    return _SUBSAMPLING.get(tuple(luma), "other")
