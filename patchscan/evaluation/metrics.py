"""Compute a detector's metrics on scored images, each with a 95 % interval.

Rates have Wilson's interval, AUC has DeLong's, the other metrics a bootstrap interval, resampled within each stratum
(generator and class; those that share a source are one stratum). Where the images' sources are known, all of them count
sources that are alike together. All resamples are computed from one matrix of counts, so a thousand resamples of 10,000
images take about a second. This module needs no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from patchscan.reporting.statistics import Estimate, auc_interval, mean_of_rates, proportion_among, undefined

RESAMPLES = 1000
ECE_BINS = 10
_ELEMENTS_AT_ONCE = 4_000_000

# With fewer real images, no threshold can be told to be at an FPR of 0.1 %.
LEAST_REAL_FOR_01 = 1000

RESAMPLED = (
    *("average_precision", "tpr_at_fpr_01", "tpr_at_fpr_1", "tpr_at_fpr_5", "eer"),
    *("brier", "ece", "f1_ai", "f1_real"),
)


@dataclass(frozen=True)
class Scored:
    """Arrays with one element per scored image.

    `label`: 1 AI, 0 real; `logit`: finite, AI positive; `p_ai`: 0..1; `says_ai`: p_ai is at or above the threshold,
    whether uncertain or not; `uncertain`: p_ai is in the abstain band; `stratum`: an integer for each combination of
    generator and class; `cluster`: an integer for each source of images that are alike, None where sources are unknown.
    """

    label: np.ndarray
    logit: np.ndarray
    p_ai: np.ndarray
    says_ai: np.ndarray
    uncertain: np.ndarray
    stratum: np.ndarray
    cluster: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label)

    @property
    def uncalibrated(self) -> np.ndarray:
        """The sigmoid of the logits, (n,): p_ai as the network was trained."""
        return np.asarray(1 / (1 + np.exp(-np.clip(self.logit, -700, 700))))


def measure(scored: Scored, resamples: int = RESAMPLES) -> dict[str, Estimate]:
    """Compute all metrics, by name. A metric that is undefined for these images (one class only, no images) is an
    Estimate of None."""
    return {
        **_rates(scored),
        "auc": auc_interval(scored.label, scored.logit, cluster=scored.cluster),
        **resampled(scored, resamples),
    }


def confusion(scored: Scored) -> dict[str, int]:
    """Count true and false decisions for AI and real at the threshold."""
    ai, says = scored.label == 1, scored.says_ai
    return {
        "true_ai": int((ai & says).sum()),
        "missed_ai": int((ai & ~says).sum()),
        "false_ai": int((~ai & says).sum()),
        "true_real": int((~ai & ~says).sum()),
    }


def _rates(scored: Scored) -> dict[str, Estimate]:
    ai, says, decided = scored.label == 1, scored.says_ai, ~scored.uncertain
    right = says == ai

    def share(hit: np.ndarray, among: np.ndarray) -> Estimate:
        return proportion_among(hit, among, scored.cluster)

    everything = np.ones(len(scored), bool)
    fake_detection, real_detection = share(right, ai), share(right, ~ai)
    return {
        "accuracy": share(right, everything),
        "balanced_accuracy": mean_of_rates(fake_detection, real_detection),
        "fake_detection": fake_detection,
        "real_detection": real_detection,
        "precision_ai": share(right, says),
        "precision_real": share(right, ~says),
        "coverage": share(decided, everything),
        "selective_accuracy": share(right, decided),
    }


def resampled(scored: Scored, resamples: int = RESAMPLES) -> dict[str, Estimate]:
    """Compute the RESAMPLED metrics, by name."""
    if len(scored) == 0:
        return {name: undefined("bootstrap") for name in RESAMPLED}
    observed = from_counts(scored, np.ones((1, len(scored))))
    samples = resampled_counts(scored.stratum, 0, resamples, scored.cluster)
    drawn = [from_counts(scored, counts) for counts in samples]
    return {name: bootstrap_estimate(name, float(observed[name][0]), np.concatenate([one[name] for one in drawn]))
            for name in RESAMPLED}  # fmt: skip


def resampled_counts(
    stratum: np.ndarray, seed: int, resamples: int, cluster: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yield how often each image is drawn in each of `resamples` stratified bootstrap samples, in pieces (b, n). Within
    a stratum with several clusters whole clusters are drawn, and strata that share a cluster are one stratum."""
    rng = np.random.default_rng(seed)
    stratum = stratum if cluster is None else joined_strata(stratum, cluster)
    members = [np.flatnonzero(stratum == value) for value in np.unique(stratum)]
    drawn = [_draw_units(where, cluster) for where in members]
    at_once = max(1, min(resamples, _ELEMENTS_AT_ONCE // len(stratum)))
    for begin in range(0, resamples, at_once):
        size = min(at_once, resamples - begin)
        counts = np.zeros((size, len(stratum)))
        for where, (units, unit) in zip(members, drawn, strict=True):
            counts[:, where] = rng.multinomial(units, np.full(units, 1 / units), size=size)[:, unit]
        yield counts


def joined_strata(stratum: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """Return the strata (n,) renumbered, with those that share a cluster (n,) as one: a photographer's pictures beside
    several generators are alike, so that a sample has all of them or none."""
    groups, group = np.unique(stratum, return_inverse=True)
    names, name = np.unique(cluster, return_inverse=True)
    size = len(groups) + len(names)
    # A graph of strata and clusters, with an edge for each image.
    graph = coo_array((np.ones(len(stratum)), (group, len(groups) + name)), shape=(size, size))
    return connected_components(graph, directed=False)[1][group]


def _draw_units(where: np.ndarray, cluster: np.ndarray | None) -> tuple[int, np.ndarray]:
    """How many units are drawn among the images `where`, and the unit of each: its cluster, if there are several."""
    if cluster is not None:
        names, unit = np.unique(cluster[where], return_inverse=True)
        if len(names) > 1:
            return len(names), unit
    return len(where), np.arange(len(where))


def bootstrap_estimate(name: str, value: float, drawn: np.ndarray) -> Estimate:
    """Return the estimate of the metric `name` from its value and its values in the bootstrap samples, (resamples,)."""
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not len(drawn):
        return undefined("bootstrap")
    low, high = (float(bound) for bound in np.quantile(drawn, [0.025, 0.975]))
    if low == high:
        # All resamples are equal, as with perfect separation: they give no information about the uncertainty.
        return Estimate(value, None, None, "bootstrap")
    if name == "ece":
        # The ECE of a resample is biased upwards, so the interval is reflected at the estimate (basic bootstrap).
        return Estimate(value, max(0.0, 2 * value - high), max(value, min(1.0, 2 * value - low)), "basic bootstrap")
    # Resamples repeat images, which ties them: the precision at the ends of the order is then beside the interval.
    return Estimate(value, min(low, value), max(high, value), "bootstrap")


def from_counts(scored: Scored, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the RESAMPLED metrics with image i counted counts[:, i] times. counts is (b, n); returns (b,) for each
    metric, NaN where it is undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {**_from_order(scored, counts), **_from_sums(scored, counts)}


def _from_order(scored: Scored, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics that depend only on the order of the logits; images of equal logit share one threshold."""
    order = np.argsort(-scored.logit, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scored.logit[order])), len(order) - 1)
    ai = scored.label[order] == 1
    hits = np.cumsum(counts[:, order] * ai, axis=1)[:, ends]
    alarms = np.cumsum(counts[:, order] * ~ai, axis=1)[:, ends]
    tpr, fpr = hits / hits[:, -1:], alarms / alarms[:, -1:]
    new_hits = np.diff(tpr, axis=1, prepend=0)
    precision = np.where(hits + alarms > 0, hits / np.maximum(hits + alarms, 1), 0)
    return {
        "average_precision": np.where(hits[:, -1] > 0, (new_hits * precision).sum(axis=1), np.nan),
        "tpr_at_fpr_01": _tpr_at(0.001, tpr, fpr) if (~ai).sum() >= LEAST_REAL_FOR_01 else np.full(len(tpr), np.nan),
        "tpr_at_fpr_1": _tpr_at(0.01, tpr, fpr),
        "tpr_at_fpr_5": _tpr_at(0.05, tpr, fpr),
        "eer": _equal_error_rate(tpr, fpr),
    }


def _tpr_at(limit: float, tpr: np.ndarray, fpr: np.ndarray) -> np.ndarray:
    """The highest TPR among thresholds whose FPR is at most `limit`; no interpolation between thresholds."""
    best = np.where(fpr <= limit, tpr, 0).max(axis=1)
    return np.where(np.isfinite(fpr[:, -1]) & np.isfinite(tpr[:, -1]), best, np.nan)


def _equal_error_rate(tpr: np.ndarray, fpr: np.ndarray) -> np.ndarray:
    """The error rate where FPR = 1 - TPR, on straight lines between the ROC's points."""
    start = np.zeros((len(tpr), 1))
    tpr, fpr = np.hstack([start, tpr]), np.hstack([start, fpr])
    excess = fpr + tpr - 1  # from -1 up to 1
    after = np.argmax(excess >= 0, axis=1)[:, None]
    ahead, behind = (np.take_along_axis(excess, index, 1) for index in (after, after - 1))
    right, left = (np.take_along_axis(fpr, index, 1) for index in (after, after - 1))
    result: np.ndarray = (left + (right - left) * behind / (behind - ahead))[:, 0].clip(0, 1)  # rounding may pass 1
    return result


def _from_sums(scored: Scored, counts: np.ndarray) -> dict[str, np.ndarray]:
    ai = (scored.label == 1).astype(float)
    says = scored.says_ai.astype(float)
    hit, miss, false, clear = (
        counts @ part for part in (ai * says, ai * (1 - says), (1 - ai) * says, (1 - ai) * (1 - says))
    )
    total = counts.sum(axis=1)
    return {
        "f1_ai": 2 * hit / (2 * hit + false + miss),
        "f1_real": 2 * clear / (2 * clear + false + miss),
        "brier": counts @ (scored.p_ai - ai) ** 2 / total,
        "ece": calibration_error(scored.label == 1, scored.p_ai, counts),
    }


def calibration_error(is_ai: np.ndarray, p_ai: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the expected calibration error over ECE_BINS equal bins, where image i counts counts[:, i] times. is_ai
    bool (n,), p_ai (n,), counts (b, n); returns (b,)."""
    in_bin = np.eye(ECE_BINS)[np.minimum((p_ai * ECE_BINS).astype(int), ECE_BINS - 1)]  # (n, bins)
    gap = counts @ (in_bin * (is_ai - p_ai)[:, None])  # (b, bins)
    error: np.ndarray = np.abs(gap).sum(axis=1) / counts.sum(axis=1)
    return error
