"""Tell drawings, screenshots and pages from photographs: large parts of them are of exactly one colour."""

import numpy as np
from PIL import Image

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
    strip = Image.new("RGB", (image.width, 2 * len(tops)))
    for place, top in enumerate(tops):  # one array of all pairs: an array of each takes five times as long
        strip.im.paste(image.im.crop((0, top, image.width, top + 2)), (0, 2 * place, image.width, 2 * place + 2))
    rows = np.asarray(strip).reshape(len(tops), 2, image.width, 3)
    upper, lower = rows[:, 0], rows[:, 1]
    flat = (upper[:, 1:] == upper[:, :-1]) & (lower[:, 1:] == upper[:, 1:]) & (lower[:, :-1] == upper[:, :-1])
    return float((flat[..., 0] & flat[..., 1] & flat[..., 2]).mean())
