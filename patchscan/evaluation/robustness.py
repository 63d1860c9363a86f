"""Measure a detector's robustness: its AUC and detection rates on the same images under every disturbance."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pandas as pd

from patchscan.dataset.sources import SOURCE_COLUMNS
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import Card
from patchscan.evaluation.disturbances import disturbances
from patchscan.evaluation.results import seen_rows
from patchscan.evaluation.scoring import apply_decision, cluster_of, score_images, usable
from patchscan.reporting.statistics import auc_difference, auc_interval, proportion_among

UNDISTURBED = "undisturbed"
# How the rates are decided; cards whose rates were decided in another way are measured again.
RATES_RULE = "by tier"


def measure_robustness(
    detector: BaseDetector, card: Card, read: Callable[[str], bytes], images: pd.DataFrame
) -> dict[str, Any]:
    """Score `images` (columns path, generator, split, class, and those of `add_sources`) undisturbed and under every
    disturbance; `read` returns the encoded bytes of a path.

    Returns what the card stores: the digest of `card`, whose decision is used; the number of images; and one row per
    disturbance and group ('seen', 'unseen') with the AUC, its paired difference to the undisturbed AUC, and the
    detection rates at the threshold of the tier that each disturbed image looks like, as in serving.
    """

    def score(label: str, disturb: Callable[[bytes], bytes]) -> pd.DataFrame:
        task = f"robustness of {card.name}, {label}"
        scores = score_images(detector, lambda path: disturb(read(path)), images, task)
        return scores.assign(**{name: images[name].to_numpy() for name in SOURCE_COLUMNS})

    undisturbed = score(UNDISTURBED, lambda data: data)
    rows = _rows(card, UNDISTURBED, 0, UNDISTURBED, undisturbed, undisturbed)
    for kind in disturbances():
        rows += _rows(card, kind.family, kind.level, kind.label, score(kind.label, kind.disturb), undisturbed)
    return {"digest": card.digest, "images": len(images), "rows": rows}


def _rows(
    card: Card, family: str, level: float, label: str, table: pd.DataFrame, undisturbed: pd.DataFrame
) -> list[dict[str, Any]]:
    seen = seen_rows(card, table)
    good = usable(table) & usable(undisturbed)
    rows = []
    for group, inside in (("seen", seen & good), ("unseen", ~seen & good)):
        part, before = table[inside], undisturbed.logit[inside].to_numpy()
        if part.empty:
            continue
        truth, logit, cluster = part.label.to_numpy(), part.logit.to_numpy(), cluster_of(part)
        change = None if table is undisturbed else auc_difference(truth, logit, before, cluster)
        right = apply_decision(part, card.decision).measured_ai.to_numpy() == (truth == 1)
        rows.append(
            {
                "family": family,
                "level": level,
                "label": label,
                "group": group,
                "images": len(truth),
                "auc": asdict(auc_interval(truth, logit, cluster=cluster)),
                "auc_change": asdict(change) if change else None,
                "fake_detection": asdict(proportion_among(right, truth == 1, cluster)),
                "real_detection": asdict(proportion_among(right, truth == 0, cluster)),
            }
        )
    return rows
