"""Fit a decision to logits (temperature, bias, threshold, abstain band), and apply it.

Cross-fitting gives unbiased numbers for the images that the decision was fitted on.
"""

from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy.special import expit

from patchscan.detector.card import Decision

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
    best = optimize.minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(1e-3, 1e3), (-50, 50)])
    return float(unit / best.x[0]), float(best.x[1])


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


def fit_decision(logit: np.ndarray, label: np.ndarray, target: Target, basis: str) -> Decision:
    """Fit the decision to calibration images: logit (n,), label (n,), both classes present. `basis` describes the
    images in words and becomes part of `chosen_by`."""
    temperature, bias = fit_temperature(logit, label)
    p_ai = expit(logit / temperature + bias)
    real, ai = p_ai[label == 0], p_ai[label == 1]
    threshold = conformal_bound(real, target.max_fpr)
    low = min(threshold, -conformal_bound(-ai, target.max_fnr))
    shortfalls = [
        f"{len(values)} {name} images are too few to promise {share:.1%}"
        for name, values, share in (("real", real, target.max_fpr), ("AI", ai, target.max_fnr))
        if len(values) < 1 / share - 1
    ]
    text = (
        f"temperature and bias by maximum likelihood, threshold at a false-positive rate of {target.max_fpr:.1%}, "
        f"'real' only where at most {target.max_fnr:.1%} of AI images score as low, on {basis}"
    )
    return Decision(
        temperature=temperature,
        bias=bias,
        threshold=threshold,
        abstain_low=low,
        abstain_high=threshold,
        chosen_by="; ".join([text, *shortfalls]),
    )


@dataclass(frozen=True)
class Decided:
    """The results of applying a decision to logits, all (n,): `p_ai` float; `says_ai` bool, p_ai is at or above the
    threshold; `uncertain` bool, p_ai is in the abstain band."""

    p_ai: np.ndarray
    says_ai: np.ndarray
    uncertain: np.ndarray


def decide(logit: np.ndarray, decision: Decision) -> Decided:
    """Apply one decision to logits (n,)."""
    p_ai = expit(logit / decision.temperature + decision.bias)
    uncertain = (decision.abstain_low <= p_ai) & (p_ai < decision.abstain_high)
    return Decided(p_ai, p_ai >= decision.threshold, uncertain)


def cross_fitted(logit: np.ndarray, label: np.ndarray, stratum: np.ndarray, target: Target) -> Decided:
    """Apply to each calibration image a decision that was fitted without it, so that metrics of the result are not
    biased by choosing the threshold on the same images.

    Cross-fitting uses FOLDS folds, balanced within each stratum (n,). If a fold would leave out a whole class, one
    decision is fitted to all images instead.
    """
    fold = np.zeros(len(logit), dtype=int)
    rng = np.random.default_rng(0)
    for value in np.unique(stratum):
        where = rng.permutation(np.flatnonzero(stratum == value))
        fold[where] = (np.arange(len(where)) + rng.integers(FOLDS)) % FOLDS
    p_ai, says_ai, uncertain = np.zeros(len(logit)), np.zeros(len(logit), bool), np.zeros(len(logit), bool)
    for number in range(FOLDS):
        held_out, fitted = fold == number, fold != number
        if len(np.unique(label[fitted])) < 2:
            fitted = np.ones(len(logit), bool)
        decided = decide(logit[held_out], fit_decision(logit[fitted], label[fitted], target, "cross-fitting"))
        p_ai[held_out], says_ai[held_out], uncertain[held_out] = decided.p_ai, decided.says_ai, decided.uncertain
    return Decided(p_ai, says_ai, uncertain)
