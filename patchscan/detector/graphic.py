"""Tell drawings, screenshots and pages from photographs: large parts of them are of exactly one colour."""

import numpy as np
from PIL import Image

from patchscan.detector.patches import below_each_other

# An image with more flat pixels is taken for a graphic. `python -m patchscan.evaluation.tier_accuracy` measures how
# many of a data set's images that are.
GRAPHIC_FLAT_SHARE = 0.4
# Pairs of rows that are looked at, so that a large photograph takes no longer than a small one.
_PAIRS = 64


def is_graphic(image: Image.Image) -> bool:
    """Return whether an RGB image looks like a drawing, a screenshot or a page rather than a photograph."""
    return flat_share(image) > GRAPHIC_FLAT_SHARE


def flat_share(image: Image.Image) -> float:
    """Return the share of pixels that equal their neighbours on the right, below, and between the two, in 64 pairs of
    rows spread evenly over an RGB image of at least 2 x 2 pixels."""
    tops = np.unique(np.linspace(0, image.height - 2, _PAIRS).astype(int)).tolist()
    width = image.width
    strip = below_each_other(image, [(0, top, width, top + 2) for top in tops])
    # A pixel as one number: Pillow's fourth byte means nothing, and may differ.
    rows = np.frombuffer(strip.tobytes("raw", "RGBX"), "<u4").reshape(len(tops), 2, width) & 0xFFFFFF
    upper, lower = rows[:, 0], rows[:, 1]
    flat = (upper[:, 1:] == upper[:, :-1]) & (lower[:, 1:] == upper[:, 1:]) & (lower[:, :-1] == upper[:, :-1])
    return float(np.count_nonzero(flat) / flat.size)
