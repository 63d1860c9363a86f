"""Compare new images with those of an earlier scan: their scores by PSI and the Kolmogorov-Smirnov test, what they are
by PSI and a chi-square test.

Scores are logits counted in fine bins, whose edges are quantiles of the earlier scan, so that memory does not grow with
the number of images.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.special import chdtrc, kolmogorov

# With fewer scores on either side there is no comparison.
MIN_SCORES = 50
BINS = 200
PSI_BINS = 10
# The usual reading of PSI: under 0.1 stable, over 0.25 a shift that needs a look.
PSI_MOVED, PSI_ALERT = 0.1, 0.25
P_MOVED, P_ALERT = 0.05, 0.001
SHIFTED, MOVED, STABLE = "shifted", "moved", "stable"
# The chi-square distribution fits where so many images are to be expected of each value.
LEAST_EXPECTED = 5


def bin_edges(logits: np.ndarray) -> np.ndarray:
    """Return up to BINS - 1 inner edges: the quantiles of a sample (n,) of the earlier scan's logits."""
    return np.unique(np.quantile(logits, np.linspace(0, 1, BINS + 1)[1:-1]))


def count_in_bins(chunks: Iterator[np.ndarray], edges: np.ndarray) -> np.ndarray:
    """Count logits, given chunk by chunk, between `edges`. Returns int64 (len(edges) + 1,)."""
    counts = np.zeros(len(edges) + 1, np.int64)
    for chunk in chunks:
        counts += np.bincount(np.searchsorted(edges, chunk, side="right"), minlength=len(counts))
    return counts


def psi(before: np.ndarray, now: np.ndarray) -> float:
    """Return the population stability index of two counts over the same bins, which are merged into about PSI_BINS bins
    of equal weight in `before`. A half is added to each bin, so that an empty one does not make the index infinite."""
    cumulative = before.cumsum() / before.sum()
    group = np.minimum((cumulative * PSI_BINS - 1e-9).astype(int), PSI_BINS - 1)
    merged = [np.bincount(group, weights=counts, minlength=PSI_BINS) for counts in (before, now)]
    return _stability(merged[0], merged[1])


def _stability(before: np.ndarray, now: np.ndarray) -> float:
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (before, now))
    return float(((q - p) * np.log(q / p)).sum())


def shift(before: np.ndarray, now: np.ndarray) -> tuple[float | None, float | None]:
    """Return PSI of two counts (n,) of the same values, and the p-value of Pearson's chi-square test that images of
    both have the same shares; None where either side has fewer than MIN_SCORES images. Values of which fewer than
    LEAST_EXPECTED images are to be expected on a side are tested as one."""
    sums = np.array([before.sum(), now.sum()])
    if min(sums) < MIN_SCORES:
        return None, None
    rare = min(sums) * (before + now) / sums.sum() < LEAST_EXPECTED
    counts = np.stack([before, now])
    table = np.column_stack([counts[:, ~rare], counts[:, rare].sum(axis=1)])
    table = table[:, table.sum(axis=0) > 0]
    expected = sums[:, None] * table.sum(axis=0) / sums.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    freedom = table.shape[1] - 1
    return _stability(before, now), float(chdtrc(freedom, statistic)) if freedom else 1.0


def reading(index: float, p_value: float) -> str:
    """Return what PSI and a p-value say together: `shifted` (an alert, of scores), `moved`, or `stable`."""
    if index > PSI_ALERT and p_value < P_ALERT:
        return SHIFTED
    return MOVED if index > PSI_MOVED and p_value < P_MOVED else STABLE


def kolmogorov_smirnov(before: np.ndarray, now: np.ndarray) -> tuple[float, float]:
    """Return the statistic D of two counts over the same bins and its asymptotic p-value, which is conservative, as all
    scores in a bin are ties."""
    distance = float(np.abs(before.cumsum() / before.sum() - now.cumsum() / now.sum()).max())
    effective = before.sum() * now.sum() / (before.sum() + now.sum())
    return distance, float(kolmogorov(distance * np.sqrt(effective)))


def compare(before: np.ndarray, now: np.ndarray) -> dict[str, Any]:
    """Return sizes, PSI, D, p-value and whether they are an alert, for the report. The figures are None where either
    side has fewer than MIN_SCORES scores."""
    sizes = {"before": int(before.sum()), "now": int(now.sum())}
    if min(sizes.values()) < MIN_SCORES:
        return {**sizes, "psi": None, "ks": None, "p_value": None, "alert": False}
    stability, (distance, p_value) = psi(before, now), kolmogorov_smirnov(before, now)
    alert = reading(stability, p_value) == SHIFTED
    return {**sizes, "psi": stability, "ks": distance, "p_value": p_value, "alert": alert}
