"""Judge likelihood ratios of a two-class question: their cost, what calibration could still save, and how far they
carry.

A likelihood ratio (LR) says how many times more probable a score is for an AI image than for a real one. All LRs here
are log10: 0 favours neither, 1 is ten to one for AI, -2 a hundred to one for real. Labels are 1 for AI, 0 for real.
`tests/golden/lir_answers.py` compares these functions with the Netherlands Forensic Institute's package `lir`.
"""

import numpy as np

LN10 = float(np.log(10))
ELUB_STEP = 0.01


def cllr(log10_lr: np.ndarray, label: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Return the log-likelihood-ratio cost in bits (Bruemmer and du Preez, Computer Speech and Language 2006): 0 for
    LRs that are always right and sure, 1 for LRs that say nothing; more than 1 misleads. Both classes weigh the same.

    log10_lr (n,), label (n,); `counts` (b, n): image i counts counts[:, i] times. Returns (b,), or (1,) without counts;
    NaN where a class is missing.
    """
    drawn = np.ones((1, len(label))) if counts is None else counts
    cost = np.logaddexp(0, np.where(label == 1, -log10_lr, log10_lr) * LN10) / np.log(2)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_class = [
            (drawn[:, label == one] @ cost[label == one]) / drawn[:, label == one].sum(axis=1) for one in (0, 1)
        ]
    result: np.ndarray = (by_class[0] + by_class[1]) / 2
    return result


def pav(log10_lr: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return the LRs that are best for these very images and keep their order (pool adjacent violators), log10 (n,),
    infinite at the ends. Both classes must be present. Their cost is Cllr-min, what better calibration cannot save."""
    from sklearn.isotonic import IsotonicRegression  # imported here because scans do not need it and it takes long

    weight = np.where(label == 1, 0.5 / (label == 1).sum(), 0.5 / (label == 0).sum())
    share = IsotonicRegression().fit_transform(log10_lr, label, sample_weight=weight)
    with np.errstate(divide="ignore"):
        result: np.ndarray = np.log10(share) - np.log10(1 - share)
    return result


def cross_entropy(log10_lr: np.ndarray, label: np.ndarray, log10_prior_odds: np.ndarray) -> np.ndarray:
    """Return the empirical cross-entropy in bits at each prior (Ramos and Gonzalez-Rodriguez, Forensic Science
    International 2013): how much is still unknown, on average, to somebody who held these odds for AI before the LR.
    log10_lr (n,), label (n,), log10_prior_odds (p,); returns (p,)."""
    odds = (log10_prior_odds[:, None] + log10_lr) * LN10  # (p, n)
    cost = np.logaddexp(0, np.where(label == 1, -odds, odds)) / np.log(2)
    prior = 1 / (1 + 10**-log10_prior_odds)
    result: np.ndarray = prior * cost[:, label == 1].mean(axis=1) + (1 - prior) * cost[:, label == 0].mean(axis=1)
    return result


def elub(log10_lr: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Return the empirical lower and upper bounds of the LRs, log10 (Vergeer et al., Science and Justice 2016, 56:482):
    beyond them, the LRs rest on extrapolation. They are the nearest to 0 where acting upon the LRs is no better than
    ignoring them, if one image of each class is added that misleads; at most log10 of the number of images plus one.

    log10_lr (n,), label (n,), both classes present.
    """
    ai, real = (np.sort(log10_lr[label == one]) for one in (1, 0))
    lowest = max(float(log10_lr.min()), -np.log10(len(ai) + 1))
    highest = min(float(log10_lr.max()), np.log10(len(real) + 1))
    first, last = min(0, int(lowest // ELUB_STEP)), max(0, int(highest // ELUB_STEP) + 1)
    threshold = np.linspace(first * ELUB_STEP, last * ELUB_STEP, last - first + 1)
    ai_above, real_above = (len(one) - np.searchsorted(one, threshold, side="right") for one in (ai, real))
    missed = 1 - ai_above / (len(ai) + 1)
    cost = missed + 10**threshold * (real_above + 1) / (len(real) + 1)
    worse = np.minimum(1, 10**threshold) < cost
    lower = float(np.max(threshold[worse & (threshold <= 0)] + ELUB_STEP, initial=threshold[0]))
    upper = float(np.min(threshold[worse & (threshold >= 0)] - ELUB_STEP, initial=threshold[-1]))
    return min(lower, 0.0), max(upper, 0.0)
