"""Estimate the share of AI images in a bucket: the flagged share, corrected for the error rates on the model's card."""

import math
from dataclasses import dataclass
from typing import Any

from patchscan.detector.card import Card
from patchscan.reporting.statistics import NORMAL_QUANTILE

ASSUMPTIONS = (
    (
        "The detector's error rates on this bucket are those it showed on the images it was evaluated on; other "
        "content, other generators or other compression change them, and with them this estimate."
    ),
    (
        "The intervals count the evaluated images as independent; where several come from one source, they are too "
        "narrow."
    ),
    "Images without a score are left out; the estimate says nothing about images that are not in the bucket.",
)
ONLY_SEEN = (
    "The rates are of generators that the model was trained on. Of other generators' images it finds fewer, so the "
    "true share may lie above this range."
)


@dataclass(frozen=True)
class Rates:
    """Counts at the threshold on evaluated images: `found` of `ai` AI images and `flagged` of `real` real ones."""

    found: int
    ai: int
    flagged: int
    real: int

    @property
    def tpr(self) -> float:
        return self.found / self.ai

    @property
    def fpr(self) -> float:
        return self.flagged / self.real


def rogan_gladen(flagged: int, scored: int, rates: Rates) -> tuple[float, float, float] | None:
    """Return the true prevalence by the share of flagged images, with its 95 % interval, each within 0..1; None where
    nothing was scored, or where the detector's TPR is not above its FPR.

    Estimate: Rogan and Gladen, Am J Epidemiol 1978. Interval, which counts the uncertainty of TPR and FPR too: Lang and
    Reiczigel, Prev Vet Med 2014, equations 8 to 10.
    """
    if scored == 0 or rates.ai == 0 or rates.real == 0 or rates.tpr <= rates.fpr:
        return None
    point = (flagged / scored - rates.fpr) / (rates.tpr - rates.fpr)
    z = NORMAL_QUANTILE
    n = scored + z * z
    share = (flagged + z * z / 2) / n
    sensitivity, specificity = (rates.found + 1) / (rates.ai + 2), (rates.real - rates.flagged + 1) / (rates.real + 2)
    youden = sensitivity + specificity - 1
    if youden <= 0:
        # So few images were evaluated that the corrected rates are no better than chance: any share is possible.
        return _clip(point), 0.0, 1.0
    centre = (share + specificity - 1) / youden
    sensitivity_variance = sensitivity * (1 - sensitivity) / (rates.ai + 2)
    specificity_variance = specificity * (1 - specificity) / (rates.real + 2)
    shift = 2 * z * z * (centre * sensitivity_variance - (1 - centre) * specificity_variance)
    variance = share * (1 - share) / n + centre**2 * sensitivity_variance + (1 - centre) ** 2 * specificity_variance
    spread = math.sqrt(variance) / youden
    low, high = centre + shift - z * spread, centre + shift + z * spread
    return _clip(point), _clip(min(low, point)), _clip(max(high, point))


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


def measured_rates(card: Card) -> dict[str, Rates]:
    """Return the rates on the card: of `seen generators`, pooled, and of `worst unseen generator`, the one with the
    lowest TPR. Empty where the card has no metrics."""
    first: dict[str, Any] = next(iter(card.metrics.values()), {})
    metrics: dict[str, Any] = card.metrics.get(card.training.get("protocol", "raw")) or first
    by_kind: dict[str, list[Rates]] = {"seen": [], "unseen": []}
    for row in metrics.values():
        if row["kind"] in by_kind:
            counts = row["confusion"]
            ai, real = counts["true_ai"] + counts["missed_ai"], counts["true_real"] + counts["false_ai"]
            if ai and real:
                by_kind[row["kind"]].append(Rates(counts["true_ai"], ai, counts["false_ai"], real))
    rates = {}
    if seen := by_kind["seen"]:
        pooled = (sum(getattr(row, field) for row in seen) for field in ("found", "ai", "flagged", "real"))
        rates["seen generators"] = Rates(*pooled)
    if by_kind["unseen"]:
        rates["worst unseen generator"] = min(by_kind["unseen"], key=lambda row: row.tpr)
    return rates


def card_rates(card: Card) -> dict[str, dict[str, float]]:
    """Return the `tpr` and `fpr` of `measured_rates`, as reports show them."""
    return {name: {"tpr": rates.tpr, "fpr": rates.fpr} for name, rates in measured_rates(card).items()}


def estimate(flagged: int, scored: int, card: Card) -> dict[str, Any]:
    """Return, for the report, the estimate under each of the card's rates, the range that covers them all, and their
    assumptions. `flagged` counts p_ai at or over the threshold; like the rates, it ignores the abstain band."""
    cases: list[dict[str, Any]] = []
    measured = measured_rates(card)
    for name, rates in measured.items():
        found = rogan_gladen(flagged, scored, rates)
        value, low, high = found or (None, None, None)
        cases.append(
            {"rates": name, "tpr": rates.tpr, "fpr": rates.fpr, "share": {"value": value, "low": low, "high": high}}
        )
    bounds = [case["share"] for case in cases if case["share"]["value"] is not None]
    return {
        "flagged": flagged,
        "scored": scored,
        "raw_share": flagged / scored if scored else None,
        "cases": cases,
        "low": min((share["low"] for share in bounds), default=None),
        "high": max((share["high"] for share in bounds), default=None),
        "assumptions": [*([] if "worst unseen generator" in measured else [ONLY_SEEN]), *ASSUMPTIONS],
    }
