"""Say how many images a claim about an error rate takes, before they are collected."""

import numpy as np
from scipy.special import bdtr

from patchscan.common.errors import UserError
from patchscan.reporting.statistics import NORMAL_QUANTILE

MOST_IMAGES = 10_000_000


class PowerError(UserError):
    """A claim that no number of images shows."""


def images_needed(limit: float, true: float, power: float = 0.8) -> int:
    """Return a number of independent images with which the 95 % Wilson interval of a rate lies wholly below `limit`
    with a chance of `power`, where the rate truly is `true`; wholly above `limit` where `true` is greater. One fewer
    does not; since the chance rises in a saw-tooth, some other numbers near it have a little more or less.

    All are shares within 0..1. Raises PowerError where more than MOST_IMAGES would be needed.
    """
    if true > limit:
        return images_needed(1 - limit, 1 - true, power)
    if true < limit:
        low, high = 1, 1
        while not _shown(high, limit, true, power):
            low, high = high, 2 * high
            if high > MOST_IMAGES:
                break
        else:
            while high - low > 1:  # the chance rises with the number of images, but for small steps
                middle = (low + high) // 2
                low, high = (low, middle) if _shown(middle, limit, true, power) else (middle, high)
            return high
    raise PowerError(f"a true rate of {true:g} is too near to {limit:g}: {MOST_IMAGES:,} images do not tell them apart")


def _shown(n: int, limit: float, true: float, power: float) -> bool:
    """Whether, with n images, the interval's upper end lies below `limit` with a chance of `power`."""
    # Wilson's interval holds all rates r with |found / n - r| <= z sqrt(r (1 - r) / n).
    most = int(np.ceil(n * limit - NORMAL_QUANTILE * np.sqrt(n * limit * (1 - limit)))) - 1
    return most >= 0 and bool(bdtr(most, n, true) >= power)


def design_effect(per_source: float, alike: float) -> float:
    """Return how many times more images are needed where each source gives `per_source` of them, whose results
    correlate by `alike`, 0 (as if independent) to 1 (a source is all right or all wrong) (Kish 1965)."""
    return 1 + (per_source - 1) * alike
