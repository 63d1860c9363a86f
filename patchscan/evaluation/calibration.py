"""From logits to decisions: temperature and bias, the threshold, the abstain band, and honest numbers for the images
that all of these were chosen on."""

from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy.special import expit

from patchscan.detector.card import Decision

FOLDS = 5
# Two implementations of the same exponential may differ in the last digits.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Target:
    """The error rates that a decision promises on images like the calibration set: of real images at most `max_fpr`
    are called `ai`, of AI images at most `max_fnr` are called `real`; what lies between is `uncertain`."""

    max_fpr: float = 0.05
    max_fnr: float = 0.05


def fit_temperature(logit: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Temperature and bias of p_ai = sigmoid(logit / temperature + bias), by maximum likelihood (Platt 1999, with his
    smoothed targets, so that perfectly separated data give finite values; Guo et al. 2017).

    Both classes weigh the same, so p_ai means the probability where half of the images are AI. logit (n,), label (n,)
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

    # Convex in slope and bias; the slope stays positive, because calibration must not turn the order round.
    best = optimize.minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(1e-3, 1e3), (-50, 50)])
    return float(unit / best.x[0]), float(best.x[1])


def conformal_bound(values: np.ndarray, share: float) -> float:
    """The bound that at most `share` of further values like these will reach, on average (split conformal prediction;
    Vovk et al. 2005): above the ceil((n + 1)(1 - share))-th smallest, half-way to the next greater value. With fewer
    than 1 / share - 1 values the promise cannot be kept and the bound lies just above all of them."""
    ordered = np.sort(values)
    rank = min(int(np.ceil((len(ordered) + 1) * (1 - share))), len(ordered))
    last = float(ordered[rank - 1])
    greater = ordered[ordered > last]
    just_above = max(float(np.nextafter(last, np.inf)), last + ROUNDING)
    return max(just_above, (last + float(greater[0])) / 2) if len(greater) else just_above


def fit_decision(logit: np.ndarray, label: np.ndarray, target: Target, basis: str) -> Decision:
    """The decision for these calibration images (logit (n,), label (n,), both classes present); `basis` says in words
    what they are and becomes part of `chosen_by`."""
    temperature, bias = fit_temperature(logit, label)
    p_ai = expit(logit / temperature + bias)
    real, ai = p_ai[label == 0], p_ai[label == 1]
    threshold = conformal_bound(real, target.max_fpr)
    low = min(threshold, -conformal_bound(-ai, target.max_fnr))
    short = [
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
        chosen_by="; ".join([text, *short]),
    )


@dataclass(frozen=True)
class Decided:
    """What decisions make of logits: `p_ai` float, `says_ai` (at the threshold, abstention set aside) and `uncertain`
    bool, all (n,)."""

    p_ai: np.ndarray
    says_ai: np.ndarray
    uncertain: np.ndarray


def decide(logit: np.ndarray, decision: Decision) -> Decided:
    """Apply one decision to logits (n,)."""
    p_ai = expit(logit / decision.temperature + decision.bias)
    uncertain = (decision.abstain_low <= p_ai) & (p_ai < decision.abstain_high)
    return Decided(p_ai, p_ai >= decision.threshold, uncertain)


def cross_fitted(logit: np.ndarray, label: np.ndarray, stratum: np.ndarray, target: Target) -> Decided:
    """Decide each calibration image by a decision fitted without it: FOLDS-fold, dealt out evenly within each stratum
    (n,). What is measured on the result is not flattered by having chosen the threshold on the same images. Where a
    class has fewer than 2 images there is nothing to leave out and everything is decided by one fit."""
    fold = np.zeros(len(logit), dtype=int)
    rng = np.random.default_rng(0)
    for value in np.unique(stratum):
        where = rng.permutation(np.flatnonzero(stratum == value))
        fold[where] = (np.arange(len(where)) + rng.integers(FOLDS)) % FOLDS
    p_ai, says_ai, uncertain = np.zeros(len(logit)), np.zeros(len(logit), bool), np.zeros(len(logit), bool)
    for number in range(FOLDS):
        held, rest = fold == number, fold != number
        if len(np.unique(label[rest])) < 2:
            rest = np.ones(len(logit), bool)
        decided = decide(logit[held], fit_decision(logit[rest], label[rest], target, "cross-fitting"))
        p_ai[held], says_ai[held], uncertain[held] = decided.p_ai, decided.says_ai, decided.uncertain
    return Decided(p_ai, says_ai, uncertain)
