"""Intervals and tests: Wilson, DeLong, Newcombe, Agresti-Min, McNemar, Holm, Friedman.

Every interval is two-sided at 95 %. Labels are 1 for AI, 0 for real; a higher score means
more likely AI. This module needs no torch. statsmodels and scipy.stats are imported inside the functions that use them,
because the import takes long and scan reports need neither.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

from patchscan.common.blas import one_blas_thread

LEVEL = 0.95
# The half-width of a normal interval in standard deviations: 1.96.
NORMAL_QUANTILE = float(ndtri(0.5 + LEVEL / 2))
DRAWS = 20_000


@dataclass(frozen=True)
class Estimate:
    """A value with its interval. None means undefined for these data: one class only, nothing to divide by, or, for the
    bounds alone, equal resamples. `method` names how the interval was computed."""

    value: float | None
    low: float | None
    high: float | None
    method: str

    @property
    def bounds(self) -> tuple[float, float, float]:
        """Value, low and high of an estimate that is not undefined."""
        assert self.value is not None
        assert self.low is not None
        assert self.high is not None
        return self.value, self.low, self.high


def undefined(method: str) -> Estimate:
    """Return an undefined estimate."""
    return Estimate(None, None, None, method)


def wilson(successes: int, trials: int) -> Estimate:
    """Estimate a proportion with Wilson's score interval (Wilson, JASA 1927); undefined for no trials."""
    if trials == 0:
        return undefined("wilson")
    return Estimate(successes / trials, *_wilson_bounds(successes, trials), "wilson")


def _wilson_bounds(successes: float, trials: float) -> tuple[float, float]:
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, trials, alpha=1 - LEVEL, method="wilson")
    # What rounding leaves of these two ends would be shown as "< 0.1 %" and "> 99.9 %".
    return 0.0 if successes == 0 else float(low), 1.0 if successes == trials else float(high)


def proportion(hit: np.ndarray, cluster: np.ndarray | None = None) -> Estimate:
    """Estimate the share of `hit` (bool, (n,)) with Wilson's interval; undefined for no images.

    Images of one `cluster` (n,), such as one photographer's, are alike and tell less than as many others. The interval
    is then that of so few independent images as have the same variance between clusters (the design effect), and of
    fewer where there are few clusters to tell that variance from (Korn and Graubard, Survey Methodology 1998); where
    all images are hits, or none is, that of one image a cluster.
    """
    n = len(hit)
    clusters = n if cluster is None else len(np.unique(cluster))
    if clusters in (0, n):
        return wilson(int(hit.sum()), n)
    effect = _design_effect(hit, cluster)
    return Estimate(float(hit.mean()), *_wilson_bounds(hit.sum() / effect, n / effect), "wilson, by source")


def proportion_among(hit: np.ndarray, among: np.ndarray, cluster: np.ndarray | None) -> Estimate:
    """Estimate the share of `hit` among some of the images, both bool (n,); `cluster` (n,) as in `proportion`."""
    return proportion(hit[among], None if cluster is None else cluster[among])


def _design_effect(values: np.ndarray, cluster: np.ndarray | None) -> float:
    """How many times as many images of clusters (n,) are needed as independent ones, for an interval of the mean of
    `values` (n,) that is as wide; at least 1, and where all values are equal as many as a cluster has on average.

    The variance between the clusters is estimated, so the interval is Student's: the effect is greater by the square of
    its quantile over the normal one (Korn and Graubard)."""
    clusters = len(values) if cluster is None else len(np.unique(cluster))
    if clusters == len(values):
        return 1.0
    excess = values - values.mean()
    if clusters == 1 or not excess.any():
        return len(values) / clusters
    sums = _sums(excess, cluster)
    effect = max(1.0, float((sums**2).sum() / (excess**2).sum() * clusters / (clusters - 1)))
    return effect * (_quantile(clusters - 1) / NORMAL_QUANTILE) ** 2


def _quantile(freedom: float) -> float:
    """The half-width of an interval in standard errors that have so many degrees of freedom (Student's t)."""
    return float(stdtrit(freedom, 0.5 + LEVEL / 2))


def _sums(values: np.ndarray, cluster: np.ndarray | None) -> np.ndarray:
    """Add up the values (n,) of each cluster (n,); each value is its own where `cluster` is None."""
    if cluster is None:
        return values
    _, number = np.unique(cluster, return_inverse=True)
    return np.bincount(number, weights=values)


def population_count(found: int, sampled: int, population: int) -> Estimate:
    """Estimate how many of `population` objects have a property that `found` of `sampled` random ones have: Wilson's
    interval with the finite population correction, in whole objects; exact where all were sampled, undefined where none
    was."""
    method = "wilson, finite population"
    if sampled == 0:
        return undefined(method)
    if sampled == population:
        return Estimate(found, found, found, method)
    # So many draws with replacement tell as much as these without.
    trials = sampled * (population - 1) / (population - sampled)
    low, high = _wilson_bounds(found / sampled * trials, trials)
    # Those that were seen are certain.
    least, most = found, population - (sampled - found)
    low, high = max(least, math.floor(population * low)), min(most, math.ceil(population * high))
    return Estimate(round(population * found / sampled), low, high, method)


def mean_interval(values: Sequence[float]) -> Estimate:
    """Estimate the mean of what cannot be negative with Student's t interval; undefined for no values, without bounds
    for one."""
    method = "Student's t"
    if not values:
        return undefined(method)
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean, None, None, method)
    half = half_width(values)
    return Estimate(mean, max(0.0, mean - half), mean + half, method)


def half_width(values: Sequence[float]) -> float:
    """Return the half-width of Student's t interval of the mean of two values or more."""
    return float(_quantile(len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def mean_of_rates(first: Estimate, second: Estimate) -> Estimate:
    """Estimate the mean of two independent rates; the interval by Newcombe's square-and-add (Stat Med 1998)."""
    if None in (first.value, second.value):
        return undefined("newcombe")
    a, a_low, a_high = first.bounds
    b, b_low, b_high = second.bounds
    low = (a + b) / 2 - np.hypot(a - a_low, b - b_low) / 2
    high = (a + b) / 2 + np.hypot(a_high - a, b_high - b) / 2
    return Estimate((a + b) / 2, float(low), float(high), "newcombe")


def difference_of_rates(first: Estimate, second: Estimate) -> Estimate:
    """Estimate the first of two independent rates minus the second, from their Wilson intervals; the interval is
    Newcombe's method 10 (Stat Med 1998)."""
    if None in (first.value, second.value):
        return undefined("newcombe")
    a, a_low, a_high = first.bounds
    b, b_low, b_high = second.bounds
    low, high = np.hypot(a - a_low, b_high - b), np.hypot(a_high - a, b - b_low)
    return Estimate(a - b, float(a - b - low), float(a - b + high), "newcombe")


def precision_at(prevalence: float, recall: Estimate, false_positive_rate: Estimate) -> Estimate:
    """Estimate the share of alarms that are right if `prevalence` of all images are AI (Bayes' theorem).

    The interval combines the worse ends of both rates, and the better ends. It holds as often as theirs, or more often.
    """
    if None in (recall.value, false_positive_rate.value):
        return undefined("wilson bounds")
    tpr, tpr_low, tpr_high = recall.bounds
    fpr, fpr_low, fpr_high = false_positive_rate.bounds

    def share(hit: float, alarm: float) -> float | None:
        alarms = prevalence * hit + (1 - prevalence) * alarm
        return prevalence * hit / alarms if alarms else None

    return Estimate(share(tpr, fpr), share(tpr_low, fpr_high), share(tpr_high, fpr_low), "wilson bounds")


def complement(rate: Estimate) -> Estimate:
    """Return 1 - rate, with its interval."""
    if rate.value is None:
        return rate
    value, low, high = rate.bounds
    return Estimate(1 - value, 1 - high, 1 - low, rate.method)


def placements(label: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for several scores (k, n) of the same images, the share of real images below each AI image, (k, m), and
    that of AI images above each real image, (k, n - m); equal scores count half. label (n,), both classes present."""
    from scipy import stats

    positive, negative = scores[:, label == 1], scores[:, label == 0]
    m, n = positive.shape[1], negative.shape[1]
    both = stats.rankdata(np.concatenate([positive, negative], axis=1), axis=1)
    over_negatives = (both[:, :m] - stats.rankdata(positive, axis=1)) / n  # (k, m)
    under_positives = 1 - (both[:, m:] - stats.rankdata(negative, axis=1)) / m  # (k, n)
    return over_negatives, under_positives


def delong_components(label: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute AUCs and their covariance for several scores of the same images (DeLong et al., Biometrics 1988; the fast
    form of Sun & Xu, IEEE SPL 2014). label (n,) of 0 and 1, both present; scores (k, n). Returns (k,), (k, k)."""
    parts = placements(label, scores)
    covariance = sum(np.atleast_2d(np.cov(part, ddof=1)) / part.shape[1] if part.shape[1] > 1 else np.nan
                     for part in parts)  # fmt: skip
    return parts[0].mean(axis=1), np.atleast_2d(covariance) * np.ones((len(scores), len(scores)))


def _influence(label: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """What each image adds to each AUC's deviation from its expectation, for scores (k, n). Returns (k, n)."""
    over, under = placements(label, scores)
    influence = np.zeros(scores.shape)
    influence[:, label == 1] = (over - over.mean(axis=1, keepdims=True)) / over.shape[1]
    influence[:, label == 0] = (under - under.mean(axis=1, keepdims=True)) / under.shape[1]
    return influence


def _clustered(
    label: np.ndarray, influence: np.ndarray, variance: float, cluster: np.ndarray | None
) -> tuple[float, float]:
    """The variance of a sum of influences (n,), of an AUC or of a difference of AUCs, with those of one cluster (n,)
    taken together, of whichever class (Obuchowski, Biometrics 1997), and its degrees of freedom (Satterthwaite's). At
    least `variance`, that of independent images, which it is where there are no clusters of several images."""
    clusters = len(label) if cluster is None else len(np.unique(cluster))
    if cluster is None or clusters == len(label):
        return variance, math.inf
    sums, parts, freedoms = [], [], []
    for one in (0, 1):
        inside = label == one
        units = len(np.unique(cluster[inside]))
        # A class of one cluster tells nothing of other clusters: its images count as independent.
        by_cluster = _sums(np.where(inside, influence, 0.0), cluster) if units > 1 else np.zeros(clusters)
        own, units = (by_cluster, units) if units > 1 else (influence[inside], int(inside.sum()))
        sums.append(by_cluster)
        parts.append(float((own**2).sum()) * units / max(units - 1, 1))
        freedoms.append(max(units - 1, 1))
    both = 2 * float(sums[0] @ sums[1]) * clusters / max(clusters - 1, 1)  # of clusters that hold both classes
    spread = sum(part**2 / freedom for part, freedom in zip(parts, freedoms, strict=True))
    freedom = sum(parts) ** 2 / spread if spread > 0 else math.inf
    if both:  # then the classes are not two samples
        freedom = min(freedom, clusters - 1)
    return float(np.fmax(variance, sum(parts) + both)), freedom


def auc_interval(label: np.ndarray, score: np.ndarray, cluster: np.ndarray | None = None) -> Estimate:
    """Estimate the AUC with DeLong's interval, computed for its log odds so that it stays within 0..1. Images of one
    `cluster` (n,) are alike: their variance is taken together, and is at least that of independent images.

    If DeLong's variance is zero or undefined (perfect separation, one image per class), the interval is Newcombe's
    method 5, for as many images as clusters. Undefined if a class is missing.
    """
    if len(np.unique(label)) < 2:
        return undefined("delong")
    auc, covariance = delong_components(label, score[None])
    value, variance = float(auc[0]), float(covariance[0, 0])
    if not variance > 0 or value in (0.0, 1.0):
        units = [
            len(np.unique(cluster[label == one])) if cluster is not None else int((label == one).sum())
            for one in (1, 0)
        ]
        return newcombe_auc(value, units[0], units[1])
    variance, freedom = _clustered(label, _influence(label, score[None])[0], variance, cluster)
    method = "delong" if math.isinf(freedom) else "delong, by source"
    odds = np.log(value / (1 - value))
    arm = _quantile(freedom) * np.sqrt(variance) / (value * (1 - value))
    low, high = 1 / (1 + np.exp(-(odds - arm))), 1 / (1 + np.exp(-(odds + arm)))
    return Estimate(value, float(low), float(high), method)


def newcombe_auc(auc: float, positives: int, negatives: int) -> Estimate:
    """Newcombe's method 5 for an AUC: a score-type interval that is sensible at 0 and 1 (Stat Med 2006, 25:559)."""
    from scipy import optimize

    size = (positives + negatives) / 2

    def distance(theta: float) -> float:
        spread = (1 - theta) / (2 - theta) + theta / (1 + theta)
        variance = theta * (1 - theta) / (positives * negatives) * (1 + (size - 1) * spread)
        return (theta - auc) ** 2 - NORMAL_QUANTILE**2 * variance

    low = 0.0 if auc == 0 else float(optimize.brentq(distance, 0, auc - 1e-9 if auc == 1 else auc))
    high = 1.0 if auc == 1 else float(optimize.brentq(distance, auc + 1e-9 if auc == 0 else auc, 1))
    return Estimate(auc, low, high, "newcombe")


@dataclass(frozen=True)
class Difference:
    """A paired difference, first minus second, with its interval and p-value."""

    value: float
    low: float
    high: float
    p_value: float


def auc_difference(
    label: np.ndarray, first: np.ndarray, second: np.ndarray, cluster: np.ndarray | None = None
) -> Difference | None:
    """Compare two scores of the same images by DeLong's paired test; None if a class is missing. Images of one
    `cluster` (n,) are alike: their variance is taken together (Obuchowski, 1997), and is at least that of independent
    images."""
    if len(np.unique(label)) < 2:
        return None
    scores = np.stack([first, second])
    auc, covariance = delong_components(label, scores)
    value = float(auc[0] - auc[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    influence = _influence(label, scores)
    variance, freedom = _clustered(label, influence[0] - influence[1], variance, cluster)
    if not variance > 1e-12:
        # Both order the images the same way (or there is one image per class): no evidence of a difference.
        return Difference(value, value, value, 1.0) if abs(value) < 1e-12 else None
    error = np.sqrt(variance)
    arm = _quantile(freedom) * error
    p_value = float(2 * stdtr(freedom, -abs(value) / error))
    return Difference(value, max(-1.0, value - arm), min(1.0, value + arm), p_value)


def accuracy_difference(
    first_right: np.ndarray, second_right: np.ndarray, cluster: np.ndarray | None = None
) -> Difference | None:
    """Compare the accuracy of two models on the same images (bool (n,), whether right), with Agresti & Min's interval
    (Stat Med 2005) and McNemar's exact test. None for no images.

    Images of one `cluster` (n,) are alike: the interval is then that of fewer images (the design effect), and in the
    test a cluster's images change sides together (`_sign_flips`).
    """
    if len(first_right) == 0:
        return None
    gains = first_right.astype(int) - second_right
    effect = _design_effect(gains, cluster)
    only_first, only_second = (float((gains == sign).sum() / effect) for sign in (1, -1))
    a, b, total = only_first + 0.5, only_second + 0.5, len(gains) / effect + 2
    arm = NORMAL_QUANTILE * np.sqrt(a + b - (a - b) ** 2 / total) / total
    centre = (a - b) / total
    low, high = max(-1.0, centre - arm), min(1.0, centre + arm)
    return Difference(float(gains.mean()), float(low), float(high), _sign_flips(_sums(gains, cluster).astype(int)))


def _sign_flips(sums: np.ndarray) -> float:
    """The exact two-sided p-value of a total if each of these whole numbers (n,) might as well have had the other sign.
    Of ones and minus ones this is McNemar's exact test."""
    from scipy.stats import binom

    # The chance of each total, from -sum(|sums|) to sum(|sums|) in steps of 1.
    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    chances = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        flipped = np.zeros(2 * size * count + 1)
        flipped[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, flipped)
    totals = np.arange(len(chances)) - (sizes * counts).sum()
    return min(1.0, float(chances[np.abs(totals) >= abs(sums.sum())].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, 1979)."""
    if not len(p_values):
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def friedman(values: np.ndarray) -> float | None:
    """Test whether the treatments (columns) differ over the blocks (rows), by Friedman's rank test.

    values: (blocks, treatments). Returns p, or None for fewer than 2 blocks or 3 treatments. p comes from DRAWS
    random permutations within the blocks.
    """
    # Not from chi-square, which needs more blocks (here generators) than there usually are.
    from scipy import stats

    blocks, treatments = values.shape
    if blocks < 2 or treatments < 3:
        return None
    ranks = stats.rankdata(values, axis=1)
    rng = np.random.default_rng(0)
    order = rng.random((DRAWS, blocks, treatments)).argsort(axis=2)
    shuffled = np.take_along_axis(np.broadcast_to(ranks, order.shape), order, axis=2)
    centre = (treatments + 1) / 2
    observed = ((ranks.mean(axis=0) - centre) ** 2).sum()
    permuted = ((shuffled.mean(axis=1) - centre) ** 2).sum(axis=1)
    return float((1 + (permuted >= observed - 1e-12).sum()) / (DRAWS + 1))


def principal_components(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return features (n, width) on their principal components, (n, k), and each one's share of the variance, (k,), in
    falling order; k is the lesser of n and width."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    wide = features.shape[1] > len(features)
    # From the smaller of the two square matrices, which takes a quarter of the time of a singular value decomposition.
    with one_blas_thread():
        square, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    variance, vectors = square[::-1].clip(0), vectors[:, ::-1]
    components = vectors * np.sqrt(variance) if wide else centred @ vectors
    return components, variance / max(float(variance.sum()), 1e-300)
