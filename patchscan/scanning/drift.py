"""Whether the images that came since the previous scan score like those it found: PSI and the Kolmogorov-Smirnov test.

Both are taken on logits, in fine bins whose edges are quantiles of the previous scan, so memory does not grow.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.special import kolmogorov

FEWEST = 50
BINS = 200
PSI_BINS = 10
# The usual reading of PSI: under 0.1 stable, over 0.25 a shift that needs a look.
PSI_ALERT = 0.25
P_ALERT = 0.001


def edges_of(logits: np.ndarray) -> np.ndarray:
    """BINS - 1 inner edges: quantiles of a sample (n,) of the previous scan's logits."""
    return np.unique(np.quantile(logits, np.linspace(0, 1, BINS + 1)[1:-1]))


def counts_of(chunks: Iterator[np.ndarray], edges: np.ndarray) -> np.ndarray:
    """Logits, chunk by chunk, counted between `edges`. Returns int64 (len(edges) + 1,)."""
    counts = np.zeros(len(edges) + 1, np.int64)
    for chunk in chunks:
        counts += np.bincount(np.searchsorted(edges, chunk, side="right"), minlength=len(counts))
    return counts


def psi(before: np.ndarray, now: np.ndarray) -> float:
    """Population stability index of two counts over the same bins, joined to about PSI_BINS bins of equal weight in
    `before`; a half is added to each bin, so that an empty one does not make it infinite."""
    upto = before.cumsum() / before.sum()
    group = np.minimum((upto * PSI_BINS - 1e-9).astype(int), PSI_BINS - 1)
    joined = [np.bincount(group, weights=counts, minlength=PSI_BINS) + 0.5 for counts in (before, now)]
    p, q = (counts / counts.sum() for counts in joined)
    return float(((q - p) * np.log(q / p)).sum())


def kolmogorov_smirnov(before: np.ndarray, now: np.ndarray) -> tuple[float, float]:
    """The statistic D of two counts over the same bins, and its asymptotic p-value (conservative: bins are ties)."""
    distance = float(np.abs(before.cumsum() / before.sum() - now.cumsum() / now.sum()).max())
    effective = before.sum() * now.sum() / (before.sum() + now.sum())
    return distance, float(kolmogorov(distance * np.sqrt(effective)))


def compare(before: np.ndarray, now: np.ndarray) -> dict[str, Any]:
    """For the report: sizes, PSI, D, p-value and whether it is an alert; only sizes where either is under FEWEST."""
    sizes = {"before": int(before.sum()), "now": int(now.sum())}
    if min(sizes.values()) < FEWEST:
        return {**sizes, "psi": None, "ks": None, "p_value": None, "alert": False}
    index, (distance, p_value) = psi(before, now), kolmogorov_smirnov(before, now)
    alert = index > PSI_ALERT and p_value < P_ALERT
    return {**sizes, "psi": index, "ks": distance, "p_value": p_value, "alert": alert}
