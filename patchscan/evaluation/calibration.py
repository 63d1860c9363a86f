"""Fit a decision to logits (temperature, bias, threshold, abstain band), and apply it.

Cross-fitting gives unbiased numbers for the images that the decision was fitted on.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize
from scipy.special import expit

from patchscan.common.blas import one_blas_thread
from patchscan.detector.answer import TIERS, Tier
from patchscan.detector.card import Decision
from patchscan.reporting.statistics import auc_interval

FOLDS = 5
# Margin added to a bound, because two implementations of the same exponential may differ in the last digits.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Target:
    """The error rates that a decision promises on images like the calibration set: at most `max_fpr` of the real images
    are called `ai`, at most `max_fnr` of the AI images are called `real`; scores in between are `uncertain`."""

    max_fpr: float = 0.05
    max_fnr: float = 0.05


def fit_temperature(logit: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Fit temperature and bias of p_ai = sigmoid(logit / temperature + bias) by maximum likelihood (Platt 1999, with
    his smoothed targets, so that perfectly separated data give finite values; Guo et al. 2017).

    Both classes have the same weight, so p_ai is the probability if half of the images are AI. logit (n,), label (n,)
    of 0 and 1, both present.
    """
    ai = label == 1
    positives, negatives = int(ai.sum()), int((~ai).sum())
    target = np.where(ai, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    weight = np.where(ai, 0.5 / positives, 0.5 / negatives)

    unit = max(float(np.std(logit)), 1e-3)
    scaled = logit / unit

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = scaled * parameters[0] + parameters[1]
        excess = weight * (expit(z) - target)
        value = (weight * (np.logaddexp(0, z) - target * z)).sum()
        return float(value), np.array([(excess * scaled).sum(), excess.sum()])

    # Convex in slope and bias. The slope stays positive, because calibration must not reverse the order of the scores.
    with one_blas_thread():
        best = optimize.minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(1e-3, 1e3), (-50, 50)])
    return float(unit / best.x[0]), float(best.x[1])


def enough(count: int, share: float) -> bool:
    """Return whether of so many values `conformal_bound` can promise this share."""
    return count >= 1 / share - 1


def conformal_bound(values: np.ndarray, share: float) -> float:
    """Return the bound that, on average, at most `share` of further values like these will reach (split conformal
    prediction; Vovk et al. 2005).

    It lies above the ceil((n + 1)(1 - share))-th smallest value, half-way to the next greater one. With fewer than
    1 / share - 1 values it lies just above all of them, and the promise does not hold.
    """
    ordered = np.sort(values)
    rank = min(int(np.ceil((len(ordered) + 1) * (1 - share))), len(ordered))
    quantile = float(ordered[rank - 1])
    greater = ordered[ordered > quantile]
    just_above = max(float(np.nextafter(quantile, np.inf)), quantile + ROUNDING)
    return max(just_above, (quantile + float(greater[0])) / 2) if len(greater) else just_above


def fitted_apart(label: np.ndarray, tier: np.ndarray) -> list[Tier]:
    """Return the tiers (n,) that get numbers of their own: those that images of both classes (label (n,)) look like."""
    return [name for name in TIERS if len(np.unique(label[tier == name])) == 2]


def fit_decision(
    logit: np.ndarray,
    label: np.ndarray,
    target: Target,
    basis: str,
    tier: np.ndarray | None = None,
    cluster: np.ndarray | None = None,
) -> Decision:
    """Fit the decision to calibration images (logit (n,), label (n,), both classes present); `basis` says in words what
    they are and becomes part of `chosen_by`.

    `tier` (n,) holds the tier that each image looks like, as scoring estimates it. Each tier then gets numbers of its
    own, fitted to the images that look like it, so that what they promise holds for images that are estimated alike,
    wrong estimates included. Where those are of one class, the numbers of `native` apply, and these are fitted to all
    images where no others are to be had.
    """
    if tier is None:
        return _fit(logit, label, target, basis)
    fitted: dict[str, Decision | None] = {}
    for name in fitted_apart(label, tier):
        rows = tier == name
        alike = None if cluster is None else cluster[rows]
        images = f"images that look like {name}, of {basis}"
        fitted[name] = _fit_covered(logit[rows], label[rows], target, images, name, alike)
    plain = fitted.pop("native", None) or _fit(logit, label, target, basis)
    return replace(plain, tiers=fitted)


def _fit_covered(
    logit: np.ndarray, label: np.ndarray, target: Target, basis: str, tier: Tier, cluster: np.ndarray | None
) -> Decision | None:
    """Fit one tier's numbers; None where its scores cannot be told from guessing, `native` excepted."""
    low = auc_interval(label, logit, cluster=cluster).low
    if tier != "native" and (low is None or low <= 0.5):
        return None
    counts = f"{int((label == 1).sum())} AI and {int((label == 0).sum())} real"
    return _fit(logit, label, target, f"{counts} {basis}")


def _per_cent(share: float) -> str:
    """A share with as many decimals as it has: 0.05 % is not 0.1 %."""
    return f"{share * 100:g} %"


def _fit(logit: np.ndarray, label: np.ndarray, target: Target, basis: str) -> Decision:
    temperature, bias = fit_temperature(logit, label)
    p_ai = expit(logit / temperature + bias)
    real, ai = p_ai[label == 0], p_ai[label == 1]
    threshold = conformal_bound(real, target.max_fpr)
    low = min(threshold, -conformal_bound(-ai, target.max_fnr))
    short = [
        f"{len(values)} {name} images are too few to promise {_per_cent(share)}"
        for name, values, share in (("real", real, target.max_fpr), ("AI", ai, target.max_fnr))
        if not enough(len(values), share)
    ]
    text = (
        f"temperature and bias by maximum likelihood, threshold at a false-positive rate of "
        f"{_per_cent(target.max_fpr)}, "
        f"'real' only where at most {_per_cent(target.max_fnr)} of AI images score as low, on {basis}"
    )
    return Decision(
        temperature=temperature,
        bias=bias,
        threshold=threshold,
        abstain_low=low,
        abstain_high=threshold,
        chosen_by="; ".join([text, *short]),
    )


@dataclass(frozen=True)
class Decided:
    """What decisions make of logits: `p_ai` float, `says_ai` (at the threshold, abstention set aside), `uncertain`
    bool, and `threshold`, the p_ai from which each would be called AI, all (n,)."""

    p_ai: np.ndarray
    says_ai: np.ndarray
    uncertain: np.ndarray
    threshold: np.ndarray

    @classmethod
    def empty(cls, count: int) -> "Decided":
        """Arrays for `count` images, to be filled by `put`; p_ai and threshold are NaN until then."""
        nothing = np.zeros(count, dtype=bool)
        return cls(np.full(count, np.nan), nothing, nothing.copy(), np.full(count, np.nan))

    def put(self, where: np.ndarray, part: "Decided") -> None:
        """Store the decisions `part` at the places `where` (bool or indices)."""
        for name in ("p_ai", "says_ai", "uncertain", "threshold"):
            getattr(self, name)[where] = getattr(part, name)


def decide(logit: np.ndarray, decision: Decision, tier: np.ndarray | None = None) -> Decided:
    """Apply a decision to logits (n,) of images that look like `tier` (n,); all like `native` where it is None."""
    decided = Decided.empty(len(logit))
    tiers: np.ndarray = np.full(len(logit), "native") if tier is None else tier
    for name in TIERS:
        rows = tiers == name
        one = decision.of(name)
        p_ai = expit(logit[rows] / one.temperature + one.bias)
        uncertain = (one.abstain_low <= p_ai) & (p_ai < one.abstain_high) | (not decision.covers(name))
        decided.put(rows, Decided(p_ai, p_ai >= one.threshold, uncertain, np.full(len(p_ai), one.threshold)))
    return decided


def cross_fitted(
    logit: np.ndarray,
    label: np.ndarray,
    stratum: np.ndarray,
    target: Target,
    tier: np.ndarray | None = None,
    image: np.ndarray | None = None,
    cluster: np.ndarray | None = None,
) -> Decided:
    """Decide each calibration image by a decision fitted without it: FOLDS-fold, dealt out evenly within each stratum
    (n,). What is measured on the result is not flattered by having chosen the threshold on the same images.

    `tier` and `cluster` as in `fit_decision`. Rows of one `image` (n,), its deliveries, are left out together. Where a
    class has fewer than 2 images there is nothing to leave out and everything is decided by one fit.
    """
    fold = _folds(stratum, np.arange(len(logit)) if image is None else image)
    decided = Decided.empty(len(logit))
    for number in range(FOLDS):
        held, rest = fold == number, fold != number
        if len(np.unique(label[rest])) < 2:
            rest = np.ones(len(logit), bool)
        one, other = (None, None) if tier is None else (tier[rest], tier[held])
        together = None if cluster is None else cluster[rest]
        fitted = fit_decision(logit[rest], label[rest], target, "", one, together)
        decided.put(held, decide(logit[held], fitted, other))
    return decided


def _folds(stratum: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Deal the images of each stratum out to FOLDS folds. Returns int (n,)."""
    _, first, back = np.unique(image, return_index=True, return_inverse=True)
    fold = np.zeros(len(first), dtype=int)
    rng = np.random.default_rng(0)
    for value in np.unique(stratum):
        where = rng.permutation(np.flatnonzero(stratum[first] == value))
        fold[where] = (np.arange(len(where)) + rng.integers(FOLDS)) % FOLDS
    return fold[back]
