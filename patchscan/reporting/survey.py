"""Estimate what a bucket holds from a stratified random sample that people have labelled.

Within a stratum every image has the same chance of being drawn. Intervals are two-sided at 95 % and are about the
images of the bucket, of which a known number was drawn, not about others. `python -m tests.audit_coverage` measures
how often they hold the truth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchscan.reporting.statistics import NORMAL_QUANTILE, Estimate, undefined

DRAWS = 10_000
LEAST_TO_TUNE = 10
PRIOR = 0.1


@dataclass(frozen=True)
class Stratum:
    """The labelled images of one stratum: `is_ai` (n,) of 0 and 1, and `predicted` (n,), the scores' p_ai, 0..1.
    `population` images are in the stratum, their mean prediction is `mean_predicted`; `called` says whether the
    detector calls them AI, `margin` how far above the threshold their scores begin, in log odds."""

    population: int
    called: bool
    margin: float
    mean_predicted: float
    is_ai: np.ndarray
    predicted: np.ndarray

    @property
    def labelled(self) -> int:
        return len(self.is_ai)

    @property
    def ai(self) -> int:
        return int(self.is_ai.sum())


def merge_unlabelled(strata: Sequence[Stratum]) -> list[Stratum]:
    """Join each stratum without a label to its neighbour on the same side of the decision, so that nothing of the
    bucket is left out. Returns fewer strata, some without labels only where a whole side has none."""
    merged: list[Stratum] = []
    for stratum in strata:
        last = merged[-1] if merged else None
        if last and last.called == stratum.called and 0 in (last.labelled, stratum.labelled):
            merged[-1] = _joined(last, stratum)
        else:
            merged.append(stratum)
    return merged


def _joined(first: Stratum, second: Stratum) -> Stratum:
    population = first.population + second.population
    mean = (first.population * first.mean_predicted + second.population * second.mean_predicted) / population
    return Stratum(
        population,
        first.called,
        min(first.margin, second.margin),
        mean,
        np.concatenate([first.is_ai, second.is_ai]),
        np.concatenate([first.predicted, second.predicted]),
    )


def prevalence(strata: Sequence[Stratum], counts: "Counts", use_predictions: bool = True) -> Estimate:
    """Estimate the share of AI images. `counts` are the strata's `possible_counts`.

    Prediction-powered inference (Angelopoulos et al., Science 2023, arXiv 2301.09633) for a stratified sample of a
    finite bucket: the mean of lambda times the predictions of all images, plus the labelled images' mean of label
    minus lambda times prediction, weighted by stratum. lambda minimises the variance (PPI++, arXiv 2311.01453); 0, and
    so without `use_predictions`, leaves the ordinary stratified estimate.

    The interval is that of the labels alone, from `counts`, narrowed as much as the predictions lower the standard
    error. The paper's normal interval has no width in a stratum where no AI image was found, and would be too narrow
    here.
    """
    population = np.array([one.population for one in strata])
    every = [_found(strata)[None], counts.low, counts.high]
    alone = _estimate([each.sum(axis=1) for each in every], [population.sum()] * 3)
    if not use_predictions:
        return alone
    value, low, high = alone.bounds
    tuned, narrowed = _tuning(strata)
    shares = population / population.sum()
    for one, share in zip(strata, shares, strict=True):
        value += share * tuned * (one.mean_predicted - float(one.predicted.mean()))
    # The images that were looked at are certain.
    least = sum(one.ai for one in strata) / population.sum()
    most = 1 - sum(one.labelled - one.ai for one in strata) / population.sum()
    value = float(min(max(value, least), most))
    first = alone.bounds[0]
    # By a ratio, because few AI images make the interval lopsided: its lower end must not pass a truth near zero.
    below = value * (low / first) ** narrowed if first > 0 else 0.0
    above = value + narrowed * (high - first)
    return Estimate(value, float(max(least, below)), float(min(most, above)), "prediction-powered, stratified")


def _tuning(strata: Sequence[Stratum]) -> tuple[float, float]:
    """The lambda of the least variance, the slope of labels on predictions within the strata, 0..1, and the standard
    error with it as a share of that without predictions. A slope through too few labels of a class is not used: 0."""
    ai = sum(one.ai for one in strata)
    if min(ai, sum(one.labelled for one in strata) - ai) < LEAST_TO_TUNE:
        return 0.0, 1.0
    covariance = predicted = labels = 0.0
    for one in strata:
        if one.labelled > 1:
            weight = one.population * (one.population - one.labelled) / one.labelled
            both = np.cov(one.is_ai, one.predicted)
            labels, covariance, predicted = (
                labels + weight * both[0, 0], covariance + weight * both[0, 1], predicted + weight * both[1, 1]
            )  # fmt: skip
    if not (predicted > 0 and labels > 0):
        return 0.0, 1.0
    tuned = float(np.clip(covariance / predicted, 0, 1))
    left = (labels - 2 * tuned * covariance + tuned**2 * predicted) / labels
    return tuned, float(np.sqrt(np.clip(left, 0, 1)))


@dataclass(frozen=True)
class Counts:
    """How many AI images each stratum may hold, int (DRAWS, strata): drawn for the lower ends of intervals, and for the
    upper ones."""

    low: np.ndarray
    high: np.ndarray


def possible_counts(strata: Sequence[Stratum]) -> Counts:
    """Draw how many AI images each stratum may hold, given its labels. Raises ValueError where a stratum has none.

    The images that were not looked at follow a beta-binomial distribution, so that what was looked at stays certain.
    Its priors, Beta(0.1, 0.9) for the lower ends and Beta(0.9, 0.1) for the upper, lie between Jeffreys' Beta(1/2,
    1/2), with which a few rare images in large strata made too narrow intervals, and the Beta(0, 1) and Beta(1, 0) of
    Clopper and Pearson's exact interval.
    """
    if any(one.labelled == 0 for one in strata):
        raise ValueError("a stratum has no label: merge_unlabelled first")
    rng = np.random.default_rng(0)

    def drawn(prior: float) -> np.ndarray:
        columns = []
        for one in strata:
            share = rng.beta(one.ai + prior, one.labelled - one.ai + 1 - prior, DRAWS)
            columns.append(one.ai + rng.binomial(one.population - one.labelled, share))
        return np.stack(columns, axis=1)

    return Counts(drawn(PRIOR), drawn(1 - PRIOR))


@dataclass(frozen=True)
class Rates:
    """What the detector does in this bucket where the images of some strata are called AI. `tpr`: the share of AI
    images that are called; `fpr`: that of real images; `precision`: the share of called images that are AI; `missed`:
    the share of the others that are AI."""

    tpr: Estimate
    fpr: Estimate
    precision: Estimate
    missed: Estimate


def rates(strata: Sequence[Stratum], called: Sequence[bool], counts: Counts) -> Rates:
    """Estimate the rates where the strata marked in `called` are called AI. `counts` are the strata's
    `possible_counts`; each interval takes the worse ends of its counts, and the better ends, and holds the estimate."""
    inside = np.asarray(called, bool)
    population = np.array([one.population for one in strata])
    every = [_found(strata)[None], counts.low, counts.high]
    hit, miss = ([each[:, which].sum(axis=1) for each in every] for which in (inside, ~inside))
    size, rest = population[inside].sum(), population[~inside].sum()
    # There are fewest real images where there are most AI images.
    alarm, clear = ([whole - part[0], whole - part[2], whole - part[1]] for whole, part in ((size, hit), (rest, miss)))
    return Rates(
        tpr=_estimate(hit, [hit[0] + miss[0], hit[1] + miss[2], hit[2] + miss[1]]),
        fpr=_estimate(alarm, [alarm[0] + clear[0], alarm[1] + clear[2], alarm[2] + clear[1]]),
        precision=_estimate(hit, [size] * 3),
        missed=_estimate(miss, [rest] * 3),
    )


def _found(strata: Sequence[Stratum]) -> np.ndarray:
    """How many AI images each stratum holds if the others are as those labelled, (strata,)."""
    return np.array([one.population * one.ai / one.labelled for one in strata])


def _estimate(part: Sequence[np.ndarray], whole: Sequence[np.ndarray]) -> Estimate:
    """Estimate part / whole. Each has three elements: what was found (1,), and draws for the lower and the upper end,
    of which 2.5 % lie outside the interval."""
    method = "stratified, beta-binomial"
    if np.all(whole[0] <= 0):
        return undefined(method)
    with np.errstate(divide="ignore", invalid="ignore"):
        value, least, most = (
            float(np.nanquantile(above / below, level))
            for above, below, level in zip(part, whole, (0.5, 0.025, 0.975), strict=True)
        )
    return Estimate(value, min(least, value), max(most, value), method)


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> Estimate:
    """Estimate how far two reviewers agree beyond chance on the same images (Cohen, 1960), with its asymptotic
    interval; undefined where both gave one and the same label to all, without bounds where its error is 0, as where
    they agree on all."""
    names = sorted({*first, *second})
    if len(names) < 2:
        return undefined("cohen")
    from statsmodels.stats.inter_rater import cohens_kappa

    place = {name: number for number, name in enumerate(names)}
    table = np.zeros((len(names), len(names)))
    for one, other in zip(first, second, strict=True):
        table[place[one], place[other]] += 1
    with np.errstate(divide="ignore", invalid="ignore"):
        found = cohens_kappa(table)
    value, spread = float(found.kappa), NORMAL_QUANTILE * float(found.std_kappa)
    if not spread > 0:
        return Estimate(value, None, None, "cohen")
    return Estimate(value, max(-1.0, value - spread), min(1.0, value + spread), "cohen")
